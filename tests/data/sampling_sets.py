"""Data sets and functions that worker processes of the tests import."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import torch


class Noisy:
    """Samples that draw from every global generator."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        noise = [random.random(), float(np.random.rand()), float(np.random.randn())]
        return {"index": i, "noise": torch.tensor(noise, dtype=torch.float64), "torch": torch.rand(2)}


class Broken:
    """Some samples raise."""

    def __init__(self, n: int, bad: tuple[int, ...]) -> None:
        self.n, self.bad = n, bad

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        if i in self.bad:
            raise OSError(f"image-{i}.png is truncated")
        return torch.tensor(i)


class Listed(Broken):
    """Samples that come from files, as torchvision's data sets list them."""

    def __init__(self, n: int, bad: tuple[int, ...]) -> None:
        super().__init__(n, bad)
        self.samples = [(f"/pictures/{i}.png", 0) for i in range(n)]


class Deadly(Noisy):
    """One sample kills the process that loads it."""

    def __getitem__(self, i: int) -> dict:
        if i == self.n - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Ragged(Noisy):
    """Samples of different shapes."""

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.zeros(i + 1)


class Where(Noisy):
    """Samples that say in which process they were loaded."""

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([os.getpid(), torch.get_num_threads()])


def keyed(sample: dict, key: torch.Tensor) -> dict:
    return {**sample, "key": key}


def noisy_collate(samples: list) -> dict:
    batch = torch.utils.data.default_collate(samples)
    return {**batch, "mix": torch.rand(()), "pick": random.random()}
