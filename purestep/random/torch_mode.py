"""The torch function mode that redirects random operations to a key.

Owns `KeyedRandom` and what all handlers share. It knows no operation itself: `torch_layers` and `torch_samplers`
register theirs.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from purestep import random
from purestep._torch import OpOverload, OpOverloadPacket, innermost_mode
from purestep.errors import RandomnessError, explain

Handler = Callable[..., Any]
Key = Tensor | Callable[[], Tensor] | None
_handlers: dict[Any, Handler] = {}
_PURE = "a pure step never touches the global generators"
_local = threading.local()


def register(handlers: Mapping[Any, Handler]) -> None:
    """Add handlers: functions `(mode, func, *args, **kwargs)` by the function of torch they stand for."""
    _handlers.update(handlers)


def handlers() -> Mapping[Any, Handler]:
    """Return the handlers of the functions that draw, for a table of more functions."""
    return _handlers


Function = Callable[..., Any]  # of torch, that a handler stands for


class KeyedRandom(TorchFunctionMode):
    """Redirect torch's random operations to a key for the duration of a `with` block.

    While it is active, every random operation of torch (dropout of all kinds, attention and RNN dropout, `rand*`,
    `normal_`, ...) draws from `fold_in(key, n)`, n counting the calls. What has no keyed form is refused by name. Of
    several modes the innermost decides.

    Args:
        key: int64[2], or a function that makes it, which is called when it is first needed; or None: then a random
            operation raises RandomnessError.
        calls: how many random operations came before; recomputation restarts from the number it was at.
        refusal: text of the error that any random operation raises, in place of a draw.
        handlers: a table of more functions than those that draw; those alone by default.
        first: int64 [], a number that is added to those of the calls: in a trace, where it differs from call to call.

    Attributes:
        met: whether it has met a function of its table.

    Examples:
        >>> import torch.nn.functional as F
        >>> with KeyedRandom(random.key(0)):
        ...     x = F.dropout(torch.ones(4), 0.5)
        >>> torch.equal(x, random.dropout(random.fold_in(random.key(0), 0), torch.ones(4), 0.5))
        True
    """

    def __init__(
        self,
        key: Key,
        calls: int = 0,
        *,
        refusal: str | None = None,
        handlers: Mapping[Any, Handler] | None = None,
        first: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.key = key
        self.calls = calls
        self.first = first
        self.refusal = refusal
        self.handlers = _handlers if handlers is None else handlers
        self.covered = 0
        self.met = False

    def __enter__(self) -> KeyedRandom:
        entered = _entered()
        # A thread of the autograd engine has torch's modes of the thread that waits for it, and none of ours.
        outer = entered[-1][0] if entered else innermost_mode(KeyedRandom)
        outer = None if outer is self else outer
        if outer is not None:
            outer.covered += 1
        entered.append((self, outer))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _, outer = _entered().pop()
        if outer is not None:
            outer.covered -= 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        kinds: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        # What a handler of the innermost mode calls is no call of the model: another mode would change it once more.
        handler = None if self.covered else self.handlers.get(func)
        if handler is None:
            if type(func) in (OpOverload, OpOverloadPacket) and _is_seeded(func):
                handler = refused
            else:
                return func(*args, **kwargs) if kwargs else func(*args)
        self.met = True
        if kwargs and kwargs.get("generator") is not None:
            raise RandomnessError(
                explain(
                    f"{func.__name__} was given a torch.Generator inside a pure call",
                    why="a generator is hidden state that moves with every draw",
                    instead="leave generator= out: the draw then comes from the key of the call",
                )
            )
        return handler(self, func, *args, **(kwargs or {}))

    def next_key(self, name: str) -> Tensor:
        """Return the key of the next random operation, for a draw on any device; `name` is for the error."""
        key, number = self.taken(1, name)
        return random.fold_in(key, number if self.first is None else self.first + number)

    def taken(self, count: int, name: str) -> tuple[Tensor, int]:
        """Return the key, and the number of the first of the next random operations, which then have come before."""
        if self.refusal is not None:
            raise RandomnessError(self.refusal)
        if self.key is None:
            raise RandomnessError(
                explain(
                    f"the model drew random numbers ({name}), but was given no key",
                    why=_PURE,
                    instead="ps.apply(model, params, buffers, x, rng=ps.random.fold_in(state.rng, state.step))\n"
                    "or train=False, which switches dropout off",
                )
            )
        if not isinstance(self.key, Tensor):
            self.key = self.key()
        self.calls += count
        return self.key, self.calls - count

    def scaled_mask(self, name: str, shape: Sequence[int], p: float, like: Tensor) -> Tensor:
        """Return a tensor of 0 (with probability p) and 1 / (1 - p), of the dtype and device of `like`."""
        drop = random.bernoulli(self.next_key(name), p, shape, device=like.device)
        return torch.where(drop, 0.0, 0.0 if p == 1.0 else 1.0 / (1.0 - p)).to(like.dtype)


def _entered() -> list[tuple[KeyedRandom, KeyedRandom | None]]:
    """Return the modes that this thread has entered, the innermost last, each with the one that it covers."""
    if not hasattr(_local, "entered"):
        _local.entered = []
    return _local.entered


def innermost() -> KeyedRandom | None:
    """Return the mode that redirects random operations in this thread, if any does."""
    entered = _entered()
    return entered[-1][0] if entered else innermost_mode(KeyedRandom)


def undispatched(func: Callable[..., Any], **names: object) -> Callable[..., Any]:
    """Return a Python function of torch that runs its body under the modes that are active.

    torch hands such a function to the mode as a whole, and then runs its body without the mode, where randomness inside
    of it would come from the global generator.

    Args:
        func: a function that begins with a test of `has_torch_function`.
        **names: globals of its module to replace.
    """
    names["has_torch_function"] = lambda tensors: False
    # The same code with other globals: nothing of torch is changed, and what else it calls is torch's own.
    copied = types.FunctionType(
        func.__code__, {**func.__globals__, **names}, func.__name__, func.__defaults__, func.__closure__
    )
    copied.__kwdefaults__ = func.__kwdefaults__
    return copied


def _is_seeded(op: Any) -> bool:
    overloads = [op] if isinstance(op, OpOverload) else [getattr(op, name) for name in op.overloads()]
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def refused(mode: KeyedRandom, func: Callable[..., Any], /, *args: object, **kwargs: object) -> NoReturn:
    """Raise the error of an operation that has no keyed form."""
    raise RandomnessError(
        explain(
            f"{getattr(func, '__name__', repr(func))} draws from the global generator and has no keyed form",
            why=_PURE,
            instead="draw with ps.random (uniform, normal, ...) from a key that is passed in with the batch",
        )
    )


def rate(p: float, name: str) -> float:
    """Check a dropout probability."""
    if not 0.0 <= p <= 1.0:
        raise RandomnessError(explain("a dropout probability lies in [0, 1]", where=f"{name}: p={p}"))
    return float(p)
