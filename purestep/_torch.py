"""Private names of torch that several rooms need; no other file but the `_torch.py` (and `_inductor.py`, `_dtensor.py`)
of a room touches what torch has not published, and a test holds that.

All were seen to work on torch 2.11.0, 2.13.0 and 2.14.1, on which the suite runs. What each is for, and what to do when
a later torch has it no more:

    transform_level         whether a torch.func transform is active. Public: none. Without it: a vmapped or
                            differentiated step would detach; look for a successor in `torch._functorch.pyfunctorch`.
    dispatch_modes          how many dispatch modes are active (a trace is one), those that only watch left out. Without
                            it: the length of `torch.utils._python_dispatch._get_current_dispatch_mode_stack()`, slower.
    all_modes               the same with those that only watch.
    function_modes          how many function modes are active. Without it: every call is under `KeyedRandom`.
    innermost_mode          the function mode of a class that torch has on its stack, also in the threads in which the
                            autograd engine runs a backward pass. Without it: a dict of modes by module.
    set_grad_enabled        sets whether autograd records. Public: `torch.set_grad_enabled`, an object for each call.
    no_torch_function       a context in which no function mode and no `__torch_function__` looks. The documented
                            `DisableTorchFunctionSubclass` leaves modes on.
    no_function_modes       takes the function modes out, where others are to be entered in their place. Without it: as
                            `torch.overrides` does for one mode.
    no_torch_dispatch       the like of `no_torch_function` for dispatch modes. Without it: leave the modes of the tape
                            and enter them again.
    DispatchMode            torch documents it under this path, in "Extending PyTorch". Follow it where it goes.
    disable_current_modes   leaves all modes, for code of others that makes modules. Without it: make them before.
    autocast_enabled        on any device. Without it: ask `torch.is_autocast_enabled` for each device.
    pytree                  registration of nodes, which `torch.func` and `torch.compile` flatten. Published as
                            `torch.utils.pytree` in part; move there once it takes `flatten_with_keys_fn`.
    parameters_of, buffers_of, children_of, pre_hooks_of, kwargs_pre_hooks_of, hooks_of
                            the dicts in which a module keeps its own. They are in every pickle of a module, so they
                            will not go quietly. The public iterators give values, not the places to put others in;
                            public registration of hooks makes a handle each time, a third of a small step.
    flat_weights, put_flat_weights, link_flat_weights, init_flat_weights
                            an RNN's list of its own weights, which it does not look up by name. Without it: nothing
                            to do, if torch reads them by name then.
    storage_id              tells storages apart where they have no address (meta, fake). Without it: `id` of the
                            storage object, kept alive.
    schema_of, OpOverload, OpOverloadPacket
                            what an operator says it writes. Published as `torch.library` wants to write, not read,
                            them. Without it: parse `str(op)` through `torch._C.parse_schema`.
    is_dtensor, local_tensor, layout_of, from_part
                            the shard of a DTensor and its spec, without the autograd node of `to_local`. Without
                            them: `x.to_local().detach()`; `x.device_mesh` and `x.placements`.
    writes                  how often a tensor was written into: checks that a model does not write into its parameters.
                            Without it: compare their bytes after the first call of a model.
    is_fake                 whether a tensor comes from FakeTensorMode. Without it: `type(x).__name__`.
    run_backward            what `torch.autograd.grad` comes to; None where it is gone: then that is called.
    saved_tensor_hooks      the hooks that are active, to see whose they are. Without it: no unit is freed after its
                            forward pass while other hooks may be active.
    checkpoint_generator, CHECKPOINT_GENERATOR, CHECKPOINT_PACKED, CHECKPOINT_PLACES
                            the inner half of `torch.utils.checkpoint.checkpoint`, called by that name in those modules.
                            Torch 2.14 packs the arguments and renames it. Without it: replace `checkpoint` itself,
                            which misses models that imported it by name.
    NormBase                the class of all batch and instance norms. Without it: list them.
    int8_product            `torch._int_mm`, the one product of int8 matrices with sums in int32. Without it: float64
                            products of the integers, which are exact and slow.
    cpu_attention, cpu_attention_backward
                            the operators of attention on a CPU, which torch's counter of operations does not know.
                            Without them: attention is not counted in a dry run on the CPU, nor are graphs cut at it.
    mark_constant           sets what `torch.compiler.assume_constant_result` sets, without importing Dynamo. Without
                            it: call that, and pay a second of import.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch.utils import checkpoint as _checkpoint
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as _mode_stack

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

__all__ = ["DispatchMode", "disable_current_modes", "pytree"]  # of the names above, those that others take from here

T = TypeVar("T")
Slots = dict[str, Tensor | None]
Hooks = OrderedDict[Any, Callable[..., Any]]

# --- modes and transforms ---------------------------------------------------------------------------------------------

transform_level: Callable[[], int | None] = torch._C._functorch.maybe_current_level
all_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
no_torch_function = torch._C.DisableTorchFunction
no_torch_dispatch = torch._C._DisableTorchDispatch
autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Watcher(DispatchMode):
    """A dispatch mode that looks on: code that asks whether it is traced runs as it would without."""


def dispatch_modes() -> int:
    """Return how many dispatch modes of this thread do more than watch."""
    count = all_modes()
    if count:
        count -= sum(isinstance(mode, Watcher) for mode in _mode_stack())
    return count


function_modes: Callable[[], int] = torch._C._len_torch_function_stack


def innermost_mode(kind: type[T]) -> T | None:
    """Return the innermost function mode of a class that is active in this thread."""
    for at in reversed(range(function_modes())):
        mode = torch._C._get_function_stack_at(at)
        if isinstance(mode, kind):
            return mode
    return None


@contextlib.contextmanager
def no_function_modes() -> Iterator[None]:
    """Take the function modes of this thread out in a `with` block, in which others may be entered."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(function_modes())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


