"""One process of several: train models in stages, and write the digests down as JSON.

Arguments: a directory, the sizes of the jobs to be part of one after the other, this process's number, and the rows to
compute, separated by semicolons.
"""

import contextlib
import dataclasses
import logging
import sys
import types
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep import errors, optim
from purestep.parallel import wire
from purestep.sharding import ddp, fsdp, pipeline, placement, zero1, zero2

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "shared"))
import gpt
import shared_rounding
from shared_ranks import answer

WIDTH, WORDS = 12, 20


def mlp():
    """The first layer of each stage writes into what it is given."""
    middle = [x for _ in range(3) for x in (nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Dropout(0.2))]
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.ReLU(inplace=True), nn.Linear(16, 3))


def mlp_loss(net, batch):
    logits = net(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"right": (logits.argmax(-1) == batch["y"]).float().mean()}


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BWT, mask_BT, *, scale):
        self.calls += 1
        y = self.layer(self.norm(x_BWT).transpose(1, 2)).transpose(1, 2)
        return x_BWT + F.dropout(y, 0.1, self.training) * mask_BT[:, None] * scale


class Odd(nn.Module):
    """Masks of the batch in every block, strides that are not those of a row, dropout and a draw between the blocks,
    buffers that change, a checkpoint, a parameter of the model itself, a frozen one, and one that three stages share.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Mixer() for _ in range(4))
        self.gate = nn.ModuleList(nn.Embedding(WORDS, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.gate[0].weight = self.gate[1].weight = self.embed.weight
        self.blocks[2].layer.weight.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        self.seen += ids.float().mean()
        mask = (ids != 0).float()
        if self.training and torch.rand(()) < 0.5:
            mask = mask * 0.9
        x = (self.embed(ids) * self.first).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = F.dropout(x, 0.1, self.training)
            x = ps.checkpoint(block, x, mask, scale=1.5) if i % 2 else block(x, mask, scale=1.5)
            if i in (1, 2):
                x = x + self.gate[i - 1](ids).transpose(1, 2)
        return self.head(x.transpose(1, 2))


def odd_loss(net, batch):
    logits = net(batch["x"])
    kept = batch["x"] != 0
    loss = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="none")
    loss = (loss * kept.flatten()).sum() / kept.sum().clamp(min=1)
    return ps.weighted(loss, kept.sum()), {"right": (logits.argmax(-1) == batch["y"]).float().mean()}


def gpt_loss(net, batch):
    return gpt.loss_fn(net, batch), {}


STAGES = {
    "mlp": {2: [["0-4"], ["5-11"]], 4: [["0"], ["1-4"], ["5-8"], ["9-11"]]},
    "odd": {
        2: [["embed", "first", "blocks.0-1", "gate.0"], ["gate.1", "blocks.2-3", "head"]],
        4: [["embed", "first", "blocks.0"], ["blocks.1", "gate.0"], ["blocks.2", "gate.1"], ["blocks.3", "head"]],
    },
    "gpt": {
        2: [["token", "position", "blocks.0"], ["blocks.1-2", "norm", "head"]],
        4: [["token", "position", "blocks.0"], ["blocks.1"], ["blocks.2"], ["norm", "head"]],
    },
}
MODELS = {"mlp": (mlp, mlp_loss), "odd": (Odd, odd_loss), "gpt": (gpt.GPT, gpt_loss)}
V = 4
TWO, FOUR = STAGES["odd"][2], STAGES["odd"][4]
# By name, the plans of a run by number of processes.
RUNS = {
    "stages": lambda: {4: pipeline(FOUR), 2: pipeline(TWO), 1: ddp()},
    "zero1": lambda: {4: zero1() * pipeline(TWO, 2), 2: zero2(), 1: ddp()},
    "fsdp": lambda: {4: fsdp() * pipeline(TWO, 2), 2: fsdp(2) * pipeline(TWO, 1), 1: ddp()},
}


def plans(size, model):
    """By name: the pipelines of so many ranks."""
    two, four = STAGES[model][2], STAGES[model][4]
    if size == 1:
        return {"one": ddp(), "1f1b": pipeline(two)}
    if size == 2:
        return {
            "1f1b": pipeline(two),
            "gpipe": pipeline(two, schedule="gpipe"),
            "interleaved": pipeline(four, schedule="interleaved"),
            "runs": pipeline(four),
        }
    turns = pipeline(four, 2, schedule="interleaved")
    return {
        "1f1b": pipeline(four),
        "gpipe": pipeline(four, schedule="gpipe"),
        "ddp": ddp() * pipeline(two, 2),
        "zero1": zero1() * pipeline(two, 2),
        "zero2": zero2() * pipeline(two, 2),
        "fsdp": fsdp() * pipeline(two, 2),
        "ddp, turns": ddp() * turns,
        "zero1, turns": zero1(min_size=100) * turns,
        "zero2, turns": turns * zero2(),
        "fsdp, turns": fsdp(fallback="pad") * turns,
    }


def data(model, count=2):
    g = torch.Generator().manual_seed(2)
    for n in range(count):
        if model == "mlp":
            # Microbatches of other sizes; then one pipeline of two has empty ones only.
            samples = (11, 2)[n]
            yield {"x": torch.randn(samples, 6, generator=g), "y": torch.randint(0, 3, (samples,), generator=g)}
        else:
            x, y = torch.randint(0, WORDS, (2, 16, 8), generator=g)
            yield {"x": x, "y": y}


def made(model, plan, policy=None, jit=None, **settings):
    factory, loss_fn = MODELS[model]
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2))
    chosen = ps.precision.policy(policy or "32")
    state = chosen.apply(ps.init(factory, tx, seed=1, plan=plan))
    state = state if policy is None else plan.place(state)
    step = ps.make_step(loss_fn, tx, microbatches=V, plan=plan, policy=policy, **settings)
    return state, step if jit is None else ps.jit(step, **jit), loss_fn


@contextlib.contextmanager
def noted():
    """Note what a pipeline sends and receives, in order: group, other rank, elements, further arguments."""
    found = []

    def noting(name):
        call = getattr(dist, name)

        def called(tensor, other, group, **further):
            found.append([name, group.group_name, other, tensor.numel(), *further])
            return call(tensor, other, group, **further)

        return called

    names = ("get_rank", "get_process_group_ranks")
    seen = {name: noting(name) for name in ("isend", "recv")} | {name: getattr(dist, name) for name in names}
    with patch.object(wire, "dist", types.SimpleNamespace(**seen)):
        yield found


def train(model, plan, **settings):
    with noted() as sent:
        return {**trained(model, plan, **settings), "sent": sent}


def trained(model, plan, **settings):
    state, step, loss_fn = made(model, plan, **settings)
    here = placement.local(state)
    held = sum(x.numel() for x in here.params.values())
    moments = sum(x.numel() for x in ps.tree.leaves(here.opt_state) if x.dim())
    losses = []
    for batch in data(model):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].compute()))
    evaluate = ps.make_eval(loss_fn, plan=plan, policy=settings.get("policy"))(state, batch)
    whole = plan.gather(state)
    return {
        "digest": ps.digest([whole, metrics, evaluate]),
        "losses": losses,
        "held": held,
        "moments": moments,
        "parameters": sum(x.numel() for x in whole.params.values()),
        "compiled": step.units.compiled if "jit" in settings and step.units is not None else 0,
        "refusals": step.refusals if "jit" in settings else (),
    }


def compiled(size, model):
    """By name, how a model is trained with the backend "eager": the bits are those of the step itself."""
    for label, plan in plans(size, model).items():
        if label in ("1f1b", "ddp", "interleaved"):
            jit = {"backend": "eager", "donate": label != "1f1b"}
            yield f"{label}, jit", lambda plan=plan, jit=jit: train(model, plan, jit=jit)
            jit = jit | {"unjittable": "eager"}
            yield f"{label}, unjittable", lambda plan=plan, jit=jit: train(model, plan, jit=jit)


def rounded(model, plan):
    """Train with a compiler that rounds: bits then show what is compiled, and what is compiled together."""
    with shared_rounding.compiler():
        return train(model, plan, jit={"backend": "eager", "by_unit": not plan.stages})


def resumed(directory, size, name, plans):
    """Begin a run on four processes, go on with it on two, and end it on one; there also in one go.

    Args:
        directory: of the job.
        size: number of processes.
        name: of the run.
        plans: by number of processes.
    """
    state, step, loss_fn = made("odd", plans[size])
    source = list(data("odd", 6))
    evaluate = ps.callbacks.evaluate(ps.make_eval(loss_fn, plan=plans[size]), source[:3], every=ps.every.steps(2))
    callbacks = [ps.callbacks.snapshots(every=ps.every.steps(2)), evaluate]

    def run(where, until):
        calls = []

        def counted(step, state, batch):
            calls.append(state.step.is_meta or type(state.step) is not torch.Tensor)  # the check before the first batch
            return step(state, batch)

        whole = ps.wrap_step(step, counted)
        result = ps.fit(whole, state, source, until=ps.steps(until), run_dir=directory / where, callbacks=callbacks)
        return {"digest": ps.digest(result.state), "loss": result.metrics["val/loss"], "steps": calls.count(False)}

    found = run(name, {4: 2, 2: 4, 1: 6}[size])
    return found if size > 1 else found | {"alone": run(f"{name} alone", 6)}


class Skip(nn.Module):
    """Uses what its first block makes after the second one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) + y


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Swapped(Skip):
    def forward(self, x):
        return self.a(self.b(self.a(x)))


