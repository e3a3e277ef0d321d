# %% [markdown]
# # Fine-tuning a model of `transformers`
#
# A model of Hugging Face's `transformers` is an `nn.Module`, so it is a model for purestep, unchanged. Nothing is
# downloaded here: a llama of 100,000 random weights is first trained on one kind of text, and then fine-tuned on
# another with half of it frozen.
#
# The text is in Python's standard library: `unicodedata` has the name of every character, LATIN SMALL LETTER A,
# LEFTWARDS WAVE ARROW. Its `ucd_3_2_0` is the table of Unicode 3.2, and the same in every version of Python. What
# will a network that has read the names of 10,000 letters, signs and boxes make of mathematics? Which symbols will
# it wish for?

# %%
import logging
import shutil
import unicodedata
import warnings

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import purestep as ps

ps.bits.portable()
logging.disable(logging.WARNING)  # what transformers says of packages that it finds, and of those that it does not
warnings.filterwarnings("ignore", "IProgress not found")
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "axes.titlelocation": "left"})
shutil.rmtree("runs/names", ignore_errors=True)

# %% [markdown]
# ## Text and tokenizer
#
# Names of mathematical symbols (Unicode's category Sm) to fine-tune on, and all other names to begin with.
# Ideographs and syllables whose names are numbers are left out.

# %%
table = unicodedata.ucd_3_2_0
names = {"others": [], "mathematics": []}
for code in range(0x30000):
    name = table.name(chr(code), "")
    if name and not name.startswith(("CJK ", "HANGUL SYLLABLE ", "YI SYLLABLE ")):
        names["mathematics" if table.category(chr(code)) == "Sm" else "others"].append(name)
for kind, found in names.items():
    print(f"{len(found):>6} {kind}: {', '.join(found[:: len(found) // 3][:3])}")

# %% [markdown]
# A tokenizer of bytes takes three lines. A line break begins and ends each name, and zeros fill it up; they are not
# counted in the loss, which is a mean over *characters*. `ps.weighted` says so, and microbatches and epochs are
# then weighted by them.

# %%
LENGTH = 32


def encode(texts):
    rows = [list(f"\n{text}\n".encode()[:LENGTH]) for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def decode(row):
    return bytes(row.tolist()).decode().split("\n")[1]


def loss_fn(net, batch):
    ids = batch["ids"]
    logits = net(input_ids=ids[:, :-1], use_cache=False).logits
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    return ps.weighted(cross_entropy(logits.flatten(0, 1), targets.flatten()), (targets >= 0).sum())


sets = {}
for kind in names:
    ids = encode(names[kind])[ps.random.permutation(ps.random.key(0), len(names[kind]))]
    held = len(ids) // 5
    sets[kind] = {"train": {"ids": ids[held:]}, "held out": {"ids": ids[:held]}}
print(decode(sets["mathematics"]["train"]["ids"][0]), sets["mathematics"]["train"]["ids"][0].tolist()[:8], "...")

# %% [markdown]
# ## Pre-training
#
# `ps.init` calls the function under its seed, so the random weights are a function of the seed alone.

# %%
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    bos_token_id=10,
    eos_token_id=10,
    pad_token_id=0,
)


def train(state, tx, kind, steps, run_dir, every=20):
    """Return the state after so many steps, and the held-out losses on the way."""
    data = ps.data.batches(sets[kind]["train"], 32, seed=0)
    val = ps.data.batches(sets[kind]["held out"], 256, shuffle=False, drop_last=False)
    evaluate = ps.callbacks.evaluate(loss_fn, val, every=ps.every.steps(every))
    step = ps.make_step(loss_fn, tx)
    result = ps.fit(step, state, data, until=ps.steps(steps), run_dir=run_dir, callbacks=[evaluate])
    return result.state, [loss for loss in ps.open(run_dir).metrics["val/loss"] if loss is not None]


def adamw(peak, steps):
    schedule = ps.optim.warmup_cosine_decay_schedule(0.0, peak, warmup_steps=steps // 10, decay_steps=steps)
    return ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(schedule, weight_decay=0.05))


