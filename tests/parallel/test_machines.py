"""Sums in the tree over members on several machines: what they send between machines, and that they add the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from purestep.distributed import collectives, machines
from purestep.distributed.collectives import Pending
from purestep.parallel.tree_reduce import Summing, whole_sum
from purestep.treesum import TreeSum, forest


class Board:
    """Where members leave what they send to one another, and find it when they wait for it.

    Args:
        size: number of members; groups are tuples of them.
        places: members on a machine.
    """

    def __init__(self, size, places):
        self.size, self.places = size, places
        self.left, self.turns, self.between, self.me = {}, Counter(), 0, 0

    def exchange(self, sent, group, lengths, own):
        pieces = [sent[place * own : (place + 1) * own] for place in range(len(group))]
        self.between += sum(
            piece.numel() * piece.element_size()
            for other, piece in zip(group, pieces, strict=True)
            if other // self.places != self.me // self.places
        )
        here = group.index(self.me)

        def collected(told):
            assert [len(pieces[here]) for pieces in told] == list(lengths)
            return torch.cat([pieces[here] for pieces in told])

        return self.coming(group, pieces, collected)

    def gather(self, sent, group):
        return self.coming(group, sent, torch.stack)

    def coming(self, group, value, collected):
        turn = self.turns[self.me, group] = self.turns[self.me, group] + 1
        self.left[group, turn, self.me] = value
        keys = [(group, turn, other) for other in group]
        return Pending(torch.empty(0), after=lambda _: collected([self.left[key] for key in keys]))

    def grid(self, group):
        found = machines.by_machine([group], self.places)
        if found is None:
            return None
        (parts,) = found
        (inside,) = [tuple(members) for members in parts if self.me in members]
        (across,) = [place for place in zip(*parts, strict=True) if self.me in place]
        return machines.Grid(inside, across, len(parts), len(inside))

    def sums(self, held, width, patch):
        """Return the sum that each member finds of values of microbatches, which `held` shares out."""
        patch.setattr(collectives, "exchange", self.exchange)
        patch.setattr(collectives, "gather", self.gather)
        patch.setattr(collectives, "rank_in", lambda group: group.index(self.me))
        patch.setattr(machines, "grid", self.grid)
        owners, sums = [forest(indices) for indices in held], []
        for self.me, indices in enumerate(held):
            trees = TreeSum(torch.add)
            for index in indices:
                trees.add(value_of(index, width), index)
            sums.append(Summing(trees.nodes, owners, tuple(range(self.size)), torch.empty(width)))
        for _ in range(2):  # every member begins an exchange before one waits for it
            for self.me, each in enumerate(sums):
                each.advance()
        return [whole_sum(each) for each in sums]


def value_of(index, width):
    return torch.randn(width, generator=torch.Generator().manual_seed(index)) * 10.0 ** (index % 5)


def runs(size, count, filled):
    each = count // size
    return [[i for i in range(r * each, (r + 1) * each) if i < filled] for r in range(size)]


def turns(size, count, filled):
    return [[i for i in range(r, count, size) if i < filled] for r in range(size)]


CASES = [(4, 2), (6, 2), (6, 3), (8, 4), (8, 2), (12, 4), (12, 3), (9, 3), (5, 2), (7, 7)]


@pytest.mark.parametrize("shared", [runs, turns])
@pytest.mark.parametrize(("size", "places"), CASES)
def test_machines_add_as_one_process_does(size, places, shared, monkeypatch):
    for count, filled in [(1, size), (3, 3 * size), (2, 2 * size - 1), (1, 1), (1, size // 2)]:
        held, width = shared(size, count * size, filled), 11
        alone = TreeSum(torch.add)
        for index in range(filled):
            alone.add(value_of(index, width), index)
        for each in (places, size):  # several machines, and one
            found = Board(size, each).sums(held, width, monkeypatch)
            assert all(torch.equal(x, alone.result()) for x in found), (count, filled, each)


def sent_between(size, places, held, monkeypatch, levels):
    """Return the bytes that slices take between machines, with the sum of a machine and without."""
    board = Board(size, places)
    if not levels:
        board.grid = lambda group: None
    board.sums(held, 8 * size, monkeypatch)
    return board.between


@pytest.mark.parametrize(("size", "places"), [(4, 2), (8, 2), (8, 4), (16, 8), (12, 4), (16, 4)])
@pytest.mark.parametrize("each", [1, 2])
def test_a_machine_sends_one_sum_where_its_ranks_hold_a_part_of_the_tree(size, places, each, monkeypatch):
    held = runs(size, size * each, size * each)
    with_levels, without = (sent_between(size, places, held, monkeypatch, levels) for levels in (True, False))
    assert without == places * with_levels == places * (size // places - 1) * 8 * size * 4


def test_a_machine_whose_ranks_hold_no_part_of_the_tree_sends_fewer_sums_or_the_same(monkeypatch):
    odd = runs(6, 6, 6)  # of three: 0 and 1, 2; 3, 4 and 5
    found = [sent_between(6, 3, odd, monkeypatch, levels) for levels in (True, False)]
    assert found == [found[1] * 4 // 6, 6 * 48 * 4 // 2]
    apart = [[0, 4], [2, 6], [1, 5], [3, 7]]  # of which no machine can add any
    assert sent_between(4, 2, apart, monkeypatch, True) == sent_between(4, 2, apart, monkeypatch, False)


def test_a_launcher_that_says_nothing_or_different_things_leaves_one_level():
    assert [machines.agreed(told) for told in ([1] * 8, [8] * 8, [4] * 8, [4] * 6, [4, 4, 4, 4, 1, 1, 1, 1])] == [
        *(1, 8, 4, 1, 1)
    ]
    assert machines.by_machine([[0, 1, 2, 3]], 1) is machines.by_machine([[0, 1, 2, 3]], 4) is None
    assert machines.by_machine([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], 6) is None
