"""Runs with a remote copy: resumed on a machine with an empty run directory, through outages, on several ranks."""

import shutil
import warnings

import pytest
import torch
from shared_faulty_fs import Faulty

import purestep as ps
from purestep.errors import ConfigError, SaveFailed, SnapshotError
from purestep.loop import CopyLost, copying
from purestep.remote import mirror

URL = "faulty://bucket/run"
TX = ps.optim.adamw(1e-2)


@pytest.fixture(autouse=True)
def faulty():
    Faulty.reset()
    yield Faulty
    Faulty.reset()


def make_model():
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Dropout(0.2), torch.nn.Linear(7, 3))


def fit(until, run_dir=None, *, remote=None, keep=None, **options):
    generator = torch.Generator().manual_seed(0)
    data = ps.data.batches({"x": torch.randn(23, 5, generator=generator)}, 4, seed=3)
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), TX)
    callbacks = [ps.callbacks.log(every=ps.every.steps(1)), *options.pop("callbacks", [])]
    if run_dir is not None:
        callbacks.append(ps.callbacks.snapshots(every=ps.every.steps(2), keep=keep or ps.snapshot.latest(1)))
    state = ps.init(make_model, TX, seed=1)
    if remote is not None and not isinstance(remote, ps.Remote):
        remote = ps.Remote(remote, tries=2, pause=0.001)
    arguments = {"until": ps.steps(until), "run_dir": run_dir, "remote": remote, "callbacks": callbacks}
    return ps.fit(step, state, data, **arguments, **options)


def rows(run_dir):
    """The log of a run without what a clock says."""
    return {name: column for name, column in ps.open(run_dir).metrics.items() if "second" not in name}


def test_a_run_goes_on_where_the_copy_ends_in_an_empty_directory(tmp_path):
    whole = fit(13, tmp_path / "whole")
    fit(7, tmp_path / "a", remote=URL, settings={"width": 7})
    assert ps.Remote(URL).steps() == [7]
    shutil.rmtree(tmp_path / "a")  # the machine is gone
    moved = fit(13, tmp_path / "b", remote=URL, settings={"width": 7})
    assert ps.digest(moved.state) == ps.digest(whole.state)
    manifest = ps.snapshot.manifest(tmp_path / "b", 13)
    assert manifest.digests["state"] == ps.snapshot.manifest(tmp_path / "whole", 13).digests["state"]
    # The record is that of one run: each row once, both starts, settings.
    assert rows(tmp_path / "b") == rows(tmp_path / "whole")
    assert len(ps.open(tmp_path / "b").programs) == 2
    fetched = ps.open(ps.Remote(URL).fetch(tmp_path / "c"))
    assert (fetched.why, fetched.snapshots, fetched.settings) == ("reached 13 steps", (13,), {"width": 7})
    assert rows(tmp_path / "c") == rows(tmp_path / "whole")
    assert ps.digest(ps.restore(tmp_path / "c", like=whole.state, verify="digest")) == ps.digest(whole.state)


@pytest.mark.slow
def test_a_directory_behind_its_copy_catches_up_and_one_ahead_does_not_go_back(tmp_path):
    fit(4, tmp_path / "a", remote=URL)
    shutil.copytree(tmp_path / "a", tmp_path / "behind")
    fit(9, tmp_path / "a", remote=URL)
    assert fit(9, tmp_path / "behind", remote=URL).loop.cursor.batches == 9
    assert ps.open(tmp_path / "behind").why == "reached 9 steps"
    fit(11, tmp_path / "a")  # without the copy
    assert ps.Remote(URL).steps() == [9]
    fit(11, tmp_path / "a", remote=URL)
    assert ps.Remote(URL).steps() == [11]


@pytest.mark.slow
def test_a_number_goes_back_in_the_copy_too(tmp_path):
    fit(8, tmp_path / "a", remote=ps.Remote(URL, keep=ps.snapshot.all_()))
    remote = ps.Remote(URL, keep=ps.snapshot.all_())
    assert 8 in remote.steps()
    there = remote.steps()
    back = next(step for step in there if step < 8)
    result = fit(9, tmp_path / "b", remote=remote, resume=back)
    assert ps.digest(result.state) == ps.digest(fit(9).state)
    assert max(remote.steps()) == 9


def test_training_goes_on_through_an_outage_which_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.0)
    lost = []

    def watch(event, loop):
        if isinstance(event, CopyLost):
            lost.append(event.error)
            if len(lost) == 3:
                Faulty.mend()

    def start(event, loop):
        if loop.cursor.batches == 3:
            Faulty.refuses = ConnectionError("no route") if len(lost) < 3 else None

    callbacks = [ps.callbacks.tap(watch, name="watch"), ps.callbacks.tap(start, name="start")]
    with pytest.warns(UserWarning, match=r"no route\n  training goes on, and the copy is tried again"):
        result = fit(24, tmp_path / "a", remote=URL, callbacks=callbacks)
    assert result.reason == "reached 24 steps"
    assert len(lost) >= 1
    assert ps.Remote(URL).steps() == [24]
    assert rows(ps.Remote(URL).fetch(tmp_path / "b")) == rows(tmp_path / "a")


def test_an_outage_to_the_end_is_said_and_made_up_for_later(tmp_path):
    def down(event, loop):
        Faulty.refuses = ConnectionError("no route")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(5, tmp_path / "a", remote=URL, callbacks=[ps.callbacks.tap(down)])
    assert "no route\n  the run directory is complete; ps.Remote(url).push(run_dir) copies it" in str(said[-1].message)
    assert ps.snapshot.steps(tmp_path / "a") == [5]
    Faulty.mend()
    assert ps.Remote(URL).push(tmp_path / "a") == [5]
    # Asked to, it stops the run.
    with pytest.raises(SaveFailed, match="no route"):
        fit(50, tmp_path / "a", remote=ps.Remote(URL, tries=1, on_error="stop"), callbacks=[ps.callbacks.tap(down)])


def test_a_run_does_not_begin_where_the_copy_cannot_be_asked(tmp_path):
    Faulty.refuses = ConnectionError("no route")
    with pytest.raises(SnapshotError, match="no route"):
        fit(5, tmp_path / "a", remote=URL)
    assert ps.snapshot.steps(tmp_path / "a") == []


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'run_dir="runs/a", remote="s3://bucket/runs/a"'):
        fit(5, remote=URL)
    with pytest.raises(ConfigError, match=r"instead: run_dir=\"runs/a\", remote='s3://b/a'"):
        fit(5, "s3://b/a")
    fit(2, tmp_path / "a", remote=URL)
    with pytest.raises(ConfigError, match="resume='never', but there are snapshots of an earlier run in the remote"):
        fit(5, tmp_path / "b", remote=URL, resume="never")
    fit(2, tmp_path / "c")
    with pytest.raises(ConfigError, match="the remote copy is of another run"):
        fit(5, tmp_path / "c", remote=URL)
    assert ps.Remote(URL).steps() == [2]
    written = Faulty.writes
    fit(2, remote=None, dry_run=1)
    assert Faulty.writes == written


def test_a_run_that_fails_copies_its_record(tmp_path):
    def boom(event, loop):
        if loop.cursor.batches == 5:
            raise KeyboardInterrupt

    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        fit(9, tmp_path / "a", remote=URL, callbacks=[ps.callbacks.tap(boom)])
    assert ps.open(ps.Remote(URL).fetch(tmp_path / "b")).why == "KeyboardInterrupt"
    assert copying._first_start((tmp_path / "b" / "run.json").read_bytes()) is not None
