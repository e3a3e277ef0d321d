"""In which order the ranks of a pipeline compute: the tables of `torch.distributed.pipelining`.

torch's schedules make a table of actions for each rank when they are built. Their stages then run modules that own
their parameters and fill `.grad`, adding up microbatch after microbatch; a pure step binds parameters for the length of
a call and adds gradients in a binary tree. So only the table is taken, and `parallel.pipeline` performs it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

from purestep.errors import ConfigError, explain
from purestep.sharding.stages import Schedule

Kind = Literal["forward", "backward"]
Action = tuple[Kind, int, int]  # stage, number of the microbatch


class _Stage:
    """What a schedule of torch asks of a stage when it makes its table."""

    def __init__(self, index: int, stages: int, ranks: int) -> None:
        self.stage_index, self.num_stages = index, stages
        self.group_size, self.group_rank = ranks, index % ranks
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.has_backward = True
        self.group = self.submod = self.device = None


@functools.lru_cache(maxsize=64)
def tables(schedule: Schedule, ranks: int, stages: int, count: int) -> list[list[Action]]:
    """Return what each rank of a pipeline does, in its order.

    Args:
        schedule: its name.
        ranks: of the pipeline.
        stages: a multiple of the ranks; stage s is computed by rank s modulo the ranks.
        count: of microbatches.

    Raises:
        ConfigError: the schedule does not take so many microbatches.

    Examples:
        >>> [f"{a[0]}{s}.{m}" for a, s, m in tables("1f1b", 2, 2, 3)[0]]
        ['f0.0', 'f0.1', 'b0.0', 'f0.2', 'b0.1', 'b0.2']
        >>> [f"{a[0]}{s}.{m}" for a, s, m in tables("gpipe", 2, 2, 2)[1]]
        ['f1.0', 'f1.1', 'b1.0', 'b1.1']
    """
    from torch.distributed.pipelining import schedules

    rank_stages: Any = [_Stage(s, stages, ranks) for s in range(stages)]
    try:
        if schedule == "interleaved":
            made: Any = schedules.ScheduleInterleaved1F1B(rank_stages[::ranks], count, loss_fn=_no_loss)
        else:
            kind = schedules.Schedule1F1B if schedule == "1f1b" else schedules.ScheduleGPipe
            made = kind(rank_stages[0], count, loss_fn=_no_loss)
    except ValueError as error:
        raise ConfigError(
            explain(
                f"the schedule {schedule!r} does not take {count} microbatches",
                where=f"{stages} stages on {ranks} ranks",
                why=str(error),
                instead=f"make_step(..., microbatches={2 * ranks})   # of each pipeline; or schedule='gpipe'",
            )
        ) from error
    return [_actions(made.pipeline_order[rank]) for rank in range(ranks)]


def _no_loss(*args: object) -> None:
    """A schedule without a loss function makes a table of forward passes."""


def _actions(given: Iterable[Any]) -> list[Action]:
    """Return torch's actions without waits, and without what is no pass.

    Each stage takes its microbatches in order, so they are counted anew: torch 2.13's table of 1F1B, which torch only
    draws, begins with the second one on the last stage.
    """
    kinds: dict[str, Kind] = {"FORWARD": "forward", "FULL_BACKWARD": "backward"}
    found: list[Action] = []
    seen: dict[tuple[Kind, int], int] = {}
    for action in given:
        kind = None if action is None else kinds.get(action.computation_type.name)
        if kind is not None:
            number = seen[kind, action.stage_index] = seen.get((kind, action.stage_index), -1) + 1
            found.append((kind, action.stage_index, number))
    return found


def bubble(schedule: Schedule, ranks: int, stages: int, count: int, backward: float = 2.0) -> float:
    """Return the part of a step in which a rank waits, where all stages take as long and sending takes no time.

    Args:
        schedule, ranks, stages, count: as of `tables`.
        backward: how many times as long as a forward pass a backward pass takes.

    Examples:
        >>> round(bubble("1f1b", 4, 4, 12), 3), round(bubble("gpipe", 4, 4, 12), 3)
        (0.2, 0.2)
        >>> round(bubble("interleaved", 4, 8, 12), 3)
        0.111
    """
    order = tables(schedule, ranks, stages, count)
    done: dict[Action, float] = {}
    now, at = [0.0] * ranks, [0] * ranks
    for _ in range(sum(map(len, order))):
        for rank in range(ranks):
            while at[rank] < len(order[rank]):
                action = order[rank][at[rank]]
                before = _before(action, stages)
                if any(b not in done for b in before):
                    break
                length = (1.0 if action[0] == "forward" else backward) * ranks / stages
                now[rank] = done[action] = max([now[rank], *(done[b] for b in before)]) + length
                at[rank] += 1
    busy = count * (1.0 + backward)
    return 1.0 - busy / max(now)


def _before(action: Action, stages: int) -> list[Action]:
    kind, stage, number = action
    if kind == "forward":
        return [("forward", stage - 1, number)] if stage else []
    later: list[Action] = [("backward", stage + 1, number)] if stage < stages - 1 else []
    return [("forward", stage, number), *later]
