"""The same bits on 1, 2, 3 and 4 processes, under every plan; and what only several processes can show."""

import json
import os
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("bits_job.py")
CASES = """plain ragged few single tied frozen routed layerdrop bf16-mixed int8 fifty skipped muon finite large six
twelve evaluated""".split()
# What `make test` runs of them, with what is asked of several processes besides bits.
QUICK = """plain|ddp;plain|fsdp;plain|hsdp;plain|fsdp, donated;skipped|ddp;skipped|fsdp;plain|zero1;plain|zero2;
plain|fsdp, checkpoint""".replace("\n", "").split(";")


@pytest.fixture(scope="session")
def answers(zygote, once):
    """By number of processes and rank, what each check of the quick cases found."""
    return _asked(
        zygote, once, "bits", "4,2,1", [*QUICK, "fast", "live", "refusals", "tensor|none", "tensor|fsdp x tensor"]
    )


@pytest.fixture(scope="session")
def more_answers(zygote, once):
    """The same of all cases."""
    return _asked(zygote, once, "more-bits", "4,3,2,1", [*CASES, "synced", "tensor"])


def _asked(zygote, once, name, sizes, cases):
    """Four processes are all of the jobs in turn."""
    directory = once(name, lambda directory: _ask(zygote, directory, sizes, cases))
    found = [(int(size), rank) for size in sizes.split(",") for rank in range(int(size))]
    return {(size, rank): json.loads((directory / f"{size}-{rank}.json").read_text()) for size, rank in found}


def _ask(zygote, directory, sizes, cases):
    quiet = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    arguments = str(directory), sizes
    children = [
        zygote.popen(JOB, *arguments, str(rank), ";".join(cases), env=quiet, preload=zygote.RANKS) for rank in range(4)
    ]
    for child in children:
        with child:
            _, errors = child.communicate(240)
            assert (child.returncode, errors) == (0, "")


@pytest.mark.parametrize("case", ["plain", "skipped"])
def test_the_bits_do_not_depend_on_ranks_or_plan(answers, case):
    check_bits(answers, case, 12)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_bits_do_not_depend_on_ranks_or_any_plan(more_answers, case):
    check_bits(more_answers, case, 9)


def check_bits(answers, case, least):
    found = {
        (size, rank, name): value
        for (size, rank), checks in answers.items()
        for name, value in checks.items()
        if name.partition("|")[0] == case
    }
    assert len(found) >= least
    assert len(set(found.values())) == 1, "\n".join(f"{k}: {v[-800:]}" for k, v in found.items())


def test_sums_of_the_backend_have_other_bits(answers):
    one, four = (answers[size, 0] for size in (1, 4))
    assert one["fast|ddp"] != four["fast|ddp"]
    assert one["fast|fsdp"] != four["fast|fsdp"]
    assert len(one["fast|ddp"]) == len(four["fast|fsdp"]) == 72
    assert len({answers[4, rank]["fast|fsdp"] for rank in range(4)}) == 1


def test_blocks_are_whole_only_while_they_are_needed(answers):
    for rank in range(2):
        found = answers[2, rank]["live"]
        assert found["reshard"][0] <= 3
        assert found["reshard"][1] == 2  # one that runs, and one that comes
        assert found["keep"][0] == 24
        assert found["reshard"][2] == found["keep"][2] == 0


def test_what_a_plan_cannot_do_is_refused(answers):
    said = answers[2, 1]["refusals"]
    assert (
        "ConfigError: the parameter 'blocks.0.weight' was used while its unit 'blocks.0' was not running"
        in said["touched"]
    )
    assert "fsdp(units=" in said["touched"]
    assert "ConfigError: this optimizer gives a part of a tensor other bits than the whole" in said["fused"]
    assert "ConfigError: 3 microbatches cannot be shared equally by 2 ranks" in said["count"]
    assert "ConfigError: a step with batch norm over ranks cannot be compiled" in said["synced"]


def test_tensor_parallel_ranks_agree_with_one_process(answers):
    check_tensor_parallel(answers, 4, "fsdp x tensor")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_alone_agree_with_one_process(more_answers, size):
    check_tensor_parallel(more_answers, size, "tensor")


def check_tensor_parallel(answers, size, label):
    for rank in range(size):
        reference = pytest.approx(answers[1, 0]["tensor|none"], rel=1e-5, abs=1e-5)
        assert answers[size, rank][f"tensor|{label}"] == reference, (label, rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["even", "uneven", "few", "weighted"])
def test_batch_norm_over_ranks_is_that_of_one_batch(more_answers, kind):
    answers = more_answers
    reference = answers[1, 0][f"synced|ddp|{kind}"]
    compared = 0
    for size, label in ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"), (4, "hsdp")):
        for rank in range(size):
            found = answers[size, rank].get(f"synced|{label}|{kind}")
            if found is None:
                assert (size, kind) == (2, "few")
                continue
            compared += 1
            for name, values in reference.items():
                assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-5), (size, label, rank, name)
    assert compared >= 12
