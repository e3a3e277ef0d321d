"""lbfgs, sam, sophia, schedule-free and muon beyond their rows: what they reach, what they ask for, what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared_marks import slow_but
from torch.fx.experimental.proxy_tensor import make_fx

from purestep import optim, tree
from purestep.errors import OptimError
from purestep.optim.optimizers.lbfgs import two_loop
from purestep.optim.optimizers.muon import COEFFICIENTS, orthogonalize


def rosenbrock(params: Any) -> torch.Tensor:
    x, y = params["x"], params["y"]
    return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).sum()


def minimise(tx: Any, params: Any, steps: int) -> tuple[Any, list[float]]:
    state, losses = tx.init(params), []
    for step in range(steps):
        grads, value = torch.func.grad_and_value(rosenbrock)(params)
        losses.append(value.item())
        updates, state = tx.update(grads, state, params, step=torch.tensor(step), value=value, value_fn=rosenbrock)
        params = optim.apply_updates(params, updates)
    return params, losses


@pytest.mark.parametrize("seed", slow_but([0, 1, 2], 0))
def test_lbfgs_finds_the_end_of_the_valley_and_never_climbs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = {n: torch.randn(2, generator=generator, dtype=torch.float64) for n in "xy"}
    found, losses = minimise(optim.lbfgs(), start, 80)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-12
    torch.testing.assert_close(found["x"], torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lbfgs_direction_is_that_of_the_dense_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, size = 7, 4
    steps = torch.randn(size, n, generator=generator, dtype=torch.float64)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    changes = steps @ (root @ root.T + torch.eye(n, dtype=torch.float64))
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    for pairs in range(size + 1):
        used = range(size - pairs, size)
        gamma = torch.dot(steps[-1], changes[-1]) / torch.dot(changes[-1], changes[-1]) if pairs else torch.tensor(1.0)
        inverse = gamma.double() * torch.eye(n, dtype=torch.float64)
        for i in used:
            rho = 1 / torch.dot(steps[i], changes[i])
            v = torch.eye(n, dtype=torch.float64) - rho * torch.outer(changes[i], steps[i])
            inverse = v.T @ inverse @ v + rho * torch.outer(steps[i], steps[i])
        torch.testing.assert_close(two_loop(g, steps, changes, torch.tensor(pairs)), inverse @ g)


def test_lbfgs_satisfies_the_wolfe_conditions_eager_and_traced() -> None:
    tx = optim.lbfgs(max_linesearch_steps=8, c1=1e-4, c2=0.9)
    params = {"x": torch.tensor([-1.2], dtype=torch.float64), "y": torch.tensor([1.0], dtype=torch.float64)}
    state = tx.init(params)
    for step in range(6):
        grads, value = torch.func.grad_and_value(rosenbrock)(params)
        updates, after = tx.update(grads, state, params, value_fn=rosenbrock)
        new = optim.apply_updates(params, updates)
        slope = sum((grads[n] * updates[n]).sum() for n in "xy")
        later = torch.func.grad(rosenbrock)(new)
        assert rosenbrock(new) <= value + 1e-4 * slope
        assert sum((later[n] * updates[n]).sum() for n in "xy") >= 0.9 * slope
        leaves, treedef = tree.flatten((grads, state, params))
        flat = lambda *xs: tree.leaves(tx.update(*tree.unflatten(treedef, xs), value_fn=rosenbrock))  # noqa: B023, E731
        if step == 3:
            assert tree.equal(make_fx(flat, tracing_mode="real")(*leaves)(*leaves), tree.leaves((updates, after)))
        params, state = new, after


def test_the_loss_function_is_asked_for() -> None:
    params = {"x": torch.ones(1), "y": torch.ones(1)}
    for tx in (optim.lbfgs(), optim.sam(optim.sgd(0.1))):
        with pytest.raises(OptimError, match=r"(?s)needs the loss as a function.*value_fn=lambda params"):
            tx.update(params, tx.init(params), params)
    with pytest.raises(OptimError, match="value_fn did not return a scalar loss"):
        optim.sam(optim.sgd(0.1)).update(
            params, optim.sam(optim.sgd(0.1)).init(params), params, value_fn=lambda p: p["x"].repeat(2)
        )


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_takes_the_gradient_at_the_worst_point_nearby(adaptive: bool) -> None:
    params = {"x": torch.tensor([0.3, -0.8]), "y": torch.tensor([1.5, 0.2])}
    grads = torch.func.grad(rosenbrock)(params)
    tx = optim.sam(optim.sgd(1.0), rho=0.1, adaptive=adaptive)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=rosenbrock)
    weight = {n: p.abs() if adaptive else torch.ones_like(p) for n, p in params.items()}
    norm = optim.global_norm({n: g * weight[n] for n, g in grads.items()})
    worst = {n: p + 0.1 * weight[n] ** 2 * grads[n] / norm for n, p in params.items()}
    for n, g in torch.func.grad(rosenbrock)(worst).items():
        torch.testing.assert_close(updates[n], -g)


def test_sophia_estimates_the_curvature_only_when_due() -> None:
    params = {"x": torch.tensor([0.5]), "y": torch.tensor([0.2])}
    tx = optim.sophia(0.1, update_interval=2, b2=0.0)
    state = tx.init(params)
    curvatures = []
    for step in range(4):
        grads = torch.func.grad(rosenbrock)(params)
        _, state = tx.update(grads, state, params, value_fn=rosenbrock if step != 2 else None)
        curvatures.append(state.scale_by_sophia.hessian["x"].item())
    assert curvatures[0] == curvatures[1] == curvatures[2] == curvatures[3] != 0.0
    exact = torch.func.jacrev(torch.func.grad(lambda x: rosenbrock({"x": x, "y": params["y"]})))(params["x"])[
        0, 0
    ].item()
    cross = 4 * 100 * 0.5
    assert curvatures[0] == pytest.approx(exact - cross) or curvatures[0] == pytest.approx(exact + cross)


def test_schedule_free_evaluates_the_average() -> None:
    tx = optim.schedule_free(optim.sgd(0.25), 0.25, b1=0.9)
    y = x = z = torch.tensor([2.0])
    params, state = {"w": y}, tx.init({"w": y})
    for step in range(1, 6):
        grads = {"w": params["w"] * 0.5}
        z = z - 0.25 * grads["w"]
        x = (1 - 1 / step) * x + z / step
        updates, state = tx.update(grads, state, params, step=torch.tensor(step - 1))
        params = optim.apply_updates(params, updates)
        torch.testing.assert_close(params["w"], 0.9 * x + 0.1 * z)
        torch.testing.assert_close(optim.schedule_free_eval_params((state,), params)["w"], x)
    with pytest.raises(OptimError, match="0 schedule-free states"):
        optim.schedule_free_eval_params(optim.sgd(1.0).init(params), params)
    warm = optim.schedule_free_adamw(0.1, warmup_steps=4)
    updates, _ = warm.update(grads, warm.init(params), params, step=torch.tensor(0))
    assert torch.isfinite(updates["w"]).all()


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_muon_orthogonalises_and_leaves_vectors_to_adamw(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator), COEFFICIENTS, 5).float())
    assert 0.4 < values.min() < values.max() < 1.6
    params = {"w": torch.randn(shape, generator=generator), "embed.w": torch.randn(3, 3), "b": torch.randn(4)}
    tx = optim.muon(0.02, matrices=lambda name: "embed" not in name)
    state = tx.init(params)
    assert list(state.muon.scale_by_muon.momentum) == ["w"]
    assert sorted(state.adamw.mu) == ["b", "embed.w"]
    with pytest.raises(OptimError, match="muon orthogonalises matrices only"):
        optim.scale_by_muon().update({"b": params["b"]}, optim.scale_by_muon().init({"b": params["b"]}))
