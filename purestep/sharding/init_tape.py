"""A tape of what the making of a model does to its tensors, without their memory, and its replay in parts.

Under `recording` tensors are made on the meta device, but say that they are on the CPU; each operation is written down
with the storages it reads and writes. `Tape.value` then computes one tensor by replaying what leads to it. Random
operations have keys of their own, so a tensor has the same bits whichever others are computed. `deferred_init` calls
it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from purestep import _torch, random, tree
from purestep.errors import StepError, explain
from purestep.sharding.init_ops import (
    COPIES,
    EMPTY,
    FILLS,
    LIKE,
    NONE,
    Function,
    Op,
    Ref,
    name_of,
    shape_of,
    written_by,
)
from purestep.sharding.spec import Box

Source = Callable[[Box], Tensor]  # reads a part of a tensor, as a copy


class Tape:
    """What was done to tensors without memory, and how to compute them; `recording` makes one.

    Args:
        rng: int64[2] key of the random operations.
    """

    def __init__(self, rng: Tensor) -> None:
        self.ops: list[Op] = []
        self.constants: dict[int, Tensor] = {}
        self._rng = rng
        self._numbers: dict[int, int] = {}
        # Storages are told apart by their addresses, so none may be freed and its address used again. Those of the meta
        # device hold no bytes.
        self._alive: list[Any] = []
        self._writers: dict[int, list[int]] = {}
        self._seeds: dict[int, int] = {}
        self._sources: dict[int, Source] = {}

    # --- recording ---

    def run(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Run an operation without memory and write it down; for real, where no tensor without memory is involved."""
        # Three cases: a factory (`torch.zeros`), which is told to make its tensor on the meta device; an operation on
        # tensors of which some have no memory; and one on real tensors alone (constants of the model), which just runs.
        inputs = [x for x in tree.leaves((args, kwargs)) if isinstance(x, Tensor)]
        makes = not inputs and any(a.name == "device" for a in _torch.schema_of(function).arguments)
        lifts = str(kwargs.get("device")) == "meta"
        if not (makes or lifts or any(t.is_meta for t in inputs)):
            return function(*args, **kwargs)
        # Whatever device the model asks for: values are computed on the CPU, where the bits are the same everywhere.
        if makes or kwargs.get("device") is not None:
            kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": torch.device("meta")}
        bare = {id(t): t if t.is_meta else torch.empty_like(t, device="meta") for t in inputs}
        # Of operations in place, the argument itself has to come back.
        meta = tree.map(lambda x: bare[id(x)] if isinstance(x, Tensor) else x, (args, kwargs))
        written = written_by(function, args, kwargs)
        try:
            # The others' kernels for meta tensors are in Python, and import sympy and Dynamo.
            fills = name_of(function) in FILLS and len(written) == 1 and written[0].is_meta
            out = written[0] if fills else function(*meta[0], **meta[1])
        except (RuntimeError, NotImplementedError) as error:
            # No meta kernel, or a result that depends on values. Such an operation can run for real now, unless it
            # writes: then what was recorded before it would be replayed over what it wrote.
            if written:
                _refuse(function, str(error).splitlines()[0], error)
            return self._run_for_real(function, args, kwargs)
        if not all(t.is_meta for t in written):
            _refuse(function, "it writes values that are not known yet into a tensor that was made elsewhere")
        # A view has the storage of its base, which the tape knows: it is no operation, only another window.
        fresh = [t for t in tree.leaves(out) if isinstance(t, Tensor) and not self.knows(t)]
        if fresh or written:
            drawn = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
            self.note(function, args, kwargs, written=written, made=fresh, is_random=drawn)
        return out

    def _run_for_real(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Run an operation whose result depends on values (`item`, `nonzero`): those are computed now."""
        args, kwargs = tree.map(lambda x: self.value(x) if isinstance(x, Tensor) else x, (args, kwargs))
        return function(*args, **(kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {})))

    def note(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        written: list[Tensor],
        made: list[Tensor],
        is_random: bool,
    ) -> None:
        """Write an operation down."""
        argument = shape_of if name_of(function) in LIKE else self._argument
        held: Any = tree.map(lambda x: argument(x) if isinstance(x, Tensor) else x, (args, kwargs))
        # A generator would have to be in the state that it has now; the replay seeds the default one instead.
        changes = {"device": torch.device("cpu"), "generator": None}
        kept = held[1] | {k: v for k, v in changes.items() if k in held[1]}
        reads = frozenset(r.storage for r in tree.leaves(held) if isinstance(r, Ref) and r.storage != NONE)
        targets = [self._ref(t) for t in written]
        refs = tuple(self._ref(t) for t in made)
        writes = frozenset(r.storage for r in targets)
        sources = [x.storage for x in tree.leaves(held) if isinstance(x, Ref)]
        # A fill may only skip what came before if it covers the whole storage and does not read it (`x.copy_(x.t())`).
        fills = None
        if name_of(function) in FILLS and len(targets) == 1 and self._covers(targets[0]):
            fills = targets[0].storage if sources.count(targets[0].storage) == 1 else None
        for storage in writes | {r.storage for r in refs}:
            self._writers.setdefault(storage, []).append(len(self.ops))
        self.ops.append(Op(function, held[0], kept, reads, writes, refs, fills, is_random))

    def read(self, source: Source, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor whose values a function reads, later, as a whole or in part."""
        with _torch.no_torch_function(), _torch.no_torch_dispatch():
            made = torch.empty(tuple(shape), dtype=dtype, device="meta")

        def whole() -> Tensor:
            return source(((0,) * len(shape), tuple(shape)))

        self.note(whole, (), {}, written=[], made=[made], is_random=False)
        self._sources[self._ref(made).storage] = source
        return made

    def source(self, tensor: Tensor) -> Source | None:
        """Return what reads parts of a tensor, if `read` made it and nothing has written into it since."""
        if not tensor.is_meta or not self.knows(tensor):
            return None
        ref = self._ref(tensor)
        return self._sources.get(ref.storage) if len(self._writers[ref.storage]) == 1 and self._covers(ref) else None

    def never_filled(self, tensor: Tensor) -> bool:
        """Tell whether the values of a tensor are what `torch.empty` or its like found in memory, or a copy of that."""
        if not tensor.is_meta or not self.knows(tensor) or not tensor.numel():
            return False
        storage, before = self._ref(tensor).storage, len(self.ops)
        while True:
            writers = [i for i in self._writers.get(storage, ()) if i < before]
            if len(writers) != 1:
                return False
            before = writers[0]
            op = self.ops[before]
            if name_of(op.function) in EMPTY:
                return True
            if name_of(op.function) not in COPIES or len(op.reads) != 1:
                return False
            storage = next(iter(op.reads))

    def _covers(self, ref: Ref) -> bool:
        return torch.Size(ref.size).numel() * ref.dtype.itemsize == self._alive[ref.storage].nbytes()

    def knows(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was made under this tape."""
        return _torch.storage_id(tensor.untyped_storage()) in self._numbers

    def _ref(self, tensor: Tensor) -> Ref:
        storage = tensor.untyped_storage()
        identity = _torch.storage_id(storage)
        if identity not in self._numbers:
            self._numbers[identity] = len(self._alive)
            self._alive.append(storage)
        number = self._numbers[identity]
        return Ref(number, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def _argument(self, tensor: Tensor) -> Ref:
        if tensor.is_meta:
            return self._ref(tensor)
        # A constant is kept as it is now: the model may write into it, or free it, before it is replayed.
        value = tensor.detach().clone()
        ref = self._ref(value)
        self.constants[ref.storage] = value
        return ref

    # --- replay ---

    def name_random(self, name: str, tensor: Tensor) -> None:
        """Let the random operations that lead to a tensor draw from a name, unless they do so from an earlier one."""
        # The name and the number of the draw, not its position on the tape: an initialisation that is added to another
        # layer leaves the numbers of this one alone. Tied and derived tensors share draws, which the first name has.
        drawn = [i for i in self._leading_to(tensor) if self.ops[i].is_random and i not in self._seeds]
        for count, index in enumerate(drawn):
            self._seeds[index] = _seed(random.fold_in(self._rng, name, count))

    def value(self, tensor: Tensor) -> Tensor:
        """Compute a tensor that was made under the tape; others are returned as they are."""
        if not tensor.is_meta or not self.knows(tensor):
            return tensor
        target, chosen = self._ref(tensor), self._leading_to(tensor)
        # When each storage is used last: then it is freed, so that one tensor and what leads to it are all there is.
        last = {s: i for i in chosen for s in self.ops[i].reads | {r.storage for r in self.ops[i].made}}
        held: dict[int, Tensor] = {}
        generator = torch.default_generator
        before = generator.get_state()
        try:
            with torch.no_grad():
                for index in chosen:
                    if self.ops[index].is_random:
                        # What is asked for while the model is being made has no name yet.
                        seed = self._seeds.setdefault(index, _seed(random.fold_in(self._rng, "unnamed", index)))
                        generator.manual_seed(seed)
                    self.replay(self.ops[index], held)
                    for storage in [s for s in held if last.get(s, -1) <= index and s != target.storage]:
                        del held[storage]
        finally:
            generator.set_state(before)
        return self.window(held, target)

    def replay(self, op: Op, held: dict[int, Tensor]) -> None:
        """Run an operation on real tensors: those in `held`, by storage, to which it adds what it makes."""
        args, kwargs = tree.map(lambda x: self.window(held, x) if isinstance(x, Ref) else x, (op.args, op.kwargs))
        out = [t for t in tree.leaves(op.function(*args, **kwargs)) if isinstance(t, Tensor)]
        known = {_torch.storage_id(s.untyped_storage()) for s in held.values()}
        fresh = [t for t in out if _torch.storage_id(t.untyped_storage()) not in known]
        for ref, tensor in zip(op.made, fresh, strict=True):
            # Kernels of the meta device and of the CPU may choose other strides; later operations were recorded as
            # windows on the former.
            if (tensor.stride(), tensor.storage_offset()) != (ref.stride, ref.offset):
                tensor = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype).copy_(tensor)
            held[ref.storage] = tensor

    def window(self, held: dict[int, Tensor], ref: Ref) -> Tensor:
        """Return the tensor that a Ref stands for."""
        if ref.storage == NONE:
            return torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype)
        owner = held[ref.storage] if ref.storage in held else self.constants[ref.storage]
        return torch.empty(0, dtype=ref.dtype).set_(owner.untyped_storage(), ref.offset, ref.size, ref.stride)

    def _leading_to(self, tensor: Tensor) -> list[int]:
        """Return the operations that the content of a tensor depends on, in order."""
        chosen: set[int] = set()
        seen: set[tuple[int, int]] = set()
        wanted = [(self._ref(tensor).storage, len(self.ops))]
        while wanted:
            storage, before = wanted.pop()
            if (storage, before) in seen:
                continue
            seen.add((storage, before))
            writers = [i for i in self._writers.get(storage, ()) if i < before]
            for index in reversed(writers):
                chosen.add(index)
                wanted += [(s, index) for s in self.ops[index].reads if s != storage]
                if self.ops[index].fills == storage:
                    # Only the memory is needed of what came before.
                    chosen.add(writers[0])
                    wanted += [(s, writers[0]) for s in self.ops[writers[0]].reads if s != storage]
                    break
        return sorted(chosen)


def _seed(rng: Tensor) -> int:
    low, high = rng.tolist()
    return int(low + ((high & 0x7FFFFFFF) << 32))


def _refuse(function: Function, why: str, error: Exception | None = None) -> None:
    raise StepError(
        explain(
            "the model does something with a tensor that deferred init cannot do without its values",
            where=f"torch.ops.{function}",
            why=why,
            instead="ps.init(make_model, tx, seed=0, plan=plan), which makes the whole model on every rank",
        )
    ) from error


# --- while a model is being made --------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording(rng: Tensor) -> Iterator[Tape]:
    """Make tensors without memory, and yield the tape on which everything that is done to them is written."""
    tape = Tape(rng)
    reset = _recorded.set(tape)
    try:
        with _truncated_normals(tape), _Recorder(tape), _Disguise(tape):
            yield tape
    finally:
        _recorded.reset(reset)


_recorded: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Do what is done to tensors in a `with` block as if nothing were recorded: files can be read in it."""
    with _torch.no_torch_function(), _torch.no_torch_dispatch():
        yield


def reading(source: Source, like: Tensor) -> Tensor:
    """Return a tensor that a function reads: now, or under `recording` when it is needed, and then in parts.

    Args:
        source: reads the part at `(offset, shape)`, as a copy on the CPU with the dtype of `like`.
        like: has the shape, dtype and device of the tensor.
    """
    tape = _recorded.get()
    if tape is not None:
        return tape.read(source, like.shape, like.dtype)
    return source(((0,) * like.dim(), tuple(like.shape))).to(like.device)


class _Recorder(_torch.DispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch hides this mode from Dynamo, which it imports for that, at the cost of seconds

    def __torch_dispatch__(
        self,
        function: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        with _torch.no_torch_function():
            return self.tape.run(function, args, kwargs or {})


class _Disguise(TorchFunctionMode):
    """Let tensors without memory say that they are ordinary ones: some initialisers leave meta tensors alone."""

    _said: dict[Any, Any] = {  # noqa: RUF012
        Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
        Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
        Tensor.device.__get__: torch.device("cpu"),
    }
    _reading = (Tensor.numpy, Tensor.tolist, Tensor.__array__)

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self,
        function: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if function in self._said and args[0].is_meta:
            return self._said[function]
        if function in self._reading:
            with _torch.no_torch_dispatch():
                args = (self.tape.value(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _truncated_normals(tape: Tape) -> Iterator[None]:
    """Write truncated normals down as one operation: they reject candidates until none is left, by looking at them."""
    name = "_no_grad_trunc_normal_"
    original = getattr(nn.init, name, None)
    if original is None:
        yield
        return

    def noted(tensor: Tensor, *args: object, generator: torch.Generator | None = None) -> Tensor:
        with _torch.no_torch_function():
            if not (tensor.is_meta and tape.knows(tensor)):
                result: Tensor = original(tensor, *args, generator=generator)
                return result
            tape.note(original, (tensor, *args), {}, written=[tensor], made=[], is_random=True)
            return tensor

    setattr(nn.init, name, noted)
    try:
        yield
    finally:
        setattr(nn.init, name, original)
