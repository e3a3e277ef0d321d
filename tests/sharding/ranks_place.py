"""One of four gloo processes: places states by every plan, gathers, digests and makes them. Run by test_place.py."""

from __future__ import annotations

import ctypes
import datetime
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import purestep as ps
from purestep import optim, tree
from purestep.distributed.mesh import world_size
from purestep.errors import ConfigError
from purestep.sharding import (
    Plan,
    Spec,
    context_parallel,
    ddp,
    expert_parallel,
    fsdp,
    hsdp,
    mesh,
    tensor_parallel,
    zero1,
    zero2,
)
from purestep.sharding.messages import slice_of
from purestep.sharding.placement import full, is_owner, is_split, local, rewrap, shard_of

RANK = int(sys.argv[1]) if __name__ == "__main__" else 0
TENSOR = {"0.weight": Spec("tensor"), "0.bias": Spec("tensor"), "2.weight": Spec(None, "tensor")}
PLANS = {
    "ddp": ddp(),
    "zero1": zero1(),
    "zero2": zero2(fallback="pad"),
    "fsdp": fsdp(),
    "fsdp min_size": fsdp(min_size=20),
    "hsdp": hsdp(fsdp=2),
    "pad": fsdp(fallback="pad"),
    "tensor": ddp() * tensor_parallel(TENSOR, 2),
    "fsdp x tensor": fsdp() * tensor_parallel(TENSOR, 2),
    "fsdp x tensor, pad": fsdp(fallback="pad") * tensor_parallel(TENSOR, 2),
    "fsdp x context": fsdp() * context_parallel(2),
    "expert": ddp() * expert_parallel(2, experts="3", shard=True),
    "by hand": Plan(
        mesh({"x": 2, "y": 2}), [("*.weight", Spec(("y", "x"))), ("*", Spec())], fallback="pad", batch=("x",)
    ),
}
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Embedding(12, 5), nn.LayerNorm(5))


def wide() -> nn.Module:
    return nn.Sequential(*[nn.Linear(256, 1024) for _ in range(16)])


def check_placing(plan: Plan, state: ps.TrainState, digest: str) -> None:
    placed = plan.place(state)
    for name, whole, leaf in zip(tree.names(state), tree.leaves(state), tree.leaves(placed), strict=True):
        if is_split(leaf):
            shard = local(leaf)
            offset, shape = shard_of(leaf)
            assert tuple(shard.shape) == shape, name
            assert torch.equal(slice_of(whole, (offset, shape)), shard), name
            assert shard.is_contiguous(), name
            assert shard.untyped_storage().nbytes() == shard.nbytes, name
            assert (leaf.shape, leaf.dtype) == (whole.shape, whole.dtype)
        else:
            assert leaf is whole, name
    assert ps.digest(placed) == digest
    assert ps.digest(ps.from_module(placed, ps.to_module(placed))) == digest
    assert ps.digest(plan.gather(placed)) == digest
    assert not any(is_split(x) for x in tree.leaves(plan.gather(placed)))
    module = ps.to_module(placed)
    assert all(torch.equal(p, state.params[n]) for n, p in module.named_parameters())
    again = rewrap(local(placed), placed)
    assert all(type(a) is type(b) for a, b in zip(tree.leaves(again), tree.leaves(placed), strict=True))
    assert tree.equal(again, state)
    assert plan.place(placed).params["0.weight"] is placed.params["0.weight"]
    expected = plan.describe(state, rank=RANK)
    held = {p: tuple(x.shape) for p, x in zip(tree.paths(state), tree.leaves(local(placed)), strict=True)}
    assert held == {row.path: row.local for row in expected.rows}
    check_owners(placed)


def check_owners(placed: ps.TrainState) -> None:
    """Every element of every leaf has one owner."""
    mine = [(i, shard_of(x)) for i, x in enumerate(tree.leaves(placed)) if is_owner(x)]
    everyone: list = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    counts = [torch.zeros(x.shape, dtype=torch.int64) for x in tree.leaves(placed)]
    for part in everyone:
        for index, box in part:
            slice_of(counts[index], box).add_(1)
    assert all(bool((c == 1).all()) for c in counts)


