"""Kill a control group: all of its processes, released in parallel.

Of version 2 (cgroup.kill, Linux 5.14: no fork escapes it) or of version 1
(signals, until it is empty).  The kernel's description of both is
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/cgroups.rst.
"""

from __future__ import annotations

import os
import sys
from errno import (
    EINVAL,
    EMFILE,
    ENFILE,
    ENODEV,
    ENOENT,
    EOPNOTSUPP,
    EPERM,
    EXDEV,
)
from time import monotonic, sleep

from mrelease import _mrelease
from mrelease.directory import Distrusted, open_directory
from mrelease.footprint import in_units
from mrelease.printable import printable
from mrelease.protocol import Terms, bounded
from mrelease.reaper import Reaper, check_reaper, kill_pinned
from mrelease.release import Outcome, Release
from mrelease.value import Value
from mrelease.victim import Victim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from mrelease.reaper import Reaping

    _Locks = Literal["protect", "ignore"]

# f_type of statfs(2).
_CGROUP2_SUPER_MAGIC = 0x63677270
_CGROUP_SUPER_MAGIC = 0x27E0EB


class CgroupRelease(Value):
    """The result of one kill_cgroup().

    path       the cgroup, as it was given
    version    1 or 2
    releases   one Release for each process that was found; of one that was
               forked and died while the cgroup was being killed there may be
               none
    unseen     how many processes of another pid namespace were seen in it:
               they have no pid here, so they cannot be pinned or released;
               cgroup.kill kills them all the same (version 2)
    populated  whether there is a process in it at the end
    before     bytes charged to it, with the cgroups in it, before the first
               signal and at the end: memory.current, in version 1
    after      memory.usage_in_bytes; None without the memory controller
    emptied    when it was seen to be empty: seconds since the call began, or
               None if it was not, within timeout
    """

    __slots__ = (  # noqa: RUF023
        "path",
        "version",
        "releases",
        "unseen",
        "populated",
        "before",
        "after",
        "emptied",
    )

    path: str
    version: int
    releases: tuple[Release, ...]
    unseen: int
    populated: bool
    before: int | None
    after: int | None
    emptied: float | None

    def __init__(
        self,
        path: str,
        version: int,
        releases: tuple[Release, ...],
        unseen: int,
        populated: bool,
        before: int | None,
        after: int | None,
        emptied: float | None,
    ) -> None:
        self._set(
            path,
            version,
            releases,
            unseen,
            populated,
            before,
            after,
            emptied,
        )

    @property
    def freed(self) -> bool:
        """Whether it is empty and the memory of each process is back.

        GONE counts as well: such a process ended by itself.  False if there
        were processes that could not be seen.  after need not be 0: page cache
        and shared memory stay charged to a cgroup without processes.
        """
        return (
            not self.populated
            and not self.unseen
            and all(
                release.freed or release.outcome is Outcome.GONE
                for release in self.releases
            )
        )

    def as_dict(self) -> dict[str, object]:
        """Give all of it, ready for JSON: bytes, seconds, names."""
        return {
            "path": self.path,
            "version": self.version,
            "freed": self.freed,
            "populated": self.populated,
            "unseen": self.unseen,
            "before": self.before,
            "after": self.after,
            "emptied": self.emptied,
            "releases": [release.as_dict() for release in self.releases],
        }

    def __str__(self) -> str:
        count = len(self.releases)
        back = sum(release.freed for release in self.releases)
        parts = [f"{count} process{'' if count == 1 else 'es'}"]
        if back < count:
            parts.append(f"{back} known to be back")
        if self.unseen:
            parts.append(f"{self.unseen} of another pid namespace")
        if self.before is not None and self.after is not None:
            parts.append(
                f"{in_units(self.before)} before, {in_units(self.after)} after"
            )
        if self.emptied is None:
            state = "still populated" if self.populated else "empty"
        else:
            state = f"empty in {self.emptied * 1e3:.1f} ms"
        name = printable(self.path)
        return f"cgroup {name} {state}: {', '.join(parts)}"


