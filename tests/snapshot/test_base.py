"""Leaves that are written once, beside the snapshots that share them."""

import os
import shutil
import signal

import pytest
import torch

from purestep import bits, tree
from purestep.errors import CorruptSnapshot
from purestep.snapshot import Base, Store, all_, latest
from purestep.snapshot.header import read_header
from purestep.snapshot.listing import Index
from purestep.snapshot.stored_digest import check as check_digests

BASE = Base(frozenset({"['frozen']['w']", "['frozen']['b']", "['tied']"}), "['frozen']")


def value(step, base_seed=0):
    draw = torch.Generator().manual_seed(base_seed)
    weight = torch.randn(600, 501, generator=draw)  # an array of its own; what is small shares an arena
    frozen = {"w": weight, "b": torch.randn(7, generator=draw).bfloat16(), "moving": torch.tensor(step)}
    return {"frozen": frozen, "tied": weight, "trained": torch.full((9, 3), float(step)), "step": step}


def used(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_a_base_is_written_once_and_every_snapshot_has_its_digest(tmp_path):
    with Store(tmp_path / "shared", keep=all_()) as store, Store(tmp_path / "whole", keep=all_()) as whole:
        for step in (1, 2, 3):
            store.save(step, value(step), base=BASE)
            whole.save(step, value(step))
        store.wait(), whole.wait()
        nbytes = 600 * 501 * 4
        assert used(store.root / "base") > nbytes > 50 * max(used(store.root / str(step)) for step in (1, 2, 3))
        assert used(whole.root / "3") > nbytes
        (part,) = (store.root / "base").iterdir()
        stamps = {path: path.stat().st_mtime_ns for path in part.rglob("*")}
        store.save(4, value(4), base=BASE)
        store.wait()
        assert stamps == {path: path.stat().st_mtime_ns for path in part.rglob("*")}
        for step in (1, 4):
            made = store.read_manifest(step)
            assert (made.base.parts, made.digest) == ((part.name,), tree.digest(value(step)))
            back = store.restore(value(0), step=step, verify="digest")
            assert tree.equal(back.value, value(step))
            assert back.value["tied"] is back.value["frozen"]["w"]
            check_digests(store.root / str(step))
        # By the paths below the base; a tied leaf, which is elsewhere, keeps the path that it has.
        pairs = {"['w']": value(0)["tied"], "['b']": value(0)["frozen"]["b"], "['tied']": value(0)["tied"]}
        assert made.base.digest == bits.digest_leaves(pairs.items())
        assert read_header(store.root / "4").format == 3
        assert read_header(whole.root / "3").format == 2


def test_what_changes_all_the_same_is_written_again_and_the_old_goes_with_its_last_snapshot(tmp_path):
    with Store(tmp_path, keep=latest(2)) as store:
        parts = []
        for step, seed in ((1, 0), (2, 1), (3, 1), (4, 0)):
            store.save(step, value(step, seed), base=BASE)
            store.wait()
            parts.append({path.name for path in (tmp_path / "base").iterdir()})
            assert parts[-1] == {name for entry in Index(tmp_path).entries() for name in entry.header.base.parts}
            for kept in store.steps():
                assert tree.equal(
                    store.restore(step=kept, verify="digest").value, value(kept, {1: 0, 2: 1, 3: 1, 4: 0}[kept])
                )
        assert [len(names) for names in parts] == [1, 2, 1, 2]
        assert parts[0] < parts[1] == parts[3]
        for step in (5, 6):
            store.save(step, value(step))
        store.wait()
        assert not (tmp_path / "base").exists()


def damaged(part, how):
    content = next(path for path in part.rglob("*") if path.is_file() and path.stat().st_size > 1_000_000)
    if how == "missing":
        shutil.rmtree(part)
    elif how == "cut off":
        os.truncate(content, 1000)
    else:
        raw = bytearray(content.read_bytes())
        raw[12345] ^= 1
        content.write_bytes(raw)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("missing", "the base of the snapshot is not there"),
        ("other bits", "the base has another digest"),
        ("cut off", "a stored array is not as large as its leaves"),
    ],
)
def test_another_base_is_refused(how, text, tmp_path):
    with Store(tmp_path, keep=all_()) as store:
        store.save(1, value(1), base=BASE)
        store.wait()
        (part,) = (tmp_path / "base").iterdir()
        digest = store.read_manifest(1).base.digest
        damaged(part, how)
        with pytest.raises(CorruptSnapshot, match=text) as caught:
            store.restore(step=1)
        if how != "cut off":
            assert digest[:16] in str(caught.value)
            assert all(f"{part}:" in str(caught.value) for part in ("where", "why", "instead"))
        if how != "other bits":  # a save sees that it is not whole, and has the bytes
            store.save(2, value(2), base=BASE)
            store.wait()
            assert tree.equal(store.restore(step=1).value, value(1))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["os.rename", "part renamed", "disk.commit", "disk.remove"])
def test_a_kill_at_any_moment_leaves_every_snapshot_with_its_base(place, python_process, tmp_path):
    stops = {
        "os.rename": "os.rename = kill",
        "part renamed": "base.durable_directories.fsync = lambda p, f=disk.fsync: kill() if p.name == 'base' else f(p)",
        "disk.commit": "disk.commit = kill",
        "disk.remove": "disk.remove = lambda p, f=disk.remove: kill() if 'base' in str(p) and p.exists() else f(p)",
    }
    script = (
        "import os, signal, sys\nsys.path.insert(0, sys.argv[2])\nfrom test_base import *\n"
        "from purestep.snapshot import base, durable_directories as disk\n"
        "kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from pathlib import Path\nstore = Store(Path(sys.argv[1]))\nstore.save(1, value(1), base=BASE); store.wait()\n"
        f"{stops[place]}\nstore.save(2, value(2, 1), base=BASE); store.wait()"
    )
    done = python_process(script, str(tmp_path), os.path.dirname(__file__))
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Store(tmp_path) as store:
        last = store.latest()
        assert last == (2 if place == "disk.remove" else 1)
        assert tree.equal(store.restore().value, value(last, last - 1))
        store.clean()
        store.save(3, value(3, 1), base=BASE)
        store.wait()
        assert tree.equal(store.restore().value, value(3, 1))
        assert [len(list((tmp_path / "base").iterdir())), store.steps()] == [1, [3]]
        assert not [path for path in tmp_path.rglob("*") if ".purestep-tmp" in path.name]
