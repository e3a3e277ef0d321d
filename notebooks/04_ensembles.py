# %% [markdown]
# # Ensembles, sweeps and hypergradients
#
# A training step is a pure function, so it can be *mapped* and *differentiated* like any other. Three things
# follow, in a few lines each:
#
# 1. an **ensemble** of 16 networks that trains in one step, and knows better when it does not know;
# 2. a **sweep** of 160 trainings, again in one step;
# 3. the **hypergradient**: how the held-out loss *after* a training depends on the learning rate and the weight
#    decay *of* that training, by one backward pass through all of it.

# %%
import itertools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, mse_loss, one_hot

import purestep as ps

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "axes.titlelocation": "left"})

# %% [markdown]
# ## An ensemble is one state
#
# 300 handwritten digits to learn from, the other 1,497 to be judged by, and a network that is deeper than so few
# images warrant.

# %%
digits = load_digits()
order = ps.random.permutation(ps.random.key(0), len(digits.target))
images = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
labels = torch.tensor(digits.target)[order]
few = {"x": images[:300], "y": labels[:300]}
rest = {"x": images[300:], "y": labels[300:]}


def make_model():
    widths = [64] * 5
    hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Dropout(0.05), nn.Linear(64, 10))


def loss_fn(net, batch):
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


tx = ps.optim.adam(1e-2)
step = ps.make_step(loss_fn, tx)
train = ps.data.batches(few, 50, seed=0)

# %% [markdown]
# Sixteen states of one architecture have one structure. Stacked leaf by leaf they are again *one* state, whose
# leaves have a new first dim, and `torch.vmap(step)` advances it. Each member draws its own dropout masks from its
# own key. What `fit` takes is a function `(state, batch) -> (state, metrics)`, whose metrics are numbers; this is
# one, and it can be logged, saved and resumed like any other.

# %%
members = [ps.init(make_model, tx, seed=seed) for seed in range(16)]
ensemble = ps.tree.map(lambda *leaves: torch.stack(leaves), *members)


def ensemble_step(states, batch):
    states, metrics = torch.vmap(step, in_dims=(0, None))(states, batch)
    losses = metrics["loss"].compute()
    return states, {"loss": losses.mean(), "spread": losses.std()}


trained = ps.fit(ensemble_step, ensemble, train, until=ps.epochs(30)).state
print("weights of the first layer:", tuple(trained.params["1.0.weight"].shape))
print("updates of each member:    ", trained.step.tolist())

# %% [markdown]
# Is member 5 what it would have become by itself? In general to rounding, as batched kernels may add in another
# order; here to the bit.

# %%
alone = ps.fit(step, members[5], train, until=ps.epochs(30)).state
member = ps.tree.map(lambda leaf: leaf[5], trained)
largest = max((alone.params[name] - member.params[name]).abs().max() for name in alone.params)
print(f"largest difference of a weight: {largest:.0e}; equal digests: {ps.digest(alone) == ps.digest(member)}")

# %% [markdown]
# ## What an ensemble knows that a net does not
#
# An evaluation can be mapped, too. We ask two questions. *Is it calibrated*: of the digits it is 70 % sure of, does
# it get 70 % right? And what happens off the training data: we turn the digits, little by little, upside down. The
# uncertainty of the ensemble, the entropy of its mean prediction, has two parts: the mean entropy of its members,
# and what they disagree about.


# %%
def probabilities(state, x):
    logits, _ = ps.apply(state.model, state.params, state.buffers, x, train=False)
    return logits.softmax(-1)


def turned(x, degrees):
    angle = torch.deg2rad(torch.tensor(degrees))
    rotation = torch.stack([angle.cos(), -angle.sin(), angle * 0, angle.sin(), angle.cos(), angle * 0]).view(1, 2, 3)
    grid = affine_grid(rotation.expand(len(x), 2, 3), [len(x), 1, 8, 8], align_corners=False)
    return grid_sample(x[:, None], grid, align_corners=False)[:, 0]


def entropy(p):
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


def calibration(p, y, bins=10):
    """Return confidence and accuracy by bins with as many samples each, and the expected calibration error."""
    sure, guess = p.max(-1)
    parts = sure.argsort().chunk(bins)
    confidence = torch.stack([sure[part].mean() for part in parts])
    accuracy = torch.stack([(guess[part] == y[part]).float().mean() for part in parts])
    return confidence, accuracy, (confidence - accuracy).abs().mean().item()


by_member = torch.vmap(probabilities, in_dims=(0, None))(trained, rest["x"])  # [16, 1497, 10]
together = by_member.mean(0)
angles = list(range(0, 181, 15))
turns = [torch.vmap(probabilities, in_dims=(0, None))(trained, turned(rest["x"], float(a))) for a in angles]

