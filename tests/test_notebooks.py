"""The notebooks: source and committed pair agree, each ends with a digest, and the comparison finds what differs."""

import asyncio
import base64
import copy
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from notebooks import execute

ROOT = Path(__file__).parents[1]

SOURCES = execute.sources()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_committed_notebook_is_its_source_with_outputs(source):
    assert execute.disagreements(source) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_executed_to_its_end_without_an_error_and_ends_with_its_digest(source):
    cells = [cell for cell in execute.read_committed(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    assert "ps.bits.portable()" in cells[0].source
    texts = [text for output in outputs for kind, text in execute._parts(output) if not kind.startswith("image/")]
    assert [text for text in texts if ELSEWHERE.search(text)] == []
    assert re.search(r"\b[0-9a-f]{64}\n$", texts[-1])


# What is otherwise on each machine: addresses in memory, absolute paths.
ELSEWHERE = re.compile(r"\b0x[0-9a-f]{6,}|(?<![\w.)<])/(tmp|home|root|work|usr|var|Users)/")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_table_names_each_notebook_and_its_digest(source):
    lines = (ROOT / "notebooks/README.md").read_text().splitlines()
    rows = [line for line in lines if f"({source.stem}.ipynb)" in line]
    assert [row.split("|")[-2].strip() for row in rows] == [
        f"`{execute.digest_of(execute.read_committed(source))[:16]}`"
    ]


def test_no_other_notebook_is_committed():
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))] == [path.stem for path in SOURCES]


# --- what the comparison finds ----------------------------------------------------------------------------------------

