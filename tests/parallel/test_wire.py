"""Messages between stages over lines that know no tags, in one process."""

from __future__ import annotations

import types
from collections import defaultdict, deque

import pytest
import torch

from purestep.parallel import wire
from purestep.parallel.wire import Key, Lines, Wire


class Line:
    """Two ranks: what one sends over a group the other takes in the same order, as NCCL does."""

    def __init__(self):
        self.waiting, self.me = defaultdict(deque), 0

    def isend(self, tensor, to, group):
        self.waiting[group, self.me, to].append(tensor.clone())
        return types.SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

    def recv(self, tensor, source, group):
        sent = self.waiting[group, source, self.me].popleft()
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)

    def wires(self, patch):
        names = {"isend": self.isend, "recv": self.recv, "get_rank": lambda group: self.me}
        patch.setattr(wire, "dist", types.SimpleNamespace(**names, get_process_group_ranks=lambda group: [0, 1]))
        found = []
        for self.me in (0, 1):
            found.append(Wire(Lines("up", "down"), torch.device("cpu")))
        return found


def tensors_of(g):
    """Tensors of several kinds, some of them not there."""
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]
    for _ in range(int(torch.randint(0, 5, (), generator=g))):
        shape = torch.randint(0, 5, (int(torch.randint(0, 4, (), generator=g)),), generator=g).tolist()
        chosen = kinds[int(torch.randint(0, 5, (), generator=g))]
        x = torch.randn(shape, generator=g).mul(9).to(chosen)
        x = x.transpose(0, -1) if x.dim() > 1 else x
        trained = chosen.is_floating_point and bool(torch.randint(0, 2, (), generator=g))
        yield None if int(torch.randint(0, 4, (), generator=g)) == 0 else x.requires_grad_(trained)


@pytest.mark.parametrize("seed", range(6))
def test_messages_are_found_in_another_order_than_that_in_which_they_were_sent(seed, monkeypatch):
    """Of an interleaved model whose first and last stage share a parameter the gradients come before their turn."""
    g, line = torch.Generator().manual_seed(seed), Line()
    wires = line.wires(monkeypatch)
    kinds = ["forward", "backward", "tied", "tied gradients", "metrics", "buffers"]
    keys = [Key(kind, stage, index, item) for kind in kinds for stage in (0, 3) for index in (0, 70) for item in (0, 1)]
    for source in (0, 1):
        sent = {}
        for number in torch.randperm(len(keys), generator=g).tolist():
            line.me, sent[keys[number]] = source, list(tensors_of(g))
            wires[source].send(1 - source, keys[number], sent[keys[number]])
        for number in torch.randperm(len(keys), generator=g).tolist():
            line.me = 1 - source
            found, wanted = wires[1 - source].receive(source, keys[number]), sent[keys[number]]
            assert [x is None for x in found] == [x is None for x in wanted]
            for x, y in zip(found, wanted, strict=True):
                if x is not None:
                    assert (x.dtype, x.shape, x.requires_grad) == (y.dtype, y.shape, y.requires_grad)
                    assert torch.equal(x, y)
                    assert x.stride() == y.stride() or 0 in x.shape
        assert wires[1 - source].early == {}
    assert not any(line.waiting.values())
    assert {group for group, *_ in line.waiting} == {"up", "down"}
