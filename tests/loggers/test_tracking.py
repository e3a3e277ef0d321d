"""Weights & Biases and MLflow: one tracked run a run directory, through resumes."""

from __future__ import annotations

import json

from purestep import loggers


def once(logger, run_dir, resume_step, hparams):
    sink = logger.open(run_dir, resume_step=resume_step)
    sink.hparams(hparams)
    sink.log((resume_step or 0) + 1, {"loss": 0.5})
    sink.close()


def test_wandb_continues_the_run_of_the_run_directory(fake_wandb, tmp_path):
    logger = loggers.wandb(project="p", name="n", entity="e", group="g", tags=["a", "b"], mode="offline")
    once(logger, tmp_path, None, {"lr": 0.1})
    once(logger, tmp_path, 1, {"lr": 0.2})
    inits = [call[1] for call in fake_wandb.calls if call[0] == "init"]
    fixed = {"project": "p", "name": "n", "entity": "e", "group": "g", "tags": ["a", "b"], "mode": "offline"}
    assert inits == [
        fixed | {"dir": str(tmp_path), "id": None, "resume": None},
        fixed | {"dir": str(tmp_path), "id": "run0", "resume": "allow"},
    ]
    assert fake_wandb.histories == {"run0": [{"loss": 0.5, "step": 1}, {"loss": 0.5, "step": 2}]}
    assert fake_wandb.configs == {"run0": {"lr": 0.2}}
    assert ("define_metric", "*", {"step_metric": "step"}) in fake_wandb.calls


def test_wandb_starts_a_new_run_afresh_or_when_its_id_is_lost(fake_wandb, tmp_path):
    once(loggers.wandb(), tmp_path, None, {})
    once(loggers.wandb(), tmp_path, None, {})
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "run1"}
    for content in ["", "{}", "[]", "null"]:
        (tmp_path / "wandb.json").write_text(content)
        once(loggers.wandb(), tmp_path, 1, {})
    assert len(fake_wandb.histories) == 6


def test_mlflow_continues_the_run_and_never_changes_a_parameter(fake_mlflow, tmp_path):
    logger = loggers.mlflow(experiment="x", tracking_uri="file:///somewhere")
    once(logger, tmp_path / "digits", None, {"lr": 0.1, "seed": 0})
    once(logger, tmp_path / "digits", 1, {"lr": 0.2, "seed": 0, "new": 3})
    ((id, run),) = fake_mlflow.runs.items()
    assert (id, run.info.run_name, run.info.experiment_id, run.info.status) == ("run0", "digits", "ex", "FINISHED")
    assert run.data.params == {"lr": "0.1", "seed": "0", "new": "3"}
    assert run.data.tags == {"lr at step 1": "0.2"}
    assert [(m.key, m.value, m.step) for m in run.data.metrics] == [("loss", 0.5, 1), ("loss", 0.5, 2)]
    assert set(fake_mlflow.calls) == {("client", "file:///somewhere")}


def test_mlflow_uses_an_experiment_that_exists(fake_mlflow, tmp_path):
    for name in ("a", "b"):
        once(loggers.mlflow(experiment="x", name=f"run {name}"), tmp_path / name, None, {})
    assert list(fake_mlflow.experiments) == ["x"]
    assert [run.info.run_name for run in fake_mlflow.runs.values()] == ["run a", "run b"]


def test_mlflow_gets_names_and_values_that_it_takes(fake_mlflow, tmp_path):
    sink = loggers.mlflow().open(tmp_path)
    sink.hparams({"adam[0]": "x" * 1000})
    sink.hparams({"adam[0]": "x" * 1000})
    sink.log(1, {"grad/norm['0.weight']": 0.5, "läss": 1.0})
    sink.close()
    (run,) = fake_mlflow.runs.values()
    assert run.data.params == {"adam_0_": "x" * 500}
    assert run.data.tags == {}
    assert [m.key for m in run.data.metrics] == ["grad/norm__0.weight__", "l_ss"]
