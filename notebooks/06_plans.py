# %% [markdown]
# # Plans: the same bits on 1, 2 and 4 processes
#
# A *plan* says which process holds which part of each tensor, and who computes what. It is a value, passed to
# `ps.make_step`; model and loss function do not know of it. This notebook trains one model on one, two and four
# processes, under plans that replicate the state and plans that shard it, hands a run from four processes to one,
# and compares the bits. Then it asks what a plan would cost for a model of 70 billion parameters, which no machine
# here could hold.

# %%
import json
import os
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import purestep as ps
from purestep.sharding import Spec, ddp, fsdp, hsdp, tensor_parallel

ps.bits.portable()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.axisbelow": True, "legend.frameon": False, "axes.titlelocation": "left"})
shutil.rmtree("runs/plans", ignore_errors=True)
os.makedirs("runs/plans")
digits = load_digits()
torch.save({"x": torch.tensor(digits.data / 16).float(), "y": torch.tensor(digits.target)}, "runs/plans/digits.pt")

# %% [markdown]
# ## One script for any number of processes
#
# Several processes need a script that each of them runs. The three lines that matter: a plan is made from its name,
# the state is made under the plan, and the step is given the plan *and the number of microbatches*. A batch is
# sliced into four microbatches wherever they are computed, and their gradients are added in one fixed binary tree.
# That is what keeps the bits.

# %%
# %%writefile runs/plans/train.py
import json
import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

ps.bits.portable()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU()) for _ in range(3))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(128, 10)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + self.drop(block(x))
        return self.head(x)


def loss_fn(net, batch):
    return cross_entropy(net(batch["x"]), batch["y"])


def train(name, steps, run_dir=None):
    plan = {"ddp": ps.sharding.ddp, "fsdp": ps.sharding.fsdp}[name]()
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-3))
    step = ps.make_step(loss_fn, tx, microbatches=4, plan=plan)
    state = ps.init(Net, tx, seed=0, plan=plan)
    data = ps.data.batches(torch.load("runs/plans/digits.pt"), 64, seed=0)
    return plan, ps.fit(step, state, data, until=ps.steps(steps), run_dir=run_dir).state


def local_bytes(state):
    leaves = [leaf.to_local() if hasattr(leaf, "to_local") else leaf for leaf in ps.tree.leaves(state)]
    return sum(leaf.nbytes for leaf in leaves)


if __name__ == "__main__":
    relay, until = sys.argv[1], int(sys.argv[2])
    found = {}
    for name in ("ddp", "fsdp"):
        plan, state = train(name, 16)
        rows = plan.describe(state, rank=ps.sharding.rank())
        found[name] = {"digest": ps.digest(state), "bytes": local_bytes(state), "described": rows.nbytes}
    _, state = train(relay, until, "runs/plans/relay")
    found["relay"] = {"digest": ps.digest(state), "steps": int(state.step)}
    with open(f"runs/plans/{ps.sharding.size()}-{ps.sharding.rank()}.json", "w") as file:
        json.dump(found, file)

# %% [markdown]
# Each call also does its part of a *relay*: one run of 16 steps that four processes begin under `fsdp`, that two
# continue under `ddp`, and that one ends.

# %%
found = {}
for size, relay, until in ((4, "fsdp", 5), (2, "ddp", 10), (1, "fsdp", 16)):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    command = [sys.executable, *launcher, "runs/plans/train.py", relay, str(until)]
    subprocess.run(command, check=True, capture_output=True)
    for rank in range(size):
        with open(f"runs/plans/{size}-{rank}.json") as file:
            found[size, rank] = json.load(file)

print("processes  plan   digest of the state after 16 steps")
for size in (1, 2, 4):
    for plan in ("ddp", "fsdp"):
        print(f"{size:<9}  {plan:<5}  {found[size, 0][plan]['digest']}")
print(f"4 > 2 > 1  mixed  {found[1, 0]['relay']['digest']}")

# %%
digests = {row[plan]["digest"] for row in found.values() for plan in ("ddp", "fsdp")}
digests.add(found[1, 0]["relay"]["digest"])
print("different digests:", len(digests))

# %% [markdown]
# ## What a rank holds
#
# `plan.describe` tells it from shapes, without processes; here beside it what the processes had. Under `fsdp` a
# rank holds its share of params and optimizer state. Tensors with no dim that four divides, like the bias of ten
# outputs, stay whole.

# %%
print("processes  plan   bytes described  bytes on each rank")
for size in (1, 2, 4):
    for plan in ("ddp", "fsdp"):
        rows = [found[size, rank][plan] for rank in range(size)]
        print(
            f"{size:<9}  {plan:<5} {rows[0]['described']:>16,}  {', '.join(format(row['bytes'], ',') for row in rows)}"
        )

