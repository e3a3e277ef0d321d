"""Keyed forms of the functions that create or fill tensors with random numbers, `torch.distributions` included.

Each handler has the signature of the function it stands for, after `(mode, func)`. Values have the distribution that
torch documents, not the bits of torch's generators.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from purestep import random
from purestep.arguments import Device
from purestep.errors import RandomnessError, explain
from purestep.random import _torch
from purestep.random.torch_mode import Function, KeyedRandom, refused


def _shape(sizes: tuple[Any, ...], size: int | Sequence[int] | None) -> tuple[Any, ...]:
    """Read a size given as `(2, 3)`, as `((2, 3),)` or as `size=`."""
    if size is not None:
        sizes = (size,)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return tuple(n if isinstance(n, torch.SymInt) else operator.index(n) for n in sizes)


def _finish(
    draw: Tensor,
    *,
    out: Tensor | None = None,
    device: Device | None = None,
    requires_grad: bool = False,
    **ignored: object,
) -> Tensor:
    """Put a draw where the keyword arguments of torch's factories want it; layout and pinning do not change values."""
    if out is not None:
        return out.resize_(draw.shape).copy_(draw)
    draw = draw.to(_place(device=device))
    return draw.requires_grad_() if requires_grad else draw


def _place(out: Tensor | None = None, device: Device | None = None, **ignored: object) -> Device:
    """Return the device that the keyword arguments of torch's factories want: draws are made there, not copied."""
    if out is not None:
        return out.device
    return torch.get_default_device() if device is None else device


def _open_unit(key: Tensor, like: Tensor) -> Tensor:
    """Draw float64 from the open interval (0, 1), symmetric about 1/2, in the shape and on the device of a tensor."""
    return (random.bits(key, like.shape, device=like.device).to(torch.float64) + 0.5) * 2.0**-32


