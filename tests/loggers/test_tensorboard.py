"""TensorBoard: the HPARAMS tab, torn event files, and what its reader sees."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing import event_accumulator as accumulator

from purestep import loggers
from purestep.errors import ConfigError


def scalars(path):
    events = accumulator.EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_hyperparameters_are_in_the_same_run_for_the_hparams_tab(tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    sink = loggers.tensorboard().open(tmp_path)
    sink.hparams({"lr": 0.1, "name": "adam", "none": None})
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["name"].string_value == "adam"
    assert [p.name for p in (tmp_path / "tensorboard").iterdir() if p.is_dir()] == []


def test_a_torn_event_file_does_not_hide_the_resumed_run(tmp_path):
    sink = loggers.tensorboard().open(tmp_path)
    for step in range(1, 9):
        sink.log(step, {"loss": float(step)})
    sink.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    resumed = loggers.tensorboard().open(tmp_path, resume_step=4)
    resumed.log(5, {"loss": 50.0})
    resumed.close()
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]}


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_flush_interval_that_is_none_is_refused(seconds):
    with pytest.raises(ConfigError, match="is not a positive number of seconds"):
        loggers.tensorboard(flush_seconds=seconds)
