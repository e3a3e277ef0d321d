"""What workers are sent: definitions that they cannot import go by value, come back as themselves, and are named."""

from __future__ import annotations

import collections
import dataclasses
import enum
import pickle
import sys
import threading
import types

import pytest
import torch

from purestep import data, tree
from purestep.data import sending
from purestep.errors import DataError

SESSION = """
import dataclasses, enum, collections
import torch

Pair = collections.namedtuple("Pair", "x kind")

class Kind(enum.Enum):
    EVEN = 0
    ODD = 1

@dataclasses.dataclass
class Item:
    x: torch.Tensor
    kind: Kind

def helper(x):
    return x * 3

class Base:
    def __len__(self):
        return 20

class Items(Base):
    def __init__(self):
        super().__init__()
        self.rows = torch.arange(40.0).reshape(20, 2)

    def __getitem__(self, i):
        return Item(helper(self.rows[i]) + torch.rand(2), Kind(i % 2))

def collate(items):
    return Pair(torch.stack([item.x for item in items]), [item.kind for item in items])
"""


@pytest.fixture
def session(monkeypatch):
    """A main module of no file, as a notebook has one."""
    module = types.ModuleType("__main__")
    exec(SESSION, module.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def test_a_session_is_sent_by_value_and_its_classes_come_back_as_themselves(session) -> None:
    source = data.batches(session.Items(), 4, collate=session.collate, seed=3)
    loader = source._loader
    assert sending.by_value(loader)
    (request, *_) = source.order.requests(0)
    here = next(iter(source.epoch(0)))
    worker = sending.unpacked(sending.packed(loader))
    method = session.Pair._replace
    there = pickle.loads(pickle.dumps(sending.Returned(worker.load(request)))).batch
    assert type(there) is session.Pair
    assert torch.equal(there.x, here.x)
    assert there.kind == here.kind  # the very members of the enumeration
    assert session.Pair._replace is method  # the class of this process is not written over
    assert not sending.is_plain(there)


def test_definitions_that_changed_are_noticed(session) -> None:
    loader = data.batches(session.Items(), 4, collate=session.collate)._loader
    sent = sending.Sent.of(loader)
    assert sent.is_current(loader)
    exec("def helper(x):\n    return x * -3", session.__dict__)  # what __getitem__ calls: the cell was run again
    assert not sent.is_current(loader)
    exec("def helper(x):\n    return x * 3", session.__dict__)
    loader.dataset.rows = loader.dataset.rows + 1
    assert not sent.is_current(loader)


def test_what_has_a_file_goes_by_reference(sets) -> None:
    loader = data.batches(sets.Noisy(8), 2, transform=sets.keyed)._loader
    assert sending.Sent.of(loader) == sending.Sent(False, None)


@pytest.mark.slow
def test_a_lambda_gives_the_same_bits_in_workers(sets) -> None:
    scale = torch.tensor(2.5)
    alone = data.batches(sets.Noisy(8), 2, transform=lambda sample, key: (sample, scale * key[0]))
    source = alone.replace(num_workers=1)
    assert tree.equal(list(source), list(alone))
    first = source._pools._idle.pids
    assert tree.equal(list(source.epoch(1)), list(alone.epoch(1)))
    assert source._pools._idle.pids == first  # sent once: nothing has changed
    scale += 1
    assert tree.equal(list(source.epoch(0)), list(alone.epoch(0)))
    source.close()


class Holder:
    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return i


def refusal(dataset, **functions) -> str:
    with pytest.raises(DataError) as caught:
        list(data.batches(dataset, 2, num_workers=1, **functions))
    return str(caught.value)


def test_what_cannot_be_sent_is_named(session) -> None:
    lock = threading.Lock()
    with open(__file__) as file:
        text = refusal(Holder(parts={"a": [1, (2, file)]}))
        assert "the dataset of a loader cannot be sent to worker processes" in text
        assert "where:   dataset.parts['a'][1][1]: _io.TextIOWrapper" in text
        assert "open files and connections in __getitem__, not before; or num_workers=0" in text
    text = refusal(Holder(), transform=lambda sample, key: (sample, lock))
    assert "the transform of a loader cannot be sent" in text
    assert "where:   transform (its variable 'lock'): _thread.lock" in text
    exec("import threading\nlock = threading.Lock()\ndef collate(items):\n    return lock and items", session.__dict__)
    assert "collate (the global 'lock' that it uses): _thread.lock" in refusal(Holder(), collate=session.collate)
    assert "dataset[1].inner.lock: _thread.lock" in refusal([Holder(), Holder(inner=Holder(lock=lock))])


@pytest.mark.parametrize(
    ("batch", "plain"),
    [
        (torch.ones(2), True),
        ({"x": [torch.ones(2), 1.0, None], "y": ("a", b"b")}, True),
        (dataclasses.make_dataclass("D", ["x"])(1), False),
        ([enum.Enum("E", "A").A], False),
        (collections.namedtuple("N", "x")(1), False),
    ],
)
def test_what_any_process_knows(batch, plain) -> None:
    assert sending.is_plain(batch) is plain
