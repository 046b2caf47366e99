#!/usr/bin/env bash
# From nothing to a speech model that answers, in minutes on two CPU cores:
#
#   bash launch/quickstart.sh            everything, into runs/quickstart
#   bash launch/quickstart.sh --smoke    every stage with tiny numbers, into runs/quickstart-smoke
#
# Needs python3 (3.11 or 3.12; or set PYTHON) and its package index. Run again after an interruption, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

install quickstart
"$VENV/bin/python" launch/quickstart.py "$@"
