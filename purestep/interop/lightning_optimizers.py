"""`configure_optimizers` of a LightningModule as a gradient transformation: `ps.optim.lift` with tabulated schedulers.

The settings of the module's optimizer are read; it never steps over real gradients. Its schedulers run once over the
length of the training, as in Lightning, and their values become tables.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import optim
from purestep.errors import ConfigError, OptimError, explain
from purestep.optim.base import GradientTransformation, wide
from purestep.optim.masks import partition, set_to_zero
from purestep.optim.schedules.base import schedule
from purestep.optim.schedules.torch_lr import TableSchedule

_SCHEDULER_KEYS = {"scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau"}


@schedule
class ExactTable(TableSchedule):
    """A table in float64, the precision of torch schedulers: a lifted optimizer reads it on the host."""

    def __call__(self, step: Any) -> Any:
        return self.at(wide(step)) if isinstance(step, Tensor) else super().__call__(step)


class Length:
    """Replaces `self.trainer` in `configure_optimizers`: its only attributes describe the length of the training."""

    def __init__(self, epochs: int | None, steps_per_epoch: int | None) -> None:
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch

    def __getattr__(self, name: str) -> Any:
        if name == "max_epochs":
            return self._need("epochs", name)
        if name == "num_training_batches":
            return self._need("steps_per_epoch", name)
        if name in ("estimated_stepping_batches", "max_steps"):
            return self._need("epochs", name) * self._need("steps_per_epoch", name)
        raise ConfigError(
            explain(
                f"configure_optimizers reads self.trainer.{name}",
                why="there is no trainer; the length of the training is known by max_epochs, max_steps, "
                "num_training_batches and estimated_stepping_batches",
                instead="ps.from_lightning(module, tx=tx)   # with a transformation of yours",
            )
        )

    def _need(self, argument: str, name: str) -> int:
        value: int | None = self.__dict__[argument]
        if value is None:
            raise ConfigError(
                explain(
                    f"configure_optimizers needs to know {argument}",
                    where=f"self.trainer.{name}" if name else "a scheduler",
                    instead="ps.from_lightning(module, epochs=10, steps_per_epoch=len(train))",
                )
            )
        return value


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A torch scheduler, and when Lightning steps it."""

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1


def transformation(module: Any, length: Length) -> GradientTransformation:
    """Return the optimizers of `configure_optimizers` as a transformation of the named parameters.

    Args:
        module: a copy of the user's module, whose `configure_optimizers` is called.
        length: length of the training.

    Raises:
        ConfigError: none or several optimizers, or a scheduler that reads a metric.
        OptimError: an optimizer that cannot be lifted.
    """
    module.trainer = length
    try:
        made = module.configure_optimizers()
    finally:
        module.trainer = None
    optimizer, schedulers = _read(type(module).__qualname__, made)
    names = {id(p): name for name, p in module.named_parameters()}
    tables = _tables(optimizer, schedulers, length)
    groups: dict[str, GradientTransformation] = {}
    members: dict[str, str] = {}
    for index, (group, values) in enumerate(zip(optimizer.param_groups, tables, strict=True)):
        strangers = [p for p in group["params"] if id(p) not in names]
        if strangers:
            raise ConfigError(
                explain(
                    "the optimizer has parameters that the module has not",
                    where=f"group {index}: {len(strangers)} tensors",
                    instead="torch.optim.Adam(self.parameters())",
                )
            )
        groups[f"group{index}"] = _lifted(optimizer, values)
        members |= {names[id(p)]: f"group{index}" for p in group["params"]}
    left = [name for name, p in module.named_parameters() if name not in members and p.requires_grad]
    if len(groups) == 1 and not left:
        return groups["group0"]
    if left:
        groups["rest"] = set_to_zero()  # parameters that the optimizer was not given do not change
    return partition(groups, _Labels(tuple(members.items())))


@dataclasses.dataclass(frozen=True)
class _Labels:
    """The group of each parameter, by name."""

    members: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)

    def __call__(self, name: str) -> str:
        return dict(self.members).get(name, "rest")


# --- reading what configure_optimizers returns ------------------------------------------------------------------------


