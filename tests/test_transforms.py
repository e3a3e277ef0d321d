"""Training under torch.func: gradients through whole updates, against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from shared_marks import slow_but
from torch import nn
from torch.nn.functional import mse_loss

import purestep as ps

TRANSFORMATIONS = {
    "sgd": lambda lr: ps.optim.sgd(lr, momentum=0.9),
    "adamw": lambda lr: ps.optim.adamw(lr, weight_decay=0.1, eps=1e-3),
    "clipped": lambda lr: ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adam(lr, eps=1e-3)),
    "skipping": lambda lr: ps.optim.apply_if_finite(ps.optim.sgd(lr), 5),
}


class Centered(nn.Module):
    """Subtracts a running mean. Unlike that of `nn.BatchNorm1d`, torch's autograd follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.8 * self.mean + 0.2 * x.mean(0)
        return x - self.mean


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.2), Centered(), nn.Linear(5, 1)).double()


def loss_fn(net, batch):
    loss = mse_loss(net(batch["x"]), batch["y"])
    return loss, {"twice": 2 * loss}


def batch(seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"x": x, "y": x.sum(1, keepdim=True).sin()}


def slope(f, x: torch.Tensor, direction: torch.Tensor, h: float = 1e-6) -> torch.Tensor:
    return (f(x + h * direction) - f(x - h * direction)) / (2 * h)


@pytest.mark.parametrize("microbatches", slow_but([1, 3], 3))
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("objective", ["eval", "metric", "params"])
def test_training_is_differentiable_by_its_learning_rate(name, microbatches, objective):
    seed = torch.randint(0, 2**31, ()).item()
    module = model()

    def trained(lr: torch.Tensor) -> torch.Tensor:
        tx = TRANSFORMATIONS[name](lr)
        step = ps.make_step(loss_fn, tx, microbatches=microbatches, engine="func")
        state = ps.init(module, tx, seed=seed)
        for k in range(3):
            state, metrics = step(state, batch(seed + k))
        if objective == "eval":
            return ps.make_eval(loss_fn)(state, batch(seed + 9))["loss"].compute()
        if objective == "metric":
            return metrics["twice"].compute() + metrics["loss"].compute()
        return sum(p.square().sum() for p in state.params.values())

    lr = torch.tensor(0.03, dtype=torch.float64)
    found = torch.func.grad(trained)(lr)
    expected = slope(trained, lr, torch.ones_like(lr))
    assert expected.abs() > 1e-6, "the test would see nothing"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_training_is_differentiable_by_the_params_it_begins_with():
    tx = ps.optim.adamw(0.03, eps=1e-3)
    step = ps.make_step(loss_fn, tx)  # inside a transform the engine is torch.func's by itself
    state = ps.init(model, tx, seed=3)
    direction = torch.randn_like(state.params["0.weight"])

    def trained(weight: torch.Tensor) -> torch.Tensor:
        now = state.replace(params=state.params | {"0.weight": weight})
        for k in range(2):
            now, _ = step(now, batch(k))
        return ps.make_eval(loss_fn)(now, batch(7))["loss"].compute()

    found = (torch.func.grad(trained)(state.params["0.weight"]) * direction).sum()
    expected = slope(lambda w: trained(w), state.params["0.weight"], direction)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_running_statistics_are_differentiable_too():
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(loss_fn, tx)
    state = ps.init(model, tx, seed=0)

    def mean(scale: torch.Tensor) -> torch.Tensor:
        weight = state.params["0.weight"] * scale
        return step(state.replace(params=state.params | {"0.weight": weight}), batch(1))[0].buffers["3.mean"].sum()

    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(mean)(one), slope(mean, one, one), rtol=1e-6, atol=1e-9)


def test_outside_of_transforms_nothing_is_part_of_a_graph():
    tx = ps.optim.adam(0.1)
    step = ps.make_step(loss_fn, tx)
    state = ps.init(model, tx, seed=0)
    # Parameters that require gradients, as those of a module do, must not make a graph that grows with every step.
    state = state.replace(params={n: p.clone().requires_grad_() for n, p in state.params.items()})
    new, metrics = step(state, batch(0))
    evaluated = ps.make_eval(loss_fn)(new, batch(1))
    assert not [leaf for leaf in ps.tree.leaves((new, metrics, evaluated)) if leaf.requires_grad]


def test_a_sweep_of_learning_rates_is_differentiated_under_vmap():
    module, first, second = nn.Linear(3, 1).double(), batch(0), batch(1)

    def trained(lr: torch.Tensor) -> torch.Tensor:
        tx = ps.optim.sgd(lr)
        state = ps.init(module, tx, seed=0)
        state, _ = ps.make_step(loss_fn, tx)(state, first)
        return ps.make_eval(loss_fn)(state, second)["loss"].compute()

    rates = torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64)
    found = torch.vmap(torch.func.grad(trained))(rates)
    expected = torch.stack([slope(trained, lr, torch.ones_like(lr)) for lr in rates])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_a_run_of_an_ensemble_logs_saves_and_resumes(tmp_path):
    tx = ps.optim.adamw(1e-2)
    step = ps.make_step(loss_fn, tx)
    members = [ps.init(model, tx, seed=seed) for seed in range(3)]
    ensemble = ps.tree.map(lambda *leaves: torch.stack(leaves), *members)
    train = ps.data.batches({name: t[:8] for name, t in batch(0).items()}, 2, seed=0)

    def ensemble_step(states, b):
        states, metrics = torch.vmap(step, in_dims=(0, None))(states, b)
        return states, {"loss": metrics["loss"].compute().mean()}

    def run(steps, run_dir):
        return ps.fit(ensemble_step, ensemble, train, until=ps.steps(steps), run_dir=run_dir)

    straight = run(5, None).state
    run(2, tmp_path)
    assert straight.step.tolist() == [5] * 3
    assert ps.digest(run(5, tmp_path).state) == ps.digest(straight)
    assert ps.open(tmp_path).metrics["step"] == [4]
