"""Models with experts under expert parallelism on 1, 2 and 4 processes: the bits of one process."""

import importlib.util
from pathlib import Path

import pytest
import shared_ranks

pytestmark = [pytest.mark.slow]  # `test_same_bits` has a quick one
JOB = Path(__file__).with_name("expert_job.py")
EXACT = ["expert", "shard", "ddp x expert", "ddp x shard"]


def asked(zygote, once, name, sizes, rows):
    def ask(directory):
        shared_ranks.ask(zygote, JOB, directory, sizes, rows, seconds=400, silent=False)

    return shared_ranks.answers(once(name, ask), sizes)


@pytest.fixture(scope="module")
def answers(zygote, once):
    """By number of processes and rank, what each row found."""
    rows = [f"tokens|{label}" for label in [*EXACT, "none", "ddp", "fast"]]
    rows += [f"mean|{label}" for label in ["expert", "ddp x shard", "none", "ddp", "hsdp"]]
    rows += ["tokens|ddp x shard, unjittable", "tokens|expert, unjittable"]
    rows += ["attending|expert", "attending|expert, jit", "attending|ddp x shard, jit"]
    rows += [f"attending|{label}, rounded" for label in EXACT]
    return asked(zygote, once, "expert-parallel", "4,2,1", [*rows, "resumed", "refused"])


def check(answers, model, labels, least):
    found = {
        (*where, label): rows[f"{model}|{label}"]
        for where, rows in answers.items()
        for label in labels
        if f"{model}|{label}" in rows
    }
    assert len(found) >= least
    assert all(isinstance(value, dict) for value in found.values()), found
    assert len({value["digest"] for value in found.values()}) == 1, found
    plain = answers[1, 0].get(f"{model}|none")
    if plain is not None:
        assert next(iter(found.values()))["numbers"] == pytest.approx(plain["numbers"], rel=1e-4, abs=1e-5)
    return found


def test_the_bits_do_not_depend_on_ranks_or_products(answers):
    check(answers, "tokens", EXACT, 7 + 7 + 8)
    check(answers, "mean", EXACT, 7 + 4)


def test_gathered_experts_have_the_bits_of_one_process_for_a_batch_of_one_sample_too(answers):
    check(answers, "mean", ["ddp", "hsdp"], 1 + 4)


def test_an_update_is_compiled_where_gradients_are_not(answers):
    found = check(answers, "tokens", ["expert", "expert, unjittable", "ddp x shard, unjittable"], 7 + 7 + 4)
    refusals = {where: value["refusals"] for where, value in found.items() if "unjittable" in where[2]}
    assert all("how many tokens a rank sends to another" in one for (one,) in refusals.values()), refusals


def test_what_is_around_experts_is_compiled_with_the_bits_of_the_step_itself(answers):
    found = check(answers, "attending", ["expert", "expert, jit", "ddp x shard, jit"], 7 + 7 + 4)
    # Of equal attentions one forward and one backward graph, for microbatches of 2 samples and of 1.
    assert {value["compiled"] for where, value in found.items() if "jit" in where[2]} == {4}
    assert all(value["refusals"] == [] for value in found.values())


def test_the_same_is_compiled_on_every_number_of_ranks_and_under_every_product(answers):
    found = check(answers, "attending", [f"{label}, rounded" for label in EXACT], 7 + 7 + 8)
    assert answers[1, 0]["attending|expert"]["digest"] not in {value["digest"] for value in found.values()}


def test_a_block_of_layers_and_experts_holds_nothing_to_compile(answers):
    for rows in answers.values():
        assert rows["refused"].startswith("no gradients of this step can be compiled, only its update"), rows
        assert 'ps.jit(step, unjittable="eager")' in rows["refused"]


def test_fast_sums_agree(answers):
    plain = answers[1, 0]["tokens|none"]["numbers"]
    for (size, rank), rows in answers.items():
        assert rows["tokens|fast"]["numbers"] == pytest.approx(plain, rel=1e-4, abs=1e-5), (size, rank)


def test_a_rank_holds_its_experts_only(answers):
    whole, experts = answers[1, 0]["tokens|expert"]["held"], 2 * 8 * (2 * 12 * 24 + 24)
    for size in (2, 4):
        assert answers[size, 1]["tokens|expert"]["held"] == whole - experts + experts // size


def test_a_run_goes_on_with_another_number_of_processes(answers):
    found = answers[1, 0]["resumed"]
    assert found["digest"] == found["alone"], found


@pytest.mark.parametrize("model", ["mixtral", "qwen"])
def test_experts_of_transformers_have_the_same_bits(model, zygote, once):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    rows = [f"{name}|{label}" for name in ("mixtral", "qwen") for label in ("expert", "none")]
    check(asked(zygote, once, "expert-parallel-transformers", "2,1", rows), model, EXACT, 3)
