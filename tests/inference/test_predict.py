"""`ps.predict`: every sample once, in files that appear whole, on one rank and on two."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, DataError, SnapshotError, StepError

JOB = Path(__file__).with_name("predict_job.py")
TX = ps.optim.sgd(0.1)


def make_model():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def start():
    return ps.init(make_model, TX, seed=0)


X = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
DATA = ps.data.batches({"x": X}, 4, shuffle=True, seed=3, drop_last=False)


def both(net, batch):
    logits = net(batch["x"])
    return {"logits": logits, "best": (logits.argmax(-1), logits.max(-1).values.double())}


def wanted():
    return ps.to_module(start()).eval()(X).detach()


@pytest.mark.parametrize("given", ["batches", "list", "generator"])
def test_each_sample_has_one_output_with_its_index(given):
    data = {"batches": DATA, "list": list(DATA), "generator": lambda epoch: iter(list(DATA))}[given]
    state = start()
    before = ps.digest(state)
    found = list(ps.predict(state, both, data))
    assert ps.digest(state) == before
    assert [len(p.indices) for p in found] == [4] * 9 + [1]
    indices = torch.cat([p.indices for p in found])
    assert sorted(indices.tolist()) == list(range(37))
    order = torch.cat([DATA.indices(0, n) for n in range(10)])
    logits = torch.cat([p.outputs["logits"] for p in found])
    torch.testing.assert_close(logits, wanted()[order])
    assert torch.equal(indices, order if given == "batches" else torch.arange(37))


def test_only_as_many_batches_as_asked_are_read_as_they_are_needed():
    read = []

    def source(epoch):
        for batch in DATA:
            read.append(1)
            yield batch

    predictions = ps.predict(start(), both, source)
    assert read == []
    next(predictions)
    assert len(read) <= 2
    assert len(list(ps.predict(start(), both, DATA, limit=3))) == 3
    step = ps.jit(ps.make_predict(lambda net, batch: net(batch["x"])), backend="eager")
    found = torch.cat([p.outputs for p in ps.predict(start(), step, DATA.replace(shuffle=False))])
    torch.testing.assert_close(found, wanted())
    zeros = ps.predict(start(), both, DATA, of=lambda s: s.replace(params={k: 0 * v for k, v in s.params.items()}))
    assert not next(zeros).outputs["logits"].any()


@pytest.mark.parametrize("format", ["safetensors", "npy", "parquet"])
def test_files_are_read_back_in_the_order_of_the_samples(format, tmp_path):
    directory = ps.predict(start(), both, DATA, to=tmp_path / "p", format=format, batches_per_file=3)
    found = ps.load_predictions(directory)
    assert torch.equal(found.indices, torch.arange(37))
    torch.testing.assert_close(found.outputs["logits"], wanted())
    assert torch.equal(found.outputs["best.0"], wanted().argmax(-1))
    assert found.outputs["best.1"].dtype == torch.float64
    assert len(list(tmp_path.glob("p/part-*"))) == 4
    assert not list(tmp_path.glob("p/*tmp*"))
    if format == "npy":
        assert np.load(tmp_path / "p" / "part-0000-000000" / "logits.npy").shape == (12, 3)
    if format == "parquet":
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(tmp_path / "p" / "part-0000-000000.parquet").num_rows == 12


def test_it_continues_after_the_last_whole_file_and_is_done_when_it_is(tmp_path):
    calls = []

    class Stop(Exception):
        pass

    class Dataset(torch.utils.data.Dataset):
        most = 99

        def __len__(self):
            return 37

        def __getitem__(self, i):
            calls.append(i)
            if len(calls) > self.most:
                raise Stop
            return {"x": X[i]}

    dataset = Dataset()
    data = ps.data.batches(dataset, 4, shuffle=False, drop_last=False)
    dataset.most = 26
    with pytest.raises(DataError):
        ps.predict(start(), both, data, to=tmp_path, batches_per_file=2)
    with pytest.raises(SnapshotError, match=r"not complete\n  where:   .*rank 0 did not finish"):
        ps.load_predictions(tmp_path)
    # What was killed between a file and the note of it is written again.
    (tmp_path / "part-0000-000003.safetensors").write_bytes(b"half")
    calls.clear()
    dataset.most = 99
    ps.predict(start(), both, data, to=tmp_path, batches_per_file=2)
    assert calls == list(range(24, 37))
    torch.testing.assert_close(ps.load_predictions(tmp_path).outputs["logits"], wanted())
    calls.clear()
    ps.predict(start(), both, data, to=tmp_path, batches_per_file=2)
    assert calls == []


def test_files_of_something_else_are_never_mixed(tmp_path):
    ps.predict(start(), both, DATA, to=tmp_path / "p")
    other = ps.init(make_model, TX, seed=1)
    for state, function, data, options, named in (
        (other, both, DATA, {}, "state is not the same"),
        (start(), lambda net, batch: net(batch["x"]), DATA, {}, "function is not the same"),
        (start(), both, DATA.replace(seed=4), {}, "data is not the same"),
        (start(), both, DATA, {"format": "npy"}, "format is not the same"),
        (start(), both, DATA, {"batches_per_file": 3}, "batches_per_file is not the same"),
    ):
        with pytest.raises(ConfigError, match=f"predictions of something else\n  where:   .*: {named}"):
            ps.predict(state, function, data, to=tmp_path / "p", **options)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"something else than predictions of this many ranks(.|\n)*thesis\.tex"):
        ps.predict(start(), both, DATA, to=tmp_path / "strange")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda d: next(ps.predict(start(), lambda n, b: n(b["x"]).sum(), DATA)), StepError, r"output: float32\[\]"),
        (lambda d: next(ps.predict(start(), lambda n, b: {}, DATA)), StepError, "a prediction is a tensor with"),
        (lambda d: ps.predict(start(), lambda n: 0, DATA), ConfigError, "takes the model and the batch"),
        (
            lambda d: ps.predict(start(), both, ps.data.batches(list(X), 4, on_bad_sample="skip")),
            DataError,
            "have no known indices",
        ),
        (
            lambda d: ps.predict(start(), both, DATA, to=d, format="csv"),
            ConfigError,
            "'safetensors', 'npy' or 'parquet'",
        ),
        (
            lambda d: ps.predict(start(), lambda n, b: n(b["x"]).bfloat16(), DATA, to=d, format="npy"),
            ConfigError,
            r"numpy has no bfloat16(.|\n)*safetensors",
        ),
        (
            lambda d: ps.predict(start(), lambda n, b: {"index": n(b["x"])}, DATA, to=d),
            ConfigError,
            "an output needs another name",
        ),
        (lambda d: ps.load_predictions(d), SnapshotError, "there are no predictions"),
    ],
)
def test_what_cannot_be_predicted_is_refused(call, error, text, tmp_path):
    with pytest.raises(error, match=text):
        call(tmp_path)


def test_bfloat16_goes_into_safetensors(tmp_path):
    ps.predict(start(), lambda n, b: n(b["x"]).bfloat16(), DATA, to=tmp_path)
    assert torch.equal(ps.load_predictions(tmp_path).outputs, wanted().bfloat16())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("given", ["batches", "list"])
def test_the_parts_of_all_ranks_make_the_whole(count, given, tmp_path):
    """Each rank's work, done here one after the other; the slow test does it in processes."""
    from purestep.data.sampler import BatchShard
    from purestep.inference.predict import _Work

    source = ps.data.as_source(DATA if given == "batches" else list(DATA.replace(shuffle=False)))
    for index in range(count):
        work = _Work(ps.make_predict(both), source, None)
        work.shard = BatchShard(index, count)
        numbers = [number for number, _ in work._run(start(), 0)]
        assert numbers == list(range(index, 10, count))
        assert [number for number, _ in work._run(start(), count)] == numbers[1:]
        with pytest.raises(SnapshotError, match=r"there are no predictions|not complete"):
            ps.load_predictions(tmp_path)
        work.write(start(), tmp_path, "safetensors", 2)
    found = ps.load_predictions(tmp_path)
    assert torch.equal(found.indices, torch.arange(37))
    torch.testing.assert_close(found.outputs["logits"], wanted())


