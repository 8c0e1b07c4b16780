"""Programs that show something with victims of their own, seen from outside.

`mrelease demo` and `mrelease bench` start processes, make control groups and
mount; nothing of it may outlive them.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cgroups
import kernel_errors
import victims

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= {int(child)} | descendants(int(child))
    return found


def skip_if_it_cannot(err: str) -> None:
    """Nothing can be shown here, and it has said why."""
    # Without a memory cgroup, what others do is measured too.
    if "MemAvailable" in err and "too much else is going on" in err:
        pytest.skip(err)
    if " cannot be " in err and not kernel_errors.has_the_call():
        pytest.skip(f"no process_mrelease(2) in Linux {os.uname().release}")


def _hear_signals() -> None:
    """Who started the tests may have had some ignored (nohup)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Running:
    """A show that has the victim it is asked for, with all that belongs to it.

    is_it(pid) tells that victim from the other processes.
    """

    def __init__(
        self, argv: Sequence[str], is_it: Callable[[int], bool]
    ) -> None:
        self._is_it = is_it
        self.popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_signals,  # noqa: PLW1509 - no threads here
        )
        try:
            victims.wait_until(lambda: self.victim() is not None, "a victim")
        except BaseException:
            self.popen.kill()
            self.popen.communicate()
            raise
        self.pids = descendants(self.popen.pid)
        self.pidfds = []
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                self.pidfds.append(os.pidfd_open(pid))

    def victim(self) -> int | None:
        for pid in descendants(self.popen.pid):
            if self._is_it(pid):
                return pid
        if self.popen.poll() is not None:
            said = self.popen.communicate()
            skip_if_it_cannot(said[1])
            pytest.fail(f"it has ended: {said}")
        return None

    def all_ended(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        for fd in self.pidfds:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([fd], [], [], left)[0]:
                return False
        return True

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()
        for fd in self.pidfds:
            os.close(fd)


def groups_of(pid: int) -> list[Path]:
    """Control groups that a demo made."""
    found = []
    for name in ("memory", "cgroup2"):
        root = cgroups.mounted(name)
        if root is not None:
            found += list(root.rglob(f"mrelease-{pid}-*"))
    return found


def python_for_all() -> str | None:
    """A Python that every user may run; the children are plain enough."""
    for name in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        found = shutil.which(name)
        if found is None:
            continue
        with contextlib.suppress(PermissionError):
            subprocess.run(
                [found, "-I", "-S", "-c", "import mmap"], check=True,
                user=65534, group=65534, extra_groups=[],
            )  # fmt: skip
            return found
    return None
