"""Updates in slices: which transformations are cut, what is written over, and what stands in the way."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import torch
from shared_marks import slow_but

from purestep import optim, precision, tree
from purestep.optim.kernels import sliced, workspace

SHAPES = {"body.weight": (13, 5), "body.bias": (13,), "head.weight": (3, 13, 2), "odd": (1, 40), "gain": ()}


@pytest.fixture(params=[4, 11, 64])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Above how many elements tensors are cut: few, so that everything is, in ways that do not divide."""
    monkeypatch.setattr(sliced, "LONG_ON_CPU", request.param)
    return request.param


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def bare(tx: Any, params: Any, steps: int = 4) -> tuple[Any, Any]:
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(draw(100 + step), state, params, step=torch.tensor(step), value=torch.tensor(1.0))
        params = tx.apply(params, updates, state)
    return params, state


def advanced(tx: Any, params: Any, steps: int = 4, *, reuse: bool = False, **told: Any) -> tuple[Any, Any]:
    state = tx.init(params)
    for step in range(steps):
        extra = {"step": torch.tensor(step), "value": torch.tensor(1.0)}
        params, state = sliced.advance(tx, draw(100 + step), state, params, reuse=reuse, **told, **extra)
    return params, state


def _scheduled() -> Any:
    return optim.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=2, decay_steps=9)


def _labelled(name: str) -> str:
    return "slow" if name.endswith("bias") else "fast"


@tree.pytree
class _First:
    params: Any