tx = adamw(1e-2, 300)
state = ps.init(lambda: LlamaForCausalLM(config), tx, seed=0)
print(f"{sum(p.numel() for p in state.params.values()):,} parameters")
state, losses = train(state, tx, "others", 300, "runs/names/others", every=100)
print("held-out loss, nats a character:", " ".join(f"{loss:.2f}" for loss in losses))

# %% [markdown]
# `ps.to_module` returns an ordinary model of `transformers`, whose `generate` works. What does it wish for?


# %%
def wish(model, known, count=48):
    """Sample names, and return those that no character has."""
    torch.manual_seed(1)
    start = torch.full((count, 1), 10)
    options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": LENGTH - 2}
    ids = model.generate(start, attention_mask=torch.ones_like(start), **options)
    return [name for name in map(decode, ids) if name not in known]


known = {name for part in names.values() for name in part}
pretrained = ps.to_module(state)
wishes = wish(pretrained, known)
print(f"{len(wishes)} of 48 are not in Unicode 3.2, for instance")
print(*wishes[:8], sep="\n")

# %% [markdown]
# ## Fine-tuning, frozen
#
# `frozen=` names what is not trained: here the embedding and the first of the two blocks. It gets no gradients and
# no optimizer state, and lives among the buffers of the state. Beside it a fine-tuning of everything, and a
# training from scratch, on the same 700 or so names of mathematical symbols.

# %%
tx = adamw(5e-3, 100)
frozen = ["model.embed_tokens*", "model.layers.0.*"]
starts = {
    "last block and head": ps.init(pretrained, tx, frozen=frozen),
    "everything": ps.init(pretrained, tx),
    "from scratch": ps.init(lambda: LlamaForCausalLM(config), tx, seed=1),
}
tuned, curves = {}, {}
for name, start in starts.items():
    tuned[name], curves[name] = train(start, tx, "mathematics", 100, f"runs/names/{name.replace(' ', '-')}")
    trained = sum(p.numel() for p in start.params.values())
    state_bytes = ps.tree.nbytes(start.opt_state)
    print(
        f"{name:<20} {trained:>8,} trained, optimizer state {state_bytes / 2**20:.1f} MiB, loss {curves[name][-1]:.3f}"
    )
before, after = starts["last block and head"].buffers, tuned["last block and head"].buffers
print("frozen weights unchanged:", ps.digest(before) == ps.digest(after))

# %%
val = {"ids": sets["mathematics"]["held out"]["ids"]}
zero = float(ps.make_eval(loss_fn)(state, val)["loss"].compute())
figure, axes = plt.subplots(figsize=(6.5, 3.2))
at = range(20, 101, 20)
axes.axhline(zero, color="0.5", lw=1, ls=":", label="before fine-tuning")
for (name, losses), colour in zip(curves.items(), ("tab:red", "tab:blue", "0.4"), strict=True):
    axes.plot(at, losses, color=colour, marker="o", ms=4, label=name)
axes.set(xlabel="steps of fine-tuning", ylabel="nats a character, held out", ylim=(0, None))
axes.set_title("Names of mathematical symbols")
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# With half of it frozen, the network learns faster than from scratch and ends where that does: one as tiny as this
# has little to spare. Training all of it is best. The symbols that it then wishes for:

# %%
model = ps.to_module(tuned["everything"])
wishes = wish(model, known)
print(f"{len(wishes)} of 48 are not in Unicode 3.2, for instance")
print(*wishes[:8], sep="\n")

# %% [markdown]
# ## Back to `transformers`
#
# Nothing of purestep is in the model, so it saves and loads as `transformers` does.

# %%
model.save_pretrained("runs/names/model")
loaded = AutoModelForCausalLM.from_pretrained("runs/names/model")
with torch.no_grad():
    same = torch.equal(loaded(val["ids"]).logits, model(val["ids"]).logits)
print(type(loaded).__name__, "computes the same logits:", same)
print("digest", ps.digest({"others": state.params, "mathematics": {name: s.params for name, s in tuned.items()}}))
