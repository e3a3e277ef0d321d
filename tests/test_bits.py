"""Bits of leaves: every dtype, every bit, and distances against numpy."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep.bits import BLOCK, describe, digest_leaves, digest_row, digest_rows, leaf_bytes, tensor_bytes
from purestep.errors import TreeError
from purestep.tree import diff, digest, equal

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8]
OTHERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
DTYPES = [*FLOATS, *OTHERS, torch.bool, torch.complex64, torch.complex128]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3)]


def random_bits(shape, dtype, seed):
    """A tensor with random bytes: all values of a dtype, NaN payloads included."""
    width = dtype.itemsize
    count = math.prod(shape)
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (count, width), generator=torch.Generator().manual_seed(seed)
    )
    return raw.to(torch.uint8).reshape(-1).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_elements(dtype, shape):
    t = random_bits(shape, dtype, seed=len(shape))
    raw = tensor_bytes(t)
    assert raw.dtype == np.uint8
    assert raw.nbytes == t.numel() * dtype.itemsize
    assert digest(t) == digest(t.clone())
    assert equal(t, t.clone())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_flipped_bit_changes_the_digest_and_is_found(dtype):
    t = random_bits((3, 5), dtype, seed=1)
    before = digest({"x": t})
    for bit in (0, 7 if dtype != torch.bool else 0, 8 * dtype.itemsize * 15 - 8):
        other = t.clone()
        flat = other.reshape(-1).view(torch.uint8)
        flat[bit // 8] ^= 1 << bit % 8
        assert digest({"x": other}) != before
        (difference,) = diff({"x": t}, {"x": other}, "s")
        assert difference.path == "s['x']"
        assert difference.elements == 1


def test_dtype_and_shape_count_and_strides_do_not():
    t = torch.arange(12.0).reshape(3, 4)
    assert len({digest(x) for x in (t, t.reshape(4, 3), t.to(torch.float64), t.view(torch.int32), t.reshape(-1))}) == 5
    assert digest(t.T.contiguous()) == digest(t.T)
    assert digest(torch.stack([t, t], -1)[..., 0]) == digest(t)
    assert digest(t[:, ::2]) == digest(t[:, ::2].clone())
    assert digest(torch.ones(1).expand(5)) == digest(torch.ones(5))
    assert digest(torch.zeros(0, 3)) != digest(torch.zeros(3, 0))
    assert digest(torch.zeros(())) != digest(torch.zeros(1))


def test_conjugate_and_negative_bits_are_resolved():
    z = torch.complex(torch.randn(5), torch.randn(5))
    assert z.conj().is_conj()
    assert digest(z.conj()) == digest(z.conj().resolve_conj())
    assert digest(z.conj()) != digest(z)
    assert z.conj().imag.is_neg()
    assert digest(z.conj().imag) == digest(z.conj().imag.clone().resolve_neg())
    assert diff(z.conj(), z)[0].max_abs == pytest.approx(2 * z.imag.abs().max().item())


def test_shared_storage_and_gradients_do_not_show():
    base = torch.randn(6)
    assert digest({"a": base[:3], "b": base[:3]}) == digest({"a": base[:3].clone(), "b": base[:3].clone()})
    assert digest(base.clone().requires_grad_()) == digest(base)
    assert digest(torch.nn.Parameter(base)) == digest(base)


def test_numpy_arrays_count_by_value_of_any_byte_order():
    a = np.arange(5, dtype=np.float32)
    assert digest(a) == digest(torch.from_numpy(a)) == digest(a.astype(">f4"))
    assert digest(a[::-1]) == digest(a[::-1].copy())
    assert not diff(a, a.astype(">f4"))
    (found,) = diff(a.astype(">f4"), (a + 1).astype(">f4"))
    assert (found.max_abs, found.elements) == (1.0, 5)
    assert digest(np.float32(3)) == digest(torch.tensor(3.0))


def test_small_floats_of_ml_dtypes_are_numbers():
    import ml_dtypes

    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        mine = torch.tensor([1.0, -2.5, 0.0]).to(getattr(torch, name))
        theirs = np.array([1.0, -2.5, 0.0], getattr(ml_dtypes, name))
        assert digest(mine) == digest(theirs)
        assert diff(theirs, np.array([1.0, -2.5, 1.0], getattr(ml_dtypes, name)))[0].max_abs == 1.0


@pytest.mark.parametrize("leaf", [True, 3, -(2**80), 2.5, float("nan"), -0.0, 1j, "text", b"bytes", ""], ids=repr)
def test_python_leaves_have_digests_of_their_own_type(leaf):
    values = [True, 1, 1.0, 1 + 0j, "1", b"1"]
    assert len({digest(v) for v in values}) == len(values)
    assert digest(leaf) == digest(leaf)
    assert equal(leaf, leaf)
    assert digest(leaf) != digest({"": leaf})


@pytest.mark.parametrize(
    "leaf",
    [object(), torch.nn.Linear(1, 1), np.array(["a"]), np.array([object()]), np.zeros(2, [("a", "i4")]), {1, 2}, print],
    ids=lambda x: type(x).__name__,
)
def test_a_leaf_without_bytes_is_refused_by_path(leaf):
    for call in (lambda: digest({"a": [leaf]}), lambda: diff({"a": [leaf]}, {"a": [1]})):
        with pytest.raises(TreeError, match=r"has no bytes to digest or compare(.|\n)*\['a'\]\[0\](.|\n)*@ps\.pytree"):
            call()


@given(st.dictionaries(st.text(max_size=4), st.integers(), max_size=5), st.randoms())
def test_order_of_leaves_does_not_matter_and_paths_do(values, rng):
    pairs = list(values.items())
    rng.shuffle(pairs)
    assert digest_leaves(pairs) == digest_leaves(values.items())
    assert digest(dict(pairs)) == digest(values)
    for path in values:
        assert digest_leaves([(p + "!" if p == path else p, v) for p, v in pairs]) != digest_leaves(pairs)


def test_the_boundary_between_leaves_counts():
    assert digest_leaves([("a", b"bc"), ("d", b"")]) != digest_leaves([("a", b"b"), ("d", b"c")])
    assert digest_leaves([("a\0bytes", b"")]) != digest_leaves([("a", b"")])


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("start", [0.0, 1.0, -1.0, 1e-4, 60000.0, 6e-8])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_ulps_count_the_steps_of_nextafter(dtype, start, steps):
    a = np.array(start, dtype)
    b = a
    for _ in range(steps):
        b = np.nextafter(b, dtype(np.inf))
    (found,) = diff(torch.from_numpy(a.reshape(1)), torch.from_numpy(b.reshape(1)))
    assert found.max_ulp == steps
    assert found.max_abs == float(b) - float(a)
    assert diff(b.reshape(1), a.reshape(1))[0].max_ulp == steps


def test_ulps_pass_through_zero_and_signed_zeros_are_no_step_but_a_difference():
    tiny = np.nextafter(np.float32(0), np.float32(1))
    assert diff(np.float32([-tiny]), np.float32([tiny]))[0].max_ulp == 2
    (found,) = diff(np.float32([-0.0]), np.float32([0.0]))
    assert (found.max_ulp, found.max_abs, found.elements) == (0, 0.0, 1)


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.bfloat16, torch.float16], ids=str)
def test_ulps_order_all_values_of_a_small_float(dtype):
    codes = torch.arange(2 ** (8 * dtype.itemsize)).to(torch.uint8 if dtype.itemsize == 1 else torch.uint16)
    values = codes.view(dtype)
    numbers = values[~torch.isnan(values.to(torch.float64))]
    numbers = numbers[numbers.to(torch.float64).argsort(stable=True)]
    wide = numbers.to(torch.float64)
    for i in range(0, len(numbers) - 1, max(1, len(numbers) // 300)):
        (found,) = diff(numbers[i : i + 1], numbers[i + 1 : i + 2])
        assert found.max_ulp == (0 if wide[i] == wide[i + 1] else 1)


def test_nan_inf_and_large_integers():
    inf, nan = math.inf, math.nan
    (found,) = diff(torch.tensor([inf, nan, 1.0]), torch.tensor([inf, nan, 3.0]))
    assert (found.elements, found.max_abs) == (1, 2.0)
    (found,) = diff(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0]))
    assert found.max_abs != found.max_abs
    assert found.max_ulp is None
    assert diff(torch.tensor([inf]), torch.tensor([-inf]))[0].max_abs == inf
    assert diff(torch.tensor([2**62]), torch.tensor([2**62 + 1]))[0].max_abs == 1.0
    assert diff(torch.tensor([-(2**63)]), torch.tensor([2**63 - 1]))[0].max_abs == 2.0**64
    assert diff(torch.tensor([True]), torch.tensor([False]))[0].max_abs == 1.0


def test_the_text_of_differences():
    a = {"w": torch.zeros(3, 4), "n": 1, "gone": 2.0}
    b = {"w": torch.zeros(4, 3), "n": 3, "new": torch.zeros((), dtype=torch.bfloat16)}
    assert [str(d) for d in diff(a, b, "s")] == [
        "s['gone']: float 2.0 != missing",
        "s['n']: int 1 != int 3, max abs 2",
        "s['w']: float32[3, 4] != float32[4, 3]",
        "s['new']: missing != bfloat16[]",
    ]
    assert str(diff(a, b, "s")).splitlines() == [
        "path       leaf                            max abs  max rel",
        "s['gone']  float 2.0 != missing",
        "s['n']     int 1 != int 3                        2   0.6667",
        "s['w']     float32[3, 4] != float32[4, 3]",
        "s['new']   missing != bfloat16[]",
    ]
    assert repr(diff(a, b, "s")) == str(diff(a, b, "s"))
    assert str(diff(a, a)) == "equal"
    assert describe(np.zeros(2, np.int8)) == "int8[2]"


def test_leaf_bytes_name_the_path():
    with pytest.raises(TreeError, match=r"state\.x"):
        leaf_bytes("state.x", object())


def test_long_leaves_are_hashed_by_blocks_and_every_block_counts():
    raw = torch.randint(0, 256, (2 * BLOCK + 17,), dtype=torch.uint8)
    blocks = [raw[:BLOCK], raw[BLOCK : 2 * BLOCK], raw[2 * BLOCK :]]
    each = b"".join(hashlib.sha256(block.numpy()).digest() for block in blocks)
    header = f"['w']\0uint8[{len(raw)}]\0{len(raw)}\0".encode()
    want = hashlib.sha256(len(header).to_bytes(8, "little") + header + hashlib.sha256(each).digest()).hexdigest()
    assert digest({"w": raw}) == want
    for position in (0, BLOCK - 1, BLOCK, 2 * BLOCK, len(raw) - 1):
        other = raw.clone()
        other[position] ^= 1
        assert digest({"w": other}) != want
    assert digest({"w": torch.cat([blocks[1], blocks[0], blocks[2]])}) != want
    small = raw[:BLOCK]
    assert digest({"w": small}) == digest_rows([("['w']", f"uint8[{BLOCK}]", BLOCK, small.numpy().tobytes())])


def test_a_digest_can_be_put_together_from_rows_made_anywhere():
    values = {"b": torch.randn(300_000), "a": 3, "c": np.arange(4)}
    rows = [(path, *digest_row(path, leaf)) for path, leaf in values.items()]
    assert digest_rows(reversed(rows)) == digest_leaves(values.items())


def test_integers_of_any_size_have_digests_and_print():
    large = 10**5000
    assert len({digest(value) for value in (large, large + 1, -large, hex(large))}) == 4
    assert describe(large).startswith("int 0x")
    assert str(diff([large], [large + 1])[0]).startswith("[0]: int 0x")
