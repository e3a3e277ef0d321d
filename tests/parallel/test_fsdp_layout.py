"""Parts of parameters in rows: whole ones put together and cut, along any dim, with one copy where parts are equal."""

import pytest
import torch

from purestep.parallel.fsdp_layout import Row, Rows
from purestep.sharding import placement
from purestep.sharding.spec import Spec, box

RANKS = 4
SHAPES = {"a": ((8, 3), 0), "b": ((3, 8), 1), "c": ((2, 3, 12), 2), "d": ((7, 2), 0), "e": ((3, 5), 1), "f": ((4,), 0)}


class _Mesh:
    @staticmethod
    def size(*axes):
        return RANKS


class _Plan:
    mesh = _Mesh
    shard_axes = ("fsdp",)


def row(name):
    shape, dim = SHAPES[name]
    spec = Spec(*[None] * dim, "fsdp")
    return Row.of_boxes(name, shape, [box(spec, {"fsdp": RANKS}, shape, {"fsdp": rank}) for rank in range(RANKS)])


@pytest.mark.parametrize("names", ["af", "b", "abc", "abcdef", "cd"])
def test_rows_are_the_parts_of_each_member(names, monkeypatch, seed):
    torch.manual_seed(seed)
    monkeypatch.setattr("purestep.parallel.fsdp_layout.collective_index", lambda plan: 1)
    rows = Rows(_Plan, [row(name) for name in names])
    wholes = [torch.randn(r.shape) for r in rows.rows]
    packed = [
        rows.pack([placement.slice_of(x, r.boxes[member]) for x, r in zip(wholes, rows.rows, strict=True)])
        for member in range(RANKS)
    ]
    found = rows.wholes(rows.unpack(torch.stack(packed)))
    assert all(torch.equal(found[r.name], x) for r, x in zip(rows.rows, wholes, strict=True))
    transposed = [x.mT.contiguous().mT if x.ndim > 1 else x for x in wholes]  # gradients come in any layout
    for given in (wholes, transposed):
        assert torch.equal(rows.cut(given, rows.rows), torch.stack(packed))
    assert [r.dim for r in rows.rows] == [SHAPES[name][1] if name not in "de" else None for name in names]
