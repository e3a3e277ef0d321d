"""Snapshots as one file: names, ties, every dtype, damage, and what loading it may run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from purestep import init, optim, snapshot, tree
from purestep.errors import ConfigError, CorruptSnapshot, MissingExtra, SnapshotError, TreeError
from purestep.snapshot import Store, consolidate
from purestep.snapshot import export as module


def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5, bias=False))
    net[2].weight = torch.nn.Parameter(net[2].weight)
    return net


@tree.pytree
class Loop:
    train: Any
    counter: int


def saved(root, value, step=3):
    with Store(root / "snapshots") as store:
        store.save(step, value)
    return root


def test_a_model_loads_its_file(tmp_path):
    net = model()
    state = init(net, optim.adamw(1e-3), seed=0)
    saved(tmp_path, Loop(state, 7))
    loaded = torch.load(consolidate(tmp_path, tmp_path / "model.pt", only="model"), weights_only=True)
    assert set(loaded) == set(net.state_dict())
    assert tree.equal(loaded, state.params | state.buffers)
    net.load_state_dict(loaded)
    params = torch.load(consolidate(tmp_path, tmp_path / "deep" / "params.pth"), weights_only=True)
    assert tree.equal(params, dict(state.params))
    whole = torch.load(consolidate(tmp_path, tmp_path / "all.pt", only="all"), weights_only=True)
    assert len(whole) == len(tree.leaves(Loop(state, 7)))
    assert (whole["counter"], whole["train.step"]) == (7, state.step)
    assert torch.equal(whole["train.params.0.weight"], state.params["0.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.pt", "deep", "model.pt", "snapshots"]


def test_two_states_have_prefixes(tmp_path):
    state = init(model(), optim.sgd(0.1), seed=0)
    saved(tmp_path, {"generator": state, "critic": state})
    names = set(torch.load(consolidate(tmp_path, tmp_path / "gan.pt")))
    assert names == {f"{who}.{name}" for who in ("generator", "critic") for name in state.params}


def test_every_kind_of_leaf_and_every_step(tmp_path, example):
    with Store(tmp_path, keep=snapshot.all_()) as store:
        store.save(1, {"w": torch.ones(2)})
        store.save(2, example)
    loaded = torch.load(consolidate(tmp_path, tmp_path / "all.pt", only="all"), weights_only=True)
    assert loaded["tied"] is not None
    for name, dtype in ((f"dtypes.{x.dtype}", x.dtype) for x in example["dtypes"].values()):
        assert (loaded[name].dtype, tree.equal(loaded[name], example["dtypes"][str(dtype)])) == (dtype, True)
    assert torch.equal(loaded["numpy.0"], torch.from_numpy(example["numpy"][0].copy()))
    assert loaded["numpy.4"].tolist() == [1.0, 1.0, 1.0]
    assert (loaded["python.0"], loaded["python.3"]) == (0.1, hex(10**4000))
    assert (loaded["python.6"], loaded["python.7"], type(loaded["python.5"])) == ("text \ud800 ü", "AP8=", bool)
    assert list(torch.load(consolidate(tmp_path, tmp_path / "one.pt", step=1, only="all"))) == ["w"]


def test_safetensors(tmp_path):
    torch_ = pytest.importorskip("safetensors.torch")
    weight = torch.randn(3, 4)
    value = {
        "w": weight,
        "tied": weight,
        "b": torch.randn(5).bfloat16(),
        "e": torch.empty(0, 2),
        "step": 7,
        "s": "text",
    }
    saved(tmp_path, value)
    out = consolidate(tmp_path, tmp_path / "x.safetensors", only="all")
    loaded = torch_.load_file(out)
    assert tree.equal(loaded, {name: leaf for name, leaf in value.items() if isinstance(leaf, torch.Tensor)})
    header = json.loads(out.read_bytes()[8 : 8 + int.from_bytes(out.read_bytes()[:8], "little")])
    about = header["__metadata__"]
    assert (about["step"], about["value:step"], about["value:s"], about["digest"]) == (
        "3",
        "7",
        '"text"',
        tree.digest(value),
    )
    saved(tmp_path / "other", {"q": torch.zeros(4, dtype=torch.complex128)})
    with pytest.raises(SnapshotError, match=r"safetensors cannot hold these leaves\n  where:   torch.complex128"):
        consolidate(tmp_path / "other", tmp_path / "y.safetensors", only="all")
    assert [path.name for path in tmp_path.glob("*y.safe*")] == []


def test_safetensors_is_an_extra(tmp_path, monkeypatch):
    saved(tmp_path, {"w": torch.ones(2)})
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(MissingExtra, match=r'pip install "purestep\[export\]"'):
        consolidate(tmp_path, tmp_path / "x.safetensors", only="all")
    assert [path.name for path in tmp_path.iterdir()] == ["snapshots"]


def test_refusals(tmp_path):
    saved(tmp_path, {"w": torch.ones(300_000)})
    for arguments, error, text in [
        ({"only": "weights"}, ConfigError, r"only= is 'params', 'model' or 'all'"),
        ({"only": "params"}, TreeError, r"holds no state with params(.|\n)*only=\"all\""),
        ({"step": 9}, SnapshotError, "no snapshot of step 9"),
    ]:
        with pytest.raises(error, match=text):
            consolidate(tmp_path, tmp_path / "x.pt", **arguments)
    with pytest.raises(ConfigError, match="the suffix says what kind of file"):
        consolidate(tmp_path, tmp_path / "x.bin")
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        consolidate(tmp_path / "none", tmp_path / "x.pt")
    (chunk,) = (tmp_path / "snapshots/3/parts/0/state").glob("0-*/0")
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CorruptSnapshot, match=r"\['w'\]"):
        consolidate(tmp_path, tmp_path / "x.pt", only="all")
    assert [path.name for path in tmp_path.iterdir()] == ["snapshots"]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    saved(tmp_path, {"w": torch.ones(2)})
    out = consolidate(tmp_path, tmp_path / "x.pt", only="all")
    before = out.read_bytes()
    monkeypatch.setattr(module.torch, "save", lambda value, path: (path.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        consolidate(tmp_path, out, only="all")
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshots", "x.pt"]
