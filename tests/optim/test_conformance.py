"""The conformance table: one row per optimizer, every row through every test. To add an optimizer, add its row.

A row names an oracle (torch.optim or optax) and how close the two are: `exact` compares float32 leaves bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared_marks import slow_but
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from purestep import optim, testing, tree
from purestep.optim.base import GradientTransformation
from purestep.optim.kernels import sliced

LR = 2.0**-6  # a power of two: multiplying by it commutes with rounding, so the order of factors cannot show
T = torch.optim


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], GradientTransformation]
    torch: Callable[[Any], torch.optim.Optimizer] | None = None
    optax: Callable[[Any], Any] | None = None
    exact: bool = False
    rtol: float = 2e-5
    smooth: bool = True  # differentiable: no signs, no bfloat16 inside
    nan_safe: bool = False  # NaN gradients are meant to vanish
    value_fn: bool = False  # takes the loss as a function
    square: bool = False  # the oracle takes matrices only


def _adv(ox: Any) -> Any:
    return ox.chain(ox.contrib.normalize(), ox.sgd(0.05))


ROWS = [
    Row("sgd", lambda: optim.sgd(LR), lambda p: T.SGD(p, LR, foreach=True), exact=True),
    Row("sgd momentum", lambda: optim.sgd(LR, 0.9), lambda p: T.SGD(p, LR, momentum=0.9, foreach=True), exact=True),
    Row(
        "sgd nesterov",
        lambda: optim.sgd(LR, 0.9, nesterov=True),
        lambda p: T.SGD(p, LR, momentum=0.9, nesterov=True, foreach=True),
        exact=True,
    ),
    Row(
        "sgd dampening",
        lambda: optim.sgd(LR, 0.9, dampening=0.5),
        lambda p: T.SGD(p, LR, momentum=0.9, dampening=0.5, foreach=True),
        exact=True,
    ),
    Row(
        "sgd fused",
        lambda: optim.sgd(LR, 0.9, fused=True),
        lambda p: T.SGD(p, LR, momentum=0.9, fused=True),
    ),
    Row("adam", lambda: optim.adam(1e-2), lambda p: T.Adam(p, 1e-2, foreach=True), exact=True),
    Row("adam fused", lambda: optim.adam(1e-2, fused=True), lambda p: T.Adam(p, 1e-2, fused=True)),
    Row("adam nesterov", lambda: optim.adam(1e-2, nesterov=True), optax=lambda ox: ox.nadam(1e-2)),
    Row(
        "adam l2",
        lambda: optim.chain(optim.add_decayed_weights(0.1), optim.adam(1e-2)),
        lambda p: T.Adam(p, 1e-2, weight_decay=0.1, foreach=True),
        exact=True,
    ),
    Row(
        "adamw",
        lambda: optim.adamw(1e-2, weight_decay=0.1),
        lambda p: T.AdamW(p, 1e-2, weight_decay=0.1, foreach=True),
    ),
    Row(
        "adamw as optax", lambda: optim.adamw(1e-2, weight_decay=0.1), optax=lambda ox: ox.adamw(1e-2, weight_decay=0.1)
    ),
    Row("amsgrad", lambda: optim.amsgrad(1e-2), lambda p: T.Adam(p, 1e-2, amsgrad=True, foreach=True), exact=True),
    Row("nadam", lambda: optim.nadam(1e-2), lambda p: T.NAdam(p, 1e-2, foreach=True)),
    Row(
        "nadamw",
        lambda: optim.nadamw(1e-2),
        lambda p: T.NAdam(p, 1e-2, weight_decay=1e-2, decoupled_weight_decay=True, foreach=True),
    ),
    Row("radam", lambda: optim.radam(LR), lambda p: T.RAdam(p, LR, foreach=True)),
    Row("adamax", lambda: optim.adamax(LR), lambda p: T.Adamax(p, LR, foreach=True), exact=True),
    Row("adagrad", lambda: optim.adagrad(LR), lambda p: T.Adagrad(p, LR, foreach=True), exact=True),
    Row("adadelta", lambda: optim.adadelta(), lambda p: T.Adadelta(p, foreach=True), exact=True),
    Row("rmsprop", lambda: optim.rmsprop(LR), lambda p: T.RMSprop(p, LR, foreach=True), exact=True),
    Row(
        "rmsprop centered",
        lambda: optim.rmsprop(LR, 0.9, momentum=0.9, centered=True),
        lambda p: T.RMSprop(p, LR, alpha=0.9, momentum=0.9, centered=True, foreach=True),
        rtol=2e-4,
    ),
    Row("rprop", lambda: optim.rprop(LR), lambda p: T.Rprop(p, LR, foreach=True), exact=True, smooth=False),
    Row("lion", lambda: optim.lion(LR), optax=lambda ox: ox.lion(LR), smooth=False),
    Row("sign_sgd", lambda: optim.sign_sgd(LR), optax=lambda ox: ox.sign_sgd(LR), smooth=False),
    Row("lamb", lambda: optim.lamb(LR, weight_decay=0.1), optax=lambda ox: ox.lamb(LR, weight_decay=0.1)),
    Row("lars", lambda: optim.lars(1.0, weight_decay=0.1), optax=lambda ox: ox.lars(1.0, weight_decay=0.1)),
    Row("adafactor", lambda: optim.adafactor(LR), lambda p: T.Adafactor(p, LR, foreach=False)),
    Row("adan", lambda: optim.adan(LR), optax=lambda ox: ox.adan(LR)),
    Row("adabelief", lambda: optim.adabelief(LR), optax=lambda ox: ox.adabelief(LR), rtol=2e-4),
    Row("yogi", lambda: optim.yogi(LR), optax=lambda ox: ox.yogi(LR)),
    Row(
        "muon",
        lambda: optim.muon(LR),
        lambda p: T.Muon(p, LR),
        rtol=1e-2,
        smooth=False,
        square=True,
    ),
    Row("sophia", lambda: optim.sophia(LR), optax=lambda ox: _frozen_sophia(ox), value_fn=True, smooth=False),
    Row(
        "schedule_free_adamw",
        lambda: optim.schedule_free_adamw(LR),
        optax=lambda ox: ox.contrib.schedule_free_adamw(LR),
    ),
    Row(
        "sam",
        lambda: optim.sam(optim.sgd(LR, 0.9), rho=0.05),
        optax=lambda ox: ox.contrib.sam(ox.sgd(LR, 0.9), _adv(ox), opaque_mode=True),
        value_fn=True,
    ),
    Row(
        "lbfgs",
        lambda: optim.lbfgs(0.5, memory_size=5, max_linesearch_steps=0),
        lambda p: T.LBFGS(p, lr=0.5, max_iter=1, history_size=5, tolerance_grad=0, tolerance_change=0),
        rtol=1e-3,
        value_fn=True,
    ),
    Row("lbfgs line search", lambda: optim.lbfgs(max_linesearch_steps=4), value_fn=True, smooth=False),
    Row("prune", lambda: optim.prune(optim.sgd(LR, 0.9), 0.25), smooth=False),
    Row(
        "lookahead",
        lambda: optim.lookahead(optim.sgd(LR), 5, slow_step_size=0.5),
        optax=lambda ox: _optax_lookahead(ox),
    ),
]
IDS = [row.name for row in ROWS]
ORACLES = [row for row in ROWS if row.torch or row.optax]
SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (7, 5), "a.bias": (7,), "gain": (), "conv.kernel": (3, 2, 5)}


def random_tree(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shapes[name], generator=generator, dtype=dtype) for name in sorted(shapes)}


def target_loss(params: Any) -> Tensor:
    """A loss with a curvature that differs from weight to weight, and a third derivative."""
    return torch.stack([((p * 0.7 - 0.3) ** 2).sum() + 0.05 * torch.cos(p).sum() for p in tree.leaves(params)]).sum()


def extras(row: Row, step: int | Tensor) -> dict[str, Any]:
    given: dict[str, Any] = {"step": torch.as_tensor(step)}
    return given | {"value_fn": target_loss} if row.value_fn else given


def gradients(row: Row, params: Any, seed: int, step: int) -> Any:
    if row.value_fn:
        return torch.func.grad(target_loss)(params)
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    return {n: g.to(params[n].dtype) for n, g in random_tree(1000 * seed + step, shapes).items()}


def run(row: Row, params: Any, seed: int, steps: int = 20) -> tuple[Any, Any]:
    tx = row.make()
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(gradients(row, params, seed, step), state, params, **extras(row, step))
        params = optim.apply_updates(params, updates)
    return params, state


# --- oracles --------------------------------------------------------------------------------------------------------


def _frozen_sophia(ox: Any) -> Any:
    """optax's sophia with our estimate of the diagonal, which for a diagonal Hessian does not depend on the signs."""
    import jax

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        return jax.tree.map(lambda p: 0.98 - 0.05 * jax.numpy.cos(p), params), state

    estimate = ox.GradientTransformation(lambda params: (), update)
    return ox.contrib.sophia(LR, hessian_diagonal_fn=estimate)


