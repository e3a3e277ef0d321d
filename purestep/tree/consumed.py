"""What becomes of a node whose tensors were donated: it can be printed, and any other use is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree

from purestep import _cells
from purestep._torch import pytree as torch_pytree
from purestep.errors import DonatedStateError, explain
from purestep.tree.nodes import NAMESPACE


class Consumed:
    """What a node becomes when its tensors were donated: it prints; any other use raises DonatedStateError."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Consumed
        raise DonatedStateError(_consumed_message(self, f".{name}"))

    def __repr__(self) -> str:
        values = object.__getattribute__(self, "__dict__")
        return f"<{values['was']}, consumed by {_consumer(values)}>"


def _consumed_message(node: object, use: str) -> str:
    values = object.__getattribute__(node, "__dict__")
    return explain(
        f"this {values['was']} was consumed by {_consumer(values)}",
        where=f"{values['was']}{use}" + ("" if values["place"] is None else f"; donated {values['place'].told()}"),
        why="a donating step writes the new state over the memory of the one it was given",
        instead="state, metrics = step(state, batch)   # go on with the state that was returned\n"
        "or the same step without donation, which keeps the old state and needs its memory",
    )


def _consumer(values: Mapping[str, Any]) -> str:
    """Name the step, and the cell: a notebook has its cells in view."""
    place: _cells.Place | None = values["place"]
    return f"{values['by']}{'' if place is None or not place.cell else f' in cell {place.cell}'}"


def consume(node: object, by: str, place: _cells.Place | None = None) -> None:
    """Make a `pytree` node unusable, because its tensors now belong to another; `by` names who took them, and where."""
    values = node.__dict__
    was = type(node).__name__
    values.clear()
    values.update(was=was, by=by, place=place)
    object.__setattr__(node, "__class__", Consumed)


def _flatten_consumed(node: Any, *rest: Any) -> Any:
    raise DonatedStateError(_consumed_message(node, ""))


optree.register_pytree_node(Consumed, _flatten_consumed, _flatten_consumed, namespace=NAMESPACE)
torch_pytree.register_pytree_node(
    Consumed, _flatten_consumed, _flatten_consumed, serialized_type_name="purestep.tree.Consumed"
)
