"""One of two processes that pass steps what they should not: each row is an error on both, and none is a hang.

Arguments: a file store, the file for the answers, this process's number.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import purestep as ps
from purestep.distributed import control
from purestep.parallel import same_inputs
from purestep.sharding import LocalBatch, ddp, fsdp, hsdp
from purestep.sharding.placement import is_split

RANK = int(sys.argv[3]) if __name__ == "__main__" else 0
TX = ps.optim.adamw(1e-2)


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


def model():
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))


def made(plan, seed=0):
    return ps.init(model, TX, seed=seed, plan=plan)


def batch(samples=8, width=1, value=1.0):
    return {"x": torch.full((samples, 6), value), "unused": torch.zeros(samples, width)}


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def trained(plan, batches, jit=False, state=None):
    """Train on these batches; the first one is compared anew in each call."""
    same_inputs._once.cache_clear()
    step = ps.make_step(loss_fn, TX, plan=plan)
    step = ps.jit(step, backend="eager") if jit else step
    state = made(plan) if state is None else state
    for each in batches:
        state, _ = step(state, each)


def first_calls():
    rows = {
        "size": [batch(8 + RANK)],
        "values": [batch(value=1.0 + RANK)],
        "dtype": [{"x": torch.ones(8, 6, dtype=torch.float64 if RANK else torch.float32)}],
        "same": [batch()],
    }
    for name, batches in rows.items():
        yield f"first|{name}", raised(lambda batches=batches: trained(ddp(), batches))
    local = LocalBatch(batch(4), samples=8 + RANK, microbatches=2)
    yield "first|local", raised(lambda: trained(hsdp(fsdp=1), [local]))
    yield "first|state", raised(lambda: trained(ddp(), [batch()], state=made(ddp(), seed=RANK)))


def later_calls():
    for name, plan, jit in (("ddp", ddp(), False), ("fsdp", fsdp(), False), ("jit", ddp(), True)):
        for kind, last in {
            "size": batch(8 + RANK),
            "shape": batch(width=1 + RANK),
            "values": batch(value=float(RANK)),
        }.items():
            yield f"later|{name}|{kind}", raised(lambda p=plan, j=jit, x=last: trained(p, [batch(), batch(16), x], j))


def placements():
    step = ps.make_step(loss_fn, TX, plan=fsdp())
    yield "unplaced", raised(lambda: step(made(None), batch()))
    yield "unplaced|jit", raised(lambda: ps.jit(step, backend="eager")(made(None), batch()))
    yield "other plan", raised(lambda: step(made(hsdp(fsdp=2, data=1)), batch()))
    yield "replicated", raised(lambda: ps.make_step(loss_fn, TX, plan=ddp())(made(None), batch()))
    plain = ps.make_step(loss_fn, TX)
    yield "no plan", raised(lambda: plain(made(fsdp()), batch()))
    yield "no plan|microbatches", raised(lambda: ps.make_step(loss_fn, TX, microbatches=2)(made(fsdp()), batch()))
    yield "no plan|eval", raised(lambda: ps.make_eval(loss_fn)(made(fsdp()), batch()))
    compiled = ps.jit(plain, backend="eager")
    yield "no plan|jit", raised(lambda: compiled(made(fsdp()), batch()))
    compiled(made(None), batch())  # of the same shapes: a DTensor must not find this entry
    yield "no plan|jit again", raised(lambda: compiled(made(fsdp()), batch()))
    twice = ps.jit(ps.make_step(loss_fn, TX, microbatches=2), backend="eager")
    yield "no plan|jit microbatches", raised(lambda: twice(made(fsdp()), batch()))


def runs():
    data = [{"x": torch.full((6,), float(i)), "unused": torch.zeros(1)} for i in range(16)]

    def run(train=None, plan=None, state=None, **options):
        plan = plan or ddp()
        state = made(plan) if state is None else state
        train = [batch()] * 4 if train is None else train
        return ps.fit(ps.make_step(loss_fn, TX, plan=plan), state, train, until=ps.steps(4), **options)

    results = [run(plan=fsdp(), state=state) for state in (made(fsdp()), made(None))]
    yield "fit|placed", sorted({is_split(x) for r in results for x in r.state.params.values()})
    yield "fit|digests", len({ps.digest(r.state) for r in results})
    yield "fit|seeds", raised(lambda: run(plan=fsdp(), state=made(None, seed=RANK)))
    yield "fit|half placed", raised(lambda: run(plan=fsdp(), state=made(fsdp() if RANK else None)))
    cut = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, RANK, shuffle=False))
    yield "fit|shares", raised(lambda: run(cut))
    same = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, 0, shuffle=False))
    yield "fit|sampler", raised(lambda: run(same))
    evaluate = ps.callbacks.evaluate(loss_fn, cut)
    yield "fit|evaluation", raised(lambda: run(callbacks=[evaluate]))
    yield "fit|first", raised(lambda: run(lambda: iter([batch(value=RANK + 1.0)] * 4)))
    yield "fit|later", raised(lambda: run([batch(), batch(), batch(), batch(value=RANK + 1.0)]))


def main(store, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=RANK, world_size=2)
    control.initialize(timeout=30)
    found = {}
    for rows in (first_calls, later_calls, placements, runs):
        found.update(rows())
    Path(answers).write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
