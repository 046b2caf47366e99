#!/usr/bin/env bash
# Installs everything the tests need and runs the default test suite; further arguments go to pytest.
#
#   bash launch/test.sh                          the default tests, minutes
#   bash launch/test.sh -m slow                  the slow ones
#   PYTHON=python3.12 bash launch/test.sh        on another Python
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

# The PyTorch originals that the tests compare with.
install test openai-whisper ichigo ichigo_asr vector-quantize-pytorch

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# As many processes as cores, since compilers use one core each; a file's tests share one process and its fixtures.
"$VENV/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
