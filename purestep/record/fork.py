"""`fork`: a new run directory that begins where another run was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from purestep import _cells, tree
from purestep.arguments import Count, Location, checked
from purestep.errors import ConfigError, SnapshotError, explain
from purestep.loggers import csv
from purestep.loop import origin
from purestep.loop.events import LoopState
from purestep.loop.resume import applied_steps
from purestep.loop.saving import DIGESTS, base_of
from purestep.record.experiment import Makes
from purestep.record.replay import Experiments, Which, begun, nearest, opened, positions, stored
from purestep.record.run_record import RunRecord
from purestep.record.run_record import open as open_run
from purestep.record.summary import is_run
from purestep.snapshot import DIRECTORY, Store


@checked(ConfigError, failed=True)
def fork(run: Which, *, at: Count, run_dir: Location, experiment: Makes) -> RunRecord:
    """Prepare a new run that begins where another one was, and goes on from there with what you change.

    The new directory has one snapshot, at `at`, the log up to it, and parent and position in its record. Train in it as
    in any other: `other.fit(run_dir=child.path)`, `ps.fit(..., run_dir=child.path)`. What differs from the parent there
    is no change of a run, so nothing warns of it; what has another structure, such as another optimizer, is refused.

    Where the parent has no snapshot at `at`, its steps from the one before are executed again. It is called by one
    process.

    Args:
        run: the parent, or its directory.
        at: the position, in batches.
        run_dir: of the new run; there must be none yet.
        experiment: what the parent was made of, or a function that makes it from its settings.

    Returns:
        The record of the new run.

    Raises:
        ConfigError: there is a run in `run_dir`, or the parent ends before `at`.
        SnapshotError: there is no snapshot at `at`, and the experiment is not that of the parent.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> @ps.experiment
        ... def linear(lr=0.1):
        ...     tx = ps.optim.sgd(lr)
        ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        ...     data = ps.data.batches({"x": torch.arange(16.0).reshape(8, 2)}, 4)
        ...     return ps.Experiment(step, ps.init(lambda: torch.nn.Linear(2, 1), tx), data, until=ps.steps(5))
        >>> root = tempfile.mkdtemp()
        >>> _ = linear(0.01).fit(run_dir=f"{root}/first")
        >>> child = ps.fork(f"{root}/first", at=3, run_dir=f"{root}/second", experiment=linear)
        >>> child.why, child.snapshots, str(child.parent)
        ('not started', (3,), 'first@3')
        >>> linear(0.002).fit(run_dir=child.path).reason
        'reached 5 steps'
        >>> [str(run.parent) for run in ps.runs(root)]
        ['None', 'first@3']
    """
    record, target = opened(run), _cells.located(run_dir)
    if at < 1:
        what = "fork: at must be a whole number >= 1"
        raise ConfigError(
            explain(what, where=f"at={at}", why="at its beginning a run is no fork", instead="ps.fit(...)")
        )
    if is_run(target) or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        what = "a fork begins in a directory of its own"
        raise ConfigError(
            explain(what, where=f"run_dir={str(run_dir)!r}", why="there are files", instead="another one")
        )
    loop = _loop_at(record, Experiments(record, experiment), at)
    loop = loop.replace(status=loop.status.replace(stop=None, save=False))
    # Whole or not there at all: a run that began in half of it would begin at its beginning.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write(partial, record, loop)
        partial.rename(target)
    except OSError as error:
        raise SnapshotError(
            explain("the new run directory cannot be made", where=str(target), why=f"{type(error).__name__}: {error}")
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_run(target)


def _loop_at(record: RunRecord, experiments: Experiments, at: int) -> LoopState:
    experiment = experiments.at(at)
    if at in record.snapshots:
        return stored(record, experiment, at)[0]
    with begun(record, experiment, nearest(record, at), at, strict=True) as replaying:
        for _ in positions(replaying, at):
            pass
        return replaying.savable()


def _write(directory: Path, record: RunRecord, loop: LoopState) -> None:
    at = loop.cursor.batches
    parent = {"run": str(record.path), "at": at, "digest": tree.digest(loop.train)}
    content: dict[str, Any] = {
        "settings": record.settings_at(at),
        "parent": parent,
        "starts": [],
        "sources": {},
        "end": None,
    }
    origin.write(directory, content)
    log = record.path / "metrics.csv"
    if log.is_file():
        shutil.copyfile(log, directory / log.name)
        csv().open(directory, resume_step=applied_steps(loop)).close()  # takes back what came later
    # Without an identity: what goes on from here may be something else, and is meant to be.
    info: dict[str, Any] = {"epoch": loop.cursor.epoch, "batch": loop.cursor.batch}
    info |= {"updates": applied_steps(loop), "stop": None}
    if record.warmup is not None:  # where a step of warmup="eager" switches, or has switched
        info["step"] = {"warmup": record.warmup}
    with Store(directory / DIRECTORY) as store:
        store.save(at, loop, metrics=loop.status.metrics, info=info, digests=DIGESTS, base=base_of(loop))
