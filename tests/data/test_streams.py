"""Streaming sets of other packages, read per rank: what each resumes from, cut at a position and on other ranks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import purestep as ps
from purestep.data import SampleShard, per_rank, stream, take
from purestep.data.adapters import ReplayWarning
from purestep.data.sharded import shard_samples
from purestep.sharding.local_batches import local_batch

pytestmark = [
    pytest.mark.slow,  # imports of several seconds
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # webdataset leaves a tar file open that is not read on
]

CUT = 3  # batches before the stop


def stateful(dataset):
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, batch_size=4)


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


def numbers(shards):
    for shard in shards:
        yield from ({"x": shard * 100.0 + i} for i in range(12))


@pytest.fixture(scope="module")
def hf():
    """A set of 8 files, as `load_dataset(..., streaming=True)` returns one."""
    datasets = pytest.importorskip("datasets")
    made = datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": list(range(8))})
    return made.with_format("torch")


def hf_files(hf):
    return lambda share: stream(stateful(hf.shard(share.count, share.index).repeat(None)), 10)


def hf_passes(hf):
    return lambda share: take(stateful(hf.shard(share.count, share.index)), 12)


def hf_order_of_files(hf):
    return lambda share: stream(
        stateful(hf.shard(share.count, share.index).shuffle(seed=3, buffer_size=1).repeat(None)), 10
    )


def hf_buffer_read_again(hf):
    shuffled = hf.shuffle(seed=3, buffer_size=20)
    return lambda share: stream(DataLoader(shuffled.shard(share.count, share.index).repeat(None), batch_size=4), 10)


def hf_buffer(hf):
    shuffled = hf.shuffle(seed=3, buffer_size=20)
    return lambda share: stream(stateful(shuffled.shard(share.count, share.index).repeat(None)), 10)


# --- webdataset -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    wds = pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("tars")
    for number in range(4):
        with wds.TarWriter(str(folder / f"{number}.tar")) as file:
            for i in range(10):
                sample = np.full(3, 100 * number + i, np.float32)
                file.write({"__key__": f"{number}-{i}", "x.npy": sample, "y.cls": i % 3})
    return [str(folder / f"{number}.tar") for number in range(4)]


def samples_of(tars, share, buffer=0):
    import webdataset as wds

    made = wds.WebDataset(tars[share.slice], shardshuffle=2 if buffer else False, seed=share.index)
    made = made.shuffle(buffer, seed=share.index) if buffer else made
    return made.decode().to_tuple("x.npy", "y.cls")


def tars_passes(tars):
    return lambda share: take(DataLoader(samples_of(tars, share).batched(4), batch_size=None), 5)


def tars_buffer(tars):
    return lambda share: take(DataLoader(samples_of(tars, share, 8).batched(4), batch_size=None), 5)


def tars_on_and_on(tars):
    return lambda share: stream(DataLoader(samples_of(tars, share, 8).repeat().batched(4), batch_size=None), 5)


# --- grain ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers_of_grain():
    grain = pytest.importorskip("grain.python")
    return grain.MapDataset.source(list(range(96))).seed(3).shuffle().map(float)


def grain_map(made):
    return lambda share: made[share.slice].batch(4, drop_remainder=True)


def grain_iterable(made):
    return lambda share: stream(made.repeat()[share.slice].batch(4, drop_remainder=True).to_iter_dataset(), 12)


# --- what each resumes from -------------------------------------------------------------------------------------------

KINDS = {  # what makes a share, from which fixture; whether batches are read again
    "datasets, files": (hf_files, "hf", False),
    "datasets, one pass": (hf_passes, "hf", False),
    "datasets, order of files shuffled": (hf_order_of_files, "hf", False),
    "datasets, shuffle buffer, DataLoader": (hf_buffer_read_again, "hf", True),
    "webdataset, one pass": (tars_passes, "tars", True),
    "webdataset, shuffled": (tars_buffer, "tars", True),
    "webdataset, on and on": (tars_on_and_on, "tars", True),
    "grain, map": (grain_map, "numbers_of_grain", False),
    "grain, iterable": (grain_iterable, "numbers_of_grain", False),
}


def straight(make):
    """Two epochs of global batches, read without a stop."""
    source = per_rank(make, 2)
    return [list(source.open(epoch, 0, source.state())) for epoch in range(2)]


def cut(make):
    """A source that was read up to a position in the first epoch, and its state there."""
    source = per_rank(make, 2)
    batches = source.open(0, 0)
    read = [next(batches) for _ in range(CUT)]
    return read, source.state()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_with_the_batch_that_comes_next(kind, request):
    maker, fixture, replays = KINDS[kind]
    make = maker(request.getfixturevalue(fixture))
    whole = straight(make)
    read, state = cut(make)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = per_rank(make, 2)
        rest = [list(again.open(0, CUT, state)), list(again.open(1, 0, again.state()))]
    assert ps.digest([*read, *rest[0]]) == ps.digest(whole[0])
    assert ps.digest(rest[1]) == ps.digest(whole[1])
    assert any(warning.category is ReplayWarning for warning in caught) == replays
    # Two ranks that go on with it read the rest of the same batches, each the rows of its microbatch.
    for rank in range(2):
        shard = SampleShard(2, (rank,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplayWarning)
            local = list(shard_samples(per_rank(make, 2), shard).open(0, CUT, state))
        assert ps.digest(local) == ps.digest([local_batch(batch, shard, 2) for batch in whole[0][CUT:]])


def test_the_buffer_of_datasets_is_not_in_its_state(hf):
    """`datasets` says so: samples in a shuffle buffer are lost, and the buffer is filled anew. The docs warn of it."""
    whole = straight(hf_buffer(hf))
    _, state = cut(hf_buffer(hf))
    assert ps.digest(list(per_rank(hf_buffer(hf), 2).open(0, CUT, state))) != ps.digest(whole[0][CUT:])


def test_a_set_that_gives_batches_is_refused_with_the_loader_to_write(tars):
    import webdataset as wds

    loader = wds.WebLoader(tars, batch_size=None)
    with pytest.raises(ps.errors.DataError, match="DataLoader\\(dataset, batch_size=None\\)"):
        ps.data.as_source(loader)


def test_a_run_over_two_shares_trains(hf):
    step = ps.make_step(lambda net, batch: (net(batch["x"][:, None]) - 1).square().mean() * 1e-4, ps.optim.sgd(0.01))
    state = ps.init(lambda: torch.nn.Linear(1, 1), step.tx, seed=0)
    result = ps.fit(step, state, per_rank(hf_files(hf), 2), until=ps.steps(12))
    assert (result.loop.cursor.epoch, result.loop.cursor.batch) == (1, 2)
