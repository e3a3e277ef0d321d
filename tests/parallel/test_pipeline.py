"""Models in stages on 1, 2 and 4 processes: the losses and bits of one process, and what cannot be cut."""

import re
from pathlib import Path

import pytest
import shared_ranks
import torch
from torch import nn

import purestep as ps
from purestep import errors
from purestep.sharding import (
    Plan,
    Spec,
    context_parallel,
    ddp,
    even_stages,
    expert_parallel,
    fsdp,
    mesh,
    pipeline,
    tensor_parallel,
    zero1,
    zero2,
)
from purestep.sharding.pipeline_order import bubble, tables
from purestep.sharding.placement import box_here

JOB = Path(__file__).with_name("pipeline_job.py")
QUICK = ["mlp|one", "mlp|1f1b", "mlp|interleaved", "mlp|interleaved, jit", "mlp|interleaved, unjittable"]
QUICK += ["mlp|zero1", "mlp|fsdp", "refused"]
PRODUCTS = ["ddp", "zero1", "zero2", "fsdp", "ddp, turns", "zero1, turns", "zero2, turns", "fsdp, turns"]
ROWS = (
    "mlp|one;mlp|gpipe;mlp|runs;mlp|bf16-master;odd|one;odd|1f1b;odd|interleaved;odd|rule;odd|16-mixed;"
    "gpt|one;gpt|1f1b;gpt|ddp;gpt|bf16-mixed;resumed|stages;resumed|zero1;resumed|fsdp;"
    "odd|1f1b, jit;odd|ddp, jit;odd|interleaved, jit;odd|one, rounded;odd|1f1b, rounded;odd|ddp, rounded;"
    "odd|interleaved, rounded;odd|one, inductor;odd|1f1b, inductor;odd|ddp, inductor"
).split(";") + [f"{model}|{name}" for name in PRODUCTS for model in ("mlp", "odd")]


@pytest.fixture(scope="module")
def quick(zygote, once):
    """By number of processes and rank, what each quick row found."""
    return asked(zygote, once, "pipeline-quick", "4,2,1", QUICK)


@pytest.fixture(scope="module")
def answers(zygote, once):
    """By number of processes and rank, what each row found."""
    return asked(zygote, once, "pipeline", "4,2,1", ROWS)


@pytest.fixture(scope="module")
def memory_answers(zygote, once):
    """By number of processes and rank, what each row found."""
    return asked(zygote, once, "pipeline-memory", "4,2", ["memory"])


def asked(zygote, once, name, sizes, rows):
    def ask(directory):
        modules = "torch.distributed.pipelining"
        shared_ranks.ask(zygote, JOB, directory, sizes, rows, preload=modules, seconds=900)

    directory = once(name, ask)
    return shared_ranks.answers(directory, sizes)


def check(answers, rows, least):
    found = [(key, row, value[row]) for key, value in answers.items() for row in rows if row in value]
    assert all(isinstance(value, dict) for _, _, value in found), found
    assert len(found) == least, found
    assert len({value["digest"] for _, _, value in found}) == 1, found
    assert len({str(value["losses"]) for _, _, value in found}) == 1, found


def test_several_ranks_have_the_bits_of_one_process(quick):
    check(quick, ["mlp|one", "mlp|1f1b", "mlp|interleaved", "mlp|zero1", "mlp|fsdp"], 18)


def test_a_compiled_step_has_the_bits_of_the_step_itself(quick):
    check(quick, ["mlp|one", "mlp|interleaved, jit", "mlp|interleaved, unjittable"], 5)
    for rank in range(2):
        whole, update = (quick[2, rank][f"mlp|interleaved, {way}"] for way in ("jit", "unjittable"))
        assert (whole["refusals"], len(update["refusals"])) == ([], 1)
        assert whole["compiled"] > update["compiled"] == 0


def test_a_rank_holds_its_stages_only(quick):
    held = [quick[2, rank]["mlp|1f1b"] for rank in range(2)]
    assert sum(found["held"] for found in held) == held[0]["parameters"]
    assert all(0 < found["held"] < found["parameters"] for found in held)


