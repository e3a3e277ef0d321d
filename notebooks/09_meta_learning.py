# %% [markdown]
# # Meta-learning: a training inside of a step
#
# *Model-agnostic meta-learning* (MAML; Finn, Abbeel and Levine, 2017) looks for weights from which a few gradient
# steps are enough to learn a new task. Its loss is the loss *after* such a small training, so its gradient goes
# through the training. Where a training step changes a model in place, that takes a library of its own. Where it is
# a pure function, a training is an expression: write it down, differentiate it, map it over tasks. The result is
# again a step, and `ps.fit` runs it.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import purestep as ps

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "axes.titlelocation": "left"})

# %% [markdown]
# ## A task is a function of a key
#
# The task of the paper: a sine wave of some amplitude and phase. It shows ten points, the *support*, and asks for
# ten others, the *query*. All of it is drawn from one key, so the training set is a table of keys, and a batch of
# 25 keys is a batch of 25 tasks.


# %%
def wave(key, points=10):
    amplitude = ps.random.uniform(ps.random.fold_in(key, "amplitude"), (1,)) * 4.9 + 0.1
    phase = ps.random.uniform(ps.random.fold_in(key, "phase"), (1,)) * torch.pi
    x = ps.random.uniform(ps.random.fold_in(key, "x"), (2 * points, 1)) * 10 - 5
    y = amplitude * torch.sin(x - phase)
    return {"x": x[:points], "y": y[:points]}, {"x": x[points:], "y": y[points:]}


waves = ps.data.batches({"key": ps.random.split(ps.random.key(0), 15_000)}, 25, seed=0)
support, query = torch.vmap(wave)(next(iter(waves.epoch(0)))["key"])
print("support:", tuple(support["x"].shape), " query:", tuple(query["x"].shape))

# %% [markdown]
# ## The inner training
#
# A model, a loss function, gradient descent, a step: nothing here knows of meta-learning. `adapt` is a few of these
# steps on the support of one task.


# %%
def make_model():
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def squared_error(net, batch):
    return mse_loss(net(batch["x"]), batch["y"])


def make_adapt(loss_fn, learning_rate):
    tx = ps.optim.sgd(learning_rate)
    step = ps.make_step(loss_fn, tx)

    def adapt(state, support, steps):
        state = state.replace(opt_state=tx.init(state.params))
        for _ in range(steps):
            state, _ = step(state, support)
        return state

    return adapt


adapt_wave, error_of = make_adapt(squared_error, 0.01), ps.make_eval(squared_error)

# %% [markdown]
# ## The outer step
#
# The loss of a task is that on its query after the inner steps; `vmap` takes its mean over the tasks, and
# `ps.grad_and_value` differentiates it by the params that all inner trainings begin with. Inside of a gradient
# steps detach nothing. With no inner steps, the same function is plain *joint training*, the baseline.


# %%
def make_meta_step(draw, adapt, evaluate, outer, steps):
    def meta_step(state, batch):
        support, query = torch.vmap(draw)(batch["key"])

        def mean_loss(params):
            def task_loss(support, query):
                return evaluate(adapt(state.replace(params=params), support, steps), query)["loss"].compute()

            return torch.vmap(task_loss)(support, query).mean()

        grads, loss = ps.grad_and_value(mean_loss, engine="func")(state.params)
        return state.apply_gradients(outer, grads), {"loss": loss}

    return meta_step


outer = ps.optim.adam(ps.optim.cosine_decay_schedule(5e-3, len(waves)))
start = ps.init(make_model, outer, seed=0)
maml_step = make_meta_step(wave, adapt_wave, error_of, outer, steps=1)
joint_step = make_meta_step(wave, adapt_wave, error_of, outer, steps=0)
ps.testing.check_pure(maml_step, start, next(iter(waves.epoch(0))))

# %% [markdown]
# Is the gradient really that through the inner training? Along a random direction we compare it with a finite
# difference, in float64, and with the *first-order* shortcut, which treats the inner gradient as a constant.

