"""Commands of the other pages, word for word, on the machines that README's five minutes have set up: web1 runs on alpha.
What stands for something (an id, an address, a ticket) is put in its place."""

import re
import sys

MOVES_BACK = "vmferry migrate web1 --to alpha"


class Page:
    def __init__(self, checkout, path):
        self.path = path
        self.blocks = re.findall(r"^```\w*\n(.*?)^```$", (checkout / path).read_text(), re.S | re.M)

    def block(self, beginning):
        """The commands of the one block that begins so."""
        found = [block for block in self.blocks if block.startswith(beginning)]
        if len(found) != 1:
            sys.exit(f"{self.path} has {len(found)} blocks that begin with {beginning!r}")
        return [line for line in found[0].replace("\\\n", "").splitlines() if line.strip() and not line.startswith("#")]


def looks(page, types):
    for line in page("docs/troubleshooting.md").block("vmferry status"):
        types("alpha", line)
    for line in page("docs/destination.md").block("vmferry qemu-command"):
        types("alpha", line)
    said = types("alpha", page("deploy/README.md").block("GLIBC_TUNABLES=")[0])
    if "0x5f5e100" not in said:
        sys.exit(f"the threshold is not taken: {said}")
    types("office", "systemctl start firewalld")
    for line in page("docs/firewall.md").block("ufw allow"):
        types("office", line)
    types("office", "systemctl stop firewalld")


def disks(page, types):
    """Each move, and back."""
    pages = page("docs/disks.md")
    for line in pages.block("vmferry replicate"):
        types("alpha", line)
    types("bravo", MOVES_BACK)
    for line in pages.block("vmferry migrate web1 --to bravo --verify"):
        types("alpha", line)
        types("bravo", MOVES_BACK)
    for line in pages.block("echo VMFERRY_REPLICATE_TO"):
        types("alpha", line)


def forwards(page, types):
    folder = "/etc/systemd/system/vmferry.service.d"
    types("alpha", f"install -D -t {folder} /usr/share/doc/vmferry/examples/vmferry.service.d/forward.conf")
    types("alpha", """printf '\n[sandbox]\nwrite = ["/run/vmferry-forward"]\n' >>/etc/vmferry/vmferry.toml""")
    types("alpha", "systemctl daemon-reload && systemctl restart vmferry")
    lines = page("docs/forward.md").block("vmferry forward add /run")
    added = types("alpha", lines.pop(0)).split()[-1]
    for line in lines:
        line = line.replace("ID", added)
        # It goes on until it is ended.
        types("alpha", f"timeout 3 {line.split('#')[0]} || [ $? = 124 ]" if line.startswith("vmferry watch") else line)


def certificates(page, types):
    own, *others = page("certs/README.md").block("vmferry certs ca ")
    types("office", f"mkdir certs && cd certs && {own}")
    for line in others:
        types("office", f"cd certs && {line}")
    # The address is an example.
    invite, join = (line.replace("10.0.0.5", "10.99.0.9") for line in page("certs/README.md").block("vmferry certs invite"))
    invite = invite.split("#")[0].replace(" bravo ", " charlie ").replace("--dir pki", "--dir certs/pki")
    waits = "for n in $(seq 100); do grep -q vmferry1/ ticket && break; sleep 0.2; done"
    types("office", f"touch ticket; {invite.strip()} >ticket 2>&1 & {waits}; grep -o 'vmferry1/[^ ]*' ticket >word")
    types("office", "scp word bravo:")
    types("bravo", "vmferry join - --dir joined < <(tr -d \"'\" <word)" if join.startswith("vmferry join 'vmferry1/bravo/") else sys.exit(join))
    types("office", f"cd certs/pki/hosts/alpha && {page('certs/README.md').block('vmferry certs check')[0].replace('bravo.pem', '../bravo/cert.pem')}")


def requests(page, types):
    """README's API, each answered with JSON; the last is refused, for nothing is undecided."""
    define, *lines = page("README.md").block("api() {")
    ended = None
    for line in lines:
        if line.startswith(("api -X POST http://vmferry/v1/forwards", "api http://vmferry/v1/recover/$ID")):
            where = "forwards" if "forwards" in line else None
            ended = f"ID=$(api http://vmferry/v1/{where} | grep -o '[0-9a-f-]\\{{36\\}}' | head -1); " if where else ended
        prefix = ended or "ID=$(api http://vmferry/v1/migrations | grep -o '[0-9a-f-]\\{36\\}' | tail -1); "
        said = types("alpha", f"{define}; {prefix if '$ID' in line else ''}{line}")
        if said and not said.lstrip().startswith(("{", "[")):
            sys.exit(f"{line}: {said}")
        ended = None


def run(checkout, types):
    page = lambda path: Page(checkout, path)
    for part in (looks, forwards, disks, requests, certificates):
        part(page, types)
