"""CartPole as a data source of a run: each batch is a rollout, played by the policy that the steps before it learned.

`ppo.py` and `dqn.py` share it. The environments are outside of the step: they play between two calls of it. Where
they stand is part of each snapshot, and what is random in a rollout comes from a key, so a resumed run plays on as if
it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

import purestep as ps

OBSERVATION, ACTIONS = 4, 2


class Player:
    """Batches that a policy plays: a `ps.data.Source`.

    A batch is a dict of tensors [steps, envs, ...]: `observation` and `next` float32[..., 4], `action` int64, `reward`
    float32, and bools: `terminated` (the pole fell), `ended` (that, or 500 steps), and `valid`, which is False where an
    environment was only reset. `return` is the sum of rewards of an episode, where it ended.

    Args:
        policy: `policy(state, observation, key) -> action`, int64[envs]; `state` is the train state of the run.
        envs: environments that play at the same time.
        steps: of each environment in a batch.
        rollouts: batches of an epoch.
        seed: of the environments and of the keys.
    """

    def __init__(self, policy: Callable[..., Tensor], *, envs: int, steps: int, rollouts: int, seed: int) -> None:
        self.policy, self.envs, self.steps, self.rollouts, self.seed = policy, envs, steps, rollouts, seed
        self._game: Any = gymnasium.make_vec("CartPole-v1", envs, vectorization_mode="vector_entry_point").unwrapped
        self._total = np.zeros(envs, np.float32)
        self._state: Any = None

    def watch(self) -> ps.callbacks.Callback:
        """Return the callback that shows the policy of the run to this player after each step."""

        def see(event: object, loop: Any) -> None:
            self._state = loop.train

        return ps.callbacks.tap(see, every=ps.every.steps(1), name="player")

    def length(self) -> int:
        return self.rollouts

    def open(self, epoch: int, batch: int, state: Any) -> Iterator[dict[str, Tensor]]:
        self._game.reset(seed=self.seed)
        self._total[:] = 0
        if state is not None:
            self._game.state = np.array(state["state"])
            self._game.steps = np.array(state["steps"], np.int32)
            self._game.prev_done = np.array(state["done"], bool)
            self._total[:] = state["total"]
        for index in range(batch, self.rollouts):
            yield self._play(ps.random.fold_in(ps.random.key(self.seed), "rollout", epoch, index))

    def state(self) -> Any:
        arrays = {"state": self._game.state, "steps": self._game.steps, "done": self._game.prev_done}
        return {name: array.tolist() for name, array in (arrays | {"total": self._total}).items()}

    def _play(self, key: Tensor) -> dict[str, Tensor]:
        self._game.np_random = np.random.default_rng(int(ps.random.bits(key)))
        observation, rows = self._game.state.T.astype(np.float32), []
        for time in range(self.steps):
            action = self.policy(self._state, torch.from_numpy(observation), ps.random.fold_in(key, time)).numpy()
            valid = ~self._game.prev_done
            after, reward, terminated, truncated, _ = self._game.step(action)
            ended = terminated | truncated
            self._total += reward
            rows.append((observation, action, reward, after, terminated, ended, valid, self._total.copy()))
            self._total[ended] = 0
            observation = after
        names = ("observation", "action", "reward", "next", "terminated", "ended", "valid", "return")
        columns = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return dict(zip(names, columns, strict=True))


def returns(rollout: dict[str, Tensor]) -> ps.metrics.Mean:
    """Return the mean return of the episodes that ended in a rollout: a metric that merges over rollouts."""
    return ps.metrics.mean(rollout["return"], weight=rollout["ended"])


def report(result: ps.Result) -> None:
    """Print how a run ended."""
    rows = {
        "why it ended": result.reason,
        "rollouts": result.loop.cursor.batches,
        "mean return, last epoch": f"{result.metrics['train/return_epoch']:.1f} of 500",
        "digest of the last state": ps.digest(result.state),
        "time in training": f"{result.loop.elapsed:.1f} s",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
