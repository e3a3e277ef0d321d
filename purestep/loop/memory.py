"""Device memory: an estimate before the first step, the words for running out of it, and the V that fits.

The estimate comes from a dry run: state, gradients, and what autograd keeps of the forward pass. It is what has to
fit at
least; the kernels' own workspace and fragmentation come on top.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from purestep import metrics, tree
from purestep.errors import ConfigError, OutOfMemory, explain
from purestep.jit import Donating, donate, jit
from purestep.loop.dry import Dry, dry_run
from purestep.loop.precheck import describe_batch
from purestep.loop.resume import _states
from purestep.step import Step

_USABLE = 0.9  # of the free memory: the rest is for workspaces and fragmentation


class MemoryEstimateWarning(UserWarning):
    """The dry estimate of a step is larger than the memory that is free."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step needs at least, in bytes.

    Attributes:
        params, optimizer: of the state.
        state: all of the state.
        gradients: of one batch, with the partial sums of several microbatches.
        activations: kept for the backward pass of the largest microbatch.
        batch: the batch.
        donated: whether the new state takes the place of the old one.
    """

    params: int
    optimizer: int
    state: int
    gradients: int
    activations: int
    batch: int
    donated: bool = False

    @property
    def beyond(self) -> int:
        """What is needed besides the state and the batch, which are there already."""
        new = 0 if self.donated else self.state
        return self.gradients + max(self.activations, new)

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.batch + self.beyond

    def __str__(self) -> str:
        parts = (
            ("params", self.params),
            ("optimizer", self.optimizer),
            ("gradients", self.gradients),
            ("activations", self.activations),
        )
        return f"{show(self.total)} in all: " + ", ".join(f"{name} {show(size)}" for name, size in parts)


def show(nbytes: float) -> str:
    """Return a number of bytes as people read it.

    Example:
        >>> show(512), show(3.2e9)
        ('512 B', '3.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return ""


def estimate(step: Any, state: Any, batch: Any, dry: Dry) -> Estimate:
    """Return what a step needs, from a dry run of it."""
    states = list(_states(state))
    params = tree.nbytes([s.params for s in states]) if states else tree.nbytes(state)
    inner = getattr(step, "__wrapped__", step)
    sums = 1 if getattr(inner, "microbatches", 1) == 1 else 2
    return Estimate(
        params,
        tree.nbytes([s.opt_state for s in states]),
        tree.nbytes(state),
        params * sums,
        dry.kept,
        tree.nbytes(batch),
        bool(getattr(step, "donate", False)),
    )


def free_memory(device: torch.device, *, root: str | Path = "/") -> int | None:
    """Return how many bytes can be allocated on a device; None where nobody says.

    On the CPU it is what the system calls available, within the limit of this process's cgroup.

    Args:
        device: where the state lives.
        root: where `proc` and `sys` are looked for.

    Example:
        >>> free_memory(torch.device("meta")) is None
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _host_memory(Path(root)) if device.type == "cpu" else None


def _host_memory(root: Path) -> int | None:
    found = []
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    group = next((line[3:] for line in _read(root / "proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    inner = Path(group.lstrip("/"))
    for folder in (inner, *inner.parents):
        limit, used = (_read(root / "sys/fs/cgroup" / folder / f"memory.{n}").strip() for n in ("max", "current"))
        if limit.isdigit() and used.isdigit():
            found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def warn_if_short(step: Any, needed: Estimate, batch: Any, device: torch.device, free: int | None) -> None:
    """Warn when a step needs more than is free, with the numbers and what would fit."""
    if free is None or needed.beyond <= free:
        return
    warnings.warn(
        explain(
            "the step may not fit in the memory of the device",
            where=f"{device}: {show(needed.beyond)} more are needed, {show(free)} are free",
            why=f"{needed}\nbatch: {describe_batch(batch)}",
            instead=_advice(step, needed, batch, free),
        ),
        MemoryEstimateWarning,
        stacklevel=2,
    )


def _advice(step: Any, needed: Estimate, batch: Any, free: int | None) -> str:
    samples, lines = metrics.sample_count(batch), []
    for parts in (2**i for i in range(1, samples.bit_length())):
        smaller = dataclasses.replace(needed, gradients=2 * needed.params, activations=-(-needed.activations // parts))
        if free is None or smaller.beyond <= _USABLE * free:
            lines.append(f"microbatches={parts}   # about {show(smaller.total)}; or microbatches='auto'")
            break
    if not needed.donated:
        lines.append("ps.jit(step, donate=True)   # the new state takes the place of the old one")
    return "\n".join(lines) or "a smaller model, ps.checkpoint around its blocks, or a device with more memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be allocated, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory(
    step: Any, state: Any, batch: Any, error: BaseException, *, index: int, free: int | None
) -> OutOfMemory:
    """Return the error to raise where a step ran out of memory: batch, estimate, and what would fit."""
    inner = getattr(step, "__wrapped__", step)
    dry = dry_run(inner, state, batch)
    needed = estimate(step, state, batch, dry)
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else ""
    room = "" if free is None else f"; {show(free)} were free at the start"
    known = f"estimate: {needed}" if dry.error is None else f"the state takes {show(needed.state)}"
    return OutOfMemory(
        explain(
            "the step ran out of memory",
            where=f"batch {index} of the run: {describe_batch(batch)}",
            why=f"{known}{room}\n{first}",
            instead=_advice(step, needed, batch, free),
        )
    )


# --- microbatches="auto" ----------------------------------------------------------------------------------------------


def is_auto(step: Any) -> bool:
    """Tell whether a step leaves its number of microbatches open."""
    inner = getattr(step, "__wrapped__", step)
    return isinstance(inner, Step) and inner.microbatches == "auto"


def with_microbatches(step: Any, count: int) -> Any:
    """Return a step with a number of microbatches, compiled or donating as the given one is."""
    inner = getattr(step, "__wrapped__", step)
    settled = dataclasses.replace(inner, microbatches=count)
    if isinstance(step, Donating):
        return donate(settled)
    return settled if step is inner else jit(settled, donate=step.donate, backend=step.backend, mode=step.mode)


def choose_microbatches(step: Any, state: Any, batch: Any, *, free: int | None = None) -> int:
    """Return the smallest number of microbatches with which a step fits in memory.

    It goes by the estimate of dry runs. On an accelerator the step is then tried for real (a pure step changes
    nothing),
    and the number raised until it runs.

    Args:
        step: a step of `make_step`, with any number of microbatches; it may be compiled.
        state, batch: what it will be given. Later batches should not be larger.
        free: bytes to go by; by default those that are free where the state is.

    Raises:
        ConfigError: not even one sample at a time would fit, or the step has a plan.

    Example:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> state = ps.init(lambda: torch.nn.Linear(3, 1), tx)
        >>> step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx, microbatches="auto")
        >>> choose_microbatches(step, state, torch.ones(64, 3))
        1
    """
    inner = getattr(step, "__wrapped__", step)
    if getattr(inner, "plan", None) is not None:
        raise ConfigError(
            explain(
                "microbatches='auto' and a plan do not go together",
                why="all ranks have to cut a batch alike, and each knows only its own memory",
                instead="microbatches=8   # a number that all of them can share",
            )
        )
    device = next((x.device for x in tree.leaves(state) if isinstance(x, torch.Tensor)), torch.device("cpu"))
    room = free_memory(device) if free is None else int(free / _USABLE)
    samples = metrics.sample_count(batch)
    count = 1 if room is None else _smallest(inner, step, state, batch, int(_USABLE * room), samples)
    while device.type in ("cuda", "xpu", "mps") and free is None and not _runs(inner, state, batch, count):
        if count >= samples:
            raise _nothing_fits(samples, None)
        count = min(samples, 2 * count)
    return count


def _smallest(inner: Any, step: Any, state: Any, batch: Any, room: int, samples: int) -> int:
    def needed(count: int) -> Estimate:
        cut = dataclasses.replace(inner, microbatches=count)
        found = dataclasses.replace(estimate(cut, state, batch, dry_run(cut, state, batch)))
        return dataclasses.replace(found, donated=bool(getattr(step, "donate", False)))

    if needed(1).beyond <= room:
        return 1
    low, high = 1, samples  # low does not fit
    if samples == 1 or needed(samples).beyond > room:
        raise _nothing_fits(samples, needed(samples))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle).beyond <= room else (middle, high)
    return high


def _nothing_fits(samples: int, needed: Estimate | None) -> ConfigError:
    return ConfigError(
        explain(
            "no number of microbatches makes the step fit in memory",
            where=f"microbatches={samples}, one sample each" + ("" if needed is None else f": {needed}"),
            instead="a smaller model, ps.jit(step, donate=True), ps.checkpoint around its blocks, or more memory",
        )
    )


def _runs(inner: Any, state: Any, batch: Any, count: int) -> bool:
    try:
        dataclasses.replace(inner, microbatches=count)(state, batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.accelerator.empty_cache() if hasattr(torch.accelerator, "empty_cache") else None
    return True
