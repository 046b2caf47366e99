#!/usr/bin/env bash
# Installs and trains on a TPU VM, in the copy of this repository that is on it; of a pod slice, every host runs this
# (launch/tpu_pod.sh does it).
#
#   bash launch/tpu_vm.sh --config configs/FILE.py:ARG --workdir DIR [--config.section.field=value …]
#
#   BUCKET   a bucket to mount as the folder bucket/ of this repository, for --workdir bucket/runs/…, with gcsfuse (none). It
#            needs a hierarchical namespace: only there can folders be renamed, which finishes a checkpoint.
#   PYTHON   the interpreter to try first (python3)
#   VENV     where to install (.venv-3.11 or .venv-3.12)
#
# The run goes on when the connection to this machine is lost, and the same command follows it again. Ctrl-C and SIGTERM reach
# it: it saves a checkpoint and ends. The exit code is the run's.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/find_python.sh
source launch/environment.sh

BUCKET=${BUCKET:-}

install tpu,gcs

if [ -n "$BUCKET" ] && ! mountpoint --quiet bucket; then
  if ! command -v gcsfuse >/dev/null; then
    echo "error: no gcsfuse found, expected it to mount BUCKET=$BUCKET; install it or set BUCKET to nothing" >&2
    exit 2
  fi
  mkdir -p bucket
  # Without a metadata cache a host sees at once what another one has written.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$BUCKET" bucket
fi

run=$VENV/run # the last run's: .command, .pid, .log, and .code until a launcher has told it
command=$(printf '%q ' "$@")
same() { [ "$(cat "$run.command" 2>/dev/null)" = "$command" ]; }
going_on() { [ -f "$run.pid" ] && kill -0 "$(cat "$run.pid")" 2>/dev/null; }

if same && { going_on || [ -f "$run.code" ]; }; then
  echo "following the run that was started before"
elif going_on; then
  echo "error: this machine still trains with $(cat "$run.command"), expected nothing or the same command;" \
    "wait for it or stop it: kill $(cat "$run.pid")" >&2
  exit 2
else
  rm -f "$run".*
  printf '%s' "$command" >"$run.command"
  # setsid: out of reach of what a lost connection or the terminal's Ctrl-C sends.
  # shellcheck disable=SC2016 # it is the inner shell that expands
  setsid bash -c '
    run=$1 python=$2
    shift 2
    "$python" -m ichigo_jax.train "$@" &
    echo $! >"$run.pid"
    code=0
    wait $! || code=$?
    echo "$code" >"$run.partial"
    mv "$run.partial" "$run.code"
  ' train "$run" "$VENV/bin/python" "$@" </dev/null >"$run.log" 2>&1 &
  until [ -f "$run.pid" ]; do sleep 0.1; done
fi

pid=$(cat "$run.pid")
trap 'kill -TERM "$pid" 2>/dev/null || true' TERM
trap 'kill -INT "$pid" 2>/dev/null || true' INT
set -m # the terminal's Ctrl-C is for the run, not for tail
tail --pid="$pid" --sleep-interval=0.2 --lines=+1 --follow "$run.log" &
follower=$!
while kill -0 "$follower" 2>/dev/null; do wait "$follower" || true; done
for _ in {1..100}; do
  if [ -f "$run.code" ]; then
    code=$(cat "$run.code")
    echo "the run ended with exit code $code" # this fails when the connection is lost, and the next launcher tells the code
    rm "$run.code" "$run.pid"
    exit "$code"
  fi
  sleep 0.1
done
echo "error: the run ended without an exit code, expected one in $run.code; start the same command again" >&2
exit 1
