"""Running a function on fake tensors: shapes without memory, so nothing is computed and no input is touched.

They are meta tensors, several times quicker than torch's fake tensor mode. Owns what a dry run leaves behind (nothing:
modules, generators and warnings are as before), which call of torch failed in it, and how many bytes it would have kept
for the backward pass. What follows from that is said by `check` and `memory`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from purestep import _torch, tree
from purestep.data import seeding
from purestep.functional import Definition
from purestep.preflight.hidden_attributes import Change, Modules, Saved, attributes, changed
from purestep.preflight.small_kernels import small_kernels
from purestep.random.host_draws import unguarded

_VERIFY_LIMIT = 1 << 28  # bytes: a failing call on larger tensors is believed without being tried on real ones


@dataclasses.dataclass(frozen=True)
class Call:
    """The call of torch that failed: the function and its arguments, with fake tensors in them."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The function's name, as it is written in code."""
        return getattr(self.function, "__name__", str(self.function)).strip("_")

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return [x for x in tree.leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def attempt(self) -> None:
        """Do it on real tensors of these shapes, unless they are large; it may raise."""
        if sum(t.numel() * t.element_size() for t in self.tensors()) <= _VERIFY_LIMIT:
            args, kwargs = tree.map(_real, (self.args, self.kwargs))
            with torch.enable_grad(), _torch.no_torch_function():
                self.function(*args, **kwargs)

    def fails_for_real(self) -> bool:
        """Tell whether it fails on real tensors of these shapes too: fake ones cannot do everything."""
        if sum(t.numel() * t.element_size() for t in self.tensors()) > _VERIFY_LIMIT:
            return True
        try:
            self.attempt()
        except Exception:
            return True
        return False


def _real(leaf: object) -> object:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu") if isinstance(leaf, Tensor) else leaf


@dataclasses.dataclass(frozen=True)
class Dry:
    """What came of a dry run.

    Attributes:
        result: what the function returned, with fake tensors in it; None when it failed.
        error: what it raised.
        call: the call of torch that raised it.
        kept: most bytes that were kept for the backward pass at one time, besides the arguments.
        changes: attributes of models that the function changes each time it is called.
    """

    result: Any
    error: Exception | None
    call: Call | None
    kept: int
    changes: tuple[Change, ...] = ()


def dry_run(function: Callable[..., Any], *args: Any) -> Dry:
    """Run a function of pytrees on fake tensors.

    Args:
        function: called once; twice when it changes attributes of a model, to learn whether it does so again.
        *args: its arguments; tensors in them are replaced by fake ones, everything else is passed as it is.
    """
    watch, kernels, result, failure, peak = _Watch(), small_kernels(), None, None, None
    changes: tuple[Change, ...] = ()

    def run(*inputs: Any) -> Any:
        # What a step makes by itself is without memory as well.
        with kernels, watch, torch.device("meta"):
            return function(*inputs)

    with contextlib.ExitStack() as stack:
        # Inside of what puts models back as they were: they may cache a table in the dry run, a fake tensor.
        modules = stack.enter_context(_undisturbed(function, args))
        fakes = tree.map(_fake, args)
        books = _Books(fakes)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(books.pack, _unpack))
        # The hooks of saved tensors count in one thread, this one.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        try:
            before = attributes(modules)
            result = run(*fakes)
            first, peak = attributes(modules), books.peak
            if changed(before, first):
                with contextlib.suppress(Exception):
                    run(*fakes)
                    changes = changed(first, attributes(modules))
        except Exception as error:
            failure = error
    return Dry(result, failure, watch.failed, books.peak if peak is None else peak, changes)


def _fake(leaf: object) -> object:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


# Products, whose operands have to be of one dtype; the kernels without memory do not compare it.
_PRODUCTS = frozenset("linear bilinear conv1d conv2d conv3d matmul rmatmul mm bmm mv addmm baddbmm".split())


