"""Which panels learning curves have, what is beside each other in them, and where the epochs are."""

from __future__ import annotations

import math

import pytest

from purestep.display import curves, plots
from purestep.errors import ConfigError
from purestep.views import Mark

LOG = {
    "step": [5, 10, 15, 20, 25, 30],
    "epoch": [0.0, 1.0, 1.0, 2.0, 2.0, 3.0],
    "train/loss": [4.0, 2.0, 1.0, 0.5, 0.25, 0.125],
    "train/loss_epoch": [None, 3.0, None, 0.75, None, 0.2],
    "val/loss": [None, 2.5, None, 0.9, None, 0.5],
    "val/accuracy": [None, 0.5, None, 0.75, None, 0.9],
    "learning_rate": [0.1] * 6,
}


def test_a_metric_has_one_panel_whatever_it_was_measured_on():
    made = {panel.title: panel for panel in curves.panels(LOG)}
    assert list(made) == ["loss", "accuracy", "learning_rate"]  # and none for the epoch
    loss = {line.name: line for line in made["loss"].lines}
    assert [name for name, line in loss.items() if line.faint] == ["train/loss"]
    assert loss["train/loss"].colour == loss["train/loss_epoch"].colour == 0
    assert loss["val/loss"].colour == made["accuracy"].lines[0].colour == 1
    assert made["learning_rate"].lines[0].colour == 0
    assert loss["val/loss"].points == [(10, 2.5), (20, 0.9), (30, 0.5)]
    assert loss["val/loss"].markers
    assert not loss["train/loss"].markers
    assert made["loss"].lines[0].faint  # drawn first, so behind


def test_epochs_are_on_a_second_axis_where_they_end():
    (panel,) = curves.panels(LOG, ["val/loss"])
    assert panel.epochs == ((10, "1"), (20, "2"), (30, "3"))
    steps = list(range(1, 1001))
    long = {"step": steps, "epoch": [float(step // 7) for step in steps], "loss": [1.0] * 1000}
    (panel,) = curves.panels(long)
    assert panel.epochs == ((350, "50"), (700, "100"))
    (panel,) = curves.panels({"step": [1, 2], "loss": [1.0, 2.0]})
    assert panel.epochs == ()
    (panel,) = curves.panels({"step": [1, 2], "epoch": [None, math.nan], "loss": [1.0, 2.0]})
    assert panel.epochs == ()
    assert curves.panels(LOG, ["epoch"])[0].title == "epoch"  # who asks for it gets it


def test_a_loss_over_many_powers_of_ten_has_a_logarithmic_axis():
    steps = list(range(6))
    falling = [10.0**-step for step in steps]
    made = curves.panels({"step": steps, "loss": falling, "rate": falling, "b_loss": [0.0, *falling[1:]]})
    assert {panel.title: panel.log for panel in made} == {"loss": True, "rate": False, "b_loss": False}


def test_runs_lie_over_each_other():
    other = LOG | {"val/loss": [None, 3.0, None, 1.0, None, 0.25], "only": [1.0] * 6}
    made = {panel.title: panel for panel in curves.beside([("a", LOG), ("b", other)], mark=Mark(10, "here"))}
    assert list(made) == ["loss", "val/accuracy", "learning_rate"]  # not what one of them alone has
    assert all(panel.mark == Mark(10, "here") and panel.epochs for panel in made.values())
    seen = {line.name: (line.colour, line.dashed, line.faint) for line in made["loss"].lines}
    assert seen == {
        "a train/loss": (0, False, True),
        "b train/loss": (1, False, True),
        "a train/loss_epoch": (0, False, False),
        "b train/loss_epoch": (1, False, False),
        "a val/loss": (0, True, False),
        "b val/loss": (1, True, False),
    }
    assert [line.name for line in made["learning_rate"].lines] == ["a", "b"]
    apart = curves.beside([("a", LOG), ("b", other)], ["val/loss", "train/loss"], together=False)
    assert [panel.title for panel in apart] == ["val/loss", "train/loss"]
    assert [line.points[-1] for line in apart[0].lines] == [(30, 0.5), (30, 0.25)]
    assert curves.beside([("a", LOG), ("b", other)], ["only"])[0].lines[0].name == "b"
    shorter = {name: column[:3] for name, column in LOG.items()}
    assert curves.beside([("a", LOG), ("b", shorter)])[0].epochs == ()  # epochs of other lengths have no one axis


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(ConfigError, match=r"no run has logged 'f1'\n  where:   metrics: train/loss, "):
        curves.beside([("a", LOG)], ["f1"])
    with pytest.raises(ConfigError, match=r"nothing to draw over each other\n  where:   runs: a, b"):
        curves.beside([("a", {"step": [1], "x": [1.0]}), ("b", {"step": [1], "y": [1.0]})])
    with pytest.raises(ConfigError, match="nothing to draw over each other"):
        curves.beside([])
    assert curves.shown({}) == curves.shown({"step": [], "loss": []}) == []
    assert curves.shown({"step": [1], "epoch": [1.0], "loss": [None]}) == []


def test_a_figure_has_the_second_axis_and_the_mark():
    figure = plots.draw(curves.beside([("a", LOG), ("b", LOG)], ["val/loss"], Mark(20, "they part at 20")), title="t")
    (axes,) = figure.axes
    above = next(child for child in axes.child_axes if child.get_xlabel() == "epoch")
    assert [tick.get_text() for tick in above.get_xticklabels()] == ["1", "2", "3"]
    assert list(above.get_xticks()) == [10, 20, 30]
    assert [line.get_xdata() for line in axes.get_lines() if line.get_label().startswith("_")] == [[20, 20]]
    assert [text.get_text() for text in axes.texts] == ["they part at 20"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert figure.get_suptitle() == "t"
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows, without pyplot


def test_many_runs_are_shades_in_their_order_with_names_beside_the_panels():
    figure = plots.draw(curves.beside([(f"r{n}", LOG) for n in range(30)], ["val/loss"]))
    lines = figure.axes[0].get_lines()
    assert len({tuple(line.get_color()) for line in lines}) == 30
    brightness = [sum(line.get_color()[:3]) for line in lines]
    assert brightness == sorted(brightness)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 24
    assert legend.get_title().get_text() == "30, the first 24:"
    assert figure.axes[0].get_legend() is None
