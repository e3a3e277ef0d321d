"""The blocks of a view: what is aligned, escaped and drawn, and in which colours."""

from __future__ import annotations

import io
import itertools
import math
import random
import re
import sys
from xml.etree import ElementTree

import pytest

from purestep.views import DARK, LIGHT, Curves, Facts, Line, Mark, Note, Panel, Printed, Table, Tree, View, sparkline
from purestep.views.chart import HEIGHT, WIDTH, svg, ticks
from purestep.views.markup import STYLE, page

EVIL = "<script>alert('x')</script> & \"quotes\""


def parsed(html: str) -> ElementTree.Element:
    """The markup, which is well-formed XML: every tag closed, every attribute quoted, nothing left unescaped."""
    return ElementTree.fromstring(f"<root>{html}</root>")


def texts(html: str) -> list[str]:
    return [text for text in parsed(html).itertext() if text.strip()]


# --- text and markup --------------------------------------------------------------------------------------------------


def test_columns_of_numbers_are_aligned_to_the_right():
    table = Table(("name", "n", "x"), [("a", 12345, 0.25), ("longer", None, 2.0)], foot=("all", 12345, 2.25))
    assert table.text().splitlines() == [
        "name         n     x",
        "------  ------  ----",
        "a       12,345  0.25",
        "longer             2",
        "------  ------  ----",
        "all     12,345  2.25",
    ]
    root = parsed(table.html())
    assert [cell.get("class") for cell in root.find(".//thead/tr")] == [None, "number", "number"]
    assert [[cell.text for cell in row] for row in root.findall(".//tbody/tr")] == [
        ["a", "12,345", "0.25"],
        ["longer", None, "2"],
    ]
    assert [cell.text for cell in root.find(".//tfoot/tr")] == ["all", "12,345", "2.25"]


def test_a_table_without_names_has_no_head():
    assert Table(("", ""), [("a", "b")]).text() == "a  b"
    assert parsed(Table(("", ""), [("a", "b")]).html()).find(".//thead") is None


@pytest.mark.parametrize(
    "block",
    [
        Note(EVIL),
        Table((EVIL, "b"), [(EVIL, 1)], title=EVIL),
        Table(("a", "b"), [("x", EVIL)], wide=True),
        Facts([(EVIL, EVIL)]),
        Tree(EVIL, EVIL, (Tree(EVIL, EVIL),)),
        Curves([Panel(EVIL, (Line(EVIL, [(0, 1.0), (1, 2.0)]), Line("b", [(0, 1.0)])), mark=Mark(0.5, EVIL))]),
        Curves([Panel(EVIL, (Line("a", [(0, 1.0)]),), epochs=((0.0, EVIL),), axis=EVIL)]),
    ],
    ids=lambda block: type(block).__name__,
)
def test_nothing_is_taken_for_markup(block):
    html = page(block.html())
    assert "<script" not in html
    assert not {element.tag for element in parsed(html).iter()} & {"script", "{http://www.w3.org/2000/svg}script"}
    # As it was written, once it is read back.
    assert EVIL in " ".join(texts(html))
    names = {name for element in parsed(html).iter() for name in element.attrib}
    assert not any(name.startswith("on") for name in names)


def test_a_tree_is_drawn_with_lines():
    tree = Tree("chain", "", (Tree("a", "x=1", (Tree("b"), Tree("c"))), Tree("d", "y=2")))
    assert tree.text().splitlines() == ["chain", "├─ a  x=1", "│  ├─ b", "│  ╰─ c", "╰─ d  y=2"]
    assert texts(tree.html()) == ["chain", "a", "x=1", "b", "c", "d", "y=2"]
    assert len(parsed(tree.html()).findall(".//details")) == 2


