"""The interpreter: whole runs, stopped and resumed, watched and disturbed."""

import itertools
import os
import signal
import threading
import warnings

import pytest
import torch

import purestep as ps
from purestep.errors import ConfigError, DataError, StepError, TemplateMismatch
from purestep.loop import Evaluated, Interrupted, Resumed, Saved, Started, StepsDone, Stopped
from purestep.loop.options import RunArguments
from purestep.loop.run import Run
from purestep.testing import assert_trees_equal, check_resume, comparable


def quiet(make, **extra):
    options = make()
    options["callbacks"] = [*options["callbacks"], *extra.pop("callbacks", ())]
    return ps.fit(**{**options, **extra})


# --- contract 2: resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("microbatches", "at"),
    [
        (1, [1, 3, 5, 8]),  # in an epoch, where an evaluation is due, at the end of an epoch, in a later one
        (2, [4, 10]),
        pytest.param(1, None, marks=pytest.mark.slow),
        pytest.param(2, None, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_after_any_batch_resumes_with_the_same_bits(job, microbatches, at):
    check_resume(lambda: job(microbatches=microbatches), batches=12, at=at)


def test_it_resumes_where_updates_were_skipped(job):
    """A batch with a NaN is skipped: neither schedule nor optimizer nor BatchNorm moves, before and after a resume."""

    def data():
        broken = job.table(40, 0)
        broken["x"][::13] = float("nan")
        return ps.data.batches(broken, 4, seed=1)

    options = job(data=data)
    result = ps.fit(**options, until=ps.steps(10))
    assert 0 < int(result.state.step) < 10
    check_resume(lambda: job(data=data), batches=10, at=[3, 5, 8])


def test_check_resume_sees_a_run_that_does_not_resume(job):
    """The proof can fail: a step that depends on more than its state."""
    calls = itertools.count()

    def make():
        options = job()
        inner = options["step"]

        def step(state, batch):
            new, metrics = inner(state, batch)
            noise = 1e-3 * next(calls)
            return new.replace(params=ps.tree.map(lambda p: p + noise, new.params)), metrics

        return {**options, "step": step}

    with pytest.raises(
        AssertionError, match=r"stopped after 2 batches and resumed, the run differs[\s\S]*loop\['train'\]"
    ):
        check_resume(make, batches=4, at=[2])


def test_a_longer_run_continues_a_finished_one(job, tmp_path):
    quiet(job, until=ps.epochs(1), run_dir=tmp_path / "a")
    longer = quiet(job, until=ps.epochs(3), run_dir=tmp_path / "a")
    straight = quiet(job, until=ps.epochs(3), run_dir=tmp_path / "b")
    assert_trees_equal(comparable(longer.loop), comparable(straight.loop))
    assert (tmp_path / "a" / "metrics.csv").read_text() == (tmp_path / "b" / "metrics.csv").read_text()


def test_the_same_call_again_changes_nothing(job, tmp_path):
    first = quiet(job, until=ps.epochs(2), run_dir=tmp_path)
    log = (tmp_path / "metrics.csv").read_text()
    events = list(run := ps.run(**job(), until=ps.epochs(2), run_dir=tmp_path))
    assert [type(e) for e in events] == [Resumed, Stopped]
    assert_trees_equal(comparable(run.loop), comparable(first.loop))
    assert (tmp_path / "metrics.csv").read_text() == log


@pytest.mark.parametrize("workers", [pytest.param(2, marks=pytest.mark.slow)])
def test_it_resumes_with_worker_processes(job, workers):
    train = ps.data.batches(job.table(37, 0), 8, seed=3, num_workers=workers, transform=_double)
    check_resume(lambda: job(data=lambda: train), batches=7, at=[3, 4])


def _double(sample, key):
    return {**sample, "x": sample["x"] * (1 + ps.random.uniform(key))}


def test_a_foreign_loader_without_a_state_is_replayed_and_says_so(job, tmp_path):
    def data():
        items = [{"x": x, "y": y} for x, y in zip(*job.table(40, 0).values(), strict=True)]
        return torch.utils.data.DataLoader(items, 8, shuffle=True)

    quiet(lambda: job(data=data), until=ps.steps(7), run_dir=tmp_path / "a")
    with pytest.warns(ps.data.ReplayWarning, match="reads its first 2 batches again"):
        resumed = quiet(lambda: job(data=data), until=ps.steps(10), run_dir=tmp_path / "a")
    straight = quiet(lambda: job(data=data), until=ps.steps(10), run_dir=tmp_path / "b")
    assert_trees_equal(comparable(resumed.loop), comparable(straight.loop))


def test_an_iterable_of_unknown_length_ends_its_epochs(job):
    batches = list(ps.data.batches(job.table(24, 0), 8, shuffle=False).open(0, 0, None))
    options = job(data=lambda: lambda: iter(batches))
    events = list(run := ps.run(**options, until=ps.epochs(2)))
    assert run.loop.cursor == ps.loop.Cursor(2, 0, 6, run.loop.cursor.loader)
    assert sum(isinstance(e, StepsDone) and e.epoch_end for e in events) == 2


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_snapshot_and_the_next_call_goes_on(job, tmp_path, number, code):
    sent = []

    def send(event, loop):
        if loop.cursor.batches >= 4 and not sent:
            sent.append(os.kill(os.getpid(), number))

    old = signal.getsignal(number)
    cut = quiet(job, until=ps.steps(12), run_dir=tmp_path / "a", callbacks=[ps.callbacks.tap(send)])
    assert signal.getsignal(number) is old
    assert (cut.reason, cut.exit_code, cut.interrupted) == (signal.Signals(number).name, code, True)
    assert 4 <= cut.loop.cursor.batches < 12
    assert ps.snapshot.steps(tmp_path / "a") == [cut.loop.cursor.batches]
    resumed = quiet(job, until=ps.steps(12), run_dir=tmp_path / "a")
    straight = quiet(job, until=ps.steps(12), run_dir=tmp_path / "b")
    assert resumed.exit_code == 0
    assert_trees_equal(comparable(resumed.loop), comparable(straight.loop))


@pytest.mark.filterwarnings("ignore::purestep.loop.RunChangedWarning")  # of the loss function that is interrupted
def test_a_signal_inside_an_evaluation_cuts_it_off_and_it_is_done_after_the_resume(job, tmp_path):
    seen = []

    def make(interrupt):
        options = job()

        def slow(net, batch):
            seen.append(1)
            if interrupt and len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return job.loss_fn(net, batch)

        options["callbacks"] = [
            ps.callbacks.evaluate(slow, job.val(), every=ps.every.steps(3)),
            ps.callbacks.early_stopping("val/loss", patience=50),
            ps.callbacks.snapshots(every=ps.every.steps(3)),
        ]
        return options

    cut = quiet(lambda: make(True), until=ps.steps(6), run_dir=tmp_path / "a")
    assert (cut.reason, cut.loop.cursor.batches, cut.loop.status.due) == ("SIGTERM", 3, ("val",))
    resumed = quiet(lambda: make(False), until=ps.steps(6), run_dir=tmp_path / "a")
    straight = quiet(lambda: make(False), until=ps.steps(6), run_dir=tmp_path / "b")
    assert_trees_equal(comparable(resumed.loop), comparable(straight.loop))


def test_workers_that_die_of_the_same_signal_do_no_harm(job, tmp_path):
    """A scheduler signals the whole process group: data may fail while the run is about to stop anyway."""

    class Dying(list):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 2 and self.deadly:
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise DataError("a worker process died")
                yield batch

    def source(deadly):
        class Once(Dying):
            pass

        Once.deadly = deadly
        batches = Once(ps.data.batches(job.table(40, 0), 8, shuffle=False).open(0, 0, None))
        return lambda: lambda: iter(batches)

    cut = quiet(lambda: job(data=source(True)), until=ps.steps(5), run_dir=tmp_path / "a")
    assert (cut.reason, cut.loop.cursor.batches) == ("SIGTERM", 1)
    with pytest.warns(ps.data.ReplayWarning):
        resumed = quiet(lambda: job(data=source(False)), until=ps.steps(5), run_dir=tmp_path / "a")
    straight = quiet(lambda: job(data=source(False)), until=ps.steps(5), run_dir=tmp_path / "b")
    assert_trees_equal(comparable(resumed.loop), comparable(straight.loop))


def test_a_second_ctrl_c_does_not_wait(job):
    def press(net, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return job.loss_fn(net, batch)

    options = job(callbacks=[])
    options["step"] = ps.make_step(press, options["step"].tx)
    with pytest.raises(KeyboardInterrupt):
        ps.fit(**options, until=ps.steps(5))


def test_it_runs_outside_the_main_thread(job):
    results = []
    thread = threading.Thread(target=lambda: results.append(quiet(job, until=ps.steps(2))))
    thread.start()
    thread.join()
    assert results[0].loop.cursor.batches == 2


# --- contract 4: observers do not disturb -------------------------------------------------------------------------


def test_no_observer_changes_a_bit_of_the_training(job, tmp_path):
    plain = ps.fit(**job(callbacks=[]), until=ps.steps(11))
    watched = quiet(
        job,
        until=ps.steps(11),
        run_dir=tmp_path,
        loggers=[ps.loggers.csv(), ps.loggers.tensorboard()],
        callbacks=[
            ps.callbacks.evaluate(job.loss_fn, job.val(), every=ps.every.steps(1), name="again", at_start=True),
            ps.callbacks.snapshots(every=ps.every.steps(2)),
            ps.callbacks.terminate_on_nan(),
            ps.callbacks.tap(lambda event, loop: torch.rand(3), every=ps.every.seconds(0.001)),
        ],
    )
    assert_trees_equal(watched.state, plain.state)
    assert_trees_equal(watched.loop.status.sums, plain.loop.status.sums)


def test_a_logger_or_sink_that_raises_is_left_out_and_training_goes_on(job, tmp_path):
    def broken(event, loop):
        raise OSError("disk on fire")

    with pytest.warns(UserWarning, match="tap raised OSError: disk on fire"):
        result = quiet(job, until=ps.steps(3), run_dir=tmp_path, callbacks=[ps.callbacks.tap(broken)])
    assert result.loop.cursor.batches == 3


# --- contract 10: no hidden sync ----------------------------------------------------------------------------------


def test_between_two_boundaries_no_tensor_is_read(job):
    """On the meta device there is nothing to read: any look at a value raises."""
    options = job()
    meta = ps.tree.map(lambda t: t.to("meta"), options["state"])
    batch = {"x": torch.empty(8, 6, device="meta"), "y": torch.empty(8, dtype=torch.int64, device="meta")}
    run = Run(RunArguments(**{**options, "state": meta}, until=ps.steps(5)))
    state, record, *_ = run._chunk(meta, iter([batch] * 5), None)
    assert len(record) == 5
    assert {t.device.type for t in ps.tree.leaves(state)} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        record.series()


def test_the_test_above_can_fail(job):
    options = job()
    meta = ps.tree.map(lambda t: t.to("meta"), options["state"])
    batch = {"x": torch.empty(8, 6, device="meta"), "y": torch.empty(8, dtype=torch.int64, device="meta")}
    inner = options["step"]

    def reads(state, batch):
        new, metrics = inner(state, batch)
        return new, metrics | {"shown": float(metrics["loss"])}

    run = Run(RunArguments(**{**options, "state": meta, "step": reads}, until=ps.steps(5)))
    with pytest.raises((RuntimeError, NotImplementedError, ps.errors.MetricError)):
        run._chunk(meta, iter([batch] * 5), None)


# --- level 2: a generator -----------------------------------------------------------------------------------------


def test_events_come_in_order_and_the_user_may_leave(job, tmp_path):
    before, kinds = set(threading.enumerate()), []
    with ps.run(**job(), until=ps.epochs(5), run_dir=tmp_path) as run:
        for event in run:
            kinds.append(type(event))
            if isinstance(event, Evaluated):
                break
        assert kinds[0] is Started
        assert kinds[-1] is Evaluated
        assert run.loop.cursor.batches == 3
        assert run.result().reason == "not finished"
    assert set(threading.enumerate()) == before
    again = ps.run(**job(), until=ps.epochs(1), run_dir=tmp_path)  # the directory is free
    assert isinstance(list(again)[-1], Stopped)
    again.close()


def test_a_hand_written_step_with_plain_metrics(job):
    tx = ps.optim.sgd(0.1, momentum=0.9)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))

    def train_step(state, batch):
        def loss_of(params):
            rng = ps.random.fold_in(state.rng, state.step)
            logits, buffers = ps.apply(model, params, state.buffers, batch["x"], rng=rng)
            return torch.nn.functional.cross_entropy(logits, batch["y"]), buffers

        grads, (loss, buffers) = ps.grad_and_value(loss_of, has_aux=True)(state.params)
        return state.apply_gradients(tx, grads, buffers=buffers), {"loss": loss}

    def make():
        return {**job(callbacks=[]), "step": train_step, "state": ps.init(model, tx, seed=1)}

    result = ps.fit(**make(), until=ps.epochs(2))
    assert result.metrics["train/loss_epoch"] > 0
    check_resume(make, batches=7, at=[2, 5])


def test_two_states_in_one_dict_train_together(job):
    """A GAN has two: any pytree of states is a state."""
    tx = ps.optim.adam(1e-3)
    a, b = (torch.nn.Linear(6, 6) for _ in range(2))

    def train_step(states, batch):
        def loss_of(params):
            return sum(ps.apply(m, params[n], {}, batch["x"])[0].square().mean() for n, m in (("a", a), ("b", b)))

        grads, loss = ps.grad_and_value(loss_of)({n: s.params for n, s in states.items()})
        return {n: s.apply_gradients(tx, grads[n]) for n, s in states.items()}, {"loss": loss}

    def make():
        return {
            **job(callbacks=[]),
            "step": train_step,
            "state": {"a": ps.init(a, tx, seed=1), "b": ps.init(b, tx, seed=2)},
        }

    check_resume(make, batches=6, at=[4])


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
def test_a_jitted_step_trains_and_resumes_and_the_given_state_stays_ours(job, tmp_path, donate):
    step = ps.jit(job()["step"], donate=donate, backend="eager")  # traced once: the runs differ in what they are given

    def make():
        return {**job(), "step": step}

    options = make()
    before = ps.digest(options["state"])
    result = ps.fit(**options, until=ps.steps(7), run_dir=tmp_path / "a")
    assert ps.digest(options["state"]) == before
    assert_trees_equal(result.state, ps.fit(**job(), until=ps.steps(7)).state)
    check_resume(make, batches=6, at=[2, 5])


# --- snapshots and the run directory ------------------------------------------------------------------------------


def test_best_and_latest_are_kept_and_restored(job, tmp_path):
    keep = ps.snapshot.best("val/loss", 2) | ps.snapshot.latest(1)
    snapshots = ps.callbacks.snapshots(every=ps.every.steps(3), keep=keep)
    result = quiet(job, until=ps.steps(18), run_dir=tmp_path, callbacks=[snapshots])
    kept = ps.snapshot.steps(tmp_path)
    assert len(kept) in (2, 3)
    assert kept[-1] == 18
    best = ps.restore(tmp_path, like=job()["state"], best="val/loss")
    losses = {step: ps.snapshot.manifest(tmp_path, step).metrics["val/loss"] for step in kept}
    at_best = min(losses, key=losses.get)
    assert int(best.step) == at_best
    assert_trees_equal(ps.restore(tmp_path, like=job()["state"]), result.state)
    with pytest.raises(ps.errors.SnapshotError, match="no snapshot knows the metric 'val/los'"):
        ps.restore(tmp_path, like=job()["state"], best="val/los")


def test_one_restore_reads_runs_and_stores(job, tmp_path):
    result = quiet(job, until=ps.steps(4), run_dir=tmp_path / "run")
    state = job()["state"]
    for where in (tmp_path / "run", tmp_path / "run" / "snapshots"):
        assert_trees_equal(ps.restore(where, like=state, verify="digest"), result.state)
    params = ps.restore(tmp_path / "run", like=state.replace(params=...)).params
    assert_trees_equal(params, result.state.params)
    loop = ps.restore(tmp_path / "run", like=result.loop)
    assert isinstance(loop, ps.loop.LoopState)
    assert loop.cursor == result.loop.cursor
    assert_trees_equal(loop.train, result.state)
    with pytest.raises(ps.errors.TemplateMismatch, match=r"pass like="):
        ps.restore(tmp_path / "run")  # a model is no data: it comes from the template
    tree = {"w": torch.arange(3), "n": 7}
    with ps.snapshot.Store(tmp_path / "store", keep=ps.snapshot.all_()) as store:
        store.save(3, tree, metrics={"loss": 0.5})
        store.save(4, {**tree, "n": 8}, metrics={"loss": 0.7})
    assert_trees_equal(ps.restore(tmp_path / "store"), {**tree, "n": 8})
    assert ps.restore(tmp_path / "store", step=3)["n"] == 7
    assert ps.restore(tmp_path / "store", best="loss", like=tree)["n"] == 7
    with pytest.raises(ps.errors.TemplateMismatch):
        ps.restore(tmp_path / "store", like=state)


def test_resume_never_must_and_back_in_time(job, tmp_path):
    with pytest.raises(ConfigError, match="no snapshot to resume from"):
        quiet(job, until=ps.steps(2), run_dir=tmp_path / "a", resume="must")
    every = [ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.latest(9))]
    straight = quiet(job, until=ps.steps(8), run_dir=tmp_path / "a", callbacks=every)
    with pytest.raises(ConfigError, match=r"resume='never', but there are snapshots[\s\S]*2, 4, 6, 8"):
        quiet(job, until=ps.steps(8), run_dir=tmp_path / "a", resume="never")
    again = quiet(job, until=ps.steps(8), run_dir=tmp_path / "a", resume=4, callbacks=every)
    assert_trees_equal(comparable(again.loop), comparable(straight.loop))
    assert ps.snapshot.steps(tmp_path / "a") == [2, 4, 6, 8]
    with pytest.raises(ConfigError, match="resume= is 'auto'"):
        quiet(job, until=ps.steps(8), resume="yes")


