from __future__ import annotations

import json
import math

import pytest
import torch

from purestep.errors import CorruptSnapshot, SnapshotError
from purestep.snapshot import durable_directories
from purestep.snapshot.codec import encode
from purestep.snapshot.manifest import DATA, TREE, Manifest, dump, environment, read_header, read_manifest, seal, unseal
from purestep.snapshot.packing import Piece


@pytest.fixture
def written(tmp_path):
    encoded = encode({"w": torch.zeros(3), "n": 5})
    made = Manifest(
        step=7,
        metrics={"loss": 0.1, "nan": math.nan, "inf": -math.inf},
        info={"a": [1, None, {"b": "ü"}]},
        digest="d" * 64,
        created=1.5,
        environment=environment(),
        keep="latest(1)",
        structure=encoded.structure,
        leaves=encoded.leaves,
        pieces=[Piece(0, (0,), (3,), 0, "arena-0", 0, 12, "0" * 16)],
    )
    durable_directories.write(tmp_path, dump(made))
    return tmp_path, made


def test_all_of_it_comes_back(written):
    directory, made = written
    back = read_manifest(directory)
    assert math.isnan(back.metrics["nan"])
    assert (back.metrics["loss"], back.metrics["inf"]) == (0.1, -math.inf)
    for name in ("step", "info", "digest", "created", "environment", "keep", "structure", "leaves", "pieces"):
        assert getattr(back, name) == getattr(made, name), name
    assert {"torch", "threads", "cpu_capability", "deterministic", "world_size"} <= set(back.environment)


def test_files_are_json(written):
    directory, _ = written
    for name in dump(written[1]):
        json.loads((directory / name).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_every_changed_byte_is_found(written):
    directory, _ = written
    for name in dump(written[1]):
        path = directory / name
        good = path.read_bytes()
        for position in range(0, len(good), 3):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises(CorruptSnapshot, match=f"corrupt\n  where:   .*{name}"):
                read_manifest(directory)
        for wrong in (b"", good[:-1], good[: len(good) // 2], good + b" "):
            path.write_bytes(wrong)
            with pytest.raises(CorruptSnapshot, match=name):
                read_manifest(directory)
        path.unlink()
        with pytest.raises(CorruptSnapshot, match=rf"cannot be read\n  where:   .*{name}\n  why:     No such file"):
            read_manifest(directory)
        path.write_bytes(good)
    read_manifest(directory)


def test_a_file_of_another_snapshot_is_found(written, tmp_path):
    directory, _ = written
    path = directory / TREE
    path.write_bytes(seal({"structure": 0, "leaves": []}))  # whole in itself
    with pytest.raises(CorruptSnapshot, match=r"not the file that meta/data\.json was written with"):
        read_manifest(directory)


def test_other_formats_are_named(tmp_path):
    durable_directories.write(tmp_path, {DATA: seal({"format": 99})})
    with pytest.raises(SnapshotError, match=r"format 99, this version of purestep reads formats 1 to 3"):
        read_header(tmp_path)


def test_seals_do_not_unpickle():
    for attack in (b"cos\nsystem\n(S'true'\ntR.", b'{"checksum": "0000000000000000", "body": {}}\n'):
        with pytest.raises(CorruptSnapshot):
            unseal(attack, "x")
