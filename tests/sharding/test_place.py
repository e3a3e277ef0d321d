"""Placing states on four processes, and the same functions on one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from purestep.sharding import ddp, fsdp
from purestep.sharding.placement import gather, is_owner, is_split, local, rewrap, shard_of


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_four_processes(zygote, tmp_path):
    """One set of processes for all checks; see ranks_place.py."""
    script = Path(__file__).with_name("ranks_place.py")
    ranks = [zygote.popen(script, str(rank), str(tmp_path / "store"), preload=zygote.RANKS) for rank in range(4)]
    ended = []
    for child in ranks:
        with child:
            ended.append((*child.communicate(120), child.returncode))
    assert [(out, code) for out, _, code in ended] == [("all hold\n", 0)] * 4, "\n".join(e[1][-3000:] for e in ended)


def test_one_process_holds_all_of_everything():
    w = torch.ones(4, 4)
    assert (is_split(w), is_owner(w), shard_of(w)) == (False, True, ((0, 0), (4, 4)))
    tree_ = {"w": w, "n": 3}
    for result in (local(tree_), gather(tree_), rewrap(tree_, tree_), fsdp().place(tree_), ddp().place(tree_)):
        assert result["w"] is w
        assert result["n"] == 3


def test_placing_loads_no_dtensor_on_one_process(zygote):
    """Nor Dynamo, whose import takes longer than that of torch: not even for a deferred init."""
    done = zygote.run(
        "import sys, torch, purestep as ps\n"
        "plan = ps.sharding.fsdp()\n"
        "state = ps.init(lambda: torch.nn.Linear(4, 4), ps.optim.sgd(0.1), plan=plan)\n"
        "ps.digest(state); plan.describe(state); plan.gather(state)\n"
        "ps.init(lambda: torch.nn.Linear(4, 4), ps.optim.adamw(1e-3), plan=plan, deferred=True)\n"
        "print([m for m in ('torch.distributed.tensor', 'torch._dynamo') if m in sys.modules])\n"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
