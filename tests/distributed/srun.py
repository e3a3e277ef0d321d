"""A stand-in for `srun [-n N] command ...` on one machine: starts tasks with the variables that srun sets."""

import argparse
import os
import subprocess
import sys


def variables(rank: int, size: int, job: str) -> dict[str, str]:
    """What srun sets in a task of a step on one node, as `srun env` shows it (SLURM 23.11)."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_JOBID": job,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": str(size),
        "SLURM_NPROCS": str(size),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_TASKS_PER_NODE": str(size),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def main() -> int:
    parser = argparse.ArgumentParser("srun")
    parser.add_argument("-n", "--ntasks", type=int, default=int(os.environ.get("SLURM_NTASKS", "1")))
    parser.add_argument("--kill-on-bad-exit", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    size, command = given.ntasks, given.command
    job = os.environ["SLURM_JOB_ID"]  # of the allocation, which sbatch or salloc made
    tasks = [subprocess.Popen(command, env=os.environ | variables(r, size, job)) for r in range(size)]
    return max(task.wait() for task in tasks)  # as srun does


if __name__ == "__main__":
    sys.exit(main())
