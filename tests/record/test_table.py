"""`ps.open` and `ps.runs`: what they read of runs, of earlier formats and of damage, and how they show it."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, MissingExtra, SnapshotError
from purestep.record import table as table_

GOLDEN = Path(__file__).parents[1] / "snapshot" / "golden"
TX = ps.optim.adamw(1e-2)


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def table(n=16):
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(n, 4, generator=g), "y": torch.randn(n, 1, generator=g)}


def first_state():
    return ps.init(lambda: nn.Linear(4, 1), TX, seed=3)


def train(run_dir, until=4, **options):
    snapshots = ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.all_())
    options.setdefault("callbacks", [snapshots])
    data = ps.data.batches(table(), 4)
    return ps.fit(ps.make_step(loss_fn, TX), first_state(), data, until=ps.steps(until), run_dir=run_dir, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    train(root / "a", 4, settings={"lr": 1e-2, "width": [4, 4], "note": "<script>alert(1)</script>"})
    train(root / "deep" / "b", 6, settings={"lr": 1e-3})
    return root


def test_a_run_is_opened(root):
    before = datetime.datetime.now(datetime.UTC)
    run = ps.open(root / "a")
    result = train(None, 4, callbacks=[])
    assert (run.name, run.why, run.updates, run.snapshots) == ("a", "reached 4 steps", 4, (2, 4))
    assert run.settings == {"lr": 1e-2, "width": [4, 4], "note": "<script>alert(1)</script>"}
    assert before - datetime.timedelta(minutes=10) < run.when < before
    assert run.digest == ps.digest(run.state(first_state())) == ps.digest(result.state)
    assert ps.digest(run.state(first_state(), step=2)) == run.header(2).digests["state"] != run.digest
    assert run.identity["data"]["seed"] == 0
    assert run.environment["torch"] == torch.__version__
    assert run.parent is None
    with pytest.raises(SnapshotError, match=r"no intact snapshot at 3\n  where:   .*: 2, 4\n"):
        run.header(3)


def test_it_remembers_the_program(root):
    (program,) = ps.open(root / "a").programs
    assert program.module == __name__
    assert Path(program.file) == Path(__file__)
    assert program.function == "train"
    assert program.source == Path(__file__).read_text()
    assert "ps.fit(" in program.source.splitlines()[program.line - 1]
    assert program.command == tuple(sys.orig_argv)


def test_it_remembers_the_commit(tmp_path, monkeypatch):
    """In a repository of its own, clean and then changed."""
    import subprocess

    from purestep.loop.origin import Program, with_commit

    script = tmp_path / "train.py"
    script.write_text("1\n")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one", "--no-gpg-sign"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (with_commit(Program(file=str(script))).commit, with_commit(Program(file=str(script))).clean) == (head, True)
    script.write_text("2\n")
    assert (with_commit(Program(file=str(script))).commit, with_commit(Program(file=str(script))).clean) == (
        head,
        False,
    )
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert with_commit(Program(file=str(script))).commit is None


def test_a_resume_is_another_start_and_settings_may_change_with_a_warning(tmp_path):
    train(tmp_path, 2, settings={"lr": 1})
    with pytest.warns(ps.loop.RunChangedWarning, match=r"settings.lr: saved with 1, now 2"):
        train(tmp_path, 4, settings={"lr": 2})
    run = ps.open(tmp_path)
    assert (run.why, run.settings, len(run.programs)) == ("reached 4 steps", {"lr": 2}, 2)
    told = json.loads((tmp_path / "run.json").read_text())
    assert [start["at"] for start in told["starts"]] == [0, 2]
    assert len(told["sources"]) == 1


def test_a_start_that_trains_nothing_leaves_the_record_as_it_was(tmp_path):
    train(tmp_path, 4, settings={"lr": 1})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.warns(ps.loop.RunChangedWarning, match=r"settings.lr: saved with 1, now 2"):
        train(tmp_path, 4, settings={"lr": 2})
    assert (tmp_path / "run.json").read_bytes() == before

    def broken(state, batch):
        raise ps.errors.StepError("no")

    data = ps.data.batches(table(), 4)
    with pytest.warns(ps.loop.RunChangedWarning), pytest.raises(ps.errors.StepError):
        ps.fit(broken, first_state(), data, until=ps.steps(6), run_dir=tmp_path, settings={"lr": 3})
    run = ps.open(tmp_path)
    assert (run.settings, run.why, len(run.programs)) == ({"lr": 1}, "StepError: no", 2)


def test_loggers_are_given_the_settings(root):
    assert json.loads((root / "a" / "hparams.json").read_text())["lr"] == 1e-2


def test_the_log_is_columns(root, monkeypatch):
    metrics = ps.open(root / "a").metrics
    assert set(metrics) == {"step", "epoch", "train/loss_epoch"}
    assert metrics["step"] == [4]
    assert metrics.at(4)["epoch"] == 1.0
    assert metrics.at(3) == {}
    assert "<td" in metrics._repr_html_()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="to_pandas"):
        metrics.to_pandas()


def test_the_table_sorts_filters_iterates_and_indexes(root):
    table = ps.runs(root)
    assert [run.name for run in table] == ["a", "deep/b"]
    assert table["deep/b"].updates == table[1].updates == 6
    assert [run.name for run in table.sort("updates", reverse=True)] == ["deep/b", "a"]
    assert [run.name for run in table.sort("lr")] == ["deep/b", "a"]
    assert [run.name for run in table.sort("note")] == ["a", "deep/b"]  # without a value: last
    assert [run.name for run in table.filter(lambda run: run.metrics["train/loss_epoch"] > 0, lr=1e-3)] == ["deep/b"]
    assert len(table[:1]) == 1
    with pytest.raises(ConfigError, match=r"no run named 'c'\n  where:   runs: a, deep/b"):
        table["c"]
    with pytest.raises(ConfigError, match=r"no run has a column 'momentum'\n  where:   columns: name, "):
        table.sort("momentum")
    with pytest.raises(ConfigError, match="no such directory"):
        ps.runs(root / "nothing")


def test_text_and_html_are_escaped_and_name_no_colour(root):
    for shown in (ps.runs(root), ps.open(root / "a")):
        html = shown._repr_html_()
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        body = html.partition("</style>")[2]  # the sheet has tests of its own
        assert not re.search(r"rgb|background|color:(?!inherit)", body)
        assert "reached 4 steps" in repr(shown)
    assert repr(ps.runs(root)[:0]) == "no runs"


def test_a_run_that_died_is_not_finished_and_one_that_raised_says_so(tmp_path):
    train(tmp_path / "killed", 2)
    told = json.loads((tmp_path / "killed" / "run.json").read_text())
    (tmp_path / "killed" / "run.json").write_text(json.dumps({**told, "end": None}))
    state, data = first_state(), ps.data.batches(table(), 4)

    def fails(state, batch):
        raise RuntimeError("no\nmore")

    with pytest.raises(RuntimeError):
        ps.fit(fails, state, data, until=ps.steps(2), run_dir=tmp_path / "raised")
    table_ = ps.runs(tmp_path)
    assert table_["killed"].why == "not finished"
    assert table_["raised"].why == "RuntimeError: no"


def test_a_directory_that_was_moved_is_not_written_to_at_its_old_path(tmp_path):
    def moved(event, loop):
        if loop.cursor.batches == 3 and not (tmp_path / "new").exists():
            (tmp_path / "run").rename(tmp_path / "new")
            (tmp_path / "run").mkdir()

    snapshots = ps.callbacks.snapshots(every=ps.every.steps(2))
    taps = [ps.callbacks.tap(moved, every=ps.every.steps(1))]
    with pytest.warns(UserWarning, match="was moved while"):
        train(tmp_path / "run", 4, callbacks=[snapshots, *taps], loggers=[])
    assert not (tmp_path / "run" / "run.json").exists()
    assert ps.open(tmp_path / "new").why == "not finished"


def test_an_earlier_format_is_read(tmp_path):
    """Without `run.json`, and with a header that knows neither updates nor why it stopped."""
    train(tmp_path / "old", 4)
    (tmp_path / "old" / "run.json").unlink()
    run = ps.open(tmp_path / "old")
    assert (run.why, run.updates, run.programs) == ("reached 4 steps", 4, ())
    from purestep.snapshot.manifest import read_header, seal, unseal

    path = tmp_path / "old" / "snapshots" / "4" / "meta" / "data.json"
    head = unseal(path.read_bytes(), "x")
    for name in ("updates", "stop", "identity"):
        del head["info"][name]
    path.write_bytes(seal(head))
    assert "stop" not in read_header(path.parents[1]).info
    run = ps.open(tmp_path / "old")
    assert (run.why, run.updates, run.settings, run.identity) == ("reached 4 steps", 4, {}, {})


def test_the_first_format_of_snapshots_is_read(tmp_path):
    shutil.copytree(GOLDEN / "format-1", tmp_path / "run" / "snapshots")
    (run,) = ps.runs(tmp_path)
    assert not run.damage
    assert run.batches == ps.open(tmp_path / "run").snapshots[-1]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 9}', "[" * 100_000])
def test_a_damaged_record_is_a_row_that_says_so(tmp_path, content):
    train(tmp_path / "run", 2)
    (tmp_path / "run" / "run.json").write_text(content)
    (row,) = ps.runs(tmp_path)
    assert row.why.startswith("damaged: ")
    assert "run.json" in row.damage
    assert row.updates == 2
    assert "damaged" in repr(ps.runs(tmp_path))
    train(tmp_path / "run", 4)  # and the run goes on
    assert ps.runs(tmp_path)["run"].why == "reached 4 steps"


def test_odd_types_in_a_record_are_no_error(tmp_path):
    train(tmp_path / "run", 2)
    for name, value in [("starts", 3), ("starts", [{"time": "x", "line": [], "command": 1, "commit": 3}]), ("end", [])]:
        told = json.loads((tmp_path / "run" / "run.json").read_text())
        (tmp_path / "run" / "run.json").write_text(json.dumps({**told, name: value, "sources": [], "parent": 3}))
        assert "run" in repr(ps.runs(tmp_path))
        assert "run" in repr(ps.open(tmp_path / "run"))


def test_a_damaged_snapshot_is_a_row_that_says_so(tmp_path):
    train(tmp_path / "run", 4)
    for step in (2, 4):
        path = tmp_path / "run" / "snapshots" / str(step) / "meta" / "data.json"
        path.write_bytes(path.read_bytes()[:-9])
        (row,) = ps.runs(tmp_path)
        assert bool(row.damage) == (step == 4)  # the newest that is intact speaks for the run
    assert row.why.startswith("damaged: snapshot 4")
    with pytest.raises(ConfigError, match="this is no run directory"):
        ps.open(tmp_path)


def test_directories_that_are_not_ours_to_read_hold_no_runs(root, monkeypatch):
    def is_run(directory):
        if directory.name == "deep":
            raise PermissionError(directory)
        return real(directory)

    real = table_.is_run
    monkeypatch.setattr(table_, "is_run", is_run)
    assert [run.name for run in ps.runs(root)] == ["a"]


@pytest.mark.parametrize("settings", [3, {"net": nn.Linear(1, 1)}, {"x": float("nan")}, {"a": {"b": object()}}, {1: 2}])
def test_settings_that_are_no_json_are_refused(settings):
    with pytest.raises(ConfigError, match=r"settings"):
        train(None, 1, settings=settings, callbacks=[])


@pytest.mark.slow
def test_a_thousand_runs_are_listed_at_once(tmp_path):
    train(tmp_path / "0", 4, settings={"lr": 0.1})
    for path in ("snapshots/2", "snapshots/4/parts"):
        shutil.rmtree(tmp_path / "0" / path)
    for n in range(1, 1000):
        shutil.copytree(tmp_path / "0", tmp_path / str(n))
    start = time.process_time()
    table = ps.runs(tmp_path)
    seconds = time.process_time() - start
    assert len(table) == 1000
    assert {run.why for run in table} == {"reached 4 steps"}
    assert seconds < 1.5  # of this process: about 0.4 where nothing else runs
