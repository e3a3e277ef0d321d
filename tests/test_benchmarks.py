"""The harness of the benchmarks on a model of no size: it compares before it times, and reports what it found."""

from __future__ import annotations

import dataclasses
import doctest
import json

import pytest
import torch

from benchmarks import (
    architectures,
    gpu,
    gpu_ranks,
    host_cost,
    machine,
    peers,
    report,
    run,
    sharding,
    targets,
    training,
    workloads,
    zoo,
)
from benchmarks.peers import base
from benchmarks.settings import SECTIONS
from benchmarks.worker import Failure


class Here:
    """A worker without a process."""

    def __init__(self, name, spoil=None):
        self.peer, self.spoil, self.asked = peers.ALL[name], spoil, []

    def ask(self, *message):
        self.asked.append(message)

    def answer(self):
        kind, *rest = self.asked.pop(0)
        if kind == "build":
            self.trainer = self.peer.make(workloads.ALL[rest[0]])
            if self.spoil:
                self.spoil(self.trainer)
        return self.run(*rest) if kind == "run" else {"memory": 1.0}

    def run(self, steps):
        script, replies = iter([steps, None]), []
        self.trainer.serve(base.Rounds(script.__next__, replies.append))
        return replies[0]


@pytest.fixture(autouse=True)
def peak_of_the_tests(monkeypatch):
    """The tests' own process keeps the peak of its memory."""
    monkeypatch.setattr(base, "_reset_peak", lambda: None)


def measured(workers, rounds=3):
    return training.measure(workers, "tiny", rounds=rounds, seconds=0.002, say=lambda text: None)


@pytest.mark.slow
def test_peers_agree_and_are_timed_in_turns():
    found = measured({name: Here(name) for name in ("loop", "loop-fused", "ps-eager", "ps-fused", "ps-fit")})
    assert found["failed"] == {}
    losses = [peer["loss"] for peer in found["peers"].values()]
    assert max(losses) - min(losses) < 1e-5 * losses[0]
    for peer in found["peers"].values():
        assert len(peer["us_rounds"]) == 3
        assert peer["us_min"] <= peer["us"] <= peer["us_max"]
    assert training.ratio(found, "loop", "loop") == (1.0, 1.0, 1.0)


def test_a_peer_that_computes_something_else_is_not_timed():
    def spoil(trainer):
        trainer.optimizer.param_groups[0]["lr"] = 0.3

    found = measured({"loop": Here("loop"), "loop-fused": Here("loop-fused", spoil)})
    assert list(found["peers"]) == ["loop"]
    assert "its loss after 10 steps is" in found["failed"]["loop-fused"]


def test_a_peer_that_fails_is_named_and_the_others_go_on():
    def spoil(trainer):
        raise Failure("Traceback ...\nRuntimeError: out of luck")

    found = measured({"loop": Here("loop"), "ps-eager": Here("ps-eager", spoil)})
    assert list(found["peers"]) == ["loop"]
    text = report.markdown(results(training={"tiny": found}))
    assert "| purestep, eager | - | left out: RuntimeError: out of luck | - | - | - |" in text


def test_sets_of_processes_are_put_together():
    first, second = (measured({"loop": Here("loop"), "ps-eager": Here("ps-eager")}, rounds=2) for _ in range(2))
    second["failed"]["ps-eager"] = "out of luck"
    found = training.together([first, first])
    assert len(found["peers"]["loop"]["us_rounds"]) == 4
    assert found["peers"]["loop"]["us_processes"] == [first["peers"]["loop"]["us"]] * 2
    assert list(training.together([first, second])["peers"]) == ["loop"]
    elsewhere = results(training={"tiny": found}) | {"machine": machine.describe() | {"cpu": "another one"}}
    text = report.markdown(results(training={"tiny": found}), [elsewhere])
    assert "| another one |" in text
    assert "| purestep, eager |" in text.split("## On each processor")[1]


def results(**sections):
    about = {"settings": "quick", "date": "2026-01-31", "took": {"training": 61.0}, "machine": machine.describe()}
    return about | sections


def test_verdicts_compare_with_the_limit_and_say_what_was_not_measured():
    def rounds(*us):
        return {"us_rounds": list(us)}

    mlp = {
        "peers": {"ps-donate": rounds(3.0, 4.0, 6.0), "loop": rounds(10.0, 10.0, 10.0), "jax": rounds(1.0, 2.0, 3.0)}
    }
    found = {v.target.what: v for v in targets.verdicts({"training": {"mlp": mlp}})}
    over_loop = found["MLP: jit, donated / hand-written loop, AdamW foreach"]
    assert over_loop.reached == pytest.approx(0.4)
    assert over_loop.text == "missed"
    assert found["MLP: jit, donated / JAX jit, donated"].reached == pytest.approx(2.0)
    assert found["import purestep / import torch"].text == "not measured"
    met = dataclasses.replace(over_loop, target=dataclasses.replace(over_loop.target, limit=0.4 + 1e-9))
    assert met.text == "reached"


