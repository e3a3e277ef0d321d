"""Which steps are recorded, the files, the same bits, a resume, and a process that ends while one records."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import purestep as ps
from purestep.errors import ConfigError

TX = ps.optim.adamw(1e-2)


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


STEP = ps.make_step(loss_fn, TX)


def train(until, callbacks, **options):
    state = ps.init(lambda: torch.nn.Linear(3, 2), TX, seed=3)
    data = ps.data.batches({"x": ps.random.normal(ps.random.key(1), (35, 3))}, 6, seed=2)
    return ps.fit(options.pop("step", STEP), state, data, until=until, callbacks=callbacks, **options)


def spans(path):
    """The marks of ours in a trace, in order."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    marks = [e for e in events if str(e.get("name")).startswith("purestep step") and e.get("cat") == "user_annotation"]
    return [e["name"] for e in sorted(marks, key=lambda e: e["ts"])]


def test_windows_become_files_and_the_bits_stay(tmp_path):
    seen = []
    callbacks = [
        ps.callbacks.profile(every=ps.every.steps(3), steps=2, repeat=2, shapes=True, on_trace=seen.append),
        ps.callbacks.evaluate(loss_fn, [{"x": torch.ones(2, 3)}], every=ps.every.steps(4)),
        ps.callbacks.snapshots(every=ps.every.steps(2)),
    ]
    with_it = train(ps.steps(10), callbacks, run_dir=tmp_path)
    assert ps.digest(with_it.state) == ps.digest(train(ps.steps(10), []).state)
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    stems = ["steps-3-4.rank0", "steps-6-7.rank0"]
    assert files == [f"{stem}{end}" for stem in stems for end in (".pt.trace.json.gz", ".txt")]
    marks = [spans(tmp_path / "profile" / f"{stem}.pt.trace.json.gz") for stem in stems]
    # The first window is cut by an evaluation and a snapshot behind its first step; it is one trace all the same.
    assert marks == [["purestep step 3", "purestep step 4"], ["purestep step 6", "purestep step 7"]]
    table = (tmp_path / "profile" / f"{stems[0]}.txt").read_text()
    assert "aten::addmm" in table
    assert "purestep step 3" in table
    assert [type(one) for one in seen] == [torch.profiler.profile] * 2


def test_a_resumed_run_records_the_rest_of_its_window_and_no_other(tmp_path):
    def profile():
        return ps.callbacks.profile(every=ps.every.steps(3), steps=4)

    train(ps.steps(5), [profile(), ps.callbacks.snapshots()], run_dir=tmp_path)
    resumed = train(ps.steps(12), [profile(), ps.callbacks.snapshots()], run_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "profile").glob("*.txt")) == [
        "steps-3-4.rank0.txt",
        "steps-5-6.rank0.txt",
    ]
    assert ps.digest(resumed.state) == ps.digest(train(ps.steps(12), []).state)


@pytest.mark.slow
def test_what_the_files_hold_of_memory_and_stacks(tmp_path):
    recorded = ps.callbacks.profile(every=ps.every.steps(1), steps=1, memory=True, stack=True, dir=tmp_path / "mine")
    train(ps.steps(2), [recorded])
    assert "Self CPU Mem" in (tmp_path / "mine" / "steps-1-1.rank0.txt").read_text()
    with gzip.open(tmp_path / "mine" / "steps-1-1.rank0.pt.trace.json.gz", "rt") as file:
        assert "Python id" in file.read()


def test_a_dry_run_records_nothing(tmp_path):
    train(ps.steps(9), [ps.callbacks.profile(every=ps.every.steps(1), dir=tmp_path / "mine")], dry_run=3)
    assert not (tmp_path / "mine").exists()


def test_without_a_place_no_run_begins():
    with pytest.raises(ConfigError) as caught:
        train(ps.steps(2), [ps.callbacks.profile()])
    assert str(caught.value).startswith("a profile needs a place\n  where:   'profile': run_dir=None, dir=None")


