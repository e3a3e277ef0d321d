"""Steps of every plan on fake CUDA tensors, as rank 0 of 4 and of 1,024 processes that are only pretended.

A fake process group sends nothing, so values are wrong and only shapes, devices and launches are looked at. What ranks
agree on before their first step is taken as agreed.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from shared_fake_cuda import Counts, counting, elsewhere, fake_cuda, needs_cuda_build, on_cuda
from shared_gpt import TOKENS, TinyGPT

import purestep as ps
from purestep.distributed import collectives, control, mesh
from purestep.errors import ConfigError
from purestep.parallel import absent, same_inputs
from purestep.sharding import placement
from tests.device import budgets
from tests.device.test_steps import IMAGES, adamw, cnn, loss_fn, of_images, opt

pytestmark = [needs_cuda_build, pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")]


def start(world: int) -> None:
    """Join a job of some processes that are not there, as rank 0."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    mesh._cache.clear()


def pretend(patch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no subclass, and no number: all ranks need what this one needs."""

    def stand_in(name, shape, like, plan):
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    patch.setattr(absent.Absent, "of", stand_in)
    patch.setattr(control, "gather", lambda value, **_: [value] * control.size())
    patch.setattr(collectives, "numbers", lambda number, group, device: [number] * collectives.size_of(group))


@pytest.fixture
def job(monkeypatch):
    pretend(monkeypatch)
    yield start
    end()


PLANS = {
    "ddp": ps.sharding.ddp(),
    "ddp fast": ps.sharding.ddp(reduction="fast"),
    "zero1": ps.sharding.zero1(),
    "zero2": ps.sharding.zero2(),
    "fsdp": ps.sharding.fsdp(),
    "fsdp fast": ps.sharding.fsdp(reduction="fast"),
    "fsdp pad": ps.sharding.fsdp(fallback="pad"),
    "hsdp": ps.sharding.hsdp(fsdp=2),
}


def with_number(net, batch):
    return loss_fn(net, batch), {"lr": 0.5, "tokens": ps.metrics.Sum(3)}


def with_weight(net, batch):
    return ps.weighted(loss_fn(net, batch), 64.0)


WORK = {
    "plain": {},
    "number": {"loss": with_number},
    "weight": {"loss": with_weight},
    "bf16-mixed": {"policy": "bf16-mixed"},
    "16-mixed": {"policy": "16-mixed"},
    "batch norm": {"loss": of_images, "make": cnn, "batch": IMAGES},
    "muon": {"tx": lambda: opt.muon(0.02, adam_learning_rate=3e-3)},
    "adafactor": {"tx": lambda: opt.adafactor(1e-2)},
    "lamb": {"tx": lambda: opt.lamb(1e-2)},
    "apply_if_finite": {"tx": lambda: opt.apply_if_finite(adamw())},
    "skip_large_updates": {"tx": lambda: opt.skip_large_updates(adamw(), max_norm=1.0)},
}


def counted(plan, count, loss=loss_fn, make=TinyGPT, batch=TOKENS, policy=None, tx=adamw) -> tuple[Counts, object]:
    """Count the second step of a plan; the first one agrees on an order, and puts constants on the card."""
    step = ps.make_step(loss, tx(), policy=policy, plan=plan, microbatches=count)
    state = ps.init(make, tx(), seed=0)
    state = state if policy is None else ps.precision.policy(policy).apply(state)
    state = plan.place(state)
    same_inputs._once(dist.group.WORLD, plan, count).done = True
    with fake_cuda():
        state = placement.rewrap(on_cuda(placement.local(state)), state)
        batch = on_cuda(batch)
        step(state, batch)
        with counting() as counts:
            out = step(state, batch)
        return counts, placement.local(out)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_of_a_plan(job, plan, work):
    job(4)
    counts, out = counted(PLANS[plan], 4, **WORK[work])
    assert counts.blocking == {}
    assert elsewhere(out) == {}
    assert counts.total <= budgets.PLANS[plan, work], counts.launches.most_common(8)


# Of 1,024 ranks: the plan, and ranks of a machine.
MANY = {"ddp": ("ddp", 1024), "fsdp fast": ("fsdp fast", 1024), "ddp, machines of 8": ("ddp", 8)}
MANY_TOKENS = {name: torch.zeros(1024, 8, dtype=torch.int64) for name in TOKENS}


def of_many(case, patch):
    """Count a step of 1,024 ranks."""
    plan, each = MANY[case]
    told = {"RANK": 0, "WORLD_SIZE": 1024, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": each}
    for name, value in {**told, "MASTER_ADDR": "none", "MASTER_PORT": 1}.items():
        patch.setenv(name, str(value))
    start(1024)
    return counted(PLANS[plan], 1024, batch=MANY_TOKENS)


@pytest.mark.parametrize("case", MANY)
def test_a_thousand_ranks(job, case, monkeypatch):
    counts, out = of_many(case, monkeypatch)
    assert counts.blocking == {}
    assert elsewhere(out) == {}
    assert counts.total <= budgets.MANY[case], counts.launches.most_common(8)


OFFLOADED = {
    "single": ps.sharding.single(),
    "ddp": ps.sharding.ddp(),
    "zero1": ps.sharding.zero1(),
    "zero2": ps.sharding.zero2(),
    "fsdp": ps.sharding.fsdp(),
    "hsdp": ps.sharding.hsdp(fsdp=2),
}


@pytest.mark.parametrize("policy", [None, "16-mixed", "bf16-master"])
@pytest.mark.parametrize("kept", [None, "optimizer", "params"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_what_is_offloaded_is_on_the_cpu_and_computed_with_on_the_card(job, name, kept, policy):
    plan = dataclasses.replace(OFFLOADED[name], offload=kept)
    if name != "single":
        job(4)
    tx = opt.apply_if_finite(adamw())
    step = ps.make_step(loss_fn, tx, policy=policy, plan=plan, microbatches=4)
    state = ps.init(TinyGPT, tx, seed=0, frozen="*.norm1.*", device="cpu")
    state = state if policy is None else ps.precision.policy(policy).apply(state)
    if name != "single":
        state = plan.place(state)
        same_inputs._once(dist.group.WORLD, plan, 4).done = True
    with fake_cuda():
        state = placement.rewrap(on_cuda(placement.local(state)), state)
        state = plan.place(state)
        batch = on_cuda(TOKENS)
        after = step(step(state, batch)[0], batch)[0]
        ps.make_eval(loss_fn, policy=policy, plan=plan)(after, batch)
        for found in (state, after):
            away = {path.split("[")[0].split(".")[1] for path in elsewhere(placement.local(found))}
            assert away == {None: set(), "optimizer": {"opt_state"}, "params": {"opt_state", "params", "buffers"}}[kept]
            assert not any(path.startswith((".step", ".rng", ".loss")) for path in elsewhere(placement.local(found)))


def test_a_state_that_is_not_placed_by_an_offloading_plan_is_refused():
    plan = ps.sharding.single(offload="optimizer")
    step = ps.make_step(loss_fn, adamw(), plan=plan)
    state = ps.init(TinyGPT, adamw(), seed=0, device="cpu")
    with fake_cuda(), pytest.raises(ConfigError, match=r"says offload='optimizer'(.|\n)*plan.place"):
        step(on_cuda(state), on_cuda(TOKENS))


def test_activations_are_moved_to_the_cpu_and_parameters_are_not():
    rule = ps.Checkpoint("blocks.*", offload=True)
    state = ps.init(TinyGPT, adamw(), seed=0, device="cpu")
    with fake_cuda():
        for checkpoint, least in ((None, 0), (rule, 20)):
            with counting() as counts:
                ps.make_step(loss_fn, adamw(), checkpoint=checkpoint)(on_cuda(state), on_cuda(TOKENS))
            moved = sum(n for line, n in counts.blocking.items() if "activations.py" in line)
            assert moved >= least
            assert bool(moved) is (checkpoint is not None)
