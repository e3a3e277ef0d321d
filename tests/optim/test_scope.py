"""What a scope decides: what is sliced, what is handed shards, and that a user's own is right by default."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import purestep as ps
from purestep import optim, tree
from purestep.errors import OptimError
from purestep.optim import _torch as kernels
from purestep.optim import scope
from purestep.optim.base import Wrapper
from purestep.optim.kernels import sliced
from purestep.optim.scope import fused_on_shards, inside, only_shards, scope_of
from purestep.testing import simulated_ranks

JOB = Path(__file__).with_name("own_job.py")


@optim.transformation
class UnitNorm(optim.GradientTransformation):
    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tree.map(lambda g: g / g.norm(), updates), state


@optim.transformation
class UnitRule(optim.Rule):
    def direction(self, gs: Any, memory: Any, t: Any, ps: Any) -> Any:
        return [g / g.norm() for g in gs], {}


@optim.transformation
class ByLoss(optim.GradientTransformation):
    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tree.map(lambda g: g * extra["value"], updates), state


# --- who reads the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tx", "needs"),
    [
        (optim.adamw(1e-3), False),
        (optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1)), False),
        (optim.chain(optim.sgd(0.1), optim.reduce_on_plateau()), True),
        (optim.apply_if_finite(optim.chain(optim.sgd(0.1), optim.reduce_on_plateau())), True),
        (optim.lbfgs(), True),
        (ByLoss(), True),
        (optim.chain(ByLoss(), optim.sgd(0.1)), True),
    ],
    ids=repr,
)
def test_the_loss_is_computed_for_who_may_read_it(tx, needs):
    assert scope.needs_value(tx) is needs


def test_a_step_passes_the_loss_to_a_transformation_of_a_user():
    def loss_fn(net: Any, batch: Any) -> Any:
        return (net(batch) ** 2).mean()

    tx = optim.chain(ByLoss(), optim.sgd(0.1))
    state = ps.init(lambda: torch.nn.Linear(2, 1), tx, seed=0)
    new, metrics = ps.make_step(loss_fn, tx)(state, torch.ones(4, 2))
    grads = ps.grad_and_value(lambda p: loss_fn(lambda x: x @ p["weight"].T + p["bias"], torch.ones(4, 2)))(
        state.params
    )
    moved = float(grads[0]["bias"] * 0.1 * metrics["loss"].compute())
    assert moved
    assert float(state.params["bias"] - new.params["bias"]) == pytest.approx(moved, rel=1e-3)


# --- a user's own under a plan ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(zygote: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, str]]:
    """By number of processes and rank, the digests of all rows of the job."""
    directory = tmp_path_factory.mktemp("own")
    quiet = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    ranks = [(1, 0), (2, 0), (2, 1)]
    children = [
        zygote.popen(JOB, str(directory), str(size), str(rank), env=quiet, preload="torch.distributed.tensor")
        for size, rank in ranks
    ]
    for child in children:
        with child:
            _, errors = child.communicate(240)
            assert (child.returncode, errors) == (0, "")
    return {rank: json.loads((directory / f"{rank[0]}-{rank[1]}.json").read_text()) for rank in ranks}


@pytest.mark.slow
def test_what_users_write_has_the_bits_of_one_process_under_fsdp(answers: Any) -> None:
    reference = {name.partition("|")[0]: digest for name, digest in answers[1, 0].items()}
    assert len(reference) == 12
    assert len(set(reference.values())) == 12
    for rank in (0, 1):
        assert {digest[-800:] for name, digest in answers[2, rank].items() if len(digest) != 64} == set()
        wrong = [name for name, digest in answers[2, rank].items() if digest != reference[name.partition("|")[0]]]
        assert wrong == []


# --- a user's own on one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("tx", [UnitNorm(), UnitRule()], ids=repr)
def test_what_is_not_declared_is_never_sliced(tx: Any, reuse: bool) -> None:
    chained = optim.chain(tx, optim.sgd(1.0))
    params, grads = {"w": torch.zeros(2000, 512)}, {"w": torch.ones(2000, 512)}
    assert sliced.is_long(params["w"])
    for one in (tx, chained):
        expected = tx.update(grads, tx.init(params), params)[0]["w"]
        given = tree.map(torch.clone, params)
        new, _ = sliced.advance(one, grads, one.init(params), given, reuse=reuse)
        assert torch.equal(new["w"].abs(), expected)
    state = ps.TrainState(
        step=torch.zeros((), dtype=torch.int64),
        params=params,
        buffers={},
        opt_state=chained.init(params),
        rng=ps.random.key(0),
    )
    assert float(state.apply_gradients(chained, grads).params["w"].double().norm()) == pytest.approx(1.0, rel=1e-3)


def test_a_rule_that_is_declared_is_sliced_and_one_that_lies_is_wrong_by_its_own_word(monkeypatch: Any) -> None:
    monkeypatch.setattr(sliced, "LONG_ON_CPU", 8)
    seen = []

    @optim.transformation
    class Halve(optim.Rule):
        scope = "element"

        def direction(self, gs: Any, memory: Any, t: Any, ps: Any) -> Any:
            seen.append([tuple(g.shape) for g in gs])
            return [g / 2 for g in gs], {}

    params, grads = {"w": torch.zeros(8, 4), "b": torch.zeros(4)}, {"w": torch.ones(8, 4), "b": torch.ones(4)}
    new, _ = sliced.advance(Halve(), grads, Halve().init(params), params)
    assert sorted(seen) == [[(1, 4)]] * 8 + [[(4,)]]
    assert torch.equal(new["w"], grads["w"] / 2)


@tree.pytree
class Held:
    held: Any


@pytest.mark.parametrize("keep", [list, tuple, lambda xs: {"of one": xs[0]}], ids=["list", "tuple", "other name"])
def test_a_state_by_position_is_not_sliced(keep: Any, monkeypatch: Any) -> None:
    """It is of scope "element", but which of its tensors belongs to which parameter nobody can tell."""
    monkeypatch.setattr(sliced, "LONG_ON_CPU", 8)

    @optim.transformation
    class ByPosition(optim.GradientTransformation):
        scope = "element"

        def init(self, params: Any) -> Any:
            return Held(keep([torch.zeros_like(p) for p in tree.leaves(params)]))

        def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            gs, structure = tree.flatten(updates)
            held = [h + g for h, g in zip(tree.leaves(state), gs, strict=False)]
            return tree.unflatten(structure, [*held, *gs[len(held) :]]), Held(keep(held))

    tx, params = ByPosition(), {"a": torch.zeros(8, 4), "b": torch.zeros(8, 4)}
    state = tx.init(params)
    grads = {"a": torch.randn(8, 4), "b": torch.randn(8, 4)}
    updates, following = tx.update(grads, state, params)
    found = sliced.advance(tx, grads, state, params)
    assert tree.equal(found, (optim.apply_updates(params, updates), following))


# --- full tensors, as many as the scope needs -------------------------------------------------------------------------

SHAPES = {"a": (8, 6), "b": (9,), "c": (4, 2, 3)}


def seen_on_ranks(width: str, keep: Any) -> tuple[list[Any], Any]:
    """Return what the update of a rule that keeps a state is given on two simulated ranks, and that state."""
    seen: list[Any] = []

    @optim.transformation
    class Norms(optim.GradientTransformation):
        def init(self, params: Any) -> Any:
            return Held(keep(params))

        def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            seen.append({name: tuple(u.shape) for name, u in updates.items()})
            return tree.map(lambda u: u / u.norm(), updates), Held(tree.map(lambda x: x + 1, state.held))

    tx = optim.transformation(type("Norms", (Norms,), {"scope": width}))()
    grads = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    params = tree.map(torch.zeros_like, grads)
    step = simulated_ranks.Update(1, grads, tx.init(params), params, {}, None, None)
    one, other = simulated_ranks.on_ranks(tx, step, 2, 0)
    expected = tx.update(grads, tx.init(params), params)
    shards = simulated_ranks.Shards(step, 2, 0)
    for rank, result in enumerate((one, other)):
        full = shards.of((*expected, params), rank)
        assert not (found := tree.diff(result[:2], full[:2])), f"\n{found}"
    return seen[:-1], expected[1]


def per_row(params: Any) -> Any:
    return {"count": torch.zeros(()), "rows": {name: torch.zeros(p.shape[0]) for name, p in params.items()}}


def test_an_update_of_scope_tensor_gathers_as_many_tensors_as_a_block_holds(monkeypatch: Any) -> None:
    a, b, c = ({name: shape} for name, shape in SHAPES.items())
    for keep in (per_row, lambda params: torch.zeros(2), lambda params: tree.map(torch.zeros_like, params)):
        for limit, blocks in ((1, (a, b, c)), (49, (a | b, c)), (1000, (SHAPES,))):
            monkeypatch.setattr(scope, "_BLOCK", limit)
            seen, _ = seen_on_ranks("tensor", keep)
            assert sorted(map(str, seen)) == sorted(str(block) for block in blocks for _ in (0, 1))
        assert seen_on_ranks("tree", keep)[0] == [SHAPES, SHAPES]


def test_a_state_that_is_not_kept_by_name_is_gathered_with_all_tensors() -> None:
    for keep in (lambda params: [torch.zeros(()) for _ in params], lambda params: {"a": torch.zeros(3)}):
        assert seen_on_ranks("tensor", keep)[0] == [SHAPES, SHAPES]


# --- what a scope means -----------------------------------------------------------------------------------------------


@optim.transformation
class Speaks(Wrapper):
    """A user's wrapper that speaks of itself."""

    scope = "element"
    inner: optim.GradientTransformation


