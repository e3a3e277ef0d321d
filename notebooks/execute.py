"""Executes the notebooks in fresh kernels, and compares what they print and draw with what is committed.

A notebook is a pair: `NN_name.py`, which people write (cells in jupytext's percent format), and `NN_name.ipynb`, the
same cells with their outputs, which this file writes. `make notebooks` calls it.

    python notebooks/execute.py            # execute all, compare
    python notebooks/execute.py 01 03      # some of them
    python notebooks/execute.py --write    # put new outputs where they differ, and write pictures of the docs
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import hashlib
import html
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).parent
ROOT = HERE.parent
AT_ONCE = 2  # kernels
CELL_SECONDS = 300
LINES = 8  # of a cell in a difference
FORMAT = "py:percent"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What a kernel computes with: one thread each, nothing of the settings and the history of the user.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}

# What an output may say otherwise each time. A notebook prints nothing of the kind; what purestep shows by itself does.
VOLATILE = (
    (re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d\b"), "<date>"),  # when a run was started
)
PIXEL = 32  # of 255: how much a channel may differ before the pixel counts
PIXELS = 0.002  # the share of pixels that may count; a line that moves is 0.5 %


@dataclasses.dataclass(frozen=True)
class Difference:
    """An output that is not the committed one."""

    notebook: str
    cell: int  # among all cells, from 1
    source: str
    what: str
    expected: str
    got: str

    def __str__(self) -> str:
        lines = self.source.splitlines()
        shown = lines if len(lines) <= LINES else [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} lines more"]
        code = "\n".join(f"    | {line}" for line in shown)
        return (
            f"{self.notebook}, cell {self.cell}: {self.what}\n{code}\n"
            f"  expected: {_indented(self.expected)}\n  got:      {_indented(self.got)}"
        )


def _indented(text: str) -> str:
    return text.replace("\n", "\n            ") or "nothing"


# --- the pair ---------------------------------------------------------------------------------------------------------


def sources(wanted: Sequence[str] = (), folder: Path = HERE) -> list[Path]:
    """Return the sources in order: all, or those whose names begin with one of the words."""
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not wanted or any(path.name.startswith(word) for word in wanted)]


def read_source(path: Path) -> nbformat.NotebookNode:
    """Return the notebook of a source, without outputs. The ids of its cells follow from their text."""
    book = jupytext.reads(path.read_text(), fmt=FORMAT)
    cells, seen = [], {}
    for cell in book.cells:
        count = seen[cell.source] = seen.get(cell.source, -1) + 1
        made = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        tags = {"tags": list(cell.metadata["tags"])} if cell.metadata.get("tags") else {}
        name = hashlib.sha256(f"{cell.cell_type} {count} {cell.source}".encode()).hexdigest()[:12]
        cells.append(made(cell.source, id=name, metadata=tags))
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def read_committed(source: Path) -> nbformat.NotebookNode | None:
    path = source.with_suffix(".ipynb")
    return nbformat.read(path, as_version=4) if path.exists() else None


def disagreements(source: Path) -> list[str]:
    """Return how the committed notebook is not its source with outputs; [] where it is. It executes nothing."""
    book, committed = read_source(source), read_committed(source)
    name = source.with_suffix(".ipynb").name
    if committed is None:
        return [f"{name} is missing"]
    found = [] if committed.metadata == book.metadata else [f"{name}: metadata {dict(committed.metadata)}"]
    if len(book.cells) != len(committed.cells):
        found.append(f"{name}: {len(committed.cells)} cells, and {len(book.cells)} in {source.name}")
    for number, (cell, other) in enumerate(zip(book.cells, committed.cells, strict=False), 1):
        if any(cell.get(key) != other.get(key) for key in ("cell_type", "source", "id", "metadata")):
            found.append(f"{name}: cell {number} is not that of {source.name}")
    for path, image in pictures(committed):
        if not path.exists() or path.read_bytes() != image:
            found.append(f"{path.relative_to(ROOT)} is not the picture in {name}")
    return found


def pictures(book: nbformat.NotebookNode) -> Iterator[tuple[Path, bytes]]:
    """Yield the pictures that the docs show: the last of each cell with a tag `picture=docs/name.png`."""
    for cell in book.cells:
        for tag in cell.metadata.get("tags", ()):
            if tag.startswith("picture="):
                images = [o.data["image/png"] for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
                yield ROOT / tag.removeprefix("picture="), base64.b64decode(images[-1] if images else "")


# --- executing --------------------------------------------------------------------------------------------------------


async def execute(book: nbformat.NotebookNode) -> float:
    """Execute a notebook in a fresh kernel and an empty directory; return the seconds it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder, tempfile.TemporaryDirectory() as settings:
        client = NotebookClient(
            book,
            kernel_name="python3",
            timeout=CELL_SECONDS,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{settings}/kernel"}}),  # no ports
        )
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        where = {"IPYTHONDIR": settings, "PYTHONPATH": os.pathsep.join(paths)}
        await client.async_execute(env={**os.environ, **ENVIRONMENT, **where})
    book.metadata = nbformat.from_dict(METADATA)  # not what this kernel says of its Python
    return time.monotonic() - began


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(name: str, committed: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> list[Difference]:
    """Return where outputs differ, by cell. The cells are the same."""
    found = []
    for number, (old, new) in enumerate(zip(committed.cells, executed.cells, strict=True), 1):
        for what, expected, got in _differing(old.get("outputs", []), new.get("outputs", [])):
            found.append(Difference(name, number, new.source, what, expected, got))
    return found


def _differing(old: Sequence[Any], new: Sequence[Any], *, markup: bool = False) -> Iterator[tuple[str, str, str]]:
    """Yield of what kind each output is that differs, and both; with `markup` also HTML that shows the same text."""
    a, b = ([part for output in outputs for part in _parts(output)] for outputs in (old, new))
    if [kind for kind, _ in a] != [kind for kind, _ in b]:
        yield "other outputs", *("\n".join(f"{kind}: {_short(kind, text)}" for kind, text in side) for side in (a, b))
        return
    for (kind, expected), (_, got) in zip(a, b, strict=True):
        if kind.startswith("image/"):
            if reason := different_images(expected, got):
                yield kind, "the committed picture", reason
        else:
            if kind == "text/html" and not markup:
                expected, got = visible(expected), visible(got)
            if settled(expected) != settled(got):
                yield kind, expected, got


def _parts(output: Any) -> list[tuple[str, str]]:
    """Return the parts of one output: of what kind each is, and its text, or its picture in base64."""
    if output.output_type == "stream":
        return [(output.name, output.text)]
    if output.output_type == "error":
        return [("error", f"{output.ename}: {output.evalue}")]
    return sorted((kind, text if isinstance(text, str) else repr(text)) for kind, text in output.data.items())


def _short(kind: str, text: str) -> str:
    return f"{len(text)} characters" if kind.startswith("image/") else text


def settled(text: str) -> str:
    """Return a text without what is volatile in it."""
    for pattern, word in VOLATILE:
        text = pattern.sub(word, text)
    return text


def visible(markup: str) -> str:
    """Return what HTML shows as text; how it looks is not compared."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", markup, flags=re.DOTALL)).split())


def different_images(expected: str, got: str) -> str:
    """Return how two pictures in base64 differ; "" where they look alike."""
    a, b = (_pixels(base64.b64decode(text)) for text in (expected, got))
    if a.shape != b.shape:
        return f"{b.shape[1]} x {b.shape[0]} pixels, not {a.shape[1]} x {a.shape[0]}"
    share = float((abs(a - b).max(-1) > PIXEL).mean())
    return "" if share <= PIXELS else f"{share:.2%} of its pixels are others"


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int16)


# --- the command ------------------------------------------------------------------------------------------------------


async def _one(source: Path, write: bool, places: asyncio.Semaphore) -> bool:
    """Execute one, report it, and write it where asked; return whether all is as committed, or written."""
    book, committed = read_source(source), read_committed(source)
    async with places:
        try:
            seconds = await execute(book)
        except CellExecutionError as error:
            print(f"{source.name}: a cell failed\n{error}", flush=True)
            return False
    found: list[Any] = list(disagreements(source))
    if committed is not None and not found:
        found = compare(source.name, committed, book)
    if write:
        what = "written" if write_pair(source, book, committed) else "as committed"
    else:
        print(*found, sep="\n", end="\n" if found else "")
        what = "NOT as committed; WRITE=1 writes what it is now" if found else "as committed"
    print(f"{source.name}: {what} ({seconds:.0f} s)", flush=True)
    return write or not found


def write_pair(source: Path, book: nbformat.NotebookNode, committed: nbformat.NotebookNode | None) -> bool:
    """Write the notebook of a source and its pictures, and return whether it is another one now.

    An output that differs in a date alone stays as it was.
    """
    before = {} if committed is None else {cell.id: cell.get("outputs", []) for cell in committed.cells}
    for cell in book.cells:
        if cell.cell_type == "code" and not list(_differing(before.get(cell.id, []), cell.outputs, markup=True)):
            cell.outputs = before.get(cell.id, [])
    path = source.with_suffix(".ipynb")
    old = path.read_bytes() if path.exists() else b""
    nbformat.write(book, path)
    for picture, image in pictures(book):
        picture.write_bytes(image)
    _write_digest(source, book)
    return path.read_bytes() != old


def digest_of(book: nbformat.NotebookNode) -> str:
    """Return the digest that a notebook ends with, "" where it has none."""
    found = re.findall(r"\b[0-9a-f]{64}\b", str(book.cells[-1].get("outputs", "")))
    return found[-1] if found else ""


def _write_digest(source: Path, book: nbformat.NotebookNode) -> None:
    """Write the first digits of the digest into the row of the notebook in the README beside it, where there is one."""
    page = source.with_name("README.md")
    if page.exists():
        row = rf"(\({source.stem}\.ipynb\).*\| `)[0-9a-f]*(` \|\n)"
        page.write_text(re.sub(row, rf"\g<1>{digest_of(book)[:16]}\g<2>", page.read_text()))


async def _all(chosen: Sequence[Path], write: bool) -> list[bool]:
    places = asyncio.Semaphore(AT_ONCE)
    return await asyncio.gather(*(_one(source, write, places) for source in chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", help="beginnings of names, such as 01; all by default")
    parser.add_argument("--write", action="store_true", help="write the outputs that differ")
    args = parser.parse_args()
    chosen = sources(args.wanted)
    if not chosen:
        print(f"no notebook is named {' or '.join(args.wanted)}: {', '.join(path.name for path in sources())}")
        return 2
    began = time.monotonic()
    good = asyncio.run(_all(chosen, args.write))
    print(f"{sum(good)} of {len(good)} notebooks, {time.monotonic() - began:.0f} s")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
