"""`Binding`: tensors in the places of a module's parameters and buffers, for the duration of a `with` block.

Owns what `bind` does on entering and on leaving, and the bindings of recomputations. `bind` is the same with its
arguments checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from purestep import _torch, transforms
from purestep.errors import StepError, explain
from purestep.functional import active
from purestep.functional.active import here
from purestep.module_tensors import Definition, module_of, slots
from purestep.random.host_draws import Guard
from purestep.random.torch_mode import Handler, Key
from purestep.random.torch_random import KeyedRandom

Tensors = Mapping[str, Tensor]
Around = Callable[[], contextlib.AbstractContextManager[Any]]
T = TypeVar("T")
_RECOMPUTED = explain(
    "random numbers were drawn in the backward pass",
    why="a checkpoint that is not torch's own recomputes dropout without the keys of the forward pass",
    instead="return ps.checkpoint(block, x)    # or torch.utils.checkpoint.checkpoint",
)
_REFUSING = KeyedRandom(None, refusal=_RECOMPUTED)


class Binding:
    """What `bind` documents.

    Args:
        module, params, buffers, rng, train, around, handlers: as of `bind`.

    Attributes:
        held: whether the tensors stay in their places for the backward pass, until `let_go`.
    """

    def __init__(
        self,
        module: nn.Module | Definition,
        params: Tensors,
        buffers: Tensors | None = None,
        *,
        rng: Key = None,
        train: bool = True,
        around: Around | None = None,
        handlers: Mapping[Any, Handler] | None = None,
    ) -> None:
        self.module = module_of(module)
        self.given = {**params, **(buffers or {})}
        self.buffer_names = list(buffers or ())
        self.train = train
        self.around = around
        self.mode = KeyedRandom(rng, handlers=handlers)
        self.first_call = 0
        self.exclusive = True
        self.new_buffers: dict[str, Tensor] = {}
        self.slots = slots(self.module)
        self.repeat = self.held = False
        if self.given.keys() != self.slots.names:
            # Parameters may have been tied, added or removed since.
            self.slots = slots(self.module, fresh=True)
            if self.given.keys() != self.slots.names:
                raise self._name_error()
        self.host = Guard(self.slots.habits, self.mode)

    def run(self, body: Callable[[nn.Module], T], function: Callable[..., Any] | None = None) -> T:
        """Call a function with the bound model, and once more where the first call drew from generators of the host.

        The first call to do so shows that a model has to be seeded from the key; later ones are seeded at once. A
        `with` block, which cannot be run again, raises RandomnessError where the model has not drawn from its first
        call on.

        Args:
            body: called with the bound model.
            function: what it calls, where it is another function each time: its calls that draw nothing from torch's
                generators need not be under the mode.
        """
        self.host.repeatable = True
        self.host.torch_habits = None if function is None else self.slots.torch_habits(function, self.train)
        while True:
            with self as net:
                out = body(net)
            if not self.repeat:
                return out

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

    # --- entering -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> nn.Module:
        if self.exclusive:
            self.slots.lock.acquire()
        self._saved: list[Any] = []
        self._rnn_saved: list[tuple[Any, Any]] = []
        self._flags: list[nn.Module] = []
        self._context: contextlib.AbstractContextManager[Any] | None = None
        reached = 0
        try:
            self.host.enter()
            reached = 2  # what `_put` has not done yet, `_take_out` leaves alone
            self._put()
            if self.around is not None:
                self._context = self.around()
                self._context.__enter__()
            reached = 3
            if self.host.keyed:
                self.mode.calls, self.mode.met = self.first_call, False
                self.mode.__enter__()
        except BaseException as error:
            failure = type(error), error, error.__traceback__
            exits = (
                self._release,
                lambda: self.host.exit(True),
                self._take_out,
                lambda: self._leave_context(*failure),
            )
            with contextlib.ExitStack() as stack:  # one that fails keeps none of the others from being reached
                for leave in exits[: reached + 1]:
                    stack.callback(leave)
            raise
        return self.module

    def _put(self) -> None:
        stack, found = here.active, self.slots
        if stack and stack[-1].held and self.exclusive and here.scope is not None:
            stack[-1].let_go()  # it waits for a backward pass, before which the forward pass goes on
        given = self._given() if self.buffer_names else self.given
        self._versions = {} if found.writes_nothing else self._counted()
        saved = self._saved
        for name, place, key in found.places:
            saved.append(place[key])
            place[key] = given[name]
        if found.rnns:
            self._rnn_saved = [(m, _torch.flat_weights(m)) for m in found.rnns]
            for rnn in found.rnns:
                _torch.link_flat_weights(rnn)
        # In training mode the flags of submodules are respected, so a frozen BatchNorm stays frozen.
        if not self.train or not self.module.training:
            self._flags = [m for m in self.module.modules() if m.training != self.train]
            for m in self._flags:
                m.__dict__["training"] = self.train
        active.push(self)

    def _given(self) -> dict[str, Tensor]:
        """Return what is put: a buffer may be written by the module; a frozen parameter among them is never written."""
        return self.given | {n: self.given[n].clone() for n in self.buffer_names if n in self.slots.buffers}

    def _counted(self) -> dict[str, int | None]:
        """Return how often each parameter was written into, as far as torch counts it here."""
        return {name: _torch.writes(self.given[name]) for name in self.slots.params}

    # --- leaving ------------------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stays = False
        try:
            try:
                if self.host.keyed:
                    self.mode.__exit__(kind, error, trace)
            finally:
                try:
                    if self._context is not None:
                        self._leave_context(kind, error, trace)
                finally:
                    if self.buffer_names:
                        self._keep_buffers()
                    stays = kind is None and self._may_stay()
                    if not stays:
                        self._take_out()
                    if kind is None and not self.slots.writes_nothing:
                        self._check_written()
                    self.repeat = self.host.exit(error is not None)
            scope = here.scope
            if scope is not None and not self.repeat:
                scope.append(self)
                self.held = stays
        finally:
            if not self.held:
                if stays:
                    self._take_out()
                self._release()

    def _leave_context(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, trace)

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
        active.pop(self)
        for (_, place, key), tensor in zip(self.slots.places, self._saved, strict=False):
            place[key] = tensor
        for m in self._flags:
            m.__dict__["training"] = not self.train
        for rnn, weights in self._rnn_saved:
            _torch.put_flat_weights(rnn, weights)

    def _release(self) -> None:
        if self.exclusive:
            self.slots.lock.release()

    # --- the backward pass --------------------------------------------------------------------------------------------

    def _may_stay(self) -> bool:
        """Tell whether the tensors may stay in place until the backward pass is done: it is the only call of its
        forward pass so far, nothing else surrounded it, and no buffer was put that a recomputation would change."""
        scope = here.scope
        return (
            scope is not None
            and not scope
            and not self.host.keyed
            and self._context is None
            and not self.slots.buffers
            and len(here.active) == 1
        )

    def let_go(self) -> None:
        """Put back what was in the places of tensors that were held for the backward pass."""
        if self.held:
            self.held = False
            try:
                self._take_out()
            finally:
                self._release()

    def guard_of_backward(self) -> Guard:
        """Return what watches the generators in the backward pass of a binding that is held: it refuses draws."""
        return self.host.following(_REFUSING)

    def repeating(self) -> Callable[[], Binding]:
        """Return what makes the binding of a recomputation of what comes next."""
        calls, mark = self.mode.calls, self.host.mark()
        return lambda: self.again(calls, mark)

    def again(self, calls: int, mark: Callable[[], Any] = lambda: None) -> Binding:
        """Return this binding for a recomputation in the backward pass: updates of buffers are thrown away.

        Args:
            calls: how many random operations came before what is recomputed.
            mark: gives the generators of the host as they were then, see `Guard.mark`.
        """
        repeated = object.__new__(Binding)
        repeated.__dict__.update(self.__dict__)
        repeated.new_buffers = {}
        repeated.first_call = calls
        repeated.held = False
        repeated.mode = KeyedRandom(self.mode.key, handlers=self.mode.handlers)
        repeated.host = self.host.replaying(repeated.mode, mark)
        # It may run on a thread of the autograd engine, while the thread that waits for the gradient holds the lock.
        repeated.exclusive = False
        return repeated

    def silent(self, others: list[Binding]) -> Binding:
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
