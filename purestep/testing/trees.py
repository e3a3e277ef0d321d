"""Asserting that trees are equal or close, with the paths that differ in the message."""

from __future__ import annotations

import torch

from purestep import tree
from purestep.arguments import NonNegative, checked
from purestep.errors import ConfigError


def assert_trees_equal(actual: object, expected: object, root: str = "") -> None:
    """Raise AssertionError unless two trees have the same paths and the same bits; the message lists each difference.

    Examples:
        >>> assert_trees_equal({"w": torch.ones(2)}, {"w": torch.ones(2)})
    """
    found = tree.diff(actual, expected, root)
    if found:
        shown = "\n".join(f"  {difference}" for difference in found[:20])
        more = f"\n  ... and {len(found) - 20} more" if len(found) > 20 else ""
        raise AssertionError(f"the trees differ at {len(found)} paths:\n{shown}{more}")


@checked(ConfigError)
def assert_trees_close(
    actual: object,
    expected: object,
    *,
    rtol: NonNegative[float] = 1e-5,
    atol: NonNegative[float] = 1e-8,
    root: str = "",
) -> None:
    """Raise AssertionError unless two trees have the same paths and close values.

    Examples:
        >>> assert_trees_close({"w": torch.ones(2)}, {"w": torch.ones(2) + 1e-7})
    """
    left, right = tree.paths(actual, root), tree.paths(expected, root)
    if left != right:
        raise AssertionError(f"the trees have different paths:\n{tree.diff(actual, expected, root)}")
    for path, a, b in zip(left, tree.leaves(actual), tree.leaves(expected), strict=True):
        try:
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{path}: {error}") from None
