"""Proximal policy optimization on CartPole: a policy and a value are learned from rollouts of 8 environments.

    python examples/ppo.py
    purestep run examples/ppo.py --lr 1e-3 --until 5epochs

The step is pure. It takes a rollout, estimates advantages, and updates the networks on minibatches of it, in an order
drawn from the key of the state. Playing is the data source (`cartpole.py`). PPO: Schulman et al., arXiv 1707.06347;
generalized advantage estimation: Schulman et al., arXiv 1506.02438.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from cartpole import ACTIONS, OBSERVATION, Player, report, returns
from torch import Tensor, nn

import purestep as ps


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        lr: learning rate of Adam at first; it falls linearly to 0.
        epochs: of 10 rollouts.
        envs: environments.
        steps: of each environment in a rollout.
        passes: over a rollout.
        minibatch: transitions.
        width: of the hidden layers.
        gamma: discount of a reward one step later.
        smoothing: lambda of the advantages.
        clip: how far the probability of an action may move, as a ratio, in one rollout.
        entropy: weight of the policy's entropy.
        seed: of all random numbers.
    """

    lr: float = 2e-3
    epochs: int = 5
    envs: int = 8
    steps: int = 128
    passes: int = 10
    minibatch: int = 256
    width: int = 64
    gamma: float = 0.99
    smoothing: float = 0.9
    clip: float = 0.2
    entropy: float = 0.0
    seed: int = 0


class ActorCritic(nn.Module):
    """Logits of the actions, and the value of an observation."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def tower(outputs: int, gain: float) -> nn.Sequential:
            layers = nn.Linear(OBSERVATION, width), nn.Linear(width, width), nn.Linear(width, outputs)
            for layer, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
                nn.init.orthogonal_(layer.weight, scale)
                nn.init.zeros_(layer.bias)
            return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

        self.actor, self.critic = tower(ACTIONS, 0.01), tower(1, 1.0)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(observation).log_softmax(-1), self.critic(observation).squeeze(-1)


look = ps.make_predict(lambda net, observation: net(observation))


def policy(state: ps.TrainState, observation: Tensor, key: Tensor) -> Tensor:
    return ps.random.categorical(key, look(state, observation)[0])


def advantages(rollout: dict[str, Tensor], values: Tensor, after: Tensor, gamma: float, smoothing: float) -> Tensor:
    """Return how much better each action was than expected: float32[steps, envs].

    Args:
        rollout: of a `Player`.
        values: of `observation`.
        after: of `next`.
        gamma: discount.
        smoothing: 0 for one step of reward and the value after it, 1 for the whole rest of the episode.
    """
    errors = rollout["reward"] + gamma * after * ~rollout["terminated"] - values
    found, later = [], torch.zeros_like(values[0])
    for error, ended in zip(reversed(errors), reversed(rollout["ended"]), strict=True):
        later = error + gamma * smoothing * ~ended * later
        found.append(later)
    return torch.stack(found[::-1])


def make_step(settings: Settings, tx: ps.optim.GradientTransformation) -> Any:
    """Return the pure step that learns from one rollout."""

    def loss_fn(net: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        logs, value = net(batch["observation"])
        ratio = (logs.gather(-1, batch["action"][:, None]).squeeze(-1) - batch["log"]).exp()
        gain, valid = batch["gain"], batch["valid"].float()
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        surrogate = torch.minimum(ratio * gain, clipped * gain)
        entropy = -(logs.exp() * logs).sum(-1)
        error = (value - batch["goal"]).square()
        loss = ((0.5 * error - surrogate - settings.entropy * entropy) * valid).sum() / valid.sum()
        return loss, {"entropy": entropy.mean(), "value_error": error.mean()}

    learn = ps.make_step(loss_fn, tx)

    def step(state: ps.TrainState, rollout: dict[str, Tensor]) -> tuple[ps.TrainState, dict[str, Any]]:
        logs, values = look(state, rollout["observation"])
        gain = advantages(rollout, values, look(state, rollout["next"])[1], settings.gamma, settings.smoothing)
        log = logs.gather(-1, rollout["action"][..., None]).squeeze(-1)
        samples = {name: rollout[name] for name in ("observation", "action", "valid")}
        samples |= {"log": log, "goal": gain + values, "gain": (gain - gain.mean()) / (gain.std() + 1e-8)}
        samples = {name: column.flatten(0, 1) for name, column in samples.items()}
        total: Any = None
        for number in range(settings.passes):
            order = ps.random.permutation(ps.random.fold_in(state.rng, state.step, number), len(samples["log"]))
            for part in order.split(settings.minibatch):
                state, metrics = learn(state, {name: column[part] for name, column in samples.items()})
                total = metrics if total is None else ps.metrics.merge(total, metrics)
        return state, {**total, "return": returns(rollout)}

    return step


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    s = settings
    player = Player(policy, envs=s.envs, steps=s.steps, rollouts=10, seed=s.seed)
    updates = s.epochs * 10 * s.passes * -(-s.envs * s.steps // s.minibatch)
    schedule = ps.optim.linear_schedule(s.lr, 0.0, transition_steps=updates)
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adam(schedule))
    state = ps.init(lambda: ActorCritic(s.width), tx, seed=s.seed)
    callbacks = [player.watch(), ps.callbacks.snapshots(every=ps.every.epoch())]
    return ps.Experiment(make_step(s, tx), state, player, until=ps.epochs(s.epochs), callbacks=callbacks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/ppo"))
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    run_dir = args.pop("run_dir")
    result = experiment(Settings(**args)).fit(run_dir=run_dir)
    report(result)
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
