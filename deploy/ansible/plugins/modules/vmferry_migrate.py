#!/usr/bin/python
"""Moves a running virtual machine from the host that this runs on to one of its peers."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: vmferry_migrate
short_description: Moves a running virtual machine to another host, with its disks
description:
  - Has the agent of this host move a VM to a peer, and waits for the end.
  - Nothing is changed when this host's last migration of the VM has moved it to that peer. Where it went from there is
    not asked; C(vmferry status) on that host says whether it runs there.
  - A migration of the VM to that peer that is under way already is waited for. A play that was interrupted can be run
    again.
  - With check mode C(vmferry migrate --dry-run) judges, which has the destination start the waiting QEMU for the
    questions, and sends it 8 MiB. What would be refused fails.
options:
  vm:
    description: The virtual machine, as C([vm.NAME]) in the configuration of both hosts.
    type: str
    required: true
  to:
    description: The destination, as C([peer.NAME]) in this host's configuration.
    type: str
    required: true
  if_absent:
    description:
      - What to make of a VM that is not on this host, and that this host has not moved to I(to).
      - C(ignore) is for a task that is run on several hosts, of which one has it.
    type: str
    choices: [fail, ignore]
    default: fail
  keep_source:
    description: Leave the source's QEMU, paused for ever, instead of ending it.
    type: bool
    default: false
  weight:
    description: Its part among migrations to the same host, 1 to 1000.
    type: int
extends_documentation_fragment: [vmferry.hypervisor.options]
attributes:
  check_mode:
    description: Can run in check mode.
    support: full
author: The vmferry authors (@vmferry)
"""

EXAMPLES = r"""
- name: Web1 runs on bravo
  vmferry.hypervisor.vmferry_migrate:
    vm: web1
    to: bravo
    retry: 3
"""

RETURN = r"""
id:
  description: The migration, the same on both hosts.
  returned: when there is one
  type: str
downtime_ms:
  description: How long the guest stood still.
  returned: when it was moved
  type: int
elapsed_ms:
  description: How long all of it took.
  returned: when it was moved
  type: int
leftovers:
  description: What is left to clean up; C(vmferry recover) tries again.
  returned: when it has ended
  type: list
  elements: dict
notes:
  description: What an operator should know although it did not fail.
  returned: when it was moved
  type: list
  elements: str
foretold:
  description: Bytes, time and pause that are to be expected.
  returned: in check mode
  type: dict
problems:
  description: What C(check) says, each with its remedy.
  returned: in check mode, and when it was refused
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmferry.hypervisor.plugins.module_utils.vmferry import (
    COMMON,
    ELSEWHERE,
    HERE,
    Cli,
    common_words,
    told,
    warn,
)


def last_of(cli, vm):
    """The VM's last migration that may say where it is: one that is under way, else the last that was meant to move it."""
    unused, document = cli.document(["list"])
    result = lambda one: (one.get("outcome") or {}).get("result")
    mine = [one for one in document["migrations"] if one["vm"] == vm and result(one) != "replicated"]
    under_way = [one for one in mine if result(one) is None]
    return (under_way or mine or [None])[-1]


def here(cli, vm):
    """What the VM's QEMU has of it on this host, and its word for why that is not known."""
    unused, status = cli.document(["status"])
    for state in status.get("vm_states", []):
        if state["vm"] == vm:
            return state["here"], state.get("cause") or ""
    return "no-qemu", ""


def judge_absent(cli, vm, peer, identity, last):
    """It is not here: whether that is what was wanted."""
    module = cli.module
    result = ((last or {}).get("outcome") or {}).get("result")
    if last and last["role"] == "source" and last["peer"] == identity and result == "moved":
        module.exit_json(changed=False, id=last["id"], msg="%s was moved to %s by %s" % (vm, peer, last["id"]))
    if result == "undecided":
        undecided(module, vm, last, changed=False)
    if module.params["if_absent"] == "ignore":
        module.exit_json(changed=False, msg="%s is not on this host" % vm)
    module.fail_json(
        changed=False, msg="%s is not on this host, and this host's last migration of it did not move it to %s" % (vm, peer)
    )


def undecided(module, vm, migration, changed):
    module.fail_json(
        changed=changed,
        id=migration["id"],
        msg="%s is undecided; start it nowhere by hand. %s" % (vm, migration["outcome"].get("cause", "")),
    )


def plan(cli, words):
    module = cli.module
    code, document = cli.document(words + ["--dry-run"])
    problems = document["problems"]
    if code != 0:
        lines = told(problems, "problem") or ["it would be refused"]
        module.fail_json(changed=False, msg="; ".join(lines), problems=problems)
    warn(module, problems)
    module.exit_json(changed=True, problems=problems, foretold=document.get("foretold"))


def end(module, vm, ended, seen, said):
    """Says how it ended."""
    if ended is None:
        module.fail_json(
            changed=True,
            id=seen["id"],
            msg="the end of %s was not seen; it goes on, or is settled when the agent is back: run this again. %s" % (seen["id"], said),
        )
    outcome = ended["outcome"]
    known = dict(id=ended["id"], leftovers=outcome.get("leftovers", []))
    if outcome["result"] == "undecided":
        undecided(module, vm, ended, changed=True)
    if outcome["result"] != "moved":
        problems = outcome.get("problems", [])
        lines = [outcome.get("cause", "it was not moved")] + told(problems, "problem")
        module.fail_json(changed=False, msg="; ".join(lines), problems=problems, **known)
    if known["leftovers"]:
        module.warn("%s was moved, and something is left to clean up: vmferry recover" % vm)
    downtime = (ended.get("downtime") or {}).get("total_ms")
    module.exit_json(
        changed=True, downtime_ms=downtime, elapsed_ms=ended["elapsed_ms"], notes=ended.get("notes", []), **known
    )


def main():
    options = dict(
        COMMON,
        vm=dict(type="str", required=True),
        to=dict(type="str", required=True),
        if_absent=dict(type="str", choices=["fail", "ignore"], default="fail"),
        keep_source=dict(type="bool", default=False),
        weight=dict(type="int"),
    )
    module = AnsibleModule(argument_spec=options, supports_check_mode=True)
    cli, vm, peer = Cli(module), module.params["vm"], module.params["to"]
    # Only its identity is wanted: migrations are listed by that.
    unused, reached = cli.document(["ping", peer, "--bytes", "0"])
    identity = reached["identity"]
    last = last_of(cli, vm)
    if last and not last.get("outcome") and (last["role"], last["peer"]) == ("source", identity):
        if module.check_mode:
            module.exit_json(changed=True, id=last["id"], msg="it is on its way already")
        end(module, vm, *cli.last_line(["watch", last["id"]]))
    state, cause = here(cli, vm)
    if state in ELSEWHERE:
        judge_absent(cli, vm, peer, identity, last)
    if state == "in-migration":
        module.fail_json(changed=False, msg="%s is part of another migration, or being checked" % vm)
    if state not in HERE:
        module.fail_json(changed=False, msg="it is not known whether %s is here (%s) %s" % (vm, state, cause))
    words = ["migrate", vm, "--to", peer] + common_words(module.params)
    if module.params["keep_source"]:
        words.append("--keep-source")
    if module.params["weight"] is not None:
        words += ["--weight", str(module.params["weight"])]
    if module.check_mode:
        plan(cli, words)
    end(module, vm, *cli.last_line(words))


if __name__ == "__main__":
    main()