def test_a_step_that_raises_ends_the_profiler_and_keeps_its_error(tmp_path):
    def breaks(state, batch):
        if int(state.step) == 2:
            raise ZeroDivisionError("of the step")
        return STEP(state, batch)

    recorded = ps.callbacks.profile(every=ps.every.steps(1), steps=3)
    with pytest.raises(ZeroDivisionError, match="of the step"):
        train(ps.steps(5), [recorded], run_dir=tmp_path, step=breaks)
    assert (tmp_path / "profile" / "steps-1-2.rank0.txt").exists()
    with torch.profiler.profile():  # torch allows one at a time
        pass


@pytest.mark.slow
def test_an_error_of_the_sink_is_said_once_and_training_goes_on(tmp_path):
    def fails(profiler):
        raise OSError("no space")

    recorded = ps.callbacks.profile(every=ps.every.steps(1), steps=1, repeat=None, on_trace=fails)
    with pytest.warns(UserWarning, match="profile raised OSError: no space\n  it is left out") as caught:
        result = train(ps.steps(4), [recorded], run_dir=tmp_path)
    assert len(caught) == 1
    assert ps.digest(result.state) == ps.digest(train(ps.steps(4), []).state)


@pytest.mark.slow
def test_a_profiler_of_the_caller_goes_on(tmp_path):
    with torch.profiler.profile() as outer, pytest.warns(UserWarning, match="another profiler"):
        train(ps.steps(4), [ps.callbacks.profile(every=ps.every.steps(1))], run_dir=tmp_path)
    assert any(event.key == "aten::addmm" for event in outer.key_averages())


LEFT_OPEN = """
import sys
import torch
import purestep as ps

tx = ps.optim.sgd(0.1)
step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
data = ps.data.batches({"x": torch.ones(12, 2)}, 2)
events = ps.run(step, ps.init(lambda: torch.nn.Linear(2, 1), tx), data, until=ps.steps(6), run_dir=sys.argv[1],
                callbacks=[ps.callbacks.profile(every=ps.every.steps(1), steps=4),
                           ps.callbacks.snapshots(every=ps.every.steps(1))])
for event in events:
    if events.loop.cursor.batches == 3:
        break
print("left while it records")
"""


@pytest.mark.slow
def test_a_process_that_ends_while_it_records_ends_well(tmp_path):
    # An interpreter of its own: the exit of a forked process would leave out what crashes.
    command = [sys.executable, "-c", LEFT_OPEN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "left while it records\n"), done.stderr


RANKS = """
import sys
import torch
import purestep as ps

tx, plan = ps.optim.sgd(0.1), ps.sharding.ddp()
step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx, microbatches=2, plan=plan)
data = ps.data.batches({"x": torch.ones(12, 2)}, 4)
ps.fit(step, ps.init(lambda: torch.nn.Linear(2, 1), tx, plan=plan), data, until=ps.steps(3), run_dir=sys.argv[1],
       callbacks=[ps.callbacks.profile(every=ps.every.steps(1), steps=1)])
"""


@pytest.mark.slow
def test_each_rank_writes_its_own_files(zygote, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        zygote.popen(RANKS, str(tmp_path), env=os.environ | several | {"RANK": str(rank)}, preload=zygote.RANKS)
        for rank in range(2)
    ]
    for child in children:
        with child:
            _, errors = child.communicate(120)
            assert child.returncode == 0, errors
    files = sorted(path.name for path in (tmp_path / "profile").glob("*.gz"))
    assert files == [f"steps-1-1.rank{rank}.pt.trace.json.gz" for rank in range(2)]


@pytest.mark.slow
def test_a_compiled_step_is_recorded_and_keeps_its_bits(tmp_path):
    step = ps.jit(STEP)
    recorded = ps.callbacks.profile(every=ps.every.steps(2), steps=2)
    with_it = train(ps.steps(6), [recorded], run_dir=tmp_path, step=step)
    assert spans(tmp_path / "profile" / "steps-2-3.rank0.pt.trace.json.gz") == ["purestep step 2", "purestep step 3"]
    assert ps.digest(with_it.state) == ps.digest(train(ps.steps(6), [], step=step).state)
