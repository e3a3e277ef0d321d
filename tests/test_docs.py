"""The Python blocks of README and docs run, in order, page by page; optimizers have a page test of their own."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import purestep as ps

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(page):
    """Run the blocks of a page one after the other; return their names."""
    namespace = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_loop_page(capsys):
    run("docs/loop.md")
    out = capsys.readouterr().out
    assert "reached 2 epochs" in out
    assert "loss below 0.5" in out


def test_metrics_page(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run("docs/metrics.md")
    out = capsys.readouterr().out
    assert "\nTrue\n" in out
    assert "torch.Size([30]) torch.Size([30, 3])" in out
    names = [name for name in namespace["row"] if name.startswith("val/")]
    assert set(names) == {"val/loss", "val/auroc", "val/scores/recall", "val/scores/kappa"}


def test_devices_page(capsys):
    run("docs/devices.md")
    assert "\non cpu\n5 trained" in capsys.readouterr().out


def test_cli_page(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("docs/cli.md")
    assert capsys.readouterr().out == "reached 20 steps\n"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_tune_page(capsys):
    namespace = run("docs/tune.md")
    assert {"suggestion", "fits"} <= set(capsys.readouterr().out.split())
    assert 1e-4 < namespace["found"].suggestion < 1.0
    assert len(namespace["study"].rows) == 5
    assert [row.left_at for row in namespace["sweep"].rows].count("") == 1
    assert (namespace["sizes"].size, len(namespace["figure"].axes)) == (256, 1)


def test_data_page_reads_per_rank(capsys):
    """The blocks of the page that stand on their own."""
    namespace = {"__name__": "page", "ps": ps}
    for block in blocks("docs/data.md"):
        if ("share" in block or "SampleShard" in block) and "mode=" not in block:
            exec(compile(block, "docs/data.md", "exec"), namespace)
    assert tuple(namespace["batch"].shape) == (32,)
    assert next(namespace["train"].open(0, 0)).unique().numel() == 32
    assert capsys.readouterr().out == "tensor([ 8,  9, 10, 11, 12, 13, 14, 15])\n"


def test_transforms_page(capsys):
    namespace = run("docs/transforms.md")
    assert float(namespace["slope"]) == pytest.approx(float(namespace["rise"]), rel=1e-2)
    assert "learning rate 0.01: loss" in capsys.readouterr().out


def test_sharding_page(capsys):
    run("docs/sharding.md")
    out = capsys.readouterr().out
    assert out.startswith("Spec(None, 'fsdp')\n")
    shown = (ROOT / "docs/sharding.md").read_text()
    table = out[out.index("mesh(") :].splitlines()[:9]
    assert "\n".join(table) in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch about its own exporter
def test_interop_page(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("docs/interop.md")
    assert capsys.readouterr().out == "32.0\n"
    suffixes = [*[""] * 3, ".ckpt", ".pt", ".pt2", *[".safetensors"] * 3]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == suffixes


def test_purity_page(capsys):
    run("docs/purity.md")
    out = capsys.readouterr().out
    assert "the same bits: True\nthe caller's stream: True\n" in out
    assert "calls: 3.0" in out


def test_record_page(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run("docs/record.md")
    out = capsys.readouterr().out
    assert "reached 4 epochs" in out
    assert "0.01@25" in out
    assert "setting outlier" in out
    assert "first batch  step" in out
    assert "the same bits" in out
    assert "DIFFERS" not in out
    (tree,) = re.findall(
        r"^```text\n(chain\n.*?)\n```", (ROOT / "docs/record.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert tree in out
    found = namespace["found"]
    assert 5 in found.batch.indices[0].tolist()
    assert found.position == found.batch.position


def test_bits_page(tmp_path, monkeypatch, capsys):
    """What is shown was seen on one machine; another one may round elsewhere, but says it in the same lines."""
    (script,) = blocks("docs/bits.md")
    (tmp_path / "train.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    try:
        runpy.run_path("train.py")
    finally:
        torch.set_num_threads(before)
    shown = re.search(
        r"^the first operation that differs.*?(?=^```)", (ROOT / "docs/bits.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert _without_numbers(capsys.readouterr().out) == _without_numbers(shown.group())
    assert (tmp_path / "1.bits").exists()


def _without_numbers(text):
    """The first words of each line, without what depends on the machine."""
    return [line.split(" is ")[0] if i == 0 else line[:13] for i, line in enumerate(text.strip().splitlines())]


@pytest.mark.slow
def test_readme(tmp_path, monkeypatch, seed):
    """The first block trains for real; the hand-written step of the second takes its place in `fit`."""
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    table = {"image": (digits.images / 16).astype(np.float32), "label": digits.target}
    cut = {k: v[:1400] for k, v in table.items()}, {k: v[1400:] for k, v in table.items()}
    first, second = (b for b in blocks("README.md") if "import purestep" in b or "def train_step" in b)
    namespace = {"__name__": "page", "train_set": cut[0], "val_set": cut[1]}
    exec(compile(first, "README.md", "exec"), namespace)
    result, ps = namespace["result"], namespace["ps"]
    assert result.metrics["val/accuracy"] > 0.7  # five epochs at 3e-4; chance is 0.1
    namespace["model"] = namespace["make_model"]()
    exec(compile(second, "README.md", "exec"), namespace)
    data = ps.data.batches({"x": cut[0]["image"], "y": cut[0]["label"]}, 128)
    by_hand = ps.fit(namespace["train_step"], ps.init(namespace["model"], namespace["tx"]), data, until=ps.epochs(1))
    assert by_hand.metrics["train/loss_epoch"] < 2.3
