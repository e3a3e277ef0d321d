"""What lies in the memory of a rank of a pipeline in the course of a step, beside its state.

The order of its passes is that of the schedule, so what is held at a time is the activations of the microbatches that
have begun and not ended. Arithmetic, as in `step_account`; `dry_run` calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from purestep.sharding import step_account
from purestep.sharding.pipeline_order import Action
from purestep.sharding.step_account import (
    GATHERED,
    Account,
    Course,
    Job,
    Kinds,
    Leaf,
    StageCourse,
    buckets_of,
    kinds,
    recast,
)


class StageAccount(Account):
    """The moments of a step of one rank.

    Args:
        job, leaves, course: as of `step_account.peak`.
        actions: what the rank does, in its order.
        stage_of: the stage of each parameter, by name.
    """

    def __init__(
        self,
        job: Job,
        leaves: Sequence[Leaf],
        course: Course | None,
        actions: Sequence[Action],
        stage_of: dict[str, int],
    ) -> None:
        super().__init__(job, leaves, course)
        self.actions = actions
        known = {} if course is None else dict(enumerate(course.stages))
        self.own = sorted({stage for _, stage, _ in actions})
        self.courses = {s: known.get(s, StageCourse()) for s in [*self.own, *(s + 1 for s in self.own)]}
        self.of = {s: [pair for pair in self.made if stage_of[pair[0].name] == s] for s in self.own}
        self.turns = {s: sum(action[:2] == ("backward", s) for action in actions) for s in self.own}
        # Parameters that are split are whole for the length of a step, and each pass casts them for itself.
        self.whole = sum(leaf.whole * leaf.at_rest for leaf in self.leaves if leaf.ranks > 1)
        self.casts = sum(leaf.whole * leaf.computed for leaf in self.leaves if leaf.computed != leaf.at_rest)
        self.casts_of = {
            s: sum(leaf.gathered for leaf in self.leaves if stage_of[leaf.name] == s and leaf.computed != leaf.at_rest)
            for s in self.own
        }

    def _passes(self) -> Iterator[Kinds]:
        begun: dict[tuple[int, int], int] = {}
        done = dict.fromkeys(self.own, 0)
        sent = 0  # gloo says of no message that it has arrived, so copies of all of them stay until the end of the step
        if self.whole:
            yield kinds(0, self.whole + 2 * min(self.whole, GATHERED[0]))
        for kind, stage, number in self.actions:
            course, key = self.courses[stage], (stage, number)
            added = sum(self._sums(s, n) for s, n in done.items())
            gathered = self.whole + sum(self.casts_of[s] for s, _ in begun)
            if kind == "forward":
                yield kinds(
                    added,
                    gathered + self.casts,
                    sent,
                    sum(begun.values()) + course.given + course.forward,
                )
                begun[key] = course.given + course.kept
                sent += self.courses[stage + 1].given
                yield kinds(added, gathered + self.casts_of[stage], sent, sum(begun.values()))
                continue
            del begun[key]
            rest, received = sum(begun.values()), self.courses[stage + 1].given
            grads = 0
            for leaf, live in self.of[stage]:
                grads += leaf.gathered
                yield kinds(added + grads, gathered, sent + received, rest + course.given + live)
            sent += course.given
            leaves = [leaf for leaf, _ in self.of[stage]]
            yield kinds(added + grads + recast(leaves), gathered, sent, rest + course.given)
            last = done[stage] + 1 == self.turns[stage]
            for moment in self._taken(stage, done[stage], last=last):
                moment["grads"] += added - self._sums(stage, done[stage])
                moment["gathered"] += gathered - self.casts_of[stage]
                moment["sums"] += sent
                moment["activations"] += rest
                yield moment
            done[stage] += 1

    @property
    def _scattering(self) -> bool:
        return self.job.zero > 1 and any(leaf.ranks * leaf.apart > 1 for leaf in self.trained)

    def _sums(self, stage: int, done: int) -> int:
        """Return the bytes of the sums of a stage after so many microbatches."""
        leaves = [leaf for leaf, _ in self.of[stage]]
        if self._scattering:
            return done.bit_count() * sum(leaf.gradient // (leaf.ranks * leaf.apart) for leaf in leaves)
        if done == self.turns[stage]:  # they have been added up
            return sum(leaf.gradient // leaf.apart for leaf in leaves)
        return done.bit_count() * sum(leaf.gradient for leaf in leaves)

    def _taken(self, stage: int, done: int, *, last: bool) -> Iterator[Kinds]:
        """Yield what is there while the sums of a stage take the gradients of a microbatch, which stay meanwhile."""
        leaves = [leaf for leaf, _ in self.of[stage]]
        whole, held, flying = sum(leaf.gradient for leaf in leaves), self._sums(stage, done), 0
        if self._scattering:
            arriving = 0
            for bucket in buckets_of([x for x in leaves if x.ranks * x.apart > 1], step_account.BUCKETS):
                rows = sum(leaf.gradient for leaf in bucket)
                yield kinds(held + whole, 0, flying + rows)
                held, flying = held + arriving, 2 * rows
                arriving = sum(leaf.gradient // (leaf.ranks * leaf.apart) for leaf in bucket)
                yield kinds(held + whole, 0, flying)
            return
        before, after, waiting = done.bit_count(), (done + 1).bit_count(), 0
        for bucket in buckets_of(leaves, step_account.BUCKETS):
            flat = sum(leaf.gradient for leaf in bucket)
            yield kinds(held + whole, 0, flying + flat)
            held += (after - before) * flat
            if not last or self.job.replicas == 1:
                continue
            sum_ = self._sum(flat, after, bucket[0].apart)
            held += waiting - after * flat
            yield kinds(held + whole, 0, flying + sum_.launch)
            # Two are under way at a time.
            flying, waiting = sum_.first, sum_.stays
        yield kinds(held + whole + waiting, 0, flying)
