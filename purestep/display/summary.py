"""A table of a model or state by submodule: parameters, bytes, dtypes, trained or frozen.

Owns the counting. It runs no model and reads no values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from purestep import devices, tree
from purestep.arguments import Count, checked
from purestep.bits import human_bytes
from purestep.errors import ConfigError, TreeError, explain
from purestep.views import Block, Note, Printed, Table


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors of a submodule and everything in it: one line of the table.

    Attributes:
        name: dotted path of the submodule.
        kind: class of the submodule, empty if it is unknown.
        trained, frozen, buffers: numbers of elements: of trained parameters, of frozen parameters, and of buffers.
        bytes: of all three.
        dtypes: their dtypes, sorted.
    """

    name: str
    kind: str = ""
    trained: int = 0
    frozen: int = 0
    buffers: int = 0
    bytes: int = 0
    dtypes: tuple[str, ...] = ()

    def __add__(self, other: Group) -> Group:
        return Group(
            self.name,
            self.kind,
            self.trained + other.trained,
            self.frozen + other.frozen,
            self.buffers + other.buffers,
            self.bytes + other.bytes,
            tuple(sorted({*self.dtypes, *other.dtypes})),
        )

    def trainable(self) -> str:
        """Return whether the parameters are trained: "yes", "no" or "in part"; "-" without parameters."""
        if not self.trained and not self.frozen:
            return "-"
        return "yes" if not self.frozen else "in part" if self.trained else "no"


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Printed):
    """The result of `summary`: groups and their total; `print` shows the table.

    Attributes:
        rows: one for each group, in the order of the model.
        total: the sum of the groups.
        optimizer_bytes: bytes of the optimizer state; None for a module or a tree without one.
        devices: where the tensors are, with the name and the memory of a card.
    """

    rows: tuple[Group, ...]
    total: Group
    optimizer_bytes: int | None = None
    devices: tuple[str, ...] = ()

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        head = ("name", "type", "params", "buffers", "bytes", "dtype", "trained")
        table = Table(head, [_cells(row) for row in self.rows], foot=_cells(self.total), right=(2, 3, 4))
        lines = [f"on {', '.join(self.devices)}"] if self.devices else []
        lines += [f"{self.total.trained:,} trained and {self.total.frozen:,} frozen parameters"]
        if self.optimizer_bytes is not None:
            lines.append(f"{human_bytes(self.optimizer_bytes)} of optimizer state")
        return [table, Note("\n".join(lines))]


@checked(ConfigError)
def summary(state_or_module: object, *, depth: Count = 1) -> Summary:
    """Count the parameters, bytes and dtypes of a model or of a state, by submodule.

    Tied weights are counted once, where they first appear. Frozen parameters are in the buffers of a `TrainState`; its
    model distinguishes them from other buffers.

    Args:
        state_or_module: a `TrainState` (or anything with `params`, and maybe `buffers` and `opt_state`), a module, or
            any pytree of tensors, which counts as trained.
        depth: number of parts of a dotted name that name a group, 1 or more.

    Returns:
        A `Summary`, which prints as a table.

    Raises:
        TreeError: there is no tensor in it, or `depth` is less than 1.

    Examples:
        >>> print(summary(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))))
        name   type         params  buffers  bytes  dtype           trained
        -----  -----------  ------  -------  -----  --------------  -------
        0      Linear           16        -   64 B  float32         yes
        1      BatchNorm1d       8        9   72 B  float32, int64  yes
        -----  -----------  ------  -------  -----  --------------  -------
        total                   24        9  136 B  float32, int64  yes
        on cpu
        24 trained and 0 frozen parameters
    """
    if depth < 1:
        raise TreeError(explain(f"depth={depth!r} is not a number of levels", instead="summary(state, depth=1)"))
    groups: dict[str, Group] = {}
    module = _module(state_or_module)
    kinds = {name: type(submodule).__name__ for name, submodule in module.named_modules()} if module is not None else {}
    seen: set[object] = set()
    found: dict[torch.device, None] = {}
    for name, tensor, role in _tensors(state_or_module, module):
        identity = _identity(tensor)
        if identity not in seen:
            seen.add(identity)
            found[tensor.device] = None
            group = ".".join(name.split(".")[:-1][:depth]) or name
            dtype = str(tensor.dtype).removeprefix("torch.")
            one = Group(group, kinds.get(group, ""), bytes=tensor.nbytes, dtypes=(dtype,), **{role: tensor.numel()})
            groups[group] = groups[group] + one if group in groups else one
    if not groups:
        where, instead = type(state_or_module).__qualname__, "summary(state), or summary(model)"
        raise TreeError(explain("there is no tensor to summarise", where=where, instead=instead))
    opt_state = getattr(state_or_module, "opt_state", None)
    optimizer_bytes = None if opt_state is None else sum(t.nbytes for t in _unique(tree.leaves(opt_state)))
    total = sum(groups.values(), Group("total"))
    return Summary(tuple(groups.values()), total, optimizer_bytes, tuple(_device(device) for device in found))


def _device(device: torch.device) -> str:
    """A device, its card and the memory of it."""
    name, memory = devices.name_of(device).partition(", ")[2], devices.memory_of(device)
    return ", ".join([str(device), *([name] if name else []), *([] if memory is None else [human_bytes(memory)])])


def _module(value: object) -> nn.Module | None:
    if isinstance(value, nn.Module):
        return value
    module = getattr(getattr(value, "model", None), "module", None)
    return module if isinstance(module, nn.Module) else None


def _tensors(value: object, module: nn.Module | None) -> Iterator[tuple[str, Tensor, str]]:
    """Every tensor with its dotted name and its role, in the order of the model where there is one."""
    if isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            yield name, parameter, "trained" if parameter.requires_grad else "frozen"
        yield from ((name, buffer, "buffers") for name, buffer in value.named_buffers())
        return
    if not hasattr(value, "params"):
        yield from ((name, t, "trained") for name, t in _named(value))
        return
    parameters = dict(module.named_parameters()) if module is not None else {}
    tensors = [(name, tensor, "trained") for name, tensor in _named(value.params)]
    tensors += [(n, t, "frozen" if n in parameters else "buffers") for n, t in _named(getattr(value, "buffers", None))]
    order = {name: i for i, name in enumerate(parameters)}
    yield from sorted(tensors, key=lambda item: order.get(item[0], len(order)))


def _named(value: object) -> Iterator[tuple[str, Tensor]]:
    pairs = zip(tree.names(value), tree.leaves(value), strict=True)
    return ((name or "tensor", leaf) for name, leaf in pairs if isinstance(leaf, Tensor))


def _identity(tensor: Tensor) -> object:
    """A key that tied weights share: the same view of the same storage; the object itself if it has no storage."""
    plain = type(tensor) in (Tensor, nn.Parameter)  # and not fake, sharded or otherwise wrapped
    if not plain or tensor.device.type == "meta" or not tensor.nbytes:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _unique(leaves: Iterable[object]) -> Iterable[Tensor]:
    return {_identity(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values()


def _cells(row: Group) -> tuple[str, ...]:
    params, buffers = row.trained + row.frozen, row.buffers
    return (
        row.name,
        row.kind,
        f"{params:,}" if params else "-",
        f"{buffers:,}" if buffers else "-",
        human_bytes(row.bytes),
        ", ".join(row.dtypes),
        row.trainable(),
    )
