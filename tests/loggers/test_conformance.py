"""What every logger keeps. A new logger is one row of SINKS."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from purestep import loggers
from purestep.errors import ConfigError, MetricError, MissingExtra

Points = dict[str, dict[int, float]]


def points_of_csv(run_dir: Path, module: Any) -> Points:
    columns = loggers.read_csv(run_dir)
    steps = columns.pop("step")
    return {n: {s: v for s, v in zip(steps, c, strict=True) if v is not None} for n, c in columns.items()}


def points_of_tensorboard(run_dir: Path, module: Any) -> Points:
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def points_of_wandb(run_dir: Path, module: Any) -> Points:
    points: Points = {}
    for row in module.histories[json.loads((run_dir / "wandb.json").read_text())["id"]]:
        for name in row.keys() - {"step"}:
            points.setdefault(name, {})[row["step"]] = row[name]
    return points


def points_of_mlflow(run_dir: Path, module: Any) -> Points:
    points: Points = {}
    for m in module.runs[json.loads((run_dir / "mlflow.json").read_text())["id"]].data.metrics:
        points.setdefault(m.key, {})[m.step] = m.value
    return points


@dataclasses.dataclass(frozen=True)
class Row:
    """One logger: its value, the stand-in for its package if it has one, and how to read back what it drew."""

    logger: Any
    read: Callable[[Path, Any], Points]
    fake: str | None = None  # a fixture of conftest.py
    cuts: bool = True  # whether points beyond the step of a resume are gone, and not only drawn over


SINKS = {
    "csv": Row(loggers.csv(), points_of_csv),
    "tensorboard": Row(loggers.tensorboard(), points_of_tensorboard),
    "wandb": Row(loggers.wandb(project="p", tags=["a"]), points_of_wandb, "fake_wandb", cuts=False),
    "mlflow": Row(loggers.mlflow(experiment="x"), points_of_mlflow, "fake_mlflow", cuts=False),
}


@pytest.fixture(params=SINKS)
def row(request) -> Row:
    return SINKS[request.param]


@pytest.fixture
def module(row, request):
    return request.getfixturevalue(row.fake) if row.fake else None


def test_a_logger_is_a_value(row):
    copy = pickle.loads(pickle.dumps(row.logger))
    assert copy == row.logger
    assert hash(copy) == hash(row.logger)
    assert re.fullmatch(r"\w+\(.*\)", repr(row.logger))
    name = dataclasses.fields(row.logger)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(row.logger, name, "other")


def test_what_is_logged_is_drawn(row, module, tmp_path):
    sink = row.logger.open(tmp_path / "new" / "run")
    sink.log(0, {"train/loss": 2.0})
    sink.log(3, {"train/loss": np.float32(0.5), "lr": torch.tensor(0.25)})
    sink.log(3, {"val/loss": np.array(0.75), "n": 4, "flag": True})
    sink.log(3, {})
    sink.log(7, {"train/loss": 0.125})
    sink.flush()
    sink.close()
    sink.close()
    assert row.read(tmp_path / "new" / "run", module) == {
        "train/loss": {0: 2.0, 3: 0.5, 7: 0.125},
        "lr": {3: 0.25},
        "val/loss": {3: 0.75},
        "n": {3: 4.0},
        "flag": {3: 1.0},
    }


def test_not_a_number_and_infinity_are_kept(row, module, tmp_path):
    sink = row.logger.open(tmp_path)
    sink.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    sink.close()
    points = row.read(tmp_path, module)
    assert math.isnan(points["a"][1])
    assert (points["b"][1], points["c"][1]) == (math.inf, -math.inf)


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_a_resumed_run_draws_what_an_undisturbed_one_draws(row, module, tmp_path, killed):
    def log(sink, steps):
        for step in steps:
            sink.log(step, {"loss": 1.0 / (step + 1)})
            if step % 3 == 0:
                sink.log(step, {"val/loss": float(step)})

    straight = row.logger.open(tmp_path / "straight")
    log(straight, range(10))
    straight.close()
    first = row.logger.open(tmp_path / "resumed")
    log(first, range(6))
    # What the first process logged beyond its last snapshot was of another fate, so that leftovers would show.
    for step in (6, 7):
        first.log(step, {"loss": 99.0} | ({} if row.cuts is False else {"only/here": 1.0}))
    if killed:
        first.flush()
    else:
        first.close()
    second = row.logger.open(tmp_path / "resumed", resume_step=5)
    log(second, range(6, 10))
    second.close()
    expected = row.read(tmp_path / "straight", module)
    found = row.read(tmp_path / "resumed", module)
    if row.cuts:
        # TensorBoard readers keep the (empty) name of a purged tag.
        found = {name: drawn for name, drawn in found.items() if drawn}
    assert found == expected
    first.close()


def test_a_fresh_start_forgets(row, module, tmp_path):
    first = row.logger.open(tmp_path)
    first.log(5, {"loss": 1.0})
    first.close()
    second = row.logger.open(tmp_path)
    second.log(1, {"loss": 2.0})
    second.close()
    assert row.read(tmp_path, module) == {"loss": {1: 2.0}}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss": "0.5"}, "the value of 'loss' is not a number\n  where:   row['loss']: str"),
        ({"loss": torch.zeros(2, 3)}, "row['loss']: torch.float32[2, 3]"),
        ({"loss": torch.zeros(1)}, "row['loss']: torch.float32[1]"),
        ({"loss": np.zeros(2)}, "row['loss']: float64[2]"),
        ({"loss": 1j}, "is not a number"),
        ({"loss": torch.tensor(1j)}, "is not a number"),
        ({"loss": None}, "row['loss']: NoneType"),
        ({"loss": torch.zeros((), device="meta")}, "is not a number"),
        ({"step": 1.0}, "'step' cannot be the name of a logged number"),
        ({"": 1.0}, "'' cannot be the name"),
        ({"a\nb": 1.0}, "cannot be the name"),
        ({3: 1.0}, "3 cannot be the name"),
    ],
)
def test_what_cannot_be_logged_is_refused_and_leaves_no_trace(row, module, tmp_path, bad, message):
    sink = row.logger.open(tmp_path)
    sink.log(1, {"loss": 1.0})
    with pytest.raises(MetricError, match=re.escape(message)):
        sink.log(2, {"first": 1.0} | bad)
    sink.log(1, {"more": 2.0})  # the step did not move either
    sink.close()
    assert row.read(tmp_path, module) == {"loss": {1: 1.0}, "more": {1: 2.0}}


def test_a_step_that_goes_back_is_refused(row, module, tmp_path):
    sink = row.logger.open(tmp_path)
    sink.log(4, {"loss": 1.0})
    with pytest.raises(MetricError, match="a row of step 3 came after one of step 4"):
        sink.log(3, {"loss": 1.0})
    sink.close()
    resumed = row.logger.open(tmp_path, resume_step=4)
    with pytest.raises(MetricError, match="a row of step 3 came after one of step 4"):
        resumed.log(3, {"loss": 1.0})
    resumed.close()


def test_a_closed_sink_refuses(row, module, tmp_path):
    sink = row.logger.open(tmp_path)
    sink.close()
    with pytest.raises(ConfigError, match=r"log\(\) on a sink that is closed"):
        sink.log(1, {"loss": 1.0})
    with pytest.raises(ConfigError, match=r"hparams\(\) on a sink that is closed"):
        sink.hparams({"lr": 1.0})


def test_hyperparameters_of_any_kind_are_taken(row, module, tmp_path):
    sink = row.logger.open(tmp_path)
    sink.hparams({})
    sink.hparams({"lr": 1e-3, "adam": {"betas": (0.9, 0.99)}, "name": "x", "none": None, "yes": True, "f": len})
    sink.hparams({f"many/{i}": i for i in range(250)})
    sink.log(1, {"loss": 1.0})
    sink.close()
    assert row.read(tmp_path, module) == {"loss": {1: 1.0}}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, tmp_path, name):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=re.escape(f'pip install "purestep[{name}]"')) as caught:
        SINKS[name].logger.open(tmp_path)
    assert f"loggers.{name} needs the module {name}" in str(caught.value)
    assert isinstance(caught.value, ImportError)
