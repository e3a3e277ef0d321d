"""The base, chains and their state: names, paths, refusals with their text, schedules without a step."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch

from purestep import optim, tree
from purestep.errors import OptimError
from purestep.optim import named_states as parts_module


def params_of(*shape: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return {"0.weight": torch.randn(*shape, generator=generator), "0.bias": torch.randn(shape[0], generator=generator)}


def test_states_have_readable_paths() -> None:
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3), optim.scale(0.5), optim.scale(2.0))
    state = tx.init(params_of(2, 3))
    assert tree.paths(state, "opt_state") == [
        "opt_state.adamw.count",
        "opt_state.adamw.mu['0.bias']",
        "opt_state.adamw.mu['0.weight']",
        "opt_state.adamw.nu['0.bias']",
        "opt_state.adamw.nu['0.weight']",
    ]
    assert state.scale == state.scale_2 == optim.EmptyState()
    assert "adamw=" in repr(state)


def test_chain_takes_names_and_reprs_evaluate() -> None:
    tx = optim.chain(("first", optim.scale(2.0)), optim.trace(0.5), name="mine")
    assert tx.name == "mine"
    assert repr(tx) == "chain(('first', scale(step_size=2.0)), trace(decay=0.5), name='mine')"
    names = {name: getattr(optim, name) for name in dir(optim) if not name.startswith("_")}
    assert eval(repr(tx), names) == tx
    nested = optim.chain(tx, optim.chain(optim.lion(1e-3)))
    assert eval(repr(nested), names) == nested
    assert hasattr(nested.init(params_of(2, 2)), "mine")


def test_parts_round_trip_flatten_pickle_and_torch() -> None:
    node = parts_module.parts(["b", "a"], [torch.ones(2), {"x": torch.zeros(1)}])
    leaves, structure = tree.flatten(node)
    assert tree.equal(tree.unflatten(structure, leaves), node)
    again = pickle.loads(pickle.dumps(node))
    assert type(again) is type(node)
    assert tree.equal(again, node)
    values, spec = torch.utils._pytree.tree_flatten(node)
    assert tree.equal(torch.utils._pytree.tree_unflatten(values, spec), node)
    assert tree.names(node) == ["b", "a.x"]
    assert parts_module.unique(["a", "a", "a_2"]) == ("a", "a_2", "a_2_2")


@pytest.mark.parametrize("name", ["two__in", "_lead", "trail_", "with space", "0th"])
def test_names_that_cannot_be_attributes_are_refused(name: str) -> None:
    with pytest.raises(OptimError, match=re.escape(f"{name!r} cannot name a part of a chain")):
        optim.chain((name, optim.scale(1.0)))


def test_a_name_twice_and_a_foreign_part_are_refused() -> None:
    with pytest.raises(OptimError, match="two parts of a chain are named 'x'"):
        optim.chain(("x", optim.scale(1.0)), ("x", optim.scale(1.0)))
    with pytest.raises(OptimError, match=r"not a gradient transformation\n  where:   part 1: type"):
        optim.chain(optim.scale(1.0), torch.optim.SGD)  # type: ignore[arg-type]


def test_a_schedule_without_a_step_says_how_to_pass_it() -> None:
    schedule = optim.linear_schedule(0.0, 1.0, transition_steps=4)
    for tx in (optim.sgd(schedule), optim.adamw(schedule), optim.lion(schedule), optim.scale_by_schedule(schedule)):
        grads = params_of(2, 3)
        with pytest.raises(OptimError) as caught:
            tx.update(grads, tx.init(grads), grads)
        assert "is a schedule, and `update` was called without a step" in str(caught.value)
        assert "tx.update(grads, opt_state, params, step=state.step)" in str(caught.value)


@pytest.mark.parametrize("make", [optim.adam, optim.adamw, lambda lr: optim.sgd(lr, 0.9), optim.nadam, optim.lamb])
def test_a_schedule_reads_the_step_it_is_given_and_no_count(make: Any) -> None:
    """The update at step 7 under a schedule is the update under its value there, whatever the state has counted."""
    schedule = optim.linear_schedule(0.0, 1.0, transition_steps=64)
    params, grads = params_of(3, 4), params_of(3, 4)
    state = make(0.5).init(params)
    for step in (0, 7, 50):
        scheduled, _ = make(schedule).update(grads, state, params, step=torch.tensor(step))
        fixed, _ = make(step / 64).update(grads, state, params)
        assert tree.equal(scheduled, fixed)
        assert make(schedule).hyperparams(state, torch.tensor(step))["learning_rate"] == step / 64


def test_update_refuses_gradients_of_other_parameters() -> None:
    tx = optim.adam(1e-3)
    state = tx.init({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(OptimError, match=r"(?s)have 2 leaves where 1 were expected.*'b' is only in the first moments"):
        tx.update({"a": torch.zeros(1)}, state)
    with pytest.raises(OptimError, match="the state has no part 'scale'"):
        optim.chain(optim.scale(1.0), optim.trace(0.9)).update({"a": torch.zeros(1)}, state)


def test_decay_without_params_is_refused() -> None:
    grads = params_of(2, 2)
    for tx in (optim.adamw(1e-3), optim.lars(1.0), optim.add_decayed_weights(0.1)):
        with pytest.raises(OptimError, match="needs the parameters"):
            tx.update(grads, tx.init(grads), step=torch.tensor(0))


@pytest.mark.parametrize("rate", [-1.0, "fast", None, True, torch.ones(2)])
def test_what_is_no_learning_rate_is_refused(rate: Any) -> None:
    with pytest.raises(OptimError, match=r"learning_rate (is not a learning rate|must be a scalar)"):
        optim.sgd(rate)


def test_out_of_range_arguments_are_refused() -> None:
    for make, text in [
        (lambda: optim.adam(1e-3, 1.0), r"adam: b1 must be in \[0, 1\)"),
        (lambda: optim.lion(1e-3, b2=-0.1), r"b2 must be in \[0, 1\)"),
        (lambda: optim.adam(1e-3, nesterov=True, fused=True), "the fused kernel takes"),
        (lambda: optim.sgd(1e-3, fused=True, dampening=0.1), "the fused kernel takes"),
        (lambda: optim.sgd(1e-3, nesterov=True), "Nesterov's momentum needs a momentum"),
        (lambda: optim.rprop(optim.constant_schedule(1.0)), "rprop takes no schedule"),  # type: ignore[arg-type]
        (lambda: optim.muon(1e-3, adjust="big"), "there is no such adjustment"),
        (lambda: optim.adafactor(1e-3, d=0.5), "adafactor needs two eps"),
        (lambda: optim.lbfgs(memory_size=0), "lbfgs needs memory_size >= 1"),
        (lambda: optim.schedule_free(optim.sgd(1.0), 1.0, b1=0.0), "b1 of a schedule-free optimizer"),
        (lambda: optim.clip_by_value(0.0), "max_delta must be greater than 0"),
    ]:
        with pytest.raises(OptimError, match=text):
            make()  # type: ignore[no-untyped-call]


def test_apply_updates_keeps_dtypes_and_inputs() -> None:
    params = {"h": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(1.0, dtype=torch.bfloat16)}
    updates = {"h": torch.full((3,), 2.0**-9), "s": torch.tensor(2.0**-9)}
    before = tree.digest((params, updates))
    after = optim.apply_updates(params, updates)
    assert {k: v.dtype for k, v in after.items()} == {"h": torch.bfloat16, "s": torch.bfloat16}
    assert tree.digest((params, updates)) == before
    with pytest.raises(OptimError, match="the updates have 1 leaves where 2 were expected"):
        optim.apply_updates(params, {"h": updates["h"]})


def test_any_pytree_of_parameters_and_none_at_all() -> None:
    params = {"layers": [torch.ones(2), (torch.ones(1), None)], "empty": torch.ones(0)}
    for tx in (optim.chain(optim.clip_by_global_norm(1.0), optim.apply_if_finite(optim.adamw(1e-2))), optim.lamb(1e-2)):
        updates, _ = tx.update(params, tx.init(params), params, step=torch.tensor(0))
        assert tree.structure(updates) == tree.structure(params)
        assert tx.update({}, tx.init({}), {}, step=torch.tensor(0))[0] == {}


def test_applied_and_hyperparams_pass_through_the_algebra() -> None:
    guarded = optim.chain(optim.clip_by_global_norm(1.0), optim.apply_if_finite(optim.adamw(0.25)))
    grads = params_of(2, 2)
    _, state = guarded.update(grads, guarded.init(grads), grads)
    assert guarded.applied(state) is not None
    assert bool(guarded.applied(state))
    _, state = guarded.update(tree.map(lambda g: g * float("inf"), grads), state, grads)
    assert not guarded.applied(state)
    assert guarded.hyperparams(state) == {"learning_rate": 0.25}
    assert optim.chain(optim.sgd(1.0)).applied(optim.chain(optim.sgd(1.0)).init(grads)) is None
    both = optim.chain(optim.sgd(0.5), optim.sgd(0.25))
    assert both.hyperparams(both.init(grads)) == {"learning_rate": 0.5, "sgd_2.learning_rate": 0.25}


def test_adding_an_optimizer_takes_one_class_and_one_function() -> None:
    """What CONTRIBUTING shows: a rule with its formula is enough to get state, names and checks."""

    @optim.transformation
    class ScaleByHalfLife(optim.Rule):
        memory = ("mu",)
        decay: float = 0.5

        def direction(self, gs: Any, memory: Any, t: Any, ps: Any) -> Any:
            mu = [self.decay * m + g for m, g in zip(memory["mu"], gs, strict=True)]
            return mu, {"mu": mu}

    tx = optim.chain(ScaleByHalfLife(0.25), optim.scale_by_learning_rate(1.0), name="half_life")
    grads = {"w": torch.ones(1)}
    _, state = tx.update(grads, tx.init(grads))
    updates, state = tx.update(grads, state)
    assert updates["w"] == -1.25
    assert tree.paths(state, "s") == ["s.scale_by_half_life.count", "s.scale_by_half_life.mu['w']"]
    assert repr(tx.transforms[0]) == "scale_by_half_life(decay=0.25)"  # type: ignore[attr-defined]
