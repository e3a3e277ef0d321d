"""Inductor's tests of the C++ compiler are skipped while a step is compiled, and can be made up for."""

from __future__ import annotations

import threading

from purestep.jit import instruction_sets


def isa(monkeypatch, answers):
    from torch._inductor.cpu_vec_isa import VecISA, supported_vec_isa_list

    monkeypatch.setattr(VecISA, "check_build", lambda self, code: answers.append(code) or False)
    return next(iter(supported_vec_isa_list))


def test_the_compiler_is_not_tested_while_a_step_is_compiled(monkeypatch):
    asked = []
    found = isa(monkeypatch, asked)
    instruction_sets.forget()
    with instruction_sets.trusted():
        assert found.check_build("code") is True
        assert bool(found) in (True, False)  # the processor decides, the compiler is not asked
        elsewhere = threading.Thread(target=lambda: asked.append(found.check_build("another thread")))
        elsewhere.start()
        elsewhere.join()
    assert asked == ["another thread", False]
    assert found.check_build("after") is False
    instruction_sets.forget()


def test_what_was_taken_for_granted_is_forgotten(monkeypatch):
    asked = []
    found = isa(monkeypatch, asked)
    instruction_sets.forget()
    with instruction_sets.trusted():
        bool(found)
    found._is_some_set_supported = True
    instruction_sets.forget()
    assert not hasattr(found, "_is_some_set_supported")
    assert not found  # the compiler is asked now, and says no
    assert asked
    instruction_sets.forget()
