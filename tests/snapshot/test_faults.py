"""What happens to a snapshot when the disk, the process or the bytes fail."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from purestep import tree
from purestep.errors import CorruptSnapshot, SnapshotError
from purestep.snapshot import Store, all_, durable_directories
from purestep.snapshot.codec import encode
from purestep.snapshot.manifest import DATA, PIECES, TREE, dump, read_manifest

STATE = """
import sys, torch
from purestep.snapshot import Store, latest, all_, durable_directories as disk
def value(step):
    return {"w": torch.arange(600_000) + step, "b": torch.full((5,), float(step)), "n": step}
"""


def value(step: int) -> dict:
    return {"w": torch.arange(600_000) + step, "b": torch.full((5,), float(step)), "n": step}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    with Store(root, keep=all_()) as store:
        for step in (1, 2):
            store.save(step, value(step))
    return root


def files_of(snapshot: Path) -> list[Path]:
    return sorted(path for path in snapshot.rglob("*") if path.is_file())


def damage(root: Path, spoil) -> str:
    """Spoil the newest snapshot; say whether it was refused. What is given back is always one of the two states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        spoil(root / "2")
        text = ""
        try:
            assert tree.equal(Store(root).restore(step=2).value, value(2))
        except SnapshotError as error:
            text = str(error)
        back = Store(root).restore()
    assert not text or ("2 cannot be read" in text and "restore(step=1)" in text)
    assert (back.step, [step for step, _ in back.skipped]) == ((1, [2]) if text else (2, []))
    assert tree.equal(back.value, value(back.step))
    return text


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "missing"])
def test_every_file_damaged_in_turn(good, tmp_path, how, seed):
    refused = []
    for path in files_of(good / "2"):
        root = tmp_path / "copy"
        shutil.copytree(good, root)
        name = path.relative_to(good / "2")

        def spoil(snapshot: Path, name=name):
            file = snapshot / name
            content = bytearray(file.read_bytes())
            if how == "missing":
                file.unlink()
            elif how == "flip" and content:
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
                file.write_bytes(content)
            else:
                file.write_bytes(content[: len(content) // 2] if how == "truncate" else b"")

        if damage(root, spoil):
            refused.append(name.name)
        shutil.rmtree(root)
    assert {"data.json", "tree.json", "pieces.json"} <= set(refused)
    if how == "missing":  # a zarr chunk that is missing would read as zeros, were it not for the checksums
        assert refused.count("0") == 2


def test_flipped_data_names_the_leaf(good, tmp_path):
    for chunk, leaf in (("arena-0/0", r"\['b'\]: float32\[5\]"), ("0-*/0", r"\['w'\]: int64\[600000\]")):
        root = tmp_path / "copy"
        shutil.copytree(good, root)

        def spoil(snapshot: Path, chunk=chunk):
            (file,) = (snapshot / "parts" / "0" / "state").glob(chunk)
            content = bytearray(file.read_bytes())
            content[17] ^= 1
            file.write_bytes(content)

        text = damage(root, spoil)
        assert re.search(rf"stored leaves are corrupt\n +where: +{leaf}\n", text), text
        assert text.count("float32[5]") + text.count("int64[600000]") == 1
        with Store(root, verify=False) as trusting:  # the switch does what it says
            assert trusting.restore(step=2).step == 2
        shutil.rmtree(root)


def test_an_unreadable_array_names_its_leaf(good, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(good, root)

    def spoil(snapshot: Path):
        (file,) = (snapshot / "parts" / "0" / "state").glob("0-*/.zarray")
        file.write_text("{}")

    text = damage(root, spoil)
    assert "stored arrays cannot be read" in text
    assert "1 of 2 arrays" in text
    assert "['w']: int64[600000], in " in text


def forge(snapshot: Path, **changes) -> None:
    """Write a manifest that is whole in itself, as an attacker could."""
    made = read_manifest(snapshot)
    fields = {name: getattr(made, name) for name in type(made).__dataclass_fields__}
    durable_directories.write(snapshot, dump(type(made)(**fields | changes)))


def test_a_forged_manifest_cannot_escape_or_run_code(good, tmp_path):
    marker = tmp_path / "executed"
    pieces = read_manifest(good / "2").pieces
    outside = [piece._replace(array="../../../../1/parts/0/state/arena-0") for piece in pieces]
    leaf = type(encode(torch.ones(2)).leaves[0])
    forgeries = [
        ({"pieces": outside}, "expected the name of a stored array"),
        ({"pieces": [piece._replace(array="/etc/passwd") for piece in pieces]}, "expected the name of a stored array"),
        (
            {"pieces": [piece._replace(rank="../../1/parts/0") for piece in pieces]},
            "[3]\n             why:     expected a whole number from 0 up",
        ),
        ({"pieces": [piece._replace(offset=10**15) for piece in pieces]}, "overlap or leave a gap"),
        ({"pieces": [piece._replace(nbytes=10**15) for piece in pieces]}, "expected a shard of a leaf"),
        ({"pieces": [piece._replace(start=(-1,)) for piece in pieces]}, "expected a whole number from 0"),
        (
            {"pieces": [piece._replace(shape=(10**9,), nbytes=8 * 10**9) for piece in pieces]},
            "expected a shard of a leaf",
        ),
        ({"pieces": pieces[:1]}, "bytes of a leaf are missing"),
        ({"leaves": [leaf("", "tensor", "load", (600_000,)), leaf("", "tensor", "load", (5,))]}, "does not make sense"),
        ({"structure": {"node": "pytree", "class": "os.system", "fields": [], "static": {}, "items": []}}, "os.system"),
        ({"structure": {"node": "lambda", "items": []}}, "does not make sense"),
        ({"structure": 999}, "does not make sense"),
    ]
    for changes, text in forgeries:
        root = tmp_path / "copy"
        shutil.copytree(good, root)
        forge(root / "2", **changes)
        with pytest.raises(SnapshotError, match=re.escape(text)):
            Store(root).restore(step=2)
        shutil.rmtree(root)
    pickled = f"cbuiltins\nexec\n(S'open({str(marker)!r}, \"w\")'\ntR.".encode()
    for name in (DATA, TREE, PIECES, "parts/0/state/_METADATA", "parts/0/state/_CHECKPOINT_METADATA"):
        root = tmp_path / "copy"
        shutil.copytree(good, root)
        (root / "2" / name).write_bytes(pickled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            Store(root).restore()
        shutil.rmtree(root)
    assert not marker.exists()


def test_no_snapshot_left(good, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(good, root)
    for path in root.glob("*/meta/data.json"):
        path.unlink()
    with pytest.raises(
        CorruptSnapshot, match=r"no snapshot can be read\n(.|\n)*step 2: meta/data.json is missing\n +step 1:"
    ):
        Store(root).restore()


# --- in processes of their own ----------------------------------------------------------------------------------------


def test_a_full_disk(python_process, tmp_path):
    done = python_process(
        STATE
        + """
import os, resource
from purestep.errors import SaveFailed
store = Store(sys.argv[1], keep=all_())
store.save(1, value(1)); store.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
store.save(2, value(2))
try:
    store.wait()
except SaveFailed as error:
    assert "File too large" in str(error) and "untouched: 1" in str(error), error
    print("told")
print(os.listdir(sys.argv[1]), store.restore().step)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.save(2, value(2)); store.close()
print(Store(sys.argv[1]).steps())
""",
        str(tmp_path),
    )
    assert (done.stdout, done.stderr, done.returncode) == ("told\n['1'] 1\n[1, 2]\n", "", 0)


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "1 / 0"])
def test_a_process_that_ends_finishes_the_save_in_flight(python_process, tmp_path, end):
    done = python_process(STATE + f"store = Store(sys.argv[1]); store.save(1, value(1)); {end}", str(tmp_path))
    assert done.returncode == {"": 0, "1 / 0": 1}.get(end, 3)
    assert ("ZeroDivisionError" in done.stderr) if end == "1 / 0" else done.stderr == ""
    assert tree.equal(Store(tmp_path).restore().value, value(1))


def test_a_failing_save_lets_the_process_end(python_process, tmp_path):
    (tmp_path / "file").write_text("")
    done = python_process(STATE + "Store(sys.argv[1]).save(1, value(1))", str(tmp_path / "file"))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_kill_between_commit_and_deletion_loses_nothing(python_process, tmp_path):
    script = STATE + "import os, signal\nkill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "store = Store(sys.argv[1]); store.save(1, value(1)); store.wait()\n"
    for place, left in (("disk.remove = kill", 2), ("disk.abandon = kill", 2)):
        root = tmp_path / place.partition(" ")[0]
        done = python_process(script + place + "\nstore.save(2, value(2)); store.wait()", str(root))
        assert done.returncode == -signal.SIGKILL
        assert len(list(root.iterdir())) == left, place
        assert tree.equal(Store(root).restore().value, value(2))
        with Store(root) as store:
            store.save(3, value(3))
        assert [path.name for path in root.iterdir()] == ["3"]


def test_nothing_heavy_is_imported_before_the_first_save(bare, tmp_path):
    done = bare.run(
        """
import sys
import torch
from purestep.snapshot import Store, steps
store = Store(sys.argv[1] + "/new")
assert steps(sys.argv[1]) == [] and store.steps() == []
print(sorted({"jax", "orbax", "tensorstore", "xxhash", "ml_dtypes", "rich"} & set(sys.modules)))
""",
        str(tmp_path),
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


def test_jax_stays_off_the_gpu_and_the_environment_as_it_was(bare, tmp_path):
    done = bare.run(
        """
import os, sys
os.environ.pop("JAX_PLATFORMS", None)
import torch
from purestep.snapshot import Store
with Store(sys.argv[1]) as store:
    store.save(1, {"w": torch.ones(3)})
import jax
print(jax.config.jax_platforms, "JAX_PLATFORMS" in os.environ)
""",
        str(tmp_path),
    )
    assert (done.stdout, done.stderr) == ("cpu False\n", "")


@pytest.mark.slow
def test_kills_at_random_moments(zygote, tmp_path):
    """SIGKILL, 12 times; what was said to be durable is there, and the newest snapshot is always whole."""
    script = (
        STATE
        + """
store = Store(sys.argv[1], keep=latest(2))
first = (store.latest() or 0) + 1
if first > 1:
    assert torch.equal(store.restore().value["w"], value(first - 1)["w"])
for step in range(first, 10**6):
    store.save(step, value(step)); store.wait()
    print(step, flush=True)
"""
    )
    draw = random.Random(7)
    durable, partial = 0, 0
    for _ in range(12):
        with zygote.popen(script, str(tmp_path), preload="orbax.checkpoint xxhash") as process:
            assert process.stdout is not None
            said = [process.stdout.readline()]  # the first save includes imports
            time.sleep(draw.random() * 0.15)
            process.kill()
            said += process.stdout.read().split("\n")
        durable = max([durable, *(int(line) for line in said if line.strip())])
        partial += any(durable_directories.MARK in path.name for path in tmp_path.iterdir())
        back = Store(tmp_path).restore()
        assert back.step in (durable, durable + 1)
        assert back.skipped == ()
        assert tree.equal(back.value, value(back.step))
        durable = back.step
    assert partial > 0  # some of the kills hit a save
