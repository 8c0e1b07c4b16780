"""Control groups for test victims: a memory meter, a freezer, a quota.

``with Meter() as group: victims.asleep(64, groups=[group])`` starts the
victim *in* the group: the child enters it before exec, so that not a
page of it is charged elsewhere. What can not be had raises Unavailable
with the reason. What holds a victim (freezer, quota) is the package's own:
`mrelease bench` needs it too.
"""

from __future__ import annotations

import os
import time
from typing import Self

from mrelease.holds import (
    PREFIX,
    Freezer,
    Group,
    Guard,
    Quota,
    Unavailable,
    guards,
    mounted,
    own_v2,
)

__all__ = [
    "Freezer",
    "Gauge",
    "Group",
    "Guard",
    "Meter",
    "Quota",
    "Unavailable",
    "allowance",
    "guards",
    "left_behind",
    "mounted",
]


class Meter(Group):
    """What the kernel charges to the processes of one memory cgroup.

    This is the measure of "memory is back": it counts pages, and does
    not depend on whether the process still shows in /proc. Each CPU may
    hold up to 64 pages charged ahead (``slack``), so compare with that.
    Page cache that a member read in first is charged too, and stays.
    """

    controller = "memory"
    controller_v2 = "memory"

    @property
    def slack(self) -> int:
        page = os.sysconf("SC_PAGE_SIZE")
        return 64 * page * (os.cpu_count() or 1)

    def usage(self) -> int:
        """Bytes charged now."""
        return int(
            self.read(
                "memory.usage_in_bytes"
                if self.version == 1
                else "memory.current"
            )
        )

    def swap_usage(self) -> int:
        """Bytes of swap charged now (0 where swap is not accounted)."""
        try:
            if self.version == 2:
                return int(self.read("memory.swap.current"))
            return int(self.read("memory.memsw.usage_in_bytes")) - self.usage()
        except FileNotFoundError:
            return 0

    def anon(self) -> int:
        """Anonymous memory by memory.stat: may lag by up to 2 s."""
        wanted = "total_rss" if self.version == 1 else "anon"
        for line in self.read("memory.stat").splitlines():
            name, value = line.split()
            if name == wanted:
                return int(value)
        raise LookupError(wanted)

    def wait_below(self, limit: int, timeout: float) -> float | None:
        """Seconds until usage is below limit, or None at the timeout."""
        begin = time.monotonic()
        while self.usage() >= limit:
            if time.monotonic() - begin > timeout:
                return None
            time.sleep(0.0002)
        return time.monotonic() - begin


class Gauge(Meter):
    """The meter, swap included, at the cost of a system call or two."""

    def __init__(self) -> None:
        super().__init__()
        memory, swap = (
            # The second is of memory and swap together.
            ("memory.usage_in_bytes", "memory.memsw.usage_in_bytes")
            if self.version == 1
            else ("memory.current", "memory.swap.current")
        )
        self.with_swap = (self.path / swap).exists()
        names = [memory]
        if self.with_swap:
            names = [swap] if self.version == 1 else [memory, swap]
        self._fds = [
            os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
            for name in names
        ]

    def usage(self) -> int:
        return sum(int(os.pread(fd, 32, 0)) for fd in self._fds)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        super().close()

    def __enter__(self) -> Self:
        return self


def allowance(threads: int, private: int) -> int:
    """Bytes that may be charged though the victim's memory is back."""
    page = os.sysconf("SC_PAGE_SIZE")
    # A CPU where it ran keeps up to 64 pages charged ahead
    # (MEMCG_CHARGE_BATCH) and up to 31 freed ones in a batch that is on
    # its way to an LRU list (PAGEVEC_SIZE).
    per_cpu = min(os.cpu_count() or 1, threads + 3) * (64 + 31) * page
    # A thread that has not ended: 16 KiB of stack and its task_struct, its
    # files and signals; one that has: until RCU has freed them.
    kernel = threads * 32 * 1024
    # The lowest level takes 8 bytes a page, the others next to nothing.
    tables = private // page * 8 + 32 * page
    return per_cpu + kernel + tables


def left_behind() -> list[str]:
    """Groups that this process made and that still exist."""
    found = []
    for name in ("memory", "freezer", "cpu", "cgroup2"):
        root = mounted(name)
        if root is not None:
            parents = {root, own_v2(root)} if name == "cgroup2" else {root}
            for parent in parents:
                found += [
                    str(p) for p in parent.glob(f"{PREFIX}{os.getpid()}-*")
                ]
    return found
