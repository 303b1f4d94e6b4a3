#!/bin/sh
# Bring requirements.lock and requirements-dev.lock up to date with pyproject.toml.
# The hashes are those of every file that the index has for a version: all platforms.
# Usage: BIN=.venv/bin deploy/dev/lock.sh [--upgrade | --upgrade-package NAME]
set -eu
export CUSTOM_COMPILE_COMMAND='make lock'
compile() {
    # No addresses: where packages come from is the business of whoever installs them.
    "${BIN:-.venv/bin}/pip-compile" --quiet --generate-hashes --strip-extras --allow-unsafe \
        --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
        --build-deps-for editable "$@" pyproject.toml
}
compile --output-file requirements.lock "$@"
compile --extra dev --constraint requirements.lock --output-file requirements-dev.lock "$@"
