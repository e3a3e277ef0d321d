"""Schedules against optax and torch at 200 points; ints, tensors, composition, printing, refusals."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared_marks import slow_but
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler

from purestep import optim
from purestep.errors import OptimError

CYCLE = {"init_value": 0.1, "peak_value": 1.0, "warmup_steps": 7, "decay_steps": 40, "end_value": 0.05}
LONG = CYCLE | {"decay_steps": 83, "exponent": 2.0}
OPTAX: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "constant": (lambda: optim.constant_schedule(0.3), lambda ox: ox.constant_schedule(0.3)),
    "linear": (
        lambda: optim.linear_schedule(0.1, 1.0, transition_steps=50, transition_begin=20),
        lambda ox: ox.linear_schedule(0.1, 1.0, 50, 20),
    ),
    "linear, no steps": (
        lambda: optim.linear_schedule(0.1, 1.0, transition_steps=0),
        lambda ox: ox.constant_schedule(0.1),
    ),
    "polynomial": (
        lambda: optim.polynomial_schedule(1.0, 0.1, power=2.5, transition_steps=90, transition_begin=11),
        lambda ox: ox.polynomial_schedule(1.0, 0.1, 2.5, 90, 11),
    ),
    "cosine": (
        lambda: optim.cosine_decay_schedule(0.7, 130, alpha=0.1, exponent=1.5),
        lambda ox: ox.cosine_decay_schedule(0.7, 130, 0.1, 1.5),
    ),
    "exponential": (
        lambda: optim.exponential_decay(1.0, 20, decay_rate=0.7, transition_begin=9, end_value=0.2),
        lambda ox: ox.exponential_decay(1.0, 20, 0.7, transition_begin=9, end_value=0.2),
    ),
    "exponential staircase": (
        lambda: optim.exponential_decay(1.0, 20, decay_rate=1.1, staircase=True, end_value=2.0),
        lambda ox: ox.exponential_decay(1.0, 20, 1.1, staircase=True, end_value=2.0),
    ),
    "piecewise constant": (
        lambda: optim.piecewise_constant_schedule(1.0, {90: 0.5, 30: 0.1}),
        lambda ox: ox.piecewise_constant_schedule(1.0, {30: 0.1, 90: 0.5}),
    ),
    "piecewise linear": (
        lambda: optim.piecewise_interpolate_schedule("linear", 1.0, boundaries_and_scales={30: 0.1, 90: 5.0}),
        lambda ox: ox.piecewise_interpolate_schedule("linear", 1.0, {30: 0.1, 90: 5.0}),
    ),
    "piecewise cosine": (
        lambda: optim.piecewise_interpolate_schedule("cosine", 1.0, boundaries_and_scales={30: 0.1, 90: 5.0}),
        lambda ox: ox.piecewise_interpolate_schedule("cosine", 1.0, {30: 0.1, 90: 5.0}),
    ),
    "join": (
        lambda: optim.join_schedules([optim.constant_schedule(1.0), optim.cosine_decay_schedule(0.5, 60)], [40]),
        lambda ox: ox.join_schedules([ox.constant_schedule(1.0), ox.cosine_decay_schedule(0.5, 60)], [40]),
    ),
    "warmup constant": (
        lambda: optim.warmup_constant_schedule(0.0, 1.0, warmup_steps=33),
        lambda ox: ox.warmup_constant_schedule(0.0, 1.0, 33),
    ),
    "warmup cosine": (
        lambda: optim.warmup_cosine_decay_schedule(**LONG),
        lambda ox: ox.warmup_cosine_decay_schedule(**LONG),
    ),
    "warmup cosine, no warmup": (
        lambda: optim.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=0, decay_steps=100),
        lambda ox: ox.warmup_cosine_decay_schedule(0.0, 1.0, 0, 100),
    ),
    "warmup exponential": (
        lambda: optim.warmup_exponential_decay_schedule(
            0.0, 1.0, warmup_steps=20, transition_steps=10, decay_rate=0.9, end_value=0.3
        ),
        lambda ox: ox.warmup_exponential_decay_schedule(0.0, 1.0, 20, 10, 0.9, end_value=0.3),
    ),
    "sgdr": (lambda: optim.sgdr_schedule([CYCLE, LONG, CYCLE]), lambda ox: ox.sgdr_schedule([CYCLE, LONG, CYCLE])),
    "linear onecycle": (
        lambda: optim.linear_onecycle_schedule(150, 0.9),
        lambda ox: ox.linear_onecycle_schedule(150, 0.9),
    ),
    "cosine onecycle": (
        lambda: optim.cosine_onecycle_schedule(150, 0.9, pct_start=0.4),
        lambda ox: ox.cosine_onecycle_schedule(150, 0.9, 0.4),
    ),
}
TORCH: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], float]] = {
    "StepLR": (lambda: optim.StepLR(0.5, 30, 0.3), lambda o: lr_scheduler.StepLR(o, 30, 0.3), 0.5),
    "MultiStepLR": (
        lambda: optim.MultiStepLR(0.5, (80, 30), 0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [30, 80], 0.3),
        0.5,
    ),
    "ConstantLR": (lambda: optim.ConstantLR(0.5, 0.2, 9), lambda o: lr_scheduler.ConstantLR(o, 0.2, 9), 0.5),
    "LinearLR": (lambda: optim.LinearLR(0.5, 0.2, 0.9, 70), lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, 70), 0.5),
    "ExponentialLR": (lambda: optim.ExponentialLR(0.5, 0.98), lambda o: lr_scheduler.ExponentialLR(o, 0.98), 0.5),
    "PolynomialLR": (lambda: optim.PolynomialLR(0.5, 90, 2.0), lambda o: lr_scheduler.PolynomialLR(o, 90, 2.0), 0.5),
    "CosineAnnealingLR": (
        lambda: optim.CosineAnnealingLR(0.5, 61, 0.01),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 61, 0.01),
        0.5,
    ),
    "warm restarts": (
        lambda: optim.CosineAnnealingWarmRestarts(0.5, 13, 2, 0.01),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 13, 2, 0.01),
        0.5,
    ),
    "warm restarts of one length": (
        lambda: optim.CosineAnnealingWarmRestarts(0.5, 13),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 13),
        0.5,
    ),
    "OneCycleLR": (lambda: optim.OneCycleLR(0.5, 201), lambda o: lr_scheduler.OneCycleLR(o, 0.5, 201), 0.02),
    "OneCycleLR linear, three phases": (
        lambda: optim.OneCycleLR(0.5, 201, 0.25, "linear", three_phase=True),
        lambda o: lr_scheduler.OneCycleLR(o, 0.5, 201, pct_start=0.25, anneal_strategy="linear", three_phase=True),
        0.02,
    ),
    "CyclicLR": (
        lambda: optim.CyclicLR(0.1, 0.5, 17, 29),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, 17, 29, cycle_momentum=False),
        0.1,
    ),
    "CyclicLR triangular2": (
        lambda: optim.CyclicLR(0.1, 0.5, 17, mode="triangular2"),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, 17, mode="triangular2", cycle_momentum=False),
        0.1,
    ),
    "CyclicLR exp_range": (
        lambda: optim.CyclicLR(0.1, 0.5, 17, mode="exp_range", gamma=0.99),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, 17, mode="exp_range", gamma=0.99, cycle_momentum=False),
        0.1,
    ),
    "LambdaLR": (
        lambda: optim.LambdaLR(0.5, lambda t: 0.95**t),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.95**t),
        0.5,
    ),
}


@pytest.mark.parametrize("name", slow_but(OPTAX, *list(OPTAX)[::3]))
def test_agrees_with_optax_at_200_points(name: str) -> None:
    import jax
    import numpy as np
    import optax
    from jax import numpy as jnp

    ours, theirs = OPTAX[name][0](), OPTAX[name][1](optax)
    expected = torch.from_numpy(np.array(jax.vmap(theirs)(jnp.arange(200, dtype=jnp.float32))))
    torch.testing.assert_close(ours(torch.arange(200)), expected, rtol=2e-5, atol=2e-7)


def torch_values(scheduler: Callable[[Any], Any], base: float, steps: int = 200) -> torch.Tensor:
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running = scheduler(optimizer)
        values = []
        for _ in range(steps):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            running.step()
    return torch.tensor(values)


@pytest.mark.parametrize("name", TORCH)
def test_agrees_with_torch_at_200_points(name: str) -> None:
    make, scheduler, base = TORCH[name]
    torch.testing.assert_close(make()(torch.arange(200)), torch_values(scheduler, base), rtol=1e-5, atol=1e-7)


ALL: dict[str, Callable[[], Any]] = {name: pair[0] for name, pair in OPTAX.items()} | {
    name: triple[0] for name, triple in TORCH.items()
}


@pytest.mark.parametrize("name", ALL)
def test_ints_tensors_traces_and_maps_agree(name: str) -> None:
    schedule = ALL[name]()
    steps = torch.arange(0, 200, 7)
    together = schedule(steps)
    assert together.dtype == torch.float32
    assert together.shape == steps.shape
    one = schedule(torch.tensor(21))
    assert one.dim() == 0
    assert torch.equal(one, together[3])
    assert isinstance(schedule(21), float)
    assert schedule(21) == pytest.approx(float(one), rel=1e-6)
    assert torch.equal(torch.vmap(schedule)(steps), together)
    graph = make_fx(schedule, tracing_mode="fake")(torch.tensor(0))
    assert all(torch.equal(graph(step), schedule(step)) for step in steps)


@pytest.mark.parametrize("name", ALL)
def test_schedules_print_compare_and_pickle(name: str) -> None:
    schedule = ALL[name]()
    assert "object at" not in repr(schedule) or "lambda" in repr(schedule)
    if name != "LambdaLR":
        assert schedule == ALL[name]()
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        assert hash(schedule) == hash(ALL[name]())
    assert repr(optim.StepLR(0.5, 30)) == "StepLR(base_lr=0.5, step_size=30)"
    assert repr(optim.constant_schedule(2.0)) == "constant_schedule(value=2.0)"


@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(2, 5))
def test_warm_restarts_begin_exactly_where_they_should(cycle: int, first: int, mult: int) -> None:
    lr = optim.CosineAnnealingWarmRestarts(1.0, first, mult)
    start, length = 0, first
    for _ in range(cycle % 12):
        start, length = start + length, length * mult
    assert lr(start) == 1.0
    assert lr(start + length) == 1.0
    if length > 1:
        assert lr(start + length - 1) < lr(start)


@given(st.integers(0, 10**9), st.integers(1, 10**6), st.integers(1, 10**6))
def test_warmup_cosine_stays_in_its_range(step: int, warmup: int, decay: int) -> None:
    schedule = optim.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup_steps=warmup, decay_steps=warmup + decay, end_value=0.1
    )
    assert 0.0 <= schedule(step) <= 1.0
    if step >= warmup:
        assert schedule(step) >= 0.1 - 1e-9


def test_a_function_of_the_step_may_stand_in_for_a_schedule() -> None:
    joined = optim.join_schedules([lambda step: step * 0.5, optim.constant_schedule(9.0)], [4])
    assert [joined(s) for s in (0, 3, 4)] == [0.0, 1.5, 9.0]
    tx = optim.sgd(lambda step: 0.5**step)
    updates, _ = tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}), step=torch.tensor(2))
    assert updates["w"] == -0.25


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "CyclicLR", "warm restarts", "LinearLR"])
def test_lifted_schedulers_tabulate_torch(name: str) -> None:
    _, scheduler, base = TORCH[name]
    lifted = optim.lift_scheduler(scheduler, base, total_steps=200)
    torch.testing.assert_close(lifted(torch.arange(200)), torch_values(scheduler, base), rtol=1e-7, atol=0)
    assert lifted(10**6) == lifted(199)
    graph = make_fx(lifted, tracing_mode="fake")(torch.tensor(0))
    assert torch.equal(graph(torch.tensor(77)), lifted(torch.tensor(77)))
    assert torch.equal(torch.vmap(lifted)(torch.arange(5)), lifted(torch.arange(5)))


def test_lifted_schedulers_of_several_parts() -> None:
    def build(optimizer: Any) -> Any:
        parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])

    lifted = optim.lift_scheduler(build, 1.0, total_steps=30)
    torch.testing.assert_close(lifted(torch.arange(30)), torch_values(build, 1.0, 30))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: optim.warmup_cosine_decay_schedule(0, 1, warmup_steps=9, decay_steps=9),
        "the decay ends before the warm-up",
    ),
    (lambda: optim.cosine_decay_schedule(1.0, 0), "a cosine decay needs at least one step"),
    (lambda: optim.join_schedules([optim.constant_schedule(1.0)], [3]), "schedules and boundaries do not fit"),
    (lambda: optim.piecewise_interpolate_schedule("square", 1.0), "there is no such interpolation"),
    (lambda: optim.piecewise_constant_schedule(1.0, {5: -1.0}), "factors of a piecewise schedule are not negative"),
    (lambda: optim.OneCycleLR(1.0, 10, anneal_strategy="square"), "there is no such annealing"),
    (lambda: optim.CyclicLR(0.0, 1.0, mode="square"), "there is no such mode"),
    (lambda: optim.CosineAnnealingWarmRestarts(1.0, 0), "cycles need a length of at least 1"),
    (lambda: optim.sgdr_schedule([]), "there is no cycle to follow"),
    (
        lambda: optim.lift_scheduler(lr_scheduler.StepLR, 1.0, total_steps=0, step_size=3),
        "total_steps must be a whole number >= 1",
    ),
    (lambda: optim.lift_scheduler(lr_scheduler.StepLR, 1.0, total_steps=5), "StepLR cannot be run"),
    (
        lambda: optim.lift_scheduler(lr_scheduler.ReduceLROnPlateau, 1.0, total_steps=5),
        "ReduceLROnPlateau is not a schedule",
    ),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refusals_say_what_is_wrong(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(OptimError, match=text):
        make()
