"""Digest and difference of whole trees, by the bits of their leaves."""

from __future__ import annotations

from purestep.bits import Differences, diff_leaves, digest_leaves
from purestep.tree.walk import leaves, paths


def digest(tree: object) -> str:
    """Return the sha256, in hex, over (path, dtype, shape, bytes) of every leaf, in order of path.

    It does not depend on strides, storage sharing, device or the order of dict keys; it does depend on every bit of
    every leaf, -0.0 and NaN payloads included. Nor does it depend on how leaves are split over processes: those are
    gathered one at a time, and every process calls it.

    Raises:
        TreeError: a leaf is not a tensor, numpy array, number, string or bytes.

    Examples:
        >>> import torch
        >>> digest({"a": torch.ones(2), "b": 1}) == digest({"b": 1, "a": torch.ones(4)[::2]})
        True
        >>> digest(torch.tensor(0.0)) == digest(torch.tensor(-0.0))
        False
    """
    return digest_leaves(zip(paths(tree), leaves(tree), strict=True))


def diff(a: object, b: object, root: str = "") -> Differences:
    """List each path at which two trees differ, with shape, dtype, largest absolute, relative and ulp difference.

    Equality is of bits: NaNs of the same payload are equal, 0.0 and -0.0 are not. Leaves that are split over processes
    are gathered, so every process calls it.

    Examples:
        >>> import torch
        >>> diff({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 2.0000002])}, root="params")
        path         leaf        differ    max abs    max rel  max ulp
        params['w']  float32[2]       1  2.384e-07  1.192e-07        1
        >>> bool(diff([1, 2], [1, 2]))
        False
    """
    left = dict(zip(paths(a, root), leaves(a), strict=True))
    right = dict(zip(paths(b, root), leaves(b), strict=True))
    return diff_leaves(left, right)


def equal(a: object, b: object) -> bool:
    """Tell whether two trees have the same paths and the same bits."""
    return not diff(a, b)
