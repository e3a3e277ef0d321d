"""A step of 64 small MLPs: stacked under `torch.vmap` and compiled once, against one after another.

All in one process and in turns, because a ratio is wanted. Times are CPU time: the process has one thread.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.training import Say, spread

MEMBERS, SIZES, BATCH = 64, (64, 128, 128, 10), 32


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{"ms": {name: median}, "ratio": {name: spread of stacked / name}, "compile": {name: seconds}}`."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="purestep-bench-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # this section has a process of its own
        turns, compiled = _turns()
    for turn in turns.values():
        turn()
    each: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(settings.ensemble_rounds):
        for name, turn in turns.items():
            started = time.process_time()
            turn()
            each[name].append((time.process_time() - started) * 1e3)
    ratios = {
        name: spread([a / b for a, b in zip(each["stacked"], times, strict=True)])
        for name, times in each.items()
        if name != "stacked"
    }
    say("64 MLPs stacked / " + ", ".join(f"{name} {ratio[0]:.2f}" for name, ratio in ratios.items()))
    return {
        "members": MEMBERS,
        "ms": {name: statistics.median(times) for name, times in each.items()},
        "ratio": ratios,
        "compile": compiled,
    }


def _turns() -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """Return one training step of all members for each way, and the seconds of compiling with an empty cache."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    import purestep as ps

    def model() -> nn.Module:
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, SIZES[0], generator=generator)
    batch = {"x": x, "y": torch.randint(0, SIZES[-1], (BATCH,), generator=generator)}
    tx = ps.optim.adamw(1e-3)
    step = ps.make_step(lambda net, b: cross_entropy(net(b["x"]), b["y"]), tx)
    alone = [ps.init(model, tx, seed=seed) for seed in range(MEMBERS)]
    together = [ps.tree.map(lambda *leaves: torch.stack(leaves), *alone)]
    one = ps.jit(step, donate=True)
    many = ps.jit(lambda states, b: torch.vmap(step, in_dims=(0, None))(states, b), donate=True)
    # What the first compilation of a process imports is no part of either.
    ps.jit(lambda x: x.sin() + 1)(torch.ones(3))
    seconds = {}
    for name, compiled, states in (("one", one, alone[0]), ("stacked", many, together[0])):
        started = time.perf_counter()
        compiled.compile(states, batch)
        seconds[name] = time.perf_counter() - started
    nets = [model() for _ in range(MEMBERS)]
    optimizers = [torch.optim.AdamW(net.parameters(), 1e-3) for net in nets]

    def stacked() -> None:
        together[0], _ = many(together[0], batch)

    def sequential() -> None:
        for i, state in enumerate(alone):
            alone[i], _ = one(state, batch)

    def by_hand() -> None:
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(net(batch["x"]), batch["y"]).backward()
            optimizer.step()

    return {"stacked": stacked, "one after another, compiled": sequential, "hand-written loops": by_hand}, seconds
