#!/bin/bash
# Puts what tests/NAME/requirements.txt names into .lab/NAME/venv, by its hashes. Only `make ansible` and
# `make orchestrators` use it.
#   usage: python.sh NAME
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

name=$1
wanted=$checkout/tests/$name/requirements.txt
venv=$lab/$name/venv
"$(dirname "${BASH_SOURCE[0]}")/packages.sh" /usr/lib/python3.11/ensurepip:python3-venv
this=$(recipe "${BASH_SOURCE[0]}" "$wanted")-$lab
if is_made "$venv" "$this"; then exit 0; fi
lock_lab
if is_made "$venv" "$this"; then exit 0; fi
say "installing Python's packages into $venv"
rm -rf "$venv"
/usr/bin/python3 -m venv "$venv"
retry 5 "$venv/bin/pip" -q --disable-pip-version-check install --require-hashes -r "$wanted"
mark_made "$venv" "$this"
