"""metrics.csv: exact numbers, growing columns, repair after kills at any byte."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purestep import loggers
from purestep.errors import ConfigError

csv_module = importlib.import_module("purestep.loggers.csv")
NAMES = ["loss", "val/loss", 'quo"ted', "with,comma", "läss"]


def write(path: Path, rows, **open_args) -> str:
    sink = loggers.csv().open(path, **open_args)
    for step, row in rows:
        sink.log(step, row)
    sink.close()
    return (path / "metrics.csv").read_text()


def some_rows(rng: random.Random, steps: int):
    rows = []
    for step in range(steps):
        for _ in range(rng.choice([1, 1, 2, 3])):
            known = NAMES[: 1 + len(NAMES) * (step + 1) // steps] if step else NAMES[:1]
            names = rng.sample(known, k=rng.randint(1, min(2, len(known))))
            rows.append((step, {n: rng.choice([rng.random(), rng.random() * 1e-300, math.inf, 3.0]) for n in names}))
    return rows


def test_the_file_is_what_the_documentation_says(tmp_path):
    rows = [(1, {"loss": 0.5}), (2, {"loss": 0.1, "acc": 1.0}), (2, {"val/loss": math.nan}), (5, {"acc": -math.inf})]
    assert write(tmp_path, rows) == "step,loss,acc,val/loss\n1,0.5,,\n2,0.1,1.0,nan\n5,,-inf,\n"
    assert loggers.csv(name="other.csv").open(tmp_path).close() is None
    assert (tmp_path / "other.csv").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "other.csv"]


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_numbers_read_back_exactly(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv")
    write(path, [(i, {"x": v}) for i, v in enumerate(values)])
    columns = loggers.read_csv(path)
    assert [repr(v) for v in columns["x"]] == [repr(v) for v in values]
    assert columns["step"] == list(range(len(values)))


@given(st.lists(st.tuples(st.integers(0, 6), st.dictionaries(st.sampled_from(NAMES), st.floats(allow_nan=False)))))
def test_the_file_holds_the_merged_rows(tmp_path_factory, rows):
    rows = sorted(rows, key=lambda r: r[0])
    lines: list[tuple[int, dict[str, float]]] = []
    for step, row in rows:
        of_step = [line for at, line in lines if at == step]
        if not row or any(all(repr(line.get(n)) == repr(v) for n, v in row.items()) for line in of_step):
            continue
        if of_step and all(repr(of_step[-1].get(n, v)) == repr(v) for n, v in row.items()):
            of_step[-1].update(row)
        else:
            lines.append((step, dict(row)))
    path = tmp_path_factory.mktemp("csv")
    write(path, rows)
    columns = loggers.read_csv(path)
    assert columns["step"] == [step for step, _ in lines]
    for name in {n for _, line in lines for n in line}:
        assert columns[name] == [line.get(name) for _, line in lines]


def test_each_row_is_on_disk_when_log_returns(tmp_path):
    sink = loggers.csv().open(tmp_path)
    sink.log(1, {"loss": 0.12345678901234567})
    assert loggers.read_csv(tmp_path) == {"step": [1], "loss": [0.12345678901234567]}
    sink.log(1, {"accuracy": 1.0})
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,accuracy\n1,0.12345678901234566,1.0\n"
    sink.log(2, {"new": 1.0})
    assert loggers.read_csv(tmp_path)["new"] == [None, 1.0]
    sink.close()


def test_two_batches_of_one_update_keep_their_rows_and_a_resume_does_not_repeat_them(tmp_path):
    """`optim.accumulate` logs several batches under one step."""
    rows = [(0, {"loss": 3.0}), (0, {"loss": 2.0}), (0, {"val/loss": 9.0}), (1, {"loss": 1.0})]
    straight = write(tmp_path / "straight", rows)
    assert straight == "step,loss,val/loss\n0,3.0,\n0,2.0,9.0\n1,1.0,\n"
    for stop in range(1, 4):
        directory = tmp_path / f"stop{stop}"
        write(directory, rows[:3])  # killed after a snapshot that was taken after `stop` rows
        assert write(directory, rows[stop:], resume_step=0) == straight


@pytest.mark.parametrize("round", range(12))
def test_resume_at_any_step_after_a_kill_at_any_byte_leaves_the_same_file(tmp_path, seed, round):
    rng = random.Random(seed)
    rows = some_rows(rng, steps=rng.randint(2, 17))
    straight = write(tmp_path / "straight", rows)
    stop = rng.randrange(rows[-1][0] + 1)  # the step of the last snapshot
    reached = rng.randint(stop, rows[-1][0])
    whole = write(tmp_path / "torn", [r for r in rows if r[0] <= reached] + [(reached + 1, {"lost": 1.0})])
    path = tmp_path / "torn" / "metrics.csv"
    survived = len(write(tmp_path / "prefix", [r for r in rows if r[0] <= stop]).encode())
    # A kill tears the last line only; the rows up to the snapshot were flushed.
    last_line = len(whole.encode()[: whole.encode()[:-1].rfind(b"\n") + 1])
    torn = rng.randint(max(survived, last_line), len(whole.encode()))
    path.write_bytes(whole.encode()[:torn])
    assert write(tmp_path / "torn", [r for r in rows if r[0] > stop], resume_step=stop) == straight


def test_a_resume_where_the_file_is_gone_empty_or_torn_in_its_header_starts_a_new_one(tmp_path):
    for content in [None, b"", b"ste", b"step,lo"]:
        path = tmp_path / "metrics.csv"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert write(tmp_path, [(4, {"loss": 1.0})], resume_step=3) == "step,loss\n4,1.0\n"


def test_damaged_lines_are_dropped_and_the_others_kept(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,loss\n1,0.5\n2,zz\nx,1.0\n3\n3,1.0,2.0\n\xff\xfe\x00\n4,0.25\n5,0.")
    assert loggers.read_csv(tmp_path) == {"step": [1, 4], "loss": [0.5, 0.25]}
    assert write(tmp_path, [(6, {"loss": 2.0})], resume_step=5) == "step,loss\n1,0.5\n4,0.25\n6,2.0\n"


@pytest.mark.parametrize("cut", range(8))
def test_a_resume_reads_the_ends_of_a_long_file_and_leaves_the_same(tmp_path, monkeypatch, seed, cut):
    rng = random.Random(seed + cut)
    rows = [(step // 2, {"loss": rng.random()}) for step in range(400)]
    rows[3] = (1, {"first": 1.0})
    rows[rng.randrange(400) if cut % 2 else 4][1]["late"] = 2.0
    straight = write(tmp_path / "straight", rows)
    stop = rng.randint(10, 199)
    whole = write(tmp_path / "cut", rows).encode()
    (tmp_path / "cut" / "metrics.csv").write_bytes(whole[: len(whole) - rng.randint(0, 9)] if stop < 198 else whole)
    monkeypatch.setattr(csv_module, "_EDGE", rng.choice([200, 500, 1000]))
    assert write(tmp_path / "cut", [r for r in rows if r[0] > stop], resume_step=stop) == straight


def test_a_resume_of_a_long_file_does_not_read_it_all(tmp_path, monkeypatch):
    write(tmp_path, [(step, {"loss": step / 7}) for step in range(2000)])
    monkeypatch.setattr(csv_module, "_EDGE", 1000)
    monkeypatch.setattr(csv_module, "_surviving_rows", None)
    text = write(tmp_path, [(1991, {"loss": 0.5})], resume_step=1990)
    assert text.endswith(f"1990,{1990 / 7}\n1991,0.5\n")
    assert text.count("\n") == 1993


def test_the_row_of_the_step_of_the_resume_can_be_completed(tmp_path):
    write(tmp_path, [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 9.0})])
    resumed = write(tmp_path, [(2, {"val/loss": 0.75}), (3, {"loss": 0.25})], resume_step=2)
    assert resumed == "step,loss,val/loss\n1,1.0,\n2,0.5,0.75\n3,0.25,\n"


@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_file_that_is_not_ours_is_never_overwritten(tmp_path, resume_step):
    (tmp_path / "metrics.csv").write_text("name,age\nx,3\n")
    with pytest.raises(ConfigError, match=r"its first column is 'name'[\s\S]*use another run_dir"):
        loggers.csv().open(tmp_path, resume_step=resume_step)
    assert (tmp_path / "metrics.csv").read_text() == "name,age\nx,3\n"


def test_names_that_leave_the_run_directory_are_refused():
    for name in ["", "../x.csv", "/x.csv", "a/b.csv"]:
        with pytest.raises(ConfigError, match="is not the name of a file in the run directory"):
            loggers.csv(name=name)


def test_hyperparameters_are_written_as_json(tmp_path):
    sink = loggers.csv().open(tmp_path)
    sink.hparams({"lr": 0.1, "adam": {"betas": (0.9, 0.99)}, "none": None})
    sink.close()
    assert json.loads((tmp_path / "hparams.json").read_text()) == {"lr": 0.1, "adam/betas": "(0.9, 0.99)", "none": None}


def test_read_csv_says_which_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv"):
        loggers.read_csv(tmp_path)
    loggers.csv().open(tmp_path).close()
    assert loggers.read_csv(tmp_path) == {"step": []}


def test_a_full_disk_is_an_error_and_leaves_whole_rows(zygote, tmp_path):
    """The loop goes on without the logger, or tries again; either way the file stays readable."""
    code = f"""
