"""Runs one of tlsfuzzer's scripts against an agent, with what nearly all of its conversations lack: a client
certificate, the ALPN, and, in the place of the HTTP request after the handshake, a HELLO that the agent answers.

    usage: tlsfuzzer_client.py TLSFUZZER CERT KEY SCRIPT ARGUMENTS...

The conversations themselves stay as they are: a CertificateRequest is expected where a server's flight has one,
and Certificate and CertificateVerify stand before the client's Finished where the script sends none of its own.
"""

import importlib
import os
import struct
import sys

checkout, cert_file, key_file, script = sys.argv[1:5]
sys.path.insert(0, checkout)

from tlslite.api import X509, X509CertChain, parsePEMKey
from tlslite.constants import ExtensionType
from tlslite.extensions import ALPNExtension
from tlsfuzzer import expect, messages
from tlsfuzzer.tree import TreeNode

CERT = X509().parse(open(cert_file).read())
KEY = parsePEMKey(open(key_file).read(), private=True)
ALPN = bytearray(b"vmferry/1")


def hello():
    """Of a version that nobody speaks (src/mux/hello.rs): it is answered with one frame, a GOAWAY, and the end."""
    payload = b"vmferry\0" + struct.pack(">HHQQ", 9, 9, 0, 0) + os.urandom(16)
    payload += struct.pack(">IQQQQ", 1024, 65536, 65536, 64 << 20, 256 << 20)
    payload += b"\x01" + os.urandom(16) + os.urandom(32)
    return bytearray(struct.pack(">BBHIQ", 1, 0, len(payload), 0, 0) + payload)


def add_child(node, child, add=TreeNode.add_child):
    generators = (messages.CertificateGenerator, messages.CertificateVerifyGenerator)
    certificates = (expect.ExpectCertificate, expect.ExpectCompressedCertificate)
    if isinstance(node, expect.ExpectEncryptedExtensions) and isinstance(child, certificates):
        add(add(node, expect.ExpectCertificateRequest()), child)
    elif isinstance(child, messages.FinishedGenerator) and not isinstance(node, generators):
        certificate = add(node, messages.CertificateGenerator(X509CertChain([CERT])))
        add(add(certificate, messages.CertificateVerifyGenerator(KEY)), child)
    else:
        add(node, child)
    return child


def client_hello(self, *args, begin=messages.ClientHelloGenerator.__init__, **kwargs):
    begin(self, *args, **kwargs)
    if self.extensions and ExtensionType.alpn not in self.extensions:
        self.extensions = {ExtensionType.alpn: ALPNExtension().create([ALPN]), **self.extensions}


def encrypted_extensions(self, extensions=None, begin=expect.ExpectEncryptedExtensions.__init__):
    """A script that lists what it expects expects the answer to the ALPN as well."""
    begin(self, extensions if extensions is None else {**extensions, ExtensionType.alpn: None})


def connect(self, hostname, port, version=(3, 0), timeout=5, begin=messages.Connect.__init__):
    """The agent's own deadlines are 5 s: which of two that are the same is over first would be chance."""
    begin(self, hostname, port, version, max(timeout, 20))


def application_data(self, payload, begin=messages.ApplicationDataGenerator.__init__):
    begin(self, hello() if bytes(payload).startswith(b"GET ") else payload)


TreeNode.add_child = add_child
messages.Connect.__init__ = connect
messages.ClientHelloGenerator.__init__ = client_hello
messages.ApplicationDataGenerator.__init__ = application_data
expect.ExpectEncryptedExtensions.__init__ = encrypted_extensions

name = script.replace("-", "_").removesuffix(".py")
# Those that are about client certificates take one.
about_certificates = "opt == '-c'" in open(f"{checkout}/tlsfuzzer/_apps/{name}.py").read()
sys.argv = [script] + sys.argv[5:] + (["-c", cert_file, "-k", key_file] if about_certificates else [])
importlib.import_module(f"tlsfuzzer._apps.{name}").main()
