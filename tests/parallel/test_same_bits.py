"""The same bits on 1, 2, 3 and 4 processes, under every plan; and what only several processes can show."""

from pathlib import Path

import pytest
import shared_ranks

JOB = Path(__file__).with_name("bits_job.py")
CASES = """plain ragged few single tied frozen routed layerdrop bf16-mixed int8 fifty skipped muon finite large six
twelve evaluated""".split()
# What `make test` runs of them, with what is asked of several processes besides bits.
QUICK = """plain|ddp;plain|fsdp;plain|hsdp;plain|fsdp, donated;skipped|ddp;skipped|fsdp;plain|zero1;plain|zero2;
plain|fsdp, checkpoint;plain|ddp, machines;plain|fsdp, machines;skipped|zero1, machines""".replace("\n", "").split(";")
EXACT_EXPERTS = ["expert", "shard", "ddp x expert", "ddp x shard"]
SENT = [f"compressed|ddp|{dtype}" for dtype in ("None", "bf16", "fp16")]

MEMORY = [f"memory|{name}" for name in ("ddp", "zero1", "zero2", "fsdp")]


@pytest.fixture(scope="session")
def answers(zygote, once):
    """By number of processes and rank, what each check of the quick cases found."""
    experts = ["experts|expert"]
    tensor = ["tensor|none", "tensor|ddp", "tensor|fsdp"]
    others = ["fast", "later", "live", "refusals", "between"]
    return _asked(zygote, once, "bits", "4,2,1", [*QUICK, *SENT, *others, *tensor, *experts, *MEMORY])


@pytest.fixture(scope="session")
def more_answers(zygote, once):
    """The same of all cases."""
    return _asked(
        zygote,
        once,
        "more-bits",
        "4,3,2,1",
        [*CASES, "by unit", "by unit, batch norm", "synced", "compressed", "tensor", "experts", "memory-more"],
    )


def _asked(zygote, once, name, sizes, cases):
    """Four processes are all of the jobs in turn."""
    directory = once(name, lambda directory: shared_ranks.ask(zygote, JOB, directory, sizes, cases))
    return shared_ranks.answers(directory, sizes)


@pytest.mark.parametrize("case", ["plain", "skipped"])
def test_the_bits_do_not_depend_on_ranks_or_plan(answers, case):
    check_bits(answers, case, 12)


def test_experts_that_are_split_have_the_bits_of_one_process(answers):
    check_bits(answers, "experts", 4 + 2 + 1)


@pytest.mark.slow
def test_experts_that_are_split_have_the_bits_of_one_process_under_every_plan(more_answers):
    check_bits(more_answers, "experts", 7 + 7 + 8, [f"experts|{label}" for label in EXACT_EXPERTS])