@pytest.mark.filterwarnings("ignore::purestep.loop.RunChangedWarning")
def test_callbacks_may_come_and_go_between_two_processes(job, tmp_path):
    quiet(job, until=ps.steps(4), run_dir=tmp_path)
    evaluate = ps.callbacks.evaluate(job.loss_fn, job.val())
    stopping = ps.callbacks.early_stopping("val/loss", patience=7)
    options = job(callbacks=[ps.callbacks.terminate_on_nan(), evaluate, stopping])
    result = ps.fit(**options, until=ps.steps(8), run_dir=tmp_path)
    assert set(result.loop.callbacks) == {"early_stopping", "terminate_on_nan", "val", "log", "progress"}
    assert result.loop.cursor.batches == 8


def test_another_callback_under_an_old_name_is_refused(job, tmp_path):
    quiet(job, until=ps.steps(4), run_dir=tmp_path)
    options = job(callbacks=[ps.callbacks.terminate_on_nan(name="early_stopping")])
    with pytest.raises(TemplateMismatch, match="state of callback 'early_stopping' is of another kind"):
        ps.fit(**options, until=ps.steps(8), run_dir=tmp_path)


def test_another_model_is_refused_and_nothing_is_lost(job, tmp_path):
    quiet(job, until=ps.steps(2), run_dir=tmp_path)
    tx = job()["step"].tx
    other = {**job(), "state": ps.init(lambda: torch.nn.Linear(6, 3), tx)}
    with pytest.raises(TemplateMismatch, match=r"train\.params"):
        ps.fit(**other, until=ps.steps(4), run_dir=tmp_path)
    assert ps.snapshot.steps(tmp_path) == [2]


