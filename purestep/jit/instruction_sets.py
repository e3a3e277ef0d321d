"""Which vector instructions the C++ compiler knows: taken for granted, instead of compiled to see.

Before its first kernel Inductor compiles and loads up to four small programs, to see whether the compiler has the
instructions that the processor reports. That costs more CPU time than the kernels of a small model. `trusted` skips
them; if the compiler then refuses a kernel, `backends` calls `forget` and compiles with the tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from purestep.jit.redirection import Redirection


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Let this thread's compilations use the vector instructions of the processor without testing the compiler."""
    from purestep.jit._inductor import VecISA, config

    with _redirection.redirected(VecISA, True), config.patch({"cpp.vec_isa_ok": True}):
        yield


def forget() -> None:
    """Make Inductor find out anew which vector instructions it may use."""
    from purestep.jit._inductor import instruction_findings

    caches, sets = instruction_findings()
    for cache in caches:
        cache.cache_clear()
    for found in sets:
        for name in [name for name in vars(found) if name.startswith("_is_")]:
            delattr(found, name)


def _answer(value: bool, original: Callable[..., bool], self: Any, code: str) -> bool:
    return value


_redirection = Redirection[bool]("check_build", _answer)
