# %% [markdown]
# # Precision policies are functions of states
#
# Mixed precision is usually a mode: autocast is switched on, a `GradScaler` lives next to the optimizer, and which
# tensor has which dtype is found out with a debugger. In purestep a *policy* is a value. `policy.apply` maps a
# state to a state, and a step made with the policy casts what the policy says. So every question about precision is
# one about values, and can be answered by looking.

# %%
import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.axisbelow": True, "legend.frameon": False, "axes.titlelocation": "left"})

digits = load_digits()
order = ps.random.permutation(ps.random.key(0), len(digits.target))
pixels = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
labels = torch.tensor(digits.target)[order]
train_set = {"x": pixels[:1400], "y": labels[:1400]}
held_out = {"x": pixels[1400:], "y": labels[1400:]}


def make_model():
    return nn.Sequential(
        *(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU()),
        *(nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU()),
        nn.Linear(128, 10),
    )


def loss_fn(net, batch):
    return cross_entropy(net(batch["x"]), batch["y"])


tx = ps.optim.adamw(1e-4, eps=1e-6)
state = ps.init(make_model, tx, seed=0)

# %% [markdown]
# ## One state under six policies
#
# `bf16-mixed` and `16-mixed` leave the params in float32 and cast them inside of the step. `bf16-true` and
# `16-true` have nothing but the half precision. `bf16-master` has both: params in bfloat16, and master weights in
# float32 in the state of the optimizer.

# %%
names = ["32", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "bf16-master"]
policies = {name: ps.precision.policy(name) for name in names}
short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def dtypes(tree):
    found = {short[leaf.dtype] for leaf in ps.tree.leaves(tree) if leaf.is_floating_point()}
    return " + ".join(sorted(found)) or "-"


print(f"{'policy':<13}{'params':<12}{'optimizer state':<17}{'loss scale':<12}{'bytes a parameter':>17}")
count = sum(p.numel() for p in state.params.values())
for name, policy in policies.items():
    s = policy.apply(state)
    scale = "-" if s.loss_scale is None else f"{float(s.loss_scale.value):.0f}"
    per = ps.tree.nbytes((s.params, s.opt_state)) / count
    print(f"{name:<13}{dtypes(s.params):<12}{dtypes(s.opt_state):<17}{scale:<12}{per:>17.1f}")

# %% [markdown]
# (The normalisation layers of `bf16-master` stay in float32, by a rule of the policy:
# `print(policies["bf16-master"])`.)
#
# A function of states has properties that can be tested. Is anything lost on the way there and back?

# %%
for name, policy in policies.items():
    back = policies["32"].apply(policy.apply(state))
    lost = ps.diff(state, back)
    print(f"32 > {name} > 32:".ljust(24), lost[3] if lost else "the same bits")

# %% [markdown]
# The mixed policies lose nothing because they change nothing, `bf16-master` because the master weights become the
# params. The true policies have rounded, and `ps.diff` says by how much.
#
# ## What is cast where
#
# `ps.trace_bits` records every operation of one step, for comparisons between machines. It knows the dtypes, too.
# The forward pass under `bf16-mixed`, operation by operation:

# %%
batch = {name: t[:8] for name, t in train_set.items()}


def forward(policy):
    trace = ps.trace_bits(ps.make_step(loss_fn, tx, policy=policy), policy.apply(state), batch)
    for op in trace.operations:
        kinds = [kind.partition("[")[0] for kind in (*(i.kind for i in op.inputs), op.outputs[0].kind)]
        if op.phase == "forward" and any("[8, " in b.kind for b in (*op.inputs, *op.outputs)):  # of 8 samples
            yield op, kinds


def table(policy, only=None):
    for op, (*inputs, output) in forward(policy):
        layer = "" if op.module == "" else f"{op.module} {type(state.model.module[int(op.module)]).__name__}"
        if only is None or layer.startswith(only):
            what = "cast" if op.name == "aten._to_copy" else op.name.removeprefix("aten.")
            print(f"{layer:<12} {what:<18} {', '.join(inputs):<30} > {output}")


table(policies["bf16-mixed"])

