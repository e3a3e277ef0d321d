"""`ps.launch.ray`: on a real local cluster that loses a worker or a node, and what a worker does, in this process."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

import purestep as ps
from purestep.errors import ConfigError
from purestep.launch import ray_train

JOB = Path(__file__).with_name("job.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make():
    """The experiment of the job, whose file needs no Ray to be read."""
    return runpy.run_path(str(JOB))["experiment"]


def work(make, tmp_path, **changes):
    given = {"settings": {"directory": str(tmp_path)}, "until": None, "restarts": True, "options": {}} | changes
    return ray_train._Job(make, str(tmp_path / "run"), **given)


def test_a_worker_reports_each_row_once_with_its_place(make, tmp_path):
    job, rows = work(make, tmp_path, until=ps.steps(6)), []
    job._train(make(str(tmp_path)), rows.append)
    logged = ps.open(tmp_path / "run").metrics
    assert [row["step"] for row in rows] == [2, 4, 5, 6]  # rows of `log`, and the end of an epoch of five batches
    assert rows[-1]["train/loss"] == logged["train/loss"][-1]
    assert {"epoch", "batches", "train/loss_epoch"} <= set(rows[-1])


def test_a_job_travels_with_its_function(make, tmp_path):
    """As Ray pickles it: the function of a script by value, the package by name."""
    job = pickle.loads(cloudpickle.dumps(work(make, tmp_path)))
    assert job.experiment(str(tmp_path), steps=1).until == ps.steps(1)
    assert pickle.loads(cloudpickle.dumps(ps.callbacks)) is ps.callbacks


def test_what_a_restart_would_only_repeat_is_refused(make, tmp_path):
    job, found = work(make, tmp_path), make(str(tmp_path))
    job._check(found, 2)
    alone = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), ps.optim.sgd(0.1))
    without = ps.Experiment(alone, found.state, found.data, callbacks=found.callbacks)
    job._check(without, 1)
    with pytest.raises(ConfigError, match="several workers train one model by a plan") as caught:
        job._check(without, 2)
    assert "ps.sharding.ddp()" in str(caught.value)
    unsaved = ps.Experiment(found.step, found.state, found.data)
    with pytest.raises(ConfigError, match="begins anew at every restart"):
        job._check(unsaved, 2)
    work(make, tmp_path, restarts=False)._check(unsaved, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"storage": "s3://bucket/run"}, "snapshots are written to a file system"),
        ({"workers": (3, 2)}, r"workers=\(3, 2\)"),
        ({"workers": 0}, "workers"),
        ({"max_restarts": -1}, "max_restarts"),
    ],
)
def test_arguments_are_refused_before_ray_is_asked(make, tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        ps.launch.ray(make, **{"storage": tmp_path, **given})


TORCHRUN = """
import runpy, sys, torch, purestep as ps
torch.set_num_threads(1)
found = runpy.run_path(sys.argv[1])["experiment"](sys.argv[2]).fit(run_dir=sys.argv[2] + "/two")
digest = ps.digest(found.state)
if ps.sharding.rank() == 0:
    print(digest)
"""


@pytest.fixture(scope="module")
def undisturbed(zygote, make, tmp_path_factory):
    """The digest of the same run in one process, and in two under the variables of torchrun."""
    directory = tmp_path_factory.mktemp("undisturbed")
    alone = ps.digest(make(str(directory)).fit(run_dir=directory / "one").state)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = [
        zygote.popen(TORCHRUN, JOB, directory, env=os.environ | job | {"RANK": str(r)}, preload=zygote.RANKS)
        for r in range(2)
    ]
    for expected, child in zip([alone, ""], children, strict=True):
        with child:
            out, errors = child.communicate(120)
            assert out.strip() == expected, errors
    return alone


@pytest.mark.slow
@pytest.mark.parametrize("lose", ["worker", "node"])
def test_a_run_that_loses_something_ends_with_the_digest_of_the_undisturbed_one(tmp_path, undisturbed, lose):
    pytest.importorskip("ray.train")
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
    env |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}  # Ray writes a token there
    command = [sys.executable, str(JOB), lose, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)  # minutes on a busy machine
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["digest"] == undisturbed
    assert told["why"] == "reached 12 steps"
    # A lost node leaves room for one worker, and `workers=(1, 2)` allows one.
    assert (told["workers"], told["nodes"], told["lost"]) == ((2, 2, False) if lose == "worker" else (1, 1, True))
    assert "train/loss_epoch" in told["metrics"]
