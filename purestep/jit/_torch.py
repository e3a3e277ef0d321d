"""Private names of torch that tracing and calling compiled steps need, those of Inductor left out (`_inductor`).

Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    set_grad_enabled        `torch.no_grad()` without the objects, around each call of a compiled step. Without it:
                            `torch.set_grad_enabled(False)`, a microsecond slower.
    set_mkldnn_enabled      oneDNN off while a graph is traced. Without it: `torch.backends.mkldnn.flags(False)`,
                            which some torch refuses to nest.
    tracing_context         what tells torch's own code that it is being traced; a context of no effect where torch
                            has none, as 2.11: then checkpoints recompute in the way that `recompute` gives them.
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
