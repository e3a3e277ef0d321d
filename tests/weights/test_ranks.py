"""Weights into states that are split over processes, and back: two small jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory with RLIMIT_AS and reads it from /proc")
def test_a_llama_larger_than_the_memory_of_a_process_is_tuned_and_written_back(zygote, tmp_path):
    sys.path.insert(0, str(HERE))
    from ranks_llama import FROZEN, TX, llama, trained

    torch.manual_seed(0)
    model = llama()
    size = sum(p.nbytes for p in model.parameters()) >> 20
    model.save_pretrained(tmp_path / "pretrained", max_shard_size="8MB")
    preload = f"{zygote.RANKS} transformers.models.llama"
    run(zygote, "ranks_llama.py", 4, tmp_path, int(0.85 * size), preload=preload)

    expected = trained(ps.init(model, TX, frozen=FROZEN), None)
    model.config.save_pretrained(tmp_path / "tuned")
    tuned = type(model).from_pretrained(tmp_path / "tuned")
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, {**expected.params, **expected.buffers}[name]), name
    assert not torch.equal(tuned.lm_head.weight, model.lm_head.weight)
