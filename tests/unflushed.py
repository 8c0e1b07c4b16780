"""A file whose close() does not come back: one of a FUSE file system.

    with Unflushed(tmp_path) as file:
        victim = subprocess.Popen([...])     # opens file.path
        file.wait_for_close()                # somebody hangs in close()

Closing lets all go on. Needs root, and FUSE in the kernel; raises Unavailable
with the reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from cgroups import Unavailable
from mrelease.closing import Closing
from mrelease.holds import Guard

if TYPE_CHECKING:
    from pathlib import Path

DAEMON = """
import ctypes, os, select, struct, sys

(INIT, LOOKUP, GETATTR, OPEN, OPENDIR, FLUSH) = (26, 1, 3, 14, 27, 25)
NO_ANSWER = {2, 42, FLUSH}  # FORGET, BATCH_FORGET
ENOSYS = 38

def attributes(node):
    mode = 0o40755 if node == 1 else 0o100444
    return struct.pack("=6Q10I", node, *[0] * 8, mode, 1, *[0] * 3, 4096, 0)

def answer(operation, node):
    if operation == INIT:
        # Version 7.31, and what else may be nothing.
        return struct.pack("=4I2H2I", 7, 31, 0, 0, 1, 1, 4096, 1) + bytes(32)
    if operation == LOOKUP:
        return struct.pack("=4Q2I", 2, *[0] * 5) + attributes(2)
    if operation == GETATTR:
        return struct.pack("=Q2I", 0, 0, 0) + attributes(node)
    if operation in (OPEN, OPENDIR):
        return struct.pack("=Q2I", 0, 0, 0)
    return None

libc = ctypes.CDLL(None, use_errno=True)
device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
if libc.mount(b"none", os.fsencode(sys.argv[1]), b"fuse", 6, options.encode()):
    sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
print("ready", flush=True)
while 0 not in select.select([device, 0], [], [])[0]:
    request = os.read(device, 1 << 20)
    _, operation, unique, node = struct.unpack_from("=2I2Q", request)
    if operation == FLUSH:
        print("closing", flush=True)
    if operation in NO_ANSWER:
        continue
    data = answer(operation, node)
    error = -ENOSYS if data is None else 0
    data = data or b""
    os.write(device, struct.pack("=IiQ", 16 + len(data), error, unique) + data)
"""


class Unflushed(Closing):
    """Such a file, as long as this is open."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            raise Unavailable("mounting a file system needs root")
        if not os.path.exists("/dev/fuse"):
            raise Unavailable("the kernel has no FUSE here")
        mount = folder / "unflushed"
        mount.mkdir()
        self.path = mount / "file"
        self._guard = Guard('umount -l "$1" || true', str(mount))
        self._daemon = subprocess.Popen(
            [sys.executable, "-I", "-c", DAEMON, mount],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._line() != "ready\n":
            self.close()
            raise Unavailable("a FUSE file system may not be mounted here")

    def _line(self) -> str:
        assert self._daemon.stdout is not None
        return self._daemon.stdout.readline()

    def wait_for_close(self) -> None:
        """Wait until somebody closes the file, and hangs."""
        assert self._line() == "closing\n"

    def close(self) -> None:
        # Its end is that of the connection: all get an answer.
        self._daemon.communicate()
        self._guard.close()
