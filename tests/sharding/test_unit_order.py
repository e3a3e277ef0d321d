"""The order of collectives without any: ranks are threads that exchange numbers."""

import collections
import copy
import pickle
import threading

import pytest
import torch

from purestep.distributed import collectives
from purestep.errors import RankError
from purestep.parallel.fsdp_order import Agreed, Exchanges, Op, Orders, UnitOrder

PATHS = ["", "blocks.0", "blocks.1", "blocks.2"]


class Group:
    """Threads in place of ranks."""

    def __init__(self, count):
        self.barrier, self.numbers = threading.Barrier(count, timeout=20), [0] * count

    def exchange(self, rank, number):
        self.barrier.wait()
        self.numbers[rank] = number
        self.barrier.wait()
        return list(self.numbers)


@pytest.fixture
def together(monkeypatch):
    """Run microbatches of several ranks, given what each needs of both passes; return what each launched."""
    mine = threading.local()
    monkeypatch.setattr(collectives, "numbers", lambda number, group, device: group.exchange(mine.rank, number))
    monkeypatch.setattr(collectives, "rank_in", lambda group: mine.rank)

    def run(orders, *needs):
        group, launched = Group(len(needs)), [[] for _ in needs]
        problems = [None] * len(needs)

        def rank(number):
            mine.rank = number
            forward, backward = ([Op(kinds[op[0]], int(op[1:])) for op in part.split()] for part in needs[number])
            coming = {op.unit for op in backward if op.kind == "reduce"}

            there = collections.Counter()

            def launch(op):
                there[op.unit] += op.kind == "gather"
                launched[number].append(f"{op.kind[0]}{op.unit}")

            exchanges = Exchanges(
                orders[number], PATHS, group, torch.device("cpu"), launch, lambda unit: unit in coming
            )

            def need(op):
                if op.kind == "reduce":
                    coming.discard(op.unit)
                if op.kind == "reduce" or not there[op.unit]:
                    exchanges.need(op)
                there[op.unit] -= op.kind == "gather"

            try:
                for op in forward:
                    need(op)
                exchanges.end_forward()
                there.clear()
                for op in backward:
                    need(op)
                exchanges.end_backward()
            except RankError as error:
                problems[number] = str(error)

        kinds = {"g": "gather", "r": "reduce"}
        threads = [threading.Thread(target=rank, args=(n,)) for n in range(len(needs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return launched, problems

    return run


ALL = "g1 g2 g3", "g3 r3 g2 r2 g1 r1"


def test_ranks_that_need_the_same_agree_on_it(together):
    orders = [UnitOrder(), UnitOrder()]
    launched, _ = together(orders, ALL, ALL)
    assert launched[0] == launched[1] == " ".join(ALL).split()
    assert orders[0].agreed == orders[1].agreed
    assert orders[0].agreed.kept == {3}
    # Now the gathers go before the reductions, and no rank asks.
    launched, _ = together(orders, ("g1 g2 g3", "r3 g2 r2 g1 r1"), ("g1 g2 g3", "r3 g2 r2 g1 r1"))
    assert launched[0] == launched[1] == "g1 g2 g3 g2 r3 g1 r2 r1".split()


def test_ranks_that_need_different_units_take_part_in_all_of_them(together):
    orders = [UnitOrder(), UnitOrder(), UnitOrder()]
    launched, problems = together(orders, ("g1 g2", "g2 r2 g1 r1"), ("g3 g1", "g1 r1 g3 r3"), ("", ""))
    assert launched[0] == launched[1] == launched[2]
    assert {"g1", "g2", "g3"} <= set(launched[0])
    assert problems == [None] * 3
    assert all(order.differs and order.agreed is None for order in orders)
    # Once seen, it is not forgotten: they go on asking.
    together(orders, ALL, ALL, ALL)
    assert orders[0].agreed is None


def test_a_unit_that_no_rank_called_keeps_them_asking(together):
    orders = [UnitOrder(), UnitOrder()]
    needs = "g1 g2", "g2 r2 g1 r1"
    together(orders, needs, needs)
    assert orders[0].agreed is None
    assert not orders[0].differs
    together(orders, ALL, ALL)
    assert orders[0].agreed is not None


@pytest.mark.parametrize("needs", [("g2", "g2 r2"), ("", ""), ("g2 g1", "g1 r1 g2 r2"), ("g3", "r3")])
def test_a_rank_that_leaves_units_out_follows_the_agreed_order(together, needs):
    orders = [UnitOrder(), UnitOrder()]
    together(orders, ALL, ALL)
    launched, problems = together(orders, ("g1 g2 g3", "r3 g2 r2 g1 r1"), needs)
    assert launched[0] == launched[1]
    assert problems == [None, None]


@pytest.mark.parametrize(
    ("needs", "problem"),
    [
        (("g1 g2 g3 g2", ""), "forward pass: the order has no call of it here"),
        (("g1 g2 g3", "g1 r1 r2 r3"), "backward pass: the gradients of 'blocks.2' come first"),
    ],
)
def test_what_the_agreed_order_has_no_place_for_is_named(together, needs, problem):
    orders = [UnitOrder(), UnitOrder()]
    together(orders, ALL, ALL)
    _, problems = together(orders, needs, needs)
    for rank, text in enumerate(problems):
        assert "is not called in the order that the ranks agreed on" in text
        assert f"rank {rank}, {problem}" in text
        assert "fsdp(units=...) with globs that leave 'blocks.*' out" in text


def test_an_order_that_ends_with_what_the_backward_pass_begins_with_keeps_it_gathered():
    forward = [Op("gather", n) for n in (1, 2, 3)]
    two = Agreed.of(forward, [Op("gather", 3), Op("gather", 2), Op("reduce", 2)], ["", "a", "b", "b"])
    assert (two.kept, two.backward) == ({2, 3}, [Op("reduce", 2)])
    assert Agreed.of(forward, [Op("reduce", 3)], PATHS).kept == frozenset()


def test_orders_stay_with_the_step_that_they_are_of():
    class Units:
        pass

    orders, units = Orders(), Units()
    order = orders.of(units)
    order.differs = True
    assert orders.of(units) is order
    assert not orders.of(Units()).differs
    for other in (copy.deepcopy(orders), pickle.loads(pickle.dumps(orders))):
        assert other.of(units) is not order
