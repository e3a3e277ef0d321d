"""A slow or full disk, and a slow logger: how long they hold up a run, what is left out, and how the run ends."""

import dataclasses
import errno
import os
import signal
import threading
import time
import warnings

import pytest

import purestep as ps
from purestep.errors import ConfigError
from purestep.loggers import Logger
from purestep.loop import SaveLost, saving
from purestep.loop.log_queue import DroppedRowsWarning
from purestep.snapshot import writer
from purestep.testing import assert_trees_equal, comparable


@pytest.fixture
def disk(monkeypatch):
    """A disk that writes a snapshot only while it is open."""
    gate, write = threading.Event(), writer.write

    def slow(*args, **options):
        gate.wait(30)
        return write(*args, **options)

    monkeypatch.setattr(writer, "write", slow)
    yield gate
    gate.set()


def at_batch(number, call):
    done = []

    def watch(event, loop):
        if loop.cursor.batches >= number and not done:
            done.append(call())

    return ps.callbacks.tap(watch)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def fit(job, run_dir, *callbacks, until=6, **options):
    given = job()
    given["callbacks"] = [*given["callbacks"], *callbacks]
    return ps.fit(**given, until=ps.steps(until), run_dir=run_dir, **options)


def test_after_the_grace_period_the_run_ends_and_keeps_its_lock_while_the_disk_still_writes(job, tmp_path, disk):
    began = time.monotonic()
    cut = fit(job, tmp_path / "a", at_batch(3, sigterm), grace_seconds=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    assert (cut.reason, cut.exit_code, cut.unsaved) == ("SIGTERM", 143, True)
    assert ps.snapshot.steps(tmp_path / "a") == []
    assert ps.open(tmp_path / "a").why == "not finished"  # nothing more is written to such a disk
    with pytest.raises(ConfigError, match="another run of this very process uses this run directory"):
        fit(job, tmp_path / "a")
    disk.set()
    resumed, end = None, time.monotonic() + 20
    while resumed is None and time.monotonic() < end:
        try:
            resumed = fit(job, tmp_path / "a")
        except ConfigError:
            time.sleep(0.01)
    straight = fit(job, tmp_path / "b")
    assert_trees_equal(comparable(resumed.loop), comparable(straight.loop))
    assert (resumed.exit_code, resumed.unsaved) == (0, False)


def test_without_a_grace_period_the_run_waits_until_its_snapshot_is_durable(job, tmp_path, disk):
    threading.Timer(0.4, disk.set).start()
    began = time.monotonic()
    cut = fit(job, tmp_path, at_batch(3, sigterm))
    assert time.monotonic() - began >= 0.4
    assert (cut.exit_code, cut.unsaved) == (143, False)
    assert ps.snapshot.steps(tmp_path) == [cut.loop.cursor.batches]


def test_a_snapshot_that_is_due_while_the_disk_is_busy_is_left_out_and_said_once(job, tmp_path, disk, monkeypatch):
    monkeypatch.setattr(saving, "SLOW_DISK_SECONDS", 0.02)
    lost = []
    watch = ps.callbacks.tap(lambda event, loop: lost.append(event.error) if isinstance(event, SaveLost) else None)
    extra = dataclasses.replace(at_batch(5, disk.set), name="open")
    every = ps.callbacks.snapshots(every=ps.every.steps(1), keep=ps.snapshot.all_())
    with pytest.warns(UserWarning, match="the disk is slower than the snapshots") as said:
        result = fit(job, tmp_path / "a", every, watch, extra)
    assert [f"that of batch {n} is left out" in text for n, text in zip((2, 3, 4), lost, strict=False)] == [True] * 3
    assert len([w for w in said if "slower than the snapshots" in str(w.message)]) == 1
    assert {1, 6} <= set(ps.snapshot.steps(tmp_path / "a")) <= {1, 5, 6}
    assert (result.exit_code, result.unsaved) == (0, False)
    straight = fit(job, tmp_path / "b")
    assert_trees_equal(comparable(result.loop), comparable(straight.loop))


@pytest.mark.parametrize("good", [0, 1])
def test_a_last_snapshot_that_cannot_be_written_is_exit_code_1(job, tmp_path, monkeypatch, good):
    write, calls = writer.write, []

    def full(*args, **options):
        calls.append(1)
        if len(calls) > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args, **options)

    monkeypatch.setattr(writer, "write", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        result = fit(job, tmp_path, ps.callbacks.snapshots(every=ps.every.steps(4)))
    assert (result.reason, result.unsaved, result.exit_code) == ("reached 6 steps", True, 1)
    assert ps.snapshot.steps(tmp_path) == [4] * good
    monkeypatch.setattr(writer, "write", write)
    again = fit(job, tmp_path)
    assert (again.unsaved, again.exit_code) == (False, 0)
    assert ps.snapshot.steps(tmp_path) == [6]


@dataclasses.dataclass(frozen=True)
class Stuck(Logger):
    """A logger whose service does not answer."""

    gate: threading.Event

    def open(self, run_dir, *, resume_step=None):
        return self

    def log(self, step, row):
        self.gate.wait(60)

    def flush(self):
        pass

    def close(self):
        pass


def test_a_logger_that_hangs_does_not_outlast_the_grace_period(job, tmp_path):
    gate = threading.Event()
    began = time.monotonic()
    with pytest.warns(DroppedRowsWarning, match="rows of the log were left out"):
        cut = fit(job, tmp_path, at_batch(5, sigterm), loggers=[Stuck(gate)], grace_seconds=0.5)
    assert time.monotonic() - began < 5
    gate.set()
    assert (cut.exit_code, cut.unsaved) == (143, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(job, tmp_path).exit_code == 0
