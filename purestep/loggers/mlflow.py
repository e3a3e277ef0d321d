"""MLflow tracking: one tracked run a run directory, continued on resume.

Owns the mapping of rows to `log_batch` and the id that ties a run directory to its tracked run. It uses a client of
its own and never MLflow's global active run. An extra: nothing is imported before a sink opens.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purestep.arguments import Name, checked
from purestep.errors import ConfigError, import_extra
from purestep.loggers.base import Logger, Sink, remembered_id, write_atomically

ID_FILE = "mlflow.json"
BATCH = 100  # the most parameters that a tracking server accepts in one request
VALUE = 500  # characters: the shortest limit of any server for the value of a parameter


@dataclass(frozen=True)
class MLflow(Logger):
    """Rows go to one run of an MLflow tracking server. Made by `mlflow`."""

    experiment: str = "purestep"
    name: str | None = None
    tracking_uri: str | None = None

    def open(self, run_dir: Path, *, resume_step: int | None = None) -> Sink:
        tracking = import_extra("mlflow.tracking", extra="mlflow", needed_by="loggers.mlflow")
        run_dir.mkdir(parents=True, exist_ok=True)
        client = tracking.MlflowClient(tracking_uri=self.tracking_uri)
        run_id = remembered_id(run_dir / ID_FILE, resume=resume_step is not None)
        if run_id is None:
            existing = client.get_experiment_by_name(self.experiment)
            experiment_id = client.create_experiment(self.experiment) if existing is None else existing.experiment_id
            run_id = client.create_run(experiment_id, run_name=self.name or run_dir.name).info.run_id
            write_atomically(run_dir / ID_FILE, json.dumps({"id": run_id}) + "\n")
        else:
            client.update_run(run_id, status="RUNNING")
        return MLflowSink(client, run_id, first_step=resume_step or 0)


@checked(ConfigError)
def mlflow(*, experiment: Name = "purestep", name: Name | None = None, tracking_uri: str | None = None) -> MLflow:
    """Log to an MLflow tracking server, with `state.step` as the x-axis.

    A resumed run continues the tracked run of its run directory. Steps that are repeated after a crash are logged again
    at the same x. MLflow never changes a parameter: a hyperparameter that differs after a resume becomes the tag
    `name at step n`. Characters that MLflow does not allow in names become underscores.

    Args:
        experiment: name of the experiment; made when it is missing.
        name: of the run; by default the name of the run directory.
        tracking_uri: of the server or store; by default that of the environment (`MLFLOW_TRACKING_URI`).

    Returns:
        A logger: a frozen value. `open(run_dir)` returns its sink.

    Raises:
        MissingExtra: when it is opened and `mlflow` is not installed (`pip install "purestep[mlflow]"`).

    Examples:
        >>> mlflow(experiment="digits")
        MLflow(experiment='digits', name=None, tracking_uri=None)
    """
    return MLflow(experiment, name, tracking_uri)


class MLflowSink(Sink):
    """A client and the id of a started run."""

    def __init__(self, client: Any, run_id: str, *, first_step: int) -> None:
        super().__init__(first_step=first_step)
        self._client, self._run_id = client, run_id
        self._entities = import_extra("mlflow.entities", extra="mlflow", needed_by="loggers.mlflow")

    def _write(self, step: int, row: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._entities.Metric(_name(name), value, now, step) for name, value in row.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _write_hparams(self, values: dict[str, Any]) -> None:
        texts = {_name(name): str(value)[:VALUE] for name, value in values.items()}
        known = self._client.get_run(self._run_id).data.params
        fresh = [self._entities.Param(name, text) for name, text in texts.items() if name not in known]
        for start in range(0, len(fresh), BATCH):
            self._client.log_batch(self._run_id, params=fresh[start : start + BATCH])
        for name, text in texts.items():
            if known.get(name, text) != text:
                self._client.set_tag(self._run_id, f"{name} at step {self._last}", text)

    def _close(self) -> None:
        self._client.set_terminated(self._run_id, status="FINISHED")


def _name(name: Name) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
