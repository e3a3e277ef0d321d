from __future__ import annotations

import numpy as np
import torch

from purestep import tree
from purestep.snapshot.staging import Staging


def test_copies_are_the_logical_bytes_and_do_not_move(seed):
    base = torch.randn(6, 7)
    values = [
        *(base, base.T, base[::2, 1::3], torch.tensor(2.0), torch.empty(0, 3), torch.randn(1, 3).expand(4, 3)),
        *(torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3, 2, dtype=torch.complex128).T),
        *(torch.randn(3, dtype=torch.complex128).conj().imag, base.bfloat16()),
    ]
    want = [tree.tensor_bytes(value).copy() for value in values]
    copies = Staging().copy(values)
    base.zero_()
    for copy, expected in zip(copies(), want, strict=True):
        assert np.array_equal(copy, expected)


def test_numpy_arrays_of_any_strides():
    base = np.arange(24.0).reshape(4, 6)
    fixed = np.arange(3)
    fixed.flags.writeable = False
    values = [base[::-1, ::2], base.T, np.asarray(5), fixed, np.zeros((0, 2)), np.arange(3, dtype=">i4")]
    want = [np.ascontiguousarray(value).tobytes() for value in values]
    copies = Staging().copy(values)
    base[:] = 0
    assert [copy.tobytes() for copy in copies()] == want


def test_buffers_are_used_again_only_where_they_fit(seed):
    staging = Staging()
    staging.copy([torch.randn(5), torch.randn(3)])()
    first = [buffer.data_ptr() for buffer in staging.buffers]
    staging.copy([torch.randn(5), torch.randn(4), torch.arange(2)])()
    second = [buffer.data_ptr() for buffer in staging.buffers]
    assert second[0] == first[0]
    assert [tuple(buffer.shape) for buffer in staging.buffers] == [(5,), (4,), (2,)]
    staging.clear()
    assert staging.buffers == []
