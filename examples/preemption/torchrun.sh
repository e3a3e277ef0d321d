#!/bin/bash
# Starts torchrun with the arguments given, and exits with 143 when SIGTERM stopped the job.
# torchrun hands SIGTERM on to its processes, which save and exit with 143, and then exits with 1 itself: a scheduler
# could not tell an interrupted job from a failed one. Its --shutdown-timeout is the time between SIGTERM and SIGKILL for
# them, 30 s by default: name at least the grace_seconds of fit. It came with torch 2.12.
#   TRAIN="bash examples/preemption/torchrun.sh --nproc-per-node=4 --shutdown-timeout=110 examples/gpt.py --plan fsdp"
set -u
told=
${TORCHRUN:-torchrun} "$@" &
child=$!
trap 'told=yes; kill -TERM "$child" 2>/dev/null' TERM
wait "$child"
code=$?
# The first wait returns when the trap has run; the processes may still be writing their snapshot.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
if [ -n "$told" ] && [ "$code" -ne 0 ]; then
    code=143
fi
exit "$code"
