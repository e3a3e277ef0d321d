"""Low-rank adapters by rule: they train as a loop by hand does, and merge into the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError, StepError, TemplateMismatch


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(width, 7), nn.Linear(7, width, bias=False), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(self.v_proj(self.q_proj(x).tanh()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(net, batch):
    return F.cross_entropy(net(batch["x"]), batch["y"])


def batches(count=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield {"x": torch.randn(9, 6, generator=draw), "y": torch.randint(0, 3, (9,), generator=draw)}


RULE, TX = ps.lora("*.q_proj", rank=3, alpha=5, train="head.*"), ps.optim.adam(0.05)


def trained(state, step=None, count=5):
    step = step or ps.make_step(loss_fn, TX)
    for batch in batches(count):
        state, metrics = step(state, batch)
    return state, float(metrics["loss"].compute())


def test_training_is_that_of_a_loop_by_hand(seed):
    state = ps.init(RULE(Net), TX, seed=seed)
    tensors = {n: t.clone() for n, t in {**state.params, **state.buffers}.items()}
    assert set(state.params) == {
        *(f"blocks.{i}.q_proj.lora_{x}" for i in range(2) for x in "AB"),
        *("head.weight", "head.bias"),
    }
    module, mine = Net(), {n: t.requires_grad_() for n, t in tensors.items() if n in state.params}
    optimizer = torch.optim.Adam(mine.values(), lr=0.05)
    for batch in batches():
        given = {n: t for n, t in tensors.items() if "lora" not in n}
        for i in range(2):
            name = f"blocks.{i}.q_proj."
            product = tensors[f"{name}lora_B"] @ tensors[f"{name}lora_A"]
            given[f"{name}weight"] = given[f"{name}weight"] + 5 / 3 * product
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.func.functional_call(module, given, (batch["x"],)), batch["y"])
        loss.backward()
        optimizer.step()
    end, last = trained(state)
    assert last == pytest.approx(loss.item(), rel=1e-4)
    for name, value in end.params.items():
        torch.testing.assert_close(value, mine[name].detach(), rtol=1e-3, atol=1e-5)
    ps.testing.assert_trees_equal(end.buffers, state.buffers)


def test_it_begins_as_the_model_and_merges_into_it(seed):
    state = ps.init(RULE(Net), TX, seed=seed)
    x = torch.randn(4, 6)
    plain = Net()
    plain.load_state_dict({n: t for n, t in {**state.params, **state.buffers}.items() if "lora" not in n})
    assert torch.equal(ps.to_module(state)(x), plain.eval()(x))
    end, _ = trained(state)
    merged = ps.merge_lora(end)
    module = ps.to_module(merged)
    assert list(dict(module.named_parameters())) == list(dict(plain.named_parameters())) == list(merged.params)
    assert {type(m) for m in module.modules()} == {type(m) for m in plain.modules()}
    torch.testing.assert_close(module(x), ps.to_module(end)(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(x), plain(x), atol=1e-3)
    with pytest.raises(StepError, match="has no adapters"):
        ps.merge_lora(merged)


def test_a_model_that_exists_is_not_changed():
    net = Net()
    before = {n: p.clone() for n, p in net.named_parameters()}
    state = ps.init(RULE(net), TX)
    trained(state)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert torch.equal(state.buffers["blocks.0.q_proj.weight"], before["blocks.0.q_proj.weight"])


class Words(nn.Module):
    """An embedding, and the linear layers of GPT-2, whose weights are [in, out]."""

    def __init__(self, linear):
        super().__init__()
        self.embed, self.attention = nn.Embedding(11, 6, padding_idx=2), linear(8, 6)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.attention(self.embed(tokens)).tanh()).mean(1)


def test_embeddings_and_conv1d_are_adapted_as_by_hand_and_merge(tmp_path, seed):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    make = lambda: Words(conv1d)  # noqa: E731
    rule = ps.lora("attention", rank=3, alpha=6, embeddings="embed")
    state = ps.init(rule(make), TX, seed=seed)
    assert {name: tuple(t.shape) for name, t in state.params.items()} == {
        "embed.lora_A": (3, 11),
        "embed.lora_B": (6, 3),
        "attention.lora_A": (3, 6),
        "attention.lora_B": (8, 3),
    }
    tokens = torch.randint(0, 11, (5, 7))
    plain = make()
    plain.load_state_dict({n: t for n, t in {**state.params, **state.buffers}.items() if "lora" not in n})
    assert torch.equal(ps.to_module(state)(tokens), plain(tokens))  # it begins as the model

    def loss_of(net, batch):
        return F.cross_entropy(net(batch["x"]), batch["y"])

    batch = {"x": tokens, "y": torch.arange(5) % 3}
    own = {name: t.clone().requires_grad_() for name, t in state.params.items()}
    optimizer = torch.optim.Adam(own.values(), lr=0.05)
    step = ps.make_step(loss_of, TX)
    for _ in range(4):
        given = {n: t for n, t in state.buffers.items() if "lora" not in n}
        for name in ("embed", "attention"):  # W + alpha / rank * (B A)^T, as in the paper and in PEFT
            given[f"{name}.weight"] = given[f"{name}.weight"] + 2 * (own[f"{name}.lora_B"] @ own[f"{name}.lora_A"]).T
        optimizer.zero_grad()
        F.cross_entropy(torch.func.functional_call(plain, given, (tokens,)), batch["y"]).backward()
        optimizer.step()
        state, _ = step(state, batch)
    for name, value in state.params.items():
        torch.testing.assert_close(value, own[name].detach(), rtol=1e-3, atol=1e-5)
    assert state.params["embed.lora_A"][:, 2].count_nonzero() == 0  # padding is not trained

    merged = ps.merge_lora(state)
    module = ps.to_module(merged)
    assert {type(m) for m in module.modules()} == {type(m) for m in plain.modules()}
    assert list(merged.params) == [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(module(tokens), ps.to_module(state)(tokens), rtol=1e-4, atol=1e-5)
    path = ps.save_adapters(state, tmp_path / "a.safetensors")
    ps.testing.assert_trees_equal(ps.load_adapters(state, path).params, state.params)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gpt2_of_transformers_is_adapted_and_merged(seed):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
    quiet = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet)).eval()
    state = ps.init(ps.lora(["*.c_attn", "*.c_proj"], rank=3, embeddings="*.wpe")(gpt), TX, seed=seed)
    assert len(state.params) == 2 * (2 * 3 + 1)
    tokens = torch.randint(0, 60, (4, 10))
    before = gpt(input_ids=tokens).logits
    assert torch.equal(ps.to_module(state)(input_ids=tokens).logits, before)
    step = ps.make_step(lambda net, batch: net(input_ids=batch, labels=batch).loss, TX)
    for _ in range(3):
        state, _ = step(state, tokens)
    merged = ps.to_module(ps.merge_lora(state))
    assert {name: type(m) for name, m in merged.named_modules()} == {name: type(m) for name, m in gpt.named_modules()}
    after = merged(input_ids=tokens).logits
    torch.testing.assert_close(after, ps.to_module(state)(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)
    with pytest.raises(ConfigError, match=r"'transformer\.wte', matched by '\*\.wte'(.|\n)*shared with another layer"):
        ps.lora((), embeddings="*.wte")(gpt)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_pretrained_base_in_bf16(deferred, tmp_path, seed):
    torch.manual_seed(seed)
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    rule = ps.lora(["*.q_proj", "*.v_proj"], rank=2, base=torch.bfloat16)
    state = ps.init(rule(Net), TX, deferred=deferred, weights=tmp_path / "a.pt")
    values = torch.load(tmp_path / "a.pt")
    assert all(torch.equal(state.buffers[n], value.bfloat16()) for n, value in values.items())
    assert {p.dtype for p in state.params.values()} == {torch.float32}
    bf16 = ps.make_step(lambda net, batch: F.cross_entropy(net(batch["x"].bfloat16()).float(), batch["y"]), TX)
    end, _ = trained(state, bf16)
    assert all(end.params[n].count_nonzero() == p.numel() for n, p in state.params.items())
    ps.testing.assert_trees_equal(end.buffers, state.buffers)
    assert ps.merge_lora(end).params["blocks.0.v_proj.weight"].dtype == torch.bfloat16
    # A file that has adapters fills them.
    back = ps.load_weights(state, ps.save_weights(end, tmp_path / "b.safetensors"))
    ps.testing.assert_trees_equal(back.params, end.params)


def test_a_file_of_adapters_goes_with_its_base_alone(tmp_path, seed):
    state = ps.init(RULE(Net), TX, seed=seed)
    end, _ = trained(state)
    path = ps.save_adapters(end, tmp_path / "a.safetensors")
    assert set(ps.interop.read_weights(path)) == set(state.params)
    ps.testing.assert_trees_equal(ps.load_adapters(state, path).params, end.params)
    other = ps.init(RULE(Net), TX, seed=seed + 1)
    with pytest.raises(TemplateMismatch) as caught:
        ps.load_adapters(other, path)
    text = str(caught.value)
    assert text.startswith("the adapters were trained beside another base\n  where:   ")
    assert "ps.init(rule(model), tx, weights=the_base_of_that_run)" in text
    ps.testing.assert_trees_equal(ps.load_weights(other, path, strict=False).params, end.params)
    with pytest.raises(ConfigError, match="does not say which base"):
        ps.load_adapters(state, ps.save_weights(end, tmp_path / "whole.safetensors"))
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        ps.save_adapters(state, tmp_path / "a.pt")


def test_dropout_draws_from_the_key_of_the_state():
    state = ps.init(ps.lora("*", rank=2, dropout=0.5)(Net), ps.optim.sgd(0.5), seed=1)
    step = ps.make_step(loss_fn, ps.optim.sgd(0.5))
    one, two = (trained(state, step)[0] for _ in range(2))
    ps.testing.assert_trees_equal(one, two)
    other = trained(state.replace(rng=ps.random.key(7)), step)[0]
    assert not torch.equal(one.params["head.lora_B"], other.params["head.lora_B"])


@pytest.mark.slow
def test_a_compiled_step_trains_adapters():
    state = ps.init(RULE(Net), TX)
    compiled, plain = trained(state, ps.jit(ps.make_step(loss_fn, TX))), trained(state)
    assert compiled[1] == pytest.approx(plain[1], rel=1e-4)


def test_a_plan_keeps_adapters_in_full():
    plan = RULE.plan(ps.sharding.fsdp(2))
    assert plan.spec("blocks.0.q_proj.lora_B", (8, 4)) == ps.sharding.Spec()
    assert plan.spec("blocks.0.q_proj.weight", (8, 4)) == ps.sharding.Spec("fsdp")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})(2, 2)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("*.k_proj", "matches no linear layer\n  where:   '*.k_proj'; linear layers of Tied: 'head', "),
        ("head", "its weight is shared with another layer"),
        ("attention.*", "NonDynamicallyQuantizableLinear, whose forward pass is its own"),
        ("own", "it is a Own, whose forward pass is its own"),
    ],
)
def test_what_cannot_be_adapted_is_refused(names, text):
    with pytest.raises(ConfigError, match=r"'embed', matched by 'embed'(.|\n)*shared with another layer"):
        ps.lora((), embeddings="embed")(Tied())
    with pytest.raises(ConfigError, match=r"'0', matched by '0'(.|\n)*max_norm= writes the weight"):
        ps.lora((), embeddings="0")(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)))
    with pytest.raises(
        ConfigError, match=r"the rule matches no embedding\n  where:   'head'; embeddings of Tied: 'embed'"
    ):
        ps.lora((), embeddings="head")(Tied())
    with pytest.raises(ConfigError) as caught:
        ps.lora(names)(Tied())
    assert text in str(caught.value)
    with pytest.raises(ConfigError, match="the filter train= matches no parameter"):
        ps.lora("*.q_proj", train="nothing.*")(Net())
