"""What only a card can settle, in eight minutes: `make gpu`, or `python -m benchmarks.gpu --device cpu` to try it.

Each check prints one line of JSON, and an error of one is a line, too, never an end. No check begins once the budget of
seconds is used up. At the end stands a table in Markdown, also in `results/gpu-<card>.md`. Correctness comes first,
speed beside hand-written loops after it. Where several cards are there, plans run on all of them (`gpu_ranks`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import purestep as ps
from benchmarks import gpu_ranks

RESULTS = Path(__file__).parent / "results"
Check = Callable[["Card"], dict[str, Any]]


# --- models and batches -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int = 64, p: float = 0.0) -> None:
        super().__init__()
        hidden = [nn.Linear(32, width), nn.GELU(), nn.Dropout(p), nn.Linear(width, width), nn.LayerNorm(width)]
        self.body = nn.Sequential(*hidden, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Recomputed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return ps.checkpoint(self.body, x)


def cnn() -> nn.Module:
    first = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(p)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """124 M parameters by default, as GPT-2 has."""

    def __init__(self, width: int = 768, layers: int = 12, words: int = 50304, length: int = 1024, p: float = 0.0):
        super().__init__()
        self.token, self.position = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, max(width // 64, 2), p) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.token.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def classify(net: Any, batch: Any) -> Any:
    out = net(batch["x"])
    return F.cross_entropy(out, batch["y"]), {"accuracy": ps.metrics.accuracy(out, batch["y"])}


def next_word(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten())


def adamw() -> Any:
    rate = ps.optim.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=5, decay_steps=100)
    return ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(rate, weight_decay=0.1))


WAYS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda step: step,
    "donate": ps.donate,
    "jit": ps.jit,
    "jit donated": lambda step: ps.jit(step, donate=True),
    "reduce-overhead donated": lambda step: ps.jit(step, donate=True, mode="reduce-overhead"),
}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw fused": lambda: ps.optim.adamw(1e-3, fused=True),
    "lion": lambda: ps.optim.lion(1e-4),
    "adafactor": lambda: ps.optim.adafactor(1e-2),
    "muon": lambda: ps.optim.muon(0.02, adam_learning_rate=3e-4),
    "lamb": lambda: ps.optim.lamb(1e-3),
    "schedule_free": lambda: ps.optim.schedule_free_adamw(2.5e-3, warmup_steps=2),
    "average_params": lambda: ps.optim.average_params(ps.optim.adamw(1e-3), decay=0.99),
    "apply_if_finite": lambda: ps.optim.apply_if_finite(ps.optim.adamw(1e-3)),
    "lift": lambda: ps.optim.lift(torch.optim.AdamW, lr=1e-3),
    "add_noise": lambda: ps.optim.chain(ps.optim.add_noise(0.01, 0.55, seed=0), ps.optim.sgd(0.1)),
}
POLICIES = ("bf16-mixed", "bf16-true", "bf16-master", "16-mixed", "64")


# --- the card ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Card:
    """The device under test, the draws of the batches, and a directory for runs."""

    device: torch.device
    quick: bool
    root: Path
    processes: int = 1
    draws: torch.Generator = dataclasses.field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def is_card(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.is_card:
            torch.cuda.synchronize()

    def put(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.device) for name, x in batch.items()}

    def rows(self, count: int = 64) -> dict[str, Tensor]:
        labels = torch.randint(0, 10, (count,), generator=self.draws)
        return {"x": torch.randn(count, 32, generator=self.draws), "y": labels}

    def images(self, count: int = 64) -> dict[str, Tensor]:
        return {**self.rows(count), "x": torch.randn(count, 3, 16, 16, generator=self.draws)}

    def words(self, count: int) -> dict[str, Tensor]:
        known, length = (50304, 1024) if self.is_card else (256, 32)
        x = torch.randint(0, known, (count, length), generator=self.draws)
        return self.put({"x": x, "y": x})

    def gpt(self, p: float = 0.0) -> nn.Module:
        return GPT(p=p) if self.is_card else GPT(64, 2, 256, 32, p=p)

    def start(self, make: Callable[[], nn.Module], tx: Any, policy: str | None = None) -> Any:
        state = ps.init(make, tx, seed=0, device=self.device)
        return state if policy is None else ps.precision.policy(policy).apply(state)

    @contextlib.contextmanager
    def waits(self) -> Iterator[dict[str, int]]:
        """Count where the host waits for the card."""
        found: dict[str, int] = {}
        if not self.is_card:
            yield found
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for one in seen:
            if "synchroniz" in str(one.message).lower():
                place = f"{Path(one.filename).name}:{one.lineno}"
                found[place] = found.get(place, 0) + 1


def train(step: Any, state: Any, batches: Sequence[Any]) -> tuple[Any, list[float]]:
    metrics = []
    for batch in batches:
        state, found = step(state, batch)
        metrics.append(found)
    return state, [float(found["loss"].compute()) for found in metrics]


def worst(a: Any, b: Any) -> float:
    return max(float((a.params[name].cpu() - b.params[name].cpu()).abs().max()) for name in a.params)


def near(a: Sequence[float], b: Sequence[float], most: float = 2e-3) -> bool:
    return all(map(math.isfinite, a)) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < most


# --- does it compute what it should? ----------------------------------------------------------------------------------


def environment(card: Card) -> dict[str, Any]:
    found = {"torch": torch.__version__, "device": str(card.device), "chosen by default": str(ps.default_device())}
    if card.is_card:
        found |= {"card": torch.cuda.get_device_name(card.device), "cards": torch.cuda.device_count()}
        found |= {"capability": torch.cuda.get_device_capability(card.device), "cuda": torch.version.cuda}
    return found


def first_state(card: Card) -> dict[str, Any]:
    found = {}
    for deferred in (False, True):
        state = ps.init(Net, adamw(), seed=0, device=card.device, deferred=deferred)
        other = ps.init(Net, adamw(), seed=0, device="cpu", deferred=deferred)
        there = {x.device.type for x in ps.tree.leaves(state)} == {card.device.type}
        found["deferred" if deferred else "made"] = there and ps.digest(state) == ps.digest(other)
    return {"ok": all(found.values()), **found}


def draws(card: Card) -> dict[str, Any]:
    """Integers and uniforms have the bits of the CPU; normals may differ in the last one."""
    here, there = ps.random.key(7), ps.random.key(7, device=card.device)
    found = {"fold_in": torch.equal(ps.random.fold_in(here, 3, "a"), ps.random.fold_in(there, 3, "a").cpu())}
    some = torch.randint(0, 2**40, (1003,))
    for name in ("bits", "uniform", "randint"):
        draw = getattr(ps.random, name)
        found[name] = torch.equal(draw(here, (1003,)), draw(there, (1003,)).cpu())
        found[f"{name}, indexed"] = torch.equal(
            draw(here, (1003,), index=some), draw(there, (1003,), index=some.to(card.device)).cpu()
        )
        found[f"{name}, key of the host"] = torch.equal(
            draw(here, (1003,)), draw(here, (1003,), device=card.device).cpu()
        )
    found["mask"] = torch.equal(ps.random.bernoulli(here, 0.3, (1003,)), ps.random.bernoulli(there, 0.3, (1003,)).cpu())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, results = torch.randn(1003, dtype=torch.float64).to(dtype), []
        for key, device in ((here, torch.device("cpu")), (there, card.device), (here, card.device)):
            held = x.detach().to(device).requires_grad_()
            kept = ps.random.dropout(key, held, 0.3)
            kept.backward(torch.ones_like(kept))
            results.append(torch.stack([kept.detach(), held.grad]).cpu())
        found[f"dropout of {dtype}"] = all(torch.equal(results[0], other) for other in results[1:])
    normals = ps.random.normal(here, (1003,)) - ps.random.normal(there, (1003,)).cpu()
    return {"ok": all(found.values()), **found, "normals differ by": float(normals.abs().max())}


def attention_dropout(card: Card) -> dict[str, Any]:
    """Attention by the card's own kernels is a function of the key, and leaves the generator; time and memory."""
    shape = (4, 12, 1024, 64) if card.is_card else (1, 2, 64, 8)
    x = torch.randn(shape, device=card.device, dtype=torch.bfloat16)
    kinds = {"written out": contextlib.nullcontext, "kernels of the device": ps.random.device_dropout}

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)

    def call(seed: int) -> tuple[Tensor, Tensor]:
        held = x.detach().requires_grad_()
        out, _ = ps.apply(Attention(), {}, {}, held, rng=ps.random.key(seed))
        out.sum().backward()
        return out.detach(), held.grad

    found: dict[str, Any] = {"ok": True}
    for name, kind in kinds.items():
        with kind():
            before = torch.cuda.get_rng_state() if card.is_card else torch.get_rng_state()
            first, again, other = call(1), call(1), call(2)
            after = torch.cuda.get_rng_state() if card.is_card else torch.get_rng_state()
            same = torch.equal(before, after) and torch.equal(first[0], again[0])
            found["ok"] &= same and not torch.equal(first[0], other[0])
            found |= contest(card, {f"{name}, ms": lambda: lambda: call(3) and None}, 5)["ms"]
            if card.is_card:
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
                call(4)
                found[f"{name}, GiB"] = round((torch.cuda.max_memory_allocated() - base) / 2**30, 3)
    return found


