"""The exception family: one base, natural parents, and messages in four parts."""

from __future__ import annotations

import inspect

import pytest

from purestep import errors
from purestep.errors import MissingExtra, PurestepError, explain, import_extra


def test_explain_prints_the_parts_in_order_and_leaves_out_what_is_not_given():
    text = explain("it broke", where="state.params['w']", why="because", instead="x = 1\ny = 2")
    assert text.splitlines() == [
        "it broke",
        "  where:   state.params['w']",
        "  why:     because",
        "  instead: x = 1",
        "           y = 2",
    ]
    assert explain("it broke") == "it broke"
    assert explain("it broke", why="", instead="x") == "it broke\n  instead: x"


def test_every_error_is_a_purestep_error_and_an_ordinary_one():
    family = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert len(family) > 10
    for error in family:
        assert issubclass(error, PurestepError)
        assert error.__doc__
        if error is not PurestepError:
            assert issubclass(error, (ValueError, TypeError, RuntimeError, ImportError)), error


def test_an_extra_is_imported_or_named():
    assert import_extra("json", extra="x", needed_by="y").__name__ == "json"
    with pytest.raises(
        MissingExtra, match=r'loggers\.foo needs the module no_such_\w+(.|\n)*pip install "purestep\[foo\]"'
    ):
        import_extra("no_such_thing", extra="foo", needed_by="loggers.foo")
    with pytest.raises(ImportError):
        import_extra("no_such_thing", extra="foo", needed_by="loggers.foo")
