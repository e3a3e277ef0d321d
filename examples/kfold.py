"""Cross-validate: train the k folds of a data set as one state, in one vmapped step, and compare learning rates.

Each fold is a training of its own, with its own weights, order of samples and dropout, and never sees its held-out
part. Stacked, they are one state, and `torch.vmap` advances all of them; so one run of `fit` is a cross-validation.

    python examples/kfold.py
    python examples/kfold.py --folds 50 --width 512 --epochs 100 --lrs 1e-4 3e-4 1e-3 3e-3 1e-2
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

Columns = dict[str, torch.Tensor]


def load() -> Columns:
    """Return the 569 tumours of scikit-learn: x, float32[n, 30]; y, int64[n], 1 for a benign one."""
    found = load_breast_cancer()
    return {"x": torch.tensor(found.data, dtype=torch.float32), "y": torch.tensor(found.target)}


def folds_of(samples: int, folds: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices that each fold learns from, [folds, n], and those that it is judged by, [folds, m].

    Every fold has as many samples as every other one, so that they stack: the samples % folds last ones of the random
    order are in no held-out part.
    """
    order = ps.random.permutation(ps.random.key(seed), samples)
    held_out = order[: samples // folds * folds].view(folds, -1)
    learnt = torch.stack([order[~torch.isin(order, part)] for part in held_out])
    return learnt, held_out


def standardized(x: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    """Scale features by mean and deviation of what the fold learns from, and of nothing else."""
    return (x - x[learnt].mean(0)) / x[learnt].std(0)


def loss_fn(net: nn.Module, batch: Columns) -> tuple[torch.Tensor, dict[str, object]]:
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


evaluate = ps.make_eval(loss_fn)


def judged(states: ps.TrainState, held_out: Columns) -> dict[str, torch.Tensor]:
    """Return loss and accuracy of each fold on its held-out part: float32[folds] each."""

    def one(state: ps.TrainState, batch: Columns) -> dict[str, torch.Tensor]:
        return {name: metric.compute() for name, metric in evaluate(state, batch).items()}

    return torch.vmap(one)(states, held_out)


def fold_sets(args: argparse.Namespace) -> tuple[Columns, Columns]:
    """Return what the folds learn from, where dim 0 is the samples and dim 1 the folds; and what judges each fold."""
    data = load()
    learnt, held_out = folds_of(len(data["y"]), args.folds, args.seed)
    x = torch.vmap(standardized, in_dims=(None, 0))(data["x"], learnt)  # [folds, samples, features]
    fold = torch.arange(args.folds)[:, None]
    train_set = {"x": x[fold, learnt].transpose(0, 1), "y": data["y"][learnt].T}
    return train_set, {"x": x[fold, held_out], "y": data["y"][held_out]}


def train_folds(args: argparse.Namespace, lr: float, folds: range, train_set: Columns) -> ps.TrainState:
    """Train some of the folds together, and return their states, stacked."""

    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(30, args.width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(args.width, 2))

    tx = ps.optim.adamw(lr, weight_decay=0.05)
    step = ps.make_step(loss_fn, tx)

    def step_of_all(states: ps.TrainState, batch: Columns) -> tuple[ps.TrainState, dict[str, torch.Tensor]]:
        states, metrics = torch.vmap(step, in_dims=(0, 1))(states, batch)
        return states, {"loss": metrics["loss"].compute().mean()}

    members = [ps.init(make_model, tx, seed=args.seed + number) for number in folds]
    together = ps.tree.map(lambda *leaves: torch.stack(leaves), *members)
    mine = {name: column[:, folds.start : folds.stop] for name, column in train_set.items()}
    train = ps.data.batches(mine, args.batch, seed=args.seed)
    return ps.fit(step_of_all, together, train, until=ps.epochs(args.epochs)).state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads

    train_set, held = fold_sets(args)
    print(f"{args.folds} folds, each a training of {args.epochs} epochs\n")
    print("learning rate  held-out loss  accuracy  standard error  worst fold  digest")
    found = []
    for lr in args.lrs:
        states = train_folds(args, lr, range(args.folds), train_set)
        scores = judged(states, held)
        loss, accuracy = float(scores["loss"].mean()), scores["accuracy"]
        error = accuracy.std() / args.folds**0.5
        cells = f"{lr:<13g}  {loss:>13.4f}  {accuracy.mean():>8.2%}  {error:>14.2%}  {accuracy.min():>10.2%}"
        print(f"{cells}  {ps.digest(states)[:16]}", flush=True)
        found.append((loss, lr, scores))

    _, lr, scores = min(found, key=lambda row: row[0])
    alone = judged(train_folds(args, lr, range(1), train_set), {name: column[:1] for name, column in held.items()})
    print(f"\nfirst fold, held-out loss: {scores['loss'][0]:.6f} among all, {alone['loss'][0]:.6f} trained alone")
    torch.testing.assert_close(alone["loss"][0], scores["loss"][0], rtol=1e-2, atol=1e-3)
    print(f"cross-validated accuracy  {scores['accuracy'].mean():.2%} at a learning rate of {lr:g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
