"""Clipping, refusing, accumulating, conditions, masks, partitions, noise, plateau: what surrounds an optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from purestep import optim, tree
from purestep.errors import OptimError


def draw(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"body.weight": (6, 5), "body.bias": (6,), "head.weight": (2, 3, 3), "gain": ()}
    return {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}


def with_bad(grads: dict[str, torch.Tensor], bad: float) -> dict[str, torch.Tensor]:
    broken = {n: g.clone() for n, g in grads.items()}
    broken["head.weight"][1, 2, 0] = bad
    return broken


# --- clipping -------------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.integers(0, 50))
def test_the_clipped_norm_is_within_the_limit_and_small_ones_keep_their_bits(limit: float, seed: int) -> None:
    grads = draw(seed)
    clipped, _ = optim.clip_by_global_norm(limit).update(grads, None)
    norm = optim.global_norm(grads)
    if norm <= limit:
        assert tree.equal(clipped, grads)
    else:
        torch.testing.assert_close(optim.global_norm(clipped), torch.tensor(limit), rtol=1e-5, atol=0)
        torch.testing.assert_close(clipped["gain"] / grads["gain"], limit / norm, rtol=1e-5, atol=0)


def test_clips_agree_with_torch_and_optax() -> None:
    import optax

    grads, params = draw(1, 3.0), draw(2)
    theirs = [g.clone().requires_grad_() for g in grads.values()]
    for p, g in zip(theirs, grads.values(), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    ours, _ = optim.clip_by_global_norm(0.7).update(grads, None)
    for p, g in zip(theirs, ours.values(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)
    jax_grads = {n: g.numpy() for n, g in grads.items()}
    jax_params = {n: p.numpy() for n, p in params.items()}
    pairs: list[tuple[Any, Any]] = [
        (optim.clip_by_value(0.5), optax.clip(0.5)),
        (optim.clip_by_block_rms(0.4), optax.clip_by_block_rms(0.4)),
        (optim.normalize_by_update_norm(2.0), optax.normalize_by_update_norm(2.0)),
        (optim.keep_params_nonnegative(), optax.keep_params_nonnegative()),
    ]
    for tx, other in pairs:
        found, _ = tx.update(grads, tx.init(params), params)
        expected, _ = other.update(jax_grads, other.init(jax_params), jax_params)
        for name in grads:
            torch.testing.assert_close(found[name], torch.tensor(expected[name].__array__()), rtol=1e-5, atol=1e-6)


def test_adaptive_clip_and_centralize_are_optax_with_the_dims_of_torch() -> None:
    import optax

    grads, params = draw(3, 3.0), draw(4)
    two = {"w": grads["body.weight"]}, {"w": params["body.weight"]}
    found, _ = optim.adaptive_grad_clip(0.1).update(*two[:1], None, two[1])
    flipped = [{"w": x["w"].T.numpy()} for x in two]  # optax's matrices are [in, out]
    other = optax.adaptive_grad_clip(0.1)
    expected, _ = other.update(flipped[0], other.init(flipped[1]), flipped[1])
    torch.testing.assert_close(found["w"], torch.tensor(expected["w"].__array__()).T, rtol=1e-5, atol=1e-6)
    centered, _ = optim.centralize().update(grads, None)
    theirs, _ = optax.centralize().update({n: g.numpy() for n, g in grads.items()}, optax.EmptyState())
    for name in grads:
        torch.testing.assert_close(centered[name], torch.tensor(theirs[name].__array__()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_shows_what_is_not_finite(bad: float) -> None:
    clipped, _ = optim.clip_by_global_norm(1.0).update(with_bad(draw(1), bad), None)
    assert not torch.isfinite(clipped["head.weight"]).all()


# --- refusing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_apply_if_finite_skips_counts_and_recovers(bad: float) -> None:
    tx = optim.apply_if_finite(optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2)), max_consecutive_errors=2)
    params = draw(5)
    state = tx.init(params)
    _, state = tx.update(draw(6), state, params)
    before = tree.digest(state.inner)
    for refusal in range(1, 6):
        updates, state = tx.update(with_bad(draw(7), bad), state, params)
        assert all((u == 0).all() for u in updates.values())
        assert tree.digest(state.inner) == before
        assert (int(state.notfinite_count), int(state.total_notfinite)) == (refusal, refusal)
        assert not tx.applied(state)
        assert bool(tx.gave_up(state)) == (refusal > 2)
    updates, state = tx.update(draw(8), state, params)
    assert (int(state.notfinite_count), int(state.total_notfinite), bool(state.last_finite)) == (0, 5, True)
    assert tree.digest(state.inner) != before
    assert not tx.gave_up(state)


def test_apply_if_finite_refuses_what_only_the_optimizer_breaks() -> None:
    """Finite gradients whose update is not: 1e30 overflows when it is scaled."""
    tx = optim.apply_if_finite(optim.chain(optim.trace(0.9), optim.scale(1e20)))
    grads = {"w": torch.tensor([1e30, 1.0])}
    updates, state = tx.update(grads, tx.init(grads))
    assert updates["w"].tolist() == [0.0, 0.0]
    assert (state.inner.trace.momentum["w"] == 0).all()


def test_skip_large_updates_and_zero_nans() -> None:
    tx = optim.skip_large_updates(optim.adam(1e-2), max_norm=5.0)
    params, state = draw(5), optim.skip_large_updates(optim.adam(1e-2), max_norm=5.0).init(draw(5))
    for grads, fine in [(draw(1, 0.1), True), (draw(1, 100.0), False), (with_bad(draw(1, 0.1), math.nan), False)]:
        updates, following = tx.update(grads, state, params)
        assert bool(tx.applied(following)) == fine
        assert tree.equal(following.inner, state.inner) != fine
        assert any((u != 0).any() for u in updates.values()) == fine
    cleaned, found = optim.zero_nans().update(with_bad(draw(1), math.nan), None)
    assert int(torch.stack(list(found.found_nan.values())).sum()) == 1
    assert torch.isfinite(cleaned["head.weight"]).all()


# --- accumulation, conditions, lookahead ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_mean", [True, False])
def test_accumulate_gives_the_update_of_the_mean_gradient(use_mean: bool) -> None:
    params, parts = draw(5), [draw(10 + i) for i in range(3)]
    tx, plain = optim.accumulate(optim.adam(1e-2), 3, use_mean=use_mean), optim.adam(1e-2)
    state, reference = tx.init(params), plain.init(params)
    for _ in range(2):
        applied = []
        for g in parts:
            updates, state = tx.update(g, state, params, step=torch.tensor(0))
            applied.append(bool(tx.applied(state)))
            if not applied[-1]:
                assert all((u == 0).all() for u in updates.values())
        assert applied == [False, False, True]
        total = tree.map(lambda a, b, c: ((a + b) + c) / (3.0 if use_mean else 1.0), *parts)
        expected, reference = plain.update(total, reference, params)
        assert tree.equal(updates, expected)
        assert tree.equal(state.inner, reference)
        assert all((t == 0).all() for t in state.total.values())


def test_accumulate_takes_a_schedule_of_updates() -> None:
    """Three calls an update, then two, then one: the schedule never moves within a sum."""
    params, grads = draw(5), [draw(10 + i) for i in range(9)]
    tx = optim.accumulate(optim.sgd(0.1), optim.piecewise_constant_schedule(3.0, {2: 2 / 3, 3: 0.5}))
    state, step, applied = tx.init(params), torch.zeros((), dtype=torch.int64), []
    for g in grads:
        updates, state = tx.update(g, state, params, step=step)
        applied.append(bool(tx.applied(state)))
        step = step + applied[-1]
    assert applied == [False, False, True] * 2 + [False, True, True]
    assert tree.equal(updates, tree.map(lambda g: -0.1 * g, grads[-1]))
    with pytest.raises(OptimError, match="every is a schedule, and `update` was called without a step"):
        tx.update(grads[0], state, params)


def test_accumulate_sums_bfloat16_in_float32() -> None:
    tx = optim.accumulate(optim.scale(1.0), 257, use_mean=False)
    grads = {"w": torch.ones(1, dtype=torch.bfloat16)}
    state = tx.init(grads)
    for _ in range(256):
        _, state = tx.update(grads, state)
    assert state.total["w"].item() == 256.0
    assert tx.update(grads, state)[0]["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [optim.conditionally_transform, optim.conditionally_mask])
def test_conditions_hold_the_inner_state(make: Any) -> None:
    tx = make(optim.trace(0.5), lambda step: step % 2 == 0)
    grads = draw(1)
    state = tx.init(grads)
    for step in range(4):
        before = state
        updates, state = tx.update(grads, state, step=torch.tensor(step))
        if step % 2 == 0:
            assert not tree.equal(state.inner, before.inner)
        else:
            assert tree.equal(state.inner, before.inner)
            expected = grads if make is optim.conditionally_transform else tree.map(torch.zeros_like, grads)
            assert tree.equal(updates, expected)
    with pytest.raises(OptimError, match="needs the step"):
        tx.update(grads, state)


def test_lookahead_moves_to_between_fast_and_slow() -> None:
    tx = optim.lookahead(optim.sgd(1.0, 0.9), 3, slow_step_size=0.25, reset_state=True)
    start = params = draw(5)
    state, fast = tx.init(params), []
    for i in range(3):
        fast.append(params)
        updates, state = tx.update(draw(i), state, params)
        params = optim.apply_updates(params, updates)
    plain, inner, reached = optim.sgd(1.0, 0.9), optim.sgd(1.0, 0.9).init(start), start
    for i in range(3):
        updates, inner = plain.update(draw(i), inner, reached)
        reached = optim.apply_updates(reached, updates)
    for name in params:
        expected = start[name] + 0.25 * (reached[name] - start[name])
        torch.testing.assert_close(params[name], expected)
        torch.testing.assert_close(state.slow[name], expected)
    assert all((m == 0).all() for m in state.inner.momentum.values())


# --- masks and partitions -------------------------------------------------------------------------------------------

LABELS: list[Any] = [
    {"slow": "body.*", "fast": "*"},
    {"slow": ["body.weight", "body.bias"], "fast": "*"},
    lambda name: "slow" if name.startswith("body") else "fast",
    {"body.weight": "slow", "body.bias": "slow", "head.weight": "fast", "gain": "fast"},
]


@pytest.mark.parametrize("labels", LABELS)
def test_partition_is_each_optimizer_on_its_part(labels: Any) -> None:
    tx = optim.partition({"slow": optim.adam(1e-3), "fast": optim.sgd(0.5, 0.9)}, labels)
    params = draw(5)
    state = tx.init(params)
    assert tree.paths(state, "s")[1:3] == ["s.slow.mu['body.bias']", "s.slow.mu['body.weight']"]
    slow = {n: p for n, p in params.items() if n.startswith("body")}
    alone, inner = optim.adam(1e-3), optim.adam(1e-3).init(slow)
    for i in range(3):
        updates, state = tx.update(draw(i), state, params)
        expected, inner = alone.update({n: g for n, g in draw(i).items() if n in slow}, inner, slow)
        assert tree.equal({n: updates[n] for n in slow}, expected)
    assert tree.structure(updates) == tree.structure(params)


def test_partition_refuses_a_parameter_without_a_label() -> None:
    tx = optim.partition({"slow": optim.sgd(1.0)}, {"slow": "body.*"})
    with pytest.raises(OptimError, match=r"(?s)has the label None.*gain: float32\[\].*\"\*\""):
        tx.init(draw(1))
    wrong = optim.partition({"a": optim.sgd(1.0)}, {"other": "a"})
    with pytest.raises(OptimError, match="the tree of labels does not have the leaves of the parameters"):
        wrong.init(draw(1))


def test_masks_by_glob_function_and_tree() -> None:
    grads = draw(1)
    tree_of_bools = {"body.weight": True, "body.bias": False, "head.weight": True, "gain": False}
    for mask in ("*weight", ["*.weight"], lambda name: name.endswith("weight"), tree_of_bools):
        tx = optim.masked(optim.scale(0.0), mask)
        updates, _ = tx.update(grads, tx.init(grads))
        assert {n for n, u in updates.items() if (u == 0).all()} == {"body.weight", "head.weight"}
    frozen = optim.chain(optim.adam(1e-2), optim.freeze("head.*"))
    updates, _ = frozen.update(grads, frozen.init(grads), grads)
    assert {n for n, u in updates.items() if (u == 0).all()} == {"head.weight"}
    with pytest.raises(OptimError, match="the mask does not have the leaves of the parameters"):
        optim.masked(optim.scale(0.0), {"gain": True}).init(grads)


def test_nested_trees_have_dotted_names_and_keep_their_structure() -> None:
    params = {"body": [torch.ones(2), torch.ones(3)], "head": (torch.ones(1),)}
    tx = optim.masked(optim.trace(0.9), "body.1")
    updates, state = tx.update(params, tx.init(params))
    assert tree.structure(updates) == tree.structure(params)
    assert list(state.inner.momentum) == ["body.1"]
    with pytest.raises(OptimError, match=r"two leaves have the dotted name 'a\.b'"):
        optim.masked(optim.trace(0.9), "*").init({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


def test_weight_decay_masks() -> None:
    params = draw(5)
    zeros = tree.map(torch.zeros_like, params)
    for tx in (optim.adamw(1.0, weight_decay=0.5, mask="*weight"), optim.lion(1.0, weight_decay=0.5, mask=["*weight"])):
        updates, _ = tx.update(zeros, tx.init(params), params)
        for name, u in updates.items():
            expected = -0.5 * params[name] if name.endswith("weight") else torch.zeros_like(u)
            torch.testing.assert_close(u, expected)
        assert hash(tx) is not None


# --- noise and plateau ----------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_step_and_name() -> None:
    zeros = {"a": torch.zeros(3000), "b": torch.zeros(3000)}
    tx = optim.add_noise(0.25, 0.5, seed=3)
    state = tx.init(zeros)
    first, same = tx.update(zeros, state, step=torch.tensor(3))
    again, _ = tx.update({"b": zeros["b"]}, state, step=torch.tensor(3))
    assert tree.equal(same, state)
    assert torch.equal(first["b"], again["b"])
    assert not torch.equal(first["a"], first["b"])
    later, _ = tx.update(zeros, state, step=torch.tensor(4))
    other, _ = optim.add_noise(0.25, 0.5, seed=4).update(zeros, optim.add_noise(0.25, 0.5, seed=4).init(zeros), step=3)
    assert not torch.equal(first["a"], later["a"])
    assert not torch.equal(first["a"], other["a"])
    assert first["a"].std().item() == pytest.approx(math.sqrt(0.25 / 4**0.5), rel=0.05)
    assert abs(first["a"].mean().item()) < 0.03
    graph = make_fx(lambda z, k, t: tx.update({"a": z}, state.replace(rng=k), step=t)[0]["a"], tracing_mode="fake")
    traced = graph(zeros["a"], state.rng, torch.tensor(0))
    assert torch.equal(traced(zeros["a"], state.rng, torch.tensor(3)), first["a"])
    with pytest.raises(OptimError, match="add_noise needs the step"):
        tx.update(zeros, state)


@pytest.mark.parametrize("cooldown", [0, 2])
def test_plateau_agrees_with_optax(cooldown: int) -> None:
    import jax
    from optax import contrib

    tx = optim.reduce_on_plateau(0.5, patience=3, rtol=1e-2, cooldown=cooldown, accumulation_size=2, min_scale=0.05)
    other = contrib.reduce_on_plateau(
        0.5, patience=3, rtol=1e-2, cooldown=cooldown, accumulation_size=2, min_scale=0.05
    )
    grads = {"w": torch.ones(1)}
    state, theirs = tx.init(grads), other.init({"w": grads["w"].numpy()})
    generator = torch.Generator().manual_seed(0)
    scales, other_update = [], jax.jit(other.update)
    for i in range(80):
        value = 2.0 + max(0.0, 1.0 - i / 20) + 0.01 * torch.rand((), generator=generator).item()
        updates, state = tx.update(grads, state, value=torch.tensor(value))
        expected, theirs = other_update({"w": grads["w"].numpy()}, theirs, value=value)
        assert updates["w"].item() == pytest.approx(float(expected["w"][0]), rel=1e-6)
        scales.append(updates["w"].item())
    assert len(set(scales)) > 3
    assert scales[-1] == pytest.approx(0.05)


def test_plateau_of_a_score_and_by_hand() -> None:
    tx = optim.reduce_on_plateau(0.1, patience=2, mode="max")
    state = tx.init({"w": torch.ones(1)})
    for score, scale in [(0.5, 1.0), (0.6, 1.0), (0.6, 1.0), (0.55, 0.1), (0.7, 0.1)]:
        state = tx.watch(state, score)
        assert state.scale.item() == pytest.approx(scale)
    with pytest.raises(OptimError, match="needs the metric it watches"):
        tx.update({"w": torch.ones(1)}, state)
    with pytest.raises(OptimError, match="out of range"):
        optim.reduce_on_plateau(1.5)