# %%
exact = ps.precision.policy("64").apply(start)
support, query = ({name: t.double() for name, t in part.items()} for part in wave(ps.random.key(3)))


def after_adapting(params):
    return error_of(adapt_wave(exact.replace(params=params), support, 1), query)["loss"].compute()


keys = dict(zip(exact.params, ps.random.split(ps.random.key(4), len(exact.params)), strict=True))
direction = {name: ps.random.normal(keys[name], p.shape, dtype=p.dtype) for name, p in exact.params.items()}
moved = [ps.tree.map(lambda p, d, h=h: p + h * d, exact.params, direction) for h in (1e-6, -1e-6)]
adapted = adapt_wave(exact, support, 1)
first_order, _ = ps.grad_and_value(
    lambda p: error_of(adapted.replace(params=p), query)["loss"].compute(), engine="func"
)(adapted.params)
through, _ = ps.grad_and_value(after_adapting, engine="func")(exact.params)


def along(grads):
    return sum((grads[name] * direction[name]).sum() for name in grads)


print(f"through the inner step  {along(through):.6f}")
print(f"finite difference       {(after_adapting(moved[0]) - after_adapting(moved[1])) / 2e-6:.6f}")
print(f"first-order shortcut    {along(first_order):.6f}")

# %% [markdown]
# ## Two trainings, one protocol
#
# `fit` takes the meta-step as it takes any step: with snapshots, resume, evaluations and loggers, had we asked for
# them.

# %%
maml = ps.fit(maml_step, start, waves, until=ps.epochs(1)).state
joint = ps.fit(joint_step, start, waves, until=ps.epochs(1)).state

new = torch.vmap(wave)(ps.random.split(ps.random.key(1), 200))
steps = [0, 1, 2, 5, 10, 20]


def after(state, adapt, evaluate, tasks, metric):
    """The mean of a metric on the queries of new tasks, after so many inner steps."""
    score = lambda n: torch.vmap(lambda s, q: evaluate(adapt(state, s, n), q)[metric].compute())(*tasks).mean()  # noqa: E731
    return [float(score(n)) for n in steps]


errors = {name: after(s, adapt_wave, error_of, new, "loss") for name, s in {"MAML": maml, "joint": joint}.items()}
print("inner steps " + "".join(f"{n:>8}" for n in steps))
for name, values in errors.items():
    print(f"{name:<12}" + "".join(f"{value:8.3f}" for value in values))

# %% [markdown]
# Joint training has learned the mean of all waves and leaves it slowly. Judged before a first step MAML is no
# better, but from where it stands every wave is near.

# %%
support, query = wave(ps.random.key(27))
line = torch.linspace(-5, 5, 200)[:, None]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), width_ratios=[1, 1, 0.9])
for axis, (name, state) in zip(axes, {"MAML": maml, "joint training": joint}.items(), strict=False):
    for n, colour in ((0, "0.7"), (1, "tab:orange"), (10, "tab:red")):
        adapted = adapt_wave(state, support, n)
        y, _ = ps.apply(adapted.model, adapted.params, adapted.buffers, line, train=False)
        axis.plot(line, y, color=colour, lw=1.6, label=f"after {n} step{'' if n == 1 else 's'}")
    axis.plot(support["x"], support["y"], "o", color="tab:blue", label="support", ms=5)
    axis.plot(query["x"], query["y"], "x", color="tab:blue", label="query", ms=5)
    axis.set(title=f"A new wave, from {name}", xlabel="x", ylim=(-5.5, 5.5))
figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="lower left", bbox_to_anchor=(0.06, -0.06))
for name, colour in (("MAML", "tab:red"), ("joint", "0.5")):
    axes[2].plot(steps, errors[name], color=colour, marker="o", ms=4, label=name)
axes[2].set(title="200 new waves", xlabel="inner steps", ylabel="squared error on the query", ylim=(0, None))
axes[2].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Kinds of digits that were held out
#
# The same with images. A task picks three kinds of image, shows three of each, and asks for the kinds of thirty
# others. Kinds are digits, upright or turned by 90 degrees: 14 to learn to learn from (0 to 6), and 6 others to
# judge by (7, 8 and 9).