@optim.transformation
class Holds(optim.GradientTransformation):
    """Holds transformations where no built-in one does."""

    scope = "element"
    by_name: dict[str, optim.GradientTransformation] = dataclasses.field(default_factory=dict)
    others: tuple[optim.GradientTransformation, ...] = ()


SCOPES = {
    "element": [
        optim.adamw(1e-3, fused=True),
        optim.nadamw(1e-3),
        optim.masked(optim.sgd(0.1), {"w": True}),
        optim.inject_hyperparams(optim.adamw)(learning_rate=0.1),
        Speaks(optim.trace(0.9)),
        optim.identity(),
        optim.chain(),
    ],
    "tensor": [
        optim.lamb(1e-3),
        optim.muon(1e-3),
        optim.masked(optim.clip_by_block_rms(1.0), "*"),
        optim.inject_hyperparams(optim.lars)(learning_rate=0.1),
        Speaks(optim.scale_by_trust_ratio()),
        Holds({"a": optim.centralize()}),
        optim.average_params(optim.adafactor(), decay=0.9),
    ],
    "tree": [
        optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3)),
        optim.apply_if_finite(optim.adamw(1e-3)),
        optim.lookahead(optim.sam(optim.sgd(0.1))),
        optim.lift(torch.optim.SGD, lr=0.1),
        UnitNorm(),
        UnitRule(),
        Speaks(UnitNorm()),
        Holds({}, (optim.sgd(0.1), UnitRule())),
    ],
}


