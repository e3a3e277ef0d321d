"""Keys: known answers, the same bits everywhere, independence, distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared_marks import slow_but
from torch.fx.experimental.proxy_tensor import make_fx

from purestep import random
from purestep.errors import KeyShapeError
from purestep.random import philox

KNOWN = [  # Random123's kat_vectors, philox4x32 of 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WORDS = st.integers(0, 2**32 - 1)

# Every draw as a function of a key and an index, with the number of elements it is asked for.
DRAWS = {
    "bits": lambda k, n, i: random.bits(k, (n,), index=i),
    "uniform": lambda k, n, i: random.uniform(k, (n,), index=i),
    "uniform of a range": lambda k, n, i: random.uniform(k, (n,), minval=-3.0, maxval=5.5, index=i),
    "uniform float64": lambda k, n, i: random.uniform(k, (n,), dtype=torch.float64, index=i),
    "uniform bfloat16": lambda k, n, i: random.uniform(k, (n,), dtype=torch.bfloat16, index=i),
    "normal": lambda k, n, i: random.normal(k, (n,), index=i),
    "normal float64": lambda k, n, i: random.normal(k, (n,), dtype=torch.float64, index=i),
    "bernoulli": lambda k, n, i: random.bernoulli(k, 0.3, (n,), index=i),
    "randint": lambda k, n, i: random.randint(k, (n,), -5, 1000, index=i),
    "dropout": lambda k, n, i: random.dropout(k, torch.ones(n), 0.4, index=i),
}


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_of_random123(counter, key, answer):
    assert philox.philox(counter, key) == answer
    tensors = philox.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(t) for t in tensors) == answer


@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_the_fast_forms_give_the_words_of_the_block_function(counter, key):
    from purestep.random.philox import philox_int, philox_numpy

    assert philox_int(counter, key) == philox.philox(counter, key)[:2]
    blocks = [word for n in range(3) for word in philox.philox((n, 0, 0, 0), key)]
    assert philox_numpy(3, key).tolist() == blocks


def test_domains_of_one_key_never_meet():
    assert len({philox.DRAW, philox.FOLD_INT, philox.FOLD_STR, philox.SPLIT}) == 4
    k = random.key(5)
    folded = {tuple(random.fold_in(k, i).tolist()) for i in range(500)}
    texts = {tuple(random.fold_in(k, str(i)).tolist()) for i in range(500)}
    splits = {tuple(s) for s in random.split(k, 500).tolist()}
    words = random.bits(k, (2000,)).reshape(-1, 4)[:, :2].tolist()
    drawn = {tuple(w) for w in words}
    assert len(folded | texts | splits | drawn) == 2000


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_holds_all_bits_of_its_seed():
    assert random.key(0).tolist() == [0, 0]
    assert random.key(2**64 - 1).tolist() == [2**32 - 1, 2**32 - 1]
    assert random.key(np.int64(7)).tolist() == [7, 0]
    assert random.key(1 << 32).tolist() == [0, 1]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None, "0"], ids=repr)
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(KeyShapeError, match=r"a seed must be an integer in \[0, 2\*\*64\)(.|\n)*ps\.random\.key\(0\)"):
        random.key(seed)


@pytest.mark.parametrize(
    "key", [torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), 3, None], ids=str
)
def test_what_is_not_a_key_is_refused(key):
    for call in (random.bits, random.fold_in, random.split, random.normal):
        with pytest.raises(KeyShapeError, match=r"a PRNG key is an int64 tensor of shape \(2,\)(.|\n)*ps\.random\.key"):
            call(key)


@pytest.mark.parametrize("part", [1.5, None, True, torch.tensor([1, 2]), torch.tensor(1.0), 2**64, b"x"], ids=repr)
def test_what_cannot_be_folded_is_refused(part):
    with pytest.raises(KeyShapeError, match="only integers, 0-d integer tensors and strings can be folded"):
        random.fold_in(random.key(0), part)


@given(st.lists(st.one_of(st.integers(-(2**63), 2**64 - 1), st.text()), max_size=4), st.integers(0, 2**64 - 1))
def test_folding_parts_is_folding_one_after_the_other(parts, seed):
    k = random.key(seed)
    one_by_one = k
    for part in parts:
        one_by_one = random.fold_in(one_by_one, part)
    assert torch.equal(random.fold_in(k, *parts), one_by_one)
    assert k.tolist() == random.key(seed).tolist()


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_tensor_folds_like_its_value(value):
    k = random.key(3)
    assert torch.equal(random.fold_in(k, torch.tensor(value), "x"), random.fold_in(k, value, "x"))


@pytest.mark.slow
def test_a_traced_fold_has_the_bits_of_a_folded_number():
    k, fold = random.key(3), lambda k, v: random.fold_in(k, v, "x", 4)
    traced = make_fx(fold)(k, torch.tensor(1))
    for value in (0, 1, -1, 2**31, 2**32, -(2**63), 2**63 - 1):
        assert torch.equal(traced(k, torch.tensor(value)), fold(k, value))
    values = torch.arange(5)
    assert torch.equal(torch.func.vmap(fold, (None, 0))(k, values), torch.stack([fold(k, int(v)) for v in values]))


def test_the_parts_of_a_path_do_not_run_together():
    k = random.key(0)
    paths = [("a", "b"), ("ab",), ("a", "", "b"), ("", "ab"), ("b", "a"), (1, 2), (12,), (2, 1), ("1", 2), (1, "2"), ()]
    assert len({tuple(random.fold_in(k, *p).tolist()) for p in paths}) == len(paths)


def test_a_split_key_does_not_depend_on_how_many_are_split():
    k = random.key(9)
    assert torch.equal(random.split(k, 10)[:3], random.split(k, 3))
    assert random.split(k).shape == (2, 2)
    assert random.split(k, 0).shape == (0, 2)
    random.normal(random.split(k, 3)[1])


def test_the_default_device_and_the_global_generators_play_no_part():
    before = torch.get_rng_state()
    with torch.device("meta"):
        folded = random.fold_in(random.key(4), 1)
    assert torch.equal(folded, random.fold_in(random.key(4), 1))
    for draw in DRAWS.values():
        draw(random.key(1), 5, None)
    random.permutation(random.key(1), 5)
    random.categorical(random.key(1), torch.zeros(5))
    assert torch.equal(torch.get_rng_state(), before)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("count", slow_but([1, 3, 31, 1027], 31))
def test_the_same_bits_traced_batched_and_sliced(name, count, seed):
    draw, k = DRAWS[name], random.key(seed)
    eager = draw(k, count, None)
    traced = make_fx(lambda key: draw(key, count, None))(k)
    assert torch.equal(traced(k), eager)
    keys = random.split(k, 3)
    batched = torch.func.vmap(lambda key: draw(key, count, None))(keys)
    assert torch.equal(batched, torch.stack([draw(key, count, None) for key in keys]))
    for start, stop in ((0, count), (count // 2, count), (count // 3, count // 3 + 1)):
        part = draw(k, stop - start, torch.arange(start, stop))
        assert torch.equal(part, eager[start:stop])
    scattered = torch.arange(count).flip(0)
    assert torch.equal(draw(k, count, scattered), eager.flip(0))


def test_a_shape_only_folds_the_elements():
    k = random.key(8)
    assert torch.equal(random.normal(k, (3, 5)), random.normal(k, (15,)).reshape(3, 5))
    assert random.uniform(k).shape == ()
    assert random.uniform(k, (0, 4)).shape == (0, 4)
    assert torch.equal(random.bits(k, (7,)), random.bits(k, (100,))[:7])
    big = torch.tensor([2**40, 2**33 + 1])
    assert torch.equal(random.bits(k, (2,), index=big), torch.stack([random.bits(k, (), index=i) for i in big]))
    assert random.bits(k, (), index=torch.tensor(2**34)) != random.bits(k)


def test_a_wrong_index_is_refused():
    with pytest.raises(KeyShapeError, match=r"index= gives the position(.|\n)*torch\.int64\[3\], shape: \[4\]"):
        random.bits(random.key(0), (4,), index=torch.arange(3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_same_bits_compiled():
    def draws(k, step):
        keys = random.split(random.fold_in(k, step, "x"), 4)
        return {
            "split": keys,
            "uniform": random.uniform(keys[3], (5, 21), minval=-1.0, maxval=2.0),
            "normal": random.normal(keys[2], (101,)),
        }

    k, step = random.key(2**40 + 11), torch.tensor(12)
    eager = draws(k, step)
    compiled = torch.compile(draws, fullgraph=True)(k, step)
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name


# --- statistics -------------------------------------------------------------------------------------------------------

N = 40_000


def plausible(p):
    """Each of some fifty tests with fixed seeds: a p-value below 1e-4 is a defect, not bad luck."""
    assert p > 1e-4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uniform_is_uniform(dtype, seed):
    x = random.uniform(random.key(seed), (N,), dtype=dtype)
    assert x.dtype == dtype
    assert x.min() >= 0
    assert x.max() < 1
    width = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    # The grid of the dtype's own resolution, moved to the middle of its cells.
    spread = x.double() + 2.0 ** -(width + 1)
    if width >= 24:
        plausible(scipy.stats.kstest(spread.numpy(), "uniform").pvalue)
    counts = torch.histc(spread.float(), 64, 0, 1).numpy()
    plausible(scipy.stats.chisquare(counts).pvalue)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uniform_of_a_range_never_reaches_its_end(dtype, seed):
    for low, high in ((1.0, 2.0), (-3.0, -2.0), (100.0, 101.0)):
        x = random.uniform(random.key(seed), (N,), minval=low, maxval=high, dtype=dtype)
        assert low <= x.min()
        assert x.max() < high
    t = random.uniform(
        random.key(1), (3,), minval=torch.tensor([0.0, 10.0, 20.0]), maxval=torch.tensor([1.0, 11.0, 21.0])
    )
    assert t.floor().tolist() == [0, 10, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normal_is_normal(dtype, seed):
    x = random.normal(random.key(seed), (N,), dtype=dtype).double().numpy()
    plausible(scipy.stats.kstest(x, "norm").pvalue)
    assert abs(x.mean()) < 5 / math.sqrt(N)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / N)
    assert abs(scipy.stats.skew(x)) < 5 * math.sqrt(6 / N)
    assert abs(scipy.stats.kurtosis(x)) < 5 * math.sqrt(24 / N)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(N)
    assert np.abs(x).max() < 6.67


def test_keys_derived_from_one_another_are_not_correlated(seed):
    k = random.key(seed)
    relatives = [k, *[random.fold_in(k, i) for i in (0, 1, 2, "0", "a")], *random.split(k, 3), random.key(seed + 1)]
    rows = torch.stack([random.normal(r, (N,)) for r in relatives]).numpy()
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / math.sqrt(N)
    # The first number of each of many keys, as steps use them.
    firsts = np.array([random.uniform(random.fold_in(k, i)).item() for i in range(3000)])
    plausible(scipy.stats.kstest(firsts, "uniform").pvalue)
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 5 / math.sqrt(3000)


def test_each_bit_is_fair(seed):
    words = random.bits(random.key(seed), (N,))
    ones = torch.stack([(words >> b & 1).double().mean() for b in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("p", [0.0, 0.001, 0.3, 0.5, 0.9, 1.0])
def test_rates_of_bernoulli_and_dropout(p, seed):
    hits = random.bernoulli(random.key(seed), p, (N,)).double().mean().item()
    assert abs(hits - p) <= 5 * math.sqrt(p * (1 - p) / N)
    x = torch.full((N,), 3.0, requires_grad=True)
    y = random.dropout(random.key(seed), x, p)
    assert abs((y == 0).double().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / N)
    assert ((y == 0) | (y == 3.0 * (1.0 / (1.0 - p) if p < 1 else 1.0))).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, y.detach() / 3.0)


def test_bernoulli_takes_tensors_of_probabilities(seed):
    p = torch.tensor([0.0, 0.25, 1.0]).expand(N, 3)
    rates = random.bernoulli(random.key(seed), p).double().mean(0)
    assert rates[0] == 0
    assert rates[2] == 1
    assert abs(rates[1] - 0.25) < 0.015
    assert random.bernoulli(random.key(seed), torch.tensor(0.5), (4, 2)).shape == (4, 2)


@pytest.mark.parametrize(("low", "high"), [(0, 7), (-3, 3), (10**12, 10**12 + 5), (-(2**62), -(2**62) + 11)])
def test_randint_is_uniform_over_its_range(low, high, seed):
    x = random.randint(random.key(seed), (N,), low, high)
    assert x.dtype == torch.int64
    counts = torch.bincount(x - low, minlength=high - low)
    assert len(counts) == high - low
    plausible(scipy.stats.chisquare(counts.numpy()).pvalue)


def test_permutations_are_uniform(seed):
    k = random.key(seed)
    found: dict[tuple[int, ...], int] = {}
    for i in range(2400):
        p = tuple(random.permutation(random.fold_in(k, i), 4).tolist())
        found[p] = found.get(p, 0) + 1
    assert len(found) == 24
    plausible(scipy.stats.chisquare(list(found.values())).pvalue)


def test_permutations_of_rows_and_of_nothing():
    k, x = random.key(2), torch.arange(12).reshape(6, 2)
    assert torch.equal(random.permutation(k, x), x[random.permutation(k, 6)])
    assert random.permutation(k, 0).tolist() == []
    assert sorted(random.permutation(k, np.int64(9)).tolist()) == list(range(9))


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_categorical_draws_with_the_probabilities_of_softmax(dim, seed):
    logits = torch.randn(3, 3)
    draws = random.categorical(random.key(seed), logits, dim=dim, shape=(N,))
    assert draws.shape == (N, 3)
    p = torch.softmax(logits.double(), dim).movedim(dim, -1)
    for row in range(3):
        counts = torch.bincount(draws[:, row], minlength=3).numpy()
        plausible(scipy.stats.chisquare(counts, (p[row] * N / p[row].sum()).numpy()).pvalue)
    assert random.categorical(random.key(seed), torch.tensor([0.0, -math.inf, 0.0]), shape=(500,)).ne(1).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda k: random.uniform(k, dtype=torch.int64), r"no draw of dtype torch\.int64(.|\n)*float16, bfloat16"),
        (lambda k: random.normal(k, dtype=torch.complex64), r"no draw of dtype torch\.complex64"),
        (lambda k: random.uniform(k, minval=1.0, maxval=1.0), r"empty(.|\n)*minval=1.0, maxval=1.0"),
        (lambda k: random.randint(k, (), 3, 3), r"empty(.|\n)*low=3, high=3"),
        (lambda k: random.randint(k, (), -(2**63), 2**63), r"less than 2\*\*63 of them(.|\n)*random\.bits"),
        (lambda k: random.bernoulli(k, 1.1), r"a probability lies in \[0, 1\](.|\n)*p=1.1"),
        (lambda k: random.bernoulli(k, float("nan")), r"a probability lies in"),
        (lambda k: random.dropout(k, torch.ones(2), -0.1), r"a dropout rate lies in \[0, 1\](.|\n)*rate=-0.1"),
    ],
)
def test_draws_that_cannot_be_made_are_refused(call, text):
    with pytest.raises(KeyShapeError, match=text):
        call(random.key(0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout_keeps_the_dtype(dtype):
    x = torch.ones(64, dtype=dtype)
    assert random.dropout(random.key(0), x, 0.5).dtype == dtype
    assert random.normal(random.key(0), (3,), dtype=dtype).dtype == dtype
    assert random.dropout(random.key(0), x, 0.0) is x
