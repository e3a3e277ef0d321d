"""The package keeps no precision state outside of values: no default dtype, no grad scaler, one scoped autocast."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "purestep"
FORBIDDEN = {"set_default_dtype", "set_default_tensor_type", "GradScaler", "set_autocast_enabled", "set_autocast_dtype"}


def names(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names]
    return found


def test_no_file_sets_precision_globally():
    used = {str(p.relative_to(PACKAGE)): set(names(p.read_text())) for p in PACKAGE.rglob("*.py")}
    assert {path: bad for path, found in used.items() if (bad := found & FORBIDDEN)} == {}
    # `Policy.autocast` is a field; the context itself is made in one place.
    assert {p for p, found in used.items() if "autocast" in found} <= {
        "precision/cast_params.py",
        "precision/describe.py",
        "precision/policies.py",
    }


@pytest.mark.parametrize(
    "source", ["torch.set_default_dtype(x)", "from torch.amp import GradScaler", "torch.cuda.amp.GradScaler()"]
)
def test_this_test_can_fail(source):
    assert set(names(source)) & FORBIDDEN