@pytest.mark.parametrize("scope", SCOPES)
def test_the_widest_scope_counts(scope: str) -> None:
    for tx in SCOPES[scope]:
        assert scope_of(tx) == scope, tx
        if not isinstance(tx, (Speaks, Holds)):  # those speak of themselves
            assert tx.scope == scope, tx


def test_who_is_handed_shards() -> None:
    clipped = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    for tx in (clipped, optim.apply_if_finite(clipped), optim.average_params(clipped), Speaks(clipped)):
        assert only_shards(tx), tx
        assert not fused_on_shards(tx), tx
    for tx in (UnitNorm(), optim.lamb(0.1), optim.sam(clipped), optim.chain(UnitRule(), clipped), Speaks(UnitNorm())):
        assert not only_shards(tx), tx
    fused = optim.adamw(1e-3, fused=True)
    for tx in (fused, optim.apply_if_finite(optim.chain(optim.clip_by_value(1.0), fused)), Speaks(fused)):
        assert fused_on_shards(tx), tx
    # Those are given full tensors, whatever kernel they run.
    for tx in (optim.sam(fused), optim.chain(optim.lift(torch.optim.SGD, lr=0.1))):
        assert not fused_on_shards(tx), tx


def test_what_is_inside() -> None:
    inner = optim.sgd(0.1)
    assert inside(inner) == []
    assert inside(Holds({"a": inner}, (UnitNorm(),))) == [inner, UnitNorm()]
    assert [type(tx).__name__ for tx in inside(optim.inject_hyperparams(optim.adamw)(learning_rate=0.1))] == ["Adam"]


