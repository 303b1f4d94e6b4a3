#!/usr/bin/env bash
# Replace the two instances one after the other, the standby first, so that one always serves. Stops
# where an instance does not become ready, and leaves the other one alone.
# Usage: redeploy.sh [--pull | --no-build] [COMPOSE…]
#   --pull       fetch the image instead of building it; --no-build takes the one that is here
#   COMPOSE      how to call compose, with options of its own: `docker compose` where it is not said,
#                `podman-compose` where that is not here
#   READY_S=120  how many seconds an instance may take until it is ready
set -euo pipefail
ready_s=${READY_S:-120}
inside=http://127.0.0.1:8080 # where an instance answers in its own container

image=build
case ${1:-} in
    --pull) image=pull ;;
    --no-build) image=here ;;
    -*)
        echo "usage: $0 [--pull | --no-build] [COMPOSE…]" >&2
        exit 2
        ;;
esac
[[ $image == build ]] || shift
compose=("$@")
if ((${#compose[@]} == 0)); then
    if docker compose version >/dev/null 2>&1; then
        compose=(docker compose)
    elif command -v podman-compose >/dev/null; then
        compose=(podman-compose)
    else
        echo "redeploy: neither \`docker compose\` nor podman-compose is here" >&2
        exit 2
    fi
fi
cd "$(dirname "$0")"

give_up() { # give_up SENTENCE: what is not as it should be, and what to do
    echo "redeploy: $1" >&2
    exit 1
}

ask() { # ask INSTANCE WORD…: the instance's own command, in its container, where its token is
    "${compose[@]}" exec -T "$1" watchkeeper "${@:2}" --url "$inside" </dev/null 2>/dev/null
}

is_ready() { # PASSIVE and ACTIVE alike: any instance answers
    ask "$1" health --ready >/dev/null
}

is_active() {
    grep -q '^    "state": "ACTIVE"' <<<"$(ask "$1" status --json)"
}

replace() { # replace INSTANCE OTHER
    is_ready "$2" || give_up "$2 is not ready, and would have to serve without $1. Nothing more was changed.
  \`${compose[*]} logs $2\` says why; \`${compose[*]} up -d\` starts what is stopped."
    echo "redeploy: replacing $1; $2 serves"
    # Stopped first, with stop_grace_period: an ACTIVE one drains and hands over to the other.
    "${compose[@]}" up -d --no-deps --no-build --force-recreate "$1" </dev/null
    local give_up_at=$((SECONDS + ready_s))
    until is_ready "$1"; do
        if ((SECONDS >= give_up_at)); then
            "${compose[@]}" logs --tail 20 "$1" </dev/null >&2 || true
            give_up "$1 is not ready after $ready_s s; its last lines are above. $2 was left alone and serves."
        fi
        sleep 0.5
    done
    echo "redeploy: $1 is ready"
}

case $image in
    build) "${compose[@]}" build a </dev/null ;;
    pull) "${compose[@]}" pull a </dev/null ;;
esac

first=b second=a
if is_active b || ! is_ready a; then
    first=a second=b
fi
replace "$first" "$second"
replace "$second" "$first"
echo "redeploy: done"
