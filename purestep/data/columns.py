"""The fast path: a pytree of tensors or arrays, one column a leaf, indexed a batch at a time.

Owns the reading of columns. It runs no Python per sample and copies nothing but the batch, so memory-mapped arrays stay
on disk. `as_columns` tells a table of columns from a data set of samples; `batches` calls it.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from purestep import tree
from purestep.errors import DataError, explain
from purestep.metrics.dicts import leaf_lines

# index_select refuses these dtypes on the CPU; numpy indexes them.
_VIA_NUMPY = (torch.uint16, torch.uint32, torch.uint64)
Array = Tensor | np.ndarray


class Columns:
    """Columns of equal length, which batches index along dim 0.

    Args:
        table: pytree of tensors or arrays, shape [n, ...] each.

    Raises:
        DataError: there is no leaf, a leaf has no leading dim or an impossible dtype, or the leading dims differ.

    Examples:
        >>> columns = Columns({"x": torch.arange(6.0).reshape(3, 2), "y": np.array([7, 8, 9])})
        >>> len(columns), columns.take(torch.tensor([2, 0]))
        (3, {'x': tensor([[4., 5.],
                [0., 1.]]), 'y': tensor([9, 7])})
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        leaves, self._structure = tree.flatten(table)
        self.length = _common_length(table, leaves)
        self._readers = [_reader(leaf, path) for leaf, path in zip(leaves, tree.paths(table, "dataset"), strict=True)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return tree.map(lambda column: column[0], self.take(torch.tensor([index])))

    def take(self, indices: Tensor) -> Any:
        """Return the samples at some indices, int64[b], as a tree of new tensors of shape [b, ...]."""
        return tree.unflatten(self._structure, [read(indices) for read in self._readers])

    def __reduce__(self) -> tuple[Callable[[Any], Columns], tuple[Any]]:
        leaves, structure = tree.flatten(self.table)
        packed = tree.unflatten(structure, [_MappedFile.pack(leaf) for leaf in leaves])
        return _unpickle, (packed,)


class _MappedFile:
    """A memory-mapped array as its file: pickled for a worker process instead of a copy of the data."""

    def __init__(self, array: np.memmap) -> None:
        order = "C" if array.flags.c_contiguous else "F"
        self.arguments: tuple[Any, ...] = (array.filename, array.dtype, array.offset, array.shape, order)

    @staticmethod
    def pack(leaf: Array) -> Array | _MappedFile:
        # A view of a map has the file and the offset of the full map, not its own, so it cannot be opened by name.
        if not isinstance(leaf, np.memmap) or leaf.filename is None:
            return leaf
        base: object = leaf.base
        return _MappedFile(leaf) if isinstance(base, mmap.mmap) else leaf

    def open(self) -> np.memmap:
        filename, dtype, offset, shape, order = self.arguments
        return np.memmap(filename, dtype=dtype, mode="r", offset=offset, shape=shape, order=order)


def _unpickle(packed: Any) -> Columns:
    return Columns(tree.map(lambda leaf: leaf.open() if isinstance(leaf, _MappedFile) else leaf, packed))


def _common_length(table: object, leaves: list[Array]) -> int:
    if not leaves:
        raise DataError(explain("the data set holds no tensor or array", where=f"dataset: {table!r}"))
    described = leaf_lines(table, "dataset")
    scalars = [text for text, leaf in zip(described, leaves, strict=True) if leaf.ndim == 0]
    if scalars:
        raise DataError(
            explain(
                "a column of a data set has no leading dim",
                where="\n".join(scalars),
                why="dim 0 of every tensor or array counts the samples",
                instead="expand it to one value a sample, or pass it to the loss function by another way",
            )
        )
    if len({leaf.shape[0] for leaf in leaves}) > 1:
        raise DataError(
            explain(
                "the columns of a data set do not have the same leading dim",
                where="\n".join(described),
                why="dim 0 of every tensor or array counts the samples",
                instead="columns of equal length, or a list (or a torch Dataset) of samples",
            )
        )
    return int(leaves[0].shape[0])


def _reader(leaf: Array, path: str) -> Callable[[Tensor], Tensor]:
    """The function from indices, int64[b], to the samples of a column: a new tensor of shape [b, ...]."""
    if isinstance(leaf, Tensor):
        column = leaf.detach()
        if column.device.type != "cpu":
            return lambda indices: column.index_select(0, indices.to(column.device))
        if column.dtype not in _VIA_NUMPY and column.layout == torch.strided:
            return lambda indices: column.index_select(0, indices)
        return lambda indices: column[indices]
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        return lambda indices: torch.from_numpy(array[indices.numpy()].astype(array.dtype.newbyteorder("=")))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a read-only array; nothing writes to it
            column = torch.from_numpy(array)
    except ValueError:  # negative strides
        return lambda indices: torch.from_numpy(array[indices.numpy()])
    except TypeError as error:
        raise DataError(
            explain(
                f"a column of dtype {array.dtype} cannot become a tensor",
                where=f"{path}: {tree.describe(leaf)}",
                instead="encode it as integers, or pass a list or Dataset of samples and a `collate` function",
            )
        ) from error
    if column.dtype in _VIA_NUMPY:
        return lambda indices: torch.from_numpy(array[indices.numpy()])
    return lambda indices: column.index_select(0, indices)


def as_columns(dataset: object) -> Columns | None:
    """Return the columns of a data set, or None when it is a data set of samples.

    Tensors, arrays, and dicts, tuples and registered nodes of them are columns; so is torch's `TensorDataset`, whose
    batches are lists as torch's are. A list is a data set of samples, as it is for torch's `DataLoader`, unless its
    elements are arrays of one leading dim and different dtype or rank, which no samples of one data set are.

    Raises:
        DataError: its leaves are tensors or arrays in part only, or of different length.

    Examples:
        >>> len(as_columns({"x": torch.zeros(5, 2)})), as_columns([1, 2, 3])
        (5, None)
    """
    from torch.utils.data import TensorDataset

    if type(dataset) is TensorDataset:
        return Columns(list(dataset.tensors))
    if isinstance(dataset, list):
        arrays = all(_is_array(item) and item.ndim for item in dataset)
        kinds = {(item.dtype, item.ndim) for item in dataset} if arrays else set()
        same_length = arrays and len({item.shape[0] for item in dataset}) == 1
        return Columns(dataset) if same_length and len(kinds) > 1 else None
    leaves = tree.leaves(dataset)
    if len(leaves) == 1 and leaves[0] is dataset and not _is_array(dataset):
        return None
    if leaves and all(_is_array(leaf) for leaf in leaves):
        return Columns(dataset)
    if not isinstance(dataset, tuple):
        _refuse_mixed(dataset, leaves)
    return None


def _refuse_mixed(dataset: object, leaves: list[object]) -> None:
    described = zip(leaf_lines(dataset, "dataset"), leaves, strict=True)
    others = [text[:120] for text, leaf in described if not _is_array(leaf)]
    raise DataError(
        explain(
            f"a {type(dataset).__name__} is read as columns, but has a leaf that is not a tensor or array",
            where="\n".join(others[:5]) or f"dataset: {dataset!r}",
            why="each leaf is a column whose dim 0 counts the samples",
            instead="tensors or arrays as leaves, or a list (or a torch Dataset) of samples",
        )
    )


def _is_array(leaf: object) -> TypeGuard[Array]:
    return isinstance(leaf, (Tensor, np.ndarray))
