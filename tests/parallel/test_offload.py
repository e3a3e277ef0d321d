"""Updates on the CPU of a state on a card: the copies give the same bits; what a plan counts, places and refuses."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from shared_marks import slow_but
from torch import nn

import purestep as ps
from purestep import optim, tree
from purestep.donation import donating, memory_of
from purestep.errors import ConfigError
from purestep.optim.kernels import sliced
from purestep.parallel import offload
from purestep.sharding import ddp, fsdp, hsdp, single

ROWS = {r.name: r for r in importlib.import_module("tests.optim.test_conformance").ROWS if not r.value_fn}
TX = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2, weight_decay=0.1))


class Copied(offload.Lane):
    """A card without one: every copy is a tensor of its own, as between two devices, filled when needed."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.late, self.asked = {}, []

    def _down(self, name, x):
        here = torch.full_like(x, torch.nan)
        self.late.setdefault(name, []).append((here, x))
        return here

    def need(self, names):
        for name in names:
            for here, x in self.late.pop(name, ()):
                here.copy_(x)
                self.asked.append(name)

    def _copied(self, new, old):
        return super()._copied(new.clone(), old).clone()


def wide():
    return nn.Sequential(nn.Linear(9, 70), nn.GELU(), nn.Linear(70, 33, bias=False), nn.GELU(), nn.Linear(33, 5))


def gradients(state, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g) for n, p in state.params.items()}


def advanced(state, tx, grads, plan=None, accept=None, donate=False):
    """Return the state after an update that is accepted or not, and the lane: of the plan, or without one."""
    lane = Copied()
    memory = memory_of(tree.leaves((state.params, state.opt_state))) if donate else frozenset()
    value = torch.tensor(0.5)
    with donating([state] if donate else [], memory):
        if plan is None:
            new = state.apply_gradients(tx, grads, accept=accept, last_use=True, value=value)
        else:
            new = offload.apply_gradients(plan, state, tx, grads, buffers=None, accept=accept, lane=lane, value=value)
    return new, lane


@pytest.mark.parametrize("name", slow_but(ROWS, "adam", "muon", "adam fused"))
@pytest.mark.parametrize("kept", ["optimizer", "params"])
def test_an_update_on_the_cpu_has_the_bits_of_one_where_the_state_is(name, kept, monkeypatch):
    monkeypatch.setattr(sliced, "LONG_ON_CPU", 300)  # some parameters are long, some short
    tx, plan = ROWS[name].make(), single(offload=kept)
    here = there = ps.init(wide, tx, seed=1)
    for seed in range(3):
        accept = [None, torch.tensor(True), torch.tensor(False)][seed]
        here, _ = advanced(here, tx, gradients(here, seed), accept=accept)
        # What the plan leaves on the CPU is not copied; what it does not is.
        there, lane = advanced(there, tx, gradients(there, seed), plan, accept)
        assert ps.digest(there) == ps.digest(here), seed
        assert set(lane.asked) == set(here.params)


def test_an_update_begins_before_the_last_gradient_is_here(monkeypatch):
    monkeypatch.setattr(sliced, "LONG_ON_CPU", 300)
    state, order = ps.init(wide, optim.adamw(1e-2), seed=1), []

    class Noted(Copied):
        def need(self, names):
            order.extend(("need", n) for n in names)
            super().need(names)

        def done(self, name, param):
            order.append(("done", name))
            super().done(name, param)

    offload.apply_gradients(
        single(offload="optimizer"),
        state,
        optim.adamw(1e-2),
        gradients(state, 0),
        buffers=None,
        accept=None,
        lane=Noted(),
    )
    assert order.index(("done", "0.weight")) < order.index(("need", "4.weight"))
    assert {n for kind, n in order if kind == "done"} == set(state.params)


def test_donated_parameters_are_written_over_where_they_are():
    state = ps.init(lambda: nn.Linear(200, 200), TX, seed=1)
    copy = tree.map(lambda x: x.clone(), state)
    plain, _ = advanced(copy, TX, gradients(copy, 3))
    new, _ = advanced(state, TX, gradients(copy, 3), single(offload="params"), donate=True)
    assert ps.digest(new) == ps.digest(plain)
    (moments,) = [x for x in tree.leaves(new.opt_state) if x.shape == (200, 200)][:1]
    assert any(moments is x for x in tree.leaves(state.opt_state))


@pytest.mark.parametrize("plan", [ddp, fsdp, single])
def test_a_cpu_has_the_same_bits_with_offload_and_without(plan):
    found = set()
    for kept in (None, "optimizer", "params"):
        state = ps.init(wide, TX, seed=2, plan=plan(offload=kept), frozen="2.*")
        step = ps.make_step(lambda net, x: net(x).square().mean(), TX, microbatches=2, plan=plan(offload=kept))
        state, _ = step(state, torch.arange(36.0).view(4, 9) / 36)
        found.add(ps.digest(state))
    assert len(found) == 1


@pytest.mark.slow
def test_a_run_goes_on_with_offload_and_without(tmp_path):
    def run(directory, offload, steps):
        plan = single(offload=offload)
        step = ps.make_step(lambda net, x: net(x).square().mean(), TX, plan=plan)
        data = ps.data.batches(torch.arange(90.0).view(10, 9) / 90, 5, seed=3)
        state = ps.init(wide, TX, seed=2, plan=plan)
        return ps.fit(step, state, data, until=ps.steps(steps), run_dir=directory).state

    whole = run(tmp_path / "whole", None, 6)
    for number, kept in enumerate(["optimizer", None, "params"]):
        parts = run(tmp_path / "parts", kept, 2 * number + 2)
    assert ps.digest(parts) == ps.digest(whole)


def test_a_dry_run_counts_the_device_and_the_host_apart():
    with torch.device("meta"):
        state = ps.init(nn.Linear(64, 64, bias=False), optim.adam(1e-3))
    size = 64 * 64 * 4
    plain = ddp(4).dry_run(state)
    moments = ddp(4, offload="optimizer").dry_run(state)
    everything = ddp(4, offload="params").dry_run(state, compute_dtype=torch.bfloat16)
    assert plain.host == {}
    assert (plain.memory["optimizer"], moments.host["optimizer"]) == (2 * size + 8, 2 * size + 8)  # and a count
    assert "optimizer" not in moments.memory
    assert (moments.host["grads"], moments.host["params"], moments.memory["params"]) == (size, size, size)
    assert (everything.memory["gathered"], everything.host["params"]) == (size // 2, size)
    assert "params" not in everything.memory
    assert plain.nbytes - moments.nbytes >= 2 * size + 8
    split = hsdp(fsdp=4, data=2, offload="optimizer").dry_run(state)
    assert (split.host["optimizer"], split.host["grads"]) == (2 * size // 4 + 8, size // 4)
    assert "memory of the host" in str(split)


def test_a_word_that_offloads_nothing_is_refused():
    with pytest.raises(ConfigError, match="offload is one of None, 'optimizer', 'params'"):
        dataclasses.replace(ddp(), offload="everything")
