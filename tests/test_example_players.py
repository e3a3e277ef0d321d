"""The data source of the examples that learn from rewards: a rollout follows from policy, seed and position."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import purestep as ps
from examples.cartpole import Player, returns


def lean(state, observation, key):
    """Push the cart to the side to which the pole leans, and now and then to a random one."""
    random = ps.random.randint(key, observation.shape[:1], 0, 5)
    return torch.where(random == 0, ps.random.bits(key, observation.shape[:1]) % 2, (observation[:, 2] > 0).long())


def player():
    return Player(lean, envs=3, steps=70, rollouts=3, seed=5)


def test_a_player_that_is_opened_in_the_middle_plays_on_as_if_it_never_stopped():
    straight, straight_states = player(), []
    batches = []
    for batch in straight.open(2, 0, None):
        batches.append(batch)
        straight_states.append(straight.state())
    for position, state in enumerate(straight_states[:-1], start=1):
        resumed = player()
        rest = list(resumed.open(2, position, state))
        assert ps.digest(rest) == ps.digest(batches[position:])
        assert resumed.state() == straight_states[-1]
    assert ps.digest(list(player().open(3, 0, None))) != ps.digest(batches)


def test_what_a_rollout_says_is_what_the_environments_did():
    (rollout,) = list(player().open(0, 2, None))
    assert rollout["observation"].shape == (70, 3, 4)
    assert torch.equal(rollout["observation"][1:], rollout["next"][:-1])
    assert torch.equal(rollout["valid"][1:], ~rollout["ended"][:-1])
    assert rollout["ended"].sum() > 2
    lengths = []  # of the episodes, counted by hand: each reward is 1
    for env in range(3):
        ends = np.flatnonzero(rollout["ended"][:, env].numpy())
        # The first step after an end only resets an environment.
        lengths += [end - begin for begin, end in zip([-1, *(ends[:-1] + 1)], ends, strict=True)]
    assert float(returns(rollout)) == pytest.approx(np.mean(lengths))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("ppo", {"passes": 1}), ("dqn", {"updates": 2, "memory": 300})])
def test_a_run_that_is_stopped_between_rollouts_ends_with_the_bits_of_a_straight_one(
    name, settings, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    example = importlib.import_module(name)

    def fit(until, run_dir):
        experiment = example.experiment(example.Settings(steps=12, **settings))
        return ps.digest(experiment.fit(until=ps.steps(until), run_dir=tmp_path / run_dir).state)

    assert fit(4, "stopped") != fit(7, "straight") == fit(7, "stopped")
