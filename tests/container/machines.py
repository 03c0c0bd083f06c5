"""Machines with a real systemd, each in a network namespace of its own, on one switch; for tests that are written in Python."""

import os
import subprocess
import sys
from pathlib import Path

CONTAINER = Path(__file__).resolve().parent / "container.sh"

# What was not as it should be.
failed = []


def say(is_good, what, why=""):
    print(("ok      " if is_good else "FAILED  ") + what, flush=True)
    if not is_good:
        print("        " + str(why).strip().replace("\n", "\n        "), flush=True)
        failed.append(what)


def run(*words, **more):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)


def must(*words, **more):
    done = run(*words, **more)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(word) for word in words)}: {done.stdout}{done.stderr}")
    return done.stdout


class Net:
    """A namespace for each host, by its name and IPv4 address, and one with the switch between them."""

    def __init__(self, hosts):
        self.hosts, self.mark, self.made = hosts, f"vfp{os.getpid()}", []

    def name(self, host):
        return f"{self.mark}-{host}"

    def _add(self, host):
        must("ip", "netns", "add", self.name(host))
        self.made.append(self.name(host))
        must("ip", "-n", self.name(host), "link", "set", "lo", "up")

    def up(self):
        self._add("switch")
        switch = ("ip", "-n", self.name("switch"), "link")
        must(*switch, "add", "switch", "type", "bridge")
        must(*switch, "set", "switch", "up")
        for host, address in self.hosts.items():
            self._add(host)
            inside = ("ip", "-n", self.name(host))
            must(*inside, "link", "add", "link0", "type", "veth", "peer", "name", host, "netns", self.name("switch"))
            must(*switch, "set", host, "master", "switch", "up")
            must(*inside, "address", "add", f"{address}/24", "dev", "link0")
            must(*inside, "link", "set", "link0", "up")

    def down(self):
        for name in self.made:
            run("ip", "netns", "delete", name)


class Machine:
    """Boots at once; `shared` folders are the same inside. Its root is this machine's, or `lower`, under a layer of its
    own. One that `walls` may have a firewall of its own."""

    def __init__(self, folder, namespace, shared=(), lower="/", walls=False):
        self.dir, self.root = folder, folder / "root"
        try:
            options = dict(CONTAINER_LOWER=str(lower), CONTAINER_WALLS="1" if walls else "")
            must(CONTAINER, "up", self.dir, namespace, *shared, env=dict(os.environ, **options))
        except SystemExit:
            self.down()
            raise
        # This machine may forbid packages to start anything.
        (self.root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)

    def run(self, *words, **more):
        return run(CONTAINER, "exec", self.dir, *words, **more)

    def must(self, *words, **more):
        return must(CONTAINER, "exec", self.dir, *words, **more)

    def has_qemu(self, lab):
        """The lab's QEMU under the name that units have; its user goes through all folders above it."""
        for folder in [lab, *lab.parents]:
            self.must("chmod", "a+rx", folder)
        program = self.root / "usr/bin/qemu-system-x86_64"
        program.unlink(missing_ok=True)
        program.write_text(f'#!/bin/sh\nexec {lab}/qemu10/bin/qemu-system-x86_64 "$@"\n')
        program.chmod(0o755)

    def guest(self, vm):
        """What QEMU itself says at the second monitor of an example unit; nothing where nobody listens."""
        asked = self.run("/usr/bin/python3", "-c", f"""
import json, socket
monitor = socket.socket(socket.AF_UNIX)
monitor.connect("/run/qemu/{vm}/admin.qmp")
lines = monitor.makefile("rw")
lines.readline()
for command in ("qmp_capabilities", "query-status"):
    print(json.dumps(dict(execute=command)), file=lines, flush=True)
    answer = json.loads(lines.readline())
    while "return" not in answer:
        answer = json.loads(lines.readline())
print(answer["return"]["status"])
""")
        return asked.stdout.strip()

    def down(self):
        run(CONTAINER, "down", self.dir)