def test_a_scope_that_there_is_not() -> None:
    with pytest.raises(OptimError) as caught:
        type("Wide", (optim.GradientTransformation,), {"scope": "elementwise"})
    assert str(caught.value).splitlines()[:3] == [
        "Wide has no scope that there is",
        "  where:   scope = 'elementwise'",
        "  why:     a scope is the data that one update needs, and there are three",
    ]
    assert 'scope = "tree"      # all tensors at once, in full: the default' in str(caught.value)


# --- speed: the paths that are taken ----------------------------------------------------------------------------------


def fast_paths(tx: Any, monkeypatch: pytest.MonkeyPatch, *, reuse: bool) -> dict[str, int]:
    """Count what an update of a long, a short and a 0-d parameter calls."""
    counts = dict.fromkeys(("slices", "foreach", "fused"), 0)

    def counting(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counting(sliced._Result, "take", "slices")
    for name in ("foreach_add", "foreach_add_", "foreach_lerp", "foreach_lerp_"):
        counting(kernels, name, "foreach")
    for name in ("fused_sgd", "fused_adamw"):
        counting(kernels, name, "fused")
    params = {"w": torch.ones(16, 8), "b": torch.ones(3), "g": torch.ones(())}
    grads = tree.map(torch.ones_like, params)
    sliced.advance(tx, grads, tx.init(params), params, reuse=reuse, step=torch.zeros(()))
    return counts


CLIP = optim.clip_by_global_norm(1.0)
# Slices of the 16 rows of 8, 8 elements each, and one block of the rest.
PATHS = {
    "adamw": (optim.adamw(1e-3), 17, False),
    "sgd": (optim.sgd(0.1, 0.9), 17, False),
    "a rule": (optim.lion(1e-3), 17, False),
    "clipped": (optim.chain(CLIP, optim.adamw(1e-3)), 17, False),
    "averaged": (optim.average_params(optim.adamw(1e-3), decay=0.5), 17, False),
    "tree mask": (optim.masked(optim.adamw(1e-3), {"w": True, "b": False, "g": True}), 17, False),
    "lamb": (optim.lamb(1e-3), 17, False),
    "adamw fused": (optim.adamw(1e-3, fused=True), 2, True),
    "sgd fused": (optim.sgd(0.1, 0.9, fused=True), 2, True),
    "clipped fused": (optim.chain(CLIP, optim.adamw(1e-3, fused=True)), 2, True),
    "muon": (optim.muon(1e-3), 0, False),
    "guarded": (optim.apply_if_finite(optim.adamw(1e-3)), 0, False),
}


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_the_fast_paths_are_taken(name: str, reuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "LONG_ON_CPU", 32)
    tx, slices, fused = PATHS[name]
    counts = fast_paths(tx, monkeypatch, reuse=reuse)
    assert counts["slices"] == (slices if reuse or not fused else 0)
    assert (counts["fused"] > 0) is fused
    assert fused or counts["foreach"] > 0
