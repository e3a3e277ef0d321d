"""The compiled function: trace once, compile, call with flat leaves.

Owns `Jit`, its cache and its call path: flatten, look up, run, unflatten. `trace` makes graphs, `donation_graph` their
epilogue, `backends` the functions that run them; a Step of several microbatches goes through `step`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from purestep import _torch, transforms, tree
from purestep._lazy import Uncollected
from purestep.donation import consume, leaves_apart, memory_of, unaliased
from purestep.errors import RandomnessError, TraceError, explain
from purestep.jit import backends, cache_key, donation_graph, errors
from purestep.jit._torch import load_tracer, set_grad_enabled
from purestep.jit.donation_graph import Layout
from purestep.jit.progress import progress
from purestep.jit.reads import Guard
from purestep.jit.static_arguments import Statics
from purestep.jit.trace import Traced, trace
from purestep.sharding.plan import Plan
from purestep.step_protocol import (
    AnyStep,
    StepFacts,
    StepFn,
    bare,
    facts_of,
    following,
    name_of,
    resliced,
    signature_of,
)
from purestep.tree import Structure

log = logging.getLogger("purestep.jit")
_MANY = 8
Unjittable = Literal["error", "eager"]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Names = Callable[[], list[str]]
# The part of a signature besides the leaves: settings of torch, and static arguments.
Extra = tuple[Hashable, tuple[tuple[str, type, Any], ...]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One compiled signature.

    Attributes:
        run: the compiled graph.
        takes: picks the tensors among the leaves of a call; None if all leaves are tensors.
        pick: picks the leaves of the result among (outputs, leaves, constants).
        layout: where the leaves of the result come from.
        structure: structure of the result.
        graph: the traced graph, for `Jit.graph`.
        held: static objects that the signature compares by identity, kept alive here.
        fixed: whether only the first argument holds such objects.
        guards: values of the batch that are constants of the graph.
    """

    run: backends.Run | None
    takes: Callable[[Sequence[Any]], Sequence[Any]] | None
    pick: Callable[[Sequence[Any]], Sequence[Any]]
    layout: Layout
    structure: Structure
    graph: fx.GraphModule | None
    held: tuple[Any, ...]
    fixed: bool
    guards: tuple[Guard, ...] = ()

    def broken(self, leaves: list[Any]) -> Guard | None:
        """Return the first guard that a call does not pass."""
        if not self.guards:
            return None
        tensors = leaves if self.takes is None else self.takes(leaves)
        return next((guard for guard in self.guards if not guard.holds(tensors)), None)

    def __call__(self, leaves: list[Any]) -> Sequence[Any]:
        """Run on the leaves of the arguments and return the leaves of the result."""
        tensors = leaves if self.takes is None else self.takes(leaves)
        grad = torch.is_grad_enabled()
        if grad:
            set_grad_enabled(False)
        try:
            outputs = self.run([*tensors])  # type: ignore[misc]
        finally:
            if grad:
                set_grad_enabled(True)
        return self.pick((*outputs, *leaves, *self.layout.constants))


@dataclasses.dataclass(frozen=True)
class _Last:
    """The state that the last call returned: if the next call passes it unchanged, its signature is known."""

    state: weakref.ref[object]
    leaves: tuple[Any, ...]
    structure: Structure
    rest: list[Hashable]
    extra: Extra
    entry: Entry
    owned: frozenset[int]


