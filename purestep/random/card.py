"""Folds and draws on a CUDA card: one kernel each, with the words of the CPU.

A fold is two hundred operations on tensors, and a draw as many again, which eager mode would launch one by one. Here
each is an operator of its own (`purestep::philox_fold`, `philox_draw`, `philox_dropout`), made by a Triton kernel.
Traces and transforms take the operations, which batch and fuse; so do a card without Triton, and devices of other
makers.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import _torch

is_capturing = torch.cuda.is_current_stream_capturing  # a CUDA graph: what the host does then is not repeated
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes that are dropped out in one launch
_BITS, _MASK, _UNIFORM, _NORMAL = range(4)  # as the kernels number them
_SCHEMAS = (
    "philox_fold(Tensor key, Tensor? value, int c0, int c1, int c2, int c3) -> Tensor",
    "philox_draw(Tensor like, Tensor? key, int k0, int k1, Tensor? index, SymInt[] shape, ScalarType dtype, int kind, "
    "int width, int threshold) -> Tensor",
    "philox_block(Tensor?[] words, int[] numbers, SymInt[] shape) -> Tensor",
    "philox_dropout(Tensor x, Tensor? key, int k0, int k1, int threshold, float scale) -> Tensor",
)


def draws(device: torch.device, *tensors: Tensor) -> bool:
    """Tell whether kernels of this room fold and draw on a device, for keys and positions in these tensors."""
    return device.type == "cuda" and plain(*tensors) and has_triton()


def launches(x: Tensor) -> bool:
    """Tell whether an operation on a tensor launches a kernel of a card when it is called, seeded by the host."""
    return x.device.type == "cuda" and plain(x) and not is_capturing()


def plain(*tensors: Tensor) -> bool:
    """Tell whether tensors are no subclasses, and not traced or transformed."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if type(t) is not Tensor and not _torch.is_fake(t):
            return False
    return _torch.transform_level() is None and _torch.dispatch_modes() == 0


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton is installed, as it is beside the builds of torch for Linux that have CUDA."""
    return importlib.util.find_spec("triton") is not None


def fold(key: Tensor, counter: Sequence[Any]) -> Tensor:
    """Return the first two words of the block of a counter under a key on the card.

    Args:
        key: int64[2].
        counter: four words; the first may be a 0-d integer tensor on the card, which stands for its two words.
    """
    first, *rest = counter
    of_tensor = isinstance(first, Tensor)
    value, number = (first, 0) if of_tensor else (None, first)
    found: Tensor = _operators().philox_fold.default(key, value, number, *rest)
    return found


def block(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return the four words of blocks on the card; words are numbers or int64 tensors there, which broadcast."""
    words = [word if isinstance(word, Tensor) else None for word in (*counter, *key)]
    numbers = [0 if isinstance(word, Tensor) else word for word in (*counter, *key)]
    shape = torch.broadcast_shapes(*(word.shape for word in words if word is not None))
    found: Tensor = _operators().philox_block.default(words, numbers, shape)
    return found.unbind(0)


class Draw:
    """A draw that a kernel makes.

    Args:
        key: int64[2], on the card or on the host.
        shape: shape of the result.
        index: int64 of that shape, the positions of the elements in a larger draw; None: 0, 1, 2, ...
        device: the card.
    """

    def __init__(self, key: Tensor, shape: Sequence[int], index: Tensor | None, device: torch.device) -> None:
        self.key, self.shape, self.index, self.device = key, tuple(shape), index, device

    def words(self, count: int) -> tuple[Tensor, ...]:
        """Return the words of each element, 1 or 2 tensors int64."""
        index = self.index
        if count == 2 and index is not None:
            index = torch.stack((2 * index, 2 * index + 1), dim=-1)
        drawn = self._drawn((*self.shape, count) if count > 1 else self.shape, index, _BITS, torch.int64)
        return (drawn,) if count == 1 else drawn.unbind(-1)

    def mask(self, threshold: int) -> Tensor:
        """Return where words are below a threshold, in [0, 2**32]: bool."""
        return self._drawn(self.shape, self.index, _MASK, torch.bool, threshold=threshold)

    def uniform(self, dtype: torch.dtype, width: int) -> Tensor:
        """Return numbers in [0, 1) of so many random bits, 53 for float64."""
        return self._drawn(self.shape, self.index, _UNIFORM, dtype, width)

    def normal(self, dtype: torch.dtype) -> Tensor:
        """Return normal numbers. Half dtypes are rounded by torch, as on the CPU: from float32."""
        made = torch.float64 if dtype == torch.float64 else torch.float32
        return self._drawn(self.shape, self.index, _NORMAL, made).to(dtype)

    def _drawn(
        self,
        shape: Sequence[int],
        index: Tensor | None,
        kind: int,
        dtype: torch.dtype,
        width: int = 0,
        threshold: int = 0,
    ) -> Tensor:
        key, k0, k1 = _given(self.key)
        # The dispatcher goes by a tensor on the card; one of no elements costs nothing.
        like = torch.empty(0, dtype=torch.int64, device=self.device) if key is None else key
        found: Tensor = _operators().philox_draw.default(like, key, k0, k1, index, shape, dtype, kind, width, threshold)
        return found


