"""`export`: the trained model as a program for other runtimes, by `torch.export` and ONNX."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.arguments import Location, checked
from purestep.errors import ConfigError, StepError, explain, import_extra
from purestep.snapshot import durable_directories
from purestep.state import TrainState, to_module


@checked(ConfigError, failed=True)
def export(
    state: TrainState,
    example: Any,
    path: Location | None = None,
    *,
    batch_dim: bool = True,
    method: str | None = None,
) -> torch.export.ExportedProgram:
    """Return the model of a state as one program, without its Python code, and write the program if a path is given.

    Args:
        state: any state; `ps.optim.averaged(state)` exports the averages.
        example: inputs of the model: a tensor, a tuple of positional inputs, or a dict of inputs by name.
        path: file to write: `model.pt2` for `torch.export.load`, `model.onnx` for other runtimes. It is written
            atomically; weights of an ONNX model beyond 2 GiB lie beside it in `model.onnx.data`.
        batch_dim: whether dim 0 of all tensors of the example is one batch of any size, as in a training step. False:
            all shapes are fixed to those of the example.
        method: name of the method that is called in place of `forward`.

    Returns:
        The exported program, in evaluation mode, with its own copy of the weights; `.module()` calls it.

    Raises:
        ConfigError: another suffix, or an example of another kind.
        StepError: the model cannot be traced into one program; the cause is an error of torch.
        MissingExtra: ONNX needs `pip install "purestep[onnx]"`.

    Examples:
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(3, 2), ps.optim.sgd(0.1))
        >>> program = export(state, torch.ones(4, 3))
        >>> program.module()(torch.ones(7, 3)).shape
        torch.Size([7, 2])

    Reference: `torch.export.export`, `torch.onnx.export(dynamo=True)`.
    """
    target = None if path is None else _target(path)
    args, kwargs = _inputs(example)
    module = to_module(state)
    called = module if method is None else _Calling(module, method)
    shapes = _dynamic(args, kwargs) if batch_dim else None
    try:
        # torch treats a batch size of 1 as a constant, so an example of one sample is doubled.
        if batch_dim:
            args, kwargs = _widened(args), _widened(kwargs)
        program = torch.export.export(called, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # tracing runs the user's code, which may raise anything
        raise StepError(
            explain(
                f"the model {type(module).__qualname__} cannot be exported as one program",
                where=str(error).strip().split("\n")[0][:300],
                why="its Python code depends on values of tensors, or on a batch size" if batch_dim else None,
                instead="ps.export(state, example, batch_dim=False)   # for the shapes of the example alone"
                if batch_dim
                else "ps.to_module(state)   # the module itself",
            )
        ) from error
    if target is not None:
        _write(target, program)
    return program


class _Calling(nn.Module):
    """A module whose `forward` calls another method of the wrapped module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        if not callable(getattr(module, method, None)):
            raise ConfigError(explain(f"the model has no method {method!r}", where=type(module).__qualname__))
        self.model, self.method = module, method
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


def _target(path: str | Path) -> Path:
    target = Path(path)
    if target.suffix not in (".pt2", ".onnx"):
        raise ConfigError(
            explain(
                "the suffix says what kind of program is written",
                where=str(target),
                instead="'model.pt2', 'model.onnx'\nps.save_weights(state, 'model.safetensors')   # the weights alone",
            )
        )
    if target.suffix == ".onnx":
        import_extra("onnxscript", extra="onnx", needed_by=f"ps.export(state, example, {str(path)!r})")
    return target.absolute()


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if not any(isinstance(leaf, Tensor) for leaf in tree.leaves(args)):
        what = "an example is a tensor, a tuple of inputs, or a dict of them by name"
        raise ConfigError(explain(what, where=f"example: {tree.describe(example)}", instead="torch.zeros(2, 784)"))
    return args, {}


def _dynamic(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    batch = torch.export.Dim("batch")

    def shape(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and leaf.ndim else None

    positional, by_name = _mapped(shape, tuple(args)), _mapped(shape, dict(kwargs))
    # torch takes one tree: the positional arguments, or a dict by name.
    return by_name if kwargs else positional


def _widened(values: Any) -> Any:
    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 1 else leaf

    return _mapped(twice, values)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, item) for item in value)
    return function(value)


def _write(target: Path, program: torch.export.ExportedProgram) -> None:
    durable_directories.make_root(target.parent)
    # Both files are written in a temporary directory under their final names, because the model refers to the file of
    # its weights by name.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as directory:
        unfinished = Path(directory, target.name)
        if target.suffix == ".pt2":
            torch.export.save(program, unfinished)
        else:
            model: Any = torch.onnx.export(program, dynamo=True, verbose=False)
            model.save(str(unfinished))
        for file in sorted(
            Path(directory).iterdir(), key=lambda file: file == unfinished
        ):  # the model after its weights
            durable_directories.fsync(file)
            os.replace(file, target.parent / file.name)
    durable_directories.fsync(target.parent)
