"""One process of several: models whose units are hard to gather, under every plan and precision policy, as digests.

Arguments: a directory, the number of processes, this process's number.
"""

import dataclasses
import functools
import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, dropout, linear
from torch.utils.checkpoint import checkpoint

import purestep as ps
from purestep import optim
from purestep.loop.skipped_updates import not_finite
from purestep.sharding import ddp, fsdp


class LinearNorm(nn.Module):
    """The dtype of the last parameters is not that of the first, and the norm comes last."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class NormLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x):
        return x + self.act(self.linear(self.norm(x)))


class ConvNorm(nn.Module):
    """As in a ResNet; batch norm has buffers too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2), nn.Identity()

    def forward(self, x):
        return x + self.out(self.norm(self.conv(x.unflatten(1, (2, 4)))).flatten(1))


class OnlyNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x).tanh()


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x, outer):
        return linear(linear(x, outer), self.weight)


class Handed(nn.Module):
    """A parameter of the block is used inside of a submodule."""

    def __init__(self):
        super().__init__()
        self.inner, self.weight, self.norm = Inner(), nn.Parameter(torch.randn(8, 8) / 3), nn.LayerNorm(8)

    def forward(self, x):
        return x + self.norm(self.inner(x, self.weight))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 5)

    def forward(self, batch):
        x = self.embed(batch["x"])
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2)
        self.head = nn.Linear(8, 5)

    def forward(self, batch):
        return self.head(self.encoder(batch["x"].unsqueeze(1))).squeeze(1)


class Tied(nn.Module):
    """One weight at both ends, one weight in two units, and one block at two places."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight
        again = LinearNorm()
        self.blocks = nn.ModuleList([LinearNorm(), again, NormLinear(), again])
        self.blocks[2].linear.weight = self.blocks[0].linear.weight

    def forward(self, batch):
        x = self.embed(batch["y"]) + batch["x"]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Experts(nn.Module):
    """Each sample runs through one expert; those without samples are not called."""

    def __init__(self, order=sorted):
        super().__init__()
        self.experts, self.order = nn.ModuleList(NormLinear() for _ in range(3)), order

    def forward(self, x, chosen):
        for i in self.order(chosen.unique().tolist()):
            hit = (chosen == i).nonzero().squeeze(1)
            x = x.index_add(0, hit, self.experts[i](x[hit]).to(x.dtype))
        return x


class TopExperts(Experts):
    """Experts that are units."""

    def __init__(self, order=sorted):
        super().__init__(order)
        self.head = nn.Linear(8, 5)

    def forward(self, batch):
        return self.head(super().forward(batch["x"], batch["e"]))


class InLayers(nn.Module):
    """Experts inside of layers: the layers are the units."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Experts() for _ in range(2)), nn.Linear(8, 5)

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = layer(x, batch["e"])
        return self.head(x)


class LayerDrop(nn.Module):
    """A layer is left out in some microbatches, so on some of the ranks, or run again."""

    def __init__(self, times):
        super().__init__()
        self.times, self.layers, self.head = times, nn.ModuleList(LinearNorm() for _ in range(3)), nn.Linear(8, 5)

    def forward(self, batch):
        x = batch["x"]
        for i, layer in enumerate(self.layers):
            for _ in range(self.times(i, int(batch["e"][0]))):
                x = layer(x)
        return self.head(x)


class Checkpointed(nn.Module):
    """Layers with dropout under torch's checkpoints, around each layer or inside of it."""

    def __init__(self, reentrant, inside=False):
        super().__init__()
        self.layers, self.head = nn.ModuleList(LinearNorm() for _ in range(3)), nn.Linear(8, 5)
        self.reentrant = reentrant
        if inside:
            for layer in self.layers:
                layer.forward = functools.partial(self.checkpointed, layer.forward)

    def checkpointed(self, layer, x):
        return checkpoint(lambda x: dropout(layer(x), 0.3), x, use_reentrant=self.reentrant)

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = layer(x) if isinstance(layer.forward, functools.partial) else self.checkpointed(layer, x)
        return self.head(x)


def as_chosen(chosen):
    """The order of the experts is that of their samples, so another one on each rank."""
    return sorted(chosen, key=lambda i: (i + len(chosen)) % 3)


