"""Build a trainer of your own, at each level that the library has; all of them end with the same bits.

Level 0 is a step by hand. Level 1 calls it in a loop of your own, with a checkpoint after each epoch, and continues
where it was interrupted. Level 2 iterates over the events of a run, and decides what to do about each. Level 3 is
`fit`, with a callback that decides and one that looks. All end early, at the accuracy that `--target` says.

    python examples/own_trainer.py
    python examples/own_trainer.py --width 1024 --epochs 100 --target 0.985
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

Batch = dict[str, torch.Tensor]
Metrics = dict[str, Any]


def load() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return four fifths of the digits to learn from, and one fifth to be judged by."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    samples = {"x": (digits.data[order] / 16).astype(np.float32), "y": digits.target[order]}
    held = len(order) // 5
    return {name: c[held:] for name, c in samples.items()}, {name: c[:held] for name, c in samples.items()}


def judge(net: nn.Module, batch: Batch) -> tuple[torch.Tensor, Metrics]:
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-3, weight_decay=0.01))


# --- level 0: a step --------------------------------------------------------------------------------------------------


def step(state: ps.TrainState, batch: Batch) -> tuple[ps.TrainState, Metrics]:
    """Return the state after a batch and its metrics. All that a training step does is in these lines."""
    key = ps.random.fold_in(state.rng, state.step)  # of dropout: another one in each step, the same after a resume

    def loss_of(params: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        logits, buffers = ps.apply(state.model, params, state.buffers, batch["x"], rng=key)
        return cross_entropy(logits, batch["y"]), buffers

    grads, (loss, buffers) = ps.grad_and_value(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(tx, grads, buffers=buffers), {"loss": loss}


# --- level 1: a loop of your own --------------------------------------------------------------------------------------


def own_loop(
    state: ps.TrainState, train: ps.data.Batches, held_out: ps.data.Batches, directory: Path, epochs: int, target: float
) -> ps.TrainState:
    """Train up to an epoch, or to an accuracy; continue where the last call with this directory ended."""
    run = {"state": state, "epochs": 0}
    with ps.snapshot.Store(directory, keep=ps.snapshot.latest(2)) as store:
        if store.steps():
            run = store.restore(like=run).value
        for epoch in range(run["epochs"], epochs):
            state = run["state"]
            for batch in train.epoch(epoch):
                state, metrics = step(state, batch)
            run = {"state": state, "epochs": epoch + 1}
            accuracy = ps.evaluate(state, judge, held_out)["val/accuracy"]
            print(f"  epoch {epoch + 1}: loss {metrics['loss']:.4f}, held-out accuracy {accuracy:.2%}")
            store.save(int(state.step), run, metrics={"accuracy": accuracy})  # copied now, written in the background
            if accuracy >= target:
                break
    return run["state"]


# --- level 2: the events of a run -------------------------------------------------------------------------------------


def own_events(
    state: ps.TrainState, train: ps.data.Batches, held_out: ps.data.Batches, epochs: int, target: float
) -> ps.TrainState:
    """Let the library drive, and look at each event: leave the loop, and the run is over."""
    evaluate = ps.callbacks.evaluate(judge, held_out, every=ps.every.epoch())
    with ps.run(step, state, train, until=ps.epochs(epochs), callbacks=[evaluate]) as events:
        for event in events:
            if isinstance(event, ps.loop.Evaluated):
                accuracy = event.row["val/accuracy"]
                print(f"  batch {events.loop.cursor.batches}: held-out accuracy {accuracy:.2%}")
                if accuracy >= target:
                    break
    return events.loop.train


# --- level 3: fit, with features of your own --------------------------------------------------------------------------


@dataclass(frozen=True)
class StopAt(ps.callbacks.Reducer):
    """Ends the run at an accuracy: it answers an event with an effect, and the loop performs it."""

    target: float
    name: str = "stop_at"

    def react(self, own: object, event: ps.loop.Event, view: ps.loop.View) -> tuple[object, tuple[Any, ...]]:
        if isinstance(event, ps.loop.Evaluated) and event.row["val/accuracy"] >= self.target:
            return own, (ps.loop.Stop(f"accuracy of {self.target}"),)
        return own, ()


def narrate(event: ps.loop.Event, loop: ps.loop.LoopState) -> None:
    """Print how an evaluation went: what only looks sees all events, and changes nothing."""
    if isinstance(event, ps.loop.Evaluated):
        print(f"  {int(loop.train.step)} updates: held-out accuracy {event.row['val/accuracy']:.2%}")


def own_features(
    state: ps.TrainState, train: ps.data.Batches, held_out: ps.data.Batches, epochs: int, target: float
) -> ps.TrainState:
    features = [
        ps.callbacks.evaluate(judge, held_out, every=ps.every.epoch()),
        StopAt(target),
        ps.callbacks.tap(narrate),
    ]
    result = ps.fit(step, state, train, until=ps.epochs(epochs), callbacks=features)
    print(f"  {result.reason}")
    return result.state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="the most")
    parser.add_argument("--target", type=float, default=0.97, help="held-out accuracy at which it ends")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads

    def make_model() -> nn.Module:
        hidden = [nn.Linear(64, args.width), nn.BatchNorm1d(args.width), nn.ReLU(), nn.Dropout(0.2)]
        return nn.Sequential(*hidden, nn.Linear(args.width, 10))

    train_set, held = load()
    train = ps.data.batches(train_set, 64, seed=args.seed)
    held_out = ps.data.batches(held, 256, shuffle=False, drop_last=False)
    start = ps.init(make_model, tx, seed=args.seed)
    ps.testing.check_pure(step, start, next(iter(train)))

    print("level 1, interrupted after an epoch:")
    with tempfile.TemporaryDirectory() as directory:
        own_loop(start, train, held_out, Path(directory), 1, args.target)
        print("and continued:")
        ends = {"1": own_loop(start, train, held_out, Path(directory), args.epochs, args.target)}
    print("level 2:")
    ends["2"] = own_events(start, train, held_out, args.epochs, args.target)
    print("level 3:")
    ends["3"] = own_features(start, train, held_out, args.epochs, args.target)

    print("\nlevel  updates  accuracy  digest")
    for level, state in ends.items():
        accuracy = ps.evaluate(state, judge, held_out)["val/accuracy"]
        print(f"{level:<5}  {int(state.step):>7}  {accuracy:8.2%}  {ps.digest(state)}")
    same = len({ps.digest(state) for state in ends.values()}) == 1
    print(f"held-out accuracy of all levels  {accuracy:.2%}" if same else "DIFFERENT BITS")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
