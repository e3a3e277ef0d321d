"""The page about optimizers: every block runs, in order, and every optimizer has its line."""

from __future__ import annotations

import re
from pathlib import Path

from purestep import optim

PAGE = (Path(__file__).parents[2] / "docs" / "optim.md").read_text()


def test_every_block_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 8
    namespace: dict[str, object] = {"__name__": "purestep_docs_page"}
    for block in blocks:
        exec(compile(block, "docs/optim.md", "exec", dont_inherit=True), namespace)


def test_every_public_optimizer_and_wrapper_is_on_the_page() -> None:
    made = {
        name
        for name in dir(optim)  # each is imported when it is asked for
        for value in [getattr(optim, name)]
        if str(getattr(value, "__annotations__", {}).get("return", "")) == "GradientTransformation"
    }
    optimizers = {n for n in made if getattr(optim, n).__module__.startswith("purestep.optim.optimizers.")}
    missing = {n for n in optimizers - {"schedule_free"} if not n.startswith("scale_by_") and f"optim.{n}(" not in PAGE}
    assert len(optimizers) > 30
    assert not missing
