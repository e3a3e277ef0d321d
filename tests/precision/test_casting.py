"""What a step casts and what it leaves alone: modules by rule, inputs, outputs, buffers, and nothing global."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import PrecisionError
from purestep.functional import bind
from purestep.precision import NAMES, NORMS, policy
from purestep.precision.cast_params import casting
from purestep.precision.module_hooks import cast_floating

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TX = ps.optim.sgd(0.1)


class Spy(nn.Module):
    """A linear layer that writes down what it was called with; on the class, because a state copies its model."""

    seen: ClassVar[list] = []

    def __init__(self) -> None:
        super().__init__()
        Spy.seen.clear()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.full((4,), 0.1))

    def forward(self, x):
        out = self.linear(x) + self.table
        Spy.seen.append((self.linear.weight.dtype, out.dtype))
        return out


def run(model, p, x=None, call=None):
    """One step of a model under a policy; returns the dtype of what the loss function sees."""
    seen = {}

    def loss_fn(net, batch):
        out = net(batch) if call is None else call(net, batch)
        seen["out"] = out
        return out.float().square().mean()

    state = p.apply(ps.init(model, TX))
    new, _ = ps.make_step(loss_fn, TX, policy=p)(state, torch.randn(4, 4) if x is None else x)
    return seen["out"].dtype, state, new


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("float8", "int8")])
def test_modules_compute_in_the_dtype_and_the_loss_sees_the_output(name):
    p = policy(name)
    out, state, new = run(Spy(), p)
    assert Spy.seen == [(p.compute, p.compute)]
    assert out == p.output
    assert {t.dtype for t in new.params.values()} == {p.param} == {t.dtype for t in state.params.values()}
    assert new.buffers["table"] is not None
    assert new.buffers["table"].dtype == p.param


def test_a_buffer_that_nobody_changed_keeps_the_digits_that_the_cast_dropped():
    _, state, new = run(Spy(), policy("bf16-mixed"))
    assert torch.equal(new.buffers["table"], state.buffers["table"])
    assert not torch.equal(new.buffers["table"].to(bf16).float(), state.buffers["table"])


def test_a_buffer_that_the_model_changes_changes():
    class Counting(Spy):
        def forward(self, x):
            self.table += torch.tensor([1.0, 0.0, 0.0, 0.0]).to(self.table.dtype)
            return super().forward(x)

    _, state, new = run(Counting(), policy("bf16-mixed"))
    assert new.buffers["table"].dtype == f32
    assert new.buffers["table"][0].item() == pytest.approx(1.1, rel=0.01)
    assert torch.equal(new.buffers["table"][1:], state.buffers["table"][1:])


def test_frozen_parameters_keep_their_bits_and_their_tensor():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    p = policy("bf16-mixed")
    state = ps.init(model, TX, frozen="0.*")
    new, _ = ps.make_step(lambda net, x: net(x).square().mean(), TX, policy=p)(state, torch.randn(4, 4))
    assert new.buffers["0.weight"] is state.buffers["0.weight"]


def test_running_statistics_stay_in_float32():
    _, _state, new = run(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), policy("16-mixed"), torch.randn(64, 4))
    assert new.buffers["1.running_var"].dtype == f32
    assert not torch.equal(new.buffers["1.running_var"].half().float(), new.buffers["1.running_var"])


def test_a_rule_casts_at_the_border_of_its_module():
    model = nn.Sequential(Spy(), Spy(), Spy())
    _out, state, _ = run(model, policy("bf16-true").where("1", compute="f32"))
    assert Spy.seen == [(bf16, bf16), (f32, f32), (bf16, bf16)]
    assert state.params["1.linear.weight"].dtype == bf16
    Spy.seen.clear()
    _, state, _ = run(
        model, policy("bf16-true").where("1", param="f32", compute="f32").where("1.linear.bias", param="f64")
    )
    assert state.params["1.linear.weight"].dtype == f32
    assert state.params["1.linear.bias"].dtype == f64


def test_the_last_layer_in_float32_keeps_its_digits_to_the_loss():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, 4)
    kept = {}

    def call(net, batch):
        kept["out"] = net(batch)
        return kept["out"]

    for p, exact in [
        (policy("bf16-mixed").where("1", compute="f32", output="f32"), True),
        (policy("bf16-mixed").where("1", compute="f32"), False),
    ]:
        run(model, p, x, call)
        assert kept["out"].dtype == f32
        assert torch.equal(kept["out"].to(bf16).float(), kept["out"]) != exact


def test_rules_go_by_class_and_by_function_too():
    model = nn.Sequential(Spy(), nn.LayerNorm(4))
    p = policy("bf16-true").where(NORMS, param="f32", compute="f32")
    _, state, _ = run(model, p)
    assert (state.params["1.weight"].dtype, state.params["0.linear.weight"].dtype) == (f32, bf16)
    q = policy("bf16-true").where(lambda name: name.endswith("bias"), param="f32")
    assert q.apply(ps.init(model, TX)).params["1.bias"].dtype == f32


@pytest.mark.parametrize("where", ["heads.*", ["a", "b"], nn.LSTM, lambda name: False])
def test_a_rule_that_finds_nothing_is_refused(where):
    p = policy("bf16-mixed").where(where, compute="f32")
    state = ps.init(nn.Linear(4, 4), TX)
    with pytest.raises(PrecisionError, match="matches nothing in the model"):
        p.apply(state)
    with pytest.raises(PrecisionError, match="matches nothing in the model"):
        ps.make_step(lambda net, x: net(x).mean(), TX, policy=p)(state, torch.ones(2, 4))


def test_methods_and_submodules_may_be_called_directly():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Sequential(nn.Linear(4, 2), nn.Tanh()), nn.Linear(2, 4)

        def encode(self, x):
            return self.down(x)

    out, _, _ = run(Coder(), policy("bf16-mixed"), call=lambda net, x: net.up(net.encode(x).float()))
    assert out == bf16


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)), None),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4, bias=False)), None),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(3, 5, 4)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ConvTranspose2d(2, 1, 3)), torch.randn(2, 1, 5, 5)),
        (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4)), torch.randint(0, 7, (3, 5))),
        (nn.Bilinear(2, 2, 3), None),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "bf16-true", "64"])
def test_layers_of_torch(model, x, name):
    call = (lambda net, b: net(b[:, :2], b[:, 2:])) if isinstance(model, nn.Bilinear) else None
    p = policy(name)
    out, state, _ = run(model, p, x, call)
    assert out == p.output
    evaluate = ps.make_eval(lambda net, b: (net(b) if call is None else call(net, b)).float().mean(), policy=p)
    assert evaluate(state, torch.randn(4, 4) if x is None else x)["loss"].compute().isfinite()


@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true"])
def test_recurrent_layers(name):
    call = lambda net, x: net(x[None], torch.zeros(1, 4, 4))[0]  # noqa: E731
    out, _, _ = run(nn.GRU(4, 4), policy(name), call=call)
    assert out == policy(name).output


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_activations_have_the_same_bits(autocast):
    class Net(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.keep = keep
            self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5)), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.body(x) if self.keep else ps.checkpoint(self.body, x))

    p, news = policy("bf16-mixed", autocast=autocast), []
    for keep in (True, False):
        torch.manual_seed(0)
        model = Net(keep)
        torch.manual_seed(1)
        _, _, new = run(model, p, torch.linspace(-1, 1, 16).view(4, 4))
        news.append(new.params)
    assert not ps.diff(*news)


def test_batches_of_float64_are_fine_and_targets_are_not_rounded():
    target = torch.full((4, 4), 0.1)
    batch = {"x": torch.randn(4, 4, dtype=f64), "y": target}

    def loss_fn(net, b):
        assert torch.equal(b["y"].to(f32), target)
        return (net(b["x"]) - b["y"]).square().mean(), {"y64": float(b["y"].dtype == f64)}

    for name in ("bf16-mixed", "64", "32"):
        state = policy(name).apply(ps.init(nn.Linear(4, 4), TX))
        _, metrics = ps.make_step(loss_fn, TX, policy=name)(state, batch)
        assert float(metrics["y64"].compute()) == (name == "64")


def test_nothing_global_is_touched_and_no_hook_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = copy.deepcopy({k: v for k, v in vars(model).items() if "hook" in k})
    for autocast in (False, True):
        p = policy("16-mixed", autocast=autocast)

        def loss_fn(net, x, autocast=autocast):
            assert torch.is_autocast_enabled("cpu") == autocast
            assert torch.get_default_dtype() == f32
            if x.isnan().any():
                raise KeyError("on purpose")
            return net(x).square().mean()

        step, state = ps.make_step(loss_fn, TX, policy=p), p.apply(ps.init(model, TX))
        step(state, torch.randn(2, 4))
        with pytest.raises(KeyError):
            step(state, torch.full((2, 4), torch.nan))
        assert not torch.is_autocast_enabled("cpu")
        for m in [*model.modules(), *state.model.module.modules()]:
            assert not (m._forward_pre_hooks)
            assert not (m._forward_hooks)
            assert not (m._forward_pre_hooks_with_kwargs)
    assert {k: v for k, v in vars(model).items() if "hook" in k} == before


def test_hooks_of_the_user_stay_and_see_what_the_module_computes_in():
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    cast = casting(policy("bf16-true"), model)
    with bind(model, cast.params(dict(model.named_parameters())), around=cast.around) as net:
        net[0](torch.ones(2, 4))
    assert seen == [bf16]
    assert len(model[0]._forward_pre_hooks) == 1


def test_resolved_policies_do_not_keep_models_alive():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    casting(policy("bf16-mixed"), model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ("32", "bf16-true", r"params\['.*'\]: float32\[4, 4\], policy bf16"),
        ("32", "16-mixed", "loss_scale: NoneType, policy DynamicLossScale"),
        ("16-mixed", "32", "loss_scale: DynamicLossScale, policy NoLossScale"),
        ("bf16-true", "bf16-master", "master weights"),
        ("bf16-master", "bf16-true", "in the state only"),
    ],
)
def test_a_state_under_another_policy_is_refused(made, asked, message):
    state = policy(made).apply(ps.init(nn.Linear(4, 4, bias=False), TX))
    step = ps.make_step(lambda net, x: net(x).mean(), TX, policy=asked)
    with pytest.raises(PrecisionError, match=message) as caught:
        step(state, torch.ones(2, 4))
    assert "state = policy.apply(ps.init(model, tx, seed=0))" in str(caught.value)


@pytest.mark.parametrize("made", ["16-mixed", "bf16-master"])
def test_a_step_without_a_policy_refuses_a_state_that_needs_one(made):
    state = policy(made).apply(ps.init(nn.Linear(4, 4), TX))
    with pytest.raises(PrecisionError, match="and the step has no policy"):
        ps.make_step(lambda net, x: net(x).mean(), TX)(state, torch.ones(2, 4))


def test_apply_refuses_what_is_no_train_state():
    with pytest.raises(PrecisionError, match="a policy applies to a train state"):
        policy("32").apply({"params": {}})


def test_nested_values_are_cast_and_the_rest_is_passed_on():
    class Output(dict):
        pass

    value = Output(logits=torch.ones(2), n=torch.arange(2))
    made = cast_floating((value, [torch.ones(1)], "text", None, 3), f16)
    assert made[0]["logits"].dtype == f16
    assert made[0]["n"].dtype == torch.int64
    assert isinstance(made[0], Output)
    assert value["logits"].dtype == f32
    assert made[1][0].dtype == f16
    assert made[2:] == ("text", None, 3)
