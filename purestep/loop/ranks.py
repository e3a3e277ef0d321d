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
from purestep.data.sampler import SampleShard
from purestep.data.sharded import ShardedSource, shard_samples
from purestep.distributed import control
from purestep.errors import RankError, explain
from purestep.loop.clock import Alone, Together
from purestep.loop.events import LoopState
from purestep.loop.identity import Identity, conditions
from purestep.loop.machine import Machine
from purestep.loop.roles import Peers
from purestep.loop.signals import Signals
from purestep.parallel.same_inputs import SAME_DATA, SAME_STATE, compare_states, fingerprint
from purestep.sharding import placement
from purestep.sharding.local_batches import LocalBatch
from purestep.sharding.placement import is_split
from purestep.sharding.plan import Plan
from purestep.step_protocol import StepFn, facts_of

T = TypeVar("T")


class Ranks:
    """The place of this process among those of the run.

    Args:
        plan: the plan of the step, None without one.
        microbatches: of a global batch.
    """

    def __init__(self, plan: Plan | None, microbatches: int) -> None:
        self.plan, self.microbatches = plan, microbatches
        self.alone = plan is None or not control.initialize()
        self.first = self.alone or control.rank() == 0
        self._cut: ShardedSource | None = None
        if plan is not None and not self.alone:
            from purestep.distributed.mesh import check_world

            check_world(plan.mesh)
            plan.microbatches(microbatches)  # refuses a number that cannot be shared, before anything begins

    @property
    def rank(self) -> int:
        """Of this process."""
        return 0 if self.alone else control.rank()

    @classmethod
    def of(cls, step: StepFn) -> Self:
        """Return the ranks of a step's plan; joins the processes that torchrun started if there is one."""
        facts = facts_of(step)
        return cls(facts.plan, facts.microbatches if isinstance(facts.microbatches, int) else 1)

    @classmethod
    def of_inference(cls, step: StepFn) -> Self:
        """Return the same for a step that evaluates or predicts: ranks share whole batches, so any number fits."""
        plan = facts_of(step).plan
        return cls(plan, 1 if plan is None else plan.replicas)

    def outside(self, signals: Signals) -> Alone:
        """Return signals and clock as all ranks see them."""
        return Alone(signals) if self.alone else Together(signals)

    # --- data -----------------------------------------------------------------------------------------------------

    def share(self, source: data.Source) -> data.Source:
        """Return a source of the rows that this rank computes; the source itself where those are all."""
        if self.plan is None or self.plan.replicas == 1:
            return source
        shard = SampleShard(self.microbatches, self.plan.microbatches(self.microbatches))
        shared = shard_samples(source, shard, functools.partial(control.gather, what="the shares of the data"))
        self._cut = shared if isinstance(shared, ShardedSource) else None
        return shared

    def seen(self) -> str | None:
        """Return the fingerprint of the global batch that was read last, where every rank reads all of it."""
        return None if self._cut is None or self._cut.last is None else fingerprint(self._cut.last)

    def compare_batch(self) -> None:
        """Check that all ranks have read the same first batch; later ones are compared where a chunk of steps ends.

        Raises:
            RankError: on every rank, with shapes and content by rank.
        """
        if not self.alone and self._cut is not None:
            control.agree_each({"the batch": self.seen()}, what="the first batch", instead=SAME_DATA)

    def samples(self, batch: object) -> int:
        """Return the number of samples of the global batch."""
        return batch.samples if isinstance(batch, LocalBatch) else metrics.sample_count(batch)

    def evaluate(self, performer: Any, train: Any, outside: Alone) -> Any:
        """Evaluate on this rank's part of the data, and return the row of all."""
        if self.alone:
            return performer.evaluate(train, lambda: outside.unread)
        return performer.evaluate(train, lambda: outside.unread, Peers(self.plan, outside.meet))

    # --- the start and the end --------------------------------------------------------------------------------------

    def placed(self, train: object) -> Any:
        """Return the state as the plan of the step places it; every rank calls it.

        Raises:
            RankError: the ranks hold different values of a state that has to be cut, or only some have it cut already.
        """
        if self.plan is None:
            return train
        if not self.alone:
            specs = tree.leaves(self.plan.specs(train))
            whole = any(s.axes and not is_split(x) for x, s in zip(tree.leaves(train), specs, strict=True))
            # Parts of different values would make a state that no rank had.
            content = fingerprint(placement.local(train)) if whole else "placed by a plan"
            control.agree_each({"the state": content}, what="the state", instead=SAME_STATE)
        return self.plan.place(train)

    def compare(self, identity: Identity, machine: Machine, loop: LoopState, at: int | None) -> None:
        """Check that all ranks are about to do the same: code, arguments, data, state.

        Raises:
            RankError: on every rank, with what differs and on which ranks.
        """
        if self.alone:
            return
        step, source = identity.step, identity.data
        facts = facts_of(step)
        order = source.order if isinstance(source, data.Batches) else None
        values = {
            "the snapshot they begin at": at,
            **{f"the step's {name}": value for name, value in conditions(step, identity.device).items()},
            "the loss function": getattr(facts.loss_fn, "__qualname__", type(facts.loss_fn).__name__),
            "tx": _plain(facts.tx),
            "the plan": self.plan,
            "callbacks": [_plain(c) for c in machine.callbacks if c.name != "progress"],
            "until": str(machine.until),
            "the data": (type(source).__name__, source.length(), _order(order)),
            **{f"the environment's {name}": value for name, value in snapshot.environment().items()},
            "the position of the loop": tree.digest(loop.replace(train=None)),
        }
        instead = "start all of them with the same script, arguments, seed and settings (OMP_NUM_THREADS, say)"
        control.agree_each(values, what="the start of a run", instead=instead)
        compare_states(loop.train)

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
        refused: Exception | None = None
        value: Any = None
        try:
            value = check()
        except Exception as error:
            refused = error
        found = control.gather((value, None if refused is None else _first_lines(refused)), what=what)
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
        exchange = functools.partial(control.gather, what="a snapshot")
        return snapshot.Ranks(control.rank(), control.size(), exchange, control.timeout())

    def tell(self, error: BaseException) -> None:
        """Leave word for the other ranks that this one fails, at once: what follows may take its time."""
        if not self.alone and not control.is_lost(error):
            control.failed(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.alone or error is None or isinstance(error, GeneratorExit):
            return
        if control.is_lost(error):
            raise control.lost(error, "a step") from error
        control.failed(error)


def _first_lines(error: Exception) -> str:
    """The head of an error: what happened, and where."""
    return f"{type(error).__name__}: {error}".split("\n  why:")[0][:1000]


def _plain(value: object) -> str:
    """The repr of a configuration, without the addresses that differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _order(order: Any) -> str:
    return "" if order is None else repr(dataclasses.replace(order, shard=None))
