"""Stand-ins for the packages of tracking services, as modules."""

from __future__ import annotations

import dataclasses
import re
import sys
import types

import pytest


@pytest.fixture
def fake_wandb(monkeypatch) -> types.ModuleType:
    """A stand-in that keeps histories by run id, as the service does."""
    module = types.ModuleType("wandb")
    module.histories, module.configs, module.calls = {}, {}, []

    class Run:
        def __init__(self, id):
            self.id, self.finished = id, False
            self.history = module.histories.setdefault(id, [])
            self.config = types.SimpleNamespace(
                update=lambda values, allow_val_change: module.configs.setdefault(id, {}).update(values)
            )

        def define_metric(self, name, **kwargs):
            module.calls.append(("define_metric", name, kwargs))

        def log(self, row):
            assert not self.finished
            self.history.append(dict(row))

        def finish(self):
            self.finished = True

    def init(**kwargs):
        module.calls.append(("init", kwargs))
        return Run(kwargs["id"] or f"run{len(module.histories)}")

    module.init = init
    for kind in ("Image", "Histogram", "Html"):
        setattr(module, kind, lambda *args, kind=kind, **kwargs: (kind, args, kwargs))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def fake_mlflow(monkeypatch) -> types.ModuleType:
    """A stand-in with the parts of MlflowClient that the logger may use; parameters cannot be changed."""
    module = types.ModuleType("mlflow")
    module.experiments, module.runs, module.calls = {}, {}, []

    def check_name(name):
        assert re.fullmatch(r"[A-Za-z0-9_\-. :/]+", name), f"MLflow refuses the name {name!r}"

    class MlflowClient:
        def __init__(self, tracking_uri=None):
            module.calls.append(("client", tracking_uri))

        def get_experiment_by_name(self, name):
            return module.experiments.get(name)

        def create_experiment(self, name):
            module.experiments[name] = types.SimpleNamespace(experiment_id=f"e{name}")
            return f"e{name}"

        def create_run(self, experiment_id, run_name=None):
            id = f"run{len(module.runs)}"
            data = types.SimpleNamespace(params={}, tags={}, metrics=[])
            info = types.SimpleNamespace(run_id=id, run_name=run_name, experiment_id=experiment_id, status="RUNNING")
            module.runs[id] = types.SimpleNamespace(info=info, data=data)
            return module.runs[id]

        def get_run(self, run_id):
            return module.runs[run_id]

        def update_run(self, run_id, status):
            module.runs[run_id].info.status = status

        set_terminated = update_run

        def set_tag(self, run_id, key, value):
            check_name(key)
            module.runs[run_id].data.tags[key] = value

        def log_batch(self, run_id, metrics=(), params=()):
            assert module.runs[run_id].info.status == "RUNNING"
            assert len(params) <= 100
            for p in params:
                check_name(p.key)
                assert len(p.value) <= 500
                assert p.key not in module.runs[run_id].data.params
                module.runs[run_id].data.params[p.key] = p.value
            for m in metrics:
                check_name(m.key)
            module.runs[run_id].data.metrics += metrics

    tracking, entities = types.ModuleType("mlflow.tracking"), types.ModuleType("mlflow.entities")
    tracking.MlflowClient = MlflowClient
    entities.Metric = dataclasses.make_dataclass("Metric", ["key", "value", "timestamp", "step"])
    entities.Param = dataclasses.make_dataclass("Param", ["key", "value"])
    for name, part in {"mlflow": module, "mlflow.tracking": tracking, "mlflow.entities": entities}.items():
        monkeypatch.setitem(sys.modules, name, part)
    return module
