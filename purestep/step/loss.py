"""What a loss function returns, read and checked: the loss, its weight and the metrics."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from purestep import transforms, tree
from purestep.arguments import NonNegative, checked
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import Binding
from purestep.metrics import Metric, as_metrics, sample_count
from purestep.metrics.converted import refuse_captured
from purestep.metrics.dicts import described
from purestep.metrics.metric import made_mean
from purestep.microbatch import Context
from purestep.sharding.plan import Plan

if TYPE_CHECKING:
    from purestep.parallel.tensor_parallel import Splitter

LossFn = Callable[[Any, Any], Any]
Metrics = dict[str, Metric]


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A loss and what it is a mean over. Made by `weighted`."""

    loss: Tensor
    weight: Tensor


@checked(StepError)
def weighted(loss: Tensor, weight: NonNegative[Tensor | float]) -> Weighted:
    """Return a loss together with what it is a mean over, when that is not the samples: tokens, pixels, edges.

    Microbatches and epochs are then weighted by it, so that the gradient is that of the mean over the whole batch. A
    batch of weight 0, all padding, has the gradient 0, and its loss counts for nothing in the mean of an epoch.

    Args:
        loss: floating [], the mean over `weight` items.
        weight: number of items, a number or a 0-d tensor.

    Examples:
        >>> weighted(torch.tensor(2.0), 3)
        Weighted(loss=tensor(2.), weight=tensor(3., dtype=torch.float64))
    """
    if not isinstance(loss, Tensor):
        raise StepError(explain("ps.weighted takes the loss as a tensor", where=f"loss: {tree.describe(loss)}"))
    # float64 counts tokens exactly, and divides without adding to the error of the gradients.
    dtype = torch.float32 if loss.device.type == "mps" else torch.float64
    if isinstance(weight, Tensor):
        return Weighted(loss, transforms.detached(weight).to(loss.device, dtype))
    return Weighted(loss, torch.full((), weight, dtype=dtype, device=loss.device))


def check_arity(loss_fn: LossFn) -> None:
    """Refuse a loss function that does not take the model and the batch."""
    refuse_captured(loss_fn)
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(loss_fn, "__name__", "loss_fn")
        raise ConfigError(
            explain(
                "a loss function takes the model and the batch",
                where=f"{name}{signature}",
                instead="def loss_fn(net, batch): ...",
            )
        ) from error


def on_plan(plan: Plan | None, loss_fn: LossFn) -> LossFn:
    """Return a loss function as several ranks compute it together, where a plan says so."""
    if plan is None:
        return loss_fn
    plan.check_computed()
    if plan.pipelined:
        from purestep.parallel.pipeline import partial_loss

        return partial_loss(loss_fn)
    if not plan.tensor_axis:
        return loss_fn
    from purestep.parallel.tensor_parallel import plain_loss

    return plain_loss(loss_fn)


def splitting(plan: Plan | None, module: nn.Module) -> Splitter | None:
    """Return what binds a model to the parts that a rank of a plan has; None where parameters are whole in a call."""
    if plan is None or not plan.tensor_axis:
        return None
    from purestep.parallel import tensor_parallel

    return tensor_parallel.splitter(plan, module)


def dispatching(plan: Plan | None, module: nn.Module, around: Context | None) -> Context | None:
    """Return what makes the context of a model in which tokens are sent to their experts, where a plan splits those."""
    if plan is None or not plan.expert_axis:
        return around
    from purestep.parallel import expert_parallel

    return expert_parallel.dispatcher(plan, module).around(None, around)


def samples_of(batch: Any) -> int:
    """Return the number of samples of a batch, which is never 0: the mean over none of them is NaN."""
    samples = sample_count(batch)
    if samples == 0:
        raise StepError(
            explain(
                "the batch has no samples",
                where=described(batch),
                why="the mean of a loss over none is 0 / 0, and would make every mean that it enters NaN",
                instead="leave empty batches out where they are made: (b for b in batches if len(b) > 0)",
            )
        )
    return samples


def read_loss(
    loss_fn: LossFn, bound: Binding, batch: Any, samples: int, *, alone: bool = True
) -> tuple[Tensor, Any, Metrics]:
    """Call a loss function on a bound model, and check and normalise what it returns.

    Args:
        loss_fn, bound, batch: what is called on what.
        samples: the weight of the loss, unless it brings its own.
        alone: whether it may be called a second time: not where the model waits for other ranks.

    Returns:
        The loss to differentiate, its weight, and all metrics, `loss` first.
    """
    out = called(loss_fn, bound, batch, alone=alone)
    loss, extra = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    weight: Any = samples
    if isinstance(loss, Weighted):
        weight = loss.weight
        loss = loss.loss
    is_dict = type(extra) is dict or isinstance(extra, Mapping)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point() or not is_dict:
        raise StepError(_loss_message(loss_fn, out))
    if "loss" in extra:
        raise StepError(explain("the metric 'loss' is the loss itself", instead="give the other metric another name"))
    metrics: Metrics = {"loss": made_mean(loss, weight)}
    if extra:
        metrics |= as_metrics(extra, samples)
    return loss, weight, metrics


def called(function: Callable[[Any, Any], Any], bound: Binding, batch: Any, *, alone: bool) -> Any:
    """Return what a function makes of the bound model and a batch; `alone`: it may be called a second time."""
    if alone:
        return bound.run(lambda net: function(net, batch), function)
    with bound as net:
        return function(net, batch)


def _loss_message(loss_fn: LossFn, out: Any) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{k!r}: {shown(v)}" for k, v in list(value.items())[:6]) + "}"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(shown(v) for v in value) + ")"
        return tree.describe(value) if isinstance(value, Tensor) else type(value).__name__

    instead = "return loss\nreturn loss, {'accuracy': ps.metrics.accuracy(logits, labels)}"
    if isinstance(out, Mapping) and "loss" in out:
        instead = "return out['loss'], {...}   # the loss first, then a dict of metrics"
    elif isinstance(out, Tensor) and out.ndim:
        instead = "return loss.mean()   # one number"
    return explain(
        "a loss function returns a loss, or (loss, metrics): a 0-d floating tensor and a dict",
        where=f"{getattr(loss_fn, '__name__', 'loss_fn')} returned {shown(out)}",
        instead=instead,
    )