def test_every_peer_of_the_settings_exists_and_the_others_are_not_imported():
    for settings in (run.FULL, run.QUICK):
        names = {name for chosen in settings.training.values() for name in chosen} | set(settings.memory)
        assert names <= peers.ALL.keys()
        assert settings.training.keys() | settings.compile_rounds.keys() <= workloads.ALL.keys()
        assert settings.sharding.keys() <= sharding.MODELS.keys()
        assert {name for chosen in settings.sharding.values() for name in chosen} <= sharding.VARIANTS.keys()
        assert set(settings.policy_workloads) <= workloads.ALL.keys()
        assert settings.portable.keys() <= workloads.ALL.keys()
        assert {name for chosen in settings.portable.values() for name in chosen} <= peers.ALL.keys()
        assert set(settings.sections) <= set(SECTIONS)
    assert run.FULL.sections == SECTIONS
    assert set(run.FULL.sharding["gpt"]) == sharding.VARIANTS.keys()


@pytest.mark.slow
def test_several_processes_take_turns():
    settings = dataclasses.replace(
        run.QUICK,
        sharding={"mlp": ("torch ddp", "torch fully_shard", "fsdp fast")},
        sharding_rounds=2,
        sharding_steps=1,
    )
    said = []
    found = sharding.run(settings, said.append)
    assert found["mlp"]["failed"] == {}
    assert [len(times) for times in found["mlp"]["seconds"].values()] == [2, 2, 2]
    assert "fsdp fast" in said[0]
    text = report.markdown(results(sharding=found))
    assert "| torch ddp | 1.00 [1.00, 1.00] |" in text
    assert "| MLP, 2 processes: ddp fast, jit / torch ddp | <= 1 | - | not measured |" in text


def test_the_report_is_written_with_a_chart(tmp_path):
    found = measured({"loop": Here("loop"), "ps-fused": Here("ps-fused")})
    run.write(results(training={"tiny": found}, loop_cost={"error": "Traceback\nValueError: no"}), tmp_path / "try")
    assert json.loads((tmp_path / "try.json").read_text())["training"]["tiny"]["peers"].keys() == {"loop", "ps-fused"}
    text = (tmp_path / "try.md").read_text()
    assert "| hand-written loop, AdamW foreach | 1.00 [1.00, 1.00] |" in text
    assert "loop_cost: failed" in text
    assert (tmp_path / "try.png").read_bytes().startswith(b"\x89PNG")


def test_turns_alternate_and_the_first_round_is_not_counted():
    asked = []

    def turn(name, seconds):
        return lambda steps: asked.append(name) or seconds * steps

    assert host_cost.in_turns(turn("ours", 3.0), turn("theirs", 1.0), 5, 3) == [(3.0, 1.0)] * 3
    assert asked == ["theirs", "ours", "ours", "theirs"] * 2


def test_the_host_cost_of_samples_is_measured_and_reported():
    pairs = host_cost.in_turns(*host_cost._samples(), 2, 2)
    assert len(pairs) == 2
    assert min(seconds for pair in pairs for seconds in pair) > 0
    found = dict.fromkeys(report.HOST_COST, (1.25, 1.0, 2.0))
    text = report.markdown(results(host_cost=found))
    assert "beyond a bare loop over it, a batch | 1.25 us | [1, 2] |" in text
    assert (
        "| a list of samples as data, beyond its collation, a sample | <= 5 us | 1.25 us [1.00, 2.00] | reached |"
        in text
    )


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """Runs the benchmark with sections that take no time; returns what was asked of them and what was written."""
    asked = []

    def found(section, settings, say):
        asked.append(section)
        if section == "imports" and asked.count(section) == 1:
            return {"error": "Traceback\nOSError: no"}
        return None if section == "sharding" else {"failed": {}, "peers": {}} if section == "memory" else {}

    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "in_process", found)
    monkeypatch.setattr(run.report, "markdown", lambda results, others=(): "")
    monkeypatch.setattr(run.report, "chart", lambda results, path: None)

    def start(*arguments):
        asked.clear()
        code = run.main(list(arguments))
        return code, list(asked), json.loads((tmp_path / "full.json").read_text())

    return start


def test_a_run_goes_on_with_the_sections_that_are_missing(sections):
    code, asked, written = sections()
    assert (code, asked) == (1, list(SECTIONS))
    assert "error" in written["imports"]
    assert written["took"].keys() == set(SECTIONS) - {"sharding"}
    assert sections("--resume")[1] == ["imports", "sharding"]  # what failed, and what was left out
    code, asked, written = sections("--only", "memory")
    assert (asked, written.keys() & set(SECTIONS)) == (["memory"], set(SECTIONS) - {"sharding"})
    assert sections()[1] == list(SECTIONS)


