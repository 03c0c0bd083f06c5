"""The manifests for Kubernetes and Nomad: judged by Kubernetes' own schemas and a parser of HCL, held to each other, and
what they say of the agent's container carried out by runc on two hosts, between which a guest moves.
Usage: orchestrators.py VMFERRY LAB CHECKOUT"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hcl2
import kubernetes_validate
from kubernetes_validate.utils import all_versions
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "container"))
from machines import Net, failed, must, run, say

VMFERRY, LAB, CHECKOUT = (Path(word).resolve() for word in sys.argv[1:4])
HOSTS = {"alpha": "10.77.8.1", "bravo": "10.77.8.2"}
QEMU = LAB / "qemu10/bin/qemu-system-x86_64"
MONITORS, GUESTS = 9908, 9909
PATIENCE_S = 60


def wait(what, look, log):
    until = time.monotonic() + PATIENCE_S
    while not look():
        if time.monotonic() > until:
            sys.exit(f"no {what}: {log.read_text()}")
        time.sleep(0.1)


def kubernetes():
    """The pod's specification, judged in all versions that there are schemas of."""
    documents = list(yaml.safe_load_all((CHECKOUT / "deploy/kubernetes/vmferry.yaml").read_text()))
    versions = [version for version in all_versions() if tuple(map(int, version.split(".")[:2])) >= (1, 28)]
    for document in documents:
        wrong = []
        for version in versions:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except Exception as e:
                wrong.append(f"{version}: {e}")
        what = f"{document['kind']} by the schemas of Kubernetes {versions[0]} to {versions[-1]}"
        say(versions and not wrong, what, wrong)
    return documents[-1]["spec"]["template"]["spec"]


def plain(it):
    """What python-hcl2 reads, without its quotes and marks."""
    if isinstance(it, dict):
        return {plain(key): plain(inner) for key, inner in it.items() if not key.startswith("__")}
    if isinstance(it, list):
        return [plain(inner) for inner in it]
    return it[1:-1] if isinstance(it, str) and it[:1] == it[-1:] == '"' else it


def nomad(pod):
    with open(CHECKOUT / "deploy/nomad/vmferry.nomad.hcl") as file:
        job = plain(hcl2.load(file))["job"][0]["vmferry"]
    task = job["group"][0]["agent"]["task"][0]["agent"]
    config, agent, user = task["config"][0], pod["containers"][0], pod["securityContext"]
    say(job["type"] == "system" and task["driver"] == "docker", "Nomad's job is HCL, of one agent on each client")
    mounts = {(mount["source"], mount["target"], bool(mount.get("readonly"))) for mount in config["mount"]}
    folders = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
    same = {(folders[m["name"]], m["mountPath"], bool(m.get("readOnly"))) for m in agent["volumeMounts"]}
    for what, one, other in [
        ("image", config["image"], agent["image"]),
        ("arguments", config["args"], agent["args"]),
        ("user", task["user"], f"{user['runAsUser']}:{user['runAsGroup']}"),
        ("groups", config["group_add"], [str(group) for group in user["supplementalGroups"]]),
        ("folders", mounts, same),
        ("the host's network and processes", (config["network_mode"], config["pid_mode"]), ("host", "host")),
        ("time to stop", task["kill_timeout"], f"{pod['terminationGracePeriodSeconds']}s"),
        ("no capability", (config["cap_drop"], config["privileged"]), (["all"], False)),
        ("no further privileges", config["security_opt"], ["no-new-privileges"]),
        ("a root that is read", config["readonly_rootfs"], True),
    ]:
        say(one == other, f"both manifests have the same: {what}", f"{one} {other}")


def seccomp():
    """The runtimes' default, without what it gives to those with capabilities."""
    profile = json.loads(Path("/usr/share/containers/seccomp.json").read_text())
    rules = []
    for rule in profile["syscalls"]:
        wants = rule.get("includes") or {}
        is_ours = not wants.get("caps") and "amd64" in wants.get("arches", ["amd64"])
        if is_ours and rule["action"] == "SCMP_ACT_ALLOW":
            rules.append({key: rule[key] for key in ("names", "action", "args") if rule.get(key)})
    return dict(defaultAction="SCMP_ACT_ERRNO", architectures=["SCMP_ARCH_X86_64"], syscalls=rules)


