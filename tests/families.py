"""Families: trees and groups of processes that fork as a script says.

    with families.Family("child() or rest()\\nrest()") as family:
        family.wait_for(2)

The script runs in Python. It has ``child()`` (os.fork()), ``rest()`` (sleep
until killed; ends by itself), ``say(text)`` (a line on stdout) and ``count``,
a number that all of the family share, to bound a storm. All have a mark in
their command line, by which they are found wherever they went: closing kills
what is left, also orphans, and only that.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import victims
from mrelease.closing import Closing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cgroups import Group

PRELUDE = """
import mmap, os, signal, sys, time
end = time.monotonic() + 60
shared = mmap.mmap(-1, 4)
def child():
    return os.fork()
def rest():
    while time.monotonic() < end:
        time.sleep(0.05)
    os._exit(0)
def say(text):
    os.write(1, text.encode() + b"\\n")
def one_more(most):
    count = int.from_bytes(shared[:4], "little")
    shared[:4] = (count + 1).to_bytes(4, "little")
    return count < most
"""

STORM = """
def storm():
    while time.monotonic() < end - 40:
        if one_more({most}) and child() == 0:
            say("one more")
            storm()
        time.sleep({pause})
    os._exit(0)
storm()
"""
"""Each forks for ever, and so do its children: at most so many in all (or a
few more: the count is not exact). Ends by itself after 20 s."""


def slowness() -> float:
    """How much longer this machine takes to read /proc than it should.

    More than 20 in an emulated one. A storm that rests by the clock would be
    as much faster there than all who try to keep up with it.
    """
    found = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(20):
            Path("/proc/self/stat").read_bytes()
        found = min(found, (time.perf_counter() - begun) / 20)
    return max(1.0, found / 50e-6)


def storm(most: int = 60, pause: float = 0.004) -> str:
    return STORM.format(most=most, pause=pause * slowness())


_numbers = itertools.count(1)


class Family(Closing):
    """A running script, a child of this process, and all it forked."""

    def __init__(
        self,
        script: str,
        *,
        groups: Sequence[Group] = (),
        new_session: bool = False,
        user: int | None = None,
    ) -> None:
        self.mark = f"family-{os.getpid()}-{next(_numbers)}-"
        argv = [sys.executable, "-S", "-E", "-c", PRELUDE + script, self.mark]
        for group in groups:
            argv = group.enter(argv)
        self.popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=new_session,
            user=user,
            bufsize=0,
        )
        self.pid = self.popen.pid

    def pids(self) -> set[int]:
        """Those that have not ended."""
        found = set()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and self._has_mark(int(entry)):
                found.add(int(entry))
        return found

    def _has_mark(self, pid: int) -> bool:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
        # Not the shell that enters a control group first.
        return line.endswith(b"\0" + self.mark.encode() + b"\0") and (
            line.startswith(sys.executable.encode() + b"\0")
        )

    def wait_for(self, count: int) -> set[int]:
        victims.wait_until(
            lambda: len(self.pids()) >= count, f"{count} processes"
        )
        return self.pids()

    def wait_forks(self, count: int) -> None:
        """Wait until a storm has forked so often."""
        for _ in range(count):
            assert self.read_line(60) == "one more"

    def read_line(self, timeout: float = 20.0) -> str:
        assert self.popen.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.popen.stdout], [], [], timeout)[0]:
                raise TimeoutError(f"only {line!r}")
            byte = self.popen.stdout.read(1)
            if not byte:
                break
            line += byte
        return line.decode().rstrip("\n")

    def left(self, within: float = 5.0) -> set[int]:
        """Those that do not end by themselves: nobody, it is hoped."""
        with contextlib.suppress(TimeoutError):
            victims.wait_until(lambda: not self.pids(), "all ended", within)
        return self.pids()

    def close(self) -> None:
        while pids := self.pids():
            for pid in pids:
                try:
                    pidfd = os.pidfd_open(pid)
                except OSError:
                    continue
                try:
                    if self._has_mark(pid):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                finally:
                    os.close(pidfd)
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


def field(pid: int, number: int) -> str:
    """A field of /proc/PID/stat, by its number in proc(5), from 3 on."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[number - 3]


def states(pids: set[int]) -> set[str]:
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found.add(field(pid, 3))
    return found
