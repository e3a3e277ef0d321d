# %% [markdown]
# # A first training
#
# scikit-learn ships 1,797 handwritten digits of 8 by 8 pixels. We train a small convolutional network on them and
# look at what it learned and at what it did not. Everything that influences the training is in three values: a
# *state*, a *step* and the *data*. So the last line of this notebook, a digest over every tensor of the trained
# state, is the same on your machine. `ps.bits.portable()` sees to that: it comes before the first tensor, and
# pins torch's kernels to those that compute alike on every x86-64 processor.

# %%
import shutil

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
shutil.rmtree("runs/first", ignore_errors=True)  # a run directory that is there is continued; this run begins anew

# %% [markdown]
# ## The data
#
# A data set is a dictionary of arrays, with samples along the first dim. Every fifth image is held out.

# %%
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # (1797, 1, 8, 8), from 0 to 1
labels = torch.tensor(digits.target)
held = torch.arange(len(images)) % 5 == 0
train_set = {"image": images[~held], "label": labels[~held]}
val_set = {"image": images[held], "label": labels[held]}

figure, axes = plt.subplots(2, 14, figsize=(8, 1.5), layout="constrained")
for axis, image, label in zip(axes.flat, train_set["image"], train_set["label"], strict=False):
    axis.imshow(image[0], cmap="gray_r")
    axis.set_title(int(label), fontsize=8, pad=2)
    axis.axis("off")

# %% [markdown]
# `ps.data.batches` makes batches of it. It is a value: it says which samples batch 7 of epoch 3 holds, and
# remembers no position. Each image is moved by up to a pixel, by an amount drawn from a key that the sample gets.


# %%
def shift(sample, key):
    down, right = ps.random.randint(key, (2,), 0, 3).tolist()
    padded = nn.functional.pad(sample["image"], (1, 1, 1, 1))
    return {**sample, "image": padded[:, down : down + 8, right : right + 8]}


train = ps.data.batches(train_set, 64, seed=0, transform=shift)
val = ps.data.batches(val_set, 360, shuffle=False, drop_last=False)
train

# %% [markdown]
# ## State and step
#
# The model is an ordinary `nn.Module`. The loss function is handed the model and a batch, and returns the loss
# and what else is to be measured.


# %%
def make_model():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10)),
    )


def loss_fn(net, batch):
    logits = net(batch["image"])
    return cross_entropy(logits, batch["label"]), {"accuracy": ps.metrics.accuracy(logits, batch["label"])}


# %% [markdown]
# `ps.init` makes the first state: parameters, buffers of the batch norms, state of the optimizer, a random key
# and a counter, in one frozen value. `ps.make_step` makes the step, a pure function from a state and a batch to a
# new state and metrics. Calling it twice gives the same bits twice, dropout included, and the first state stays
# as it was.

# %%
epochs = 12
schedule = ps.optim.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=44, decay_steps=epochs * len(train))
tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(schedule, weight_decay=0.05))
state = ps.init(make_model, tx, seed=0)
step = ps.make_step(loss_fn, tx)

batch = next(iter(train.open(0, 0, None)))
before = ps.digest(state)
one, metrics = step(state, batch)
again, _ = step(state, batch)
print("twice the same bits:", ps.digest(one) == ps.digest(again), "  the input unchanged:", ps.digest(state) == before)
print("loss", float(metrics["loss"]))

# %% [markdown]
# ## The run
#
# `ps.fit` calls the step in a loop. What else a run should do is a list of callbacks; here it evaluates after
# each epoch and keeps the best snapshot and the last one. Metrics go to a CSV file in the run directory.

# %%
result = ps.fit(
    step,
    state,
    train,
    until=ps.epochs(epochs),
    run_dir="runs/first",
    callbacks=[
        ps.callbacks.log(every=ps.every.steps(2)),
        ps.callbacks.evaluate(loss_fn, val, every=ps.every.epoch()),
        ps.callbacks.snapshots(every=ps.every.epoch(), keep=ps.snapshot.best("val/loss", 1) | ps.snapshot.latest(1)),
    ],
)
print(f"{result.reason}: held-out accuracy {result.metrics['val/accuracy']:.2%}")

# %% [markdown]
# ## What it learned
#
# The run directory is data. `ps.open` reads the log as columns and restores a snapshot, verified; here that of
# the smallest held-out loss. `ps.apply` calls the model as a function of the tensors in a state.

# %%
run = ps.open("runs/first")
best = run.state(state, best="val/loss")
logits, _ = ps.apply(best.model, best.params, best.buffers, val_set["image"], train=False)
probability, answer = logits.softmax(1).max(1)
wrong = (answer != val_set["label"]).nonzero()[:, 0]
print(f"snapshots {run.snapshots}; the best is of step {int(best.step)}")
print(f"{len(wrong)} of {len(answer)} held-out digits are misread: {1 - len(wrong) / len(answer):.2%} are right")

# %% [markdown]
# Left: the loss of the training batches, their mean over each epoch, and the held-out loss, which is lower
# because dropout and shifts are off. Middle: the label against the answer. Right: every misread digit, with its
# label and the answer.

# %% tags=["picture=docs/first_training.png"]
figure = plt.figure(figsize=(9.6, 2.9), layout="constrained")
left, middle, right = figure.subfigures(1, 3, width_ratios=[1.15, 0.85, 1])

axis = left.subplots()
log = run.metrics
per_epoch = len(train)
axis.plot([s / per_epoch for s in log["step"]], log["train/loss"], color="#0072B2", alpha=0.35, linewidth=0.9)
for name, label, colour in [("train/loss_epoch", "training", "#0072B2"), ("val/loss", "held out", "#D55E00")]:
    points = [
        (step / per_epoch, value) for step, value in zip(log["step"], log[name], strict=True) if value is not None
    ]
    axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.4, label=label)
axis.set(yscale="log", xlabel="epoch", title="loss")
axis.grid(alpha=0.25)
axis.legend(frameon=False)

axis = middle.subplots()
counts = ps.metrics.confusion(logits, val_set["label"]).counts
axis.imshow(counts.sqrt(), cmap="Blues")
for row, column in counts.nonzero().tolist():
    colour = "white" if row == column else "#D55E00"
    axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
axis.set(xticks=range(10), yticks=range(10), xlabel="answer", ylabel="label", title="confusion")
axis.spines[:].set_visible(False)
axis.tick_params(length=0)

axes = right.subplots(2, 4)
right.suptitle(f"misread: {len(wrong)} of {len(answer)}", fontsize=11)
for axis in axes.flat:
    axis.axis("off")
for axis, index in zip(axes.flat, wrong.tolist(), strict=False):
    axis.imshow(val_set["image"][index, 0], cmap="gray_r")
    axis.set_title(f"{int(val_set['label'][index])}, read as {int(answer[index])}", fontsize=8)

# %% [markdown]
# ## The digest
#
# One hash over every tensor of the last state: parameters, buffers, both moments of Adam, key and counter. If
# yours is another one, the machine computed something else, and notebook 7 says how to find out what.

# %%
print("digest", ps.digest(result.state))
