"""Descriptions of values: equal for equal values, without addresses, whatever the values are."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import json
import math
import pathlib
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep.loop.stable_json import source_digest, stable

HERE = __name__
FACTOR = 2.0


class Colour(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", ["x", "y"])


@dataclasses.dataclass
class Settings:
    rate: float
    path: str = dataclasses.field(default="", compare=False)
    seen: list = dataclasses.field(default_factory=list, init=False)


class Plain:
    """Keeps one argument under its name, one under another, and counts."""

    def __init__(self, rate, hidden=3, *, named=None, num_workers=0):
        self.rate, self._hidden, self.named, self.num_workers = rate, hidden, named, num_workers
        self.count = 0


class Says:
    def __init__(self, value):
        self.value = value

    def identity(self):
        return self.value


class Loss:
    def __init__(self, margin):
        self.margin = margin

    def __call__(self, net, batch):
        return net(batch).mean() + self.margin


class Criterion(nn.Module):
    def forward(self, x):
        return x.mean()


class Raises:
    @property
    def __dict__(self):
        raise RuntimeError("never")

    def __repr__(self):
        raise RuntimeError("never")

    def __len__(self):
        raise RuntimeError("never")


def function(net, batch, gain=0.5):
    return net(batch).mean() * FACTOR * gain


def described(name, **more):
    return {"class": f"{HERE}.{name}", **more}


TABLE = {
    "scalars": ([None, True, 3, 0.5, "a"], [None, True, 3, 0.5, "a"]),
    "floats that JSON lacks": ([math.inf, -math.inf, math.nan], ["inf", "-inf", "nan"]),
    "numpy scalars": ([np.float32(0.5), np.int64(3)], [0.5, 3]),
    "enum": (Colour.RED, f"{HERE}.Colour.RED"),
    "sets": ({"b", "a", "c"}, ["a", "b", "c"]),
    "keys that are no strings": ({1: 2, None: 3}, {"1": 2, "null": 3}),
    "named tuple": (Point(1, 2), described("Point", x=1, y=2)),
    "path": (pathlib.Path("a") / "b", "a/b"),
    "dtype and device": ([torch.float16, torch.device("cpu")], ["torch.float16", "device(type='cpu')"]),
    "small tensor": (torch.tensor([1, 2]), {"tensor": "int64[2]", "values": [1, 2]}),
    "parameter": (nn.Parameter(torch.ones(1)), {"tensor": "float32[1]", "values": [1.0]}),
    "no content": (torch.empty(2, device="meta"), {"tensor": "float32[2]"}),
    "large array": (np.zeros(20_000), {"tensor": "float64[20000]"}),
    "texts in an array": (np.array(["a"]), {"tensor": "str32[1]"}),
    "class": (Plain, f"{HERE}.Plain"),
    "dataclass": (Settings(0.5, "somewhere"), described("Settings", rate=0.5)),
    "object": (Plain(1, named={"a"}), described("Plain", rate=1, named=["a"])),
    "what says it": ([Says({"a": 1}), Says(None), Says([Plain])], [described("Says", a=1), None, [f"{HERE}.Plain"]]),
    "without anything to tell": (object(), {"class": "builtins.object"}),
    "what raises": (Raises(), described("Raises")),
    "built-in function": (len, {"function": "builtins.len"}),
    "library function": (nn.functional.cross_entropy, {"function": "torch.nn.functional.cross_entropy"}),
    "loss of a library": (
        nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.ones(2)),
        {
            "class": "torch.nn.modules.loss.CrossEntropyLoss",
            "weight": {"tensor": "float32[2]", "values": [1.0, 1.0]},
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.1,
        },
    ),
    "model": (nn.Linear(2, 3), {"class": "torch.nn.modules.linear.Linear"}),
    "transformation": (
        ps.optim.clip_by_global_norm(0.5),
        {"class": "purestep.ClipByGlobalNorm", "max_norm": 0.5},
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_values_are_described_as_the_table_says(case):
    value, expected = TABLE[case]
    found = stable(value)
    assert found == expected
    assert json.loads(json.dumps(found)) == found


def test_functions_are_told_by_name_source_and_constants():
    found = stable(function)
    assert found["function"] == f"{HERE}.function"
    assert found["reads"] == {"FACTOR": 2.0, "gain": 0.5}
    assert len(found["source"]) == 16


def test_what_a_function_is_made_of_counts():
    def outer(inner, scale):
        @functools.wraps(inner)
        def around(net, batch):
            return inner(net, batch) * scale

        return around

    one, same, other, another = outer(function, 1), outer(function, 1), outer(function, 2), outer(Plain.__init__, 1)
    assert stable(one) == stable(same)
    assert len({json.dumps(stable(f)) for f in (one, other, another, function)}) == 4
    assert stable(one)["wraps"] == stable(function)
    assert stable(functools.partial(function, gain=1)) != stable(functools.partial(function, gain=2))
    assert stable(Plain(1).__init__)["of"] == stable(Plain(1))
    assert stable(Loss(0.5))["__call__"]["function"] == f"{HERE}.Loss.__call__"
    assert stable(Criterion())["forward"]["function"] == f"{HERE}.Criterion.forward"


def test_what_a_function_changes_itself_is_no_constant_of_it():
    calls = 0

    def counting(net, batch):
        nonlocal calls
        calls += 1
        return net(batch).mean()

    before = stable(counting)
    counting(nn.Identity(), torch.ones(1))
    assert (calls, stable(counting)) == (1, before)
    assert "reads" not in before


def test_lambdas_are_told_from_the_statement_around_them():
    one = {"f": lambda x: x + 1, "until": 3}["f"]
    same = {"f": lambda x: x + 1, "until": 4}["f"]
    other = {"f": lambda x: x + 2, "until": 3}["f"]
    renamed = {"f": lambda y: y + 1, "until": 3}["f"]
    digests = [source_digest(f) for f in (one, same, other, renamed)]
    assert None not in digests
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_function_without_source_has_no_digest():
    scope = {}
    exec("def f(x): return x", scope)
    assert source_digest(scope["f"]) is None
    assert stable(scope["f"])["source"] is None


def test_no_module_is_touched_to_find_a_source(monkeypatch):
    """Modules that load what they are asked for would be loaded by a look at each of them."""
    asked = []

    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            asked.append(name)
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "lazy_of_this_test", Lazy("lazy_of_this_test"))
    assert stable(function)["source"] is not None
    assert asked == []


def test_long_values_are_bounded_and_still_told_apart():
    assert stable("a" * 300) != stable("a" * 299 + "b")
    assert stable(2**300) != stable(2**300 + 1)
    assert stable([0.5] * 100) == stable([0.5] * 100)
    assert stable([0.5] * 100) != stable([0.5] * 99 + [1.0])
    assert stable(b"one") != stable(b"two")
    huge = [[[[[list(range(50)) for _ in range(50)] for _ in range(50)] for _ in range(50)]]]
    assert len(json.dumps(stable(huge))) < 300_000


def test_values_that_contain_themselves_end():
    loop = []
    loop.append(loop)
    chain = Says(None)
    chain.value = chain
    assert len(json.dumps(stable([loop, chain]))) < 1000

    def recursive(n):
        return recursive(n - 1) if n else 0

    assert stable(recursive)["reads"]["recursive"] == {"function": stable(recursive)["function"]}


def test_large_tensors_are_not_read_and_small_ones_are_told_apart():
    x = torch.arange(100.0)
    assert stable(x) == stable(x.clone())
    assert stable(x) != stable(x + 1)
    assert stable(torch.zeros(1 << 15)) == stable(torch.ones(1 << 15))


def test_generators_are_left_alone():
    state, numbers = torch.get_rng_state(), random.getstate()
    stable([ps.data.batches(torch.arange(10), 2), nn.Dropout(0.1), torch.Generator()])
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers
