"""One of four gloo processes: fine-tunes a Llama that is larger than the memory that a process may take.

Run by test_ranks.py: `ranks_llama.py RANK FOLDER LIMIT`, the limit in MiB of address space beyond what the libraries,
the process group and a first training of a tiny model have mapped.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import purestep as ps

FROZEN = "*.mlp.*"
TX = ps.optim.sgd(0.1)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
SETTINGS = {
    "vocab_size": 300,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def trained(state: ps.TrainState, plan: ps.sharding.Plan | None, steps: int = 1) -> ps.TrainState:
    step = ps.make_step(lambda net, batch: net(input_ids=batch, labels=batch).loss, TX, microbatches=4, plan=plan)
    draw = torch.Generator().manual_seed(0)
    donating = ps.donate(step)
    for _ in range(steps):
        state, _ = donating(state, torch.randint(0, 200, (4, 8), generator=draw))
    return state


def llama(**changes: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SETTINGS | changes)))


def mapped() -> int:
    """Bytes of address space of this process, which RLIMIT_AS limits: libraries and files count, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))


def fits(make: Callable[[], object]) -> bool:
    try:
        make()
    except (RuntimeError, MemoryError):
        pass
    else:
        return True
    gc.collect()  # of the half that was made
    return False


def main() -> None:
    torch.set_num_threads(1)
    rank, root, limit = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) << 20
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=4, timeout=timeout)
    plan = ps.sharding.fsdp()
    # What is imported when first used is imported now.
    tiny = lambda: llama(hidden_size=32, intermediate_size=64, num_hidden_layers=1)  # noqa: E731
    trained(ps.init(tiny, TX, plan=plan, frozen=FROZEN, deferred=True), plan)

    # The heap gives memory back; otherwise what is free in it counts, too.
    for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 1 << 18), (_TRIM_THRESHOLD, 1 << 18)):
        ctypes.CDLL(None).mallopt(option, value)
    allowed = mapped() + limit
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    assert not fits(lambda: ps.init(llama, TX, plan=plan, frozen=FROZEN))
    state = ps.init(llama, TX, plan=plan, frozen=FROZEN, deferred=True, weights=root / "pretrained")
    state = trained(state, plan)
    ps.save_weights(state, root / "tuned", shard_bytes=8_000_000)
    dist.barrier()
    dist.destroy_process_group()
    print("all hold")


if __name__ == "__main__":
    main()
