"""Backends: what runs a traced graph.

Each is a function from a graph and its fake inputs to `run(tensors) -> tensors`. "inductor" compiles it (and is the
default), "eager" runs it operator by operator, "aot_eager" and "dynamo" go through `torch.compile`. torch's compilers
are imported on first use only.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from purestep import _torch, portable
from purestep.errors import ConfigError, explain
from purestep.jit import constants, disk_cache, errors, host_side, instruction_sets, layouts
from purestep.jit._torch import aot_backend, make_fx, runnable
from purestep.jit.compile_units import together
from purestep.jit.cuda_graph import Replay
from purestep.jit.hoist import hoist_scalars
from purestep.jit.layers import layered
from purestep.jit.outline import outlined
from purestep.jit.random_nodes import expanding
from purestep.jit.trace import Traced

Backend = Literal["inductor", "eager", "aot_eager", "dynamo"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Run = Callable[[list[Tensor]], Sequence[Any]]


def check(backend: str, mode: str | None) -> None:
    """Refuse names that are not those of a backend or mode.

    Raises:
        ConfigError: with the names there are.
    """
    if backend not in _BACKENDS:
        names = ", ".join(map(repr, _BACKENDS))
        raise ConfigError(explain("jit has no such backend", where=f"backend={backend!r}", instead=f"one of {names}"))
    if mode is not None and (mode not in _MODES or backend not in ("inductor", "dynamo")):
        names = ", ".join(map(repr, _MODES))
        raise ConfigError(
            explain(
                "jit has no such mode" if mode not in _MODES else "only a compiler has modes",
                where=f"mode={mode!r}, backend={backend!r}",
                instead=f"one of {names}, with backend='inductor' or 'dynamo'",
            )
        )
    if mode is not None and "autotune" in mode and portable.mode() == "portable":
        raise ConfigError(
            explain(
                "portable bits cannot be those of the fastest kernels",
                where=f"mode={mode!r}",
                why="autotuning takes the kernel that is fastest on this machine, and kernels add in different orders",
                instead="ps.jit(step)",
            )
        )


_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_RECORDED = ("reduce-overhead", "max-autotune")


def compile(traced: Traced, backend: str, mode: str | None, *, donated: int) -> Run:
    """Return the function that runs a traced graph: it takes a list that it may empty, and returns the outputs.

    Args:
        traced: the graph, its epilogue included.
        backend: name of the backend.
        mode: name of a mode, or None.
        donated: how many leaves of the arguments, the first ones, the graph overwrites.
    """
    constants.place(traced)
    host = host_side.of(traced)
    if host is not None:
        return host.run(_built(host.traced, backend, mode, donated=donated))
    return _built(traced, backend, mode, donated=donated)


def _built(traced: Traced, backend: str, mode: str | None, *, donated: int) -> Run:
    with _without_warnings():
        run = _BACKENDS[backend](traced, mode)
    recorded = backend == "inductor" and mode in _RECORDED and any(x.is_cuda for x in traced.fakes)
    if recorded and donated and host_side.has_keys(traced):
        return Replay(run, [slot for slot, leaf in enumerate(traced.takes) if leaf < donated])
    return run


def _eager(traced: Traced, mode: str | None) -> Run:
    forward = runnable(traced.graph).forward

    def run(tensors: list[Tensor]) -> Sequence[Any]:
        return forward(*tensors)

    return run


def _through_torch_compile(name: str | None) -> Callable[[Traced, str | None], Run]:
    def build(traced: Traced, mode: str | None) -> Run:
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        options |= {"backend": aot_backend(layouts.settle)} if name else {"mode": mode}
        compiled = torch.compile(runnable(traced.graph), **options)
        ready = False

        def run(tensors: list[Tensor]) -> Sequence[Any]:
            nonlocal ready
            if ready:
                return compiled(*tensors)
            with _without_warnings():
                ready = True
                return compiled(*tensors)

        return run

    return build


# --- Inductor ---------------------------------------------------------------------------------------------------------


def _inductor(traced: Traced, mode: str | None) -> Run:
    with _without_warnings():
        updates = None if mode else outlined(traced)
        rest = traced if updates is None else updates.rest
        layers = None if mode else layered(rest)
        graphs = [rest] if layers is None else [*layers.kinds]
        runs = _each([*graphs, *(() if updates is None else updates.kinds)], mode)
        first, others = runs[: len(graphs)], runs[len(graphs) :]
        run = first[0] if layers is None else layers.run(first)
        return run if updates is None else updates.run(run, others)


def _each(graphs: Sequence[Traced], mode: str | None) -> list[Run]:
    """Take graphs from the disk cache, or compile them, their kernels together."""
    names = [disk_cache.key(graph, mode) for graph in graphs]
    runs = [None if name is None else disk_cache.take(name) for name in names]
    missing = [i for i, run in enumerate(runs) if run is None]
    for i, compiled in zip(missing, _together([graphs[i] for i in missing], mode), strict=True):
        # The inner method of the object's `__call__`, without its work for profilers and caches.
        run: Run = getattr(compiled, "current_callable", None) or compiled
        runs[i], name = run, names[i]
        if name is not None and not getattr(compiled, "constants", None):
            disk_cache.put(name, run)
            runs[i] = disk_cache.take(name) or run  # the stored form, whose temporary buffers are used again
    return [run for run in runs if run is not None]


def _together(graphs: Sequence[Traced], mode: str | None) -> list[Callable[..., Any]]:
    if not graphs:
        return []
    try:
        with instruction_sets.trusted(), together():
            return [_compiled(graph, mode) for graph in graphs]
    except Exception as error:
        if not errors.compiler_failed(error):
            raise
    # The compiler may not support all instructions of the processor; Inductor's test of that takes seconds.
    instruction_sets.forget()
    with together():
        return [_compiled(graph, mode) for graph in graphs]


def _compiled(traced: Traced, mode: str | None) -> Callable[..., Any]:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from purestep.jit import _inductor as inductor

    options: dict[str, Any] = {**inductor.list_mode_options(mode or "default")}
    # CUDA graphs are recorded around the whole call (see `cuda_graph`), where inputs are known to stay in place.
    options.pop("triton.cudagraphs", None)
    fake_mode = traced.mode
    device = traced.fakes[0].device if traced.fakes else None
    with _decompositions(device) as decompositions:
        graph = _broken_up(traced, decompositions)
        # Traces have no ShapeEnv, so that shapes which depend on values are errors; Inductor's disk cache needs one.
        fake_mode.shape_env = ShapeEnv()
        with (
            inductor.config.patch({**options, **_config(device)}),
            torch.no_grad(),
            inductor.compiling(fake_mode),
        ):
            graph = inductor.joint_graph_passes(graph, device)
            hoist_scalars(graph)
            end = graph.graph.output_node()
            end.meta["user_visible_output_idxs"] = list(range(len(end.args[0])))
            return inductor.compile_fx_inner(graph, traced.fakes, is_inference=True)


def _broken_up(traced: Traced, decompositions: Mapping[_torch.OpOverload, Callable[..., object]]) -> fx.GraphModule:
    """Return the graph decomposed into the operators that Inductor supports."""
    traced.mode.shape_env = None
    with traced.mode, torch.no_grad(), expanding():
        return make_fx(runnable(traced.graph), decompositions)(*traced.fakes)


@contextlib.contextmanager
def _decompositions(device: torch.device | None) -> Iterator[dict[_torch.OpOverload, Callable[..., object]]]:
    """Yield Inductor's decompositions, and leave the gradient of max_pool2d on CPUs to torch's kernel meanwhile.

    Inductor would decompose it, or lower it to a loop that is not vectorized; so neither of its tables may have it.
    """
    from purestep.jit import _inductor as inductor

    known, lowered = dict(inductor.decompositions()), inductor.lowerings
    by_torch = inductor.POOL_FALLBACK
    if device is None or device.type != "cpu":
        yield known
        return
    known.pop(_POOL_BACKWARD, None)
    by_inductor = lowered.get(_POOL_BACKWARD)
    if by_inductor is None or by_torch is None:
        yield known
        return
    lowered[_POOL_BACKWARD] = by_torch
    try:
        yield known
    finally:
        lowered[_POOL_BACKWARD] = by_inductor


_POOL_BACKWARD = torch.ops.aten.max_pool2d_with_indices_backward.default
# The signature of the call has checked the inputs, so kernels need not check them again.
_CONFIG: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}


def _config(device: torch.device | None) -> dict[str, Any]:
    """Return the settings of Inductor for graphs of a device.

    On CPUs Inductor would give every image and every weight of a convolution the layout channels-last. Weights at rest,
    their moments and what a step returns are contiguous, so a compiled step would move each weight and its gradient
    from one layout to the other: ResNet-18 took 331 ms for 142 without (`docs/decisions.md`, 79).
    """
    on_cpu = device is not None and device.type == "cpu"
    return {**_CONFIG, "layout_optimization": False} if on_cpu else _CONFIG


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep the warnings of torch's compiler about itself away from users of `-W error`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_BACKENDS: dict[str, Callable[[Traced, str | None], Run]] = {
    "inductor": _inductor,
    "eager": _eager,
    "aot_eager": _through_torch_compile("aot_eager"),
    "dynamo": _through_torch_compile(None),
}
