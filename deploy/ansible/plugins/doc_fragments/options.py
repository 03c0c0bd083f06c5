"""Options that the modules share."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type


class ModuleDocFragment(object):
    DOCUMENTATION = r"""
options:
  program:
    description: The command line.
    type: path
    default: vmferry
  socket:
    description: The agent's socket; the packaged agent's by default.
    type: path
  auto_converge:
    description: Slow guests down whose RAM changes faster than it can be sent.
    type: bool
    default: false
  never_slow_writes:
    description: Let no write of a guest's wait, also when it writes faster than its disks can be copied.
    type: bool
    default: false
  compress:
    description: Compress the disks on their way.
    type: bool
    default: false
  strict:
    description: Refuse for warnings, too.
    type: bool
    default: false
  accept:
    description: Go on in spite of problems of these kinds.
    type: list
    elements: str
    default: []
  retry:
    description: Begin again, up to so many times, after a failure that may pass.
    type: int
  downtime_limit_ms:
    description: Longest pause to plan for the rest of the RAM.
    type: int
  limit:
    description: Send no more than this in a second, as C(100MiB/s).
    type: str
"""
