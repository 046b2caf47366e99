#!/usr/bin/env bash
# One training run as several processes on this machine, as a cluster would run it:
#
#   PROCESSES=2 bash launch/local_processes.sh --config configs/FILE.py:ARG --workdir DIR [--config.section.field=value …]
#
#   PROCESSES   how many (2)
#   PORT        where they find each other (29400)
#   PATIENCE    seconds that the others have to end after one has failed (10); then they are killed
#   PYTHON      the interpreter (python3)
#
# For CPUs: on a machine with GPUs every process would take all of them. Ctrl-C and SIGTERM reach all processes once, and their
# ends are awaited. The exit code is the first that is not 0.
set -euo pipefail

PROCESSES=${PROCESSES:-2}
PORT=${PORT:-29400}
PATIENCE=${PATIENCE:-10}
PYTHON=${PYTHON:-python3}

if ! [[ $PROCESSES =~ ^[1-9][0-9]*$ ]]; then
  echo "error: PROCESSES=$PROCESSES found, expected a positive number; set PROCESSES to how many processes shall run" >&2
  exit 2
fi

processes=()
stopping=
send() { kill -s "$1" "${processes[@]}" 2>/dev/null || true; }
trap 'stopping=yes; send TERM' TERM
trap 'stopping=yes; send INT' INT

# A process group each, so that the terminal's Ctrl-C does not reach them a second time: at a second one they end without saving.
set -m
for ((id = 0; id < PROCESSES; id++)); do
  "$PYTHON" -m ichigo_jax.train "$@" \
    --coordinator "127.0.0.1:$PORT" --processes "$PROCESSES" --process-id "$id" </dev/null &
  processes+=($!)
done

code=0
failed_at=
while [ ${#processes[@]} -gt 0 ]; do
  running=" $(jobs -rp | tr '\n' ' ')"
  left=()
  for process in "${processes[@]}"; do
    status=0
    if [[ $running == *" $process "* ]]; then
      left+=("$process")
    else
      wait "$process" || status=$?
    fi
    [ "$code" -ne 0 ] || code=$status
  done
  processes=(${left[@]+"${left[@]}"})
  if [ "$code" -ne 0 ] && [ -z "$stopping" ] && [ -z "$failed_at" ]; then
    failed_at=$SECONDS
    echo "a process ended with exit code $code, stopping the others" >&2
    send TERM
  elif [ -n "$failed_at" ] && ((SECONDS - failed_at >= PATIENCE)); then
    send KILL
  fi
  sleep 0.1
done
exit "$code"
