"""Plans: who computes which microbatches, which rule a parameter gets, units, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import purestep as ps
from purestep import tree
from purestep.errors import ConfigError
from purestep.sharding import (
    Plan,
    Spec,
    context_parallel,
    ddp,
    expert_parallel,
    fsdp,
    hsdp,
    mesh,
    pipeline,
    single,
    tensor_parallel,
    zero1,
    zero2,
)
from purestep.treesum import TreeSum

# name, plan on a mesh of its own, ranks, ranks that compute different microbatches
PLANS = [
    ("ddp", ddp(4), 4, 4),
    ("single", single(), 1, 1),
    ("zero1", zero1(4), 4, 4),
    ("zero2", zero2(4), 4, 4),
    ("fsdp", fsdp(4), 4, 4),
    ("hsdp", hsdp(fsdp=2, data=3), 6, 6),
    ("tensor", tensor_parallel({"*": Spec("tensor")}, 2), 2, 1),
    ("context", ddp(3) * context_parallel(2), 6, 3),
    ("expert", ddp(3) * expert_parallel(2), 6, 6),
    ("pipeline", pipeline([["0"], ["1"], ["2"]], 3), 3, 1),
    ("ddp x pipeline", ddp(2) * pipeline([["0"], ["1"]], 2), 4, 2),
    ("fsdp x tensor", fsdp(2) * tensor_parallel({"*.w": Spec("tensor")}, 3), 6, 2),
    ("hsdp x tensor", hsdp(fsdp=2, data=2) * tensor_parallel({"*.w": Spec("tensor")}, 2), 8, 4),
]


@pytest.mark.parametrize(("plan", "ranks", "replicas"), [p[1:] for p in PLANS], ids=[p[0] for p in PLANS])
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_every_microbatch_is_computed_once_a_model_replica(plan, ranks, replicas, turns):
    assert (plan.mesh.world, plan.replicas) == (ranks, replicas)
    count = turns * replicas
    shares = [plan.microbatches(count, rank=r) for r in range(ranks)]
    assert all(len(s) == turns for s in shares)
    everyone = sorted(i for s in shares for i in s)
    assert everyone == sorted([*range(count)] * (ranks // replicas))


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_the_sums_of_all_topologies_are_one_tree(data, split, turns):
    """Over fsdp first, then the turns, then data: the balanced tree over all microbatches, for every topology."""
    plan = hsdp(fsdp=split, data=data)
    count = data * split * turns

    def summed(values):
        total = TreeSum(lambda a, b: f"({a}+{b})")
        for value in values:
            total.add(value)
        return total.result()

    per_group = []
    for d in range(data):
        ranks = [d * split + f for f in range(split)]
        shares = [plan.microbatches(count, rank=r) for r in ranks]
        per_group.append(summed([summed([shares[f][m] for f in range(split)]) for m in range(turns)]))
    assert summed(per_group) == summed(range(count))


def test_data_takes_runs_and_fsdp_takes_turns():
    assert [ddp(2).microbatches(4, rank=r) for r in range(2)] == [(0, 1), (2, 3)]
    assert [fsdp(2).microbatches(4, rank=r) for r in range(2)] == [(0, 2), (1, 3)]
    assert (hsdp(fsdp=2, data=2).data_axes, hsdp(fsdp=2, data=2).shard_axes) == (("data",), ("fsdp",))


def test_stages_of_zero_split_what_they_say():
    with torch.device("meta"):
        state = ps.init(torch.nn.Linear(8, 4), ps.optim.adam(0.1))
    for plan, axis, whole in ((ddp(4), None, True), (zero1(4), "data", True), (fsdp(4), "fsdp", False)):
        rows = {row.path: row for row in plan.describe(state).rows}
        moment = next(row for path, row in rows.items() if "mu" in path and "weight" in path)
        assert moment.spec == (Spec() if axis is None else Spec(axis))
        assert (rows[".params['weight']"].spec == Spec()) is whole
    # Gradients that stay whole are summed over runs of microbatches first, those that are split go at once.
    assert [zero1(2).microbatches(4, rank=r) for r in range(2)] == [(0, 1), (2, 3)]
    assert [zero2(2).microbatches(4, rank=r) for r in range(2)] == [(0, 2), (1, 3)]
    plan = hsdp(fsdp=2, data=2, zero=1)
    assert [plan.microbatches(4, rank=r) for r in range(4)] == [(0,), (1,), (2,), (3,)]


def test_stages_of_zero_do_not_go_with_tensor_parallelism():
    with pytest.raises(ConfigError) as caught:
        zero1() * tensor_parallel({"*": Spec("tensor")}, 2)
    assert "ZeRO 1 and 2 keep parameters whole, and tensor parallelism splits them" in str(caught.value)
    with pytest.raises(ConfigError, match="zero is one of 1, 2, 3"):
        fsdp(zero=4)


@pytest.mark.parametrize(("count", "named"), [(6, "microbatches=4 or 8"), (1, "microbatches=4"), (0, "microbatches=4")])
def test_microbatches_that_cannot_be_shared_are_refused(count, named):
    with pytest.raises(ConfigError) as caught:
        ddp(4).microbatches(count)
    assert f"{count} microbatches cannot be shared equally by 4 ranks" in str(caught.value)
    assert named in str(caught.value)


def test_the_first_rule_that_matches_wins():
    rules = [
        ("*.bias", Spec()),
        (["head.*", "embed.*"], Spec(None, "fsdp")),
        (lambda n: "norm" in n, Spec()),
        ("*", Spec("fsdp")),
    ]
    plan = Plan(mesh({"fsdp": 2}), rules)
    found = {n: plan.spec(n, (4, 4)) for n in ("head.bias", "head.weight", "embed.weight", "norm.weight", "0.weight")}
    assert list(found.values()) == [Spec(), Spec(None, "fsdp"), Spec(None, "fsdp"), Spec(), Spec("fsdp")]


def test_names_without_a_rule_follow_the_fallback():
    rules = [("head.*", Spec("fsdp"))]
    assert Plan(mesh({"fsdp": 2}), rules, fallback="replicate").spec("body.weight", (4, 4)) == Spec()
    assert Plan(mesh({"fsdp": 2}), rules, fallback="pad").spec("body.weight", (4, 4)) == Spec()
    with pytest.raises(ConfigError) as caught:
        Plan(mesh({"fsdp": 2}), rules).spec("body.weight", (4, 4))
    for part in ("no rule of the plan matches a parameter", "body.weight: [4, 4]", "'head.*'", '("*", Spec())'):
        assert part in str(caught.value)


def test_one_process_keeps_everything_whole():
    for plan in (ddp(), fsdp(), hsdp(fsdp=1), fsdp() * tensor_parallel({"*": Spec("tensor")}, 1)):
        params = {"w": torch.ones(4, 4)}
        assert plan.place(params)["w"] is params["w"]
        assert plan.gather(params)["w"] is params["w"]
        assert (plan.replicas, plan.index, plan.microbatches(3)) == (1, 0, (0, 1, 2))


def test_units_are_children_of_lists_or_what_globs_name():
    names = ["embed.weight", "blocks.0.attn.q.weight", "blocks.0.norm.weight", "blocks.1.mlp.0.weight", "head.weight"]
    assert [fsdp().unit(n) for n in names] == ["", "blocks.0", "blocks.0", "blocks.1", ""]
    named = fsdp(units=["blocks.*.mlp", "head"])
    assert [named.unit(n) for n in names] == ["", "", "", "blocks.1.mlp", "head"]


def test_products_split_by_both():
    rules = {"*.up.weight": Spec("tensor"), "*.up.bias": Spec("tensor"), "*.down.weight": Spec(None, "tensor")}
    plan = hsdp(fsdp=2, data=2) * tensor_parallel(rules, 2)
    assert plan == tensor_parallel(rules, 2) * hsdp(fsdp=2, data=2)
    assert plan.mesh == mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert (plan.data_axes, plan.shard_axes, plan.model_axes) == (("data",), ("fsdp",), ("tensor",))
    assert plan.spec("0.up.weight", (8, 8)) == Spec(("tensor", "fsdp"))
    assert plan.spec("0.up.bias", (8,)) == Spec(("tensor", "fsdp"))
    assert plan.spec("0.up.bias", (2,)) == Spec("tensor")
    assert plan.spec("0.down.weight", (8, 8)) == Spec("fsdp", "tensor")
    assert plan.spec("0.norm.weight", (8,)) == Spec("fsdp")


def test_axes_of_the_batch_split_a_dim_last_whatever_the_order_of_the_factors():
    batch, model = (
        Plan(mesh({"fsdp": 2}), [("*", Spec("fsdp"))], fallback="replicate"),
        tensor_parallel({"*": Spec("tensor")}, 2),
    )
    for plan in (batch * model, model * batch):
        assert plan.spec("w", (8,)) == Spec(("tensor", "fsdp"))


@given(
    st.lists(st.sampled_from(["*", "*.w", "a.*", "*b*"]), max_size=3),
    st.lists(st.sampled_from(["*", "*.w", "a.*", "b.*"]), max_size=3),
    st.sampled_from(["a.w", "a.b", "b.w", "c.c"]),
)
def test_rules_of_a_product_are_the_first_of_each(left, right, name):
    one = Plan(mesh({"x": 2}), [(g, Spec(*[None] * i, "x")) for i, g in enumerate(left)], fallback="replicate")
    two = Plan(mesh({"y": 2}), [(g, Spec(*[None] * i, "y")) for i, g in enumerate(right)], fallback="replicate")
    shape = (4, 4, 4)
    a, b, both = one.spec(name, shape), two.spec(name, shape), (one * two).spec(name, shape)
    for dim in range(3):
        expected = set((*a.entries, (), (), ())[dim]) | set((*b.entries, (), (), ())[dim])
        assert set((*both.entries, (), (), ())[dim]) == expected


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: fsdp(2) * fsdp(2), ["both plans have the mesh axis 'fsdp'"]),
        (lambda: ddp() * fsdp(), ["both plans take what is left of the job", "hsdp(fsdp=8)"]),
        (
            lambda: fsdp(fallback="pad") * tensor_parallel({}, 2, fallback="error"),
            ["the two plans disagree about fallback", "'pad' and 'error'"],
        ),
        (lambda: Plan(mesh({"a": 1}), [("*",)]), ["a rule is a pair of a filter and a Spec", "('*',)"]),
        (lambda: Plan(mesh({"a": 1}), [("*", "fsdp")]), ["a rule is a pair of a filter and a Spec"]),
        (lambda: fsdp(fallback="no"), ["fallback is one of 'replicate', 'error', 'pad'", "fallback='no'"]),
        (lambda: fsdp(reduction="sum"), ["reduction is one of 'tree', 'fast'"]),
        (lambda: fsdp(compress="bf16"), ["have other bits on another number of ranks", 'reduction="fast"']),
        (lambda: fsdp(reduction="fast", compress="fp8"), ["compress is one of None, 'bf16', 'fp16'"]),
        (lambda: fsdp(sync_batchnorm=True), ["batch norm over ranks has other bits on another number", "reduction="]),
    ],
)
def test_what_does_not_fit_together_is_refused(make, parts):
    with pytest.raises(ConfigError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_settings_of_a_product_come_from_the_factor_that_was_told():
    halved = ddp(2, reduction="fast", compress="bf16") * tensor_parallel({}, 2)
    assert halved.sent_dtype == torch.bfloat16
    plan = fsdp(min_size=8, reshard_after_forward=False) * tensor_parallel({}, 2, reduction="fast", units="blocks.*")
    assert (plan.min_size, plan.reshard_after_forward, plan.reduction, plan.units) == (8, False, "fast", ("blocks.*",))


@pytest.mark.parametrize(
    ("plan", "what", "said", "instead"),
    [
        ("fsdp", "not a str", "plan='fsdp'", "plan=ps.sharding.fsdp()"),
        (hsdp, "not a function", "plan=hsdp", "plan=ps.sharding.hsdp(fsdp=8)"),
        ("zero3", "not a str", "plan='zero3'", "plan=ps.sharding.fsdp()"),
        (mesh({"data": 1}), "not a Mesh", "plan=mesh({'data': 1})", "plan=ps.sharding.fsdp()"),
        (True, "not a bool", "plan=True", "plan=ps.sharding.fsdp()"),
    ],
)
@pytest.mark.parametrize("name", ["make_step", "make_eval", "init"])
def test_what_is_no_plan_is_refused_by_every_call_that_takes_one(name, plan, what, said, instead):
    tx = ps.optim.sgd(0.1)
    calls = {
        "make_step": lambda: ps.make_step(lambda net, batch: 0, tx, plan=plan),
        "make_eval": lambda: ps.make_eval(lambda net, batch: 0, plan=plan),
        "init": lambda: ps.init(lambda: torch.nn.Linear(2, 2), tx, plan=plan),
    }
    with pytest.raises(ConfigError) as caught:
        calls[name]()
    assert str(caught.value) == (f"a plan is a Plan, {what}\n  where:   ps.{name}({said})\n  instead: {instead}")


def test_a_plan_is_multiplied_by_a_plan():
    with pytest.raises(ConfigError, match="a plan is multiplied by a Plan, not by a str"):
        ddp() * "fsdp"


@pytest.mark.parametrize("plan", [p[1] for p in PLANS], ids=[p[0] for p in PLANS])
def test_a_plan_is_a_value(plan):
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert hash(pickle.loads(pickle.dumps(plan))) == hash(plan)
    assert plan.on(plan.mesh) == plan
    assert "mesh(" in repr(plan)


def test_specs_have_the_structure_of_the_state():
    params = {"w": torch.zeros(4, 2), "layers": [torch.zeros(2), (torch.zeros(3), None)]}
    specs = fsdp(2).specs(params)
    assert tree.names(specs) == tree.names(params)
    assert specs == {"w": Spec("fsdp"), "layers": [Spec("fsdp"), (Spec(), None)]}
