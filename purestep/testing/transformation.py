"""`check_transformation`: the proof that a gradient transformation keeps the protocol and declares the right scope.

No run shows a wrong scope: slices and shards are then updated wrongly without an error. Threads that exchange through a
barrier simulate ranks, so the proof needs one process and executes the code of a real plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, NonNegative, checked
from purestep.errors import ConfigError, PurestepError, explain
from purestep.optim.base import GradientTransformation
from purestep.optim.base import check_transformation as check_kind
from purestep.optim.kernels import sliced
from purestep.optim.scope import Scope, ShardAware, fused_on_shards, inside, scope_of
from purestep.sharding import ddp, exact_norm, full_tensors
from purestep.sharding.leaf_roles import follow

# A leaf of each number of dimensions, with sizes that are no multiples of 2 or 3 ranks or of a vector register.
_SHAPES: dict[str, tuple[int, ...]] = {"matrix": (19, 7), "vector": (37,), "kernel": (5, 3, 4), "scalar": ()}
_LIMITS = (5, 40)  # elements above which the slices of one process begin
_RANKS = ((2, 0), (3, 0), (2, -1))  # simulated ranks, and the dimension along which they share each tensor
_WHY = {
    "element": "steps slice long tensors and plans hand out shards: each must get the bits that it has in full",
    "tensor": "each tensor may be updated without the others, and must get the bits that it has among them",
    "tree": "the update has to know that tensors are shards, and ask all ranks for what it needs of the rest",
}


@dataclasses.dataclass(frozen=True)
class _Step:
    """The inputs of one update, and its results on full tensors."""

    number: int
    grads: Any
    state: Any
    params: Any
    extra: dict[str, Any]
    updates: Any
    following: Any

    def __str__(self) -> str:
        return f"update {self.number}"


@dataclasses.dataclass(frozen=True)
class _Tolerance:
    """The tolerance of a comparison; bits are compared if both numbers are 0."""

    rtol: float
    atol: float


@checked(ConfigError)
def check_transformation(
    tx: GradientTransformation,
    params: object = None,
    *,
    value_fn: Callable[[Any], Any] | None = None,
    seeds: Count = 2,
    steps: Count = 3,
    rtol: NonNegative[float] = 0.0,
    atol: NonNegative[float] = 0.0,
) -> None:
    """Prove that a transformation keeps the protocol, and that its update may be split as its `scope` allows.

    For each seed the transformation makes several updates with random gradients. An update must not change its
    arguments, must return the same bits again, accept unknown keywords, and keep structure, shapes and dtypes. Then
    each update is repeated on parts:

    - "element": slice by slice, as long tensors are on one process;
    - "element" and "tensor": one tensor at a time, from `init` on;
    - every scope: on the shards of 2 and 3 simulated ranks, along the first and the last dimension.

    The results must equal those of the update on full tensors.

    Args:
        tx: the transformation; if a part of a combination fails, the error names the part.
        params: floating-point tensors; by default a matrix, a vector, a kernel of three dimensions and a scalar of
            float32, and for the protocol also a bfloat16 tensor. Pass your own for a rule of matrices only.
        value_fn: params -> loss, 0-d, for transformations that evaluate the loss; gradients are then computed from it.
        seeds: number of sequences of random gradients.
        steps: number of updates in each.
        rtol, atol: tolerance relative to the results on full tensors; 0 and 0 compare bits. `fused=True` needs about
            1e-6, because the rounding of torch's fused kernels depends on an element's position in memory.

    Raises:
        ConfigError: `tx` is no transformation, or an argument is out of range.
        AssertionError: a check fails; the message names the leaf, the first element that differs and the scope to
            declare.

    Examples:
        >>> from purestep import optim
        >>> check_transformation(optim.adamw(1e-3))
        >>> @optim.transformation
        ... class UnitNorm(optim.GradientTransformation):
        ...     scope = "element"
        ...
        ...     def update(self, updates, state, params=None, **extra):
        ...         return tree.map(lambda u: u / u.norm(), updates), state
        >>> check_transformation(UnitNorm())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: unit_norm() is not of scope "element"
          where:   sliced by rows, update 1, params['kernel'][0, 0, 0]: ... in full, ... otherwise
          why:     steps slice long tensors and plans hand out shards: each must get the bits that it has in full
          instead: scope = "tensor"
    """
    check_kind(tx)
    _check_params(params)
    near = _Tolerance(rtol, atol)
    for seed in range(seeds):
        if params is None and value_fn is None and seed == 0:
            half = _draw(_SHAPES, seed) | {"half": _draw({"half": (6, 3)}, seed)["half"].bfloat16()}
            _straight(tx, half, seed, steps, None)
        done = _straight(tx, _draw(_SHAPES, seed) if params is None else params, seed, steps, value_fn)
        failed = _failed(tx, done, near)
        if failed is None:
            continue
        # The error of a part is more precise than that of the combination.
        for part in inside(tx):
            if not isinstance(part, GradientTransformation):
                continue
            with contextlib.suppress(PurestepError):
                check_transformation(part, params, value_fn=value_fn, seeds=seed + 1, steps=steps, rtol=rtol, atol=atol)
        claim, where, instead = failed
        if fused_on_shards(tx):
            instead = "check_transformation(tx, rtol=1e-5)   # a fused kernel rounds by where an element lies"
        raise AssertionError(
            explain(f'{tx!r} is not of scope "{claim}"', where=where, why=_WHY[claim], instead=instead)
        )


def _check_params(params: object) -> None:
    if params is None:
        return
    odd = [n for n, p in zip(tree.names(params), tree.leaves(params), strict=True) if not _is_number(p)]
    if odd or not tree.leaves(params):
        raise ConfigError(
            explain(
                "parameters are floating-point tensors, at least one",
                where=f"params: {odd[0]!r} is none" if odd else f"params={params!r}",
                instead='check_transformation(tx, {"w": torch.randn(19, 7)})',
            )
        )


def _is_number(p: object) -> bool:
    return isinstance(p, Tensor) and p.is_floating_point()


def _failed(tx: GradientTransformation, done: list[_Step], near: _Tolerance) -> tuple[Scope, str, str] | None:
    """Return the scope that fails, where, and what to write instead; None if the declared scope holds."""
    claim = scope_of(tx)
    if claim == "element" and (found := _first(_sliced(tx, done, near))):
        alone = _first(_one_by_one(tx, done, near)) is None
        return claim, found, 'scope = "tensor"' if alone else 'scope = "tree"'
    if claim != "tree" and (found := _first(_one_by_one(tx, done, near))):
        return claim, found, 'scope = "tree"'
    if found := _first(_sharded(tx, done, near)):
        if isinstance(tx, ShardAware):
            return claim, found, "no ShardAware among its bases: then it is given full tensors"
        # Whether a wrapper itself gets shards depends on its own scope, not on its parts.
        return tx.scope, found, f'scope = "{"tensor" if claim == "element" else "tree"}"'
    return None


def _first(found: Iterator[str]) -> str | None:
    return next(found, None)


# --- the update on full tensors ---------------------------------------------------------------------------------------


def _straight(
    tx: GradientTransformation, params: object, seed: int, steps: int, value_fn: Callable[[Any], Any] | None
) -> list[_Step]:
    """Return the updates on full tensors, each checked against the protocol."""
    state = tx.init(params)
    _check_alias(tx, state, params)
    done = []
    for number in range(1, steps + 1):
        grads = _gradients(params, 1000 * seed + number, value_fn)
        extra: dict[str, Any] = {"step": torch.tensor(number - 1), "value": torch.tensor(1.0 / number)}
        if value_fn is not None:
            extra["value_fn"] = value_fn
        step = _protocol(tx, number, grads, state, params, extra)
        done.append(step)
        params, state = tx.apply(params, step.updates, step.following), step.following
        _check_kept(f"{tx!r}: the parameters after update {number}", step.params, params, "params")
    return done


def _protocol(
    tx: GradientTransformation, number: int, grads: object, state: object, params: object, extra: dict[str, Any]
) -> _Step:
    """Update twice, and check the rules that every step relies on."""
    kept = tree.map(_copy, (grads, state, params))
    updates, following = tx.update(grads, state, params, **extra)
    for name, old, now in zip(("updates", "state", "params"), kept, (grads, state, params), strict=True):
        if found := tree.diff(old, now, name):
            _broken(
                f"update {number} of {tx!r} changed what it was given",
                str(found[0]),
                "a step may read its old state again, and others may hold these tensors",
                "new tensors: out-of-place operations, and a new state",
            )
    _check_kept(f"{tx!r}: what update {number} returned", grads, updates, "updates", dtypes=False)
    _check_kept(f"{tx!r}: the state after update {number}", state, following, "state")
    try:
        again = tx.update(grads, state, params, **extra, an_unknown_keyword=torch.ones(()))
    except TypeError as error:
        _broken(
            f"{tx!r} does not take keywords that it does not know",
            f"update {number}: {error}",
            "a step passes what it knows to all transformations: step, value, value_fn, ...",
            "def update(self, updates, state, params=None, **extra):",
        )
    if found := tree.diff((updates, following), again, "update"):
        _broken(
            f"{tx!r} gave other bits the second time",
            f"update {number}: {found[0]}",
            "an update is a function of what it is given, or no run can be repeated",
            "randomness from a key in the state: ps.random.fold_in(state.rng, step)",
        )
    return _Step(number, grads, state, params, extra, updates, following)


def _check_kept(what: str, old: object, new: object, root: str, *, dtypes: bool = True) -> None:
    before, after = (dict(zip(tree.paths(x, root), tree.leaves(x), strict=True)) for x in (old, new))
    odd = next(iter(before.keys() ^ after.keys()), None)
    if odd is not None:
        _broken(f"{what} has other leaves than before", f"{odd} is only in {'the old' if odd in before else 'the new'}")
    for path, leaf in after.items():
        expected = before[path]
        if not isinstance(leaf, Tensor):
            _broken(f"{what} holds what is no tensor", f"{path}: {type(leaf).__name__}")
        if leaf.shape != expected.shape or (dtypes and leaf.dtype != expected.dtype):
            _broken(f"{what} changed shape or dtype", f"{path}: {tree.describe(expected)} became {tree.describe(leaf)}")
    if tree.structure(old) != tree.structure(new):
        _broken(f"{what} has another structure than before", f"{root}: {tree.structure(old)} and {tree.structure(new)}")


def _check_alias(tx: GradientTransformation, state: object, params: object) -> None:
    """Refuse an initial state that holds a tensor twice, or a parameter itself, because it could not be donated."""
    seen: dict[int, str] = {}
    named = zip(tree.paths(params, "params") + tree.paths(state, "state"), tree.leaves((params, state)), strict=True)
    for path, leaf in named:
        if isinstance(leaf, Tensor) and leaf.numel():
            other = seen.setdefault(leaf.data_ptr(), path)
            if other != path:
                _broken(
                    f"the initial state of {tx!r} holds the same memory twice",
                    f"{path} is {other}",
                    "where a state is donated, its memory is written over, and each tensor must have its own",
                    "params copied by torch.clone, zeros by torch.zeros_like",
                )


def _broken(what: str, where: str, why: str | None = None, instead: str | None = None) -> NoReturn:
    why = why or "a state that changes its structure, shapes or dtypes cannot be compiled, restored or compared"
    raise AssertionError(explain(what, where=where, why=why, instead=instead or "leaves like those that were given"))


# --- the update of parts ----------------------------------------------------------------------------------------------


def _sliced(tx: GradientTransformation, done: list[_Step], near: _Tolerance) -> Iterator[str]:
    """Yield the differences of updates slice by slice, as `kernels.sliced` makes them for long tensors."""
    for step in done:
        if type(step.params) is not dict:
            return
        expected = tx.advance(step.grads, step.state, step.params, **step.extra)
        for limit, reuse in ((limit, reuse) for limit in _LIMITS for reuse in (False, True)):
            how = f"sliced by rows{', in donated memory' if reuse else ''}, {step}"
            state, params = tree.map(_copy, (step.state, step.params))
            try:
                found = sliced.sliced(tx, step.grads, state, params, reuse=reuse, limit=limit, **step.extra)
            except Exception as error:  # a user's formula may raise anything on a slice
                yield f"{how}: {type(error).__name__}: {error}"
                return
            if found is not None:
                yield from _differences(how, ("params", "state"), expected, found, near)


def _one_by_one(tx: GradientTransformation, done: list[_Step], near: _Tolerance) -> Iterator[str]:
    """Yield the differences of updates of one tensor at a time, from `init` on."""
    structure = tree.structure(done[0].params)
    for at, name in enumerate(tree.names(done[0].params)):
        state = None
        for step in done:
            how = f"without the other tensors, {step}"
            grads, params, expected = (
                {name: tree.leaves(values)[at]} for values in (step.grads, step.params, step.updates)
            )
            if structure.num_leaves == 1:
                grads, params, expected = step.grads, step.params, step.updates
            try:
                state = tx.init(params) if state is None else state
                updates, state = tx.update(grads, state, params, **step.extra)
            except Exception as error:  # a user's formula may raise anything on one tensor
                yield f"{how}: {name}: {type(error).__name__}: {error}"
                return
            yield from _differences(how, ("updates",), (expected,), (updates,), near)


def _sharded(tx: GradientTransformation, done: list[_Step], near: _Tolerance) -> Iterator[str]:
    """Yield the differences of updates on the shards of simulated ranks from those of one rank under the same plan."""
    for step in done:
        try:
            alone = _on_ranks(tx, step, 1, 0)[0]
            for size, dim in _RANKS:
                how = f"on the shards of {size} ranks{'' if dim == 0 else ' along the last dimension'}, {step}"
                ranks = _on_ranks(tx, step, size, dim)
                shards = _Shards(step, size, dim)
                for rank, result in enumerate(ranks):
                    expected = shards.of(alone, rank)
                    yield from _differences(f"{how}, rank {rank}", _ROOTS, expected, result, near)
        except Exception as error:  # a user's formula may raise anything on a shard
            yield f"on the shards of simulated ranks, {step}: {type(error).__name__}: {error}"
            return


def _differences(
    how: str, roots: Sequence[str], expected: Sequence[Any], found: Sequence[Any], near: _Tolerance
) -> Iterator[str]:
    for root, a, b in zip(roots, expected, found, strict=True):
        left, right = (dict(zip(tree.paths(x, root), tree.leaves(x), strict=True)) for x in (a, b))
        for path, full in left.items():
            other = right.get(path)
            if not isinstance(other, Tensor) or (full.shape, full.dtype) != (other.shape, other.dtype):
                known = "missing" if other is None else tree.describe(other)
                yield f"{how}, {path}: {tree.describe(full)} in full, {known} otherwise"
                continue
            apart = _apart(full, other, near).nonzero()
            if len(apart):
                at = tuple(apart[0].tolist())
                numbers = f"{full[at].item()!r} in full, {other[at].item()!r} otherwise"
                yield f"{how}, {path}{list(at) if at else ''}: {numbers}"


def _apart(a: Tensor, b: Tensor, near: _Tolerance) -> Tensor:
    """Return a mask of the elements that differ, in their bits or by more than a tolerance."""
    if near.rtol or near.atol:
        return ~torch.isclose(a, b, rtol=near.rtol, atol=near.atol, equal_nan=True)
    raw = [x.detach().contiguous().reshape(-1, 1).view(torch.uint8) for x in (a, b)]
    return (raw[0] != raw[1]).any(dim=1).reshape(a.shape)


# --- simulated ranks --------------------------------------------------------------------------------------------------

_ROOTS = ("updates", "state", "params")


class _Shards:
    """The shards of the leaves of a step: consecutive rows for each rank; the last ranks may hold none."""

    def __init__(self, step: _Step, size: int, dim: int) -> None:
        self.size, self.dim = size, dim
        self.shapes = {
            n: tuple(p.shape) for n, p in zip(tree.names(step.params), tree.leaves(step.params), strict=True)
        }
        # The parameter of each leaf of the optimizer state, which determines its placement under a real plan.
        roles = follow({"opt_state": step.state, "params": step.params})
        self.followed = [leaf.name is not None for leaf in roles if leaf.kind != "params"]

    def of(self, result: Sequence[Any], rank: int) -> tuple[Any, Any, Any]:
        """Return the shards of a rank of `(updates or gradients, state, params)`."""
        updates, state, params = result
        leaves, structure = tree.flatten(state)
        held = [self.cut(x, rank) if own else x for x, own in zip(leaves, self.followed, strict=True)]
        cut = lambda x: self.cut(x, rank)  # noqa: E731
        return tree.map(cut, updates), tree.unflatten(structure, held), tree.map(cut, params)

    def cut(self, leaf: Tensor, rank: int) -> Tensor:
        """Return a copy of the shard of a rank."""
        if leaf.dim() == 0 or self.size == 1:
            return leaf
        start, length = self.rows(tuple(leaf.shape), rank)
        return leaf.narrow(self.dim, start, length).clone(memory_format=torch.contiguous_format)

    def rows(self, shape: tuple[int, ...], rank: int) -> tuple[int, int]:
        """Return the start of the shard of a rank along the dimension, and its length."""
        count = shape[self.dim]
        most = -(-count // self.size)
        start = min(rank * most, count)
        return start, min(most, count - start)

    def shape(self, full: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Return the shape of the shard of a rank."""
        local = list(full)
        local[self.dim] = self.rows(full, rank)[1]
        return tuple(local)


