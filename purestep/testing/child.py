"""The main function of a process of the fault harness: install the shims, run the training, report, exit.

`zygote` forks the process; `lane` writes its order and reads its report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from purestep.testing import shims

# Modules that a run imports; the zygote imports them once.
PRELOAD = "orbax.checkpoint xxhash purestep.trainer purestep.loggers purestep.snapshot purestep.optim.optimizers"
CODE = "from purestep.testing import child; child.main()"


def main() -> None:
    """Execute the order in `sys.argv[1]`, and exit with the code of the training.

    The order holds `file` and `function` (None for a script), `argv`, `report`, `shims`, `stdout` ("closed" or ""), and
    `verify`: a run directory; after a successful run the digest of its newest snapshot is reported.
    """
    order = json.loads(sys.argv[1])
    if order["stdout"] == "closed":  # as after `>&-`: the next opened file gets descriptor 1
        os.close(1)
        sys.stdout = None
    injector = shims.install(order["shims"], report=Path(order["report"]))
    sys.argv = [order["file"], *order["argv"]]
    sys.path[0] = str(Path(order["file"]).parent)
    code = _called(order["file"], order["function"], order["argv"])
    if order["verify"] and not code:
        injector.note("digest", _digest_of(Path(order["verify"]), injector.template))
    raise SystemExit(code)


def _called(file: str, function: str | None, argv: list[str]) -> int:
    try:
        if function is None:
            runpy.run_path(file, run_name="__main__")
            return 0
        result = getattr(_loaded(file), function)(Path(argv[0]))
        return int(getattr(result, "exit_code", result if isinstance(result, int) else 0))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _loaded(file: str) -> Any:
    """Import a file under its own name, so that its classes and functions can be pickled."""
    name = Path(file).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    return sys.modules[name]


def _digest_of(run_dir: Path, train: object) -> str:
    """Return the digest of those parts of the newest snapshot of a run that must not depend on interruptions.

    Args:
        run_dir: the run directory.
        train: a train state of the stored structure.
    """
    from purestep import snapshot, tree
    from purestep.loop.events import LoopState
    from purestep.loop.resume import store_root
    from purestep.testing.resume import comparable

    like = LoopState(train, cursor=..., callbacks=..., status=..., elapsed=0.0)  # type: ignore[arg-type]
    restored = snapshot.Store(store_root(run_dir)).restore(like, fallback=False)
    return tree.digest(comparable(restored.value))
