"""`refresh_batchnorm`: the statistics of BatchNorm for parameters that were never trained with, averages above all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from purestep import data as data_
from purestep import random
from purestep.arguments import checked
from purestep.errors import ConfigError, DataError, explain
from purestep.functional import bind
from purestep.state import TrainState, definition

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@checked(ConfigError, failed=True)
def refresh_batchnorm(state: TrainState, loss_fn: Callable[[Any, Any], Any], data: object) -> TrainState:
    """Return a state whose BatchNorm statistics are those of its parameters: equal means over the batches of `data`.

    Averaged parameters (`ps.optim.average_params`) need it before they are evaluated, because the statistics of the run
    are those of the parameters that trained.

    Args:
        state: `ps.optim.averaged(state)`, say. A state without BatchNorm comes back as it is.
        loss_fn: calls the model on a batch, as in `make_step`; what it returns is not used. It runs in training mode
            without gradients, with randomness from the key of the state.
        data: what `fit` takes as data; it is read once, from its beginning.

    Returns:
        The state with new buffers; everything else stays.

    Raises:
        DataError: there are no batches.

    Examples:
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.BatchNorm1d(1, affine=True), ps.optim.sgd(0.1))
        >>> batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])]
        >>> refresh_batchnorm(state, lambda net, batch: net(batch).mean(), batches).buffers["running_mean"]
        tensor([4.])

    Reference: `torch.optim.swa_utils.update_bn`; Izmailov et al., 2018.
    """
    module = definition(state).module
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _NORMS) and m.track_running_stats}
    own = {f"{name}.{kind}" if name else kind for name in norms for kind in _STATISTICS}
    statistics = {name: _beginning(name, tensor) for name, tensor in state.buffers.items() if name in own}
    if not statistics:
        return state
    count, device = 0, state.step.device
    for count, batch in enumerate(data_.as_source(data).open(0, 0, None), start=1):
        rng = functools.partial(random.fold_in, state.rng, "batchnorm", count)
        bound = bind(module, state.params, {**state.buffers, **statistics}, rng=rng)
        moved = data_.to_device(batch, device)
        with torch.no_grad():
            bound.run(functools.partial(_called, list(norms.values()), loss_fn, moved))
        statistics = {name: bound.new_buffers[name] for name in statistics}
    if not count:
        raise DataError(explain("refresh_batchnorm has no batches", where=f"data={data!r:.80}"))
    return state.replace(buffers={**state.buffers, **statistics})


def _beginning(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor) if name.endswith("running_var") else torch.zeros_like(tensor)


def _called(norms: list[Any], loss_fn: Callable[[Any, Any], Any], batch: Any, net: nn.Module) -> None:
    with _cumulative(norms):
        loss_fn(net, batch)


@contextmanager
def _cumulative(norms: list[Any]) -> Iterator[None]:
    """Make BatchNorm take equal means instead of moving ones, while the caller holds the model."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = None
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