for name, p in {"a net (the mean of 16)": by_member, "the ensemble": together[None]}.items():
    right = (p.argmax(-1) == rest["y"]).float().mean()
    nll = -(p * one_hot(rest["y"], 10)).sum(-1).log().mean()
    error = sum(calibration(q, rest["y"])[2] for q in p) / len(p)
    print(f"{name:<24} accuracy {right:.1%}   negative log likelihood {nll:.3f}   calibration error {error:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.plot([0.3, 1], [0.3, 1], color="0.6", lw=1, ls="--")
for p in by_member:
    left.plot(*calibration(p, rest["y"])[:2], color="tab:blue", alpha=0.3, lw=1)
left.plot([], [], color="tab:blue", alpha=0.6, label="one net (16 of them)")
left.plot(*calibration(together, rest["y"])[:2], color="tab:red", marker="o", lw=2, label="their ensemble")
left.set(xlabel="how sure it is", ylabel="how often it is right", title="Calibration on digits never seen")
left.legend(loc="upper left")

total = torch.stack([entropy(p.mean(0)).mean() for p in turns])
within = torch.stack([entropy(p).mean() for p in turns])
wrong = [(p.mean(0).argmax(-1) != rest["y"]).float().mean() for p in turns]
right.fill_between(angles, 0, within, color="tab:blue", alpha=0.35, lw=0, label="what each member is unsure of")
right.fill_between(angles, within, total, color="tab:red", alpha=0.45, lw=0, label="what the members disagree about")
right.plot(angles, wrong, color="black", lw=1.5, label="share of wrong answers")
right.set(xlabel="digits turned by [degrees]", ylabel="entropy [nats]", title="Uncertainty off the training data")
right.set(xticks=angles[::2], ylim=(0, 1.45))
right.legend(loc="upper left")
figure.tight_layout()
plt.show()

# %% [markdown]
# On upright digits the members mostly agree; the more the digits are turned, the more they part. The red band is
# what no single network can report. It is no cure: at 90 degrees even the ensemble is far too sure of answers that
# are mostly wrong.
#
# ## A sweep is one step
#
# Hyperparameters that `inject_hyperparams` keeps are tensors in the optimizer state, so a training can be mapped
# over them as well as over seeds. Nesting `vmap` trains the whole table, 32 learning rates by 5 seeds, on the 178
# wines of scikit-learn: 160 trainings of 100 full-batch steps.

# %%
wine = load_wine()
shuffled = ps.random.permutation(ps.random.key(1), len(wine.target))
features = torch.tensor((wine.data - wine.data.mean(0)) / wine.data.std(0), dtype=torch.float32)[shuffled]
kinds = torch.tensor(wine.target)[shuffled]
learn, judge = {"x": features[:90], "y": kinds[:90]}, {"x": features[90:], "y": kinds[90:]}

sgd = ps.optim.inject_hyperparams(ps.optim.sgd)(learning_rate=0.1, momentum=0.9)
sgd_step, evaluate = ps.make_step(loss_fn, sgd), ps.make_eval(loss_fn)


def training(rate, state):
    """The held-out loss along one training."""
    state, losses = ps.optim.set(state, learning_rate=rate), []
    for k in range(100):
        state, _ = sgd_step(state, learn)
        if k % 10 == 9:
            losses.append(evaluate(state, judge)["loss"].compute())
    return torch.stack(losses)


def make_wine():
    return nn.Sequential(nn.Linear(13, 32), nn.Tanh(), nn.Linear(32, 3))


rates = torch.logspace(-4, 1.5, 32)
seeds = ps.tree.map(lambda *leaves: torch.stack(leaves), *[ps.init(make_wine, sgd, seed=s) for s in range(5)])
over_seeds = torch.vmap(training, in_dims=(None, 0))
curves = torch.vmap(over_seeds, in_dims=(0, None))(rates, seeds)  # [rate, seed, time]
best = int(curves[..., -1].mean(1).argmin())
print(f"{curves[..., 0].numel()} trainings; the best learning rate is {rates[best]:.2g}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.8))
colours = plt.get_cmap("viridis_r")
for k in (0, 1, 2, 4, 9):
    mean = curves[:, :, k].mean(1)
    axes.plot(rates, mean, color=colours(0.1 + 0.1 * k), lw=1.8, label=f"after {10 * (k + 1)} steps")
    low, high = curves[:, :, k].amin(1), curves[:, :, k].amax(1)
    axes.fill_between(rates, low, high, color=colours(0.1 + 0.1 * k), alpha=0.15, lw=0)
axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss", ylim=(0.02, 20))
axes.set_title("160 trainings in one vmapped step (bands: 5 seeds)")
axes.legend(ncols=2, loc="upper left")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Differentiating a training
#
# Inside of `torch.func.grad` a step detaches nothing. So the held-out loss after 60 steps of AdamW is a
# differentiable function of the learning rate and the weight decay of these steps. 40 of scikit-learn's diabetes
# patients are few enough to overfit, and the precision policy `64` makes the comparison with finite differences a
# sharp one.

# %%
diabetes = load_diabetes()
shuffled = ps.random.permutation(ps.random.key(2), len(diabetes.target))
patients = torch.tensor(diabetes.data / diabetes.data.std(0))[shuffled]
progress = torch.tensor((diabetes.target - diabetes.target.mean()) / diabetes.target.std())[shuffled, None]
few_patients = {"x": patients[:40], "y": progress[:40]}
many_patients = {"x": patients[40:], "y": progress[40:]}

adamw = ps.optim.inject_hyperparams(ps.optim.adamw)(learning_rate=0.01, weight_decay=0.1)
double = ps.precision.policy("64")


def squared_error(net, batch):
    return mse_loss(net(batch["x"]), batch["y"])


def make_regression():
    return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))


