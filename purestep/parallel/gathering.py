"""One microbatch of a model whose parameters are split over ranks: its gathers, and the sums of its gradients."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from purestep.accumulate import Accumulation, Gradients
from purestep.parallel.shares import Shares
from purestep.sharding import collectives, place, tensor
from purestep.sharding.gather import Session, Unit, Units
from purestep.sharding.plan import Plan
from purestep.sharding.reduce import Flat, Flats, arrived, rows_of, send
from purestep.treesum import Node


class Gathering:
    """One microbatch of a model whose parameters are split: what the step asks for, and the sums that come of it.

    Args:
        shares: who computes what.
        sums: what is added and divided.
        split: split leaves (DTensors) by name.
        turn: of this rank and its group.
        index: of the microbatch. An empty one is run on other data, because the others need this rank's parts.
    """

    def __init__(self, shares: Shares, sums: Accumulation, split: Mapping[str, Tensor], turn: int, index: int) -> None:
        self.shares, self.sums, self.split, self.index = shares, sums, split, index
        self.owners = shares.turn(turn)
        self.fast = shares.plan.reduction == "fast"
        self.counts = index < shares.filled
        self.weight: Any = None
        self._sent: dict[int, Any] = {}
        self._late: dict[int, Tensor] = {}
        self._widths: dict[int, Tensor] = {}
        self.reduced: Callable[[Any], Any] = lambda grads: grads
        self.like: Flats = []

    def bound(self, cast: Any, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
        """Return the tensors that the model is bound to, params and buffers, and what makes the context it runs in."""
        parts = {n: (params if n in params else buffers)[n] for n in self.split}
        self.reduced = cast.reduced
        self.units = units_of(self.shares.plan, cast.module, self.split, parts, params)
        wrap = wrapping(self.shares.plan, self.split)
        self.session = Session(self.units, parts, self.sink, wrap)
        return *_given(self.session, params, buffers), functools.partial(both, self.session.around, cast.around)

    def gathered(self, view: Any) -> Any:
        """Return the state with all parameters whole, for a compiled piece: they stay until it has run."""
        params, buffers = view.params, view.buffers
        parts = {n: (params if n in params else buffers)[n] for n in self.split}
        self.units = units_of(self.shares.plan, view.model.module, self.split, parts, params)
        self.session = Session(self.units, parts, self.sink)
        pending = [
            collectives.gather(u.rows.pack([parts[n] for n in u.names]), self.units.group) for u in self.units.units
        ]
        known: dict[str, Tensor] = {}
        for unit, sent in zip(self.units.units, pending, strict=True):
            known.update(unit.rows.wholes(unit.rows.unpack(sent.wait())))
        return view.replace(
            params={n: known.get(n, t) for n, t in params.items()},
            buffers={n: known.get(n, t) for n, t in buffers.items()},
        )

    def taken(self, part: Gradients, view: Any) -> Gradients:
        """Take the gradients of whole parameters, as a compiled piece returns them; `part` with frozen parts again."""
        self.weight = part.weight
        for number, unit in enumerate(self.units.units):
            if unit.trained:
                self._late[number] = self._rows(unit, [part.grads[n] for n in unit.trained])
        buffers = {n: view.buffers[n] if n in self.split else t for n, t in part.buffers.items()}
        kept = {n: view.params[n] if n in self.split else g for n, g in part.grads.items()}
        return part.replace(buffers=buffers, grads=kept)  # type: ignore[attr-defined]

    def forward_done(self, weight: Any, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take note of what the microbatch weighs, before its backward pass; return the buffers with frozen parts."""
        self.weight = weight
        self.session.begin_backward()
        plain = {n: t.to_local() if place.is_split(t) else t for n, t in new.items()}  # type: ignore[attr-defined]
        return {n: old[n] if n in self.split else t for n, t in plain.items()}

    def sink(self, unit: Unit, grads: list[Tensor | None]) -> None:
        """Take the gradients of a unit, and send the others their parts; those of the root go last."""
        rows = self._rows(unit, grads)
        number = self.units.units.index(unit)
        if not unit.path:
            self._late[number] = rows
            return
        for before in [n for n, sent in self._sent.items() if isinstance(sent, tuple)]:
            self._sent[before] = self._arrived(*self._sent[before])
        self._sent[number] = self._send(rows)

    def _rows(self, unit: Unit, grads: list[Tensor | None]) -> Tensor:
        chosen = [unit.rows.by_name[n] for n in unit.trained]
        part = self.session.parts
        wholes = [
            torch.zeros(row.shape, dtype=part[row.name].dtype, device=part[row.name].device) if g is None else g
            for row, g in zip(chosen, grads, strict=True)
        ]
        with torch.no_grad():
            ready = self.sums.weighed(self.reduced(wholes), self.weight, self.index if self.counts else 0)
            rows = unit.rows.cut(ready, chosen)
        self._widths[self.units.units.index(unit)] = rows.new_empty(1).expand(rows.shape[1])
        return rows

    def _send(self, rows: Tensor) -> tuple[collectives.Pending, int]:
        group = self.units.group
        if self.fast:
            return collectives.scatter_sum(rows if self.counts else torch.zeros_like(rows), group), rows.shape[1]
        held = rows.unsqueeze(1) if self.counts else rows.unsqueeze(1)[:, :0]
        return send(held, self.owners, group), rows.shape[1]

    def _arrived(self, pending: collectives.Pending, n: int) -> dict[Node, Tensor]:
        if self.fast:
            return {(0, 0): pending.wait()}
        return {node: flats[0] for node, flats in arrived(pending, n, self.owners).nodes.items()}

    def finish(self, rest: Sequence[Tensor]) -> dict[Node, Flats]:
        """Exchange what is left, and return the sums over the group: one flat tensor a unit, and those of the rest."""
        flat = Flat(rest)
        pieces = [rows_of(x, self.units.units[0].rows.count) for x in flat.pack(rest)] if rest else []
        for number, unit in enumerate(self.units.units):
            if unit.trained and number not in self._sent:
                rows = self._late.get(number)
                self._sent[number] = self._send(self._rows(unit, [None] * len(unit.trained)) if rows is None else rows)
        sent = [self._sent[n] for n in sorted(self._sent)] + [self._send(rows) for rows in pieces]
        done = [self._arrived(*x) if isinstance(x, tuple) else x for x in sent]
        self.like = [self._widths[n] for n in sorted(self._widths)] + [
            rows.new_empty(1).expand(rows.shape[1]) for rows in pieces
        ]
        return {node: [part[node] for part in done] for node in done[0]}

    def parts(self, flats: Flats, rest: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the local gradients by name, and the rest whole, from the sums over all ranks."""
        units = [u for u in self.units.units if u.trained]
        found: dict[str, Tensor] = {}
        for unit, row in zip(units, flats, strict=False):
            chosen = [unit.rows.by_name[n] for n in unit.trained]
            found.update(zip(unit.trained, unit.rows.parts(row, chosen), strict=True))
        slices = [collectives.gather(x, self.units.group) for x in flats[len(units) :]]
        return found, Flat(rest).unpack([self._cropped(p.wait(), i, rest) for i, p in enumerate(slices)])

    def _cropped(self, gathered: Tensor, group: int, rest: Sequence[Tensor]) -> Tensor:
        return gathered.view(-1)[: sum(Flat(rest).lengths[group])]


def evaluated(plan: Plan, at_rest: Any, cast: Any, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
    """Return what a model is bound to without gradients: params, buffers, and what makes the context it runs in."""
    split = split_leaves(at_rest)
    if not split:
        return params, buffers, cast.around
    parts = {n: (params if n in params else buffers)[n] for n in split}
    units = units_of(plan, cast.module, split, parts, params)
    session = Session(units, parts, lambda unit, grads: None, wrapping(plan, split))
    return *_given(session, params, buffers), functools.partial(both, session.around, cast.around)


def wrapping(plan: Plan, split: Mapping[str, Tensor]) -> tensor.Wrapped | None:
    """Return what makes DTensors of whole parameters, where several ranks compute together."""
    return tensor.Wrapped(plan, split) if tensor.is_tensor_parallel(plan) else None


def _given(session: Session, *groups: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    known, wrap = session.tensors(), session.wrap or (lambda name, value: value)
    return tuple({n: known[n] if n in known else wrap(n, t) for n, t in group.items()} for group in groups)


def split_leaves(at_rest: Any) -> dict[str, Tensor]:
    """Return the parameters of a state of which ranks hold parts, trained and frozen, by name."""
    return {n: x for n, x in (at_rest.params | at_rest.buffers).items() if place.is_split(x)}


_units: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Units]]] = weakref.WeakKeyDictionary()


def units_of(plan: Plan, module: nn.Module, split: Any, parts: Any, trained: Any) -> Units:
    """Return the units of a model, made once for each plan and placement."""
    specs = [x._spec for x in split.values()]
    key = plan, tuple(split), tuple(id(spec) for spec in specs), tuple(parts[n].dtype for n in split), tuple(trained)
    known = _units.setdefault(module, {})
    if key not in known:
        # The specs are kept, so that nothing else can get their ids.
        known[key] = specs, Units(plan, module, split, parts, trained)
    return known[key][1]


@contextlib.contextmanager
def both(outer: Any, inner: Any) -> Iterator[None]:
    """Enter two contexts, of which the inner one may be missing."""
    with outer(), inner() if inner is not None else contextlib.nullcontext():
        yield