def _creator(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def handler(
        mode: KeyedRandom,
        func: Function,
        *sizes: Any,
        size: int | Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Tensor:
        out = kwargs.get("out")
        dtype = dtype or (torch.get_default_dtype() if out is None else out.dtype)
        return _finish(_draw(draw, mode.next_key(name), _shape(sizes, size), dtype, _place(**kwargs)), **kwargs)

    return handler


def _like_creator(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def handler(
        mode: KeyedRandom,
        func: Function,
        input: Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: Device | None = None,
        **kwargs: Any,
    ) -> Tensor:
        place = input.device if device is None else device
        made = _draw(draw, mode.next_key(name), tuple(input.shape), dtype or input.dtype, place)
        return _finish(made, device=place, **kwargs)

    return handler


def _draw(
    draw: Callable[..., Tensor], key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: Device
) -> Tensor:
    if not dtype.is_complex:
        return draw(key, shape, dtype=dtype, device=device)
    parts = draw(key, (*shape, 2), dtype=dtype.to_real(), device=device)
    # torch's complex normal has variance 1 in all, half of it in each part.
    return torch.view_as_complex(parts * (math.sqrt(0.5) if draw is random.normal else 1.0))


def _randint(mode: KeyedRandom, func: Function, *args: Any, **kwargs: Any) -> Tensor:
    bounds = [a for a in args if not isinstance(a, (tuple, list))]
    sizes = [a for a in args if isinstance(a, (tuple, list))]
    size = sizes[0] if sizes else kwargs.pop("size")
    high = kwargs.pop("high", None)
    if high is None:
        high = bounds.pop()
    low = bounds[0] if bounds else kwargs.pop("low", 0)
    kwargs.pop("low", None)
    out, dtype = kwargs.get("out"), kwargs.pop("dtype", None)
    draw = random.randint(mode.next_key("randint"), _shape((), size), low, high, device=_place(**kwargs))
    return _finish(draw.to(dtype or (torch.int64 if out is None else out.dtype)), **kwargs)


def _randint_like(mode: KeyedRandom, func: Function, input: Tensor, *bounds: int, **kwargs: Any) -> Tensor:
    given = list(bounds)
    high = kwargs.pop("high", None)
    if high is None:
        high = given.pop()
    low = given[0] if given else kwargs.pop("low", 0)
    kwargs["device"] = kwargs.get("device") or input.device
    draw = random.randint(mode.next_key("randint_like"), input.shape, low, high, device=kwargs["device"])
    return _finish(draw.to(kwargs.pop("dtype", None) or input.dtype), **kwargs)


def _randperm(mode: KeyedRandom, func: Function, n: int, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    out = kwargs.get("out")
    dtype = dtype or (torch.int64 if out is None else out.dtype)
    return _finish(random.permutation(mode.next_key("randperm"), n, device=_place(**kwargs)).to(dtype), **kwargs)


def _bernoulli(
    mode: KeyedRandom,
    func: Function,
    input: Tensor,
    p: float | None = None,
    *,
    out: Tensor | None = None,
    **ignored: object,
) -> Tensor:
    key = mode.next_key("bernoulli")
    draw = random.bernoulli(key, input if p is None else p, input.shape, device=input.device).to(input.dtype)
    return draw if out is None else _finish(draw, out=out)


def _bernoulli_(mode: KeyedRandom, func: Function, input: Tensor, p: float | Tensor = 0.5, **ignored: object) -> Tensor:
    p = p.to(input.device) if isinstance(p, Tensor) else p
    return input.copy_(random.bernoulli(mode.next_key("bernoulli_"), p, input.shape, device=input.device))


def _normal(
    mode: KeyedRandom,
    func: Function,
    mean: float | Tensor = 0.0,
    std: float | Tensor = 1.0,
    size: int | Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Tensor:
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    shape = _shape((), size) if size is not None else torch.broadcast_shapes(*(t.shape for t in tensors))
    dtype = dtype or (tensors[0].dtype if tensors else torch.get_default_dtype())
    place = tensors[0].device if tensors else _place(**kwargs)
    noise = _draw(random.normal, mode.next_key("normal"), tuple(shape), dtype, place)
    with torch.no_grad():  # as in torch, samples are not a function of the parameters; rsample says that itself
        if tensors:
            draw = mean + std * noise
            return draw if kwargs.get("out") is None else _finish(draw, out=kwargs["out"])
        return _finish(mean + std * noise, **kwargs)


def _normal_(
    mode: KeyedRandom, func: Function, input: Tensor, mean: float = 0.0, std: float = 1.0, **ignored: object
) -> Tensor:
    key = mode.next_key("normal_")
    return input.copy_(_draw(random.normal, key, tuple(input.shape), input.dtype, input.device) * std + mean)


def _uniform_(
    mode: KeyedRandom, func: Function, input: Tensor, a: float = 0.0, b: float = 1.0, **kwargs: Any
) -> Tensor:
    low, high = kwargs.get("from", a), kwargs.get("to", b)
    key = mode.next_key("uniform_")
    if low == high:
        return input.fill_(low)
    drawn = random.uniform(key, input.shape, minval=low, maxval=high, dtype=input.dtype, device=input.device)
    return input.copy_(drawn)


def _random_(mode: KeyedRandom, func: Function, input: Tensor, *bounds: int, **kwargs: Any) -> Tensor:
    low, high = bounds if len(bounds) == 2 else (kwargs.get("from", 0), bounds[0] if bounds else kwargs.get("to"))
    if high is None:
        # As in torch: all values of an integer dtype that are not negative, all integers a floating dtype can hold.
        floating = input.is_floating_point()
        high = int(2 / torch.finfo(input.dtype).eps) + 1 if floating else torch.iinfo(input.dtype).max
        high = high if floating or input.dtype == torch.int64 else high + 1
    return input.copy_(random.randint(mode.next_key("random_"), input.shape, low, high, device=input.device))


def _inverse(name: str, quantile: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fill in place by the inverse of a distribution function, in float64."""

    def handler(mode: KeyedRandom, func: Function, input: Tensor, *args: float, **kwargs: Any) -> Tensor:
        kwargs.pop("generator", None)
        return input.copy_(quantile(_open_unit(mode.next_key(name), input), *args, **kwargs))

    return handler


def _exponential(unit: Tensor, lambd: float = 1.0) -> Tensor:
    return -torch.log(unit) / lambd


def _cauchy(unit: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * torch.tan(math.pi * (unit - 0.5))


def _geometric(unit: Tensor, p: float) -> Tensor:
    return torch.ceil(torch.log(unit) / math.log1p(-p)).clamp(min=1)


def _log_normal_(
    mode: KeyedRandom, func: Function, input: Tensor, mean: float = 1.0, std: float = 2.0, **ignored: object
) -> Tensor:
    key = mode.next_key("log_normal_")
    noise = random.normal(key, input.shape, dtype=torch.float64, device=input.device)
    return input.copy_(torch.exp(noise * std + mean))


def _multinomial(
    mode: KeyedRandom,
    func: Function,
    input: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    out: Tensor | None = None,
    **ignored: object,
) -> Tensor:
    key, logits = mode.next_key("multinomial"), input.detach().to(torch.float64).log()
    if replacement:
        draw = random.categorical(key, logits, shape=(num_samples,)).movedim(0, -1)
    else:
        if num_samples > input.shape[-1]:
            raise RandomnessError(
                explain(
                    "multinomial cannot draw more than there is without replacement",
                    where=f"num_samples={num_samples}, categories: {input.shape[-1]}",
                    instead="torch.multinomial(probs, n, replacement=True)",
                )
            )
        # The largest Gumbel-perturbed logits are a sample without replacement.
        gumbel = -torch.log(-torch.log(_open_unit(key, input)))
        draw = torch.topk(logits + gumbel, num_samples, dim=-1).indices
    return draw if out is None else _finish(draw, out=out)


def _lobpcg(mode: KeyedRandom, func: Function, *args: object, **kwargs: object) -> object:
    given = args[3] if len(args) > 3 else kwargs.get("X")
    return refused(mode, func) if given is None else func(*args, **kwargs)


_REFUSED = (
    torch.svd_lowrank,
    torch.pca_lowrank,
    torch.poisson,
    torch.binomial,
    torch.miopen_rnn,
    _torch.standard_gamma,
    _torch.sample_dirichlet,
    torch.rrelu_,
    torch.alpha_dropout_,
    torch.feature_alpha_dropout_,
    torch.feature_dropout_,
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
)

HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.rand: _creator("rand", random.uniform),
    torch.randn: _creator("randn", random.normal),
    torch.rand_like: _like_creator("rand_like", random.uniform),
    torch.randn_like: _like_creator("randn_like", random.normal),
    torch.randint: _randint,
    torch.randint_like: _randint_like,
    torch.randperm: _randperm,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.normal: _normal,
    torch.Tensor.normal_: _normal_,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.random_: _random_,
    torch.Tensor.exponential_: _inverse("exponential_", _exponential),
    torch.Tensor.cauchy_: _inverse("cauchy_", _cauchy),
    torch.Tensor.geometric_: _inverse("geometric_", _geometric),
    torch.Tensor.log_normal_: _log_normal_,
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
    torch.lobpcg: _lobpcg,
    **dict.fromkeys(_REFUSED, refused),
}