def test_a_run_directory_in_use_is_refused(job, tmp_path):
    first = ps.run(**job(), until=ps.steps(4), run_dir=tmp_path)
    next(first)
    with pytest.raises(
        ConfigError, match=f"another run of this very process uses this run directory[\\s\\S]*{os.getpid()}"
    ):
        quiet(job, until=ps.steps(4), run_dir=tmp_path)
    for _ in first:
        pass
    quiet(job, until=ps.steps(6), run_dir=tmp_path)


def test_another_number_of_threads_is_noticed(job, tmp_path):
    quiet(job, until=ps.steps(2), run_dir=tmp_path)
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="threads: saved under 1, now 2"):
            quiet(job, until=ps.steps(3), run_dir=tmp_path)
        torch.set_num_threads(1)
        with pytest.raises(ps.errors.SnapshotError, match=r"torch\.set_num_threads\(2\)"):
            quiet(job, until=ps.steps(4), run_dir=tmp_path, strict=True)
    finally:
        torch.set_num_threads(1)


def test_another_number_of_microbatches_is_noticed(job, tmp_path):
    quiet(job, until=ps.steps(2), run_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"microbatches: saved under 1, now 2[\s\S]*microbatches=1\)"):
        quiet(lambda: job(microbatches=2), until=ps.steps(3), run_dir=tmp_path)


