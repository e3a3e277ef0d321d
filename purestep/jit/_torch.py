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
    empty_on_cpu            allocates a tensor for a compiled graph. Without it: `torch.empty_strided`.
    storage_references      how many tensors refer to a memory. Without it: no temporary buffer is used again.
    pointer_function        the address that a kernel's file asks for when Python loads it. Without it: nothing is
                            taken from the disk cache, and graphs are compiled anew.
    node_of, proxy_root     the node of a tensor in the graph that is being traced, and the module with the constants of
                            that graph. Without them: no value is read while a function is traced.
    make_fx                 the tracer, without its mode that notes for `torch.export` which function of torch
                            made an operator. The public `make_fx` traces the same graph and takes a tenth longer.
    untracked               operations in it are not added to the graph that is being traced. Without it: as `track`.
    track                   makes the fake tensor of a new node in the graph that is being traced. Without it: no nodes
                            are copied, and the operations of every random draw are traced.
    compiling               what `torch.compiler.is_compiling()` answers. Torch sets the same flag in `torch.export`.
    uncompiled              runs modules wrapped by `torch.compile` uncompiled. Half of it is the public
                            `torch.compiler.set_stance`; the private half is Dynamo's setting for use in `make_fx`.
    validates_distributions whether distributions check their parameters by default. Without it: True.
    module_conversion, put_module_conversion
                            the method behind `module.to(...)`, `.half()` and so on. Without it: a module that converts
                            another in its forward is refused.
    script_source           the Python function that `torch.jit.script` compiled. Without it: constants inside of such a
                            function are taken for captured tensors.
    aot_backend             the backend `aot_eager` of `torch.compile`, which records views anew, then a pass of ours.
    READ_VALUE, UNIQUE, UNSAFE_VIEW, TO_COPY
                            operators: the first reads a value, the second has an output shape that depends on values,
                            the third views a fresh tensor, the fourth converts. They have no public names.
    DEVICE, fake_device     the operator that `x.device` is in a trace, and the device of a fake tensor. Without them:
                            the same answer, in a longer way.
    uncompiled_graphs       graphs that generate their Python code when they first run. Without it: it is generated
                            three times while a function is traced.
    FakeTensorMode          tensors of shapes without memory. There is no public name; `torch.export` uses it.
    batch_norm_legit, batch_norm_functional
                            batch norm whose schema marks the running statistics as written, and the functional one
                            that returns them.
    overload_of             the name of an overload of an operator.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from purestep._lazy import Lasting

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

set_grad_enabled = torch._C._set_grad_enabled
empty_on_cpu = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]


def storage_references(tensor: Tensor) -> int:
    """Return the number of references to the memory of a tensor: one more for each other tensor that shares it."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


set_mkldnn_enabled = torch._C._set_mkldnn_enabled
batch_norm_legit = torch.ops.aten._native_batch_norm_legit
batch_norm_functional = torch.ops.aten._native_batch_norm_legit_functional.default
overload_of: Callable[[Any], str] = operator.attrgetter("_overloadname")


READ_VALUE = torch.ops.aten._local_scalar_dense.default
DEVICE = torch.ops.prim.device.default
fake_device: Callable[[Tensor], torch.device] = operator.attrgetter("fake_device")
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
TO_COPY = torch.ops.aten._to_copy.default
UNIQUE = torch.ops.aten._unique2.default
Conversion = Callable[..., nn.Module]


def validates_distributions() -> bool:
    """Return the setting of `Distribution.set_default_validate_args`."""
    return bool(torch.distributions.Distribution._validate_args)


def module_conversion() -> Conversion:
    """Return the method that all conversions of modules go through."""
    return nn.Module._apply


def put_module_conversion(method: Conversion) -> None:
    """Replace that method."""
    nn.Module._apply = method  # type: ignore[method-assign]


def script_source(function: object) -> Callable[..., Any] | None:
    """Return the Python function that `torch.jit.script` compiled."""
    return getattr(function, "_torchdynamo_inline", None)


def aot_backend(mend: Callable[[fx.GraphModule], None]) -> Callable[..., Any]:
    """Return a backend for `torch.compile`: AOTAutograd, a pass over its graph, then the operators one by one."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def compiled(graph: fx.GraphModule, inputs: Any) -> Any:
        mend(graph)
        graph.recompile()
        return make_boxed_func(graph.forward)

    backend: Callable[..., Any] = aot_autograd(fw_compiler=compiled, keep_inference_input_mutations=True)
    return backend


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
    """Return the context that tells torch's own code that it is being traced."""
    made: contextlib.AbstractContextManager[Any] = getattr(
        torch.compiler, "_non_strict_tracing_context", contextlib.nullcontext
    )()
    return made


def make_fx(function: Callable[..., Any], table: Mapping[Any, Any]) -> Callable[..., fx.GraphModule]:
    """Return a function that traces another on fake tensors, with a table of decompositions."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, decomposition_table=dict(table), _disable_torch_fn_metadata_mode=True)


def node_of(tensor: Tensor) -> fx.Node | None:
    """Return the node of a tensor in the graph that is being traced."""
    mode = _proxy_mode()
    if mode is None:
        return None
    found = _proxy_slot(tensor, mode.tracer, None)
    return None if found is None else found.proxy.node


def proxy_root() -> nn.Module:
    """Return the module that holds the constants of the graph that is being traced."""
    root: nn.Module = _proxy_mode().tracer.root
    return root


def untracked() -> contextlib.AbstractContextManager[Any]:
    """Return a context whose operations are not added to the graph that is being traced."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def track(node: fx.Node, like: Tensor) -> Tensor:
    """Return a fresh fake tensor for a node of the graph that is being traced."""
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    tracer = _proxy_mode().tracer
    with untracked():
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return track_tensor_tree(made, fx.Proxy(node, tracer), constant=None, tracer=tracer)


def _proxy_mode() -> Any:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode()


def _proxy_slot(*args: Any) -> Any:
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    return get_proxy_slot(*args)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let `torch.compiler.is_compiling()` say yes in a `with` block."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Let modules and functions that `torch.compile` wrapped run uncompiled in a `with` block."""
    if "torch._dynamo" not in sys.modules:  # nothing is wrapped
        yield
        return
    from torch._dynamo import config

    with torch.compiler.set_stance("force_eager"), config.patch(error_on_nested_fx_trace=False):
        yield


def uncompiled_graphs() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which torch makes graphs that generate their code when it is first needed."""
    from torch.fx import _lazy_graph_module as lazy

    return lazy._use_lazy_graph_module(True)


def runnable(graph: fx.GraphModule) -> fx.GraphModule:
    """Generate the code of such a graph now."""
    from torch.fx import _lazy_graph_module as lazy

    lazy._LazyGraphModule.force_recompile(graph)
    return graph


def fake_tensor_mode(*, allow_non_fake_inputs: bool) -> FakeTensorMode:
    """Return a mode in which tensors have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs)


@functools.cache
def load_tracer() -> None:
    """Import what a trace needs: hundreds of modules, whose objects are none that a collection after it has to look at.

    The imports are those that torch makes when it traces for the first time.
    """
    with Lasting():
        fake_tensor_mode(allow_non_fake_inputs=True)
        importlib.import_module("torch.fx.experimental.proxy_tensor")


def fake_like(mode: FakeTensorMode, tensor: Tensor, device: str | None = None) -> Tensor:
    """Return a fake tensor laid out like another, with memory of its own, on its device or on another one."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)