class Cgroup:
    """An open cgroup directory, and those in it.

    It is opened once.  From then on it is this directory, whatever the path
    comes to mean: all is read, and killed, through its file descriptor.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd: int = open_directory(path)
        except NotADirectoryError:
            raise self.refused("it is not a directory") from None
        except Distrusted as error:
            raise self.refused(str(error)) from None
        except ValueError:  # a NUL, a lone surrogate
            raise ValueError(
                f"cgroup {path!r} is refused: no file can have that name; "
                "nothing was signalled"
            ) from None
        try:
            self.version: int = self._check()
        except BaseException:
            os.close(self.fd)
            raise

    def again(self) -> Cgroup:
        """Give the same directory with a file descriptor of its own."""
        other = Cgroup.__new__(Cgroup)
        other.path, other.version = self.path, self.version
        other.fd = os.dup(self.fd)
        return other

    def refused(self, why: str) -> ValueError:
        """Give the error for what must not be killed."""
        return ValueError(
            f"cgroup {printable(self.path)} is refused: {why}; nothing was "
            "signalled"
        )

    def _check(self) -> int:
        kind = _mrelease.file_system(self.fd)
        if kind == _CGROUP2_SUPER_MAGIC:
            # Both files are in every cgroup but the root.
            if not self.has("cgroup.events"):
                if not self.has("cgroup.procs"):  # removed meanwhile
                    raise FileNotFoundError(
                        ENOENT, os.strerror(ENOENT), self.path
                    )
                raise self.refused("it is the root of all cgroups")
            if self.has("cgroup.type"):
                found = self.read("cgroup.type").strip()
                if found == "threaded":
                    raise self.refused(
                        "it is threaded, it holds threads and not processes; "
                        "the domain that it belongs to can be killed"
                    )
            return 2
        if kind == _CGROUP_SUPER_MAGIC:
            if self.has("release_agent"):  # in the root alone
                raise self.refused("it is the root of its hierarchy")
            return 1
        raise self.refused("it is not a cgroup")

    def has(self, name: str) -> bool:
        """Whether there is such a file in it."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, fd: int | None = None) -> str:
        """Read a file of it, or of the one in it that is open as fd."""
        at = self.fd if fd is None else fd
        file = _mrelease.open_inside(at, name, os.O_RDONLY)
        try:
            text = b""
            while part := os.read(file, 1 << 16):
                text += part
        finally:
            os.close(file)
        return text.decode("ascii")

    def pids(self) -> tuple[set[int], int]:
        """Give the pids in it and below; and how many have no pid here.

        Raises OSError; with EXDEV if something is mounted in it: that would be
        another cgroup, and what it hides cannot be seen.
        """
        found: set[int] = set()
        unseen = self._gather(self.fd, found)
        return found, unseen

    def _gather(self, at: int, found: set[int]) -> int:
        unseen = 0
        try:
            # Opened anew each time: version 1 keeps its list with the file.
            pids = [int(pid) for pid in self.read("cgroup.procs", at).split()]
        except OSError as error:
            # Removed meanwhile; or threaded (EOPNOTSUPP), then its processes
            # stand in the domain above.  Else it is not known to be empty.
            if error.errno not in (ENOENT, ENODEV, EOPNOTSUPP):
                raise
            pids = []
        for pid in pids:
            if pid:
                found.add(pid)
            else:
                unseen += 1
        for name in self._below(at):
            try:
                fd = _mrelease.open_inside(
                    at, name, os.O_RDONLY | os.O_DIRECTORY
                )
            except FileNotFoundError:
                continue
            try:
                unseen += self._gather(fd, found)
            finally:
                os.close(fd)
        return unseen

    def _below(self, at: int) -> list[str]:
        try:
            # Two links are its own, and each cgroup in it adds one.
            if os.fstat(at).st_nlink == 2:
                return []
            with os.scandir(at) as entries:
                return [
                    entry.name
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False)
                ]
        except FileNotFoundError:
            return []

    def populated(self) -> bool:
        """Whether there is a process in it or below."""
        if self.version == 2:
            try:
                text = self.read("cgroup.events")
            except OSError as error:
                # Empty if it was removed; else it is not known to be.
                return error.errno not in (ENOENT, ENODEV)
            return "populated 1" in text.split("\n")
        try:
            pids, unseen = self.pids()
        except OSError:
            return True
        return bool(pids or unseen)

    def charged(self) -> int | None:
        """Bytes of memory charged to it and to those below."""
        name = "memory.current"
        if self.version == 1:
            name = "memory.usage_in_bytes"
        try:
            return int(self.read(name))
        except OSError:
            return None

    def open_kill(self) -> int | None:
        """Open cgroup.kill; None where there is none, or not for us."""
        if self.version == 1:
            return None
        try:
            return _mrelease.open_inside(self.fd, "cgroup.kill", os.O_WRONLY)
        except OSError:
            return None

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


