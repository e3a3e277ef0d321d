"""Arrays that Orbax has written, read as plain files: an uncompressed zarr array of one chunk is a file of its bytes.

Reading them costs a copy from the page cache; Orbax took some ten times as long. It reads arrays of exactly that form
and leaves others to Orbax, which reads them or raises. It verifies no bytes: `packing` does.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_BLOCK = 8 << 20  # bytes of one read
_THREADS = 4
_COMPRESSION = 4096  # the largest ratio by which a codec of zarr makes weights smaller
_FORM = {"compressor": None, "filters": None, "order": "C", "zarr_format": 2, "dimension_separator": "."}
_DTYPE = re.compile(r"[<|][biufc](\d+)|b(float16)|(float8)_\w+")


@dataclass(frozen=True)
class _File:
    path: Path
    nbytes: int


def read_plain(directory: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return uint8[nbytes] by name, of those arrays that are complete plain files; the others are left out.

    The memory is aligned as torch aligns its own, because some kernels compute other bits on memory that is not.
    """
    files = {name: file for name in names if (file := _plain_file(directory / name)) is not None}
    contents = {name: torch.empty(file.nbytes, dtype=torch.uint8).numpy() for name, file in files.items()}
    with ExitStack() as stack:
        work: list[tuple[str, int, memoryview, int]] = []
        for name, file in files.items():
            try:
                descriptor = os.open(file.path, os.O_RDONLY)
            except OSError:
                del contents[name]
                continue
            stack.callback(os.close, descriptor)
            # Read in blocks by several threads: one thread copies from the page cache slower than the memory allows.
            view = contents[name].data
            work += [
                (name, descriptor, view[offset : offset + _BLOCK], offset) for offset in range(0, file.nbytes, _BLOCK)
            ]
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            short = {name for name, complete in pool.map(_fill, work) if not complete}
    return {name: array for name, array in contents.items() if name not in short}


def _fill(work: tuple[str, int, memoryview, int]) -> tuple[str, bool]:
    name, descriptor, view, offset = work
    # `preadv` may read less than asked for; it fills the array directly, without a copy.
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError:
            return name, False
        if not count:
            return name, False
        view, offset = view[count:], offset + count
    return name, True


def _plain_file(array: Path) -> _File | None:
    """Return the one file of an array and its size; None for any other form of zarr, or when it is not complete."""
    try:
        metadata = json.loads((array / ".zarray").read_bytes())
        shape, dtype = metadata["shape"], _DTYPE.fullmatch(metadata["dtype"])
        if dtype is None or not shape or metadata["chunks"] != shape or any(metadata[k] != v for k, v in _FORM.items()):
            return None
        file = _File(array / ".".join("0" for _ in shape), math.prod(shape) * _width(dtype.groups()))
        return file if os.stat(file.path).st_size == file.nbytes > 0 else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def implausible(array: Path, nbytes: int) -> str | None:
    """Return why a stored array cannot have that many bytes, None if it can; asked before memory is allocated for it.

    Snapshots are not compressed, so the files of an array have at least as many bytes. Another program may have
    compressed them since, by a limited ratio.
    """
    metadata: Any = None
    try:
        metadata = json.loads((array / ".zarray").read_bytes())
        stored = sum(entry.stat().st_size for entry in os.scandir(array) if entry.is_file(follow_symlinks=False))
    except FileNotFoundError:
        return None  # the error of Orbax says which file is missing
    except (OSError, ValueError, RecursionError) as error:
        return f"{array}: {type(error).__name__}: {str(error)[:200]}"
    plain = isinstance(metadata, dict) and metadata.get("compressor") is None and not metadata.get("filters")
    if nbytes > stored * (1 if plain else _COMPRESSION):
        return f"{array}: {stored} bytes on the disk cannot be {nbytes} bytes"
    shape, dtype = (metadata.get("shape"), metadata.get("dtype")) if isinstance(metadata, dict) else (None, None)
    known = _DTYPE.fullmatch(dtype) if isinstance(dtype, str) else None
    sizes = shape if isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) else None
    if known is not None and sizes is not None and math.prod(sizes) * _width(known.groups()) != nbytes:
        return f"{array}: its form is {dtype}{shape}, and {nbytes} bytes are expected"
    return None


def _width(groups: Iterable[str | None]) -> int:
    digits, half, _ = groups
    return int(digits) if digits else (2 if half else 1)