# %% [markdown]
# Inputs are cast where they enter a layer, matrix products run in bfloat16, layer norms and the loss in float32.
# Rules change that, by path, class or function, and a policy with a rule is another value. The last layer in
# float32:

# %%
precise_head = policies["bf16-mixed"].where("6", compute="f32", output="f32")
table(precise_head, only="6")

# %% [markdown]
# ## Why float16 needs a loss scale
#
# The smallest positive float16 is $2^{-24}$, and below $2^{-14}$ digits are lost. Here is where the gradients are
# after some training, and what a scale of $2^{16}$ does about it: multiply the loss, divide the gradients, in
# float32, afterwards.

# %%
step = ps.make_step(loss_fn, ps.optim.adamw(1e-3))
warm = state
for epoch in range(8):
    for b in ps.data.batches(train_set, 64, seed=0).epoch(epoch):
        warm, _ = step(warm, b)
grads = torch.cat([g.flatten() for g in step.grads(warm, train_set).grads.values()])
exponents = grads[grads != 0].abs().log2()

figure, axes = plt.subplots(figsize=(8, 3.2))
bins = torch.arange(-44, 17).tolist()
axes.hist(exponents, bins, color="tab:blue", alpha=0.75, label="gradients")
axes.hist(exponents + 16, bins, color="tab:orange", alpha=0.6, label="times $2^{16}$")
top = axes.get_ylim()[1]
axes.axvspan(-44, -24, color="0.75", alpha=0.5, lw=0)
axes.axvspan(-24, -14, color="0.9", alpha=0.7, lw=0)
axes.axvspan(16, 18, color="0.75", alpha=0.5, lw=0)
axes.text(-34, top * 0.93, "zero in float16", ha="center")
axes.text(-19, top * 0.93, "subnormal", ha="center")
axes.set(xlabel="exponent: $\\log_2$ of the magnitude", ylabel="elements", xlim=(-44, 18))
axes.set_title("Gradients of a trained network, and float16")
axes.text(17, top * 0.5, "infinite", ha="center", va="center", rotation=90)
axes.legend(loc="upper right", bbox_to_anchor=(0.97, 1))
figure.tight_layout()
plt.show()
for name, shift in (("as they are", 0), ("times 2**16", 16)):
    lost, coarse = (exponents + shift < -24).float().mean(), (exponents + shift < -14).float().mean()
    print(f"{name}: {lost:.1%} become zero in float16, {coarse:.1%} lose digits")

# %% [markdown]
# ## The loss scale is part of the state
#
# It is a value with a rule: halve when a gradient overflows, double after `period` steps without. A step whose
# gradients are not finite is *skipped*: params, optimizer state and step counter stay bit for bit, the metric
# `skipped` counts it. We begin far too high and spoil one batch on purpose.

# %%
scale = ps.precision.DynamicLossScale(2.0**24, period=20)
policy = ps.precision.policy("16-mixed", loss_scale=scale)
step = ps.make_step(loss_fn, tx, policy=policy)
s, history = policy.apply(warm.replace(opt_state=tx.init(warm.params))), []
batches = [b for epoch in range(5) for b in ps.data.batches(train_set, 64, seed=0).epoch(epoch)]
for k, b in enumerate(batches):
    if k == 60:
        b = {**b, "x": b["x"] * 1e6}
    before, (s, metrics) = s, step(s, b)
    skipped = bool(metrics["skipped"].compute())
    history.append((math.log2(before.loss_scale.value), skipped))
    if skipped:
        same = ps.digest((before.params, before.opt_state, before.step)) == ps.digest((s.params, s.opt_state, s.step))
        print(f"batch {k:>2} skipped at scale 2^{history[-1][0]:.0f}; params, optimizer and step unchanged: {same}")
print(f"{len(batches)} batches, {int(s.step - warm.step)} updates")

