"""What mkdocs shows: the pages of the repository at their own paths, notebooks if there are any, and the API.

Called by mkdocs (`hooks:` in mkdocs.yml). It reads sources and never imports purestep, so the site needs no torch.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path, outside of any package

import api  # noqa: E402

# What is on the site, by where it lies in the repository. Everything that a page links to has to be here.
SHOWN = (
    *(
        "*.md",
        "docs/*.md",
        "docs/*.png",
        "notebooks/*.md",
        "benchmarks/*.md",
        "benchmarks/*.txt",
        "benchmarks/results/*.md",
    ),
    *("docs/site/*.css", "benchmarks/results/*.png", "examples/**/*"),
)
CELL = re.compile(r"<t[dh][ >].*?</t[dh]>", re.DOTALL)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Add the notebooks and the pages of the API to the navigation."""
    if notebooks := _notebooks():
        config.nav.insert(2, {"Notebooks": ["notebooks/README.md", *notebooks]})
    config.nav.insert(-2, {"API": [{room: f"api/{room}.md"} for room in api.rooms(ROOT)]})
    return config


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: Any) -> Files:
    """Return the files of the site; those of the theme stay as they are."""
    shown = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in [*_shown(), *_notebooks()]]
    pages = [File.generated(config, f"api/{room}.md", content=api.page(ROOT, room)) for room in api.rooms(ROOT)]
    theme = [file for file in files if file.src_dir != config.docs_dir]  # style sheets, scripts, icons
    return Files([*shown, *pages, *theme])


def on_post_build(config: Any) -> None:
    """Refuse a site whose first page asks for a style sheet or a script that is not there."""
    site = Path(config.site_dir)
    asked = re.findall(r'(?:href|src)="((?:assets|docs/site)/[^"?#]+)', (site / "index.html").read_text())
    if not asked or (missing := [path for path in asked if not (site / path).is_file()]):
        raise PluginError(f"the site lacks files of its theme: {', '.join(missing) if asked else 'all of them'}")


def on_page_content(content: str, **_: Any) -> str:
    """Return the page with its formulas as MathML, which browsers show without a script, and code of tables to copy.

    In a table GitHub takes `\\|` in code for a bar, and Python-Markdown for both characters.
    """
    content = FORMULA.sub(_mathml, content)
    return CELL.sub(lambda cell: cell[0].replace(r"\|", "|"), content)


def _mathml(formula: re.Match[str]) -> str:
    return convert(html.unescape(formula["tex"]), display="inline" if formula["tag"] == "span" else "block")


def _shown() -> list[str]:
    found = {path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts)


def _notebooks() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("notebooks/*.ipynb"))