class Attending(nn.Module):
    """One layer of attention with dropout over eight positions that are made of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(32, 2 * 8 * 16), nn.Linear(2 * 8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).unflatten(1, (2, 8, 16))
        return self.head(F.scaled_dot_product_attention(h, h, h, dropout_p=0.2, is_causal=True).flatten(1))


def attention_in_graphs(card: Card) -> dict[str, Any]:
    """Compiled and recorded steps draw the masks of the eager one, by the card's own kernels, without a wait."""
    policy = ps.precision.policy("bf16-mixed", dropout="device")
    found: dict[str, Any] = {"ok": True}
    tx, batches = adamw(), [card.put(card.rows()) for _ in range(6)]
    step = ps.make_step(classify, tx, policy=policy)
    expected = train(step, policy.apply(card.start(Attending, tx)), batches)[1]
    for name in ("jit", "jit donated", "reduce-overhead donated"):
        compiled = WAYS[name](step)
        state, losses = train(compiled, policy.apply(card.start(Attending, tx)), batches)
        with card.waits() as waits:
            for _ in range(3):
                state, _ = compiled(state, batches[0])
        found["ok"] &= near(losses, expected, 2e-2) and not waits
        found[name] = {"losses differ by": max(abs(a - b) for a, b in zip(losses, expected, strict=True))}
        found[name] |= {"waits in 3 steps": waits}
    return found


