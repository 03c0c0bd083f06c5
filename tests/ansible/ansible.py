"""The Ansible collection of deploy/ansible on two machines with a real systemd: the role installs, enrols, configures;
the modules move guests of the example units, and say truly what changed. Usage: ansible.py VMFERRY LAB CHECKOUT"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "container"))
from machines import CONTAINER, Machine, Net, failed, must, run, say

VMFERRY, LAB, CHECKOUT = (Path(word).resolve() for word in sys.argv[1:4])
HERE = CHECKOUT / "tests/ansible"
BIN = LAB / "ansible/venv/bin"
HOSTS = {"alpha": "10.77.9.1", "bravo": "10.77.9.2", "authority": "10.77.9.3"}
GUESTS = ["web1", "web2"]
DISK_MIB = 16


class Ansible:
    def __init__(self, ground):
        self.inventory = ground / "inventory.json"
        home = ground / "home"
        self.collections = ground / "collections"
        # What the controller's own user has set is not this test's.
        self.environment = {
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": str(home),
            "ANSIBLE_HOME": str(home),
            "ANSIBLE_COLLECTIONS_PATH": str(self.collections),
            "ANSIBLE_CONNECTION_PLUGINS": str(HERE / "connection_plugins"),
            "ANSIBLE_INVENTORY": str(self.inventory),
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "ANSIBLE_DEPRECATION_WARNINGS": "0",
        }
        home.mkdir()

    def run(self, *words):
        return run(*words, env=self.environment, cwd=self.environment["HOME"], stdin=subprocess.DEVNULL)

    def play(self, book, *words):
        """How it ended, and what changed on each host."""
        done = self.run("ansible-playbook", book, *words)
        counts = {}
        for line in done.stdout.splitlines():
            if found := re.match(r"(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", line):
                counts[found[1]] = dict(changed=int(found[3]), failed=int(found[4]) + int(found[5]))
        return done, counts

    def module(self, host, name, arguments, *words):
        """What a module says on one host, and the word before it: SUCCESS, CHANGED, FAILED."""
        done = self.run("ansible", host, "-m", f"vmferry.hypervisor.{name}", "-a", json.dumps(arguments), *words)
        found = re.search(r"^\S+ \| (\w+)!? => (\{.*?^\})", done.stdout, re.S | re.M)
        if not found:
            sys.exit(f"{name} {arguments}: {done.stdout}{done.stderr}")
        return found[1], json.loads(found[2])


def inventory(ground, net, package):
    machine = lambda host: dict(
        machine_through=f"{CONTAINER} exec {ground / host}",
        machine_root=str(ground / host / "root"),
        vmferry_address=f"{HOSTS[host]}:9907",
    )
    through = f"ip netns exec {net.name('authority')}"
    every = dict(
        ansible_connection="machine",
        ansible_python_interpreter="/usr/bin/python3",
        ansible_become=False,
        vmferry_package=str(package),
        vmferry_receive=["web*"],
        vmferry_send=["web*"],
        vmferry_settings=dict(
            create=dict(path="/var/lib/vmferry-vm/{vm}.raw", mode="0660"),
            vm={"web*": dict(qmp="/run/qemu/{vm}/agent.qmp", start=dict(unit="qemu-incoming@{vm}.service"))},
        ),
        vmferry_ca_host="authority",
        vmferry_ca_program=str(VMFERRY),
        vmferry_ca_dir=str(ground / "pki"),
        vmferry_ca_create=True,
        vmferry_ca_address=HOSTS["authority"],
    )
    groups = {
        "all": {
            "vars": every,
            "hosts": {"authority": {"machine_through": through}},
            "children": {"hypervisors": {"hosts": {host: machine(host) for host in ("alpha", "bravo")}}},
        }
    }
    (ground / "inventory.json").write_text(json.dumps(groups, indent=1))


def judge_files(ansible):
    collection = ansible.collections / "ansible_collections/vmferry/hypervisor"
    built = ansible.run("ansible-galaxy", "collection", "install", CHECKOUT / "deploy/ansible", "-p", ansible.collections)
    say(built.returncode == 0, "the collection is built and installed", built.stdout + built.stderr)
    for book in sorted((collection / "playbooks").iterdir()):
        done = ansible.run("ansible-playbook", "--syntax-check", book)
        say(done.returncode == 0, f"ansible-playbook --syntax-check {book.name}", done.stderr)
    modules = [f"vmferry.hypervisor.{path.stem}" for path in sorted((collection / "plugins/modules").iterdir()) if path.suffix == ".py"]
    for module in modules:
        done = ansible.run("ansible-doc", "-t", "module", module)
        say(done.returncode == 0 and "OPTIONS" in done.stdout, f"ansible-doc {module}", done.stderr)
    # From its own folder, so that it is known as a collection; a copy, for it leaves a folder of its own there.
    copy = ansible.collections.parent / "copy"
    shutil.copytree(CHECKOUT / "deploy/ansible", copy)
    done = run(BIN / "ansible-lint", "--offline", "--nocolor", env=ansible.environment, cwd=copy)
    say(done.returncode == 0, "ansible-lint", done.stdout + done.stderr)


def role_is_played(ansible, machines, ground):
    done, counts = ansible.play("vmferry.hypervisor.site", "--check")
    nothing = [host for host, machine in machines.items() if machine.run("test", "-e", "/usr/bin/vmferry").returncode == 0]
    good = done.returncode == 0 and all(counts[host]["changed"] for host in machines) and not nothing
    say(good, "the role in check mode on new hosts: it would change them, and does not", done.stdout + done.stderr)
    for again in (False, True):
        done, counts = ansible.play("vmferry.hypervisor.site")
        good = done.returncode == 0 and all((counts[host]["changed"] == 0) == again for host in machines)
        say(good, "the role once more: nothing changes" if again else "the role: both hosts are set up", done.stdout + done.stderr)
    done, counts = ansible.play("vmferry.hypervisor.site", "--check")
    good = done.returncode == 0 and all(counts[host]["changed"] == 0 for host in machines)
    say(good, "the role in check mode on hosts that are set up: nothing would change", done.stdout + done.stderr)
    for host, machine in machines.items():
        key = machine.must("stat", "-c", "%U %a", "/etc/vmferry/tls/key.pem").strip()
        say(key == "vmferry 600", f"{host}'s key is its agent's alone", key)
        active = machine.must("systemctl", "show", "-P", "ActiveState", "-P", "UnitFileState", "vmferry").split()
        say(active == ["active", "enabled"], f"{host}'s agent runs, and will after a boot", active)
        doctor = machine.run("vmferry", "doctor")
        say(doctor.returncode == 0, f"vmferry doctor on {host}", doctor.stdout)
    keys = sorted(str(path.relative_to(ground)) for path in (ground / "pki").rglob("*key*.pem") if not path.is_symlink())
    say(keys == ["pki/ca-key.pem"], "no key has travelled: the authority has its own alone", keys)
    settings = {"vmferry_settings": {"create": {"path": "relative"}}}
    done, counts = ansible.play("vmferry.hypervisor.site", "-e", json.dumps(settings))
    good = done.returncode != 0 and all(counts[host] == dict(changed=0, failed=1) for host in machines)
    say(good, "a configuration that the agent refuses takes nobody's place", done.stdout + done.stderr)


def runs_at(machines, vm, host):
    """One QEMU alone runs it, by QEMU's own word."""
    states = {name: machine.guest(vm) for name, machine in machines.items()}
    running = [name for name, state in states.items() if state == "running"]
    say(running == [host], f"{vm} runs on {host} alone", states)