small = ps.init(lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)), ps.optim.sgd(0.1))
print()
print(fsdp(4).describe(small))

# %% [markdown]
# ## 70 billion parameters
#
# `dry_run` asks a plan what a step would need of a rank, on a mesh that is not here. It reads shapes only, so the
# model is made on the meta device and takes no memory: here the tensors of a llama with 80 blocks of width 8,192.


# %%
class Block(nn.Module):
    def __init__(self, width, hidden, shared):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, shared, bias=False), nn.Linear(width, shared, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)


class Llama(nn.Module):
    def __init__(self, blocks=80, width=8192, hidden=28672, shared=1024, tokens=128256):
        super().__init__()
        self.embed, self.norm = nn.Embedding(tokens, width), nn.RMSNorm(width)
        self.blocks = nn.ModuleList(Block(width, hidden, shared) for _ in range(blocks))
        self.head = nn.Linear(width, tokens, bias=False)


with torch.device("meta"):
    llama = ps.init(Llama(), ps.optim.adamw(1e-4))
count = sum(p.numel() for p in llama.params.values())
print(f"{count / 1e9:.1f} billion parameters, {ps.tree.nbytes(llama) / 2**30:,.0f} GiB with the state of AdamW")
print(fsdp().dry_run(llama, {"fsdp": 1024}, compute_dtype=torch.bfloat16))

# %% [markdown]
# Five ways to put it onto 1,024 GPUs of 80 GiB. Activations are not counted, so what is left of the 80 is for them.

# %%
columns = ["*.q.weight", "*.k.weight", "*.v.weight", "*.gate.weight", "*.up.weight"]
tensor = tensor_parallel([(columns, Spec("tensor")), (["*.o.weight", "*.down.weight"], Spec(None, "tensor"))], 8)
plans = {
    "ddp": ddp(1024),
    "hsdp, groups of 16": hsdp(fsdp=16, data=64),
    "hsdp, groups of 64": hsdp(fsdp=64, data=16),
    "fsdp": fsdp(1024),
    "hsdp of 16, tensor of 8": hsdp(fsdp=16, data=8) * tensor,
}
needs = {name: plan.dry_run(llama, compute_dtype=torch.bfloat16) for name, plan in plans.items()}
kinds = ["params", "optimizer", "grads", "gathered", "sums"]
print(f"{'GiB':<24}" + "".join(f"{kind:>11}" for kind in [*kinds, "all", "sent"]))
for name, need in needs.items():
    values = [need.memory.get(kind, 0) for kind in kinds]
    print(f"{name:<24}" + "".join(f"{n / 2**30:11,.1f}" for n in [*values, need.nbytes, sum(need.sent.values())]))

# %%
colours = ["tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[1.2, 1])
for y, need in enumerate(needs.values()):
    offset = 0
    for kind, colour in zip(kinds, colours, strict=True):
        size = need.memory.get(kind, 0) / 2**30
        left.barh(y, size, left=offset, color=colour, height=0.6, label=kind if y == 0 else None)
        offset += size
    label = f"{offset:,.0f} GiB" + (" >" if offset > 110 else "")
    left.text(min(offset, 110) + 1, y, label, va="center", bbox={"color": "white", "pad": 1})
left.axvline(80, color="0.3", lw=1, ls="--", zorder=0.5)
left.set(yticks=range(len(needs)), yticklabels=list(needs), xlim=(0, 110), xlabel="GiB on a rank")
left.set_title("70.6 billion parameters on 1,024 ranks")
left.invert_yaxis()
left.legend(loc="lower right", frameon=True, edgecolor="none", framealpha=1)

sizes = [2**k for k in range(3, 12)]
by_size = [fsdp().dry_run(llama, {"fsdp": n}, compute_dtype=torch.bfloat16) for n in sizes]
for kind, colour in zip(kinds, colours, strict=True):
    found = [run.memory.get(kind, 0) / 2**30 for run in by_size]
    right.plot(sizes, found, color=colour, marker="o", ms=3, label=kind)
right.plot(sizes, [run.nbytes / 2**30 for run in by_size], color="black", lw=2, label="all")
right.axhline(80, color="0.3", lw=1, ls="--")
right.set(xscale="log", yscale="log", xlabel="ranks", ylabel="GiB on a rank", xticks=sizes[::2], xticklabels=sizes[::2])
right.set_title("fsdp by the number of ranks")
right.minorticks_off()
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# The kinds are those of the moment in which most is there: a block has ended its backward pass, and its gradients
# are packed while those of the block before are on their way (`sums`). Sharding divides params and optimizer state by
# the number of ranks. It does not divide what is *gathered*, nor the whole gradients of a block and of the root;
# past a few hundred ranks that is what is left.

# %%
print("digest", ps.digest({"trained": sorted(digests), "bytes": [need.memory for need in needs.values()]}))
