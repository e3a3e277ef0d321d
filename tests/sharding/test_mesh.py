"""Meshes: coordinates, sizes that are left open, and what is refused."""

from __future__ import annotations

import itertools
import pickle
import sys

import pytest
import torch

from purestep.errors import ConfigError
from purestep.sharding import Mesh, fsdp, mesh


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 2, "fsdp": 3}, {"a": 2, "b": 1, "c": 4}])
def test_ranks_are_row_major_coordinates(sizes):
    m = mesh(sizes)
    grid = list(itertools.product(*(range(n) for n in sizes.values())))
    assert m.world == len(grid)
    for rank, point in enumerate(grid):
        assert m.coordinate(rank) == dict(zip(sizes, point, strict=True))
        assert m.index(*sizes, rank=rank) == rank
        for axis, at in m.coordinate(rank).items():
            assert m.index(axis, rank=rank) == at
            assert m.ranks(axis, rank=rank)[at] == rank
            assert len(m.ranks(axis, rank=rank)) == m.size(axis)


def test_ranks_along_several_axes_partition_the_mesh():
    m = mesh({"data": 2, "fsdp": 3, "tensor": 2})
    groups = {tuple(m.ranks("data", "fsdp", rank=r)) for r in range(12)}
    assert groups == {(0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)}


def test_an_open_size_is_what_the_job_leaves(monkeypatch):
    m = mesh({"data": -1, "fsdp": 2})
    module = sys.modules["purestep.distributed.mesh"]  # the package's `mesh` is the function
    monkeypatch.setattr(module, "world_size", lambda: 6)
    assert (m.shape, m.world, m.size("data"), m.size("tensor")) == ((3, 2), 6, 3, 1)
    monkeypatch.setattr(module, "world_size", lambda: 5)
    with pytest.raises(ConfigError, match="2 does not divide 5 processes") as caught:
        _ = m.shape
    assert "start a multiple of 2 processes" in str(caught.value)


def test_one_process_needs_no_groups():
    assert mesh({"data": -1, "fsdp": 1}).group("data", "fsdp") is None
    assert mesh({"data": -1}).world == 1


def test_a_mesh_of_another_machine_is_only_described():
    m = mesh({"fsdp": 1024})
    assert m.coordinate(1023) == {"fsdp": 1023}
    with pytest.raises(ConfigError, match="the mesh has 1024 processes, the job 1") as caught:
        _ = m.device_mesh
    assert "torchrun --nproc-per-node=1024" in str(caught.value)
    assert "dry_run" in str(caught.value)
    with pytest.raises(ConfigError, match="the mesh has 4 processes, the job 1"):
        fsdp(4).place({"w": torch.zeros(8)})


@pytest.mark.parametrize(
    ("axes", "sizes", "message"),
    [
        ((), (), "at least one axis"),
        (("a", "b"), (2,), "one size an axis"),
        (("a", "a"), (2, 2), "different identifiers"),
        (("a b",), (2,), "different identifiers"),
        (("a",), (0,), "positive integers, or -1"),
        (("a",), (True,), "positive integers, or -1"),
        (("a",), (-2,), "positive integers, or -1"),
        (("a", "b"), (-1, -1), "at most one size of a mesh is -1"),
    ],
)
def test_a_malformed_mesh_is_refused(axes, sizes, message):
    with pytest.raises(ConfigError, match=message):
        Mesh(axes, sizes)


def test_a_mesh_is_a_value():
    m = mesh({"data": 2, "fsdp": -1})
    assert m == mesh({"data": 2, "fsdp": -1}) != mesh({"fsdp": -1, "data": 2})
    assert len({m, mesh({"data": 2, "fsdp": -1})}) == 1
    assert pickle.loads(pickle.dumps(m)) == m
    assert repr(m) == "mesh({'data': 2, 'fsdp': -1})"
