"""Weight decay: pull parameters towards zero, all of them or those that a filter of names selects.

Owns `add_decayed_weights` and the mask of the decoupled optimizers. A filter is matched against dotted names, on the
host, when the update runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from purestep import tree
from purestep.arguments import NonNegative, checked
from purestep.errors import OptimError
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    StepNumber,
    is_zero,
    need_params,
    same_leaves,
    transformation,
    value_at,
)
from purestep.optim.kernels import foreach as fx


@transformation
class AddDecayedWeights(GradientTransformation):
    scope = "element"
    weight_decay: ScalarOrSchedule
    mask: tree.Filter | None = None

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        if is_zero(self.weight_decay):
            return updates, state
        us, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params")
        decay = value_at(self.weight_decay, step, "weight_decay")
        return tree.unflatten(treedef, add_decay(us, ps, decay, mask=self.mask, like=updates)), state


@checked(OptimError)
def add_decayed_weights(
    weight_decay: NonNegative[ScalarOrSchedule], mask: tree.Filter | None = None
) -> GradientTransformation:
    r"""Add a multiple of the parameters to the updates: $u \leftarrow u + \lambda w$.

    Before an optimizer this is L2 regularisation (`weight_decay` of `torch.optim.Adam`); after `scale_by_*` and before
    the learning rate it is decoupled decay (AdamW).

    Args:
        weight_decay: $\lambda$: a number, a 0-d tensor or a schedule.
        mask: which parameters decay, by dotted name: a glob, a list of globs, or a function of the name. All by
            default.

    Examples:
        >>> import torch
        >>> tx = add_decayed_weights(0.1, mask="*weight")
        >>> params = {"weight": torch.tensor([10.0]), "bias": torch.tensor([10.0])}
        >>> tx.update({"weight": torch.zeros(1), "bias": torch.zeros(1)}, None, params)[0]
        {'weight': tensor([1.]), 'bias': tensor([0.])}

    Reference: Loshchilov and Hutter, 2019 <https://arxiv.org/abs/1711.05101>; `optax.add_decayed_weights`.
    """
    return AddDecayedWeights(weight_decay, fixed_filter(mask))


def add_decay(
    us: list[Tensor], ps: list[Tensor], decay: Scalar, *, mask: tree.Filter | None, like: Any, reuse: bool = False
) -> list[Tensor]:
    """Return `u + decay * p` where the mask says so, and `u` elsewhere. `like` is the tree the leaves come from."""
    if mask is None:
        return fx.add(us, ps, alpha=decay, reuse=reuse)
    at = [i for i, name in enumerate(tree.names(like)) if tree.matches(mask, name)]
    result = list(us)
    for i, u in zip(at, fx.add([us[i] for i in at], [ps[i] for i in at], alpha=decay, reuse=reuse), strict=True):
        result[i] = u
    return result


def fixed_filter(filter: Any) -> Any:
    """Return a filter as a value that compares and hashes: a list of globs becomes a tuple."""
    return tuple(filter) if isinstance(filter, list) else filter
