"""Adam, adamw and amsgrad, and their directions without a learning rate: `scale_by_adam`, `scale_by_amsgrad`.

One transformation holds the moments, the learning rate and the decoupled decay, so that an update makes few passes over
the memory. Moments and updates follow `torch.optim.Adam(foreach=True)` to the bit in float32; in float64 the bias
corrections may differ in the last place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Decay, NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    StepNumber,
    is_zero,
    need_params,
    new_count,
    next_count,
    same_leaves,
    transformation,
    value_at,
    wide,
    zeros_like,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.kernels.fused import fitted, fused_adam
from purestep.optim.kernels.straight import added, straight_adam
from purestep.optim.scale import checked_rate
from purestep.optim.scope import Kernel
from purestep.optim.weight_decay import add_decay, fixed_filter
from purestep.random.keys import is_host
from purestep.tree import Structure
from purestep.tree.walk import rebuild

_Moments = tuple[list[Tensor], list[Tensor], list[Tensor] | None]  # mu, nu, and nu_max of amsgrad
_FLOAT32 = {torch.float32}


@tree.pytree
class AdamState:
    """`mu`, `nu`: moving averages of the gradient and its square, like the parameters; `count`: updates so far."""

    count: Tensor
    mu: Any
    nu: Any


@tree.pytree
class AmsgradState:
    """As `AdamState`, with `nu_max`: the largest `nu` so far."""

    count: Tensor
    mu: Any
    nu: Any
    nu_max: Any


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """The inputs of an update, as lists in the order of the parameters; gradients in the dtypes of `nu`."""

    structure: Structure
    gs: list[Tensor]
    mu: list[Tensor]
    nu: list[Tensor]
    top: list[Tensor] | None
    count: Tensor


@transformation
class Adam(Kernel, GradientTransformation):
    scope = "element"
    learning_rate: ScalarOrSchedule | None = None
    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-8
    eps_root: Scalar = 0.0
    weight_decay: ScalarOrSchedule = 0.0
    mask: tree.Filter | None = None
    nesterov: bool = False
    amsgrad: bool = False
    fused: bool = False
    mu_dtype: torch.dtype | None = None
    label: str = "adam"

    @property
    def name(self) -> str:
        return self.label

    def init(self, params: Any) -> Any:
        count, mu, nu = new_count(params), zeros_like(params, self.mu_dtype), zeros_like(params)
        return AmsgradState(count, mu, nu, zeros_like(params)) if self.amsgrad else AdamState(count, mu, nu)

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        leaves = self._leaves(updates, state)
        ps = None if params is None else same_leaves(params, leaves.structure, updates, "params")
        us, moments = self._proposed(updates, leaves, ps, step, reuse=False)
        return self._trees(leaves, us, moments)

    def advance(
        self,
        updates: Any,
        state: Any,
        params: Any,
        *,
        reuse: bool = False,
        step: StepNumber | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        leaves = self._leaves(updates, state)
        ps = same_leaves(params, leaves.structure, updates, "params")
        if self.fused and self.learning_rate is not None:
            decay = value_at(self.weight_decay, step, "weight_decay")
            done = self._in_one_pass(updates, leaves, ps, value_at(self.learning_rate, step), decay, reuse)
            if done is not None:
                return done
        us, moments = self._proposed(updates, leaves, ps, step, reuse=reuse)
        return self._trees(leaves, added(ps, us, reuse=reuse), moments)

    def _leaves(self, updates: Any, state: Any) -> _Leaves:
        gs, structure = tree.flatten(updates)
        mu = same_leaves(state.mu, structure, updates, "first moments")
        nu = same_leaves(state.nu, structure, updates, "second moments")
        top = same_leaves(state.nu_max, structure, updates, "largest second moments") if self.amsgrad else None
        return _Leaves(structure, fx.cast(gs, nu), mu, nu, top, next_count(state.count))

    def _trees(self, leaves: _Leaves, first: list[Tensor], moments: _Moments) -> tuple[Any, Any]:
        """Return the tree of updates or parameters, and the next state."""
        lists = [first, *[xs for xs in moments if xs is not None]]
        result, *trees = rebuild(leaves.structure, lists)
        return result, (AmsgradState if self.amsgrad else AdamState)(leaves.count, *trees)

    def _proposed(
        self, updates: Any, leaves: _Leaves, ps: list[Tensor] | None, step: StepNumber | None, *, reuse: bool
    ) -> tuple[list[Tensor], _Moments]:
        """Return the updates, and the next moments."""
        rate = None if self.learning_rate is None else value_at(self.learning_rate, step)
        moments = [leaves.mu, leaves.nu] + ([] if leaves.top is None else [leaves.top])
        gs = fitted(leaves.gs, *moments) if self.fused and fx.plain(leaves.gs, *moments) else None
        if gs is None or rate is None:
            us, mu, nu, top = self._foreach(leaves, rate, reuse)
        else:
            us = [torch.zeros_like(g) for g in gs]
            mu, nu, top = self._fused(us, gs, leaves, rate, [0.0] * len(us), reuse)
        if not is_zero(self.weight_decay):
            ps = need_params(ps, f"{self.name} with weight decay")
            decay = value_at(self.weight_decay, step, "weight_decay")
            us = add_decay(us, ps, decay * (1.0 if rate is None else -rate), mask=self.mask, like=updates, reuse=True)
        return us, (mu, nu, top)

    def _in_one_pass(
        self, updates: Any, leaves: _Leaves, ps: list[Tensor], rate: Scalar, decay: Scalar, reuse: bool
    ) -> tuple[Any, Any] | None:
        """Update the parameters by the fused kernel: the bits of `torch.optim`'s fused Adam. None if it cannot run."""
        moments = [leaves.mu, leaves.nu] + ([] if leaves.top is None else [leaves.top])
        if isinstance(decay, Tensor) or not fx.plain(ps, leaves.gs, *moments):
            return None
        gs = fitted(leaves.gs, ps, *moments)
        if gs is None:
            return None
        decays = [decay] * len(ps)
        if self.mask is not None:
            decays = [decay if tree.matches(self.mask, name) else 0.0 for name in tree.names(updates)]
        ps = ps if reuse else fx.copies(ps)
        return self._trees(leaves, ps, self._fused(ps, gs, leaves, rate, decays, reuse))

    def _foreach(self, leaves: _Leaves, rate: Scalar | None, reuse: bool) -> tuple[Any, ...]:
        """Compute moments and update, in the order of operations of torch's foreach implementation."""
        gs, top, sign = leaves.gs, leaves.top, 1.0 if rate is None else -rate
        numbers = self._corrections(leaves, sign)
        if numbers is not None and self._straight(leaves):
            (scale, factor), b1, b2, eps = numbers, float(self.b1), float(self.b2), float(self.eps)
            found = straight_adam(
                gs, leaves.mu, leaves.nu, b1=b1, b2=b2, eps=eps, scale=scale, factor=factor, reuse=reuse
            )
            return *found, None
        mu = fx.lerp(leaves.mu, fx.cast(gs, leaves.mu), 1 - self.b1, reuse=reuse)
        nu = fx.average_of_squares(leaves.nu, gs, self.b2, reuse=reuse)
        if top is not None:
            top = fx.maximum(top, nu, reuse=reuse)
        largest = nu if top is None else top
        root, move = ("adam root", "adam move") if reuse else (None, None)
        denom = fx.sqrt(largest if is_zero(self.eps_root) else fx.add(largest, self.eps_root), between=root)
        moment = fx.cast(mu, nu)
        if numbers is not None:
            scale, factor = numbers
            us = fx.mul(moment, factor, between=move)
        else:
            t = wide(leaves.count)
            scale = torch.sqrt(1 - self.b2**t)
            us = self._directions(moment, gs, t, sign, move)
        denom = fx.add(fx.div(denom, scale, reuse=True), self.eps, reuse=True)
        return fx.div(us, denom, reuse=True), mu, nu, top

    def _straight(self, leaves: _Leaves) -> bool:
        """Tell whether the operations need not look at each list: of float32, where `_corrections` are numbers."""
        plain = fx.plain(leaves.gs, leaves.mu, leaves.nu)
        return plain and leaves.top is None and type(self.eps) is float and is_zero(self.eps_root)

    def _directions(self, moment: list[Tensor], gs: list[Tensor], t: Tensor, sign: Scalar, move: str | None) -> Any:
        """Return the first moments without their bias, times the rate; Nesterov's form has the gradient in it."""
        if not self.nesterov:
            return fx.mul(moment, sign / (1 - self.b1**t), between=move)
        us = fx.mul(moment, sign * self.b1 / (1 - self.b1 ** (t + 1)), between=move)
        return fx.add(us, gs, alpha=sign * (1 - self.b1) / (1 - self.b1**t), reuse=True)

    def _corrections(self, leaves: _Leaves, sign: Scalar) -> tuple[Tensor, float] | None:
        """Return the corrections of both moments by arithmetic of Python, a tenth of the time of that of 0-d tensors.

        None where the host does not have the numbers, or the bits would be others: in other dtypes than float32 a
        number is not rounded as a 0-d tensor is.
        """
        b1, b2, count = self.b1, self.b2, leaves.count
        if self.nesterov or isinstance(b1, Tensor) or isinstance(b2, Tensor) or isinstance(sign, Tensor):
            return None
        if not is_host(count) or fx.dtypes(leaves.mu, leaves.nu) != _FLOAT32:
            return None
        t = int(count)
        # torch divides a number by a tensor like this; and its root is not rounded as Python's is in the last place.
        scale = torch.sqrt(torch.full((), 1 - b2**t, dtype=torch.float64)).to(torch.float32)
        return scale, 1 / (1 - b1**t) * sign

    def _fused(
        self,
        into: list[Tensor],
        gs: list[Tensor],
        leaves: _Leaves,
        rate: Scalar,
        decays: list[float],
        reuse: bool,
    ) -> _Moments:
        """Run the kernel on `into`, and return the moments."""
        mu, nu, top = leaves.mu, leaves.nu, leaves.top
        if not reuse:
            mu, nu = fx.copies(mu), fx.copies(nu)
            top = None if top is None else fx.copies(top)
        b1, b2, eps = float(self.b1), float(self.b2), float(self.eps)
        fused_adam(into, gs, mu, nu, top, leaves.count, decays, rate=rate, b1=b1, b2=b2, eps=eps)
        return mu, nu, top

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {} if self.learning_rate is None else {"learning_rate": value_at(self.learning_rate, step)}

    def __repr__(self) -> str:
        return super().__repr__().replace(f", label={self.label!r}", "").replace(f"label={self.label!r}", "")


