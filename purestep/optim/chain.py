"""Transformations one after another: `chain`, the composition of the algebra, and `identity`, its neutral element.

A chain is again a transformation. Its state has one attribute per part, named after the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from purestep.arguments import checked
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, Scalar, StepNumber, transformation
from purestep.optim.named_states import parts, parts_class, unique
from purestep.optim.scope import Combinator, scope_of
from purestep.views import Tree


@transformation
class Identity(GradientTransformation):
    scope = "element"

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return updates, state


@checked(OptimError)
def identity() -> GradientTransformation:
    """Return the transformation that does not change updates.

    Examples:
        >>> identity().update({"w": 1.0}, identity().init({"w": 2.0}))[0]
        {'w': 1.0}
    """
    return Identity()


class Several(Combinator, GradientTransformation):  # type: ignore[override]  # its scope follows from its members
    """Base of transformations with named members: combines the members' flags and hyperparameters."""

    transforms: tuple[GradientTransformation, ...]
    names: tuple[str, ...]
    label: str

    @property
    def name(self) -> str:
        return self.label

    def applied(self, state: Any) -> Tensor | None:
        return all_applied(t.applied(own) for _, t, own in self._members(state))

    def refused(self, state: Any) -> Tensor | None:
        return any_refused(t.refused(own) for _, t, own in self._members(state))

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        """Return the hyperparameters of all members; from its second use on, a name becomes `member.name`."""
        result: dict[str, Any] = {}
        for member, transform, own in self._members(state):
            for name, value in transform.hyperparams(own, step).items():
                result[name if name not in result else f"{member}.{name}"] = value
        return result

    def _note(self, members: list[GradientTransformation]) -> str:
        return ""

    def _branches(self, members: list[GradientTransformation]) -> tuple[Tree, ...]:
        return tuple(t.outline(name) for name, t in zip(self.names, self.transforms, strict=True))

    def _members(self, state: Any) -> Iterator[tuple[str, GradientTransformation, Any]]:
        for name, transform in zip(self.names, self.transforms, strict=True):
            yield name, transform, getattr(state, name)


@transformation
class Chain(Several):
    transforms: tuple[GradientTransformation, ...]
    names: tuple[str, ...]
    label: str = "chain"

    def init(self, params: Any) -> Any:
        return parts(self.names, [t.init(params) for t in self.transforms])

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        following = []
        for transform, name in zip(self.transforms, self.names, strict=True):
            updates, own = transform.update(updates, _part(state, name, self), params, **extra)
            following.append(own)
        return updates, parts(self.names, following)

    def advance(self, updates: Any, state: Any, params: Any, *, reuse: bool = False, **extra: Any) -> tuple[Any, Any]:
        if not self._one_pass():
            return super().advance(updates, state, params, reuse=reuse, **extra)
        *before, last = self.names
        following = []
        for transform, name in zip(self.transforms, before, strict=False):
            updates, own = transform.update(updates, _part(state, name, self), params, **extra)
            following.append(own)
        params, own = self.transforms[-1].advance(updates, _part(state, last, self), params, reuse=reuse, **extra)
        return params, parts(self.names, [*following, own])

    def divided(self, state: Any) -> tuple[tuple[Chain, Any], tuple[Chain, Any]]:
        """Split off the trailing parts of scope "element": return both chains with their states."""
        at = len(self.transforms)
        while at and scope_of(self.transforms[at - 1]) == "element":
            at -= 1
        states = [_part(state, name, self) for name in self.names]

        def some(of: slice) -> tuple[Chain, Any]:
            chosen = Chain(self.transforms[of], self.names[of], self.label)
            return chosen, parts(self.names[of], states[of])

        return some(slice(at)), some(slice(at, None))

    def joined(self, before: Any, end: Any) -> Any:
        """Return the state of the chain from the states of the two chains of `divided`."""
        return parts(self.names, [*before.__dict__.values(), *end.__dict__.values()])

    def _one_pass(self) -> bool:
        return bool(self.transforms) and self.transforms[-1]._one_pass()

    def only_fused(self) -> bool:
        return len(self.transforms) == 1 and self.transforms[0].only_fused()

    def __repr__(self) -> str:
        usual = unique([t.name for t in self.transforms])
        shown = [
            repr(t) if n == u else f"({n!r}, {t!r})" for t, n, u in zip(self.transforms, self.names, usual, strict=True)
        ]
        if self.label != "chain":
            shown.append(f"name={self.label!r}")
        return f"chain({', '.join(shown)})"


@checked(OptimError)
def chain(
    *transforms: GradientTransformation | tuple[str, GradientTransformation], name: str = "chain"
) -> GradientTransformation:
    r"""Apply transformations one after another: the updates of one are the gradients of the next.

    Args:
        *transforms: transformations, or `(name, transformation)` pairs. The default name of a part is that of the
            transformation: `adam`, `clip_by_global_norm`; a second one of the same name is `adam_2`.
        name: the name of this chain within another chain.

    Returns:
        A transformation whose state has one attribute per part.

    Raises:
        OptimError: a part is not a transformation, or a name is not an identifier or comes twice.

    Examples:
        >>> from purestep import optim, tree
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(3e-4))
        >>> tx
        chain(clip_by_global_norm(max_norm=1.0), adamw(learning_rate=0.0003, weight_decay=0.01))
        >>> tree.paths(tx.init({"w": torch.zeros(2)}), "opt_state")[1]
        "opt_state.adamw.mu['w']"

    Reference: `optax.chain` and `optax.named_chain`.
    """
    given: list[str | None] = []
    members: list[GradientTransformation] = []
    for position, item in enumerate(transforms):
        own, transform = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if not isinstance(transform, GradientTransformation):
            raise OptimError(
                explain(
                    "a part of a chain is not a gradient transformation",
                    where=f"part {position}: {type(transform).__name__} {transform!r}",
                    instead="chain(clip_by_global_norm(1.0), adamw(3e-4))\n"
                    "lift(torch.optim.SGD, lr=0.1)   # for torch's own",
                )
            )
        given.append(own)
        members.append(transform)
    chosen = [n for n in given if n is not None]
    rest = iter(unique([*chosen, *(t.name for t, n in zip(members, given, strict=True) if n is None)])[len(chosen) :])
    names = tuple(n if n is not None else next(rest) for n in given)
    parts_class(names)
    return Chain(transforms=tuple(members), names=names, label=name)


def all_applied(flags: Iterable[Tensor | None]) -> Tensor | None:
    """Combine the `applied` flags of parts: true if all are, None if no part ever skips an update."""
    return _combined(torch.logical_and, flags)


def any_refused(flags: Iterable[Tensor | None]) -> Tensor | None:
    """Combine the `refused` flags of parts: true if one is, None if no part ever refuses an update."""
    return _combined(torch.logical_or, flags)


def _combined(both: Callable[[Tensor, Tensor], Tensor], flags: Iterable[Tensor | None]) -> Tensor | None:
    said = [flag for flag in flags if flag is not None]
    return reduce(both, said) if said else None


def _part(state: Any, name: str, transform: Chain) -> Any:
    try:
        return getattr(state, name)
    except AttributeError:
        raise OptimError(
            explain(
                f"the state has no part {name!r}",
                where=f"opt_state: {type(state).__name__}",
                why=f"it was not made by this transformation: {transform!r}",
                instead="opt_state = tx.init(params)",
            )
        ) from None