def guests_begin(ansible, machines, ground):
    image = ground / "alpha/root/var/cache/image"
    image.write_bytes(os.urandom(DISK_MIB << 20))
    arguments = (CHECKOUT / "deploy/vm-example.env").read_text()
    for told, wanted in [("-smp 2 -m 2048", "-smp 1 -m 64"), ("file.cache.direct=on,", "")]:
        if told not in arguments:
            sys.exit(f"the example has no {told} any more")
        arguments = arguments.replace(told, wanted)
    more = dict(guests=GUESTS, guest_arguments=arguments, first_image="/var/cache/image")
    done, counts = ansible.play(HERE / "prepare.yml", "-e", json.dumps(more))
    say(done.returncode == 0, "two guests of the example units", done.stdout + done.stderr)
    for vm in GUESTS:
        runs_at(machines, vm, "alpha")


def expect(ansible, host, module, arguments, word, what, *words):
    said, result = ansible.module(host, module, arguments, *words)
    say(said == word and result["changed"] == (word == "CHANGED"), f"{what}: {word}", json.dumps(result, indent=1))
    return result


def guests_are_moved(ansible, machines):
    move = lambda vm, to, **more: dict(vm=vm, to=to, **more)
    result = expect(ansible, "alpha", "vmferry_migrate", move("web1", "bravo"), "CHANGED", "check mode", "--check")
    say(bool(result.get("foretold", {}).get("prediction")), "… and it foretells bytes, time and pause", result)
    runs_at(machines, "web1", "alpha")
    result = expect(ansible, "alpha", "vmferry_migrate", move("web1", "bravo"), "CHANGED", "web1 is moved")
    say(result.get("downtime_ms", 0) > 0 and result["leftovers"] == [], "… and it says how long it stood still", result)
    runs_at(machines, "web1", "bravo")
    once = result["id"]
    result = expect(ansible, "alpha", "vmferry_migrate", move("web1", "bravo"), "SUCCESS", "the same once more")
    say(result.get("id") == once, "… by the migration that moved it", result)
    expect(ansible, "alpha", "vmferry_migrate", move("web1", "bravo"), "SUCCESS", "the same in check mode", "--check")
    # What fails changes nothing.
    result = expect(ansible, "alpha", "vmferry_migrate", move("ghost", "bravo"), "FAILED", "a VM that nobody has")
    expect(ansible, "alpha", "vmferry_migrate", move("ghost", "bravo", if_absent="ignore"), "SUCCESS", "… where that is meant")
    result = expect(ansible, "alpha", "vmferry_migrate", move("web2", "charlie"), "FAILED", "a peer that nobody has")
    say("charlie" in result["msg"], "… which it names", result)
    # The destination's QEMU does not begin.
    bravo = machines["bravo"]
    bravo.must("mv", "/etc/vmferry/vm/web2.env", "/etc/vmferry/vm/web2.aside")
    for mode in (["--check"], []):
        result = expect(ansible, "alpha", "vmferry_migrate", move("web2", "bravo"), "FAILED", f"no QEMU there {' '.join(mode)}", *mode)
        say("qemu-incoming@web2" in result["msg"], "… which it says", result)
        result = expect(ansible, "alpha", "vmferry_drain", dict(to=["bravo"]), "FAILED", f"nor for a drain {' '.join(mode)}", *mode)
        say("web2" in result["msg"], "… which names the VM", result)
    runs_at(machines, "web2", "alpha")
    bravo.must("mv", "/etc/vmferry/vm/web2.aside", "/etc/vmferry/vm/web2.env")


