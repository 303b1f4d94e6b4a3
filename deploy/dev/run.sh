#!/bin/sh
# Start one instance for trying things out: SQLite, loopback WhatsApp, everything in .run/.
# Usage: deploy/dev/run.sh NAME PORT; `make run` and `make run-standby` call it.
set -eu
umask 077
name=$1
port=$2
address=http://127.0.0.1:$port
watchkeeper=.venv/bin/watchkeeper
mkdir -p ".run/$name" .run/shared .run/loopback

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
make_once .run/token .venv/bin/python -c 'import secrets; print(secrets.token_urlsafe(32))'
make_once .run/encryption-key $watchkeeper keygen
# curl reads it with -H @file, so that the token is in no process list and no shell history.
make_once .run/authorization sed 's/^/Authorization: Bearer /' .run/token

cat <<END

Watchkeeper, instance $name: $address (API: $address/docs)
State in .run/, the admin token in .run/token. Ctrl+C hands over and stops.
In another terminal, here, once it is ACTIVE:

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

END
if [ "$name" = a ]; then
    echo "  # a second instance that takes over, with every account, when you stop this one"
    echo "  make run-standby"
    echo
fi

export WATCHKEEPER_INSTANCE_NAME="$name" WATCHKEEPER_HTTP_BIND="127.0.0.1:$port"
export WATCHKEEPER_STORE=sqlite WATCHKEEPER_CONNECTOR=loopback
export WATCHKEEPER_STATE_DIR=".run/$name" WATCHKEEPER_SHARED_DIR=.run/shared
export WATCHKEEPER_LOOPBACK_DIR=.run/loopback
export WATCHKEEPER_ADMIN_TOKEN_FILE=.run/token
export WATCHKEEPER_ENCRYPTION_KEY_FILE=.run/encryption-key
exec $watchkeeper run
