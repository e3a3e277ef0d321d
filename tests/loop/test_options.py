"""The arguments of a run are declared once: `fit` and `run` show them, and say what is wrong with them."""

import dataclasses
import gc
import inspect
import pydoc
import types
import typing

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.loop.options import RunArguments, RunOptions

TX = ps.optim.sgd(0.1)


def arguments():
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), TX)
    return step, ps.init(lambda: nn.Linear(2, 1), TX), [torch.ones(2, 2)] * 3


@pytest.mark.parametrize(("function", "result"), [(ps.fit, "Result"), (ps.run, "Run")])
def test_the_signature_is_that_of_the_dataclass(function, result):
    found = inspect.signature(function)
    assert list(found.parameters) == list(inspect.signature(RunArguments).parameters)
    assert found.return_annotation.__name__ == result
    options = {f.name: f for f in dataclasses.fields(RunOptions)}
    assert [n for n, p in found.parameters.items() if p.kind is p.KEYWORD_ONLY] == list(options)
    for name, field in options.items():
        default = found.parameters[name].default
        assert default is (inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default)
    assert typing.get_type_hints(function)["until"] is ps.loop.cadence.Until
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert "grace_seconds: float | None = None" in text


def test_fit_says_what_each_of_its_arguments_means():
    described = [line.split(":")[0].strip() for line in ps.fit.__doc__.splitlines() if line.startswith("        ")]
    assert [name for name in inspect.signature(ps.fit).parameters if name not in described] == []


@pytest.mark.parametrize("function", [ps.fit, ps.run])
def test_an_unknown_name_is_told_with_the_nearest(function):
    with pytest.raises(ConfigError) as caught:
        function(*arguments(), until=ps.steps(1), rundir="runs/a")
    message = str(caught.value)
    assert message.startswith(f"{function.__name__} has no argument rundir\n  where:   rundir='runs/a'")
    assert message.endswith("instead: run_dir='runs/a'")
    with pytest.raises(ConfigError, match="fit has no argument gpus") as caught:
        ps.fit(*arguments(), until=ps.steps(1), gpus=8)
    assert "it takes step, state, train, until, callbacks" in str(caught.value)
    assert "instead" not in str(caught.value)


def test_missing_and_doubled_arguments_are_pythons_errors():
    with pytest.raises(TypeError, match=r"fit\(\) missing a required argument: 'until'"):
        ps.fit(*arguments())
    with pytest.raises(TypeError, match=r"run\(\) multiple values for argument 'step'"):
        ps.run(*arguments(), step=arguments()[0], until=ps.steps(1))
    with pytest.raises(TypeError, match=r"fit\(\) too many positional arguments"):
        ps.fit(*arguments(), ps.steps(1))


def test_arguments_may_be_named():
    step, state, train = arguments()
    assert ps.fit(train=train, state=state, step=step, until=ps.steps(2)).reason == "reached 2 steps"


@pytest.mark.parametrize("changes", [{"strict": 1}, {"resume": "yes"}, {"grace_seconds": -1}, {"run_dir": ""}])
def test_options_are_checked_where_they_are_made(changes):
    with pytest.raises(ConfigError):
        RunOptions(until=ps.steps(1), **changes)


def test_a_run_does_not_keep_the_state_that_it_was_given():
    step, state, train = arguments()
    given = state.params["weight"]
    run = ps.run(step, state, train, until=ps.steps(2))
    for event in run:
        if isinstance(event, ps.loop.StepsDone):
            break
    del state
    gc.collect()
    assert [holder for holder in gc.get_referrers(given) if not isinstance(holder, types.FrameType)] == []
