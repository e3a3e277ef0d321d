"""One process of several: train models with experts under expert parallelism, and write the digests down as JSON.

Arguments: a directory, the sizes of the jobs to be part of one after the other, this process's number, and the rows to
compute, separated by semicolons.
"""

import logging
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep import errors, optim
from purestep.sharding import ddp, expert_parallel, hsdp

sys.path.append(str(Path(__file__).parents[1] / "shared"))
import shared_rounding
from shared_ranks import answer

COUNT, CHOSEN, WIDTH, WORDS = 8, 3, 12, 40
V = 4


class Experts(nn.Module):
    """Feed-forward experts, one after the other."""

    def __init__(self, count, width):
        super().__init__()
        self.num_experts = count
        self.up = nn.Parameter(torch.randn(count, 2 * width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(count, 2 * width))
        self.down = nn.Parameter(torch.randn(count, width, 2 * width) / width**0.5)

    def forward(self, tokens, chosen, weights):
        out = torch.zeros_like(tokens)
        for expert in range(self.num_experts):
            rows, place = (chosen == expert).nonzero().unbind(1)
            h = F.gelu(F.linear(tokens[rows], self.up[expert], self.bias[expert]))
            out = out.index_add(0, rows, F.linear(h, self.down[expert]) * weights[rows, place, None])
        return out


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, COUNT)
        self.experts, self.drop = Experts(COUNT, WIDTH), nn.Dropout(0.1)

    def forward(self, x):
        tokens = self.norm(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(CHOSEN)
        return x + self.drop(self.experts(tokens, chosen, weights).view_as(x))


class Attention(nn.Module):
    """What of a block can be compiled."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-2, -3)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + F.dropout(self.out(seen), 0.1, self.training)


class Attending(Block):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return super().forward(self.attention(x))


class Mixture(nn.Module):
    """Blocks of experts, of which the second one is used twice, and again under a checkpoint."""

    def __init__(self, block=Block):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, ids):
        x = self.blocks[1](self.blocks[0](self.embed(ids)))
        return self.head(ps.checkpoint(self.blocks[1], x))


def token_loss(net, batch):
    keep = batch["y"] > 3
    losses = F.cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten(), reduction="none")
    return ps.weighted((losses * keep.flatten()).sum() / keep.sum(), keep.sum()), {"most": losses.max()}


def mean_loss(net, batch):
    return F.cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten())


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))


def qwen():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    moe = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **heads, **moe))


def their_loss(net, batch):
    return net(input_ids=batch["x"], labels=batch["x"], output_router_logits=True).loss


MODELS = {
    "tokens": (Mixture, token_loss),
    "mean": (Mixture, mean_loss),
    "attending": (lambda: Mixture(Attending), mean_loss),
    "mixtral": (mixtral, their_loss),
    "qwen": (qwen, their_loss),
}


def made(model, plan, **jit):
    factory, loss_fn = MODELS[model]
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2))
    state = ps.init(factory, tx, seed=1, plan=plan)
    step = ps.make_step(loss_fn, tx, microbatches=V, plan=plan)
    return state, ps.jit(step, **jit) if jit else step, loss_fn


def data(count=3):
    g = torch.Generator().manual_seed(2)
    for samples in (8, 7, 1, 8, 5, 8)[:count]:  # uneven microbatches, and half of the ranks without any
        x, y = torch.randint(0, WORDS, (2, samples, 6), generator=g)
        yield {"x": x, "y": y}


def train(model, plan, steps=3, **jit):
    state, step, loss_fn = made(model, plan, **jit)
    held = sum(x.to_local().numel() if hasattr(x, "to_local") else x.numel() for x in state.params.values())
    for batch in data(steps):
        state, metrics = step(state, batch)
    evaluate = ps.make_eval(loss_fn, plan=plan)(state, batch)
    whole = state if plan is None else plan.gather(state)
    some = torch.cat([p.flatten()[:4] for p in whole.params.values()]).tolist()
    numbers = [float(metrics["loss"].compute()), float(evaluate["loss"].compute()), *some]
    compiled, refusals = (step.units and step.units.compiled, step.refusals) if jit else (None, ())
    found = {"digest": ps.digest([state, metrics]), "numbers": numbers, "held": held}
    return found | {"compiled": compiled, "refusals": refusals}


def rounded(model, plan):
    """Train with a compiler that rounds: bits then show what is compiled, and what is compiled together."""
    with shared_rounding.compiler():
        return train(model, plan, backend="eager")


def refused(plan):
    """The words of a step whose blocks hold nothing but layers of torch and experts."""
    try:
        train("mean", plan, 1, backend="eager")
    except errors.ConfigError as error:
        return str(error)
    return "nothing"


def plans(size):
    found = {"expert": expert_parallel(size), "shard": expert_parallel(size, shard=True)}
    found["fast"] = expert_parallel(size, reduction="fast")
    if size == 1:
        found |= {"none": None, "ddp": ddp()}
    if size == 4:
        found |= {"ddp x expert": ddp(2) * expert_parallel(2), "ddp x shard": ddp(2) * expert_parallel(2, shard=True)}
        found |= {"hsdp": hsdp(fsdp=2)}
    return found


def resumed(directory, size):
    """Continue a run that another number of processes began."""
    state, step, _ = made("tokens", plans(size)["expert"])
    until = {4: 2, 2: 4, 1: 6}[size]
    callbacks = [ps.callbacks.snapshots(every=ps.every.steps(2))]
    batches = list(data(6))
    result = ps.fit(step, state, batches, until=ps.steps(until), run_dir=directory / "run", callbacks=callbacks)
    alone = ps.fit(step, state, batches, until=ps.steps(until)) if size == 1 else result
    return {"digest": ps.digest(result.state), "alone": ps.digest(alone.state)}


def checks(directory, size):
    for model in MODELS:
        for label, plan in plans(size).items():
            yield f"{model}|{label}", lambda model=model, plan=plan: train(model, plan)
            yield f"{model}|{label}, rounded", lambda model=model, plan=plan: rounded(model, plan)
            for way, jit in {"jit": {}, "unjittable": {"unjittable": "eager"}}.items():
                jit = {"backend": "eager", "donate": "ddp" in label} | jit
                yield f"{model}|{label}, {way}", lambda m=model, plan=plan, jit=jit: train(m, plan, **jit)
    yield "resumed", lambda: resumed(directory, size)
    yield "refused", lambda: refused(plans(size)["expert"])


if __name__ == "__main__":
    directory, sizes, number, rows = sys.argv[1:]
    counts = [int(n) for n in sizes.split(",")]
    logging.getLogger("purestep.jit").setLevel(logging.ERROR)  # of what runs uncompiled; the answers have it
    answer(directory, counts, int(number), lambda n: checks(Path(directory), n), rows.split(";").__contains__)
