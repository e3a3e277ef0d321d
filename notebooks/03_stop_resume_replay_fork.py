# %% [markdown]
# # Stop, kill, resume, replay, fork
#
# A training is deterministic here, so a run directory is more than a log: any step of it can be computed again,
# with the bits that it had. We interrupt a run in two ways and see that nothing was lost. Then its loss jumps
# late in the training, where everything seemed settled. We go back to that moment, look at what was never logged,
# and let the run go on differently from just before it.

# %%
import shutil
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import torch
from IPython.utils.capture import capture_output
from torch.nn.functional import cross_entropy

import purestep as ps

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
shutil.rmtree("runs/spike", ignore_errors=True)  # a run directory that is there would be continued

# %% [markdown]
# ## An experiment
#
# What `fit` is called with, in a function under `@ps.experiment`: its arguments are the settings of a run, and
# are recorded in it. It is in a file, because another process will import it.

# %%
# %%writefile digits_experiment.py
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps


def make_model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def loss_fn(net, batch):
    return cross_entropy(net(batch["x"]), batch["y"])


@ps.experiment
def digits(lr=0.35, seed=2):
    x, y = load_digits(return_X_y=True)
    train = torch.arange(len(x)) % 5 > 0
    x, y = torch.tensor(x, dtype=torch.float32)[train] / 16, torch.tensor(y)[train]
    tx = ps.optim.sgd(lr, momentum=0.9)
    log = ps.callbacks.log(every=ps.every.steps(1))
    saving = ps.callbacks.snapshots(every=ps.every.epoch(), keep=ps.snapshot.all_())
    return ps.Experiment(
        ps.make_step(loss_fn, tx),
        ps.init(make_model, tx, seed=seed),
        ps.data.batches({"x": x, "y": y}, 64, seed=seed),
        until=ps.epochs(25),
        callbacks=[log, saving],
    )


# %% [markdown]
# ## Stopped, killed, and the same bits
#
# One run goes straight through its 550 steps.

# %%
import digits_experiment as on

straight = on.digits().fit(run_dir="runs/spike/straight")
print(straight.reason, ps.digest(straight.state)[:16])

# %% [markdown]
# The other one stops after 100 steps. Then a process of its own continues it, until it has written two more
# snapshots and is killed with signal 9 by the notebook, at whatever it does then. What is left on the disk is a
# run that is not finished.

# %%
with capture_output():
    on.digits().fit(run_dir="runs/spike/killed", until=ps.steps(100))

before = len(ps.open("runs/spike/killed").snapshots)
code = "import digits_experiment as on; on.digits().fit(run_dir='runs/spike/killed')"
child = subprocess.Popen([sys.executable, "-c", code])
while len(ps.open("runs/spike/killed").snapshots) < before + 2:
    assert child.poll() is None, "it ended by itself"
    time.sleep(0.05)
child.kill()
print("exit code", child.wait(), " the run:", ps.open("runs/spike/killed").why)

# %% [markdown]
# The same call once more. It finds the newest intact snapshot and goes on to the end: a run of three processes,
# one of them dead, with the bits of the run of one.

# %%
resumed = on.digits().fit(run_dir="runs/spike/killed")
assert ps.digest(resumed.state) == ps.digest(straight.state)
print(resumed.reason, ps.digest(resumed.state)[:16])

# %% [markdown]
# ## Something happened
#
# The loss falls for 500 steps, and jumps.

# %%
run = ps.open("runs/spike/straight")
loss = torch.tensor(run.metrics["train/loss"])
worst = int(loss[300:].argmax()) + 301  # the first row is step 1

figure, axis = plt.subplots(figsize=(8.4, 2.4), layout="constrained")
axis.plot(range(1, len(loss) + 1), loss, color="#0072B2", linewidth=0.9)
axis.annotate(
    f"step {worst}: {loss[worst - 1]:.2f}",
    (worst, loss[worst - 1]),
    (worst - 110, 1.6),
    arrowprops={"arrowstyle": "->"},
)
axis.set(xlabel="step", ylabel="loss of the batch")
axis.grid(alpha=0.25)

# %% [markdown]
# ## Replay
#
# `ps.replay` computes a span of the run again, from the snapshot before it, and hands over each step: batch,
# indices of its samples, state, metrics. What the log lacks can be measured now: how far each step moves the
# weights, and which sample of its batch has the largest loss.