import resource, signal
from pathlib import Path
from purestep import loggers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = loggers.csv().open(Path({str(tmp_path)!r}))
sink.log(1, {{"loss": 0.5}})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
for row in ({{"loss": 0.123456789}}, {{"new": 1.0}}):
    try:
        sink.log(2, row)
        raise SystemExit("no error")
    except OSError:
        print(repr(Path({str(tmp_path)!r}, "metrics.csv").read_text()))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
sink.log(2, {{"loss": 0.25}})
sink.close()
"""
    run = zygote.run(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [repr("step,loss\n1,0.5\n")] * 2
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.getrlimit(resource.RLIMIT_FSIZE)[1]


@pytest.mark.slow
def test_killed_at_random_moments_the_file_ends_the_same(tmp_path, seed):
    """SIGKILL in the middle of thousands of rows; each process resumes at the last multiple of 100 that it finds."""
    code = """
import sys
from pathlib import Path
from purestep import loggers
run_dir, total = Path(sys.argv[1]), int(sys.argv[2])
marker = run_dir / "snapshot"
step = int(marker.read_text()) if marker.exists() else None
sink = loggers.csv().open(run_dir, resume_step=step)
print("open", flush=True)
for i in range((step or 0) + 1, total + 1):
    sink.log(i, {"loss": 1 / i})
    sink.log(i, {f"late/{i // 700}": float(i)})
    if i % 100 == 0:
        sink.flush()
        (run_dir / "partial").write_text(str(i))
        (run_dir / "partial").rename(marker)
sink.close()
print("done")
"""
    total, rng, kills = 5000, random.Random(seed), 0
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    while True:
        command = [sys.executable, "-c", code, str(tmp_path / "killed"), str(total)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "open\n"
            try:
                process.wait(rng.uniform(0.001, 0.06) if kills < 4 else 60)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
            if process.stdout.read() == "done\n":
                break
            kills += 1
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "straight"), str(total)], check=True, capture_output=True
    )
    assert kills >= 2
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("straight", "killed")]
    assert texts[0] == texts[1]
