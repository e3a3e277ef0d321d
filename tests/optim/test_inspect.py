"""Reading and changing states: inject_hyperparams, get, set, monitor; sweeps by vmap."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from purestep import optim, tree
from purestep.errors import OptimError

PARAMS = {"w": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.tensor(0.5)}
GRADS = {"w": torch.linspace(2, -1, 6).reshape(2, 3), "b": torch.tensor(-0.25)}


def test_injected_equals_plain_and_set_equals_made_with_it() -> None:
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.inject_hyperparams(optim.adamw)(3e-4, weight_decay=0.1))
    state = tx.init(PARAMS)
    plain = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(3e-4, weight_decay=0.1))
    assert tree.paths(state, "opt_state")[:2] == [
        "opt_state.adamw.hyperparams['learning_rate']",
        "opt_state.adamw.hyperparams['weight_decay']",
    ]
    torch.testing.assert_close(tx.update(GRADS, state, PARAMS)[0], plain.update(GRADS, plain.init(PARAMS), PARAMS)[0])
    changed = optim.set(state, learning_rate=0.5, weight_decay=torch.tensor(0.0))
    assert tree.structure(changed) == tree.structure(state)
    expected, _ = optim.adam(0.5).update(*_clipped(), optim.adam(0.5).init(PARAMS), PARAMS)
    torch.testing.assert_close(tx.update(GRADS, changed, PARAMS)[0], expected)
    assert optim.get(state, "learning_rate").item() == 3e-4
    assert optim.get(tx.update(GRADS, changed, PARAMS)[1], "learning_rate").item() == 0.5
    assert tx.hyperparams(changed)["learning_rate"].item() == 0.5
    assert pickle.loads(pickle.dumps(tx)) == tx
    assert repr(tx.transforms[1]) == "inject_hyperparams(adamw)(learning_rate=0.0003, weight_decay=0.1)"


def _clipped() -> tuple[Any]:
    return (optim.clip_by_global_norm(1.0).update(GRADS, None)[0],)


def test_injected_schedules_are_evaluated_and_shown() -> None:
    schedule = optim.linear_schedule(0.0, 1.0, transition_steps=4)
    tx = optim.inject_hyperparams(optim.sgd)(schedule, momentum=0.9)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, step=torch.tensor(2))
    assert optim.get(state, "learning_rate").item() == 0.5
    assert tx.hyperparams(state, torch.tensor(3))["learning_rate"].item() == 0.75
    torch.testing.assert_close(updates["w"], -0.5 * GRADS["w"])


def test_static_arguments_and_nothing_to_inject() -> None:
    tx = optim.inject_hyperparams(optim.adam, static_args=["b1"])(0.1, 0.8, nesterov=True)
    assert list(tx.init(PARAMS).hyperparams) == ["learning_rate"]
    assert repr(tx) == "inject_hyperparams(adam)(b1=0.8, nesterov=True, learning_rate=0.1)"
    with pytest.raises(OptimError, match="there is no hyperparameter to keep in the state"):
        optim.inject_hyperparams(optim.scale_by_sign)()


def test_changing_a_hyperparameter_does_not_retrace() -> None:
    tx = optim.inject_hyperparams(optim.adamw)(learning_rate=1e-2, b1=0.9, weight_decay=0.1)
    state = tx.init(PARAMS)
    leaves, treedef = tree.flatten((GRADS, state, PARAMS))

    def update(*values: torch.Tensor) -> list[torch.Tensor]:
        return tree.leaves(tx.update(*tree.unflatten(treedef, values)))

    graph = make_fx(update, tracing_mode="fake")(*leaves)
    changed = optim.set(state, {"learning_rate": 0.5, "b1": 0.5})
    eager = tree.leaves(tx.update(GRADS, changed, PARAMS))
    assert tree.equal(graph(*tree.leaves((GRADS, changed, PARAMS))), eager)
    assert not tree.equal(graph(*leaves)[0], eager[0])


def test_vmap_sweeps_a_hyperparameter() -> None:
    tx = optim.inject_hyperparams(optim.adam)(learning_rate=1.0, eps=1e-8)
    rates = torch.tensor([0.1, 0.5, 2.0])
    state = tx.init(PARAMS)
    swept = torch.vmap(lambda rate: tx.update(GRADS, optim.set(state, learning_rate=rate), PARAMS)[0])(rates)
    for i, rate in enumerate(rates):
        alone, _ = tx.update(GRADS, optim.set(state, learning_rate=rate), PARAMS)
        assert tree.equal(tree.map(lambda x, i=i: x[i], swept), alone)


def test_get_finds_trees_and_tells_ambiguity() -> None:
    tx = optim.partition({"slow": optim.adam(1e-3), "fast": optim.adam(1e-1)}, {"slow": "w", "fast": "*"})
    state = tx.init(PARAMS)
    assert list(optim.get(state, "slow.mu")) == ["w"]
    with pytest.raises(OptimError, match=r"(?s)'mu' names 2 things.*slow\.mu, fast\.mu"):
        optim.get(state, "mu")
    with pytest.raises(OptimError, match=r"(?s)nothing named 'learning_rate'.*inject_hyperparams\(optim.adamw\)"):
        optim.get(state, "learning_rate")
    new = {"w": torch.ones(2, 3)}
    assert tree.equal(optim.set(state, {"slow.mu": new}).slow.mu, new)
    assert (optim.set(state, {"fast.count": 7}).fast.count) == 7
    before = tree.digest(state)
    with pytest.raises(
        OptimError, match=r"(?s)the new 'slow.mu' does not fit the old.*float32\[2, 3\] != float32\[1\]"
    ):
        optim.set(state, {"slow.mu": {"w": torch.ones(1)}})
    with pytest.raises(OptimError, match="does not fit"):
        optim.set(state, {"slow.mu": {"other": torch.ones(2, 3)}})
    assert tree.digest(state) == before


def test_monitor_measures_where_it_stands_and_changes_nothing() -> None:
    largest = lambda u: torch.stack([x.abs().max() for x in tree.leaves(u)]).max()  # noqa: E731
    tx = optim.chain(
        ("before", optim.monitor({"grad_norm": optim.global_norm})),
        optim.clip_by_global_norm(0.5),
        ("after", optim.monitor({"clipped_norm": optim.global_norm, "largest": largest})),
    )
    state = tx.init(PARAMS)
    updates, after = tx.update(GRADS, state)
    assert tree.structure(after) == tree.structure(state)
    assert torch.equal(optim.get(after, "grad_norm"), optim.global_norm(GRADS))
    torch.testing.assert_close(optim.get(after, "clipped_norm"), torch.tensor(0.5))
    assert torch.equal(tx.hyperparams(after)["largest"], largest(updates))