class _Exchange:
    """An all-gather between simulated ranks, which are threads."""

    def __init__(self, size: int) -> None:
        self.sent: list[tuple[str, Any]] = [("", None)] * size
        self.barrier = threading.Barrier(size, timeout=120)

    def __call__(self, rank: int, what: str, value: object = None) -> list[Any]:
        self.sent[rank] = what, value
        self.barrier.wait()
        sent = list(self.sent)
        self.barrier.wait()
        if len({message for message, _ in sent}) > 1:
            raise RuntimeError(f"the ranks ask for different things: {', '.join(message for message, _ in sent)}")
        return [value for _, value in sent]


class _Rank(full_tensors.Whole):
    """The exchange of an update on one simulated rank with the others, as `Whole` is on real ranks."""

    def __init__(self, shards: _Shards, rank: int, exchange: _Exchange, given: Sequence[Any]) -> None:
        super().__init__(ddp(), {})
        self.shards, self.rank, self.exchange = shards, rank, exchange
        self.__dict__["split"] = shards.size > 1
        own = [*([True] * len(tree.leaves(given[0]))), *shards.followed, *([True] * len(tree.leaves(given[2])))]
        self.held = {id(x) for x, yes in zip(tree.leaves(tuple(given)), own, strict=True) if yes and x.dim()}

    def reduce(self, values: Tensor, op: str) -> Tensor:
        stacked = torch.stack(self.exchange(self.rank, f"a {op}", values))
        return stacked.sum(0) if op == "sum" else stacked.amax(0) if op == "max" else stacked.amin(0)

    def squares(self, values: Sequence[Tensor], structure: Any) -> Tensor:
        counts, mine = [], []
        for name, value in zip(self.names(structure), values, strict=True):
            full = self.shards.shapes[name]
            counts.append(torch.Size(full).numel())
            mine.append(self._is_shard(name, value) or self.rank == 0)
        return exact_norm.squares(values, counts, mine, self.reduce)

    def count(self, name: str, value: Tensor) -> int:
        return torch.Size(self.shards.shapes[name]).numel()

    def full(self, named: Sequence[tuple[str, Any]]) -> list[Any]:
        return [
            torch.cat(self.exchange(self.rank, f"the full {name}", x), self.shards.dim)
            if self._is_shard(name, x)
            else x
            for name, x in named
        ]

    def parted(self, values: object, like: object) -> Any:
        leaves, structure = tree.flatten(values)
        old, known = tree.flatten(like)
        if structure != known:
            return values
        parts = [
            self.shards.cut(x, self.rank) if self._is_shard(name, y) else x
            for name, x, y in zip(self.names(known), leaves, old, strict=True)
        ]
        return tree.unflatten(structure, parts)

    def _is_shard(self, name: str, value: object) -> bool:
        if not self.split or not isinstance(value, Tensor):
            return False
        full = self.shards.shapes.get(name)
        return id(value) in self.held or bool(full and self.shards.shape(full, self.rank) == tuple(value.shape))


