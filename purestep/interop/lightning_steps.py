"""`training_step` and `validation_step` of a LightningModule as pure loss functions; `self.log` becomes their metrics.

For the length of a call the module has a `log` that records, and a trainer that refuses: Lightning itself would return
0 for `self.current_epoch` where there is no trainer, and drop what is logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from purestep import metrics
from purestep._torch import children_of
from purestep.errors import MetricError, StepError, explain
from purestep.metrics import Metric
from purestep.metrics.converted import theirs
from purestep.step_protocol import StepFn

_MEANS = ("mean", "avg", torch.mean)
_EXTREMES: dict[Any, Callable[[Any], Metric]] = {
    **dict.fromkeys(("sum", torch.sum, sum), metrics.Sum),
    **dict.fromkeys(("min", torch.min, min), metrics.Min),
    **dict.fromkeys(("max", torch.max, max), metrics.Max),
}


class NoTrainer:
    """Stands for `self.trainer` while a step runs: whatever is read of it is an error that says so."""

    def __getattr__(self, name: str) -> Any:
        raise StepError(
            explain(
                f"the step reads self.trainer.{name}, and a pure step has no trainer",
                why="self.current_epoch, self.global_step, self.logger, self.optimizers(), self.print and "
                "self.all_gather read it, too; the result of a pure step depends on state and batch alone",
                instead="a hyperparameter that changes: a schedule in lit.tx, or a field of the state\n"
                "an image or a histogram: ps.callbacks.tap(function, every=...)\n"
                "a number: self.log, which is a metric",
            )
        )


class NoIndex:
    """Stands for `batch_idx`: it may be handed on, but whatever is done with it is an error that says so."""

    def __repr__(self) -> str:
        return "batch_idx"


def _refused(self: NoIndex, *args: object) -> Any:
    raise StepError(
        explain(
            "the step uses batch_idx, which a pure step does not know",
            why="its result depends on state and batch alone: the same batch at another place gives the same",
            instead="every n-th batch: a callback, ps.callbacks.tap(function, every=ps.every.steps(n))\n"
            "or put the number into the batch",
        )
    )


for _operation in (
    "index int float bool str format eq ne lt le gt ge add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv "
    "mod rmod pow rpow divmod neg abs and or xor"
).split():
    setattr(NoIndex, f"__{_operation}__", _refused)


class PureMetric:
    """Stands for a metric of torchmetrics in a module while a step runs: what it is called with becomes a value that
    merges.

    Args:
        name: its path in the module.
        convert: what `ps.metrics.from_torchmetrics` made of it.
    """

    def __init__(self, name: str, convert: Callable[..., Metric]) -> None:
        self._name, self._convert = name, convert
        self.value: Metric | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the value of this call, as a metric: to be logged, exact over the batches."""
        new = self._convert(*args, **kwargs)
        self.value = new if self.value is None else self.value.merge(new)
        return new

    forward = update = __call__

    def compute(self) -> Any:
        """Return the value of this batch, as a metric."""
        return self.logged()

    def reset(self) -> None:
        """Nothing is remembered from one batch to the next."""

    def logged(self) -> Metric:
        """Return what `self.log` of it logs."""
        if self.value is None:
            raise MetricError(
                explain(
                    f"self.{self._name} is logged, and was not called in this step",
                    instead=f"self.{self._name}(preds, target)   # before self.log",
                )
            )
        return self.value

    def __getattr__(self, name: str) -> Any:
        raise StepError(
            explain(
                f"the step reads self.{self._name}.{name}",
                why="a metric of torchmetrics is a pure value here, which has no states of its own",
                instead=f"self.{self._name}(preds, target), and self.log('name', self.{self._name})",
            )
        )


class PureCollection:
    """Stands for a `MetricCollection`: its metrics by name."""

    def __init__(self, metrics_by_name: dict[str, PureMetric]) -> None:
        self._metrics = metrics_by_name
        self.items, self.keys, self.values = metrics_by_name.items, metrics_by_name.keys, metrics_by_name.values

    def __getitem__(self, name: str) -> PureMetric:
        return self._metrics[name]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Metric]:
        """Return the values of this call, as metrics: for `self.log_dict`."""
        return {name: metric(*args, **kwargs) for name, metric in self.items()}

    forward = update = __call__

    def compute(self) -> dict[str, Metric]:
        """Return the values of this batch, as metrics."""
        return {name: metric.compute() for name, metric in self.items()}

    def reset(self) -> None:
        """Nothing is remembered from one batch to the next."""