def repeatable(card: Card) -> dict[str, Any]:
    tx = adamw()
    step, batches = ps.make_step(classify, tx, microbatches=4), [card.put(card.rows()) for _ in range(5)]
    digests = {ps.digest(train(step, card.start(lambda: Net(p=0.1), tx), batches)[0]) for _ in range(3)}
    return {"ok": len(digests) == 1, "digests of 3 trainings": len(digests)}


def way(name: str, make: Callable[[], nn.Module], images: bool) -> Check:
    def check(card: Card) -> dict[str, Any]:
        tx, batches = adamw(), [card.put(card.images() if images else card.rows()) for _ in range(6)]
        base = ps.make_step(classify, tx)
        plain, expected = train(base, card.start(make, tx), batches)
        step = WAYS[name](base)
        state, losses = train(step, card.start(make, tx), batches)
        found = {"ok": near(losses, expected), "params differ by": worst(plain, state)}
        with card.waits() as waits:
            for _ in range(3):
                state, _ = step(state, batches[0])
        return {**found, "ok": found["ok"] and not waits, "waits in 3 steps": waits}

    return check


def recomputation(card: Card) -> dict[str, Any]:
    """The backward pass runs in threads of the device: are keys, casts and bindings there?"""
    batches, found = [card.put(card.rows()) for _ in range(3)], {}
    for policy in (None, "bf16-mixed"):
        tx = adamw()
        step = ps.make_step(classify, tx, policy=policy)
        stored = train(step, card.start(lambda: Net(p=0.3), tx, policy), batches)[0]
        again = train(step, card.start(lambda: Recomputed(p=0.3), tx, policy), batches)[0]
        found[str(policy)] = worst(stored, again)
    return {"ok": max(found.values()) < 1e-5, "params differ by": found}


