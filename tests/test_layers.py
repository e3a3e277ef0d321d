"""The rules of the house a machine can hold: who may import whom, who may touch torch's insides, what is in no file."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "purestep"

# The order of rooms: each may import from those before it, and from itself. `__init__` stands above all.
ROOMS = (
    "_torch _cpus _lazy _cells closures errors views arguments _torch_cpu portable_kernels portable bits "
    "transforms tree devices treesum recompute distributed random donation module_tensors metrics loggers display "
    "sharding functional activations optim precision data snapshot remote weights state trainable lora_layers lora "
    "batchnorm grad microbatch step_protocol parallel step ensembles workers jit preflight loop callbacks inference "
    "interop trainer record launch tune testing cli __main__"
).split()

# Libraries with one importer. Keys are top-level modules, values the only file or room that may name them.
SINGLE_IMPORTERS = {"optree": "tree/", "orbax": "snapshot/orbax_io.py"}


parsed = functools.cache(ast.parse)  # each rule reads every file


def room_of(relative: Path) -> str:
    """The room a file of the package belongs to."""
    return relative.parts[0].removesuffix(".py")


def imported_modules(source: str, relative: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything a source imports, lazily or under TYPE_CHECKING included."""
    package = ["purestep", *relative.parts[:-1]]
    found: list[tuple[int, str]] = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from purestep import tree` names the room only in the alias; `from torch import nn` gains nothing.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "purestep" else [module]
            found += [(node.lineno, name) for name in names]
    return found


def wrong_imports(source: str, relative: Path) -> list[str]:
    """Each import of a file that the order of rooms, or the list of single importers, forbids."""
    room, problems = room_of(relative), []
    for line, name in imported_modules(source, relative):
        top, *rest = name.split(".")
        place = f"purestep/{relative}:{line}"
        if not str(relative).startswith(SINGLE_IMPORTERS.get(top, "")):
            problems.append(f"{place} imports {top}; only purestep/{SINGLE_IMPORTERS[top]} may")
        if top != "purestep" or room == "__init__":
            continue
        if not rest:
            problems.append(f"{place} imports the whole package; import the room it needs")
        elif rest[0] not in ROOMS:
            problems.append(f"{place} imports purestep.{rest[0]}, which is not a room of ROOMS")
        elif ROOMS.index(rest[0]) > ROOMS.index(room):
            problems.append(f"{place}: {room} imports {rest[0]}, which stands below it")
    return problems


def forbidden_words(source: str, relative: Path) -> list[str]:
    """Assertions, stubs, and the notes that mark unfinished work, in a file."""
    problems = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Assert):
            problems.append(f"purestep/{relative}:{node.lineno} asserts; raise an error of purestep.errors")
        # Catching it is fine: other libraries raise it.
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.dump(node.exc):
            problems.append(f"purestep/{relative}:{node.lineno} raises NotImplementedError; write it or leave it out")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if match := re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
            problems.append(f"purestep/{relative}:{token.start[0]} has {match.group()}; finish it or leave it out")
    return problems


def no_docstring(source: str, relative: Path) -> list[str]:
    missing = source.strip() and ast.get_docstring(parsed(source)) is None
    return [f"purestep/{relative} does not say what it owns: no module docstring"] if missing else []


# --- torch's private names --------------------------------------------------------------------------------------------

# The files that may touch them, one for each purpose; each says what for, and what to do when a name goes.
PRIVATE_FILES = {"_torch.py", "_torch_cpu.py", "_inductor.py", "_dtensor.py"}
# Names with an underscore that are public all the same, or not torch's: whose they are.
NOT_TORCHS = {
    "_fields": "named tuples",
    "_replace": "named tuples",
    "_make": "named tuples",
    "_asdict": "named tuples",
    "_exit": "os",
    "_getframe": "sys",
    "_register_atexit": "threading",
    "_count": "_thread",
    "_forkserver": "multiprocessing",
    "_preload_modules": "multiprocessing",
    "_inheriting": "multiprocessing",
    "_inst": "random",
    "_rand": "numpy.random",
    "_legacy_seeding": "numpy.random, of a bit generator that replaces its own",
    "_is_protocol": "typing",
    "_fmt": "orbax",
    "_background_serialize": "orbax",
    "_repr_html_": "IPython",
}
# Files of which these rules do not hold yet, and why; the list only shrinks.
NOT_YET = {"loop/standin.py": "it names the modules of torch that it stands in for, and is to go"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def imported_names(module: ast.Module, package: str) -> set[str]:
    """The names of a file that stand for a package, or for something of it."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == package}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package and not node.level:
            found |= {a.asname or a.name for a in node.names}
    return found


def own_names(source: str) -> set[str]:
    """The private names that a file of ours defines: its functions, classes, attributes and fields."""
    found = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return {name for name in found if is_private(name)}


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_torch(source: str, relative: Path) -> list[str]:
    """Each use of a private name of torch: imported, by attribute, or by a text that names one."""
    if relative.name in PRIVATE_FILES or str(relative) in NOT_YET:
        return []
    module, own = parsed(source), own_names(source) | set(NOT_TORCHS)
    torchs, uses = imported_names(module, "torch"), []
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = [] if isinstance(node, ast.Import) else [node.module or ""]
            full = [".".join([*base, a.name]) for a in node.names]
            level = getattr(node, "level", 0)
            uses += [
                (line, f)
                for f in full
                if not level and f.split(".")[0] == "torch" and any(map(is_private, f.split(".")))
            ]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if root_of(node.value) in torchs or node.attr not in own | ours():
                uses.append((line, ast.unparse(node)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.match(r"torch(\.\w+)*\._[a-z]", node.value):
                uses.append((line, repr(node.value)))
        elif isinstance(node, ast.Call) and root_of(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
            "attrgetter",
            "operator",
        ):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            texts += [
                a.values[0].value
                for a in node.args
                if isinstance(a, ast.JoinedStr) and isinstance(a.values[0], ast.Constant)
            ]
            uses += [(line, repr(text)) for text in texts if is_private(text) and text not in own]
    return [f"purestep/{relative}:{at} touches {what}; put it into the _torch.py of its room" for at, what in uses]


# --- circles of files -------------------------------------------------------------------------------------------------


def file_imports(root: Path) -> dict[str, set[str]]:
    """For each file of a package the files it imports: at the top, in functions and for type checkers alike.

    A type is a dependence like any other: who reads one file of a circle has to read them all. And an import that is in
    a function because at the top it would not work is a circle, too, so no list of such imports is needed. What Python
    runs besides, the `__init__` of the folders on the way, is not what a file depends on, unless it takes names of it.
    """
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join([root.name, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = set()
        for node in ast.walk(parsed(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                targets |= {full if (full := f"{module}.{alias.name}") in files else module for alias in node.names}
        graph[name] = {target for target in targets if target in files and target != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of files of which each imports each, over others or not."""

    def reached(start: str) -> set[str]:
        seen, pending = set(), [start]
        while pending:
            for target in graph[pending.pop()] - seen:
                seen.add(target)
                pending.append(target)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


# --- state of a thread ------------------------------------------------------------------------------------------------

# The files with a thread-local, each for what is active in a `with` block. Values go as arguments wherever they can.
THREAD_LOCALS = set(
    "functional/active.py donation.py recompute.py random/torch_mode.py random/card_dropout.py "
    "sharding/full_tensors.py optim/kernels/workspace.py jit/redirection.py".split()
)


def thread_local(source: str, relative: Path) -> list[str]:
    if str(relative) in THREAD_LOCALS or "threading" not in source:
        return []
    uses = [n for n in ast.walk(parsed(source)) if isinstance(n, ast.Attribute) and ast.unparse(n) == "threading.local"]
    return [f"purestep/{relative}:{n.lineno} keeps state of a thread; pass it as an argument" for n in uses]


def test_state_of_a_thread_is_caught():
    source = "import threading\n_local = threading.local()"
    assert thread_local(source, Path("loop/run.py"))
    assert not thread_local(source, Path("functional/active.py"))


RULES = [wrong_imports, forbidden_words, no_docstring, private_torch, thread_local]
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@functools.cache
def ours():
    """Return private names of ours that one file uses of another's class; not those that torch has, too."""
    names = set(NOT_TORCHS)
    torchs = set()
    for path in FILES:
        text = (PACKAGE / path).read_text()
        if path.name in PRIVATE_FILES:
            torchs.update(re.findall(r"\b_[a-z]\w+", text))
        else:
            names |= own_names(text)
    return names - torchs


def test_no_file_imports_itself_over_others():
    assert circles(file_imports(PACKAGE)) == []


def test_a_circle_is_found_however_it_is_written(tmp_path):
    root = tmp_path / "house"
    files = {
        "a/one.py": "from house.a import two",
        "a/two.py": "def f():\n    from . import three",
        "a/three.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.a.one import x",
        "b.py": "import house.a.one",
        "c.py": "from .d import y",
        "d.py": "from .b import y",
    }
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    (root / "__init__.py").write_text("from house.b import z")
    assert circles(file_imports(root)) == [["house.a.one", "house.a.three", "house.a.two"]]


def test_a_list_of_exceptions_has_no_entry_that_is_not_needed():
    for name in NOT_YET:
        if (PACKAGE / name).exists():  # other than an exception, a file may go at any time
            assert private_torch((PACKAGE / name).read_text(), Path("elsewhere.py")), f"{name} is fine now"


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("import torch\ntorch._C._len_torch_dispatch_stack()", "torch._C._len_torch_dispatch_stack"),
        ("from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("from torch.distributed.tensor.placement_types import _StridedShard", "_StridedShard"),
        ("import torch._inductor.lowering", "torch._inductor.lowering"),
        ("def f(x):\n    return x._local_tensor", "x._local_tensor"),
        ("def f(x):\n    return hasattr(x, '_spec')", "'_spec'"),
        ("import torch\nf = getattr(torch, f'_foreach_{1}')", "'_foreach_'"),
        ("import sys\nfake = sys.modules.get('torch._subclasses.fake_tensor')", "torch._subclasses"),
        ("from torch import nn\nnorm = nn.modules.batchnorm._NormBase", "nn.modules.batchnorm._NormBase"),
        ("import torch.distributed as dist\n_x = 1\ndist._x", "dist._x"),
    ],
)
def test_a_private_name_of_torch_is_caught(source, use):
    problems = private_torch(source, Path("loop/run.py"))
    assert any(use in problem for problem in problems), problems
    assert not private_torch(source, Path("loop/_torch.py"))


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self, other):\n        return other._x",
        "import os\nos._exit(1)",
        "from purestep import _torch\n_torch.dispatch_modes()",
        "x = 'a text about torch.nn._things, say'",
        "import torch\n_level = torch.get_num_threads()\nprint(_level)",
    ],
)
def test_a_private_name_of_ours_or_of_others_passes(source):
    assert private_torch(source, Path("loop/run.py")) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert FILES
    problems = [p for relative in FILES for p in rule((PACKAGE / relative).read_text(), relative)]
    assert not problems, "\n" + "\n".join(problems)


def test_every_file_belongs_to_a_room():
    strangers = {room_of(relative) for relative in FILES} - {*ROOMS, "__init__", "__main__"}
    assert not strangers, f"add to ROOMS, in the order of who imports whom: {sorted(strangers)}"


@pytest.mark.parametrize(
    ("relative", "source", "message"),
    [
        ("tree.py", "from purestep.loop import run", "purestep/tree.py:1: tree imports loop, which stands below it"),
        ("tree.py", "from purestep import loop", "tree imports loop, which stands below it"),
        ("tree.py", "from . import loop", "tree imports loop, which stands below it"),
        ("tree.py", "import purestep.loop.run as r", "tree imports loop, which stands below it"),
        ("optim/base.py", "from ..state import TrainState", "optim imports state, which stands below it"),
        ("optim/base.py", "def f():\n    from purestep.step import x", "purestep/optim/base.py:2: optim imports step"),
        ("step.py", "import purestep as ps", "imports the whole package"),
        ("step.py", "from purestep.utils import x", "imports purestep.utils, which is not a room"),
        ("state.py", "import optree", "imports optree; only purestep/tree/ may"),
        (
            "snapshot/codec.py",
            "import orbax.checkpoint as ocp",
            "imports orbax; only purestep/snapshot/orbax_io.py may",
        ),
        ("snapshot/codec.py", "from orbax import checkpoint", "imports orbax; only purestep/snapshot/orbax_io.py may"),
    ],
)
def test_a_wrong_import_is_caught(relative, source, message):
    (problem,) = wrong_imports(source, Path(relative))
    assert message in problem


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("__init__.py", "from purestep.loop import run as run"),
        ("optim/clip.py", "from purestep.optim import base\nfrom . import base\nfrom .base import x"),
        ("optim/clip.py", "import torch\nfrom purestep import tree\nfrom .. import tree\nfrom ..errors import explain"),
        ("tree/walk.py", "import optree"),
        ("snapshot/orbax_io.py", "import orbax.checkpoint as ocp"),
    ],
)
def test_a_right_import_passes(relative, source):
    assert wrong_imports(source, Path(relative)) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(x):\n    assert x", "purestep/a.py:2 asserts"),
        ("x = 1  # TODO later", "purestep/a.py:1 has TODO"),
        ('"""FIXME"""', "has FIXME"),
        ("raise NotImplementedError", "purestep/a.py:1 raises NotImplementedError"),
        ("raise NotImplementedError('later') from None", "raises NotImplementedError"),
    ],
)
def test_a_forbidden_word_is_caught(source, message):
    (problem,) = forbidden_words(source, Path("a.py"))
    assert message in problem


def test_a_file_without_a_docstring_is_caught():
    assert no_docstring("x = 1", Path("a.py"))
    assert not no_docstring("", Path("a.py"))
    assert not no_docstring('"""Owns x."""', Path("a.py"))
