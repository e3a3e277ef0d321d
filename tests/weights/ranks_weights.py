"""One of two gloo processes: weights into split states, each rank its part, and back. Run by test_ranks.py."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import purestep as ps
from purestep.errors import ConfigError, SnapshotError
from purestep.sharding import ddp, fsdp
from purestep.snapshot import export
from purestep.weights import files, matching
from purestep.weights.stored import OnDemand

RANK = int(sys.argv[1]) if __name__ == "__main__" else 0
TX = ps.optim.adam(0.1)
PLANS = {"ddp": ddp(), "fsdp": fsdp(), "pad": fsdp(fallback="pad"), "min_size": fsdp(min_size=40)}


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 5, bias=False))


def counted(directory: Path, entries: list[int]) -> dict[str, OnDemand]:
    """The tensors of a directory, which note how many elements are read of them."""

    def watched(stored: OnDemand) -> OnDemand:
        def read(box):
            entries.append(torch.Size(box[1]).numel())
            return stored.part(box)

        return OnDemand(stored.shape, stored.dtype, read)

    return {name: watched(stored) for name, stored in files.stored_weights(directory).items()}


def check_in_and_out(name: str, root: Path) -> None:
    plan, source = PLANS[name], root / "source"
    one = ps.init(net, TX, weights=source)
    for deferred in (False, True):
        state = ps.init(net, TX, plan=plan, deferred=deferred, weights=source)
        ps.testing.assert_trees_equal(plan.gather(state), one)
        assert ps.tree.structure(state) == ps.tree.structure(plan.place(one))
    blank = ps.init(net, TX, plan=plan, seed=5)
    loaded = ps.load_weights(blank, source)
    ps.testing.assert_trees_equal(plan.gather(loaded).params, one.params)
    out = ps.save_weights(loaded, root / name, shard_bytes=200)
    dist.barrier()  # a state that is not split is written by rank 0 alone
    ps.testing.assert_trees_equal(ps.init(net, TX, weights=out), one)
    assert len(list(out.iterdir())) > 3


def check_parts(root: Path, entries: list[int]) -> None:
    plan = PLANS["fsdp"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "stored_weights", lambda path, entry=None: counted(path, entries))
        state = ps.init(net, TX, plan=plan, deferred=True, weights=root / "source")
    here = [ps.sharding.placement.part_of(t).numel() for t in {**state.params, **state.buffers}.values()]
    assert sorted(entries) == sorted(here)
    assert sum(here) < 0.7 * sum(t.numel() for t in {**state.params, **state.buffers}.values())


def check_distributed_checkpoints(root: Path) -> None:
    """FSDP2 goes on where a split state was, and the other way round, each rank with its parts."""
    plan, batch = PLANS["fsdp"], (torch.arange(8), torch.ones(8, 5))
    step = ps.make_step(lambda net, batch: (net(batch[0]) - batch[1]).square().mean(), TX, plan=plan)
    state, _ = step(ps.init(net, TX, plan=plan), batch)
    saved = ps.interop.save_dcp(state, root / "dcp", optimizer=torch.optim.Adam)

    module = fully_shard(net())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    model, inner = get_state_dict(module, optimizer)
    dcp.load({"model": model, "optimizer": inner}, checkpoint_id=saved)
    set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=inner)
    whole = plan.gather(state)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.full_tensor(), whole.params[name]), name
        moment = optimizer.state[parameter]["exp_avg"].full_tensor()
        assert torch.equal(moment, whole.opt_state.mu[name]), name

    model, inner = get_state_dict(module, optimizer)
    dcp.save({"model": model, "optimizer": inner}, checkpoint_id=root / "theirs")
    back = ps.init(net, TX, plan=plan, seed=9, deferred=True, weights=root / "theirs")
    back = plan.gather(ps.interop.load_dcp_optimizer(back, root / "theirs"))
    for field in ("params", "opt_state", "step"):
        ps.testing.assert_trees_equal(getattr(back, field), getattr(whole, field))


def check_adapters(root: Path) -> None:
    rule = ps.lora("1", rank=2, embeddings="0")
    plan, batch = rule.plan(PLANS["fsdp"]), (torch.arange(8), torch.ones(8, 5))
    loss_fn = lambda net, batch: (net(batch[0]) - batch[1]).square().mean()  # noqa: E731
    ends = []
    for place in (plan, None):
        state = ps.init(rule(net), TX, plan=place, deferred=True, weights=root / "source")
        for _ in range(3):
            state, _ = ps.make_step(loss_fn, TX, plan=place, microbatches=2)(state, batch)
        saved = ps.save_adapters(state, root / "adapters.safetensors")
        dist.barrier()
        ps.testing.assert_trees_equal(ps.load_adapters(state, saved), state)
        ends.append(ps.merge_lora(state))
    assert ps.sharding.placement.is_split(ends[0].params["1.weight"])
    ps.testing.assert_trees_equal(plan.gather(ends[0]).params, ends[1].params)


def check_errors(root: Path) -> None:
    state = ps.init(net, TX, plan=PLANS["fsdp"])
    dist.barrier()
    with pytest.raises(ConfigError, match="holds weights already"):
        ps.save_weights(state, root / "fsdp")
    write = export.write_file

    def full(*args, **kwargs):
        raise SnapshotError("the disk is full")

    expected = "the disk is full" if RANK else "another process could not write its part of the weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_file", full if RANK else write)
        with pytest.raises(SnapshotError, match=expected):
            ps.save_weights(state, root / "failed", shard_bytes=100)
    assert not (root / "failed" / "model.safetensors.index.json").exists()


def main() -> None:
    torch.set_num_threads(1)
    root, timeout = Path(sys.argv[2]), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=RANK, world_size=2, timeout=timeout)
    for name in PLANS:
        check_in_and_out(name, root)
    check_parts(root, [])
    check_distributed_checkpoints(root)
    check_adapters(root)
    check_errors(root)
    dist.destroy_process_group()
    print("all hold")


if __name__ == "__main__":
    main()
