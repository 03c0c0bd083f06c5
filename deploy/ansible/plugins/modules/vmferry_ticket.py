#!/usr/bin/python
"""Begins to serve a ticket on the machine that has the authority, and tells it."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: vmferry_ticket
short_description: Invites a host to fetch its certificate
description:
  - Begins C(vmferry certs invite) in the background and tells the ticket, with which the host makes its key and fetches
    its certificate, once. No key travels. It serves until the ticket was used or is over.
  - The ticket is a secret. Use C(no_log).
options:
  host:
    description: The new host's identity.
    type: str
    required: true
  dir:
    description: The authority's folder.
    type: path
    required: true
  address:
    description: Where the new host reaches this machine, as HOST:PORT. Each ticket that is open takes a port of its own.
    type: str
    required: true
  minutes:
    description: How long the ticket is good.
    type: int
    default: 10
  force:
    description: Give a host that has a certificate another one, for a new key.
    type: bool
    default: false
  program:
    description: The command line.
    type: path
    default: vmferry
attributes:
  check_mode:
    description: Can run in check mode, and invites nobody then.
    support: full
author: The vmferry authors (@vmferry)
"""

EXAMPLES = r"""
- name: A ticket for bravo
  vmferry.hypervisor.vmferry_ticket:
    host: bravo
    dir: /srv/pki
    address: 10.0.0.5:9909
  no_log: true
  register: ticket
"""

RETURN = r"""
ticket:
  description: For C(vmferry join -) on the host.
  returned: unless in check mode
  type: str
"""

import os
import re
import subprocess
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

PATIENCE_S = 30


def begin(words, output):
    """In a session of its own, so that the end of this module is not its."""
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, close_fds=True, start_new_session=True)


def main():
    options = dict(
        host=dict(type="str", required=True),
        dir=dict(type="path", required=True),
        address=dict(type="str", required=True),
        minutes=dict(type="int", default=10),
        force=dict(type="bool", default=False),
        program=dict(type="path", default="vmferry"),
    )
    module = AnsibleModule(argument_spec=options, supports_check_mode=True)
    params = module.params
    program = params["program"]
    program = program if "/" in program else module.get_bin_path(program, required=True)
    if module.check_mode:
        module.exit_json(changed=True)
    words = [program, "certs", "invite", params["host"], "--dir", params["dir"], "--address", params["address"]]
    words += ["--minutes", str(params["minutes"])] + (["--force"] if params["force"] else [])
    # Nobody else can read it, and nobody finds it later.
    handle, path = tempfile.mkstemp(prefix="vmferry-ticket-")
    try:
        process = begin(words, handle)
        until = time.time() + PATIENCE_S
        while time.time() < until:
            ended = process.poll()
            with open(path) as said:
                text = said.read()
            found = re.search(r"vmferry join '(\S+)'", text)
            if found:
                module.exit_json(changed=True, ticket=found.group(1))
            if ended is not None:
                module.fail_json(msg=text.strip() or "exit code %s without a word" % ended)
            time.sleep(0.1)
        process.kill()
        module.fail_json(msg="no ticket within %s s" % PATIENCE_S)
    finally:
        os.close(handle)
        os.unlink(path)


if __name__ == "__main__":
    main()