@checked(OptimError)
def adam(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    eps_root: NonNegative[Scalar] = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    fused: bool = False,
) -> GradientTransformation:
    r"""Adam: steps scaled by moving averages of the gradient and of its square.

    $m \leftarrow \beta_1 m + (1 - \beta_1) g$, $v \leftarrow \beta_2 v + (1 - \beta_2) g^2$,
    $u = -\eta \, \hat m / (\sqrt{\hat v + \bar\epsilon} + \epsilon)$ with $\hat m = m / (1 - \beta_1^t)$, $\hat v = v /
    (1 - \beta_2^t)$.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        eps_root: added under the root, to the uncorrected second moment; for differentiating through the update.
        nesterov: use Nesterov's form of the first moment (`optax.nadam`).
        mu_dtype: dtype of the first moment; by default that of each parameter.
        fused: use torch's fused kernel in eager mode: faster, equal to a few units in the last place, and a shard does
            not get the bits of the full tensor.

    Returns:
        A transformation with the state `AdamState(count, mu, nu)`.

    Raises:
        OptimError: a hyperparameter is out of range, or the fused kernel does not support the arguments.

    Examples:
        >>> tx = adam(0.1)
        >>> grads = {"w": torch.tensor([0.5, -2.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> updates
        {'w': tensor([-0.1000,  0.1000])}

    Reference: Kingma and Ba, 2015 <https://arxiv.org/abs/1412.6980>; `torch.optim.Adam`. For L2 regularisation put
    `add_decayed_weights` before it; for decoupled decay use `adamw`.
    """
    return _checked(
        Adam(checked_rate(learning_rate), b1, b2, eps, eps_root, nesterov=nesterov, fused=fused, mu_dtype=mu_dtype)
    )


