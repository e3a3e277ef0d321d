"""One process of several: train transformers under context parallelism, and write the digests down as JSON.

Arguments: a directory, the sizes of the jobs to be part of one after the other, this process's number, and the rows to
compute, separated by semicolons.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.parallel.tensor_parallel import Team, split
from purestep.sharding import context_parallel, ddp, fsdp, zero1, zero2
from purestep.testing.storages import Storages

sys.path.append(str(Path(__file__).parents[1] / "shared"))
import tensor_job
from shared_ranks import answer

PARTS = 4


class TokenLoss(nn.Module):
    """A model whose loss counts tokens, with a padding mask, attention that is not causal, and attention by formula."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(tensor_job.WORDS, 16), nn.Embedding(8, 16)
        self.first, self.second = nn.Linear(16, 48), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, tensor_job.WORDS)

    def forward(self, ids, keep):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        q, k, v = self.first(x).view(*ids.shape, 3, 4, 4).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, keep[:, None, None]).transpose(1, 2).flatten(2)
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.second(self.norm(x)).chunk(3, -1))
        weight = (q @ k.mT / 2).masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
        return self.head(x + (F.dropout(weight, 0.2, self.training) @ v).transpose(1, 2).flatten(2))


def token_loss(net, batch):
    keep = batch["positions"] < 9  # of later positions the loss and the attention know nothing
    losses = F.cross_entropy(net(batch["x"], keep).transpose(1, 2), batch["y"], reduction="none")
    return ps.weighted((losses * keep).sum() / keep.sum(), keep.sum()), {"most": losses.max()}


tensor_job.MODELS["tokens"] = (TokenLoss, token_loss, None)


def plans(size):
    found = {"context": context_parallel(size, parts=PARTS)}
    found["ring"] = context_parallel(size, parts=PARTS, attention="ring")
    if size == 1:
        found["none"] = None
    if size == 4:
        by = {"ddp": ddp, "zero1": zero1, "zero2": zero2, "fsdp": fsdp}
        found |= {f"{name} x context": plan(2) * context_parallel(2, parts=PARTS) for name, plan in by.items()}
        found["fsdp x ring"] = fsdp(2) * context_parallel(2, parts=PARTS, attention="ring")
    return found


def kept(size):
    """Return what layers of attention keep for the backward pass, and hold at most, by how they meet other keys."""
    group = dist.group.WORLD if size > 1 else None
    layers = torch.randn(3, 3, 2, 2, 256 // size, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = {}
    for ring in (False, True):
        team = Team(group, size, context=True, ring=ring)
        with Storages(layers) as storages:
            start, total = storages.now, 0
            for layer in layers.unbind():
                cut = [split([x], 2, (256,), team) for x in layer.unbind()]
                total = total + F.scaled_dot_product_attention(*cut, is_causal=True).parts[0].sum()
            held = storages.now - start
            total.backward()
        layers.grad = None
        found["ring" if ring else "gather"] = [held, storages.most - start]
    return found


def resumed(directory, size, label):
    """Continue a run that another number of processes began."""
    state, step, _ = tensor_job.made("tokens", plans(size)[label])
    until = {4: 2, 2: 4, 1: 6}[size]
    callbacks = [ps.callbacks.snapshots(every=ps.every.steps(2))]
    data = list(tensor_job.data(6))
    result = ps.fit(step, state, data, until=ps.steps(until), run_dir=directory / label, callbacks=callbacks)
    alone = ps.fit(step, state, data, until=ps.steps(until)) if size == 1 else result
    return {"digest": ps.digest(result.state), "alone": ps.digest(alone.state)}


def checks(directory, size):
    for model in tensor_job.MODELS:
        for label, plan in plans(size).items():
            yield f"{model}|{label}", lambda model=model, plan=plan: tensor_job.train(model, plan)
        if size == 2:
            for label, jitted in (("context", "jit"), ("ring", "jit ring")):
                plan = plans(size)[label]
                yield f"{model}|{jitted}", lambda model=model, plan=plan: tensor_job.train(model, plan, "eager")
    yield "kept", lambda: kept(size)
    yield "resumed", lambda: resumed(directory, size, "context")
    yield "resumed ring", lambda: resumed(directory, size, "ring")


if __name__ == "__main__":
    directory, sizes, number, rows = sys.argv[1:]
    counts = [int(n) for n in sizes.split(",")]
    answer(directory, counts, int(number), lambda n: checks(Path(directory), n), rows.split(";").__contains__)
