"""Rules of tensor parallelism by the name of a family: what they split, and the matrices that they do not know."""

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.sharding import Plan, Spec, ddp, fsdp, mesh, tensor_parallel, tensor_rules


def named(**shapes):
    """A module with parameters of these names (`__` for a dot) and shapes."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split("__")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    return root


ATTENTION = {f"layers__0__self_attn__{n}_proj__weight": (8, 8) for n in "qkvo"}
# By family: parameters, and of those that are split the dim and its blocks.
FAMILIES = {
    "llama": (
        {
            "embed_tokens__weight": (12, 8),
            "layers__0__mlp__down_proj__weight": (8, 16),
            "norm__weight": (8,),
            **ATTENTION,
        },
        {
            "embed_tokens.weight": (0, (12,)),
            "layers.0.mlp.down_proj.weight": (1, (16,)),
            **{f"layers.0.self_attn.{n}_proj.weight": (0, (8,)) for n in "qkv"},
            "layers.0.self_attn.o_proj.weight": (1, (8,)),
        },
    ),
    "gpt2": (
        {
            "h__0__attn__c_attn__weight": (8, 24),
            "h__0__attn__c_attn__bias": (24,),
            "h__0__attn__c_proj__weight": (8, 8),
        },
        {
            "h.0.attn.c_attn.weight": (1, (8, 8, 8)),
            "h.0.attn.c_attn.bias": (0, (8, 8, 8)),
            "h.0.attn.c_proj.weight": (0, (8,)),
        },
    ),
    "nanogpt": (
        {"h__0__attn__c_attn__weight": (24, 8), "h__0__mlp__c_proj__weight": (8, 32), "wpe__weight": (16, 8)},
        {"h.0.attn.c_attn.weight": (0, (8, 8, 8)), "h.0.mlp.c_proj.weight": (1, (32,))},
    ),
    "gpt_neox": (
        {"l__0__attention__query_key_value__weight": (24, 8), "l__0__attention__dense__bias": (8,)},
        {"l.0.attention.query_key_value.weight": (0, (24,))},
    ),
    "bert": (
        {"l__0__attention__self__query__bias": (8,), "l__0__attention__output__dense__weight": (8, 8)},
        {"l.0.attention.self.query.bias": (0, (8,)), "l.0.attention.output.dense.weight": (1, (8,))},
    ),
    "transformer": (
        {"layers__0__self_attn__in_proj_weight": (24, 8), "layers__0__linear2__weight": (8, 16)},
        {"layers.0.self_attn.in_proj_weight": (0, (8, 8, 8)), "layers.0.linear2.weight": (1, (16,))},
    ),
    "gpt": (
        {"blocks__0__query__weight": (8, 8), "position__weight": (16, 8), "head__weight": (12, 8)},
        {"blocks.0.query.weight": (0, (8,)), "head.weight": (0, (12,))},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_knows_its_matrices(family):
    shapes, expected = FAMILIES[family]
    for plan in (tensor_parallel(family, 2), fsdp(1) * tensor_parallel(family, 2, tensor_parts=4)):
        found = {n: plan.tensor_cut(n, tuple(p.shape)) for n, p in named(**shapes).named_parameters()}
        assert {n: cut for n, cut in found.items() if cut} == expected
    plan = ddp() * tensor_parallel(family, 1, tensor_parts=2)
    ps.init(lambda: named(**shapes), ps.optim.sgd(0.1), plan=plan)  # what a member does not have is not missed


def test_matrices_that_a_family_does_not_know_are_named():
    def model():
        return named(**ATTENTION, gate__router__weight=(4, 8), gate__bias=(4,))

    tx = ps.optim.sgd(0.1)
    for plan in (tensor_parallel("llama", 1), fsdp() * tensor_parallel("llama", 1)):
        with pytest.raises(ConfigError) as error:
            ps.init(model, tx, plan=plan)
        assert str(error.value).startswith(
            "the rules of llama do not know 1 matrices of the model\n  where:   gate.router.weight\n"
        )
        assert '{**ps.sharding.tensor_rules("llama"), "gate.router.weight": Spec("tensor")}' in str(error.value)
    ps.init(model, tx, plan=tensor_parallel({**tensor_rules("llama"), "gate.router.*": Spec()}, 1))
    with pytest.raises(ConfigError, match=r"no rules for a family 'lama'(.|\n)*there are llama, gpt, gpt2"):
        tensor_parallel("lama", 2)


def test_what_cannot_be_cut_is_whole_or_refused():
    rules = {"qkv.weight": Spec("tensor", fused=(2, 1, 1))}
    plan = tensor_parallel(rules, 2)
    assert plan.tensor_cut("qkv.weight", (16, 8)) == (0, (8, 4, 4))
    # The blocks are what is cut: 4 rows are 2 + 1 + 1, of which two parts have no whole rows.
    assert plan.tensor_cut("qkv.weight", (4, 8)) is None
    assert plan.spec("qkv.weight", (4, 8)) == Spec()
    with pytest.raises(ConfigError, match=r"cannot be cut into 2 equal parts(.|\n)*fused=\(2, 1, 1\)"):
        tensor_parallel(rules, 2, fallback="error").tensor_cut("qkv.weight", (4, 8))
    with pytest.raises(ConfigError, match=r"3 parts cannot be shared by 2 ranks"):
        tensor_parallel(rules, 2, tensor_parts=3).tensor_axis  # noqa: B018
    with pytest.raises(ConfigError, match=r"6 parts cannot be shared by 2 ranks"):
        tensor_parallel(rules, 2, tensor_parts=6).tensor_cut("qkv.weight", (12, 8))
    assert tensor_parallel(rules, 3).parts == 3
    with pytest.raises(ConfigError, match="fused= is a positive number of matrices"):
        Spec("tensor", fused=0)
    two = Plan(mesh({"x": 2, "y": 2}), [("*", Spec("x", "y"))])
    with pytest.raises(ConfigError, match="over one axis of the mesh"):
        two.check_computed()


def test_a_product_keeps_the_blocks():
    plan = fsdp(2) * tensor_parallel({"qkv.weight": Spec("tensor", fused=3)}, 2)
    assert plan.spec("qkv.weight", (24, 8)) == Spec(("tensor", "fsdp"))
    assert plan.tensor_cut("qkv.weight", (24, 8)) == (0, (8, 8, 8))
    assert plan.tensor_cut("norm.weight", (8,)) is None
