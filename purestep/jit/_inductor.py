"""Private names of Inductor, torch's compiler, which has no public function that compiles a graph.

Importing this file imports Inductor, which takes seconds: `backends`, `disk_cache` and `compile_units` do where they
compile. Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    compile_fx_inner        compiles a functional graph of ATen operators. `torch.compile` would do it through Dynamo,
                            `torch._inductor.standalone_compile` (semi-public) with another calling convention.
    joint_graph_passes, decompositions
                            what `compile_fx` does before it. Without them: `compile_fx`.
    config                  settings. The environment variables TORCHINDUCTOR_* are the documented half of them.
    list_mode_options       what `torch.compile(mode=...)` means. Without it: `torch._inductor.config.patch` by hand.
    set_fake_mode, tracing  the context in which `compile_fx_inner` expects to be called.
    lowerings, POOL_FALLBACK
                            which operators Inductor writes loops for. Without them: its slow gradient of max_pool2d.
    AsyncCompile, CppCache, LambdaFuture, get_compile_threads
                            how C++ kernels are compiled. `compile_units` works without: each kernel in a file of its
                            own.
    VecISA, instruction_findings
                            the instruction sets that Inductor may use, and their tests of the C++ compiler.
                            `instruction_sets` works without `check_build`: Inductor then tests the compiler.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# Torch warns of its own use of itself while the compiler is loaded, which `-W error` would take for the user's.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # First: the decomposition of max_pool2d uses it without importing it.
    import torch._inductor.lowering as _lowering
    from torch._guards import TracingContext
    from torch._guards import tracing as _tracing
    from torch._inductor import config as config
    from torch._inductor import cpu_vec_isa as _instructions
    from torch._inductor import list_mode_options as list_mode_options
    from torch._inductor.async_compile import AsyncCompile as AsyncCompile
    from torch._inductor.async_compile import get_compile_threads as get_compile_threads
    from torch._inductor.codecache import CppPythonBindingsCodeCache as CppCache
    from torch._inductor.codecache import LambdaFuture as LambdaFuture
    from torch._inductor.compile_fx import compile_fx_inner as compile_fx_inner
    from torch._inductor.cpu_vec_isa import VecISA as VecISA
    from torch._inductor.decomposition import select_decomp_table as decompositions
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes as joint_graph_passes
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


def instruction_findings() -> tuple[list[Any], list[VecISA]]:
    """Return what holds Inductor's findings about vector instructions: cached functions, and instruction sets."""
    kinds = [x for x in vars(_instructions).values() if isinstance(x, type) and issubclass(x, VecISA)]
    places = [vars(_instructions), *(vars(kind) for kind in kinds)]
    caches = [x for place in places for x in place.values() if hasattr(x, "cache_clear")]
    return caches, list(_instructions.supported_vec_isa_list)