# --- modules ----------------------------------------------------------------------------------------------------------

# `attrgetter` rather than functions: these are called for each module or leaf in every step.
parameters_of: Callable[[nn.Module], Slots] = operator.attrgetter("_parameters")
buffers_of: Callable[[nn.Module], Slots] = operator.attrgetter("_buffers")
children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = operator.attrgetter("_modules")
pre_hooks_of: Callable[[nn.Module], Hooks] = operator.attrgetter("_forward_pre_hooks")
kwargs_pre_hooks_of: Callable[[nn.Module], dict[Any, bool]] = operator.attrgetter("_forward_pre_hooks_with_kwargs")
hooks_of: Callable[[nn.Module], Hooks] = operator.attrgetter("_forward_hooks")
flat_weights: Callable[[nn.RNNBase], list[Tensor | None]] = operator.attrgetter("_flat_weights")
NormBase = nn.modules.batchnorm._NormBase


def put_flat_weights(rnn: nn.RNNBase, weights: list[Tensor | None]) -> None:
    """Set the list of weights that an RNN computes with."""
    rnn._flat_weights = weights


def link_flat_weights(rnn: nn.RNNBase) -> None:
    """Let an RNN compute with the tensors that are now under the names of its weights.

    Not its own `_init_flat_weights`: with cuDNN that moves the memory of the tensors it is given.
    """
    rnn._flat_weights = [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def init_flat_weights(rnn: nn.RNNBase) -> None:
    """Do what an RNN does when it is made: list its weights, and lay them out for cuDNN."""
    rnn._init_flat_weights()


# --- tensors and operators --------------------------------------------------------------------------------------------

local_tensor: Callable[[Tensor], Tensor] = operator.attrgetter("_local_tensor")
layout_of: Callable[[Tensor], DTensorSpec] = operator.attrgetter("_spec")


storage_id: Callable[[torch.UntypedStorage], int] = operator.attrgetter("_cdata")


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Tell whether a value is a DTensor, without loading torch's DTensor."""
    return type(value) is not Tensor and isinstance(value, Tensor) and hasattr(value, "_local_tensor")


def from_part(cls: type[Tensor], part: Tensor, layout: DTensorSpec) -> Tensor:
    """Return the DTensor of a spec whose shard on this rank is a tensor."""
    # Not cls(...): its empty `__init__` is hidden from Dynamo, which it imports for that, at the cost of seconds.
    made: Tensor = cls.__new__(cls, part, layout, requires_grad=False)
    return made


def is_fake(value: object) -> bool:
    """Tell whether a value is a fake tensor; before their module is imported, nothing is."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(value, fake.FakeTensor)


def writes(tensor: Tensor) -> int | None:
    """Return how often a tensor was written into; None for one whose writes torch does not count, or counts
    otherwise."""
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return tensor._version if plain and not tensor.is_inference() else None


def schema_of(op: Callable[..., Any]) -> torch._C.FunctionSchema:
    """Return what an operator says of its arguments."""
    schema: torch._C.FunctionSchema = op._schema  # type: ignore[attr-defined]
    return schema


def mark_constant(function: Callable[..., T]) -> Callable[..., T]:
    """Have Dynamo call a function while it traces, and take its result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# --- the backward pass ------------------------------------------------------------------------------------------------

run_backward: Callable[..., Sequence[Tensor | None]] | None = getattr(
    torch.autograd.graph, "_engine_run_backward", None
)


def saved_tensor_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return the innermost hooks that see what autograd saves; None without any."""
    hooks: tuple[Callable[..., Any], Callable[..., Any]] | None = torch._C._autograd._top_saved_tensors_default_hooks(
        True
    )
    return hooks


# From torch 2.14 on it takes the function's arguments as a tuple and a dict, and the name of old is a call of it.
CHECKPOINT_PACKED = hasattr(_checkpoint, "_checkpoint_without_reentrant_generator_impl")
CHECKPOINT_GENERATOR = "_checkpoint_without_reentrant_generator" + "_impl" * CHECKPOINT_PACKED
checkpoint_generator: Callable[..., Any] = getattr(_checkpoint, CHECKPOINT_GENERATOR)
CHECKPOINT_PLACES = (
    ("torch.utils.checkpoint", ("CheckpointFunction", CHECKPOINT_GENERATOR)),
    # It has the generator by name, for hooks that checkpoint a module.
    ("torch.distributed._composable.checkpoint_activation", (CHECKPOINT_GENERATOR,)),
)


# --- integer products -------------------------------------------------------------------------------------------------


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` in int32 of int8[m, k] and int8[n, k]: `torch._int_mm`, of any sizes on every device.

    On CUDA it takes more than 16 rows and multiples of 8 only. On CPUs it is silently wrong where a size is 1, because
    the strides of such a dim do not tell which layout a matrix has (torch 2.11 to 2.13). Zeros make up the rest, and
    change no sum.
    """
    rows, multiple = (2, 1) if a.device.type == "cpu" else (24, 8)
    m, n = a.shape[0], b.shape[0]
    sums = torch._int_mm(_padded(a, rows, multiple), _padded(b, max(2, multiple), multiple).t())
    return sums if sums.shape == (m, n) else sums[:m, :n]


def _padded(rows: Tensor, least: int, multiple: int) -> Tensor:
    """Return a matrix with zeros below and to the right, up to multiples of a number, in row-major order."""
    m, k = rows.shape
    below = max(least, m + -m % multiple) - m
    right = max(2, k + -k % multiple) - k
    return (nn.functional.pad(rows, (0, right, 0, below)) if below or right else rows).contiguous()
