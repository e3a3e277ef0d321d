"""Calling an `nn.Module` as a pure function: the one place that does it.

`bind` puts tensors in the places of a module's parameters and buffers for the duration of a `with` block and takes
them out again; `apply` is one such call. Buffers go in as clones, randomness comes from a key, and nothing of the
module is left changed. `grad`, `step` and users' own steps call it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from purestep import _torch, transforms
from purestep.arguments import checked
from purestep.errors import StepError, explain
from purestep.module_tensors import Definition as Definition
from purestep.module_tensors import Slots as Slots
from purestep.module_tensors import module_of
from purestep.module_tensors import slots as slots
from purestep.random.host_draws import Guard
from purestep.random.torch_mode import Handler, Key
from purestep.random.torch_random import KeyedRandom
from purestep.recompute import Contexts, Redirection

Tensors = Mapping[str, Tensor]
T = TypeVar("T")
_RECOMPUTED = explain(
    "random numbers were drawn in the backward pass",
    why="a checkpoint that is not torch's own recomputes dropout without the keys of the forward pass",
    instead="return ps.checkpoint(block, x)    # or torch.utils.checkpoint.checkpoint",
)

_local = threading.local()


def _stack(name: str) -> list[Any]:
    if not hasattr(_local, name):
        setattr(_local, name, [])
    return getattr(_local, name)


@checked(StepError, failed=True)
class bind:
    """Put tensors in the places of a module's parameters and buffers for the duration of a `with` block.

    Inside the block the module itself is the bound model: its `forward`, other methods and attributes all see the given
    tensors, and all randomness of torch comes from the key. On leaving, everything is put back, whatever happened.

    Args:
        module: any module. It is not changed: flags, tensors and hooks are as before afterwards.
        params: tensors by parameter name, as `named_parameters` has them (a tied one once, under its first name).
        buffers: tensors by buffer name; parameters that are not trained may be among them. Buffers are cloned first.
        rng: int64[2] key of everything random, or a function that makes it if it is needed; or None: then random
            operations raise RandomnessError.
        train: True runs in training mode (as `module.train()` would set it; if the module is in training mode already,
            the flags of its submodules are respected, so a frozen BatchNorm stays frozen). False runs in evaluation
            mode.
        around: makes a context that is entered in the block, and in every recomputation of it (hooks of a precision
            policy).
        handlers: a table of functions of torch that run otherwise in the block (see `KeyedRandom`); those that draw by
            default.

    Attributes:
        new_buffers: after the block, the buffers as the call left them, by name.

    Raises:
        StepError: a name is missing or unknown; or, on leaving, the model has written into a parameter.

    Examples:
        >>> model = nn.BatchNorm1d(2)
        >>> params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        >>> with bind(model, params, buffers) as net:
        ...     y = net(torch.ones(4, 2))
        >>> int(buffers["num_batches_tracked"]), int(net.num_batches_tracked)
        (0, 0)
    """

    def __init__(
        self,
        module: nn.Module | Definition,
        params: Tensors,
        buffers: Tensors | None = None,
        *,
        rng: Key = None,
        train: bool = True,
        around: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
        handlers: Mapping[Any, Handler] | None = None,
    ) -> None:
        _check_options(train, around, handlers)
        self.module = module_of(module)
        self.given = {**params, **(buffers or {})}
        self.buffer_names = list(buffers or {})
        self.train = train
        self.around = around or contextlib.nullcontext
        self.mode = KeyedRandom(rng, handlers=handlers)
        self.first_call = 0
        self.exclusive = True
        self.new_buffers: dict[str, Tensor] = {}
        self.slots = slots(self.module)
        self.repeat = False
        if not self._fits():
            # Parameters may have been tied, added or removed since.
            self.slots = slots(self.module, fresh=True)
            if not self._fits():
                raise self._name_error()
        self.host = Guard(self.slots.habits, self.mode)

    def run(self, body: Callable[[nn.Module], T]) -> T:
        """Call a function with the bound model, and once more where the first call drew from generators of the host.

        The first call to do so shows that a model has to be seeded from the key; later ones are seeded at once. A
        `with` block, which cannot be run again, raises RandomnessError where the model has not drawn from its first
        call on.
        """
        self.host.repeatable = True
        while True:
            with self as net:
                out = body(net)
            if not self.repeat:
                return out

    def _fits(self) -> bool:
        known = len(self.slots.params) + len(self.slots.buffers)
        return len(self.given) == known and all(
            n in self.given for group in (self.slots.params, self.slots.buffers) for n in group
        )

    def _name_error(self) -> StepError:
        known = self.slots.params.keys() | self.slots.buffers.keys()
        missing = [n for n in (*self.slots.params, *self.slots.buffers) if n not in self.given]
        unknown = [n for n in self.given if n not in known]
        return StepError(
            explain(
                f"the tensors do not fit the module {type(self.module).__qualname__}",
                where="; ".join(
                    f"{label}: {', '.join(map(repr, group[:5]))}{', ...' if len(group) > 5 else ''}"
                    for label, group in (("missing", missing), ("unknown", unknown))
                    if group
                ),
                why="every parameter and buffer has to be passed, because a pure call uses none of the module's own",
                instead="pass the params and buffers of a state made for this module: state = ps.init(model, tx)",
            )
        )

    def __enter__(self) -> nn.Module:
        if self.exclusive:
            self.slots.lock.acquire()
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._rnn_saved: list[tuple[Any, Any]] = []
        self._flags: list[nn.Module] = []
        reached = 0
        try:
            self.host.enter()
            reached = 2  # what `_put` has not done yet, `_take_out` leaves alone
            self._put()
            self._around = self.around()
            self._around.__enter__()
            reached = 3
            self.mode.calls = self.first_call
            self.mode.__enter__()
        except BaseException as error:
            failure = type(error), error, error.__traceback__
            exits = (
                self._release,
                lambda: self.host.exit(True),
                self._take_out,
                lambda: self._around.__exit__(*failure),
            )
            with contextlib.ExitStack() as stack:  # one that fails keeps none of the others from being reached
                for leave in exits[: reached + 1]:
                    stack.callback(leave)
            raise
        return self.module

    def _put(self) -> None:
        # A buffer may be written in place by the module; a frozen parameter among the buffers is never written.
        given = self.given | {n: self.given[n].clone() for n in self.buffer_names if n in self.slots.buffers}
        self._versions = {} if self.slots.writes_nothing else self._counted()
        for group in (self.slots.params, self.slots.buffers):
            for name, places in group.items():
                tensor = given[name]
                for place, key in places:
                    self._saved.append((place, key, place[key]))
                    place[key] = tensor
        self._rnn_saved = [(m, _torch.flat_weights(m)) for m in self.slots.rnns]
        for rnn in self.slots.rnns:
            _torch.link_flat_weights(rnn)
        # In training mode the flags of submodules are respected, so a frozen BatchNorm stays frozen.
        if not self.train or not self.module.training:
            self._flags = [m for m in self.module.modules() if m.training != self.train]
        for m in self._flags:
            m.__dict__["training"] = self.train
        _push(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self.mode.__exit__(kind, error, trace)
            finally:
                try:
                    self._around.__exit__(kind, error, trace)
                finally:
                    self._keep_buffers()
                    self._take_out()
                    if kind is None and not self.slots.writes_nothing:
                        self._check_written()
                    self.repeat = self.host.exit(error is not None)
            scope = getattr(_local, "scope", None)
            if scope is not None and not self.repeat:
                scope.append(self)
        finally:
            self._release()

    def _counted(self) -> dict[str, int | None]:
        """Return how often each parameter was written into, as far as torch counts it here."""
        return {name: _torch.writes(self.given[name]) for name in self.slots.params}

    def _check_written(self) -> None:
        """Refuse a model that writes into its parameters, as far as its first call shows it."""
        if written := [name for name, writes in self._counted().items() if writes != self._versions[name]]:
            raise StepError(
                explain(
                    "a model writes into its parameters while it is called",
                    where=", ".join(map(repr, written)),
                    why="the state that a call is given stays as it is: it may be kept, saved, or trained from again",
                    instead="F.embedding(ids, torch.renorm(net.embed.weight, 2, 0, max_norm))   # not max_norm= of the "
                    "layer\nself.register_buffer(...)   # for what a call changes",
                )
            )
        # A call on fake tensors, say, shows nothing of a parameter: then the next call is looked at, too.
        self.slots.writes_nothing = None not in self._versions.values()

    def _keep_buffers(self) -> None:
        for name in self.buffer_names:
            if name in self.slots.buffers:
                place, key = self.slots.buffers[name][0]
                self.new_buffers[name] = transforms.detached(place[key])
            else:
                self.new_buffers[name] = self.given[name]

    def _take_out(self) -> None:
        active = _stack("active")
        if active and active[-1] is self:
            _pop()
        for place, key, tensor in reversed(self._saved):
            place[key] = tensor
        for m in self._flags:
            m.__dict__["training"] = not self.train
        for rnn, weights in self._rnn_saved:
            _torch.put_flat_weights(rnn, weights)

    def _release(self) -> None:
        if self.exclusive:
            self.slots.lock.release()

    def again(self, calls: int, mark: Callable[[], Any] = lambda: None) -> bind:
        """Return this binding for a recomputation in the backward pass: updates of buffers are thrown away.

        Args:
            calls: how many random operations came before what is recomputed.
            mark: gives the generators of the host as they were then, see `Guard.mark`.
        """
        repeated = object.__new__(bind)
        repeated.__dict__.update(self.__dict__)
        repeated.new_buffers = {}
        repeated.first_call = calls
        repeated.mode = KeyedRandom(self.mode.key, handlers=self.mode.handlers)
        repeated.host = self.host.replaying(repeated.mode, mark)
        # It may run on a thread of the autograd engine, while the thread that waits for the gradient holds the lock.
        repeated.exclusive = False
        return repeated

    def silent(self, others: list[bind]) -> bind:
        """Return this binding for the backward pass, where torch does not say which call is recomputed.

        So random operations are refused, and of a module that was called with several sets of tensors those that
        differ are replaced by tensors without data, with which a recomputation fails instead of giving other numbers.
        """
        repeated = self.again(0)
        repeated.exclusive = True
        repeated.mode = KeyedRandom(None, refusal=_RECOMPUTED, handlers=self.mode.handlers)
        repeated.host = Guard(self.slots.habits, repeated.mode)
        same = [o.given for o in others if o.module is self.module and o is not self]
        if same:
            unclear = [n for n, t in self.given.items() if any(given.get(n) is not t for given in same)]
            repeated.given = self.given | {n: torch.empty_like(self.given[n], device="meta") for n in unclear}
        return repeated


def _check_options(train: object, around: object, handlers: object) -> None:
    """Refuse options of `bind` of another type: at every call, so by hand."""
    fine = isinstance(train, bool) and (around is None or callable(around))
    if not fine or not (handlers is None or isinstance(handlers, Mapping)):
        what = "train= is True or False, around= a function that makes a context, handlers= a table of functions"
        raise StepError(explain(what, where=f"train={train!r}, around={around!r}, handlers={handlers!r:.80}"))


@checked(StepError, failed=True)
def apply(
    module: nn.Module | Definition,
    params: Tensors,
    buffers: Tensors | None = None,
    *args: object,
    rng: Tensor | None = None,
    train: bool = True,
    **kwargs: object,
) -> tuple[Any, dict[str, Tensor]]:
    """Call a module as a pure function of its parameters, buffers and inputs.

    Args:
        module: any module, which is not changed; or the definition that a state carries, as `state.model`.
        params: tensors by parameter name.
        buffers: tensors by buffer name; they are not changed either.
        *args, **kwargs: what `module.forward` takes.
        rng: int64[2] key of dropout and all other randomness of the call.
        train: training or evaluation mode, see `bind`.

    Returns:
        What the module returns, and the buffers after the call.

    Raises:
        StepError: the names of the tensors do not fit the module.
        RandomnessError: the module draws random numbers and `rng` is None.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> y, buffers = apply(model, dict(model.named_parameters()), {}, torch.ones(4, 3))
        >>> y.shape, buffers
        (torch.Size([4, 2]), {})
    """
    bound = bind(module, params, buffers, rng=rng, train=train)
    out = bound.run(lambda net: net(*args, **kwargs))
    return out, bound.new_buffers


class gradient_scope:
    """Collect the bindings whose results are differentiated, so that `backward_scope` can restore them."""

    def __enter__(self) -> list[bind]:
        self.outer = getattr(_local, "scope", None)
        collected: list[bind] = []
        _local.scope = collected
        return collected

    def __exit__(self, *error: Any) -> None:
        _local.scope = self.outer


class backward_scope:
    """Make the bindings of the forward pass active in the backward pass, where checkpoints call the module again."""

    def __init__(self, collected: list[bind]) -> None:
        self.collected = collected
        self.entered: list[bind] = []

    def __enter__(self) -> None:
        self.outer, _local.scope = getattr(_local, "scope", None), None
        try:
            for bound in self.collected:
                repeated = bound.silent(self.collected)
                repeated.__enter__()
                self.entered.append(repeated)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            while self.entered:
                self.entered.pop().__exit__(*error)
        finally:
            _local.scope = self.outer


@checked(StepError, failed=True)
def checkpoint(function: Callable[..., Any], *args: object, **kwargs: Any) -> Any:
    """Run a function without storing its activations; the backward pass recomputes them (activation checkpointing).

    It is `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`. Inside a pure call that one, its reentrant form
    and `checkpoint_sequential` recompute as this does: dropout and other randomness is drawn from the same keys again,
    and the module sees the same bound parameters.

    Args:
        function: a module or function of tensors, called inside a pure call of a model.
        *args, **kwargs: its arguments.

    Returns:
        What the function returns.

    Examples:
        >>> from purestep import random
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = block
        ...     def forward(self, x):
        ...         return checkpoint(self.block, x)
        >>> net = Net()
        >>> y, _ = apply(net, dict(net.named_parameters()), {}, torch.ones(2, 4), rng=random.key(0))
        >>> y.shape
        torch.Size([2, 4])
    """
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    return torch_checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _recomputation() -> Contexts | None:
    """Return what makes the context in which what runs now can run again; None outside of pure calls."""
    active = list(_stack("active"))
    places = [(bound.mode.calls, bound.host.mark()) for bound in active]
    return (lambda: _Entered([b.again(*at) for b, at in zip(active, places, strict=True)])) if active else None


class _Entered(contextlib.ExitStack):
    """Several contexts, which are entered together."""

    def __init__(self, contexts: list[Any]) -> None:
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> Any:
        try:
            for context in self.contexts:
                self.enter_context(context)
        except BaseException:
            self.close()
            raise
        return self


_redirection = Redirection(_recomputation)


def _push(bound: bind) -> None:
    _stack("active").append(bound)
    _redirection.enter()


def _pop() -> None:
    _stack("active").pop()
    _redirection.leave()
