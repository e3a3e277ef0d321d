"""Run the benchmark: `python -m benchmarks.run [--quick] [--only SECTION ...] [--resume] [--report FILE]`.

Writes `results/<name>.json`, `.md` and `.png` after every section, so that what was measured before a failure or an
interruption is kept, and `--resume` goes on from there; and a copy `results/<name>-<processor>.json`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.settings import FULL, QUICK, SECTIONS, Settings

FOLDER = Path(__file__).parent / "results"
_CHANGING = ("load", "system")  # of a machine that is the same


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
    results["took"] = {}
    kept = _measured(FOLDER / f"{name}.json", results["machine"]) if options.only or options.resume else {}
    results |= {key: value for key, value in kept.items() if key in SECTIONS}
    results["took"] |= {key: value for key, value in kept.get("took", {}).items() if key in results}
    for section in options.only or settings.sections:
        if options.resume and "error" not in results.get(section, {"error": "not measured"}):
            say(f"--- {section}: measured before")
            continue
        say(f"--- {section}")
        started = time.perf_counter()
        found = in_process(section, settings, say)
        if found is not None:
            results[section] = found
            results["took"][section] = time.perf_counter() - started
        write(results, FOLDER / name)
    print(report.markdown(results))
    return int(any("error" in results.get(section, {}) for section in SECTIONS))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller and shorter")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections; the others stay as they were")
    parser.add_argument("--resume", action="store_true", help="leave out the sections that were measured before")
    parser.add_argument("--name", help="name of the files in benchmarks/results")
    parser.add_argument("--report", metavar="FILE", help="only write table and chart of this JSON file")
    return parser.parse_args(arguments)


def _measured(file: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Return the results of an earlier run, unless it was on another machine or with other versions."""
    if not file.exists():
        return {}
    before: dict[str, Any] = json.loads(file.read_text())
    same = all(before["machine"].get(key) == now[key] for key in now if key not in _CHANGING)
    if not same:
        print(f"{file} was measured on another machine or with other versions; it is not used", file=sys.stderr)
    return before if same else {}


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
    from benchmarks.worker import ENVIRONMENT

    os.environ.update(ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(settings.cache)})
    try:
        run = getattr(importlib.import_module(f"benchmarks.{section}"), "run", None)
        if run is None:
            pipe.send(("say", f"benchmarks/{section}.py has no run(), so it is left out"))
        pipe.send(("done", run and run(settings, lambda text: pipe.send(("say", text)))))
    except Exception:
        pipe.send(("say", traceback.format_exc()))
        pipe.send(("done", {"error": traceback.format_exc()}))


def write(results: dict[str, Any], stem: Path) -> None:
    """Write the results, the report and the chart."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    stem.with_suffix(".json").write_text(text)
    # Of each processor the newest results are kept in a file of its name, to be set side by side.
    stem.with_name(f"{stem.name}-{machine.slug(results['machine']['cpu'])}.json").write_text(text)
    others = [json.loads(file.read_text()) for file in sorted(stem.parent.glob(f"{stem.name}-*.json"))]
    stem.with_suffix(".md").write_text(report.markdown(results, others))
    if "training" in results and "error" not in results["training"]:
        report.chart(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
