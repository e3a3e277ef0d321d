"""Compiled graphs on disk: a new process that traces the same step runs what an earlier one compiled.

Inductor has such a cache too, but reading it imports most of Inductor. This cache stores the generated function and its
kernels, which need torch alone. A graph with anything unusual in it is not stored, and is compiled every time.
"""

from __future__ import annotations

import ast
import builtins
import cmath
import contextlib
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purestep import _torch
from purestep.jit._torch import inductor_cache_dir, inductor_config, pointer_function
from purestep.jit.layouts import laid_out
from purestep.jit.temporaries import temporaries
from purestep.jit.trace import Traced
from purestep.random.philox import philox

Run = Callable[[list[Tensor]], Sequence[Any]]

_FORMAT = 1
_POINTER = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # where a kernel's bindings look for torch's accessor
_HERE = Path(__file__).parent
_PHILOX = Path(inspect.getfile(philox))
# Functions besides torch's operators that a graph may call; their code is part of the key.
_KNOWN = (philox, laid_out)


# --- the name of a graph ----------------------------------------------------------------------------------------------


def is_used(backend: str) -> bool:
    """Tell whether what a backend compiles is stored at all."""
    config = inductor_config()
    return backend == "inductor" and not config.force_disable_caches and bool(config.fx_graph_cache)


