"""Every file that the map of the rooms, the architecture and the guides name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
# What is on no disk of this repository: what a run writes, other people's files, and what `make docs` fills.
ELSEWHERE = re.compile(
    r"^(runs|train|val|test|snapshots|meta|parts|state|site|notebooks|benchmarks/results|step|script\.py|train\.py|sine\.py)\b|^/"
)


def named(page):
    text = re.sub(r"^```(python|text)\n.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"https?://\S+|\]\([^)]*\)", "", text)
    found = {path.rstrip("/") for path in re.findall(r"(?<=[`\s(])((?:\.?[a-z_-]+/)*[a-z_0-9]+\.py)\b", text)}
    found |= set(re.findall(r"`(\.?[a-z_]+(?:/[a-z_]+)*/)`", text))
    return {path for path in found if not ELSEWHERE.match(path)}


def is_there(path):
    """From the root, from the package, or a bare name of a file or folder anywhere in it."""
    path = path.rstrip("/")
    bare = "/" not in path and any((ROOT / "purestep").rglob(path))
    return bare or (ROOT / path).exists() or (ROOT / "purestep" / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    assert [path for path in sorted(named(page)) if not is_there(path)] == []


def test_the_map_names_files():
    assert len(named("CONTRIBUTING.md")) > 40
    assert len(named("docs/architecture.md")) > 40
    assert not is_there("loop/nothing.py")


def test_every_room_is_on_the_map():
    rows = (ROOT / "CONTRIBUTING.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    package = ROOT / "purestep"
    rooms = {p.name for p in package.glob("*.py")} | {p.parent.name + "/" for p in package.glob("*/*.py")}
    assert {room for room in rooms if f"`{room}`" not in rows and not room.startswith("_")} == set()
