"""What ranks pass to a step is compared: batches, states and where these live. Two processes run all rows."""

import json
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("inputs_job.py")


@pytest.fixture(scope="module")
def answers(zygote, once):
    """What each rank found, by row."""
    directory = once("inputs", lambda directory: _ask(zygote, directory))
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def _ask(zygote, directory):
    children = [
        zygote.popen(
            JOB,
            str(directory / "store"),
            str(directory / f"{rank}.json"),
            str(rank),
            preload=zygote.RANKS,
        )
        for rank in range(2)
    ]
    for child in children:
        with child:
            _, errors = child.communicate(120)
            assert child.returncode == 0, errors


BATCH = "RankError: the ranks differ in the batch\n  where:   the batch: rank 0: "
SIZE = "RankError: the ranks differ in the size of the batch\n  where:   the size of the batch: rank 0: 8 samples"
UNPLACED = "ConfigError: the state is not placed by the plan of the step\n  where:   state.params['0.weight']: [8, 6], "
NO_PLAN = "ConfigError: the state is placed by a plan, and the step has none\n  where:   state.params['0."
SAMPLER = "DataError: the sampler of a loader shards the data for other ranks than those that share a batch"
DEALT = "DataError: the sampler of a loader shards the data by rank, and an evaluation deals batches to ranks itself"
LATER = {"size": (SIZE, "rank 1: 9 samples"), "shape": (SIZE, "rank 1: 8 samples"), "values": ("no error", "")}


@pytest.mark.parametrize(
    ("row", "begins", "says"),
    [
        ("first|size", BATCH, "['x']: float32[9, 6]"),
        ("first|values", BATCH, "the same global batch on every rank: a loader without DistributedSampler"),
        ("first|dtype", BATCH, "rank 1: \"['x']: float64[8, 6]"),
        ("first|same", "no error", ""),
        ("first|local", BATCH, "'8 samples in 2 microbatches'; rank 1: '9 samples in 2 microbatches'"),
        ("first|state", "RankError: the ranks differ in state.params['0.bias']", "the same seed and code"),
        *((f"later|{name}|{kind}", *said) for name in ("ddp", "fsdp", "jit") for kind, said in LATER.items()),
        ("unplaced", UNPLACED + "whole on every rank; the plan says Spec('fsdp')", "state = plan.place(state)"),
        ("unplaced|jit", UNPLACED, "ps.init(model, tx, seed=0, plan=plan)"),
        ("other plan", UNPLACED + "placed by (Replicate(), Shard(dim=0))", "the plan says Spec('fsdp')"),
        ("replicated", "no error", ""),
        ("no plan", NO_PLAN, "ps.make_step(loss_fn, tx, plan=plan)"),
        ("no plan|microbatches", NO_PLAN, "plan.gather(state)"),
        ("no plan|eval", NO_PLAN, "ps.make_eval(loss_fn, plan=plan)"),
        ("no plan|jit", NO_PLAN, "ps.make_step(loss_fn, tx, plan=plan)"),
        ("no plan|jit again", NO_PLAN, "ps.make_step(loss_fn, tx, plan=plan)"),
        ("no plan|jit microbatches", NO_PLAN, "ps.make_step(loss_fn, tx, plan=plan)"),
        ("fit|seeds", "RankError: the ranks differ in the state\n", "the same seed and code on every rank"),
        ("fit|half placed", "RankError: the ranks differ in the state\n", "rank 1: 'placed by a plan'"),
        ("fit|sampler", SAMPLER, "ps.data.batches(dataset, batch_size=8, shuffle=False, seed=0)"),
        ("fit|shares", "no error", ""),
        ("fit|evaluation", DEALT, "DataLoader(dataset, batch_size=8, shuffle=False)"),
        ("fit|first", BATCH, "a loader that gives every rank the same batches in the same order"),
        ("fit|later", "RankError: the ranks differ in batch 4", "ps.data.batches does"),
    ],
)
def test_what_differs_is_an_error_on_every_rank(answers, row, begins, says):
    for found in answers:
        assert found[row].startswith(begins)
        assert says in found[row]


def test_fit_places_a_state_that_no_plan_has_placed(answers):
    for found in answers:
        assert (found["fit|placed"], found["fit|digests"]) == ([True], 1)