def test_results_of_another_machine_are_not_gone_on_with(sections, tmp_path, capsys):
    sections()
    written = json.loads((tmp_path / "full.json").read_text())
    written["machine"]["versions"]["torch"] = "1.0"
    (tmp_path / "full.json").write_text(json.dumps(written))
    assert sections("--resume")[1] == list(SECTIONS)
    assert "was measured on another machine or with other versions" in capsys.readouterr().err


def test_a_section_without_run_is_left_out(monkeypatch):
    import benchmarks.workloads

    sent = []
    pipe = type("Pipe", (), {"send": sent.append})
    monkeypatch.setattr(run.os, "environ", {})
    run._section(pipe, "workloads", run.QUICK)
    assert not hasattr(benchmarks.workloads, "run")
    assert sent == [("say", "benchmarks/workloads.py has no run(), so it is left out"), ("done", None)]


@pytest.mark.parametrize("name", ["gpt", "cnn", "mlp"])
def test_weights_fit_the_modules(name):
    work = workloads.ALL[name]
    model = workloads.module(work)
    assert sum(p.numel() for p in model.parameters()) == work.parameters()
    x, y = (torch.from_numpy(array) for array in work.batches()[0])
    assert model(x).shape[0] == y.shape[0]


def test_doctests():
    assert doctest.testmod(report).failed == 0


# --- on a card --------------------------------------------------------------------------------------------------------


def test_what_a_card_settles_is_a_line_each_and_an_error_ends_nothing(capsys, tmp_path, monkeypatch):
    def broken(card):
        raise RuntimeError("no kernel | image")

    some = {
        "environment": gpu.environment,
        "broken": broken,
        "draws": gpu.draws,
        "mlp, eager": gpu.checks()["mlp, eager"],
    }
    monkeypatch.setattr(gpu, "checks", lambda: some)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "table.md")]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {row["check"]: row["ok"] for row in rows} == {name: name != "broken" for name in some}
    assert rows[1]["error"] == "RuntimeError: no kernel | image"
    assert "| broken | **no** |" in (tmp_path / "table.md").read_text()
    assert gpu.main(["--device", "cpu", "--budget", "0"]) == 0
    assert '"left out": "no time"' in capsys.readouterr().out


@pytest.mark.slow
def test_plans_on_two_processes_beside_those_of_torch(tmp_path):
    found = gpu_ranks.on_processes("cpu", 2, tmp_path, True)
    assert (found["ok"], found["same bits"], found["processes"]) == (True, True, 2)
    ours = {f"purestep {kind} {reduction}" for kind in ("ddp", "fsdp") for reduction in ("tree", "fast")}
    assert found["ms"].keys() == ours | {"torch ddp", "torch fully_shard"}


# --- the zoo ----------------------------------------------------------------------------------------------------------


def tiny(loss):
    """A row of the zoo: one layer behind dropout."""
    model = lambda: torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(6, 1))  # noqa: E731
    return architectures.Row(model, lambda generator: {"x": torch.randn(4, 6, generator=generator)}, loss)


def row_of(monkeypatch, tmp_path, loss):
    monkeypatch.setitem(zoo.ROWS, "tiny", tiny(loss))
    return zoo.row_of("tiny", tmp_path, compile=False, timed=False)


def test_a_model_that_is_right_fills_its_row(monkeypatch, tmp_path):
    cells = row_of(monkeypatch, tmp_path, lambda net, batch: net(batch["x"]).square().mean())
    assert {name: cells[name] for name in ("pure", "traces", "bits", "retraces")} == {
        "pure": "yes",
        "traces": "yes",
        "bits": "same",
        "retraces": "0",
    }
    assert zoo.faults(cells) == []
    assert zoo.resumed("tiny", tmp_path) == "same"


def test_a_loss_that_counts_its_calls_is_told_as_different_from_a_loop(monkeypatch, tmp_path):
    calls = []

    def loss(net, batch):
        calls.append(None)
        return net(batch["x"]).square().mean() * len(calls)

    assert "loop: " in str(zoo.faults(row_of(monkeypatch, tmp_path, loss)))


def test_a_model_that_does_not_trace_is_a_fault(monkeypatch, tmp_path):
    def loss(net, batch):
        out = net(batch["x"])
        return out[out > 0].sum()

    cells = row_of(monkeypatch, tmp_path, loss)
    (fault,) = zoo.faults(cells)
    assert fault.startswith("traces: no: TraceError: ")
    assert cells["bits"] == 'same, unjittable="eager"'