# %%
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)


def kinds(which):
    """[kind, 170, 64]: 170 images of each digit, and the same turned."""
    turned = [torch.rot90(images[labels == d][:170], r, (1, 2)).flatten(1) for d in which for r in (0, 1)]
    return torch.stack(turned)


def make_draw(pool, ways=3, shots=3, asked=10):
    def draw(key):
        chosen = ps.random.uniform(ps.random.fold_in(key, "kinds"), (len(pool),)).argsort()[:ways]
        order = ps.random.uniform(ps.random.fold_in(key, "images"), (ways, pool.shape[1])).argsort()
        x = pool[chosen[:, None], order[:, : shots + asked]]
        y = torch.arange(ways)[:, None].expand(ways, shots + asked)
        parts = slice(0, shots), slice(shots, None)
        return tuple({"x": x[:, part].flatten(0, 1), "y": y[:, part].flatten()} for part in parts)

    return draw


def make_classifier(outputs=3):
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def classify(net, batch):
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


known, unknown = kinds(range(7)), kinds(range(7, 10))
adapt_digits, judge = make_adapt(classify, 0.2), ps.make_eval(classify)
keys = ps.data.batches({"key": ps.random.split(ps.random.key(0), 4000)}, 16, seed=0)
outer = ps.optim.adam(ps.optim.cosine_decay_schedule(3e-3, len(keys)))
first = ps.init(make_classifier, outer, seed=0)
learned = ps.fit(make_meta_step(make_draw(known), adapt_digits, judge, outer, 3), first, keys, until=ps.epochs(1)).state

# %% [markdown]
# Two other starts to adapt from: the random one, and what one would do without meta-learning, a classifier of the
# 14 known kinds whose last layer is replaced.

# %%
tx = ps.optim.adam(3e-3)
all_known = {"x": known.flatten(0, 1), "y": torch.arange(14).repeat_interleave(170)}
batches = ps.data.batches(all_known, 64, seed=0)
wide = ps.fit(
    ps.make_step(classify, tx), ps.init(lambda: make_classifier(14), tx, seed=0), batches, until=ps.epochs(12)
).state
head = {name: torch.zeros_like(p) for name, p in first.params.items() if name.startswith("4.")}
pretrained = first.replace(params={**wide.params, **head})

new = torch.vmap(make_draw(unknown))(ps.random.split(ps.random.key(1), 300))
starts = {"MAML": learned, "pre-trained": pretrained, "random": first}
accuracies = {name: after(state, adapt_digits, judge, new, "accuracy") for name, state in starts.items()}
print("inner steps " + "".join(f"{n:>8}" for n in steps))
for name, values in accuracies.items():
    print(f"{name:<12}" + "".join(f"{value:8.1%}" for value in values))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[1.25, 1])
padded = [nn.functional.pad(part["x"][0].view(3, -1, 8, 8)[:, :6], (1, 1, 1, 1)) for part in new]
gap = padded[0].new_zeros(3, 1, 10, 10)
rows = torch.cat([padded[0], gap, padded[1]], 1)  # [kind, image, 10, 10]
left.imshow(rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), cmap="gray_r")
left.set(title="One task: three of each kind, and what is asked")
left.axis("off")
for (name, values), colour in zip(accuracies.items(), ("tab:red", "tab:blue", "0.5"), strict=True):
    right.plot(steps, values, color=colour, marker="o", ms=4, label=name)
right.set(title="300 tasks of unknown kinds", xlabel="inner steps", ylabel="accuracy", ylim=(0.3, 1))
right.legend(loc="lower right")
figure.tight_layout()
plt.show()

# %% [markdown]
# MAML is made for the first few steps, and that is where it leads. Given twenty, the other starts come close:
# telling three kinds of digit apart is not hard.

# %%
print("digest", ps.digest({"waves": maml, "joint": joint, "digits": learned, "pretrained": pretrained}))
