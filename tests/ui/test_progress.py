"""The progress bar: what it draws, where it is silent, and that it never ends a run."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import types

import pytest
from rich.console import Console

from purestep.display import live, progress
from purestep.display.progress import ProgressSink

STATE = {"epoch": 0, "epochs": 5, "batch": 10, "length": 100, "metrics": {"loss": 0.51239, "acc": 1.0}, "rate": 20.0}


def terminal(width=120, file=None):
    return Console(
        file=file or io.StringIO(), force_terminal=True, width=width, legacy_windows=False, color_system=None
    )


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.fixture
def clock(monkeypatch):
    """Time that moves by hand."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def last_line(console) -> str:
    return plain(console.file.getvalue()).strip().splitlines()[-1]


def test_a_terminal_shows_where_the_run_is(clock):
    bar = ProgressSink(console := terminal())
    bar.update(**STATE, note="evaluating")
    line = last_line(console)
    for text in ["epoch 1/5", "10/100", "20.0 batches/s", "0:04 left", "loss 0.5124", "acc 1", "evaluating"]:
        assert text in line
    clock.seconds += 1
    bar.update(**STATE | {"epoch": 5, "batch": 0, "rate": None, "metrics": {}})
    line = last_line(console)
    assert "epoch 5/5" in line
    assert "batches/s" not in line
    bar.close()


def test_unknown_lengths_are_not_made_up(clock):
    bar = ProgressSink(console := terminal())
    bar.update(epoch=2, epochs=None, batch=1234, length=None, metrics={}, rate=5432.1)
    line = last_line(console)
    assert "epoch 3 " in line
    assert "1234 batches" in line
    assert "5,432 batches/s" in line
    assert "left" not in line
    bar.close()


@pytest.mark.parametrize("width", [50, 60, 61, 80, 100])
def test_a_narrow_terminal_gets_one_line(clock, width):
    bar = ProgressSink(console := terminal(width=width))
    bar.update(**STATE | {"metrics": {f"metric/{i}": 1 / 3 for i in range(50)}})
    lines = plain(console.file.getvalue()).strip().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert re.match(r"epoch 1/5 \S+ +10/100", lines[0])
    assert ("metric/0" in lines[0]) is (width >= 80)
    bar.close()


def test_what_looks_like_markup_is_text(clock):
    bar = ProgressSink(console := terminal())
    bar.update(**STATE | {"metrics": {"[bold]x": 1.0}}, note="[/red]")
    bar.print("[link] above {text}")
    bar.close()
    text = plain(console.file.getvalue())
    assert "[bold]x 1" in text
    assert "[/red]" in text
    assert "[link] above {text}" in text


def test_it_redraws_at_most_ten_times_a_second_and_ends_with_the_last_frame(clock, monkeypatch):
    frames = []
    monkeypatch.setattr(progress.TerminalBar, "draw", lambda self, frame: frames.append(frame.batch))
    bar = ProgressSink(terminal())
    for batch in range(1, 43):
        bar.update(**STATE | {"batch": batch})
        clock.seconds += 0.03
    bar.close()
    assert len(frames) <= 42 * 0.03 / 0.1 + 2
    assert frames[-1] == 42
    bar.update(**STATE)
    bar.print("x")
    bar.close()
    assert frames[-1] == 42


def test_the_end_of_an_epoch_is_always_drawn(clock):
    bar = ProgressSink(console := terminal())
    bar.update(**STATE)
    bar.update(**STATE | {"batch": 100})
    assert "100/100" in last_line(console)
    bar.close()


def test_prints_of_the_program_go_above_and_the_streams_come_back(clock, monkeypatch):
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    bar = ProgressSink(console := terminal())
    bar.update(**STATE)
    assert sys.stdout is not stdout
    print("a line of the program")
    bar.close()
    assert sys.stdout is stdout
    assert "a line of the program" in plain(console.file.getvalue())
    assert stdout.getvalue() == ""


