"""One update of all parameters; long ones go in slices, so that temporary buffers fit in the processor's cache.

Owns `advance`, which `TrainState.apply_gradients` calls. Slices change no bit: only transformations of scope "element"
are sliced. Only donated memory is overwritten.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from purestep import tree
from purestep.optim.base import GradientTransformation
from purestep.optim.chain import Chain
from purestep.optim.columns import Block, rows_of
from purestep.optim.kernels import foreach as fx
from purestep.optim.scope import scope_of
from purestep.sharding.step_account import LONG_ON_CPU, LONG_ON_DEVICE, WORTH

_ORDINARY = (Tensor, torch.nn.Parameter)
_NOTHING: Any = object()


class Transfer(Protocol):
    """What brings gradients and parameters of an update from another device while earlier ones are updated."""

    def need(self, names: Iterable[str]) -> None:
        """Wait until the gradients and parameters of these names are here."""

    def done(self, name: str, param: Tensor) -> None:
        """Take a parameter that has been updated."""


def is_long(x: Tensor) -> bool:
    """Tell whether a tensor is updated slice by slice."""
    return type(x) in _ORDINARY and x.numel() > _limit(x) and x.dim() > 0 and x.shape[0] > 1


def any_long(xs: Collection[Any]) -> bool:
    """Tell whether a tensor is among some that is updated slice by slice."""
    return any(map(is_long, [x for x in xs if type(x) in _ORDINARY and x.numel() > LONG_ON_CPU]))


def owned(leaves: Iterable[Any]) -> list[Tensor]:
    """Return the leaves of donated parameters or optimizer state that are overwritten."""
    return [x for x in leaves if type(x) in _ORDINARY and x.dim() > 0 and not x.is_meta]


def worth_reusing(params: Iterable[Any]) -> bool:
    """Tell whether parameters are large enough to overwrite their memory and that of their state."""
    return max(map(Tensor.numel, owned(params)), default=0) >= WORTH


def _limit(x: Tensor) -> int:
    return LONG_ON_CPU * torch.get_num_threads() if x.is_cpu else LONG_ON_DEVICE


def advance(
    tx: GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    *,
    accept: Tensor | None = None,
    reuse: bool = False,
    transfer: Transfer | None = None,
    **extra: Any,
) -> tuple[Any, Any]:
    """Return the parameters and the state of a transformation after an update.

    Args:
        tx: the transformation.
        grads: gradients, of the structure of `params`.
        state: state of the transformation.
        params: the parameters.
        accept: 0-d bool: whether to apply the update; if False, parameters and state keep their values. None: True.
        reuse: whether the tensors of `params` and `state` are donated: then the result uses their memory if possible,
            and an error during the update leaves them partly overwritten.
        transfer: told what the update is about to read, and what it is through with; None where all of it is here.
        **extra: keyword arguments of `tx.update`.
    """
    # With a transfer short parameters go in blocks, too, so that the first ones need not wait for the last.
    if type(params) is dict and (transfer is not None or any_long(params.values())):
        if scope_of(tx) == "element":
            done = None
            if reuse or not tx.only_fused():
                done = sliced(tx, grads, state, params, accept=accept, reuse=reuse, transfer=transfer, **extra)
            if done is not None:
                return done
        elif isinstance(tx, Chain) and tx.transforms and scope_of(tx.transforms[-1]) == "element":
            (first, before), (end, held) = tx.divided(state)
            if transfer is not None:
                transfer.need(params)
            proposed, following = first.update(grads, before, params, **extra)
            if accept is not None:
                following = fx.select_tree(accept, following, before)
            params, held = advance(end, proposed, held, params, accept=accept, reuse=reuse, transfer=transfer, **extra)
            return params, tx.joined(following, held)
    if transfer is not None:
        transfer.need(params)
    new = tx.advance(grads, state, params, reuse=reuse and accept is None, **extra)
    if accept is not None:
        new = fx.select_tree(accept, new, (params, state))
    if transfer is not None:
        for name, param in new[0].items():
            transfer.done(name, param)
    return new


def sliced(
    tx: GradientTransformation,
    grads: dict[str, Tensor],
    state: Any,
    params: dict[str, Tensor],
    *,
    accept: Tensor | None = None,
    reuse: bool = False,
    limit: int | None = None,
    transfer: Transfer | None = None,
    **extra: Any,
) -> tuple[Any, Any] | None:
    """Update slice by slice; None if the tensors are not plain ones, or if the state cannot be sliced like them.

    Args:
        tx, grads, state, params, accept, reuse, transfer, **extra: as for `advance`; `tx` is of scope "element".
        limit: number of elements above which a tensor is sliced; the default depends on the device.
    """
    leaves, structure = tree.flatten(state)
    everything = (list(grads.values()), list(params.values()), leaves)
    if not all(isinstance(x, Tensor) for xs in everything for x in xs) or not fx.plain(*everything):
        return None
    shapes = tuple((name, tuple(p.shape)) for name, p in params.items())
    limits = tuple(limit or _limit(p) for p in params.values())
    # A one-pass kernel has no temporary buffers, and may give a slice other bits.
    layout = rows_of(structure, shapes, tuple(tuple(x.shape) for x in leaves), limits, tx.only_fused())
    if layout is None:
        return None
    result = _Result(params, leaves, accept, reuse)
    for block in layout:
        if transfer is not None:
            transfer.need(block.names)
        result.take(block, tx, grads, extra)
        for name in block.names:
            done = block.rows is None or block.rows.stop >= params[name].shape[0]
            if transfer is not None and done:
                transfer.done(name, result.params[name])
    return {name: result.params[name] for name in params}, tree.unflatten(structure, result.leaves)


class _Result:
    """The result of an update, filled block by block."""

    def __init__(self, params: dict[str, Tensor], leaves: list[Tensor], accept: Tensor | None, reuse: bool) -> None:
        self.old, self.old_leaves, self.accept, self.reuse = params, leaves, accept, reuse
        self.params: dict[str, Tensor] = {}
        self.leaves: list[Any] = [_NOTHING] * len(leaves)

    def take(self, block: Block, tx: GradientTransformation, grads: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Update one block."""
        rows = block.rows
        gs = {name: grads[name] if rows is None else grads[name][rows] for name in block.names}
        ps = {name: self.old[name] if rows is None else self.old[name][rows] for name in block.names}
        held = [self.old_leaves[i] if rows is None or not own else self.old_leaves[i][rows] for i, own in block.leaves]
        reuse = self.reuse and self.accept is None
        new, following = tx.advance(gs, tree.unflatten(block.structure, held), ps, reuse=reuse, **extra)
        for name, old in ps.items():
            if rows is None:
                self.params[name] = self._chosen(new[name], old)
            else:
                if name not in self.params:
                    self.params[name] = self._room(self.old[name])
                self._write(self.params[name], rows, new[name], old)
        for (i, own), value, old in zip(block.leaves, tree.leaves(following), held, strict=True):
            if rows is None or not own:
                if self.leaves[i] is _NOTHING:  # a leaf that all parameters share is the same in every block
                    self.leaves[i] = self._chosen(value, old)
            else:
                if self.leaves[i] is _NOTHING:
                    self.leaves[i] = self._room(self.old_leaves[i])
                self._write(self.leaves[i], rows, value, old)

    def _room(self, old: Tensor) -> Tensor:
        return old if self.reuse else torch.empty_like(old)

    def _chosen(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.accept is None or new is old else torch.where(self.accept, new, old)

    def _write(self, target: Tensor, rows: slice, new: Tensor, old: Tensor) -> None:
        if new is not old or not self.reuse:
            target[rows].copy_(self._chosen(new, old))
