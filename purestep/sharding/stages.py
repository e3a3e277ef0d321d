"""Stages of a pipeline: which names of a model belong to which, and who computes them.

A stage is a list of entries, each the path of a submodule or of a parameter. Everything here is arithmetic on names;
`parallel.stage_cut` runs a model stage by stage.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from purestep import tree
from purestep.arguments import Count, checked
from purestep.errors import ConfigError, explain

AXIS = "stage"
Schedule = Literal["1f1b", "gpipe", "interleaved"]
Stages = tuple[tuple[str, ...], ...]

_RANGE = re.compile(r"^(?P<path>.*\.)?(?P<first>\d+)-(?P<last>\d+)$")


def expanded(entries: str | Sequence[str]) -> tuple[str, ...]:
    """Return the entries of a stage with ranges of a list written out.

    Examples:
        >>> expanded(["embed", "blocks.9-11"])
        ('embed', 'blocks.9', 'blocks.10', 'blocks.11')
    """
    found: list[str] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        range_ = _RANGE.match(entry)
        if range_ is None:
            found.append(entry)
            continue
        numbers = range(int(range_["first"]), int(range_["last"]) + 1)
        found += [f"{range_['path'] or ''}{number}" for number in numbers]
    return tuple(found)


@functools.lru_cache(maxsize=1 << 14)
def stage_of(stages: Stages, name: str) -> int | None:
    """Return the number of the first stage with an entry that is the dotted name, or the path of a module above it.

    Examples:
        >>> stages = (("embed", "blocks.0"), ("blocks.1", "head"))
        >>> [stage_of(stages, n) for n in ("blocks.1.up.weight", "embed.weight", "blocks.10", "norm.weight")]
        [1, 0, None, None]
    """
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((s for s, own in enumerate(stages) if any(tree.matches(own, p) for p in prefixes)), None)


def submodules(module: nn.Module, stage_of: Callable[[str], int | None]) -> dict[nn.Module, tuple[int, str]]:
    """Return the stage and the path of each outermost submodule of a stage.

    Args:
        module: the model.
        stage_of: returns the stage of a path, None for none.
    """
    found: dict[nn.Module, tuple[int, str]] = {}
    for path, child in module.named_modules():
        stage = stage_of(path) if path else None
        if stage is not None and not any(path.startswith(f"{above}.") for _, above in found.values()):
            found[child] = stage, path
    return found


@functools.lru_cache(maxsize=64)
def cut(stages: Stages, ranks: int, schedule: Schedule) -> Stages:
    """Return the stages as so many ranks run them: neighbours on one rank are one, but where ranks take turns.

    Examples:
        >>> cut((("a",), ("b",), ("c",), ("d",)), 2, "1f1b")
        (('a', 'b'), ('c', 'd'))
    """
    if schedule == "interleaved":
        return stages
    share = len(stages) // ranks
    return tuple(sum(stages[i : i + share], ()) for i in range(0, len(stages), share))


@checked(ConfigError)
def even_stages(model: nn.Module | Callable[[], nn.Module], count: Count) -> Stages:
    """Return stages for `pipeline`: the blocks of a model in so many runs, of about equal numbers of parameters.

    The blocks are those of the outermost `ModuleList` or `Sequential`, the first if there are several. What the model
    defines before it is part of the first stage, what it defines after it of the last. That is right for a model which
    calls its parts in the order in which it defines them; write the stages of others by hand.

    Args:
        model: a module, or a function that makes one, which is called on the meta device.
        count: of stages.

    Raises:
        ConfigError: there is no list of blocks, or it has fewer than `count`.

    Examples:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(10, 4)
        ...         self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        ...         self.head = nn.Linear(4, 10)
        >>> even_stages(Net, 2)
        (('embed', 'blocks.0', 'blocks.1'), ('blocks.2', 'blocks.3', 'head'))
        >>> even_stages(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 2)
        (('0', '1'), ('2',))
    """
    module = model if isinstance(model, nn.Module) else _on_meta(model)
    path, blocks = _blocks(module)
    if blocks is None or len(blocks) < count:
        raise ConfigError(
            explain(
                f"a model cannot be cut into {count} stages by itself",
                where=f"{type(module).__name__}: "
                + (f"{path!r} has {len(blocks)} blocks" if blocks is not None else "it has no list of blocks"),
                why="stages are runs of the outermost ModuleList or Sequential",
                instead='ps.sharding.pipeline([["embed", "first"], ["second", "head"]])   # paths of submodules',
            )
        )
    before, after = _around(module, path)
    runs = _even_runs([sum(p.numel() for p in block.parameters()) for block in blocks], count)
    dot = f"{path}." if path else ""
    names = [[f"{dot}{name}" for name, _ in blocks.named_children()][run.start : run.stop] for run in runs]
    names[0], names[-1] = before + names[0], names[-1] + after
    return tuple(map(tuple, names))


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        made: object = make()
    if not isinstance(made, nn.Module):
        where = f"model={getattr(make, '__name__', make)!r}, which made a {type(made).__name__}"
        raise ConfigError(explain("model= is a module, or a function that makes one", where=where))
    return made


def _blocks(module: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential | None]:
    # The outermost: in the order of depth, then of definition.
    found = [(path, m) for path, m in module.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    return min(found, key=lambda item: len(item[0].split(".")) if item[0] else 0, default=("", None))


def _around(module: nn.Module, path: str) -> tuple[list[str], list[str]]:
    """Return the paths of what is defined before and after a submodule, outside of it, as far up as they can be."""
    before: list[str] = []
    after: list[str] = []
    parts = path.split(".") if path else []
    for depth, part in enumerate(parts):
        parent = module.get_submodule(".".join(parts[:depth]))
        prefix = "".join(f"{p}." for p in parts[:depth])
        names = [n for n, _ in parent.named_parameters(recurse=False)] + [n for n, _ in parent.named_children()]
        at = names.index(part)
        before += [prefix + n for n in names[:at]]
        after = [prefix + n for n in names[at + 1 :]] + after
    return before, after


def _even_runs(sizes: Sequence[int], count: int) -> list[range]:
    """Cut a list into runs, none of them empty, each ending where its share of the total is reached."""
    total, runs, start, done = sum(sizes), [], 0, 0
    for run in range(count):
        stop = start + 1
        done += sizes[start]
        most = len(sizes) - (count - run - 1)
        while stop < most and (run == count - 1 or done + sizes[stop] / 2 <= total * (run + 1) / count):
            done += sizes[stop]
            stop += 1
        runs.append(range(start, stop))
        start = stop
    return runs
