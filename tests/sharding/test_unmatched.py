"""A rule, or an entry of units, that matches nothing is an error when a state is made or placed."""

import pytest
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.sharding import Plan, Spec, ddp, fsdp, mesh, tensor_parallel

TX = ps.optim.adamw(1e-3)


def model():
    return nn.ModuleDict(
        {"blocks": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), "head": nn.Linear(4, 2)}
    )


def by_hand(filter):
    return Plan(mesh({"fsdp": 1}), [(filter, Spec("fsdp")), ("*", Spec())])


def unknown(name):
    return name == "nowhere"


RULE, UNIT = "a rule of the plan matches no parameter", "an entry of units= matches no submodule with parameters"


@pytest.mark.parametrize("made", ["at once", "deferred", "placed"])
@pytest.mark.parametrize(
    ("plan", "what", "where"),
    [
        (by_hand("head.wieght"), RULE, "'head.wieght'; closest: head.weight, head.bias"),
        (by_hand(["*.scale", "*.gain"]), RULE, "('*.scale', '*.gain'); "),
        (by_hand(unknown), RULE, "unknown; there are: blocks.0."),
        (ddp() * tensor_parallel({"layers.*.up": Spec("tensor")}, 1), RULE, "'layers.*.up'; "),
        (fsdp() * tensor_parallel({"head.weight": Spec("tensor"), "haed.bias": Spec()}, 1), RULE, "'haed.bias'; "),
        (fsdp(units=["blocks.*", "encoder.*"]), UNIT, "'encoder.*'; "),
        (fsdp(units="block.0"), UNIT, "'block.0'; closest: blocks.0"),
    ],
)
def test_what_matches_nothing_is_refused(plan, what, where, made):
    calls = {
        "at once": lambda: ps.init(model, TX, plan=plan),
        "deferred": lambda: ps.init(model, TX, plan=plan, deferred=True),
        "placed": lambda: plan.place(ps.init(model, TX)),
    }
    with pytest.raises(ConfigError) as error:
        calls[made]()
    assert str(error.value).startswith(f"{what}\n  where:   {where}")


@pytest.mark.parametrize(
    "plan",
    [
        ddp(),
        fsdp(units=()),
        fsdp(units=["blocks.*", "head"]),
        by_hand(["*.scale", "*.bias"]),  # one of several is enough: models without biases are common
        fsdp() * tensor_parallel({"head.*": Spec("tensor"), "blocks.0.weight": Spec(None, "tensor")}, 1),
    ],
)
def test_what_matches_passes(plan):
    state = ps.init(model, TX, plan=plan)
    assert plan.place({"generator": state, "other": state})["generator"].params.keys() == state.params.keys()


def test_a_rule_for_one_of_several_states_and_bare_trees_pass():
    plan = by_hand("head.weight")
    two = (ps.init(model, TX), ps.init(lambda: nn.Linear(2, 2), TX))
    assert plan.place(two)[1].params["weight"].shape == (2, 2)
    assert plan.place({"ema": {"weight": two[1].params["weight"]}})
