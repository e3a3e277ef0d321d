"""`microbatches="auto"`: the smallest number of microbatches with which a step fits in memory.

It is settled once, with the first batch, by the estimates of `memory`; a resumed run keeps its number.
"""

from __future__ import annotations

import dataclasses

import torch

from purestep import metrics, tree
from purestep.errors import ConfigError, explain
from purestep.preflight import memory
from purestep.preflight.dry_run import dry_run
from purestep.step_protocol import StepFn, bare, facts_of, no_microbatches


def is_auto(step: StepFn) -> bool:
    """Tell whether a step leaves its number of microbatches open."""
    return facts_of(step).microbatches == "auto"


def choose_microbatches(step: StepFn, state: object, batch: object, *, free: int | None = None) -> int:
    """Return the smallest number of microbatches with which a step fits in memory.

    It goes by the estimate of dry runs. On an accelerator the step is then tried for real (a pure step changes
    nothing), and the number raised until it runs.

    Args:
        step: a step of `make_step`, with any number of microbatches; it may be compiled, or of `wrap_step`.
        state, batch: what it will be given. Later batches should not be larger.
        free: bytes to go by; by default those that are free where the state is.

    Raises:
        ConfigError: not even one sample at a time would fit, the step has a plan, or is a function of another kind.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> state = ps.init(lambda: torch.nn.Linear(3, 1), tx)
        >>> step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx, microbatches="auto")
        >>> choose_microbatches(step, state, torch.ones(64, 3))
        1
    """
    facts = facts_of(step)
    if facts.microbatches is None:
        raise no_microbatches(step)
    if facts.plan is not None:
        raise ConfigError(
            explain(
                "microbatches='auto' and a plan do not go together",
                where="ps.loop.choose_microbatches, for a step with a plan",
                why="all ranks have to slice a batch alike, and each knows only its own memory",
                instead="microbatches=8   # a number that all of them can share",
            )
        )
    device = next((x.device for x in tree.leaves(state) if isinstance(x, torch.Tensor)), torch.device("cpu"))
    room = memory.free_memory(device) if free is None else int(free / memory.USABLE)
    samples = metrics.sample_count(batch)
    count = 1 if room is None else _smallest(step, state, batch, int(memory.USABLE * room), samples)
    while device.type in ("cuda", "xpu", "mps") and free is None and not _runs(step, state, batch, count):
        if count >= samples:
            raise _nothing_fits(samples, None)
        count = min(samples, 2 * count)
    return count


def needed(step: StepFn, state: object, batch: object, count: int | None = None) -> memory.Estimate:
    """Return what a step needs with a number of microbatches: by `step_memory`, else what it needs at least.

    Args:
        step: of one process.
        state, batch: what it will be given.
        count: of microbatches; None for as many as it has.
    """
    sliced, donated = bare(step, count), facts_of(step).donate
    if (account := memory.accounted(sliced, state, batch, donate=donated)) is not None:
        return account
    found = memory.estimate_alone(sliced, state, batch, dry_run(sliced, state, batch))
    return dataclasses.replace(found, donated=donated)


def _smallest(step: StepFn, state: object, batch: object, room: int, samples: int) -> int:
    # More microbatches have smaller activations, and one more sum at a time from each power of two on: between two of
    # them the last needs least, so those are asked first. One sample each may need more than something before.
    low, high = 0, 1  # low does not fit
    while (estimate := needed(step, state, batch, high)).beyond > room:
        if high >= samples:
            raise _nothing_fits(samples, estimate)
        low, high = high, min(2 * high + 1, samples)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(step, state, batch, middle).beyond <= room else (middle, high)
    return high


def _nothing_fits(samples: int, estimate: memory.Estimate | None) -> ConfigError:
    return ConfigError(
        explain(
            "no number of microbatches makes the step fit in memory",
            where=f"microbatches={samples}, one sample each" + ("" if estimate is None else f": {estimate}"),
            instead="a smaller model, ps.jit(step, donate=True), ps.checkpoint around its blocks, or more memory",
        )
    )


def _runs(step: StepFn, state: object, batch: object, count: int) -> bool:
    try:
        bare(step, count)(state, batch)
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return False
    finally:
        torch.accelerator.empty_cache() if hasattr(torch.accelerator, "empty_cache") else None
    return True
