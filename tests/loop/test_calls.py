"""What a run does between two steps, counted in calls: of a batch like the last one it asks nothing again.

After each step the code of the loop has left the caches of the processor, so that every function costs about a
microsecond, whatever it does. Times on a shared machine tell nothing; the number of calls is the same everywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import purestep as ps

STEPS = 100  # an epoch: the first metrics are read after 64 of them
OURS = str(Path(ps.__file__).parent)
BATCH = {"x": torch.ones(4, 3)}
DATA = {
    "list": lambda: [BATCH] * STEPS,
    "batches": lambda: ps.data.batches({"x": torch.ones(4 * STEPS, 3)}, 4),
    "loader": lambda: DataLoader([BATCH] * STEPS, batch_size=None),
}


def calls(data):
    """Return how many functions of this package are called before each step of three epochs."""
    counts, new = [], [0]

    def count(frame, event, _):
        new[0] += event == "call" and frame.f_code.co_filename.startswith(OURS)

    def step(state, batch):
        sys.setprofile(None)
        counts.append(new[0])
        new[0] = 0
        try:
            return {"n": state["n"] + 1}, {
                "loss": ps.metrics.mean(batch["x"].sum(), 4),
                "n": ps.metrics.Sum(state["n"]),
            }
        finally:
            sys.setprofile(count)

    callbacks = [ps.callbacks.log(every=ps.every.steps(50))]
    try:
        ps.fit(step, {"n": torch.zeros(())}, data, until=ps.epochs(3), callbacks=callbacks)
    finally:
        sys.setprofile(None)
    return counts


# Two are the generator that gives batches and the comparison of each with the first one; the others make the batch. A
# loader is asked whether the generators of the host moved, before and after.
@pytest.mark.parametrize(("kind", "batch", "epoch"), [("list", 3, 230), ("batches", 13, 310), ("loader", 6, 300)])
def test_a_batch_like_the_last_one_costs_few_calls(kind, batch, epoch):
    counts = calls(DATA[kind]())
    second = counts[STEPS + 1 : 2 * STEPS]
    assert max(second[4:40]) <= batch
    assert max(counts[STEPS], counts[2 * STEPS]) <= epoch  # where an epoch ends, and a chunk of steps
