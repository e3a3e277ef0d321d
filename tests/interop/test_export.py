"""The exported program computes what the model does, on batches of any size; ONNX by its reference evaluator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, StepError

TX = ps.optim.sgd(0.1)
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch about its own exporter


class Two(nn.Module):
    """Two inputs, BatchNorm, dropout, a frozen table."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(3, 7)
        self.norm, self.drop = nn.BatchNorm1d(7), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.rand(7), requires_grad=False)

    def forward(self, x, y):
        return self.drop(self.norm(self.a(x) + self.b(y)).relu()) * self.scale

    def embed(self, x):
        return self.a(x)


@pytest.fixture(scope="module")
def state():
    step = ps.make_step(lambda net, batch: net(*batch).square().mean(), TX)
    return step(ps.init(Two, TX, seed=1), (torch.randn(8, 5), torch.randn(8, 3)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_any_batch_gives_what_the_model_gives(rows, state, tmp_path):
    example = {"y": torch.randn(rows, 3), "x": torch.randn(rows, 5)}
    ps.export(state, example, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    by_position = ps.export(state, (example["x"], example["y"])).module()
    model = ps.to_module(state)
    for n in (1, 5, 64):
        x, y = torch.randn(n, 5), torch.randn(n, 3)
        assert torch.equal(loaded(x=x, y=y), model(x, y))
        assert torch.equal(by_position(x, y), model(x, y))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.slow
def test_onnx(state, tmp_path):
    onnx = pytest.importorskip("onnx.reference")
    ps.export(state, (torch.randn(1, 5), torch.randn(1, 3)), tmp_path / "m.onnx")
    run = onnx.ReferenceEvaluator(str(tmp_path / "m.onnx"))
    for n in (1, 5):
        x, y = torch.randn(n, 5), torch.randn(n, 3)
        (out,) = run.run(None, {"x": x.numpy(), "y": y.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), ps.to_module(state)(x, y).detach())


@pytest.mark.slow
def test_another_method_and_fixed_shapes(state):
    program = ps.export(state, torch.randn(3, 5), method="embed", batch_dim=False)
    x = torch.randn(3, 5)
    assert torch.equal(program.module()(x), ps.to_module(state).embed(x))
    with pytest.raises(ConfigError, match="the model has no method 'nothing'"):
        ps.export(state, x, method="nothing")


@pytest.mark.slow
def test_what_cannot_be_one_program():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.w if x.sum() > 0 else x

    with pytest.raises(StepError, match="Branch cannot be exported as one program"):
        ps.export(ps.init(Branch, TX), torch.ones(2, 2))


def test_arguments(state, tmp_path):
    with pytest.raises(ConfigError, match=r"what kind of program is written(.|\n)*ps.save_weights"):
        ps.export(state, torch.ones(1, 5), tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="an example is a tensor, a tuple"):
        ps.export(state, 3)
    assert list(tmp_path.iterdir()) == []