def key(traced: Traced, mode: str | None) -> str | None:
    """Return the name of a graph in the disk cache: a digest of everything that its compiled form depends on.

    None for graphs that are not stored: graphs with constant tensors, or with tensors on another device than the CPU.
    """
    if not is_used("inductor"):
        return None
    lines = [repr(_machine()), repr(mode), repr(_settings()), inductor_config().get_hash().hex()]
    for node in traced.graph.graph.nodes:
        target = node.target
        if node.op == "call_function":
            known = target in _KNOWN or getattr(target, "__module__", "") == "_operator"
            if not isinstance(target, _torch.OpOverload) and not known:
                return None
        elif node.op not in ("placeholder", "output"):
            return None
        kinds = [_kind(x) for x in _tensors(node.meta.get("val"))]
        if any(kind is None for kind in kinds):
            return None
        lines.append(f"{node.op} {node.name} {_named(target)} {node.args} {node.kwargs} {kinds}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _named(target: Any) -> str:
    """Return the name of what a node calls, without addresses."""
    return str(getattr(target, "__qualname__", target)) if target in _KNOWN else str(target)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _kind(x: Tensor) -> tuple[Any, ...] | None:
    if x.device.type != "cpu" or x.layout != torch.strided:
        return None
    return tuple(x.shape), x.stride(), x.dtype, x.storage_offset()


def _settings() -> tuple[Any, ...]:
    """Return the settings of the process that generated kernels depend on."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        bool(torch.backends.mkldnn.enabled),
        {k: v for k, v in sorted(os.environ.items()) if k.startswith(("TORCHINDUCTOR_", "ATEN_CPU", "CXX", "OMP_NUM"))},
    )


@functools.cache
def _machine() -> tuple[Any, ...]:
    """Return the facts that are fixed for the process: versions, the processor, and the code that makes graphs."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        with open("/proc/cpuinfo") as lines:
            model = "".join(sorted({line for line in lines if line.startswith(wanted)}))
    own = hashlib.sha256(b"".join(p.read_bytes() for p in (*sorted(_HERE.glob("*.py")), _PHILOX))).hexdigest()
    return (
        _FORMAT,
        torch.__version__,
        torch.version.git_version,
        sys.version,
        torch.backends.cpu.get_cpu_capability(),
        model,
        own,
    )


# --- read and write ---------------------------------------------------------------------------------------------------


def take(name: str) -> Run | None:
    """Return the compiled graph of a name, or None if it is missing or damaged."""
    folder = _folder(name)
    try:
        if os.name == "posix" and folder.stat().st_uid != os.getuid():
            return None
        kept = Kept(**json.loads((folder / "kept.json").read_text()))
        for file, digest in kept.files.items():
            if hashlib.sha256((folder / file).read_bytes()).hexdigest() != digest:
                return None
        return kept.load(folder)
    except (OSError, ValueError, TypeError, AttributeError, ImportError, SyntaxError):
        return None


def put(name: str, call: Any) -> None:
    """Store a compiled graph, unless it holds something that cannot be stored."""
    found = written(call)
    if found is None:
        return
    kept, files = found
    folder = _folder(name)
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            for file, source in files.items():
                shutil.copyfile(source, made / file)
            kept.files = {file: hashlib.sha256((made / file).read_bytes()).hexdigest() for file in files}
            (made / "kept.json").write_text(json.dumps(dataclasses.asdict(kept)))
            os.rename(made, folder)  # fails where another process was first
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _folder(name: str) -> Path:
    return Path(inductor_cache_dir()) / "purestep" / name[:2] / name


@dataclasses.dataclass
class Kept:
    """A compiled graph as it is stored.

    Attributes:
        source: the Python code that Inductor generated around the kernels, without its imports and its tests.
        kernels: `[file, function]` of each kernel, by the name under which the source calls it.
        extern: names of functions of torch that the source calls as `extern_kernels`.
        files: digests of the shared objects.
    """

    source: str
    kernels: dict[str, list[str]]
    extern: list[str]
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def load(self, folder: Path) -> Run:
        """Load the kernels, and return the function."""
        modules = {file: _module(folder / file) for file in self.files}
        names = _namespace(self.extern)
        names |= {name: getattr(modules[file], function) for name, (file, function) in self.kernels.items()}
        exec(compile(self.source, f"<{folder.name}>", "exec"), names)
        names["empty_strided_cpu"] = temporaries
        return names["call"]


def _module(path: Path) -> types.ModuleType:
    os.environ[_POINTER] = str(pointer_function())
    # The last part is the name of the function that Python looks for in the file.
    spec = importlib.util.spec_from_file_location(f"purestep_{path.parent.name}_{path.stem}.kernel", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _namespace(extern: Sequence[str]) -> dict[str, Any]:
    """Return the globals in which the source of a compiled graph runs."""
    kernels = types.SimpleNamespace(**{name: getattr(torch, name) for name in extern})
    return {
        "torch": torch,
        "math": math,
        "inf": math.inf,
        "nan": math.nan,
        "nanj": cmath.nanj,
        "device": torch.device,
        "empty_strided": torch.empty_strided,
        "extern_kernels": kernels,
    }


# --- from what Inductor generated -------------------------------------------------------------------------------------


def written(call: Any) -> tuple[Kept, dict[str, str]] | None:
    """Return a compiled graph as it is stored, and its files by name; None if something in it cannot be stored.

    Args:
        call: the function of Inductor's module.
    """
    function = inspect.unwrap(getattr(call, "__func__", call))
    module = getattr(function, "__globals__", {})
    try:
        tree = ast.parse(Path(module["__file__"]).read_text())
    except (KeyError, OSError, SyntaxError):
        return None
    body = [node for node in tree.body if _needed(node)]
    source = ast.unparse(ast.Module(body, []))
    kernels, files = _kernels(module)
    extern = _attributes(body, "extern_kernels")
    known = _namespace([]).keys() | kernels.keys() | _defined(body) | set(dir(builtins))
    asked = _asked(source)
    if not asked <= known or not all(_is_torch(module, name) for name in extern):
        return None
    used = {name: at for name, at in kernels.items() if name in asked}
    wanted = {file: path for file, path in files.items() if any(at[0] == file for at in used.values())}
    return Kept(source, used, sorted(extern)), wanted


def _needed(node: ast.stmt) -> bool:
    if isinstance(node, ast.ClassDef):
        return True
    if isinstance(node, ast.FunctionDef):
        return node.name == "call"
    if not isinstance(node, ast.Assign):
        return False
    return not any(isinstance(x, ast.Name) and x.id in ("async_compile", "AsyncCompile") for x in ast.walk(node))


def _defined(body: Sequence[ast.stmt]) -> set[str]:
    names = {node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    return names | {
        x.id for node in body if isinstance(node, ast.Assign) for x in node.targets if isinstance(x, ast.Name)
    }


def _kernels(module: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the kernels in a module, `[file, function]` by name, and the paths of the files."""
    kernels: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for name, value in module.items():
        home = getattr(value, "__self__", None)
        path = getattr(home, "__file__", None)
        if isinstance(value, types.BuiltinFunctionType) and isinstance(home, types.ModuleType) and path:
            file = next((f for f, p in files.items() if p == path), f"{len(files)}.so")
            files[file] = path
            kernels[name] = [file, value.__name__]
    return kernels, files


def _attributes(body: Sequence[ast.stmt], name: str) -> set[str]:
    nodes = [x for node in body for x in ast.walk(node) if isinstance(x, ast.Attribute)]
    return {x.attr for x in nodes if isinstance(x.value, ast.Name) and x.value.id == name}


def _is_torch(module: dict[str, Any], name: str) -> bool:
    return getattr(module.get("extern_kernels"), name, None) is getattr(torch, name, module)


def _asked(source: str) -> set[str]:
    """Return the global names that code reads."""
    pending, names = [compile(source, "<graph>", "exec")], set[str]()
    while pending:
        code = pending.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME") and i.argval}
        pending += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return names
