"""Fine-tune a GPT by low-rank adapters: pretrained on Python's source code, adapted to the prose of its documentation.

    python examples/lora.py
    purestep run examples/lora.py --rank 2 --until 50steps

    pretrain    all parameters, on source code; its weights go to a file, as those of a published model would
    adapters    a few thousand parameters beside the frozen ones, on prose: `ps.lora` says which layers get them
    merged      the adapters added to the weights they belong to: an ordinary model, of the same bits in every run

A run of adapters writes the frozen weights once; each of its snapshots has what trains, and their digest.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from gpt import GPT, loss_fn, read, windows

import purestep as ps

BATCH = 16
ADAPTED = ["*.query", "*.value", "*.up", "*.down"]


@dataclass(frozen=True)
class Settings:
    """The settings of the adapters' run.

    Args:
        root: directory of the run directories and of the pretrained weights.
        rank: of the adapters.
        lr: their learning rate.
        steps: of 16 samples of 64 bytes each.
        pretraining: steps before, on source code.
        seed: of all random numbers.
    """

    root: Path = Path("runs/lora")
    rank: int = 4
    lr: float = 1e-2
    steps: int = 120
    pretraining: int = 150
    seed: int = 0


def prose() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return samples of Python's documentation to train on, and others to evaluate with."""
    text = np.frombuffer("\n".join(topics.values()).encode(), np.uint8)
    cut = len(text) * 9 // 10
    return windows(text[:cut]), windows(text[cut:])


def held_out_loss(state: ps.TrainState) -> float:
    held_out = ps.data.batches(prose()[1], 64, shuffle=False).take(8)
    return ps.evaluate(state, loss_fn, held_out)["val/loss"]


def pretrained(settings: Settings) -> Path:
    """Train all of a GPT on source code, or find that it was; return the file of its weights."""
    tx = ps.optim.adamw(3e-3)
    data = ps.data.batches(windows(read(1.0)), BATCH, seed=settings.seed)
    state = ps.init(GPT, tx, seed=settings.seed)
    directory, until = settings.root / f"pretrain-{settings.pretraining}", ps.steps(settings.pretraining)
    result = ps.fit(ps.make_step(loss_fn, tx), state, data, until=until, run_dir=directory)
    return ps.save_weights(result.state, directory / "gpt.safetensors")


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    rule = ps.lora(ADAPTED, rank=settings.rank, alpha=2 * settings.rank, embeddings="position")
    tx = ps.optim.adamw(settings.lr)
    return ps.Experiment(
        ps.make_step(loss_fn, tx),
        ps.init(rule(GPT), tx, seed=settings.seed, weights=pretrained(settings)),
        ps.data.batches(prose()[0], BATCH, seed=settings.seed),
        until=ps.steps(settings.steps),
        callbacks=[ps.callbacks.snapshots(every=ps.every.steps(40), keep=ps.snapshot.all_())],
        free_settings=["root"],
    )


def disk(path: Path) -> int:
    """Return the bytes of the files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Settings.root)
    for name in ("rank", "steps", "pretraining"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    settings = Settings(**vars(parser.parse_args()))
    adapted = experiment(settings)
    before = held_out_loss(adapted.state)  # B begins at zero, so this is the loss of the pretrained model
    run_dir = settings.root / f"rank-{settings.rank}-{settings.steps}"
    result = adapted.fit(run_dir=run_dir)
    if result.interrupted:
        return result.exit_code
    merged = ps.merge_lora(result.state)
    ps.save_weights(merged, settings.root / "merged.safetensors")  # under the names of the pretrained weights
    snapshots = run_dir / "snapshots"
    newest = snapshots / str(ps.snapshot.steps(run_dir)[-1])
    report = {
        "parameters, trained": f"{sum(t.numel() for t in result.state.params.values()):,}",
        "parameters, frozen": f"{sum(t.numel() for t in result.state.buffers.values()):,}",
        "held-out loss, pretrained": f"{before:.4f}",
        "held-out loss, adapted": f"{held_out_loss(result.state):.4f}",
        "held-out loss, merged": f"{held_out_loss(merged):.4f}",
        "on the disk": f"{disk(newest):,} bytes a snapshot, {disk(snapshots / 'base'):,} bytes of frozen weights once",
    }
    width = max(len(name) for name in report)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in report.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
