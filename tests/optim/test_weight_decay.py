"""The table of weight decay in docs/optim.md: what stands there as torch's behaviour is torch's."""

from __future__ import annotations

import pytest
import torch

from purestep import optim

WD = 0.1
L2 = {
    "sgd": (lambda: optim.sgd(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=WD)),
    "adam": (lambda: optim.adam(0.01), lambda p: torch.optim.Adam(p, 0.01, weight_decay=WD)),
    "amsgrad": (lambda: optim.amsgrad(0.01), lambda p: torch.optim.Adam(p, 0.01, weight_decay=WD, amsgrad=True)),
    "radam": (lambda: optim.radam(0.01), lambda p: torch.optim.RAdam(p, 0.01, weight_decay=WD)),
    "nadam": (lambda: optim.nadam(0.01), lambda p: torch.optim.NAdam(p, 0.01, weight_decay=WD)),
    "adamax": (lambda: optim.adamax(0.01), lambda p: torch.optim.Adamax(p, 0.01, weight_decay=WD)),
    "adagrad": (lambda: optim.adagrad(0.01), lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=WD)),
    "adadelta": (lambda: optim.adadelta(0.5), lambda p: torch.optim.Adadelta(p, 0.5, weight_decay=WD)),
    "rmsprop": (lambda: optim.rmsprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01, weight_decay=WD)),
}
DECOUPLED = {
    "adamw": (lambda: optim.adamw(0.01, weight_decay=WD), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=WD)),
    "nadamw": (
        lambda: optim.nadamw(0.01, weight_decay=WD),
        lambda p: torch.optim.NAdam(p, 0.01, weight_decay=WD, decoupled_weight_decay=True),
    ),
}


def trained(tx, steps: int) -> torch.Tensor:
    params = {"w": start()}
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update({"w": gradient(step)}, state, params, step=torch.tensor(step))
        params = tx.apply(params, updates, state)
    return params["w"]


def trained_by_torch(make, steps: int) -> torch.Tensor:
    weight = torch.nn.Parameter(start())
    optimizer = make([weight])
    for step in range(steps):
        weight.grad = gradient(step)
        optimizer.step()
    return weight.detach()


def start() -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def gradient(step: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(step + 1))


@pytest.mark.parametrize("name", L2)
def test_decay_before_the_rule_is_torchs_l2(name):
    make, theirs = L2[name]
    ours = trained(optim.chain(optim.add_decayed_weights(WD), make()), 12)
    torch.testing.assert_close(ours, trained_by_torch(theirs, 12), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trained(make(), 12), ours, rtol=1e-3), "the decay did nothing"


@pytest.mark.parametrize("name", DECOUPLED)
def test_where_torch_decouples_it_is_the_same(name):
    make, theirs = DECOUPLED[name]
    torch.testing.assert_close(trained(make(), 12), trained_by_torch(theirs, 12), rtol=1e-5, atol=1e-6)
