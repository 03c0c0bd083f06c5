"""What sslyze may find of an agent's port: TLS 1.3 alone, nothing that takes a session up without a handshake.

    usage: sslyze_verdict.py RESULT.json
"""

import json
import sys

(server,) = json.load(open(sys.argv[1]))["server_scan_results"]
found = {name: scan["result"] for name, scan in server["scan_result"].items() if scan and scan["result"]}
accepted = {name: [suite["cipher_suite"]["name"] for suite in result["accepted_cipher_suites"]]
            for name, result in found.items() if name.endswith("_cipher_suites")}
expected = {
    "cipher suites of TLS 1.3": (sorted(accepted.pop("tls_1_3_cipher_suites")),
                                 ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]),
    "older versions": ([name for name, suites in accepted.items() if suites], []),
    "versions asked for": (len(accepted), 5),
    "session ids": (found["session_resumption"]["session_id_resumption_result"], "SERVER_IS_TLS_1_3_ONLY"),
    "compression": (found["tls_compression"]["supports_compression"], False),
    "CCS injection": (found["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"], False),
    "Heartbleed": (found["heartbleed"]["is_vulnerable_to_heartbleed"], False),
    "renegotiation by clients": (found["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"], False),
}
wrong = {what: pair for what, pair in expected.items() if pair[0] != pair[1]}
for what, (is_so, _) in expected.items():
    print(f"{'WRONG ' if what in wrong else ''}{what}: {is_so}")
sys.exit(bool(wrong))
