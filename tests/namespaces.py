"""A pid namespace: processes that can name, and so kill, only each other.

    with PidNamespace() as inside:
        with victims.asleep(64, pid_namespace=inside) as victim:
            popen = inside.start(["pkill", "-KILL", "victim"])

A process in it finds only pids of it, in the kernel and in /proc: it has a
/proc of its own, in a mount namespace of its own. So what chooses its victim
by itself can not choose one outside. only() makes sure that it is so, and
tells who is inside.

The first process of the namespace ends with this one, however that ends, and
the kernel then kills all others of the namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cgroups import Unavailable
from mrelease.closing import Closing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CLONE_NEWPID = 0x20000000

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: int) -> None:
    # os.unshare() and os.setns() came with Python 3.12.
    if getattr(_libc, name)(*args) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


class NotAlone(Exception):
    """A namespace is not what it must be before something may kill in it."""


class PidNamespace(Closing):
    """A pid namespace, and a mount namespace with its /proc.

    cover: files of ours, each put over a path that those see who are started
    with start(): {"/proc/meminfo": path}.
    """

    def __init__(
        self, cover: Mapping[str, str | os.PathLike[str]] | None = None
    ) -> None:
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        script = "mount -t proc proc /proc || exit 1; "
        args: list[str] = []
        for path, file in (cover or {}).items():
            script += 'mount --bind "$1" "$2" || exit 1; shift 2; '
            args += [os.fspath(file), path]
        # It answers, and so tells that it is ready; it ends with its stdin.
        script += "exec cat"
        try:
            _call("unshare", CLONE_NEWPID)  # the next child is its first
            try:
                # Mounts are private in there: nothing is mounted outside.
                self._first = subprocess.Popen(
                    ["unshare", "--mount", "--propagation", "private",
                     "sh", "-c", script, "sh", *args],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,  # Ctrl-C is for its maker
                )  # fmt: skip
            finally:
                _call("setns", self._own, CLONE_NEWPID)
        except OSError as error:
            os.close(self._own)
            raise Unavailable(f"a pid namespace: {error}") from None
        assert self._first.stdin is not None
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        self.pid = self._first.pid
        self._started: list[subprocess.Popen[bytes]] = []
        self._namespace = -1
        try:
            try:
                self._first.stdin.write(b"\n")
            except BrokenPipeError:
                pass  # it says why
            if self._first.stdout.readline() != b"\n":
                said = self._first.stderr.read().decode().strip()
                raise Unavailable(f"a pid namespace: {said}")
            self._namespace = os.open(
                f"/proc/{self.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC
            )
            if self._same(self._namespace, self._own):
                raise Unavailable("a pid namespace: it is our own")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _same(one: int, other: int) -> bool:
        return os.path.sameopenfile(one, other)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Children that this thread starts meanwhile are in it."""
        _call("setns", self._namespace, CLONE_NEWPID)
        try:
            yield
        finally:
            _call("setns", self._own, CLONE_NEWPID)

    def start(
        self, argv: Sequence[str], nice: int = 0, **options: int
    ) -> subprocess.Popen[bytes]:
        """Run a program in both namespaces; a child of this process.

        It is in both when this returns, or has ended. options: stdin, stdout
        and stderr as of Popen.
        """
        # No fork: the pid is that of the program.
        command = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--wd=/"]
        if nice:
            command = ["nice", "-n", str(nice), *command]
        with self.entered():
            popen = subprocess.Popen(
                [*command, *argv],
                start_new_session=True,
                cwd="/",
                **options,  # type: ignore[call-overload]
            )
        assert isinstance(popen, subprocess.Popen)
        self._started.append(popen)
        mounts = os.stat(f"/proc/{self.pid}/ns/mnt").st_ino
        while popen.poll() is None:
            try:
                if os.stat(f"/proc/{popen.pid}/ns/mnt").st_ino == mounts:
                    break
            except OSError:
                pass  # it has just ended
            time.sleep(0.0002)
        return popen

    def pids(self) -> set[int]:
        """The pids of all that are inside, as they are told there.

        Read from the /proc that is seen inside.
        """
        names = os.listdir(f"/proc/{self.pid}/root/proc")
        return {int(name) for name in names if name.isdigit()}

    def inner(self, pid: int) -> int:
        """The pid, inside, of a process that is directly in it."""
        link = f"/proc/{pid}/ns/pid"
        try:
            found = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotAlone(f"process {pid}: {error.strerror}") from None
        try:
            if not self._same(found, self._namespace):
                raise NotAlone(f"process {pid} is in another pid namespace")
        finally:
            os.close(found)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
        raise NotAlone(f"process {pid} has ended")

    def only(self, victim: int | None, *peers: int) -> None:
        """Raise NotAlone unless nobody else is there to be killed.

        Inside must be the first process, which nobody there can kill, the
        peers, each of which sees this namespace's /proc and is in no other
        pid namespace, and the victim, if there is one. All pids are ours.
        """
        first = self.inner(self.pid)
        if first != 1:
            raise NotAlone(f"the first process is {first}")
        expected = {1, *(self.inner(peer) for peer in peers)}
        if victim is not None:
            expected.add(self.inner(victim))
        for peer in peers:
            self._sees(peer)
        found = self.pids()
        if found != expected:
            raise NotAlone(
                f"inside are {sorted(found)}, not {sorted(expected)}"
            )

    def _sees(self, peer: int) -> None:
        """The peer's /proc is the one of the namespace."""
        ours, its = (
            os.stat(f"/proc/{pid}/root/proc") for pid in (self.pid, peer)
        )
        outer = os.stat("/proc")
        if ours.st_dev == outer.st_dev or its.st_dev != ours.st_dev:
            raise NotAlone(f"process {peer} sees another /proc")
        for number in os.listdir(f"/proc/{peer}/fd"):
            try:
                target = os.readlink(f"/proc/{peer}/fd/{number}")
                device = os.stat(f"/proc/{peer}/fd/{number}").st_dev
            except FileNotFoundError:
                continue  # closed meanwhile
            if "[pidfd]" in target or device == outer.st_dev:
                raise NotAlone(f"process {peer} has {target} of outside")

    def close(self) -> None:
        """End it, and what was started in it; victims are to be closed."""
        assert self._first.stdin is not None
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        # The first process ends only when all others have been waited for,
        # and these are our children.
        for popen in self._started:
            popen.kill()
            popen.wait()
        self._first.stdin.close()
        self._first.wait(60.0)
        self._first.stdout.close()
        self._first.stderr.close()
        os.close(self._own)
        if self._namespace >= 0:
            os.close(self._namespace)
