"""`from_lightning`: converts a LightningModule to the arguments of `fit`.

Owns `FromLightning` and the conversion. Nothing here imports Lightning: the user's module has imported it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import nn

from purestep.arguments import Count, Name, Seed, Whole, checked
from purestep.callbacks.evaluate import EvaluateCallback, evaluate
from purestep.errors import ConfigError, explain
from purestep.interop import lightning_hooks
from purestep.interop.lightning_optimizers import Length, transformation
from purestep.interop.lightning_steps import EvaluationStep, LightningStep, TrainingStep, converted_metrics, renamed
from purestep.loop.cadence import Every, every
from purestep.optim.base import GradientTransformation
from purestep.state import TrainState, init
from purestep.step import Step, make_eval, make_step
from purestep.step_protocol import wrap_step
from purestep.views import Block, Printed, Table, written

Part = Literal["validation", "test"]


@dataclasses.dataclass(frozen=True, repr=False)
class FromLightning(Printed):
    """The parts of a LightningModule. Made by `from_lightning`.

    Attributes:
        module: a copy of the module. For a state with other options: `ps.init(lit.module, lit.tx, plan=plan)`.
        loss_fn: its `training_step`. For a step with other options:
            `ps.make_step(lit.loss_fn, lit.tx, microbatches=4, policy="bf16")`.
        tx: its optimizer and schedulers.
        seed: seed of `state`.
        settings: the hyperparameters of `save_hyperparameters` that are JSON, for `fit(..., settings=lit.settings)`.
    """

    module: Any
    loss_fn: Callable[..., Any]
    tx: GradientTransformation
    seed: int
    settings: dict[str, Any]
    base: type[nn.Module]

    def view(self) -> list[Block]:
        """Return the blocks that show it: the parts by name, and the settings."""
        has = [part for part in get_args(Part) if lightning_hooks.overridden(self.module, f"{part}_step", self.base)]
        calls = [f"lit.evaluate(data{'' if part == 'validation' else f', part={part!r}'})" for part in has]
        rows = [
            ["lit.module", f"{sum(p.numel() for p in self.module.parameters()):,} parameters"],
            ["lit.loss_fn", "training_step"],
            ["lit.tx", str(self.tx)],
            ["lit.state, lit.step", f"of seed {self.seed}"],
            *([call, f"{part}_step"] for call, part in zip(calls, has, strict=True)),
            *([f"setting {name}", written(value)] for name, value in self.settings.items()),
        ]
        return [Table(["LightningModule", type(self.module).__qualname__], rows, wide=True)]

    @functools.cached_property
    def state(self) -> TrainState:
        """The initial state, with the weights of the module."""
        return init(self.module, self.tx, seed=self.seed)

    @functools.cached_property
    def step(self) -> Step:
        """The step: loss, gradients, update."""
        return make_step(self.loss_fn, self.tx)

    @checked(ConfigError)
    def evaluate(
        self,
        data: object,
        *,
        part: Part = "validation",
        name: Name | None = None,
        dataloader_idx: Whole = 0,
        every: Every = every.epoch(),  # noqa: B008
        at_start: bool = False,
    ) -> EvaluateCallback:
        """Return the callback that runs `validation_step` over a held-out set, as `ps.callbacks.evaluate` does.

        `self.log("val_loss", ...)` becomes the metric `val/val_loss`. A returned loss becomes `val/loss`.

        Args:
            data: data as for `fit`.
            part: "validation" or "test": the step to run.
            name: name of the callback, and prefix of its metrics; "val" or "test" by default. Each set needs its own.
            dataloader_idx: value of the step's argument of that name, if it has one.
            every: when the callback runs.
            at_start: whether it also runs before the first step.

        Raises:
            ConfigError: the module has no such step.
        """
        method = f"{part}_step"
        if not lightning_hooks.overridden(self.module, method, self.base):
            raise ConfigError(explain(f"the module has no {method}", where=type(self.module).__qualname__))
        loss_fn = _step(EvaluationStep, self.module, method, self.base, dataloader_idx)
        step = wrap_step(make_eval(loss_fn), renamed)
        return evaluate(step, data, every=every, at_start=at_start, name=name or {"validation": "val"}.get(part, part))


def _step(kind: type[LightningStep], module: Any, method: str, base: type[nn.Module], dataloader_idx: int = 0) -> Any:
    transfer = lightning_hooks.overridden(module, "on_after_batch_transfer", base)
    return kind(getattr(type(module), method), base, dataloader_idx, transfer, converted_metrics(module))


@checked(ConfigError)
def from_lightning(
    module: nn.Module,
    *,
    epochs: Count | None = None,
    steps_per_epoch: Count | None = None,
    tx: GradientTransformation | None = None,
    without: Sequence[Name] = (),
    seed: Seed = 0,
) -> FromLightning:
    """Convert a LightningModule to the arguments of `fit`: state, step, transformation, evaluations.

    `training_step` becomes the loss function, `self.log` its metrics, `validation_step` and `test_step` evaluations,
    `configure_optimizers` the transformation: `ps.optim.lift` of the torch optimizer, with schedulers tabulated as
    Lightning would step them. A step that draws no random numbers has the losses of `Trainer.fit` on the same batches;
    dropout draws from the key of the state instead of the global generator. The step calls `on_after_batch_transfer`.

    Args:
        module: a module of `lightning` or `pytorch_lightning`. It is copied and not changed.
        epochs, steps_per_epoch: the length of the training. Needed if schedulers, or `self.trainer.max_epochs`,
            `.estimated_stepping_batches` and the like in `configure_optimizers`, depend on it.
        tx: a transformation in place of `configure_optimizers`. One of `ps.optim` can be jitted and split over ranks;
            a lifted one runs eagerly.
        without: overridden hooks to leave out. Any other overridden hook that a step does not call is an error.
        seed: seed of the state.

    Raises:
        ConfigError: no LightningModule, manual optimization, several optimizers, ReduceLROnPlateau, or hooks that would
            be lost.
        StepError: while training: the step reads `self.trainer` or `batch_idx`.

    Examples:
        `lit = ps.from_lightning(LitModel())`, then
        `ps.fit(lit.step, lit.state, train, until=ps.epochs(5), callbacks=[lit.evaluate(val)])`.

    Reference: Lightning 2.6, `LightningModule`.
    """
    base = lightning_hooks.check_kind(module)
    lightning_hooks.check(module, base, tuple(without))
    copied = copy.deepcopy(module)
    if tx is None:
        tx = transformation(copy.deepcopy(module), Length(epochs, steps_per_epoch))
    loss_fn = _step(TrainingStep, copied, "training_step", base)
    return FromLightning(copied, loss_fn, tx, seed, _settings(copied), base)


def _settings(module: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in dict(module.hparams).items():
        try:
            plain[str(name)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            plain[str(name)] = repr(value)
    return plain
