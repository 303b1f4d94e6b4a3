#!/bin/sh
# Set up .venv from a lock file, with the `watchkeeper` command in it. `make` calls this.
# Usage: deploy/dev/setup.sh LOCK_FILE
set -eu
lock=$1
modern='import sys; sys.exit(sys.version_info < (3, 11))'

if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    found=
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if command -v "$python" >/dev/null && "$python" -c "$modern"; then
            found=$python
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "Watchkeeper needs Python 3.11 or later, and there is none on the PATH." >&2
        echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew" >&2
        echo "install python), or name one: make PYTHON=/path/to/python3 …" >&2
        exit 1
    fi
    echo "Setting up .venv with $("$found" --version) …"
    rm -rf .venv
    if ! "$found" -m venv .venv; then
        rm -rf .venv
        echo "Python's venv module does not work (Debian, Ubuntu: apt-get install python3-venv)." >&2
        exit 1
    fi
fi

echo "Installing $lock into .venv …"
export PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/python -m pip install --quiet --require-hashes -r "$lock"
# The locked setuptools builds it: nothing is fetched that the lock file does not name. Twice quiet:
# it warns of what is meant, an editable install from here.
.venv/bin/python -m pip install -qq --no-deps --no-build-isolation --editable .
