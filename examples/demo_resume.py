"""Train the digits once straight, and once killed with SIGKILL at four random moments; compare the bits.

One of the kills hits a save in progress. Exits with 1 unless both runs end with the same digest.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("digits.py")
EPOCHS = 8


def start(run_dir: Path, epochs: int, workers: int) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(SCRIPT),
        "--run-dir",
        str(run_dir),
        "--epochs",
        str(epochs),
        "--workers",
        str(workers),
    ]
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "stderr.txt", "a") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)


def rows(run_dir: Path) -> int:
    """Progress of a run as seen from outside: the rows of its log."""
    log = run_dir / "metrics.csv"
    return len(log.read_text().splitlines()) if log.exists() else 0


def saving(run_dir: Path) -> bool:
    """Whether a snapshot is being written: its directory is there under a temporary name."""
    snapshots = run_dir / "snapshots"
    return snapshots.exists() and any("tmp" in path.name for path in snapshots.iterdir())


def kill_in_progress(run_dir: Path, epochs: int, workers: int, rng: random.Random, *, in_save: bool) -> str | None:
    """Start or continue the run and kill it, in a save or after a random number of rows. None if it ended before."""
    before, process = rows(run_dir), start(run_dir, epochs, workers)
    more = rng.randint(2, 8)
    while process.poll() is None:
        if in_save and saving(run_dir):
            break
        if not in_save and rows(run_dir) >= before + more:
            time.sleep(rng.random() * 0.2)
            break
        time.sleep(0.0005)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    where = "during a save" if in_save else "between saves" if not saving(run_dir) else "during a save, by chance"
    return f"killed {where}, after {rows(run_dir)} rows of the log"


def finish(run_dir: Path, epochs: int, workers: int) -> str:
    """Run to the end and return the digest that the script prints."""
    process = start(run_dir, epochs, workers)
    out, _ = process.communicate()
    found = re.search(r"digest of the last state\s+([0-9a-f]{64})", out)
    if process.returncode or not found:
        raise SystemExit(f"the run failed with exit code {process.returncode}, see {run_dir / 'stderr.txt'}\n{out}")
    return found.group(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-resume"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=None, help="of the random moments; differs each time by default")
    args = parser.parse_args()
    shutil.rmtree(args.run_dir, ignore_errors=True)
    seed = random.randrange(2**31) if args.seed is None else args.seed
    rng, began = random.Random(seed), time.monotonic()

    straight = finish(args.run_dir / "straight", args.epochs, args.workers)
    print(f"straight run   {straight}", flush=True)
    in_save = rng.randrange(args.kills)
    for number in range(args.kills):
        what = kill_in_progress(args.run_dir / "killed", args.epochs, args.workers, rng, in_save=number == in_save)
        print(f"  kill {number + 1}: {what or 'the run ended before it could be killed'}", flush=True)
        if what is None:
            print(f"too few epochs for {args.kills} kills (seed {seed}); try --epochs {args.epochs * 2}")
            return 1
    killed = finish(args.run_dir / "killed", args.epochs, args.workers)
    print(f"killed run     {killed}")
    print(f"{'the same bits' if killed == straight else 'DIFFERENT'} in {time.monotonic() - began:.0f} s (seed {seed})")
    return 0 if killed == straight else 1


if __name__ == "__main__":
    raise SystemExit(main())