@pytest.mark.slow
def test_experts_that_are_not_split_have_the_bits_of_one_process(more_answers):
    """Which may be others than those of split experts: tokens of several microbatches are multiplied together."""
    check_bits(more_answers, "experts", 2 + 4, ["experts|none", "experts|ddp", "experts|hsdp"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["by unit", "by unit, batch norm"])
def test_units_that_are_compiled_have_the_same_bits_under_every_plan(more_answers, case):
    check_bits(more_answers, case, 4 * 2 + 2 * 5 + 5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_bits_do_not_depend_on_ranks_or_any_plan(more_answers, case):
    check_bits(more_answers, case, 9)


def check_bits(answers, case, least, names=()):
    found = {
        (size, rank, name): value
        for (size, rank), checks in answers.items()
        for name, value in checks.items()
        if name.partition("|")[0] == case and (not names or name in names)
    }
    assert len(found) >= least
    assert len(set(found.values())) == 1, "\n".join(f"{k}: {v[-800:]}" for k, v in found.items())


def check_memory(answers, case):
    found = {
        (size, name): value
        for (size, _), checks in answers.items()
        for name, value in checks.items()
        if name.partition("|")[0] == case
    }
    assert len(found) > 8
    assert all(0.85 <= value[0] <= 1.15 for value in found.values()), found


def test_the_memory_of_a_step_is_as_predicted(answers):
    check_memory(answers, "memory")


@pytest.mark.slow
def test_the_memory_of_a_step_of_every_plan_is_as_predicted(more_answers):
    check_memory(more_answers, "memory-more")


def test_a_sum_on_each_machine_halves_what_two_processes_of_a_machine_send_to_others(answers):
    found = [answers[4, rank]["between"] for rank in range(4)]
    for label in ("ddp", "zero1", "zero2", "fsdp"):
        (levels, without), *rest = (each[label] for each in found)
        assert rest == [[levels, without]] * 3
        assert levels * 2 == without > 0, label


def test_sums_of_the_backend_have_other_bits(answers):
    one, four = (answers[size, 0] for size in (1, 4))
    assert one["fast|ddp"] != four["fast|ddp"]
    assert one["fast|fsdp"] != four["fast|fsdp"]
    assert len(one["fast|ddp"]) == len(four["fast|fsdp"]) == 72
    assert len({answers[4, rank]["fast|fsdp"] for rank in range(4)}) == 1


def check_compressed(answers, places):
    for (size, rank), label in places:
        plain = answers[size, rank][f"compressed|{label}|None"]
        for dtype, name, error in (("bf16", "torch.bfloat16", 2**-7), ("fp16", "torch.float16", 2**-10)):
            found = answers[size, rank][f"compressed|{label}|{dtype}"]
            assert found["buffers"] == plain["buffers"]
            assert found["moved"] != plain["moved"]
            for key, values in plain["moved"].items():
                near = pytest.approx(values, rel=2 * error, abs=error * max(map(abs, values)) + 1e-6)
                assert found["moved"][key] == near, (label, dtype, key)
            narrow = sum(count for kind, count in found["sent"] if kind == name)
            assert narrow > 0.8 * sum(count for _, count in found["sent"])
            assert sum(count for _, count in found["sent"]) == sum(count for _, count in plain["sent"])
            assert answers[size, 0][f"compressed|{label}|{dtype}"] == found


def test_gradients_are_sent_in_another_dtype(answers):
    check_compressed(answers, [((size, rank), "ddp") for size in (2, 4) for rank in range(size)])
    assert answers[1, 0]["compressed|ddp|bf16"] == answers[1, 0]["compressed|ddp|None"]


@pytest.mark.slow
@pytest.mark.parametrize("label", ["ddp", "fsdp", "hsdp"])
def test_gradients_are_sent_in_another_dtype_under_every_plan(more_answers, label):
    sizes = (4,) if label == "hsdp" else (2, 4)
    check_compressed(more_answers, [((size, rank), label) for size in sizes for rank in range(size)])


def test_blocks_are_whole_only_while_they_are_needed(answers):
    for rank in range(2):
        found = answers[2, rank]["live"]
        assert found["reshard"][0] <= 3
        assert found["reshard"][1] == 2  # one that runs, and one that comes
        assert found["keep"][0] == 24
        assert found["by unit"] == found["reshard"]  # compiled or not
        assert found["reshard"][2] == found["keep"][2] == 0


def test_ranks_that_draw_nothing_go_without_the_mode_and_keep_their_bits_when_they_begin_to_draw(answers):
    found = [answers[size, rank]["later"] for size in (4, 2, 1) for rank in range(size)]
    assert [row["quiet"] for row in found] == [0] * 7
    assert all(row["drawing"] for row in found)
    assert len({row["digest"] for row in found}) == 1


def test_what_a_plan_cannot_do_is_refused(answers):
    said = answers[2, 1]["refusals"]
    assert (
        "ConfigError: the parameter 'blocks.0.weight' was used while its unit 'blocks.0' was not running"
        in said["touched"]
    )
    assert "fsdp(units=" in said["touched"]
    assert "ConfigError: this optimizer gives a part of a tensor other bits than the whole" in said["fused"]
    assert "ConfigError: 3 microbatches cannot be shared equally by 2 ranks" in said["count"]
    assert "ConfigError: no gradients of this step can be compiled, only its update" in said["synced"]


def test_tensor_parallel_ranks_have_the_bits_of_one_process(answers):
    check_tensor_parallel(answers, [(1, "ddp"), (2, "ddp"), (4, "fsdp")])


@pytest.mark.slow
def test_products_with_tensor_parallelism_have_the_bits_of_one_process(more_answers):
    check_tensor_parallel(more_answers, [(1, "ddp"), (2, "ddp"), (2, "tensor"), (4, "tensor"), (4, "fsdp")])


def check_tensor_parallel(answers, plans):
    found = {
        (size, rank, label): answers[size, rank][f"tensor|{label}"] for size, label in plans for rank in range(size)
    }
    (whole, *numbers), reference = answers[1, 0]["tensor|none"], found[1, 0, "ddp"]
    assert all(value == reference for value in found.values()), found
    # Sums in two parts round otherwise than whole ones.
    assert whole != reference[0]
    assert reference[1:] == pytest.approx(numbers, rel=1e-4, abs=1e-5)


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
