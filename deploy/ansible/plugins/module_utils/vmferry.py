"""What the modules share: vmferry's command line, its JSON, and what each of its answers means for a play."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import json

# VM states in which a guest is on this host, and can be moved from it.
HERE = ("runs", "holds", "not-begun")
# … and in which surely none is.
ELSEWHERE = ("waits", "spent", "given-away", "no-qemu")

COMMON = dict(
    program=dict(type="path", default="vmferry"),
    socket=dict(type="path"),
    auto_converge=dict(type="bool", default=False),
    never_slow_writes=dict(type="bool", default=False),
    compress=dict(type="bool", default=False),
    strict=dict(type="bool", default=False),
    accept=dict(type="list", elements="str", default=[]),
    retry=dict(type="int"),
    downtime_limit_ms=dict(type="int"),
    limit=dict(type="str"),
)


def common_words(params):
    """The options of `COMMON` as words of the command line."""
    words = []
    for name in ("auto_converge", "never_slow_writes", "compress", "strict"):
        if params[name]:
            words.append("--" + name.replace("_", "-"))
    for kind in params["accept"]:
        words += ["--accept", kind]
    for name, word in (("retry", "--retry"), ("downtime_limit_ms", "--downtime-limit"), ("limit", "--limit")):
        if params[name] is not None:
            words += [word, str(params[name])]
    return words


class Cli(object):
    """The program, and the agent that it talks to."""

    def __init__(self, module):
        self.module = module
        program = module.params["program"]
        self.words = [module.get_bin_path(program, required=True) if "/" not in program else program]
        if module.params["socket"]:
            self.words += ["--socket", module.params["socket"]]

    def run(self, words):
        """Exit code, output, and what was said beside it."""
        return self.module.run_command(
            self.words + words, environ_update=dict(LC_ALL="C.UTF-8", VMFERRY_LOG="error"), handle_exceptions=True
        )

    def refuse(self, words, code, said):
        """It did not begin."""
        said = said.strip() or "exit code %s without a word" % code
        self.module.fail_json(msg=said, changed=False, command=["vmferry"] + words, rc=code)

    def document(self, words):
        """One document of JSON; whatever the exit code means, it is the caller's to say."""
        words = words + ["--json"]
        code, out, said = self.run(words)
        try:
            return code, json.loads(out)
        except ValueError:
            self.refuse(words, code, said)

    def last_line(self, words):
        """The last of several lines of JSON. None when the end was not seen; a play is told what began."""
        words = words + ["--json"]
        code, out, said = self.run(words)
        lines = [line for line in out.splitlines() if line.strip()]
        if not lines:
            self.refuse(words, code, said)
        seen = None
        for line in lines:
            try:
                seen = json.loads(line)
            except ValueError:
                break
        if seen is None:
            self.refuse(words, code, said)
        return seen if seen.get("last") else None, seen, said.strip()


def told(problems, severity=None):
    """Findings of `check` in a line each, with their remedies."""
    return [
        "%s (%s)" % (one["text"], one["remedy"])
        for one in problems
        if severity is None or one.get("severity", "problem") == severity
    ]


def warn(module, problems):
    for line in told(problems, "warning"):
        module.warn(line)
