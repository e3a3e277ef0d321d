"""Jobs that ask ranks for several checks on several numbers of processes: what each rank does, and what starts them."""

import json
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Checks = Iterable[tuple[str, Callable[[], Any]]]


def answer(
    directory: str, sizes: Iterable[int], number: int, checks: Callable[[int], Checks], asked: Callable[[str], bool]
) -> None:
    """Run the checks in a group of each size, and write what they found, or their traceback, to `<size>-<rank>.json`.

    Args:
        directory: of the answers, and of the stores over which the ranks meet.
        sizes: numbers of processes, one after another.
        number: rank of this process; it takes no part in groups that are too small for it.
        checks: names and functions, for a number of processes.
        asked: whether a check of this name is run.
    """
    torch.set_num_threads(1)
    for round, size in enumerate(sizes):
        if number >= size:
            continue
        if size > 1:
            store = f"file://{directory}/store-{round}-{size}"
            dist.init_process_group("gloo", init_method=store, rank=number, world_size=size)
        found = {}
        for name, check in checks(size):
            if not asked(name):
                continue
            try:
                found[name] = check()
            except Exception:
                found[name] = traceback.format_exc()
        (Path(directory) / f"{size}-{number}.json").write_text(json.dumps(found))
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()


def ask(
    zygote: Any,
    job: Path,
    directory: Path,
    sizes: str,
    checks: Iterable[str],
    *,
    preload: str = "",
    seconds: float = 600,
    silent: bool = True,
) -> None:
    """Start the ranks of a job, as many as the largest group has, and wait for their answers.

    Args:
        zygote: the fixture.
        job: script that calls `answer` with its arguments.
        directory, sizes, checks: its arguments; sizes with commas between them.
        preload: further modules of the zygote, which is then one for such jobs alone.
        seconds: to wait for a rank.
        silent: refuse a rank that writes to stderr, as libraries do when they are imported.
    """
    quiet = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    asked = ";".join(checks)
    children = [
        zygote.popen(
            job, str(directory), sizes, str(rank), asked, env=quiet, preload=f"{zygote.RANKS} {preload}".strip()
        )
        for rank in range(max(map(int, sizes.split(","))))
    ]
    for child in children:
        with child:
            _, errors = child.communicate(seconds)
            assert (child.returncode, errors) == (0, "" if silent else errors), errors


def answers(directory: Path, sizes: str) -> dict[tuple[int, int], Any]:
    """Return what the ranks have answered, by number of processes and rank."""
    found = [(int(size), rank) for size in sizes.split(",") for rank in range(int(size))]
    return {(size, rank): json.loads((directory / f"{size}-{rank}.json").read_text()) for size, rank in found}
