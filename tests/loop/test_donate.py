"""`fit(..., donate=True)`: states that the loop alone owns are updated in place, and nobody can tell from the bits."""

import pytest
import torch
from shared_marks import slow_but

import purestep as ps
from purestep.errors import ConfigError, DonatedStateError
from purestep.loop import StepsDone
from purestep.loop.options import RunArguments
from purestep.loop.run import Run
from purestep.optim.kernels import sliced
from purestep.testing import assert_trees_equal, check_resume, comparable


@pytest.fixture(autouse=True)
def few_elements_are_many(monkeypatch):
    monkeypatch.setattr(sliced, "LONG_ON_CPU", 16)
    monkeypatch.setattr(sliced, "WORTH", 16)


def averaged():
    rate = ps.optim.warmup_cosine_decay_schedule(0.0, 0.02, warmup_steps=4, decay_steps=20)
    return ps.optim.average_params(ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adamw(rate)), decay=0.8)


TXS = {"averaged": averaged, "skipping": lambda: None, "fused": lambda: ps.optim.adamw(1e-2, fused=True)}


@pytest.fixture(params=slow_but(TXS, "averaged"))
def made(request, job):
    """The job, with evaluations, a snapshot after every second step, and averages of the parameters evaluated, too."""

    def make(**extra):
        options = job(tx=TXS[request.param](), **extra)
        options["callbacks"].append(ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.all_()))
        if request.param == "averaged":
            average = ps.callbacks.evaluate(
                job.loss_fn, job.val(), every=ps.every.steps(2), of=ps.optim.averaged, name="ema"
            )
            options["callbacks"].append(average)
        return options

    make.name = request.param
    return make


@pytest.mark.parametrize("microbatches", slow_but([1, 2], 2))
def test_donated_or_not_a_run_has_the_same_bits(made, microbatches, tmp_path):
    plain = ps.fit(**made(microbatches=microbatches), until=ps.epochs(3), run_dir=tmp_path / "plain")
    options = made(microbatches=microbatches, donate=True)
    before = options["state"]
    digest = ps.digest(before)
    donated = ps.fit(**options, until=ps.epochs(3), run_dir=tmp_path / "donated")
    assert ps.digest(before) == digest  # the state that was given is not the run's to write over
    assert_trees_equal(comparable(donated.loop), comparable(plain.loop))
    logs = [(tmp_path / where / "metrics.csv").read_text() for where in ("plain", "donated")]
    assert logs[0] == logs[1]
    numbers = ps.snapshot.steps(tmp_path / "plain")
    assert len(numbers) > 5
    for number in numbers:  # the bytes are those of the moment of the save
        one, other = (ps.restore(tmp_path / where, like=before, step=number) for where in ("plain", "donated"))
        assert_trees_equal(other, one)


def test_it_resumes_with_the_same_bits(made):
    check_resume(lambda: made(donate=True), batches=8, at=[1, 4, 7])


@pytest.mark.parametrize("first", slow_but([True, False], True))
def test_a_run_is_resumed_donated_or_not(made, first, tmp_path):
    straight = ps.fit(**made(), until=ps.steps(9), run_dir=tmp_path / "straight")
    ps.fit(**made(donate=first), until=ps.steps(5), run_dir=tmp_path / "resumed")
    resumed = ps.fit(**made(donate=not first), until=ps.steps(9), run_dir=tmp_path / "resumed")
    assert_trees_equal(comparable(resumed.loop), comparable(straight.loop))


def test_memory_stays_where_it_is_and_kept_states_are_consumed(job):
    tx = ps.optim.adamw(1e-2)
    run = Run(RunArguments(**job(tx=tx), until=ps.steps(6), donate=True))
    places, kept = [], []
    for event in run:
        if isinstance(event, StepsDone):
            kept.append(run.loop.train)
            places.append([p.data_ptr() for p in run.loop.train.params.values() if p.numel() > 16])
    assert len(kept) > 2
    assert len(places[0]) >= 2
    assert all(place == places[0] for place in places)
    for state in kept[:-1]:
        with pytest.raises(DonatedStateError, match="this TrainState was consumed by Step"):
            _ = state.params
    assert int(kept[-1].step) == 6
    assert kept[-1] is run.result().state


def test_the_number_of_microbatches_is_found_for_a_donating_step_too(job):
    options = job(tx=ps.optim.adamw(1e-2), microbatches="auto")
    donated = ps.fit(**options, until=ps.steps(4), donate=True)
    plain = ps.fit(**job(tx=ps.optim.adamw(1e-2), microbatches="auto"), until=ps.steps(4))
    assert_trees_equal(donated.state, plain.state)


def test_a_step_that_is_compiled_without_donation_is_refused(job):
    options = job(tx=ps.optim.adamw(1e-2))
    with pytest.raises(ConfigError, match="a compiled step is made a donating one when it is compiled"):
        ps.fit(**{**options, "step": ps.jit(options["step"], backend="eager")}, until=ps.steps(1), donate=True)
    step = ps.jit(options["step"], backend="eager", donate=True)
    compiled = ps.fit(**{**options, "step": step}, until=ps.steps(3), donate=True)
    assert int(compiled.state.step) == 3


def test_an_error_in_a_batch_leaves_the_state_of_the_last_step(job):
    options = job(tx=ps.optim.adamw(1e-2))
    batches = list(ps.data.batches(job.table(24, 0), 8, shuffle=False).open(0, 0, None))
    batches[2] = {**batches[2], "y": batches[2]["y"].float() * float("nan")}

    def checked(net, batch):
        if torch.is_floating_point(batch["y"]):
            raise ValueError("labels are integers")
        return job.loss_fn(net, batch)

    seen = []
    step = ps.donate(ps.make_step(checked, ps.optim.adamw(1e-2)))

    def watching(state, batch):
        if not state.step.is_meta:
            seen[:] = [state]
        return step(state, batch)

    with (
        pytest.warns(UserWarning, match="a batch differs"),
        pytest.raises(ps.errors.StepError, match="labels are integers"),
    ):
        ps.fit(**{**options, "step": watching, "train": batches, "callbacks": []}, until=ps.epochs(1))
    assert int(seen[-1].step) == 2  # nothing was written, so it can still be looked at
