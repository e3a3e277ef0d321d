"""Different rules for different parameters: `partition` by label, `masked` by filter, `freeze`, `set_to_zero`.

Inner transformations get a flat dict of their parameters by dotted name, so the paths of their state read
`opt_state.partition.head.adamw.mu['head.weight']`. Parameters are assigned by name and structure, on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from purestep import tree
from purestep.arguments import checked
from purestep.errors import OptimError, explain
from purestep.optim.base import ElementWrapper, GradientTransformation, transformation
from purestep.optim.chain import Several
from purestep.optim.named_states import parts, parts_class
from purestep.optim.weight_decay import fixed_filter

Labels = Mapping[str, Any] | Callable[[str], str] | Any


@transformation
class SetToZero(GradientTransformation):
    scope = "element"

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tree.map(torch.zeros_like, updates), state


@checked(OptimError)
def set_to_zero() -> GradientTransformation:
    """Replace updates by zeros; NaNs too.

    Examples:
        >>> set_to_zero().update({"w": torch.tensor([float("nan")])}, None)[0]
        {'w': tensor([0.])}

    Reference: `optax.set_to_zero`.
    """
    return SetToZero()


@tree.pytree
class MaskedState:
    """`inner`: state of the inner transformation, for the parameters it sees."""

    inner: Any


@transformation
class Masked(ElementWrapper):
    inner: GradientTransformation
    mask: Any

    def init(self, params: Any) -> MaskedState:
        if not is_filter(self.mask):
            check_same_names(by_name(self.mask), by_name(params), "mask")
        return MaskedState(self.inner.init(self._seen(params)))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        seen = None if params is None else self._seen(params)
        changed, inner = self.inner.update(self._seen(updates), state.inner, seen, **extra)
        return _put_back(updates, [changed]), MaskedState(inner)

    def _seen(self, values: Any) -> dict[str, Any]:
        named = by_name(values)
        if is_filter(self.mask):
            return {name: x for name, x in named.items() if tree.matches(self.mask, name)}
        wanted = by_name(self.mask)
        check_known_names(wanted, named, "mask")
        return {name: x for name, x in named.items() if wanted[name]}


@checked(OptimError)
def masked(inner: GradientTransformation, mask: Any) -> GradientTransformation:
    """Apply a transformation to some parameters only; the updates of the others pass unchanged.

    Args:
        inner: the transformation.
        mask: a filter of dotted names (a glob, a list of globs, a function of the name), or a tree of bools like the
            parameters.

    Raises:
        OptimError: a tree of bools has other leaves than the parameters.

    Examples:
        >>> from purestep.optim import scale
        >>> tx = masked(scale(10.0), "*weight")
        >>> updates = {"weight": torch.ones(1), "bias": torch.ones(1)}
        >>> tx.update(updates, tx.init(updates))[0]
        {'weight': tensor([10.]), 'bias': tensor([1.])}

    Reference: `optax.masked`.
    """
    return Masked(inner, fixed_filter(mask))


@checked(OptimError)
def freeze(mask: Any) -> GradientTransformation:
    """Set the updates of some parameters to zero.

    Put it last in a chain. An optimizer before it still keeps state for the frozen parameters; with
    `ps.init(..., frozen=...)`, or `partition` with `set_to_zero()`, there is no such state.

    Args:
        mask: as for `masked`.

    Examples:
        >>> tx = freeze("backbone.*")
        >>> updates = {"backbone.w": torch.ones(1), "head.w": torch.ones(1)}
        >>> tx.update(updates, tx.init(updates))[0]
        {'backbone.w': tensor([0.]), 'head.w': tensor([1.])}

    Reference: `optax.freeze`.
    """
    return masked(set_to_zero(), mask)


@transformation
class Partition(Several):
    transforms: tuple[GradientTransformation, ...]
    names: tuple[str, ...]
    labels: Any
    label: str = "partition"

    def _note(self, members: list[GradientTransformation]) -> str:
        return f"by {self.labels!r}" if _are_filters(self.labels) else "by a function" if callable(self.labels) else ""

    def init(self, params: Any) -> Any:
        if not callable(self.labels) and not _are_filters(self.labels):
            check_same_names(by_name(self.labels), by_name(params), "tree of labels")
        groups = self._groups(params)
        return parts(self.names, [t.init(groups[n]) for t, n in zip(self.transforms, self.names, strict=True)])

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        groups = self._groups(updates)
        seen = dict.fromkeys(self.names) if params is None else self._groups(params)
        changed, following = [], []
        for transform, name in zip(self.transforms, self.names, strict=True):
            new, own = transform.update(groups[name], getattr(state, name), seen[name], **extra)
            changed.append(new)
            following.append(own)
        return _put_back(updates, changed), parts(self.names, following)

    def _groups(self, values: Any) -> dict[str, dict[str, Any]]:
        groups: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        named = by_name(values)
        find = self._finder(named)
        for name, leaf in named.items():
            label = find(name, leaf)
            if label not in groups:
                raise OptimError(
                    explain(
                        f"a parameter has the label {label!r}, for which there is no transformation",
                        where=f"{name}: {tree.describe(leaf)}",
                        why=f"the labels are {list(self.names)}",
                        instead='give the last label the glob "*", which takes what is left',
                    )
                )
            groups[label][name] = leaf
        return groups

    def _finder(self, named: dict[str, Any]) -> Callable[[str, Any], Any]:
        if isinstance(self.labels, MatrixLabels):
            return self.labels
        if _are_filters(self.labels):
            return lambda name, leaf: next((n for n, f in self.labels if tree.matches(f, name)), None)
        if callable(self.labels):
            return lambda name, leaf: self.labels(name)
        given = by_name(self.labels)
        check_known_names(given, named, "tree of labels")
        return lambda name, leaf: given[name]


@checked(OptimError)
def partition(transforms: Mapping[str, GradientTransformation], labels: Labels) -> GradientTransformation:
    """Give each parameter the transformation of its label: torch's param groups, by path.

    Args:
        transforms: `{label: transformation}`; labels are identifiers.
        labels: `{label: filter}`, where the first filter that matches a dotted name wins; or a function of the dotted
            name that returns a label; or a tree of labels like the parameters.

    Returns:
        A transformation whose state has one attribute per label.

    Raises:
        OptimError: a label is unknown, or a parameter has none (when its tree is first seen).

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = partition({"slow": sgd(0.1), "fast": sgd(1.0)}, {"slow": "backbone.*", "fast": "*"})
        >>> grads = {"backbone.w": torch.ones(1), "head.w": torch.ones(1)}
        >>> tx.update(grads, tx.init(grads))[0]
        {'backbone.w': tensor([-0.1000]), 'head.w': tensor([-1.])}

    Reference: `optax.partition` (`optax.multi_transform`).
    """
    if isinstance(labels, type):
        raise OptimError(
            explain("labels is a function of name and leaf, filters, or a tree", where=f"labels={labels!r}")
        )
    names = tuple(transforms)
    parts_class(names)
    for name, transform in transforms.items():
        if not isinstance(transform, GradientTransformation):
            raise OptimError(explain("not a gradient transformation", where=f"{name}: {transform!r}"))
    if isinstance(labels, Mapping) and all(is_filter(f) for f in labels.values()) and set(labels) <= set(names):
        labels = tuple((name, fixed_filter(f)) for name, f in labels.items())
    return Partition(tuple(transforms.values()), names, labels)


@dataclasses.dataclass(frozen=True)
class MatrixLabels:
    """Labels by shape: `matrix` for 2-d parameters that a filter names, `other` for the rest."""

    matrix: str
    other: str
    filter: tree.Filter | None = None

    def __call__(self, name: str, leaf: Any) -> str:
        chosen = leaf.dim() == 2 and (self.filter is None or tree.matches(self.filter, name))
        return self.matrix if chosen else self.other


def _are_filters(labels: Any) -> bool:
    return isinstance(labels, tuple) and all(isinstance(x, tuple) and len(x) == 2 for x in labels)


# --- names ----------------------------------------------------------------------------------------------------------


def by_name(values: Any) -> dict[str, Any]:
    """Return the leaves of a tree as a dict by dotted name."""
    names = tree.names(values)
    named = dict(zip(names, tree.leaves(values), strict=True))
    if len(named) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise OptimError(
            explain(f"two leaves have the dotted name {twice!r}", why="masks and labels go by dotted name")
        )
    return named


def is_filter(value: Any) -> bool:
    """Tell whether a value is a filter of names, rather than a tree of bools or labels."""
    if isinstance(value, str) or (callable(value) and not isinstance(value, type)):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)


def check_same_names(given: dict[str, Any], named: dict[str, Any], what: str) -> None:
    """Refuse a user's tree whose leaves differ from those of the parameters."""
    odd = sorted(set(given) ^ set(named))
    if odd:
        where = f"{odd[0]!r} is only in the {what if odd[0] in given else 'parameters'}"
        raise OptimError(explain(f"the {what} does not have the leaves of the parameters", where=where))


def check_known_names(given: dict[str, Any], named: dict[str, Any], what: str) -> None:
    """Refuse parameters that a user's tree does not have; the tree may have more, as an update may hold only some."""
    check_same_names({name: x for name, x in given.items() if name in named}, named, what)


def _put_back(updates: Any, changed: list[dict[str, Any]]) -> Any:
    """Return the updates with some leaves replaced, by dotted name."""
    named = by_name(updates)
    for group in changed:
        named.update(group)
    return tree.unflatten(tree.structure(updates), list(named.values()))