def test_a_console_that_is_no_terminal_gets_nothing(clock):
    bar = ProgressSink(console := Console(file=io.StringIO(), force_terminal=False))
    bar.update(**STATE)
    bar.print("x")
    bar.close()
    assert console.file.getvalue() == ""


def test_a_reader_that_goes_away_does_not_end_the_process():
    """rich would point stdout at the null device and exit."""
    code = f"""
import os, sys
from rich.console import Console
from purestep.display.progress import ProgressSink
bar = ProgressSink(Console(force_terminal=True))
sys.stdin.readline()
for batch in range(3):
    bar.update(**{STATE!r} | {{"batch": 100}})
bar.close()
os.write(2, b"alive")
os._exit(7)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.wait(120) == 7
        assert process.stderr.read() == b"alive"


class Breaking(io.StringIO):
    """A stream that works for some writes, and then fails."""

    def __init__(self, writes: int, error: Exception) -> None:
        super().__init__()
        self.writes, self.error = writes, error

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise self.error
        return super().write(text)


ERRORS = [BrokenPipeError(32, "gone"), ValueError("I/O operation on closed file"), OSError(5, "EIO")]
ERRORS += [UnicodeEncodeError("ascii", "━", 0, 1, "ordinal not in range")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("writes", range(6))
def test_a_stream_that_breaks_ends_the_bar_and_nothing_else(clock, monkeypatch, error, writes):
    stdout, stderr = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    stream = Breaking(writes, error)
    bar = ProgressSink(terminal(file=stream))
    for batch in range(4):
        bar.update(**STATE | {"batch": batch})
        bar.print("x")
        clock.seconds += 1
    assert stream.writes < 0
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    bar.close()
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("stdout", [None, "closed"])
def test_without_a_stdout_it_is_silent(monkeypatch, stdout):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", None if stdout is None else stream)
    bar = ProgressSink()
    bar.update(**STATE)
    bar.print("x")
    bar.close()


def test_a_pipe_gets_nothing_and_rich_is_not_imported(bare):
    code = f"""
import sys
from purestep.display.progress import ProgressSink
bar = ProgressSink()
bar.update(**{STATE!r})
bar.print("above")
bar.close()
sys.exit("rich was imported" if "rich" in sys.modules else 0)
"""
    run = bare.run(code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(("term", "drawn"), [("xterm-256color", True), ("dumb", False)])
def test_a_real_terminal(bare, term, drawn):
    code = f"""
from purestep.display.progress import ProgressSink
bar = ProgressSink()
bar.update(**{STATE!r})
bar.close()
print("end")
"""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    environment |= {"TERM": term, "COLUMNS": "100"}
    try:
        assert (
            bare.run(code, stdout=os.ttyname(theirs), env=environment).returncode == 0
        )  # reading a terminal that nobody wrote to would wait for ever
        text = plain(os.read(ours, 100_000).decode())
    finally:
        os.close(ours)
        os.close(theirs)
    assert ("epoch 1/5" in text) is drawn
    assert text.splitlines()[-1] == "end"


class Cell:
    """What a cell of a notebook shows."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.shown = 0

    def display(self, bundle, raw, display_id=False):
        assert raw
        self.outputs.append(bundle)
        self.shown += 1
        place = len(self.outputs) - 1

        class Handle:
            def update(handle, bundle, raw):
                assert raw
                self.outputs[place] = bundle
                self.shown += 1

        return Handle() if display_id else None


@pytest.fixture
def cell(monkeypatch):
    """A notebook around this process, in which drawing takes no time."""
    cell, part = Cell(), types.ModuleType("IPython.display")
    part.display = cell.display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", part)
    monkeypatch.setattr(progress._cells, "in_kernel", lambda: True)
    monkeypatch.setattr(live.time, "perf_counter", lambda: 0.0)
    return cell


