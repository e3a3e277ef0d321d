"""HTML views: what is shown, that it is well formed, and that nothing in it is taken for markup."""

from __future__ import annotations

import collections
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from purestep import tree
from purestep.display import notebook
from purestep.tree import pytree, static


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps tags, titles and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.titles, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.stack.append(tag)
        self.tags.append((tag, "open" in dict(attrs)))
        if "title" in dict(attrs):
            self.titles.append(dict(attrs)["title"])

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data if self.stack[-1:] != ["style"] else ""


@pytree
class Part:
    weight: torch.Tensor
    layers: list
    table: dict
    rate: float = 0.5
    name: str = static(default="<part & co>")


Pair = collections.namedtuple("Pair", "left right")


def some_tree():
    return Part(
        weight=torch.tensor([[1.0, 2.0], [3.0, float("nan")]]),
        layers=[torch.ones(3, dtype=torch.bfloat16), np.arange(4), (torch.tensor(7), None)],
        table={"b": Pair(torch.tensor(2.5), "<b>"), "a'\"<x>": torch.zeros(0), "c": torch.tensor([True, False, True])},
    )


def read(value, **kwargs) -> Reader:
    return Reader(notebook.show(value, **kwargs)._repr_html_())


def test_every_leaf_is_shown_under_the_path_that_reads_it():
    state = some_tree()
    reader = read(state, root="state")
    for path in tree.paths(state, "state"):
        assert path in reader.titles
        eval(path, {"state": state})
    for text in ["float32[2, 2]", "16 bytes", "1 not finite", "2 ± 0.816, in [1, 3]", "bfloat16[3]", "int64[4]"]:
        assert text in reader.text
    assert "= 7" in reader.text
    assert "= 2.5" in reader.text
    assert "2 true" in reader.text
    assert "float 0.5" in reader.text
    assert "name='<part & co>'" in reader.text


def test_bytes_and_leaves_of_a_node_are_summed():
    assert "2 leaves, 20 bytes" in read({"a": torch.zeros(3), "b": [torch.zeros(2)]}).text
    assert "1 leaf, 8 bytes" in read([torch.tensor(1)]).text


def test_nothing_is_taken_for_markup():
    evil = "</details><script>alert(1)</script>"
    view = notebook.show(
        {evil: torch.ones(2), "x": evil, "d": Part(torch.ones(1), [], {evil: 1}, name=evil)}, root=evil
    )
    reader = Reader(view._repr_html_())
    assert {tag for tag, _ in reader.tags} == {"div", "style", "details", "summary", "b", "span"}
    assert "<script" not in view._repr_html_()
    differences = tree.diff({evil: torch.ones(2)}, {evil: torch.zeros(2)}, root=evil)
    assert "<script" not in notebook.show(differences)._repr_html_()


def test_the_first_levels_are_open_unless_they_are_long():
    reader = read({"a": {"b": {"c": torch.ones(1)}}, "many": list(range(100))})
    assert [unfolded for tag, unfolded in reader.tags if tag == "details"] == [True, True, False, False]


def test_a_huge_tree_is_cut_and_says_so():
    value = [{"w": torch.ones(1)} for _ in range(500)]
    reader = read(value, max_leaves=100)
    assert sum(title.endswith("['w']") for title in reader.titles) == 100
    assert reader.text.count("more leaves than are shown") == 1
    text = repr(notebook.show(value, max_leaves=100)).splitlines()
    assert len(text) == 101
    assert text[-1] == "... and 400 more"


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (torch.full((3,), 2.0, dtype=torch.float8_e4m3fn), "float8_e4m3fn[3] 3 bytes · 2 ± 0, in [2, 2]"),
        (torch.tensor([3 + 4j, 0j]), "complex64[2] 16 bytes · magnitude 2.5 ± 2.5, in [0, 5]"),
        (torch.full((2,), float("inf")), "float32[2] 8 bytes · 2 not finite"),
        (torch.zeros(0, 3), "float32[0, 3] 0 bytes"),
        (torch.zeros(3, device="meta"), "float32[3] 12 bytes, meta"),
        (torch.zeros(100_001), "float32[100001] 400,004 bytes"),
        (np.float32(1.5), "float32[] 4 bytes · = 1.5"),
        (np.array(["a"]), "[1] 4 bytes"),
        (nn.Parameter(torch.ones(2)), "float32[2] 8 bytes · 1 ± 0, in [1, 1]"),
        ("x" * 500, "str 'xxx"),
        (None, "None"),
        (b"ab", "bytes b'ab'"),
    ],
)
def test_leaves_of_any_kind(leaf, text):
    shown = read([leaf]).text
    assert text in shown
    assert "…" not in shown or isinstance(leaf, str)


def test_showing_changes_nothing():
    state = some_tree()
    before, generator = tree.digest(state), torch.get_rng_state()
    read(state)
    repr(notebook.show(state))
    assert tree.digest(state) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_terminal_gets_a_line_a_leaf():
    view = notebook.show(some_tree(), root="state")
    lines = repr(view).splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == tree.paths(some_tree(), "state")
    assert lines[0] == "state.weight: float32[2, 2]"


def test_differences_are_a_table():
    left = {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(2), "c": 1, "same": 0}
    right = {"a": torch.tensor([1.0, 2.0000002]), "b": torch.ones(3), "d": 1, "same": 0}
    found = tree.diff(left, right, root="p")
    reader = read(found)
    assert sum(tag == "tr" for tag, _ in reader.tags) == 5
    for text in ["p['a']", "2.384e-07", "1.192e-07", "float32[3]", "missing"]:
        assert text in reader.text
    assert repr(notebook.show(found)) == str(found)
    assert found._repr_html_() == notebook.show(found)._repr_html_()
    assert read(tree.diff(left, left)).text == "equal"