def a_play_is_run_again(ansible, machines):
    """A migration that is under way already is waited for."""
    bravo = machines["bravo"]
    bravo.must("vmferry", "limit", "--peer", "alpha", "--rate", "1MiB/s")
    begun = bravo.must("vmferry", "migrate", "web1", "--to", "alpha", "--detach").strip()
    result = expect(ansible, "bravo", "vmferry_migrate", dict(vm="web1", to="alpha"), "CHANGED", "one under way, in check mode", "--check")
    say(result.get("id") == begun, "… is the one that would be waited for", result)
    bravo.must("vmferry", "limit", "--peer", "alpha", "--rate", "4MiB/s")
    result = expect(ansible, "bravo", "vmferry_migrate", dict(vm="web1", to="alpha"), "CHANGED", "one under way is waited for")
    say(result.get("id") == begun, "… and no second one begun", result)
    runs_at(machines, "web1", "alpha")
    bravo.must("vmferry", "limit", "--peer", "alpha", "--rate", "none")


def a_host_is_emptied(ansible, machines):
    drain = dict(to=["bravo"])
    result = expect(ansible, "alpha", "vmferry_drain", drain, "CHANGED", "a drain in check mode", "--check")
    say(sorted(vm["vm"] for vm in result["vms"]) == GUESTS, "… names the VMs", result)
    runs_at(machines, "web2", "alpha")
    result = expect(ansible, "alpha", "vmferry_drain", drain, "CHANGED", "a drain")
    say(result["here_at_end"] == [], "… leaves the host empty", result)
    for vm in GUESTS:
        runs_at(machines, vm, "bravo")
    expect(ansible, "alpha", "vmferry_drain", drain, "SUCCESS", "the same once more")
    expect(ansible, "alpha", "vmferry_drain", drain, "SUCCESS", "the same in check mode", "--check")
    done, counts = ansible.play("vmferry.hypervisor.move", "-e", "vm=web1 to=alpha", "--limit", "bravo")
    say(done.returncode == 0 and counts["bravo"]["changed"] == 1, "the playbook that moves a VM", done.stdout + done.stderr)
    runs_at(machines, "web1", "alpha")
    machines["bravo"].must("systemctl", "stop", "vmferry")
    said, result = ansible.module("bravo", "vmferry_drain", dict(to=["alpha"]))
    say(said == "FAILED" and "cannot reach the agent" in result["msg"], "an agent that does not run: FAILED, by its name", result)


def main(ground, net, machines):
    must(CHECKOUT / "deploy/package/build.sh", VMFERRY, ground / "packages", env=dict(os.environ, COMPRESSION="none", FORMATS="deb"))
    package = next((ground / "packages").iterdir())
    net.up()
    ansible = Ansible(ground)
    inventory(ground, net, package)
    judge_files(ansible)
    for host in ("alpha", "bravo"):
        machines[host] = Machine(ground / host, net.name(host), [LAB])
        machines[host].has_qemu(LAB)
    role_is_played(ansible, machines, ground)
    if failed:
        return
    guests_begin(ansible, machines, ground)
    guests_are_moved(ansible, machines)
    a_play_is_run_again(ansible, machines)
    a_host_is_emptied(ansible, machines)


ground, net, machines = Path(tempfile.mkdtemp(prefix="vmferry-ansible-")), Net(HOSTS), {}
try:
    main(ground, net, machines)
finally:
    for machine in machines.values():
        machine.down()
    net.down()
    shutil.rmtree(ground, ignore_errors=True)
print(f"{len(failed)} of these failed" if failed else "all of it as it should be")
sys.exit(1 if failed else 0)