# By path in the module: the converted metric, or those of a collection by name.
Converted = tuple[tuple[str, Any], ...]


def converted_metrics(module: nn.Module) -> Converted:
    """Convert the metrics of torchmetrics in a module, the outermost of nested ones.

    Raises:
        MetricError: one has no value that can be merged over batches.
    """
    found: dict[str, Any] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        kind = theirs(part)
        if kind is None or any(path.startswith(f"{outer}.") for outer in found):
            continue
        collection: Any = part
        found[path] = (
            metrics.from_torchmetrics(part)
            if kind == "Metric"
            else {name: metrics.from_torchmetrics(metric) for name, metric in collection.items(copy_state=False)}
        )
    return tuple(found.items())


@contextlib.contextmanager
def _pure_metrics(net: nn.Module, converted: Converted) -> Iterator[None]:
    """Put pure metrics in the places of those of torchmetrics."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, convert in converted:
            owner, _, name = path.rpartition(".")
            children: dict[str, Any] = children_of(net.get_submodule(owner))
            replaced.append((children, name, children[name]))
            children[name] = (
                PureCollection({key: PureMetric(path, made) for key, made in convert.items()})
                if isinstance(convert, dict)
                else PureMetric(path, convert)
            )
        yield
    finally:
        for children, name, module in reversed(replaced):
            children[name] = module


class Recorder:
    """What takes the place of `self.log`: the metrics of one batch by name."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.metrics: dict[str, Metric] = {}
        self.values: dict[str, object] = {}

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Note a value. Step and epoch rows, all ranks and every loader come from how metrics merge here, so the
        arguments about them have nothing to decide."""
        metric = self._metric(name, value, reduce_fx, self.samples if batch_size is None else batch_size)
        if name in self.metrics:
            # Logged twice in one batch, it counts twice, as it does with Lightning.
            metric = self.metrics[name].merge(metric)
        self.metrics[name], self.values[name] = metric, value

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Note several values."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def _metric(self, name: str, value: Any, reduce_fx: Any, weight: int) -> Metric:
        if isinstance(value, PureMetric):
            return value.logged()
        if isinstance(value, nn.Module):
            raise MetricError(
                explain(
                    f"self.log({name!r}, ...) was given a {type(value).__name__}, which remembers batches in itself",
                    why="what is in an attribute is in no state: it is not saved, merged over ranks or resumed",
                    instead=f"self.log({name!r}, a metric that merges): ps.metrics.accuracy(logits, labels), "
                    "ps.metrics.confusion, or a pytree of yours with merge and compute",
                )
            )
        if not isinstance(value, (Tensor, int, float)):
            if isinstance(value, Metric):
                return metrics.as_metrics({name: value}, self.samples)[name]
            raise MetricError(explain(f"self.log({name!r}, ...) takes a number", where=f"a {type(value).__name__}"))
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise MetricError(
                    explain(f"self.log({name!r}, ...) takes one number", where=f"a tensor of {list(value.shape)}")
                )
            value = value.detach().reshape(())
        if reduce_fx in _MEANS:
            return metrics.mean(value, weight)
        if reduce_fx in _EXTREMES:
            return _EXTREMES[reduce_fx](value if isinstance(value, Tensor) else torch.tensor(value))
        raise MetricError(
            explain(
                f"self.log({name!r}, reduce_fx=...) is 'mean', 'sum', 'min' or 'max'",
                where=f"reduce_fx={reduce_fx!r}",
                instead="log a metric of yours: a pytree with merge and compute",
            )
        )


@contextlib.contextmanager
def recording(net: nn.Module, samples: int, base: type[nn.Module], converted: Converted = ()) -> Iterator[Recorder]:
    """Give a module, and the LightningModules in it, a `log` that records, a trainer that refuses, and pure metrics."""
    recorder, trainer = Recorder(samples), NoTrainer()
    inner: list[Any] = [m for m in net.modules() if isinstance(m, base)]
    for module in inner:
        module.trainer = trainer
        module.log, module.log_dict = recorder.log, recorder.log_dict
    try:
        with _pure_metrics(net, converted):
            yield recorder
    finally:
        for module in inner:
            module.trainer = None
            del module.log, module.log_dict


@dataclasses.dataclass(frozen=True)
class LightningStep:
    """A method of a LightningModule as a loss function `(net, batch) -> (loss, metrics)`.

    Attributes:
        function: the method, as its class defines it.
        base: the class `LightningModule`.
        dataloader_idx: what an evaluation step with that argument is called with.
        transfer: whether the module has `on_after_batch_transfer`, which is called first.
        converted: its metrics of torchmetrics.
    """

    function: Callable[..., Any]
    base: type[nn.Module] = dataclasses.field(repr=False)
    dataloader_idx: int = 0
    transfer: bool = False
    converted: Converted = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def identity(self) -> dict[str, object]:
        """Return what a snapshot of a run records of it."""
        return {"function": self.function, "dataloader_idx": self.dataloader_idx, "transfer": self.transfer}

    def called(self, net: Any, batch: Any) -> tuple[Any, Recorder]:
        """Return what the method returns, and what it logged."""
        with recording(net, metrics.sample_count(batch), self.base, self.converted) as recorder:
            if self.transfer:
                batch = net.on_after_batch_transfer(batch, self.dataloader_idx)
            return self.function(net, *self._arguments(batch)), recorder

    def _arguments(self, batch: Any) -> tuple[Any, ...]:
        taken = list(inspect.signature(self.function).parameters.values())[1:]
        several = any(p.kind is p.VAR_POSITIONAL for p in taken)
        available = (batch, NoIndex(), self.dataloader_idx)
        return available if several else available[: len([p for p in taken if p.kind is not p.VAR_KEYWORD])]


class TrainingStep(LightningStep):
    """`training_step` as a loss function."""

    def __call__(self, net: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        out, recorder = self.called(net, batch)
        loss = out.get("loss") if isinstance(out, dict) else out
        if not isinstance(loss, Tensor):
            raise StepError(
                explain(
                    "training_step returns a loss, or a dict with 'loss'",
                    where=f"{self.function.__qualname__} returned {type(out).__name__}",
                    why="a batch that Lightning skips is an update of its own here: the counter counts it"
                    if out is None
                    else None,
                    instead="return loss * 0.0   # a batch that is to change nothing but momentum"
                    if out is None
                    else "return loss",
                )
            )
        named = dict(recorder.metrics)
        if "loss" in named and recorder.values["loss"] is loss:
            del named["loss"]  # it is logged anyway
        elif "loss" in named:
            named["logged_loss"] = named.pop("loss")
        return loss, named


class EvaluationStep(LightningStep):
    """`validation_step` or `test_step` as a loss function; what it returns counts as `loss` if it is one."""

    def __call__(self, net: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        out, recorder = self.called(net, batch)
        named = dict(recorder.metrics)
        loss = out.get("loss") if isinstance(out, dict) else out
        if "loss" in named:
            named[_LOSS] = named.pop("loss")
        elif isinstance(loss, Tensor) and loss.numel() == 1:
            named[_LOSS] = metrics.mean(loss.detach().reshape(()), recorder.samples)
        if not named:
            raise StepError(
                explain(
                    f"{self.function.__qualname__} neither logs anything nor returns a loss",
                    instead="self.log('val_loss', loss)",
                )
            )
        device = next(net.parameters()).device
        return torch.zeros((), device=device), named


_LOSS = "returned or logged as loss"


def renamed(step: StepFn, state: Any, batch: Any) -> dict[str, Metric]:
    """Call an evaluation step of an `EvaluationStep`; its metrics are those that the module logs, by their names."""
    values = dict(step(state, batch))
    del values["loss"]  # zero: a loss function returns one, an evaluation of Lightning need not
    if _LOSS in values:
        values["loss"] = values.pop(_LOSS)
    return values