def test_a_terminal_that_has_no_such_characters_gets_others(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert Tree("a", "", (Tree("b"), Tree("c"))).text().splitlines() == ["a", "|- b", "`- c"]
    assert sparkline([0, 1, 2]).isascii()


def test_a_value_shows_itself_in_each_place():
    class Code(View):
        def __repr__(self):
            return "code()"

        def view(self):
            return [Note("a text")]

    class Result(Printed):
        def view(self):
            return [Table(("a",), [(1,)]), Table(("b",), [(2,)]), Note("end")]

    said = []
    printer = type("Printer", (), {"text": lambda self, text: said.append(text)})()
    Code()._repr_pretty_(printer, cycle=False)
    assert (repr(Code()), str(Code()), said) == ("code()", "a text", ["a text"])
    assert "a text" in texts(Code()._repr_html_())
    assert repr(Result()) == str(Result()) == "a\n1\n\nb\n2\nend"


# --- sparklines -------------------------------------------------------------------------------------------------------


def test_a_sparkline_goes_as_its_numbers_do():
    draw = random.Random(0)
    for _ in range(50):
        values = sorted(draw.uniform(-1, 1) * 10 ** draw.randint(-300, 300) for _ in range(draw.randint(2, 200)))
        line = sparkline(values, width=32)
        assert len(line) == min(32, len(values))
        assert list(line) == sorted(line)
        assert line[-1] == "█"
        assert line[0] == "▁"
    assert sparkline([1.0, math.nan, None, math.inf, 2.0]) == "▁   █"
    assert sparkline([]) == ""
    assert sparkline([math.nan]) == " "
    assert sparkline([-1.7e308, 1.7e308]) == "▁█"
    assert sparkline([1, 10, 100, 1000], log=True) == "▁▃▆█"


# --- curves -----------------------------------------------------------------------------------------------------------


def drawn(panel: Panel) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """The points of each polyline, and the texts."""
    root = ElementTree.fromstring(svg(panel))
    lines = root.findall("{*}polyline")
    points = [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in lines]
    return points, [element.text for element in root.findall("{*}text")]


def test_points_are_where_their_numbers_are():
    (points,), labels = drawn(Panel("loss", (Line("loss", [(0, 1.0), (5, 0.25), (10, 0.5)]),), limits=(0, 10)))
    xs, ys = zip(*points, strict=True)
    assert xs[1] - xs[0] == xs[2] - xs[1]
    assert (ys[1] - ys[0]) / (ys[1] - ys[2]) == pytest.approx(0.75 / 0.25, rel=0.01)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert {"0", "10", "0.4", "1", "step"} <= set(labels)


def test_a_logarithmic_axis_has_powers_of_ten_at_equal_distances():
    line = Line("loss", [(step, 10.0**-step) for step in range(5)])
    (points,), labels = drawn(Panel("loss", (line,), log=True, limits=(0, 4)))
    steps = [b - a for (_, a), (_, b) in itertools.pairwise(points)]
    assert max(steps) - min(steps) < 0.3
    assert {"1", "0.1", "0.01", "0.001", "0.0001"} <= set(labels)


def test_what_is_not_finite_leaves_a_gap_and_a_single_point_is_seen():
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 1.0, 2.0]
    panel = Panel("x", (Line("x", list(enumerate(values))),), limits=(0, 6))
    points, _ = drawn(panel)
    assert [len(run) for run in points] == [2, 2]
    assert len(ElementTree.fromstring(svg(panel)).findall("{*}circle")) == 1
    for nothing in ([(0, math.nan)], [(0, math.inf), (1, -math.inf)]):
        assert "no value is finite" in drawn(Panel("x", (Line("x", nothing),)))[1]
    for flat in ([(3, 5.0)], [(0, 0.0), (1, 0.0)], [(0, -2.0), (1, -2.0)], [(0, 1e300), (1, -1e300)]):
        ElementTree.fromstring(svg(Panel("x", (Line("x", flat),), limits=(flat[0][0], flat[-1][0]))))


def test_a_long_curve_keeps_its_spikes():
    draw = random.Random(1)
    values = [draw.random() for _ in range(50_000)]
    values[31_234], values[777] = 9.0, -9.0
    (points,), _ = drawn(Panel("x", (Line("x", list(enumerate(values))),), limits=(0, 50_000)))
    assert len(points) <= 300
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    whole, _ = drawn(Panel("x", (Line("x", [(777, -9.0), (31_234, 9.0)]),), limits=(0, 50_000)))
    for expected in whole[0]:
        assert expected in points


