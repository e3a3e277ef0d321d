"""Which leaf of a state is which parameter: what the leaves of an optimizer state, or of an average, follow.

Names and shapes decide: a leaf whose path ends with the name of a parameter, and that has its shape, lives where the
parameter lives. It never looks at values.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from purestep import tree
from purestep.module_tensors import Definition, slots

Kind = Literal["params", "frozen", "buffers", "optimizer", "other"]
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a tree: its path, its role, the parameter it is or follows (None: it follows nothing), its shape."""

    path: Path
    kind: Kind
    name: str | None
    shape: tuple[int, ...]


def follow(value: object) -> list[Leaf]:
    """Return the role of each leaf of a tree, in order.

    A tree with nodes called `params` is a state, or holds states; a tree without is a tree of parameters. Buffers that
    are parameters of the state's model (frozen ones) are treated as parameters, other buffers are not.

    Examples:
        >>> import torch
        >>> params = {"w": torch.zeros(2)}
        >>> found = follow({"params": params, "opt_state": {"mu": params, "count": torch.zeros(())}, "step": 0})
        >>> [(leaf.path[-1], leaf.kind, leaf.name) for leaf in found]
        [('count', 'optimizer', None), ('w', 'optimizer', 'w'), ('w', 'params', 'w'), ('step', 'other', None)]
    """
    paths, leaves = tree.parts(value), tree.leaves(value)
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
    scopes = _scopes(paths)
    if not scopes:
        return [Leaf(p, "params", _dotted(p), s) for p, s in zip(paths, shapes, strict=True)]
    frozen = {scope: _parameters(_at(value, scope)) for scope in scopes}
    own: dict[Path, dict[str, tuple[int, ...]]] = {scope: {} for scope in scopes}
    found: list[Leaf | None] = []
    for path, shape in zip(paths, shapes, strict=True):
        leaf = _own_leaf(path, shape, scopes, frozen)
        if leaf is not None:
            own[path[: len(_scope_of(path, scopes) or ())]][leaf.name or ""] = shape
        found.append(leaf)
    return [leaf or _following(path, shape, own) for leaf, path, shape in zip(found, paths, shapes, strict=True)]


def _scopes(paths: list[Path]) -> list[Path]:
    """Return the paths of the nodes that have a child `params`, the longest first."""
    found = set()
    for path in paths:
        at = path.index("params") if "params" in path else len(path)
        if at < len(path) - 1 and "opt_state" not in path[:at]:
            found.add(path[:at])
    return sorted(found, key=len, reverse=True)


def _scope_of(path: Path, scopes: list[Path]) -> Path | None:
    return next((s for s in scopes if path[: len(s)] == s), None)


def _own_leaf(path: Path, shape: tuple[int, ...], scopes: list[Path], frozen: dict[Path, set[str]]) -> Leaf | None:
    scope = _scope_of(path, scopes)
    if scope is None or len(path) < len(scope) + 2:
        return None
    role, name = path[len(scope)], _dotted(path[len(scope) + 1 :])
    if role == "params":
        return Leaf(path, "params", name, shape)
    return Leaf(path, "frozen", name, shape) if role == "buffers" and name in frozen[scope] else None


def _following(path: Path, shape: tuple[int, ...], own: dict[Path, dict[str, tuple[int, ...]]]) -> Leaf:
    scope = _scope_of(path, list(own))
    inside = path[len(scope) :] if scope is not None else path
    kind: Kind = "optimizer" if "opt_state" in path else "buffers" if "buffers" in inside[:1] else "other"
    if kind == "buffers" or not shape:
        return Leaf(path, kind, None, shape)
    # The leaf's own state first; an average that a callback keeps is of some other one.
    for names in [own[scope]] if scope is not None else list(own.values()):
        for start in range(1, len(inside)):
            if names.get(name := _dotted(inside[start:])) == shape:
                return Leaf(path, kind, name, shape)
    return Leaf(path, kind, None, shape)


def _parameters(node: object) -> set[str]:
    model = getattr(node, "model", None)
    return set(slots(model.module).params) if isinstance(model, Definition) else set()


def _at(value: Any, path: Path) -> Any:
    for part in path:
        value = getattr(value, part) if isinstance(part, str) and hasattr(value, part) else value[part]
    return value


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)
