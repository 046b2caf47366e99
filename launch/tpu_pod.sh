#!/usr/bin/env bash
# Trains on a TPU pod slice from any machine with gcloud: asks for the slice by a queued resource, waits until it is there, and
# runs launch/tpu_vm.sh with the same arguments on all its hosts. When the slice is preempted, deletes it, asks again and goes on
# from the last checkpoint.
#
#   NAME=ichigo ZONE=us-east5-b TYPE=v6e-16 VERSION=v2-alpha-tpuv6e BUCKET=my-bucket \
#     bash launch/tpu_pod.sh --config configs/FILE.py:ARG --workdir bucket/runs/NAME [--config.section.field=value …]
#
#   NAME       of the queued resource and of the slice
#   ZONE       where
#   TYPE       gcloud's --accelerator-type
#   VERSION    gcloud's --runtime-version for it
#   BUCKET     a Cloud Storage bucket with a hierarchical namespace, which all hosts mount as bucket/: data and --workdir belong
#              there, since the hosts share no other folder and lose their disks with the slice
#   PROJECT    the project (gcloud's own)
#   OPTIONS    more options of `queued-resources create` (--spot)
#   SETUP      a command that every host runs first, such as one that installs gcsfuse where the image lacks it (none)
#   RESTARTS   how often to go on after a preemption or a lost connection before giving up (100)
#   POLL       seconds between two looks at the slice's state (30)
#   KEEP       1: leave the slice there at the end (0: delete it)
#   DRY_RUN    1: print the gcloud commands of a run without a preemption, and do nothing (0)
#
# The hosts get the last commit, not the working tree. Ctrl-C leaves the slice and the run on it as they are; the same command
# follows it again.
set -euo pipefail
cd "$(dirname "$0")/.."

PROJECT=${PROJECT:-}
OPTIONS=${OPTIONS---spot}
SETUP=${SETUP:-true}
RESTARTS=${RESTARTS:-100}
POLL=${POLL:-30}
KEEP=${KEEP:-0}
DRY_RUN=${DRY_RUN:-0}

for variable in NAME ZONE TYPE VERSION BUCKET; do
  if [ -z "${!variable:-}" ]; then
    echo "error: $variable not set, expected a value; the top of launch/tpu_pod.sh says what it means" >&2
    exit 2
  fi
done

place=(--zone="$ZONE")
[ -z "$PROJECT" ] || place+=(--project="$PROJECT")
archive=$(mktemp --suffix=.tar.gz)
answer=$(mktemp)
trap 'rm -f "$archive" "$answer"' EXIT
trap 'echo "the slice $NAME is left as it is; the same command follows the run on it" >&2; exit 130' INT TERM
git archive --format=tar.gz --output="$archive" HEAD

run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Sets state: what gcloud says, ABSENT, or UNKNOWN where it could not be asked.
look() {
  if state=$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>"$answer"); then
    return
  elif grep -q NOT_FOUND "$answer"; then
    state=ABSENT
  else
    cat "$answer" >&2
    state=UNKNOWN
  fi
}

create() {
  local more
  read -ra more <<<"$OPTIONS"
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$VERSION" "${more[@]}"
}

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet; }

# Copies the commit to all hosts and trains there; the exit code is the run's.
train() {
  local command
  command="{ $SETUP; } && mkdir -p ichigo_jax && tar -xzf ichigo_jax.tar.gz -C ichigo_jax && cd ichigo_jax && $(
    printf 'BUCKET=%q bash launch/tpu_vm.sh' "$BUCKET"
    printf ' %q' "$@"
  )"
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:ichigo_jax.tar.gz" "${place[@]}" --worker=all || return 255
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$command"
}

end() {
  if [ "$KEEP" = 1 ]; then
    echo "the slice $NAME is left there and costs; delete it with:"
    DRY_RUN=1 delete
  else
    delete
  fi
  exit "$1"
}

if [ "$DRY_RUN" = 1 ]; then
  create
  run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
  train "$@"
  end 0
fi

for ((restart = 0; restart <= RESTARTS; restart++)); do
  while look && [ "$state" != ACTIVE ]; do
    echo "slice $NAME: $state"
    case $state in
      ABSENT) create ;;
      FAILED | SUSPENDED)
        delete
        restart=$((restart + 1))
        [ "$restart" -le "$RESTARTS" ] || break 2
        ;;
    esac
    sleep "$POLL"
  done

  code=0
  train "$@" || code=$?
  case $code in
    0) echo "the run is complete" && end 0 ;;
    2) end 2 ;; # what the run was given cannot be used
  esac

  # A preempted slice can count as active for a while, and the run on it ends with any code.
  for _ in 1 2 3 4 5; do
    look
    [ "$state" = ACTIVE ] || continue 2
    sleep "$POLL"
  done
  case $code in
    143 | 255) echo "exit code $code on an active slice: stopped from outside or connection lost; going on" ;;
    *) end "$code" ;;
  esac
done
echo "error: $RESTARTS restarts used up, expected the run to end before; the same command goes on (RESTARTS sets how many)" >&2
exit 1
