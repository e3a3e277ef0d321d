"""`import purestep` stays light: what it must not load, and proof that this test would notice."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import weakref

import pytest

from purestep._lazy import Lasting

# Modules that nothing may load before it is used. A dotted name forbids only that part of its package.
FORBIDDEN = (
    "grain jax jaxlib matplotlib mlflow optax orbax pandas pyarrow rich scipy sklearn tensorboard tensorstore "
    "torchdata torchmetrics wandb torch._dynamo torch._inductor torch.utils.tensorboard IPython hypothesis pytest"
).split()


def loaded_by(bare, code: str) -> list[str]:
    """The forbidden modules that an interpreter holds after running the code, beyond those of torch alone."""
    script = f"""
import json, sys, warnings
before = set(sys.modules)
warnings.simplefilter("error")
{code}
names = {FORBIDDEN!r}
print(json.dumps([n for n in names if n in sys.modules and n not in before]))
"""
    run = bare.run(script)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_purestep_and_its_rooms_loads_no_extra(bare):
    assert loaded_by(bare, "import purestep, purestep.loggers, purestep.display, purestep.display.notebook") == []


def test_values_that_name_an_extra_do_not_load_it(bare):
    code = "from purestep import loggers; loggers.tensorboard(); loggers.wandb(project='p'); loggers.mlflow()"
    assert loaded_by(bare, code) == []


@pytest.mark.slow
def test_this_test_can_fail(bare):
    found = loaded_by(bare, "import purestep, rich, torch._dynamo")
    assert {"rich", "torch._dynamo"} <= set(found)


def test_torch_alone_loads_nothing_forbidden(bare):
    """Otherwise the comparison with `before` would hide it."""
    script = f"import sys, numpy, torch; sys.exit(', '.join(n for n in {FORBIDDEN!r} if n in sys.modules))"
    assert bare.run(script).stderr.strip() == ""


def test_a_package_offers_functions_and_modules_of_others_lazily(tmp_path, monkeypatch):
    offered = "from typing import TYPE_CHECKING\nfrom purestep._lazy import attach\nif TYPE_CHECKING:\n"
    for path, text in {
        "lazy_top/__init__.py": offered
        + "    from lazy_top import own as own\n"
        + "    from lazy_top.inner import far as far\n"
        + "    from lazy_top.inner.far import value as renamed\n"
        + "__getattr__, __dir__ = attach(__name__)\n",
        "lazy_top/own.py": "import gc\ncollected = gc.isenabled()",
        "lazy_top/inner/__init__.py": "",
        "lazy_top/inner/far.py": "value = 3",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    top = importlib.import_module("lazy_top")
    assert "lazy_top.own" not in sys.modules
    assert "lazy_top.inner" not in sys.modules
    assert gc.isenabled()
    assert not top.own.collected  # while it was loaded: a collection would look at all that torch has made
    assert gc.isenabled()
    gc.disable()
    try:
        assert top.far.__name__ == "lazy_top.inner.far"
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert (top.own.__name__, top.far.__name__, top.renamed) == ("lazy_top.own", "lazy_top.inner.far", 3)
    assert {"own", "far", "renamed"} <= set(dir(top))
    with pytest.raises(AttributeError, match="module 'lazy_top' has no attribute 'other'"):
        _ = top.other


class Node:
    """An object that a collection takes if it refers to itself."""

    def __init__(self):
        self.me = self


@pytest.mark.parametrize("collecting", [True, False])
def test_what_lasts_is_old_and_what_was_garbage_before_is_collected(collecting):
    gc.collect()
    garbage = weakref.ref(Node())
    if not collecting:
        gc.disable()
    try:
        with Lasting():
            kept = Node()
            assert not gc.isenabled()
        assert gc.isenabled() == collecting
        assert (garbage() is None) == collecting
        # Nothing is moved in a program that collects when it chooses to.
        assert any(x is kept for x in gc.get_objects(generation=2)) == collecting
    finally:
        gc.enable()


def test_what_a_program_has_frozen_stays_so():
    gc.collect()
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with Lasting():
            kept = Node()
        assert gc.get_freeze_count() == before > 0
        assert not any(x is kept for x in gc.get_objects(generation=2))
    finally:
        gc.unfreeze()
