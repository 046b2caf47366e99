#!/usr/bin/env bash
# Trains on a SLURM cluster; options before the file's name replace those below:
#
#   sbatch --nodes=4 launch/slurm.sh --config configs/FILE.py:ARG --workdir DIR [--config.section.field=value …]
#
#   PYTHON   an interpreter that has this project with its cuda extra, in a folder that all nodes see
#            (.venv-3.11/bin/python; made by: bash -c 'source launch/environment.sh; install cuda')
#
# To be submitted from the repository. DIR must be in a folder that all nodes see. One task per GPU, as JAX expects it; it asks
# SLURM for the rest. Two minutes before the time limit the tasks get SIGTERM, save a checkpoint and end with 143, and the job
# is put back into the queue, where it goes on from the checkpoint. So it is if SLURM preempts the job with a grace time.
#SBATCH --job-name=ichigo
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

PYTHON=${PYTHON:-.venv-3.11/bin/python}

if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: no SLURM_JOB_ID found, expected to run as a SLURM job; start this with: sbatch launch/slurm.sh …" >&2
  exit 2
fi
trap : TERM # whatever is sent to the whole job is for the tasks; this script has to outlive them

# The first task to end must not take the others down while they save; they are killed when they are still there a minute later.
code=0
srun --kill-on-bad-exit=0 --wait=60 "$PYTHON" -m ichigo_jax.train "$@" || code=$?

if [ "$code" -eq 143 ]; then
  # A job that is being cancelled, or that SLURM itself requeues, is no longer running by now.
  if scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    echo "stopped with a checkpoint saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" ||
      echo "error: job $SLURM_JOB_ID could not be requeued; submit the same command again, it goes on from the checkpoint" >&2
  fi
fi
exit "$code"