def test_snapshots_need_a_place(job):
    with pytest.raises(ConfigError, match="snapshots need a place"):
        quiet(job, until=ps.steps(2), callbacks=[ps.callbacks.snapshots()])


def _fail_to_save(monkeypatch, times):
    from purestep import snapshot

    real, left = snapshot.Store.save, iter([True] * times)

    def save(self, step, value, **options):
        if next(left, False):
            raise ps.errors.SaveFailed("the disk is full")
        return real(self, step, value, **options)

    monkeypatch.setattr(snapshot.Store, "save", save)


def test_a_save_that_fails_is_told_and_tried_again(job, tmp_path, monkeypatch):
    _fail_to_save(monkeypatch, 1)
    snapshots = ps.callbacks.snapshots(every=ps.every.steps(2))
    with pytest.warns(UserWarning, match="the disk is full"):
        events = list(run := ps.run(**job(callbacks=[snapshots]), until=ps.steps(6), run_dir=tmp_path))
    assert sum(isinstance(e, ps.loop.SaveLost) for e in events) == 1
    assert {e.step for e in events if isinstance(e, Saved)} == {4, 6}
    assert run.reason == "reached 6 steps"


def test_a_save_that_fails_can_stop_the_run(job, tmp_path, monkeypatch):
    _fail_to_save(monkeypatch, 1)
    with pytest.raises(ps.errors.SaveFailed, match="the disk is full"):
        quiet(job, until=ps.steps(6), run_dir=tmp_path, on_save_error="stop")


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda s, b: s, r"a step returns \(state, metrics\)[\s\S]*returned TrainState"),
        (lambda s, b: (s.replace(params=list(s.params.values())), {}), "a state of the structure it was given"),
        (
            lambda s, b: (s.replace(params={**s.params, "0.weight": s.params["0.weight"][:3]}), {}),
            r"state\.params\['0\.weight'\] was float32\[16, 6\] and came back as float32\[3, 6\]",
        ),
        (lambda s, b: (s.replace(step=s.step.float()), {}), r"state\.step was int64\[\] and came back as float32\[\]"),
    ],
)
def test_a_step_that_breaks_its_contract(job, broken, message):
    with pytest.raises(StepError, match=message):
        ps.fit(**{**job(), "step": broken}, until=ps.steps(2))


