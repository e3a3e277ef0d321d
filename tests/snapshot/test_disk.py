from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from purestep.snapshot import Store, durable_directories, latest


def test_everything_is_synced_before_the_rename_and_the_root_after_it(tmp_path, monkeypatch):
    """What a power cut could lose: a file that the rename names before it is on the disk, or the rename itself."""
    log = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), real_rename(a, b))[1])
    temporary = durable_directories.begin(tmp_path, "5")
    durable_directories.write(temporary, {"a": b"1", "deep/er/b": b"2", "deep/c": b"3"})
    durable_directories.commit(temporary, tmp_path / "5")
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    want = {str(temporary / name) for name in ("", "a", "deep", "deep/er", "deep/er/b", "deep/c")}
    assert set(before) == {name.rstrip("/") for name in want}
    assert {Path(name).name for name in before[:3]} == {"a", "b", "c"}  # files before the directories that name them
    assert after == [str(tmp_path)]
    assert sorted(p.name for p in (tmp_path / "5").rglob("*") if p.is_file()) == ["a", "b", "c"]


def test_removal_renames_first(tmp_path, monkeypatch):
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "x").write_text("")

    def stop(path, ignore_errors):
        raise KeyboardInterrupt

    monkeypatch.setattr(durable_directories.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        durable_directories.remove(tmp_path / "5")
    assert not (tmp_path / "5").exists()
    assert durable_directories.MARK in next(tmp_path.iterdir()).name


def test_cleaning_spares_what_this_process_writes(tmp_path):
    mine = durable_directories.begin(tmp_path, "7")
    for name in (f"3{durable_directories.MARK}999-0", f"{durable_directories.MARK}x"):
        (tmp_path / name / "parts").mkdir(parents=True)
    (tmp_path / "3").mkdir()
    durable_directories.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", mine.name]
    durable_directories.abandon(mine)
    assert not mine.exists()


def test_new_directories_are_durable(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(durable_directories, "fsync", synced.append)
    durable_directories.make_root(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
    synced.clear()
    durable_directories.make_root(tmp_path / "a" / "b")
    assert synced == []


@pytest.mark.parametrize("mended_before", ["the next save", "the end"])
def test_what_could_not_be_removed_is_removed_once_the_disk_is_mended(tmp_path, monkeypatch, mended_before):
    store = Store(tmp_path, keep=latest(1))
    store.save(1, {"x": torch.ones(3)})
    store.wait()
    with monkeypatch.context() as broken:
        broken.setattr(durable_directories.shutil, "rmtree", lambda path, ignore_errors: None)
        store.save(2, {"x": torch.ones(3)})
        store.wait()
    assert len(list(tmp_path.glob(f"*{durable_directories.MARK}*"))) == 1
    if mended_before == "the next save":
        store.save(3, {"x": torch.ones(3)})
        store.wait()
    else:
        store.close()
    assert not list(tmp_path.glob(f"*{durable_directories.MARK}*"))
    store.close()
