"""Private names of Inductor, torch's compiler, which has no public function that compiles a graph.

Importing this file imports Inductor, which takes seconds: `backends`, `disk_cache` and `compile_units` do where they
compile. Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    compile_fx_inner        compiles a functional graph of ATen operators. `torch.compile` would do it through Dynamo,
                            `torch._inductor.standalone_compile` (semi-public) with another calling convention.
    joint_graph_passes, decompositions
                            what `compile_fx` does before it. Without them: `compile_fx`.
    config, cache_dir       settings, and where Inductor keeps what it compiled. The environment variables
                            TORCHINDUCTOR_* are the documented half of them.
    list_mode_options       what `torch.compile(mode=...)` means. Without it: `torch._inductor.config.patch` by hand.
    set_fake_mode, tracing  the context in which `compile_fx_inner` expects to be called.
    lowerings, POOL_FALLBACK
                            which operators Inductor writes loops for. Without them: its slow gradient of max_pool2d.
    AsyncCompile, CppCache, LambdaFuture, get_compile_threads
                            how C++ kernels are compiled. `compile_units` works without: each kernel in a file of its
                            own.
    pointer_function        the address that a kernel's file asks for when Python loads it. Without it: nothing is
                            taken from the disk cache, and graphs are compiled anew.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Torch warns of its own use of itself while the compiler is loaded, which `-W error` would take for the user's.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # First: the decomposition of max_pool2d uses it without importing it.
    import torch._inductor.lowering as _lowering
    from torch._guards import TracingContext
    from torch._guards import tracing as _tracing
    from torch._inductor import config as config
    from torch._inductor import list_mode_options as list_mode_options
    from torch._inductor.async_compile import AsyncCompile as AsyncCompile
    from torch._inductor.async_compile import get_compile_threads as get_compile_threads
    from torch._inductor.codecache import CppPythonBindingsCodeCache as CppCache
    from torch._inductor.codecache import LambdaFuture as LambdaFuture
    from torch._inductor.compile_fx import compile_fx_inner as compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table as decompositions
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes as joint_graph_passes
    from torch._inductor.runtime.cache_dir_utils import cache_dir as cache_dir
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["CppCache", "decompositions"]

lowerings: dict[Any, Callable[..., Any]] = _lowering.lowerings
POOL_FALLBACK: Callable[..., Any] | None = getattr(_lowering, "fallback_max_pool2d_with_indices_backward", None)


@contextlib.contextmanager
def compiling(fake_mode: FakeTensorMode) -> Iterator[None]:
    """The context in which graphs traced under a fake mode are compiled."""
    with V.set_fake_mode(fake_mode), _tracing(TracingContext(fake_mode)):
        yield


def pointer_function() -> int:
    """Return the address of torch's C function that gives the address of a tensor's data."""
    guards = torch._C._dynamo.guards
    address: int = guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    return address
