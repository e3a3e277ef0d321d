"""The scope of a transformation: the data that one update needs: a slice, a full tensor, or the full tree.

Owns the three scopes, the scope of a transformation that contains others, and the gather before an update that needs
full tensors while a step holds shards. `kernels.sliced` checks the scope before slicing, a plan before passing shards.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from purestep import tree
from purestep.errors import OptimError, explain
from purestep.optim.columns import tensors_of
from purestep.sharding import full_tensors

Scope = Literal["element", "tensor", "tree"]
SCOPES: tuple[Scope, ...] = ("element", "tensor", "tree")  # from the narrowest
T = TypeVar("T")


class Scoped:
    """Internal: an object with a scope; the base of `GradientTransformation`."""

    scope: ClassVar[Scope] = "tree"


class ShardAware:
    """Internal: `update` is right on shards whatever its scope, because it reduces norms and flags over all ranks."""


class Combinator(ShardAware):
    """Internal: combines other transformations, with the widest scope of its parts."""

    @property
    def scope(self) -> Scope:
        """The widest scope of the transformations in this one."""
        return scope_of(self)  # type: ignore[arg-type]


class Kernel:
    """Internal: `advance` writes parameters and moments in one pass, with torch's fused kernels if `fused`.

    The last bits that a fused kernel gives to an element depend on its position in memory. So a fused kernel is not
    sliced on one process, and is refused if a plan promises bits.
    """

    fused: bool


def scope_of(tx: Scoped) -> Scope:
    """Return the widest scope of a transformation and of all its parts.

    The scope that a wrapper declares is that of its own work, so it cannot narrow the scope of its parts.

    Raises:
        OptimError: `tx.scope` is none of the three.

    Examples:
        >>> from purestep import optim
        >>> scope_of(optim.nadam(1e-3)), scope_of(optim.lamb(1e-3)), scope_of(optim.clip_by_global_norm(1.0))
        ('element', 'tensor', 'tree')
    """
    own: Scope = "element" if isinstance(tx, Combinator) else check_scope(tx.scope, tx)
    return max((own, *map(scope_of, inside(tx))), key=SCOPES.index)


def check_scope(scope: Any, owner: Any) -> Scope:
    """Return a scope, or refuse a value that is none."""
    if isinstance(scope, str) and scope in SCOPES:
        return scope
    name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    raise OptimError(
        explain(
            f"{name} has no scope that there is",
            where=f"scope = {scope!r}",
            why="a scope is the data that one update needs, and there are three",
            instead='scope = "element"   # any slice of a tensor by itself\n'
            'scope = "tensor"    # each tensor by itself, in full\n'
            'scope = "tree"      # all tensors at once, in full: the default',
        )
    )


def inside(tx: Scoped) -> list[Scoped]:
    """Return the transformations in the fields of a transformation, also within tuples, lists and dicts."""
    held = [*vars(tx).values(), getattr(tx, "inner", None)]
    found: dict[int, Scoped] = {}
    for value in held:
        members = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else (value,)
        found |= {id(x): x for x in members if isinstance(x, Scoped)}
    return list(found.values())


def takes_shards(tx: Scoped) -> bool:
    """Tell whether a transformation itself gets this rank's shards; its parts decide for themselves."""
    return isinstance(tx, ShardAware) or check_scope(tx.scope, tx) == "element"


def only_shards(tx: Scoped) -> bool:
    """Tell whether a transformation and all its parts get shards, so that an update gathers nothing."""
    return takes_shards(tx) and all(map(only_shards, inside(tx)))


def fused_on_shards(tx: Scoped) -> bool:
    """Tell whether a fused kernel gets shards, whose last bits may differ from those of full tensors."""
    own = isinstance(tx, Kernel) and tx.fused
    return takes_shards(tx) and (own or any(map(fused_on_shards, inside(tx))))


def needs_value(tx: Scoped) -> bool:
    """Tell whether an update may read `value=`, the loss: for a transformation from elsewhere, yes.

    Those of this package that read it have it as an argument by name, and pass everything else on to their parts.
    """
    if not type(tx).__module__.startswith("purestep."):
        return True
    own = (getattr(type(tx), name, None) for name in ("update", "advance"))
    named = any("value" in inspect.signature(method).parameters for method in own if method is not None)
    return named or any(map(needs_value, inside(tx)))


