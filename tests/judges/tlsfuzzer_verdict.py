"""What tlsfuzzer's scripts have said: a table, and whether it is as good as tests/judges/expected.txt.

    usage: tlsfuzzer_verdict.py EXPECTED LOG...

A probe that fails has failed in one of five ways. Only the last would be a hole:

    alert    refused as it should be, with another alert than RFC 8446 names
    refused  refused where the script expects to go on: what it offers is not offered here
    closed   the connection was ended without an alert
    offers   the server's own offer differs from what the script takes for granted
    went on  the server has gone on where the script expects an alert
"""

import os
import re
import sys

WAYS = ("alert", "refused", "closed", "offers", "went on")


def way_of(node, error):
    """In which way a probe has failed that waited at this node."""
    if "Expected alert description" in error:
        return "alert"
    if "Unexpected message from peer: Alert(" in error:
        return "refused"
    if re.search("Unexpected closure|Broken pipe|TLSAbruptClose|ConnectionReset", error):
        return "closed"
    return "went on" if re.match("ExpectAlert|ExpectClose", node) else "offers"


def judge(path):
    text = open(path, errors="replace").read()
    number = lambda word: int((re.search(rf"^{word}: (\d+)", text, re.M) or [0, 0])[1])
    ways = dict.fromkeys(WAYS, 0)
    for failure in text.split("Error encountered while processing node ")[1:]:
        errors = re.findall(r"^(?:[A-Za-z.]*Error|[A-Za-z.]*Exception)\b.*", failure, re.M) or ["?"]
        # The last of a chain of causes is the script's own word.
        ways[way_of(failure, errors[-1])] += 1
    return number("PASS"), number("FAIL"), ways


def main():
    lines = [line.split() for line in open(sys.argv[1]) if line.strip() and not line.startswith("#")]
    expected = {name: (int(least), int(most)) for name, least, most in lines}
    good, seen = True, set()
    print("| script | passed | failed | " + " | ".join(WAYS) + " |")
    print("|---|---|---|" + "---|" * len(WAYS))
    for path in sorted(sys.argv[2:]):
        name = re.sub(r"^test-tls13-|\.py\.log$", "", os.path.basename(path))
        passed, failed, ways = judge(path)
        least, most = expected.get(name, (0, 0))
        seen.add(name)
        worse = passed < least or ways["went on"] > most
        good &= not worse
        print(f"| {name}{' **WORSE**' if worse else ''} | {passed} | {failed} | " + " | ".join(map(str, ways.values())) + " |")
    for name in expected.keys() - seen:
        good = False
        print(f"{name} was not run")
    return 0 if good else 1


sys.exit(main())
