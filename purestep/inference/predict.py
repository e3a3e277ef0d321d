"""`predict`: outputs of a model for the samples of a data set, as an iterator over batches or as files.

Owns the assignment of batches to ranks, and the sample indices of a batch. `saved` owns the files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, overload

import torch

from purestep import data as data_
from purestep import tree
from purestep.arguments import Count, Location, checked
from purestep.data.sampler import BatchShard
from purestep.data.sharded import shard_batches
from purestep.data.source import close
from purestep.data.to_device import on_device
from purestep.distributed import control
from purestep.errors import ConfigError, DataError, explain
from purestep.inference import saved
from purestep.inference.saved import Format, Predictions
from purestep.loop.checks import check_counts
from purestep.loop.input import device_of
from purestep.loop.ranks import Ranks
from purestep.loop.stable_json import stable
from purestep.metrics import sample_count
from purestep.sharding import placement
from purestep.sharding.placement import is_split
from purestep.sharding.plan import Plan, check_plan
from purestep.step import Predict, make_predict
from purestep.step_protocol import AnyStep, facts_of


@overload
def predict(
    state: Any,
    function: Callable[..., Any],
    data: object,
    *,
    of: Callable[[Any], Any] | None = ...,
    plan: Plan | None = ...,
    limit: Count | None = ...,
    to: None = ...,
    format: Format = ...,
    batches_per_file: Count = ...,
) -> Iterator[Predictions]: ...
@overload
def predict(
    state: Any,
    function: Callable[..., Any],
    data: object,
    *,
    of: Callable[[Any], Any] | None = ...,
    plan: Plan | None = ...,
    limit: Count | None = ...,
    to: Location,
    format: Format = ...,
    batches_per_file: Count = ...,
) -> Path: ...
@checked(ConfigError, failed=True)
def predict(
    state: Any,
    function: Callable[..., Any],
    data: object,
    *,
    of: Callable[[Any], Any] | None = None,
    plan: Plan | None = None,
    limit: Count | None = None,
    to: Location | None = None,
    format: Format = "safetensors",
    batches_per_file: Count = 64,
) -> Iterator[Predictions] | Path:
    """Predict for the samples of a set: an iterator of outputs with sample indices, or files of them.

    With `to=` the outputs of `batches_per_file` batches are in memory at a time. Each file is written atomically, and
    the same call continues after the last file; a directory of other predictions is refused.

    Args:
        state: a train state; it is not changed.
        function: `function(net, batch)` returns a tensor with the samples as dim 0, or a pytree of them; or a step of
            `make_predict`, jitted or not. The model is in evaluation mode, without gradients.
        data: data as for `fit`, read from its beginning in the order of its epoch 0.
        of: a pure function from the state to the state that predicts: `of=ps.optim.averaged`.
        plan: plan of the ranks that predict together: rank r of n computes batches r, r + n, ... Every rank calls
            `predict`, and reads its iterator to the end if parameters are split.
        limit: the most batches, None for all.
        to: directory to write to; `ps.load_predictions` reads it.
        format: format of the files: "safetensors" (every dtype), "npy" (one array a file, no bfloat16), "parquet" (a
            column for each output; needs pyarrow).
        batches_per_file: batches in one file of a rank.

    Returns:
        An iterator of `Predictions` on the CPU, one for each batch; with `to=` the directory. Indices are positions in
        the data set of `ps.data.batches`; for other data they count the samples in the order in which they are read.

    Raises:
        ConfigError: the directory holds predictions of another state, function, set, format or number of ranks.
        DataError: samples may be left out (`on_bad_sample="skip"`), so that indices are unknown.
        StepError: dim 0 of an output is not the number of samples.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> state = ps.init(lambda: torch.nn.Linear(2, 3), ps.optim.sgd(0.1))
        >>> test = ps.data.batches({"x": torch.ones(5, 2)}, 2, shuffle=False, drop_last=False)
        >>> [p.indices.tolist() for p in predict(state, lambda net, batch: net(batch["x"]).argmax(-1), test)]
        [[0, 1], [2, 3], [4]]
    """
    check_plan(plan, "ps.predict")
    check_counts(1, limit=limit, batches_per_file=-1 if batches_per_file is None else batches_per_file)
    saved.check_format(format)
    step = function if _is_step(function) else make_predict(function)
    if plan is not None and isinstance(step, AnyStep):
        step = step.under(plan)
    source = data_.as_source(data)
    if limit is not None:
        source = data_.take(source, limit)
    if isinstance(source, data_.Batches) and source.on_bad_sample == "skip":
        raise DataError(
            explain(
                "predictions of samples that may be left out have no known indices",
                where=f"data: {source!r}",
                instead="data.replace(on_bad_sample='raise')",
            )
        )
    work = _Work(step, source, of)
    if to is None:
        return work.stream(state)
    return work.write(state, Path(to), format, batches_per_file)


def _is_step(function: object) -> bool:
    facts = facts_of(function)
    return isinstance(function, Predict) or (isinstance(function, AnyStep) and facts.loss_fn is None)


class _Work:
    """The work of this rank in a prediction.

    Args:
        step: prediction step, `(state, batch) -> outputs`; with split parameters every rank must call it.
        source: the batches.
        of: function from the state to the state that predicts, or None.
    """

    def __init__(self, step: Callable[[Any, Any], Any], source: data_.Source, of: Callable[[Any], Any] | None) -> None:
        self.step, self.source, self.of = step, source, of
        self.ranks = Ranks.of_inference(step)
        plan = self.ranks.plan
        alone = self.ranks.alone or plan is None
        self.shard = BatchShard(0, 1) if alone or plan is None else BatchShard(plan.index, plan.replicas)

    def _placed(self, state: Any) -> Any:
        """Return the state that predicts, placed by the plan."""
        placed = self.ranks.placed(state)
        return placed if self.of is None else self.of(placed)

    def stream(self, state: Any) -> Iterator[Predictions]:
        """Yield the predictions of this rank."""
        with self.ranks:
            for _, predictions in self._run(state, 0):
                yield predictions

    def _run(self, state: Any, first: int) -> Iterator[tuple[int, Predictions]]:
        """Yield index and predictions of this rank's batches, from the round of batch `first` on. A round is one batch
        for each rank."""
        state = self._placed(state)
        collective = any(is_split(leaf) for leaf in tree.leaves(state))
        device, spare = device_of(state), None
        for number, indices, batch in self._rounds(first):
            if batch is None:
                if collective:  # a gather of parameters needs all ranks, also those without a batch in this round
                    spare = next(iter(self.source.open(0, 0, None))) if spare is None else spare
                    self.step(state, on_device(spare, device))
                continue
            spare = batch if collective else None
            outputs = tree.map(lambda x: x.detach().cpu(), self.step(state, on_device(batch, device)))
            yield number, Predictions(indices, outputs)

    def _rounds(self, first: int) -> Iterator[tuple[int, Any, Any]]:
        """Yield index, sample indices and batch of this rank for each round; the batch is None if the rank has none."""
        source, shard = self.source, self.shard
        if isinstance(source, data_.Batches):
            batches = shard_batches(source, shard).open(0, first, None)
            try:
                for start in range(first - first % shard.count, source.length(), shard.count):
                    number = start + shard.index
                    if number < first:
                        continue
                    batch = next(batches, None)
                    yield number, None if batch is None else source.indices(0, number), batch
            finally:
                close(batches)
            return
        shard_batches(source, shard)  # refuses a loader that shards by itself
        stream, seen = enumerate(source.open(0, 0, None)), 0
        while True:
            mine: tuple[int, Any, Any] | None = None
            read = start = 0
            for number, batch in itertools.islice(stream, shard.count):
                read, start = read + 1, number - number % shard.count
                samples = sample_count(batch)
                if number % shard.count == shard.index:
                    mine = (number, torch.arange(seen, seen + samples), batch)
                seen += samples
            if not read:
                return
            if start + shard.count > first:
                yield mine or (start + shard.index, None, None)

    def write(self, state: Any, directory: Path, format: Format, batches_per_file: int) -> Path:
        """Write the predictions of this rank, from the first batch that no file holds yet."""
        ranks, (index, count) = self.ranks, (self.shard.index, self.shard.count)
        with ranks:
            # If several ranks compute a batch together (tensor parallelism), the first one writes.
            owners: dict[int, int] = {}
            for rank, theirs in enumerate(ranks.agreed(lambda: index, "the ranks of a prediction")):
                owners.setdefault(theirs, rank)
            mine = ranks.alone or owners[index] == control.rank()
            identity = self._identity(state)
            writer: saved.Writer | None = None

            def begin() -> tuple[int, bool] | None:
                nonlocal writer
                if mine:
                    writer = saved.Writer(directory, format, batches_per_file, (index, count), of=identity)
                return None if writer is None else (writer.batches, writer.complete)

            found = [x for x in ranks.agreed(begin, "the predictions that are there") if x is not None]
            if not all(complete for _, complete in found):
                # All ranks start in the same round. Ranks whose files hold that round compute it without writing.
                self._write(self._run(state, min(batches for batches, _ in found) * count), writer, batches_per_file)
        return directory

    def _write(self, batches: Iterator[tuple[int, Predictions]], writer: saved.Writer | None, most: int) -> None:
        there = 0 if writer is None else writer.batches * self.shard.count
        waiting: list[Predictions] = []
        for number, predictions in batches:
            if writer is None or number < there:
                continue
            waiting.append(predictions)
            if len(waiting) == most:
                writer.add(waiting)
                waiting = []
        if writer is not None:
            if waiting:
                writer.add(waiting)
            writer.finish()

    def _identity(self, state: Any) -> dict[str, Any]:
        """Return the facts that must be the same to continue a directory of predictions."""
        chosen = self._placed(state)
        fields = tree.map(_local, (chosen.params, chosen.buffers, chosen.rng))
        return {"state": tree.digest(fields), "function": stable(self.step), "data": stable(self.source)}


def _local(leaf: Any) -> Any:
    return placement.local(leaf) if is_split(leaf) else leaf
