"""Run every example of this folder, each in a process of its own, and print one table: name, seconds, result.

    python examples/run_all.py                      # all of them, as `make examples` does
    python examples/run_all.py digits.py gpt.py     # some of them
    python examples/run_all.py --write              # and write what was measured into README.md beside this file

The examples are those of catalogue.py. An example that ends with an error, or whose result is not what the list
says, fails; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from catalogue import EXAMPLES, Example, judged

FOLDER = Path(__file__).resolve().parent
LONGEST = 600  # seconds that one of them may take


@dataclass(frozen=True)
class Outcome:
    """How one example ended: `cpu` is seconds of CPU of all its processes, `why` is empty where all is well."""

    example: Example
    seconds: float
    cpu: float
    result: str
    why: str


def run(example: Example) -> Outcome:
    """Run an example in a fresh process and an empty directory, so that nothing of an earlier run is continued."""
    path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(FOLDER / example.file), *shlex.split(example.quick)]
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=said, stderr=subprocess.STDOUT)
        timer = threading.Timer(LONGEST, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        timer.cancel()
        seconds, process.returncode = time.monotonic() - began, os.waitstatus_to_exitcode(status)
        said.seek(0)
        out = said.read()
    result, why = judged(example, process.returncode, out, example.expects)
    if seconds > LONGEST:
        why = f"it did not end within {LONGEST} s"
    return Outcome(example, seconds, used.ru_utime + used.ru_stime, result, why and f"{why}\n{out[-3000:]}")


def table_row(outcome: Outcome) -> str:
    """Return the row of an example in README.md."""
    example = outcome.example
    lines = len((FOLDER / example.file).read_text().splitlines())
    name = f"[`{example.file}`]({example.file})"
    return f"| {name} | {example.shows} | {lines} | {outcome.cpu:.0f} s | {example.result}: {outcome.result} |"


def write(outcomes: Sequence[Outcome], page: Path = FOLDER / "README.md") -> None:
    """Write what was measured into the table of README.md, in the order of the list; other rows stay as they are."""
    before, rule, rest = page.read_text().partition("|---|---|---:|---:|---|\n")
    rows, blank, after = rest.partition("\n\n")
    known = {match.group(1): row for row in rows.splitlines() if (match := re.match(r"\| \[`(.*?)`\]", row))}
    known |= {outcome.example.file: table_row(outcome) for outcome in outcomes}
    ordered = [known[example.file] for example in EXAMPLES if example.file in known]
    page.write_text(before + rule + "\n".join(ordered) + blank + after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="of this folder; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="how many to run at a time")
    parser.add_argument("--write", action="store_true", help="write what was measured into README.md")
    args = parser.parse_args()
    unknown = set(args.files) - {example.file for example in EXAMPLES}
    if unknown:
        parser.error(f"no such example: {', '.join(sorted(unknown))}")
    chosen = [example for example in EXAMPLES if not args.files or example.file in args.files]

    began, outcomes = time.monotonic(), []
    width = max(len(example.file) for example in chosen)
    print(f"{'example':<{width}}  seconds  of CPU  result")
    with ThreadPoolExecutor(args.jobs) as pool:
        for outcome in pool.map(run, chosen):
            outcomes.append(outcome)
            said = f"FAILED: {outcome.why}" if outcome.why else f"{outcome.example.result}: {outcome.result}"
            print(f"{outcome.example.file:<{width}}  {outcome.seconds:7.1f}  {outcome.cpu:6.1f}  {said}", flush=True)
    failed = [outcome.example.file for outcome in outcomes if outcome.why]
    right, cpu = len(chosen) - len(failed), sum(outcome.cpu for outcome in outcomes)
    print(f"\n{right} of {len(chosen)} ran as they should, in {time.monotonic() - began:.0f} s, {cpu:.0f} s of CPU")
    if args.write:
        write([outcome for outcome in outcomes if not outcome.why])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
