"""The loop on many ranks: the same run on 1, 2 and 4 processes; stopped, refused and failed together."""

import json
import os
import socket
from pathlib import Path

import pytest
from shared_marks import slow_but

import purestep as ps
from purestep.distributed import control
from purestep.loop.clock import Together
from purestep.loop.signals import Signals

SCRIPT = Path(__file__).with_name("ranks_job.py")
ALL = "straight own_loop level_two relay shares"
SLOW = "fsdp hsdp few foreign collated"
MORE = "quiet with_signal signal_in_evaluation seconds exchanges refusals mismatches wrong memory wrapped opaque"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(zygote, directory, size, names, timeout=60):
    """Run checks on some processes together; return the answers of each rank, and what they ended with."""
    directory.mkdir(parents=True, exist_ok=True)
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    several = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [
        zygote.popen(
            SCRIPT,
            directory,
            str(timeout),
            *names.split(),
            env=base | (several | {"RANK": str(r)} if size > 1 else {}),
            preload=zygote.RANKS,
        )
        for r in range(size)
    ]
    ends = []
    for child in children:
        with child:
            _, errors = child.communicate(120)
            ends.append((child.returncode, errors))
    return said(directory, size), ends


def said(directory, size):
    answers = [directory / f"{size}-{rank}.json" for rank in range(size)]
    return [json.loads(a.read_text()) if a.exists() else None for a in answers]


@pytest.fixture(scope="session")
def answers(zygote, once):
    """By number of processes, the answers of each rank."""

    def ask(directory):
        for size, names in ((4, f"{ALL} hsdp {MORE}"), (2, ALL), (1, f"{ALL} memory")):
            _, ends = start(zygote, directory, size, names)
            assert ends == [(0, "")] * size, ends

    directory = once("ranks", ask)
    return {size: said(directory, size) for size in (4, 2, 1)} | {"directory": directory}


@pytest.fixture(scope="session")
def more_answers(zygote, once):
    """The same of the checks that `make test` leaves out."""

    def ask(directory):
        for size in (4, 2, 1):
            _, ends = start(zygote, directory, size, f"{SLOW} wrong_on_two_axes switched")
            assert ends == [(0, "")] * size, ends

    directory = once("more-ranks", ask)
    return {size: said(directory, size) for size in (4, 2, 1)}


@pytest.mark.parametrize("check", slow_but(["straight", *SLOW.split()], "straight"))
def test_a_run_has_the_same_bits_on_any_number_of_ranks(request, check):
    answers = request.getfixturevalue("more_answers" if check in SLOW.split() else "answers")
    runs = [answers[size][rank][check] for size in (1, 2, 4) for rank in range(size)]
    assert len({run["digest"] for run in runs}) == 1
    assert runs[0]["metrics"]["val/loss"] > 0
    for run in runs:
        assert (run["batches"], run["reason"], run["metrics"]) == tuple(
            runs[0][name] for name in ("batches", "reason", "metrics")
        )


def test_loaders_per_rank_go_on_with_other_ranks(answers):
    assert [answers[4][rank]["shares"]["opened"] for rank in range(4)] == [[0], [1], [2], [3]]
    assert [answers[2][rank]["shares"]["opened"] for rank in range(2)] == [[0, 1], [2, 3]]
    ended = answers[1][0]["shares"]
    assert (ended["batches"], ended["state"]) == (14, ended["alone"])


def test_a_function_around_a_step_keeps_its_plan(answers):
    straight = answers[1][0]["straight"]
    for rank in range(4):
        answer = answers[4][rank]["wrapped"]
        assert (answer["digest"], answer["metrics"]) == (straight["digest"], straight["metrics"])
        # Called with the step of the plan, and once on fake tensors with one that has none.
        assert answer["calls"] == [[False, 4], [True, None]]
    assert sum(answers[4][rank]["wrapped"]["read"] for rank in range(4)) == straight["read"]


def test_a_function_that_hides_a_plan_is_refused_on_every_rank(answers):
    for rank in range(4):
        for text in answers[4][rank]["opaque"].values():
            assert text.startswith("ConfigError: a function around a step hides its plan from the run")
            assert "on 4 processes" in text
            assert "ps.wrap_step(step, function)" in text


def test_a_run_has_the_same_bits_under_two_plans(answers):
    assert answers[4][0]["straight"]["digest"] == answers[4][0]["hsdp"]["digest"]


