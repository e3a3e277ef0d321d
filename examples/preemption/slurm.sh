#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# SLURM sends SIGTERM to this shell 120 s before the time is over, and when the job is preempted. The shell hands it on;
# training takes a snapshot and exits with 143; then the job asks to be queued again and continues from that snapshot.
set -u
TRAIN=${TRAIN:-"python examples/digits.py --run-dir runs/digits"}

$TRAIN &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM
wait "$child"
code=$?
# The first wait returns when the trap has run; the training may still be writing its snapshot.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
