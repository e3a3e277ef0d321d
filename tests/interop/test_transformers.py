"""Models of transformers: into a state, trained, and out as `save_pretrained` writes them; tiny configurations."""

from __future__ import annotations

import warnings

import pytest
import torch

import purestep as ps

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def gpt2():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=37, n_positions=24))


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_trained_state_is_saved_and_loaded_as_a_pretrained_model(shard, gpt2, tmp_path):
    tx = ps.optim.adamw(1e-2)
    step = ps.make_step(lambda net, batch: net(input_ids=batch, labels=batch).loss, tx)
    state, first = ps.init(gpt2, tx), None
    batch = torch.randint(0, 37, (4, 12))
    for _ in range(5):
        state, metrics = step(state, batch)
        first = first or float(metrics["loss"].compute())
    assert float(metrics["loss"].compute()) < first

    ps.to_module(state).save_pretrained(tmp_path, max_shard_size=shard)
    loaded = type(gpt2).from_pretrained(tmp_path).eval()
    model = ps.to_module(state)
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, model(batch).logits)
    back = ps.load_weights(ps.init(gpt2, tx), tmp_path)
    ps.testing.assert_trees_equal(back.params, state.params)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "8KB")
