"""Which rows of a table `make test` runs; `make test-all` runs every one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(rows: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the rows for `pytest.mark.parametrize`, with all but the quick ones marked as slow.

    Raises:
        ValueError: a quick row is not in the table.
    """
    rows = list(rows)
    if missing := [row for row in quick if row not in rows]:
        raise ValueError(f"rows that are not in the table: {missing}")
    return [row if row in quick else pytest.param(row, marks=pytest.mark.slow) for row in rows]
