"""Kernels that share a file are the same functions, and what cannot share one is compiled alone."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from purestep.jit import compile_units
from purestep.jit.redirection import Redirection

INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>\n"


def source(body, extra=""):
    return f'\n{INCLUDE}{extra}extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0)\n{{\n    {body}\n}}\n'


TYPES = ["const float*", "float*"]


class Alone:
    """What Inductor would return for a kernel of its own."""

    def __init__(self, name, asked):
        self.name, self.asked = name, asked

    def __call__(self):
        self.asked.append(self.name)
        return self

    def result(self):
        return self.name


@pytest.mark.slow
def test_kernels_of_one_file_are_called_by_their_own_names():
    batch, asked = compile_units.Batch(1), []
    bodies = ("out_ptr0[0] = in_ptr0[0] + 1;", "out_ptr0[0] = in_ptr0[0] * 3;")
    futures = [batch.add(TYPES, source(body), None, Alone(body, asked)) for body in bodies]
    given, found = torch.tensor([5.0]), torch.zeros(1)
    for future, expected in zip(futures, (6.0, 15.0), strict=True):
        future.result()(given, found)
        assert float(found) == expected
    assert asked == []
    with pytest.raises(RuntimeError, match="requires 2 args"):
        futures[0].result()(given)


def test_what_cannot_share_a_file_is_recognised():
    assert compile_units.fits(source("out_ptr0[0] = 1;"))
    assert compile_units.fits(source("#pragma omp simd"))
    assert not compile_units.fits(source("out_ptr0[0] = 1;", extra="#define STEP 2\n"))
    assert not compile_units.fits(source("out_ptr0[0] = 1;") + source("out_ptr0[0] = 2;"))
    assert not compile_units.fits("nothing that looks like a kernel")


def test_kernels_are_distributed_alike_whatever_their_order():
    kernels = [compile_units.Kernel(None, TYPES, source("x;" * n), None, None) for n in (1, 9, 4, 4, 30, 2, 17)]
    seen = set()
    for order in itertools.islice(itertools.permutations(kernels), 0, 5040, 37):
        groups = compile_units._groups(list(order), 3)
        assert sorted(k.source for g in groups for k in g) == sorted(k.source for k in kernels)
        seen.add(tuple(tuple(k.source for k in g) for g in groups))
    assert len(seen) == 1


def merged_by(monkeypatch, load):
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", load)
    batch, asked = compile_units.Batch(2), []
    made = [batch.add(TYPES, source(f"out_ptr0[0] = {i};"), None, Alone(i, asked)) for i in range(5)]
    return [future.result() for future in made], asked


def test_a_file_that_does_not_compile_is_given_up(monkeypatch):
    def load(code, device, submit_fn=None):
        def refused():
            raise RuntimeError("C++ compile error")

        return refused

    found, asked = merged_by(monkeypatch, load)
    assert found == list(range(5)) == sorted(asked)


def test_an_inductor_of_other_insides_is_left_alone(monkeypatch):
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    monkeypatch.setattr(CppPythonBindingsCodeCache, "suffix_template", "something new")
    found, asked = merged_by(monkeypatch, None)
    assert found == list(range(5)) == sorted(asked)


def test_one_kernel_keeps_its_file():
    batch, asked = compile_units.Batch(2), []
    assert batch.add(TYPES, source("x;"), None, Alone(0, asked)).result() == 0
    assert asked == [0]


@pytest.mark.parametrize(("length", "files"), [(10, 1), (70_000, 2), (400_000, 3)])
def test_there_are_more_files_the_longer_the_kernels_are(monkeypatch, length, files):
    found = []
    monkeypatch.setattr(compile_units, "_start", lambda group, parts: found.append(group))
    batch = compile_units.Batch(3)
    for i in range(4):
        batch.add(TYPES, source(f"out_ptr0[0] = {i};" + " " * length), None, Alone(i, []))
    batch.start()
    assert len(found) == files


def test_one_file_holds_all_kernels_and_each_include_once():
    kernels = [compile_units.Kernel(None, TYPES, source(f"out_ptr0[0] = {i};"), None, None) for i in range(3)]
    text = compile_units._merged(kernels, compile_units._binding_parts())
    assert text.count(INCLUDE.strip()) == 1
    assert all(f"void  kernel{i}(" in text and f'{{"kernel{i}", kernel{i}_py' in text for i in range(3))
    assert "PyInit_kernel(void)" in text


class Compiler:
    def cpp_pybinding(self, argtypes, source_code):
        return Alone("alone", [])

    submit = None


def redirected(cls, redirection=None):
    redirection = redirection or Redirection("cpp_pybinding", compile_units._collected)
    return redirection.redirected(cls, compile_units.Batch(2))


def test_other_threads_keep_inductors_way():
    found = []
    with redirected(Compiler):
        elsewhere = threading.Thread(target=lambda: found.append(Compiler().cpp_pybinding(TYPES, source("x;"))))
        elsewhere.start()
        elsewhere.join()
        assert isinstance(found[0], Alone)
        future = Compiler().cpp_pybinding(TYPES, source("x;"))
        assert not isinstance(future, Alone)
    assert future.result() == "alone"


def test_inductor_is_as_it_was_after_the_last_compilation_that_shares_the_change():
    redirection, before = Redirection("cpp_pybinding", compile_units._collected), Compiler.cpp_pybinding
    first, second = redirected(Compiler, redirection), redirected(Compiler, redirection)
    first.__enter__()
    second.__enter__()  # another thread, that is
    first.__exit__(None, None, None)
    assert Compiler.cpp_pybinding is not before
    second.__exit__(KeyError, KeyError(), None)
    assert Compiler.cpp_pybinding is before


def test_a_change_that_somebody_else_made_meanwhile_stays(monkeypatch):
    def theirs(self, argtypes, source_code):
        return "theirs"

    monkeypatch.setattr(Compiler, "cpp_pybinding", Compiler.cpp_pybinding)  # to put back afterwards
    with redirected(Compiler):
        Compiler.cpp_pybinding = theirs
    assert Compiler.cpp_pybinding is theirs


def test_an_inductor_without_the_function_compiles_as_it_does():
    class Other:
        pass

    with redirected(Other):
        assert vars(Other).get("cpp_pybinding") is None


def test_compiling_a_step_leaves_no_change_behind():
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    before = AsyncCompile.cpp_pybinding
    with compile_units.together():
        inside = AsyncCompile.cpp_pybinding
    assert AsyncCompile.cpp_pybinding is before
    assert (inside is not before) == (get_compile_threads() > 1)