def check_order(answers, size, row):
    """What NCCL asks for: between two ranks one side sends over a group and the other receives, in the same order."""
    logs = [answers[size, rank][row]["sent"] for rank in range(size)]
    lines = {(group, *sorted((rank, other))) for rank, log in enumerate(logs) for _, group, other, *_ in log}
    assert len(lines) > size - 1  # both directions
    for group, *pair in lines:
        sides = [
            [(name, *rest) for name, line, other, *rest in logs[a] if (line, other) == (group, b)]
            for a, b in (pair, pair[::-1])
        ]
        names = sorted(sorted({name for name, *_ in side}) for side in sides)
        assert names == [["isend"], ["recv"]], (row, group, pair)
        assert [rest for _, *rest in sides[0]] == [rest for _, *rest in sides[1]], (row, group, pair)
        assert all(len(rest) == 1 for _, *rest in sides[0])  # no tag, nothing but the number of elements


@pytest.mark.parametrize("row", ["mlp|1f1b", "mlp|interleaved"])
def test_messages_find_their_place_without_tags(quick, row):
    check_order(quick, 2, row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "row"),
    [(4, "mlp|gpipe"), (4, "mlp|ddp"), (4, "odd|1f1b"), (4, "odd|ddp"), (2, "odd|interleaved"), (4, "gpt|1f1b")],
)
def test_messages_of_many_stages_and_tied_parameters_find_their_place_without_tags(answers, size, row):
    check_order(answers, size, row)


@pytest.mark.parametrize(("plan", "whole"), [("zero1", True), ("fsdp", False)])
def test_a_rank_holds_its_part_of_its_stages_only(quick, plan, whole):
    ranks = [quick[4, rank][f"mlp|{plan}"] for rank in range(4)]  # the stages of a pipeline are neighbours
    total, uneven = ranks[0]["parameters"], 3  # a bias of three elements is whole on both ranks of its stage
    assert [ranks[0]["held"], ranks[1]["held"]] == [ranks[2]["held"], ranks[3]["held"]]
    assert sum(found["held"] for found in ranks[:2]) == (total if whole else (total - uneven) // 2 + uneven)
    # Two moments of Adam for each element that a rank updates.
    assert sum(found["moments"] for found in ranks[:2]) == 2 * ((total - uneven) // 2 + uneven)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unstaged", "no stage of the pipeline has a parameter\n  where:   2.bias: [6]"),
        ("scalar", "a parameter without dims cannot be a part of a pipeline\n  where:   2.scale"),
        ("few", "3 stages cannot be shared equally by 2 ranks"),
        ("microbatches", "the schedule '1f1b' does not take 1 microbatches"),
        ("no units", "no gradients of this step can be compiled, only its update"),
        ("in a unit", "a stage begins in the middle of what is compiled\n  where:   the unit '0'"),
        ("skip", "stage 1 of the pipeline computes with a tensor of shape [2, 6] of another stage"),
        ("parameter", "stage 0 of the pipeline computes with the parameter 'scale' of another stage"),
        ("order", "'a' of stage 0 is called in the middle of stage 1"),
        ("reading", "a model cannot be cut into stages: what it does depends on the values of a tensor"),
        ("writing", "a tensor made of the batch is written with what another stage computes"),
        ("short", "the loss function ended before stage 1 of the pipeline began"),
    ],
)
def test_every_rank_refuses_what_cannot_be_cut(quick, case, words):
    for rank in range(2):
        assert quick[2, rank]["refused"][case].startswith(words), quick[2, rank]["refused"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "least"),
    [
        ("mlp|one mlp|gpipe mlp|runs", 9),
        ("odd|one odd|1f1b odd|interleaved odd|rule", 13),
        ("gpt|one gpt|1f1b gpt|ddp", 12),
        ("odd|one odd|1f1b, jit odd|ddp, jit odd|interleaved, jit", 14),
        ("odd|one, rounded odd|1f1b, rounded odd|ddp, rounded odd|interleaved, rounded", 14),
        ("odd|one, inductor odd|1f1b, inductor odd|ddp, inductor", 12),
        ("gpt|bf16-mixed", 7),
        ("odd|16-mixed", 3),
        ("mlp|bf16-master", 3),
    ],
)
def test_schedules_products_and_numbers_of_ranks_have_the_same_bits(answers, rows, least):
    check(answers, re.findall(r"[^\s,]+(?:, \w+)?", rows), least)


