"""Whatever the JSON files of a snapshot hold, the others are listed and read, and the error names the file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import warnings

import pytest
import torch
from shared_marks import slow_but

import purestep as ps
from purestep import snapshot, tree
from purestep.errors import ConfigError, CorruptSnapshot, PurestepError, SnapshotError
from purestep.snapshot import Scope, Store, durable_directories, latest
from purestep.snapshot.codec import DEPTH, encode
from purestep.snapshot.manifest import DATA, PIECES, TREE, checksum, seal

HUGE = 10**4000
OTHERS = [None, True, -1, 0.5, 10**30, HUGE, "", "\ud800", "x", [], [[]], {}, {"": {}}, float("inf")]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    with Store(root, keep=latest(2)) as store:
        for step in (1, 2):
            w = torch.arange(5.0) + step
            value = {"w": w, "tied": w, "n": step, "l": [None, (b"x", 1.5)], "big": torch.ones(300_000)}
            store.save(step, value, metrics={"loss": 0.5}, info={"a": 1}, digests={"w": Scope("['w']")})
    return root


def bodies(root):
    return {name: json.loads((root / "2" / name).read_bytes())["body"] for name in (DATA, TREE, PIECES)}


def write(root, changed):
    """Write files whose seals agree."""
    files = {name: seal(body) for name, body in changed.items()}
    seals = changed[DATA].get("seals")
    if (
        isinstance(seals, dict)
        and set(seals) == {TREE, PIECES}
        and all(isinstance(text, str) for text in seals.values())
    ):
        seals = {name: checksum(files[name]) for name in (TREE, PIECES)}
        files[DATA] = seal(changed[DATA] | {"seals": seals})
    durable_directories.write(root / "2", files)


def mutations(value, path=()):
    """Every place of a JSON value: without it, with another key beside it, and with values of other types in it."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*path, key), "remove", None
            for other in OTHERS:
                yield (*path, key), "set", other
            yield from mutations(value[key], (*path, key))


def mutated(bodies_, path, how, other):
    changed = json.loads(json.dumps(bodies_))
    *above, last = path
    at = changed
    for key in above:
        at = at[key]
    if how == "remove":
        del at[last]
    else:
        at[last] = other
    return changed


