# Sourced by launchers for rented machines, whose python3 may be too old: sets PYTHON to a 3.11 or 3.12, which it gets where there
# is none.
#
#   PYTHON   the interpreter to try first (python3)

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.12 python3.11; do
    # Debian's python3 can lack what makes virtual environments.
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  echo "no Python 3.11 or 3.12 on this machine, getting 3.12 with uv" >&2
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  PATH=$PATH:$HOME/.local/bin
  uv python install --quiet 3.12
  PYTHON=$(uv python find 3.12)
}

find_python
