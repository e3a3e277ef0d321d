"""Rules of tensor parallelism for families of models, by the names that their authors gave the parameters.

Of the two matrices around each nonlinearity the first is split by its outputs and the second by its inputs, attention
by heads, embeddings and the output layer by the vocabulary (Megatron-LM: Shoeybi et al., arXiv 1909.08053).
"""

from __future__ import annotations

import dataclasses

from purestep import tree
from purestep.arguments import checked
from purestep.errors import ConfigError, explain
from purestep.sharding.spec import Spec


@dataclasses.dataclass(frozen=True)
class OfFamily:
    """A filter that a family brings. It may match nothing: not every member has biases, or an output layer of its own.

    Args:
        family: its name.
        globs: of dotted names.
    """

    family: str
    globs: tuple[str, ...]

    def __call__(self, name: str) -> bool:
        return tree.matches(self.globs, name)

    def __str__(self) -> str:
        return f"{self.family}: {', '.join(self.globs)}"


_ROWS, _COLUMNS, _WHOLE = Spec("tensor"), Spec(None, "tensor"), Spec()


def _layers(*names: str, ends: tuple[str, ...] = ("weight", "bias")) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}.{end}" for name in names for prefix in ("", "*.") for end in ends)


def _weights(*names: str) -> tuple[str, ...]:
    return _layers(*names, ends=("weight",))


# Weights of nn.Linear are [outputs, inputs]. Biases of layers that are split by their inputs are whole.
_FAMILIES: dict[str, dict[tuple[str, ...], Spec]] = {
    # transformers: Llama, Mistral, Qwen 2 and 3, Gemma, and others with these names
    "llama": {
        _layers("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"): _ROWS,
        _weights("o_proj", "down_proj"): _COLUMNS,
        _layers("embed_tokens", "lm_head"): _ROWS,
    },
    # examples/gpt.py and examples/transformer.py
    "gpt": {
        _layers("query", "key", "value", "gate", "up"): _ROWS,
        _weights("out", "down"): _COLUMNS,
        _layers("token", "head"): _ROWS,
        _weights("position"): _WHOLE,
    },
    # transformers: GPT-2, whose Conv1D has weights [inputs, outputs]
    "gpt2": {
        _weights("attn.c_attn"): Spec(None, "tensor", fused=3),
        _layers("attn.c_attn", ends=("bias",)): Spec("tensor", fused=3),
        _weights("mlp.c_fc"): _COLUMNS,
        _layers("mlp.c_fc", ends=("bias",)): _ROWS,
        _weights("attn.c_proj", "mlp.c_proj"): _ROWS,
        _weights("wte", "lm_head"): _ROWS,
        _weights("wpe"): _WHOLE,
    },
    # nanoGPT and its descendants: the names of GPT-2 with nn.Linear
    "nanogpt": {
        _layers("attn.c_attn"): Spec("tensor", fused=3),
        _layers("mlp.c_fc", "wte", "lm_head"): _ROWS,
        _weights("attn.c_proj", "mlp.c_proj"): _COLUMNS,
        _weights("wpe"): _WHOLE,
    },
    # transformers: GPT-NeoX and Pythia, whose heads hold query, key and value side by side
    "gpt_neox": {
        _layers("query_key_value", "dense_h_to_4h", "embed_in", "embed_out"): _ROWS,
        _weights("attention.dense", "dense_4h_to_h"): _COLUMNS,
    },
    # transformers: BERT and RoBERTa
    "bert": {
        _layers("self.query", "self.key", "self.value", "intermediate.dense"): _ROWS,
        _weights("attention.output.dense", "output.dense"): _COLUMNS,
        _layers("word_embeddings"): _ROWS,
        (
            *_weights("position_embeddings", "token_type_embeddings", "pooler.dense"),
            "cls.*",
            "lm_head.*",
            "classifier.*",
        ): (_WHOLE),
    },
    # nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, nn.MultiheadAttention
    "transformer": {
        ("in_proj_weight", "*.in_proj_weight", "in_proj_bias", "*.in_proj_bias"): Spec("tensor", fused=3),
        _weights("out_proj", "linear2"): _COLUMNS,
        _layers("linear1"): _ROWS,
    },
}


@checked(ConfigError)
def tensor_rules(family: str) -> dict[OfFamily, Spec]:
    """Return the rules of tensor parallelism of a family of models, to use as they are or with others.

    Args:
        family: "llama" (Llama, Mistral, Qwen, Gemma of transformers), "gpt" (the examples here), "gpt2" and "bert" of
            transformers, "nanogpt", "gpt_neox", or "transformer" (`nn.TransformerEncoder` and its relatives).

    Raises:
        ConfigError: there is no such family; the message names those that there are.

    Examples:
        >>> from purestep.sharding import tensor_parallel
        >>> rules = {**tensor_rules("transformer"), "embed.weight": Spec("tensor"), "head.*": Spec("tensor")}
        >>> plan = tensor_parallel(rules, 2)
        >>> plan.tensor_cut("layers.0.self_attn.in_proj_weight", (48, 16)), plan.tensor_cut("head.weight", (100, 16))
        ((0, (16, 16, 16)), (0, (100,)))
    """
    if family not in _FAMILIES:
        raise ConfigError(
            explain(
                f"there are no rules for a family {family!r}",
                where=f"tensor_parallel({family!r}, ...)",
                why=f"there are {', '.join(_FAMILIES)}",
                instead='tensor_parallel({"*.up.weight": Spec("tensor"), "*.down.weight": Spec(None, "tensor")}, 2)',
            )
        )
    return {OfFamily(family, globs): spec for globs, spec in _FAMILIES[family].items()}
