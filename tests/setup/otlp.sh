#!/bin/bash
# Puts OpenTelemetry's own messages, as Python has them, into a folder. Only `make observe` uses them.
#   usage: otlp.sh      makes .lab/otlp/bin/python
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

wanted=$checkout/tests/observe/requirements.txt
room=$lab/otlp
this=$(recipe "$wanted" "${BASH_SOURCE[0]}")
if is_made "$room" "$this"; then exit 0; fi
lock_lab
if is_made "$room" "$this"; then exit 0; fi
rm -rf "$room"
python3 -m venv "$room" || die "python3 has no venv: apt-get install python3-venv"
retry 5 "$room/bin/pip" -q install --require-hashes -r "$wanted"
mark_made "$room" "$this"
