"""A step with a warm-up switches where the counter of its state says, in whatever process."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.jit import backends, compile_elsewhere


def loss_fn(net, batch):
    return net(batch).square().mean()


TX = ps.optim.adamw(1e-2)


def first():
    return ps.init(lambda: nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)), TX, seed=0)


def samples(count=40):
    return list(torch.randn(count, 3, generator=torch.Generator().manual_seed(1)))


DATA = ps.data.Batches(samples(), batch_size=4, seed=0)


def made(warmup=5, **options):
    return ps.jit(ps.make_step(loss_fn, TX), backend="eager", warmup=warmup, **options)


@pytest.fixture
def rounding(monkeypatch):
    """A compiler whose results are a bit larger: a run then shows in its bits which steps were compiled."""
    calls = []
    own = backends._eager

    def other(traced, mode):
        run = own(traced, mode)

        def rounded(tensors):
            calls.append(len(tensors))
            return [x * (1 + 2**-20) if x.is_floating_point() else x for x in run(tensors)]

        return rounded

    monkeypatch.setitem(backends._BACKENDS, "eager", other)
    return calls


def trained(step, until, run_dir=None, **options):
    return ps.fit(step, first(), DATA, until=ps.steps(until), run_dir=run_dir, **options)


@pytest.mark.parametrize("donate", [False, True])
def test_the_first_steps_are_uncompiled_and_the_others_compiled(rounding, donate):
    step, plain = made(donate=donate), ps.make_step(loss_fn, TX)
    state = expected = first()
    for i, batch in enumerate(torch.stack(samples()).split(4)[:8]):
        expected, _ = plain(expected, batch)
        state, _ = step(state, batch)
        assert len(rounding) == max(0, i - 4)
        if i == 4:
            assert ps.digest(state) == ps.digest(expected)
    assert int(state.step) == 8
    assert donate or ps.digest(state) != ps.digest(expected)


def test_a_step_of_microbatches_has_one(rounding):
    step = ps.jit(ps.make_step(loss_fn, TX, microbatches=2), backend="eager", warmup=1)
    state, batch = first(), torch.stack(samples(4))
    state, _ = step(state, batch)
    assert rounding == []
    step(state, batch)
    assert len(rounding) == 3  # two microbatches and the update


@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.slow), 7])
def test_a_run_that_is_resumed_switches_where_it_would_have(rounding, tmp_path, at):
    whole = trained(made(), 9)
    trained(made(), at, tmp_path / "run")
    resumed = trained(made(), 9, tmp_path / "run", resume="auto")
    assert ps.digest(resumed.state) == ps.digest(whole.state)
    assert ps.digest(trained(made(6), 9).state) != ps.digest(whole.state)


def test_a_run_is_verified_with_the_warm_up_that_it_had(rounding, tmp_path):
    trained(made(), 7, tmp_path / "run")
    assert ps.verify(tmp_path / "run", ps.Experiment(made(), first(), DATA)).ok
    with pytest.warns(UserWarning, match="saved under eager from step 5, now eager from step 6"):
        assert not ps.verify(tmp_path / "run", ps.Experiment(made(6), first(), DATA)).ok


def test_what_is_no_training_step_has_none():
    for function in (lambda state, batch: (state, {}), ps.make_eval(loss_fn)):
        with pytest.raises(ConfigError, match="only a step that trains has a warm-up"):
            ps.jit(function, warmup=3)
    with pytest.raises(ConfigError, match="is called with a train state"):
        made()({"w": torch.ones(2)}, torch.ones(2, 3))


def test_it_shows_and_asks_as_a_compiled_step(rounding):
    step = made(2)
    assert "warmup=2" in repr(step)
    assert step.facts.backend == "eager"
    assert step.facts.warmup == 2
    assert step.with_microbatches(4).facts.microbatches == 4
    assert "tanh" not in step.compile(first(), torch.ones(4, 3)).graph(first(), torch.ones(4, 3))
    assert step.retraces == step.refusals == ()


# --- the other process ------------------------------------------------------------------------------------------------


def test_work_is_done_in_another_process(tmp_path):
    file = tmp_path / "done"

    def work():
        print("not seen")
        file.write_text(str(os.getpid()))

    elsewhere = compile_elsewhere.Elsewhere(work)
    elsewhere.wait()
    assert int(file.read_text()) == elsewhere.pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(elsewhere.pid, 0)


@pytest.mark.parametrize("end", ["raises", "is killed", "hangs"])
def test_a_process_that_does_not_do_its_work_is_waited_for(monkeypatch, end):
    monkeypatch.setattr(compile_elsewhere, "_PATIENCE", 0.2)

    def work():
        if end == "raises":
            raise KeyError("no compiler")
        if end == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    elsewhere = compile_elsewhere.Elsewhere(work)
    elsewhere.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(elsewhere.pid, 0)


def test_the_process_ends_with_the_step():
    elsewhere = compile_elsewhere.Elsewhere(lambda: time.sleep(60))
    pid = elsewhere.pid
    del elsewhere
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


KILLED = """
import os, sys, signal, torch
torch.set_num_threads(1)
import purestep as ps
from torch import nn

run_dir = sys.argv[1]
tx = ps.optim.adamw(1e-2)
model = lambda: nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.Dropout(0.2), nn.Linear(33, 3))
step = ps.jit(ps.make_step(lambda net, batch: net(batch).exp().logsumexp(1).mean(), tx), donate=True, warmup=6)
data = ps.data.Batches(list(torch.randn(80, 6, generator=torch.Generator().manual_seed(0))), batch_size=8, seed=0)

def watched(step, state, batch):
    if int(state.step) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, batch)

result = ps.fit(ps.wrap_step(step, watched), ps.init(model, tx, seed=0), data, until=ps.steps(12),
    run_dir=run_dir, callbacks=[ps.callbacks.snapshots(every=ps.every.steps(2))], resume="auto")
print(ps.digest(result.state), result.metrics["loss"] if "loss" in result.metrics else "")
"""


@pytest.mark.slow
def test_a_run_that_is_killed_before_and_after_the_switch_ends_in_the_same_bits(zygote, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    whole = zygote.run(KILLED, tmp_path / "whole", 99, timeout=300)
    assert whole.returncode == 0, whole.stderr
    for kill_at in (3, 9):
        assert zygote.run(KILLED, tmp_path / "killed", kill_at, timeout=300).returncode != 0
    ended = zygote.run(KILLED, tmp_path / "killed", 99, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[0] == whole.stdout.split()[0]