class _Watch(TorchFunctionMode):
    """Remembers the first call of torch that raised, or would on real tensors."""

    failed: Call | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, tuple(args), dict(kwargs or {}))
        try:
            if call.name in _PRODUCTS and len({t.dtype for t in call.tensors()}) > 1 and not autocasting():
                call.attempt()
            return func(*args, **(kwargs or {}))
        except Exception:
            if self.failed is None:
                self.failed = call
            raise


def autocasting() -> bool:
    """Tell whether an autocast chooses dtypes, on whatever device."""
    return _torch.autocast_enabled()


# --- bytes kept for the backward pass ---------------------------------------------------------------------------------


class _Books:
    """Counts the storages that autograd holds on to, each once, as long as it does."""

    def __init__(self, given: object) -> None:
        self.given = {_torch.storage_id(x.untyped_storage()) for x in tree.leaves(given) if isinstance(x, Tensor)}
        self.held: dict[int, int] = {}
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> Tensor | _Held:
        storage = tensor.untyped_storage()
        if _torch.storage_id(storage) in self.given:
            return tensor
        return _Held(self, tensor, _torch.storage_id(storage), storage.nbytes())


class _Held:
    """A tensor that autograd keeps; when it lets go, the books are told."""

    __slots__ = ("books", "key", "nbytes", "tensor")

    def __init__(self, books: _Books, tensor: Tensor, key: int, nbytes: int) -> None:
        self.books, self.tensor, self.key, self.nbytes = books, tensor, key, nbytes
        if books.held.setdefault(key, 0) == 0:
            books.live += nbytes
            books.peak = max(books.peak, books.live)
        books.held[key] += 1

    def __del__(self) -> None:
        self.books.held[self.key] -= 1
        if self.books.held[self.key] == 0:
            self.books.live -= self.nbytes


def _unpack(kept: Tensor | _Held) -> Tensor:
    return kept.tensor if isinstance(kept, _Held) else kept


# --- leaving nothing behind -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(function: object, args: Sequence[object]) -> Iterator[Modules]:
    """Put back generators, and what models have remembered meanwhile: a cached table would be a fake tensor."""
    modules = models_of(function, args)
    saved = Saved(modules)
    # What a guard learned of a model without memory would not hold for its real calls.
    with seeding.preserved(), unguarded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again, from the real step
        try:
            yield modules
        finally:
            saved.put_back()


def models_of(function: object, args: Sequence[object]) -> Modules:
    """Return the modules that a function and its arguments reach, each under its path in the model it is part of."""
    found: Modules = {}
    known: set[int] = set()
    for root in (*_models(args), *_modules(function)):
        label = "model" if not found else type(root).__name__
        label = label if label not in found else f"{label} ({len(found)})"
        for path, module in root.named_modules():
            if id(module) not in known:
                known.add(id(module))
                found[f"{label}.{path}" if path else label] = module
    return found


def _models(args: Sequence[object]) -> Iterator[nn.Module]:
    """The modules that states carry in their structure."""
    pending, seen = [*args], 0
    while pending and seen < 10_000:
        value = pending.pop()
        seen += 1
        if isinstance(value, Definition):
            yield value.module
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif dataclasses.is_dataclass(value):
            pending.extend(vars(value).values())


def _modules(function: object) -> Iterator[nn.Module]:
    """The modules that a function reaches through its closure, its globals, its attributes, and functions in them."""
    pending: list[tuple[object, int]] = [(function, 0)]
    seen: set[int] = set()
    while pending and len(seen) < 1_000:
        value, depth = pending.pop()
        if id(value) in seen or depth > 4:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, types.FunctionType):
            names = [n for n in value.__code__.co_names if n in value.__globals__]
            found = [value.__globals__[n] for n in names] + [_content(cell) for cell in value.__closure__ or ()]
            pending.extend((x, depth + 1) for x in found)
        elif isinstance(value, types.MethodType):
            pending.extend([(value.__func__, depth), (value.__self__, depth + 1)])
        elif isinstance(value, functools.partial):
            pending.extend([(value.func, depth), *((x, depth + 1) for x in value.args)])
        elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)):
            pending.extend((x, depth + 1) for x in vars(value).values())


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None