class Jit(AnyStep):
    """A compiled function. Made by `jit`; call it like the function.

    Attributes:
        function: the function.
        donate: whether the first argument is consumed.
        backend: name of the backend.
        retraces: the reason of each trace but the first, in order.
        refusals: with `unjittable="eager"`, the reason for each signature that runs uncompiled.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        donate: bool,
        backend: str,
        static: Sequence[int | str],
        mode: str | None,
        *,
        reads: bool = True,
        unjittable: Unjittable = "error",
    ) -> None:
        self.function = function
        self.__name__ = name_of(function)
        self.__doc__ = function.__doc__
        self.__signature__ = signature_of(function)
        self.donate, self.backend, self.mode = donate, backend, mode
        self.reads, self.unjittable = reads, unjittable
        self._statics = Statics(function, static)
        self._is_step = isinstance(function, AnyStep)
        self._lock = threading.RLock()
        self._fell_back = False
        self.clear()

    def clear(self) -> None:
        """Forget everything that was compiled."""
        self._entries: dict[Hashable, list[Entry]] = {}
        self._shapes: list[cache_key.Shape] = []
        self._last: _Last | None = None
        self.retraces: tuple[str, ...] = ()
        self.refusals: tuple[str, ...] = ()

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in (("donate", self.donate), ("backend", self.backend)))
        return f"jit({self.function!r}, {options})"

    # --- as a step ----------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> StepFacts:
        """Facts of the function, with the backend and the donation of this one."""
        return dataclasses.replace(facts_of(self.function), donate=self.donate, backend=self.backend)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return bare(self.function, microbatches)

    def with_microbatches(self, count: int) -> Jit:
        return Jit(resliced(self.function, count), self.donate, self.backend, (), self.mode, unjittable=self.unjittable)

    def under(self, plan: Plan) -> StepFn:
        return self

    def identity(self) -> Callable[..., Any]:
        """Return the plain function, which a snapshot records: compilation is not part of the identity of a step."""
        return self.function

    # --- calling ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if transforms.active() or _torch.dispatch_modes() > 0:
            # Inside a transform or another trace, the plain function runs.
            return self.function(*args, **kwargs)
        if self._is_step and len(args) == 2:
            args = args[0], following(*args)
        args, kwargs, extra = self._split(args, kwargs)
        leaves, structure = tree.flatten((args, kwargs))
        last = self._last
        if last is not None and args and last.state() is args[0]:
            entry = self._again(last, leaves, structure, extra)
            if entry is not None:
                if self.donate:
                    n = len(last.leaves)
                    leaves[n:] = leaves_apart(leaves[n:], last.owned)
                return self._run(entry, args, leaves, structure, extra, last)
        entry = self._find(args, kwargs, leaves, structure, extra)
        if entry.run is None:
            return self._statics.bound(self.function, extra[1])(*args, **kwargs)
        if self.donate:
            leaves = unaliased(leaves, entry.layout.state_leaves)
        return self._run(entry, args, leaves, structure, extra, None)

    def _split(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs, Extra]:
        """Return the traced arguments, and the rest of the signature: settings of torch and static arguments."""
        if not self._statics:
            return args, kwargs, (cache_key.ambient(), ())
        args, kwargs, given = self._statics.split(args, kwargs)
        return args, kwargs, (cache_key.ambient(), given)

    def _again(self, last: _Last, leaves: list[Any], structure: Structure, extra: Extra) -> Entry | None:
        """Return the entry of the last call if only the contents of the batch differ in this call."""
        n = len(last.leaves)
        if (
            all(map(operator.is_, last.leaves, leaves))
            and [cache_key.leaf_signature(leaf) for leaf in leaves[n:]] == last.rest
            and extra == last.extra
            and structure == last.structure
            and last.entry.broken(leaves) is None
        ):
            return last.entry
        return None

    def _run(
        self,
        entry: Entry,
        args: Args,
        leaves: list[Any],
        structure: Structure,
        extra: Extra,
        last: _Last | None,
    ) -> Any:
        if not self.donate:
            found = entry(leaves)
            result = tree.unflatten(entry.structure, found)
        else:
            try:
                found = entry(leaves)
            except BaseException:
                consume(args[0], f"{self.__name__}, which failed while it wrote over it")
                raise
            result = tree.unflatten(entry.structure, found)
            consume(args[0], self.__name__)
        n = entry.layout.state_leaves
        if n and entry.fixed:
            self._remember(
                entry, result if entry.layout.alone else result[0], found[:n], leaves[n:], structure, extra, last
            )
        return result

    def _remember(
        self,
        entry: Entry,
        state: object,
        found: Sequence[Any],
        others: list[Any],
        structure: Structure,
        extra: Extra,
        last: _Last | None,
    ) -> None:
        try:
            reference = weakref.ref(state, self._forget)
        except TypeError:
            return
        if last is not None:
            rest, owned = last.rest, last.owned
        else:
            rest = [cache_key.leaf_signature(leaf) for leaf in others]
            owned = memory_of(found) if self.donate else frozenset()
        self._last = _Last(reference, tuple(found), structure, rest, extra, entry, owned)

    def _forget(self, reference: weakref.ref[object]) -> None:
        last = self._last
        if last is not None and last.state is reference:
            self._last = None

    # --- looking up and compiling -------------------------------------------------------------------------------------

    def _find(self, args: Args, kwargs: Kwargs, leaves: list[Any], structure: Structure, extra: Extra) -> Entry:
        cache_key.check_whole(leaves, lambda: self._paths(args, kwargs))
        objects = cache_key.static_values((args, kwargs))
        signatures = tuple([cache_key.leaf_signature(leaf) for leaf in leaves])
        key = (structure, extra, tuple(map(cache_key.fingerprint, objects)), signatures)
        try:
            entry, _ = self._fitting(key, leaves)
        except TypeError:
            cache_key.check_leaves(leaves, lambda: self._paths(args, kwargs))
            raise
        if entry is None:
            with self._lock:
                entry, broken = self._fitting(key, leaves)
                if entry is None:
                    # A mode of the caller must not see the operations of a trace.
                    with _torch.disable_current_modes():
                        load_tracer()
                        with Uncollected():
                            entry = self._build(args, kwargs, leaves, structure, extra, objects, broken)
                    self._entries.setdefault(key, []).append(entry)
        return entry

    def _fitting(self, key: Hashable, leaves: list[Any]) -> tuple[Entry | None, Guard | None]:
        """Return the entry of a signature whose guards a call passes; else None and a guard that the call fails."""
        broken = None
        for entry in self._entries.get(key, ()):
            broken = entry.broken(leaves)
            if broken is None:
                return entry, None
        return None, broken

    def _build(
        self,
        args: Args,
        kwargs: Kwargs,
        leaves: list[Any],
        structure: Structure,
        extra: Extra,
        objects: list[Any],
        broken: Guard | None,
    ) -> Entry:
        names = functools.cache(lambda: self._paths(args, kwargs))
        cache_key.check_leaves(leaves, names)
        # A dry run on meta tensors runs the graph eagerly, because it would run a compiled one only once.
        dry = any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves)
        if not dry:
            self._explain_retrace(cache_key.Shape.of(names(), leaves, extra[1]), broken)
        with progress(self.__name__) as note:
            backend = "eager" if self._fell_back or dry else self.backend
            note(f"tracing {len(leaves)} leaves")
            try:
                traced, layout = self._traced(args, kwargs, leaves, structure, extra, names)
            except (TraceError, RandomnessError) as error:
                if self.unjittable == "error":
                    raise
                self.refusals = (*self.refusals, str(error))
                log.warning("%s runs uncompiled: %s", self.__name__, error)
                return _uncompiled(structure, objects)
            note(f"compiling {len(traced.graph.graph.nodes)} operations with {backend}")
            try:
                run = backends.compile(traced, backend, self.mode, donated=layout.state_leaves if self.donate else 0)
            except Exception as error:
                if not errors.no_compiler(error):
                    raise errors.not_compiled(self.__name__, backend, error) from error
                self._fell_back = True
                warnings.warn(errors.no_compiler_message(self.__name__, error), stacklevel=5)
                traced, layout = self._traced(args, kwargs, leaves, structure, extra, names)
                run = backends.compile(traced, "eager", None, donated=0)
        takes = None if len(traced.takes) == len(leaves) else _picker(traced.takes)
        fixed = not cache_key.static_values((args[1:], kwargs))
        return Entry(
            run,
            takes,
            _picker(layout.picks),
            layout,
            traced.structure,
            traced.graph,
            tuple(objects),
            fixed,
            traced.guards,
        )

    def _traced(
        self,
        args: Args,
        kwargs: Kwargs,
        leaves: list[Any],
        structure: Structure,
        extra: Extra,
        names: Callable[[], list[str]],
    ) -> tuple[Traced, Layout]:
        function = self._statics.bound(self.function, extra[1])
        traced = trace(
            function,
            leaves,
            structure,
            paths=names,
            static=cache_key.static_values((args, kwargs)),
            state_leaves=len(tree.leaves(args[0])) if self.reads and args else None,
        )
        first = args[0] if args else None
        layout = donation_graph.epilogue(traced, first, len(leaves), donate=self.donate, name=self.__name__)
        return traced, layout

    def _paths(self, args: Args, kwargs: Kwargs) -> list[str]:
        named = self._statics.names(len(args))
        roots = [*zip(named, args, strict=True), *((k, kwargs[k]) for k in sorted(kwargs))]
        return [path for name, value in roots for path in tree.paths(value, name)]

    def _explain_retrace(self, shape: cache_key.Shape, broken: Guard | None) -> None:
        if self._shapes:
            reason = cache_key.why(shape, self._shapes) if broken is None else f"another value than {broken}"
            self.retraces = (*self.retraces, reason)
            log.info("%s is traced again: %s", self.__name__, reason)
            if len(self.retraces) == _MANY + 1:
                warnings.warn(
                    explain(
                        f"{self.__name__} was traced more than {_MANY} times again, and each time costs a compilation",
                        where=reason,
                        why="one is kept for each combination of structure, shapes, dtypes and Python values",
                        instead="pad batches to a few fixed sizes\n"
                        "keep what differs from batch to batch a tensor, instead of reading its value\n"
                        "make a number that changes a tensor: torch.tensor(0.1)\n"
                        "all reasons are in step.retraces",
                    ),
                    stacklevel=6,
                )
        self._shapes.append(shape)

    # --- ahead of time ------------------------------------------------------------------------------------------------

    def compile(self, *args: Any, **kwargs: Any) -> Jit:
        """Compile for the signature of these arguments without running anything; they are not consumed.

        Returns:
            The compiled function itself.
        """
        self._entry_for(args, kwargs)
        return self

    def graph(self, *args: Any, **kwargs: Any) -> str:
        """Return the traced graph of a call as code, the epilogue of a donation included."""
        graph = self._entry_for(args, kwargs).graph
        return "" if graph is None else graph.print_readable(print_output=False)

    def _entry_for(self, args: Args, kwargs: Kwargs) -> Entry:
        args, kwargs, extra = self._split(args, kwargs)
        leaves, structure = tree.flatten((args, kwargs))
        return self._find(args, kwargs, leaves, structure, extra)


def _uncompiled(structure: Structure, objects: list[Any]) -> Entry:
    """Return the entry of a signature that runs uncompiled."""
    return Entry(None, None, _picker(()), Layout((), (), 0, False), structure, None, tuple(objects), False)


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    if len(positions) >= 2:
        return operator.itemgetter(*positions)
    return lambda values: tuple([values[p] for p in positions])