@pytest.mark.slow
def test_compiled_stages_agree_with_the_step_itself(answers):
    plain, rounded, compiled = (answers[1, 0][f"odd|one{way}"] for way in ("", ", rounded", ", inductor"))
    assert plain["digest"] != rounded["digest"]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    # Equal blocks have one forward and one backward graph. One block of four has a frozen parameter.
    assert compiled["compiled"] == 4
    for size, counts in {1: [4], 2: [2, 4], 4: [2, 2, 2, 2]}.items():
        assert [answers[size, rank]["odd|1f1b, inductor"]["compiled"] for rank in range(size)] == counts


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "odd"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_over_the_data_axis_have_the_bits_of_one_process(answers, model, name):
    check(answers, [f"{model}|one", f"{model}|{name}"], 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stages", "zero1", "fsdp"])
def test_a_run_goes_on_under_another_plan_on_fewer_processes(answers, name):
    found = {size: answers[size, 0][f"resumed|{name}"] for size in (4, 2, 1)}
    assert [found[size]["steps"] for size in (4, 2, 1)] == [2, 2, 2]
    assert found[1]["alone"] == {"digest": found[1]["digest"], "loss": found[1]["loss"], "steps": 6}


@pytest.mark.slow
def test_the_memory_of_a_step_in_stages_is_as_predicted(memory_answers):
    rows = [(size, row) for size in (2, 4) for row in memory_answers[size, 0]]
    assert len(rows) == 13
    for size, row in rows:
        found = [memory_answers[size, rank][row] for rank in range(size)]
        (said,) = {said for _, _, said in found}  # of the rank with the most
        assert 0.85 * said <= max(most for _, most, _ in found) <= 1.15 * said, (size, row, found)


# --- what needs no ranks ----------------------------------------------------------------------------------------------


@pytest.mark.slow  # imports torch's pipelining in this process
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (2, 5), (3, 9), (4, 8)])
def test_a_table_has_every_pass_once_and_can_be_performed(schedule, ranks, count):
    stages = ranks * 2 if schedule == "interleaved" else ranks
    if schedule == "interleaved" and count == 5:
        with pytest.raises(errors.ConfigError, match="does not take 5 microbatches"):
            tables(schedule, ranks, stages, count)
        return
    order = tables(schedule, ranks, stages, count)
    wanted = {(kind, s, m) for kind in ("forward", "backward") for s in range(stages) for m in range(count)}
    assert sorted(a for own in order for a in own) == sorted(wanted)
    assert all(stage % ranks == rank for rank, own in enumerate(order) for _, stage, _ in own)
    # A table that waits for itself would leave the simulation with passes that were not done.
    assert 0 < bubble(schedule, ranks, stages, count) < 1
    alike = (ranks - 1) / (ranks - 1 + count)
    assert schedule == "interleaved" or bubble(schedule, ranks, stages, count) == pytest.approx(alike)


@pytest.mark.slow
def test_1f1b_holds_fewer_microbatches_than_gpipe():
    def most(schedule, rank):
        held, top = 0, 0
        for kind, _, _ in tables(schedule, 4, 4, 16)[rank]:
            held += 1 if kind == "forward" else -1
            top = max(top, held)
        return top

    assert [most("gpipe", rank) for rank in range(4)] == [16] * 4
    assert [most("1f1b", rank) for rank in range(4)] == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("words", "other"),
    [
        ("tensor and context parallelism", lambda plan: plan * tensor_parallel({"a": Spec("tensor")}, 2)),
        ("tensor and context parallelism", lambda plan: context_parallel(2) * plan),
        ("offload", lambda plan: pipeline([["a"], ["b"]], 2, offload="optimizer")),
        ("sync_batchnorm", lambda plan: ddp(sync_batchnorm=True, reduction="fast") * plan),
        ("rules over the axis 'stage'", lambda plan: plan * Plan(mesh({"data": 2}), [("a", Spec("stage"))])),
    ],
)
def test_a_pipeline_refuses_what_splits_a_layer_or_leaves_the_device(words, other):
    with pytest.raises(errors.ConfigError, match=f"a pipeline does not go with {words}"):
        other(pipeline([["a"], ["b"]], 2))


def test_experts_do_not_go_with_stages():
    with pytest.raises(errors.ConfigError, match="expert parallelism goes with data parallelism only"):
        expert_parallel(2) * pipeline([["a"], ["b"]], 2)