# %%
rows, before = [], None
for r in ps.replay(run, on.digits, worst - 25, worst + 15):
    if before is not None:
        logits, _ = ps.apply(before.model, before.params, {}, r.data["x"])
        losses = cross_entropy(logits, r.data["y"], reduction="none")
        hard = int(losses.argmax())
        rows.append(
            {
                "step": r.position,
                "loss": r.metrics["loss"],
                "moved": float(sum((p - before.params[n]).square().sum() for n, p in r.state.params.items()).sqrt()),
                "hardest": float(losses[hard]),
                "sample": int(r.indices[hard]),
                "image": r.data["x"][hard].reshape(8, 8),
                "title": f"{int(r.data['y'][hard])}, read as {int(logits[hard].argmax())}",
            }
        )
    before = r.state

for row in rows[16:25]:
    text = "step {step}: loss {loss:.3f}, of sample {sample:4} alone {hardest:5.2f}, weights moved {moved:.2f}"
    print(text.format(**row))
same = [row["loss"] for row in rows] == [float(loss[row["step"] - 1]) for row in rows]
print("the losses are those of the log, to the last bit:", same)

# %% [markdown]
# So this is how it came. At step 499 arrives a 2 that the network takes for a 7: its loss alone is 22.4, and with
# a learning rate of 0.35 the step moves the weights twice as far as usual. Momentum carries them on. At 502 a 3
# adds to it, and for two steps the loss looks harmless. At 505 the weights are somewhere else, where other digits
# are wrong, and so on.

# %%
chosen = [row for row in rows if row["step"] in (499, 502, 505, 508, 509, 510)]
figure, axes = plt.subplot_mosaic("aabcd;eefgh", figsize=(9, 3.4), width_ratios=[2, 2, 1, 1, 1], layout="constrained")
for name, key, label, colour in [
    ("a", "loss", "loss of the batch", "#0072B2"),
    ("e", "moved", "weights moved", "#009E73"),
]:
    axes[name].plot(
        [row["step"] for row in rows], [row[key] for row in rows], "o-", color=colour, markersize=3, linewidth=1
    )
    axes[name].plot([row["step"] for row in chosen], [row[key] for row in chosen], "o", color="#D55E00", markersize=4)
    axes[name].set(ylabel=label, ylim=(0, None))
    axes[name].grid(alpha=0.25)
axes["e"].set_xlabel("step")
for name, row in zip("bcdfgh", chosen, strict=True):
    axes[name].imshow(row["image"], cmap="gray_r")
    axes[name].set_title(f"{row['title']}\nstep {row['step']}, loss {row['hardest']:.1f}", fontsize=8)
    axes[name].axis("off")

# %% [markdown]
# ## Fork
#
# What if the learning rate had been lower from just before that step? `ps.fork` makes a run directory that begins
# where the other was at step 498, momentum and position in the data included. There is no snapshot at 498, so it
# computes the steps from 484 again. Then the run goes on in it with what we change.

# %%
with capture_output():
    for lr in (0.2, 0.1, 0.05):
        child = ps.fork(run, at=498, run_dir=f"runs/spike/lr {lr}", experiment=on.digits)
        on.digits(lr).fit(run_dir=child.path)
table = ps.runs("runs/spike")
table

# %%
figure, axis = plt.subplots(figsize=(8.4, 2.8), layout="constrained")
colours = {0.35: "#0072B2", 0.2: "#E69F00", 0.1: "#D55E00", 0.05: "#009E73"}
for one in table.filter(lambda one: one.name != "killed").sort("lr", reverse=True):
    log = ps.open(one.path).metrics
    pairs = [(step, value) for step, value in zip(log["step"], log["train/loss"], strict=True) if step >= 480]
    axis.plot(
        *zip(*pairs, strict=True),
        color=colours[one.settings["lr"]],
        linewidth=1.3,
        label=f"learning rate {one.settings['lr']}",
    )
axis.axvline(498, color="black", linewidth=0.6, linestyle=":")
axis.set(xlabel="step", ylabel="loss of the batch", yscale="log", ylim=(8e-4, 12))
axis.set_title("the run, and three forks at step 498")
axis.grid(alpha=0.25)
_ = axis.legend(frameon=False, ncols=4, loc="upper left", fontsize=8)

# %% [markdown]
# All four curves are one until step 498: the log of the parent up to there belongs to each fork. A fork is a run
# like any other, and its digest is on your machine what it is here.

# %%
print("parent ", run.digest)
print("fork at", child.digest)
print("digest ", ps.open(child.path).digest)
