"""A step with a warm-up switches where the counter of its state says, in whatever process."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, SnapshotError
from purestep.jit import api, backends, compile_elsewhere, warmup
from purestep.jit.function import Jit


def loss_fn(net, batch):
    return net(batch).square().mean()


TX = ps.optim.adamw(1e-2)


def first():
    return ps.init(lambda: nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1)), TX, seed=0)


def samples(count=40):
    return list(torch.randn(count, 3, generator=torch.Generator().manual_seed(1)))


DATA = ps.data.Batches(samples(), batch_size=4, seed=0)


def made(counter=5, **options):
    return ps.jit(ps.make_step(loss_fn, TX), backend="eager", warmup=counter, **options)


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
def test_a_run_that_is_resumed_switches_where_it_would_have(ready_after, tmp_path, at):
    whole = trained(made(), 9)
    trained(made(), at, tmp_path / "run")
    resumed = trained(made(), 9, tmp_path / "run", resume="auto")
    assert ps.digest(resumed.state) == ps.digest(whole.state)
    assert ps.digest(trained(made(6), 9).state) != ps.digest(whole.state)


def test_a_run_is_verified_with_the_warm_up_that_it_had(ready_after, tmp_path):
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


# --- a switch that the run decides ------------------------------------------------------------------------------------


@pytest.fixture
def ready_after(monkeypatch):
    """Let each compiler that is started be done after the step of a counter, of which there is a list."""
    counters, seen = [], []
    own = warmup._counter

    class Compiler:
        def __init__(self):
            self.after = counters.pop(0) if counters else 0

        def ended(self):
            return seen[-1] >= self.after

        def wait(self):
            pass

    def counter(step, state):
        seen.append(own(step, state))
        return seen[-1]

    class Rounded(Jit):
        """Traces nothing, which takes half a second each time."""

        def __call__(self, state, batch):
            state, values = self.function(state, batch)
            return ps.tree.map(lambda x: x * (1 + 2**-20) if x.is_floating_point() else x, state), values

    monkeypatch.setattr(api, "Jit", Rounded)
    monkeypatch.setattr(warmup, "_counter", counter)
    monkeypatch.setattr(warmup.disk_cache, "is_used", lambda backend: True)
    monkeypatch.setattr(warmup, "_compiling", lambda calls: Compiler())
    return counters


EVERY = [ps.callbacks.snapshots(every=ps.every.steps(3), keep=ps.snapshot.all_())]


@pytest.mark.parametrize("options", [{}, pytest.param({"microbatches": 2}, marks=pytest.mark.slow), {"donate": True}])
def test_a_run_switches_at_the_first_batch_at_which_the_step_is_compiled(ready_after, options):
    ready_after.append(4)
    donate = options.pop("donate", False)
    step = ps.jit(ps.make_step(loss_fn, TX, **options), backend="eager", warmup="eager", donate=donate)
    run = ps.run(step, first(), DATA, until=ps.steps(9))
    trained_so_far = 0
    for event in run:
        trained_so_far += event.count if isinstance(event, ps.loop.StepsDone) else 0
        if isinstance(event, ps.loop.Switched):
            assert event.counter == trained_so_far == 5
    fixed = ps.jit(ps.make_step(loss_fn, TX, **options), backend="eager", warmup=5, donate=donate)
    assert ps.digest(run.result().state) == ps.digest(trained(fixed, 9).state)


def test_an_update_that_is_skipped_does_not_move_the_switch(ready_after):
    ready_after.append(0)
    step = made("eager").with_warmup(None)
    state, batch = first(), torch.stack(samples(4))
    for _ in range(3):
        step(state, batch)  # as if it had returned the same state
        ready = step.facts.ready()
    assert ready == 1  # not 0: with that number the calls above would run compiled


@pytest.mark.parametrize("killed_at", [3, 8])
def test_what_comes_after_the_switch_is_that_of_the_run_which_recorded_it(ready_after, tmp_path, killed_at):
    """Resumed before the switch a run makes its own, and after it keeps the one that it has."""
    ready_after.extend([4, 6])
    trained(made("eager"), killed_at, tmp_path / "run", callbacks=EVERY)
    trained(made("eager"), 12, tmp_path / "run", callbacks=EVERY)
    record = ps.open(tmp_path / "run")
    at = {3: 7, 8: 5}[killed_at]
    assert record.warmup == at
    assert ["compiled", f"from step {at}"] in record.facts()
    assert ps.digest(trained(made(at), 12).state) == record.digest
    assert ps.digest(trained(made(at + 1), 12).state) != record.digest
    experiment = ps.Experiment(made("eager"), first(), DATA)
    assert ps.verify(tmp_path / "run", experiment).ok
    assert [step.digest for step in ps.replay(tmp_path / "run", experiment, 9, 12)][-1] == record.digest


def test_a_run_that_goes_back_and_a_fork_switch_where_it_did(ready_after, tmp_path):
    ready_after.append(4)
    whole = trained(made("eager"), 12, tmp_path / "run", callbacks=EVERY)
    for at in (3, 9):
        ps.fork(
            tmp_path / "run", at=at, run_dir=tmp_path / f"{at}", experiment=ps.Experiment(made("eager"), first(), DATA)
        )
        assert ps.digest(trained(made("eager"), 12, tmp_path / f"{at}").state) == ps.digest(whole.state)
    again = trained(made("eager"), 12, tmp_path / "run", callbacks=EVERY, resume=3, strict=True)
    assert ps.digest(again.state) == ps.digest(whole.state)


def test_a_compiled_run_is_not_taken_for_one_that_was_not(ready_after, tmp_path):
    trained(made(0), 4, tmp_path / "run")
    with pytest.raises(SnapshotError, match="saved under eager, now eager once it is compiled"):
        trained(made("eager"), 6, tmp_path / "run", strict=True)


def test_outside_of_a_run_it_stays_uncompiled(rounding):
    step, state = made("eager"), first()
    for batch in torch.stack(samples()).split(4):
        state, _ = step(state, batch)
    assert rounding == []
    assert step.facts.ready is None


def test_where_no_other_process_compiles_the_first_batch_is_uncompiled(ready_after, monkeypatch):
    monkeypatch.setattr(warmup, "can_fork", lambda: False)
    result = trained(made("eager"), 5)
    assert ps.digest(result.state) == ps.digest(trained(made(1), 5).state)


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
import os, sys, signal, time, torch
torch.set_num_threads(1)
import purestep as ps
from torch import nn

run_dir = sys.argv[1]
tx = ps.optim.adamw(1e-2)
model = lambda: nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.Dropout(0.2), nn.Linear(33, 3))
plain = ps.make_step(lambda net, batch: net(batch).exp().logsumexp(1).mean(), tx)
step = ps.jit(plain, donate=True, warmup=eval(sys.argv[3]))
data = ps.data.Batches(list(torch.randn(80, 6, generator=torch.Generator().manual_seed(0))), batch_size=8, seed=0)

def watched(step, state, batch):
    if int(state.step) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    if int(state.step) == 8 and step.facts.ready is not None:
        while step.facts.ready() is None:
            time.sleep(0.1)
    return step(state, batch)

result = ps.fit(ps.wrap_step(step, watched), ps.init(model, tx, seed=0), data, until=ps.steps(16),
    run_dir=run_dir, callbacks=[ps.callbacks.snapshots(every=ps.every.steps(2))], resume="auto")
print(ps.digest(result.state), result.metrics["loss"] if "loss" in result.metrics else "")
"""


@pytest.mark.slow
@pytest.mark.parametrize("warmup", ["6", "'eager'"])
def test_a_run_that_is_killed_before_and_after_the_switch_ends_in_the_same_bits(zygote, tmp_path, monkeypatch, warmup):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def digest(run_dir, counter):
        ended = zygote.run(KILLED, tmp_path / run_dir, 99, counter, timeout=300)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.split()[0]

    for kill_at in (3, 13):
        assert zygote.run(KILLED, tmp_path / "killed", kill_at, warmup, timeout=300).returncode != 0
    counter = 6 if warmup == "6" else 9
    assert ps.open(tmp_path / "killed").warmup == counter
    assert digest("killed", warmup) == digest("whole", counter)
    assert warmup == "6" or digest("killed", warmup) != digest("other", 14)
