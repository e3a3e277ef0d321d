"""The gradients of a batch that is one microbatch of one process, in the dtypes of the state, storing all activations.

Nothing is cast, exchanged or run again there, so it is the definition of a training step and no more. `Step` computes
the same by pieces which leave room for policies, plans and checkpoints; on a small model asking all of them takes a
twentieth of a step.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from purestep.functional import Binding
from purestep.grad import Engine, loss_gradients
from purestep.microbatch import Gradients
from purestep.precision.cast_params import check_uncast
from purestep.random.keys import step_key
from purestep.sharding import placement
from purestep.state import TrainState, definition
from purestep.step.loss import LossFn, read_loss, samples_of


def direct_gradients(
    loss_fn: LossFn, engine: Engine, state: TrainState, batch: Any, index: int | Tensor = 0
) -> Gradients:
    """Return what a batch contributes to an update.

    Args:
        loss_fn, engine: as of `make_step`.
        state: the train state, without a policy and not split over ranks.
        batch: the batch.
        index: which microbatch it is; randomness comes from (state.rng, state.step, index).
    """
    placement.check_plain(state)
    check_uncast(state)
    samples, module, buffers = samples_of(batch), definition(state).module, state.buffers
    rng = functools.partial(step_key, state.rng, state.step, index)

    def loss_of(params: dict[str, Tensor]) -> tuple[Tensor, Any]:
        bound = Binding(module, params, buffers, rng=rng)
        loss, weight, metrics = read_loss(loss_fn, bound, batch, samples)
        return loss, (weight, bound.new_buffers, metrics)

    grads, (weight, new, metrics) = loss_gradients(loss_of, state.params, engine, False)
    return Gradients(grads, weight, new, metrics)
