"""Private names of torch that tracing and calling compiled steps need, those of Inductor left out (`_inductor`).

Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    set_grad_enabled        `torch.no_grad()` without the objects, around each call of a compiled step. Without it:
                            `torch.set_grad_enabled(False)`, a microsecond slower.
    set_mkldnn_enabled      oneDNN off while a graph is traced. Without it: `torch.backends.mkldnn.flags(False)`,
                            which some torch refuses to nest.
    tracing_context         what tells torch's own code that it is being traced; a context of no effect where torch
                            has none, as 2.11: then checkpoints recompute in the way that `recompute` gives them.
    inductor_config, inductor_cache_dir
                            settings of Inductor, and where it keeps what it compiled, without the import of Inductor,
                            which a graph from the disk cache does not need. The environment variables TORCHINDUCTOR_*
                            are the documented half of them.
    pointer_function        the address that a kernel's file asks for when Python loads it. Without it: nothing is
                            taken from the disk cache, and graphs are compiled anew.
    FakeTensorMode          tensors of shapes without memory. There is no public name; `torch.export` uses it.
    batch_norm_legit        batch norm that says in its schema what it writes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

set_grad_enabled = torch._C._set_grad_enabled
set_mkldnn_enabled = torch._C._set_mkldnn_enabled
batch_norm_legit = torch.ops.aten._native_batch_norm_legit


def inductor_config() -> Any:
    """Return the module of Inductor's settings."""
    from torch._inductor import config

    return config


def inductor_cache_dir() -> str:
    """Return the directory in which Inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def pointer_function() -> int:
    """Return the address of torch's C function that gives the address of a tensor's data."""
    guards = torch._C._dynamo.guards
    address: int = guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    return address


def tracing_context() -> contextlib.AbstractContextManager[Any]:
    """Return the context in which torch takes itself to be traced."""
    made: contextlib.AbstractContextManager[Any] = getattr(
        torch.compiler, "_non_strict_tracing_context", contextlib.nullcontext
    )()
    return made


def fake_tensor_mode(*, allow_non_fake_inputs: bool) -> FakeTensorMode:
    """Return a mode in which tensors have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs)