# --- on two ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_write_their_parts_and_evaluate_as_one(zygote, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        zygote.popen(JOB, str(tmp_path), env=base | several | {"RANK": str(r)}, preload=zygote.RANKS) for r in range(2)
    ]
    for child in children:
        with child:
            _, errors = child.communicate(120)
            assert (child.returncode, errors) == (0, "")
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    single = ps.evaluate(start(), lambda net, batch: net(batch["x"]).square().mean(), DATA)
    for answer in answers:
        assert answer["evaluations"] == [dict(single)] * 2
        assert answer["refused"].startswith("RankError" if answer["rank"] else "ConfigError")
    assert sorted(answers[0]["indices"] + answers[1]["indices"]) == list(range(37))
    assert len(answers[0]["indices"]) == 20
    for plan in ("ddp", "fsdp", "resumed"):
        found = ps.load_predictions(tmp_path / plan)
        torch.testing.assert_close(found.outputs["logits"], wanted())
    with pytest.raises(ConfigError, match="this many ranks"):
        ps.predict(start(), both, DATA, to=tmp_path / "ddp")
    (tmp_path / "ddp" / "rank-0001.json").unlink()
    with pytest.raises(SnapshotError, match="rank 1 wrote nothing"):
        ps.load_predictions(tmp_path / "ddp")
