"""A stored structure compared with a user's template, and the tree built from both.

It names the differences of a snapshot and a template before any array is read, and unflattens the leaves. It never
imports a module and never calls a constructor that a snapshot names: classes come from the template, are registered, or
are classes of purestep, which it finds in purestep's own source.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from purestep import _torch, tree
from purestep.errors import TemplateMismatch, explain
from purestep.snapshot.codec import JSON, Leaf, children, dtype_name, is_namedtuple, kind_of, show

_SHOWN = 40
_NOTHING = object()
Values = Callable[[int, Any], Any]  # (index of the leaf, the template's leaf or ...) -> the leaf


def check(structure: JSON, leaves: list[Leaf], template: Any) -> None:
    """Refuse a snapshot that does not fit a template; `...` in the template fits whatever is stored.

    Raises:
        TemplateMismatch: lists every difference with its path: shape, dtype, missing, extra, other node type.

    Examples:
        >>> check(0, [Leaf("", "tensor", "float32", (3,))], torch.empty(3, device="meta"))
        >>> check(0, [Leaf("", "tensor", "float32", (3,))], torch.zeros(4))
        Traceback (most recent call last):
        purestep.errors.TemplateMismatch: the snapshot does not have the structure of the template
          where:   the root: stored float32[3], template float32[4]
          instead: pass like= a tree of the stored structure, with ... in place of each subtree to take as it is stored
    """
    checker = _Checker(leaves)
    checker.node(structure, template, "")
    if checker.differences:
        lines = checker.differences[:_SHOWN]
        if len(checker.differences) > _SHOWN:
            lines.append(f"and {len(checker.differences) - _SHOWN} more")
        what = "the snapshot does not have the structure of the template"
        instead = "pass like= a tree of the stored structure, with ... in place of each subtree to take as it is stored"
        raise TemplateMismatch(explain(what, where="\n".join(lines), instead=instead))


class _Checker:
    def __init__(self, leaves: list[Leaf]) -> None:
        self.leaves = leaves
        self.differences: list[str] = []

    def differ(self, path: str, text: str) -> None:
        self.differences.append(f"{show(path)}: {text}")

    def node(self, stored: JSON, template: Any, path: str) -> None:
        if template is ...:
            self.buildable(stored, path)
            return
        node = None if isinstance(template, torch.Tensor) else children(template, path)
        if isinstance(stored, int) and node is None:
            self.leaf(self.leaves[stored], template, path)
        elif node is None or not _same_node(stored, node[0]):
            self.differ(path, f"stored {self.describe(stored)}, template {_describe_template(template)}")
        else:
            self.items(stored, dict(node[1]), path)

    def leaf(self, stored: Leaf, template: Any, path: str) -> None:
        kind = kind_of(template)
        wanted = f"a leaf of type {type(template).__qualname__}"
        if kind == "tensor":
            wanted = str(Leaf(path, kind, dtype_name(template.dtype), tuple(template.shape)))
        elif kind in ("array", "scalar"):
            wanted = str(Leaf(path, kind, template.dtype.str, template.shape))
        elif kind is not None:
            wanted = kind
        if stored.kind != kind or str(stored) != wanted or (kind == "array" and stored.dtype != template.dtype.str):
            self.differ(path, f"stored {stored}, template {wanted}")

    def items(self, stored: JSON, templates: dict[str, Any], path: str) -> None:
        if stored is None:
            return
        stored_items = dict(zip(stored_paths(stored, path), stored["items"], strict=True))
        for where, item in stored_items.items():
            if where in templates:
                self.node(item, templates[where], where)
            else:
                self.differ(where, f"stored {self.describe(item)}, missing in the template")
        for where, template in templates.items():
            if where not in stored_items:
                self.differ(where, f"not stored, template {_describe_template(template)}")

    def buildable(self, stored: JSON, path: str) -> None:
        if stored is None or isinstance(stored, int):
            return
        if stored["node"] in ("namedtuple", "defaultdict"):
            name = stored.get("class", stored["node"])
            self.differ(path, f"a {name} can be restored only into a template, because a snapshot holds no code")
        elif stored["node"] == "pytree":
            self.registered(stored, path)
        for where, item in zip(stored_paths(stored, path), stored["items"], strict=True):
            self.buildable(item, where)

    def registered(self, stored: JSON, path: str) -> None:
        name, fields = stored["class"], stored["fields"]
        cls = _class_of(name)
        if cls is None:
            module = name.rpartition(".")[0]
            self.differ(path, f"a {name}, which no imported module registers; import {module} first, or pass like=")
        elif (tuple(fields), tuple(stored["static"])) != tree.node_fields(cls):
            now = tree.node_fields(cls)
            self.differ(path, f"{name} was stored with fields {fields} and {list(stored['static'])}, and has {now} now")
        for field, value in stored["static"].items():
            if opaque := _opaque(value):
                self.differ(
                    f"{path}.{field}", f"a static {opaque}, which is no JSON; pass like= so that it comes from there"
                )

    def describe(self, stored: JSON) -> str:
        if isinstance(stored, int):
            return str(self.leaves[stored])
        return _describe_head(stored)


def stored_paths(stored: JSON, path: str) -> list[str]:
    """Return the path of each child of a stored node, as `purestep.tree.paths` prints it."""
    if "keys" in stored:
        return [f"{path}[{key!r}]" for key in stored["keys"]]
    if "fields" in stored:
        return [f"{path}.{field}" for field in stored["fields"]]
    return [f"{path}[{i}]" for i in range(len(stored["items"]))]


def _same_node(stored: JSON, head: JSON) -> bool:
    if not isinstance(stored, dict) or head is None:
        return stored is None and head is None
    # A class may have moved to another module (a script is `__main__` when run and a module when imported).
    last = [str(node.get("class", "")).rpartition(".")[2] for node in (stored, head)]
    return stored["node"] == head["node"] and last[0] == last[1]


def _describe_head(head: JSON) -> str:
    if head is None:
        return "None"
    return f"a {head['class']}" if "class" in head else f"a {head['node']}"


def _describe_template(template: Any) -> str:
    if template is ...:
        return "..."
    if isinstance(template, torch.Tensor) or kind_of(template) is not None:
        return tree.describe(template)
    node = children(template, "")
    return f"a {type(template).__qualname__}" if node is None else _describe_head(node[0])


def _class_of(name: str) -> type | None:
    """Return the registered class of a stored name. One of purestep is imported, if it is not yet, from where it is."""
    cls, package = tree.node_class(name), __name__.partition(".")[0]
    if cls is not None or not name.startswith(f"{package}."):
        return cls
    root = Path(sys.modules[package].__path__[0])
    defines = re.compile(rf"^class {re.escape(name.rpartition('.')[2])}\b", re.MULTILINE)
    for path in sorted(root.rglob("*.py")):
        if defines.search(path.read_text("utf-8")):
            importlib.import_module(".".join([package, *path.relative_to(root).with_suffix("").parts]))
    return tree.node_class(name)


def _opaque(value: JSON) -> str | None:
    if isinstance(value, dict):
        if "opaque" in value:
            return str(value["opaque"])
        items = list(value.get("tuple", value.get("dict", {}).values() if "dict" in value else []))
    else:
        items = value if isinstance(value, list) else []
    return next((name for item in items if (name := _opaque(item))), None)


def _static_value(value: JSON) -> Any:
    if isinstance(value, list):
        return [_static_value(v) for v in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_static_value(v) for v in value["tuple"])
        if "int" in value:
            return int(value["int"], 16)
        return {key: _static_value(v) for key, v in value["dict"].items()}
    return value


# --- building -------------------------------------------------------------------------------------------------------


def build(stored: JSON, template: Any, values: Values) -> Any:
    """Build the tree of a checked structure, with classes and static fields of the template."""
    if isinstance(stored, int):
        return values(stored, template)
    if stored is None:
        return None
    templates: dict[str, Any] = {} if template is ... else dict(children(template, "")[1])  # type: ignore[index]
    stored_items = dict(zip(stored_paths(stored, ""), stored["items"], strict=True))
    items = {where: build(item, templates.get(where, ...), values) for where, item in stored_items.items()}
    if "keys" in stored:
        keys = dict(zip(stored_items, stored["keys"], strict=True))
        # The order of keys comes from the template, like its classes and static fields.
        order = templates if templates else stored_items
        return _mapping(stored["node"], template, [(keys[where], items[where]) for where in order])
    return _sequence_or_record(stored, template, list(items.values()))


def device_of(template: Any) -> torch.device | None:
    """Return the device that a leaf of a template asks for, None for the CPU: fake and meta tensors mean it, too."""
    if not isinstance(template, torch.Tensor) or _torch.is_fake(template):
        return None
    return None if template.device.type in ("cpu", "meta") else template.device


def _mapping(node: str, template: Any, pairs: list[tuple[str | int, Any]]) -> Any:
    if node == "defaultdict":
        return defaultdict(template.default_factory, pairs)
    return OrderedDict(pairs) if node == "OrderedDict" else dict(pairs)


def _sequence_or_record(stored: JSON, template: Any, items: list[Any]) -> Any:
    node, has_template = stored["node"], template is not ...
    if node == "list":
        return items
    if node == "tuple":
        return tuple(items)
    # From here on `check` has seen to it that a class comes from the template, or is registered by an imported module.
    if node == "deque":
        return deque(items, maxlen=template.maxlen if has_template else stored["maxlen"])
    if node == "namedtuple" and is_namedtuple(type(template)):
        return type(template)._make(items)
    fields = dict(zip(stored["fields"], items, strict=True))
    if has_template:
        static = {name: getattr(template, name) for name in tree.node_fields(type(template))[1]}
        return tree.node_build(type(template), fields | static)
    static = {name: _static_value(value) for name, value in stored["static"].items()}
    cls: Any = _class_of(stored["class"])
    return tree.node_build(cls, fields | static)
