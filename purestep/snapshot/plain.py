"""Arrays that Orbax has written, read as the plain files they are: uncompressed zarr of one chunk is an array's bytes.

Copying them from the page cache is all it costs; Orbax's own reading took some ten times as long. It reads what has
exactly that form and leaves the rest to Orbax, which reads it or says what is wrong. It checks no bytes: `pack` does.
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
_COMPRESSION = 4096  # no codec of zarr makes weights smaller than that
_FORM = {"compressor": None, "filters": None, "order": "C", "zarr_format": 2, "dimension_separator": "."}
_DTYPE = re.compile(r"[<|][biufc](\d+)|b(float16)|(float8)_\w+")


@dataclass(frozen=True)
class _File:
    path: Path
    nbytes: int


def read_plain(directory: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return uint8[nbytes] by name, of those arrays that are whole plain files; the others are left out.

    The memory is aligned as torch aligns its own, so that kernels do not tell a restored tensor from another.
    """
    files = {name: file for name in names if (file := _plain_file(directory / name)) is not None}
    found = {name: torch.empty(file.nbytes, dtype=torch.uint8).numpy() for name, file in files.items()}
    with ExitStack() as stack:
        work: list[tuple[str, int, memoryview, int]] = []
        for name, file in files.items():
            try:
                descriptor = os.open(file.path, os.O_RDONLY)
            except OSError:
                del found[name]
                continue
            stack.callback(os.close, descriptor)
            view = found[name].data
            work += [(name, descriptor, view[at : at + _BLOCK], at) for at in range(0, file.nbytes, _BLOCK)]
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            short = {name for name, whole in pool.map(_fill, work) if not whole}
    return {name: array for name, array in found.items() if name not in short}


def _fill(work: tuple[str, int, memoryview, int]) -> tuple[str, bool]:
    name, descriptor, view, at = work
    while view:
        try:
            count = os.preadv(descriptor, [view], at)
        except OSError:
            return name, False
        if not count:
            return name, False
        view, at = view[count:], at + count
    return name, True


def _plain_file(array: Path) -> _File | None:
    """Return the one file of an array and its size; None for any other form of zarr, or when it is not whole."""
    try:
        about = json.loads((array / ".zarray").read_bytes())
        shape, dtype = about["shape"], _DTYPE.fullmatch(about["dtype"])
        if dtype is None or not shape or about["chunks"] != shape or any(about[k] != v for k, v in _FORM.items()):
            return None
        file = _File(array / ".".join("0" for _ in shape), math.prod(shape) * _width(dtype.groups()))
        return file if os.stat(file.path).st_size == file.nbytes > 0 else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def implausible(array: Path, nbytes: int) -> str | None:
    """Return why a stored array cannot be of that many bytes, None when it can: before memory is taken for it.

    Snapshots are not compressed, so an array has at least as many bytes on the disk; what another program has
    compressed since may have fewer, but not by more than compression gives.
    """
    about: Any = None
    try:
        about = json.loads((array / ".zarray").read_bytes())
        stored = sum(entry.stat().st_size for entry in os.scandir(array) if entry.is_file(follow_symlinks=False))
    except FileNotFoundError:
        return None  # Orbax says what is missing
    except (OSError, ValueError, RecursionError) as error:
        return f"{array}: {type(error).__name__}: {str(error)[:200]}"
    plain = isinstance(about, dict) and about.get("compressor") is None and not about.get("filters")
    if nbytes > stored * (1 if plain else _COMPRESSION):
        return f"{array}: {stored} bytes on the disk cannot be {nbytes} bytes"
    shape, dtype = (about.get("shape"), about.get("dtype")) if isinstance(about, dict) else (None, None)
    known = _DTYPE.fullmatch(dtype) if isinstance(dtype, str) else None
    sizes = shape if isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) else None
    if known is not None and sizes is not None and math.prod(sizes) * _width(known.groups()) != nbytes:
        return f"{array}: its form is {dtype}{shape}, and {nbytes} bytes are expected"
    return None


def _width(groups: Iterable[str | None]) -> int:
    digits, half, _ = groups
    return int(digits) if digits else (2 if half else 1)
