"""`Policy.describe`: the table says what modules really do in a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import PrecisionError
from purestep.precision import policy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


POLICIES = {name: policy(name) for name in ("32", "64", "bf16-mixed", "16-mixed", "bf16-true", "bf16-master")} | {
    "by path": policy("bf16-mixed").where("body.2", compute="f32").where("head", compute="f32", output="f64"),
    "by class": policy("bf16-true").where(nn.LayerNorm, param="f32", compute="f32").where("*.bias", param="f32"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_says_what_a_step_does(name):
    """The dtypes of the weights that modules compute with, and of what the module around each gets from it."""
    chosen, tx = POLICIES[name], ps.optim.sgd(0.1)
    weights: dict[str, torch.dtype] = {}
    returned: dict[str, torch.dtype] = {}

    class Watching(Net):
        def forward(self, x):
            for path, module in (("body.0", self.body[0]), ("body.1", self.body[1]), ("head", self.head)):
                if path == "head":
                    x = self.body[2](x)
                    returned["body.2"] = x.dtype
                x = module(x)
                weights[path], returned[path] = module.weight.dtype, x.dtype
            for n in (0, 1):
                weights[f"body.2.{n}"] = self.body[2][n].weight.dtype
            return x

    def watched(net, batch):
        out = net(batch["x"])
        returned[""] = out.dtype
        return out.square().mean()

    state = chosen.apply(ps.init(Watching, tx))
    ps.make_step(watched, tx, policy=chosen)(state, {"x": torch.randn(4, 8)})
    rows = {row.path: row for row in chosen.describe(state).rows}
    assert chosen.describe(ps.init(Watching, tx)) == chosen.describe(Watching()) == chosen.describe(state)
    assert {path: rows[path].compute for path in weights} == weights
    assert {path: rows[path].output for path in returned if path in rows} == {
        p: d for p, d in returned.items() if p in rows
    }
    tensors = {**state.params, **state.buffers}
    for path in weights:
        own = [tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == path]
        assert set(rows[path].rest) == {t.dtype for t in own if t.is_floating_point()}
        assert rows[path].elements == sum(t.numel() for t in own)
    assert chosen.describe(state).nbytes == sum(t.nbytes for t in tensors.values())


def test_it_shows_itself():
    chosen = policy("bf16-master", loss_scale=ps.precision.StaticLossScale(8.0))
    text = repr(chosen.describe(Net())).splitlines()
    assert text[0] == str(chosen)
    assert text[1].split() == "module type elements at rest computes in returns by rule".split()
    assert text[4].split() == ["body.1", "BatchNorm1d", "65", "f32", "f32", "bf16", "_NormBase:param=f32+compute=f32"]
    assert text[-2:] == ["master weights in f32 in the optimizer state", "loss scale: StaticLossScale(value=8.0)"]
    html = policy("32").where("<b>*", compute="f64")._repr_html_()
    assert "&lt;b&gt;*:compute=f64" in html
    assert "<b>*" not in html
    assert (
        str(policy("bf16-true")) == "params=bf16,compute=bf16,output=f32,reduce=bf16"
    )  # the words that `policy` reads


def test_autocast_and_float8_have_their_words():
    auto = policy("bf16-mixed", autocast=True, rules=()).describe(Net())
    assert [(row.compute, row.output) for row in auto.rows] == [(None, torch.float32)] + [(None, None)] * 5
    assert "autocast" in repr(auto)
    eight = policy("float8").where("head", float8=False).describe(Net())
    assert [row.path for row in eight.rows if row.float8] == ["body.0", "body.2.0"]


def test_what_cannot_be_described_is_an_error():
    with pytest.raises(PrecisionError, match=r"matches nothing in the model\n  where:   where\('haed'\)"):
        policy("32").where("haed", compute="bf16").describe(Net())
    with pytest.raises(
        PrecisionError, match=r"policy.describe\(dict\)\n  instead: policy.describe\(ps.init\(model, tx\)\)"
    ):
        policy("32").describe({"w": torch.ones(2)})
