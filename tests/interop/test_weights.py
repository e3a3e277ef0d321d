"""Weights of every kind of file come into a state under their names, and nothing is lost without a word."""

from __future__ import annotations

import json
import pickle
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, SnapshotError, TemplateMismatch
from purestep.interop import read_weights

TX = ps.optim.adam(0.1)


class Net(nn.Module):
    """Tied parameters, BatchNorm statistics, a table that no state_dict holds, a frozen parameter, odd sizes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("table", torch.rand(4), persistent=False)


def whole(path, tensors):
    torch.save(tensors, path / "w.pt")
    return path / "w.pt"


def lightning(path, tensors):
    torch.save(
        {"epoch": 2, "state_dict": tensors, "optimizer_states": [{"state": {0: {"x": torch.ones(2)}}}]}, path / "w.ckpt"
    )
    return path / "w.ckpt"


def old_format(path, tensors):
    torch.save({"model": tensors, "step": 3}, path / "w.bin", _use_new_zipfile_serialization=False)
    return path / "w.bin"


def safetensors(path, tensors):
    save_file({k: v.clone() for k, v in tensors.items()}, path / "w.safetensors")
    return path / "w.safetensors"


def shards(path, tensors):
    names = list(tensors)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].clone() for n in names if files[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path


def distributed(path, tensors):
    dcp.save({"model": tensors, "extra": {"n": 3, "t": torch.ones(2)}}, checkpoint_id=path / "dcp", no_dist=True)
    return path / "dcp"


def ours(path, tensors):
    state = ps.init(Net(), TX)
    return ps.save_weights(ps.load_weights(state, whole(path, tensors)), path / "ours.safetensors")


FILES = [whole, lightning, old_format, safetensors, shards, distributed, ours]


@pytest.fixture
def module(seed):
    torch.manual_seed(seed)
    module = Net()
    for tensor in (module.norm.running_mean, module.norm.running_var):
        tensor.uniform_(1, 2)
    return module


@pytest.fixture(scope="module")
def state():
    return ps.init(Net, TX, seed=1)


@pytest.mark.filterwarnings("ignore")  # of torch, which saves a checkpoint without a process group
@pytest.mark.parametrize("write", FILES, ids=lambda f: f.__name__)
def test_every_kind_of_file_comes_in(write, module, state, tmp_path):
    loaded = ps.load_weights(state, write(tmp_path, module.state_dict()))
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in {**loaded.params, **loaded.buffers}.items():
        expected = state.buffers[name] if name == "table" else own[name]
        assert torch.equal(tensor, expected), name
    ps.testing.assert_trees_equal(loaded.opt_state, state.opt_state)
    assert ps.tree.structure(loaded) == ps.tree.structure(state)


def test_a_module_and_back(module, state):
    inside = ps.from_module(state, module)
    out = ps.to_module(inside)
    for name, tensor in (own := {**dict(module.named_parameters()), **dict(module.named_buffers())}).items():
        assert torch.equal({**dict(out.named_parameters()), **dict(out.named_buffers())}[name], tensor), name
    assert len(own) == 8
    module.scale.data.zero_()
    assert not torch.equal(inside.buffers["scale"], module.scale)  # a copy


def test_names_of_both_sides_are_listed_with_what_to_write(module, state, tmp_path):
    tensors = {f"net.{name}": tensor for name, tensor in module.state_dict().items()}
    path = whole(tmp_path, tensors)
    with pytest.raises(TemplateMismatch) as caught:
        ps.load_weights(state, path)
    text = str(caught.value)
    assert "missing (7): 'embed.weight', 'norm.weight', 'norm.bias', 'scale', " in text
    assert "left over (8): 'net.scale', 'net.embed.weight', 'net.norm.weight'" in text
    assert text.endswith("instead: rename={'net.': ''}")
    fine = ps.load_weights(state, path, rename={"net.": ""})
    ps.testing.assert_trees_equal(fine, ps.load_weights(state, path, rename=lambda name: name.removeprefix("net.")))
    ps.testing.assert_trees_equal(fine.params["embed.weight"], module.embed.weight.detach())
    with pytest.raises(TemplateMismatch, match=r"rename=\{'': 'net.'\}"):
        ps.load_weights(ps.init(nn.ModuleDict({"net": Net()}), TX), whole(tmp_path, module.state_dict()))


def test_what_may_be_missing_or_left_over_is_said(module, state, tmp_path):
    tensors = module.state_dict()
    del tensors["scale"]
    path = whole(tmp_path, tensors | {"old.weight": torch.ones(2)})
    with pytest.raises(TemplateMismatch) as caught:
        ps.load_weights(state, path)
    assert "missing (1): 'scale'\n" in str(caught.value)
    assert "left over (1): 'old.weight'\n" in str(caught.value)
    loaded = ps.load_weights(state, path, keep="scale", ignore="old.*")
    assert torch.equal(loaded.buffers["scale"], state.buffers["scale"])
    for argument in ("keep", "ignore"):
        wanted = {"keep": "scale", "ignore": "old.*"} | {argument: "nothing.*"}
        with pytest.raises(ConfigError, match=f"the filter {argument}= matches nothing"):
            ps.load_weights(state, path, **wanted)


def test_a_shape_is_no_matter_of_names(module, state, tmp_path):
    tensors = module.state_dict() | {"scale": torch.ones(4)}
    with pytest.raises(TemplateMismatch, match=r"scale: float32\[4\], in the state float32\[3\]"):
        ps.load_weights(state, whole(tmp_path, tensors))


def test_tied_parameters_have_one_value(module, state, tmp_path):
    one = {name: tensor for name, tensor in module.state_dict().items() if name != "embed.weight"}
    loaded = ps.load_weights(state, whole(tmp_path, one))
    assert torch.equal(loaded.params["embed.weight"], module.head.weight)
    two = module.state_dict() | {"head.weight": torch.ones(7, 5)}
    with pytest.raises(TemplateMismatch, match="tied parameters have different values"):
        ps.load_weights(state, whole(tmp_path, two))


@pytest.mark.parametrize("wrap", [ps.optim.average_params, ps.optim.lookahead, ps.precision.master_weights])
def test_copies_in_the_optimizer_state_are_not_forgotten(wrap, module):
    tx = wrap(ps.optim.adam(0.1))
    state = ps.init(Net, tx, seed=1)
    with pytest.raises(ConfigError, match="the optimizer state holds copies of the parameters"):
        ps.from_module(state, module)
    ps.testing.assert_trees_equal(ps.from_module(state, module, tx=tx), ps.init(module, tx, seed=1))


def test_values_take_the_dtype_of_the_state(module):
    state = ps.precision.policy("bf16-true").apply(ps.init(Net, TX, seed=1))
    loaded = ps.from_module(state, module)
    assert loaded.params["embed.weight"].dtype == torch.bfloat16
    assert torch.equal(loaded.params["embed.weight"], module.embed.weight.to(torch.bfloat16))


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.filterwarnings("ignore")
def test_no_code_of_a_file_is_run(tmp_path, capsys, module, state):
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": Evil()}, tmp_path / "a.ckpt")
    directory = distributed(tmp_path, module.state_dict())
    (directory / ".metadata").write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path / "a.ckpt", directory):
        with pytest.raises(SnapshotError, match="it holds objects of other classes than tensors"):
            ps.load_weights(state, path)
    assert capsys.readouterr().out == ""


def test_damage_is_told(tmp_path, module, state):
    for write in (whole, safetensors):
        path = write(tmp_path, module.state_dict())
        path.write_bytes(path.read_bytes()[: random.Random(0).randrange(20, 200)])
        with pytest.raises(SnapshotError, match="the weights cannot be read"):
            ps.load_weights(state, path)
    directory = shards(tmp_path, module.state_dict())
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(SnapshotError, match="an index names tensors that its files do not have"):
        ps.load_weights(state, directory)


@pytest.mark.parametrize(
    ("content", "entry", "text"),
    [
        (
            {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}},
            None,
            "does not say which of its entries(.|\n)*entry='a'",
        ),
        ({"state_dict": {"w": torch.ones(1)}}, "ema", "the checkpoint has no entry 'ema'"),
        ({"epoch": 3}, None, "does not say which of its entries"),
        ([torch.ones(1)], None, "the file is no dict of tensors"),
    ],
)
def test_which_entry_is_asked_for(content, entry, text, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=text):
        read_weights(tmp_path / "x.pt", entry=entry)


def test_entries_by_name(tmp_path):
    torch.save({"a": {"b": {"w": torch.ones(1)}}, "model": {"w": torch.zeros(1)}}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt") == {"w": torch.zeros(1)}
    assert read_weights(tmp_path / "x.pt", entry="a.b") == {"w": torch.ones(1)}
    assert read_weights(tmp_path / "x.pt", entry="a") == {"b.w": torch.ones(1)}


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "x.txt").write_text("?")
    for path, text in (
        (tmp_path / "no.pt", "no such file"),
        (tmp_path / "x.txt", "suffix"),
        (tmp_path, "holds no weights"),
    ):
        with pytest.raises(ConfigError, match=text):
            read_weights(path)
    with pytest.raises(ConfigError, match="suffix"):
        ps.save_weights(ps.init(nn.Linear(1, 1), TX), tmp_path / "x.npz")
