"""What is saved of a loader that is not ours: its own state, and the place in the data that this state is of.

Owns the form of that record, which lies in the cursor of a run. `foreign` makes it and follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

_FIELDS = {"generators", "place", "stop", "then"}


@dataclasses.dataclass(frozen=True)
class Saved:
    """The state of a loader.

    Attributes:
        place: epoch and number of batches read of it; None in snapshots that are older than this field.
        stop: whether the epoch was over: "" no, or nobody has asked; "ahead" it was, and the state is the one before
            the loader said so; "past" the state is the one after.
        then: where to go on to from there, by reading again; None: nowhere. It is for loaders whose state stands still.
        generators: first seeds of the loader's generators.
        state_dict: what `state_dict()` returned, packed; None where the loader has none.
        get_state: the same of the iterator's `get_state()`.
    """

    place: tuple[int, int] | None = None
    stop: Literal["", "ahead", "past"] = ""
    then: tuple[int, int] | None = None
    generators: list[int] = dataclasses.field(default_factory=list)
    state_dict: Any = None
    get_state: Any = None

    def replace(self, **changes: Any) -> Saved:
        return dataclasses.replace(self, **changes)

    @property
    def own(self) -> bool:
        """Whether the loader, or its iterator, has a state of its own."""
        return self.state_dict is not None or self.get_state is not None

    @property
    def worker_ended(self) -> bool:
        """Whether a worker of a loader with workers has read its share to the end while others go on.

        Such a loader (torchdata's) begins that share again when it is restored.
        """
        workers = [value for key, value in _items(self.state_dict) if key == "_worker_snapshots"]
        return any(value is True for w in workers for key, value in _items(w) if key == "fetcher_ended")

    def packed(self) -> Any:
        """Return it as a pytree of plain values, or None where it says nothing."""
        packed: dict[str, Any] = {"generators": list(self.generators)} if self.generators else {}
        if self.own:
            packed["place"] = None if self.place is None else list(self.place)
            packed["stop"] = self.stop
            packed["then"] = None if self.then is None else list(self.then)
            name = "get_state" if self.state_dict is None else "state_dict"
            packed[name] = getattr(self, name)
        return packed or None

    @classmethod
    def of(cls, packed: dict[str, Any]) -> Saved:
        """Undo `packed`."""
        fields = dict(packed)
        places = {name: _place(fields.pop(name, None)) for name in ("place", "then")}
        bases = [int(base) for base in fields.pop("generators", [])]
        return cls(**places, generators=bases, **fields)


def fits(packed: Any, own: str, generators: int) -> bool:
    """Tell whether something is the record of a loader whose state is called `own` and that has so many generators."""
    return (
        isinstance(packed, dict)
        and set(packed) <= {*_FIELDS, own}
        and len(packed.get("generators", [])) == generators
        and packed.get("stop", "") in ("", "ahead", "past")
    )


def _place(pair: Any) -> tuple[int, int] | None:
    return None if pair is None else (int(pair[0]), int(pair[1]))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from _items(item)
