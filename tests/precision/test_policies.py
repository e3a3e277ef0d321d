"""The policy algebra: names, words, rules, casts; jmp is the oracle of the casts."""

from __future__ import annotations

import pickle

import jax.numpy as jnp
import jmp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from purestep.errors import PrecisionError
from purestep.precision import NAMES, NORMS, DynamicLossScale, NoLossScale, Policy, StaticLossScale, policy

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

MEANING = {  # param, compute, output, reduce, master
    "32": (f32, f32, f32, f32, None),
    "64": (f64, f64, f64, f64, None),
    "bf16-mixed": (f32, bf16, f32, f32, None),
    "16-mixed": (f32, f16, f32, f32, None),
    "bf16-true": (bf16, bf16, f32, bf16, None),
    "16-true": (f16, f16, f32, f16, None),
    "bf16-master": (bf16, bf16, f32, f32, f32),
    "float8": (f32, bf16, f32, f32, None),
    "int8": (f32, bf16, f32, f32, None),
}


def test_every_name_has_a_meaning():
    assert set(NAMES) == set(MEANING)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_what_it_says(name):
    p = policy(name)
    assert (p.param, p.compute, p.output, p.reduce, p.master) == MEANING[name]
    assert isinstance(p.loss_scale, DynamicLossScale if name == "16-mixed" else NoLossScale)
    assert (p.float8 is not None) == (name == "float8")
    assert (p.int8 is not None) == (name == "int8")


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_a_value(name):
    p = policy(name, loss_scale=StaticLossScale(8.0)).where(["a*", "b*"], param="f64").where(nn.LayerNorm, compute=f32)
    again = pickle.loads(pickle.dumps(p))
    assert again == p
    assert hash(again) == hash(p)
    assert p != policy(name)
    assert str(again) == str(p)
    assert policy(p) is p


def test_names_of_lightning_are_understood():
    assert policy(32) == policy("32") == policy("32-true")
    assert policy(64) == policy("64-true")


WORDS = {"float32": f32, "bfloat16": bf16, "float16": f16}


@given(*[st.sampled_from(sorted(WORDS)) for _ in range(3)])
def test_the_long_form_is_that_of_jmp(param, compute, output):
    text = f"params={param},compute={compute},output={output}"
    ours, theirs = policy(text), jmp.get_policy(text)
    assert str(jnp.dtype(theirs.param_dtype)) == str(ours.param).removeprefix("torch.")
    values = np.random.default_rng(0).standard_normal(7).astype(np.float32)
    for cast in ("cast_to_param", "cast_to_compute", "cast_to_output"):
        mine = getattr(ours, cast)({"x": torch.tensor(values), "n": torch.arange(3), "s": "text"})
        other = getattr(theirs, cast)({"x": jnp.asarray(values), "n": jnp.arange(3), "s": "text"})
        assert str(mine["x"].dtype) == f"torch.{other['x'].dtype}"
        np.testing.assert_array_equal(mine["x"].float().numpy(), np.asarray(other["x"], np.float32))
        assert mine["n"].dtype == torch.int64
        assert mine["s"] == "text"


def test_the_long_form_fills_in_from_params():
    assert policy("params=bf16") == Policy(bf16, bf16, bf16, bf16)
    assert policy("params=bf16,compute=bf16,output=f32,reduce=f32,master=f32").master == f32
    assert policy("p=f32,c=bf16,o=f32").compute == bf16


def test_rules_hold_for_what_is_inside_and_the_last_one_counts():
    p = policy("bf16-true").where("head", compute=f32).where("head.bias", compute=f16)
    values = {"head": {"weight": torch.ones(1), "bias": torch.ones(1)}, "header": {"weight": torch.ones(1)}}
    cast = p.cast_to_compute(values)
    assert (cast["head"]["weight"].dtype, cast["head"]["bias"].dtype) == (f32, f16)
    assert cast["header"]["weight"].dtype == bf16


def test_printed_policies_say_everything_that_changes_bits():
    p = policy("16-mixed")
    assert (
        len(
            {
                str(q)
                for q in (
                    p,
                    p.replace(autocast=True),
                    p.replace(reduce=f16),
                    p.where("a", param=f16),
                    p.where("b", param=f16),
                    p.replace(loss_scale=StaticLossScale(2.0)),
                    policy("float8"),
                    policy("float8", float8="rowwise"),
                )
            }
        )
        == 8
    )
    assert "0x" not in str(p.where(lambda name: "norm" in name, compute=f32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy("16"), "16-mixed or 16-true"),
        (lambda: policy("half"), "one of 32, 64, bf16-mixed"),
        (lambda: policy(True), "no such precision policy"),
        (lambda: policy("params=f32,weights=f16"), "a policy in words has no 'weights'"),
        (lambda: policy("params=f32,p=f16"), "'p' occurs twice"),
        (lambda: policy("params=int8"), "one of f64, f32, f16, bf16"),
        (lambda: policy("32", compute=torch.int32), "compute=torch.int32"),
        (lambda: policy("32", precision="16"), "a policy has no 'precision'"),
        (lambda: policy("32", loss_scale=1024.0), "loss_scale=ps.precision.StaticLossScale"),
        (lambda: policy("float8", float8="columnwise"), "one of tensorwise, rowwise"),
        (lambda: policy("32").where("a"), "the rule changes nothing"),
        (lambda: policy("32").where(int, compute=f16), "by module classes"),
        (lambda: policy("32").where(["a", nn.Linear], compute=f16), "a rule goes by globs"),
        (lambda: policy("32", autocast=True), "autocast needs compute=f16 or bf16"),
        (lambda: policy("bf16-mixed", autocast=True).where("a", compute=f32), "where('a')"),
        (lambda: policy("float8", autocast=True), "float8"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(PrecisionError) as caught:
        make()
    assert message in str(caught.value)


def test_norms_are_torchs_normalisation_layers():
    for norm in (nn.BatchNorm2d(2), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.RMSNorm(2), nn.InstanceNorm1d(2)):
        assert isinstance(norm, NORMS)
    assert not isinstance(nn.Linear(2, 2), NORMS)
