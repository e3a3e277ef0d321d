"""Where a run begins: at its beginning, or at a snapshot in its run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from purestep import snapshot, tree
from purestep.arguments import Location, checked
from purestep.bits import tensor_bytes
from purestep.errors import ConfigError, SnapshotError, TemplateMismatch, explain
from purestep.loop.events import LoopState
from purestep.loop.identity import Identity, check_resumed, differences, warmup_of
from purestep.loop.machine import Machine
from purestep.module_tensors import Adapted
from purestep.precision import Policy
from purestep.precision import policy as policy_of
from purestep.precision.convert_state import any_policy, under_policy
from purestep.sharding.placement import part_of
from purestep.snapshot import Verify
from purestep.snapshot.listing import Index
from purestep.state import TrainState
from purestep.step_protocol import StepFn, facts_of, resliced
from purestep.trainable import frozen_names

Resume = Literal["auto", "never", "must"] | int


def store_root(run_dir: str | Path) -> Path:
    """Return the directory of the snapshots of a run."""
    return Path(run_dir) / "snapshots"


def begin(
    machine: Machine,
    train: object,
    store: snapshot.Store | None,
    resume: Resume,
    *,
    identity: Identity,
    strict: bool = False,
    silent: bool = False,
) -> tuple[LoopState, int | None]:
    """Return the loop to begin with, and the snapshot it comes from (None: from the beginning).

    Raises:
        ConfigError: `resume` cannot be had.
        DataError: the position of the snapshot is no place in the data of this run.
        SnapshotError: the snapshots cannot be read or do not fit the state, or `strict`, and they are of another run.
    """
    fresh = machine.init(train)
    steps = [] if store is None else store.steps()
    if store is None or not steps or resume == "never":
        if store is not None and steps:
            raise ConfigError(
                explain(
                    "resume='never', but there are snapshots of an earlier run",
                    where=f"{store.root}: {', '.join(str(s) for s in steps)}",
                    why="the new run would have to overwrite them",
                    instead="another run_dir=, or resume='auto' to continue; delete the directory to give the run up",
                )
            )
        if resume not in ("auto", "never"):
            raise ConfigError(
                explain(
                    "there is no snapshot to resume from",
                    where="run_dir=None" if store is None else f"{store.root}",
                    instead="resume='auto', which starts at the beginning when there is none",
                )
            )
        return fresh, None
    wanted = resume if isinstance(resume, int) else None
    try:
        restored = store.restore(like=around(train), step=wanted, fallback=wanted is None)
    except TemplateMismatch as error:
        raise TemplateMismatch(_other_run(error, store, steps[-1] if wanted is None else wanted, identity)) from error
    store.ranks.raise_everywhere(_other_base(train, restored.value.train, str(store.root)))
    adopted, saved = adopt(fresh, restored.value, machine), store.read_manifest(restored.step)
    check_resumed(saved, identity, adopted.cursor, machine.length, strict=strict, silent=silent)
    if wanted is not None:
        store.delete_after(wanted)
    return adopted, restored.step


def _other_base(given: object, stored: object, where: str) -> TemplateMismatch | None:
    """Return the error of a state whose adapters were trained beside other frozen parameters than it has.

    Other frozen parameters are not compared: a step may write them, a teacher that follows its student for example.
    """
    pairs = zip(tree.find(given, TrainState, "state"), tree.find(stored, TrainState), strict=True)
    odd = [f"{path}.buffers[{name!r}]" for (path, own), (_, old) in pairs for name in _changed_base(own, old)]
    if not odd:
        return None
    return TemplateMismatch(
        explain(
            "the adapters of the run directory were trained beside another base",
            where=f"{where}: {', '.join(odd[:3])}{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}",
            why="a low-rank update means something only beside the very weights it was trained with",
            instead="ps.init(rule(model), tx, weights=the_base_of_that_run), or another run_dir=",
        )
    )


def _changed_base(given: TrainState, stored: TrainState) -> list[str]:
    """Return the frozen parameters of a state with adapters that are not the stored ones, in this rank's part."""
    if given.model is None or not any(isinstance(m, Adapted) for m in given.model.module.modules()):
        return []

    def content(state: TrainState, name: str) -> np.ndarray:
        return tensor_bytes(part_of(state.buffers[name]))

    return [name for name in frozen_names(given) if not np.array_equal(content(given, name), content(stored, name))]


def _other_run(error: TemplateMismatch, store: snapshot.Store, at: int, identity: Identity) -> str:
    """The words of a snapshot that does not fit, for a caller who asked for no snapshot."""
    changed: list[str] = []
    with contextlib.suppress(SnapshotError):
        changed = [line for line in differences(store.read_manifest(at), identity) if line.startswith("step")]
    found = str(error)
    where = found.partition("  where:   ")[2].partition("\n  instead: ")[0].replace("\n           ", "\n")
    where = where.replace("missing in the template", "not in the given one").replace(", template ", ", given ")
    place = found.partition("\n  snapshot: ")[2]
    return explain(
        "the run directory holds a run of another state",
        where="\n".join(filter(None, [*changed, where, place])),
        why="the model or the optimizer is not the one that the run began with",
        instead="another run_dir=, or the model and the tx of that run; resume='auto' continues what it finds",
    )