@checked(OptimError)
def adamw(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    eps_root: NonNegative[Scalar] = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: NonNegative[ScalarOrSchedule] = 1e-2,
    mask: tree.Filter | None = None,
    *,
    nesterov: bool = False,
    fused: bool = False,
) -> GradientTransformation:
    r"""Adam with decoupled weight decay: $u = u_\mathrm{Adam} - \eta \lambda w$.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        eps_root: added under the root.
        weight_decay: $\lambda$, multiplied by the learning rate; torch's default.
        mask: which parameters decay, by dotted name: a glob, a list of globs, or a function of the name. All by
            default.
        nesterov: use Nesterov's form of the first moment (`optax.nadamw`).
        mu_dtype: dtype of the first moment; by default that of each parameter.
        fused: as for `adam`.

    Returns:
        A transformation with the state `AdamState(count, mu, nu)`.

    Raises:
        OptimError: as for `adam`.

    Examples:
        >>> tx = adamw(0.1, weight_decay=0.5, mask="*weight")
        >>> params = {"bias": torch.tensor([1.0]), "weight": torch.tensor([1.0])}
        >>> grads = {"bias": torch.tensor([1.0]), "weight": torch.tensor([1.0])}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'bias': tensor([-0.1000]), 'weight': tensor([-0.1500])}

    Reference: Loshchilov and Hutter, 2019 <https://arxiv.org/abs/1711.05101>; `torch.optim.AdamW`, which applies the
    decay to the
    parameters before the step instead of adding it to the update: equal up to rounding.
    """
    rate, filter = checked_rate(learning_rate), fixed_filter(mask)
    return _checked(
        Adam(rate, b1, b2, eps, eps_root, weight_decay, filter, nesterov, False, fused, mu_dtype, label="adamw")
    )


