"""What a run does because it is one of several: its share of the data, comparing notes, and word of its end.

`Ranks` is made from the plan of the step; without a plan, or with one process, it changes nothing. Only rank 0 (the
`first`) shows anything to the world outside.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Self, TypeVar

from purestep import data, metrics, snapshot, tree
from purestep.errors import RankError, explain
from purestep.loop.agree import Alone, Together
from purestep.loop.events import LoopState
from purestep.loop.machine import Machine
from purestep.loop.resume import identity
from purestep.loop.signals import Signals
from purestep.sharding import world
from purestep.sharding.local import LocalBatch

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Peers:
    """What an evaluation is told about the other ranks.

    Attributes:
        plan: the plan of the step.
        meet: `meet(what, value)` returns the values of all ranks; every rank calls it.
    """

    plan: Any
    meet: Callable[[str, Any], list[Any]]


class Ranks:
    """The place of this process among those of the run.

    Args:
        plan: the plan of the step, None without one.
        microbatches: of a global batch.
    """

    def __init__(self, plan: Any, microbatches: int) -> None:
        self.plan, self.microbatches = plan, microbatches
        self.alone = plan is None or not world.initialize()
        self.first = self.alone or world.rank() == 0
        if not self.alone:
            from purestep.sharding.mesh import check_world

            check_world(plan.mesh)
            plan.microbatches(microbatches)  # refuses a number that cannot be shared, before anything begins

    @classmethod
    def of(cls, step: Any) -> Self:
        """Return the ranks of a step's plan; joins the processes that torchrun started if there is one."""
        inner = getattr(step, "__wrapped__", step)
        plan = getattr(inner, "plan", None)
        return cls(plan, 1 if plan is None else getattr(inner, "parts", plan.replicas))

    def outside(self, signals: Signals) -> Alone:
        """Return signals and clock as all ranks see them."""
        return Alone(signals) if self.alone else Together(signals)

    # --- data -----------------------------------------------------------------------------------------------------

    def share(self, source: data.Source) -> data.Source:
        """Return a source of the rows that this rank computes; the source itself where those are all."""
        if self.plan is None or self.plan.replicas == 1:
            return source
        from purestep.data.order import Rows
        from purestep.data.share import share_rows

        return share_rows(source, Rows(self.microbatches, self.plan.microbatches(self.microbatches)))

    def samples(self, batch: Any) -> int:
        """Return the number of samples of the global batch."""
        return batch.samples if isinstance(batch, LocalBatch) else metrics.sample_count(batch)

    def evaluate(self, performer: Any, train: Any, outside: Alone) -> Any:
        """Evaluate on this rank's part of the data, and return the row of all."""
        if self.alone:
            return performer.evaluate(train, lambda: outside.unread)
        return performer.evaluate(train, lambda: outside.unread, Peers(self.plan, outside.meet))

    # --- the start and the end --------------------------------------------------------------------------------------

    def compare(self, step: Any, machine: Machine, loop: LoopState, at: int | None, source: Any) -> None:
        """Check that all ranks are about to do the same: code, arguments, data, state.

        Raises:
            RankError: on every rank, with what differs and on which ranks.
        """
        if self.alone:
            return
        inner = getattr(step, "__wrapped__", step)
        order = getattr(source, "plan", None)
        values = {
            "the snapshot they begin at": at,
            **{f"the step's {name}": value for name, value in identity(step).items()},
            "the loss function": getattr(getattr(inner, "loss_fn", inner), "__qualname__", type(inner).__name__),
            "tx": _plain(getattr(inner, "tx", None)),
            "the plan": self.plan,
            "callbacks": [_plain(c) for c in machine.callbacks if c.name != "progress"],
            "until": str(machine.until),
            "the data": (type(source).__name__, source.length(), _order(order)),
            **{f"the environment's {name}": value for name, value in snapshot.environment().items()},
            "the position of the loop": tree.digest(loop.replace(train=None)),
        }
        instead = "start all of them with the same script, arguments, seed and settings (OMP_NUM_THREADS, say)"
        world.agree_each(values, what="the start of a run", instead=instead)
        _compare_states(loop.train)

    def agreed(self, check: Callable[[], T], what: str) -> list[T]:
        """Check something on every rank, each for itself, and go on only if none refuses. Every rank calls it.

        Args:
            check: what one rank can do alone; its value is made known to all, so it should be small.
            what: what is checked.

        Returns:
            What it returned on each rank.

        Raises:
            Exception: what it raised here.
            RankError: it raised on other ranks only.
        """
        if self.alone:
            return [check()]
        refused, value = None, None
        try:
            value = check()
        except Exception as error:
            refused = error
        found = world.gather((value, None if refused is None else _first_lines(refused)), what=what)
        if refused is not None:
            raise refused
        words = {rank: text for rank, (_, text) in enumerate(found) if text is not None}
        if words:
            raise RankError(
                explain(
                    f"{what} failed on {'rank' if len(words) == 1 else 'ranks'} {', '.join(map(str, words))}, not here",
                    where="\n".join(f"rank {rank}: {text}" for rank, text in words.items()),
                    why="every rank checks its own rows of a batch, and rank 0 the evaluations",
                    instead="what the error of that rank says",
                )
            )
        return [value for value, _ in found]

    def for_store(self) -> snapshot.Ranks:
        """Return the processes that write snapshots together."""
        if self.alone:
            return snapshot.Ranks()
        exchange = functools.partial(world.gather, what="a snapshot")
        return snapshot.Ranks(world.rank(), world.size(), exchange, world.timeout())

    def tell(self, error: BaseException) -> None:
        """Leave word for the other ranks that this one fails, at once: what follows may take its time."""
        if not self.alone and not world.is_lost(error):
            world.failed(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.alone or error is None or isinstance(error, GeneratorExit):
            return
        if world.is_lost(error):
            raise world.lost(error, "a step") from error
        world.failed(error)


def _first_lines(error: Exception) -> str:
    """The head of an error: what happened, and where."""
    return f"{type(error).__name__}: {error}".split("\n  why:")[0][:1000]


def _plain(value: Any) -> str:
    """The repr of a configuration, without the addresses that differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _order(order: Any) -> str:
    return "" if order is None else repr(dataclasses.replace(order, share=None))


def _compare_states(train: Any) -> None:
    """Compare the leaves that are whole on every rank, and the parts that several ranks hold."""
    import xxhash

    from purestep.bits import leaf_bytes
    from purestep.sharding.place import is_split, shard_of

    whole, parts, places = xxhash.xxh3_128(), xxhash.xxh3_128(), []
    hashes = []
    for path, leaf in zip(tree.paths(train, "state"), tree.leaves(train), strict=True):
        split = is_split(leaf)
        kind, content = leaf_bytes(path, leaf._local_tensor if split else leaf)
        target = parts if split else whole
        target.update(f"{path} {kind} ".encode())
        target.update(content)
        if split:
            places.append((path, kind, shard_of(leaf)))
        else:
            hashes.append((path, kind, xxhash.xxh3_64_hexdigest(content)))
    found = world.gather((whole.hexdigest(), hash_of(places), parts.hexdigest()), what="the state")
    if len({w for w, _, _ in found}) > 1:
        everything = world.gather(hashes, what="the leaves of the state")
        world.agree_each(_differing(everything, hashes), what="the state", instead=_SAME_STATE)
    held: dict[str, tuple[int, str]] = {}
    for number, (_, where, content) in enumerate(found):
        other, same = held.setdefault(where, (number, content))
        if same != content:
            raise RankError(
                explain(
                    "ranks that hold the same part of the state hold different values",
                    where=f"ranks {other} and {number}",
                    instead=_SAME_STATE,
                )
            )


_SAME_STATE = "state = ps.init(model, tx, seed=0, plan=plan)   # the same seed and code on every rank"


def hash_of(value: Any) -> str:
    """Return a short hash of the repr of a value."""
    import xxhash

    return str(xxhash.xxh3_64_hexdigest(repr(value).encode()))


def _differing(everything: list[list[tuple[str, str, str]]], mine: list[tuple[str, str, str]]) -> dict[str, str]:
    """The leaves of this rank that are not the same on every rank, at most a few of them."""
    others = [{path: (kind, content) for path, kind, content in entries} for entries in everything]
    paths = [p for p, *_ in everything[0] if len({repr(o.get(p)) for o in others}) > 1]
    own = {path: f"{kind} {content}" for path, kind, content in mine}
    return {path: own.get(path, "nothing") for path in paths[:4]} or {"the structure of the state": str(len(own))}
