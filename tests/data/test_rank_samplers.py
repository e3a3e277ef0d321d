"""Samplers that cut by rank are recognised by what they say of themselves."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from purestep.data import as_source
from purestep.data.sampler import BatchShard, SampleShard
from purestep.data.sharded import shard_batches, shard_samples
from purestep.errors import DataError

DATA = torch.arange(16.0)


class Repeated(Sampler):
    """As timm's RepeatAugSampler: its own class, with torch's names."""

    num_replicas, rank = 4, 1

    def __iter__(self):
        return iter(range(1, 16, 4))

    def __len__(self):
        return 4


class Shard(Repeated):
    """As Accelerate's BatchSamplerShard: a batch sampler."""

    num_replicas = 1
    num_processes, process_index = 2, 0
    batch_size = 3

    def __iter__(self):
        return iter([[0, 1, 2], [6, 7, 8]])


LOADERS = {
    "DistributedSampler over 2 ranks": DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 2, 0, shuffle=True)),
    "Repeated over 4 ranks": DataLoader(DATA, 2, sampler=Repeated()),
    "Shard over 2 ranks": DataLoader(DATA, batch_sampler=Shard()),
}
INSTEAD = ("batch_size=8, shuffle=True", "batch_size=8, shuffle=True", "batch_size=2 * batch_size, shuffle=True")


@pytest.mark.parametrize(("name", "instead"), list(zip(LOADERS, INSTEAD, strict=True)))
def test_a_sampler_that_cuts_by_rank_is_refused_with_the_loader_to_write(name, instead):
    source = as_source(LOADERS[name])
    # Of these samplers, no other rank reads the rest; an evaluation deals whole batches.
    for share in (lambda: shard_samples(source, SampleShard(2, (0,))), lambda: shard_batches(source, BatchShard(0, 2))):
        with pytest.raises(DataError, match=name) as error:
            share()
        assert f"ps.data.batches(dataset, {instead}, seed=0)" in str(error.value)


def test_others_pass(recwarn):
    whole = DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=False)
    for loader in (DataLoader(DATA, 4), DataLoader(DATA, 4, shuffle=True), DataLoader(DATA, 4, sampler=whole)):
        assert next(shard_samples(as_source(loader), SampleShard(2, (1,))).open(0, 0)).samples == 4
    alone = as_source(LOADERS["Repeated over 4 ranks"])
    assert shard_batches(alone, BatchShard(0, 1)) is alone