class CgroupKilling:
    """One call: the processes that were found, and what came of them."""

    def __init__(
        self, cgroup: Cgroup, begun: float, timeout: float, locks: _Locks
    ) -> None:
        from signal import SIGKILL  # heavy: not for `import mrelease`

        self._signal: int = SIGKILL
        self._cgroup = cgroup
        self._begun = begun
        self._deadline = begun + timeout
        self._locks: _Locks = locks
        self._victims: dict[int, Victim] = {}
        self._reapings: list[tuple[Victim, Reaping]] = []
        self._releases: list[Release] = []
        self._skipped: set[int] = set()
        self._unseen = 0
        self._begun_to_kill = False
        # Half of those that are free: the reaper needs its own for each.
        self._most_files: int = (cgroup.fd + os.sysconf("SC_OPEN_MAX")) // 2
        self._kill_file: int | None = None

    def prepare(self) -> None:
        """Pin everything, and raise what is to be raised."""
        cgroup = self._cgroup
        try:
            pids, self._unseen = cgroup.pids()
        except OSError as error:
            if error.errno != EXDEV:
                raise
            raise cgroup.refused("something is mounted in it") from None
        for pid, who in ((os.getpid(), "the caller"), (1, "pid 1")):
            if pid in pids:
                raise cgroup.refused(f"{who} is in it")
        self._before = cgroup.charged()
        for pid, pidfd in self._pin(pids, strict=True):
            self._adopt(pid, pidfd)
        self._kill_file = cgroup.open_kill()
        if self._kill_file is None and (pids or self._unseen):
            self._check_rights()

    def _check_rights(self) -> None:
        for victim in self._victims.values():
            try:
                _mrelease.pidfd_signal(victim, 0)
            except PermissionError:
                continue
            except OSError:
                return
            return
        if self._victims or self._unseen:
            raise PermissionError(
                EPERM,
                f"cannot kill cgroup {printable(self._cgroup.path)}: its "
                "cgroup.kill cannot be written and none of its processes be "
                "signalled; "
                "nothing was signalled",
            )

    def _pin(
        self, pids: set[int], *, strict: bool = False
    ) -> list[tuple[int, _mrelease.Pidfd]]:
        """Open a pidfd of each that is in the cgroup still after that."""
        opened: list[tuple[int, _mrelease.Pidfd]] = []
        for pid in pids:
            known = self._victims.get(pid)
            if pid in self._skipped or (
                known is not None and _mrelease.pidfd_state(known) != "reaped"
            ):
                continue
            try:
                pidfd = _mrelease.pidfd_open(pid)
                if pidfd.fileno() > self._most_files:
                    raise OSError(EMFILE, os.strerror(EMFILE))
                opened.append((pid, pidfd))
            except ProcessLookupError:
                continue
            except OSError as error:
                if error.errno == EINVAL:
                    continue  # it is ending
                if error.errno in (EMFILE, ENFILE) and (opened or not strict):
                    break  # when those have ended, there are some again
                if strict:
                    raise OSError(
                        error.errno,
                        f"cannot kill cgroup {printable(self._cgroup.path)}: "
                        f"no pidfd for pid {pid}: {error.strerror}; nothing "
                        "was signalled",
                    ) from None
                self._skipped.add(pid)
                self._releases.append(
                    Release(pid, Outcome.DENIED, errno=error.errno)
                )
        if not opened:
            return []
        # A pid that was reused meanwhile is another's, somewhere else.
        confirmed, _ = self._cgroup.pids()
        return [
            (pid, pidfd)
            for pid, pidfd in opened
            if pid in confirmed and pid != os.getpid()
        ]

    def _adopt(self, pid: int, pidfd: _mrelease.Pidfd) -> Victim | None:
        try:
            victim = Victim._of(pidfd, pid)
        except ProcessLookupError:
            return None
        except ValueError:
            self._skipped.add(pid)  # a kernel thread
            return None
        old = self._victims.get(pid)
        if old is not None:
            old.close()
        self._victims[pid] = victim
        return victim

    def _submit(self, reaper: Reaper, victims: list[Victim]) -> None:
        if not victims:
            return
        reapings = kill_pinned(
            reaper,
            victims,
            0.0,
            self._left(),
            self._locks,
            signalled=self._begun_to_kill,
        )
        self._begun_to_kill = True
        self._reapings += zip(victims, reapings, strict=True)

    def _left(self) -> float:
        return max(0.0, self._deadline - monotonic())

    def run(self, reaper: Reaper) -> CgroupRelease:
        """Kill, until the cgroup is empty or the time is over."""
        cgroup = self._cgroup
        emptied: float | None = None
        written = False
        self._submit(reaper, list(self._victims.values()))
        if self._kill_file is not None:
            try:
                os.write(self._kill_file, b"1")
                self._begun_to_kill = written = True
            except OSError:
                pass  # removed: then it is empty
        while True:
            if not cgroup.populated():
                emptied = monotonic() - self._begun
                break
            if not self._left():
                break
            if not self._more(reaper, written):
                sleep(0.0005)
        self._releases += [
            self._told(victim, reaping.result(), written)
            for victim, reaping in self._reapings
        ]
        return CgroupRelease(
            cgroup.path,
            cgroup.version,
            tuple(self._releases),
            self._unseen,
            emptied is None and cgroup.populated(),
            self._before,
            cgroup.charged(),
            emptied,
        )

    def _more(self, reaper: Reaper, written: bool) -> bool:
        """Take in what was forked meanwhile; whether there was anything."""
        self._harvest(written)
        try:
            pids, unseen = self._cgroup.pids()
            pinned = self._pin(pids)
        except OSError:
            return False  # no file descriptor for it now
        self._unseen = max(self._unseen, unseen)
        if not written:
            # At once: each forks on until it is killed, and the rest takes
            # longer than a fork.
            for _, pidfd in pinned:
                try:
                    _mrelease.pidfd_signal(pidfd, self._signal)
                    self._begun_to_kill = True
                except OSError:
                    pass
        adopted = [self._adopt(pid, pidfd) for pid, pidfd in pinned]
        self._submit(reaper, [v for v in adopted if v is not None])
        return bool(pinned)

    def _harvest(self, written: bool) -> None:
        """Note what is done, and give its file descriptors back."""
        left: list[tuple[Victim, Reaping]] = []
        for victim, reaping in self._reapings:
            if reaping.done() and victim.exited:
                release = self._told(victim, reaping.result(), written)
                self._releases.append(release)
                if self._victims.get(victim.pid) is victim:
                    del self._victims[victim.pid]
                victim.close()
            else:
                left.append((victim, reaping))
        self._reapings = left

    def _told(
        self, victim: Victim, release: Release, written: bool
    ) -> Release:
        if written and release.outcome is Outcome.DENIED:
            # Not to be signalled by us, but killed by cgroup.kill; and to
            # release what is dying needs no right.
            found = victim.release(timeout=self._left(), locks=self._locks)
            if found.outcome is not Outcome.ALIVE:
                return found
        return release

    @property
    def victims(self) -> list[Victim]:
        """What is pinned."""
        return list(self._victims.values())

    def close(self) -> None:
        """Let go of all file descriptors."""
        for victim in self._victims.values():
            victim.close()
        if self._kill_file is not None:
            os.close(self._kill_file)
        self._cgroup.close()


