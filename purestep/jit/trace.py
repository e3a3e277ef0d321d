"""Tracing: from a function of pytrees to one functional graph of tensor operations, autograd included.

`trace` runs the function once on fake tensors (shapes without memory), so nothing is computed and no input is touched.
A function that does not fit in a graph is refused with an error of `errors`. `donation_graph` and `backends` take the
graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from purestep import _torch, tree
from purestep.errors import PurestepError, TraceError
from purestep.jit import errors, layouts
from purestep.jit._torch import (
    batch_norm_legit,
    fake_tensor_mode,
    make_fx,
    set_mkldnn_enabled,
    tracing_context,
    uncompiled_graphs,
)
from purestep.jit.errors import ValueReadError
from purestep.jit.functional_graph import functionalized
from purestep.jit.reads import Guard, Reads, Roots
from purestep.jit.surroundings import traceable
from purestep.random import host_draws

if TYPE_CHECKING:
    from purestep.jit._torch import FakeTensorMode


@dataclasses.dataclass
class Traced:
    """A function as a graph.

    Attributes:
        graph: takes the tensor leaves of the arguments and returns the tensor leaves of the result, as lists.
        fakes: the fake inputs.
        takes: positions of the tensor leaves among all leaves of the arguments.
        leaves: all leaves of the result, with None in place of each tensor.
        structure: structure of the result.
        result: the result with its fake tensors, to compare structures and shapes with.
        mode: the mode that the fake tensors belong to.
        guards: values of the batch that are constants of the graph.
    """

    graph: fx.GraphModule
    fakes: list[Tensor]
    takes: list[int]
    leaves: list[Any]
    structure: tree.Structure
    result: Any
    mode: FakeTensorMode
    guards: tuple[Guard, ...] = ()

    def nodes(self) -> tuple[list[fx.Node], fx.Node, list[fx.Node]]:
        """Return the inputs, the output node, and the nodes that are returned."""
        every = list(self.graph.graph.nodes)
        return [n for n in every if n.op == "placeholder"], every[-1], list(every[-1].args[0])


def trace(
    function: Callable[..., Any],
    leaves: Sequence[Any],
    structure: tree.Structure,
    *,
    paths: Callable[[], list[str]],
    static: Sequence[Any] = (),
    state_leaves: int | None = None,
) -> Traced:
    """Trace a function of `(args, kwargs)` into one functional graph.

    If the function reads a value that cannot become a guard, it is traced once more with
    `torch.compiler.is_compiling()` True, on which libraries avoid such reads. That branch may round otherwise, so it
    comes second.

    Args:
        function: called as `function(*args, **kwargs)` on fake tensors, once; again for the second trace, and to find
            the line for an error.
        leaves: leaves of `(args, kwargs)`; those that are not tensors are constants of the graph.
        structure: structure of `(args, kwargs)`.
        paths: gives the printed path of each leaf, for errors.
        static: static values of the arguments, such as the model of a state; for errors, too.
        state_leaves: how many of the leaves, the first ones, are those of a state: values of the others may be read,
            and become guards. None: values of constants alone may be read.

    Raises:
        TraceError: the function captures a tensor, branches on values, changes an input or draws from a generator of
            Python or numpy.
        RandomnessError: it draws from a global generator of torch.
    """
    takes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    roots = _roots([leaves[i] for i in takes], takes, state_leaves)
    call = _Call(function, leaves, structure, takes, paths, static)
    try:
        return call.traced(roots, library_branch=False)
    except ValueReadError as error:
        refused = error
    try:
        return call.traced(roots, library_branch=True)
    except ValueReadError as error:
        raise TraceError(str(error)) from error.__cause__
    except TraceError:
        raise TraceError(str(refused)) from refused.__cause__


def _roots(tensors: list[Tensor], takes: list[int], state_leaves: int | None) -> Roots:
    if state_leaves is None:
        return Roots(tensors)
    slots = list(enumerate(takes))
    batch = frozenset(slot for slot, leaf in slots if leaf >= state_leaves)
    exact = frozenset(s for s, x in enumerate(tensors) if not (x.is_floating_point() or x.is_complex()))
    return Roots(tensors, batch, batch | exact)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call to trace."""

    function: Callable[..., Any]
    leaves: Sequence[Any]
    structure: tree.Structure
    takes: list[int]
    paths: Callable[[], list[str]]
    static: Sequence[Any]

    def traced(self, roots: Roots, *, library_branch: bool) -> Traced:
        reads = Reads(roots)
        captured: dict[str, Any] = {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            values = list(self.leaves)
            for i, tensor in zip(self.takes, tensors, strict=True):
                values[i] = tensor
            args, kwargs = tree.unflatten(self.structure, values)
            with traceable(library_branch=library_branch):
                result = self.function(*args, **kwargs)
            out, captured["structure"] = tree.flatten(result)
            captured["result"] = result
            captured["leaves"] = [None if isinstance(x, Tensor) else x for x in out]
            return [x.detach() if x.requires_grad else x for x in out if isinstance(x, Tensor)]

        def again(*, real: bool = True) -> None:
            """Run the function on new fake tensors; `real=False` makes each use of a real tensor an error."""
            with fake_tensor_mode(allow_non_fake_inputs=real), reads.replayed():
                flat(*[_fake(x) for x in fakes])

        mode = fake_tensor_mode(allow_non_fake_inputs=True)
        with mode:
            fakes = [_fake(self.leaves[i]) for i in self.takes]
        with _fixed_settings(), uncompiled_graphs():
            try:
                with host_draws.refused(errors.host_draw, again), mode:
                    graph = make_fx(flat, {**_TABLE, **reads.table()})(*fakes)
            except PurestepError:
                raise
            except Exception as error:
                raise errors.explained(error) from error
            graph.graph.eliminate_dead_code()
            errors.check_captured(graph, lambda: _raised(again), [self.function, *self.static])
            names = [self.paths()[i] for i in self.takes] if _mutable_nodes(graph) or _random_nodes(graph) else []
            errors.check_random(_random_nodes(graph))
            errors.check_mutation(graph, _mutable_nodes(graph), names)
            if _mutable_nodes(graph):
                graph = functionalized(graph, mode, fakes, _TABLE)
                graph.graph.eliminate_dead_code()
            layouts.settle(graph)
        graph.recompile()
        return Traced(
            graph,
            fakes,
            self.takes,
            captured["leaves"],
            captured["structure"],
            captured["result"],
            mode,
            tuple(reads.guards),
        )


def _raised(again: Callable[..., None]) -> BaseException | None:
    """Return the error of the first line that uses a real tensor."""
    try:
        again(real=False)
    except Exception as error:
        return error
    return None


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    legit = batch_norm_legit
    if mean is None:
        return legit.no_stats(x, weight, bias, training, momentum, eps)
    return legit.default(x, weight, bias, mean, var, training, momentum, eps)


# Operators that write into arguments which their schema calls unchanged: no check of the graph would see the write.
_TABLE: dict[Any, Any] = {torch.ops.aten.native_batch_norm.default: _batch_norm}


def _fake(leaf: Tensor) -> Tensor:
    """Return a fake tensor with its own memory, so that inputs which share memory are not traced as views."""
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


@contextlib.contextmanager
def _fixed_settings() -> Iterator[None]:
    """Fix the settings of torch that would change a trace."""
    # The autograd engine would run the backward pass of device tensors in other threads, where our modes are off.
    threads = torch.autograd.set_multithreading_enabled(False)
    # Within this context, activation checkpoints recompute in a trace as they do outside.
    tracing = tracing_context
    # oneDNN's recurrent layers hand an opaque workspace to their backward pass, which no graph can hold.
    onednn: Any = torch.backends.mkldnn.enabled
    set_mkldnn_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), threads, tracing():
            yield
    finally:
        set_mkldnn_enabled(onednn)


def _mutable_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if errors.is_writer(n)]


# Attention and recurrent kernels have the tag because of their dropout, which `random.torch_mode` has replaced.
_NOT_RANDOM = (
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn",
    "miopen",
    "mkldnn",
    "_fused_sdp",
)


def _random_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [
        n
        for n in graph.graph.nodes
        if isinstance(n.target, _torch.OpOverload)
        and torch.Tag.nondeterministic_seeded in n.target.tags
        and not _torch.schema_of(n.target).name.removeprefix("aten::").startswith(_NOT_RANDOM)
    ]
