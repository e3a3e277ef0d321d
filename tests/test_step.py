"""Training and evaluation steps: pure, strict about what losses return, and equal to a loop written by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import purestep as ps
from purestep import optim, tree
from purestep.errors import ConfigError, MetricError, StepError
from purestep.step import Weighted, make_eval, make_step, weighted
from purestep.testing import check_pure

X, Y = torch.linspace(-2, 2, 7 * 4).reshape(7, 4), torch.linspace(0, 1, 7).reshape(7, 1)
BATCH = {"x": X, "y": Y}


def loss_fn(net, batch):
    return mse_loss(net(batch["x"]), batch["y"])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, num_layers=2, dropout=0.3), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.layer(x.unsqueeze(1)).squeeze(1))


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x)) + torch.distributions.Normal(0.0, 0.1).sample()


MODELS = {
    "linear": lambda: nn.Linear(4, 1),
    "batchnorm and dropout": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 1)
    ),
    "lstm": Recurrent,
    "transformer": Transformer,
    "noise": lambda: Noisy(4, 1),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1)),
}
TXS = {
    "sgd": lambda: optim.sgd(0.1, momentum=0.9),
    "adamw": lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2)),
    "if finite": lambda: optim.apply_if_finite(optim.adam(1e-2)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tx", TXS)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_step_is_pure(model, tx, microbatches):
    tx = TXS[tx]()
    step, state = make_step(loss_fn, tx, microbatches=microbatches), ps.init(MODELS[model], tx, seed=1)
    for _ in range(2):
        check_pure(step, state, BATCH)
        structure = tree.structure(state)
        state, _ = step(state, BATCH)
        assert tree.structure(state) == structure
        assert not any(t.requires_grad for t in tree.leaves(state))
    check_pure(lambda s, b: (s, make_eval(loss_fn)(s, b)), state, BATCH)


def test_the_proof_of_purity_can_fail():
    tx = optim.sgd(0.1)
    step, state = make_step(loss_fn, tx), ps.init(lambda: nn.Linear(4, 1), tx)

    def in_place(state, batch):
        state.params["bias"].add_(1)
        return step(state, batch)

    def global_noise(state, batch):
        torch.rand(1)
        return step(state, batch)

    for impure in (in_place, global_noise):
        with pytest.raises(AssertionError):
            check_pure(impure, state, BATCH)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_twenty_steps_have_the_bits_of_a_loop_in_torch(momentum, nesterov, seed):
    def make():
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))

    tx = optim.sgd(0.1, momentum=momentum, nesterov=nesterov)
    state, step = ps.init(make, tx, seed=3), make_step(loss_fn, tx)
    model = ps.to_module(state).train()
    params = list(model.parameters())
    traces = [torch.zeros_like(p) for p in params]
    losses = []
    for _ in range(20):
        batch = {"x": torch.randn(9, 4), "y": torch.randn(9, 1)}
        state, metrics = step(state, batch)
        model.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        with torch.no_grad():
            grads = [p.grad for p in params]
            torch._foreach_mul_(traces, momentum)
            torch._foreach_add_(traces, grads)
            direction = torch._foreach_add(grads, traces, alpha=momentum) if nesterov else traces
            torch._foreach_add_(params, torch._foreach_mul(direction, -0.1))
        losses.append(float(metrics["loss"]) - loss.item())
    assert max(map(abs, losses)) < 1e-6
    assert not tree.diff(state.params, dict(model.named_parameters()), "params")
    assert not tree.diff(state.buffers, dict(model.named_buffers()), "buffers")
    assert int(state.step) == 20


def test_the_loss_falls_on_a_toy_problem():
    torch.manual_seed(0)
    w = torch.randn(4, 1)
    tx = optim.adam(0.05)
    state, step = ps.init(MODELS["batchnorm and dropout"], tx), make_step(loss_fn, tx, microbatches=2)
    first = None
    for _ in range(150):
        x = torch.randn(32, 4)
        state, metrics = step(state, {"x": x, "y": x @ w})
        first = first or float(metrics["loss"])
    x = torch.randn(200, 4)
    assert float(make_eval(loss_fn)(state, {"x": x, "y": x @ w})["loss"]) < 0.3 * first


# --- what a loss function returns -------------------------------------------------------------------------------------


def take(returned, batch=BATCH, **options):
    tx = optim.sgd(0.1)
    step = make_step(lambda net, batch: returned(mse_loss(net(batch["x"]), batch["y"])), tx, **options)
    return step(ps.init(lambda: nn.Linear(4, 1), tx), batch)[1]


def test_the_forms_a_loss_may_have():
    assert list(take(lambda loss: loss)) == ["loss"]
    metrics = take(
        lambda loss: (loss, {"double": loss * 2, "n": ps.metrics.Sum(torch.tensor(3)), "each": torch.arange(7.0)})
    )
    assert list(metrics) == ["loss", "double", "n", "each"]
    assert float(metrics["double"]) == pytest.approx(2 * float(metrics["loss"]))
    assert float(metrics["each"]) == 3.0
    assert metrics["double"].weight == 7
    assert not any(t.requires_grad for t in tree.leaves(metrics))
    heavy = take(lambda loss: (weighted(loss, 50), {}))
    assert float(heavy["loss"].weight) == 50


@dataclasses.dataclass
class HuggingFaceOutput:
    loss: torch.Tensor


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (
            lambda loss: {"loss": loss, "acc": 1.0},
            r"returned \{'loss': float32\[\], 'acc': float\}(.|\n)*return out\['loss'\]",
        ),
        (lambda loss: loss * torch.ones(3), r"returned float32\[3\](.|\n)*return loss\.mean\(\)"),
        (lambda loss: 3, r"returned int(.|\n)*return loss, \{'accuracy'"),
        (lambda loss: None, r"returned NoneType"),
        (lambda loss: (loss, 1.0, {}), r"returned \(float32\[\], float, \{\}\)"),
        (lambda loss: [loss, {}], r"returned \(float32\[\], \{\}\)"),
        (lambda loss: (loss, loss), r"returned \(float32\[\], float32\[\]\)"),
        (lambda loss: (loss, None), r"returned \(float32\[\], NoneType\)"),
        (lambda loss: loss.item(), r"returned float"),
        (lambda loss: loss.to(torch.int64), r"returned int64\[\]"),
        (HuggingFaceOutput, r"returned HuggingFaceOutput"),
    ],
)
def test_anything_else_is_refused_and_shown(returned, text):
    with pytest.raises(StepError, match=r"a loss function returns a loss, or \(loss, metrics\)(.|\n)*" + text):
        take(returned)


def test_other_mistakes_are_refused():
    with pytest.raises(StepError, match="the metric 'loss' is the loss itself"):
        take(lambda loss: (loss, {"loss": loss}))
    with pytest.raises(MetricError, match="metric 'a' is neither one number nor one value a sample"):
        take(lambda loss: (loss, {"a": torch.zeros(3)}))
    with pytest.raises(StepError, match="does not depend on the parameters"):
        take(lambda loss: loss.detach())
    with pytest.raises(StepError, match=r"ps\.weighted takes the loss as a tensor(.|\n)*float 1\.0"):
        weighted(1.0, 3)
    tx = optim.sgd(0.1)
    for microbatches in (0, -1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="microbatches is a positive integer"):
            make_step(loss_fn, tx, microbatches=microbatches)

    def bad(batch):
        return batch

    text = r"a loss function takes the model and the batch(.|\n)*bad\(batch\)(.|\n)*def loss_fn\(net, batch\)"
    with pytest.raises(ConfigError, match=text):
        make_step(bad, tx)
    with pytest.raises(
        ConfigError,
        match=r"needs a gradient transformation(.|\n)*torch\.optim\.sgd\.SGD(.|\n)*optim\.lift\(torch\.optim\.SGD",
    ):
        make_step(loss_fn, torch.optim.SGD([torch.zeros(1)], 0.1))
    state = ps.init(lambda: nn.Linear(4, 1), tx)
    with pytest.raises(StepError, match=r"holds no model to bind(.|\n)*TrainState(.|\n)*ps\.apply"):
        make_step(loss_fn, tx)(state.replace(model=None), BATCH)
    with pytest.raises(MetricError, match="number of samples is unknown"):
        make_step(loss_fn, tx)(state, {"x": torch.tensor(1.0)})


def test_a_loss_that_draws_its_own_data_needs_no_batch():
    tx = optim.sgd(0.1)
    step = make_step(lambda net, batch: net(torch.randn(8, 4)).square().mean(), tx)
    state = ps.init(lambda: nn.Linear(4, 1), tx)
    check_pure(step, state, None)
    new, metrics = step(state, None)
    assert int(new.step) == 1
    assert metrics["loss"].weight == 1


# --- microbatches, randomness, skipping -------------------------------------------------------------------------------


def test_metrics_of_microbatches_merge_exactly():
    def both(net, batch):
        each = (net(batch["x"]) - batch["y"]).square().squeeze(1)
        return each.mean(), {"each": each, "mean": each.mean(), "count": ps.metrics.Sum(torch.tensor(len(each)))}

    tx = optim.sgd(0.1)
    state = ps.init(lambda: nn.Linear(4, 1), tx)
    _, whole = make_step(both, tx)(state, BATCH)
    for parts in (2, 3, 7, 9):
        _, cut = make_step(both, tx, microbatches=parts)(state, BATCH)
        for name in ("loss", "each", "mean"):
            assert float(cut[name]) == pytest.approx(float(whole[name]), rel=1e-5)
        assert int(cut["count"].compute()) == 7


def test_batchnorm_statistics_of_microbatches_are_averaged_and_constants_keep_their_bits():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)
            self.frozen = nn.BatchNorm1d(4).eval()
            self.register_buffer("table", torch.tensor([0.1, 1 / 3, -0.0, float("inf"), -float("inf"), 1e-42]))

        def forward(self, x):
            return self.head(self.frozen(self.norm(x))) + 0 * self.table[0]

    tx = optim.sgd(0.1)
    state = ps.init(Net, tx)
    state = state.replace(buffers={**state.buffers, "frozen.running_mean": torch.tensor([0.1, 0.2, 0.3, 0.7])})
    parts = make_step(loss_fn, tx, microbatches=3)
    new, _ = parts(state, BATCH)
    for name in ("table", "frozen.running_mean", "frozen.running_var"):
        assert not tree.diff(new.buffers[name], state.buffers[name], name)
    singles = [
        parts.grads(state, {"x": x, "y": y}).buffers
        for x, y in zip(X.split([3, 2, 2]), Y.split([3, 2, 2]), strict=True)
    ]
    wanted = sum(n * b["norm.running_mean"] for n, b in zip((3, 2, 2), singles, strict=True)) / 7
    torch.testing.assert_close(new.buffers["norm.running_mean"], wanted)
    assert int(new.buffers["norm.num_batches_tracked"]) == 1


def test_dropout_differs_between_steps_microbatches_and_seeds():
    seen = []

    def watching(net, batch):
        out = nn.functional.dropout(torch.ones(64), 0.5)
        seen.append(tuple(out.tolist()))
        return net(batch["x"]).mean()

    tx = optim.sgd(0.0)
    step = make_step(watching, tx, microbatches=3)
    state = ps.init(lambda: nn.Linear(4, 1), tx, seed=0)
    new, _ = step(state, BATCH)
    step(new, BATCH)
    step(ps.init(lambda: nn.Linear(4, 1), tx, seed=1), BATCH)
    assert len(set(seen)) == 9
    step(state, BATCH)
    assert seen[9:] == seen[:3]


def test_a_microbatch_without_weight_does_not_poison_the_rest():
    def tokens(net, batch):
        labels = batch["label"].flatten()
        return weighted(cross_entropy(net(batch["x"]).flatten(0, 1), labels, ignore_index=-1), (labels >= 0).sum())

    tx = optim.sgd(1.0)
    state = ps.init(lambda: nn.Linear(4, 3), tx)
    batch = {"x": torch.randn(4, 5, 4), "label": torch.randint(0, 3, (4, 5))}
    batch["label"][:2] = -1
    new, metrics = make_step(tokens, tx, microbatches=2)(state, batch)
    whole, wanted = make_step(tokens, tx)(state, batch)
    torch.testing.assert_close(new.params["weight"], whole.params["weight"])
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]))


def test_skipped_updates_are_counted():
    tx = optim.apply_if_finite(optim.sgd(0.1))
    step = make_step(loss_fn, tx)
    state = ps.init(MODELS["batchnorm and dropout"], tx)
    good, metrics = step(state, BATCH)
    assert int(metrics["skipped"].compute()) == 0
    bad, metrics = step(good, {"x": X * float("nan"), "y": Y})
    assert int(metrics["skipped"].compute()) == 1
    for field in ("step", "params", "buffers"):
        assert not tree.diff(getattr(bad, field), getattr(good, field))
    assert (
        "skipped" not in make_step(loss_fn, optim.sgd(0.1))(ps.init(lambda: nn.Linear(4, 1), optim.sgd(0.1)), BATCH)[1]
    )


def test_engines_agree():
    tx = optim.sgd(0.1)
    state = ps.init(MODELS["batchnorm and dropout"], tx)
    a, _ = make_step(loss_fn, tx)(state, BATCH)
    b, _ = make_step(loss_fn, tx, engine="func")(state, BATCH)
    assert not tree.diff(a, b)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_is_without_dropout_or_gradients_and_changes_nothing():
    tx = optim.sgd(0.1)
    state = ps.init(MODELS["batchnorm and dropout"], tx)
    state, _ = make_step(loss_fn, tx)(state, BATCH)
    evaluate = make_eval(
        lambda net, batch: (loss_fn(net, batch), {"graph": torch.tensor(float(net(batch["x"]).requires_grad))})
    )
    before = tree.digest(state)
    a = evaluate(state, BATCH)
    assert tree.digest(state) == before
    model = ps.to_module(state)
    assert float(a["loss"]) == pytest.approx(loss_fn(model, BATCH).item())
    assert float(a["graph"]) == 0
    parts = [evaluate(state, {"x": X[s], "y": Y[s]}) for s in (slice(0, 3), slice(3, 7))]
    assert float(ps.metrics.merge(*parts)["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5)
    with pytest.raises(ConfigError, match="takes the model and the batch"):
        make_eval(lambda net: net)


def test_evaluation_that_draws_is_the_same_each_time():
    tx = optim.sgd(0.1)
    evaluate, state = make_eval(loss_fn), ps.init(lambda: Noisy(4, 1), tx)
    assert float(evaluate(state, BATCH)["loss"]) == float(evaluate(state, BATCH)["loss"])


def test_weights_are_exact_counts():
    assert float(weighted(torch.tensor(1.0), 2**24 + 1).weight) == 2**24 + 1
    assert isinstance(weighted(torch.tensor(1.0), torch.tensor(3)), Weighted)
