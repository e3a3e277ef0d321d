"""Packing, cutting into rows, and stand-ins, on one process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep.errors import ConfigError
from purestep.parallel.absent import Absent
from purestep.parallel.fsdp_layout import Row, Rows
from purestep.parallel.tree_reduce import Flat, added, rows_of
from purestep.sharding import fsdp
from purestep.sharding.spec import Spec, box
from purestep.treesum import TreeSum

DTYPES = [torch.float32, torch.float64, torch.int64, torch.bool]


@given(st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=6))
def test_packed_tensors_come_back(kinds):
    values = [torch.randn(shape).to(dtype) for shape, dtype in kinds]
    flat = Flat(values)
    packed = flat.pack(values)
    assert len(packed) == len({dtype for _, dtype in kinds})
    for value, back in zip(values, flat.unpack(packed), strict=True):
        assert torch.equal(value, back)
        assert (value.dtype, value.shape) == (back.dtype, back.shape)


def test_rows_have_the_same_length():
    assert rows_of(torch.arange(5), 3).tolist() == [[0, 1], [2, 3], [4, 0]]
    assert rows_of(torch.arange(4), 2).tolist() == [[0, 1], [2, 3]]


SHAPES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=4)


@given(st.integers(1, 4), SHAPES, st.sampled_from([Spec("fsdp"), Spec(None, "fsdp")]))
def test_parts_of_whole_tensors_make_the_whole_again(count, shapes, spec):
    plan = fsdp(count)
    rows = []
    for i, shape in enumerate(shapes):
        boxes = [box(spec, {"fsdp": count}, shape, {"fsdp": r}) for r in range(count)]
        rows.append(Row.of_boxes(str(i), shape, boxes))
    unit = Rows(plan, rows)
    wholes = [torch.randn(shape) for shape in shapes]
    cut = unit.cut(wholes, rows)
    assert cut.shape == (count, unit.width)
    for whole, found in zip(wholes, unit.wholes(unit.unpack(cut)).values(), strict=True):
        assert torch.equal(whole, found)
    mine = unit.parts(cut[unit.mine], rows)
    assert torch.equal(unit.pack(mine), cut[unit.mine])


def test_a_stand_in_has_a_shape_and_refuses_everything_else():
    stand_in = Absent.of("blocks.0.weight", (3, 2), torch.zeros(1, dtype=torch.float64), fsdp())
    assert (tuple(stand_in.shape), stand_in.dtype, stand_in.ndim, stand_in.size(0)) == ((3, 2), torch.float64, 2, 3)
    for use in (lambda: stand_in + 1, lambda: torch.ones(2, 3) @ stand_in, lambda: torch.cat([stand_in, stand_in])):
        with pytest.raises(ConfigError, match=r"'blocks.0.weight' was used while its unit 'blocks.0' was not running"):
            use()


@pytest.mark.parametrize("owners", [[[(0, 0)], [(0, 1)]], [[(0, 0), (0, 1)], [(0, 2)]], [[(1, 0)], [(0, 2)]]])
def test_a_sum_does_not_hold_what_came_in(owners):
    """The slices of all members are as large as the gradient that they were cut from."""
    nodes = [node for own in owners for node in own]
    received = torch.randn(len(nodes) * 5, generator=torch.Generator().manual_seed(1))
    expected = TreeSum(torch.add)
    for node, part in zip(nodes, received.view(-1, 5).unbind(), strict=True):
        expected.put(node, part)
    wanted = {node: part.clone() for node, part in expected.nodes.items()}
    found = added(received.view(-1, 5), owners).nodes
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[node], wanted[node]) for node in found)
    if len(found) < len(nodes):
        assert [x.untyped_storage().nbytes() for x in found.values()] == [20] * len(found)