def _read(owner: str, made: Any) -> tuple[torch.optim.Optimizer, list[Scheduled]]:
    """Return the optimizer and its schedulers, in any of the forms that Lightning documents."""
    schedulers: list[Any] = []
    if isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], list):
        made, schedulers = made[0], made[1] if isinstance(made[1], list) else [made[1]]
    if isinstance(made, (tuple, list)) and len(made) == 1:
        made = made[0]
    if isinstance(made, Mapping):
        schedulers = [made["lr_scheduler"]] if made.get("lr_scheduler") is not None else schedulers
        made = made.get("optimizer")
    if not isinstance(made, torch.optim.Optimizer):
        many = isinstance(made, (tuple, list)) and len(made) > 1
        raise ConfigError(
            explain(
                f"configure_optimizers returns {len(made)} optimizers" if many else "configure_optimizers returns none",
                where=owner,
                why="several are stepped by hand in Lightning, too" if many else None,
                instead="one state and one ps.make_step for each" if many else "ps.from_lightning(module, tx=tx)",
            )
        )
    return made, [_scheduled(owner, given) for given in schedulers]


def _scheduled(owner: str, given: Any) -> Scheduled:
    settings = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    scheduler = settings.get("scheduler")
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or settings.get("reduce_on_plateau")
    if plateau or not callable(getattr(scheduler, "step", None)) or set(settings) - _SCHEDULER_KEYS:
        raise ConfigError(
            explain(
                "configure_optimizers returns a scheduler that reads a metric"
                if plateau
                else "configure_optimizers returns a scheduler that is none",
                where=f"{owner}: {type(scheduler).__name__}, {', '.join(settings)}",
                why="a learning rate is a function of the number of updates, or part of the optimizer state"
                if plateau
                else None,
                instead="ps.from_lightning(module, tx=ps.optim.chain(ps.optim.adam(1e-3), "
                "ps.optim.reduce_on_plateau(0.1, patience=10)))   # by the training loss"
                if plateau
                else '{"scheduler": scheduler, "interval": "step", "frequency": 1}',
            )
        )
    return Scheduled(scheduler, settings.get("interval", "epoch"), settings.get("frequency", 1))


# --- tables of schedulers ---------------------------------------------------------------------------------------------


def _tables(optimizer: torch.optim.Optimizer, schedulers: Sequence[Scheduled], length: Length) -> list[dict[str, Any]]:
    """Return the options of each group: a number, or a table for an option that a scheduler changes."""
    taken = set(inspect.signature(type(optimizer)).parameters)
    rows: list[list[dict[str, Any]]] = [[] for _ in optimizer.param_groups]

    def note() -> None:
        for row, group in zip(rows, optimizer.param_groups, strict=True):
            row.append({k: _plain(v) for k, v in group.items() if k != "params" and k in taken})

    if not schedulers:
        note()
        return [row[0] for row in rows]
    per_epoch, total = (
        length._need("steps_per_epoch", ""),
        length._need("epochs", "") * length._need("steps_per_epoch", ""),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers warn that the optimizer takes no steps
        for step in range(total):
            note()
            batch, last = step % per_epoch, (step + 1) % per_epoch == 0
            for s in schedulers:
                # As in Lightning: with interval "step", the frequency counts batches within the epoch.
                due = batch + 1 if s.interval == "step" else (step // per_epoch + 1) if last else None
                if due is not None and due % s.frequency == 0:
                    _advance(s.scheduler, total)
    source = " and ".join(type(s.scheduler).__name__ for s in schedulers)
    return [{key: _column([row[key] for row in group], source) for key in group[0]} for group in rows]


def _advance(scheduler: Any, total: int) -> None:
    try:
        scheduler.step()
    except ValueError as error:
        if "total steps" not in str(error):  # OneCycleLR raises this at its end; its last value stays
            raise OptimError(
                explain(f"the scheduler {type(scheduler).__name__} cannot be run for {total} steps", why=str(error))
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _column(values: list[Any], source: str) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    if isinstance(values[0], tuple):
        return tuple(_column(list(column), source) for column in zip(*values, strict=True))
    return ExactTable(tuple(map(float, values)), f"{source}, {len(values)} steps")


def _lifted(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> GradientTransformation:
    arguments = dict(options)
    rate = arguments.pop("lr", None)
    return optim.lift(type(optimizer), rate, **arguments)
