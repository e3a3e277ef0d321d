"""In a notebook: one kernel, in which cells are run, interrupted and run again, as a user does it."""

from __future__ import annotations

import re
import sys
import time

import pytest
from shared_kernel import Kernel

from purestep import _cells

SETUP = """
import os, signal, time
import torch
import purestep as ps

def loss_fn(net, batch):
    loss = (net(batch["x"]) - batch["y"]).square().mean()
    return loss, {"error": loss.detach().sqrt()}

tx = ps.optim.adamw(1e-3)
step = ps.make_step(loss_fn, tx)
x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
train = ps.data.batches({"x": x, "y": x.sum(1, keepdim=True)}, 8)

def new():
    return ps.init(lambda: torch.nn.Linear(8, 1), tx)

def often():
    return [ps.callbacks.log(every=ps.every.steps(5))]

def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

before = handlers()
quiet = ps.callbacks.progress(display="none")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "first.ipynb").write_text("{}")
    (folder / "elsewhere").mkdir()
    return folder


@pytest.fixture(scope="module")
def kernel(zygote, folder, tmp_path_factory):
    kernel = Kernel(zygote, tmp_path_factory.mktemp("k"), folder, {"JPY_SESSION_NAME": str(folder / "first.ipynb")})
    try:
        assert kernel.run(SETUP).error == ""
        yield kernel
    finally:
        kernel.close()


def test_a_run_is_one_output_that_grows_and_ends_without_times(kernel):
    cell = "_ = ps.fit(step, new(), train, until=ps.epochs(3), callbacks=often())"
    first, again = kernel.run(cell), kernel.run(cell)
    assert first.error == ""
    assert first.kinds[0] == "display_data"
    assert set(first.kinds[1:]) == {"update_display_data"}
    assert len(first.kinds) < 150  # batches
    last = first.shown[-1]
    assert last == again.shown[-1]  # the same bits leave the same output
    assert re.match(r"epoch 3/3  150 batches  train/loss \S+  train/error \S+\nreached 3 epochs$", last["text/plain"])
    assert last["text/html"].count("<svg") >= 2
    assert "<polyline" in last["text/html"]
    assert 'value="150" max="150"' in last["text/html"]
    assert not re.search("<script|http(?!://www.w3.org)|onload", last["text/html"])
    assert len(last["text/html"]) < 16_000
    assert kernel.run("handlers() == before").text == "True"


def test_a_run_is_shown_elsewhere_where_it_is_asked_for(kernel):
    assert kernel.run("_ = ps.fit(step, new(), train, until=ps.steps(3), callbacks=[quiet])").shown == []
    kernel.run("os.environ['PURESTEP_DISPLAY'] = 'none'")
    assert kernel.run("_ = ps.fit(step, new(), train, until=ps.steps(3))").shown == []
    kernel.run("del os.environ['PURESTEP_DISPLAY']")
    assert kernel.run("_ = ps.fit(step, new(), train, until=ps.steps(3))").shown != []


def test_an_interrupted_cell_leaves_a_result_and_goes_on(kernel, folder):
    cell = kernel.start(
        "result = ps.fit(step, new(), train, until=ps.epochs(10_000), run_dir='runs/cut')\nprint('next')"
    )
    kernel.until(cell, "train/loss")
    kernel.interrupt()
    end = kernel.finish(cell)
    assert (end.error, end.text) == ("", "next\n")
    assert "interrupted by SIGINT; saved in runs/cut: run the cell again to go on" in end.shown[-1]["text/plain"]
    assert kernel.run("result.interrupted, handlers() == before").text == "(True, True)"
    assert "SIGINT, interrupted" in kernel.run("result").text
    more = kernel.run(
        "n = result.loop.cursor.batches + 9\n"
        "result = ps.fit(step, new(), train, until=ps.steps(n), run_dir='runs/cut', callbacks=[quiet])\n"
        "straight = ps.fit(step, new(), train, until=ps.steps(n), callbacks=[quiet])\n"
        "ps.digest(result.state) == ps.digest(straight.state)"
    )
    assert (more.error, more.text) == ("", "True")


def test_a_donated_state_names_the_cell_that_consumed_it(kernel):
    kernel.run("state = new()")
    number = int(kernel.run("new_state, _ = ps.donate(step)(state, next(iter(train)))\nlen(In) - 1").text)
    assert kernel.run("state").text == f"<TrainState, consumed by Step in cell In[{number}]>"
    error = kernel.run("step(state, next(iter(train)))").error
    assert f"this TrainState was consumed by Step in cell In[{number}]" in error
    assert f"donated in cell In[{number}], line 1" in error
    helper = int(
        kernel.run("def advance(state):\n    return ps.donate(step)(state, next(iter(train)))\nlen(In) - 1").text
    )
    kernel.run("advance(new_state)")
    assert f"donated in cell In[{helper + 1}] (line 2 of In[{helper}])" in kernel.run("new_state.step").error
    kernel.run("run = ps.run(step, new(), train, until=ps.steps(3), donate=True, callbacks=[quiet])\nnext(run)")
    number = int(kernel.run("kept = run.loop.train\n\nfor _ in run: pass\nlen(In) - 1").text)
    assert f"donated in cell In[{number}], line 3" in kernel.run("kept.step").error


def test_paths_are_those_of_the_notebook_wherever_a_cell_has_gone(kernel, folder):
    kernel.run("os.chdir('elsewhere')")
    try:
        done = kernel.run("ps.fit(step, new(), train, until=ps.steps(60), run_dir='runs/here')")
        assert (folder / "runs" / "here" / "metrics.csv").exists()
        assert str(folder / "runs" / "here") in done.shown[0]["text/plain"]
        assert str(folder / "runs" / "here") in done.text  # of the result
        assert "; runs/here" in done.shown[-1]["text/plain"]
        assert kernel.run("[run.name for run in ps.runs('runs') if run.name == 'here']").text == "['here']"
        assert kernel.run("ps.open('runs/here').updates, ps.snapshot.steps('runs/here')").text == "(60, [60])"
        assert kernel.run("ps.loggers.read_csv('runs/here')['step']").text == "[50]"
        # VS Code says it in a variable. A kernel that was started by another one inherits the environment of that.
        located = "str(ps._cells.located('runs'))"
        (folder / "elsewhere" / "code.ipynb").write_text("{}")
        kernel.run(f"__vsc_ipynb_file__ = {str(folder / 'elsewhere' / 'code.ipynb')!r}; os.chdir('/')")
        assert kernel.run(located).text == repr(str(folder / "elsewhere" / "runs"))
        kernel.run("del __vsc_ipynb_file__; began, get_ipython().starting_dir = get_ipython().starting_dir, '/usr'")
        assert kernel.run(located).text == "'/runs'"
    finally:
        kernel.run(f"get_ipython().starting_dir = began; os.chdir({str(folder)!r})")


def test_a_run_remembers_its_cell_and_those_before(kernel, folder):
    cell = "# the program\n_ = ps.fit(step, new(), train, until=ps.steps(2), run_dir='runs/told', callbacks=[quiet])"
    number = int(kernel.run("len(In)").text)
    kernel.run(cell)
    told = "p = ps.open('runs/told').programs[-1]\n"
    assert kernel.run(told + "p.source").text == repr(cell + "\n")
    assert kernel.run(told + "p.line, p.cell, p.module").text == f"(2, 'In[{number}]', '__main__')"
    assert kernel.run(told + "p.notebook").text == repr(str(folder / "first.ipynb"))
    session = kernel.run("print(p.session)").text
    assert "# In[1]\n\nimport os, signal, time" in session  # what defines the loss
    assert session.index("def loss_fn") < session.index("# the program")
    kernel.run("%%time\n_ = ps.fit(step, new(), train, until=ps.steps(2), run_dir='runs/timed', callbacks=[quiet])")
    assert "runs/timed" in kernel.run("ps.open('runs/timed').programs[-1].source").text


def test_a_second_run_works_after_an_error_and_after_one_that_was_left(kernel):
    broken = "def loss_fn(net, batch):\n    raise ValueError('mine')\n"
    fit = "ps.fit(ps.make_step(loss_fn, tx), new(), train, until=ps.steps(4), run_dir='runs/second')"
    failed = kernel.run(broken + fit)
    assert failed.error == "ValueError: mine"
    assert failed.shown[-1]["text/plain"].endswith("ended by ValueError: mine")
    left = (
        "for event in ps.run(step, new(), train, until=ps.steps(400), run_dir='runs/second', callbacks=[quiet]):\n"
        "    if isinstance(event, ps.loop.StepsDone): raise KeyError('left')"
    )
    assert kernel.run(left).error == "KeyError: 'left'"
    mended = "def loss_fn(net, batch):\n    return net(batch['x']).square().mean()\n"
    done = kernel.run(mended + fit)  # the same names, defined anew
    assert done.error == ""
    assert "reached 4 steps" in done.text
    assert kernel.run("handlers() == before").text == "True"


@pytest.mark.slow
def test_a_second_interrupt_raises_and_the_next_run_works(kernel):
    slow = "[quiet, ps.callbacks.tap(lambda event, loop: (print('tapped'), time.sleep(2)))]"
    cell = kernel.start(f"ps.fit(step, new(), train, until=ps.epochs(100), run_dir='runs/twice', callbacks={slow})")
    kernel.until(cell, "tapped")
    kernel.interrupt()
    time.sleep(0.3)
    kernel.interrupt()
    assert kernel.finish(cell).error.startswith("KeyboardInterrupt")
    assert kernel.run("handlers() == before").text == "True"
    done = kernel.run("ps.fit(step, new(), train, until=ps.steps(4), run_dir='runs/twice', callbacks=[quiet]).reason")
    assert (done.error, done.text) == ("", "'reached 4 steps'")


WORKERS = """
class Rows:
    def __len__(self):
        return 400

    def __getitem__(self, i):
        return {"x": x[i] + noise(8), "y": x[i].sum(0, keepdim=True)}