SOURCE = """# %% [markdown]
# # Title

# %%
1 + 1

# %%
1 + 1

# %%
print("loss 0.25")
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "01_small.py"
    path.write_text(SOURCE)
    return path


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def with_outputs(book, text="loss 0.25", image=None):
    book = copy.deepcopy(book)
    data = {"text/plain": text} | ({} if image is None else {"image/png": png(image)})
    book.cells[-1].outputs = [nbformat.v4.new_output("display_data", data)]
    return book


def test_ids_of_cells_follow_from_their_text(source):
    book = execute.read_source(source)
    nbformat.validate(book)
    assert [cell.cell_type for cell in book.cells] == ["markdown", "code", "code", "code"]
    assert len({cell.id for cell in book.cells}) == 4
    assert execute.read_source(source) == book
    source.write_text(SOURCE.replace("0.25", "0.5"))
    assert [a.id == b.id for a, b in zip(execute.read_source(source).cells, book.cells, strict=True)] == [True] * 3 + [
        False
    ]


def test_a_source_that_was_changed_is_found_without_executing_it(source):
    assert execute.disagreements(source) == ["01_small.ipynb is missing"]
    nbformat.write(execute.read_source(source), source.with_suffix(".ipynb"))
    assert execute.disagreements(source) == []
    source.write_text(SOURCE.replace("0.25", "0.5"))
    assert execute.disagreements(source) == ["01_small.ipynb: cell 4 is not that of 01_small.py"]
    source.write_text(SOURCE + "\n# %%\n2\n")
    assert execute.disagreements(source) == ["01_small.ipynb: 4 cells, and 5 in 01_small.py"]


@pytest.mark.parametrize(
    ("text", "differs"),
    [
        ("loss 0.25", False),
        ("loss 0.26", True),
        ("loss 0.250", True),
        ("", True),
    ],
)
def test_a_printed_number_is_compared_to_its_last_digit(source, text, differs):
    book = execute.read_source(source)
    found = execute.compare("01_small", with_outputs(book), with_outputs(book, text))
    assert [(d.cell, d.expected, d.got) for d in found] == [(4, "loss 0.25", text)] * differs
    assert all('| print("loss 0.25")' in str(d) and text in str(d) for d in found)


@pytest.mark.parametrize(
    ("text", "other", "differs"),
    [
        ("digits  2026-11-30 02:13  660", "digits  2027-01-01 12:59  660", False),
        ("digits  2026-11-30 02:13  660", "digits  2027-01-01 12:59  661", True),
        ("took 3 s", "took 4 s", True),
    ],
)
def test_dates_may_differ_and_nothing_else(source, text, other, differs):
    book = execute.read_source(source)
    assert bool(execute.compare("01_small", with_outputs(book, text), with_outputs(book, other))) == differs


def test_html_is_compared_by_the_text_in_it(source):
    def shown(markup):
        book = with_outputs(execute.read_source(source))
        book.cells[-1].outputs[0].data["text/html"] = (
            f"<style>b{{{markup}}}</style><td {markup}>loss</td><td>0.25 &lt; 1</td>"
        )
        return book

    assert execute.compare("01_small", shown("a"), shown("b")) == []
    other = shown("a")
    other.cells[-1].outputs[0].data["text/html"] += "<td>2</td>"
    assert [(d.expected, d.got) for d in execute.compare("01_small", shown("a"), other)] == [
        ("loss 0.25 < 1", "loss 0.25 < 1 2")
    ]
    execute.write_pair(source, shown("b"), shown("a"))  # but writing writes the markup of now
    assert execute.read_committed(source) == shown("b")


def test_pictures_are_compared_loosely(source):
    book = execute.read_source(source)
    plain = np.full((100, 200, 3), 255, np.uint8)
    fainter, line = plain - 20, plain.copy()
    line[50] = 0  # a line across: 1 % of the pixels
    for image, differs in [(plain, False), (fainter, False), (line, True), (plain[1:], True)]:
        found = execute.compare("01_small", with_outputs(book, image=plain), with_outputs(book, image=image))
        assert [d.what for d in found] == ["image/png"] * differs
    assert execute.compare("01_small", with_outputs(book, image=plain), with_outputs(book))[0].what == "other outputs"


def test_writing_leaves_what_differs_in_a_date_alone(source, monkeypatch, tmp_path):
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    source.write_text(SOURCE.replace("%%\nprint", '%% tags=["picture=docs/nothing.png"]\nprint'))
    book, image = execute.read_source(source), np.zeros((4, 4, 3), np.uint8)
    old = with_outputs(book, "at 2026-11-30 02:13", image)
    execute.write_pair(source, copy.deepcopy(old), None)
    written = source.with_suffix(".ipynb").read_text()
    assert execute.disagreements(source) == []
    execute.write_pair(source, with_outputs(book, "at 2027-01-01 09:00", image), old)
    assert source.with_suffix(".ipynb").read_text() == written
    execute.write_pair(source, with_outputs(book, "at 2027-01-01 09:00, 3", image), old)
    assert "2027-01-01 09:00, 3" in source.with_suffix(".ipynb").read_text()
    (tmp_path / "docs/nothing.png").write_bytes(b"another")
    assert execute.disagreements(source) == ["docs/nothing.png is not the picture in 01_small.ipynb"]


def test_writing_keeps_the_digest_in_the_table(source, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("| [1](01_small.ipynb) | `a` | 3 | `0` |\n| [2](02_other.ipynb) | | 3 | `0` |\n")
    execute.write_pair(source, with_outputs(execute.read_source(source), f"digest {'ab' * 32}"), None)
    assert (
        page.read_text() == f"| [1](01_small.ipynb) | `a` | 3 | `{'ab' * 8}` |\n| [2](02_other.ipynb) | | 3 | `0` |\n"
    )


@pytest.mark.slow
def test_a_notebook_runs_in_a_fresh_kernel_and_leaves_nothing(tmp_path, capsys):
    source = tmp_path / "01_small.py"
    source.write_text("# %%\nimport os, pathlib\npathlib.Path('left').touch()\nos.listdir()\n\n# %%\nprint(id)\n")
    places = asyncio.Semaphore(1)

    def run(write):
        return asyncio.run(execute._one(source, write, places))

    assert not run(write=False)
    assert run(write=True)
    assert run(write=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01_small.ipynb", "01_small.py"]
    committed = execute.read_committed(source)
    assert [execute._parts(cell.outputs[0])[0][1] for cell in committed.cells] == [
        "['left']",
        "<built-in function id>\n",
    ]
    assert [cell.metadata for cell in committed.cells] == [{}, {}]
    committed.cells[1].outputs[0].text = "another\n"
    nbformat.write(committed, source.with_suffix(".ipynb"))
    capsys.readouterr()
    assert not run(write=False)
    assert "01_small.py, cell 2: stdout\n    | print(id)\n  expected: another" in capsys.readouterr().out
    source.write_text("# %%\n1 / 0\n")
    assert not run(write=False)
    assert "ZeroDivisionError" in capsys.readouterr().out
