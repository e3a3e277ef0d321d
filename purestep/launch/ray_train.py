"""`ray`: an experiment as a job of Ray Train. Ray places and restarts the workers; the run itself is that of `fit`.

Owns what a worker does: it makes the experiment, trains it in a run directory on shared storage, and reports to Ray.
Ray's own checkpoints are not used: a restarted group of workers continues at the last snapshot of the run directory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from purestep.arguments import Count, Location, Whole, checked
from purestep.errors import ConfigError, RankError, explain, import_extra
from purestep.loop.cadence import Until
from purestep.loop.events import Event, LoopState
from purestep.loop.lock import STALE_SECONDS, Lock
from purestep.loop.resume import applied_steps
from purestep.loop.roles import SnapshotPolicy
from purestep.record.experiment import Experiment, Makes, made
from purestep.record.run_record import RunRecord
from purestep.record.run_record import open as open_run
from purestep.step_protocol import facts_of

_REFUSED = "purestep/refused"  # reported instead of metrics: an error that a restart would only repeat


@checked(ConfigError)
def ray(
    experiment: Makes,
    *,
    workers: Count | tuple[int, int] = 1,
    storage: Location,
    resources: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    until: Until | None = None,
    max_restarts: Whole = 3,
    **options: Any,
) -> RunRecord:
    """Train an experiment on workers of a Ray cluster, and return the record of the run.

    Ray Train (https://docs.ray.io/en/latest/train/train.html) places the workers and joins them as processes of torch.
    When a worker or its node is lost, Ray starts the workers again, on as many as there is room for, and the run
    continues at its last snapshot. The bits are those of any other launcher: with `microbatches=V` in the step and
    numbers of workers that divide V, they depend neither on losses nor on the number of workers.

    Call it where `ray.init()` finds the cluster; it starts a local one if there is none. The same call continues a run.

    Args:
        experiment: a function that makes an experiment; each worker calls it. Or the experiment, which is pickled.
        workers: number of workers, or the least and the most of them; then Ray changes their number with the cluster.
        storage: directory that every node sees under this path. It is the run directory; Ray's own files are in `ray/`.
        resources: of each worker, as Ray names them: `{"CPU": 4, "GPU": 1}`; one CPU by default. torch computes with
            as many threads as a worker has CPUs, and bits depend on their number.
        settings: arguments of the function.
        until: where the run ends; by default where the experiment says.
        max_restarts: how many times Ray starts the workers again after an error or a loss.
        options: others of `fit`, such as `loggers`; pickled.

    Returns:
        The record of the run, as `ps.open(storage)` reads it: metrics, digest, why it ended. What is logged or
        evaluated was reported to Ray, too (`ray.train.report`), by its name, with `step`, `epoch` and `batches`.

    Raises:
        ConfigError: arguments or an experiment that do not fit together.
        MissingExtra: Ray Train is not installed (`pip install "purestep[ray]"`).
        RankError: the run failed more often than it may be restarted; with the error of a worker.
    """
    directory = _shared(storage)
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= least <= most:
        what = "workers is a positive number, or the least and the most of them"
        raise ConfigError(explain(what, where=f"workers={workers!r}", instead="workers=(2, 4)"))
    if max_restarts < 0:  # Ray takes -1 for no limit
        raise ConfigError(explain("max_restarts is a whole number >= 0", where=f"max_restarts={max_restarts!r}"))
    train: Any = import_extra("ray.train", extra="ray", needed_by="ps.launch.ray")
    torch_train: Any = import_extra("ray.train.torch", extra="ray", needed_by="ps.launch.ray")
    job = _Job(experiment, str(directory), settings or {}, until, max_restarts > 0, options)
    trainer = torch_train.TorchTrainer(
        job,
        torch_config=torch_train.TorchConfig(backend=_backend(resources or {})),
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu=(resources or {}).get("GPU", 0) > 0,
            resources_per_worker=dict(resources) if resources else None,
        ),
        run_config=train.RunConfig(
            name="ray",
            storage_path=str(directory),
            failure_config=train.FailureConfig(max_failures=max_restarts),
        ),
    )
    try:
        result = trainer.fit()
    except train.TrainingFailedError as error:
        raise RankError(
            explain(
                f"the run failed on Ray, with {max_restarts} restarts",
                where=str(directory),
                why=str(error),
                instead="remove the cause and call it again: it continues at the last snapshot",
            )
        ) from error
    refused = (result.metrics or {}).get(_REFUSED)
    if refused is not None:
        raise ConfigError(refused)
    return open_run(directory)


def _shared(storage: str | Path) -> Path:
    if "://" in str(storage):
        raise ConfigError(
            explain(
                "snapshots are written to a file system",
                where=f"storage={str(storage)!r}",
                instead="storage='/shared/runs/digits'   # NFS, Lustre, EFS, ...: one path on every node",
            )
        )
    directory = Path(storage).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _backend(resources: Mapping[str, float]) -> str:
    # Values on the host (signals, time, decisions of the loop) are exchanged by gloo on machines with GPUs, too.
    return "cpu:gloo,cuda:nccl" if resources.get("GPU", 0) > 0 else "gloo"


@dataclasses.dataclass(frozen=True)
class _Job:
    """What Ray calls in every worker, in each of their lives."""

    experiment: Any
    run_dir: str
    settings: Mapping[str, Any]
    until: Until | None
    restarts: bool
    options: Mapping[str, Any]

    def __call__(self) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        if torch.cuda.is_available():
            torch.cuda.set_device(ray.train.torch.get_device())
        try:
            found = made(self.experiment, self.settings)
            self._check(found, context.get_world_size())
        except ConfigError as error:  # every worker raises it, and would again
            ray.train.report({_REFUSED: str(error)})
            return
        if context.get_world_rank() == 0:
            _wait_for_the_dead(Path(self.run_dir))
        self._train(found, ray.train.report)

    def _check(self, found: Experiment, size: int) -> None:
        if size > 1 and facts_of(found.step).plan is None:
            what = "several workers train one model by a plan, and the step has none"
            instead = "plan = ps.sharding.ddp()\nstep = ps.make_step(loss_fn, tx, plan=plan, microbatches=4)"
            raise ConfigError(explain(what, where=f"{size} workers", instead=instead))
        if self.restarts and not any(isinstance(callback, SnapshotPolicy) for callback in found.callbacks):
            raise ConfigError(
                explain(
                    "a run that takes no snapshots begins anew at every restart",
                    where=f"callbacks: {', '.join(callback.name for callback in found.callbacks) or 'none'}",
                    instead="callbacks=[ps.callbacks.snapshots(every=ps.every.minutes(10))]\nor max_restarts=0",
                )
            )

    def _train(self, found: Experiment, report: Any) -> None:
        options = dict(self.options) | ({} if self.until is None else {"until": self.until})
        told: str | None = None
        with found.run(run_dir=self.run_dir, **options) as events:
            for event in events:
                # A report is a barrier of all workers. The loop state is the same on each of them, so all come here.
                values = repr(sorted(events.loop.status.metrics.items()))
                if values != told and events.loop.status.metrics:
                    told = values
                    report(_row(event, events.loop))


def _row(event: Event, loop: LoopState) -> dict[str, float]:
    place = {"step": applied_steps(loop), "epoch": loop.cursor.epoch, "batches": loop.cursor.batches}
    return {**loop.status.metrics, **place}


def _wait_for_the_dead(run_dir: Path) -> None:
    """Wait until the lease of a worker that was lost with its node is void; that of a living run is refused later."""
    end = time.monotonic() + 1.5 * STALE_SECONDS
    while time.monotonic() < end:
        try:
            with Lock(run_dir):
                return
        except ConfigError:
            time.sleep(1.0)