def test_metrics_that_cannot_be_logged(job):
    for values, message in (({3: 1.0}, "metrics key 3 of type int"), ({"a": "b"}, "metric 'a' has no value")):
        with pytest.raises(ps.errors.MetricError, match=message):
            ps.fit(**{**job(callbacks=[]), "step": lambda s, b, v=values: (s, v)}, until=ps.steps(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"until": 5}, r"until= says when the run ends[\s\S]*ps\.epochs\(5\)"),
        ({"step": "train"}, "a step is a function"),
        ({"on_save_error": "ignore"}, "on_save_error= is"),
    ],
)
def test_arguments_that_do_not_fit(job, change, message):
    with pytest.raises(ConfigError, match=message):
        ps.fit(**{**job(), "until": ps.steps(1), **change})


def test_data_without_a_batch(job):
    with pytest.raises(DataError):
        ps.fit(**job(data=list), until=ps.steps(1))
    empty = ps.callbacks.evaluate(job.loss_fn, [], every=ps.every.steps(1))
    with pytest.raises(DataError, match="val"):
        ps.fit(**job(callbacks=[empty]), until=ps.steps(1))


def test_an_error_in_the_step_reaches_the_user_and_earlier_snapshots_stay(job, tmp_path):
    options, seen = job(callbacks=[ps.callbacks.snapshots(every=ps.every.steps(2))]), []
    inner, calls = options["step"], itertools.count()

    def breaks(state, batch):
        if next(calls) == 5:
            raise ZeroDivisionError("user's bug")
        return inner(state, batch)

    options["callbacks"].append(ps.callbacks.tap(lambda event, loop: seen.append(event)))
    with pytest.raises(ZeroDivisionError, match="user's bug"):
        ps.fit(**{**options, "step": breaks}, until=ps.steps(9), run_dir=tmp_path)
    assert seen[-1] == ps.loop.Failed("ZeroDivisionError: user's bug")
    assert ps.snapshot.steps(tmp_path) == [4]


