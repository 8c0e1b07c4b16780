"""How long until memory is back: meters, and a thread that watches one.

    meter, why_not_better = open_meter(child.pid)
    with meter:
        before = meter.read()
        ...                            # the child touches size bytes
        limit = before + int(size * meter.slack)
        with Watch(meter, limit, give_up=15.0) as watch:
            begun = monotonic_ns()
            ...                        # kill it
            seconds = watch.wait(begun)

For the demo and for benchmarks; nothing that kills needs it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from errno import ENOENT

from mrelease.closing import Closing
from mrelease.process import read_lines

_PAGE = os.sysconf("SC_PAGE_SIZE")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self


class Meter(Closing):
    """A count of bytes in use; only its growth and its fall mean anything."""

    name: str = ""
    exact: bool = False
    """Whether it counts the measured processes alone."""
    slack: float = 0.1
    """The share that may be missing when memory counts as back."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> int:
        """Give the bytes in use now."""
        raise NotImplementedError

    def add(self, pid: int) -> None:
        """Count what this process allocates from now on; OSError."""

    def close(self) -> None:
        """Give back what it holds; closing twice is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class AvailableMeter(Meter):
    """MemAvailable and SwapFree of /proc/meminfo: all that runs disturbs it.

    Freed pages go to a list of their CPU first, which since Linux 6.7 may grow
    to an eighth of the memory and is not part of MemAvailable.  The lists are
    counted as well, where /proc/zoneinfo can be read.
    """

    name = "MemAvailable of the whole machine"

    def __init__(self) -> None:
        super().__init__(os.open("/proc/meminfo", os.O_RDONLY))
        self._zones = -1
        with contextlib.suppress(OSError):
            self._zones = os.open("/proc/zoneinfo", os.O_RDONLY)

    def read(self) -> int:
        """Give minus the bytes that are available on the whole machine."""
        meminfo = os.pread(self._fd, 1024, 0)
        available = _available(meminfo) + _field(meminfo, b"SwapFree")
        if self._zones >= 0:
            available += _PAGE * _on_lists(self._zones)
        return -available

    def close(self) -> None:
        """Close the files; closing twice is no error."""
        super().close()
        if self._zones >= 0:
            os.close(self._zones)
            self._zones = -1


class CgroupMeter(Meter):
    """What is charged to a memory cgroup of our own, version 1 or 2.

    In memory, and in swap where that is counted.  Exact but for the 64 pages
    that each CPU may hold charged in advance.  All processes that compete for
    a CPU with the measured one should be in it too: a version 2 group may be
    a scheduling group of its own.

    Made with a first member.  Raises OSError where that is not allowed.
    """

    exact: bool = True
    slack: float = 0.05
    _numbers = itertools.count(1)

    def __init__(self, pid: int) -> None:
        super().__init__(-1)
        self._swap = -1
        why = OSError(ENOENT, "no memory cgroup is mounted")
        for version, groups in _own_groups():
            for parent in groups:
                if version == 2 and not _passes_on_memory(parent):
                    continue
                try:
                    self._make(version, parent, pid)
                except OSError as error:
                    why = error
                else:
                    self.name: str = f"memory cgroup (version {version})"
                    return
        raise why

    def _make(self, version: int, parent: str, pid: int) -> None:
        _sweep(parent)
        self.version: int = version
        self.path: str = (
            f"{parent}/mrelease-{os.getpid()}-{next(self._numbers)}"
        )
        os.mkdir(self.path)
        try:
            self.add(pid)
            if version == 2:
                self._fd = self._open("memory.current")
                with contextlib.suppress(FileNotFoundError):
                    self._swap = self._open("memory.swap.current")
            else:
                try:
                    self._fd = self._open("memory.memsw.usage_in_bytes")
                except FileNotFoundError:
                    self._fd = self._open("memory.usage_in_bytes")
        except BaseException:
            self._close_files()
            with contextlib.suppress(OSError):
                _write(f"{parent}/cgroup.procs", str(pid))
            with contextlib.suppress(OSError):
                os.rmdir(self.path)
            raise

    def add(self, pid: int) -> None:
        """Put a process into the group; children that it makes follow it."""
        _write(f"{self.path}/cgroup.procs", str(pid))

    def _open(self, name: str) -> int:
        return os.open(f"{self.path}/{name}", os.O_RDONLY)

    def _close_files(self) -> None:
        super().close()
        if self._swap >= 0:
            os.close(self._swap)
            self._swap = -1

    def read(self) -> int:
        """Give the bytes charged to the group."""
        usage = int(os.pread(self._fd, 32, 0))
        if self._swap >= 0:
            usage += int(os.pread(self._swap, 32, 0))
        return usage

    def close(self) -> None:
        """Remove the group, whose members must have been killed.

        Waits up to 10 seconds for them to be gone.
        """
        if self._fd < 0:
            return
        self._close_files()
        deadline = time.monotonic() + 10
        while True:
            try:
                os.rmdir(self.path)
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
            else:
                return


def open_meter(pid: int) -> tuple[Meter, str]:
    """Open the best meter to be had for a process and its children.

    Gives it, and why it is not a better one ("" if there is none).
    """
    try:
        return CgroupMeter(pid), ""
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return AvailableMeter(), f"{error.strerror}{where}"


def room() -> int:
    """Give the bytes that this process may still use without pressure.

    MemAvailable, and for each memory cgroup that it is in, the limit without
    what is in use and is no inactive page cache.  Raises OSError if /proc
    cannot be read.
    """
    with open("/proc/meminfo", "rb") as file:
        least = _available(file.read())
    for version, groups in _own_groups():
        for group in groups:
            try:
                left = _left_in(version, group)
            except (OSError, ValueError):
                continue  # no limit here (the root has no such files)
            least = min(least, left)
    return max(0, least)


class Watch:
    """A thread that looks at a meter until it is at or below a limit.

    Inside the with statement it is looking already.  It looks at most 0.3 ms
    apart, if it gets the CPU: it takes SCHED_FIFO, or else nice -20, where
    that is allowed, for itself alone.

    scheduling  what it got, in words
    looks       how often it looked
    gap         the longest time between two looks, in seconds
    """

    def __init__(self, meter: Meter, limit: int, *, give_up: float) -> None:
        self.scheduling: str = "normal priority"
        self.looks: int = 0
        self.gap: float = 0.0
        self._meter = meter
        self._limit = limit
        self._give_up = give_up
        self._back: int | None = None
        self._error: OSError | None = None
        self._stopping = False
        self._looking = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.scheduling = _raise_thread()
            self._look()
        except OSError as error:
            self._error = error
        finally:
            self._looking.set()
            self._ended.set()

    def _look(self) -> None:
        last = time.monotonic_ns()
        while not self._stopping:
            used = self._meter.read()
            now = time.monotonic_ns()
            self.gap = max(self.gap, (now - last) / 1e9)
            self.looks += 1
            last = now
            if used <= self._limit:
                self._back = now
                return
            self._looking.set()
            time.sleep(0.0003)

    def wait(self, begun: int) -> float | None:
        """Give the seconds from begun (monotonic_ns()) until memory was back.

        None if it is not after give_up seconds.  Raises OSError if the meter
        could not be read.
        """
        end = begun / 1e9 + self._give_up
        self._ended.wait(max(0.0, end - time.monotonic()))
        if self._error is not None:
            raise self._error
        back = self._back
        return None if back is None else max(0, back - begun) / 1e9

    def __enter__(self) -> Self:
        self._thread.start()
        self._looking.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        self._thread.join()


def _raise_thread() -> str:
    """Give the calling thread the best scheduling there is; in words.

    2, since a raised victim has SCHED_FIFO 1 and would be in the way.
    """
    try:
        os.sched_setscheduler(
            0,
            os.SCHED_FIFO | os.SCHED_RESET_ON_FORK,
            os.sched_param(2),
        )
    except OSError:
        pass
    else:
        return "SCHED_FIFO 2"
    try:
        # On Linux this is the thread's own.
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    except OSError:
        return "normal priority"
    return "nice -20"


def _available(meminfo: bytes) -> int:
    return _field(meminfo, b"MemAvailable")


def _field(meminfo: bytes, name: bytes) -> int:
    found = re.search(rb"^%b:\s+(\d+) kB" % name, meminfo, re.MULTILINE)
    if found is None:
        raise OSError(ENOENT, f"no {name.decode()}", "/proc/meminfo")
    return int(found[1]) * 1024


def _on_lists(zoneinfo: int) -> int:
    """Give the free pages that the CPUs keep to hand (/proc/zoneinfo)."""
    pages = 0
    at = 0
    rest = b""
    while piece := os.pread(zoneinfo, 1 << 16, at):
        at += len(piece)
        whole, _, rest = (rest + piece).rpartition(b"\n")
        # Only the lists have "count:"; the zones' own lines have no colon.
        pages += sum(
            map(int, re.findall(rb"^\s+count:\s+(\d+)", whole, re.MULTILINE))
        )
    return pages


def _write(path: str, text: str) -> None:
    # Not open(): a failed write must be reported here, for this path.
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _own_groups() -> Iterator[tuple[int, list[str]]]:
    """Give (version, folders) of the memory cgroups of this process.

    The folders go from its own group up to the one that is mounted.
    """
    try:
        lines = [
            line.split(":", 2) for line in read_lines("/proc/self/cgroup")
        ]
        mounts = [
            line.split(" ") for line in read_lines("/proc/self/mountinfo")
        ]
    except OSError:
        return
    for number, controllers, own in lines:
        if "memory" in controllers.split(","):
            version = 1
        elif number == "0":
            version = 2
        else:
            continue
        for mount in mounts:
            root, where = (_unescape(text) for text in mount[3:5])
            kind, _, options = mount[mount.index("-") + 1 :]
            if kind != ("cgroup2" if version == 2 else "cgroup"):
                continue
            if version == 1 and "memory" not in options.split(","):
                continue
            yield version, _upwards(where, root, own)
            break


def _unescape(text: str) -> str:
    """Undo what mountinfo does to blanks, which are octal there."""
    return re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), text)


def _upwards(where: str, root: str, own: str) -> list[str]:
    """Give the folder of group `own` and those above it, nearest first."""
    base = root.rstrip("/")
    if not (own + "/").startswith(base + "/") or "/.." in own:
        return [where]  # mounted from elsewhere: only this one is certain
    parts = [part for part in own[len(base) :].split("/") if part]
    return [
        "/".join([where.rstrip("/"), *parts[:count]])
        for count in range(len(parts), -1, -1)
    ]


def _passes_on_memory(group: str) -> bool:
    """Whether children of this version 2 group count memory."""
    try:
        return "memory" in _read(f"{group}/cgroup.subtree_control").split()
    except OSError:
        return False


def _left_in(version: int, group: str) -> int:
    """Give the bytes left in a group; ValueError if it has no limit."""
    if version == 2:
        limit = int(_read(f"{group}/memory.max"))
        used = int(_read(f"{group}/memory.current"))
        name = "inactive_file"
    else:
        limit = int(_read(f"{group}/memory.limit_in_bytes"))
        used = int(_read(f"{group}/memory.usage_in_bytes"))
        name = "total_inactive_file"
    found = re.search(
        rf"^{name} (\d+)$", _read(f"{group}/memory.stat"), re.MULTILINE
    )
    return limit - used + (int(found[1]) if found else 0)


def _sweep(parent: str) -> None:
    """Remove groups whose maker was killed; one in use cannot be removed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            made = re.fullmatch(r"mrelease-(\d+)-\d+", name)
            if made and not os.path.exists(f"/proc/{made[1]}"):
                with contextlib.suppress(OSError):
                    os.rmdir(f"{parent}/{name}")