def policy_of(name: str) -> Check:
    def check(card: Card) -> dict[str, Any]:
        tx, batches = adamw(), [card.put(card.rows()) for _ in range(6)]
        expected = train(ps.make_step(classify, tx), card.start(Net, tx), batches)[1]
        step = ps.make_step(classify, tx, policy=name)
        state, losses = train(step, card.start(Net, tx, name), batches)
        with card.waits() as waits:
            step(state, batches[0])
        return {"ok": near(losses, expected, 0.05) and not waits, "waits": waits}

    return check


def optimizer_of(name: str) -> Check:
    def check(card: Card) -> dict[str, Any]:
        batches, tx = [card.rows() for _ in range(4)], OPTIMIZERS[name]()
        step = ps.make_step(classify, tx)
        state, losses = train(step, card.start(Net, tx), [card.put(batch) for batch in batches])
        expected = train(step, ps.init(Net, tx, seed=0, device="cpu"), batches)[1]
        batch = card.put(batches[0])
        with card.waits() as waits:
            step(state, batch)
        return {"ok": near(losses, expected) and not waits, "waits": waits}

    return check


def run(card: Card, run_dir: Path | None, steps: int, *, jit: bool = False) -> Any:
    card.draws.manual_seed(5)
    tx = adamw()
    step = ps.make_step(classify, tx)
    every = ps.every.steps(10)
    callbacks: list[Any] = [ps.callbacks.log(every=ps.every.steps(50))]
    if run_dir is not None:
        held = ps.data.batches(card.rows(), 32, shuffle=False)
        callbacks += [ps.callbacks.evaluate(classify, held, every=every), ps.callbacks.snapshots(every=every)]
    data = ps.data.batches(card.rows(600), 32, seed=0)
    step = ps.jit(step, donate=True) if jit else step
    state = card.start(lambda: Net(p=0.1), tx)
    return ps.fit(step, state, data, until=ps.steps(steps), run_dir=run_dir, callbacks=callbacks)


def fit(card: Card) -> dict[str, Any]:
    run(card, None, 5)
    with card.waits() as waits:
        result = run(card, None, 60)
    return {"waits in 60 steps": waits, "seconds": result.seconds}


def resume(jit: bool) -> Check:
    def check(card: Card) -> dict[str, Any]:
        whole = ps.digest(run(card, card.root / f"whole{jit}", 50, jit=jit).state)
        run(card, card.root / f"parts{jit}", 23, jit=jit)
        parts = ps.digest(run(card, card.root / f"parts{jit}", 50, jit=jit).state)
        return {"ok": whole == parts, "digest": whole[:12]}

    return check


def snapshots(card: Card) -> dict[str, Any]:
    tx = adamw()
    state, _ = train(ps.make_step(classify, tx), card.start(Net, tx), [card.put(card.rows())] * 2)
    with ps.snapshot.Store(card.root / "store") as store:
        with card.waits() as waits:
            store.save(2, state)
        store.wait()
        found = [store.restore(like).value for like in (card.start(Net, tx), ps.init(Net, tx, device="cpu"))]
    return {"ok": {ps.digest(x) for x in found} == {ps.digest(state)}, "waits": waits}


def purity(card: Card) -> dict[str, Any]:
    tx = adamw()
    ps.testing.check_pure(ps.make_step(classify, tx), card.start(lambda: Net(p=0.1), tx), card.put(card.rows()))
    return {}


def ensemble(card: Card) -> dict[str, Any]:
    tx = ps.optim.adamw(1e-3)
    states = [card.start(Net, tx).replace(rng=ps.random.key(i, device=card.device)) for i in range(3)]
    stacked, batch = ps.tree.map(lambda *x: torch.stack(x), *states), card.put(card.rows())
    _, metrics = torch.vmap(ps.make_step(classify, tx), in_dims=(0, None))(stacked, batch)
    return {"losses": metrics["loss"].compute().tolist()}


