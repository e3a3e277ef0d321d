"""`check_transformation` believes no claim: true ones pass, false ones are named with the leaf and the number."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from shared_marks import slow_but
from torch import nn

import purestep as ps
from purestep import optim, tree
from purestep.errors import ConfigError, OptimError
from purestep.optim.base import Wrapper
from purestep.optim.scope import ShardAware
from purestep.testing import check_transformation


class Local(optim.GradientTransformation):
    """A base for what tests define: nothing remembered, `formula` of the list of gradients."""

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        us, structure = tree.flatten(updates)
        return tree.unflatten(structure, self.formula(us)), state

    def formula(self, us: list[torch.Tensor]) -> list[torch.Tensor]:
        raise NotImplementedError


@optim.transformation
class Halve(Local):
    scope = "element"

    def formula(self, us):
        return [u / 2 for u in us]


@optim.transformation
class UnitNorm(Local):
    scope = "tensor"

    def formula(self, us):
        return [u / u.norm().clamp(min=1e-6) for u in us]


@optim.transformation
class ByAll(Local):
    def formula(self, us):
        return [u / torch.stack([v.abs().sum() for v in us]).sum() for u in us]


@optim.transformation
class ByRow(Local):
    """Its rows are right by themselves, but not its columns: tensor parallelism and `fsdp` may shard any dimension."""

    scope = "element"

    def formula(self, us):
        return [u if u.dim() < 2 else u - u.mean(dim=tuple(range(1, u.dim())), keepdim=True) for u in us]


@optim.transformation
class ByShape(Local):
    """The width of a layer is a fact about the full tensor."""

    scope = "element"

    def formula(self, us):
        return [u if u.dim() == 0 else u / u.shape[0] for u in us]


@optim.transformation
class Noise(optim.GradientTransformation):
    """The noise of an element depends on where it lies in its tensor."""

    scope = "element"

    def update(self, updates, state, params=None, *, step=None, **extra):
        key = ps.random.fold_in(ps.random.key(0), step)
        return tree.map_with_name(lambda n, u: u + ps.random.normal(ps.random.fold_in(key, n), u.shape), updates), state


@optim.transformation
class Rows(optim.Rule):
    """A rule with memory, of the mean gradient of a tensor."""

    scope = "element"
    memory = ("mean",)

    def direction(self, gs, memory, t, ps):
        mean = [0.9 * m + g.mean() for m, g in zip(memory["mean"], gs, strict=True)]
        return mean, {"mean": mean}


@optim.transformation
class Twice(Wrapper):
    """A wrapper that speaks of itself: it doubles what is in it."""

    scope = "element"
    inner: optim.GradientTransformation

    def init(self, params):
        return self.inner.init(params)

    def update(self, updates, state, params=None, **extra):
        updates, state = self.inner.update(updates, state, params, **extra)
        return tree.map(lambda u: 2 * u, updates), state


@optim.transformation
class Summed(Wrapper):
    """Claims to act element by element, and looks at all gradients."""

    scope = "element"
    inner: optim.GradientTransformation

    def init(self, params):
        return self.inner.init(params)

    def update(self, updates, state, params=None, **extra):
        total = torch.stack([u.sum() for u in tree.leaves(updates)]).sum()
        return self.inner.update(tree.map(lambda u: u * total, updates), state, params, **extra)


@optim.transformation
class Aware(ShardAware, Local):
    """Claims to ask the ranks, and does not."""

    def formula(self, us):
        return ByAll().formula(us)


def claimed(kind: type, scope: str) -> Any:
    return optim.transformation(type(kind.__name__, (kind,), {"scope": scope, "__module__": __name__}))()


TRUE = {
    "element": Halve(),
    "tensor": UnitNorm(),
    "tree": ByAll(),
    "narrower would do": claimed(Halve, "tree"),
    "tensor would do": claimed(UnitNorm, "tree"),
    "rows in full": claimed(ByRow, "tensor"),
    "width": claimed(ByShape, "tensor"),
    "noise": claimed(Noise, "tensor"),
    "rule": claimed(Rows, "tensor"),
    "wrapper of elements": Twice(Halve()),
    "wrapper of a tensor": Twice(UnitNorm()),
    "wrapper of all": Twice(ByAll()),
    "wrapper of a clip": Twice(optim.clip_by_global_norm(1.0)),
    "chain": optim.chain(Halve(), UnitNorm(), ByAll(), optim.adamw(1e-2)),
    "partition": optim.partition({"a": UnitNorm(), "b": optim.adamw(1e-2)}, {"a": "matrix", "b": "*"}),
    "injected": optim.inject_hyperparams(optim.lamb)(learning_rate=0.1),
    "guards": optim.apply_if_finite(optim.skip_large_updates(optim.adamw(1e-2), max_norm=10.0)),
    "norm": optim.chain(optim.normalize_by_update_norm(), optim.adamw(1e-2)),
    "averaged": optim.average_params(optim.muon(0.1), decay=0.5),
    "lookahead": optim.lookahead(optim.lars(1.0), 2),
    "master": ps.precision.master_weights(optim.chain(optim.centralize(), optim.sgd(0.1, 0.9))),
    "noise of our own": optim.add_noise(0.1, 0.55, seed=1),
    "block": optim.chain(optim.clip_by_block_rms(1.0), optim.adaptive_grad_clip(0.1), optim.zero_nans()),
    "monitor": optim.monitor({"norm": optim.global_norm}),
    "lifted": optim.lift(torch.optim.SGD, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", slow_but(TRUE, *list(TRUE)[::3]))
def test_a_true_claim_passes(name):
    check_transformation(TRUE[name])


FALSE = {
    "norm of a tensor": (claimed(UnitNorm, "element"), "element", "tensor"),
    "norm of all": (claimed(ByAll, "tensor"), "tensor", "tree"),
    "norm of all by element": (claimed(ByAll, "element"), "element", "tree"),
    "row": (ByRow(), "element", "tensor"),
    "width": (ByShape(), "element", "tensor"),
    "noise": (Noise(), "element", "tensor"),
    "rule": (Rows(), "element", "tensor"),
    "wrapper": (Summed(optim.sgd(0.1)), "element", "tree"),
    "wrapper of a tensor": (Summed(UnitNorm()), "tensor", "tree"),
    "wrapper of a clip": (Summed(optim.clip_by_global_norm(1.0)), "element", "tree"),
    "in a chain": (optim.chain(optim.trace(0.9), claimed(UnitNorm, "element")), "element", "tensor"),
    "in a clipped chain": (
        optim.chain(optim.clip_by_global_norm(1.0), claimed(UnitNorm, "element")),
        "element",
        "tensor",
    ),
    "on shards": (Aware(), "tree", None),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_claim_is_named(name):
    tx, claim, better = FALSE[name]
    with pytest.raises(AssertionError) as caught:
        check_transformation(tx)
    said = str(caught.value)
    at_fault = {"in a chain": "unit_norm()", "in a clipped chain": "unit_norm()"}.get(name, repr(tx))
    assert said.startswith(f'{at_fault} is not of scope "{claim}"\n  where: ')
    assert any(leaf in said for leaf in ("['matrix']", "['vector']", "['kernel']"))
    assert "in full" in said.splitlines()[1]
    assert "otherwise" in said.splitlines()[1]
    assert (f'instead: scope = "{better}"' if better else "instead: no ShardAware") in said


def test_the_message_in_full():
    with pytest.raises(AssertionError) as caught:
        check_transformation(claimed(UnitNorm, "element"), {"w": torch.zeros(4, 2)}, seeds=1, steps=1)
    what, where, why, instead = str(caught.value).splitlines()
    assert what == 'unit_norm() is not of scope "element"'
    assert where.startswith("  where:   sliced by rows, update 1, params['w'][0, 0]: ")
    assert "long tensors" in why
    assert instead == '  instead: scope = "tensor"'


# --- the protocol -----------------------------------------------------------------------------------------------------


@tree.pytree
class Kept:
    value: Any


class Broken(optim.GradientTransformation):
    def init(self, params):
        return Kept(tree.map(torch.zeros_like, params))


@optim.transformation
class WritesGradients(Broken):
    def update(self, updates, state, params=None, **extra):
        return tree.map(lambda u: u.mul_(2), updates), state


@optim.transformation
class WritesState(Broken):
    def update(self, updates, state, params=None, **extra):
        return updates, Kept(tree.map(lambda s, u: s.add_(u), state.value, updates))


@optim.transformation
class NoKeywords(Broken):
    def update(self, updates, state, params=None, *, step=None, value=None):
        return updates, state


@optim.transformation
class Drifts(Broken):
    def update(self, updates, state, params=None, **extra):
        return updates, Kept(tree.map(lambda s: s.double(), state.value))


@optim.transformation
class Grows(Broken):
    def update(self, updates, state, params=None, **extra):
        return updates, Kept(state.value | {"seen": torch.zeros(())})


@optim.transformation
class Counts(Broken):
    def init(self, params):
        return Kept({"count": 0})

    def update(self, updates, state, params=None, **extra):
        return updates, Kept({"count": state.value["count"] + 1})


@optim.transformation
class Draws(Broken):
    def update(self, updates, state, params=None, **extra):
        return tree.map(lambda u: u + torch.randn(u.shape).to(u), updates), state


@optim.transformation
class Flattens(Broken):
    def update(self, updates, state, params=None, **extra):
        return tree.map(lambda u: u.reshape(-1), updates), state


@optim.transformation
class KeepsParams(Broken):
    def init(self, params):
        return Kept(params)

    def update(self, updates, state, params=None, **extra):
        return updates, state


@optim.transformation
class HalfParams(Broken):
    def update(self, updates, state, params=None, **extra):
        return updates, state

    def apply(self, params, updates, state):
        return tree.map(lambda p, u: (p + u).double(), params, updates)


BROKEN = {
    WritesGradients: ("changed what it was given", "updates['half']"),
    WritesState: ("changed what it was given", "state.value['half']"),
    NoKeywords: ("does not take keywords that it does not know", "an_unknown_keyword"),
    Drifts: ("changed shape or dtype", "bfloat16[6, 3] became float64[6, 3]"),
    Grows: ("has other leaves than before", "state.value['seen'] is only in the new"),
    Counts: ("holds what is no tensor", "state.value['count']: int"),
    Draws: ("gave other bits the second time", "update"),
    Flattens: ("changed shape or dtype", "bfloat16[6, 3] became bfloat16[18]"),
    KeepsParams: ("holds the same memory twice", "state.value['half'] is params['half']"),
    HalfParams: ("changed shape or dtype", "bfloat16[6, 3] became float64[6, 3]"),
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_protocol_is_named(kind, seed):
    what, where = BROKEN[kind]
    with pytest.raises(AssertionError) as caught:
        check_transformation(kind())
    assert what in str(caught.value)
    assert where in str(caught.value)
    assert "instead:" in str(caught.value)


def test_what_is_no_transformation_and_no_scope():
    with pytest.raises(ConfigError, match="a step needs a gradient transformation"):
        check_transformation(torch.optim.AdamW)
    with pytest.raises(OptimError, match="Wide has no scope that there is"):
        type("Wide", (optim.GradientTransformation,), {"scope": "row"})

    @optim.transformation
    class AsField(Local):  # an annotation makes it an argument
        scope: str = "element"
        factor: float = 2.0

        def formula(self, us):
            return [u * self.factor for u in us]

    check_transformation(AsField())
    check_transformation(AsField("tree"))
    with pytest.raises(OptimError, match=r"scope = 0\.5"):
        check_transformation(AsField(0.5))


# --- parameters of one's own, tolerances, and threads -----------------------------------------------------------------


def test_parameters_of_ones_own():
    with pytest.raises(OptimError, match="orthogonalises matrices only"):
        check_transformation(optim.scale_by_muon())
    check_transformation(optim.scale_by_muon(), {"a": torch.randn(9, 4), "b": torch.randn(3, 11)})
    nested = {"layer": {"weight": torch.randn(7, 3), "bias": torch.randn(7)}, "gain": torch.ones(())}
    check_transformation(optim.lamb(1e-2), nested)
    with pytest.raises(AssertionError, match=r"without the other tensors.*updates\['"):
        check_transformation(claimed(ByAll, "tensor"), nested)
    check_transformation(optim.adamw(1e-2), dict(nn.Linear(5, 3).named_parameters()))


@pytest.mark.parametrize("params", [{}, 3, {"w": 1.0}, {"w": torch.zeros(3), "i": torch.zeros(3, dtype=torch.int64)}])
def test_what_are_no_parameters(params):
    with pytest.raises(ConfigError, match="parameters are floating-point tensors, at least one"):
        check_transformation(Halve(), params)


@pytest.mark.parametrize("argument", ["seeds", "steps"])
def test_a_proof_of_nothing_is_refused(argument):
    with pytest.raises(ConfigError, match=f"{argument} must be a whole number >= 1"):
        check_transformation(Halve(), **{argument: 0})


def test_a_loss_for_those_that_evaluate_it():
    loss = lambda params: torch.stack([(p * 0.7 - 0.3).square().sum() for p in tree.leaves(params)]).sum()  # noqa: E731
    check_transformation(optim.sam(optim.sgd(0.1), rho=0.05), value_fn=loss)
    check_transformation(optim.lbfgs(max_linesearch_steps=4), value_fn=loss, seeds=1)


@optim.transformation
class Near(Local):
    """Right to a few units in the last place."""

    scope = "element"

    def formula(self, us):
        return [u * (1.0 + 1e-6 * (u.numel() % 2)) for u in us]


def test_tolerances():
    with pytest.raises(AssertionError, match='not of scope "element"'):
        check_transformation(Near())
    check_transformation(Near(), rtol=1e-5, atol=1e-5)
    check_transformation(optim.adamw(1e-2, fused=True), rtol=1e-5)
    with pytest.raises(ConfigError, match="rtol"):
        check_transformation(Near(), rtol=-1.0)


def test_simulated_ranks_that_do_different_things_are_told_so():
    @optim.transformation
    class Sometimes(ShardAware, Local):
        def formula(self, us):
            if us[0].numel():
                optim.clip_by_global_norm(1.0).update({"matrix": us[0]}, None)
            return us

    before = threading.active_count()
    with pytest.raises(AssertionError, match="the ranks ask for different things"):
        check_transformation(Sometimes(), {"matrix": torch.zeros(1, 7)})
    assert threading.active_count() == before