@optim.transformation
class _TowardsTheFirst(optim.GradientTransformation):
    """Remembers the first parameters, and hands its state on as the very tensors it is given."""

    scope = "element"

    def init(self, params: Any) -> _First:
        return _First(tree.map(torch.clone, params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tree.map(lambda p, f: 0.1 * (f - p) - 1.0, params, state.params), state


adamw, sgd = optim.adamw(1e-2, weight_decay=0.1), optim.sgd(0.1, momentum=0.9)
TREE = {name: name != "gain" for name in SHAPES}
# Each with whether it is cut as a whole.
COMPOSED = {
    "clipped": (optim.chain(optim.clip_by_global_norm(1.0), adamw), False),
    "schedule": (optim.adamw(_scheduled(), weight_decay=0.1, mask="*weight"), True),
    "decay by schedule": (optim.adamw(1e-2, weight_decay=_scheduled()), True),
    "amsgrad": (optim.amsgrad(1e-2, weight_decay=0.1), True),
    "averaged": (optim.average_params(adamw, decay=0.5), True),
    "averaged equally": (optim.average_params(sgd, decay=None, start=1, every=2), True),
    "injected": (optim.inject_hyperparams(optim.adamw)(learning_rate=1e-2, weight_decay=0.1), True),
    "masked": (optim.masked(adamw, "*weight"), True),
    "masked by a tree": (optim.masked(adamw, TREE), True),
    "frozen": (optim.chain(adamw, optim.freeze("body.*")), True),
    "partition": (optim.partition({"slow": sgd, "fast": adamw}, {"slow": "*bias", "fast": "*"}), True),
    "partition by function": (optim.partition({"slow": sgd, "fast": adamw}, _labelled), True),
    "partition by a tree": (
        optim.partition({"slow": sgd, "fast": adamw}, {n: "slow" if n == "odd" else "fast" for n in SHAPES}),
        True,
    ),
    "master": (precision.master_weights(adamw), True),
    "accumulated": (optim.accumulate(adamw, every=2), True),
    "lookahead": (optim.lookahead(adamw, 2, reset_state=True), True),
    "conditional": (optim.conditionally_transform(optim.trace(0.9), lambda step: step % 2 == 0), True),
    "schedule free": (optim.schedule_free_adamw(1e-2, 3), True),
    "plateau": (optim.chain(sgd, optim.reduce_on_plateau(patience=1)), True),
    "if finite": (optim.apply_if_finite(adamw), False),
    "clipped by value": (optim.chain(optim.clip_by_value(0.3), adamw, optim.keep_params_nonnegative()), True),
    "norm at the end": (optim.chain(adamw, optim.clip_by_block_rms(0.1)), False),
    "nothing": (optim.identity(), True),
    "unchanged state": (_TowardsTheFirst(), True),
    "state before the end": (optim.chain(optim.trace(0.9), optim.clip_by_global_norm(1.0), adamw), False),
    "bfloat16 moments": (optim.adamw(1e-2, mu_dtype=torch.bfloat16), True),
}


@pytest.mark.parametrize("name", slow_but(COMPOSED, *list(COMPOSED)[::3]))
def test_slices_and_donated_memory_change_no_bit(name: str, limit: int) -> None:
    tx, separable = COMPOSED[name]
    assert (tx.scope == "element") is separable
    expected = bare(tx, draw(1))
    params = draw(1)
    assert not (found := tree.diff(advanced(tx, params), expected)), f"\n{found}"
    assert tree.equal(params, draw(1))
    kept = tree.map(torch.clone, params)
    actual = advanced(tx, params, reuse=True)
    assert not (found := tree.diff(actual, expected)), f"\n{found}"
    long = [n for n, p in kept.items() if sliced.is_long(p)]
    if separable or name in ("clipped", "state before the end"):
        assert long
        assert all(actual[0][n].data_ptr() == params[n].data_ptr() for n in long)
    written = {n for n in SHAPES if actual[0][n].data_ptr() == params[n].data_ptr()}
    assert all(torch.equal(params[n], kept[n]) for n in SHAPES if n not in written)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("name", ["clipped", "averaged", "partition", "if finite", "master", "state before the end"])
def test_an_update_that_does_not_count_changes_nothing(name: str, reuse: bool, limit: int) -> None:
    tx, _ = COMPOSED[name]
    params, state = bare(tx, draw(2), 3)
    before = tree.digest((params, state))
    bad = {n: g * float("nan") for n, g in draw(3).items()}
    extra = {"step": torch.tensor(3), "value": torch.tensor(1.0), "accept": torch.tensor(False), "reuse": reuse}
    assert tree.digest(sliced.advance(tx, bad, state, params, **extra)) == before
    one = sliced.advance(tx, draw(3), state, params, **extra | {"accept": torch.tensor(True), "reuse": False})
    other = sliced.advance(tx, draw(3), state, params, **extra | {"accept": torch.tensor(True)})
    assert tree.digest(one) == tree.digest(other)
    assert tree.digest(one) != before


# --- the fused kernels ------------------------------------------------------------------------------------------------

FUSED = {
    "sgd": (optim.sgd(0.1, fused=True), lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "momentum": (optim.sgd(0.1, 0.9, fused=True), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True)),
    "nesterov": (
        optim.sgd(0.1, 0.9, nesterov=True, fused=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, fused=True),
    ),
    "adam": (optim.adam(1e-2, fused=True), lambda p: torch.optim.Adam(p, 1e-2, fused=True)),
    "adamw": (
        optim.adamw(1e-2, weight_decay=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    ),
    "amsgrad": (optim.amsgrad(1e-2, fused=True), lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, fused=True)),
    "masked decay": (
        optim.adamw(1e-2, weight_decay=0.1, mask="*weight", fused=True),
        lambda p: torch.optim.AdamW(
            [
                {"params": [x for n, x in zip(SHAPES, p, strict=True) if n.endswith("weight")], "weight_decay": 0.1},
                {"params": [x for n, x in zip(SHAPES, p, strict=True) if not n.endswith("weight")]},
            ],
            1e-2,
            weight_decay=0.0,
            fused=True,
        ),
    ),
}


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_updates_have_the_bits_of_torch(name: str, reuse: bool, limit: int) -> None:
    tx, make = FUSED[name]
    theirs = [p.clone().requires_grad_() for p in draw(4).values()]
    optimizer = make(theirs)
    for step in range(4):
        for p, g in zip(theirs, draw(100 + step).values(), strict=True):
            p.grad = g.clone()
        optimizer.step()
    params = draw(4)
    pointers = {n: p.data_ptr() for n, p in params.items() if sliced.is_long(p)}
    ours, state = advanced(tx, params, reuse=reuse)
    assert not (found := tree.diff(ours, dict(zip(SHAPES, [p.detach() for p in theirs], strict=True)))), f"\n{found}"
    assert not reuse or {n: ours[n].data_ptr() for n in pointers} == pointers
    near = bare(tx, draw(4))  # an update that is added rounds otherwise
    for a, b in zip(tree.leaves((ours, state)), tree.leaves(near), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_of_half_precision_on_a_cpu_is_that_without_the_kernel(momentum: float, dtype: torch.dtype) -> None:
    """The kernel of torch 2.13 skips all full vectors of such tensors, and reads their momentum as float32."""
    params = {"w": torch.randn(9, 64).to(dtype), "b": torch.randn(3)}
    ends = []
    for fused in (True, False):
        tx, ps = optim.sgd(0.1, momentum, fused=fused), params
        state = tx.init(ps)
        for step in range(3):
            grads = {n: torch.full_like(p, 0.5 + step) for n, p in ps.items()}
            ps, state = sliced.advance(tx, grads, state, ps)
        ends.append((ps, state))
    assert not (found := tree.diff(*ends)), f"\n{found}"
    assert not torch.equal(ends[0][0]["w"], params["w"])


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_updates_do_not_mind_how_gradients_lie_in_memory(name: str, chained: bool) -> None:
    """The kernels walk memory, whatever it means: gradients of a convolution in channels-last come so."""
    tx, _ = FUSED[name]
    tx = optim.chain(optim.clip_by_global_norm(0.5), tx) if chained else tx
    generator = torch.Generator().manual_seed(0)
    params = {
        "k.weight": torch.randn(5, 3, 2, 4, generator=generator),
        "m.weight": torch.randn(7, 5, generator=generator),
    }
    plain = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
    odd = {
        "k.weight": plain["k.weight"].to(memory_format=torch.channels_last),
        "m.weight": plain["m.weight"].T.contiguous().T,
    }
    assert odd["k.weight"].stride() != plain["k.weight"].stride()
    for use in (
        lambda gs: sliced.advance(tx, gs, tx.init(params), params),
        lambda gs: tx.update(gs, tx.init(params), params),
    ):
        assert not (found := tree.diff(use(odd), use(plain))), f"\n{found}"
    turned = {
        n: p.to(memory_format=torch.channels_last) if p.dim() == 4 else p.T.contiguous().T for n, p in params.items()
    }
    ours = sliced.advance(tx, odd, tx.init(turned), turned)[0]
    # The last few elements in memory are computed one by one, which rounds otherwise; they are other ones here.
    torch.testing.assert_close(ours, sliced.advance(tx, plain, tx.init(params), params)[0], rtol=1e-6, atol=1e-7)


# --- what is not cut --------------------------------------------------------------------------------------------------


@tree.pytree
class _Odd:
    seen: Any


@optim.transformation
class _PerParameter(optim.GradientTransformation):
    """Claims "element" falsely: it keeps one number a parameter by its name, which cannot be sliced."""

    scope = "element"

    def init(self, params: Any) -> _Odd:
        return _Odd({name: torch.zeros(()) for name in params})

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return updates, _Odd({name: state.seen[name] + updates[name].abs().max() for name in updates})


def test_a_state_that_cannot_be_cut_is_updated_as_a_whole(limit: int) -> None:
    assert tree.equal(advanced(_PerParameter(), draw(1), reuse=True), bare(_PerParameter(), draw(1)))


def test_a_parameter_that_is_named_like_a_hyperparameter(limit: int) -> None:
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    params = {"learning_rate": torch.ones(9, 7), "w": torch.ones(9, 7)}
    grads = {name: torch.full((9, 7), 2.0) for name in params}
    updates, state = tx.update(grads, tx.init(params), params)
    assert tree.equal(sliced.advance(tx, grads, tx.init(params), params), (optim.apply_updates(params, updates), state))


def test_transformations_of_users_are_not_cut_unless_they_say_so(limit: int) -> None:
    seen = []

    @optim.transformation
    class Mine(optim.GradientTransformation):
        def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            seen.append(sorted(updates))
            return updates, state

    sliced.advance(Mine(), draw(1), Mine().init(draw(1)), draw(1))
    assert seen == [sorted(SHAPES)]


@pytest.mark.parametrize("how", ["vmap", "grad", "nested"])
def test_transforms_and_nested_parameters_go_as_a_whole(how: str, limit: int) -> None:
    tx, params = adamw, draw(1)
    state = tx.init(params)

    def run(grads: Any) -> Any:
        return sliced.advance(tx, grads, state, params, reuse=True)[0]

    if how == "nested":
        nested = {"a": {"w": torch.ones(9, 9)}, "b": torch.ones(9)}
        updates, following = tx.update(nested, tx.init(nested), nested)
        assert tree.equal(
            sliced.advance(tx, nested, tx.init(nested), nested), (tx.apply(nested, updates, None), following)
        )
        return
    before = tree.digest((params, state))
    if how == "vmap":
        stacked = {n: torch.stack([g, 2 * g]) for n, g in draw(2).items()}
        both = torch.vmap(run)(stacked)
        torch.testing.assert_close({n: x[0] for n, x in both.items()}, run_bare(draw(2), tx, state, params))
    else:
        out = torch.func.grad(lambda g: sum(x.sum() for x in run(g).values()))(draw(2))
        assert all(torch.isfinite(g).all() for g in out.values())
    assert tree.digest((params, state)) == before


def run_bare(grads: Any, tx: Any, state: Any, params: Any) -> Any:
    updates, following = tx.update(grads, state, params)
    return tx.apply(params, updates, following)


# --- memory between operations ----------------------------------------------------------------------------------------


def test_scratch_memory_is_taken_again_by_name_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace._local, "kept", {}, raising=False)
    monkeypatch.setattr(workspace, "LEAST", 0)
    xs = [torch.randn(3, 5), torch.randn(7)]
    first = workspace.into("a", torch.sqrt, [x.abs() for x in xs])
    again = workspace.into("a", torch.mul, xs, 2.0)
    assert first is not None
    assert again is not None
    assert [x.data_ptr() for x in again] == [x.data_ptr() for x in first]
    assert all(torch.equal(a, x * 2) for a, x in zip(again, xs, strict=True))
    for other in (
        workspace.into("b", torch.mul, xs, 2.0),
        workspace.into("a", torch.mul, [xs[0].T, xs[1]], 2.0),
        workspace.into("a", torch.mul, [x.double() for x in xs], 2.0),
    ):
        assert other is not None
        assert not {x.data_ptr() for x in other} & {x.data_ptr() for x in first}


def test_scratch_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace._local, "kept", {}, raising=False)
    monkeypatch.setattr(workspace, "LEAST", 0)
    for size in range(3 * workspace._MOST_LISTS):
        assert workspace.into("a", torch.neg, [torch.ones(size)]) is not None
    assert len(workspace._local.kept) == workspace._MOST_LISTS
    monkeypatch.setattr(workspace, "KEPT", 15)
    assert workspace.into("a", torch.neg, [torch.ones(4)]) is None
    assert workspace.into("a", torch.neg, [torch.ones(4, device="meta")]) is None


def test_updates_of_two_threads_do_not_share_scratch_memory() -> None:
    tx = optim.adamw(1e-2)
    expected = bare(tx, draw(1), 30)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: advanced(tx, draw(1), 30, reuse=True), range(8)))
    assert all(tree.equal(one, expected) for one in found)
