"""What a row may hold besides numbers: `Image`, `Histogram` and `Text`, as values on the host.

They copy what they are made of, so a state that is donated afterwards does not change them. How each looks as a file is
here, too: PNG, npz and text.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from purestep.arguments import Count, checked
from purestep.errors import MetricError, explain
from purestep.loggers.base import Media

_BINS = 10_000
_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels: what a PNG calls them


@checked(MetricError)
@dataclasses.dataclass(frozen=True, eq=False)
class Image(Media):
    """A picture, or several of one size in a grid, for a row of the log.

    Args:
        pixels: `[H, W]`, `[C, H, W]` or `[N, C, H, W]` with one (grey), two (grey, alpha), three (RGB) or four (RGBA)
            channels. Numbers with a point are from 0 (black) to 1, and cut off there; whole ones are from 0 to 255.

    Attributes:
        pixels: `[H, W, C]`, uint8, on the host.

    Raises:
        MetricError: it has another shape, or no size.

    Examples:
        >>> Image(torch.rand(6, 1, 28, 28)).pixels.shape     # a grid of 2 x 3, one pixel between
        (57, 86, 1)
    """

    suffix: ClassVar[str] = ".png"
    pixels: Any

    def __post_init__(self) -> None:
        given = _tensor("Image", self.pixels)
        if given.ndim not in (2, 3, 4) or not given.numel() or given.shape[-3:-2] not in ((), (1,), (2,), (3,), (4,)):
            raise MetricError(
                explain(
                    "an image is [H, W], [C, H, W] or [N, C, H, W] with 1 to 4 channels",
                    where=f"Image(pixels): {given.dtype}{list(given.shape)}",
                    instead="x.permute(2, 0, 1), if channels come last",
                )
            )
        scaled = given.float().nan_to_num(0.0).clamp(0, 1).mul(255).round() if given.is_floating_point() else given
        whole = scaled.clamp(0, 255).to(torch.uint8)
        pixels = whole[None] if whole.ndim == 2 else _grid(whole) if whole.ndim == 4 else whole
        object.__setattr__(self, "pixels", pixels.permute(1, 2, 0).contiguous().numpy())

    def content(self) -> bytes:
        """Return it as a PNG file."""
        height, width, channels = self.pixels.shape
        lines = np.concatenate([np.zeros((height, 1), np.uint8), self.pixels.reshape(height, -1)], axis=1)
        head = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
        parts = [(b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)

    def _repr_png_(self) -> bytes:
        return self.content()

    def __repr__(self) -> str:
        height, width, channels = self.pixels.shape
        return f"<Image of {height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}>"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _grid(images: Tensor) -> Tensor:
    """Lay `[N, C, H, W]` out as one `[C, H', W']`, about as many rows as columns, a black line between them."""
    number, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(number)))
    rows = -(-number // columns)
    sheet = images.new_zeros(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


@checked(MetricError)
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Histogram(Media):
    """The distribution of numbers, for a row of the log: of weights, activations, gradients.

    Args:
        values: a tensor of any shape; those that are not finite are counted apart.
        bins: number of bins, 10,000 at most, of equal width from the smallest to the largest.

    Attributes:
        counts: `[bins]`, int64.
        edges: `[bins + 1]`, float64, ascending.
        total: sum of the values.
        squares: sum of their squares.
        not_finite: how many are not finite.

    Raises:
        MetricError: they are no real numbers.

    Examples:
        >>> Histogram(torch.tensor([0.0, 0.1, 1.0, float("nan")]), bins=2)
        <Histogram of 3 values from 0 to 1, 1 not finite>
    """

    suffix: ClassVar[str] = ".npz"
    counts: Any
    edges: Any
    total: float
    squares: float
    not_finite: int

    def __init__(self, values: Any, bins: Count = 64) -> None:
        if isinstance(bins, int) and bins > _BINS:
            raise MetricError(explain("a histogram has too many bins to be shown", where=f"bins={bins}, above {_BINS}"))
        numbers = _tensor("Histogram", values).double().flatten().numpy()
        finite = numbers[np.isfinite(numbers)]
        counts, edges = np.histogram(finite, bins)
        found = {"counts": counts, "edges": edges, "total": float(finite.sum()), "squares": float((finite**2).sum())}
        for name, value in {**found, "not_finite": len(numbers) - len(finite)}.items():
            object.__setattr__(self, name, value)

    def content(self) -> bytes:
        """Return it as an npz file with the arrays `counts`, `edges` and `not_finite`."""
        file = io.BytesIO()
        np.savez(file, counts=self.counts, edges=self.edges, not_finite=np.int64(self.not_finite))
        return file.getvalue()

    def __repr__(self) -> str:
        odd = f", {self.not_finite} not finite" if self.not_finite else ""
        return f"<Histogram of {self.counts.sum()} values from {self.edges[0]:g} to {self.edges[-1]:g}{odd}>"


@checked(MetricError)
@dataclasses.dataclass(frozen=True)
class Text(Media):
    """A text for a row of the log: a sample of a language model, say.

    Args:
        text: of any length and number of lines.

    Examples:
        >>> Text("to be or").content()
        b'to be or'
    """

    suffix: ClassVar[str] = ".txt"
    text: str

    def content(self) -> bytes:
        """Return it as a file."""
        return self.text.encode(errors="replace")


def _tensor(name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values).detach().to("cpu", copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_numbers(name, type(values).__name__) from error
    if tensor.is_complex() or tensor.is_meta:
        raise _no_numbers(name, f"{tensor.dtype}{list(tensor.shape)}")
    return tensor


def _no_numbers(name: str, what: str) -> MetricError:
    return MetricError(
        explain(
            f"a {name} is made of real numbers",
            where=f"{name}(...): {what}",
            instead=f"ps.loggers.{name}(tensor), outside of a step, where it has values",
        )
    )
