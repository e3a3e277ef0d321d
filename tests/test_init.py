"""What the user types: every name is there, the lazy ones are those that type checkers see."""

import ast
import importlib
import types
from pathlib import Path

import pytest

import purestep as ps


def _names(nodes):
    return {alias.asname for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname}


@pytest.mark.parametrize("package", ["purestep", "purestep.optim"])
def test_every_listed_name_is_there_and_what_it_is_said_to_be(package):
    module = importlib.import_module(package)
    body = ast.parse(Path(module.__file__).read_text()).body
    (typed,) = (node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert _names(typed.body)
    assert not _names(typed.body) & _names(body)
    for name in _names(typed.body) | _names(body):
        assert name in dir(module)
        value = getattr(module, name)
        assert value is not None
        if package == "purestep.optim":
            assert not isinstance(value, types.ModuleType), name


def test_the_rooms_around_a_step_are_imported_when_first_used(bare):
    seen = "assert ('purestep.loop' in sys.modules) is"
    script = f"import sys, purestep as ps; {seen} False; ps.fit; {seen} True"
    assert bare.run(script).returncode == 0


@pytest.mark.parametrize("module", [ps, ps.optim])
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        module.Trainer  # noqa: B018
