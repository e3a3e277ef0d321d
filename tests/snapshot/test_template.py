from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from purestep import tree
from purestep.errors import TemplateMismatch
from purestep.snapshot.codec import encode, from_text
from purestep.snapshot.template import build, check, device_of
from purestep.state import TrainState


class Pair(NamedTuple):
    left: Any
    right: Any


@tree.pytree
class State:
    params: Any
    step: Any
    patience: Any = tree.static(default=3)


def load(value, like=...):
    encoded = encode(value)
    check(encoded.structure, encoded.leaves, like)

    def value_of(index, like):
        leaf = encoded.leaves[index]
        return encoded.values[index] if leaf.text is None else from_text(leaf.kind, leaf.text)

    return build(encoded.structure, like, value_of)


def mismatch(value, like) -> str:
    with pytest.raises(TemplateMismatch) as caught:
        load(value, like)
    return str(caught.value)


def test_every_difference_is_listed_with_its_path():
    stored = State({"0.weight": torch.zeros(3), "same": torch.zeros(2), "old": torch.zeros(1), "n": [1, 2]}, 5)
    like = State({"0.weight": torch.zeros(4), "same": torch.zeros(2), "new": torch.zeros(7), "n": (1, 2)}, 0.5)
    assert mismatch(stored, like) == (
        "the snapshot does not have the structure of the template\n"
        "  where:   params['0.weight']: stored float32[3], template float32[4]\n"
        "           params['old']: stored float32[1], missing in the template\n"
        "           params['n']: stored a list, template a tuple\n"
        "           params['new']: not stored, template float32[7]\n"
        "           step: stored int, template float\n"
        "  instead: pass like= a tree of the stored structure, with ... in place of each subtree "
        "to take as it is stored"
    )


@pytest.mark.parametrize(
    ("stored", "like", "text"),
    [
        (torch.zeros(2), torch.zeros(2).double(), "the root: stored float32[2], template float64[2]"),
        (torch.zeros(2), torch.zeros(2, 1), "the root: stored float32[2], template float32[2, 1]"),
        (torch.zeros(2), np.zeros(2, np.float32), "stored float32[2], template numpy float32[2]"),
        (np.zeros(2), np.zeros(2, np.float32), "stored numpy float64[2], template numpy float32[2]"),
        (np.zeros(2), np.zeros(2, ">f8"), "stored numpy float64[2], template numpy float64[2]"),
        (np.float32(1), 1.0, "stored numpy float32[], template float"),
        (True, 1, "stored bool, template int"),
        (None, 1.0, "stored None, template float 1.0"),
        (1.0, None, "stored float, template None"),
        ([1], [1, 2], "[1]: not stored, template int 2"),
        ([1, 2], [1], "[1]: stored int, missing in the template"),
        ({1: 0}, {"1": 0}, "[1]: stored int, missing in the template"),
        (OrderedDict(a=1), {"a": 1}, "stored a OrderedDict, template a dict"),
        (Pair(1, 2), (1, 2), "Pair, template a tuple"),
        ([[]], [3], "[0]: stored a list, template int 3"),
        ([3], [[]], "[0]: stored int, template a list"),
        ([3], [object], "[0]: stored int, template a leaf of type type"),
    ],
)
def test_each_difference_is_refused(stored, like, text):
    assert text in mismatch(stored, like)


def test_many_differences_are_counted():
    stored = {str(i): i for i in range(100)}
    text = mismatch(stored, {})
    assert "and 60 more" in text
    assert text.count("missing in the template") == 40


def test_ellipsis_takes_what_is_stored_anywhere():
    value = State({"w": torch.zeros(3), "deep": {"x": [1, 2]}}, 5, patience=9)
    back = load(value, State({"w": ..., "deep": ...}, ..., patience=1))
    assert (back.params["deep"], back.step, back.patience) == ({"x": [1, 2]}, 5, 1)
    assert load(value).patience == 9  # without a template, static fields are the stored ones


def test_order_of_keys_and_values_of_python_leaves():
    assert list(load({"a": 1, "b": 2}, {"b": 0, "a": 0}).items()) == [("b", 2), ("a", 1)]
    assert list(load({"b": 1, "a": 2}).items()) == [("b", 1), ("a", 2)]


def test_fake_and_meta_tensors_mean_the_cpu():
    devices = []
    with FakeTensorMode():
        fake = torch.empty(3, device="cpu")
    for like in (torch.empty(3, device="meta"), fake, torch.empty(3), ...):
        encoded = encode(torch.zeros(3))
        check(encoded.structure, encoded.leaves, like)
        build(encoded.structure, like, lambda index, like: devices.append(device_of(like)))
    assert devices == [None] * 4


def test_a_class_of_purestep_is_known_wherever_its_file_lies():
    """Also in a process that has not imported it, and under the name that an earlier version stored."""
    assert tree.node_name(TrainState) == "purestep.TrainState"
    assert tree.node_class("purestep.once.there.TrainState") is TrainState
    program = """
        import purestep as ps
        from purestep.snapshot.template import build, check
        for name in ("purestep.SophiaState", "purestep.optim.somewhere_else.SophiaState", "purestep.Patience"):
            assert ps.tree.node_class(name) is None or "Sophia" in name
            {head}
            try:
                check(structure, [], ...)
            except ps.errors.TemplateMismatch as error:
                assert "was stored with fields" in str(error), error  # the class was found
            else:
                raise SystemExit(f"{{name}} was taken with no field")
    """.format(head='structure = {"node": "pytree", "class": name, "fields": [], "static": {}, "items": []}')
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_classes_come_from_the_registry_or_the_template_only():
    encoded = encode(State(1, 2))
    encoded.structure["class"] = "elsewhere.State"
    with pytest.raises(
        TemplateMismatch, match=r"a elsewhere\.State, which no imported module registers; import elsewhere"
    ):
        check(encoded.structure, encoded.leaves, ...)
    check(encoded.structure, encoded.leaves, State(0, 0))  # a class that moved to another module is known by its name
    assert type(build(encoded.structure, State(0, 0), lambda index, like: index)) is State
    encoded.structure["fields"] = ["params", "count"]
    encoded.structure["class"] = tree.node_name(State)
    with pytest.raises(TemplateMismatch, match=r"was stored with fields \['params', 'count'\] and \['patience'\]"):
        check(encoded.structure, encoded.leaves, ...)
    with pytest.raises(TemplateMismatch, match=r"count: stored int, missing in the template\n +step: not stored"):
        check(encoded.structure, encoded.leaves, State(0, 0))


def test_what_only_a_template_can_give():
    assert "static builtins.builtin_function_or_method, which is no JSON" in mismatch(State(1, 2, patience=print), ...)
    assert "static builtins.set" in mismatch([State(1, 2, patience=({"a": [set()]},))], ...)
    assert "Pair can be restored only into a template" in mismatch({"p": Pair(1, 2)}, ...)
    static = (1, [2.5, None], {"a": (True,)})
    assert load(State(1, 2, patience=static)).patience == static
