"""Who owns a run directory: one process, for as long as it lives, and nothing is written outside of it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import purestep as ps
from purestep.errors import ConfigError, SaveFailed, SnapshotError
from purestep.loop import lock as lock_
from purestep.loop.lock import LEASE, Lock

HOLDER = """
import os, sys, time
from pathlib import Path
from purestep.loop.lock import Lock
with Lock(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)  # not by the parent, which may be killed before the child has closed its copy
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def quiet(job, **options):
    return ps.fit(**{**job(), **options})


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def flock(descriptor, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)


# --- the lock and forked children -----------------------------------------------------------------------------------


def test_the_lock_dies_with_its_process_although_a_forked_child_lives(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        child = int(owner.stdout.readline())
        try:
            with (
                pytest.raises(ConfigError, match=f"another process is running .*\n.*process {owner.pid}\n"),
                Lock(tmp_path),
            ):
                pass
            owner.kill()
            owner.wait()
            os.kill(child, 0)  # still there
            with Lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            owner.kill()


FORKS = pytest.mark.filterwarnings("ignore")  # JAX, if another test has loaded it, warns of every fork


@FORKS
def test_a_fork_during_the_run_does_not_hold_the_lock_after_it(tmp_path):
    with Lock(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with Lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@FORKS
def test_a_child_that_leaves_the_block_of_its_parent_releases_nothing(tmp_path):
    with Lock(tmp_path) as lock:
        child = os.fork()
        if not child:
            lock.__exit__(None, None, None)
            try:
                Lock(tmp_path).__enter__()
            except ConfigError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(ConfigError, match="another run of this very process"), Lock(tmp_path):
            pass


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.tensor([float(index % 7)])


def test_a_second_fit_beside_persistent_workers_is_not_refused(tmp_path):
    tx = ps.optim.sgd(0.01)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
    data = torch.utils.data.DataLoader(Numbers(), 4, num_workers=1, persistent_workers=True)
    for until in (2, 4):
        state = ps.init(lambda: torch.nn.Linear(1, 1), tx, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fork beside JAX's threads, and of the loader's order
            result = ps.fit(step, state, data, until=ps.steps(until), run_dir=tmp_path)
        assert result.loop.cursor.batches == until


# --- file systems without locks -------------------------------------------------------------------------------------


def owner(tmp_path, **changes):
    """Write the lease of another owner."""
    text = {**lock_._place(), "pid": 2**22 + 1, "started": "1", "token": "x", **changes}
    (tmp_path / LEASE).write_text(json.dumps(text))


def test_without_locks_a_lease_keeps_others_out_and_says_so(job, tmp_path, no_locks):
    with pytest.warns(RuntimeWarning, match="no locks; a lease keeps other runs out instead\n.*Function not impl"):
        result = quiet(job, until=ps.steps(2), run_dir=tmp_path)
    assert result.reason == "reached 2 steps"
    assert not list(tmp_path.glob(f"{LEASE}*"))


@pytest.mark.parametrize(
    "changes", [{}, {"pid": os.getpid()}, {"pid": "x"}], ids=["dead", "another start", "no number"]
)
def test_a_lease_of_a_dead_process_here_is_taken_over(tmp_path, no_locks, changes):
    owner(tmp_path, **changes)
    with pytest.warns(RuntimeWarning, match="lease"), Lock(tmp_path) as lock:
        assert lock.trouble() is None


def test_a_lease_of_a_living_process_here_is_respected(tmp_path, no_locks):
    parent = os.getppid()
    owner(tmp_path, pid=parent, started=lock_._started(parent))
    with pytest.raises(ConfigError, match=f"another process is running .*\n.*process {parent}\n"), Lock(tmp_path):
        pass


@pytest.mark.parametrize(("age", "taken"), [(0, False), (59, False), (61, True)])
def test_a_lease_of_another_machine_counts_by_its_age(tmp_path, no_locks, age, taken):
    owner(tmp_path, host="other", pid=7)
    os.utime(tmp_path / LEASE, (time.time() - age,) * 2)
    if taken:
        with pytest.warns(RuntimeWarning, match="lease"), Lock(tmp_path):
            pass
        return
    with pytest.raises(ConfigError, match=r"process 7 on other, seen .* s ago"), Lock(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 5000, b"3", b'{"pid": {}}'])
def test_a_lease_that_is_no_lease_counts_by_its_age(tmp_path, no_locks, content):
    (tmp_path / LEASE).write_bytes(content)
    with pytest.raises(ConfigError, match="another process is running"), Lock(tmp_path):
        pass
    os.utime(tmp_path / LEASE, (0, 0))
    with pytest.warns(RuntimeWarning, match="lease"), Lock(tmp_path):
        pass


def test_the_owner_renews_its_lease_and_finds_out_that_it_was_taken(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(lock_, "RENEW_SECONDS", 0.01)
    with warnings.catch_warnings(action="ignore"), Lock(tmp_path) as lock:
        os.utime(tmp_path / LEASE, (0, 0))
        end = time.monotonic() + 10
        while os.stat(tmp_path / LEASE).st_mtime < 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert os.stat(tmp_path / LEASE).st_mtime > 1
        owner(tmp_path, host="other", pid=7)
        assert "another run has taken this run directory over\n" in lock.trouble()
        assert "process 7 on other" in lock.trouble()
    assert json.loads((tmp_path / LEASE).read_text())["pid"] == 7


def test_other_errors_of_the_lock_are_told_as_what_they_are(job, tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(SnapshotError, match=r"cannot be made or written[\s\S]*Input/output error"):
        quiet(job, until=ps.steps(1), run_dir=tmp_path)


# --- nothing is written outside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lock", "snapshots"])
def test_what_is_a_link_is_refused(job, tmp_path, name):
    outside, run_dir = tmp_path / "outside", tmp_path / "run"
    run_dir.mkdir()
    outside.mkdir() if name == "snapshots" else outside.write_text("precious")
    (run_dir / name).symlink_to(outside)
    with pytest.raises(SnapshotError, match=f"is a symbolic link, or no file of ours\n  where:   .*run/{name}\n"):
        quiet(job, until=ps.steps(1), run_dir=run_dir)
    assert not list(outside.iterdir()) if name == "snapshots" else outside.read_text() == "precious"


def test_a_lease_that_is_a_link_is_refused(tmp_path, no_locks):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / LEASE).symlink_to(tmp_path / "outside")
    with pytest.raises(SnapshotError, match="is a symbolic link"), Lock(tmp_path):
        pass
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    os.mkdir(tmp_path / "lock") if kind == "directory" else os.mkfifo(tmp_path / "lock")
    with pytest.raises(SnapshotError, match="no file of ours"), Lock(tmp_path):
        pass


def test_logs_never_follow_links(job, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    outside = {name: tmp_path / name for name in ("metrics.csv", "hparams.json", f"metrics.csv.{os.getpid()}.partial")}
    for name, path in outside.items():
        path.write_text("step\n")
        (run_dir / name).symlink_to(path)
    quiet(job, until=ps.steps(4), run_dir=run_dir)
    assert {path.read_text() for path in outside.values()} == {"step\n"}
    assert len((run_dir / "metrics.csv").read_text().splitlines()) > 1


def test_a_run_directory_may_be_a_link(job, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "there")
    quiet(job, until=ps.steps(2), run_dir=tmp_path / "run")
    assert ps.snapshot.steps(tmp_path / "there") == [2]


# --- a run directory that goes away ---------------------------------------------------------------------------------


def away(tmp_path, how):
    if how == "moved":
        os.rename(tmp_path / "run", tmp_path / "elsewhere")
    else:
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("how", ["moved", "deleted"])
@pytest.mark.parametrize("answer", ["stop", "continue"])
def test_a_directory_that_goes_away_is_told_and_never_made_anew(job, tmp_path, how, answer):
    done = []

    def go(event, loop):
        if loop.cursor.batches >= 3 and not done:
            end = time.monotonic() + 20
            while ps.snapshot.steps(tmp_path / "run") != [2] and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.05)
            done.append(away(tmp_path, how))

    given = job()
    given["callbacks"] = [*given["callbacks"], ps.callbacks.tap(go), ps.callbacks.snapshots(every=ps.every.steps(2))]
    options = {"until": ps.steps(6), "run_dir": tmp_path / "run", "on_save_error": answer}
    where = "elsewhere now" if how == "moved" else "it is gone, with all that was in it"
    text = f"the run directory was {how} while the run used it\n  where:   .*{where}"
    if answer == "stop":
        # The log, which is left out, warns as well.
        with warnings.catch_warnings(action="ignore"), pytest.raises(SaveFailed, match=text):
            ps.fit(**given, **options)
    else:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = ps.fit(**given, **options)
        assert any(re.search(text, str(warning.message)) for warning in said)
        assert (result.unsaved, result.loop.cursor.batches) == (True, 6)
    assert not (tmp_path / "run").exists()
    if how == "moved":
        assert ps.snapshot.steps(tmp_path / "elsewhere") == [2]


def test_a_save_that_has_begun_makes_no_directory_anew(tmp_path):
    with ps.snapshot.Store(tmp_path / "run" / "snapshots") as store:
        store.check({"n": 1})
        away(tmp_path, "deleted")
        store.save(1, {"n": 1})
        with pytest.raises(SaveFailed, match="FileNotFoundError"):
            store.wait()
    assert not (tmp_path / "run").exists()


def test_a_new_owner_of_the_name_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    with Lock(tmp_path / "run") as first:
        away(tmp_path, "moved")
        (tmp_path / "run").mkdir()
        with Lock(tmp_path / "run") as second:
            assert "was moved" in first.trouble()
            assert second.trouble() is None


# --- the argument ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_dir", ["", " ", "\t\n", Path(), Path("")], ids=repr)
def test_a_run_directory_without_a_name_is_refused(job, run_dir):
    with pytest.raises(ConfigError, match=r"run_dir= names no directory\n[\s\S]*run_dir='runs/digits'"):
        quiet(job, until=ps.steps(1), run_dir=run_dir)


@pytest.mark.parametrize("run_dir", ["a\0b", Path("a\0b")], ids=repr)
def test_a_run_directory_that_cannot_be_named_is_refused(job, run_dir):
    with pytest.raises(ConfigError, match="run_dir= is a path"):
        quiet(job, until=ps.steps(1), run_dir=run_dir)
