#!/bin/sh
# What `make test` runs side by side, for each of them mostly waits: the tests, those with Node, and a
# hundred simulated worlds on what these leave of the processors. With arguments, which go to pytest,
# only what they ask for.
set -eu
[ $# -eq 0 ] || exec .venv/bin/pytest -m "not long" "$@"
with_node='tests/bridge tests/whatsapp'
out=$(mktemp -d)
jobs=
# shellcheck disable=SC2317  # The trap below calls it.
finish() {
    # shellcheck disable=SC2086  # Several, and numbers.
    [ -z "$jobs" ] || kill $jobs 2>/dev/null || true
    rm -rf "$out"
}
trap finish EXIT
trap 'exit 130' INT TERM

nice -n 19 .venv/bin/python -m tests.simulation \
    --first 101 --seeds 100 --minutes 10 --processes 1 >"$out/worlds" 2>&1 &
worlds=$!
# shellcheck disable=SC2086
.venv/bin/pytest -m "not long" $with_node -p no:cacheprovider >"$out/with_node" 2>&1 &
with_node_tests=$!
jobs="$worlds $with_node_tests"

status=0
# shellcheck disable=SC2046,SC2086
.venv/bin/pytest -m "not long" $(printf ' --ignore=%s' $with_node) || status=1
wait "$with_node_tests" || status=1
cat "$out/with_node"
wait "$worlds" || status=1
jobs=
cat "$out/worlds"
exit "$status"
