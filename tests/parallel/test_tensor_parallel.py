"""Transformers under tensor parallelism on 1, 2 and 4 processes: the bits of one process that computes all parts."""

import importlib.util
from pathlib import Path

import pytest
import shared_ranks

pytestmark = [pytest.mark.slow]
JOB = Path(__file__).with_name("tensor_job.py")
ROWS = """gpt|tensor;gpt|none;gpt|fsdp x tensor;llama|tensor;llama|none;llama|jit;llama|sequence;llama|ddp x tensor;
llama|fsdp x tensor;encoder|tensor;encoder|none;encoder|sequence;resumed|llama""".replace("\n", "").split(";")


@pytest.fixture(scope="module")
def answers(zygote, once):
    """By number of processes and rank, what each row found."""
    return _asked(zygote, once, "tensor-parallel", "4,2,1", ROWS)


def _asked(zygote, once, name, sizes, rows):
    directory = once(
        name, lambda directory: shared_ranks.ask(zygote, JOB, directory, sizes, rows, seconds=400, silent=False)
    )
    return shared_ranks.answers(directory, sizes)


def check(answers, model, labels, least):
    found = {
        (size, rank, label): found[f"{model}|{label}"]
        for (size, rank), found in answers.items()
        for label in labels
        if f"{model}|{label}" in found
    }
    assert len(found) >= least
    assert len({value["digest"] for value in found.values() if isinstance(value, dict)}) == 1, found
    assert all(isinstance(value, dict) for value in found.values()), found
    whole = answers[1, 0][f"{model}|none"]
    value = next(iter(found.values()))
    assert value["numbers"] == pytest.approx(whole["numbers"], rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("model", ["gpt", "llama", "encoder"])
def test_the_bits_do_not_depend_on_ranks_products_or_jit(answers, model):
    labels = ["tensor", "jit", "ddp x tensor", "fsdp x tensor"]
    check(answers, model, labels, {"gpt": 11, "llama": 17, "encoder": 7}[model])


@pytest.mark.parametrize("model", ["llama", "encoder"])
def test_split_positions_have_the_same_bits_on_any_number_of_ranks(answers, model):
    check(answers, model, ["sequence"], 7)


def test_split_positions_have_bits_of_their_own(answers):
    # Gradients of norms are sums over parts of the positions. The encoder's samples, its dim 1, are split instead.
    assert answers[1, 0]["llama|sequence"]["digest"] != answers[1, 0]["llama|tensor"]["digest"]


def test_a_run_goes_on_with_another_number_of_processes(answers):
    found = answers[1, 0]["resumed|llama"]
    assert found["digest"] == found["alone"] == found["restored"], found
    assert len({answers[4, rank]["resumed|llama"]["digest"] for rank in range(4)}) == 1


def test_the_llama_of_transformers_has_the_same_bits(zygote, once):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    rows = ["transformers|tensor", "transformers|none"]
    check(_asked(zygote, once, "tensor-parallel-transformers", "2,1", rows), "transformers", ["tensor"], 3)