def test_products_split_what_the_other_plan_splits_over_the_ranks_of_a_stage():
    stages = pipeline([["a"], ["b"]], 2)
    whole, part = Spec(at={"stage": 1}), Spec("data", at={"stage": 1})
    kinds = ("params", "optimizer")
    assert (ddp() * stages).mesh == mesh({"data": -1, "stage": 2})
    assert [(ddp(2) * stages).spec("b", (4, 2), k) for k in kinds] == [whole, whole]
    assert [(zero1(2) * stages).spec("b", (4, 2), k) for k in kinds] == [whole, part]
    assert [(stages * zero2(2)).spec("b", (4, 2), k) for k in kinds] == [whole, part]
    assert [(fsdp(2) * stages).spec("b", (4, 2), k) for k in kinds] == [Spec("fsdp", at={"stage": 1})] * 2
    assert (zero1(2) * stages).spec("b", (3, 3), "optimizer") == whole
    assert box_here((fsdp(2) * stages), (4, 2), Spec("fsdp", at={"stage": 0})) == ((0, 0), (2, 2))


def test_stages_of_a_plan_are_runs_or_take_turns():
    stages = [["a"], ["b"], ["c"], ["d"]]
    homes = [pipeline(stages, 2, schedule=s) for s in ("1f1b", "interleaved")]
    assert [[plan.spec(n, (2, 2)).at[0][1] for n in "abcd"] for plan in homes] == [[0, 0, 1, 1], [0, 1, 0, 1]]
    # On one process every tensor is whole, and a plan of several says where the parts of others are.
    assert pipeline(stages).spec("a", (2, 2)) == Spec()
    assert box_here(homes[0], (4, 3), homes[0].spec("a", (4, 3))) == ((0, 0), (4, 3))
    assert box_here(homes[0], (4, 3), homes[0].spec("d", (4, 3))) == ((0, 0), (0, 0))


def test_a_dry_run_tells_the_largest_rank_and_that_waits_are_not_known():
    run = pipeline([["a"], ["b"]], 2).dry_run({"a": torch.zeros(2), "b": torch.zeros(4, 4)})
    assert (run.memory, run.bubble, run.description.rank) == ({"params": 64, "grads": 64, "update": 128}, None, 1)
    assert "how long a rank waits for the others depends on microbatches=" in str(run)


@pytest.mark.slow  # imports torch's pipelining in this process
def test_the_memory_of_a_step_in_stages_is_that_of_the_microbatches_under_way():
    def make():
        return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(8)])

    tx, batch = ps.optim.sgd(0.1), torch.ones(800, 8)

    def activations(size, schedule):
        plan = pipeline(even_stages(make, 4), size, schedule=schedule)
        step = ps.make_step(lambda net, x: net(x).sum(), tx, plan=plan, microbatches=8)
        return ps.step_memory(step, ps.init(make, tx), batch, {"stage": size}).memory["activations"]

    one = 100 * 8 * 4  # what a stage is given for a microbatch, and what each of its two layers keeps of it
    assert 8 * 3 * one <= activations(4, "gpipe") <= (8 * 3 + 3) * one
    assert 3 * 3 * one <= activations(4, "1f1b") <= (3 * 3 + 3) * one  # of the second rank: the first is given nothing
    assert 8 * one <= activations(1, "1f1b") <= (8 + 3) * one


def test_a_dry_run_tells_how_long_ranks_wait():
    run = pipeline([["a"], ["b"]], 2).dry_run({"a": torch.zeros(2), "b": torch.zeros(2)}, microbatches=3)
    assert run.bubble == pytest.approx(1 / 4)
    assert "a rank waits 25.0% of a step" in str(run)


def test_even_stages_balance_parameters_and_keep_the_rest_at_the_ends():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(nn.init.ones_(nn.Parameter(nn.Linear(1, 1).weight.new_empty(1))))
            self.body = nn.Module()
            self.body.embed = nn.Embedding(10, 4)
            self.body.layers = nn.ModuleList(nn.Linear(4, n) for n in (64, 4, 4, 4, 4, 64))
            self.body.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 10)

    assert even_stages(Net, 3) == (
        ("scale", "body.embed", "body.layers.0"),
        ("body.layers.1", "body.layers.2", "body.layers.3", "body.layers.4"),
        ("body.layers.5", "body.norm", "head"),
    )
    with pytest.raises(errors.ConfigError, match=r"'body\.layers' has 6 blocks"):
        even_stages(Net, 7)
    with pytest.raises(errors.ConfigError, match="it has no list of blocks"):
        even_stages(lambda: nn.Linear(2, 2), 2)
