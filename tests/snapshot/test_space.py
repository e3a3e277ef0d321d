"""Room on the disk, a directory that cannot be written, and a disk that fails under a save: a real one where we may."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from purestep import tree
from purestep.errors import SaveFailed, SnapshotError, TreeError
from purestep.snapshot import Store, all_, best, durable_directories, every_steps, free_space, latest

MEGABYTE = 1_000_000
Usage = namedtuple("Usage", "total used free")


def value(step: int, megabytes: int = 2) -> dict:
    return {"w": torch.full((megabytes * MEGABYTE // 4,), float(step)), "n": step}


@pytest.fixture
def free(monkeypatch):
    """Sets what the disk says is free, in megabytes."""

    def say(megabytes: float) -> None:
        monkeypatch.setattr(free_space.shutil, "disk_usage", lambda path: Usage(0, 0, int(megabytes * MEGABYTE)))

    return say


@pytest.mark.parametrize(
    ("policy", "present", "room", "fits"),
    [
        (latest(2), 0, 3 * 3.1, None),
        (latest(2), 0, 2 * 3.1, "only 2 of the next 3 snapshots fit on the disk"),
        (latest(2), 2, 3.1, None),  # one more, and then the oldest is deleted
        (latest(2), 3, 3.1, None),
        (latest(2), 2, 3.0, "only 0 of the next 1 snapshots fit on the disk"),
        (latest(1) | best("loss", 2), 0, 4 * 3.1, None),
        (latest(1) | best("loss", 2), 0, 3 * 3.1, "only 3 of the next 4 snapshots fit on the disk"),
        (all_(), 0, 3.1, None),  # no bound: the next only
        (all_() | latest(3), 5, 3.0, "only 0 of the next 1 snapshots fit on the disk"),
        (every_steps(10), 1, 3.1, None),
    ],
)
def test_room_for_what_will_be_kept(tmp_path, free, policy, present, room, fits):
    free(room)
    found = free_space.shortage(tmp_path, 2 * MEGABYTE, policy, present)
    assert (found is None) if fits is None else found.startswith(f"{fits}\n  where:   {tmp_path}: ")


def test_the_message_has_the_numbers(tmp_path, free):
    free(7)
    assert free_space.shortage(tmp_path / "not" / "yet", 2 * MEGABYTE, latest(2), 0) == (
        "only 2 of the next 3 snapshots fit on the disk\n"
        f"  where:   {tmp_path}/not/yet: 6.7 MiB free, 8.7 MiB needed\n"
        "  why:     latest(2) keeps up to 2, of 1.9 MiB each and 1.0 MiB around it, and a new one is written before an "
        "old one is deleted\n"
        "  instead: free space, keep fewer, or choose another run_dir="
    )


def test_it_is_checked_before_a_run_and_before_each_save(tmp_path, free):
    store = Store(tmp_path, keep=latest(2))
    store.check(value(1))
    free(2.5)
    with pytest.raises(SnapshotError, match=r"does not fit here\n(.|\n)*2\.9 MiB to write, 2\.4 MiB free"):
        store.check(value(1))
    free(7)
    with pytest.warns(RuntimeWarning, match="only 2 of the next 3 snapshots fit on the disk"):
        store.check(value(1))
    store.save(1, value(1))  # said once
    store.wait()
    free(100)
    store.save(2, value(2))
    store.wait()
    free(2.5)
    with pytest.warns(RuntimeWarning, match="only 0 of the next 1 snapshots fit on the disk"):
        store.save(3, value(3))
    with pytest.raises(SaveFailed, match=r"No space|2\.9 MiB to write, 2\.4 MiB free(.|\n)*untouched: 1, 2"):
        store.wait()
    assert store.restore().step == 2


def test_a_run_that_cannot_save_is_told_at_its_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match=r"cannot be written here\n  where:   .*/file/deep\n  why:     NotADir"):
        Store(tmp_path / "file" / "deep").check({})
    with pytest.raises(TreeError, match=r"\['x'\]"):
        Store(tmp_path).check({"x": object()})
    Store(tmp_path / "new").check({"w": torch.ones(2)})
    assert list((tmp_path / "new").iterdir()) == []

    def refuses(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(durable_directories, "write", refuses)
    with pytest.raises(SnapshotError, match=r"why:     OSError: .* Read-only file system\n  instead: repair it"):
        Store(tmp_path).check({})
    assert [path.name for path in tmp_path.iterdir() if durable_directories.MARK in path.name] == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, and a function that mounts it again with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(place)], check=True, capture_output=True)

    try:
        mount("-t", "tmpfs", "-o", "size=8m", "none")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a file system")
    yield place, lambda option: mount("-o", f"remount,{option}")
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_or_turns_read_only(small_disk, monkeypatch):
    place, remount = small_disk
    root = place / "snapshots"
    store = Store(root, keep=latest(1))
    store.save(1, value(1))
    store.wait()
    ballast = place / "ballast"
    ballast.write_bytes(bytes(5 * 1024 * 1024))
    with monkeypatch.context() as patch:  # the check of the space is right: nothing is begun
        with pytest.warns(RuntimeWarning, match="only 0 of the next"):
            store.save(2, value(2))
        with pytest.raises(SaveFailed, match=r"No space left|MiB to write"):
            store.wait()
        patch.setattr(free_space, "check_room", lambda *args: None)  # somebody else fills the disk in mid-save
        store.save(3, value(3))
        with pytest.raises(SaveFailed, match=r"(?i)no space left(.|\n)*untouched: 1"):
            store.wait()
    assert [path.name for path in root.iterdir()] == ["1"]
    ballast.unlink()
    store.save(4, value(4))
    store.wait()
    remount("ro")
    store.save(5, value(5))
    with pytest.raises(SaveFailed, match=r"Read-only file system(.|\n)*untouched: 4"):
        store.wait()
    assert tree.equal(Store(root).restore().value, value(4))
    with pytest.raises(SnapshotError, match="Read-only file system"):
        store.check(value(5))
    remount("rw")
    store.save(6, value(6))
    store.close()
    assert tree.equal(Store(root).restore().value, value(6))
    assert [path.name for path in root.iterdir()] == ["6"]


def test_a_device_that_reports_errors_while_a_file_is_forced_out(tmp_path, monkeypatch):
    store = Store(tmp_path, keep=all_())
    store.save(1, value(1))
    store.wait()

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(durable_directories.os, "fsync", fails)
        store.save(2, value(2))
        with pytest.raises(SaveFailed, match=r"Input/output error(.|\n)*untouched: 1"):
            store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    store.save(2, value(2))
    store.close()
    assert Store(tmp_path).steps() == [1, 2]


def test_snapshots_of_format_1_are_read(tmp_path):
    root = tmp_path / "run"
    shutil.copytree(Path(__file__).with_name("golden") / "format-1", root)
    store = Store(root)
    back = store.restore()
    assert (back.step, back.metrics, back.info) == (4, {"loss": 0.25}, {"epoch": 2})
    assert tree.digest(back.value) == back.digest
    assert torch.equal(back.value["w"], torch.arange(12.0).reshape(3, 4))
    assert back.value["tied"] is back.value["w"]
    assert (back.value["n"], back.value["list"]) == (10**30, [1.5, None, "x"])
    assert store.read_manifest(4).format == 1
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        good = path.read_bytes()
        path.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
        with contextlib.suppress(SnapshotError):
            assert tree.equal(Store(root).restore(step=4).value, back.value), path
        path.write_bytes(good)
    store.save(5, back.value)
    store.wait()
    assert (store.restore().digest, store.read_manifest(5).format) == (back.digest, 2)
