"""What stands between the loop and a step: the checks before its first call, and the words when a later one fails.

Per batch it costs one comparison of dtypes and names, and nothing of the device is read. `run` has one guard.
"""

from __future__ import annotations

import re
import warnings

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import PurestepError, StepError, explain
from purestep.preflight import check as check_module
from purestep.preflight import fit_memory, hidden_attributes, memory
from purestep.preflight.dry_run import dry_run, models_of
from purestep.preflight.explain_shapes import describe_batch, misfit, module_path
from purestep.preflight.single_process import lone
from purestep.sharding.local_batches import LocalBatch
from purestep.step_protocol import StepFn, facts_of, resliced


class BatchChangeWarning(UserWarning):
    """A batch has another structure or other dtypes than the first one."""


class Guard:
    """Watches over one step of one run.

    Attributes:
        step: the step to call; the first batch settles `microbatches="auto"`.
        metrics: names of what it returns, as far as the check of the first batch told.
    """

    def __init__(self, step: StepFn) -> None:
        check_module.check_arity(step)
        self.step = step
        self.metrics: tuple[str, ...] | None = None
        self._first: object = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._free: int | None = None
        self._told = False
        self._dry_changes: tuple[hidden_attributes.Change, ...] = ()

    def first(self, state: object, batch: object) -> str | None:
        """Check step, state and first batch, without a real step and without the other ranks.

        Returns:
            What to warn of when memory is short.

        Raises:
            StepError: see `check.check_step`.
        """
        self._remember(batch)
        if fit_memory.is_auto(self.step):
            self.step = resliced(self.step, fit_memory.choose_microbatches(self.step, state, batch))
        dry, short = check_module.check_step(self.step, state, batch), None
        if dry is not None:
            self._dry_changes = dry.changes
            self.metrics = tuple(dry.result[1])
            device = next((x.device for x in tree.leaves(state) if isinstance(x, Tensor)), torch.device("cpu"))
            self._free = memory.own_share(memory.free_memory(device), device)
            needed = memory.estimate(self.step, state, batch, dry)
            if needed is not None:
                needed = memory.careful(self.step, state, batch, needed, self._free)
                short = memory.shortage(self.step, needed, batch, device, self._free)
        return short

    def attributes(self, state: object) -> Remembered:
        """Return what the models of the step remember before its first real call, to compare it afterwards."""
        return Remembered(self.step, state, self._dry_changes)

    # --- later batches ------------------------------------------------------------------------------------------------

    def _remember(self, batch: object) -> None:
        batch = _rows(batch)
        self._first = tree.map(_shape_of, batch)
        if type(batch) is dict and all(isinstance(value, Tensor) for value in batch.values()):
            self._dtypes = {name: value.dtype for name, value in batch.items()}

    def same(self, batch: object, index: int) -> None:
        """Warn, once, when a batch has another structure or other dtypes than the first one."""
        if type(batch) is not dict:
            batch = _rows(batch)
        if type(batch) is dict and self._dtypes:
            if len(batch) == len(self._dtypes):
                try:
                    for name, dtype in self._dtypes.items():
                        if batch[name].dtype is not dtype:
                            break
                    else:
                        return
                except (KeyError, AttributeError):
                    pass
        elif self._first is None or self._told:
            return
        self._compare(batch, index)

    def _compare(self, batch: object, index: int) -> None:
        changes = [text for kind, text in self._changes(batch) if kind != "shape"]
        if changes and not self._told:
            self._told = True
            warnings.warn(
                explain(
                    "a batch differs from the first one of this run",
                    where=f"batch {index} of the run: {'; '.join(changes[:4])}",
                    why="a step computes in other types then, and a compiled one is compiled again",
                    instead="one structure and one dtype for all batches, in `transform` or `collate`",
                ),
                BatchChangeWarning,
                stacklevel=3,
            )

    def _changes(self, batch: object) -> list[tuple[str, str]]:
        """Return how a batch differs from the first one, besides its number of samples."""
        if self._first is None:
            return []
        batch = _rows(batch)
        before = dict(zip(tree.paths(self._first, "batch"), tree.leaves(self._first), strict=True))
        now = dict(zip(tree.paths(batch, "batch"), map(_shape_of, tree.leaves(batch)), strict=True))
        found = [("structure", f"{path} is missing") for path in before if path not in now]
        found += [("structure", f"{path} is new") for path in now if path not in before]
        for path in [p for p in now if p in before]:
            (was, trailing), (is_, other) = before[path].value, now[path].value
            if was != is_:
                found.append(("dtype", f"{path} was {was}, now {is_}"))
            elif trailing != other:
                found.append(("shape", f"{path} was {was}[n{_tail(trailing)}], now {is_}[n{_tail(other)}]"))
        return found

    # --- a step that failed -------------------------------------------------------------------------------------------

    def explained(self, error: Exception, state: object, batch: object, index: int) -> Exception:
        """Return the error to raise for one that a step raised: itself, unless more can be said."""
        if memory.is_out_of_memory(error):
            return memory.out_of_memory(self.step, state, batch, error, index=index, free=self._free)
        changes = [text for _, text in self._changes(batch)]
        if isinstance(error, PurestepError):
            return error
        if not changes:
            error.add_note(_note(error, _rows(batch), index))
            return error
        what = f"batch {index} of the run differs from the first one, and the step failed on it"
        where = "; ".join(changes[:4])
        found = None
        alone = lone(self.step, state, batch)
        if alone is not None:
            dry = dry_run(alone.step, alone.state, alone.batch)
            found = misfit(dry, alone.batch, what=f"{what}\n  changed: {where}")
        return found or StepError(explain(what, where=where, why=f"{type(error).__name__}: {str(error)[:300]}"))


