# %% [markdown]
# # Two runs that should be the same
#
# A colleague runs your training and gets another number. Somewhere the two runs part: in the data, in the code,
# or in the machine. We make one run, then three others that each differ from it in one small thing, and let
# `compare`, `bisect`, `verify` and `trace_bits` find out what it was.

# %%
import os
import shutil
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from IPython.utils.capture import capture_output
from torch import nn

import purestep as ps

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
shutil.rmtree("runs/twins", ignore_errors=True)  # a run directory that is there would be continued

# %% [markdown]
# The training: how diabetes of 442 patients proceeds within a year, from ten measurements of each. The loss keeps
# the mean square of the activations near one. `patient` adds a thousandth to one measurement of one patient. The
# file is what two colleagues share.

# %%
# %%writefile diabetes_experiment.py
import torch
from sklearn.datasets import load_diabetes
from torch import nn

import purestep as ps


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.body = nn.Linear(10, 512)
        self.activation = activation
        self.head = nn.Linear(512, 1)

    def forward(self, x):
        hidden = self.activation(self.body(x))
        return self.head(hidden)[:, 0], hidden


def loss_fn(net, batch):
    predicted, hidden = net(batch["x"])
    energy = hidden.square().mean()  # one sum over 56,320 numbers
    return (predicted - batch["y"]).square().mean() + 0.1 * (energy - 1).square()


def build(patient, activation):
    x, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    if patient is not None:
        x[patient, 2] += 1e-3
    tx = ps.optim.adam(1e-3)
    log = ps.callbacks.log(every=ps.every.steps(1))
    saving = ps.callbacks.snapshots(every=ps.every.epoch(), keep=ps.snapshot.all_())
    state = ps.init(lambda: Net(activation), tx, seed=0)
    data = ps.data.batches({"x": x, "y": y}, 110, seed=0)
    return ps.Experiment(ps.make_step(loss_fn, tx), state, data, until=ps.epochs(10), callbacks=[log, saving])


@ps.experiment
def diabetes(patient=None):
    return build(patient, nn.GELU())


# %%
import diabetes_experiment as on

first = on.diabetes().fit(run_dir="runs/twins/first")
print(first.reason, ps.digest(first.state)[:16])

# %% [markdown]
# ## A changed sample
#
# `compare` reads what both runs recorded and executes nothing: settings, environment, logs, digests.

# %%
with capture_output():
    on.diabetes(patient=229).fit(run_dir="runs/twins/sample")
ps.compare("runs/twins/first", "runs/twins/sample")

# %% [markdown]
# Had the setting not been recorded, the logs would still part somewhere. `bisect` executes both again from the
# last position at which they are equal, and looks at what goes into each step and at what comes out.

# %%
found = ps.bisect("runs/twins/first", "runs/twins/sample", on.diabetes)
found

# %% [markdown]
# `found.batch.samples` names patient 229. `found.operation()` executes that one step again in both, and compares
# what each operation of torch reads and returns.

# %%
found.operation()

# %% [markdown]
# ## A changed line of code
#
# The colleague's GELU is the approximation by tanh, as in GPT-2. Each run is now executed with its own code.


# %%
@ps.experiment
def edited(patient=None):
    return on.build(patient, nn.GELU(approximate="tanh"))


with capture_output():
    edited().fit(run_dir="runs/twins/line")
found = ps.bisect("runs/twins/first", "runs/twins/line", on.diabetes, edited)
display(found, found.operation())

# %% [markdown]
# ## Another number of threads
#
# The same file, executed by a process with two threads.

# %%
code = "import diabetes_experiment as on; on.diabetes().fit(run_dir='runs/twins/threads')"
two = {**os.environ, "PURESTEP_BITS": "portable:2"}
subprocess.run([sys.executable, "-c", code], env=two, check=True)
ps.compare("runs/twins/first", "runs/twins/threads")

# %% [markdown]
# `bisect` executes both here, with one thread, and both come out alike, though what they recorded is not. So the
# cause is not in what was executed but in where. `verify` executes each span of one run again, compares with the
# digests in its snapshots, and names the run that computes otherwise here.

# %%
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    display(ps.bisect("runs/twins/first", "runs/twins/threads", on.diabetes))
    display(ps.verify("runs/twins/threads", on.diabetes))
print(said[0].message)

# %% [markdown]
# ## Which operation?
#
# What differs is the machine, or here its number of threads, so each has to trace the step itself. A trace is a
# file; it can be carried from one machine to another, and reading it executes nothing.

# %%
trace = """
import purestep as ps
import diabetes_experiment as on

experiment = on.diabetes()
batch = next(iter(experiment.data.open(0, 0, None)))
ps.trace_bits(experiment.step, experiment.state, batch, file, values=True)
"""
exec(trace, {"file": "one.bits"})
subprocess.run([sys.executable, "-c", "file = 'two.bits'" + trace], env=two, check=True)
ps.compare_bits("one.bits", "two.bits")

# %% [markdown]
# ## How far they part
#
# One thousandth in one of 4,420 numbers, one word in one line, one more thread: this is how far each moves the
# weights away from those of the first run.


# %%
def weights(name):
    run = ps.open(f"runs/twins/{name}")
    return run.snapshots, [run.state(first.state, step=step).params for step in run.snapshots]


figure, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
steps, reference = weights("first")
for name, label, colour in (
    ("line", "one word in a line", "#D55E00"),
    ("sample", "a thousandth in a sample", "#0072B2"),
    ("threads", "one more thread", "#009E73"),
):
    _, other = weights(name)
    away = [sum((a[n] - b[n]).double().square().sum() for n in a).sqrt() for a, b in zip(reference, other, strict=True)]
    axis.plot(steps, away, "o-", color=colour, markersize=3.5, label=label)
axis.set(xlabel="step", ylabel="distance of the weights", yscale="log")
axis.grid(alpha=0.25)
_ = axis.legend(frameon=False)

# %%
print("digest", ps.digest(first.state))
