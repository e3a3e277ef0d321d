"""Every kind of step, policy and optimizer on fake CUDA tensors: one device, no wait of the host, and few launches.

`budgets.py` is the contract: the launches of a whole step without its backward pass. A change that adds some fails
here; one that saves some lowers the number. The model is a GPT of two blocks with 28 parameters, so that a launch for
each parameter shows.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from shared_fake_cuda import counted, elsewhere, fake_cuda, needs_cuda_build
from shared_gpt import TOKENS, TinyGPT
from torch import nn

import purestep as ps
from tests.device import budgets

pytestmark = needs_cuda_build
opt = ps.optim
# float8 needs torchao and sizes that are multiples of 16.
POLICIES = [name for name in ps.precision.policies.NAMES if name != "float8"]
CONFORMANCE = importlib.import_module("tests.optim.test_conformance")


def loss_fn(net, batch):
    return F.cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten())


def with_metrics(net, batch):
    logits = net(batch["x"]).flatten(0, 1)
    metrics = {"lr": 0.5, "accuracy": ps.metrics.accuracy(logits, batch["y"].flatten())}
    return F.cross_entropy(logits, batch["y"].flatten()), metrics


def of_images(net, batch):
    return F.cross_entropy(net(batch["x"]), batch["y"])


def adamw():
    return opt.chain(opt.clip_by_global_norm(0.5), opt.adamw(1e-2, weight_decay=0.1))


def cnn():
    body = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3), nn.BatchNorm2d(9), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4))


IMAGES = {"x": torch.zeros(8, 1, 9, 9), "y": torch.zeros(8, dtype=torch.int64)}


def step_of(loss=loss_fn, make=TinyGPT, batch=TOKENS, policy=None, tx=adamw, wrap=lambda step: step, **options):
    step = ps.make_step(loss, tx(), policy=policy, **options)
    state = ps.init(make, tx(), seed=0)
    state = state if policy is None else ps.precision.policy(policy).apply(state)
    return wrap(step), state, batch


STEPS = {
    "plain": lambda: step_of(),
    "metrics": lambda: step_of(with_metrics),
    "weighted": lambda: step_of(lambda net, batch: ps.weighted(loss_fn(net, batch), 64.0)),
    "dropout": lambda: step_of(make=lambda: TinyGPT(p=0.1)),
    "4 microbatches": lambda: step_of(microbatches=4),
    "batch norm": lambda: step_of(of_images, cnn, IMAGES),
    "batch norm, 4 microbatches": lambda: step_of(of_images, cnn, IMAGES, microbatches=4),
    "wrapped": lambda: step_of(wrap=lambda step: ps.wrap_step(step, lambda step, state, batch: step(state, batch))),
    "evaluation": lambda: (ps.make_eval(with_metrics), *step_of()[1:]),
    "prediction": lambda: (ps.make_predict(lambda net, batch: net(batch["x"])), *step_of()[1:]),
    **{f"policy {name}": lambda name=name: step_of(policy=name) for name in POLICIES},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_a_card(name):
    step, state, batch = STEPS[name]()
    counts, out = counted(step, state, batch)
    assert counts.blocking == {}
    # What is made of a Python number is read on the host, and stays there.
    assert {path for path in elsewhere(out) if "'lr'" not in path} == set()
    assert counts.total <= budgets.STEPS[name], counts.launches.most_common(8)


# --- optimizers -------------------------------------------------------------------------------------------------------

MORE = {
    "clipped adamw": adamw,
    "adamw of a schedule": lambda: opt.adamw(
        opt.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=2, decay_steps=10)
    ),
    "adamw of a table": lambda: opt.adamw(
        opt.lift_scheduler(torch.optim.lr_scheduler.StepLR, 1e-3, total_steps=9, step_size=3)
    ),
    "inject_hyperparams": lambda: opt.inject_hyperparams(opt.adamw)(learning_rate=1e-3),
    "apply_if_finite": lambda: opt.apply_if_finite(adamw()),
    "skip_large_updates": lambda: opt.skip_large_updates(adamw(), max_norm=1.0),
    "average_params": lambda: opt.average_params(adamw(), decay=0.99),
    "accumulate": lambda: opt.accumulate(adamw(), every=2),
    "add_noise": lambda: opt.chain(opt.add_noise(0.01, 0.55, seed=0), opt.sgd(0.1)),
    "adaptive_grad_clip": lambda: opt.chain(opt.adaptive_grad_clip(0.01), opt.sgd(0.1)),
    "reduce_on_plateau": lambda: opt.chain(opt.adam(1e-3), opt.reduce_on_plateau(0.5)),
    "lookahead": lambda: opt.lookahead(opt.adam(1e-3), sync_period=3),
    "lift": lambda: opt.lift(torch.optim.AdamW, lr=1e-2),
    "partition": lambda: opt.partition({"a": opt.adamw(1e-3), "b": opt.sgd(0.1)}, {"a": "*weight", "b": "*"}),
    "monitor": lambda: opt.chain(opt.monitor({"norm": opt.global_norm}), opt.sgd(0.1)),
}
# Fake tensors know no fused SGD, and an optimizer that evaluates the loss again needs a backward pass.
UNKNOWN = {"sgd fused"}
ROWS = {row.name: row.make for row in CONFORMANCE.ROWS if not row.value_fn and row.name not in UNKNOWN} | MORE


def updated(tx):
    """Count an update by gradients that are the parameters."""

    def update(state, batch):
        return state.apply_gradients(tx, state.params, value=state.step.to(torch.float32))

    return counted(update, ps.init(TinyGPT, tx, seed=0), TOKENS)


@pytest.mark.parametrize("name", ROWS)
def test_an_optimizer_on_a_card(name):
    counts, out = updated(ROWS[name]())
    assert counts.blocking == {}
    assert elsewhere(out) == {}
    assert counts.total <= budgets.OPTIMIZERS[name], counts.launches.most_common(8)


# --- compiled steps ---------------------------------------------------------------------------------------------------


def test_numbers_that_elements_of_a_card_share_are_computed_once():
    from torch.fx.experimental.proxy_tensor import make_fx

    from purestep.jit.hoist import hoist_scalars

    def f(count, x):
        return x * (1 / (1 - 0.9**count)).to(x.dtype)

    with fake_cuda():
        given = torch.empty((), dtype=torch.float64, device="cuda"), torch.empty(64, device="cuda")
        graph = make_fx(f)(*given)
    assert hoist_scalars(graph) == 1
    (stored,) = [n for n in graph.graph.nodes if n.target is torch.ops.aten.as_strided.default]
    assert stored.meta["val"].device.type == "cuda"
