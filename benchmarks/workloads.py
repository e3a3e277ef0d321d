"""What is trained: four models as torch modules, their first weights and batches as numpy arrays.

Every peer starts from the same arrays and reads the same batches, so that losses can be compared. Modules are named so
that flax can name its own alike (`jax_models`). torch is imported by the functions that need it: the JAX peer does not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
BATCHES = 8
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model and its data.

    Attributes:
        name: short name.
        title: what the table says.
        shapes: shape of each parameter by torch name; buffers start at torch's defaults.
        data: makes one batch (x, y) from a generator.
        kind: which model, "mlp", "gpt" or "cnn".
        sizes: what the model is made of.
    """

    name: str
    title: str
    kind: str
    sizes: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    data: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]

    def arrays(self, seed: int = 0) -> Arrays:
        """Return the first weights, by torch name: ones for scales, zeros for other vectors, else scaled uniform."""
        rng, made = np.random.default_rng(seed), {}
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                made[name] = (np.ones if name.endswith("weight") else np.zeros)(shape, np.float32)
            else:
                bound = 0.05 if "embed" in name else 1 / math.sqrt(math.prod(shape[1:]))
                made[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        return made

    def batches(self, seed: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the batches that every peer cycles through."""
        rng = np.random.default_rng(seed)
        return [self.data(rng) for _ in range(BATCHES)]

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def _mlp(name: str, title: str, widths: list[int], batch: int) -> Workload:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"layer{i}.weight": (b, a), f"layer{i}.bias": (b,)}

    def data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(size=(batch, widths[0])).astype(np.float32), rng.integers(0, widths[-1], batch)

    return Workload(name, title, "mlp", {"widths": widths}, shapes, data)


def _gpt(name: str, title: str, layers: int, width: int, length: int, batch: int, vocabulary: int) -> Workload:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocabulary, width), "embed_position.weight": (length, width)}
    for i in range(layers):
        for part, (b, a) in {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}.items():
            shapes |= {f"block{i}.{part}.weight": (b * width, a * width), f"block{i}.{part}.bias": (b * width,)}
        for part in ("norm1", "norm2"):
            shapes |= {f"block{i}.{part}.weight": (width,), f"block{i}.{part}.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (vocabulary, width), "head.bias": (vocabulary,)}

    def data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        text = rng.integers(0, vocabulary, (batch, length + 1))
        return text[:, :-1].copy(), text[:, 1:].reshape(-1).copy()

    sizes = {"layers": layers, "width": width, "length": length, "vocabulary": vocabulary, "heads": width // 32}
    return Workload(name, title, "gpt", sizes, shapes, data)


def _cnn(name: str, title: str, channels: list[int], side: int, batch: int) -> Workload:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(itertools.pairwise(channels)):
        shapes |= {f"conv{i}.weight": (b, a, 3, 3), f"norm{i}.weight": (b,), f"norm{i}.bias": (b,)}
    shapes |= {"head.weight": (10, channels[-1]), "head.bias": (10,)}

    def data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(size=(batch, channels[0], side, side)).astype(np.float32), rng.integers(0, 10, batch)

    return Workload(name, title, "cnn", {"channels": channels}, shapes, data)


ALL: dict[str, Workload] = {
    w.name: w
    for w in (
        _mlp("mlp", "MLP 64-128-128-10, batch 32", [64, 128, 128, 10], 32),
        _gpt("gpt", "GPT, 4 layers of 128, 64 tokens, batch 8", 4, 128, 64, 8, 256),
        _cnn("cnn", "CNN on 32x32, batch 32", [3, 32, 64, 64], 32, 32),
        _mlp("wide", "MLP with 50 M parameters, batch 16", [4096, 4096, 4096, 4096], 16),
        _mlp("mid", "MLP with 12 M parameters, batch 32", [2048, 2048, 2048, 2048], 32),
        _mlp("tiny", "MLP 8-16-4, batch 4", [8, 16, 4], 4),
    )
}


def module(work: Workload) -> Any:
    """Return the model of a workload as a torch module with its first weights."""
    import torch

    from benchmarks import torch_models

    made = torch_models.MODELS[work.kind](work.sizes)
    weights = {name: torch.from_numpy(array) for name, array in work.arrays().items()}
    missing, unexpected = made.load_state_dict(weights, strict=False)
    buffers = {name for name, _ in made.named_buffers()}
    if set(missing) - buffers or unexpected:
        raise ValueError(f"{work.name}: missing {missing}, unexpected {unexpected}")
    return made
