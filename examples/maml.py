"""Meta-learn: find weights from which a few gradient steps learn a new task (MAML; Finn, Abbeel and Levine, 2017).

The loss of a task is that on its query *after* a small training on its support. A training is a loop of pure steps, so
the loss is an expression: `vmap` takes it over the tasks of a batch, and `ps.grad_and_value` differentiates it through
the inner steps. A task is drawn from a key, so a batch is a column of keys. Two kinds of task:

    python examples/maml.py                  # sine waves of any amplitude and phase: squared error
    python examples/maml.py --tasks digits   # three kinds of digits that training never shows: cross entropy
    python examples/maml.py --inner-steps 5 --width 128 --batches 10000 --first-order

The results are `val/before` and `val/after`, the loss on the queries of 200 new tasks before and after adapting, and
`val/ratio`, the second by the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import purestep as ps
from purestep.cli.command import main

Samples = dict[str, torch.Tensor]
Draw = Callable[[torch.Tensor], tuple[Samples, Samples]]


@dataclass(frozen=True)
class Settings:
    """What one may change.

    Args:
        tasks: what is learnt to learn.
        inner_steps: gradient steps on the support of a task.
        inner_lr: their learning rate; by default 0.01 for waves, 0.2 for digits.
        first_order: leave out the derivative of the inner gradients.
        width: of the hidden layers.
        lr: peak of the outer learning rate.
        batch: tasks of a batch.
        batches: of the run.
        seed: seed of all random numbers.
    """

    tasks: Literal["waves", "digits"] = "waves"
    inner_steps: int = 1
    inner_lr: float | None = None
    first_order: bool = False
    width: int = 40
    lr: float = 5e-3
    batch: int = 25
    batches: int = 600
    seed: int = 0


def wave(key: torch.Tensor, points: int = 10) -> tuple[Samples, Samples]:
    """Draw a task: ten points of a sine wave to learn from, and ten others that are asked for."""
    amplitude = ps.random.uniform(ps.random.fold_in(key, "amplitude"), (1,)) * 4.9 + 0.1
    phase = ps.random.uniform(ps.random.fold_in(key, "phase"), (1,)) * torch.pi
    x = ps.random.uniform(ps.random.fold_in(key, "x"), (2 * points, 1)) * 10 - 5
    y = amplitude * torch.sin(x - phase)
    return {"x": x[:points], "y": y[:points]}, {"x": x[points:], "y": y[points:]}


def draw_of_digits(which: range, ways: int = 3, shots: int = 3, asked: int = 10) -> Draw:
    """Return what draws a task from some of the digits, upright or turned by 90 degrees: three kinds of these."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    turned = [torch.rot90(images[labels == d][:170], r, (1, 2)).flatten(1) for d in which for r in (0, 1)]
    pool = torch.stack(turned)  # [kind, 170, 64]

    def draw(key: torch.Tensor) -> tuple[Samples, Samples]:
        chosen = ps.random.uniform(ps.random.fold_in(key, "kinds"), (len(pool),)).argsort()[:ways]
        order = ps.random.uniform(ps.random.fold_in(key, "images"), (ways, pool.shape[1])).argsort()
        x = pool[chosen[:, None], order[:, : shots + asked]]
        y = torch.arange(ways)[:, None].expand(ways, shots + asked)
        support, query = (
            {"x": x[:, part].flatten(0, 1), "y": y[:, part].flatten()} for part in (slice(shots), slice(shots, None))
        )
        return support, query

    return draw


@dataclass(frozen=True)
class Problem:
    """A distribution of tasks, and another of new ones; the size of a sample and of what the model says; the loss."""

    known: Draw
    new: Draw
    inputs: int
    outputs: int
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    inner_lr: float


def problem_of(tasks: str) -> Problem:
    if tasks == "waves":
        return Problem(wave, wave, 1, 1, mse_loss, 0.01)
    return Problem(draw_of_digits(range(7)), draw_of_digits(range(7, 10)), 64, 3, cross_entropy, 0.2)


def make_steps(
    problem: Problem, settings: Settings, outer: ps.optim.GradientTransformation
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the outer step, and the evaluation on new tasks."""

    def loss_fn(net: nn.Module, batch: Samples) -> torch.Tensor:
        return problem.loss(net(batch["x"]), batch["y"])

    tx = ps.optim.sgd(settings.inner_lr or problem.inner_lr)
    step, judge = ps.make_step(loss_fn, tx), ps.make_eval(loss_fn)

    def adapted(state: ps.TrainState, support: Samples) -> ps.TrainState:
        """Return a state after the gradient steps on a support: an ordinary training."""
        inner = state.replace(opt_state=tx.init(state.params))
        for _ in range(settings.inner_steps):
            inner, _ = step(inner, support)
        if not settings.first_order:
            return inner
        # The way that the params went becomes a constant, so they are differentiated as if they had not moved.
        return inner.replace(params={n: p + (inner.params[n] - p).detach() for n, p in state.params.items()})

    def meta_step(state: ps.TrainState, batch: Samples) -> tuple[ps.TrainState, dict[str, torch.Tensor]]:
        tasks = torch.vmap(problem.known)(batch["key"])

        def mean_loss(params: Samples) -> torch.Tensor:
            def loss_of(support: Samples, query: Samples) -> torch.Tensor:
                return judge(adapted(state.replace(params=params), support), query)["loss"].compute()

            return torch.vmap(loss_of)(*tasks).mean()

        grads, loss = ps.grad_and_value(mean_loss, engine="func")(state.params)
        return state.apply_gradients(outer, grads), {"loss": loss}

    def on_new_tasks(judge: Callable[..., Any], state: ps.TrainState, batch: Samples) -> dict[str, Any]:
        """Return the mean loss on the queries of new tasks, before and after adapting to their supports."""
        tasks = torch.vmap(problem.new)(batch["key"])
        before = torch.vmap(lambda support, query: judge(state, query)["loss"].compute())(*tasks)
        after = torch.vmap(lambda support, query: judge(adapted(state, support), query)["loss"].compute())(*tasks)
        found = {"before": before, "after": after, "ratio": after.mean() / before.mean()}
        return {name: ps.metrics.mean(values) for name, values in found.items()}

    return meta_step, ps.wrap_step(judge, on_new_tasks)


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    problem, width, seed = problem_of(settings.tasks), settings.width, settings.seed

    def make_model() -> nn.Module:
        hidden = [nn.Linear(problem.inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, problem.outputs))

    outer = ps.optim.adam(ps.optim.cosine_decay_schedule(settings.lr, settings.batches))
    step, evaluation = make_steps(problem, settings, outer)
    keys = ps.random.split(ps.random.key(seed), settings.batches * settings.batch)
    new_keys = ps.random.split(ps.random.fold_in(ps.random.key(seed), "new"), 200)
    return ps.Experiment(
        step,
        ps.init(make_model, outer, seed=seed),
        ps.data.batches({"key": keys}, settings.batch, seed=seed),
        until=ps.epochs(1),
        callbacks=[
            ps.callbacks.evaluate(evaluation, ps.data.batches({"key": new_keys}, 200), every=ps.every.epoch()),
            ps.callbacks.snapshots(every=ps.every.epoch()),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main(["run", __file__, *sys.argv[1:]]))