# Experts of the 8 samples, 2 in a microbatch, by step.
ALIKE, OTHERS, NONE = [0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0]
ALL = [0, 1, 2, 0, 1, 2, 0, 1]
ROUTED = {
    "experts differ": (TopExperts, [OTHERS, ALIKE, OTHERS]),
    "experts in another order": (lambda: TopExperts(as_chosen), [OTHERS, ALIKE, OTHERS]),
    "experts not called": (TopExperts, [NONE, NONE, OTHERS]),
    "experts in layers": (InLayers, [ALIKE, OTHERS]),
    "layers left out": (lambda: LayerDrop(lambda i, e: i != e), [OTHERS, ALIKE, OTHERS]),
    "layers left out later": (lambda: LayerDrop(lambda i, e: e == 0 or i != e), [NONE, OTHERS, OTHERS]),
    "layers run again": (lambda: LayerDrop(lambda i, e: 1 + (i == e)), [OTHERS, OTHERS]),
}
MODELS = {
    "linear, norm": lambda: Net(LinearNorm(), LinearNorm(), LinearNorm()),
    "norm, linear": lambda: Net(NormLinear(), NormLinear()),
    "conv, norm": lambda: Net(ConvNorm(), ConvNorm(), NormLinear()),
    "only norm": lambda: Net(LinearNorm(), OnlyNorm(), nn.Identity(), LinearNorm()),
    "encoder": Encoder,
    "tied": Tied,
    "handed": lambda: Net(Handed(), Handed(), LinearNorm()),
}


def loss_fn(net, batch):
    return cross_entropy(net(batch), batch["y"])


def batches(routes):
    g = torch.Generator().manual_seed(7)
    for e in routes:
        x, y = torch.randn(8, 8, generator=g), torch.randint(0, 5, (8,), generator=g)
        yield {"x": x, "y": y, "e": torch.tensor(e)}


@dataclasses.dataclass
class Row:
    model: Callable[[], nn.Module]
    policy: Any = "32"
    frozen: Any = None
    tx: Callable[[], Any] = lambda: optim.sgd(0.3)
    jit: bool = False
    routes: list[list[int]] = dataclasses.field(default_factory=lambda: [NONE])

    def run(self, plan):
        policy = ps.precision.policy(self.policy)
        tx = self.tx()
        state = policy.apply(ps.init(self.model, tx, seed=1, frozen=self.frozen))
        state = state if plan is None else plan.place(state)
        step = ps.make_step(loss_fn, tx, microbatches=4, policy=policy, plan=plan)
        if self.jit:
            step = ps.jit(step, backend="eager")
        metrics = {}
        for batch in batches(self.routes):
            state, metrics = step(state, batch)
        if not torch.isfinite(torch.stack([p.float().sum() for p in state.params.values()])).all():
            return f"not finite: {metrics}"
        seen = []
        if self.routes[-1] != NONE:
            evaluate = ps.make_eval(loss_fn, plan=plan, policy=policy)
            # As `fit` does: each rank evaluates a batch of its own, and they are called at the same time.
            own = self.routes[:2] if plan is None else [self.routes[dist.get_rank()]]
            seen = [ps.digest(evaluate(state, next(batches([route])))) for route in own]
            if plan is not None:
                everybody = [None, None]
                dist.all_gather_object(everybody, seen[0])
                seen = everybody
        return ps.digest(state if plan is None else plan.gather(state)) + "".join(seen)


def rows():
    keeps_some = ps.precision.policy("params=f32,compute=bf16,output=f32").where(["*.linear*"], compute="f32")
    scaled = ps.precision.policy("16-mixed", loss_scale=ps.precision.StaticLossScale(128.0))
    policies = {p: p for p in ("32", "bf16-mixed", "bf16-true", "bf16-master")} | {"16": scaled, "rules": keeps_some}
    for name, model in MODELS.items():
        for label, policy in policies.items():
            yield f"{name}|{label}", Row(model, policy)
    mixed = MODELS["linear, norm"]
    yield "frozen norms", Row(mixed, "bf16-mixed", frozen=["*.norm.*"])
    yield "frozen linears", Row(mixed, "bf16-mixed", frozen=["*.linear.*"])
    yield "frozen block", Row(mixed, "bf16-mixed", frozen=["blocks.1.*"])
    yield "skipped", Row(mixed, "16-mixed", routes=[NONE] * 3)
    yield "adamw", Row(mixed, "bf16-mixed", tx=lambda: optim.adamw(1e-2), routes=[NONE] * 3)
    yield "jit", Row(mixed, "bf16-mixed", jit=True, routes=[NONE] * 2)
    for label, reentrant in (("reentrant", True), ("not reentrant", False)):
        yield label, Row(functools.partial(Checkpointed, reentrant), "bf16-mixed", routes=[NONE] * 2)


def routed():
    for name, (model, routes) in ROUTED.items():
        for policy in ("32", "bf16-mixed"):
            yield f"{name}|{policy}", Row(model, policy, routes=routes)


def again(routes):
    """Run a layer again in a later step, where the first step agreed on an order in which all ran once."""
    row = Row(lambda: LayerDrop(lambda i, e: 1 + (i == 1 and e > 0)), routes=[NONE, routes])
    try:
        row.run(fsdp())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def inside(reentrant):
    """Run a checkpoint that is called inside of a unit."""
    try:
        Row(lambda: Checkpointed(reentrant, inside=True)).run(fsdp())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def infinite(net, batch):
    return loss_fn(net, batch) + net.blocks[1].norm.bias[7] * float("inf")


def refused(plan):
    """Tell the first gradient that is not finite, of which one rank has the part."""
    policy, tx = ps.precision.policy("16-mixed", loss_scale=ps.precision.StaticLossScale(1.0)), optim.sgd(0.1)
    state = policy.apply(ps.init(MODELS["linear, norm"], tx, seed=1))
    step = ps.make_step(infinite, tx, microbatches=4, policy=policy, plan=plan)
    placed = state if plan is None else plan.place(state)
    return not_finite(step.gradients(placed, next(batches([NONE]))), placed)


def left_by(plan):
    """Return how many bytes of tensors each of some steps leaves behind, beyond the state, without a collector."""
    tx = optim.adamw(1e-2)
    state = plan.place(ps.init(MODELS["linear, norm"], tx, seed=1, plan=plan))
    step = ps.make_step(loss_fn, tx, microbatches=4, plan=plan)
    evaluate = ps.make_eval(loss_fn, plan=plan)
    gc.collect()
    gc.disable()
    try:
        sizes = []
        for batch in batches([NONE] * 4):
            state, _ = step(state, batch)
            evaluate(state, batch)
            sizes.append(sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor))
        return [later - sizes[0] for later in sizes]
    finally:
        gc.enable()


def plans(model):
    modules = [name for name, _ in model.named_modules()]
    some = [glob for glob in ("blocks.1", "encoder.*.0") if any(ps.tree.matches((glob,), name) for name in modules)]
    return {
        "ddp": ddp(),
        "fsdp": fsdp(),
        "keep": fsdp(reshard_after_forward=False),
        "root": fsdp(units=()),
        "some": fsdp(units=some),
    }


def main(directory, size, number, cases, others):
    torch.set_num_threads(1)
    # Memory that is read before it is written is NaN, not by luck the right numbers of the microbatch before.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=number, world_size=size)
    found = {}
    for name, row in (*rows(), *routed()):
        if name.partition("|")[0] not in cases:
            continue
        for label, plan in plans(row.model()).items() if size > 1 else [("none", None)]:
            try:
                found[f"{name}|{label}"] = row.run(plan)
            except Exception:
                found[f"{name}|{label}"] = traceback.format_exc()
    if size > 1 and others:
        found["left"] = {name: left_by(plan) for name, plan in plans(MODELS["linear, norm"]()).items()}
        found["refused"] = [refused(plan) for plan in (ddp(), fsdp(units=()))]
        found["inside"] = [inside(reentrant) for reentrant in (True, False)]
        found["all again"] = again([1] * 8)
        # Of the last one only rank 1 has a second run, and it leaves: rank 0 must not go on with what it did not get.
        found["one again"] = again([0, 0, 1, 1, 0, 0, 1, 1])
    (Path(directory) / f"{size}-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split("|"), sys.argv[5] == "others")
