"""Runs the Triton kernels of `purestep.random` in Triton's interpreter on CPU tensors, beside the CPU's own draws.

Started with TRITON_INTERPRET=1 by `test_draws.py`, because Triton decides at its import. The operators are given the
kernels for CPU tensors, too, and the package is told that the CPU is a card; so whole calls of `ps.random` run through
them. Prints a line of JSON: for each case the number of elements that differ, the largest
relative difference, and whether shapes and dtypes are those of the CPU.
"""

from __future__ import annotations

import json

import torch

import purestep as ps
from purestep.random import card, draws, keys
from purestep.random.philox import philox
from purestep.random.torch_random import KeyedRandom

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTS = (3, 1024, 1403)  # less than a block of words, one program of 256 blocks, and an uneven part of another
r = ps.random


def cases(seed):
    """Calls by name, each of which returns tensors."""
    key = r.key(seed)
    other = torch.Generator().manual_seed(seed % 1000)
    found = {}
    for parts in ((0,), (-5,), (2**40 + 7,), ("dropout",), (3, "a", 4)):
        found[f"fold {parts}"] = lambda parts=parts: [r.fold_in(key, *parts)]
        found[f"fold tensors {parts}"] = lambda parts=parts: [
            r.fold_in(key, *(p if isinstance(p, str) else torch.tensor(p) for p in parts))
        ]
    found["fold int32"] = lambda: [r.fold_in(key, torch.tensor(-7, dtype=torch.int32))]
    for n in COUNTS:
        far = torch.randint(0, 2**40, (n,), generator=other)
        for name, index in ((f"{n}", None), (f"{n} indexed", far)):
            found[f"bits {name}"] = lambda n=n, i=index: [r.bits(key, (n,), index=i)]
            found[f"randint {name}"] = lambda n=n, i=index: [r.randint(key, (n,), -5, 1000, index=i)]
            for p in (0.0, 0.1, 0.9, 1.0):
                found[f"bernoulli {p} {name}"] = lambda n=n, i=index, p=p: [r.bernoulli(key, p, (n,), index=i)]
            for dtype in FLOATS:
                kind = str(dtype).removeprefix("torch.")
                found[f"uniform {kind} {name}"] = lambda n=n, i=index, d=dtype: [r.uniform(key, (n,), dtype=d, index=i)]
                found[f"normal {kind} {name}"] = lambda n=n, i=index, d=dtype: [r.normal(key, (n,), dtype=d, index=i)]
    column, row = torch.randint(0, 2**32, (5, 1), generator=other), torch.randint(0, 2**32, (7,), generator=other)
    for name, words in {
        "numbers and a row": ((row, 0, 5, 3), (key[0], key[1])),
        "a column and a row": ((column, row, 2**32 - 1, 1), (key[0], row)),
        "many": ((torch.arange(1403), 0, 0, 3), (key[0], 7)),
        "nothing": ((row[:0], 0, 0, 3), (key[0], 7)),
    }.items():
        found[f"block of {name}"] = lambda words=words: list(_block(*words))
    found["split"] = lambda: [r.split(key, 300)]
    found["permutation"] = lambda: [r.permutation(key, 101)]
    found["categorical"] = lambda: [r.categorical(key, torch.zeros(7, 5))]
    found["nothing"] = lambda: [r.uniform(key, (0, 3)), r.dropout(key, torch.ones(0), 0.5)]
    for dtype in FLOATS:
        x = torch.randn(37, 5, 7, generator=other, dtype=torch.float64).to(dtype)
        grad = torch.randn(37, 5, 7, generator=other, dtype=torch.float64).to(dtype)
        for rate in (0.1, 0.5, 0.9):
            kind = str(dtype).removeprefix("torch.")
            found[f"dropout {rate} {kind}"] = lambda x=x, g=grad, rate=rate: _differentiated(key, x, g, rate)
            found[f"dropout {rate} {kind} transposed"] = lambda x=x, g=grad, rate=rate: _differentiated(
                key, x.transpose(0, 2), g.transpose(0, 2), rate
            )
    found["in a model"] = lambda: [_model(key, torch.ones(6, 5))]
    return found


def _differentiated(key, x, grad, rate):
    x = x.detach().requires_grad_()
    y = r.dropout(key, x, rate)
    y.backward(grad)
    return [y.detach(), x.grad]


def _model(key, x):
    with KeyedRandom(key):
        h = torch.nn.functional.dropout(x, 0.3)
        return h + torch.rand(6, 5) + torch.randn_like(h) + torch.nn.functional.alpha_dropout(x, 0.2, True)


def _block(counter, key):
    return card.block(counter, key) if card.draws is not _draws else philox(counter, key)


def _as_a_card(yes, words=False):
    """Let the CPU be a card, or itself; its kernels are given keys in memory, or their words."""
    card._given = _given if words else lambda key: (key, 0, 0)
    card.draws = (lambda device, *tensors: True) if yes else _draws
    # A key of the CPU is not folded and drawn from in Python then.
    keys.is_host = (lambda *tensors: False) if yes else _is_host
    draws.is_host = keys.is_host


_draws, _is_host, _given = card.draws, keys.is_host, card._given


def main():
    card.implement(card._library(), "CPU")
    found = {}
    for name, call in cases(0x9ABCDEF181234567).items():
        _as_a_card(False)
        expected = call()
        pairs = []
        for words in (False, True):
            _as_a_card(True, words)
            pairs += zip(call(), expected, strict=True)
        odd = sum(int((a != b).sum()) for a, b in pairs)
        relative = [
            float(((a - b) / b.abs().clamp(min=1e-30)).abs().max())
            for a, b in pairs
            if a.is_floating_point() and a.numel()
        ]
        alike = all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
        found[name] = [odd, max(relative, default=0.0), alike]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
