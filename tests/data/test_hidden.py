"""What the parts of a loader hide is found, captured and put back; what is not theirs is left alone."""

from __future__ import annotations

import functools
import json
import random as python_random
import secrets
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from purestep import tree
from purestep.data.hidden_state import HiddenState

GENERATORS: dict[str, tuple[Any, Any]] = {
    "python": (lambda: python_random.Random(3), lambda g: g.gauss(0, 1)),
    "pcg64": (lambda: np.random.default_rng(3), lambda g: g.random()),
    "mt19937": (lambda: np.random.Generator(np.random.MT19937(3)), lambda g: g.random()),
    "philox": (lambda: np.random.Generator(np.random.Philox(3)), lambda g: g.random()),
    "sfc64": (lambda: np.random.Generator(np.random.SFC64(3)), lambda g: g.random()),
    "random state": (lambda: np.random.RandomState(3), lambda g: g.normal()),
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand((), generator=g).item()),
}


class Box(Dataset):
    def __init__(self, **inside: Any) -> None:
        self.__dict__.update(inside)


def plain(captured: dict[str, Any]) -> dict[str, Any]:
    """What a snapshot makes of it."""
    leaves, structure = tree.flatten(captured)
    back = [leaf.clone() if isinstance(leaf, torch.Tensor) else json.loads(json.dumps(leaf)) for leaf in leaves]
    return tree.unflatten(structure, back)


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_go_on_where_they_were(kind: str) -> None:
    make, draw = GENERATORS[kind]
    generator = make()
    draw(generator)
    captured = plain(HiddenState({"dataset": Box(rng=generator)}).capture())
    assert list(captured) == ["dataset.rng"]
    expected = [draw(generator) for _ in range(3)]
    other = make()
    HiddenState({"dataset": Box(rng=other)}).restore(captured)
    assert [draw(other) for _ in range(3)] == expected


def test_they_are_found_in_wrappers_transforms_and_functions() -> None:
    def rng() -> python_random.Random:
        return python_random.Random(1)

    inner, of_function = rng(), rng()

    def collate(samples: list[Any], power: Any = None) -> float:
        return of_function.random()

    parts = {
        "dataset": Subset(Box(transform=[None, {"flip": Box(rng=inner)}]), [0]),  # type: ignore[arg-type]
        "sampler": Box(rng=inner),
        "collate_fn": functools.partial(collate, power=rng()),
    }
    assert sorted(HiddenState(parts).capture()) == [
        "collate_fn.func.of_function",
        "collate_fn.keywords['power']",
        "dataset.dataset.transform[1]['flip'].rng",
    ]


def test_what_is_not_of_the_data_is_left_alone() -> None:
    known = np.random.default_rng(1)
    model = nn.Linear(1, 1)
    model.rng = python_random.Random(1)
    box = Box(
        known=known,
        model=model,
        module=python_random,
        kind=Box,
        loader=DataLoader(Box(rng=python_random.Random(1)), 1),
        ours=python_random._inst,
        numpys=np.random.mtrand._rand,
        torchs=torch.default_generator,
        system=secrets.SystemRandom(),
        large=[python_random.Random(1)] * 1000,
    )
    box.itself = box
    assert HiddenState({"dataset": box}, known=[known]).capture() == {}


def test_nothing_is_iterated_or_called() -> None:
    class Reads(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    class Mapped(dict[str, int]):
        items = keys = values = __iter__ = None  # type: ignore[assignment]

    batches, mapped = Reads([1, 2]), Mapped(a=1)
    assert (
        HiddenState({"loader": lambda: (batches, mapped), "dataset": Box(batches=batches, mapped=mapped)}).capture()
        == {}
    )


def test_large_data_sets_are_not_searched_through() -> None:
    chain: Any = python_random.Random(1)
    for _ in range(10):
        chain = Box(inner=chain)
    wide = Box(**{f"a{i}": Box(**{f"b{j}": Box(x=1.5) for j in range(15)}) for i in range(60)})
    hidden = HiddenState({"deep": chain, "wide": wide})
    assert hidden.capture() == {}
    assert len(hidden._owners) <= 500


def test_data_sets_with_a_state_are_captured_and_other_things_with_one_are_not() -> None:
    class Stateful(Box):
        def state_dict(self) -> dict[str, Any]:
            return {"i": self.i}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.i = state["i"]

    class Unsavable(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {"i": object()}

    class Meter:
        """No data set: it counts, say, and belongs to somebody else."""

        state_dict, load_state_dict = Stateful.state_dict, Stateful.load_state_dict

    data = Stateful(i=3)
    hidden = HiddenState(
        {"dataset": TensorDataset(torch.ones(2)), "sampler": data, "collate_fn": Box(a=Unsavable(i=1), b=Meter())}
    )
    captured = hidden.capture()
    assert list(captured) == ["sampler"]
    data.i = 5
    hidden.restore(captured)
    assert data.i == 3
    assert hidden.changed() == ["collate_fn.a"]


def test_numbers_that_change_are_told_of() -> None:
    class Told(Box):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    told, data = Told(epoch=0), Box(calls=0, name="a", cache=None, share=0.5, flag=True)
    hidden = HiddenState({"sampler": told, "dataset": data})
    assert hidden.changed() == []
    told.set_epoch(3)
    data.calls, data.name, data.cache, data.flag = 4, "b", 7, False
    assert hidden.changed() == ["dataset.calls", "dataset.name"]