class Reading(Skip):
    def forward(self, x):
        y = self.a(x)
        return self.b(y if y.sum() > 0 else -y)


class Writing(Skip):
    def forward(self, x):
        y = torch.zeros(len(x), 6)
        y += self.a(x)
        return self.b(y)


class Short(Skip):
    def forward(self, x):
        return self.a(x)


class Root(Skip):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.b(self.a(x) * self.scale)


def refused():
    """The words of what a pipeline refuses, and of what a rank says whose neighbour refused."""

    def words(factory, stages, change=lambda step: step, loss=lambda net, batch: net(batch).square().mean()):
        plan = pipeline(stages)
        try:
            tx = optim.sgd(0.1)
            state = ps.init(factory, tx, plan=plan)
            change(ps.make_step(loss, tx, microbatches=4, plan=plan))(state, torch.ones(8, 6))
        except errors.PurestepError as error:
            return str(error)
        return "nothing"

    def layers():
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))

    def outermost(step):
        return ps.jit(dataclasses.replace(step, plan=dataclasses.replace(step.plan, units=("0",))), backend="eager")

    return {
        "unstaged": words(layers, [["0"], ["1"]]),
        "no units": words(Skip, [["a"], ["b"]], ps.jit),
        "in a unit": words(lambda: nn.Sequential(layers(), nn.Linear(6, 6)), [["0.0-1"], ["0.2", "1"]], outermost),
        "few": words(layers, [["0"], ["1"], ["2"]]),
        "scalar": words(lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU()).append(Scaled()), [["0"], ["1-2"]]),
        "skip": words(Skip, [["a"], ["b"]]),
        "order": words(Swapped, [["a"], ["b"]]),
        "reading": words(Reading, [["a"], ["b"]]),
        "writing": words(Writing, [["a"], ["b"]]),
        "short": words(Short, [["a"], ["b"]]),
        "parameter": words(Root, [["a"], ["b", "scale"]]),
        "microbatches": words(layers, [["0"], ["1-2"]], lambda step: step.with_microbatches(1)),
    }


