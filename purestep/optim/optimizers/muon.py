"""Muon: momentum whose matrices are orthogonalised, for the 2-d parameters; AdamW for the rest."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Decay, Finite, NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, Scalar, ScalarOrSchedule, transformation
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.masks import MatrixLabels, Partition
from purestep.optim.optimizers.adam import adamw, check_betas
from purestep.optim.rule import Memory, Rule
from purestep.optim.scale import scale_by_learning_rate
from purestep.optim.weight_decay import add_decayed_weights, fixed_filter
from purestep.sharding import full_tensors

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@transformation
class ScaleByMuon(Rule):
    scope = "tensor"
    memory: ClassVar[tuple[str, ...]] = ("momentum",)
    beta: Scalar = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS
    eps: float = 1e-7
    adjust: str = "original"

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        momentum = fx.lerp(memory["momentum"], gs, 1 - self.beta)
        ahead = fx.lerp(gs, momentum, self.beta) if self.nesterov else momentum
        behind = full_tensors.current()
        found = list(map(self._step, ahead)) if behind is None else behind.spread(self._step, ahead)
        return found, {"momentum": momentum}

    def _step(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise OptimError(
                explain(
                    "muon orthogonalises matrices only",
                    where=f"an update of {tree.describe(x)}",
                    instead="muon(0.02)   # gives parameters that are not 2-d to adamw",
                )
            )
        factor = _SHAPES[self.adjust](x.shape[0], x.shape[1])
        found = orthogonalize(x, self.ns_coefficients, self.ns_steps, eps=self.eps)
        # In the layout of the parameters, which one kernel for all of them takes.
        return found.to(x.dtype, memory_format=torch.contiguous_format) * factor


_SHAPES: dict[str, Any] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / max(columns, 1))),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "none": lambda rows, columns: 1.0,
}


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, *, eps: float = 1e-7) -> Tensor:
    """Return nearly the orthogonal factor of a matrix, in bfloat16, by a quintic Newton-Schulz iteration.

    Singular values end up between about 0.5 and 1.5, not at 1: the coefficients favour speed, as in torch and the
    original.
    """
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    y = x.bfloat16().T if tall else x.bfloat16()
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y


@checked(OptimError)
def scale_by_muon(
    ns_coefficients: Finite[tuple[float, float, float]] = COEFFICIENTS,
    ns_steps: Count = 5,
    beta: Decay[Scalar] = 0.95,
    eps: NonNegative[float] = 1e-7,
    *,
    nesterov: bool = True,
    adjust: str = "original",
) -> GradientTransformation:
    """Muon's direction, uphill, for 2-d parameters; see `muon`.

    Examples:
        >>> tx = scale_by_muon()
        >>> updates, _ = tx.update({"w": torch.eye(2) * 7}, tx.init({"w": torch.zeros(2, 2)}))
        >>> 0.5 < float(updates["w"][0, 0]) < 1.5
        True

    Reference: `optax.contrib.scale_by_muon`.
    """
    check_betas("scale_by_muon", beta=beta)
    if adjust not in _SHAPES:
        raise OptimError(
            explain("there is no such adjustment", where=f"{adjust=}", instead=" or ".join(map(repr, _SHAPES)))
        )
    a, b, c = ns_coefficients
    return ScaleByMuon(beta, nesterov, ns_steps, (a, b, c), eps, adjust)


@checked(OptimError)
def muon(
    learning_rate: NonNegative[ScalarOrSchedule],
    ns_coefficients: Finite[tuple[float, float, float]] = COEFFICIENTS,
    ns_steps: Count = 5,
    beta: Decay[Scalar] = 0.95,
    eps: NonNegative[float] = 1e-7,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.1,
    mask: tree.Filter | None = None,
    *,
    nesterov: bool = True,
    adjust: str = "original",
    matrices: tree.Filter | None = None,
    adam_learning_rate: NonNegative[ScalarOrSchedule] | None = None,
    adam_b1: Decay[Scalar] = 0.9,
    adam_b2: Decay[Scalar] = 0.999,
    adam_eps: NonNegative[Scalar] = 1e-8,
    adam_weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
) -> GradientTransformation:
    r"""Muon for matrices, AdamW for the rest.

    $m \leftarrow \beta m + (1 - \beta) g$, $u = -\eta (s \, \mathrm{ortho}(m) + \lambda w)$ with $s$ by the shape.

    Args:
        learning_rate: $\eta$ of the matrices: a number, a 0-d tensor or a schedule of the number of applied updates.
        beta: decay of the momentum.
        nesterov: orthogonalise the momentum one step ahead.
        ns_steps, ns_coefficients, eps: arguments of the Newton-Schulz iteration, which runs in bfloat16.
        adjust: scale by shape: "original" ($\sqrt{\max(1, rows / columns)}$), "match_rms_adamw"
            ($0.2 \sqrt{\max(rows, columns)}$, for learning rates tuned for AdamW) or "none".
        weight_decay: decoupled decay of the matrices.
        mask: which of the matrices decay.
        matrices: which 2-d parameters Muon updates, by dotted name; all by default. Embeddings and output
            layers usually do better with AdamW: `matrices=lambda name: "embed" not in name and "head" not in name`.
        adam_learning_rate: learning rate of AdamW for the other parameters; `learning_rate` by default.
        adam_b1, adam_b2, adam_eps, adam_weight_decay: arguments of AdamW for the other parameters.

    Returns:
        A partition with the state parts `muon` and `adamw`.

    Examples:
        >>> tx = muon(0.02, adam_learning_rate=1e-3)
        >>> params = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
        >>> tree.paths(tx.init(params), "opt_state")[1::2]
        ["opt_state.muon.scale_by_muon.momentum['weight']", "opt_state.adamw.mu['bias']"]

    Reference: Jordan et al., 2024 <https://kellerjordan.github.io/posts/muon/>; `torch.optim.Muon`,
    `optax.contrib.muon`.
    """
    direction = scale_by_muon(
        beta=beta, nesterov=nesterov, ns_steps=ns_steps, ns_coefficients=ns_coefficients, eps=eps, adjust=adjust
    )
    for_matrices = chain(
        direction, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate), name="muon"
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    rest = adamw(rate, adam_b1, b2=adam_b2, eps=adam_eps, weight_decay=adam_weight_decay)
    labels = MatrixLabels("muon", "adamw", fixed_filter(matrices))
    return Partition((for_matrices, rest), ("muon", "adamw"), labels, label="muon")