def test_a_notebook_gets_one_output_that_is_replaced(clock, cell):
    bar = ProgressSink()
    bar.update(**STATE, note="<script>", batches=10, total=500, run_left=61.0, place="/home/<me>/runs/a")
    bar.print("above")
    clock.seconds += 1
    bar.update(**STATE | {"batch": 20}, note="<script>", batches=20, total=500, run_left=61.0)
    bar.close()
    assert [o["text/plain"].split("  ")[:2] for o in cell.outputs] == [["epoch 1/5", "20/100"], ["above"]]
    assert "1:01 left" in cell.outputs[0]["text/plain"]
    assert 'value="20" max="500"' in cell.outputs[0]["text/html"]
    assert "&lt;script&gt;" in cell.outputs[0]["text/html"]
    assert "<script>" not in cell.outputs[0]["text/html"]


def test_a_notebook_keeps_the_end_of_a_run_without_times(clock, cell):
    bar = ProgressSink()
    for step in range(1, 2001):
        bar.log(step, {"train/loss": 1 / step, "epoch": step / 100})
    bar.log(2000, {"val/loss": 0.5})
    bar.update(**STATE, batches=10, total=500, run_left=61.0, place="/runs/a")
    bar.finish("reached <5> epochs; runs/a")
    (output,) = cell.outputs
    assert output["text/plain"] == "epoch 1/5  10 batches  loss 0.5124  acc 1\nreached <5> epochs; runs/a"
    assert "reached &lt;5&gt; epochs" in output["text/html"]
    assert output["text/html"].count("<polyline") == 1
    assert len(output["text/html"]) < 12_000
    bar.update(**STATE)
    bar.finish("again")
    assert cell.shown == 2


def test_a_notebook_is_not_flooded(clock, cell, monkeypatch):
    bar = ProgressSink()
    for epoch in range(1000):  # of one batch each
        bar.update(**STATE | {"epoch": epoch, "batch": 100})
        clock.seconds += 0.001
    assert cell.shown == 4
    monkeypatch.setattr(live.time, "perf_counter", iter([0.0, 0.02]).__next__)  # the next one takes 20 ms
    clock.seconds += 1
    bar.update(**STATE)
    clock.seconds += 1.9
    bar.update(**STATE)
    assert cell.shown == 5
    clock.seconds += 0.2
    monkeypatch.setattr(live.time, "perf_counter", lambda: 0.0)
    bar.update(**STATE)
    assert cell.shown == 6


def test_a_long_history_keeps_its_spikes():
    history = live.History()
    values = [0.001 * ((7 * step) % 100) for step in range(10_000)]
    values[4321], values[8765] = 50.0, -50.0
    for step, value in enumerate(values):
        history.add(step, {"loss": value})
    columns = history.columns()
    assert len(columns["step"]) <= 1200
    assert columns["step"] == sorted(columns["step"])
    assert {50.0, -50.0} <= set(columns["loss"])
    assert columns["loss"][columns["step"].index(4321)] == 50.0


@pytest.mark.parametrize(
    ("where", "variable", "shown"),
    [
        ("auto", None, "none"),  # under pytest stdout is no terminal
        ("auto", "notebook", "notebook"),
        ("auto", "auto", "none"),
        ("none", "notebook", "none"),
        ("terminal", None, "terminal"),
    ],
)
def test_where_it_is_shown(monkeypatch, where, variable, shown):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delenv("PURESTEP_DISPLAY", raising=False)
    if variable is not None:
        monkeypatch.setenv("PURESTEP_DISPLAY", variable)
    assert progress.shown_in(where) == shown


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch):
    package, zmq = types.ModuleType("IPython"), types.ModuleType("ipykernel.zmqshell")
    zmq.ZMQInteractiveShell = type("ZMQInteractiveShell", (), {})
    package.get_ipython = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "IPython", package)
    assert not progress._cells.in_kernel()
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", zmq)
    assert not progress._cells.in_kernel()
    package.get_ipython = zmq.ZMQInteractiveShell
    assert progress._cells.in_kernel()
