"""In which order the ranks of a group gather and reduce the units of a model.

A collective has no name: ranks that gathered different units at the same moment would compute with each other's
parameters, or wait for ever. So in the first microbatch the ranks exchange, before each collective, which one each of
them needs next. Where all needed the same, in a microbatch that called every unit, that sequence is agreed on, and each
rank follows it without asking. Where they did not, they go on asking. `fsdp` units call it; it moves no parameter.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from purestep.distributed import collectives
from purestep.errors import RankError, explain

_END = -1  # on the wire: this rank needs no collective of the phase any more


class Op(NamedTuple):
    """A collective: the gather of a unit's parameters, or the reduction of its gradients."""

    kind: Literal["gather", "reduce"]
    unit: int

    @property
    def code(self) -> int:
        """The number that ranks exchange."""
        return 2 * self.unit + (self.kind == "reduce")

    @classmethod
    def of(cls, code: int) -> Op:
        """Return the collective of a number."""
        return cls("reduce" if code % 2 else "gather", code // 2)


@dataclasses.dataclass(frozen=True)
class Agreed:
    """The collectives of a microbatch, in the order in which every rank launches them.

    Attributes:
        forward: those of the forward pass.
        backward: those of the backward pass.
        kept: units that stay gathered between the two, because the one ends and the other begins with them.
    """

    forward: list[Op]
    backward: list[Op]
    kept: frozenset[int] = frozenset()

    @classmethod
    def of(cls, forward: Sequence[Op], backward: Sequence[Op], paths: Sequence[str]) -> Agreed:
        """Return the order to follow from the one that was seen, in which nothing was gathered ahead.

        Examples:
            >>> seen = [Op(kind, unit) for unit in (2, 1, 0) for kind in ("gather", "reduce")]
            >>> order = Agreed.of([Op("gather", unit) for unit in (0, 1, 2)], seen, ["a", "b", "c"])
            >>> [f"{op.kind[0]}{op.unit}" for op in order.backward], sorted(order.kept)
            (['g1', 'r2', 'g0', 'r1', 'r0'], [2])
        """
        # Freed after the forward pass, the last submodule would be gathered again at once.
        ended = paths[forward[-1].unit]
        first = 0
        while first < len(backward) and backward[first].kind == "gather" and paths[backward[first].unit] == ended:
            first += 1
        kept = frozenset(op.unit for op in backward[:first])
        return cls(list(forward), _gathers_first(backward[first:]), kept)


def _gathers_first(seen: Sequence[Op]) -> list[Op]:
    """Move each gather before the reductions that come just before it, so that it is under way while they are made."""
    order: list[Op] = []
    reductions: list[Op] = []
    for op in seen:
        if op.kind == "reduce":
            reductions.append(op)
        else:
            order += [op, *reductions]
            reductions = []
    return order + reductions


class UnitOrder:
    """What the ranks know of the order for one step and model.

    Attributes:
        agreed: the order that every rank follows, once there is one.
        differs: whether ranks have needed different collectives at the same moment. Then they ask for good.
    """

    def __init__(self) -> None:
        self.agreed: Agreed | None = None
        self.differs = False

    def settle(self, forward: Sequence[Op], backward: Sequence[Op], paths: Sequence[str]) -> None:
        """Agree on what was seen in a microbatch in which all ranks asked for the same, if it called every unit.

        Args:
            forward: collectives of the forward pass, in order.
            backward: those of the backward pass.
            paths: submodules of the units, by number; "" for those of the root, which are gathered beforehand.
        """
        # A unit that was not called is called under a condition, on which ranks may differ another time.
        if not self.differs and {op.unit for op in forward} == {n for n, path in enumerate(paths) if path}:
            self.agreed = Agreed.of(forward, backward, paths)


class Orders:
    """The orders of a step by the units of its models. A copy of a step begins without any."""

    def __init__(self) -> None:
        self._by_units: weakref.WeakKeyDictionary[Any, UnitOrder] = weakref.WeakKeyDictionary()

    def of(self, units: object) -> UnitOrder:
        """Return the order of some units."""
        return self._by_units.setdefault(units, UnitOrder())

    def __reduce__(self) -> tuple[type[Orders], tuple[()]]:
        return Orders, ()


class Exchanges:
    """The collectives of one microbatch on one rank, launched in the order of all ranks.

    Args:
        order: what is known of the order.
        paths: submodules of the units, by number.
        group: the ranks; None for this one alone.
        device: of the parameters.
        launch: begins a collective. A rank that does not need it takes part all the same.
        computing: tells whether gradients of a unit are still to come on this rank, so that it cannot be reduced yet.
    """

    def __init__(
        self,
        order: UnitOrder,
        paths: Sequence[str],
        group: dist.ProcessGroup | None,
        device: torch.device,
        launch: Callable[[Op], None],
        computing: Callable[[int], bool],
    ) -> None:
        self._order, self._paths, self._group, self._device = order, paths, group, device
        self._launch, self._computing = launch, computing
        self._agreed = order.agreed
        self._backward = False
        self._seen: tuple[list[Op], list[Op]] = ([], [])
        self._next = 0

    def keeps(self, unit: int) -> bool:
        """Tell whether a unit that has run stays gathered for the backward pass, which begins with it."""
        return self._agreed is not None and unit in self._agreed.kept and self._next == len(self._agreed.forward)

    def need(self, op: Op) -> None:
        """Launch a collective, and before it those that other ranks need first.

        A reduction that cannot be launched now, because gradients of another one before it are still to come, is
        launched later: nothing on this rank waits for it.

        Raises:
            RankError: the agreed order has no place for it any more.
        """
        if self._group is None:
            self._launch(op)
        elif self._agreed is None:
            self._ask(op.code)
        else:
            self._follow(op)

    def ahead(self) -> None:
        """Launch the next collective if it is an agreed gather, so that it is under way while this rank computes."""
        rest = self._rest
        if self._next < len(rest) and rest[self._next].kind == "gather":
            self._next += 1
            self._launch(rest[self._next - 1])

    def end_forward(self) -> None:
        """Take part in what other ranks need of the forward pass."""
        self._end()
        self._backward, self._next = True, 0

    def end_backward(self) -> None:
        """Take part in what other ranks need of the backward pass, and agree on the order if all went the same way."""
        self._end()
        if self._group is not None and self._agreed is None:
            self._order.settle(*self._seen, self._paths)

    # --- the agreed order ---------------------------------------------------------------------------------------------

    @property
    def _rest(self) -> list[Op]:
        if self._agreed is None:
            return []
        return self._agreed.backward if self._backward else self._agreed.forward

    def _follow(self, op: Op) -> None:
        # Everything up to this collective is launched, in the agreed order: the other ranks do the same, whether they
        # need it or not, so that the n-th collective of the group is the same one everywhere.
        try:
            end = self._rest.index(op, self._next)
        except ValueError:
            if op.kind == "gather":
                raise self._disorder(op, "the order has no call of it here") from None
            return
        while self._next <= end:
            following = self._rest[self._next]
            if following.kind == "reduce" and self._computing(following.unit):
                if op.kind == "gather":
                    raise self._disorder(op, f"the gradients of {self._paths[following.unit]!r} come first")
                return
            self._next += 1
            self._launch(following)

    def _disorder(self, op: Op, problem: str) -> RankError:
        path = self._paths[op.unit]
        name = path.rpartition(".")[0] + ".*" if "." in path else path
        return RankError(
            explain(
                f"the unit {path!r} is not called in the order that the ranks agreed on",
                where=f"rank {collectives.rank_in(self._group)}, {'backward' if self._backward else 'forward'} pass: "
                f"{problem}",
                why="every rank gathers a unit together with the others. The first microbatch called all units in one "
                "order on all ranks; a later one may leave some out, but not call them more often or in another order",
                instead=f"fsdp(units=...) with globs that leave {name!r} out: parameters of no unit are whole during "
                "the whole call of the model",
            )
        )

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, code: int) -> None:
        """Exchange what each rank needs, and take part in it, until all need this or it is put off."""
        while True:
            asked = collectives.numbers(code, self._group, self._device)
            if len(set(asked)) == 1:
                if code != _END:
                    self._seen[self._backward].append(Op.of(code))
                    self._launch(Op.of(code))
                return
            self._order.differs = True
            # The choice has to be the same on every rank, from what all of them know: the gather of the lowest number.
            # A rank can take part in any gather, but not in the reduction of gradients that it has yet to compute.
            gathers = [c for c in asked if c != _END and Op.of(c).kind == "gather"]
            if gathers:
                self._launch(Op.of(min(gathers)))
                if code == min(gathers):
                    return
            elif code != _END:
                return  # reduced after the backward pass, with all that were put off, in the order of their numbers

    def _end(self) -> None:
        if self._agreed is not None:
            while self._next < len(self._rest):
                self._next += 1
                self._launch(self._rest[self._next - 1])
        elif self._group is not None:
            self._ask(_END)
