#!/usr/bin/python
"""Moves all virtual machines of the host that this runs on, or those selected, to its peers."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: vmferry_drain
short_description: Empties a host of its virtual machines
description:
  - Has the agent of this host move its VMs to peers, a few at a time, and waits for the end.
  - Nothing is changed when none of the selection is here. It fails when one stays, or is undecided, and says which.
  - The same drain that is under way already is waited for. A play that was interrupted can be run again.
  - With check mode C(vmferry drain --dry-run) judges, which has destinations start waiting QEMUs for the questions.
options:
  to:
    description: Where VMs may go, as C([peer.NAME]) in this host's configuration; the first is preferred.
    type: list
    elements: str
    required: true
  vms:
    description: Only VMs of these names, C(*) for any run of characters; all by default.
    type: list
    elements: str
    default: []
  except:
    description: All but VMs of these names.
    type: list
    elements: str
    default: []
  at_once:
    description: No more than so many at once; what the configuration says by default.
    type: int
  within:
    description: Cancel it after so many seconds, and wait for its end.
    type: int
extends_documentation_fragment: [vmferry.hypervisor.options]
attributes:
  check_mode:
    description: Can run in check mode.
    support: full
author: The vmferry authors (@vmferry)
"""

EXAMPLES = r"""
- name: This host is empty before its kernel is replaced
  vmferry.hypervisor.vmferry_drain:
    to: [bravo, charlie]
    within: 3600
"""

RETURN = r"""
id:
  description: The drain.
  returned: when one was begun
  type: str
result:
  description: How it ended.
  returned: when it has ended
  type: str
vms:
  description: What became of each VM, or what would in check mode.
  returned: when it has ended, and in check mode
  type: list
  elements: dict
here_at_end:
  description: VMs that are still on this host.
  returned: when it has ended
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmferry.hypervisor.plugins.module_utils.vmferry import COMMON, Cli, common_words, told


def plan(cli, words):
    module = cli.module
    code, document = cli.document(words + ["--dry-run"])
    go = [vm for vm in document["vms"] if vm["to"]]
    known = dict(vms=document["vms"] + document["stay"])
    if code == 0:
        module.exit_json(changed=bool(go), **known)
    stay = ["%s: %s" % (vm["vm"], vm.get("cause") or "") for vm in document["stay"]]
    for vm in document["vms"]:
        if not vm["to"]:
            lines = [line for check in vm["checks"] for line in told(check["problems"], "problem")]
            stay.append("%s: %s" % (vm["vm"], "; ".join(lines) or "no peer takes it"))
    module.fail_json(changed=False, msg="some would stay: " + " | ".join(stay), **known)


def end(module, ended, seen, said):
    if ended is None:
        module.fail_json(
            changed=True,
            id=seen["id"],
            msg="the end of the drain was not seen; it goes on when the agent is back: run this again. %s" % said,
        )
    vms, result = ended["vms"], ended["result"]
    changed = any(vm["state"] in ("moved", "undecided") for vm in vms)
    known = dict(changed=changed, id=ended["id"], result=result, vms=vms, here_at_end=ended["here_at_end"])
    if result not in ("moved", "left"):
        not_moved = ["%s %s: %s" % (vm["vm"], vm["state"], vm.get("cause") or "") for vm in vms if vm["state"] != "moved"]
        module.fail_json(msg="%s: %s" % (result, " | ".join(not_moved)), **known)
    if result == "left":
        module.warn("all are moved, and something is left to clean up: vmferry recover")
    module.exit_json(**known)


def main():
    options = dict(
        COMMON,
        to=dict(type="list", elements="str", required=True),
        vms=dict(type="list", elements="str", default=[]),
        at_once=dict(type="int"),
        within=dict(type="int"),
    )
    # A word of the language.
    options["except"] = dict(type="list", elements="str", default=[])
    module = AnsibleModule(argument_spec=options, supports_check_mode=True)
    cli, params = Cli(module), module.params
    words = ["drain", "--to", ",".join(params["to"])] + common_words(params)
    for name, word in (("vms", "--vm"), ("except", "--except")):
        for pattern in params[name]:
            words += [word, pattern]
    if params["at_once"] is not None:
        words += ["--at-once", str(params["at_once"])]
    if module.check_mode:
        plan(cli, words)
    if params["within"] is not None:
        words += ["--within", str(params["within"])]
    end(module, *cli.last_line(words))


if __name__ == "__main__":
    main()
