"""Combined sources are sources: lengths, modes, and resume at every position, with parts of every kind."""

from __future__ import annotations

import itertools
from typing import Any

import grain.python as grain
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from purestep import data, tree
from purestep.errors import DataError

# torchdata 0.11 calls a function that torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


ONE_THREAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)


def long() -> data.Batches:
    return data.batches(torch.arange(14), 2, seed=1)


def short() -> data.Batches:
    return data.batches(torch.arange(100, 106), 2, seed=2)


def stateful() -> Any:
    return StatefulDataLoader(torch.arange(200, 220), 4, shuffle=True)


def endless() -> Any:
    return grain.MapDataset.range(5).shuffle(seed=3).repeat().batch(2).to_iter_dataset(ONE_THREAD)


SOURCES = {
    "zip": lambda: data.zip({"a": long(), "b": (short(), stateful())}),
    "zip cycle": lambda: data.zip((long(), short(), stateful()), mode="cycle"),
    "zip pad": lambda: data.zip({"a": long(), "b": short(), "c": stateful()}, mode="pad"),
    "concat": lambda: data.concat(short(), stateful(), long()),
    "concat of a loader last": lambda: data.concat(short(), stateful()),
    "take": lambda: data.take(stateful(), 3),
    "take of batches": lambda: data.take(long(), 0.5),
    "stream": lambda: data.stream(endless(), 3),
    "nested": lambda: data.zip((data.concat(short(), data.take(stateful(), 2)), data.stream(endless(), 9))),
    "prefetch": lambda: data.prefetch(data.zip((long(), stateful())), "cpu", depth=3),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_resume_at_every_batch(kind: str) -> None:
    source = SOURCES[kind]()
    assert isinstance(source, data.Source)
    for epoch in range(3):
        whole, states = [], [source.state()]
        for batch in source.open(epoch, 0, None if epoch == 0 else states[0]):
            whole.append(batch)
            states.append(source.state())
        assert len(whole) == source.length() > 1
        for position in range(len(whole)):
            assert tree.equal(list(SOURCES[kind]().open(epoch, position, states[position])), whole[position:])


def test_shortest_ends_with_the_first() -> None:
    pairs = list(data.zip({"a": long(), "b": short()}).open(0, 0, None))
    assert len(pairs) == 3
    assert tree.equal([p["b"] for p in pairs], list(short()))
    unknown = data.zip((long(), lambda: iter([1, 2])))
    assert unknown.length() is None
    assert len(list(unknown.open(0, 0, None))) == 2


def test_cycle_starts_the_shorter_again_in_a_new_order() -> None:
    source = data.zip((long(), short()), mode="cycle")
    assert source.length() == 7
    columns = [[p[1] for p in source.open(e, 0, None)] for e in range(2)]
    passes = [torch.cat(c[i : i + 3]).tolist() for c in columns for i in (0, 3)]
    assert all(sorted(p) == list(range(100, 106)) for p in passes)
    assert len({tuple(p) for p in passes}) == 4
    assert tree.equal([p[0] for p in source.open(1, 0, None)], list(long().epoch(1)))


def test_pad_gives_none() -> None:
    rows = list(data.zip([long(), short()], mode="pad").open(0, 0, None))
    assert [r[1] is None for r in rows] == [False] * 3 + [True] * 4


def test_concat_is_one_after_the_other() -> None:
    source = data.concat(short(), [7, 8])
    assert source.length() == 5
    assert tree.equal(list(source.open(2, 0, None)), [*short().epoch(2), 7, 8])


def test_take_never_reads_one_too_many() -> None:
    numbers = itertools.count()
    source = data.take(numbers, 3)
    assert list(source.open(0, 0, None)) == [0, 1, 2]
    assert next(numbers) == 3
    assert data.take([1, 2, 3, 4], 0.5).length() == 2


def test_stream_goes_on() -> None:
    source = data.stream(endless(), 4)
    seen = [b.tolist() for e in range(3) for b in source.open(e, 0, source.state())]
    straight = [b.tolist() for b in itertools.islice(iter(endless()), 12)]
    assert seen == straight


def test_closing_closes_the_parts() -> None:
    closed = []

    class Part:
        def length(self) -> int:
            return 2

        def open(self, epoch: int, batch: int, state: Any):
            return iter([1, 2][batch:])

        def state(self) -> None:
            return None

        def close(self) -> None:
            closed.append(self)

    made = [
        data.zip((Part(),)),
        data.concat(Part()),
        data.take(Part(), 1),
        data.stream(Part(), 1),
        data.prefetch(Part(), "cpu"),
    ]
    for source in made:
        source.close()
    assert len(closed) == 5


def test_refusals() -> None:
    def unknown():
        return iter([1])

    cases = [
        (lambda: data.zip({}), "there is nothing to zip"),
        (lambda: data.zip((long(),), mode="longest"), "zip has no such mode"),
        (
            lambda: data.zip({"a": long(), "b": unknown}, mode="cycle"),
            "a source of unknown length cannot be combined with others",
        ),
        (
            lambda: data.zip((long(), long().take(0)), mode="cycle"),
            "a source of no batches cannot be combined with others",
        ),
        (lambda: data.concat(), "there is nothing to concatenate"),
        (lambda: data.concat(unknown, long()), "sources[0]"),
        (lambda: data.take(unknown, 0.5), "0.5 is a fraction of the length"),
        (lambda: data.take([1], -1), "a limit is a number of batches"),
        (lambda: data.stream(unknown, 0), "an epoch of a stream has 1 or more batches"),
        (lambda: data.prefetch([1], "cpu", depth=0), "a depth is a number of batches"),
    ]
    for make, text in cases:
        with pytest.raises(DataError) as caught:
            make()
        assert text in str(caught.value)


def test_a_part_that_ends_before_its_length_ends_a_cycle() -> None:
    with pytest.raises(DataError) as caught:
        list(data.zip((long(), torch.utils.data.DataLoader(_Half(), 2)), mode="cycle").open(0, 0, None))
    assert "a source ended before its length" in str(caught.value)
    assert "after 1 of 3 batches" in str(caught.value)


class _Half(torch.utils.data.IterableDataset[int]):
    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        return iter([1, 2])
