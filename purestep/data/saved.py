"""What is saved of a loader that is not ours: its own state, and the place in the data that this state is of.

Owns the form of that record, which lies in the cursor of a run. `foreign` makes it and follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

Place = tuple[int, int]
_OWN = {"state_dict", "get_state"}


@dataclasses.dataclass(frozen=True)
class Saved:
    """The state of a loader.

    Attributes:
        place: epoch and number of batches read of it; None in snapshots that are older than this field.
        stop: whether the epoch was over: "" no, or it was not asked for more; "ahead" it was, and the state is the one
            before the loader said so; "past" the state is the one after.
        then: where to go on to from there, by reading again; None: nowhere. It is for loaders whose state stands still.
        generators: first seeds of the loader's generators.
        state_dict: what `state_dict()` returned, packed; None where the loader has none.
        get_state: the same of the iterator's `get_state()`.
        start: what `hidden` found in the loader's parts, as it was when the epoch began.
        now: the same, at the place.
        changed: paths of what it found and could not capture.
    """

    place: Place | None = None
    stop: Literal["", "ahead", "past"] = ""
    then: Place | None = None
    generators: list[int] = dataclasses.field(default_factory=list)
    state_dict: Any = None
    get_state: Any = None
    start: dict[str, Any] = dataclasses.field(default_factory=dict)
    now: dict[str, Any] = dataclasses.field(default_factory=dict)
    changed: list[str] = dataclasses.field(default_factory=list)

    def replace(self, **changes: Any) -> Saved:
        return dataclasses.replace(self, **changes)

    @property
    def own(self) -> bool:
        """Whether the loader, or its iterator, has a state of its own."""
        return self.state_dict is not None or self.get_state is not None

    @property
    def unfit(self) -> str | None:
        """Why a state of torchdata's loader does not lead back inside of an epoch; None where it does, as all others.

        A worker that has read its share to the end begins it again. Where nothing has a state the loader reads up to
        the place itself, and counts these batches twice in the next state.
        """
        workers = (value for key, value in _items(self.state_dict) if key == "_worker_snapshots")
        of_workers = [state for found in workers for state in found.values()]
        for state in (self.state_dict, *of_workers):
            fetcher = state.get("fetcher_state") if isinstance(state, dict) else None
            if not isinstance(fetcher, dict) or "dataset_iter_state" not in fetcher:
                continue
            if fetcher["dataset_iter_state"] is None and state.get("dataset_state") is None:
                return "its data set keeps no state that could be saved"
            if fetcher.get("fetcher_ended") and state is not self.state_dict:
                return "one of its workers had ended, and would begin again"
        return None

    def packed(self) -> Any:
        """Return it as a pytree of plain values, or None where it says nothing."""
        if not (self.own or self.now or self.changed):
            return {"generators": list(self.generators)} if self.generators else None
        packed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (field.name in _OWN or value):
                packed[field.name] = list(value) if isinstance(value, tuple) else value
        return packed

    @classmethod
    def of(cls, packed: dict[str, Any]) -> Saved:
        """Undo `packed`."""
        fields = dict(packed)
        for name in {"place", "then"} & fields.keys():
            fields[name] = (int(fields[name][0]), int(fields[name][1]))
        return cls(**fields)


def fits(packed: Any, own: str, generators: int) -> bool:
    """Tell whether something is the record of a loader whose state is called `own` and that has so many generators."""
    other = _OWN - {own}
    return (
        isinstance(packed, dict)
        and set(packed) <= {field.name for field in dataclasses.fields(Saved)} - other
        and len(packed.get("generators", [])) == generators
        and packed.get("stop", "") in ("", "ahead", "past")
    )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from _items(item)
