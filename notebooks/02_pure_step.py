# %% [markdown]
# # A pure step, by hand
#
# `ps.make_step` writes the usual step. Research often needs another one. Here we write sharpness-aware
# minimization (Foret et al., 2021, arXiv:2010.01412), which takes the gradient not where the parameters are but
# where the loss is largest nearby, so it needs two backward passes in an update. The step is twelve lines. Then
# we break it in four ways that everybody has written once, and let `ps.testing.check_pure` say what is wrong with
# each.

# %%
import shutil

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
shutil.rmtree("runs/pure", ignore_errors=True)  # a run directory that is there would be continued

# %% [markdown]
# The data: 178 Italian wines, 13 chemical measurements of each, and which of three growers made it.

# %%
wine = load_wine()
x = torch.tensor(wine.data, dtype=torch.float32)
x = (x - x.mean(0)) / x.std(0)
train = ps.data.batches({"x": x, "y": torch.tensor(wine.target)}, 32, seed=0)
batch = next(iter(train.open(0, 0, None)))


def make_model():
    return nn.Sequential(nn.Linear(13, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 3))


# %% [markdown]
# ## The step
#
# Three rules make it pure. It reads its inputs and changes none. What is random comes from a key in the state,
# folded with the number of the step: dropout differs from step to step, and both passes of one step draw the same
# masks. And what the next step needs is in the state that it returns: here an average of the parameters, which a
# subclass of `TrainState` has room for. It then goes wherever the state goes: into snapshots, over processes,
# through `vmap`.


# %%
@ps.pytree
class Averaged(ps.TrainState):
    average: dict[str, torch.Tensor] | None = None


tx = ps.optim.adam(3e-3)


def loss_of(params, state, batch):
    key = ps.random.fold_in(state.rng, state.step)
    logits, _ = ps.apply(state.model, params, state.buffers, batch["x"], rng=key)
    return cross_entropy(logits, batch["y"])


def step(state, batch, radius=0.05):
    grads, loss = ps.grad_and_value(loss_of)(state.params, state, batch)
    length = sum(g.square().sum() for g in grads.values()).sqrt()
    uphill = {name: p + radius * grads[name] / length for name, p in state.params.items()}
    grads, worst = ps.grad_and_value(loss_of)(uphill, state, batch)
    state = state.apply_gradients(tx, grads)
    average = {name: torch.lerp(a, state.params[name], 0.05) for name, a in state.average.items()}
    return state.replace(average=average), {"loss": loss, "sharpness": worst - loss}


first = ps.init(make_model, tx, seed=0)
state = Averaged(**vars(first), average=first.params)
state

# %% [markdown]
# `check_pure` calls the step twice and compares everything: the outputs, the inputs before and after, the global
# random generators, the attributes of the model. It raises what it finds, and is silent here.

# %%
ps.testing.check_pure(step, state, batch)
print("pure")

# %% [markdown]
# ## Four ways to break it
#
# **In place.** The usual implementation moves the parameters uphill, computes the second gradient and moves them
# back. Back is not where they were: a sum of floating-point numbers is rounded, and so is the difference.


# %%
def in_place(state, batch, radius=0.05):
    grads, loss = ps.grad_and_value(loss_of)(state.params, state, batch)
    length = sum(g.square().sum() for g in grads.values()).sqrt()
    for name, p in state.params.items():
        p.add_(radius * grads[name] / length)
    worst_grads, _ = ps.grad_and_value(loss_of)(state.params, state, batch)
    for name, p in state.params.items():
        p.sub_(radius * grads[name] / length)
    return state.apply_gradients(tx, worst_grads), {"loss": loss}


def check(step, state):
    try:
        ps.testing.check_pure(step, state, batch)
    except AssertionError as error:
        print(error)


fresh = ps.init(make_model, tx, seed=0)
check(in_place, fresh)

# %% [markdown]
# **A global generator.** Noise on the inputs, drawn from torch's own stream. Any other draw in the program, of a
# worker or of another cell of this notebook, shifts all that come after it.


# %%
def noisy(state, batch):
    batch = {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])}
    return step(state, batch)


check(noisy, state)


# %% [markdown]
# The cure is a key. `ps.random` draws from keys alone, and a name folded in separates this use from that of
# dropout.


# %%
def keyed(state, batch):
    key = ps.random.fold_in(ps.random.fold_in(state.rng, state.step), "noise")
    return step(state, {**batch, "x": batch["x"] + 0.1 * ps.random.normal(key, batch["x"].shape)})


check(keyed, state)

# %% [markdown]
# **A counter outside of the state.** The radius grows with the number of calls. No input and no generator
# changes, and the second call gives other bits.


# %%
def make_warm():
    calls = []

    def warm(state, batch):
        calls.append(None)
        return step(state, batch, radius=0.5 * min(1.0, len(calls) / 60))

    return warm


check(make_warm(), state)

# %% [markdown]
# **A model that remembers.** An attribute that `forward` changes is in no snapshot.


# %%
class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make_model()
        self.average = torch.zeros(13)

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.body(x - self.average)


check(ps.make_step(lambda net, b: cross_entropy(net(b["x"]), b["y"]), tx), ps.init(Remembering, tx, seed=0))

# %% [markdown]
# ## What an impure step costs
#
# The counter looks harmless. We train for 120 steps, once straight and once stopped after 60 and continued by a
# new process, for which `make_warm()` stands: its counter begins at zero. The pure step counts by `state.step`.


# %%
def by_state(state, batch):
    return step(state, batch, radius=0.5 * (state.step / 60).clamp(max=1.0))


def sharpness(make, name, stops):
    callbacks = [ps.callbacks.log(every=ps.every.steps(1)), ps.callbacks.progress(display="none")]
    for stop in stops:
        ps.fit(make(), state, train, until=ps.steps(stop), run_dir=f"runs/pure/{name}", callbacks=callbacks)
    run = ps.open(f"runs/pure/{name}")
    return run.metrics["train/sharpness"], run.digest


figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.6), sharey=True, layout="constrained")
for axis, title, make in zip(
    axes, ("counter outside", "counter in the state"), (make_warm, lambda: by_state), strict=True
):
    straight, digest = sharpness(make, f"{title}, straight", [120])
    resumed, other = sharpness(make, f"{title}, resumed", [60, 120])
    axis.plot(straight, color="#0072B2", linewidth=3.5, alpha=0.4, label="straight")
    axis.plot(resumed, color="#D55E00", linewidth=1.1, label="stopped at 60, resumed")
    axis.axvline(60, color="black", linewidth=0.6, linestyle=":")
    axis.set(title=f"{title}: {'the same bits' if digest == other else 'other bits'}", xlabel="step")
    axis.grid(alpha=0.25)
axes[0].set_ylabel("sharpness: loss uphill - loss")
_ = axes[0].legend(frameon=False)

# %% [markdown]
# Left the second process computes other numbers from its first step on, and nothing in its log says so. Right
# both runs end with this digest.

# %%
print("digest", digest)