def plans_alone(card: Card) -> dict[str, Any]:
    batch, digests = card.put(card.rows()), set()
    for plan in (ps.sharding.ddp(), ps.sharding.fsdp()):
        tx = adamw()
        state = ps.init(Net, tx, seed=0, plan=plan, device=card.device)
        digests.add(ps.digest(train(ps.make_step(classify, tx, microbatches=4, plan=plan), state, [batch] * 2)[0]))
    return {"ok": len(digests) == 1}


def plans_on_processes(card: Card) -> dict[str, Any]:
    if card.processes < 2:
        return {"ok": None, "left out": "one card"}
    return gpu_ranks.on_processes(card.device.type, card.processes, card.root, card.quick)


# --- how fast? --------------------------------------------------------------------------------------------------------


def by_hand(card: Card, make: Any, loss: Any, batch: Any, bf16: bool, mode: str | None) -> Callable[[], None]:
    """A loop without a trainer: fused AdamW, clipping, autocast; compiled in a mode of torch.compile, or eager."""
    net = make().to(card.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def forward() -> Tensor:
        with torch.autocast(card.device.type, torch.bfloat16, enabled=bf16):
            found = loss(net, batch)
        return found[0] if isinstance(found, tuple) else found

    called = forward if mode is None else torch.compile(forward, mode=mode)

    def once() -> None:
        optimizer.zero_grad()
        called().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return once


def ours(card: Card, make: Any, loss: Any, batch: Any, bf16: bool, name: str) -> Callable[[], None]:
    policy = "bf16-mixed" if bf16 else None
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-3, weight_decay=0.1))
    step, held = WAYS[name](ps.make_step(loss, tx, policy=policy)), [card.start(make, tx, policy)]

    def once() -> None:
        held[0] = step(held[0], batch)[0]

    return once


def contest(card: Card, makers: dict[str, Callable[[], Callable[[], None]]], steps: int) -> dict[str, Any]:
    """Time ways of the same step in turns; the median of rounds, in ms a step, and the peak of the first two steps."""
    runs, peaks, failed = {}, {}, {}
    for name, make in makers.items():
        try:
            if card.is_card:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if card.is_card else 0
            once = make()
            for _ in range(4):
                once()
            card.sync()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if card.is_card else None
            runs[name] = once
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3 if card.quick else 5):
        for name, once in runs.items():
            card.sync()
            start = time.perf_counter()
            for _ in range(steps):
                once()
            card.sync()
            times[name].append((time.perf_counter() - start) / steps * 1e3)
    found = {"ms": {name: round(statistics.median(values), 3) for name, values in times.items()}}
    found |= {"peak GiB": {name: round(peak, 2) for name, peak in peaks.items() if peak is not None}}
    return {"ok": not failed, **found, **({"failed": failed} if failed else {})}


def beside(card: Card, make: Any, loss: Any, batch: Any, bf16: bool, steps: int) -> dict[str, Any]:
    makers: dict[str, Any] = {}
    for name, mode in {"eager": None, "compile": "default", "compile reduce-overhead": "reduce-overhead"}.items():
        makers[f"torch {name}"] = lambda mode=mode: by_hand(card, make, loss, batch, bf16, mode)
    for name in ("donate", "jit donated", "reduce-overhead donated"):
        makers[f"purestep {name}"] = lambda name=name: ours(card, make, loss, batch, bf16, name)
    found = contest(card, makers, steps)
    targets = {
        "jit donated with graphs / compile reduce-overhead, at most 1.0": (
            "purestep reduce-overhead donated",
            "torch compile reduce-overhead",
        ),
        "eager donated / eager by hand, at most 1.1": ("purestep donate", "torch eager"),
    }
    ms = found["ms"]
    return found | {t: round(ms[a] / ms[b], 3) for t, (a, b) in targets.items() if a in ms and b in ms}


def speed_mlp(card: Card) -> dict[str, Any]:
    return beside(card, lambda: Net(256), classify, card.put(card.rows(128)), False, 50)


def speed_cnn(card: Card) -> dict[str, Any]:
    return beside(card, cnn, classify, card.put(card.images(128)), False, 20 if card.is_card else 5)


def speed_gpt(card: Card) -> dict[str, Any]:
    return beside(card, card.gpt, next_word, card.words(8 if card.is_card else 2), True, 10 if card.is_card else 2)


