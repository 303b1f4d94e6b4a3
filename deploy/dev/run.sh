#!/bin/sh
# Start one instance for trying things out: SQLite, everything in one directory.
# Usage: deploy/dev/run.sh NAME PORT [CONNECTOR]; `make run`, `make run-standby` and
# `make run-whatsapp` call it. The loopback WhatsApp's accounts are in .run/, real ones apart from
# them.
set -eu
umask 077
name=$1
port=$2
connector=${3:-loopback}
address=http://127.0.0.1:$port
watchkeeper=.venv/bin/watchkeeper
state=.run
[ "$connector" = loopback ] || state=.run/whatsapp
mkdir -p "$state/$name" "$state/shared" "$state/loopback"

# Made once and used by every instance. `ln` fails when another start was quicker: then that one's
# counts, for both.
make_once() {
    file=$1
    shift
    [ -s "$file" ] && return
    "$@" >"$file.$$"
    ln "$file.$$" "$file" 2>/dev/null || true
    rm "$file.$$"
}
make_once "$state/token" .venv/bin/python -c 'import secrets; print(secrets.token_urlsafe(32))'
make_once "$state/encryption-key" $watchkeeper keygen
# curl reads it with -H @file, so that the token is in no process list and no shell history.
make_once "$state/authorization" sed 's/^/Authorization: Bearer /' "$state/token"

cat <<END

Watchkeeper, instance $name: $address (API: $address/docs)
State in $state/, the admin token in $state/token. Ctrl+C hands over and stops.
In another terminal, here, once it is ACTIVE:

END
if [ "$connector" = loopback ]; then
    cat <<END

  # who is what
  curl -sH @.run/authorization $address/api/status/dashboard

  # pair an account with the loopback WhatsApp: add it, scan its QR code, see it connected
  curl -sH @.run/authorization -H 'Content-Type: application/json' \\
    -d '{"accountId": "anna", "name": "Anna"}' $address/api/whatsapp/accounts
  curl -sH @.run/authorization -X POST $address/api/loopback/scan/anna
  curl -sH @.run/authorization $address/api/whatsapp/accounts

  # send a message, and see what arrived
  curl -sH @.run/authorization -H 'Content-Type: application/json' \\
    -d '{"accountId": "anna", "to": "4915112345678", "message": "Hello"}' \\
    $address/api/whatsapp/send-message
  curl -sH @.run/authorization $address/api/loopback/messages

  # have somebody answer, and read what came in
  curl -sH @.run/authorization -H 'Content-Type: application/json' \\
    -d '{"accountId": "anna", "from": "4915112345678", "text": "Hello yourself"}' \\
    $address/api/loopback/receive
  curl -sH @.run/authorization "$address/api/whatsapp/messages?accountId=anna"

END
else
    cat <<END
  # link a phone's WhatsApp: its QR code is drawn there; scan it with the phone (Linked devices)
  $watchkeeper accounts add Anna --url $address --token-file $state/token

  # send a message, to a number in international form, digits only
  $watchkeeper send anna 4915112345678 Hello --url $address --token-file $state/token

END
fi
if [ "$name-$connector" = a-loopback ]; then
    echo "  # a second instance that takes over, with every account, when you stop this one"
    echo "  make run-standby"
    echo
fi

export WATCHKEEPER_INSTANCE_NAME="$name" WATCHKEEPER_HTTP_BIND="127.0.0.1:$port"
export WATCHKEEPER_STORE=sqlite WATCHKEEPER_CONNECTOR="$connector"
export WATCHKEEPER_STATE_DIR="$state/$name" WATCHKEEPER_SHARED_DIR="$state/shared"
export WATCHKEEPER_LOOPBACK_DIR="$state/loopback"
export WATCHKEEPER_ADMIN_TOKEN_FILE="$state/token"
export WATCHKEEPER_ENCRYPTION_KEY_FILE="$state/encryption-key"
exec $watchkeeper run
