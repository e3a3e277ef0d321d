"""Local batches: every row on one rank, the pieces of one process, at aligned addresses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep.errors import StepError
from purestep.microbatch import split_batch
from purestep.sharding import LocalBatch, ddp, hsdp, local_batch, mesh
from purestep.sharding.local_batches import aligned, microbatch_sizes, rows


class Rank:
    """A plan as seen by one rank of a job that is not here."""

    def __init__(self, plan, rank):
        self.plan, self.rank = plan, rank

    def microbatches(self, count):
        return self.plan.microbatches(count, rank=self.rank)


def ranks_of(data, fsdp):
    plan = hsdp(fsdp=fsdp).on(mesh({"data": data, "fsdp": fsdp}))
    return [Rank(plan, r) for r in range(data * fsdp)]


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_all_ranks_together_hold_the_pieces_of_one_process(samples, data, fsdp, times):
    parts = data * fsdp * times
    batch = {"x": torch.arange(samples * 3.0).view(samples, 3), "y": torch.arange(samples), "shared": torch.tensor(7)}
    sizes = microbatch_sizes(samples, parts)
    straight = iter(split_batch(batch, parts))
    expected = {index: next(straight) for index in range(parts) if sizes[index]}
    found = {}
    for rank in ranks_of(data, fsdp):
        mine = rank.microbatches(parts)
        local = local_batch(batch, rank, parts)
        assert (local.samples, local.microbatches) == (samples, parts)
        found |= {index: (piece, size) for index, piece, size in local.pieces(mine)}
        spare = local.spare(mine)
        assert len(spare["x"]) > 0
        assert any(torch.equal(spare["x"], piece["x"]) for piece, _ in expected.values())
    assert found.keys() == expected.keys()
    for index, (piece, size) in found.items():
        assert size == expected[index][1] == sizes[index]
        for name in batch:
            assert torch.equal(piece[name], expected[index][0][name])
            assert piece[name].data_ptr() % 16 == expected[index][0][name].data_ptr() % 16 == 0


@given(st.integers(1, 40), st.integers(1, 8))
def test_rows_of_all_microbatches_are_all_rows(samples, parts):
    assert rows(samples, parts, tuple(range(parts))).tolist() == list(range(samples))


def test_aligned_copies_only_what_lies_elsewhere():
    whole = torch.arange(64.0)
    assert aligned(whole[16:]) is not None
    assert aligned(whole[16:]).data_ptr() == whole[16:].data_ptr()
    moved = aligned(whole[3:])
    assert moved.data_ptr() % 64 == 0
    assert torch.equal(moved, whole[3:])


def test_a_local_batch_is_taken_as_it_is_and_only_for_its_number_of_microbatches():
    local = LocalBatch(torch.arange(4), samples=8, microbatches=2)
    assert local_batch(local, ddp(), 2) is local
    with pytest.raises(StepError, match="cut for another number of microbatches") as error:
        local_batch(local, ddp(), 4)
    assert "LocalBatch: 2 microbatches, step: 4" in str(error.value)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(StepError, match="differ in their number of samples") as error:
        local_batch({"x": torch.ones(4), "y": torch.ones(5)}, ddp(), 1)
    assert "batch['y']: float32[5]" in str(error.value)
    with pytest.raises(StepError, match="no tensor with dims"):
        local_batch({"x": torch.tensor(1.0)}, ddp(), 1)