# --- full tensors where a step holds shards ---------------------------------------------------------------------------
# `base` wraps these three methods in each subclass that defines them. Without a plan, or if nothing is sharded, the
# original method is called.


def _gathers(tx: Scoped) -> full_tensors.Whole | None:
    behind = full_tensors.current()
    return behind if behind is not None and behind.split and not takes_shards(tx) else None


def full_update(method: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Return an `update` that gathers full tensors first, unless the transformation takes shards."""

    @functools.wraps(method)
    def update(self: Any, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        behind = _gathers(self)
        if behind is None:
            return method(self, updates, state, params, **extra)
        call = functools.partial(method, self, **extra)
        if scope_of(self) == "tensor" and (done := _in_blocks(behind, call, updates, state, params)) is not None:
            return done
        new, following = behind.in_full(call, updates, state, params)
        return behind.parted(new, updates), behind.parted(following, state)

    return update


# Elements of full tensors from which a block takes no more: they are gathered together, and held at once.
_BLOCK = 1 << 23


def _in_blocks(
    behind: full_tensors.Whole, call: Callable[..., Any], updates: Any, state: Any, params: Any
) -> tuple[Any, Any] | None:
    """Gather, update and shard some tensors after others, so that few are full at a time, and messages are few.

    None if the trees are not flat, or if the state does not assign its leaves to parameters by name.
    """
    if type(updates) is not dict or not (params is None or (type(params) is dict and params.keys() == updates.keys())):
        return None
    leaves, structure = tree.flatten(state)
    if not updates or not all(isinstance(x, Tensor) for x in (*updates.values(), *leaves)):
        return None
    shapes = tuple((name, tuple(u.shape)) for name, u in updates.items())
    counts = tuple(behind.count(name, u) for name, u in updates.items())  # the same on every rank, as shapes are not
    blocks = tensors_of(structure, shapes, tuple(tuple(x.shape) for x in leaves), counts, _BLOCK)
    if blocks is None:
        return None
    result: dict[str, Tensor] = {}
    following = list(leaves)
    for block in blocks:
        given = {name: updates[name] for name in block.names}
        own = tree.unflatten(block.structure, [leaves[at] for at, _ in block.leaves])
        some = None if params is None else {name: params[name] for name in block.names}
        new, held = behind.in_full(call, given, own, some)
        result |= behind.parted(new, given)
        for (at, _), leaf in zip(block.leaves, tree.leaves(behind.parted(held, own)), strict=True):
            following[at] = leaf  # a leaf that all tensors share, such as a count, is the same in each block
    return result, tree.unflatten(structure, following)


def full_apply(method: Callable[..., T]) -> Callable[..., T]:
    """Return an `apply` that gathers full tensors first, unless the transformation takes shards."""

    @functools.wraps(method)
    def apply(self: Any, params: Any, updates: Any, state: Any) -> Any:
        behind = _gathers(self)
        if behind is None:
            return method(self, params, updates, state)
        return behind.parted(behind.in_full(functools.partial(method, self), params, updates, state), params)

    return apply


def full_advance(method: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Return an `advance` that gathers full tensors first, unless the transformation takes shards."""

    @functools.wraps(method)
    def advance(
        self: Any, updates: Any, state: Any, params: Any, *, reuse: bool = False, **extra: Any
    ) -> tuple[Any, Any]:
        behind = _gathers(self)
        if behind is None:
            return method(self, updates, state, params, reuse=reuse, **extra)
        # Gathered tensors belong to this call and may be overwritten; tensors that every rank holds in full do not.
        call = functools.partial(method, self, reuse=False, **extra)
        new, following = behind.in_full(call, updates, state, params)
        return behind.parted(new, params), behind.parted(following, state)

    return advance


IN_FULL: dict[str, Callable[..., Any]] = {"update": full_update, "apply": full_apply, "advance": full_advance}