def noise(n):
    return 0.1 * torch.rand(n)

rows = ps.data.batches(Rows(), 8, transform=lambda sample, key: sample)
loaded = rows.replace(num_workers=2)
"""


@pytest.mark.slow
def test_data_of_a_cell_in_workers_interrupted_and_defined_anew(kernel):
    kernel.run(SETUP)
    assert kernel.run(WORKERS).error == ""
    fit = "result = ps.fit(step, new(), loaded, until=ps.epochs(10_000), run_dir='runs/workers')"
    for _ in range(2):
        cell = kernel.start(fit)
        kernel.until(cell, "train/loss")
        time.sleep(0.5)
        kernel.interrupt()  # the workers get it, too
        assert kernel.finish(cell).error == ""
        assert kernel.run("result.interrupted").text == "True"
    same = (
        "n = result.loop.cursor.batches\n"
        "straight = ps.fit(step, new(), rows, until=ps.steps(n), callbacks=[quiet])\n"
        "ps.digest(result.state) == ps.digest(straight.state)"
    )
    assert kernel.run(same).text == "True"
    kernel.run("def noise(n):\n    return torch.zeros(n)")
    anew = kernel.run("ps.tree.equal(list(loaded.epoch(0)), list(rows.epoch(0))), list(loaded.epoch(0))[0]['x'].dtype")
    assert (anew.error, anew.text) == ("", "(True, torch.float32)")


@pytest.mark.slow
def test_a_stored_notebook_is_executed_and_keeps_the_last_output(folder):
    """As `jupyter execute` does it: another client, an interpreter of its own, and the file that is left."""
    import nbclient
    import nbformat
    from nbformat import v4

    cells = [
        SETUP,
        "result = ps.fit(step, new(), train, until=ps.epochs(2), callbacks=often())",
        "ps.digest(result.state)",
    ]
    book = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    nbformat.validate(book)
    (output,) = book.cells[1].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"].endswith("reached 2 epochs")
    assert "<polyline" in output.data["text/html"]


def test_outside_of_a_notebook_paths_and_places_are_those_of_python(tmp_path, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "other.ipynb"))  # inherited from a kernel that started this
    (tmp_path / "other.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    assert not _cells.in_kernel()
    assert _cells.notebook() is None
    assert _cells.located("runs") == tmp_path / "runs"
    place, line = _cells.place(), sys._getframe().f_lineno
    assert (place.cell, str(place)) == ("", f"{__file__}:{line}")
    assert _cells.session() == ""