@checked(OptimError)
def amsgrad(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    *,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
    fused: bool = False,
) -> GradientTransformation:
    r"""Adam whose step never grows: it divides by the largest second moment so far.

    $v_{\max} \leftarrow \max(v_{\max}, v)$, $u = -\eta \, \hat m / (\sqrt{v_{\max} / (1 - \beta_2^t)} + \epsilon)$.

    Args:
        learning_rate: as for `adam`, like `b1`, `b2`, `eps` and `fused`.
        weight_decay: decoupled decay, as in `adamw`.
        mask: which parameters decay.

    Examples:
        >>> tx = amsgrad(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([-0.1000])}

    Reference: Reddi et al., 2018 <https://openreview.net/forum?id=ryQu7f-RZ>; `torch.optim.Adam(amsgrad=True)`.
    """
    rate, filter = checked_rate(learning_rate), fixed_filter(mask)
    return _checked(Adam(rate, b1, b2, eps, 0.0, weight_decay, filter, amsgrad=True, fused=fused, label="amsgrad"))


@checked(OptimError)
def scale_by_adam(
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    eps_root: NonNegative[Scalar] = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    r"""Adam's direction $\hat m / (\sqrt{\hat v} + \epsilon)$, without a learning rate and uphill.

    Examples:
        >>> tx = scale_by_adam()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([1.0000])}

    Reference: `optax.scale_by_adam`.
    """
    return _checked(Adam(None, b1, b2, eps, eps_root, nesterov=nesterov, mu_dtype=mu_dtype, label="scale_by_adam"))


@checked(OptimError)
def scale_by_amsgrad(
    b1: Decay[Scalar] = 0.9, b2: Decay[Scalar] = 0.999, eps: NonNegative[Scalar] = 1e-8
) -> GradientTransformation:
    """AMSGrad's direction, without a learning rate and uphill; see `amsgrad`.

    Examples:
        >>> tx = scale_by_amsgrad()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([1.0000])}
    """
    return _checked(Adam(None, b1, b2, eps, amsgrad=True, label="scale_by_amsgrad"))


def check_betas(owner: str, **betas: Scalar) -> None:
    """Refuse decay rates outside [0, 1). Tensors are not checked, because reading one would wait for the device."""
    for name, value in betas.items():
        if not isinstance(value, Tensor) and not 0.0 <= value < 1.0:
            raise OptimError(
                explain(
                    f"{owner}: {name} must be in [0, 1)", where=f"{name}={value!r}", why="it is the decay of an average"
                )
            )


def _checked(tx: Adam) -> Adam:
    check_betas(tx.label, b1=tx.b1, b2=tx.b2)
    unfit = tx.nesterov or tx.mu_dtype is not None or not is_zero(tx.eps_root)
    if tx.fused and (unfit or any(isinstance(x, Tensor) for x in (tx.b1, tx.b2, tx.eps))):
        raise OptimError(
            explain(
                "the fused kernel takes b1, b2 and eps as numbers, and neither nesterov, eps_root nor mu_dtype",
                where=repr(tx),
                instead=f"{tx.label}(1e-3)   # without fused=True",
            )
        )
    return tx
