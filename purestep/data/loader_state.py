"""The saved state of a third-party loader: the loader's own state, and the position in the data where it was taken.

Owns the form of that record, which is in the cursor of a run. `adapters` makes and restores it. Its field names are in
snapshots on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, TypeGuard

from purestep.data.plain_state import Packed

Position = tuple[int, int]
_LOADER_STATES = {"state_dict", "get_state"}


@dataclasses.dataclass(frozen=True)
class Saved:
    """The state of a loader.

    Attributes:
        place: position: epoch, and number of its batches read; None in snapshots older than this field.
        stop: whether the epoch had ended: "" no, or no batch after the last was asked for; "ahead" yes, and the state
            was taken before the loader raised StopIteration; "past" yes, and the state was taken after it.
        then: position to read on to after the state is restored, None for none: for loaders whose state does not change
            from batch to batch.
        generators: initial seeds of the loader's generators.
        state_dict: what `state_dict()` returned, packed; None where the loader has none.
        get_state: what the iterator's `get_state()` returned, packed.
        start: the states that `hidden_state` found in the loader's components, at the start of the epoch; by path.
        now: the same, at the position.
        changed: paths of the states that `hidden_state` found and could not capture.
    """

    place: Position | None = None
    stop: Literal["", "ahead", "past"] = ""
    then: Position | None = None
    generators: list[int] = dataclasses.field(default_factory=list)
    state_dict: Any = None
    get_state: Any = None
    start: dict[str, Any] = dataclasses.field(default_factory=dict)
    now: dict[str, Any] = dataclasses.field(default_factory=dict)
    changed: list[str] = dataclasses.field(default_factory=list)

    def replace(self, **changes: Any) -> Saved:
        return dataclasses.replace(self, **changes)

    @property
    def has_loader_state(self) -> bool:
        """Whether the loader, or its iterator, saves its own state."""
        return self.state_dict is not None or self.get_state is not None

    @property
    def unfit(self) -> str | None:
        """Why a state of torchdata's loader cannot be restored inside of an epoch; None if it can.

        A worker that has read its shard to the end would begin it again. If no component has a state, the loader itself
        reads up to the position, and counts these batches twice in its next state.
        """
        snapshots = (value for key, value in _items(self.state_dict) if key == "_worker_snapshots")
        worker_states = [state for snapshot in snapshots for state in snapshot.values()]
        for state in (self.state_dict, *worker_states):
            fetcher = state.get("fetcher_state") if isinstance(state, dict) else None
            if not isinstance(fetcher, dict) or "dataset_iter_state" not in fetcher:
                continue
            if fetcher["dataset_iter_state"] is None and state.get("dataset_state") is None:
                return "its data set keeps no state that could be saved"
            if fetcher.get("fetcher_ended") and state is not self.state_dict:
                return "one of its workers had ended, and would begin again"
        return None

    def packed(self) -> dict[str, Packed] | None:
        """Return it as a pytree of plain values, or None where there is nothing to save."""
        if not (self.has_loader_state or self.now or self.changed):
            return {"generators": list(self.generators)} if self.generators else None
        packed: dict[str, Packed] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # The state of a loader may be empty, and says even so that there is one; other empty fields are defaults.
            if value is not None and (field.name in _LOADER_STATES or value):
                packed[field.name] = list(value) if isinstance(value, tuple) else value
        return packed

    @classmethod
    def of(cls, packed: dict[str, Any]) -> Saved:
        """Undo `packed`."""
        fields = dict(packed)
        for name in {"place", "then"} & fields.keys():
            fields[name] = (int(fields[name][0]), int(fields[name][1]))
        return cls(**fields)


def fits(packed: object, method: str, generators: int) -> TypeGuard[dict[str, Any]]:
    """Tell whether a value is the record of a loader that saves its state by `method`, with so many generators."""
    other_methods = _LOADER_STATES - {method}
    return (
        isinstance(packed, dict)
        and set(packed) <= {field.name for field in dataclasses.fields(Saved)} - other_methods
        and len(packed.get("generators", [])) == generators
        and packed.get("stop", "") in ("", "ahead", "past")
    )


def _items(value: object) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from _items(item)
