"""Moving batches keeps their structure and values, and reading ahead is not seen in the state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from purestep import data


class Batch:
    """A batch object of another library."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> Batch:
        return Batch(str(device))


def test_structure_strings_and_objects() -> None:
    x = torch.ones(2)
    moved = data.to_device({"x": x, "names": ["a", "b"], "n": 3, "none": None, "other": Batch()}, "meta")
    assert moved["x"].device.type == "meta"
    assert moved["names"] == ["a", "b"]
    assert (moved["n"], moved["none"], moved["other"].device) == (3, None, "meta")
    assert data.to_device(x, "cpu") is x


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[::-1], lambda a: a.astype(">f4"), lambda a: a.T])
def test_arrays_become_tensors(view) -> None:
    array = view(np.random.rand(3, 4))
    for writeable in (True, False):
        array.setflags(write=writeable)
        assert np.array_equal(data.to_device(array, "cpu").numpy(), array)
    assert data.to_device(np.float32(2.5), "cpu").item() == 2.5
    text = np.array(["a"])
    assert data.to_device(text, "cpu") is text


class Spy:
    """A source that counts what was read of it."""

    def __init__(self) -> None:
        self.read = 0

    def length(self) -> int:
        return 6

    def open(self, epoch: int, batch: int, state: Any):
        for i in range(batch, 6):
            self.read = i + 1
            yield i

    def state(self) -> int:
        return self.read


def test_reading_ahead_is_bounded_and_not_seen() -> None:
    spy = Spy()
    source = data.prefetch(spy, "cpu", depth=2)
    seen = []
    for i in source.open(0, 0, None):
        seen.append(i)
        assert source.state() == i + 1
        assert spy.read == min(i + 3, 6)
    assert seen == list(range(6))
    assert source.length() == 6


def test_sample_count() -> None:
    assert data.sample_count({"a": 3, "b": torch.zeros(()), "c": torch.zeros(5, 2)}) == 5