def test_epochs_a_mark_and_names_are_written():
    lines = (Line("train/loss", [(0, 1.0), (9, 0.5)], faint=True), Line("val/loss", [(4, 1.0)], 1, dashed=True))
    panel = Panel("loss", lines, limits=(0, 9), epochs=((3.0, "1"), (6.0, "2")), mark=Mark(6.0, "they part at 6"))
    labels = drawn(panel)[1]
    assert [text for text in labels if text in ("epoch", "they part at 6")] == ["epoch", "they part at 6"]
    assert labels.count("2") + labels.count("1") >= 2
    figure = Curves([panel]).html()
    assert {"loss", " train/loss", " val/loss"} <= set(texts(figure))
    assert Curves([panel]).text().splitlines()[1].split()[:3] == ["train/loss", "1", "0.5"]
    many = Panel("x", tuple(Line(str(n), [(0, float(n))]) for n in range(20)))
    assert "and 4 more" in texts(Curves([many]).html())
    assert Curves([]).html() == Curves([]).text() == ""


def test_ticks_are_round_and_inside():
    draw = random.Random(2)
    for _ in range(300):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-9, 9)
        high = low + draw.uniform(0.01, 1) * 10 ** draw.randint(-3, 9)
        found = ticks(low, high, 6)
        assert 1 <= len(found) <= 8
        slack = (high - low) * 1e-6
        assert all(low - slack <= tick <= high + slack for tick in found)
        assert found == sorted(set(found))
    assert ticks(5.0, 5.0, 6) == [5.0]


# --- light and dark ---------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance, as the guidelines for accessible web pages define it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    brighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(("colours", "pages"), [(LIGHT, ("#ffffff", "#f7f7f7")), (DARK, ("#000000", "#1e1e1e"))])
def test_each_colour_stands_out_from_its_page(colours, pages):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert len(set(colours)) == len(LIGHT) == len(DARK)
    for colour in colours:
        assert min(contrast(colour, behind) for behind in pages) >= 3


def test_the_sheet_has_colours_for_light_and_dark_and_none_but_those_of_curves():
    def variables(colours):
        return "{" + "".join(f"--ps{n}:{c};" for n, c in enumerate(colours)) + "}"

    light, dark = variables(LIGHT), variables(DARK)
    media = STYLE.index("@media (prefers-color-scheme:dark){.purestep" + dark + "}")
    assert STYLE.index(".purestep" + light) < media
    # A notebook or a site that says which theme it has is right, whatever the browser prefers: its rules come last.
    for theme, chosen in {
        '[data-jp-theme-light="true"]': light,
        '[data-jp-theme-light="false"]': dark,
        '[data-vscode-theme-kind="vscode-light"]': light,
        '[data-vscode-theme-kind="vscode-dark"]': dark,
        '[data-md-color-scheme="default"]': light,
        '[data-md-color-scheme="slate"]': dark,
    }.items():
        at = STYLE.index(f"{theme} .purestep")
        assert at > media
        assert STYLE[at:].partition("{")[2].partition("}")[0] == chosen[1:-1]
    rest = STYLE.replace(light, "").replace(dark, "")
    assert not re.search(r"#[0-9a-f]{3}|rgb|hsl|background|color:(?!inherit|dark)", rest)
    assert STYLE.count("{") == STYLE.count("}")


def test_curves_have_the_colours_of_the_sheet_and_all_else_that_of_the_text():
    panel = Panel("x", tuple(Line(str(n), [(0, 1.0), (1, float(n))], n) for n in range(9)), mark=Mark(0.5, "m"))
    html = Curves([panel]).html()
    for element in parsed(html).iter():
        for name in ("stroke", "fill"):
            paint = element.get(name)
            if paint in (None, "none", "currentColor"):
                continue
            assert paint in LIGHT
            assert element.get("style") == f"{name}:var(--ps{LIGHT.index(paint)},{paint})"
    assert html.count(LIGHT[0]) > html.count(LIGHT[6]) > 0  # the eighth curve begins again
