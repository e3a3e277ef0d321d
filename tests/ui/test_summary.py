"""The table of a model or state: what is counted where."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from purestep import display
from purestep.bits import human_bytes
from purestep.errors import TreeError
from purestep.tree import pytree, static


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())


def test_a_module_by_depth():
    model = nn.Sequential(block(3), block(5), nn.Linear(5, 2, dtype=torch.float64))
    one = display.summary(model)
    assert [(r.name, r.kind, r.trained, r.buffers) for r in one.rows] == [
        ("0", "Sequential", 12 + 6, 7),
        ("1", "Sequential", 30 + 10, 11),
        ("2", "Linear", 12, 0),
    ]
    assert one.rows[0].dtypes == ("float32", "int64")
    assert one.rows[2].bytes == 12 * 8
    two = display.summary(model, depth=2)
    assert [(r.name, r.kind, r.trained) for r in two.rows][:2] == [("0.0", "Linear", 12), ("0.1", "BatchNorm1d", 6)]
    assert (two.total.trained, two.total.bytes) == (one.total.trained, one.total.bytes)
    assert one.total.trained == sum(p.numel() for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert one.total.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert one.optimizer_bytes is None


def test_frozen_and_tied_weights():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    table = display.summary(model)
    assert [(r.name, r.trained, r.frozen, r.trainable()) for r in table.rows] == [
        ("0", 28, 0, "yes"),
        ("1", 4, 16, "in part"),
    ]
    model[1].requires_grad_(False)
    assert display.summary(model).rows[1].trainable() == "no"
    assert str(display.summary(model)).endswith("28 trained and 20 frozen parameters")


@pytree
class SomeState:
    """Of the shape of a TrainState, as far as a summary looks at it."""

    params: dict
    buffers: dict
    opt_state: dict
    model: object = static(default=None)


class Definition:
    def __init__(self, module):
        self.module = module


def state_of(model, frozen=()):
    params = {n: p.detach() for n, p in model.named_parameters() if n not in frozen}
    buffers = dict(model.named_buffers()) | {n: p.detach() for n, p in model.named_parameters() if n in frozen}
    count = torch.tensor(0)
    opt_state = {"mu": {n: torch.zeros_like(p) for n, p in params.items()}, "count": count, "again": count}
    return SomeState(params, buffers, opt_state, Definition(model))


def test_a_state_counts_like_its_module_and_knows_its_frozen_parameters():
    model = nn.Sequential(block(3), nn.Linear(3, 2))
    state = state_of(model, frozen=("0.0.weight",))
    table, expected = display.summary(state), display.summary(model)
    assert [r.name for r in table.rows] == [r.name for r in expected.rows]
    assert [r.kind for r in table.rows] == ["Sequential", "Linear"]
    assert (table.rows[0].trained, table.rows[0].frozen, table.rows[0].buffers) == (9, 9, 7)
    assert table.total.bytes == expected.total.bytes
    assert table.optimizer_bytes == table.total.trained * 4 + 8
    assert re.search(r"\n\d+ B of optimizer state$", str(table))


def test_without_a_model_frozen_parameters_are_buffers():
    state = state_of(nn.Linear(3, 2), frozen=("bias",)).replace(model=None)
    assert [(r.name, r.kind, r.trained, r.buffers) for r in display.summary(state).rows] == [
        ("weight", "", 6, 0),
        ("bias", "", 0, 2),
    ]


def test_any_tree_of_tensors():
    table = display.summary({"a": [torch.zeros(2), torch.zeros(3, dtype=torch.bool)], "b": torch.zeros(()), "n": 3})
    assert [(r.name, r.trained, r.dtypes) for r in table.rows] == [
        ("a", 5, ("bool", "float32")),
        ("b", 1, ("float32",)),
    ]
    assert display.summary(torch.zeros(4)).total.trained == 4


def test_one_tensor_at_two_places_of_a_tree_is_counted_once():
    w = torch.zeros(3, 2)
    assert display.summary({"a": w, "b": w, "c": w.view(3, 2)}).total.trained == 6
    assert display.summary({"a": w, "b": w.t()}).total.trained == 12


def test_tensors_without_memory_are_counted():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    assert display.summary(model).total.trained == 32
    with torch._subclasses.FakeTensorMode():
        assert display.summary({"a": torch.empty(3), "b": torch.empty(3)}).total.trained == 6


def test_the_table_is_aligned():
    text = str(display.summary(nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(10))))
    lines = text.splitlines()
    assert lines[0].split() == ["name", "type", "params", "buffers", "bytes", "dtype", "trained"]
    rules = [i for i, line in enumerate(lines) if set(line) == {"-", " "}]
    assert rules == [1, 4]
    starts = [m.start() for m in re.finditer(r"\S+", lines[0])]
    for line in lines[2:4]:
        assert all(line[starts[i] - 1] == " " for i in (1, 5, 6))
    assert "1,001,000" in lines[2]
    assert "3.8 MiB" in lines[2]


def test_nothing_to_summarise_is_an_error():
    for nothing in ({}, nn.ReLU(), {"n": 3}):
        with pytest.raises(TreeError, match="there is no tensor to summarise"):
            display.summary(nothing)
    with pytest.raises(TreeError, match="depth=0 is not a number of levels"):
        display.summary(nn.Linear(1, 1), depth=0)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**60, "1024.0 PiB")])
def test_bytes_as_people_read_them(count, text):
    assert human_bytes(count) == text
