"""C++ kernels of one graph, compiled a few files at a time instead of each in a file of its own.

Inductor writes one source file for each CPU kernel, and the C++ compiler spends most of its time on the headers.
`together` makes Inductor put short kernels into one file, and longer ones into as many as there are cores. Where
Inductor's code has another form than expected, or the compiler refuses the files, Inductor compiles each kernel by
itself. Only `backends` calls it.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from purestep.jit.redirection import Redirection

_HEAD, _TAIL = "static PyObject* {entry_func}_py(", "static PyMethodDef py_methods[]"
_METHOD = '{{"{entry_func}", {entry_func}_py, METH_VARARGS, ""}},'
_SIGNATURE = re.compile(r'(extern "C"\s+void\s+)kernel(\()')
_INCLUDE = re.compile(r"^\s*#include[^\n]*\n", re.MULTILINE)
_DIRECTIVE = re.compile(r"^\s*#(?!pragma)", re.MULTILINE)
# The compiler takes as long for so many characters of kernels as for the headers, which each file includes.
_FULL = 200_000


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Make this thread's compilations put their C++ kernels into few files, compiled when the block ends."""
    from purestep.jit._inductor import AsyncCompile, get_compile_threads

    if get_compile_threads() <= 1:
        yield
        return
    waiting: list[Callable[[], object]] = []
    with (
        _kernels.redirected(AsyncCompile, Batch(get_compile_threads())),
        _waits.redirected(AsyncCompile, waiting),
    ):
        yield
    for wait in waiting:
        wait()


def _deferred(waiting: list[Callable[[], object]], original: Callable[..., Any], self: Any, scope: Any) -> None:
    waiting.append(lambda: original(self, scope))


def _collected(batch: Batch, original: Callable[..., Any], self: Any, argtypes: list[str], source_code: str) -> Any:
    return batch.add(argtypes, source_code, self.submit, lambda: original(self, argtypes, source_code))


_kernels = Redirection["Batch"]("cpp_pybinding", _collected)
# The module of a compiled graph waits for its kernels as it is imported; kernels of all graphs are compiled together.
_waits = Redirection[list[Callable[[], object]]]("wait", _deferred)


class Batch:
    """The kernels of one graph: collected first, compiled when the first result is needed.

    Args:
        files: the largest number of source files.
    """

    def __init__(self, files: int) -> None:
        self.files = files
        self.kernels: list[Kernel] = []

    def add(self, argtypes: Sequence[str], source: str, submit: Any, alone: Callable[[], Any]) -> Any:
        """Return the future of a kernel."""
        kernel = Kernel(self, list(argtypes), source, submit, alone)
        self.kernels.append(kernel)
        return _future(kernel)

    def start(self) -> None:
        """Start to compile the collected kernels."""
        kernels, self.kernels = self.kernels, []
        try:
            files = min(self.files, 1 + sum(len(k.source) for k in kernels) // _FULL)
            parts = _binding_parts() if len(kernels) > files else None
            fit = [k for k in kernels if parts is not None and fits(k.source)]
            for group in _groups(fit, files):
                _start(group, parts)
        except (AttributeError, LookupError, TypeError, ValueError):
            for kernel in kernels:
                kernel.get = None
        for kernel in kernels:
            if kernel.get is None:
                kernel.get = kernel.alone().result


class Kernel:
    """One kernel, and how to get its Python function."""

    def __init__(self, batch: Batch, argtypes: list[str], source: str, submit: Any, alone: Callable[[], Any]) -> None:
        self.batch, self.argtypes, self.source, self.submit, self.alone = batch, argtypes, source, submit, alone
        self.get: Callable[[], Any] | None = None

    def result(self) -> Any:
        """Compile unless another thread has begun to, wait, and return the function."""
        if self.get is None:
            self.batch.start()
        get: Any = self.get
        return get()


def _future(kernel: Kernel) -> Any:
    from purestep.jit._inductor import LambdaFuture

    return LambdaFuture(kernel.result)


def fits(source: str) -> bool:
    """Tell whether a kernel's source can share a file: one function, and no preprocessor lines but includes."""
    return len(_SIGNATURE.findall(source)) == 1 and not _DIRECTIVE.search(_INCLUDE.sub("", source))


def _binding_parts() -> tuple[str, str, str] | None:
    """Split Inductor's template of Python bindings into the head, the wrapper of one kernel, and the module."""
    from purestep.jit._inductor import CppCache

    template = getattr(CppCache, "suffix_template", "")
    if any(template.count(mark) != 1 for mark in (_HEAD, _TAIL, _METHOD)):
        return None
    start, end = template.index(_HEAD), template.index(_TAIL)
    return template[:start], template[start:end], template[end:]


def _groups(kernels: list[Kernel], files: int) -> list[list[Kernel]]:
    """Distribute kernels over files of about the same length, the same way every time."""
    groups: list[list[Kernel]] = [[] for _ in range(min(files, len(kernels)))]
    lengths = [0] * len(groups)
    for kernel in sorted(kernels, key=lambda k: (-len(k.source), k.source)):
        at = lengths.index(min(lengths))
        groups[at].append(kernel)
        lengths[at] += len(kernel.source)
    return groups


def _start(group: list[Kernel], parts: Any) -> None:
    from purestep.jit._inductor import CppCache

    waiting = CppCache.load_async(_merged(group, parts), "cpu", submit_fn=group[0].submit)
    lock = threading.Lock()
    found: dict[str, Any] = {}

    def module() -> Any:
        with lock:
            if not found:
                try:
                    found["module"] = waiting()
                except Exception:
                    # Each kernel is then compiled alone, which either works or fails with Inductor's own message.
                    found["module"] = None
            return found["module"]

    def getter(kernel: Kernel, name: str) -> Callable[[], Any]:
        def get() -> Any:
            loaded = module()
            return kernel.alone().result() if loaded is None else getattr(loaded, name)

        return get

    for i, kernel in enumerate(group):
        kernel.get = getter(kernel, f"kernel{i}")


def _merged(group: list[Kernel], parts: tuple[str, str, str]) -> str:
    """Write one file: each kernel in a namespace under a name of its own, the bindings of all, one module."""
    before, wrapper, after = parts
    includes = dict.fromkeys(line.strip() for k in group for line in _INCLUDE.findall(k.source))
    bodies, wrappers, methods = [], [], []
    for i, kernel in enumerate(group):
        name = f"kernel{i}"
        body = _SIGNATURE.sub(rf"\g<1>{name}\g<2>", _INCLUDE.sub("", kernel.source))
        bodies.append(f"namespace file{i} {{\n{body}\n}}\nusing file{i}::{name};\n")
        types = (t.replace("const ", "") for t in kernel.argtypes)
        given = ", ".join(f"parse_arg<{t}>(args, {n})" for n, t in enumerate(types))
        call = f"{name}({given}); Py_RETURN_NONE;"
        wrappers.append(wrapper.format(entry_func=name, arg_len=len(kernel.argtypes), call_entry_func=call))
        methods.append(_METHOD.format(entry_func=name))
    bindings = before.format(entry_func="kernel", extra_parse_arg="")
    module = after.replace(_METHOD, "@methods@").format(entry_func="kernel").replace("@methods@", "\n".join(methods))
    return "\n".join([*includes, *bodies, bindings, *wrappers, module])
