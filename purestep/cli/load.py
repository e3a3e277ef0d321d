"""Loading the experiment of a Python file: the file is imported under the name that worker processes will use."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from purestep.cli.usage import UsageError, of_explained
from purestep.errors import PurestepError, nearest_name
from purestep.loop.result import Result
from purestep.loop.run import Run
from purestep.record.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A function that makes an experiment from settings.

    Attributes:
        path: path of its file.
        name: name of the function.
        function: the function.
    """

    path: Path
    name: str
    function: Callable[..., Experiment]

    @property
    def stem(self) -> str:
        """The beginning of the names of its runs."""
        return self.path.stem if self.name == "experiment" else self.name

    def make(self, plain: Mapping[str, Any]) -> Experiment:
        """Make the experiment with settings in JSON.

        Raises:
            UsageError: the function, or a function that it calls, refuses a setting.
        """
        try:
            return Experiment.of(self.function, plain)
        except PurestepError as error:
            raise of_explained(error) from error

    def fit(self, of: Experiment, **options: Any) -> Result:
        """Call `of.fit(**options)` as code of the experiment's file, so that the record of the run names that file."""
        result: Result = self._called(of.fit, options)
        return result

    def run(self, of: Experiment, **options: Any) -> Run:
        """Call `of.run(**options)` in the same way."""
        run: Run = self._called(of.run, options)
        return run

    def _called(self, method: Callable[..., Any], options: Mapping[str, Any]) -> Any:
        function: Any = inspect.unwrap(self.function)
        line = function.__code__.co_firstlineno
        code = compile("\n" * (line - 1) + "_call(**_options)", str(self.path), "eval")
        code = code.replace(co_qualname=self.name, co_name=self.name)
        names = {"__name__": function.__module__, "__file__": str(self.path)}
        return eval(code, {**names, "_call": method, "_options": options})


def load(spec: str) -> Loaded:
    """Import a file, and return the function in it that makes an experiment.

    The file becomes a module of its name, and its directory the first entry of `sys.path`, as for a script, so that
    worker processes can import its functions.

    Args:
        spec: FILE.py or FILE.py:NAME.

    Raises:
        UsageError: there is no such file or function, or several functions make one.
    """
    text, _, name = spec.partition(":")
    path = Path(text).absolute()
    if not path.is_file() or path.suffix != ".py":
        problem = f"there is no such file: {text}" if path.suffix == ".py" else f"FILE is a Python file, not {text!r}"
        near = nearest_name(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise UsageError(problem, str(Path(text).parent / near) if near else "FILE.py or FILE.py:NAME")
    module = _imported(path)
    found = {key: value for key, value in vars(module).items() if _makes_experiment(value, module)}
    if name:
        chosen = getattr(module, name, None)
        if not callable(chosen):
            near = nearest_name(name, found) or ", ".join(found)
            raise UsageError(f"{text} has no function {name!r}", f"{text}:{near}" if near else "")
        return Loaded(path, name, chosen)
    if "experiment" in found or len(found) == 1:
        name = "experiment" if "experiment" in found else next(iter(found))
        return Loaded(path, name, found[name])
    if not found:
        instead = "def experiment(settings: Settings) -> ps.Experiment: ..."
        raise UsageError(f"{text} has no function that is annotated to return a ps.Experiment", instead)
    raise UsageError(f"{text} has several experiments", " or ".join(f"{text}:{key}" for key in found))


def _makes_experiment(value: object, module: ModuleType) -> bool:
    if not isinstance(value, FunctionType) or value.__module__ != module.__name__:
        return False
    try:
        return typing.get_type_hints(value).get("return") is Experiment
    except Exception:  # an annotation for type checkers only
        return "Experiment" in str(value.__annotations__.get("return"))


def _imported(path: Path) -> ModuleType:
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "/").absolute() != path:
        raise UsageError(f"a module is called {path.stem!r} already, which {path.name} would hide", "another file name")
    if not path.stem.isidentifier():
        raise UsageError(f"{path.name} is no name of a module, which worker processes import", "letters, digits and _")
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)
