# Sourced by the other launchers: makes a virtual environment and installs the exact versions of constraints.txt into it.
#
#   PYTHON   the interpreter to make it with (3.11 or 3.12)
#   VENV     where it lives
#
# install EXTRA [PACKAGE...]   this project with the extra, then packages that must come without their dependencies

PYTHON=${PYTHON:-python3}
VERSION=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV=${VENV:-.venv-$VERSION}

install() {
  local extra=$1
  shift
  case $VERSION in
    3.11 | 3.12) ;;
    *)
      echo "error: $PYTHON is Python $VERSION, expected 3.11 or 3.12; set PYTHON to one of them" >&2
      exit 2
      ;;
  esac
  local stamp=$VENV/.installed-$extra
  local wanted
  wanted=$(cat setup.py constraints.txt launch/environment.sh; echo "$extra $*")
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing into $VENV (Python $VERSION), once; this takes a few minutes"
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
    if [ $# -gt 0 ]; then
      "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --no-build-isolation "$@"
    fi
    printf '%s' "$wanted" >"$stamp"
  fi
}
