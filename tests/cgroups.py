"""Control groups for test victims: a memory meter, a freezer, a quota.

Version 1 is used where its controller is mounted, else version 2 (the
freezer of version 2 needs no controller; ask for it with ``version=2``:
a process frozen by version 2 can be killed, one frozen by version 1
stays where it is).

``with Meter() as group: victims.asleep(64, groups=[group])`` starts the
victim *in* the group: the child enters it before exec, so that not a
page of it is charged elsewhere. What can not be had raises Unavailable
with the reason.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class Unavailable(Exception):
    """This machine or this user can not do it; the text says why."""


_guards: set[int] = set()


def guards() -> set[int]:
    """Pids of the guards that have not done their work yet."""
    return set(_guards)


class Guard:
    """Runs a shell script when closed, or when this process is killed.

    For what outlives a process: mounts, swap, frozen groups. It is the
    only way by which these are cleaned up, so each test tries it.
    The shell waits in ``read`` on a pipe that ends with this process.
    """

    def __init__(self, script: str, *args: str) -> None:
        self._popen = subprocess.Popen(
            [
                "/bin/sh",
                "-c",
                f"trap '' INT TERM HUP; read -r _; {script}",
                "guard",
                *args,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        _guards.add(self._popen.pid)

    def close(self, timeout: float = 30.0) -> None:
        if self._popen.stdin is None or self._popen.stdin.closed:
            return
        # A forked child may hold the pipe too: a line, not only the end.
        self._popen.stdin.write(b"\n")
        _, errors = self._popen.communicate(timeout=timeout)
        _guards.discard(self._popen.pid)
        if self._popen.returncode != 0:
            raise RuntimeError(
                f"clean-up failed: {self._popen.args!r}: {errors.decode()}"
            )


def mounted(controller: str) -> Path | None:
    """Where a version 1 controller, or "cgroup2", is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == controller == "cgroup2" or (
            kind == "cgroup" and controller in options.split(",")
        ):
            return Path(left.split()[4])
    return None


def _own_v2(root: Path) -> Path:
    """The group of this process under the version 2 mount."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return root / line[3:].lstrip("/")
    return root


_numbers = itertools.count(1)
_PREFIX = "mrelease-test-"

_REMOVE = """
[ -e "$1" ] || exit 0
[ -e "$1/freezer.state" ] && echo THAWED > "$1/freezer.state"
[ -e "$1/cgroup.freeze" ] && echo 0 > "$1/cgroup.freeze"
i=0
until rmdir "$1" 2>/dev/null; do
    [ -e "$1" ] || exit 0
    i=$((i + 1))
    [ $i -gt 500 ] && { rmdir "$1"; exit 1; }
    sleep 0.02
done
"""


class Group:
    """A control group of our own; removed on close, thawed if need be."""

    controller = ""  # the name in version 1
    controller_v2: str | None = None  # None: needs no controller

    def __init__(self, *, version: int | None = None) -> None:
        parent, self.version = self._parent(version)
        name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self.path = parent / name
        try:
            self.path.mkdir()
        except OSError as e:
            raise Unavailable(
                f"may not make a control group in {parent}: {e.strerror}"
            ) from None
        self._guard = Guard(_REMOVE, str(self.path))

    def _parent(self, version: int | None) -> tuple[Path, int]:
        if version != 2:
            root = mounted(self.controller)
            if root is not None:
                return root, 1
            if version == 1:
                raise Unavailable(
                    f"cgroup v1 controller {self.controller} not mounted"
                )
        root = mounted("cgroup2")
        if root is None:
            raise Unavailable(f"no cgroup mount for {self.controller}")
        wanted = self.controller_v2
        if wanted is None:
            own = _own_v2(root)
            return (root if os.access(root, os.W_OK) else own), 2
        if wanted not in (root / "cgroup.controllers").read_text().split():
            raise Unavailable(f"cgroup v2 has no controller {wanted} here")
        for parent in dict.fromkeys((root, _own_v2(root))):
            control = parent / "cgroup.subtree_control"
            try:
                if wanted not in control.read_text().split():
                    control.write_text(f"+{wanted}")
            except OSError:
                continue
            return parent, 2
        raise Unavailable(f"may not enable cgroup v2 controller {wanted}")

    def read(self, name: str) -> str:
        return (self.path / name).read_text().strip()

    def write(self, name: str, value: str) -> None:
        (self.path / name).write_text(value)

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.read("cgroup.procs").split()]

    def enter(self, argv: list[str]) -> list[str]:
        """The command that runs argv in this group, same pid.

        A shell enters and execs: what a process allocates before it
        enters stays charged to the group that it came from.
        """
        return [
            "/bin/sh",
            "-c",
            'echo $$ > "$1" || exit 3; shift; exec "$@"',
            "enter",
            str(self.path / "cgroup.procs"),
            *argv,
        ]

    def let_go(self) -> None:
        """Take away what keeps a member from running to its end."""

    def close(self) -> None:
        self.let_go()
        self._guard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


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


class Freezer(Group):
    """Stops its members inside the kernel."""

    controller = "freezer"

    def freeze(self, timeout: float = 10.0) -> None:
        if self.version == 1:
            self.write("freezer.state", "FROZEN")
        else:
            self.write("cgroup.freeze", "1")
        deadline = time.monotonic() + timeout
        while not self.frozen:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.path} does not freeze")
            time.sleep(0.001)

    @property
    def frozen(self) -> bool:
        if self.version == 1:
            return self.read("freezer.state") == "FROZEN"
        return "frozen 1" in self.read("cgroup.events").splitlines()

    def thaw(self) -> None:
        if self.version == 1:
            self.write("freezer.state", "THAWED")
        else:
            self.write("cgroup.freeze", "0")

    def let_go(self) -> None:
        if self.path.exists():
            self.thaw()


class Quota(Group):
    """Bounds the CPU time of its members."""

    controller = "cpu"
    controller_v2 = "cpu"

    def __init__(self, *, version: int | None = None) -> None:
        super().__init__(version=version)
        file = "cpu.cfs_quota_us" if self.version == 1 else "cpu.max"
        if not (self.path / file).exists():
            self.close()
            raise Unavailable(f"the cpu controller has no {file} here")

    def limit(self, percent: float, period_us: int = 100_000) -> None:
        quota = max(1000, round(period_us * percent / 100))
        if self.version == 1:
            self.write("cpu.cfs_period_us", str(period_us))
            self.write("cpu.cfs_quota_us", str(quota))
        else:
            self.write("cpu.max", f"{quota} {period_us}")

    def let_go(self) -> None:
        if not self.path.exists():
            return
        if self.version == 1:
            if (self.path / "cpu.cfs_quota_us").exists():
                self.write("cpu.cfs_quota_us", "-1")
        elif (self.path / "cpu.max").exists():
            self.write("cpu.max", "max")


def left_behind() -> list[str]:
    """Groups that this process made and that still exist."""
    found = []
    for name in ("memory", "freezer", "cpu", "cgroup2"):
        root = mounted(name)
        if root is not None:
            parents = {root, _own_v2(root)} if name == "cgroup2" else {root}
            for parent in parents:
                found += [
                    str(p) for p in parent.glob(f"{_PREFIX}{os.getpid()}-*")
                ]
    return found