@pytest.mark.slow
def test_a_run_has_the_same_bits_under_any_plan(answers, more_answers):
    assert answers[4][0]["straight"]["digest"] == more_answers[4][0]["fsdp"]["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["False", "True"])
def test_all_ranks_switch_to_the_compiled_step_at_the_same_batch(more_answers, sharded):
    for size in (4, 2, 1):
        answers = [more_answers[size][rank]["switched"][sharded] for rank in range(size)]
        assert all(answer == answers[0] for answer in answers)
        assert 0 < answers[0]["at"][0] < 40
        assert answers[0]["digest"] == answers[0]["fixed"]
        assert answers[0]["resumed"] == [[], answers[0]["longer"]]


@pytest.mark.parametrize("other", [None, 7])
def test_ranks_switch_once_the_step_is_compiled_on_all(monkeypatch, other):
    monkeypatch.setattr(control, "gather", lambda entry, what: [entry, (*entry[:-1], other)])
    outside = Together(Signals())
    outside.watch(lambda: 7)
    assert outside.switch is None  # what one rank alone knows is nothing
    assert outside.stop(None) is (other is not None)
    assert outside.switch == other


def test_a_loop_of_ones_own_has_the_same_bits_too(answers):
    """The fixture sees that every process leaves with 0, without a word on stderr."""
    assert len({answers[size][rank]["own_loop"]["digest"] for size in (1, 2, 4) for rank in range(size)}) == 1


def test_a_run_goes_on_with_fewer_ranks(answers):
    assert answers[4][0]["relay"]["batches"] == 5
    last, straight = answers[1][0]["relay"], answers[1][0]["straight"]
    assert (last["batches"], last["digest"], last["metrics"]) == (12, straight["digest"], straight["metrics"])
    log = answers["directory"] / "relay" / "metrics.csv"
    assert log.read_text() == (answers["directory"] / "of-1" / "straight" / "metrics.csv").read_text()


def test_a_run_has_one_identity_on_any_number_of_ranks(answers):
    """Rank 0 writes it; `relay` goes on with `strict=True`, under another plan too."""
    runs = [answers["directory"] / f"of-{size}" / "straight" for size in (1, 2, 4)]
    found = [ps.snapshot.manifest(run, 12).info["identity"] for run in runs]
    assert all(identity == found[0] for identity in found)
    assert found[0]["data"]["batch_size"] == 12
    assert set(found[0]["callbacks"]) == {"val", "early_stopping", "log"}


def test_the_result_of_every_rank_is_the_same_also_its_clock(answers):
    for size in (2, 4):
        assert len({json.dumps({**a["straight"], "read": 0, "evaluated": 0}) for a in answers[size]}) == 1


def test_each_sample_is_read_by_one_rank_and_evaluated_once(answers):
    alone = {name: answers[1][0]["straight"][name] for name in ("read", "evaluated")}
    for size in (2, 4):
        assert {name: sum(a["straight"][name] for a in answers[size]) for name in alone} == alone
    assert max(a["straight"]["read"] for a in answers[4]) < answers[1][0]["straight"]["read"] / 3


def test_only_rank_0_writes(answers):
    rows = [(answers["directory"] / f"of-{size}" / "straight" / "metrics.csv").read_text() for size in (1, 2, 4)]
    assert rows[0] == rows[1] == rows[2]
    assert [a["quiet"]["shown"] for a in answers[4]] == [1, 0, 0, 0]
    assert [len(a["quiet"]["warnings"]) for a in answers[4]] == [1, 0, 0, 0]


def test_events_are_the_same_on_every_rank(answers):
    events = [answers[size][rank]["level_two"]["events"] for size in (1, 2, 4) for rank in range(size)]
    assert all(e == events[0] for e in events)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(answers):
    found = [a["with_signal"] for a in answers[4]]
    assert len({json.dumps({**f, "seconds": 0}) for f in found}) == 1
    assert (found[0]["reason"], found[0]["exit_code"]) == ("SIGTERM", 143)
    assert 30 <= found[0]["batches"] < 400


def test_a_signal_in_an_evaluation_leaves_it_due_on_all(answers):
    found = [a["signal_in_evaluation"] for a in answers[4]]
    assert {f["reason"] for f in found} == {"SIGTERM"}
    assert {tuple(f["due"]) for f in found} == {("val",)}
    assert len({f["digest"] for f in found}) == 1
    assert max(f["evaluated"] for f in found) < 200


def test_the_clock_is_that_of_rank_0(answers):
    found = [a["seconds"] for a in answers[4]]
    assert len({json.dumps({**f, "seconds": 0}) for f in found}) == 1
    assert found[0]["reason"] == "reached 0.3 seconds"
    assert 0.3 <= found[0]["elapsed"] < 3.0


def test_ranks_that_differ_are_told_at_the_start(answers):
    for found in (a["mismatches"] for a in answers[4]):
        assert "the ranks differ in the step's microbatches" in found["microbatches"]
        assert "ranks 0, 1, 2: 4; rank 3: 8" in found["microbatches"]
        assert "the ranks differ in state." in found["seed"]
        assert "ranks 0, 1: " in found["seed"]
        assert "the same seed and code on every rank" in found["seed"]
        assert "the ranks differ in the data" in found["data"]
        assert "rank 3: ('Batches', 5, 'BatchOrder(samples=60" in found["data"]
        assert "ranks 0, 1, 2: '2 steps'; rank 3: '3 steps'" in found["until"]
        assert "the ranks differ in callbacks" in found["callbacks"]


def test_what_cannot_be_shared_is_refused(answers):
    for found in (a["refusals"] for a in answers[4]):
        assert "6 microbatches cannot be shared equally by 4 ranks" in found["count"]
        assert "does not work where several ranks read shards of one batch" in found["skip"]
        assert "Subset" in found["skip"]


def assert_refused(found):
    assert found["loss"].startswith("StepError: a loss function returns a loss, or (loss, metrics)")
    assert found["model"].startswith("StepError: the first batch does not fit the model")
    assert "model.0 (Linear), in linear" in found["model"]
    assert "expected float32[..., 6], given float32[1, 5]" in found["model"]
    assert found["tx"].startswith("StepError: the optimizer state of the state was not made by the tx")
    assert found["metric"].startswith("MetricError: the name of a metric is a string")
    assert found["devices"] == ["meta"]


@pytest.mark.slow
def test_a_wrong_program_is_refused_under_a_plan_of_two_axes(more_answers):
    for rank in range(4):
        assert_refused(more_answers[4][rank]["wrong_on_two_axes"])


def test_a_wrong_program_is_refused_on_every_rank_before_its_first_step(answers):
    """Each rank checks its own rows by itself, and says what one process would say."""
    for found in (a["wrong"] for a in answers[4]):
        for plan in ("ddp", "fsdp"):
            assert_refused(found[plan])
        assert "batch 2 of the run differs from the first one, and the step failed on it" in found["later"]
        assert "batch['x'] was float32[n, 6], now float32[n, 4]" in found["later"]


def test_what_only_one_rank_refuses_is_told_to_the_others(answers):
    for rank, found in enumerate(a["wrong"] for a in answers[4]):
        if rank == 2:
            assert found["one"].startswith("StepError: a loss function returns a loss")
            continue
        assert found["one"].startswith("RankError: the check before the first step failed on rank 2, not here")
        assert "rank 2: StepError: a loss function returns a loss, or (loss, metrics)" in found["one"]
        page = (SCRIPT.parents[2] / "docs" / "assumptions.md").read_text()
        assert found["one"].splitlines()[0].removeprefix("RankError: ") in " ".join(page.split())
        assert "returned {'loss': " in found["one"]


def test_evaluations_are_checked_by_rank_0(answers):
    for rank, found in enumerate(a["wrong"] for a in answers[4]):
        kind = "StepError: the first batch of the evaluation 'val'" if rank == 0 else "RankError: the check before"
        assert found["evaluation"].startswith(kind)
        assert "the first batch of the evaluation 'val' does not fit the model" in found["evaluation"]


def test_a_rank_checks_without_the_others(answers):
    """Only one of them ran the check: with a collective in it, it would have waited for ever."""
    assert [a["wrong"]["alone"] for a in answers[4]] == ["fine", None, None, None]


def test_memory_is_estimated_for_one_rank(answers):
    alone = answers[1][0]["memory"]["ddp"]
    for found in (a["memory"] for a in answers[4]):
        assert found["ddp"]["params"] == alone["params"]
        # Each rank holds one of four microbatches, which need no second sum, and its rows of the batch.
        assert (found["ddp"]["gradients"], alone["gradients"]) == (alone["params"], 2 * alone["params"])
        assert found["ddp"]["activations"] == alone["activations"]
        assert found["ddp"]["batch"] * 4 == alone["batch"]
        assert (found["ddp"]["gathered"], found["fsdp"]["gathered"] > 0) == (0, True)
        assert found["fsdp"]["activations"] == alone["activations"]
        assert found["fsdp"]["params"] == found["local"] < alone["params"] / 3
        assert found["fsdp"]["optimizer"] < alone["optimizer"] / 3
        # Gathered parameters are not kept, so their cast copies are not counted; those of ddp are.
        assert found["bf16 fsdp"]["activations"] < found["bf16 ddp"]["activations"]
        assert found["bf16 ddp"]["activations"] - found["bf16 fsdp"]["activations"] == found["copies"]


def test_a_shortage_on_one_rank_is_told_once(answers):
    texts = [a["memory"]["warned"] for a in answers[4]]
    assert texts[1:] == [[], [], []]
    (text,) = texts[0]
    assert text.startswith("the step may not fit in the memory of the device\n  where:   cpu: ")
    assert "100 B are free" in text
    assert "plan=ps.sharding.fsdp()" in text
    assert text.endswith("\n  ranks:   2, 3 of 4; the numbers are those of rank 2")


def test_values_are_exchanged_and_differences_named(answers):
    for found in (a["exchanges"] for a in answers[4]):
        assert found["ranks"] == [0, 1, 2, 3]
        assert found["long"] == [0, 1500, 3000, 4500]
        assert found["from"] == 0
        assert "rank 0: evaluate" in found["different"]
        assert "rank 3: save" in found["different"]
        assert "the ranks differ in b" in found["differ"]
        assert "b: ranks 0, 1: 0; ranks 2, 3: 1" in found["differ"]


def test_a_rank_that_raises_is_named_by_the_others(zygote, tmp_path):
    found, _ = start(zygote, tmp_path, 3, "raises")
    assert found[1]["raises"]["error"] == "ValueError: a bad day"
    for rank in (0, 2):
        text = found[rank]["raises"]["error"]
        assert text.startswith("RankError: "), text
        assert "rank 1 failed at batch 5: ValueError: a bad day" in text
        assert found[rank]["raises"]["seconds"] < 20


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_after_the_timeout(zygote, tmp_path):
    found, ends = start(zygote, tmp_path, 3, "hangs", timeout=2)
    assert ends[1][0] == 3
    for rank in (0, 2):
        text = found[rank]["hangs"]["error"]
        assert f"rank {rank} got no answer from the others in " in text
        assert "at batch 5" in text
        assert "rank 1 says nothing; it was last heard of at " in text
        assert "timeout: 2 s" in text
        assert 2 <= found[rank]["hangs"]["seconds"] < 11


AGENT = """
import sys, torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def work(script, *arguments):
    import runpy
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    runpy.run_path(script, run_name="__main__")

agents, endpoint, *arguments = sys.argv[1:]
config = LaunchConfig(int(agents), int(agents), 2 // int(agents), run_id="killed", rdzv_backend="c10d", max_restarts=3,
                      rdzv_endpoint=endpoint, monitor_interval=0.1, start_method="fork")
elastic_launch(config, work)(*arguments)
"""


@pytest.mark.slow
@pytest.mark.parametrize("agents", [1, 2])
def test_a_killed_rank_is_restarted_and_the_run_ends_with_the_same_bits(zygote, tmp_path, agents):
    """torchrun's agents, one with two workers or one on each of two nodes; workers are forked, not started anew."""
    endpoint = f"localhost:{free_port() if agents > 1 else 0}"
    modules = "xxhash torch.distributed.launcher.api torch.distributed.tensor orbax.checkpoint"
    words = [str(agents), endpoint, SCRIPT, tmp_path, "20", "killed"]
    children = [zygote.popen(AGENT, *words, preload=modules) for _ in range(agents)]
    for child in children:
        with child:
            _, errors = child.communicate(120)
            assert child.returncode == 0, errors
    found = [json.loads((tmp_path / f"2-{rank}.json").read_text())["killed"] for rank in (0, 1)]
    assert found[0] == found[1]
    assert 6 <= found[0]["steps"] < 12, "the second life began at a snapshot"
    straight, ends = start(zygote, tmp_path / "straight", 1, "killed")
    assert ends == [(0, "")]
    assert straight[0]["killed"]["digest"] == found[0]["digest"]