start = double.apply(ps.init(make_regression, adamw, seed=0))
adamw_step = ps.make_step(squared_error, adamw, policy=double)
held_out = ps.make_eval(squared_error, policy=double)


def after_training(h):
    """The held-out loss after 60 steps, by the logarithms of learning rate and weight decay."""
    state = ps.optim.set(start, learning_rate=h[0].exp(), weight_decay=h[1].exp())
    for _ in range(60):
        state, _ = adamw_step(state, few_patients)
    return held_out(state, many_patients)["loss"].compute()


h = torch.tensor([0.02, 0.5], dtype=torch.float64).log()
slope = torch.func.grad(after_training)(h)
shifts = 1e-5 * torch.eye(2, dtype=torch.float64)
differences = [(after_training(h + e) - after_training(h - e)) / 2e-5 for e in shifts]
for name, exact, measured in zip(("log learning rate", "log weight decay"), slope, differences, strict=True):
    print(f"d loss / d {name:<18} by backward pass {exact:+.6f}   by finite differences {measured:+.6f}")

# %% [markdown]
# Where there is a gradient there is gradient descent. `vmap` of the gradient descends from five starts at once,
# with purestep's Adam on the two logarithms. To see where it walks we `vmap` the function itself over a grid of 24
# by 24 trainings.

# %%
descend = torch.vmap(torch.func.grad_and_value(after_training))
outer = ps.optim.adam(0.2)
starts = [(0.0005, 0.03), (0.015, 0.3), (0.2, 0.03), (0.15, 20.0), (0.001, 60.0)]
h = torch.tensor(starts, dtype=torch.float64).log()
outer_state, walks, losses = outer.init(h), [], []
for k in range(25):
    slope, loss = descend(h)
    walks.append(h.exp())
    losses.append(loss)
    updates, outer_state = outer.update(slope, outer_state, h, step=torch.tensor(k))
    h = h + updates
walks, losses = torch.stack(walks), torch.stack(losses)

learning_rates = torch.logspace(-3.5, -0.5, 24, dtype=torch.float64)
decays = torch.logspace(-2, 2, 24, dtype=torch.float64)
grid = torch.cartesian_prod(learning_rates.log(), decays.log())
landscape = torch.vmap(after_training)(grid).view(24, 24)
print("loss at the starts:    ", "  ".join(f"{loss:8.3g}" for loss in losses[0]))
print("after 24 hypergradients", "  ".join(f"{loss:8.3g}" for loss in losses[-1]))
print(f"lowest on the grid     {landscape.min():9.3g}")

# %%
figure, axes = plt.subplots(figsize=(7, 4.2))
levels = torch.linspace(float(landscape.min()), 1.1, 25).tolist()
filled = axes.contourf(learning_rates, decays, landscape.T.clamp(max=1.0999), levels=levels, cmap="Blues")
figure.colorbar(filled, label="held-out loss after 60 steps", format="%.2f", ticks=levels[::4])
for walk in walks.unbind(1):
    axes.plot(walk[:, 0], walk[:, 1], color="tab:red", marker="o", ms=2.5, lw=1)
    axes.plot(*walk[0], color="white", marker="o", ms=6, markeredgecolor="tab:red")
axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="weight decay")
axes.set(xlim=(learning_rates[0], learning_rates[-1]), ylim=(decays[0], decays[-1]))
axes.set_title("Descent by hypergradients, from five starts")
axes.grid(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Four of the five reach the valley, one of them out of a region where training diverges. The fifth walks over a
# ridge and settles in a hollow: hypergradients are as local as other gradients.
#
# No loss function, model or optimizer knew that it was mapped or differentiated; they are those of an ordinary run.
# The digest of what came out:

# %%
print("digest", ps.digest({"ensemble": trained, "sweep": curves, "walks": walks, "landscape": landscape}))