class Node:
    """A host whose agent is a container, as the manifest has it."""

    def __init__(self, ground, net, name, pod):
        self.name, self.folder, self.pod, self.runc = name, ground / name, pod, ["runc", "--root", ground / "runc"]
        self.namespace, self.id = net.name(name), f"{net.mark}-{name}"
        self.user = pod["securityContext"]["runAsUser"]
        for path, mode, owner, group in [
            ("etc/vmferry/tls", 0o750, 0, self.user),
            ("var/lib/vmferry", 0o700, self.user, self.user),
            ("run/vmferry", 0o750, self.user, self.user),
            ("run/qemu/web1", 0o2710, GUESTS, MONITORS),
        ]:
            made = self.folder / path
            made.mkdir(parents=True)
            os.chown(made, owner, group)
            made.chmod(mode)
        os.chown(self.folder / "etc/vmferry", 0, self.user)

    def configure(self, pki, peer):
        for file in ("ca-cert.pem", "cert.pem", "key.pem"):
            made = shutil.copy(pki / "hosts" / self.name / file, self.folder / "etc/vmferry/tls" / file)
            os.chown(made, self.user, self.user)
        (self.folder / "etc/vmferry/vmferry.toml").write_text(f"""[tls]
ca = "tls/ca-cert.pem"
cert = "tls/cert.pem"
key = "tls/key.pem"
[peer.{peer}]
identity = "{peer}"
address = "{HOSTS[peer]}:9907"
receive = ["*"]
send = ["*"]
[vm.web1]
qmp = "/run/qemu/web1/agent.qmp"
""")

    def oci(self):
        """The manifest's words in those of the runtimes' common configuration."""
        pod, agent = self.pod, self.pod["containers"][0]
        rights, user = agent["securityContext"], pod["securityContext"]
        folders = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
        mounts = [
            dict(destination="/proc", type="proc", source="proc"),
            dict(destination="/dev", type="tmpfs", source="tmpfs", options=["nosuid", "mode=755", "size=65536k"]),
        ]
        for one in agent["volumeMounts"]:
            spread = "rslave" if one.get("mountPropagation") else "rprivate"
            source = self.folder / folders[one["name"]].lstrip("/")
            options = ["rbind", spread, "ro" if one.get("readOnly") else "rw"]
            mounts.append(dict(destination=one["mountPath"], type="bind", source=str(source), options=options))
        kept = [] if rights["capabilities"]["drop"] == ["ALL"] else sys.exit("not all capabilities are dropped")
        namespaces = [dict(type="mount"), dict(type="ipc"), dict(type="uts")]
        namespaces += [] if pod["hostPID"] else [dict(type="pid")]
        namespaces += [dict(type="network", path=f"/run/netns/{self.namespace}")] if pod["hostNetwork"] else sys.exit("no network")
        return dict(
            ociVersion="1.0.2",
            process=dict(
                args=["/usr/bin/vmferry"] + agent["args"],
                env=["PATH=/usr/bin:/bin"],
                cwd="/",
                user=dict(uid=user["runAsUser"], gid=user["runAsGroup"], additionalGids=user["supplementalGroups"]),
                capabilities=dict.fromkeys(["bounding", "effective", "permitted", "inheritable", "ambient"], kept),
                noNewPrivileges=not rights["allowPrivilegeEscalation"],
            ),
            root=dict(path=str(self.folder / "image"), readonly=rights["readOnlyRootFilesystem"]),
            hostname=self.name,
            mounts=mounts,
            linux=dict(namespaces=namespaces, seccomp=seccomp(), maskedPaths=["/proc/kcore"], readonlyPaths=["/proc/sys"]),
        )

    def run(self):
        """Its image: Debian's, and the program in it."""
        image = self.folder / "image"
        for folder in ("upper/usr/bin", "work", "image"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(VMFERRY, self.folder / "upper/usr/bin/vmferry")
        layers = f"lowerdir={LAB}/debian12/root,upperdir={self.folder}/upper,workdir={self.folder}/work"
        must("mount", "-t", "overlay", "-o", layers, "overlay", image)
        (self.folder / "config.json").write_text(json.dumps(self.oci(), indent=1))
        self.log = open(self.folder / "log", "w")
        self.process = subprocess.Popen([*self.runc, "run", "--bundle", self.folder, self.id], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        probe = self.pod["containers"][0]["livenessProbe"]["exec"]["command"]
        wait(f"agent on {self.name}", lambda: self.exec(*probe).returncode == 0, self.folder / "log")

    def exec(self, *words):
        return run(*self.runc, "exec", self.id, *words)

    def vmferry(self, *words):
        return self.exec("/usr/bin/vmferry", *words)

    def guest(self, *more):
        """A QEMU of another user; the agent reaches its monitor by a group."""
        folder = self.folder / "run/qemu/web1"
        (self.folder / "disks").mkdir()
        disk = self.folder / "disks/web1.raw"
        disk.write_bytes(b"" if more else os.urandom(4 << 20))
        os.truncate(disk, 16 << 20)
        os.chown(disk, GUESTS, GUESTS)
        os.chown(self.folder / "disks", GUESTS, GUESTS)
        words = ["ip", "netns", "exec", self.namespace, "setpriv", f"--reuid={GUESTS}", f"--regid={GUESTS}", "--clear-groups", "--", "sh", "-c", 'umask 007; exec "$@"', "sh"]
        words += [QEMU, "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg", "-m", "64"]
        words += ["-qmp", f"unix:{folder}/agent.qmp,server=on,wait=off", "-qmp", f"unix:{folder}/admin.qmp,server=on,wait=off"]
        words += ["-blockdev", f"driver=raw,node-name=disk0,file.driver=file,file.filename={disk}", "-device", "virtio-blk-pci,drive=disk0,id=vda"]
        log = open(self.folder / "qemu.log", "w")
        self.qemu = subprocess.Popen([str(word) for word in [*words, *more]], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait(f"QEMU on {self.name}", (folder / "admin.qmp").exists, self.folder / "qemu.log")

    def here(self):
        states = json.loads(self.vmferry("status", "--json").stdout)["vm_states"]
        return states[0]["here"]

    def stop(self):
        """As the runtime does: SIGTERM, and how long it took is bounded by the manifest."""
        run(*self.runc, "kill", self.id, "TERM")
        return self.process.wait(self.pod["terminationGracePeriodSeconds"])

    def down(self):
        run(*self.runc, "delete", "--force", self.id)
        for process in (getattr(self, "process", None), getattr(self, "qemu", None)):
            if process and process.poll() is None:
                process.kill()
                process.wait()
        run("umount", self.folder / "image")


def is_confined(node):
    """By the kernel's word."""
    inside = json.loads(must(*node.runc, "state", node.id))
    status = dict(line.split(":", 1) for line in Path(f"/proc/{inside['pid']}/status").read_text().splitlines())
    told = {key: status[key].split() for key in ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Groups")}
    none = ["0000000000000000"]
    good = told["Uid"] == [str(node.user)] * 4 and told["CapEff"] == none and told["CapBnd"] == none
    good = good and told["NoNewPrivs"] == ["1"] and told["Seccomp"] == ["2"]
    say(good, f"{node.name}'s agent: its own user, no capability, no new privileges, seccomp", told)
    say(node.exec("/bin/touch", "/usr/bin/x").returncode != 0, "… and a root that it cannot write")
    say(node.exec("/bin/touch", "/etc/vmferry/x").returncode != 0, "… nor its configuration")


def trial(ground, pod, nodes):
    net = Net(HOSTS)
    try:
        net.up()
        pki = ground / "pki"
        must(VMFERRY, "certs", "ca", "--dir", pki)
        for name in HOSTS:
            must(VMFERRY, "certs", "host", name, "--dir", pki)
        for name, peer in (("alpha", "bravo"), ("bravo", "alpha")):
            node = Node(ground, net, name, pod)
            nodes.append(node)
            node.configure(pki, peer)
            node.guest(*([] if name == "alpha" else ["-incoming", "defer", "-S"]))
            node.run()
        alpha, bravo = nodes
        for node in nodes:
            is_confined(node)
        say((alpha.here(), bravo.here()) == ("runs", "waits"), "both see their QEMU", (alpha.here(), bravo.here()))
        moved = alpha.vmferry("migrate", "web1", "--to", "bravo")
        say(moved.returncode == 0, "the guest moves", moved.stdout + moved.stderr)
        # An agent looks at its QEMUs now and then.
        wait("guest on bravo alone", lambda: (alpha.here(), bravo.here()) == ("no-qemu", "runs"), bravo.folder / "log")
        say(True, "… and runs there alone")
        say(alpha.qemu.poll() is not None, "… its old QEMU has ended")
        for node in nodes:
            code = node.stop()
            say(code == 0, f"{node.name}'s agent stops in time", code)
    finally:
        for node in nodes:
            node.down()
        net.down()


ground = Path(tempfile.mkdtemp(prefix="vmferry-orchestrators-"))
ground.chmod(0o755)
try:
    pod = kubernetes()
    nomad(pod)
    trial(ground, pod, [])
finally:
    shutil.rmtree(ground, ignore_errors=True)
print(f"{len(failed)} of these failed" if failed else "all of it as it should be")
sys.exit(1 if failed else 0)
