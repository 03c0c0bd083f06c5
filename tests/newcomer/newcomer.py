"""README's five minutes, literally: the commands and files of its recipe on fresh machines with a real systemd, and what
they say; then commands of the other pages. A command that fails, or a recipe that has other blocks than are known here, ends it.
Usage: newcomer.py VMFERRY LAB CHECKOUT [TRANSCRIPT]"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "container"))
from machines import Machine, Net, must
import pages

VMFERRY, LAB, CHECKOUT = (Path(word).resolve() for word in sys.argv[1:4])
TRANSCRIPT = Path(sys.argv[4]) if len(sys.argv) > 4 else None
# The addresses of README's example.
HOSTS = {"alpha": "10.99.0.1", "bravo": "10.99.0.2", "office": "10.99.0.9"}
SECTION = ("\n## On two real hosts, in five minutes\n", "\n## ")
LINES_MAX = 24
PATIENCE_S = 300


class Recipe:
    """The blocks of the section, each taken once and in order, and the words between them."""

    def __init__(self, readme):
        begin = readme.index(SECTION[0]) + len(SECTION[0])
        self.text = readme[begin : readme.index(SECTION[1], begin)]
        self.blocks = re.findall(r"^```\w*\n(.*?)^```$", self.text, re.S | re.M)

    def take(self, beginning):
        if not self.blocks or not self.blocks[0].lstrip().startswith(beginning):
            sys.exit(f"README's next block does not begin with {beginning!r}: {self.blocks[:1]}")
        return self.blocks.pop(0)

    def says(self, words):
        if words not in self.text:
            sys.exit(f"README does not say {words!r} any more")
        return words


class Story:
    """What was typed where, and what came of it."""

    def __init__(self, machines):
        self.machines, self.parts, self.last = machines, [], None

    def heading(self, text):
        self.parts.append(f"\n## {text}\n")

    def note(self, text):
        self.parts.append(f"\n{text}\n")

    def file(self, host, path, text):
        # As an editor writes it: owner and mode stay.
        self.machines[host].must("/bin/sh", "-c", 'cat >"$0"', path, input=text)
        self.parts.append(f"\n`{path}` on {host}:\n\n```\n{text.rstrip()}\n```\n")

    def types(self, host, command):
        """It must succeed. What it said."""
        done = self.machines[host].run("/bin/bash", "-c", f"exec 2>&1 </dev/null; cd /root; {command}\n", timeout=PATIENCE_S)
        lines = [line.rstrip() for line in done.stdout.expandtabs().rstrip().splitlines()]
        # On a terminal each is written over the one before.
        lines = [line for line in lines if not re.fullmatch(r"\(Reading database \.\.\.( \d+%)?", line)]
        said = "\n".join(lines)
        if self.last == (command, said):
            lines = ["… (the same)"]
        self.last = (command, said)
        if len(lines) > LINES_MAX:
            lines = lines[: LINES_MAX - 4] + [f"… ({len(lines) - LINES_MAX + 1} lines more)"] + lines[-3:]
        self.parts.append("\n```\n" + "\n".join([f"{host}# {command}"] + lines) + "\n```\n")
        print(f"{host}# {command}\n{said}", flush=True)
        if done.returncode != 0:
            sys.exit(f"exit code {done.returncode} of `{command}` on {host}")
        return said

    def goes_on(self):
        """The same machines; what is typed now is not told."""
        return Story(self.machines)

    def write(self, path, head):
        text = head + "".join(self.parts)
        path.write_text(re.sub(r"\n{3,}", "\n\n", text))


def lines_of(block):
    """The commands of a block, one a line, each with what follows a backslash."""
    return [line for line in block.replace("\\\n", "").splitlines() if line.strip() and not line.startswith("#")]


def administrator(machines):
    """What hosts have before: names, and an SSH login of the office's root."""
    names = "".join(f"{address} {host}\n" for host, address in HOSTS.items())
    for host, machine in machines.items():
        (machine.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (machine.root / "etc/hostname").write_text(f"{host}\n")
        machine.must("hostname", host)
        machine.must("ssh-keygen", "-A")
        machine.must("systemctl", "start", "ssh")
    office = machines["office"]
    office.must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/.ssh/id_ed25519")
    (office.root / "root/.ssh/config").write_text("StrictHostKeyChecking accept-new\nLogLevel ERROR\n")
    for host in ("alpha", "bravo"):
        machines[host].must("install", "-d", "-m", "700", "/root/.ssh")
        shutil.copy(office.root / "root/.ssh/id_ed25519.pub", machines[host].root / "root/.ssh/authorized_keys")


def wall(machines, story, lines):
    """Bravo has a firewall that lets SSH in and nothing else; README's line goes into it."""
    rule, reload = lines[0], "systemctl reload nftables"
    closed = """#!/usr/sbin/nft -f
flush ruleset
table inet filter {
    chain input {
        type filter hook input priority filter; policy drop;
        iif lo accept
        ct state established,related accept
        tcp dport 22 accept
        %s
    }
}
"""
    bravo = machines["bravo"]
    (bravo.root / "etc/nftables.conf").write_text(closed % "")
    if bravo.run("systemctl", "enable", "--now", "nftables").returncode != 0:
        sys.exit(bravo.run("journalctl", "-u", "nftables", "-o", "cat", "--no-pager").stdout)
    story.file("bravo", "/etc/nftables.conf", closed % rule)
    story.types("bravo", reload)
    ruled = bravo.must("nft", "list", "ruleset")
    if rule not in ruled:
        sys.exit(f"the rule is not in force: {ruled}")
    # The two others, where nothing depends on them.
    machines["office"].must("systemctl", "start", "firewalld")
    story.note("The other two firewalls, on the machine where nothing depends on them:")
    for line in lines[1:]:
        story.types("office", line)
    machines["office"].must("systemctl", "stop", "firewalld")


def is_as_shown(said, shown):
    """Line by line, numbers aside."""
    plain = lambda line: re.sub(r"[\d.]+ ?(KiB|MiB|ms|s)?\b", "N", line)
    said = [plain(line) for line in said.splitlines()]
    for line in filter(None, shown.splitlines()):
        begin = plain(line).split(" N")[0]
        if not any(told.startswith(begin) for told in said):
            sys.exit(f"README shows {line!r}, and what came was {said}")


def follow(recipe, story, machines, package):
    both = ("alpha", "bravo")
    story.heading("1, 2. Packages")
    for host in HOSTS:
        shutil.copy(package, machines[host].root / "root" / package.name)
    install = lines_of(recipe.take("apt install"))[0]
    for host in (*both, "office"):
        story.types(host, install)
    story.heading("3. Certificates")
    for line in lines_of(recipe.take("vmferry certs ca")):
        story.types("office", line)
    owned = recipe.says("systemd-tmpfiles --create vmferry.conf")
    for host in both:
        story.types(host, owned)
    story.heading("4. Configuration")
    text = recipe.take("[tls]")
    story.file("alpha", "/etc/vmferry/vmferry.toml", text)
    story.file("bravo", "/etc/vmferry/vmferry.toml", text.replace("bravo", "alpha").replace(HOSTS["bravo"], HOSTS["alpha"]))
    story.heading("5. Firewall")
    wall(machines, story, lines_of(recipe.take("# /etc/nftables.conf")))
    story.heading("6. The guest")
    for line in lines_of(recipe.take("cp /usr/share/doc")):
        for host in both:
            story.types(host, line)
    for line in lines_of(recipe.take("install -o")):
        story.types("alpha", line)
    recipe.take("qemu-system-x86_64 …")
    story.heading("7. Go")
    for line in lines_of(recipe.take("systemctl enable")):
        for host in both if "# on both" in line else ("alpha",):
            said = story.types(host, line)
            if line.startswith("vmferry check"):
                checked = said
    is_as_shown(checked + "\n" + said, recipe.take("web1 can be moved"))
    runs_at(machines, "bravo")
    back = re.search(r"and later, on bravo: (vmferry .*)", line)[1]
    story.types("bravo", back)
    runs_at(machines, "alpha")
    if recipe.blocks:
        sys.exit(f"README's recipe goes on: {recipe.blocks}")


def runs_at(machines, host):
    """By QEMU's own word."""
    states = {name: machines[name].guest("web1") for name in ("alpha", "bravo")}
    if [name for name, state in states.items() if state == "running"] != [host]:
        sys.exit(f"web1 does not run on {host} alone: {states}")


def main(ground, net, machines):
    packages = ground / "packages"
    must(CHECKOUT / "deploy/package/build.sh", VMFERRY, packages, env=dict(os.environ, COMPRESSION="none", FORMATS="deb"))
    net.up()
    for host in HOSTS:
        machines[host] = Machine(ground / host, net.name(host), lower=LAB / "debian12/root", walls=True)
    administrator(machines)
    story = Story(machines)
    follow(Recipe((CHECKOUT / "README.md").read_text()), story, machines, next(packages.iterdir()))
    pages.run(CHECKOUT, story.goes_on().types)
    if TRANSCRIPT:
        debian = machines["alpha"].must("cat", "/etc/debian_version").strip()
        qemu = machines["alpha"].must("qemu-system-x86_64", "--version").splitlines()[0]
        story.write(TRANSCRIPT, HEAD.format(debian=debian, qemu=qemu))


HEAD = """# The five minutes, as they went

`make newcomer` has written this: [README's recipe](../README.md#on-two-real-hosts-in-five-minutes), its commands and files taken from there word for word, on fresh machines, each with a systemd of its own: alpha, bravo, and office, which has the authority and runs no guests. A command that fails ends it. Debian {debian}, {qemu}, no KVM, a development build of vmferry (which is larger); root may log in from office by SSH, and bravo has a firewall that lets in nothing else.
"""

ground, net, machines = Path(tempfile.mkdtemp(prefix="vmferry-newcomer-")), Net(HOSTS), {}
try:
    main(ground, net, machines)
    print("all of it as README says")
finally:
    for machine in machines.values():
        machine.down()
    net.down()
    shutil.rmtree(ground, ignore_errors=True)
