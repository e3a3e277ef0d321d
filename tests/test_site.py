"""The pages of the API name what users type, and every guide is in the navigation; `make docs` builds them strictly."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import purestep as ps

ROOT = Path(__file__).parents[1]


def site_api():
    spec = importlib.util.spec_from_file_location("site_api", ROOT / "docs/site/api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROOMS = site_api().rooms(ROOT)


def test_every_public_name_has_a_place_on_a_page():
    listed = {*ROOMS, *(full.rpartition(".")[2] for full in ROOMS["purestep"])}
    offered = {name for name in dir(ps) if not name.startswith("_")} - {"TYPE_CHECKING", "attach"}
    # A file of the package is an attribute of it as soon as anything has imported it, without being offered.
    assert {name for name in offered - listed if not isinstance(getattr(ps, name), ModuleType)} == set()
    assert {"fit", "jit", "make_step", "TrainState", "optim", "snapshot", "tree"} <= listed


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_page_documents_is_there(room):
    value = ps if room == "purestep" else getattr(ps, room)
    names = [full.rpartition(".")[2] for full in ROOMS[room]]
    assert names
    assert [name for name in names if not hasattr(value, name)] == []
    assert "\n::: " in site_api().page(ROOT, room)


def test_a_function_with_the_name_of_its_file_is_found_under_its_home():
    assert "purestep.data.batches.batches" in ROOMS["data"]
    assert "purestep.optim.adamw" in ROOMS["optim"]


def test_every_guide_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*(pages(e) for e in (entry.values() if isinstance(entry, dict) else entry)))

    shown = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")} <= shown
    assert [page for page in shown if not (ROOT / page).exists()] == []