def kill_cgroup(
    path: str | os.PathLike[str],
    *,
    timeout: float = 1.0,
    locks: Literal["protect", "ignore"] = "protect",
    reaper: Reaper | None = None,
) -> CgroupRelease:
    """Kill all processes of a cgroup, and release their memory in parallel.

    path is the cgroup's directory, of version 1 (any hierarchy) or 2; cgroups
    in it are included.  Symbolic links in the path are followed if they are
    root's or the caller's own; of /proc, those in /proc/self/fd.  It is opened
    once, and all is done through that file descriptor: if the path comes to
    name another cgroup meanwhile, that one is left alone.  All processes
    are pinned, killed and released by the reaper, or one that is made for the
    call; then cgroup.kill (version 2, Linux 5.14) kills what was forked
    meanwhile, and that is released, too.  In version 1, or without the right
    to write cgroup.kill, each process that appears is sent SIGKILL until none
    does.  The call waits until the cgroup is empty and every Release is there,
    at most timeout seconds in all.

    The robust locks (locks='protect', see kill()) of what cgroup.kill kills
    are looked at when it is dying.  The times in each Release count from when
    it was handed to the reaper.

    Raises, before anything was signalled: FileNotFoundError; ValueError and
    TypeError for bad arguments, what is not a cgroup, the root of all cgroups
    or of a hierarchy, a threaded cgroup, one with the caller or pid 1 in it,
    one in which something is mounted, a path by another user's link;
    PermissionError if cgroup.kill may not be written and none of its processes
    be signalled; OSError if no file descriptor is left (if there are fewer
    than processes, they are released one batch after the other).  After that
    nothing is raised but what a signal handler or an audit hook of the
    caller's raises.

    Raises an auditing event mrelease.kill_cgroup with argument path.
    """
    begun = monotonic()
    Terms(0.0, None, timeout, locks)
    check_reaper(reaper)
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(
            f"the path of a cgroup must be str, not {type(name).__name__}"
        )
    return kill_opened(Cgroup(name), begun, timeout, locks, reaper)


def kill_opened(
    cgroup: Cgroup,
    begun: float,
    timeout: float,
    locks: _Locks,
    reaper: Reaper | None,
) -> CgroupRelease:
    """Kill what is in a cgroup, as kill_cgroup() does, and close it."""
    killing = find_cgroup(cgroup, begun, bounded(timeout), locks)
    try:
        sys.audit("mrelease.kill_cgroup", cgroup.path)
        if reaper is not None:
            return killing.run(reaper)
        with Reaper() as own:
            try:
                return killing.run(own)
            except BaseException:
                own.close(0)
                raise
    finally:
        killing.close()


def find_cgroup(
    cgroup: Cgroup, begun: float, timeout: float, locks: _Locks
) -> CgroupKilling:
    """Pin what is in a cgroup, which is closed with it, or by an error.

    Raises as kill_cgroup() does.
    """
    killing = CgroupKilling(cgroup, begun, timeout, locks)
    try:
        killing.prepare()
    except BaseException:
        killing.close()
        raise
    return killing
