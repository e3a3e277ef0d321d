"""A compiler that rounds: bits then show what was compiled, and what was compiled together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from purestep.jit import backends


@contextlib.contextmanager
def compiler() -> Iterator[None]:
    """Have the backend "eager" make all floating results of a graph a bit larger, for the length of a `with` block."""
    own = backends._BACKENDS["eager"]

    def larger(traced, mode):
        run = own(traced, mode)
        return lambda tensors: [x * (1 + 2**-20) if x.is_floating_point() else x for x in run(tensors)]

    backends._BACKENDS["eager"] = larger
    try:
        yield
    finally:
        backends._BACKENDS["eager"] = own
