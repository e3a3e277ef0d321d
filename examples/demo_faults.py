"""Break a small training in every way we know, several hundred times; it must end with the same bits each time.

Prints one table and exits with 1 unless every run ended right. Takes two or three minutes.

    python examples/demo_faults.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

BATCHES = 12
SAMPLES, SIZE = 17, 3  # six batches an epoch, the last one smaller


def loss_fn(net: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, object]]:
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


def table(samples: int, seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()}


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def train(run_dir: Path, *, workers: int = 0) -> ps.Result:
    """A training with what makes resuming hard: shuffle, dropout, BatchNorm, schedule, early stopping."""
    torch.set_num_threads(1)
    tx = ps.optim.adamw(ps.optim.warmup_cosine_decay_schedule(0.0, 0.02, warmup_steps=4, decay_steps=BATCHES))
    data = ps.data.batches(table(SAMPLES, 0), SIZE, drop_last=False, num_workers=workers)
    held_out = ps.data.batches(table(7, 1), 4, shuffle=False, drop_last=False)
    result = ps.fit(
        ps.make_step(loss_fn, tx),
        ps.init(make_model, tx, seed=0),
        data,
        until=ps.steps(BATCHES),
        run_dir=run_dir,
        callbacks=[
            ps.callbacks.log(every=ps.every.steps(2)),
            ps.callbacks.evaluate(loss_fn, held_out, every=ps.every.epoch()),
            ps.callbacks.early_stopping("val/loss", patience=50),
            ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.latest(2)),
        ],
    )
    print(f"{result.reason}: {ps.digest(result.state)}")
    return result


def train_with_workers(run_dir: Path) -> ps.Result:
    return train(run_dir, workers=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--times", type=int, default=None, help="how often each fault is injected; it knows by default")
    parser.add_argument("--only", nargs="*", default=None, help="names of faults; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="how many faults to try at a time")
    args = parser.parse_args()
    report = ps.testing.check_faults(
        train,
        with_workers=train_with_workers,
        faults=args.only,
        times=None if args.times is None else dict.fromkeys(ps.testing.FAULTS, args.times),
        seed=args.seed,
        jobs=args.jobs,
        progress=lambda row: print(f"  {row.fault}: {row.why_not or f'{row.right} of {row.runs} runs'}", flush=True),
    )
    print(f"\n{report}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
