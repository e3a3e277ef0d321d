"""Small values of many ranks: added a level of the tree at once, with the bits of one by one."""

import pytest
import torch

import purestep as ps
from purestep.metrics import Last, Max, Mean, Min, Sum
from purestep.microbatch import Partial, merge
from purestep.parallel import small_exchange
from purestep.treesum import TreeSum


def part(weighted, generator):
    def number(*shape):
        return torch.randn(shape, generator=generator)

    counted = torch.randint(9, (), generator=generator)
    metrics = {"loss": Mean(number(), counted), "sums": Sum(number(3)), "min": Min(number()), "max": Max(number())}
    metrics["nan"] = Max(torch.tensor(float("nan")) if float(number()) > 0.8 else number())
    metrics["none"] = Sum(torch.zeros(0))
    return Partial(
        [], number().abs() if weighted else 7, {"seen": counted}, {**metrics, "last": Last(number().double())}
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 7, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bits_are_those_of_one_by_one(ranks, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [part(weighted, generator) for _ in range(ranks)]
    order = torch.randperm(ranks, generator=generator).tolist()
    owners = [[(2, place)] for place in order]
    like, structure = small_exchange._leaves(parts[0])
    flat = small_exchange._bytes(tuple((x.shape, x.dtype, x.device) for x in like))
    rows = torch.stack([flat.pack(small_exchange._leaves(parts[place])[0]) for place in order])
    whole = TreeSum(merge)
    for place, packed in zip(order, rows, strict=True):
        whole.put((2, place), small_exchange._without_vector(parts[0], flat.unpack(packed), structure))
    places = small_exchange._level_order(parts[0], owners)
    found = small_exchange._by_level(parts[0], flat.unpack_rows(rows[places]), structure)
    assert ps.digest((found.kept, found.metrics)) == ps.digest((whole.result().kept, whole.result().metrics))
    if weighted:
        assert ps.digest(found.weight) == ps.digest(whole.result().weight)


def test_other_metrics_and_other_trees_are_added_one_by_one():
    generator = torch.Generator().manual_seed(0)
    pattern = part(False, generator)
    assert small_exchange._level_order(pattern, [[(0, 0)], [(0, 1)]]) == [0, 1]
    assert small_exchange._level_order(pattern, [[(0, 0)], [(1, 1)]]) is None
    assert small_exchange._level_order(pattern, [[(0, 0), (0, 1)], [(0, 2)]]) is None
    assert small_exchange._level_order(pattern, [[(0, 1)], [(0, 2)]]) is None
    pattern.metrics = {"own": ps.metrics.confusion(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))}
    assert small_exchange._level_order(pattern, [[(0, 0)], [(0, 1)]]) is None
