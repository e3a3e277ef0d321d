"""What lies in the memory of a rank in the course of a step, beside its state: gradients, gathered parameters, buffers.

Arithmetic over the leaves of a plan, in the order in which `parallel` makes, sends and frees them: the course of one
step is a list of moments, and its peak is the largest. `dry_run` calls it; nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

# Bytes of whole gradients at which a bucket is full: of the first one, which is to leave early, and of the others.
BUCKETS = 1 << 20, 25 << 20
# Bytes of whole parameters that are gathered at a time after an update of parts.
GATHERED = 4 << 20, 4 << 20

# Elements from which a tensor is updated in slices, a quarter of them each: on the CPU, where a few slices fill a
# core's own cache, and on a device, where launching a kernel costs more than a slice saves: there they limit memory.
LONG_ON_CPU, LONG_ON_DEVICE = 1 << 19, 1 << 26

# Elements of the largest parameter from which updates in place save time: fresh pages are mapped from 128 KiB on.
WORTH = 1 << 15
# Bytes of a list of temporary buffers up to which an update in place on the CPU keeps it for the next one; and of a
# tensor of it, on average, from which it does: to allocate a smaller one costs less than to look for it.
KEPT, LEAST = 1 << 25, 1 << 16

Kinds = dict[str, int]


@dataclasses.dataclass(frozen=True)
class StageCourse:
    """What the passes of one stage of one microbatch keep, beside what the stages before keep.

    Attributes:
        given: bytes that come from the stage before.
        forward: most bytes at one time in the forward pass.
        kept: bytes that stay until the backward pass.
    """

    given: int = 0
    forward: int = 0
    kept: int = 0


@dataclasses.dataclass(frozen=True)
class Course:
    """What the forward and the backward pass of one microbatch keep, beside parameters and gradients.

    Attributes:
        forward: most bytes at one time before the first gradient of a parameter is there.
        moments: of each gradient, in the order in which they are made, the name of its parameter and the most bytes at
            one time since the one before.
        widths: by parameter, bytes an element as it is computed with, and of its gradient in sums.
        flops: floating-point operations of both passes, see `DryRun.flops`.
        stages: of a pipeline. Bytes of `moments` are then without what the stages before keep.
    """

    forward: int = 0
    moments: tuple[tuple[str, int], ...] = ()
    widths: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    flops: int = 0
    stages: tuple[StageCourse, ...] = ()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as a step sees it; lengths in elements, widths in bytes an element.

    Attributes:
        name: of the parameter.
        unit: with which it is gathered.
        trained: whether it has a gradient.
        whole: its elements as a model computes with them; under tensor parallelism of this rank.
        ranks: over how many ranks it is split at rest.
        apart: over how many ranks it is updated, where it is whole at rest: ZeRO 1 and 2.
        at_rest: width in the state.
        computed: width as it is computed with, and that of its gradient.
        summed: width of its gradient in sums.
    """

    name: str
    unit: str
    trained: bool
    whole: int
    ranks: int
    apart: int
    at_rest: int
    computed: int
    summed: int

    @property
    def gathered(self) -> int:
        """Bytes of it gathered; of what it takes part with in a step."""
        return self.whole * self.computed

    @property
    def gradient(self) -> int:
        """Bytes of its whole gradient in a sum."""
        return self.whole * self.summed


@dataclasses.dataclass(frozen=True)
class Job:
    """The ranks of a step, and what it does.

    Attributes:
        zero: the stage of ZeRO.
        replicas: ranks that compute different microbatches.
        copies: of them, ranks that hold the same parts.
        turns: microbatches of a rank.
        reshard: whether gathered parameters are freed after the forward pass.
        fast: whether ranks may add in any order.
        donated: whether the new state takes the memory of the old one.
        optimizer: bytes of the optimizer state of a rank on its device.
        away: whether updates run elsewhere than on the device.
        long: elements from which a parameter is updated in slices; where none is so long, all are updated at once.
        by_element: whether the update of an element depends on it alone, so that it can be sliced.
        one_graph: whether a microbatch was compiled as a whole, for which all parameters are gathered at once.
    """

    zero: int
    replicas: int
    copies: int
    turns: int
    reshard: bool
    fast: bool
    donated: bool
    optimizer: int
    away: bool
    long: int = LONG_ON_CPU
    by_element: bool = True
    one_graph: bool = False


