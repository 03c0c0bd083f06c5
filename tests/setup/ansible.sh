#!/bin/bash
# Puts ansible-core and ansible-lint into .lab/ansible, by their hashes. Only `make ansible` runs them.
#   usage: ansible.sh      makes .lab/ansible/venv/bin/{ansible-playbook,ansible-lint}
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

wanted=$checkout/tests/ansible/requirements.txt
venv=$lab/ansible/venv
this=$(recipe "${BASH_SOURCE[0]}" "$wanted")-$lab
if is_made "$venv" "$this"; then exit 0; fi
lock_lab
if is_made "$venv" "$this"; then exit 0; fi
say "installing Ansible into $venv"
rm -rf "$venv"
/usr/bin/python3 -m venv "$venv" || die "python3 has no venv: apt-get install python3-venv"
retry 5 "$venv/bin/pip" -q --disable-pip-version-check install --require-hashes -r "$wanted"
"$venv/bin/ansible-playbook" --version >/dev/null || die "ansible-playbook does not run"
mark_made "$venv" "$this"