def adopt(fresh: LoopState, stored: LoopState, machine: Machine) -> LoopState:
    """Give each callback its stored state; a new callback starts fresh, a removed one is forgotten."""
    owns = {}
    for name, own in fresh.callbacks.items():
        old = stored.callbacks.get(name, own)
        if type(old) is not type(own):
            raise TemplateMismatch(
                explain(
                    f"the stored state of callback {name!r} is of another kind",
                    where=f"stored {type(old).__name__}, expected {type(own).__name__}",
                    why="another callback had this name when the snapshot was taken",
                    instead="give the callback another name=",
                )
            )
        owns[name] = old
    due = tuple(name for name in stored.status.due if name in owns)
    return stored.replace(callbacks=owns, status=stored.status.replace(due=due))


def recorded_warmup(step: StepFn, store: snapshot.Store | None) -> int | None:
    """Return where a run of `warmup="eager"` began to run compiled, as its snapshots say; every rank calls it.

    Any of them is asked, so that a run that goes back to an earlier one switches where it did before.
    """
    if store is None or facts_of(step).warmup != "eager":
        return None

    def read() -> int | None:
        headers = [entry.header for entry in reversed(Index(store.root).entries()) if entry.header is not None]
        return next((found for header in headers if (found := warmup_of(header.info)) is not None), None)

    told: int | None = store.ranks.from_first(read)
    return told


def settled(step: StepFn, manifest: snapshot.Manifest) -> StepFn:
    """Return a step of `microbatches="auto"` with the number that the run was saved with: bits depend on it."""
    from purestep.preflight import fit_memory

    was = manifest.info.get("step")
    count = was.get("microbatches") if isinstance(was, Mapping) else None
    return resliced(step, count) if fit_memory.is_auto(step) and isinstance(count, int) and count else step


@checked(ConfigError)
def restore(
    run_dir: Location,
    like: Any = ...,
    *,
    step: int | None = None,
    best: str | None = None,
    mode: Literal["min", "max"] = "min",
    policy: Policy | str | None = None,
    verify: Verify = True,
) -> Any:
    """Read what was trained from its snapshots: the train state of a run of `fit`, or the tree of another `Store`.

    Args:
        run_dir: run directory, or the directory of its snapshots.
        like: a template of the same structure, shapes and dtypes: for a run of `fit` a train state, which
            `ps.init(model, tx)` makes. `...` in it, or as all of it, takes what is stored, see `Store.restore`. A
            `LoopState` gives the whole run: position in the data, callbacks and all.
        step: which snapshot; the newest that can be read by default.
        best: name of a metric: take the snapshot that is best in it, among those that were kept.
        mode: whether the smallest or the largest value is best.
        policy: precision policy to have the train state under, whatever it was saved under; `like` may be under any.
            Without one, a state of other dtypes than those of `like` is refused.
        verify: whether to check the checksum of every leaf; "digest" for the digests in the manifest, too.

    Returns:
        What was trained.

    Raises:
        ConfigError: both `step` and `best` are given.
        TemplateMismatch: the snapshot is not of the structure, shapes or dtypes of `like`.
        CorruptSnapshot: stored bytes are missing or changed.
        SnapshotError: there is no snapshot, or none that knows the metric.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import purestep as ps
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     with ps.snapshot.Store(f"{run_dir}/snapshots") as store:
        ...         store.save(5, {"w": torch.arange(3), "name": "digits"})
        ...     restore(run_dir, like={"w": torch.empty(3, dtype=torch.int64), "name": ...})
        {'w': tensor([0, 1, 2]), 'name': 'digits'}
    """
    if step is not None and best is not None:
        raise ConfigError(
            explain("restore takes a step or a best metric, not both", where=f"step={step}, best={best!r}")
        )
    store = snapshot.Store(snapshot.root_of(run_dir), verify=verify)
    if best is not None:
        step = store.best(best, mode)
        if step is None:
            raise SnapshotError(
                explain(
                    f"no snapshot knows the metric {best!r}",
                    where=f"{store.root}: {store.steps()}",
                    instead="ps.callbacks.snapshots(keep=ps.snapshot.best(metric)) keeps those that are best",
                )
            )
    asked = like if policy is None else any_policy(like)
    whole = isinstance(like, LoopState) or not _is_of_a_run(store, step)
    template = asked if whole else around(asked)
    value = store.restore(like=template, step=step, fallback=step is None).value
    found = value if whole else value.train
    return found if policy is None else under_policy(policy_of(policy), found, like)


def around(train: object) -> LoopState:
    """Return the template of a run in which only the train state matters."""
    return LoopState(train, cursor=..., callbacks=..., status=..., elapsed=0.0)  # type: ignore[arg-type]


def _is_of_a_run(store: snapshot.Store, step: int | None) -> bool:
    """Tell whether a snapshot is that of a run, by the newest manifest that can be read."""
    for number in reversed(store.steps()) if step is None else [step]:
        with contextlib.suppress(SnapshotError):
            root = store.read_manifest(number).structure
            return isinstance(root, Mapping) and root.get("class") == tree.node_name(LoopState)
    return False


def applied_steps(loop: LoopState) -> int:
    """Return the x-axis of the logs: `state.step`, or the batches consumed when the train state has no step.

    Of states that are stacked for `vmap` it is the largest step, as one of them may have skipped updates.
    """
    if isinstance(loop.train, TrainState):
        return int(loop.train.step.max())  # each row of the log asks, and mostly it is the whole
    states = tree.find(loop.train, TrainState)
    return int(states[0][1].step.max()) if states else loop.cursor.batches