def survives(root):
    """The other snapshot is listed and read, whatever the newest one is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert 1 in snapshot.steps(root)
        assert ps.restore(root, step=1)["n"] == 1
        ps.restore(root)  # the newest one, where the change left it readable, or else the first
        for call in (lambda: snapshot.manifest(root, 2), lambda: ps.restore(root, step=2)):
            with contextlib.suppress(SnapshotError):
                call()


@pytest.mark.parametrize("part", slow_but(range(3), 0))
def test_every_field_of_every_file(good, tmp_path, part):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    before = bodies(root)
    for name in before:
        for number, (path, how, other) in enumerate(mutations(before[name])):
            if number % 3 != part:
                continue
            if how == "set" and number % 5 and path[0] not in ("format", "step", "digest", "seals"):
                continue  # a fifth of the values for each field: the types differ from field to field
            try:
                changed = mutated(before, (name, *path), how, other)
                write(root, changed)
                survives(root)
            except PurestepError:
                raise
            except Exception as error:
                error.add_note(f"{name}: {path} {how} {str(other)[:50]!r}")
                raise
    write(root, before)
    assert ps.restore(root)["n"] == 2


@pytest.mark.parametrize("name", [DATA, TREE, PIECES])
@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"NaN", b"1" * 5000, b'{"format":2}', b"[]", b"3"],
    ids=lambda text: repr(text[:8]),
)
def test_any_text(good, tmp_path, name, text):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    sealed = b'{"checksum": "' + checksum(text).encode() + b'", "body": ' + text + b"}\n"
    before = bodies(root)
    if name != DATA:
        before[DATA]["seals"][name] = checksum(sealed)
        (root / "2" / DATA).write_bytes(seal(before[DATA]))
    (root / "2" / name).write_bytes(sealed)
    survives(root)
    with pytest.raises(CorruptSnapshot, match=name):
        ps.restore(root, step=2)


def test_another_file_of_ours_is_named_and_fallen_back_from(good, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    shutil.copy(root / "2" / TREE, root / "2" / DATA)
    assert snapshot.steps(root) == [1]
    with pytest.warns(RuntimeWarning, match=f"using step 1[\\s\\S]*{DATA}[\\s\\S]*a record with the field 'format'"):
        assert ps.restore(root)["n"] == 1


def test_fields_of_a_newer_version_are_skipped(good, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    changed = bodies(root)
    changed[DATA]["newer"] = changed[TREE]["newer"] = {"a": [1]}
    changed[TREE]["leaves"][0]["newer"] = 3
    write(root, changed)
    assert ps.restore(root)["n"] == 2


def forged(root, shape, **piece):
    changed = bodies(root)
    index = next(i for i, leaf in enumerate(changed[TREE]["leaves"]) if leaf["path"] == "['big']")
    nbytes = 4 * shape
    changed[TREE]["leaves"][index]["shape"] = [shape]
    rows = changed[PIECES]["pieces"]
    at = next(i for i, row in enumerate(rows) if row[0] == index)
    rows[at][2], rows[at][6] = [piece.get("part", shape)], 4 * piece.get("part", shape)
    write(root, changed)
    return root / "2" / "parts/0/state" / rows[at][4], nbytes


@pytest.mark.parametrize("part", [10**13, 300_000])
@pytest.mark.parametrize("zarray", [False, True])
def test_a_forged_huge_leaf_takes_no_memory(good, tmp_path, monkeypatch, part, zarray):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    array, _ = forged(root, 10**13, part=part)
    if zarray:
        about = json.loads((array / ".zarray").read_bytes())
        (array / ".zarray").write_text(json.dumps(about | {"shape": [10**13], "chunks": [10**13]}))

    def refuse(*args, **options):
        raise AssertionError("memory was asked for")

    monkeypatch.setattr("purestep.snapshot.orbax_io.read_arrays", refuse)
    monkeypatch.setattr("numpy.empty", refuse)
    with pytest.raises(CorruptSnapshot, match=r"not as large as its leaves|bytes of a leaf are missing"):
        Store(root).restore(step=2)


def test_a_tree_that_is_too_deep_is_refused_when_it_is_saved():
    deep = 1
    for _ in range(DEPTH):
        deep = [deep]
    encode(deep)
    with pytest.raises(ps.errors.TreeError, match=f"more than {DEPTH} levels"):
        encode([deep])


# --- digests --------------------------------------------------------------------------------------------------------


def test_digests_of_parts(good):
    manifest, value = snapshot.manifest(good, 2), ps.restore(good, verify="digest")
    assert manifest.digests == {"w": tree.digest(value["w"])}
    assert manifest.digest == tree.digest(value)


@pytest.mark.parametrize("field", ["digest", "digests"])
def test_a_wrong_digest_is_found_when_it_is_asked_for(good, tmp_path, field):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    changed = bodies(root)
    changed[DATA][field] = "0" * 64 if field == "digest" else {"w": "0" * 64}
    write(root, changed)
    assert ps.restore(root)["n"] == 2
    with pytest.raises(CorruptSnapshot, match=f"does not have the digest of its manifest[\\s\\S]*{field}.*: 0000"):
        ps.restore(root, step=2, verify="digest")
    with pytest.warns(RuntimeWarning, match="using step 1"):
        assert ps.restore(root, verify="digest")["n"] == 1
    with pytest.raises(ConfigError, match="verify= is True, False or 'digest'"):
        ps.restore(root, verify="yes")


# --- a reader beside a writer ---------------------------------------------------------------------------------------


def test_a_reader_beside_a_writer_always_finds_one(tmp_path):
    with Store(tmp_path, keep=latest(1)) as store:
        store.save(0, {"n": 0})
        store.wait()
        ended, found = threading.Event(), []

        def read():
            while not ended.is_set():
                try:
                    found.append(Store(tmp_path).restore().step)
                    assert Store(tmp_path).latest() is not None
                except BaseException as error:
                    found.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        for step in range(1, 30):
            store.save(step, {"n": step})
        store.wait()
        ended.set()
        thread.join()
    assert [error for error in found if not isinstance(error, int)] == []


def test_what_was_listed_and_is_gone_is_listed_again(good, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    store = Store(root)
    entries = store._index.revisions()

    def listed():
        if (root / "2").exists():
            os.rename(root / "2", root / "2.purestep-tmp-x")
            return entries
        return type(store._index)(root).revisions()

    monkeypatch.setattr(store._index, "revisions", listed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.restore().step == 1
