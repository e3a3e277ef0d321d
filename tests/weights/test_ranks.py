"""Weights into states that are split over processes, and back: two small jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import purestep as ps

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).parent


def run(zygote, script: str, ranks: int, *arguments: object, preload: str) -> None:
    jobs = [zygote.popen(HERE / script, str(rank), *map(str, arguments), preload=preload) for rank in range(ranks)]
    ended = []
    for child in jobs:
        with child:
            ended.append((*child.communicate(240), child.returncode))
    assert [(out, code) for out, _, code in ended] == [("all hold\n", 0)] * ranks, "\n".join(
        e[1][-3000:] for e in ended
    )


def test_two_processes_read_and_write_together(zygote, tmp_path):
    """One set of processes for all checks; see ranks_weights.py."""
    sys.path.insert(0, str(HERE))
    from ranks_weights import TX, net

    state = ps.init(net, TX, seed=3)
    ps.save_weights(state, tmp_path / "source", shard_bytes=300)
    run(zygote, "ranks_weights.py", 2, tmp_path, preload=zygote.RANKS)