def _on_ranks(tx: GradientTransformation, step: _Step, size: int, dim: int) -> list[tuple[Any, Any, Any]]:
    """Return `(updates, state, params)` after an update for each simulated rank."""
    shards, exchange = _Shards(step, size, dim), _Exchange(size)
    results: list[Any] = [None] * size
    failed: list[Exception] = []

    def run(rank: int) -> None:
        try:
            grads, state, params = shards.of((step.grads, step.state, step.params), rank)
            with full_tensors.updating(_Rank(shards, rank, exchange, (grads, state, params))):
                updates, following = tx.update(grads, state, params, **step.extra)
                results[rank] = updates, following, tx.apply(params, updates, following)
            exchange(rank, "nothing more")
        except threading.BrokenBarrierError:
            pass  # another rank failed, and its error is raised
        except Exception as error:
            failed.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return results


# --- gradients --------------------------------------------------------------------------------------------------------


def _draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _gradients(params: object, seed: int, value_fn: Callable[[Any], Any] | None) -> Any:
    """Return the gradients of a loss, or random gradients of different magnitudes, some of them 0."""
    if value_fn is not None:
        return torch.func.grad(value_fn)(params)
    generator = torch.Generator().manual_seed(seed)

    def drawn(p: Tensor) -> Tensor:
        g, size, kept = (torch.randn(p.shape, generator=generator) for _ in range(3))
        return torch.where(kept > -1.5, g * torch.exp(2 * size), 0.0).to(p)

    return tree.map(drawn, params)


def _copy(x: object) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
