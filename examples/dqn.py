"""Deep Q-learning on CartPole, with the replay memory as a part of the train state.

    python examples/dqn.py
    purestep run examples/dqn.py --double false

The state of the run is a dict: the network with its optimizer, the copy of it that values what comes next, and the
memory. The pure step stores a rollout in the memory, draws minibatches from it by a key, and updates the network; so a
snapshot has all of it, and a resumed run continues bit for bit. Playing is the data source (`cartpole.py`). DQN: Mnih
et al., Nature 518, 2015; the double estimate: van Hasselt et al., arXiv 1509.06461.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from cartpole import ACTIONS, OBSERVATION, Player, report, returns
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

import purestep as ps

STORED = ("observation", "action", "reward", "next", "terminated", "valid")


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        lr: learning rate of Adam.
        epochs: of 20 rollouts.
        envs: environments.
        steps: of each environment in a rollout.
        updates: of the network for each rollout.
        minibatch: transitions.
        memory: transitions that are remembered.
        width: of the hidden layers.
        gamma: discount of a reward one step later.
        explore: updates until the share of random actions has fallen from 1 to `random`.
        random: share of random actions after that.
        double: choose the next action by the network, and value it by the copy.
        seed: of all random numbers.
    """

    lr: float = 1e-3
    epochs: int = 8
    envs: int = 16
    steps: int = 16
    updates: int = 64
    minibatch: int = 128
    memory: int = 20_000
    width: int = 128
    gamma: float = 0.99
    explore: int = 2000
    random: float = 0.02
    double: bool = True
    seed: int = 0


def make_network(width: int) -> nn.Module:
    """Return the network from an observation to the value of each action."""
    hidden = nn.Sequential(nn.Linear(OBSERVATION, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(width, ACTIONS))


values = ps.make_predict(lambda net, observation: net(observation))


def loss_fn(net: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    value = net(batch["observation"]).gather(-1, batch["action"][:, None]).squeeze(-1)
    error = smooth_l1_loss(value, batch["goal"], reduction="none")
    valid = batch["valid"].float()
    return (error * valid).sum() / valid.sum().clamp(min=1), {"value": value.mean()}


def empty(size: int) -> dict[str, Tensor]:
    """Return a memory of `size` transitions, and the number of those that were ever stored."""
    kinds = {"action": torch.int64, "terminated": torch.bool, "valid": torch.bool}
    columns = {name: torch.zeros(size, dtype=kinds.get(name, torch.float32)) for name in STORED}
    columns |= {name: torch.zeros(size, OBSERVATION) for name in ("observation", "next")}
    return columns | {"count": torch.tensor(0)}


def stored(memory: dict[str, Tensor], rollout: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the memory with a rollout in the place of its oldest transitions."""
    number = rollout["action"].numel()
    place = (memory["count"] + torch.arange(number)) % len(memory["action"])
    columns = {name: memory[name].index_copy(0, place, rollout[name].flatten(0, 1)) for name in STORED}
    return columns | {"count": memory["count"] + number}


def drawn(memory: dict[str, Tensor], key: Tensor, number: int) -> dict[str, Tensor]:
    """Return transitions of the memory at random, with repetition."""
    filled = memory["count"].clamp(max=len(memory["action"]))
    place = (ps.random.uniform(key, (number,), dtype=torch.float64) * filled).long()
    return {name: memory[name][place] for name in STORED}


def make_step(settings: Settings, tx: ps.optim.GradientTransformation) -> Any:
    """Return the pure step that stores a rollout and learns from the memory."""
    learn = ps.make_step(loss_fn, tx)

    def step(state: dict[str, Any], rollout: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        network, memory = state["network"], stored(state["memory"], rollout)
        copy, total = network.replace(params=state["copy"]), None
        for _ in range(settings.updates):
            key = ps.random.fold_in(network.rng, "memory", network.step)
            batch = drawn(memory, key, settings.minibatch)
            later = values(copy, batch["next"])
            best = (values(network, batch["next"]) if settings.double else later).argmax(-1, keepdim=True)
            later = later.gather(-1, best).squeeze(-1) * ~batch["terminated"]
            batch = {**batch, "goal": batch["reward"] + settings.gamma * later}
            network, metrics = learn(network, batch)
            total = metrics if total is None else ps.metrics.merge(total, metrics)
        return {"network": network, "copy": network.params, "memory": memory}, {**total, "return": returns(rollout)}

    return step


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    s = settings
    share = ps.optim.linear_schedule(1.0, s.random, transition_steps=s.explore)

    def policy(state: dict[str, Any], observation: Tensor, key: Tensor) -> Tensor:
        first, second = ps.random.split(key)
        best = values(state["network"], observation).argmax(-1)
        chance = ps.random.uniform(first, best.shape) < share(state["network"].step)
        return torch.where(chance, ps.random.randint(second, best.shape, 0, ACTIONS), best)

    player = Player(policy, envs=s.envs, steps=s.steps, rollouts=20, seed=s.seed)
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(10.0), ps.optim.adam(s.lr))
    network = ps.init(lambda: make_network(s.width), tx, seed=s.seed)
    state = {"network": network, "copy": network.params, "memory": empty(s.memory)}
    callbacks = [player.watch(), ps.callbacks.snapshots(every=ps.every.epoch())]
    return ps.Experiment(make_step(s, tx), state, player, until=ps.epochs(s.epochs), callbacks=callbacks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/dqn"))
    for field in fields(Settings):
        action = {"action": argparse.BooleanOptionalAction} if field.type == "bool" else {"type": type(field.default)}
        parser.add_argument(f"--{field.name}", default=field.default, **action)
    args = vars(parser.parse_args())
    run_dir = args.pop("run_dir")
    result = experiment(Settings(**args)).fit(run_dir=run_dir)
    report(result)
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
