"""A real Prometheus scrapes two real agents while a guest moves between them: names, rules, every panel of
the dashboard, and alerts whose causes are provoked. Usage: observe.py VMFERRY LAB CHECKOUT"""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

VMFERRY, LAB, CHECKOUT = (Path(word).resolve() for word in sys.argv[1:4])
DEPLOY = CHECKOUT / "deploy/prometheus"
PROMTOOL = LAB / "prometheus/bin/promtool"
OTLP = LAB / "otlp/bin/python"
QEMU = LAB / "qemu10/bin/qemu-system-x86_64"
PATIENCE_S = 120
MIB = 1 << 20

started = []
mounted = []
failed = []


def say(is_good, what):
    print(("ok      " if is_good else "FAILED  ") + what, flush=True)
    if not is_good:
        failed.append(what)


def run(*words, **more):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)


def must(*words):
    done = run(*words)
    if done.returncode != 0:
        sys.exit(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def start(*words, log):
    process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    started.append(process)
    return process


def wait(what, look, patience=PATIENCE_S):
    until = time.monotonic() + patience
    while not (found := look()):
        if time.monotonic() > until:
            return None
        time.sleep(0.2)
    return found


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Collector:
    """Takes traces, as a collector of OpenTelemetry does."""

    def __init__(self):
        told = self.told = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                told.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans_of(self, migration):
        """By host, the migration's own first."""
        found = {}
        for _, body in list(self.told):
            of_resource = json.loads(body)["resourceSpans"][0]
            host = {one["key"]: one["value"]["stringValue"] for one in of_resource["resource"]["attributes"]}["host.name"]
            spans = of_resource["scopeSpans"][0]["spans"]
            if spans[0]["traceId"] == migration.replace("-", ""):
                found[host] = spans
        return found


class Agent:
    def __init__(self, ground, name, text, collector):
        self.name, self.folder = name, ground / name
        self.folder.mkdir()
        self.metrics = free_port()
        tls = ground / "pki/hosts" / name
        head = f"""state_dir = 'state'
runtime_dir = 'run'
[metrics]
listen = '127.0.0.1:{self.metrics}'
[traces]
url = '{collector.url}'
[tls]
ca = '{tls}/ca-cert.pem'
cert = '{tls}/cert.pem'
key = '{tls}/key.pem'
crl = '{ground}/pki/crl.pem'
"""
        listen, rest = text.split("\n", 1)
        (self.folder / "vmferry.toml").write_text(listen + "\n" + head + rest)
        self.log = open(self.folder / "log", "wb")

    def start(self):
        self.process = start(VMFERRY, "agent", "--config", self.folder / "vmferry.toml", log=self.log)
        if not wait("an agent", lambda: self.scrape(), 30):
            sys.exit((self.folder / "log").read_text())

    def scrape(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
                return answer.read().decode()
        except OSError:
            return None

    def cli(self, *words):
        return run(VMFERRY, "--socket", self.folder / "run/vmferry.sock", *words)


def guest(ground, side, vm, log, *more):
    folder = ground / side
    disk, qmp = folder / f"{vm}.raw", folder / f"{vm}.qmp"
    with open(disk, "wb") as image:
        image.truncate(48 * MIB)
        if not more:
            for _ in range(32):
                image.write(os.urandom(MIB))
    process = start(
        QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "tcg", "-m", "64",
        "-chardev", f"socket,id=agent,path={qmp},server=on,wait=off", "-mon", "chardev=agent,mode=control",
        "-blockdev", f"driver=raw,node-name=disk0,file.driver=file,file.filename={disk}",
        "-device", "virtio-blk-pci,drive=disk0,id=vda", *more, log=log)
    if not wait("a QEMU", qmp.exists, 30):
        sys.exit(f"{side}: no QEMU")
    return process, qmp


class Prometheus:
    def __init__(self, ground, agents):
        # As they are, but for patience: what waits for minutes waits for a second here.
        rules = (DEPLOY / "vmferry.rules.yml").read_text()
        rules = re.sub(r"\bfor: \d+m\b", "for: 1s", rules).replace("_idle_seconds > 120", "_idle_seconds > 3")
        # What is looked at over ten minutes there.
        rules = rules.replace("_limited_seconds_total[10m]", "_limited_seconds_total[5s]")
        (ground / "vmferry.rules.yml").write_text(rules)
        targets = ", ".join(f'"127.0.0.1:{agent.metrics}"' for agent in agents)
        (ground / "prometheus.yml").write_text(f"""global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [vmferry.rules.yml]
scrape_configs:
  - job_name: vmferry
    static_configs: [{{targets: [{targets}]}}]
""")
        self.port = free_port()
        start(LAB / "prometheus/bin/prometheus", f"--config.file={ground}/prometheus.yml",
              f"--storage.tsdb.path={ground}/tsdb", f"--web.listen-address=127.0.0.1:{self.port}",
              log=open(ground / "prometheus.log", "wb"))
        if not wait("Prometheus", lambda: self.ask("query", query="vector(1)"), 60):
            sys.exit((ground / "prometheus.log").read_text())

    def ask(self, what, **query):
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def has(self, expression):
        data = self.ask("query", query=expression)
        return bool(data and data["result"])

    def fires(self, alert):
        return self.has(f'ALERTS{{alertname="{alert}",alertstate="firing"}}')


def expressions():
    """Of every panel, with Grafana's variables in place."""
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$instance", ".*").replace("$__rate_interval", "10s")


def check_files():
    for what in (["check", "rules", DEPLOY / "vmferry.rules.yml"], ["test", "rules", DEPLOY / "vmferry.rules.test.yml"]):
        done = run(PROMTOOL, *what)
        say(done.returncode == 0, f"promtool {what[0]} {what[1]}" + ("" if done.returncode == 0 else done.stdout))


def check_metrics(agents):
    for agent in agents:
        done = run(PROMTOOL, "check", "metrics", input=agent.scrape())
        say(done.returncode == 0 and not done.stderr, f"promtool check metrics: {agent.name} {done.stdout}{done.stderr}")


def expect(prometheus, alert, cause, patience=PATIENCE_S):
    say(bool(wait(alert, lambda: prometheus.fires(alert), patience)), f"{alert} fires: {cause}")


def short_certificate(pki, host, seconds):
    """Replaces a host's certificate by one that ends soon."""
    ground = pki / f"short-{host}"
    ground.mkdir()
    (ground / "index").touch()
    (ground / "config").write_text(f"""[ca]
default_ca = it
[it]
dir = {ground}
database = {ground}/index
new_certs_dir = {ground}
serial = {ground}/serial
rand_serial = yes
default_md = sha256
policy = any
x509_extensions = host
unique_subject = no
[any]
commonName = supplied
[host]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature,keyEncipherment
extendedKeyUsage = serverAuth,clientAuth
subjectAltName = DNS:{host}
[req]
distinguished_name = name
[name]
""")
    folder = pki / "hosts" / host
    must("openssl", "req", "-new", "-config", ground / "config", "-key", folder / "key.pem", "-subj", f"/CN={host}",
         "-out", ground / "request")
    moment = lambda at: time.strftime("%Y%m%d%H%M%SZ", time.gmtime(at))
    now = time.time()
    must("openssl", "ca", "-batch", "-config", ground / "config", "-cert", pki / "ca-cert.pem", "-keyfile",
         pki / "ca-key.pem", "-in", ground / "request", "-out", folder / "cert.pem", "-notext", "-startdate",
         moment(now - 3600), "-enddate", moment(now + seconds))


def full_disk(folder, kib):
    """A folder on a file system of its own, which is filled when the result is called."""
    folder.mkdir()
    must("mount", "-t", "tmpfs", "-o", f"size={kib}k", "observe", folder)
    mounted.append(folder)

    def fill():
        with open(folder / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    return fill


def few_descriptors(process):
    """No more than it has, and a few."""
    has = len(os.listdir(f"/proc/{process.pid}/fd"))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (has + 4, has + 4))


def stand_still(prometheus, alpha, bravo):
    """A guest whose destination takes its time to start it, and whose agent there ends meanwhile."""
    begun = alpha.cli("migrate", "web2", "--to", "bravo", "--detach")
    say(begun.returncode == 0, f"a migration begins {begun.stderr}")
    expect(prometheus, "VmferryGuestStandsStill", "the destination's hook takes half a minute")
    os.kill(bravo.process.pid, signal.SIGKILL)
    bravo.process.wait()
    expect(prometheus, "VmferryUndecidedHandOver", "the destination's agent is killed in the hand-over")
    bravo.start()
    ended = wait("its end", lambda: not prometheus.has("vmferry_migrations_undecided > 0"))
    say(bool(ended), "the hand-over is decided when it is back")


def check_traces(collector, migration):
    both = wait("a trace", lambda: (found := collector.spans_of(migration)) and len(found) == 2 and found, 30)
    say(bool(both), "both hosts tell of the migration by one id")
    if not both:
        return
    (source, *phases), (destination, *others) = both["alpha"], both["bravo"]
    is_below = destination.get("parentSpanId") == source["spanId"] and "parentSpanId" not in source
    say(is_below, "the destination's part is below the source's")
    names = [span["name"] for span in phases]
    say(set(names) >= {"begin", "prepare", "mirror", "precopy", "device", "confirm"}, f"its phases are told: {names}")
    says = lambda span: (int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"]))
    (from_ns, to_ns), second = says(source), 10**9
    ours = all(from_ns <= a <= b <= to_ns for a, b in map(says, phases))
    theirs = all(from_ns - second <= a <= b <= to_ns + second for a, b in map(says, [destination, *others]))
    say(ours and theirs, "all of it lies within the migration")
    judged = [run(OTLP, CHECKOUT / "tests/observe/otlp.py", input=body.decode()) for _, body in collector.told]
    said = [one.stderr for one in judged if one.returncode != 0]
    say(judged and not said, f"OpenTelemetry's own messages take all {len(judged)} requests {said[:1] or ''}")
    say({path for path, _ in collector.told} == {"/v1/traces"}, "where a collector takes them")


def leave_something(prometheus, alpha, bravo, ground):
    """An image that was made for a guest which does not come, and that somebody has mounted meanwhile."""
    image = ground / "bravo/web3-vda.raw"
    begun = alpha.cli("migrate", "web3", "--to", "bravo", "--detach")
    say(begun.returncode == 0, f"a migration begins {begun.stderr}")
    say(bool(wait("an image", image.exists)), "an image is made for it")
    must("mount", "--bind", image, image)
    mounted.append(image)
    (ground / "go").touch()
    expect(prometheus, "VmferryLeftovers", "the image cannot be removed: it is mounted")
    left = bravo.cli("recover", "--look").stdout
    say(str(image) in left and "busy" in left, "recover names the image and why it is left" + ("" if "busy" in left else f": {left}"))
    must("umount", mounted.pop())
    say(bravo.cli("recover").returncode == 0 and not image.exists(), "recover removes it when it can")
    gone = wait("no left-over", lambda: not prometheus.fires("VmferryLeftovers"))
    say(bool(gone), "the alert ends with that")


def move_and_look(prometheus, alpha, bravo, collector):
    wanted = dict(expressions())
    before = {title: text for title, text in wanted.items() if prometheus.has(text)}
    begun = alpha.cli("migrate", "web1", "--to", "bravo", "--limit", "2MiB/s", "--detach")
    say(begun.returncode == 0, f"a migration begins {begun.stderr}")
    wait("bytes that flow", lambda: prometheus.has("vmferry_migration_rate_bytes_per_second > 0"))
    check_metrics([alpha, bravo])
    expect(prometheus, "VmferryBudgetStarved", "a limit", patience=40)
    # A host that does not answer, and lives.
    os.kill(bravo.process.pid, signal.SIGSTOP)
    expect(prometheus, "VmferryMigrationStuck", "the destination's agent is stopped", patience=40)
    os.kill(bravo.process.pid, signal.SIGCONT)
    seen = set(before)

    def all_seen():
        seen.update(title for title, text in wanted.items() if title not in seen and prometheus.has(text))
        return len(seen) == len(wanted)

    wait("every panel", all_seen)
    # Of a migration that has ended, too.
    wait("its end", lambda: '"outcome": null' not in alpha.cli("status", "web1", "--json").stdout)
    report = alpha.cli("report", "web1")
    if len(sys.argv) > 4:
        Path(sys.argv[4]).write_text(report.stdout)
    say(report.returncode == 0 and report.stdout.count("<polyline") >= 3, f"a report of it {report.stderr}")
    check_traces(collector, begun.stdout.strip())
    for title in wanted:
        say(title in seen, f"panel \"{title}\" has data" + ("" if title in seen else f": {wanted[title]}"))


def main():
    ground = Path(tempfile.mkdtemp(prefix="vmferry-observe-"))
    pki = ground / "pki"
    must(VMFERRY, "certs", "ca", "--dir", pki, "--days", "30")
    for host in ("alpha", "bravo", "charlie"):
        must(VMFERRY, "certs", "host", host, "--dir", pki, "--days", "3")
    must(VMFERRY, "certs", "revoke", "--dir", pki, "--days", "1")
    port = free_port()
    log = open(ground / "qemu.log", "wb")
    collector = Collector()
    alpha = Agent(ground, "alpha", f"""listen = []
[peer.bravo]
identity = 'bravo'
address = '127.0.0.1:{port}'
send = ['*']
[peer.nobody]
identity = 'nobody'
address = '127.0.0.1:1'
send = ['*']
[vm.web1]
qmp = '{ground}/alpha/web1.qmp'
[vm.web2]
qmp = '{ground}/alpha/web2.qmp'
[vm.web3]
qmp = '{ground}/alpha/web3.qmp'
[deadlines]
undecided_s = 5
resume_s = 15
[forward.vnc]
listen = '{ground}/vnc'
to = 'bravo'
target = 'vnc'
""", collector)
    bravo = Agent(ground, "bravo", f"""listen = ['127.0.0.1:{port}']
[peer.alpha]
identity = 'alpha'
receive = ['web*']
[deadlines]
hook_s = 40
[vm.web1]
qmp = '{ground}/bravo/web1.qmp'
[vm.web2]
qmp = '{ground}/bravo/web2.qmp'
before_start = ['/bin/sleep', '30']
[vm.web3]
qmp = '{ground}/bravo/web3.qmp'
start = {{ command = ['/bin/sh', '-c', 'until [ -e {ground}/go ]; do sleep 0.2; done; exit 1'] }}
[vm.web3.create]
path = '{ground}/bravo/{{vm}}-{{disk}}.{{format}}'
""", collector)
    charlie = Agent(ground, "charlie", """listen = []
[peer.alpha]
identity = 'alpha'
receive = ['web1']
""", collector)
    fill = full_disk(charlie.folder / "state", 512)
    short_certificate(pki, "charlie", 45)
    charlie.start()
    for vm in ("web1", "web2"):
        guest(ground, "bravo", vm, log, "-incoming", "defer", "-S")
    for vm in ("web1", "web2", "web3"):
        guest(ground, "alpha", vm, log)
    alpha.start()
    bravo.start()
    check_files()
    check_metrics([alpha, bravo])
    prometheus = Prometheus(ground, [alpha, bravo, charlie])
    # What never happened has no figure yet.
    alpha.cli("check", "web1", "--to", "nobody")
    move_and_look(prometheus, alpha, bravo, collector)
    check_metrics([alpha, bravo])

    for alert, cause in [
        ("VmferryCertificateExpiring", "certificates of three days"),
        ("VmferryAuthorityExpiring", "a CA of thirty days"),
        ("VmferryRevocationListExpiring", "a list of one day"),
    ]:
        expect(prometheus, alert, cause)
    expect(prometheus, "VmferryCertificateExpired", "one of 45 seconds")
    fill()
    charlie.cli("cancel", "drain")
    expect(prometheus, "VmferryAuditFailing", "its file system is full")
    few_descriptors(charlie.process)
    expect(prometheus, "VmferryFewDescriptorsLeft", "it may open only a few more")
    leave_something(prometheus, alpha, bravo, ground)
    stand_still(prometheus, alpha, bravo)
    (ground / "vnc").unlink()
    socket.socket(socket.AF_UNIX).bind(str(ground / "vnc"))
    expect(prometheus, "VmferryForwardBypassed", "the socket's file is another one")
    for _ in range(5):
        before = alpha.scrape()
        run("ss", "-K", "dst", "127.0.0.1", "dport", "=", port)
        wait("a new connection", lambda: alpha.scrape() != before, 10)
        time.sleep(2)
    expect(prometheus, "VmferrySessionFlapping", "its connection is cut five times")
    expect(prometheus, "VmferryPeerUnreachable", "a peer at a port where nobody listens")
    os.kill(bravo.process.pid, signal.SIGKILL)
    expect(prometheus, "VmferryAgentDown", "an agent is killed")
    journal = bravo.folder / "state/migrations" / "00000000-0000-4000-8000-000000000000.source.journal"
    damaged = sorted((bravo.folder / "state/migrations").iterdir())
    damaged[0].write_bytes(b"x" + damaged[0].read_bytes()[1:]) if damaged else journal.write_bytes(b"x\n")
    bravo.start()
    expect(prometheus, "VmferryJournalRefused", "a journal is damaged")
    print(f"{len(failed)} of these failed" if failed else "all of it as it should be")
    return 1 if failed else 0


try:
    code = main()
finally:
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
    for folder in mounted:
        run("umount", folder)
sys.exit(code)
