"""Optimizer state lives where its parameter lives, however deep it is wrapped; the rest stays whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim, tree
from purestep.precision.master_params import master_weights
from purestep.sharding import Spec, fsdp
from purestep.sharding.leaf_roles import follow


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


# transformation, how many copies of the parameters its state holds
TABLE = {
    "sgd": (optim.sgd(0.1), 0),
    "momentum": (optim.sgd(0.1, momentum=0.9), 1),
    "adamw": (optim.adamw(1e-3), 2),
    "chain": (optim.chain(optim.clip_by_global_norm(1.0), optim.trace(0.9), optim.adamw(1e-3)), 3),
    "partition": (optim.partition({"a": optim.adamw(1e-3), "b": optim.adamw(1e-2)}, {"a": "0.*", "b": "*"}), 2),
    "masked": (optim.masked(optim.trace(0.9), lambda n: True), 1),
    "lookahead": (optim.lookahead(optim.adamw(1e-3), sync_period=2), 3),
    "master": (master_weights(optim.adamw(1e-3)), 3),
    "accumulate": (optim.accumulate(optim.adamw(1e-3), every=2), 3),
    "ema": (optim.chain(optim.ema(0.9), optim.sgd(0.1)), 1),
    "lift": (optim.lift(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
    "inject": (optim.inject_hyperparams(optim.adamw)(learning_rate=1e-3), 2),
    "average": (optim.average_params(optim.adamw(1e-3), decay=0.9), 3),
    "schedule_free": (optim.schedule_free_adamw(1e-3), 3),
}


@pytest.mark.parametrize(("tx", "copies"), TABLE.values(), ids=TABLE)
def test_optimizer_state_follows_its_parameter(tx, copies):
    state = ps.init(net, tx, seed=0)
    followed = [f for f in follow(state) if f.kind == "optimizer"]
    by_name = {name: [f for f in followed if f.name == name] for name in state.params}
    assert {len(found) for found in by_name.values()} == {copies}
    assert all(f.shape == tuple(state.params[f.name].shape) for f in followed if f.name)
    # What follows nothing is small.
    assert all(len(f.shape) == 0 for f in followed if f.name is None)
    specs = fsdp(2).specs(state)
    assert {s for f, s in zip(follow(state), tree.leaves(specs), strict=True) if f.name == "0.weight"} == {Spec("fsdp")}


def test_statistics_of_other_shapes_stay_whole():
    state = ps.init(net, optim.adafactor(1e-3), seed=0)
    names = {f.name for f in follow(state) if f.kind == "optimizer" and f.shape in [(8, 1), (1, 6), (0,)]}
    assert names == {None}


def test_steps_keys_and_batch_norm_stay_whole():
    state = ps.init(net, optim.adamw(1e-3), seed=0)
    kinds = {f.path[-1]: (f.kind, f.name) for f in follow(state) if f.kind in ("buffers", "other")}
    assert kinds == {
        "step": ("other", None),
        "rng": ("other", None),
        "1.running_mean": ("buffers", None),
        "1.running_var": ("buffers", None),
        "1.num_batches_tracked": ("buffers", None),
    }


def test_frozen_parameters_are_split_like_others():
    state = ps.init(net, optim.adamw(1e-3), seed=0, frozen="0.*")
    assert {f.path[-1] for f in follow(state) if f.kind == "frozen"} == {"0.weight", "0.bias"}
    specs = fsdp(2).specs(state)
    assert specs.buffers["0.weight"] == Spec("fsdp")
    assert specs.buffers["1.running_mean"] == Spec()


def test_several_states_and_averages_around_them():
    gen, disc = ps.init(net, optim.adamw(1e-3)), ps.init(lambda: nn.Linear(6, 2), optim.sgd(0.1, momentum=0.9))
    both = {"gen": gen, "disc": disc, "callbacks": {"ema": {"average": gen.params, "loss": torch.zeros(())}}}
    found = {".".join(map(str, f.path)): f for f in follow(both)}
    assert found["disc.params.weight"].name == "weight"
    assert found["gen.params.0.weight"].name == "0.weight"
    assert found["callbacks.ema.average.2.weight"].name == "2.weight"
    assert found["callbacks.ema.average.2.weight"].kind == "other"
    assert found["callbacks.ema.loss"].name is None


def test_a_parameter_of_one_state_does_not_lead_another_state():
    """Two states have a `w` each, of one shape; what is split in one is whole in the other."""
    one, two = {"w": torch.zeros(4)}, {"v": torch.zeros(4)}
    value = {"a": {"params": one, "opt_state": {"mu": one}}, "b": {"params": two, "opt_state": {"mu": one}}}
    assert [(f.path[0], f.path[1], f.name) for f in follow(value)] == [
        ("a", "opt_state", "w"),
        ("a", "params", "w"),
        ("b", "opt_state", None),
        ("b", "params", "v"),
    ]


def test_nested_parameters_and_an_optimizer_with_a_field_called_params():
    params = {"layers": [{"w": torch.zeros(4, 4)}, {"w": torch.zeros(4, 4)}]}
    value = {"params": params, "opt_state": {"params": params, "flat": {"layers.1.w": torch.zeros(4, 4)}}}
    assert [f.name for f in follow(value)] == ["layers.1.w", "layers.0.w", "layers.1.w", "layers.0.w", "layers.1.w"]


def test_a_tree_without_params_is_a_tree_of_parameters():
    assert [(f.kind, f.name) for f in follow({"w": torch.zeros(2), "b": [torch.zeros(3)]})] == [
        ("params", "b.0"),
        ("params", "w"),
    ]