def peak(account: Account) -> Kinds:
    """Return the bytes by kind at the moment of a step in which most is there, without the state."""
    most = max(account.moments(), key=lambda moment: sum(moment.values()))
    return {kind: count for kind, count in most.items() if count}


@dataclasses.dataclass
class _Sum:
    """The buffers of a sum over ranks, in bytes.

    Attributes:
        launch: while it is begun, with what this rank has added up itself.
        first: while its first exchange is under way.
        second: while its second one is.
        stays: the sum.
    """

    launch: int
    first: int
    second: int
    stays: int


class Account:
    """The moments of one step.

    Args:
        job: the ranks, and what the step does.
        leaves: of the parameters, trained and frozen, in the order of the state.
        course: what the passes of one microbatch keep; by default nothing, gradients in the reverse order of `leaves`.
    """

    def __init__(self, job: Job, leaves: Sequence[Leaf], course: Course | None) -> None:
        self.leaves = list(leaves)
        self.trained = [leaf for leaf in leaves if leaf.trained]
        # Elements of what this rank updates.
        self.sizes = [-(-leaf.whole // (leaf.ranks * leaf.apart)) for leaf in self.trained]
        worth = max((-(-leaf.whole // leaf.ranks) for leaf in self.trained), default=0) >= WORTH
        self.job = dataclasses.replace(job, donated=job.donated and worth)
        course = course or Course(moments=tuple((leaf.name, 0) for leaf in reversed(self.trained)))
        known = {leaf.name: leaf for leaf in self.trained}
        made = [(known.pop(name), live) for name, live in course.moments if name in known]
        # Parameters that the loss does not depend on get zeros at the end.
        self.made = made + [(leaf, 0) for leaf in known.values()]
        self.forward = course.forward
        # Copies in the dtype of the computation, of what lies here: of parts where a parameter is split.
        self.casts = sum(
            -(-leaf.whole // leaf.ranks) * leaf.computed for leaf in leaves if leaf.computed != leaf.at_rest
        )

    def moments(self) -> Iterator[Kinds]:
        """Yield what is there at one moment after the other, by kind."""
        workspace, kept = self._workspace()
        for moment in itertools.chain(self._passes(), self._over_copies()):
            yield moment | {"update": kept}
        yield from self._updating(workspace, kept)

    def _passes(self) -> Iterator[Kinds]:
        passes = self._in_buckets
        if any(leaf.ranks > 1 for leaf in self.leaves):
            passes = self._at_once if self.job.one_graph else self._in_units
        elif self.job.zero == 2 and any(leaf.apart > 1 for leaf in self.trained):
            passes = self._scattered
        for before, after, last in _turns(self.job.turns):
            yield from passes(before, after, last)

    # --- whole gradients are added up in buckets: `parallel.ddp` ------------------------------------------------------

    def _in_buckets(self, before: int, after: int, last: bool) -> Iterator[Kinds]:
        buckets = buckets_of(sorted(self.trained, key=lambda leaf: leaf.name, reverse=True), BUCKETS)
        missing, home = _waiting(buckets)
        added = before * sum(leaf.gradient for leaf in self.trained)
        flying: list[_Sum] = []
        held = at = 0
        yield kinds(added, self.casts, live=self.forward)
        for leaf, live in self.made:
            held += leaf.gathered
            missing[home[leaf.name]] -= 1
            buffers = sum(x.second for x in flying[:-1]) + sum(x.first for x in flying[-1:])
            yield kinds(added + held, self.casts, buffers, live)
            while at < len(buckets) and not missing[at]:
                bucket, at = buckets[at], at + 1
                flat = sum(x.gradient for x in bucket)
                yield kinds(added + held, self.casts, buffers + flat + recast(bucket), live)
                held -= sum(x.gathered for x in bucket)
                added += (after - before) * flat
                if not last or self.job.replicas == 1:
                    continue
                if len(flying) > 1:
                    added += flying.pop(0).stays
                new = self._sum(flat, after, bucket[0].apart)
                added -= after * flat
                # The gradient at hand is held by autograd until its hook has returned.
                buffers = sum(x.second for x in flying)
                yield kinds(added + held + leaf.gathered, self.casts, buffers + new.launch, live)
                flying.append(new)
                buffers += new.first
        for i, sum_ in enumerate(flying):
            yield kinds(added, 0, sum_.second + sum_.stays + sum(x.second for x in flying[i + 1 :]))
            added += sum_.stays

    def _sum(self, flat: int, held: int, apart: int) -> _Sum:
        """Return the buffers of the sum of a bucket of which this rank has added up so many parts."""
        if apart > 1:  # rows of each rank's parts, and as many as come in
            both = (1 if self.job.fast else held) * 2 * flat
            return _Sum(both, both, both, flat // apart)
        pair = self.job.replicas == 2 and (self.job.fast or held == 1)
        if pair or self.job.fast:
            # What this rank has added up, and what the other sends; several add it up in place.
            size = 2 * flat if pair else flat
            return _Sum(size, size, size, flat)
        # Rows of slices and as many as come in; then the sums of all slices, and this rank's.
        return _Sum(3 * held * flat, 2 * held * flat, flat + flat // self.job.replicas, flat)

    # --- buckets are sent in each microbatch, of whole parameters: `parallel.scattered` -------------------------------

    def _scattered(self, before: int, after: int, last: bool) -> Iterator[Kinds]:
        buckets = buckets_of([leaf for leaf in reversed(self.trained) if leaf.apart > 1], BUCKETS)
        missing, home = _waiting(buckets)
        parts = before * sum(leaf.gradient // leaf.apart for bucket in buckets for leaf in bucket)
        held = at = flying = arriving = 0
        yield kinds(parts, self.casts, live=self.forward)
        for leaf, live in self.made:
            held += leaf.gathered
            yield kinds(parts + held, self.casts, flying, live)
            if leaf.name not in home:
                continue
            missing[home[leaf.name]] -= 1
            while at < len(buckets) and not missing[at]:
                bucket, at = buckets[at], at + 1
                rows = sum(x.gradient for x in bucket)
                yield kinds(parts + held, self.casts, flying + rows + recast(bucket), live)
                held -= sum(x.gathered for x in bucket)
                parts, flying, arriving = parts + arriving, 2 * rows, sum(x.gradient // x.apart for x in bucket)
                yield kinds(parts + held + leaf.gathered, self.casts, flying, live)
        yield kinds(parts + arriving + held, 0, flying)

    # --- parameters are gathered by units: `parallel.fsdp` ------------------------------------------------------------

    def _in_units(self, before: int, after: int, last: bool) -> Iterator[Kinds]:
        job, size, rows = self.job, _by_unit(self.leaves), _by_unit(self.trained, gradients=True)
        ranks = max(leaf.ranks for leaf in self.leaves)
        missing: dict[str, int] = {}
        for leaf in self.trained:
            missing[leaf.unit] = missing.get(leaf.unit, 0) + (leaf.ranks > 1)
        order = list(dict.fromkeys(leaf.unit for leaf, _ in self.made if leaf.unit and leaf.ranks > 1))
        coming = {unit: size[other] + size[other] // ranks for unit, other in itertools.pairwise(order)}
        root, parts = size.get("", 0), before * sum(rows.values()) // ranks
        opened = {unit: size[unit] for unit in size if unit and not job.reshard}
        held: dict[str, int] = {}
        flying = arriving = 0
        # In the forward pass one unit is taken apart while the next is on its way; its activations are still few.
        pairs = (
            [2 * size[unit] + coming.get(unit, 0) for unit in order[::-1]] if job.reshard else [sum(opened.values())]
        )
        yield kinds(parts, self.casts + root + max(pairs, default=0))
        yield kinds(parts, self.casts + root + (sum(opened.values()) or max(size.values())), live=self.forward)
        for leaf, live in self.made:
            unit = leaf.unit
            ahead = coming.get(unit, 0) if job.reshard else 0
            if unit and unit in size and unit not in opened:
                opened[unit] = size[unit]
                now = self.casts + root + sum(opened.values())
                yield kinds(parts + sum(held.values()), now + size[unit] + ahead, flying, live)
            held[unit] = held.get(unit, 0) + leaf.gathered
            now = self.casts + root + sum(opened.values()) + ahead
            yield kinds(parts + sum(held.values()), now, flying, live)
            if leaf.ranks == 1:
                continue
            missing[unit] -= 1
            if missing[unit] or not unit:
                continue
            opened.pop(unit, None)
            now = self.casts + root + sum(opened.values()) + ahead
            copies = recast([x for x in self.trained if x.unit == unit])
            yield kinds(parts + sum(held.values()), now, flying + rows[unit] + copies, live)
            parts, flying, arriving = parts + arriving, 2 * rows[unit], rows[unit] // ranks
            yield kinds(parts + sum(held.values()), now, flying, live)
            del held[unit]
        # Those of the root, and of parameters that are not split, are sent last.
        rest = sum(leaf.gradient for leaf in self.trained if leaf.ranks == 1 or not leaf.unit)
        yield kinds(parts + arriving + sum(held.values()), 0, flying + rest)
        yield kinds(parts + arriving + sum(held.values()), 0, 2 * rest)

    # --- parameters are gathered for a graph of the whole microbatch: `jit.step` --------------------------------------

    def _at_once(self, before: int, after: int, last: bool) -> Iterator[Kinds]:
        split, rows = [leaf for leaf in self.leaves if leaf.ranks > 1], _by_unit(self.trained, gradients=True)
        size: dict[str, int] = {}
        for leaf in split:  # the graph takes parameters as the state has them, and casts them itself
            size[leaf.unit] = size.get(leaf.unit, 0) + leaf.whole * leaf.at_rest
        whole, parts, held = sum(size.values()), before * sum(rows.values()) // split[0].ranks, 0
        casts = sum(leaf.whole * leaf.computed for leaf in self.leaves if leaf.computed != leaf.at_rest)
        # Each unit is taken apart while all others are here or on their way.
        yield kinds(parts, whole + whole // split[0].ranks + max(size.values()))
        yield kinds(parts, whole + casts, live=self.forward)
        for leaf, live in self.made:
            held += leaf.gradient
            yield kinds(parts + held, whole + casts, live=live)
        rest = sum(leaf.gradient for leaf in self.trained if leaf.ranks == 1)
        yield kinds(parts + held, whole, 2 * (sum(rows.values()) + rest))

    # --- after the passes ---------------------------------------------------------------------------------------------

    def _parts(self, *, summed: bool) -> int:
        """Bytes of what this rank updates: of gradients, or of parameters."""
        pairs = zip(self.sizes, self.trained, strict=True)
        return sum(n * (leaf.summed if summed else leaf.at_rest) for n, leaf in pairs)

    def _over_copies(self) -> Iterator[Kinds]:
        """Sums over the ranks that hold the same parts: all are under way at once."""
        if self.job.copies > 1 and any(leaf.ranks > 1 or leaf.apart > 1 for leaf in self.leaves):
            parts = self._parts(summed=True)
            few = self.job.copies == 2 or self.job.fast
            yield kinds(parts, 0, parts if few else 2 * parts)

    def _updating(self, workspace: int, kept: int) -> Iterator[Kinds]:
        job, grads, params = self.job, self._parts(summed=True), self._parts(summed=False)
        split = [leaf for leaf in self.trained if leaf.apart > 1]
        cut = sum(leaf.whole * leaf.at_rest // leaf.apart for leaf in split)
        new = 0 if job.donated else params + job.optimizer
        if job.away:
            cut, new = 0, 0 if job.donated else params
        yield kinds(grads, update=cut + new + workspace)
        if not split:
            return
        groups = buckets_of(split, GATHERED, at_rest=True)
        sizes = [sum(leaf.whole * leaf.at_rest for leaf in group) for group in groups]
        # Two are under way while the first is taken apart.
        pairs = [
            2 * a + a // split[0].apart + b + b // split[0].apart for a, b in zip(sizes, [*sizes[1:], 0], strict=True)
        ]
        whole = 0 if job.donated else sum(sizes)
        yield kinds(0, update=cut + new + whole + kept + max(pairs))

    def _workspace(self) -> tuple[int, int]:
        """Return the bytes of temporary buffers of an update, and how many of them stay until the next one."""
        job = self.job
        if job.away:
            return 0, 0
        whole, count = sum(n * leaf.summed for n, leaf in zip(self.sizes, self.trained, strict=True)), len(self.sizes)
        if job.by_element and max(self.sizes, default=0) > job.long:
            whole, count = min(whole, job.long), 1  # a slice of a quarter of its elements, four bytes each
        moments = job.optimizer > whole // 2
        used = (2 if job.donated and moments else 1) * whole
        kept = job.donated and job.long == LONG_ON_CPU and LEAST * count <= whole <= KEPT
        return used, used if kept else 0


def kinds(grads: int, gathered: int = 0, sums: int = 0, live: int = 0, update: int = 0) -> Kinds:
    return {"grads": grads, "gathered": gathered, "sums": sums, "update": update, "activations": live}


def _turns(count: int) -> list[tuple[int, int, bool]]:
    """The microbatches that differ: how many sums of a tree are there before and after one, and whether it is the last.

    Examples:
        >>> _turns(1), _turns(4)
        ([(0, 1, True)], [(0, 1, False), (1, 1, False), (1, 2, False), (2, 1, True)])
    """
    found = [(t.bit_count(), (t + 1).bit_count(), t + 1 == count) for t in range(count)]
    return sorted(set(found), key=found.index)


def _waiting(buckets: Sequence[Sequence[Leaf]]) -> tuple[list[int], dict[str, int]]:
    """How many gradients each bucket waits for, and which is whose."""
    return [len(bucket) for bucket in buckets], {leaf.name: k for k, bucket in enumerate(buckets) for leaf in bucket}


def buckets_of(leaves: Sequence[Leaf], limits: tuple[int, int], *, at_rest: bool = False) -> list[list[Leaf]]:
    """Return the leaves that travel together, as `parallel.tree_reduce.Flat` packs them."""
    found: list[list[Leaf]] = []
    sizes: list[int] = []
    filling: dict[tuple[int, bool], int] = {}
    for leaf in leaves:
        width = leaf.at_rest if at_rest else leaf.computed
        kind = width, leaf.apart > 1
        group = filling.get(kind)
        if group is None or sizes[group] >= limits[group > 0]:
            group = filling[kind] = len(found)
            found.append([])
            sizes.append(0)
        found[group].append(leaf)
        sizes[group] += leaf.whole * width
    return found


def _by_unit(leaves: Sequence[Leaf], *, gradients: bool = False) -> dict[str, int]:
    """Return the bytes of the units of what is split, gathered, or of its gradients."""
    found: dict[str, int] = {}
    for leaf in leaves:
        if leaf.ranks > 1:
            found[leaf.unit] = found.get(leaf.unit, 0) + (leaf.gradient if gradients else leaf.gathered)
    return found


def recast(leaves: Sequence[Leaf]) -> int:
    """Return the bytes of copies of gradients in the dtype of their sums, while they are packed."""
    return sum(leaf.gradient for leaf in leaves if leaf.summed != leaf.computed)
