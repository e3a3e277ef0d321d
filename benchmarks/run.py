"""Run the benchmark: `python -m benchmarks.run [--quick] [--only SECTION ...] [--report FILE]`.

Writes `results/<name>.json`, `.md` and `.png` after every section, so that what was measured before a failure is kept.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.settings import FULL, QUICK, Settings

SECTIONS = ("training", "loop_cost", "compile_time", "memory", "precision", "snapshots", "imports", "sharding")
# Each in a process of its own: it may leave memory, threads and imports behind.
FOLDER = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print the table; return 0 unless a section failed."""
    options = _options(arguments)
    if options.report:
        results = json.loads(Path(options.report).read_text())
        write(results, Path(options.report).with_suffix(""))
        print(report.markdown(results))
        return 0
    settings = QUICK if options.quick else FULL
    name = options.name or settings.name
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    results: dict[str, Any] = {"settings": settings.name, "date": datetime.date.today().isoformat()}
    results["machine"] = machine.describe()
    before = FOLDER / f"{name}.json"
    if options.only and before.exists():
        results |= {k: v for k, v in json.loads(before.read_text()).items() if k in SECTIONS}
    for section in options.only or SECTIONS:
        say(f"--- {section}")
        found = in_process(section, settings, say)
        if found is not None:
            results[section] = found
        results["seconds"] = time.perf_counter() - began
        write(results, FOLDER / name)
    print(report.markdown(results))
    return int(any("error" in results.get(section, {}) for section in SECTIONS))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller and shorter")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections; the others stay as they were")
    parser.add_argument("--name", help="name of the files in benchmarks/results")
    parser.add_argument("--report", metavar="FILE", help="only write table and chart of this JSON file")
    return parser.parse_args(arguments)


def in_process(section: str, settings: Settings, say: Any) -> Any:
    """Run a section in a new process and return its results; None if this checkout does not have it."""
    import multiprocessing

    if importlib.util.find_spec(f"benchmarks.{section}") is None:
        return None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_section, args=(theirs, section, settings))
    process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind != "say":
                return value
            say(value)
    except EOFError:
        process.join(10)
        return {"error": f"the process of section {section} ended with code {process.exitcode}"}
    finally:
        process.join(30)
        if process.is_alive():
            process.terminate()


def _section(pipe: Any, section: str, settings: Settings) -> None:
    import os

    from benchmarks.worker import ENVIRONMENT

    os.environ.update(ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(settings.cache)})
    try:
        found = importlib.import_module(f"benchmarks.{section}").run(settings, lambda text: pipe.send(("say", text)))
        pipe.send(("done", found))
    except Exception:
        pipe.send(("say", traceback.format_exc()))
        pipe.send(("done", {"error": traceback.format_exc()}))


def write(results: dict[str, Any], stem: Path) -> None:
    """Write the results, the report and the chart."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(report.markdown(results))
    if "training" in results and "error" not in results["training"]:
        report.chart(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