def test_terminate_on_nan_names_the_batch(job):
    def data():
        broken = job.table(40, 0)
        broken["x"][17] = float("nan")
        return ps.data.batches(broken, 8, shuffle=False)

    options = job(data=data, tx=ps.optim.sgd(0.1), callbacks=[ps.callbacks.terminate_on_nan()])
    result = ps.fit(**options, until=ps.epochs(3))
    assert result.reason == "loss is nan at batch 3"


def test_transform_changes_the_state_by_a_pure_function(job):
    zero = ps.callbacks.transform(
        lambda s: s.replace(params=ps.tree.map(torch.zeros_like, s.params)), every=ps.every.steps(3), name="zero"
    )
    result = ps.fit(**job(callbacks=[zero]), until=ps.steps(3))
    assert all(not p.any() for p in result.state.params.values())


def test_seconds_end_a_run_and_elapsed_time_adds_up(job, tmp_path):
    result = quiet(job, until=ps.seconds(0.3) | ps.steps(10**6), run_dir=tmp_path)
    assert result.reason == "reached 0.3 seconds or 1000000 steps"
    assert 0.3 <= result.loop.elapsed < 60
    longer = result.loop.elapsed + 0.2
    again = quiet(job, until=ps.seconds(longer), run_dir=tmp_path)
    assert again.loop.elapsed >= longer
    assert again.loop.cursor.batches > result.loop.cursor.batches


def test_nothing_warns_in_an_ordinary_run(job, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(job, until=ps.steps(4), run_dir=tmp_path)


def test_interrupted_is_an_event(job):
    run = ps.run(**job(), until=ps.steps(12))
    kinds = []
    for event in run:
        kinds.append(type(event))
        if isinstance(event, StepsDone):
            os.kill(os.getpid(), signal.SIGTERM)
    assert kinds.count(Interrupted) == 1
    assert kinds[-1] is Stopped


def test_a_run_over_epochs_without_batches_ends_with_an_error():
    """A run of so many steps would go on for ever."""
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
    state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
    for data in (list, lambda epoch: iter([torch.ones(4, 2)] if epoch == 0 else [])):
        with pytest.raises(ps.errors.DataError, match=r"epoch \d of the training data has no batches"):
            ps.fit(step, state, data, until=ps.steps(9))