def checks(directory, size):
    for model in MODELS:
        for label, plan in plans(size, model).items():
            yield f"{model}|{label}", lambda model=model, plan=plan: train(model, plan)
            yield f"{model}|{label}, rounded", lambda model=model, plan=plan: rounded(model, plan)
            jit = {"donate": True, "by_unit": not plan.stages}
            yield f"{model}|{label}, inductor", lambda model=model, plan=plan, jit=jit: train(model, plan, jit=jit)
        for label, check in compiled(size, model):
            yield f"{model}|{label}", check
    label = {1: "one", 2: "interleaved", 4: "ddp"}[size]
    yield "gpt|bf16-mixed", lambda: train("gpt", plans(size, "gpt")[label], policy="bf16-mixed")
    for name, plans_of_run in RUNS.items():
        yield f"resumed|{name}", lambda name=name, chosen=plans_of_run: resumed(directory, size, name, chosen())
    from memory_cases import of_pipelines  # found once the script has said where

    yield from of_pipelines(size)
    if size == 4:
        return
    yield "odd|rule", lambda: train("odd", plans(size, "odd")["1f1b"], checkpoint="blocks.*")
    yield "odd|16-mixed", lambda: train("odd", plans(size, "odd")[label], policy="16-mixed")
    yield "mlp|bf16-master", lambda: train("mlp", plans(size, "mlp")[label], policy="bf16-master")
    yield "gpt|float8", lambda: train("gpt", plans(size, "gpt")[label], policy="float8")
    if size == 2:
        yield "refused", refused


def main(directory, sizes, number, rows):
    def asked(name):
        return name in rows or name.partition("|")[0] in rows

    logging.getLogger("purestep.jit").setLevel(logging.ERROR)  # of what runs uncompiled; the answers have it
    answer(directory, sizes, number, lambda size: checks(Path(directory), size), asked)


if __name__ == "__main__":
    main(sys.argv[1], [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3]), sys.argv[4].split(";"))
