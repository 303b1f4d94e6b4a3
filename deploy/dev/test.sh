#!/bin/sh
# What `make test` runs: a hundred simulated worlds in the background, on what the tests leave of the
# processors, and the tests. With arguments, which go to pytest, only what they ask for.
set -eu
out=$(mktemp)
worlds=
finish() {
    [ -z "$worlds" ] || kill "$worlds" 2>/dev/null || true
    rm -f "$out"
}
trap finish EXIT
trap 'exit 130' INT TERM
if [ $# -eq 0 ]; then
    nice -n 19 .venv/bin/python -m tests.simulation \
        --first 101 --seeds 100 --minutes 10 --processes 1 >"$out" 2>&1 &
    worlds=$!
fi
status=0
.venv/bin/pytest -m "not long" "$@" || status=$?
if [ -n "$worlds" ]; then
    wait "$worlds" || status=1
    worlds=
    cat "$out"
fi
exit "$status"
