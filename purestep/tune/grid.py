"""The combinations of settings of a sweep, and the directory of the run of each."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from purestep.errors import ConfigError, explain
from purestep.record.experiment import Experiment
from purestep.record.kinds import REQUIRED, kind_of, settings_of
from purestep.record.settings import encode


@dataclasses.dataclass(frozen=True)
class Member:
    """One combination of settings, and the directory of its run.

    Attributes:
        values: of the settings in which the runs of the sweep differ, as text.
        run_dir: of the run.
    """

    values: Mapping[str, str]
    run_dir: Path

    @property
    def name(self) -> str:
        """Of the run: its directory below the root."""
        return self.run_dir.name


def name_of(values: Mapping[str, str]) -> str:
    """Return the name of the directory of a run: the settings that differ.

    Examples:
        >>> name_of({"lr": "1e-3", "optimizer": "lion(1e-4)"})
        'lr=1e-3,optimizer=lion(1e-4)'
    """
    text = ",".join(f"{name}={value}" for name, value in values.items())
    return re.sub(r"[^\w.,=()+-]+", "_", text)[:200] or "run"


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Return each combination of values, and the names of the settings in which they differ.

    Examples:
        >>> [values for values, _ in combinations({"lr": [0.1, 0.2], "seed": [0]})]
        [{'lr': 0.1, 'seed': 0}, {'lr': 0.2, 'seed': 0}]
    """
    several = tuple(name for name, values in axes.items() if len(values) > 1) or tuple(axes)
    return [(dict(zip(axes, chosen, strict=True)), several) for chosen in itertools.product(*axes.values())]


def nested(maker: Callable[..., Experiment], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name as JSON, nested."""
    known = {setting.name: setting for setting in settings_of(maker)}
    found: dict[str, Any] = {}
    for path, value in values.items():
        first, *rest = path.split(".")
        kind = known[first].kind if first in known else kind_of(Any)
        if not rest:
            found[first] = encode(value, kind, first)
            continue
        if first not in found and first in known and known[first].default is not REQUIRED:
            found[first] = copy.deepcopy(encode(known[first].default, kind, first))
        place = found.setdefault(first, {})
        for name in rest[:-1]:
            place = place.setdefault(name, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(explain(f"the setting {path} is inside of one that has no fields", where=f"{first}"))
        place[rest[-1]] = encode(value, kind_of(Any), path)
    return found


def value_of(plain: Mapping[str, Any], path: str) -> Any:
    """Return a setting by its dotted name."""
    value: Any = plain
    for name in path.split("."):
        value = value[name]
    return value
