"""Models whose units are hard to gather: the bits of one process without a plan, under every plan and policy."""

import json
import os
from pathlib import Path

import pytest
from shared_marks import slow_but

JOB = Path(__file__).with_name("units_job.py")
RANKS = [(1, 0), (2, 0), (2, 1)]
MODELS = "linear, norm|norm, linear|conv, norm|only norm|encoder|tied|handed".split("|")
ROUTED = """experts differ|experts in another order|experts not called|experts in layers|layers left out
layers left out later|layers run again""".replace("\n", "|").split("|")
OTHERS = "frozen norms, frozen linears, frozen block, skipped, adamw, jit, reentrant, not reentrant".split(", ")
QUICK = ["adamw"]
CASES = [*MODELS, *ROUTED, *OTHERS]


@pytest.fixture(scope="session")
def answers(zygote, once):
    """By number of processes and rank, the digests of the quick rows, and what else two processes were asked."""
    return _asked(zygote, once, "units", QUICK, "others")


@pytest.fixture(scope="session")
def more_answers(zygote, once):
    """The digests of the other rows."""
    return _asked(zygote, once, "more-units", [case for case in CASES if case not in QUICK], "")


def _asked(zygote, once, name, cases, others):
    directory = once(name, lambda directory: _ask(zygote, directory, "|".join(cases), others))
    return {rank: json.loads((directory / f"{rank[0]}-{rank[1]}.json").read_text()) for rank in RANKS}


def _ask(zygote, directory, *asked):
    quiet = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    children = [
        zygote.popen(JOB, str(directory), str(size), str(rank), *asked, env=quiet, preload=zygote.RANKS)
        for size, rank in RANKS
    ]
    for child in children:
        with child:
            _, errors = child.communicate(240)
            assert (child.returncode, errors) == (0, "")


@pytest.mark.parametrize("case", slow_but(CASES, *QUICK))
def test_every_plan_and_policy_has_the_bits_of_one_process(request, case):
    answers = request.getfixturevalue("answers" if case in QUICK else "more_answers")
    reference = {name.rpartition("|")[0]: digest for name, digest in answers[1, 0].items()}
    wrong, compared = {}, 0
    for rank in (0, 1):
        for name, digest in answers[2, rank].items():
            row = name.rpartition("|")[0]
            if row.partition("|")[0] == case:
                compared += 1
                if digest != reference[row]:
                    wrong[name, rank] = digest[-800:]
    assert not wrong
    assert compared == 2 * 5 * (6 if case in MODELS else 2 if case in ROUTED else 1)
    assert all(len(digest) in (64, 64 + 64 + 64) for digest in reference.values())


def test_a_unit_that_is_called_in_another_order_later_is_named(answers):
    said = [answers[2, rank]["all again"] for rank in (0, 1)] + [answers[2, 1]["one again"]]
    for text, rank in zip(said, (0, 1, 1), strict=True):
        assert "RankError: the unit 'layers.1' is not called in the order that the ranks agreed on" in text
        assert f"rank {rank}, forward pass: the order has no call of it here" in text
        assert "fsdp(units=...) with globs that leave 'layers.*' out" in text
    assert answers[2, 0]["one again"] != "nothing was raised"


def test_a_checkpoint_inside_of_a_unit_is_refused_with_what_to_write(answers):
    for text in [text for rank in (0, 1) for text in answers[2, rank]["inside"]]:
        assert "ConfigError: a checkpoint inside of the unit 'layers.2' uses its parameter 'layers.2." in text
        assert (
            "instead: a checkpoint around the call of the unit: ps.checkpoint(model.get_submodule('layers.2'), x)"
            in text
        )


def test_a_gradient_that_is_not_finite_is_named_on_every_rank(answers):
    for rank in (0, 1):
        assert answers[2, rank]["refused"] == ["grads['blocks.1.norm.bias'] has infinities, the loss is nan"] * 2


def test_a_step_leaves_no_tensors_behind(answers):
    """Not even in cycles, which a collector finds late, or, where they go through autograd, never."""
    for rank in (0, 1):
        for plan, sizes in answers[2, rank]["left"].items():
            assert min(sizes[1:]) <= 0, (plan, sizes)
