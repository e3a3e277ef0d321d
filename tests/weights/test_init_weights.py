"""`ps.init(..., weights=)`: the values of a file in a first state, read in parts, and directories of shards."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, SnapshotError, StepError, TemplateMismatch
from purestep.weights.directories import INDEX
from purestep.weights.files import stored_weights

TX, FSDP = ps.optim.adam(0.1), ps.sharding.fsdp()


class Net(nn.Module):
    """Tied, frozen and half-precision parameters, statistics, and a table that no file holds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.half = nn.Linear(5, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


@pytest.fixture
def directory(tmp_path, seed):
    """Shards and an index, as Hugging Face's libraries write them: values in float64, under other names."""
    torch.manual_seed(seed)
    tensors = {f"net.{n}": t.double() if t.is_floating_point() else t for n, t in Net().state_dict().items()}
    del tensors["net.head.weight"]
    tensors["net.norm.num_batches_tracked"] = torch.tensor(3)
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tmp_path


@pytest.mark.parametrize("deferred", [False, True])
def test_a_file_of_any_kind_is_read_while_a_model_is_made(deferred, tmp_path, seed):
    torch.manual_seed(seed)
    torch.save({"state_dict": Net().state_dict()}, tmp_path / "a.ckpt")
    state = ps.init(Net, TX, deferred=deferred, weights=tmp_path / "a.ckpt")
    ps.testing.assert_trees_equal(state.params, ps.load_weights(state, tmp_path / "a.ckpt").params)


@pytest.mark.parametrize(("tx", "plan"), [(ps.optim.average_params(TX), None), (ps.precision.master_weights(TX), FSDP)])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_state_begins_with_the_values_of_a_file(deferred, plan, tx, directory):
    weights = ps.Weights(directory, rename={"net.": ""})
    state = ps.init(Net, tx, seed=1, plan=plan, deferred=deferred, weights=weights)
    expected = ps.load_weights(ps.init(Net, tx, seed=1), directory, rename={"net.": ""}, tx=tx)
    ps.testing.assert_trees_equal(state, expected)
    assert state.params["half.weight"].dtype == torch.bfloat16
    assert int(state.buffers["norm.num_batches_tracked"]) == 3


def test_what_the_file_lacks_is_initialised_as_without_it(directory):
    def made(**more):
        return ps.init(lambda: nn.ModuleDict({"net": Net(), "new": nn.Linear(5, 2)}), TX, deferred=True, **more)

    state, plain = made(weights=ps.Weights(directory, keep="new.*")), made()
    assert torch.equal(state.params["new.weight"], plain.params["new.weight"])
    assert not torch.equal(state.params["net.embed.weight"], plain.params["net.embed.weight"])


def test_names_that_one_side_has_alone_are_errors_unless_strict_is_off(directory):
    def net(width=5, count=7):
        return nn.ModuleDict({"net": nn.ModuleDict({"embed": nn.Embedding(count, width), "new": nn.Linear(2, 2)})})

    def made(**options):
        return ps.init(net, TX, weights=ps.Weights(directory, **options), deferred=True)

    with pytest.raises(TemplateMismatch) as caught:
        made()
    text = str(caught.value)
    assert "the weights do not fit the state\n  where:" in text
    assert "missing (2): 'net.new.weight', 'net.new.bias'" in text
    assert "left over (8): " in text
    assert "instead: keep='net.new.weight'" in text
    assert made(strict=False).params["net.embed.weight"].shape == (7, 5)
    with pytest.raises(TemplateMismatch, match=r"net.embed.weight: float64\[7, 5\], in the state float32\[4, 4\]"):
        ps.init(lambda: net(4, 4), TX, weights=ps.Weights(directory, strict=False))
    with pytest.raises(ConfigError, match="there is no such file of weights"):
        ps.init(Net, TX, weights=directory / "nothing")


@pytest.mark.filterwarnings("ignore")  # of torch, which saves a checkpoint without a process group
def test_a_part_of_a_tensor_is_read_without_the_rest(tmp_path, seed):
    draw = random.Random(seed)
    tensors = {"w": torch.randn(11, 5, 3), "s": torch.tensor(2.0), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    dcp.save(tensors, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt", tmp_path / "dcp"):
        stored = stored_weights(path)
        for _ in range(4):
            starts = [draw.randrange(n) for n in (11, 5, 3)]
            lengths = [draw.randrange(n - s + 1) for n, s in zip((11, 5, 3), starts, strict=True)]
            part = tensors["w"][tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))]
            assert torch.equal(stored["w"].part((tuple(starts), tuple(lengths))), part), path.name
        assert stored["s"].part(((), ())).item() == 2.0
        assert stored["none"].part(((0, 1), (0, 2))).shape == (0, 2)


class Existing(nn.Module):
    """Does what `from_pretrained` does: values that were read elsewhere become its parameters."""

    def __init__(self, read, fill=True):
        super().__init__()
        self.weight, self.bias = nn.Parameter(read), nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.empty(3))
        if fill:
            self.table.fill_(1.0)


def test_deferred_init_says_how_to_read_a_pretrained_model():
    read = torch.ones(4, 4)
    for arguments, text in (
        ((read,), "has read the values of its parameters into memory\n  where:   'weight'; 1 of 2 tensors"),
        ((torch.ones(1), False), "leaves tensors without values\n  where:   'buffers.table'; 1 of "),
    ):
        with pytest.raises(StepError) as caught:
            ps.init(lambda given=arguments: Existing(*given), TX, deferred=True)
        assert text in str(caught.value)
        assert "tx, weights=directory, plan=plan, deferred=True)" in str(caught.value)


def test_a_directory_of_shards_is_written_and_read(directory, tmp_path):
    state = ps.init(Net, TX, weights=ps.Weights(directory, rename={"net.": ""}))
    out = ps.save_weights(state, tmp_path / "out", shard_bytes=150)
    index = json.loads((out / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(p.name for p in out.iterdir() if p.name != INDEX)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    read = {n: t for file in files for n, t in load_file(out / file).items()}
    names = set(Net().state_dict())
    assert set(read) == names  # under both names of tied parameters, without the table
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read.values())
    sizes = [sum(t.nbytes for t in load_file(out / file).values()) for file in files]
    assert all(size <= 150 or len(load_file(out / f)) == 1 for size, f in zip(sizes, files, strict=True))
    ps.testing.assert_trees_equal(ps.init(Net, TX, weights=out), state)
    with pytest.raises(ConfigError, match="the directory holds weights already"):
        ps.save_weights(state, out)
    single = ps.save_weights(state, f"{tmp_path}/v1.5/")
    assert [p.name for p in single.iterdir()] == ["model.safetensors"]


def test_an_incomplete_directory_has_no_index(directory, tmp_path, monkeypatch):
    state = ps.init(Net, TX, weights=ps.Weights(directory, rename={"net.": ""}))
    from purestep.snapshot import export

    written = []

    def full(path, values, metadata):
        if written:
            raise SnapshotError("the disk is full")
        written.append(path)

    monkeypatch.setattr(export, "write_file", full)
    with pytest.raises(SnapshotError, match="the disk is full"):
        ps.save_weights(state, tmp_path / "out", shard_bytes=150)
    assert not (tmp_path / "out" / INDEX).exists()