def speed_dropout(card: Card) -> dict[str, Any]:
    """What dropout adds to a step of the GPT; the target is 3 %."""
    batch, makers = card.words(4 if card.is_card else 2), {}
    for p in (0.0, 0.1):
        for name in ("donate", "jit donated"):
            make = lambda p=p: card.gpt(p)  # noqa: E731
            makers[f"{name} p={p}"] = lambda make=make, name=name: ours(card, make, next_word, batch, True, name)
    found = contest(card, makers, 5 if card.is_card else 2)
    ms = found["ms"]
    added = {name: ms[f"{name} p=0.1"] / ms[f"{name} p=0.0"] - 1 for name in ("donate", "jit donated")}
    return found | {"dropout adds": {name: round(share, 3) for name, share in added.items()}}


def checks() -> dict[str, Check]:
    found: dict[str, Check] = {"environment": environment, "first state": first_state, "draws": draws}
    found |= {"attention with dropout": attention_dropout}
    found |= {"repeatable": repeatable, "recomputation": recomputation, "fit": fit, "snapshots": snapshots}
    for name in WAYS:
        found[f"mlp, {name}"] = way(name, lambda: Net(p=0.1), False)
    for name in ("eager", "jit donated", "reduce-overhead donated"):
        found[f"cnn, {name}"] = way(name, cnn, True)
    found["fused attention in graphs"] = attention_in_graphs
    found |= {f"policy {name}": policy_of(name) for name in POLICIES}
    found |= {f"optimizer {name}": optimizer_of(name) for name in OPTIMIZERS}
    found |= {"purity": purity, "ensemble": ensemble, "plans in one process": plans_alone}
    found["plans on processes"] = plans_on_processes
    found |= {"resume": resume(False), "speed of the MLP": speed_mlp, "speed of the GPT in bf16": speed_gpt}
    found |= {"cost of dropout": speed_dropout, "speed of the CNN": speed_cnn, "resume, jit": resume(True)}
    return found


# --- running them -----------------------------------------------------------------------------------------------------


def performed(name: str, check: Check, card: Card) -> dict[str, Any]:
    """Return what a check found; an error is a finding."""
    start = time.perf_counter()
    try:
        found = {"ok": True, **check(card)}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        at = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500], "at": at}
    if card.is_card:
        with contextlib.suppress(RuntimeError):
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return {"check": name, **found, "s": round(time.perf_counter() - start, 1)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the findings as Markdown."""
    words = {True: "yes", False: "**no**", None: "-"}
    lines = ["| check | holds | s | found |", "|---|---|---|---|"]
    for row in rows:
        rest = {name: value for name, value in row.items() if name not in ("check", "ok", "s")}
        shown = json.dumps(rest, default=str)[1:-1].replace("|", "\\|")
        lines.append(f"| {row['check']} | {words[row['ok']]} | {row['s']} | {shown} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks; return 0 unless one does not hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, help="of the plans; by default one for each card")
    parser.add_argument("--quick", action="store_true", help="fewer rounds of timing")
    parser.add_argument("--only", default="", help="names of checks, or beginnings of them, with commas between")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no check begins")
    parser.add_argument("--out", type=Path, help="where the table goes; by default results/gpu-<card>.md on a card")
    told = parser.parse_args(words)
    root = Path(tempfile.mkdtemp(prefix="purestep-gpu-"))
    device = torch.device(told.device)
    cards = torch.cuda.device_count() if device.type == "cuda" else 1
    card = Card(device, told.quick, root, cards if told.processes is None else told.processes)
    start, rows = time.monotonic(), []
    only = tuple(filter(None, told.only.split(",")))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root / "inductor")  # the one of the machine may hold half a kernel
    try:
        for name, check in checks().items():
            if only and not name.startswith(only):
                continue
            left = time.monotonic() - start < told.budget
            row = performed(name, check, card) if left else {"check": name, "ok": None, "s": 0.0, "left out": "no time"}
            rows.append(row)
            print(json.dumps(row, default=str), flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(table(rows))
    out = told.out
    if out is None and card.is_card and not only:
        out = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name(card.device).lower())}.md"
    if out is not None:
        out.write_text(table(rows))
    return 1 if any(row["ok"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