def _optax_lookahead(ox: Any) -> Any:
    inner = ox.lookahead(ox.sgd(LR), sync_period=5, slow_step_size=0.5)
    slow: dict[str, Any] = {}

    def init(params: Any) -> Any:
        slow["params"] = params
        return inner.init(ox.LookaheadParams.init_synced(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        both = ox.LookaheadParams(fast=params, slow=slow["params"])
        changes, state = inner.update(updates, state, both)
        slow["params"] = ox.apply_updates(slow["params"], changes.slow)
        return changes.fast, state

    return ox.GradientTransformation(init, update)


SQUARE = {"w": (9, 4), "v": (3, 11)}


@functools.cache
def compared(name: str, seed: int) -> tuple[Any, Any]:
    """Parameters after 20 steps here and at the oracle; computed once, for the test and for the printed table."""
    row = next(row for row in ROWS if row.name == name)
    params = random_tree(seed, SQUARE if row.square else SHAPES)
    return run(row, params, seed)[0], (torch_oracle if row.torch else optax_oracle)(row, params, seed)


def torch_oracle(row: Row, params: Any, seed: int, steps: int = 20) -> Any:
    assert row.torch is not None
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = row.torch(list(theirs.values()))
    for step in range(steps):
        for name, g in gradients(row, {n: p.detach() for n, p in theirs.items()}, seed, step).items():
            theirs[name].grad = g.clone()
        if isinstance(optimizer, T.LBFGS):
            optimizer.step(lambda: target_loss(theirs))
        else:
            optimizer.step()
    return {name: p.detach() for name, p in theirs.items()}


def optax_oracle(row: Row, params: Any, seed: int, steps: int = 20) -> Any:
    import jax
    import numpy as np
    import optax

    assert row.optax is not None
    optimizer = row.optax(optax)
    theirs = {name: jax.numpy.asarray(p.numpy()) for name, p in params.items()}
    state = optimizer.init(theirs)
    update = optimizer.update if row.name in ("sam", "lookahead") else jax.jit(optimizer.update)
    options: dict[str, Any] = {}

    def grad_fn(at: Any, _: int = 0) -> Any:
        back = {name: torch.from_numpy(np.array(p)) for name, p in at.items()}
        return {name: jax.numpy.asarray(g.numpy()) for name, g in torch.func.grad(target_loss)(back).items()}

    if row.name == "sam":
        options["grad_fn"] = grad_fn
    for step in range(steps):
        current = {name: torch.from_numpy(np.array(p)) for name, p in theirs.items()}
        grads = {n: jax.numpy.asarray(g.numpy()) for n, g in gradients(row, current, seed, step).items()}
        updates, state = update(grads, state, theirs, **options)
        theirs = optax.apply_updates(theirs, updates)
    return {name: torch.from_numpy(np.array(p)) for name, p in theirs.items()}


@pytest.mark.parametrize("seed", slow_but([0, 1], 0))
@pytest.mark.parametrize("row", slow_but(ORACLES, *ORACLES[::2]), ids=[row.name for row in ORACLES])
def test_agrees_with_its_oracle(row: Row, seed: int) -> None:
    ours, theirs = compared(row.name, seed)
    if row.exact:
        assert not (found := tree.diff(ours, theirs)), f"\n{found}"
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=row.rtol, atol=row.rtol, msg=lambda m, n=name: f"{n}: {m}")


# Not torch's fused SGD, which computes half precision wrongly on CPUs (torch 2.13); ours does not take that kernel.
BF16 = [row for row in ORACLES if row.torch and not row.value_fn and not row.square and row.name != "sgd fused"]


@pytest.mark.parametrize("row", BF16, ids=[row.name for row in BF16])
def test_agrees_in_bfloat16(row: Row) -> None:
    params = {n: p.bfloat16() if n != "a.bias" else p for n, p in random_tree(5).items()}
    ours, _ = run(row, params, 5, steps=5)
    theirs = torch_oracle(row, params, 5, steps=5)
    assert {n: p.dtype for n, p in ours.items()} == {n: p.dtype for n, p in params.items()}
    for name, p in ours.items():
        torch.testing.assert_close(p.float(), theirs[name].float(), rtol=4e-2, atol=4e-2)


# --- properties of every row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_takes_unknown_extras_and_changes_nothing(row: Row) -> None:
    tx = row.make()
    params, state = run(row, random_tree(3), 3, steps=2)  # a state of zeros would hide a change
    grads = gradients(row, params, 3, 0)
    before = tree.digest((params, grads, state))
    first = tx.update(grads, state, params, **extras(row, 0), loss_of_another_kind=torch.ones(()), verbose=True)
    second = tx.update(grads, state, params, **extras(row, 0))
    assert tree.digest((params, grads, state)) == before
    assert tree.equal(first, second)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_state_keeps_its_structure_shapes_and_dtypes(row: Row) -> None:
    params = {n: p.bfloat16() if n == "gain" else p for n, p in random_tree(4).items()}
    before = row.make().init(params)
    after_params, after = run(row, params, 4, steps=3)
    assert tree.structure(before) == tree.structure(after)
    assert [tree.describe(x) for x in tree.leaves(before)] == [tree.describe(x) for x in tree.leaves(after)]
    assert [tree.describe(x) for x in tree.leaves(params)] == [tree.describe(x) for x in tree.leaves(after_params)]
    assert all(isinstance(x, Tensor) for x in tree.leaves(after))


@pytest.mark.parametrize("accept", [None, True, False])
@pytest.mark.parametrize("row", slow_but(ROWS, *ROWS[1::4]), ids=IDS)
def test_slices_and_donated_memory_change_no_bit(row: Row, accept: bool | None, monkeypatch: Any) -> None:
    """`blocks.advance` gives the bits of `update` and `apply`, cut or not, in place or not."""
    shapes = SQUARE if row.square else SHAPES
    told = None if accept is None else torch.tensor(accept)
    ends = []
    for limit, reuse in ((1 << 17, False), (6, False), (6, True)):
        monkeypatch.setattr(sliced, "LONG_ON_CPU", limit)
        tx, params = row.make(), random_tree(7, shapes)
        state = tx.init(params)
        for step in range(4):
            grads = gradients(row, params, 7, step)
            before, kept = tree.digest((grads, params, state)), tree.digest(grads)
            where = {n: p.data_ptr() for n, p in params.items() if sliced.is_long(p)}
            old = params, state
            params, state = sliced.advance(*(tx, grads, state, params), accept=told, reuse=reuse, **extras(row, step))
            assert tree.digest(grads) == kept
            if not reuse:
                assert tree.digest((grads, *old)) == before
            elif tx.scope == "element":
                assert {n: params[n].data_ptr() for n in where} == where
        ends.append((params, state))
    if "fused" not in row.name:  # those kernels round otherwise than an update that is added
        tx, params = row.make(), random_tree(7, shapes)
        state = tx.init(params)
        for step in range(4 if accept in (None, True) else 0):
            updates, state = tx.update(gradients(row, params, 7, step), state, params, **extras(row, step))
            params = tx.apply(params, updates, state)
        ends.append((params, state))
    for end in ends[1:]:
        assert not (found := tree.diff(ends[0], end)), f"\n{found}"


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_prints_compares_and_pickles(row: Row) -> None:
    tx = row.make()
    assert tx == row.make()
    assert hash(tx) == hash(row.make())
    again = pickle.loads(pickle.dumps(tx))
    assert again == tx
    assert repr(again) == repr(tx)
    assert "object at" not in repr(tx)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_resumes_with_the_same_bits(row: Row) -> None:
    params = random_tree(6)
    straight = run(row, params, 6, steps=6)
    tx = row.make()
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update(gradients(row, params, 6, step), state, params, **extras(row, step))
        params = optim.apply_updates(params, updates)
        params, state = pickle.loads(pickle.dumps((params, state)))
        tx = pickle.loads(pickle.dumps(tx))
    assert not (found := tree.diff(straight, (params, state))), f"\n{found}"


def flat_update(row: Row, treedef: Any) -> Callable[..., list[Tensor]]:
    def update(*leaves: Tensor) -> list[Tensor]:
        grads, state, params, step = tree.unflatten(treedef, leaves)
        return tree.leaves(row.make().update(grads, state, params, **extras(row, step)))

    return update


@pytest.mark.parametrize("mode", slow_but(["fake", "real"], "fake"))  # `jit` traces over fake tensors
@pytest.mark.parametrize("row", slow_but(ROWS, *ROWS[2::3]), ids=IDS)
def test_one_trace_serves_every_step(row: Row, mode: str) -> None:
    """Traced once at the first step, the graph gives the bits of eager at the first four."""
    params = random_tree(7, {"w": (3, 5), "b": ()} if row.value_fn else SHAPES)  # a loss makes long graphs
    state = row.make().init(params)
    graph = None
    for step in range(4):
        inputs = (gradients(row, params, 7, step), state, params, torch.tensor(step))
        leaves, treedef = tree.flatten(inputs)
        if graph is None:
            graph = make_fx(flat_update(row, treedef), tracing_mode=mode)(*leaves)
        eager = row.make().update(*inputs[:3], **extras(row, inputs[3]))
        traced = tree.unflatten(tree.structure(eager), graph(*leaves))
        if "fused" in row.name:  # a traced update does not use the fused kernel: it fuses by itself
            for a, b in zip(tree.leaves(eager), tree.leaves(traced), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        else:
            assert not (found := tree.diff(eager, traced)), f"\n{found}"
        params, state = optim.apply_updates(params, eager[0]), eager[1]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_vmap_equals_a_loop(row: Row) -> None:
    members = [random_tree(20 + i) for i in range(3)]
    tx = row.make()
    starts = [run(row, p, 8, steps=2) for p in members]
    grads = [gradients(row, p, 30 + i, 0) for i, (p, _) in enumerate(starts)]

    def update(g: Any, s: Any, p: Any) -> Any:
        return tx.update(g, s, p, **extras(row, 2))

    stacked = [
        tree.map(lambda *xs: torch.stack(xs), *parts)
        for parts in (grads, [s for _, s in starts], [p for p, _ in starts])
    ]
    mapped = torch.vmap(update)(*stacked)
    for i, (p, s) in enumerate(starts):
        alone = tx.update(grads[i], s, p, **extras(row, 2))
        one = tree.map(lambda x, i=i: x[i], mapped)
        exact = row.smooth and not row.value_fn and "fused" not in row.name and row.name not in NORMS
        if exact:
            assert not (found := tree.diff(alone, one)), f"\n{found}"
        for a, b in zip(tree.leaves(alone), tree.leaves(one), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3 if row.name == "muon" else 1e-5)


NORMS = ("lamb", "lars", "adafactor")  # norms are summed in another order under vmap


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_nan_is_never_swallowed_and_always_refused(row: Row) -> None:
    params = random_tree(9)
    tx = row.make()
    state = run(row, params, 9, steps=2)[1]
    grads = dict(gradients(row, params, 9, 2))
    grads["a.weight"] = grads["a.weight"].clone()
    grads["a.weight"][2, 3] = float("nan")
    options = extras(row, 2)
    if row.value_fn:  # the loss at the same place, which is what a trainer would pass
        options["value_fn"] = lambda p: target_loss(p) * float("nan")
    updates, _ = tx.update(grads, state, params, **options)
    assert not torch.isfinite(updates["a.weight"]).all()
    guarded = optim.apply_if_finite(tx)
    outer = guarded.init(params).replace(inner=state)
    updates, after = guarded.update(grads, outer, params, **options)
    assert all(bool((u == 0).all()) for u in updates.values())
    assert tree.equal(after.inner, state)
    assert not guarded.applied(after)


# A second or so each: every row in `make test-slow`, each fourth one in `make test`.
@pytest.mark.parametrize("row", slow_but(ROWS, *ROWS[::7]), ids=IDS)
def test_the_scope_that_it_declares_is_true(row: Row) -> None:
    """Slices, single tensors and the shards of simulated ranks have the bits of the update in full."""
    near = 1e-5 if "fused" in row.name else 0.0  # those kernels round an element by where it lies in memory
    testing.check_transformation(row.make(), value_fn=target_loss if row.value_fn else None, rtol=near, atol=near)


def test_every_optimizer_has_a_row() -> None:
    from purestep.optim import optimizers

    made = set()
    for module in pkgutil.iter_modules(optimizers.__path__):
        for name, value in vars(importlib.import_module(f"{optimizers.__name__}.{module.name}")).items():
            here = getattr(value, "__module__", "") == f"{optimizers.__name__}.{module.name}"
            returns = str(getattr(value, "__annotations__", {}).get("return", ""))
            if here and returns == "GradientTransformation" and not name.startswith(("scale_by_", "_")):
                made.add(name)
    assert len(made) > 20
    assert made - {row.name.split()[0] for row in ROWS} == {"schedule_free"}  # the wrapper of schedule_free_adamw


def test_the_scope_of_each_row() -> None:
    told = {row.name: row.make().scope for row in ROWS}
    assert [name for name, scope in told.items() if scope == "tensor"] == ["lamb", "lars", "adafactor", "muon"]
    assert [name for name, scope in told.items() if scope == "tree"] == [
        "sophia",
        "sam",
        "lbfgs",
        "lbfgs line search",
        "prune",
    ]


EMPTY = {"none": (0,), "rows": (0, 3), "columns": (3, 0), "inner": (2, 0, 3), "outer": (0, 2, 3)}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_tensors_without_elements_change_nothing_for_others(name: str) -> None:
    """torch's own optimizers divide by zero where there are some, so they are given the others alone."""
    row = next(row for row in ROWS if row.name == name)
    start, tx = random_tree(3, {"w": (5, 3), "v": (4, 4)}), row.make()
    params = {**{name: torch.zeros(shape) for name, shape in EMPTY.items()}, **start}
    state = tx.init(params)
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    torchs = row.torch(list(theirs.values()))
    for step in range(3):
        grads = random_tree(step, {name: tuple(p.shape) for name, p in params.items()})
        params, state = tx.advance(grads, state, params, step=torch.tensor(step))
        for key, p in theirs.items():
            p.grad = grads[key]
        torchs.step()
    for key, p in theirs.items():
        torch.testing.assert_close(params[key], p.detach(), rtol=row.rtol, atol=1e-5)
    assert {key: tuple(params[key].shape) for key in EMPTY} == EMPTY


SMOOTH = [row for row in ROWS if row.smooth]


@pytest.mark.parametrize("row", slow_but(SMOOTH, *SMOOTH[::3]), ids=[row.name for row in SMOOTH])
def test_gradients_flow_through_updates(row: Row) -> None:
    """d(params after three steps)/d(initial params), against finite differences in float64."""
    shapes = {"w": (3, 2), "b": (2,), "s": ()}
    params = random_tree(12, shapes, torch.float64)
    grads = [random_tree(40 + i, shapes, torch.float64) for i in range(3)]
    names = sorted(shapes)

    def after(*values: Tensor) -> tuple[Tensor, ...]:
        current = dict(zip(names, values, strict=True))
        tx = row.make()
        state = tx.init(current)
        for step in range(3):
            slopes = {n: (current[n] - 0.3) * 1.4 + 0.2 * grads[step][n] for n in names}
            updates, state = tx.update(slopes, state, current, **extras(row, step))
            current = optim.apply_updates(current, updates)
        return tuple(current[n] for n in names)

    inputs = [params[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(after, inputs, eps=1e-6, atol=1e-5, rtol=1e-3)


RATES: list[tuple[str, Callable[[Any], GradientTransformation]]] = [
    ("sgd", lambda lr: optim.sgd(lr, 0.9)),
    ("adam", optim.adam),
    ("adamw", lambda lr: optim.adamw(lr, weight_decay=0.1)),
    ("nadam", optim.nadam),
    ("radam", optim.radam),
    ("rmsprop", lambda lr: optim.rmsprop(lr, momentum=0.9)),
    ("adamax", optim.adamax),
    ("adan", optim.adan),
    ("adafactor", optim.adafactor),
    ("lamb", optim.lamb),
    ("injected", lambda lr: optim.inject_hyperparams(optim.adamw)(learning_rate=lr, weight_decay=lr)),
]


@pytest.mark.parametrize(("name", "make"), RATES, ids=[name for name, _ in RATES])
def test_gradients_flow_to_the_learning_rate(name: str, make: Callable[[Any], GradientTransformation]) -> None:
    shapes = {"w": (3, 2), "s": ()}
    start = random_tree(13, shapes, torch.float64)

    def after(rate: Tensor) -> Tensor:
        tx, params = make(rate), start
        state = tx.init(params)
        for step in range(3):
            grads = {n: (p - 0.3) * 1.4 for n, p in params.items()}
            updates, state = tx.update(grads, state, params, step=torch.tensor(step))
            params = optim.apply_updates(params, updates)
        return torch.stack([(p**2).sum() for p in params.values()]).sum()

    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (rate,), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_print_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """What must be seen: every row with its oracle, and how close they came. Nothing is skipped."""
    with capsys.disabled():
        print(f"\n{'row':22} {'oracle':7} {'compared':9} {'scope':8} max abs")
        for row in ROWS:
            tx = row.make()
            ours, theirs = compared(row.name, 0) if row in ORACLES else (None, None)
            far = max(float((ours[n] - theirs[n]).abs().max()) for n in ours) if theirs else float("nan")
            oracle = "torch" if row.torch else "optax" if row.optax else "own"
            kind = "bits" if row.exact else "rounding" if theirs else "property"
            print(f"{row.name:22} {oracle:7} {kind:9} {tx.scope:8} {far:.1e}")
            assert theirs is None or far < 0.05
