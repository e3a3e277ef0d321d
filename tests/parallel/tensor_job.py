"""One process of several: train transformers under tensor parallelism, and write the digests down as JSON.

Arguments: a directory, the sizes of the jobs to be part of one after the other, this process's number, and the rows to
compute, separated by semicolons.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep import optim
from purestep.sharding import Spec, ddp, fsdp, tensor_parallel, tensor_rules

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import gpt

HEADS, KEYS, WIDTH, WORDS = 8, 4, 4, 40  # heads, those of keys and values, width of a head, size of the vocabulary
PARTS = 4


def rotate(x, cosine, sine):
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        width = HEADS * WIDTH
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, KEYS * WIDTH) for _ in range(2))
        self.q_norm = nn.RMSNorm(WIDTH)

    def forward(self, x, cosine, sine):
        shape = (*x.shape[:-1], -1, WIDTH)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cosine, sine), rotate(k, cosine, sine)
        k, v = (y[:, :, None].expand(-1, -1, HEADS // KEYS, -1, -1).flatten(1, 2) for y in (k, v))
        p = 0.1 if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.o_proj(seen.transpose(1, 2).reshape(*x.shape[:-1], -1))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        width, hidden = HEADS * WIDTH, 48
        self.self_attn = Attention()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, cosine, sine):
        x = x + self.self_attn(self.before(x), cosine, sine)
        h = self.after(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """RMSNorm, rotary positions that come with the batch, SwiGLU, fewer heads of keys, a checkpoint, tied weights."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, HEADS * WIDTH, padding_idx=0)
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(2)), nn.RMSNorm(HEADS * WIDTH)
        self.lm_head = nn.Linear(HEADS * WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids, positions):
        angles = positions[..., None] * 100.0 ** -torch.linspace(0, 1, WIDTH // 2, device=ids.device)
        angles = torch.cat((angles, angles), -1).unsqueeze(1)
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = ps.checkpoint(layer, x, angles.cos(), angles.sin()) if i else layer(x, angles.cos(), angles.sin())
        return self.lm_head(self.norm(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, norm_first=True)
        self.embed, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids, positions):
        return self.head(self.encoder(self.embed(ids.T)).transpose(0, 1))


def transformers_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_dropout=0.1))


def own_loss(net, batch):
    logits = net(batch["x"], batch["positions"])
    smooth = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), ignore_index=3, label_smoothing=0.1)
    return smooth, {"right": (logits.argmax(-1) == batch["y"]).float().mean()}


def their_loss(net, batch):
    return net(input_ids=batch["x"], position_ids=batch["positions"], labels=batch["x"]).loss


def gpt_loss(net, batch):
    return gpt.loss_fn(net, batch), {}


ENCODER = {**tensor_rules("transformer"), ("embed.*", "head.*"): Spec("tensor")}
MODELS = {
    "gpt": (gpt.GPT, gpt_loss, "gpt"),
    "llama": (Llama, own_loss, "llama"),
    "encoder": (Encoder, own_loss, ENCODER),
    "transformers": (transformers_llama, their_loss, "llama"),
}


def made(model, plan):
    factory, loss_fn, _ = MODELS[model]
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    state = ps.init(factory, tx, seed=1, plan=plan)
    return state, ps.make_step(loss_fn, tx, microbatches=2, plan=plan), loss_fn


def data(count=3):
    g = torch.Generator().manual_seed(2)
    positions = torch.arange(8).expand(4, 8) + torch.tensor([[0], [3], [0], [1]])
    for _ in range(count):
        x, y = torch.randint(0, WORDS, (2, 4, 8), generator=g)
        yield {"x": x, "y": y, "positions": positions}


def train(model, plan, jit=None):
    state, step, loss_fn = made(model, plan)
    step = step if jit is None else ps.jit(step, backend=jit)
    for batch in data():
        state, metrics = step(state, batch)
    evaluate = ps.make_eval(loss_fn, plan=plan)(state, batch)
    whole = state if plan is None else plan.gather(state)
    some = torch.cat([p.flatten()[:4] for p in whole.params.values()]).tolist()
    numbers = [float(metrics["loss"].compute()), float(evaluate["loss"].compute()), *some]
    return {"digest": ps.digest([state, metrics]), "numbers": numbers}


def plans(size, model):
    """By name: what several ranks compute together, the rest by data parallelism."""
    rules = MODELS[model][2]

    def parts(ranks, **settings):
        return tensor_parallel(rules, ranks, tensor_parts=PARTS, **settings)

    found = {"tensor": parts(size), "sequence": parts(size, sequence_parallel=True)}
    if size == 1:
        found["none"] = None
    if size == 4:
        found |= {"ddp x tensor": ddp(2) * parts(2), "fsdp x tensor": fsdp(2) * parts(2)}
    return found


def resumed(directory, size):
    """Continue a run that another number of processes began."""
    plan = plans(size, "llama")["tensor"]
    state, step, _ = made("llama", plan)
    until = {4: 2, 2: 4, 1: 6}[size]
    callbacks = [ps.callbacks.snapshots(every=ps.every.steps(2))]
    result = ps.fit(step, state, list(data(6)), until=ps.steps(until), run_dir=directory / "run", callbacks=callbacks)
    found = {"digest": ps.digest(result.state)}
    if size == 1:
        alone = ps.fit(step, state, list(data(6)), until=ps.steps(until), run_dir=directory / "alone")
        restored = ps.restore(directory / "run", like=made("llama", None)[0])
        found |= {"alone": ps.digest(alone.state), "restored": ps.digest(restored)}
    return found


def checks(directory, size):
    for model in MODELS:
        for label, plan in plans(size, model).items():
            yield f"{model}|{label}", lambda model=model, plan=plan: train(model, plan)
        if size == 2:
            yield f"{model}|jit", lambda model=model: train(model, plans(size, model)["tensor"], "eager")
    yield "resumed|llama", lambda: resumed(directory, size)


def main(directory, sizes, number, rows):
    answer(directory, sizes, number, lambda size: checks(Path(directory), size), rows.__contains__)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "shared"))
    from shared_ranks import answer

    main(sys.argv[1], [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3]), sys.argv[4].split(";"))
