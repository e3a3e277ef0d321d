"""Private names of torch that the callbacks need, and what to do when a later torch has them no more.

record_memory, dump_memory  the allocator's history on CUDA, as torch documents it in "Understanding CUDA Memory
                            Usage", under these names. Public: `torch.profiler.profile.export_memory_timeline`,
                            which is deprecated in their favour. Without them: leave the file out.
profiling                   whether a profiler of torch records in this thread; a second one would end it without a
                            word. Public: none. Without it: take the risk.
"""

from __future__ import annotations

import torch


def record_memory(on: bool) -> None:
    """Begin or end to note each allocation on CUDA, with its stack."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def profiling() -> bool:
    """Tell whether a profiler of torch records."""
    return bool(torch.autograd._profiler_enabled())


def dump_memory(path: str) -> None:
    """Write what was noted, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(path)
