from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from purestep import tree
from purestep.snapshot import Store, zarr_files
from purestep.snapshot.orbax_io import read_arrays, write_arrays
from purestep.snapshot.zarr_files import read_plain

LARGE = 300_000
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool, torch.uint16]


def bytes_of(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@pytest.fixture
def written(tmp_path, seed):
    rng = np.random.default_rng(seed)
    arrays = {
        "a": rng.standard_normal((600, 7), np.float32),
        "b": rng.integers(0, 255, LARGE, np.uint8),
        "c": np.zeros((3, 5, 11), np.int64),
        "d": np.asarray(rng.standard_normal(9) + 1j, np.complex64),
    }
    write_arrays(tmp_path / "state", arrays)
    return tmp_path / "state", arrays


def test_the_bytes_are_those_that_orbax_reads(written, monkeypatch):
    directory, arrays = written
    found = read_plain(directory, list(arrays))
    monkeypatch.setattr("purestep.snapshot.orbax_io.read_plain", lambda *args: {})
    by_orbax = read_arrays(directory, list(arrays))
    for name, array in arrays.items():
        assert np.array_equal(found[name], bytes_of(array))
        assert np.array_equal(found[name], bytes_of(by_orbax[name]))
        assert found[name].ctypes.data % 64 == 0
        assert found[name].flags.writeable


@pytest.mark.parametrize("block", [1, 1000, 4096])
def test_blocks_do_not_change_what_is_read(written, monkeypatch, block):
    directory, arrays = written
    monkeypatch.setattr(zarr_files, "_BLOCK", block)
    found = read_plain(directory, ["a", "c", "d"])
    assert all(np.array_equal(found[name], bytes_of(arrays[name])) for name in found)
    assert len(found) == 3


def test_short_reads_are_taken_up_again(written, monkeypatch):
    directory, arrays = written
    real = os.preadv
    monkeypatch.setattr(zarr_files.os, "preadv", lambda fd, views, at: real(fd, [views[0][:777]], at))
    assert np.array_equal(read_plain(directory, ["b"])["b"], arrays["b"])


def spoil_header(directory, **changes):
    path = directory / "a" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_chunk(directory, change):
    path = directory / "a" / "0.0"
    path.write_bytes(change(path.read_bytes()))


SPOILS = {
    "compressed": lambda d: spoil_header(d, compressor={"id": "zstd", "level": 1}),
    "filtered": lambda d: spoil_header(d, filters=[{"id": "delta"}]),
    "Fortran order": lambda d: spoil_header(d, order="F"),
    "several chunks": lambda d: spoil_header(d, chunks=[300, 7]),
    "nested": lambda d: spoil_header(d, dimension_separator="/"),
    "big endian": lambda d: spoil_header(d, dtype=">f4"),
    "other dtype": lambda d: spoil_header(d, dtype="|O8"),
    "not a dtype": lambda d: spoil_header(d, dtype=[["x", "<f4"]]),
    "without a shape": lambda d: spoil_header(d, shape=[], chunks=[]),
    "shape of words": lambda d: spoil_header(d, shape=["x", "y"], chunks=["x", "y"]),
    "other zarr": lambda d: spoil_header(d, zarr_format=3),
    "no JSON": lambda d: (d / "a" / ".zarray").write_text("{"),
    "no header": lambda d: (d / "a" / ".zarray").unlink(),
    "no chunk": lambda d: (d / "a" / "0.0").unlink(),
    "truncated": lambda d: replace_chunk(d, lambda content: content[:-1]),
    "too long": lambda d: replace_chunk(d, lambda content: content + b"x"),
    "empty": lambda d: replace_chunk(d, lambda content: b""),
}


@pytest.mark.parametrize("how", SPOILS)
def test_other_forms_are_left_to_orbax(written, how):
    directory, _ = written
    assert read_plain(directory, ["a", "b"]).keys() == {"a", "b"}
    SPOILS[how](directory)
    assert read_plain(directory, ["a", "b"]).keys() == {"b"}


def test_a_file_that_shrinks_while_it_is_read_is_left_to_orbax(written, monkeypatch):
    directory, _ = written
    real = os.preadv

    def failing(descriptor, views, at):
        return 0 if at >= 4096 else real(descriptor, [views[0][:4096]], at)

    monkeypatch.setattr(zarr_files.os, "preadv", failing)
    assert read_plain(directory, ["a", "d"]).keys() == {"d"}


def test_every_dtype_of_a_snapshot_is_plain(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (3 * LARGE * 8,), dtype=torch.uint8, generator=generator)
    value = {str(dtype): raw.view(dtype).reshape(3, -1, 5) for dtype in DTYPES}
    with Store(tmp_path) as store:
        store.save(1, value | {"small": torch.ones(3)})
    monkeypatch.setattr("purestep.snapshot.orbax_io._read_by_orbax", lambda *args: pytest.fail("not plain"))
    back = Store(tmp_path).restore().value
    assert tree.equal(back, value | {"small": torch.ones(3)})


def test_restoring_loads_neither_orbax_nor_jax(bare, tmp_path):
    with Store(tmp_path) as store:
        store.save(1, {"large": torch.ones(LARGE), "bf16": torch.ones(1 << 20).bfloat16(), "small": torch.ones(3)})
    code = (
        "import sys, purestep as ps; value = ps.restore(sys.argv[1]); print(float(value['large'].sum()), "
        "[name for name in ('orbax', 'jax', 'tensorstore') if name in sys.modules])"
    )
    assert bare.run(code, str(tmp_path)).stdout.strip() == f"{float(LARGE)} []"
