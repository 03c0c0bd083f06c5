"""How Ansible reaches a machine of the test: by a command that runs another one inside, and by a folder with its files."""

import os
import shlex
import shutil

from ansible.plugins.connection.local import Connection as Local

DOCUMENTATION = """
name: machine
short_description: A machine in a network namespace of this one
description: A machine in a network namespace of this one.
author: The vmferry authors
options:
  through:
    description: The command, to which another one is given.
    vars: [{name: machine_through}]
    required: true
  root:
    description: Where its files are, seen from here.
    vars: [{name: machine_root}]
    default: ""
"""


class Connection(Local):
    transport = "machine"

    def exec_command(self, cmd, in_data=None, sudoable=True):
        inside = f"exec {self.get_option('through')} /bin/sh -c {shlex.quote(cmd)}"
        return super().exec_command(inside, in_data=in_data, sudoable=sudoable)

    def _seen(self, path):
        return os.path.join(self.get_option("root") or "/", path.lstrip("/"))

    def put_file(self, in_path, out_path):
        shutil.copyfile(in_path, self._seen(out_path))

    def fetch_file(self, in_path, out_path):
        shutil.copyfile(self._seen(in_path), out_path)
