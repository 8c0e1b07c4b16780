"""What keeps a process where it is: control groups, a frozen disk.

For victims that are to be measured: a cgroup that freezes them or bounds
their CPU time, and a file system that leaves them in D state.  Version 1 of
cgroups is used where its controller is mounted, else version 2 (the freezer
of version 2 needs no controller; a process that it froze can be killed, one
that version 1 froze stays where it is).

All are undone on close, and also if this process is killed.  What cannot be
had raises Unavailable with the reason.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from mrelease.closing import Closing
from mrelease.process import read_lines

TYPE_CHECKING = False

MIB = 1 << 20


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
        """Run it; RuntimeError with what it said if it fails."""
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
    for line in read_lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == controller == "cgroup2" or (
            kind == "cgroup" and controller in options.split(",")
        ):
            return Path(left.split()[4])
    return None


def own_v2(root: Path) -> Path:
    """Give the group of this process under the version 2 mount."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return root / line[3:].lstrip("/")
    return root


_numbers = itertools.count(1)
PREFIX = "mrelease-hold-"

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


class Group(Closing):
    """A control group of our own; removed on close, thawed if need be."""

    controller: str = ""  # the name in version 1
    controller_v2: str | None = None  # None: needs no controller

    def __init__(
        self, *, version: int | None = None, at: Path | None = None
    ) -> None:
        """Make one; or use the version 2 group at a path, and leave it."""
        self._guard: Guard | None = None
        if at is not None:
            self.path: Path = at
            self.version: int = 2
            return
        parent, self.version = self._parent(version)
        self.path = parent / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
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
            own = own_v2(root)
            return (root if os.access(root, os.W_OK) else own), 2
        if wanted not in (root / "cgroup.controllers").read_text().split():
            raise Unavailable(f"cgroup v2 has no controller {wanted} here")
        for parent in dict.fromkeys((root, own_v2(root))):
            control = parent / "cgroup.subtree_control"
            try:
                if wanted not in control.read_text().split():
                    control.write_text(f"+{wanted}")
            except OSError:
                continue
            return parent, 2
        raise Unavailable(f"may not enable cgroup v2 controller {wanted}")

    def add(self, pid: int) -> None:
        """Move a process into it."""
        self.write("cgroup.procs", str(pid))

    def read(self, name: str) -> str:
        """Give what a file of the group says."""
        return (self.path / name).read_text().strip()

    def write(self, name: str, value: str) -> None:
        """Write to a file of the group."""
        (self.path / name).write_text(value)

    def pids(self) -> list[int]:
        """Give the members."""
        return [int(pid) for pid in self.read("cgroup.procs").split()]

    def enter(self, argv: list[str]) -> list[str]:
        """Give the command that runs argv in this group, same pid.

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
        """Let its members go, and remove it if it was made here."""
        self.let_go()
        if self._guard is not None:
            self._guard.close()


class Freezer(Group):
    """Stops its members inside the kernel."""

    controller: str = "freezer"

    def freeze(self, timeout: float = 10.0) -> None:
        """Stop the members; TimeoutError."""
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
        """Whether all members have stopped."""
        if self.version == 1:
            return self.read("freezer.state") == "FROZEN"
        return "frozen 1" in self.read("cgroup.events").splitlines()

    def thaw(self) -> None:
        """Let the members run on."""
        if self.version == 1:
            self.write("freezer.state", "THAWED")
        else:
            self.write("cgroup.freeze", "0")

    def let_go(self) -> None:
        """Thaw it, if it is still there."""
        if self.path.exists():
            self.thaw()


class Quota(Group):
    """Bounds the CPU time of its members."""

    controller: str = "cpu"
    controller_v2: str | None = "cpu"

    def __init__(
        self, *, version: int | None = None, at: Path | None = None
    ) -> None:
        """As a Group; Unavailable where CPU time cannot be bounded."""
        super().__init__(version=version, at=at)
        file = "cpu.cfs_quota_us" if self.version == 1 else "cpu.max"
        if not (self.path / file).exists():
            self.close()
            raise Unavailable(f"the cpu controller has no {file} here")

    def limit(self, percent: float, period_us: int = 100_000) -> None:
        """Give the members this share of one CPU."""
        quota = max(1000, round(period_us * percent / 100))
        if self.version == 1:
            self.write("cpu.cfs_period_us", str(period_us))
            self.write("cpu.cfs_quota_us", str(quota))
        else:
            self.write("cpu.max", f"{quota} {period_us}")

    def let_go(self) -> None:
        """Take the limit away."""
        if not self.path.exists():
            return
        if self.version == 1:
            if (self.path / "cpu.cfs_quota_us").exists():
                self.write("cpu.cfs_quota_us", "-1")
        elif (self.path / "cpu.max").exists():
            self.write("cpu.max", "max")


class Disk:
    """An ext4 file system of its own on a loop device, to be frozen."""

    def __init__(self, mib: int = 64) -> None:
        if os.geteuid() != 0:
            raise Unavailable("mounting a file system needs root")
        for tool in ("mkfs.ext4", "mount", "umount", "fsfreeze"):
            if find_tool(tool) is None:
                raise Unavailable(f"{tool} is not installed")
        self._folder = Path(tempfile.mkdtemp(prefix="mrelease-disk-"))
        self._folder.chmod(0o755)
        image = self._folder / "image"
        self.path: Path = self._folder / "mounted"
        self.path.mkdir()
        with image.open("wb") as f:
            f.truncate(mib * MIB)
        self.frozen: bool = False
        self.owner: int = os.getpid()
        try:
            self.tool("mkfs.ext4", "-q", "-F", str(image))
            self.tool(
                "mount", "-t", "ext4", "-o", "loop", str(image), str(self.path)
            )
        except Unavailable:
            shutil.rmtree(self._folder)
            raise
        self._guard = Guard(
            'PATH="$PATH:/usr/sbin:/sbin"; '
            'fsfreeze -u "$1/mounted" 2>/dev/null; i=0; '
            'until umount "$1/mounted" 2>/dev/null; do i=$((i + 1)); '
            '[ $i -gt 500 ] && { umount "$1/mounted"; exit 1; }; '
            'sleep 0.02; done; rm -r "$1"',
            str(self._folder),
        )
        self.path.chmod(0o1777)

    @staticmethod
    def tool(name: str, *args: str) -> None:
        """Run a program; Unavailable with what it said if it fails."""
        try:
            done = subprocess.run(
                [find_tool(name) or name, *args],
                stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=60,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{name} has not ended after 60 s") from None
        if done.returncode != 0:
            raise Unavailable(f"{name} fails: {done.stderr.strip()}")

    def _ioctl(self, request: int) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, request, 0)
        finally:
            os.close(fd)

    def freeze(self) -> None:
        """Let who writes wait: uninterruptible."""
        # Before it is: an interruption may come as soon as the call returns.
        self.frozen = True
        try:
            self._ioctl(0xC0045877)  # FIFREEZE
        except OSError as e:
            self.frozen = False
            raise Unavailable(f"can not freeze ext4: {e.strerror}") from None

    def thaw(self) -> None:
        """Let them go on."""
        if self.frozen:
            try:
                self._ioctl(0xC0045878)  # FITHAW
            except OSError as e:
                if e.errno != errno.EINVAL:  # it was not frozen
                    raise
            self.frozen = False

    def empty(self) -> None:
        """Remove the files."""
        for path in self.path.iterdir():
            if path.is_file():
                path.unlink()

    def close(self) -> None:
        """Thaw, unmount and remove it."""
        self._guard.close()


def find_tool(tool: str) -> str | None:
    """Find a program, also where only root's programs are."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(tool, path=f"{path}:/usr/sbin:/sbin")
