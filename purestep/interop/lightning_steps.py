"""`training_step` and `validation_step` of a LightningModule as pure loss functions; `self.log` becomes their metrics.

During a call the module has a `log` that records values, and a trainer whose attributes raise errors: without a trainer
Lightning would return 0 for `self.current_epoch` and drop logged values.
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
    """Replaces `self.trainer` while a step runs: reading any attribute raises an error."""

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
    """Replaces `batch_idx`: it may be passed on, but any operation on it raises an error."""

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
    """Replaces a metric of torchmetrics in a module while a step runs: each call returns a mergeable value.

    Args:
        name: path of the metric in the module.
        convert: the metric converted by `ps.metrics.from_torchmetrics`.
    """

    def __init__(self, name: str, convert: Callable[..., Metric]) -> None:
        self._name, self._convert = name, convert
        self.value: Metric | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the value of this call as a metric, which merges exactly over batches."""
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
        """Return the metric that `self.log` logs for this object."""
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
    """Replaces a `MetricCollection`: its metrics by name."""

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


# By path in the module: a converted metric, or the converted metrics of a collection by name.
Converted = tuple[tuple[str, Any], ...]


def converted_metrics(module: nn.Module) -> Converted:
    """Convert the metrics of torchmetrics in a module; of nested metrics the outermost.

    Raises:
        MetricError: the states of a metric cannot be merged over batches.
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
    """Replace the metrics of torchmetrics in a module by pure ones, in a `with` block."""
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
    """Replaces `self.log` and keeps the metrics of one batch by name."""

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
        """Keep a value. Arguments about steps, epochs, ranks and loaders are ignored, as metrics merge over all."""
        metric = self._metric(name, value, reduce_fx, self.samples if batch_size is None else batch_size)
        if name in self.metrics:
            # As in Lightning, a value that is logged twice in one batch counts twice.
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
                    why="a value in an attribute is not part of the state: it is not saved, merged or resumed",
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
    """Give a module and the LightningModules in it a `Recorder`, a `NoTrainer` and pure metrics, in a `with` block."""
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
        dataloader_idx: value of the argument of that name of an evaluation step.
        transfer: whether the module has `on_after_batch_transfer`, which is called first.
        converted: the converted metrics of torchmetrics in the module.
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
        """Return the value by which a snapshot of a run identifies this step."""
        return {"function": self.function, "dataloader_idx": self.dataloader_idx, "transfer": self.transfer}

    def called(self, net: Any, batch: Any) -> tuple[Any, Recorder]:
        """Call the method; return its result and the logged values."""
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
    """`validation_step` or `test_step` as a loss function; a returned loss becomes the metric `loss`."""

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
    """Call an evaluation step of an `EvaluationStep`, and return the metrics under the names that the module logs."""
    values = dict(step(state, batch))
    del values["loss"]  # a zero: a loss function must return a loss, an evaluation step of Lightning need not
    if _LOSS in values:
        values["loss"] = values.pop(_LOSS)
    return values
