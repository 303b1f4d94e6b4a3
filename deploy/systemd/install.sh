#!/bin/sh
# Put Watchkeeper on this host as systemd services, or take it away again.
# `make install-systemd` and `make uninstall-systemd` call it; both may be repeated.
# Usage: install.sh install|uninstall      Variables, with their defaults:
#   PREFIX=/opt/watchkeeper   the program: a virtual environment of its own
#   SYSCONFDIR=/etc           settings in watchkeeper/, and the units in systemd/system/
#   DESTDIR=                  put before both, for packages; then nothing is started or reloaded
#   PYTHON=python3            3.11 or later
set -eu
prefix=${PREFIX:-/opt/watchkeeper} sysconfdir=${SYSCONFDIR:-/etc} destdir=${DESTDIR:-}
here=$(cd "$(dirname "$0")" && pwd) source=$(cd "$(dirname "$0")/../.." && pwd)
config=$destdir$sysconfdir/watchkeeper units=$destdir$sysconfdir/systemd/system
program=$destdir$prefix

reload() {
    if [ -z "$destdir" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
}

put_unit() { # put_unit NAME: with the paths of this installation in it
    sed -e "s|@PREFIX@|$prefix|g" -e "s|@SYSCONFDIR@|$sysconfdir|g" "$here/$1" >"$units/$1.new"
    chmod 644 "$units/$1.new"
    mv "$units/$1.new" "$units/$1"
}

make_secret() { # make_secret NAME ARGUMENT…: made once, never replaced
    name=$1
    shift
    if ! [ -s "$config/secrets/$name" ]; then
        "$program/bin/python" -m daemon keygen "$@" --output "$config/secrets/$name"
        echo "Made $config/secrets/$name."
    fi
}

install_all() {
    umask 022
    mkdir -p "$program" "$units" "$config" "$program/share/doc/watchkeeper"
    if ! [ -x "$program/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$program"
    fi
    echo "Installing into $program …"
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
    # Built with the locked setuptools from a copy: nothing is written into the source directory.
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    (cd "$source" && tar -cf - pyproject.toml README.md LICENSE machine daemon) | tar -xf - -C "$build"
    "$program/bin/python" -m pip install --quiet --require-hashes -r "$source/requirements.lock"
    "$program/bin/python" -m pip install --quiet --no-deps --no-build-isolation --force-reinstall "$build"
    if [ -n "$destdir" ]; then
        # A package is made: the scripts must name where they will be, not where they are now.
        sed -i "1s|^#!$program|#!$prefix|" "$program"/bin/watchkeeper
    fi
    cp "$source"/docs/*.md "$program/share/doc/watchkeeper/"
    for unit in watchkeeper.service watchkeeper@.service; do
        put_unit "$unit"
    done
    [ -e "$config/watchkeeper.env" ] || cp "$here/watchkeeper.env" "$config/watchkeeper.env"
    mkdir -p "$config/secrets"
    chmod 700 "$config/secrets"
    make_secret admin-token --token
    make_secret encryption-key
    reload
    cat <<END
Installed. Settings: $sysconfdir/watchkeeper/watchkeeper.env; keep a copy of
$sysconfdir/watchkeeper/secrets/encryption-key, apart from backups of what it encrypts.
  $prefix/bin/watchkeeper setup-whatsapp # once, and after an upgrade: Baileys (Node.js 20 and npm)
  systemctl enable --now watchkeeper     # one instance
  systemctl status watchkeeper           # its state, epoch and accounts
  journalctl -u watchkeeper -f           # what it does
END
}

uninstall_all() {
    if [ -z "$destdir" ] && [ -d /run/systemd/system ]; then
        systemctl disable --now watchkeeper.service 'watchkeeper@*.service' 2>/dev/null || true
    fi
    rm -f "$units/watchkeeper.service" "$units/watchkeeper@.service"
    rm -rf "$program"
    reload
    echo "Removed the program and its units. Kept: settings and secrets in $sysconfdir/watchkeeper,"
    echo "accounts in /var/lib/watchkeeper."
}

case ${1:-} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *)
        echo "usage: $0 install|uninstall" >&2
        exit 2
        ;;
esac