class Remembered:
    """What models remember in attributes, from before the first real call of a step.

    Args:
        step: the step.
        state: what it is about to be given.
        dry: attributes that it was seen to change each time on fake tensors.
    """

    def __init__(self, step: StepFn, state: object, dry: tuple[hidden_attributes.Change, ...]) -> None:
        self._step, self._dry = step, dry
        self._modules = models_of(step, (state,))
        self._saved, self._before = hidden_attributes.Saved(self._modules), hidden_attributes.attributes(self._modules)

    def check(self, state: object, batch: object, returned: tuple[object, object], *, repeatable: bool) -> str | None:
        """Refuse attributes that make the same call compute other numbers; called after the first call.

        Only where attributes changed the step is called again, and what it remembers meanwhile is put back.

        Args:
            state, batch: what the step was given.
            returned: what it returned.
            repeatable: whether the step can be called again: not where it consumes its state, or waits for other ranks.

        Returns:
            What to warn of.

        Raises:
            StepError: the same call gave other bits the second time, and the first ones with the attributes put back.
        """
        first = hidden_attributes.attributes(self._modules)
        once, again = hidden_attributes.changed(self._before, first), self._dry
        if once and repeatable:
            now = hidden_attributes.Saved(self._modules)
            try:
                second = self._step(state, batch)[0]
                if facts_of(self._step).backend is None:  # a compiled call runs nothing of the model's Python
                    again = hidden_attributes.changed(first, hidden_attributes.attributes(self._modules))
                if not tree.equal(second, returned[0]):
                    self._saved.put_back()
                    # Not so where kernels add up in another order each time.
                    if tree.equal(self._step(state, batch)[0], returned[0]):
                        raise hidden_attributes.error(again or once)
            finally:
                now.put_back()
        return hidden_attributes.message(again) if again else None


def _note(error: Exception, batch: object, index: int) -> str:
    """What to add to an error that came out of a step, in its own words: which batch, and where in the model."""
    where = [f"batch {index} of the run: {describe_batch(batch)}"]
    path, _ = module_path(error)
    if path:
        where.insert(0, path)
    found = ((why, instead) for message, why, instead in _MESSAGES if re.search(message, str(error)))
    why, instead = next(found, (None, None))
    return explain("the step failed", where="\n".join(where), why=why, instead=instead)


# Messages of torch that name neither the value of the batch nor what to write: pattern, why, what to write.
_MESSAGES = (
    (r"^Target -?\d+ is out of bounds", "labels count from 0, and the scores have one column for each of them", None),
    (
        r"^expected (target dtype to be Long or Byte, but got|scalar type Long but found) ",
        "labels that name a class are int64",
        'cross_entropy(logits, batch["y"].long()), or int64 labels in the data: y.astype(np.int64)',
    ),
)


def _rows(batch: object) -> object:
    return batch.data if isinstance(batch, LocalBatch) else batch


class _Shape:
    """dtype and trailing dims of a leaf, as a leaf itself."""

    def __init__(self, value: tuple[str, tuple[int, ...]]) -> None:
        self.value = value


def _shape_of(leaf: object) -> _Shape:
    if isinstance(leaf, Tensor):
        return _Shape((str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape[1:])))
    return _Shape((type(leaf).__name__, ()))


def _tail(dims: tuple[int, ...]) -> str:
    return "".join(f", {n}" for n in dims)
