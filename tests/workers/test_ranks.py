"""Workers have the same bits on 1, 2 and 4 processes; params are sent once a round, gradients as thin factors."""

import json
from pathlib import Path

import pytest
import shared_ranks

JOB = Path(__file__).with_name("workers_job.py")
KINDS = ["apart", "microbatches", "start", "diloco", "compiled", "ragged", "evaluated", "power", "power_ragged"]
POWER = ["power_resumed", "power_sent"]


@pytest.fixture(scope="session")
def answers(zygote, once):
    """By number of processes and rank, what each quick check found."""
    return _asked(zygote, once, "workers", "2,1", ["sent", "power_sent"])


@pytest.fixture(scope="session")
def more_answers(zygote, once):
    """The same of all checks."""
    return _asked(zygote, once, "more-workers", "4,2,1", [*KINDS, *POWER, "fast", "resumed", "sent", "unplaced"])


def _asked(zygote, once, name, sizes, checks):
    directory = once(name, lambda directory: shared_ranks.ask(zygote, JOB, directory, sizes, checks))
    return shared_ranks.answers(directory, sizes)


def check_bits(answers, kind):
    found = {place: json.dumps(checks[kind]) for place, checks in answers.items()}
    assert len(set(found.values())) == 1, "\n".join(f"{place}: {text[-800:]}" for place, text in found.items())
    assert "Traceback" not in found[1, 0]


def check_sent(answers, size):
    """Steps 1 and 4 and 7 end a round of 3: the first step is taken together, which sends gradients."""
    for rank in range(size):
        params, sent, *_ = answers[size, rank]["sent"]
        rounds = [step for step, count in enumerate(sent) if count >= params]
        assert rounds == [0, 3, 6], sent
        assert max(count for step, count in enumerate(sent) if step not in rounds) <= 64, sent
    check_same(answers, "sent")


def check_compressed(answers, size):
    """The first two steps send gradients, the others factors of the one matrix that is worth it."""
    for rank in range(size):
        params, sent, *_ = answers[size, rank]["power_sent"]
        assert min(sent[:2]) > params
        assert max(sent[2:]) < min(sent[:2]) - 4 * 7 * 5 / 2, sent
    check_same(answers, "power_sent")


def check_same(answers, name):
    assert answers[1, 0][name][1] == [0] * 8
    assert len({tuple(checks[name][2:]) for checks in answers.values()}) == 1


def test_params_are_sent_once_a_round_and_the_bits_are_those_of_one_process(answers):
    check_sent(answers, 2)


def test_compressed_gradients_are_small_and_the_bits_are_those_of_one_process(answers):
    check_compressed(answers, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_every_kind_do_not_depend_on_the_number_of_processes(more_answers, kind):
    check_bits(more_answers, kind)


@pytest.mark.slow
def test_four_two_and_one_process_share_a_run(more_answers):
    assert more_answers[1, 0]["resumed"] == more_answers[1, 0]["diloco"][0]
    assert more_answers[1, 0]["power_resumed"] == more_answers[1, 0]["power"]
    check_sent(more_answers, 4)
    check_compressed(more_answers, 4)
    assert more_answers[1, 0]["compiled"][0] != more_answers[1, 0]["start"][0]


@pytest.mark.slow
def test_sums_of_the_backend_have_other_bits(more_answers):
    one, four = (more_answers[size, 0] for size in (1, 4))
    assert one["fast"][0] != four["fast"][0]
    assert one["fast"][2]["train/loss_epoch"] == pytest.approx(four["fast"][2]["train/loss_epoch"], rel=1e-4)
    assert len({more_answers[4, rank]["fast"][0] for rank in range(4)}) == 1


@pytest.mark.slow
def test_what_ranks_cannot_hold_is_refused(more_answers):
    unplaced, uneven = more_answers[4, 2]["unplaced"]
    assert "the state is not placed by the plan of the step" in unplaced
    assert "4 workers are on this rank, the plan says 1" in unplaced
    assert "6 workers cannot be shared equally by 4 ranks" in uneven
    assert "workers=4, 8, 16" in uneven
