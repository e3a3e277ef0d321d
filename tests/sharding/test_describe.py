"""Tables of plans, golden placements, and dry runs of machines that are not here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim
from purestep.sharding import Plan, Spec, ddp, fsdp, hsdp, mesh, tensor_parallel, zero1, zero2

from .models import TENSOR_RULES, Llama, llama_70b, small

GOLDEN = Path(__file__).parent / "golden"
RULES = [(glob, Spec(*entries) if isinstance(entries, tuple) else Spec(entries)) for glob, entries in TENSOR_RULES]
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))


def llama():
    with torch.device("meta"):
        return Llama(blocks=2, width=64, hidden=96, kv=16, words=250)


CASES = {
    "ddp": (ddp(4), small),
    "fsdp": (fsdp(4), small),
    "fsdp_pad": (fsdp(4, fallback="pad"), small),
    "fsdp_min_size": (fsdp(2, min_size=20), small),
    "hsdp": (hsdp(fsdp=2, data=2), llama),
    "tensor": (ddp(2) * tensor_parallel(RULES, 2), llama),
    "fsdp_tensor": (fsdp(4) * tensor_parallel(RULES, 4), llama),
}


@pytest.mark.parametrize("name", CASES)
def test_placements_are_those_of_the_golden_file(name):
    """A layout that changes unseen is a snapshot that is read slowly, or a job that no longer fits. To accept a change:
    UPDATE_GOLDEN=1.
    """
    plan, model = CASES[name]
    found = plan.describe(ps.init(model, TX, seed=0)).placements()
    path = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert json.loads(path.read_text()) == found


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tx", [optim.adamw(1e-3), optim.sgd(0.1, momentum=0.9)], ids=["adamw", "momentum"])
def test_a_rank_holds_its_share_of_the_state(tx, ranks):
    state = ps.init(lambda: Llama(blocks=2, width=64, hidden=96, kv=16, words=256), tx, seed=0)
    whole, plan = ps.tree.nbytes(state), fsdp(ranks)
    for rank in range(ranks):
        assert plan.describe(state, rank=rank).nbytes <= 1.05 / ranks * whole
    assert sum(plan.describe(state, rank=r).nbytes for r in range(ranks)) >= whole
    assert ddp(ranks).describe(state).nbytes == whole


def test_uneven_parts_differ_by_rank():
    plan = fsdp(4, fallback="pad")
    locals_ = [plan.describe({"w": torch.zeros(6)}, rank=r).rows[0].local for r in range(4)]
    assert locals_ == [(2,), (2,), (2,), (0,)]


def test_rows_say_what_a_leaf_is():
    state = ps.init(small, TX, seed=0, frozen="3.*")
    rows = {row.path: row for row in fsdp(4).describe(state).rows}
    assert rows[".params['0.weight']"].kind == "params"
    assert rows[".params['0.weight']"].unit == "0"
    assert rows[".buffers['3.weight']"].kind == "frozen"
    assert rows[".buffers['3.weight']"].spec == Spec("fsdp")
    assert rows[".buffers['1.running_mean']"].kind == "buffers"
    assert rows[".rng"].kind == "other"
    (mu,) = [row for path, row in rows.items() if "mu['0.weight']" in path]
    assert (mu.kind, mu.spec, mu.unit) == ("optimizer", rows[".params['0.weight']"].spec, None)


def test_a_table_is_printed_with_its_sum():
    text = str(fsdp(4).describe({"a": torch.zeros(8, 2), "b": 3}, rank=1))
    first, *_, last = text.splitlines()
    assert first == "mesh({'fsdp': 4}), rank 1 of 4"
    assert "['a']  float32[8, 2]  Spec('fsdp')  [2, 2]        16" in text
    assert last.split() == ["all", "16"]


# --- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_70b_model_on_1024_ranks():
    state = ps.init(llama_70b(), optim.adamw(1e-4), seed=0)
    count = sum(p.numel() for p in state.params.values())
    assert 70e9 < count < 71e9
    run = fsdp().dry_run(state, {"fsdp": 1024}, compute_dtype=torch.bfloat16)
    share = 4 * count / 1024
    for kind, copies in (("params", 1), ("optimizer", 2)):
        assert share * copies <= run.memory[kind] <= 1.05 * share * copies
    block = sum(p.numel() for n, p in state.params.items() if n.startswith("blocks.7."))
    root = sum(p.numel() for n, p in state.params.items() if not n.startswith("blocks."))
    # At the end of a block's backward pass: the root, the next block on its way, and this rank's parts in bf16.
    assert run.memory["gathered"] == pytest.approx(2 * (root + block * 1025 / 1024) + share / 2, rel=1e-3)
    # Whole gradients of the root and of the block, and parts of those before; of this block rows and a copy in float32,
    # of the block before rows and what came in.
    assert 2 * (root + block) < run.memory["grads"] < 2 * (root + block) + share
    assert run.memory["sums"] == 4 * 4 * block
    # Gathered in the forward and again in the backward pass, but for the rank's own part; reduced in float32.
    assert run.sent["gather"] == 2 * 2 * (count - count // 1024)
    assert run.sent["reduce"] == 4 * (count - count // 1024)
    text = str(run)
    assert "memory of a rank" in text
    assert "sent in a step" in text
    assert "GiB" in text


def test_hybrid_and_tensor_parallel_dry_runs():
    state = ps.init(llama(), optim.adamw(1e-4), seed=0)
    whole = sum(p.nbytes for p in state.params.values())
    alone = fsdp(8).dry_run(state)
    hybrid = hsdp(fsdp=8).dry_run(state, {"data": 4, "fsdp": 8})
    assert hybrid.memory == alone.memory
    assert hybrid.sent["gather"] == alone.sent["gather"]
    assert hybrid.sent["reduce"] > alone.sent["reduce"]
    split = (fsdp(8) * tensor_parallel(RULES, 4)).dry_run(state)
    assert split.memory["params"] < 0.55 * alone.memory["params"]
    assert split.nbytes < 0.6 * alone.nbytes
    replicated = ddp(8).dry_run(state)
    halved = ddp(8, reduction="fast", compress="bf16").dry_run(state)
    assert 2 * halved.sent["reduce"] == replicated.sent["reduce"]
    assert halved.memory == replicated.memory
    assert (replicated.memory["params"], replicated.sent["gather"]) == (whole, 0)
    assert replicated.sent["reduce"] == 2 * whole * 7 // 8
    assert "gathered" not in replicated.memory


def test_more_microbatches_and_no_resharding():
    state = {"blocks.0.w": torch.zeros(8, 8), "blocks.1.w": torch.zeros(8, 8), "blocks.2.w": torch.zeros(8, 8)}
    one, four = fsdp(2).dry_run(state), fsdp(2).dry_run(state, microbatches=8)
    assert four.sent["gather"] == 4 * one.sent["gather"]
    kept = fsdp(2, reshard_after_forward=False).dry_run(state)
    assert kept.sent["gather"] * 2 == one.sent["gather"]
    # One unit is taken apart while the next is on its way, with this rank's part; or those that are still to come.
    assert (one.memory["gathered"], kept.memory["gathered"]) == (3 * 256 + 128, 2 * 256)


def test_a_plan_for_another_machine_says_so_when_it_is_used():
    plan = Plan(mesh({"fsdp": 1024}), [("*", Spec(auto="fsdp"))], fallback="pad")
    assert plan.dry_run({"w": torch.zeros(1024)}).memory["params"] == 4
    with pytest.raises(ps.errors.ConfigError, match="the mesh has 1024 processes, the job 1"):
        ps.init(lambda: nn.Linear(1024, 2), optim.sgd(0.1), plan=plan)


def test_dry_runs_of_the_stages_of_zero():
    with torch.device("meta"):
        state = ps.init(nn.Sequential(nn.Linear(64, 64, bias=False)), ps.optim.adam(0.1))
    size, found = 64 * 64 * 4, {}
    for stage, plan in enumerate((ddp(4), zero1(4), zero2(4), fsdp(4))):
        found[stage] = plan.dry_run(state)
        assert found[stage].memory["params"] == (size if stage < 3 else size // 4)
        assert found[stage].memory["optimizer"] == (size * 2 if stage < 1 else size // 2) + 8  # and a count
    # While they are updated: gradients, two buffers of the update, and copies of parts that are sent around.
    assert found[0].memory["grads"] == size
    assert found[0].nbytes > found[1].nbytes == found[2].nbytes > found[3].nbytes
    # An all-reduce sends twice 3/4 of the gradients; what is sent in parts, or gathered, is 3/4 of it.
    part = 3 * size // 4
    sent = {stage: (run.sent["gather"], run.sent["reduce"]) for stage, run in found.items()}
    assert sent == {0: (0, 2 * part), 1: (part, part), 2: (part, part), 3: (2 * part, part)}
    assert zero2(4).dry_run(state, microbatches=8).sent == {"gather": part, "reduce": 2 * part}