# %%
figure, axes = plt.subplots(figsize=(8, 2.6))
axes.step(range(len(history)), [h[0] for h in history], where="post", color="tab:blue")
skips = [k for k, h in enumerate(history) if h[1]]
axes.plot(skips, [history[k][0] for k in skips], "x", color="tab:red", ms=7, label="skipped")
axes.set(xlabel="batch", ylabel="$\\log_2$ of the loss scale", title="A dynamic loss scale, seen from its state")
axes.legend(loc="upper center")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Why master weights
#
# A bfloat16 has 8 significant bits. An update of less than 1/512 of a weight is rounded away, every time. With a
# learning rate of 1e-4 that is most updates: five trainings from the same state, the same batches in the same
# order.

# %%
train = ps.data.batches(train_set, 64, seed=0)
curves, last, gone = {}, {}, {}
for name in ("32", "bf16-mixed", "16-mixed", "bf16-true", "bf16-master"):
    policy = policies[name]
    step, evaluate = ps.make_step(loss_fn, tx, policy=policy), ps.make_eval(loss_fn, policy=policy)
    s, curves[name] = policy.apply(state), []
    for epoch in range(12):
        for b in train.epoch(epoch):
            old, (s, _) = s, step(s, b)
        curves[name].append(float(evaluate(s, held_out)["loss"].compute()))
    last[name] = s
    same = [(old.params[name] == p).float().mean() for name, p in s.params.items() if p.ndim == 2]
    gone[name] = float(sum(same) / len(same))
print(f"{'policy':<13}{'held-out loss':>13}{'weights that the last update left as they were':>50}")
for name, losses in curves.items():
    print(f"{name:<13}{losses[-1]:>13.4f}{gone[name]:>50.0%}")

# %% [markdown]
# What a policy costs in memory: the state, from above, and what the forward pass saves for the backward pass, which
# autograd tells.


# %%
def saved_bytes(policy, batch):
    """Bytes that autograd keeps from the forward pass, without those that are the state itself."""
    s, kept = policy.apply(state), {}
    own = {leaf.untyped_storage().data_ptr() for leaf in ps.tree.leaves(s)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ps.make_step(loss_fn, tx, policy=policy)(s, batch)
    return sum(nbytes for nbytes, _ in kept.values())


wide = {name: t[:1024] for name, t in train_set.items()}
memory = {}
for name in curves:
    s = policies[name].apply(state)
    memory[name] = [ps.tree.nbytes(s.params), ps.tree.nbytes(s.opt_state), saved_bytes(policies[name], wide)]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[1.1, 1])
styles = {"32": ("0.75", "-", 6), "bf16-mixed": ("tab:blue", "-", 2.5), "16-mixed": ("black", ":", 2)}
styles |= {"bf16-true": ("tab:red", "-", 2), "bf16-master": ("tab:orange", "--", 1.5)}
for name, losses in curves.items():
    left.plot(range(1, 13), losses, color=styles[name][0], ls=styles[name][1], lw=styles[name][2], label=name)
left.set(xlabel="epoch", ylabel="held-out loss", title="AdamW at a learning rate of 1e-4")
left.legend(loc="lower left")
offset = [0.0] * len(memory)
for k, kind in enumerate(("params", "optimizer state", "saved for backward, 1,024 samples")):
    sizes = [row[k] / 2**20 for row in memory.values()]
    right.barh(list(memory), sizes, left=offset, height=0.6, color=("tab:blue", "tab:orange", "0.6")[k], label=kind)
    offset = [a + b for a, b in zip(offset, sizes, strict=True)]
right.invert_yaxis()
right.set(xlabel="MiB", title="Memory", xlim=(0, None))
right.legend(fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(-0.25, -0.16), columnspacing=1)
figure.tight_layout()
plt.show()

# %% [markdown]
# `bf16-true` is the smallest, and barely moves. The params of `bf16-master` move as rarely, but each of them is the
# rounded master weight, which never stands still. It is in fact `bf16-mixed` to the bit, with the float32 copy kept
# elsewhere, so that what a plan gathers is half as large:

# %%
mixed, master = (policies["32"].apply(last[name]) for name in ("bf16-mixed", "bf16-master"))
print("bf16-mixed and bf16-master, both taken to 32:", ps.diff(mixed, master))
print("digest", ps.digest(last))
