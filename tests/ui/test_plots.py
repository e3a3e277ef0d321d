"""Learning curves: which panels, which points, and that nothing global is touched."""

from __future__ import annotations

import math
import os
import sys

import pytest
from shared_marks import slow_but

from purestep import display, loggers
from purestep.display import plots
from purestep.errors import ConfigError, MissingExtra

COLUMNS = {
    "step": [1, 2, 3, 4],
    "loss": [0.9, 0.5, math.nan, 0.3],
    "accuracy": [0.1, 0.2, 0.3, 0.4],
    "val/loss": [None, 0.6, None, 0.4],
    "val/accuracy": [None, 0.3, None, 0.5],
    "learning_rate": [1e-3, 1e-3, 1e-4, math.inf],
    "never": [None] * 4,
}


def drawn(monkeypatch, *args, **kwargs):
    """What each panel was given, and the lines it drew."""
    panels = {}
    original = plots._draw_panel

    def spy(axes, panel):
        original(axes, panel)
        lines = axes.get_lines()
        panels[panel.title] = {line.get_label(): (line.get_xydata().tolist(), line.get_color()) for line in lines}

    monkeypatch.setattr(plots, "_draw_panel", spy)
    return display.learning_curves(*args, **kwargs), panels


def test_one_panel_a_family_with_train_and_validation_together(monkeypatch, tmp_path):
    path, panels = drawn(monkeypatch, COLUMNS, tmp_path / "new" / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]
    assert {family: list(lines) for family, lines in panels.items()} == {
        "loss": ["loss", "val/loss"],
        "accuracy": ["accuracy", "val/accuracy"],
        "learning_rate": ["learning_rate"],
    }
    assert panels["loss"]["val/loss"][0] == [[2, 0.6], [4, 0.4]]
    colours = {name: colour for lines in panels.values() for name, (_, colour) in lines.items()}
    assert colours["loss"] == colours["accuracy"] == colours["learning_rate"]
    assert colours["val/loss"] == colours["val/accuracy"] != colours["loss"]


def test_keys_choose_and_order(monkeypatch, tmp_path):
    _, panels = drawn(monkeypatch, COLUMNS, tmp_path / "a.png", keys=["val/loss", "loss"], title="digits")
    assert {family: list(lines) for family, lines in panels.items()} == {"loss": ["val/loss", "loss"]}


def test_from_a_run_directory_and_from_its_file(monkeypatch, tmp_path):
    sink = loggers.csv().open(tmp_path)
    for step in range(1, 5):
        sink.log(step, {"loss": 1 / step})
    sink.close()
    for source in (tmp_path, tmp_path / "metrics.csv", str(tmp_path)):
        _, panels = drawn(monkeypatch, source, tmp_path / "a.png")
        assert panels["loss"]["loss"][0] == [[step, 1 / step] for step in range(1, 5)]


@pytest.mark.parametrize("panels", slow_but(range(1, 9), 1, 2, 5))
def test_any_number_of_panels_and_points(tmp_path, panels):
    columns = {"step": [7]} | {f"metric_{i}": [float(i)] for i in range(panels)}
    assert display.learning_curves(columns, tmp_path / "a.png").exists()


def test_only_values_that_are_not_finite(tmp_path):
    display.learning_curves({"step": [1, 2], "loss": [math.nan, math.inf]}, tmp_path / "a.png")


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no column 'x' to draw\n  where:   columns: step, loss"):
        display.learning_curves(COLUMNS, tmp_path / "a.png", keys=["loss", "x"])
    with pytest.raises(ConfigError, match="there is no column 'step' to draw"):
        display.learning_curves({"loss": [1.0]}, tmp_path / "a.png")
    for nothing in ({"step": []}, {"step": [1], "loss": [None]}):
        with pytest.raises(ConfigError, match="there is nothing to draw yet"):
            display.learning_curves(nothing, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_not_even_imported(bare, tmp_path):
    code = f"""
import sys
from purestep import display
display.learning_curves({{"step": [1], "loss": [0.5]}}, {str(tmp_path / "a.png")!r})
sys.exit("pyplot was imported" if "matplotlib.pyplot" in sys.modules else 0)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "DISPLAY")}
    run = bare.run(code, env=environment)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_missing_matplotlib_is_named_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r'pip install "purestep\[plots\]"'):
        display.learning_curves(COLUMNS, tmp_path / "a.png")