def dropout(key: Tensor, x: Tensor, threshold: int, scale: float) -> Tensor:
    """Return `x * scale`, and 0 where the words of a key are below a threshold: one launch, and one in the backward
    pass, which draws again instead of keeping a mask."""
    found: Tensor = _Dropout.apply(x, key, threshold, scale)
    return found


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, threshold: int, scale: float) -> Tensor:
        ctx.given = threshold, scale
        ctx.save_for_backward(key)
        found: Tensor = _operators().philox_dropout.default(x, *_given(key), threshold, scale)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (key,) = ctx.saved_tensors
        return _Dropout.apply(grad, key, *ctx.given), None, None, None


def _given(key: Tensor) -> tuple[Tensor | None, int, int]:
    """Return a key as the operators take it: a tensor on the card, or two words."""
    return (None, *key.tolist()) if key.is_cpu else (key, 0, 0)


# --- the operators ----------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> torch.library.Library:
    library = torch.library.Library("purestep", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    implement(library, "CUDA")
    # What they return, without values: for fake tensors.
    library.impl("philox_fold", lambda key, *counter: torch.empty_like(key), "Meta")
    library.impl("philox_draw", _empty, "Meta")
    library.impl("philox_block", lambda words, numbers, shape: _first(words).new_empty((4, *shape)), "Meta")
    library.impl("philox_dropout", lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format), "Meta")
    return library


def implement(library: torch.library.Library, device: str) -> None:
    """Register the kernels as the operators' implementation for a kind of device."""
    library.impl("philox_fold", _fold, device)
    library.impl("philox_draw", _draw, device)
    library.impl("philox_block", _block, device)
    library.impl("philox_dropout", _dropped, device)


def _operators() -> Any:
    _library()
    return torch.ops.purestep


def _empty(
    like: Tensor, key: Tensor | None, k0: int, k1: int, index: Tensor | None, shape: Any, dtype: torch.dtype, *rest: int
) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _fold(key: Tensor, value: Tensor | None, c0: int, c1: int, c2: int, c3: int) -> Tensor:
    from purestep.random import philox_triton

    out, held = torch.empty_like(key), key if value is None else value
    with torch.cuda.device_of(key):
        philox_triton.fold[(1,)](out, key, held, c0, c1, c2, c3, VALUE=value is not None)
    return out


def _first(words: Sequence[Tensor | None]) -> Tensor:
    return next(word for word in words if word is not None)


def _block(words: Sequence[Tensor | None], numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    from purestep.random import philox_triton

    out, count = _first(words).new_empty((4, *shape)), math.prod(shape)
    if count == 0:
        return out
    kinds = [0 if word is None else 1 if word.numel() == 1 else 2 for word in words]
    held = [out if w is None else w if w.numel() == 1 else w.expand(shape).contiguous() for w in words]
    with torch.cuda.device_of(out):
        philox_triton.block[(-(-count // philox_triton.BLOCKS),)](
            out, count, *held, *numbers, *kinds, BLOCKS=philox_triton.BLOCKS
        )
    return out


def _draw(
    like: Tensor,
    key: Tensor | None,
    k0: int,
    k1: int,
    index: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: int,
    width: int,
    threshold: int,
) -> Tensor:
    from purestep.random import philox_triton

    out = like.new_empty(shape, dtype=dtype)
    count = math.prod(shape)
    if count == 0:
        return out
    per_element = 2 if kind == _NORMAL or width == 53 else 1
    blocks = count if index is not None else -(-count * per_element // 4)
    with torch.cuda.device_of(like):
        philox_triton.draw[(-(-blocks // philox_triton.BLOCKS),)](
            out,
            out if key is None else key,  # a kernel takes no None: a pointer that it does not read
            out if index is None else index.contiguous(),
            count,
            threshold,
            k0,
            k1,
            KIND=kind,
            WIDTH=width,
            PER_ELEMENT=per_element,
            HOST=key is None,
            INDEXED=index is not None,
            BLOCKS=philox_triton.BLOCKS,
        )
    return out


def _dropped(x: Tensor, key: Tensor | None, k0: int, k1: int, threshold: int, scale: float) -> Tensor:
    from purestep.random import philox_triton

    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    (bits,) = struct.unpack("<q", struct.pack("<d", scale))  # Triton takes a Python float for a float32
    with torch.cuda.device_of(x):
        philox_triton.dropout[(-(-x.numel() // (4 * philox_triton.BLOCKS)),)](
            out,
            x,
            out if key is None else key,
            x.numel(),
            threshold,
            bits,
            k0,
            k1,
            WIDE=x.dtype == torch.float64,
            HOST=key is None,
            BLOCKS=philox_triton.BLOCKS,
        )
    return out
