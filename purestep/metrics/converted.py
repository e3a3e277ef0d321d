"""`from_torchmetrics`: a metric of torchmetrics as a pure function to a value that merges.

A metric of torchmetrics is an object that changes. Here its `update` runs on a private copy that begins with empty
states, and what is left in them is the value: a pytree that knows how each state merges. torchmetrics is imported when
something is converted.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from purestep import _torch as torch_names
from purestep import transforms, tree
from purestep.arguments import checked
from purestep.closures import free_variables, named_globals
from purestep.errors import MetricError, explain
from purestep.metrics import _torch, converted_settings, converted_states
from purestep.metrics.metric import Growing, extreme, written
from purestep.tree import pytree, static
from purestep.views import Block, Note, Printed

# What the words of `_torch.reduction` say of two states. Those that are kept whole have a first dim that grows.
_MERGE: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b,
    "min": lambda a, b: extreme(a, b, torch.minimum, min),
    "max": lambda a, b: extreme(a, b, torch.maximum, max),
}
_KEPT = frozenset(("cat", "stack", "list"))
_LONGEST = 10_000  # elements of a constant that is written into a graph
# Wrappers whose value depends on the order of calls or on a random generator, so it cannot be that of merged batches.
_NO_MONOID = {
    "BootStrapper": "it draws from the global random generator",
    "MetricTracker": "it is a list of metrics by epoch: the rows of a run are",
    "MinMaxMetric": "it compares the values of `compute` between calls: ps.metrics.from_torchmetrics of the metric "
    "inside of it, and the smallest of its rows",
    "NormalizedRootMeanSquaredError": "torchmetrics itself merges no more than two parts of it: "
    "ps.metrics.rmse(preds, target), divided by what it is normalized by",
    "Running": "it forgets old batches, so it depends on where batches begin: ps.callbacks.log(every=...) has windows",
}
# By name, what states of that name were made by: a state from a snapshot finds its `compute` here.
_MADE: dict[str, TorchmetricsFunction] = {}


def _said(value: object) -> str:
    return value if isinstance(value, str) else written(value)


@pytree
class TorchmetricsState(Growing, Printed):
    """The states of a torchmetrics metric over some batches. Made by the function that `from_torchmetrics` returns.

    Attributes:
        states: by name, a tensor, or what is kept of every batch: a tensor with the samples, or the batches, as dim 0,
            or a tuple of tensors. A number in place of a 0-d tensor where the loop has read it.
        updates: number of batches.
        kinds: (name, how it merges) of each state.
        source: name of the metric with its settings.
    """

    states: dict[str, Any]
    updates: Any
    kinds: tuple[tuple[str, str], ...] = static()
    source: str = static()

    def __repr__(self) -> str:
        try:
            value = self.compute()
        except Exception:  # of a metric of others, or of tensors without values: its states can be shown all the same
            value = {name: tree.describe(state) for name, state in self.states.items() if isinstance(state, Tensor)}
        numbers = [f"{name} {_said(x)}" for name, x in value.items()] if isinstance(value, Mapping) else [_said(value)]
        name = self.source.partition("#")[0].rpartition(".")[2]
        return f"{name}({', '.join([*numbers, f'batches={_said(self.updates)}'])})"

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        return [Note(repr(self))]

    @property
    def grows(self) -> bool:
        return any(kind in _KEPT for _, kind in self.kinds)

    def merge(self, other: TorchmetricsState) -> TorchmetricsState:
        return self.merge_all([other])

    def merge_all(self, others: Sequence[TorchmetricsState]) -> TorchmetricsState:
        for other in others:
            if (other.source, other.kinds) != (self.source, self.kinds):
                raise MetricError(
                    explain(
                        "two metrics of torchmetrics with different settings do not merge",
                        where=f"{self.source} and {other.source}",
                        instead="one ps.metrics.from_torchmetrics(...) outside of the loss function, called in it",
                    )
                )
        every, states = [self, *others], {}
        for name, kind in self.kinds:
            values = [state.states[name] for state in every]
            if kind in _KEPT:
                states[name] = converted_states.kept(values, kind)
            else:
                total = values[0]
                for value in values[1:]:
                    total = _MERGE[kind](total, value)
                states[name] = total
        updates = self.updates
        for other in others:
            updates = updates + other.updates
        return TorchmetricsState(states, updates, self.kinds, self.source)

    def value(self) -> Any:
        """Return what `compute()` of torchmetrics returns for all batches: numbers, tensors, curves.

        Raises:
            MetricError: the metric was not converted in this process.
        """
        return self._made().value(self)

    def compute(self) -> Any:
        """Return the number for the log, or a dict of numbers.

        Raises:
            MetricError: the metric was not converted in this process, or its value is neither.
        """
        return self._made().compute(self)

    def _made(self) -> TorchmetricsFunction:
        if self.source not in _MADE:
            raise MetricError(
                explain(
                    "the metric that these states belong to was not converted in this process",
                    where=self.source,
                    why="a snapshot holds the states of a metric, not its code",
                    instead=f"ps.metrics.from_torchmetrics({self.source.partition('#')[0]}(...))   # as in the run",
                )
            )
        return _MADE[self.source]


class TorchmetricsFunction:
    """A pure function of the arguments of `update` to a `TorchmetricsState`. Made by `from_torchmetrics`.

    Attributes:
        source: name of the metric with a digest of its settings.
    """

    def __init__(self, metric: nn.Module, pick: Callable[[Any], Any] | None) -> None:
        self._template = metric
        self._pick = pick
        self._idle: dict[str, list[nn.Module]] = {}  # copies to work on, by device
        self._looked = False
        self._constants = {
            name: (x.tolist(), x.dtype)
            for name, x in converted_states.constants(metric)
            if x.numel() <= _LONGEST and not x.is_meta
        }
        self.kinds = tuple(
            (f"{path}{state}", _torch.reduction(part, state))
            for path, part in converted_states.parts(metric)
            for state in sorted(_torch.defaults(part))
        )
        self.source = f"{tree.stable_name(type(metric))}#{converted_settings.digest(metric, pick)}"

    def __repr__(self) -> str:
        return f"from_torchmetrics({self._template!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> TorchmetricsState:
        """Return the states after `update(*args, **kwargs)` of one batch."""
        args, kwargs = tree.map(lambda x: transforms.detached(x) if isinstance(x, Tensor) else x, (args, kwargs))
        tensors = [x for x in tree.leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        traced = transforms.active() or torch_names.dispatch_modes() > 0 or any(map(_has_no_values, tensors))
        with self._worker(device, traced) as worker, transforms.unrecorded():
            before = None if self._looked or traced else converted_settings.attributes(worker)
            with _Traceable() if traced else contextlib.nullcontext():
                self._reset(worker, device, traced)
                # The method of the class: that of the instance is wrapped, counts calls and may move lists to the CPU.
                type(worker).update(worker, *args, **kwargs)  # type: ignore[attr-defined]
            if before is not None:
                converted_settings.check_attributes(self._template, before, converted_settings.attributes(worker))
                self._looked = True
            # A tensor, because a number would be no output of a vmapped step.
            updates = torch.ones((), dtype=torch.int64, device=device)
            states = {
                f"{path}{state}": converted_states.taken(getattr(part, state), kinds, f"{type(part).__name__}.{state}")
                for path, part in converted_states.parts(worker)
                for state in sorted(_torch.defaults(part))
                for kinds in [_torch.reduction(part, state)]
            }
        return TorchmetricsState(states, updates, self.kinds, self.source)

    def value(self, state: TorchmetricsState) -> Any:
        """Return what `compute()` returns for the states."""
        tensors = [x for x in tree.leaves(state.states) if isinstance(x, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        with self._worker(device, False) as worker, torch.no_grad():
            for path, part in converted_states.parts(worker):
                for name, default in _torch.defaults(part).items():
                    setattr(
                        part, name, converted_states.loaded(part, name, state.states[f"{path}{name}"], default, device)
                    )
                _torch.begin(part, int(state.updates))
            return worker.compute()  # type: ignore[operator]

    def compute(self, state: TorchmetricsState) -> Any:
        value = self.value(state)
        return converted_states.numbers(value if self._pick is None else self._pick(value), self.source)

    @contextlib.contextmanager
    def _worker(self, device: torch.device, traced: bool) -> Iterator[nn.Module]:
        """A copy of the metric that no other call has. One that failed is in an unknown state, and is dropped."""
        idle = self._idle.setdefault(f"{device} {traced}", [])
        worker = idle.pop() if idle else self._copy(device, traced)
        yield worker
        idle.append(worker)

    def _copy(self, device: torch.device, traced: bool) -> nn.Module:
        with torch_names.disable_current_modes():
            worker = copy.deepcopy(self._template).to(device)
        _torch.alone(worker)
        for part in worker.modules():
            if traced and "validate_args" in vars(part):  # it reads values, which a trace and a dry run do not have
                part.validate_args = False  # type: ignore[assignment]
        return worker

    def _reset(self, worker: nn.Module, device: torch.device, traced: bool) -> None:
        """Put every state to its beginning. In a trace its constants are made anew: those from outside are refused."""
        for path, part in converted_states.parts(worker):
            for name, default in _torch.defaults(part).items():
                if isinstance(default, Tensor):
                    setattr(part, name, self._constant(f"{path}{name}", default, device, traced))
                else:
                    setattr(part, name, [])
            _torch.begin(part, 1)
        if traced:
            for path, part in converted_states.parts(worker):
                for name, buffer in part.named_buffers(recurse=False):
                    setattr(part, name, self._constant(f"{path}{name}", buffer, device, traced))

    def _constant(self, name: str, value: Tensor, device: torch.device, traced: bool) -> Tensor:
        if not traced or name not in self._constants:
            return value.detach().clone()
        numbers, dtype = self._constants[name]
        return torch.tensor(numbers, dtype=dtype, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _MADE.setdefault(self.source, self)


@checked(MetricError)
def from_torchmetrics(metric: Any, *, pick: Callable[[Any], Any] | None = None) -> TorchmetricsFunction:
    """Make any metric or collection of torchmetrics a pure function to a metric that merges.

    The value over an epoch, over microbatches, over ranks and after a resume is that of torchmetrics on all samples at
    once, not the mean over batches. What torchmetrics does itself is off: no state in the object, no exchange between
    processes in `compute`, no compute groups.

    A state that torchmetrics sums stays as small as it is. One that it concatenates (`AUROC` without `thresholds=`,
    say) holds what it needs of every sample until the metric is computed.

    Args:
        metric: a `torchmetrics.Metric` or `MetricCollection`. It is copied, with its settings, and stays as it is.
        pick: what of its value goes to the log, a function of it to a number or a dict of numbers. By default numbers,
            dicts of numbers, and vectors, whose elements are numbered; `state.value()` returns everything.

    Returns:
        A function of what `metric.update` takes. Call it in the loss function: `{"auroc": auroc(probs, labels)}`. Under
        `ps.jit` and on tensors without memory, `validate_args` is off, because it reads values.

    Raises:
        MetricError: it is no metric of torchmetrics, or its value depends on more than the samples: `Running`,
            `MinMaxMetric`, `MetricTracker`, `BootStrapper`.

    Examples:
        >>> import torchmetrics
        >>> auroc = from_torchmetrics(torchmetrics.AUROC(task="binary"))
        >>> a = auroc(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
        >>> b = auroc(torch.tensor([0.8, 0.3]), torch.tensor([0, 1]))
        >>> float(a.compute()), float(b.compute()), float(a.merge(b).compute())
        (1.0, 0.0, 0.75)

    Reference: torchmetrics, "Implementing a Metric"
    <https://lightning.ai/docs/torchmetrics/stable/pages/implement.html>.
    """
    for part in metric.modules() if isinstance(metric, nn.Module) else ():
        name = type(part).__name__
        if type(part).__module__.startswith("torchmetrics.") and name in _NO_MONOID:
            raise MetricError(
                explain(
                    f"{name} has no value that can be merged over batches",
                    where=f"from_torchmetrics({type(metric).__name__}(...))",
                    why=_NO_MONOID[name],
                )
            )
    if isinstance(metric, TorchmetricsFunction):
        raise MetricError(explain("the metric is converted already", where=repr(metric), instead="use it as it is"))
    if theirs(metric) is None:
        raise MetricError(
            explain(
                "from_torchmetrics takes a metric or a collection of torchmetrics",
                where=f"metric: {metric!r}"[:200],
                why="torchmetrics.functional has functions, whose values do not merge"
                if isinstance(metric, types.FunctionType)
                else None,
                instead='ps.metrics.from_torchmetrics(torchmetrics.AUROC(task="binary"))',
            )
        )
    with torch.no_grad():
        made = TorchmetricsFunction(copy.deepcopy(metric), pick)
    if not made.kinds:
        raise MetricError(
            explain(
                f"{type(metric).__name__} has no states, so there is nothing to merge",
                where=repr(metric),
                instead="declare them with add_state in its __init__",
            )
        )
    _MADE[made.source] = made
    return made


def theirs(value: object) -> str | None:
    """Return "Metric" or "MetricCollection" for an object of torchmetrics, None for any other; it imports nothing."""
    module: Any = sys.modules.get("torchmetrics")
    if module is None:
        return None
    return next((name for name in ("Metric", "MetricCollection") if isinstance(value, getattr(module, name))), None)


def refuse_unconverted(key: str, value: object) -> None:
    """Refuse an object of torchmetrics in a dict of metrics, with the line to write.

    Raises:
        MetricError: it is one, or a converted one that was not called.
    """
    if isinstance(value, TorchmetricsFunction):
        raise MetricError(
            explain(
                f"metric {key!r} is a function that was not called",
                where=f"metrics[{key!r}]: {value!r}",
                instead=f"{{{key!r}: {key}(preds, target)}}   # what its update takes",
            )
        )
    if theirs(value) is not None:
        raise MetricError(
            explain(
                f"metric {key!r} is an object of torchmetrics, which a pure step cannot update",
                where=f"metrics[{key!r}]: {type(value).__name__}",
                why="it would keep its states outside of the run: no snapshot, no other rank and no merge sees them",
                instead=f"{key} = ps.metrics.from_torchmetrics({type(value).__name__}(...))   # once, outside of the "
                f"loss function\nreturn loss, {{{key!r}: {key}(preds, target)}}",
            )
        )


def refuse_captured(function: Callable[..., Any]) -> None:
    """Refuse a loss function that reads an object of torchmetrics from outside: calling it would change it.

    Raises:
        MetricError: with its name, and the line to write.
    """
    if not isinstance(function, types.FunctionType) or "torchmetrics" not in sys.modules:
        return
    for name, value in (named_globals(function) | free_variables(function)).items():
        if theirs(value) is not None:
            raise MetricError(
                explain(
                    "the loss function uses an object of torchmetrics, which a pure step cannot update",
                    where=f"{name} in {function.__qualname__}: {type(value).__name__}",
                    why="calling it returns the value of one batch, and the log would have the mean of those; its "
                    "states are in no snapshot, and each rank has its own",
                    instead=f"{name} = ps.metrics.from_torchmetrics({name})   # outside of the loss function",
                )
            )


# --- tracing ----------------------------------------------------------------------------------------------------------


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or torch_names.is_fake(tensor)


class _Traceable(TorchFunctionMode):
    """Replaces `torch.bincount` of a known number of bins, whose shape depends on values, by a sum of fixed shape."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.bincount, Tensor.bincount):
            bound = dict(zip(("input", "weights", "minlength"), args, strict=False)) | kwargs
            if bound.get("weights") is None and bound.get("minlength"):
                x = bound["input"].to(torch.int64)
                bins = torch.zeros(bound["minlength"], dtype=torch.int64, device=x.device)
                return bins.scatter_add(0, x, torch.ones_like(x))
        return func(*args, **kwargs)
