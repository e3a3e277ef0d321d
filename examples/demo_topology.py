"""Train the same small GPT on 1, 2 and 4 processes under seven plans, and once across them; compare the bits.

Prints one table of digests. Exits with 1 unless all are equal, those of the run that began on 4 processes under fsdp,
went on with 2 under ddp and ended on 1 too. Tensor parallelism cuts matrices into four parts, whoever computes them: it
has a digest of its own, the same on any number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpt
import torch

import purestep as ps

STEPS = 18
PLANS = ("ddp", "zero1", "zero2", "fsdp", "hsdp", "tensor", "pipeline")
SIZES = (4, 2, 1)
RELAY = {4: "fsdp", 2: "ddp", 1: "ddp"}  # the run that is handed on: its plan on so many processes


def work(directory: Path, steps: int) -> None:
    """What each process does: every plan in turn, then its part of the run that is handed on."""
    torch.set_num_threads(1)
    size = ps.sharding.size()
    found = {}
    for plan in PLANS:
        result = gpt.train(plan, steps=steps, megabytes=0.1)
        found[plan] = ps.digest(result.state)
    part = steps * (SIZES.index(size) + 1) // len(SIZES)
    result = gpt.train(RELAY[size], steps=part, schedule_steps=steps, megabytes=0.1, run_dir=directory / "relay")
    found["relay"] = ps.digest(result.state)
    found["relay steps"] = str(int(result.state.step))
    if ps.sharding.rank() == 0:
        (directory / f"{size}.json").write_text(json.dumps(found))


def launch(directory: Path, steps: int, size: int) -> dict[str, str]:
    """Run `work` on so many processes, and return what it found."""
    command = [sys.executable]
    if size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += [__file__, "--work", "--run-dir", str(directory), "--steps", str(steps)]
    log = directory / f"{size}.log"
    # Portable bits, where the machine has them: then the table has one digest on every x86-64 machine.
    bits = "portable" if ps.bits.portable_here() else "native"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PURESTEP_BITS": bits}
    with open(log, "w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if code:
        raise SystemExit(f"{size} processes failed with exit code {code}:\n{log.read_text()[-4000:]}")
    found: dict[str, str] = json.loads((directory / f"{size}.json").read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo-topology"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.run_dir, args.steps)
        return 0
    shutil.rmtree(args.run_dir, ignore_errors=True)
    args.run_dir.mkdir(parents=True)
    began = time.monotonic()
    print(f"{args.steps} steps of a small GPT, 4 microbatches a step\n\nprocesses  plan      digest of the state")
    digests: dict[bool, set[str]] = {True: set(), False: set()}  # whether matrices are cut
    for size in SIZES:
        found = launch(args.run_dir, args.steps, size)
        for plan in PLANS:
            digests[plan == "tensor"].add(found[plan])
            print(f"{size:<9}  {plan:<8}  {found[plan]}", flush=True)
    digests[False].add(found["relay"])
    print(f"{'4 > 2 > 1':<9}  {'mixed':<8}  {found['relay']}   (fsdp, then ddp, then ddp)")
    same = all(len(each) == 1 for each in digests.values())
    print(f"\n{'the same bits' if same else 'DIFFERENT'} in {time.monotonic() - began:.0f} s")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
