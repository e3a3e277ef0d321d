"""What is known of a step: of those that purestep makes, and of those that a user puts a function around."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, StepError
from purestep.jit import Jit, JitStep
from purestep.jit.donated import Donating
from purestep.loop.identity import Identity
from purestep.preflight.fit_memory import choose_microbatches
from purestep.preflight.single_process import lone
from purestep.sharding import ddp
from purestep.step_protocol import StepFacts, facts_of

PACKAGE = Path(ps.__file__).parent
TX = ps.optim.adamw(1e-2)
IMAGES = [{"x": torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(i))} for i in range(3)]
FLAT = [{"x": batch["x"].flatten(1)} for batch in IMAGES]


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


def made(**options):
    return ps.make_step(loss_fn, TX, **options)


def state():
    return ps.init(lambda: nn.Linear(6, 1), TX, seed=0)


def flat(step, state, batch):
    return step(state, {"x": batch["x"].flatten(1)})


def decorated(step):
    @functools.wraps(step)
    def flat_step(state, batch):
        return step(state, {"x": batch["x"].flatten(1)})

    return flat_step


def fitted(step, data, **options):
    return ps.fit(step, state(), data, until=ps.steps(len(data)), **options)


# --- opaque functions -------------------------------------------------------------------------------------------------


def test_a_decorated_step_is_checked_and_run_as_itself():
    """The step inside takes flat samples only: to run it instead of its decoration is an error, or other training."""
    step = made()
    assert ps.digest(fitted(decorated(step), IMAGES).state) == ps.digest(fitted(step, FLAT).state)
    with pytest.raises(StepError, match="the first batch does not fit the model"):
        fitted(step, IMAGES)


def test_the_first_batch_of_a_decorated_step_is_still_checked():
    with pytest.raises(StepError, match="the first batch does not fit the model"):
        fitted(decorated(made()), [{"x": torch.ones(4, 5, 3)}])


@pytest.mark.parametrize(
    "step",
    [made(microbatches="auto"), made(plan=ddp()), ps.donate(made()), ps.jit(made(), backend="eager", donate=True)],
    ids=["auto", "plan", "donating", "compiled"],
)
def test_attributes_that_a_decorator_copies_are_no_facts(step):
    function = decorated(step)
    assert facts_of(function) == StepFacts()
    assert facts_of(step) != StepFacts()
    alone = lone(function, state(), IMAGES[0])
    assert alone is not None
    assert alone.step is function


def test_auto_microbatches_inside_of_a_function_are_an_error_that_says_how():
    step = made(microbatches="auto")
    with pytest.raises(ConfigError, match=r"ps\.wrap_step\(step, function\)"):
        fitted(decorated(step), IMAGES)
    with pytest.raises(ConfigError, match="this step has no number of microbatches") as caught:
        choose_microbatches(decorated(step), state(), IMAGES[0])
    assert "ps.wrap_step(step, function)" in str(caught.value)


def test_a_function_around_a_compiled_step_compiles_it_once():
    """The dry run runs the function, and so the compiled step, on tensors without memory."""
    step = ps.jit(made(), backend="eager")
    fitted(decorated(step), IMAGES)
    assert step.retraces == ()


# --- what each kind of step answers -----------------------------------------------------------------------------------


def kinds():
    one, several = made(), made(microbatches=2)
    return {
        "made": (one, 1, False, None),
        "several": (several, 2, False, None),
        "donating": (ps.donate(several), 2, True, None),
        "compiled": (ps.jit(one, backend="eager"), 1, False, "eager"),
        "compiled in pieces": (ps.jit(several, backend="eager", donate=True), 2, True, "eager"),
    }


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", kinds())
def test_facts(name, around):
    step, microbatches, donate, backend = kinds()[name]
    facts = facts_of(ps.wrap_step(step, flat) if around else step)
    assert (facts.loss_fn, facts.tx, facts.policy, facts.plan) == (loss_fn, TX, None, None)
    assert (facts.microbatches, facts.donate, facts.backend, facts.evaluates) == (microbatches, donate, backend, False)
    assert (facts.gradients is None) == around  # the function may hand the step another batch


def test_the_facts_of_a_plan_and_of_evaluations():
    plan = ddp()
    policy = ps.precision.policy("bf16-mixed")
    facts = facts_of(made(plan=plan, policy=policy))
    assert (facts.plan, facts.microbatches, facts.policy) == (plan, plan.replicas, policy)
    evaluate = ps.make_eval(loss_fn)
    for step in (evaluate, ps.jit(evaluate, backend="eager"), ps.wrap_step(evaluate, flat)):
        assert facts_of(step).evaluates
        assert facts_of(step).microbatches is None


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", kinds())
def test_another_number_of_microbatches_keeps_the_rest(name, around):
    step = kinds()[name][0]
    chosen = ps.wrap_step(step, flat) if around else step
    for count in (1, 2, 4):
        other = chosen.with_microbatches(count)
        expected = dataclasses_like(facts_of(chosen), count)
        assert dataclasses_like(facts_of(other), count) == expected
        assert facts_of(other).microbatches == count
        inner = other.step if around else other
        if not isinstance(step, Donating):
            assert isinstance(inner, (Jit, JitStep)) == isinstance(step, (Jit, JitStep))
        bare = facts_of(chosen.bare(count))
        assert (bare.microbatches, bare.donate, bare.backend) == (count, False, None)


def dataclasses_like(facts, count):
    return facts.tx, facts.loss_fn, facts.policy, facts.donate, facts.backend, count


# --- wrap_step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"donate": True}], ids=["kept", "donated"])
@pytest.mark.parametrize("name", ["made", "several", "compiled", "compiled in pieces"])
def test_a_wrapped_step_trains_with_the_bits_of_the_step(name, options):
    step = kinds()[name][0]
    if options and facts_of(step).backend is not None:
        options = {}
    expected = ps.digest(fitted(step, FLAT).state)
    assert ps.digest(fitted(ps.wrap_step(step, flat), IMAGES, **options).state) == expected


def test_the_first_batch_settles_the_microbatches_of_a_wrapped_step(monkeypatch):
    from purestep.preflight import memory

    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    seen = []

    def around(step, state, batch):
        if not state.step.is_meta:
            seen.append(facts_of(step).microbatches)
        return flat(step, state, batch)

    step = ps.wrap_step(made(microbatches="auto"), around)
    with pytest.raises(ConfigError, match="no number of microbatches makes the step fit in memory"):
        fitted(step, IMAGES)
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    result = fitted(step, IMAGES)
    assert seen == [1, 1, 1]
    assert ps.digest(result.state) == ps.digest(fitted(made(), FLAT).state)


def test_the_estimate_is_that_of_the_wrapped_step():
    """The batch as the function gets it is another than that of the step; what the step keeps of it is the same."""
    tx = ps.optim.sgd(0.1)

    def wide_loss(net, batch):
        return net(batch["x"]).square().mean()

    step = ps.make_step(wide_loss, tx, microbatches="auto")
    first = ps.init(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), tx)
    images = {"x": torch.ones(512, 2, 3)}

    def chosen(step, batch):
        return [choose_microbatches(step, first, batch, free=free) for free in range(6000, 60000, 4000)]

    expected = chosen(step, {"x": images["x"].flatten(1)})
    assert len(set(expected)) > 2
    assert chosen(ps.wrap_step(step, flat), images) == expected


def test_a_wrapped_evaluation():
    evaluate = ps.callbacks.evaluate(ps.wrap_step(ps.make_eval(loss_fn), flat), IMAGES, every=ps.every.steps(3))
    plain = ps.callbacks.evaluate(loss_fn, FLAT, every=ps.every.steps(3))
    rows = [fitted(made(), FLAT, callbacks=[callback]).metrics["val/loss"] for callback in (evaluate, plain)]
    assert rows[0] == rows[1]


def test_a_function_around_an_evaluation_step_is_taken_for_a_loss_function_and_told():
    callback = ps.callbacks.evaluate(decorated(ps.make_eval(loss_fn)), IMAGES, every=ps.every.steps(1))
    with pytest.raises(StepError, match=r"holds no model to bind[\s\S]*ps\.wrap_step\(step, function\), if a function"):
        fitted(made(), FLAT, callbacks=[callback])


def test_what_goes_around_a_step_is_part_of_the_identity_of_a_run():
    def other(step, state, batch):
        return step(state, {"x": batch["x"].flatten(1) * 2})

    step = made()
    plain = [Identity(ps.data.as_source([1]), each, ()).plain["step"] for each in (step, ps.donate(step))]
    assert plain[0] == plain[1] == Identity(ps.data.as_source([1]), ps.jit(step, backend="eager"), ()).plain["step"]
    wrapped = [Identity(ps.data.as_source([1]), ps.wrap_step(step, f), ()).plain["step"] for f in (flat, other)]
    assert wrapped[0] != wrapped[1]
    assert plain[0] not in wrapped


def test_what_wrap_step_and_jit_refuse():
    with pytest.raises(ConfigError, match=r"takes the step, a state and a batch\n  where:   <lambda>\(state, batch\)"):
        ps.wrap_step(made(), lambda state, batch: (state, {}))
    for step in (made(microbatches=2), made(microbatches="auto"), made(plan=ddp())):
        with pytest.raises(ConfigError, match=r"ps\.wrap_step\(ps\.jit\(step\), function\)"):
            ps.jit(ps.wrap_step(step, flat))
    one = ps.jit(ps.wrap_step(made(), flat), backend="eager")
    assert ps.digest(one(state(), IMAGES[0])) == ps.digest(made()(state(), FLAT[0]))
    with pytest.raises(ConfigError, match="made a donating one when it is compiled"):
        ps.donate(ps.wrap_step(ps.jit(made(), backend="eager"), flat))
    donating = ps.wrap_step(ps.donate(made()), flat)
    assert ps.donate(donating) is donating
    assert repr(donating) == f"wrap_step({donating.step!r}, flat)"


def test_no_file_asks_a_step_for_what_it_wraps():
    """`__wrapped__` says what a function was made of, and not what it does."""
    describes = {"loop/stable_json.py", "optim/schedules/torch_lr.py", "step_protocol.py"}
    found = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if re.search("__wrapped__", f.read_text())}
    assert found == describes
