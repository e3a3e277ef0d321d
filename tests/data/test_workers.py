"""Workers change nothing but the time: the same bits for every count, kept from epoch to epoch, and clear ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from shared_marks import slow_but

from purestep import data, tree
from purestep.errors import DataError


def pids(source: data.Batches) -> list[int]:
    return source._pools._idle.pids


@pytest.mark.parametrize("workers", slow_but([1, 2, 3], 2))
@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, False), (False, True)])
def test_the_same_bits_for_every_count(sets, seed: int, workers: int, shuffle: bool, drop_last: bool) -> None:
    alone = data.batches(
        sets.Noisy(22),
        4,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        transform=sets.keyed,
        collate=sets.noisy_collate,
    )
    source = alone.replace(num_workers=workers)
    before = torch.get_rng_state()
    for epoch in range(2):
        whole = list(alone.epoch(epoch))
        assert tree.equal(list(source.epoch(epoch)), whole)
        for batch in range(source.length() + 1):
            assert tree.equal(list(source.open(epoch, batch)), whole[batch:])
    assert torch.equal(torch.get_rng_state(), before)
    source.close()


def test_columns_in_workers(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.rand(20, 3))
    table = {"x": np.load(tmp_path / "x.npy", mmap_mode="r"), "y": torch.arange(20)}
    alone = data.batches(table, 3)
    assert tree.equal(list(alone), list(alone.replace(num_workers=1)))


def test_workers_live_from_epoch_to_epoch(sets) -> None:
    source = data.batches(sets.Noisy(12), 4, num_workers=2)
    list(source.epoch(0))
    first = pids(source)
    assert len(first) == 2
    list(source.epoch(1))
    list(source.epoch(5))  # not the next one
    abandoned = source.epoch(2)
    next(abandoned)
    abandoned.close()
    list(source.open(0, 2))
    assert pids(source) == first
    source.close()
    for pid in first:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert len(list(source.epoch(0))) == 3  # closed is not the end
    source.close()


def test_two_iterators_at_once(sets) -> None:
    source = data.batches(sets.Noisy(12), 4, num_workers=1)
    pairs = list(zip(source.epoch(0), source.epoch(1), strict=True))
    alone = source.replace(num_workers=0)
    assert tree.equal([a for a, _ in pairs], list(alone.epoch(0)))
    assert tree.equal([b for _, b in pairs], list(alone.epoch(1)))
    source.close()


def test_workers_end_with_their_batches(sets) -> None:
    source = data.batches(sets.Noisy(12), 4, num_workers=1)
    list(source)
    (pid,) = pids(source)
    del source
    gc.collect()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_workers_are_other_processes_with_one_thread(sets) -> None:
    rows = torch.cat(list(data.batches(sets.Where(8), 2, num_workers=2)))
    assert os.getpid() not in rows[:, 0].tolist()
    assert len(set(rows[:, 0].tolist())) == 2
    assert set(rows[:, 1].tolist()) == {1}


def test_workers_leave_ctrl_c_to_the_main_process(sets) -> None:
    source = data.batches(sets.Noisy(40), 4, num_workers=2)
    list(source)
    for pid in pids(source):
        os.kill(pid, signal.SIGINT)
    assert tree.equal(list(source.epoch(1)), list(source.replace(num_workers=0).epoch(1)))
    source.close()


def test_a_killed_worker_is_an_error_and_not_a_hang(sets) -> None:
    source = data.batches(sets.Noisy(60), 2, num_workers=2)
    list(source.epoch(0))
    os.kill(pids(source)[0], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(source.epoch(1))
    assert time.monotonic() - start < 30
    assert "a worker process ended in the middle of an epoch" in str(caught.value)
    assert "num_workers=0 to see the error in this process" in str(caught.value)
    assert len(list(source.epoch(1))) == 30  # new workers take over
    source.close()


def test_a_sample_that_kills_its_process(sets) -> None:
    with pytest.raises(DataError, match="ended"):
        list(data.batches(sets.Deadly(8), 2, shuffle=False, num_workers=1))


SCRIPT = """
import sys
from purestep import data

class Squares:
    def __len__(self): return 8
    def __getitem__(self, i): return i * i

def main():
    for batch in data.batches(Squares(), 4, shuffle=False, num_workers=1, worker_start=sys.argv[1]).epoch(0):
        print(batch.tolist())

"""


GUARD = 'if __name__ == "__main__":\n    main()\n'


@pytest.mark.slow
def test_a_guarded_script_runs(tmp_path: Path) -> None:
    """As a user starts it: the workers import what is needed, and no more."""
    path = tmp_path / "script.py"
    heavy = '[m for m in ("jax", "orbax", "grain", "torchdata") if m in sys.modules]'
    path.write_text(SCRIPT.replace("return i * i", f"assert not {heavy}; return i * i") + GUARD)
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, path, "forkserver"], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert (done.stdout, done.stderr) == ("[0, 1, 4, 9]\n[16, 25, 36, 49]\n", "")


@pytest.mark.slow
def test_a_guarded_script_runs_with_spawned_workers(zygote, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + GUARD)
    done = zygote.run(path, "spawn")
    assert (done.stdout, done.stderr) == ("[0, 1, 4, 9]\n[16, 25, 36, 49]\n", "")


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(zygote, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + "main()\n")
    done = zygote.run(path, "spawn")
    assert done.returncode == 1
    assert "the script starts its training again while a worker process imports it" in done.stderr
    assert "the worker processes ended before they loaded a batch" in done.stderr
    assert 'instead: if __name__ == "__main__":' in done.stderr


def test_an_interactive_session_sends_what_it_defines(zygote) -> None:
    done = zygote.run(SCRIPT + "main()\n", "forkserver")
    assert (done.stdout, done.stderr) == ("[0, 1, 4, 9]\n[16, 25, 36, 49]\n", "")


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_run(zygote, tmp_path: Path) -> None:
    code = SCRIPT.replace("print(batch.tolist())", "print('ready', flush=True); import time; time.sleep(60)")
    path = tmp_path / "script.py"
    path.write_text(code + GUARD)
    with zygote.popen(path, "forkserver", stderr=None) as main:
        assert main.stdout.readline() == "ready\n"
        family = psutil.Process(main.pid).children(recursive=True)
        assert len(family) >= 2
        main.kill()
        main.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