def check_moving(state: ps.TrainState, digest: str) -> None:
    """From each plan to the next, which is what an elastic restart does."""
    for plan in PLANS.values():
        state = plan.place(state)
        assert ps.digest(state) == digest
    assert ddp().place(state).params["0.weight"].__class__ is torch.Tensor


def check_differences(state: ps.TrainState) -> None:
    placed = fsdp().place(state)
    changed = state.replace(params=state.params | {"0.weight": state.params["0.weight"] + 1})
    (found,) = ps.diff(placed, fsdp().place(changed))
    assert found.path == ".params['0.weight']"
    assert found.elements == 48
    assert abs(found.max_abs - 1) < 1e-5
    assert not ps.diff(placed, state)


def check_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.int64, torch.complex64):
        x = torch.arange(24).reshape(8, 3).to(dtype)
        split = hsdp(fsdp=2).place({"x": x})["x"]
        assert is_split(split)
        assert tree.equal(full(split), x)
    halves = tree.map(lambda t: t.to(torch.bfloat16), local({"x": fsdp().place({"x": torch.ones(8)})["x"]}))
    assert rewrap(halves, fsdp().place({"x": torch.ones(8)}))["x"].dtype == torch.bfloat16


def check_init() -> None:
    reference = ps.digest(ps.init(small, TX, seed=5))
    deferred = ps.digest(ps.init(small, TX, seed=5, deferred=True))
    assert reference != deferred
    for plan in (PLANS[name] for name in ("ddp", "fsdp", "hsdp", "fsdp x tensor, pad")):
        assert ps.digest(ps.init(small, TX, seed=5, plan=plan)) == reference
        made = ps.init(small, TX, seed=5, plan=plan, deferred=True)
        assert ps.digest(made) == deferred
        held = {p: tuple(x.shape) for p, x in zip(tree.paths(made), tree.leaves(local(made)), strict=True)}
        assert held == {row.path: row.local for row in plan.describe(made, rank=RANK).rows}


def check_memory() -> None:
    """The state of a rank is its share; while it is made, little more than one parameter is held besides."""

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    # Freed tensors go back to the system at once, so that what is measured is what lives.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    tx = optim.sgd(0.1)
    ps.init(lambda: nn.Linear(256, 1024), tx, plan=fsdp(), deferred=True)
    largest = 256 * 1024 * 4
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    state = ps.init(wide, tx, seed=0, plan=fsdp(), deferred=True)
    peak = status("VmHWM") - before
    whole, mine = tree.nbytes(state), tree.nbytes(local(state))
    assert whole > 16 * largest
    assert mine <= 1.05 / 4 * whole, (mine, whole)
    assert peak <= mine + 4 * largest, (peak, mine)


def check_errors(state: ps.TrainState) -> None:
    placed = fsdp().place(state)
    with pytest.raises(ConfigError, match="a local tensor has another shape than the part it stands for"):
        rewrap(tree.map(lambda t: t[:0] if t.dim() else t, local(placed)), placed)
    with pytest.raises(ConfigError, match="the mesh has 3 processes, the job 4"):
        fsdp(3).place(state)


def check_groups() -> None:
    m = mesh({"data": 2, "fsdp": -1})
    for axes in (("data",), ("fsdp",), ("data", "fsdp")):
        members = m.ranks(*axes)
        assert dist.get_process_group_ranks(m.group(*axes)) == members
        assert m.group(*axes) is m.group(*axes)
    three = mesh({"data": 2, "one": 1, "fsdp": 2})
    assert dist.get_process_group_ranks(three.group("one", "fsdp")) == three.ranks("fsdp")
    assert three.group("one") is None
    assert hsdp(fsdp=2).index == RANK


def main() -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=RANK, world_size=4, timeout=timeout)
    state = ps.init(small, TX, seed=0)
    digest = ps.digest(state)
    check_groups()
    for name, plan in PLANS.items():
        try:
            check_placing(plan, state, digest)
        except AssertionError as error:
            raise AssertionError(f"plan {name}, rank {RANK}: {error}") from error
    check_moving(state, digest)
    check_differences(state)
    check_dtypes()
    check_errors(state)
    check_init()
    check_memory()
    assert "torch._dynamo" not in sys.modules, "placing a state imported Dynamo, for seconds"
    dist.destroy_process_group()
    print("all hold")


if __name__ == "__main__":
    main()
