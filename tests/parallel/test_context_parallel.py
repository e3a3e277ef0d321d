"""Transformers under context parallelism on 1, 2 and 4 processes: the bits of one process that computes all parts.

Ring attention has bits of its own, which are those of one process, too.
"""

import importlib.util
from pathlib import Path

import pytest
import shared_ranks

JOB = Path(__file__).with_name("context_job.py")
LABELS = ["context", "none", "jit", "ddp x context", "fsdp x context", "zero1 x context", "zero2 x context"]
# By model: what is computed besides `context` and `none`.
MORE = {"gpt": ["jit", "fsdp x context"], "llama": ["ddp x context", "zero1 x context"], "encoder": []}
MORE["tokens"] = ["jit", "ddp x context", "fsdp x context", "zero1 x context", "zero2 x context"]
RINGS = {"gpt": ["ring", "jit ring"], "llama": ["ring", "fsdp x ring"], "encoder": ["ring"]}
RINGS["tokens"] = ["ring", "jit ring", "fsdp x ring"]
SLOW = pytest.mark.slow


def asked(zygote, once, name, sizes, rows):
    def ask(directory):
        shared_ranks.ask(zygote, JOB, directory, sizes, rows, seconds=400, silent=False)

    return shared_ranks.answers(once(name, ask), sizes)


@pytest.fixture(scope="module")
def answers(zygote, once):
    """By number of processes and rank, what each row found."""
    rows = [f"{model}|{label}" for model, more in MORE.items() for label in ["context", "none", *more]]
    rows += [f"{model}|{label}" for model, labels in RINGS.items() for label in labels]
    return asked(zygote, once, "context-parallel", "4,2,1", [*rows, "resumed", "resumed ring"])


def check(answers, model, least, labels=LABELS):
    found = {
        (*where, label): rows[f"{model}|{label}"]
        for where, rows in answers.items()
        for label in labels
        if label != "none" and f"{model}|{label}" in rows
    }
    assert len(found) >= least
    assert all(isinstance(value, dict) for value in found.values()), found
    assert len({value["digest"] for value in found.values()}) == 1, found
    # Sums over positions are added in another order than without a plan.
    plain, value = answers[1, 0].get(f"{model}|none"), next(iter(found.values()))
    if plain is not None:
        assert value["numbers"] == pytest.approx(plain["numbers"], rel=1e-3, abs=2e-4)
        assert value["digest"] != plain["digest"]


@SLOW
@pytest.mark.parametrize("model", MORE)
def test_the_bits_do_not_depend_on_ranks_products_or_jit(answers, model):
    products = len([label for label in MORE[model] if "x" in label])
    check(answers, model, 7 + 4 * products + 2 * ("jit" in MORE[model]))


@SLOW
@pytest.mark.parametrize("model", RINGS)
def test_the_bits_of_a_ring_do_not_depend_on_ranks_products_or_jit(answers, model):
    labels = RINGS[model]
    check(answers, model, 7 + 4 * ("fsdp x ring" in labels) + 2 * ("jit ring" in labels), labels)


@SLOW
@pytest.mark.parametrize("row", ["resumed", "resumed ring"])
def test_a_run_goes_on_with_another_number_of_processes(answers, row):
    found = answers[1, 0][row]
    assert found["digest"] == found["alone"], found


@SLOW
def test_the_llama_of_transformers_has_the_same_bits(zygote, once):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    rows = ["transformers|context", "transformers|none"]
    check(asked(zygote, once, "context-parallel-transformers", "2,1", rows), "transformers", 3)


def test_two_processes_compute_the_parts_of_one(zygote, once):
    rows = ["tokens|context", "tokens|ring", "kept"]
    found = asked(zygote, once, "context-parallel-quick", "2,1", rows)
    check(found, "tokens", 3)
    check(found, "tokens", 3, ["ring"])
    for rank in range(2):
        # Of each layer gathering keeps the keys and values of both ranks, which a ring has at a time of one layer only.
        (held, most), (gathered, peak) = found[2, rank]["kept"]["ring"], found[2, rank]["kept"]["gather"]
        assert held < 0.5 * gathered, found[2, rank]
        assert most < 0.9 * peak, found[2, rank]
