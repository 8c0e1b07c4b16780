"""Victims: the processes that tests and benchmarks kill.

    with victims.asleep(64) as victim:          # 64 MiB, one thread
        mrelease.kill(victim.pid)
        assert victim.rss_anon() == 0

Each function starts one process of a kind and returns when it is what
its name says. Closing (leaving the ``with``) kills and reaps it and all
that was started or changed for it, whatever state it is in.

All take the size in MiB of touched private anonymous memory, ``threads``
and the Options (what else it maps, which control groups it is in, ...).
What a machine can not do raises Unavailable with the reason;
``need(kind)`` makes a skip of it, ``kinds()`` is all of them by name.

The victim is native/victim.c, built once for each process that uses it,
or the program that $MRELEASE_TEST_VICTIM names.
$MRELEASE_TEST_DISPOSABLE=1 says that the machine is nobody's: only then
are settings of the whole machine changed (core_pattern).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar, Unpack

from cgroups import Freezer, Group, Guard, Quota, Unavailable
from mrelease import _mrelease
from mrelease.closing import Closing
from mrelease.holds import Disk, find_tool
from mrelease.meter import room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from namespaces import PidNamespace

PAGE = os.sysconf("SC_PAGE_SIZE")
Holding = TypeVar("Holding", Freezer, Quota)
MIB = 1 << 20
TIMEOUT = 60.0
"""For what takes no time on an idle machine."""


class Options(TypedDict, total=False):
    """What a victim has and does besides; sizes in MiB."""

    groups: Sequence[Group]
    pid_namespace: PidNamespace  # it alone: what is done for it is not in it
    cwd: str | os.PathLike[str]
    user: int  # run as this uid and gid, no other groups
    file: str | os.PathLike[str]  # private mapping, read
    dirty_file: str | os.PathLike[str]  # private mapping, written
    shared_file: str | os.PathLike[str]  # shared mapping, read
    shared_anon: int
    private_memfd: int
    shared_memfd: int
    hugetlb: int  # a count of huge pages of 2 MiB
    thp: str  # on or off: transparent huge pages in the anonymous memory
    vmas: int  # so many mappings of the anonymous memory, not one
    mlock: bool
    swap: bool  # page the anonymous memory out
    spin: bool
    idle: bool  # SCHED_IDLE and nice 19
    sigterm: str  # ignore, exit (a handler that calls _exit) or default
    sharer: bool
    zombie_leader: bool
    robust: str | os.PathLike[str]  # hold the robust lock in this file
    robust_pi: bool  # ... one with priority inheritance
    robust_in_thread: bool  # ... held by the last thread
    robust_wait: str | os.PathLike[str]
    robust_churn: str | os.PathLike[str]
    fsync_loop: str | os.PathLike[str]
    grow: int  # from when a thread reads a byte of start: each needs one
    start: str | os.PathLike[str]  # a FIFO
    progress: str | os.PathLike[str]  # a file: struct progress of victim.c
    core: bool  # may dump core
    trace: int  # be the tracer of this pid: see held()


# ---------------------------------------------------------- the program


def compiled(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a compiler; what is preloaded into this process is not its own."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
        timeout=120,
    )  # fmt: skip


@functools.cache
def binary() -> Path:
    """The victim's program; built by the first call."""
    given = os.environ.get("MRELEASE_TEST_VICTIM")
    if given:
        return Path(given)
    source = Path(__file__).parent / "native" / "victim.c"
    folder = Path(tempfile.mkdtemp(prefix="mrelease-victim-"))
    folder.chmod(0o755)  # victims may run as another user
    atexit.register(_remove_if_own, folder, os.getpid())
    tried = []
    for compiler in (
        os.environ.get("CC"),
        sysconfig.get_config_var("CC"),
        "cc",
        "gcc",
        "clang",
    ):
        command = shlex.split(compiler or "")
        if not command or shutil.which(command[0]) is None:
            continue
        program = folder / "victim"
        # Only the name of the compiler: flags that Python was built with
        # (-pthread apart) are for Python.
        done = compiled(
            command[0], "-std=c11", "-O2", "-g", "-pthread", source,
            "-o", program,
        )  # fmt: skip
        if done.returncode == 0:
            return program
        tried.append(done.stderr)
    raise RuntimeError("no C compiler builds victim.c\n" + "\n".join(tried))


def _remove_if_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------- the process


def wait_until(
    condition: Callable[[], bool], what: str, timeout: float = TIMEOUT
) -> None:
    deadline = time.monotonic() + timeout
    pause = 0.0002
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {timeout} s: {what}")
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status by field."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    return {
        name: value.strip()
        for name, _, value in (x.partition(":") for x in text.splitlines())
    }


def is_sent_sigkill(pid: int) -> bool:
    """Whether SIGKILL waits for it to take notice."""
    status = status_of(pid)
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return pending >> (signal.SIGKILL - 1) & 1 == 1


def children(of: int | str = "self") -> set[int]:
    """The pids of a process' children, dead ones included."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{of}/task").iterdir():
            found |= {int(p) for p in (task / "children").read_text().split()}
    return found


class Process(Closing):
    """A running victim, a child of this process."""

    def __init__(
        self, mib: int = 0, threads: int = 1, **options: Unpack[Options]
    ) -> None:
        self._undo = contextlib.ExitStack()
        self._let_go: list[Callable[[], None]] = []
        self._closed = False
        argv = [str(binary())]
        if mib:
            argv += ["--anon", str(mib)]
        if threads != 1:
            argv += ["--threads", str(threads)]
        for name, value in options.items():
            if name in ("groups", "pid_namespace", "cwd", "user"):
                continue
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is not None and value is not False:
                assert isinstance(value, (int, str, os.PathLike)), name
                argv += [flag, os.fspath(value) if not isinstance(value, int)
                         else str(value)]  # fmt: skip
        for group in reversed(options.get("groups", ())):
            argv = group.enter(argv)
        user = options.get("user")
        namespace = options.get("pid_namespace")
        with namespace.entered() if namespace else contextlib.nullcontext():
            self.popen = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,  # the victim ends with it: victim.c
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=options.get("cwd"),
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        self.pid = self.popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.facts: dict[str, int] = {}
        """What victim.c said after "ready": bytes, counts, pids."""
        self._sharer_reaped = False
        try:
            line = self.read_line()
            word, *facts = line.split() or [""]
            if word != "ready":
                assert self.popen.stderr is not None
                self.popen.kill()
                error = self.popen.stderr.read().decode()
                raise Unavailable(error.strip() or f"victim said {line!r}")
            for fact in facts:
                key, _, text = fact.partition("=")
                self.facts[key] = int(text)
        except BaseException:
            self.close()
            raise

    # -- what it says

    def read_line(self, timeout: float = TIMEOUT) -> str:
        """The next line that the victim printed ("" at its end)."""
        assert self.popen.stdout is not None
        deadline = time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if (
                left <= 0
                or not select.select([self.popen.stdout], [], [], left)[0]
            ):
                raise TimeoutError(f"victim {self.pid} said only {line!r}")
            byte = self.popen.stdout.read(1)
            if not byte:
                break
            line += byte
        return line.decode().rstrip("\n")

    # -- what the kernel says

    def status(self) -> dict[str, str]:
        return status_of(self.pid)

    def bytes_of(self, field: str) -> int:
        """A field of /proc/PID/status that is in kB, in bytes.

        0 if it is not there: a process without an mm has none. Such a
        process may still hold memory (exit_mmap is at work); only the
        memory cgroup tells.
        """
        value = self.status().get(field)
        return 0 if value is None else int(value.split()[0]) * 1024

    def rss_anon(self) -> int:
        return self.bytes_of("RssAnon")

    def rss_file(self) -> int:
        return self.bytes_of("RssFile")

    def rss_shmem(self) -> int:
        return self.bytes_of("RssShmem")

    def vm_rss(self) -> int:
        return self.bytes_of("VmRSS")

    def vm_swap(self) -> int:
        return self.bytes_of("VmSwap")

    def vm_locked(self) -> int:
        return self.bytes_of("VmLck")

    def hugetlb(self) -> int:
        return self.bytes_of("HugetlbPages")

    def has_mm(self) -> bool:
        """Not past exit_mm(), so the call can still reach its memory."""
        return "RssAnon" in self.status()

    def core_dumping(self) -> bool:
        return self.status().get("CoreDumping") == "1"

    def tids(self) -> list[int]:
        """The leader's first: after the highest pid, low ones come again."""
        try:
            found = os.listdir(f"/proc/{self.pid}/task")
        except (FileNotFoundError, ProcessLookupError):
            return []
        return sorted(map(int, found), key=lambda tid: (tid != self.pid, tid))

    def states(self) -> str:
        """The state letter of each thread, the leader's first."""
        letters = ""
        for tid in self.tids():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{self.pid}/task/{tid}/stat").read_text()
                letters += stat.rpartition(")")[2].split()[0]
        return letters

    def state(self) -> str:
        return self.states()[:1]

    def started(self) -> int:
        """Field 22 of /proc/PID/stat: clock ticks since boot."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[19])

    def ended(self, timeout: float = 0.0) -> bool:
        """All its threads have ended; it is not waited for."""
        return bool(select.select([self.pidfd], [], [], timeout)[0])

    # -- what happens to it

    def let_go(self) -> None:
        """Take away all that keeps it from running to its end."""
        while self._let_go:
            self._let_go.pop()()

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end and reap it; the exit code (-signal)."""
        return self.popen.wait(timeout)

    def also(
        self,
        undo: Callable[[], object] | None = None,
        *,
        let_go: Callable[[], None] | None = None,
    ) -> None:
        """Do this too: undo at close, let_go before it has to end."""
        if undo is not None:
            self._undo.callback(undo)
        if let_go is not None:
            self._let_go.append(let_go)

    def close(self) -> None:
        """Kill it, let it go, reap it, undo what was done for it."""
        if self._closed:
            return
        self._closed = True
        with self._undo:
            # Killed first: what was held must not run on.
            self.popen.kill()
            try:
                self.let_go()
            finally:
                self.wait()
                self._end_sharer()
                for pipe in (
                    self.popen.stdin,
                    self.popen.stdout,
                    self.popen.stderr,
                ):
                    assert pipe is not None
                    pipe.close()
                os.close(self.pidfd)

    def _end_sharer(self) -> None:
        """The sharer is a child of this process too (CLONE_PARENT)."""
        pid = self.facts.get("sharer")
        if pid is not None and not self._sharer_reaped:
            self._sharer_reaped = True
            with contextlib.suppress(ChildProcessError):
                # Ours and not reaped: the pid can not be another's.
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    def end_sharer(self) -> None:
        """Kill and reap the process that shares the memory."""
        self._end_sharer()


@contextlib.contextmanager
def _finishing(victim: Process) -> Iterator[Process]:
    """Close a victim that could not be made what it should be."""
    try:
        yield victim
    except BaseException:
        victim.close()
        raise


# ------------------------------------------------- what a victim may need


_idle_disks: list[Disk] = []


def _borrow_disk() -> Disk:
    """A disk for one victim. A new one takes 0.1 s, so they are kept."""
    for disk in _idle_disks:
        if disk.owner == os.getpid():  # not one of before a fork
            _idle_disks.remove(disk)
            return disk
    return Disk()


def _return_disk(disk: Disk) -> None:
    disk.thaw()
    disk.empty()
    _idle_disks.append(disk)


class Swap:
    """A swap area on a new zram device."""

    def __init__(self, mib: int = 512) -> None:
        control = Path("/sys/class/zram-control/hot_add")
        if os.geteuid() != 0:
            raise Unavailable("swap: swapon needs root")
        if not control.exists():
            raise Unavailable("swap: no /sys/class/zram-control (zram)")
        for tool in ("mkswap", "swapon", "swapoff"):
            if find_tool(tool) is None:
                raise Unavailable(f"swap: {tool} is not installed")
        try:
            index = control.read_text().strip()
        except OSError as e:
            raise Unavailable(f"swap: no zram: {e.strerror}") from None
        self.device = Path(f"/dev/zram{index}")
        self._guard = Guard(
            'PATH="$PATH:/usr/sbin:/sbin"; '
            'if grep -q "^/dev/zram$1 " /proc/swaps; '
            'then swapoff "/dev/zram$1"; fi; '
            'echo 1 > "/sys/block/zram$1/reset"; '
            'echo "$1" > /sys/class/zram-control/hot_remove',
            index,
        )
        try:
            wait_until(self.device.exists, f"{self.device}", 10)
            Path(f"/sys/block/zram{index}/disksize").write_text(f"{mib}M")
            Disk.tool("mkswap", str(self.device))
            # The first that is used, if there are others.
            Disk.tool("swapon", "-p", "32000", str(self.device))
        except BaseException as e:
            self._guard.close()
            if isinstance(e, OSError):
                raise Unavailable(f"swap on zram: {e}") from None
            raise

    def close(self) -> None:
        self._guard.close()


_swap: list[Swap] = []


def _free_swap() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("SwapFree:"):
            return int(line.split()[1]) * 1024
    return 0


def use_swap() -> None:
    """Have swap from here to close_all(): that of the machine or ours."""
    if not _swap and _free_swap() < 256 * MIB:
        _swap.append(Swap())


def close_all() -> None:
    """Give back what is kept for the next victim: disks and swap."""
    while _idle_disks:
        _idle_disks.pop().close()
    while _swap:
        _swap.pop().close()


class HugePages:
    """So many huge pages of 2 MiB more in the machine's pool."""

    _file = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")

    def __init__(self, count: int) -> None:
        if not self._file.exists():
            raise Unavailable("no huge pages of 2 MiB in this kernel")
        if not os.access(self._file, os.W_OK):
            raise Unavailable("huge pages: only root may reserve them")
        with self._file.open("r+") as f:
            # Other test runs add and take theirs: never an absolute count.
            fcntl.flock(f, fcntl.LOCK_EX)
            before = int(f.read())
            self._file.write_text(str(before + count))
            added = int(self._file.read_text()) - before
            self._guard = Guard(
                'flock "$2" sh -c \'echo $(($(cat "$1") - $0)) > "$1"\' '
                '"$1" "$2"',
                str(added),
                str(self._file),
            )
        if added < count:
            self.close()
            raise Unavailable("no free memory for huge pages")

    def close(self) -> None:
        self._guard.close()


# ------------------------------------------------------------- the kinds


class Factory(Protocol):
    def __call__(
        self,
        mib: int = 64,
        *,
        threads: int = 1,
        **options: Unpack[Options],
    ) -> Process: ...


def asleep(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """All threads asleep."""
    victim = Process(mib, threads, **options)
    with _finishing(victim):
        wait_until(lambda: set(victim.states()) <= {"S"}, "all threads asleep")
    return victim


def spinning(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """All threads busy."""
    options["spin"] = True
    return Process(mib, threads, **options)


def starved(
    mib: int = 64,
    *,
    threads: int = 1,
    busy: int | None = None,
    **options: Unpack[Options],
) -> Process:
    """SCHED_IDLE and nice 19, while others (2 x CPUs) are busy."""
    options["idle"] = True
    if busy is None:
        busy = 2 * len(os.sched_getaffinity(0))
    victim = asleep(mib, threads=threads, **options)
    with _finishing(victim):
        for _ in range(busy):
            victim.also(let_go=Process(spin=True).close)
    return victim


def held(
    mib: int = 64,
    *,
    threads: int = 1,
    killed: bool = False,
    **options: Unpack[Options],
) -> Process:
    """Runs until killed; then every thread stands in PTRACE_EVENT_EXIT.

    It is dying, can not finish, and holds its memory: wait_held() waits
    until it has got there, let_go() lets it end. With killed=True it is
    there already.

    The tracer is a process of its own: ptrace requests must come from
    the thread that attached, and so any thread of a test may kill, wait
    and let go, and the victim stays a child of the test. Its end is what
    lets go.
    """
    victim = asleep(mib, threads=threads, **options)
    with _finishing(victim):
        hold(victim)
        if killed:
            victim.popen.kill()
            wait_held(victim)
    return victim


def hold(victim: Process) -> None:
    """Make a tracer hold the victim's threads where they end."""
    try:
        tracer = Process(trace=victim.pid)
    except Unavailable as e:
        raise Unavailable(f"ptrace of an own process: {e}") from None
    victim.also(let_go=tracer.close)


def wait_held(victim: Process, timeout: float = TIMEOUT) -> None:
    """Wait until every thread of a killed held() victim stands still."""
    wait_until(
        lambda: set(victim.states()) == {"t"}, "held at its end", timeout
    )


def stopped(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """Stopped by SIGSTOP."""
    victim = asleep(mib, threads=threads, **options)
    with _finishing(victim):
        victim.popen.send_signal(signal.SIGSTOP)
        wait_until(lambda: set(victim.states()) == {"T"}, "stopped")
    return victim


def in_d_state(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """The first thread in uninterruptible sleep: a frozen file system."""
    disk = _borrow_disk()
    try:
        options["fsync_loop"] = disk.path / "written"
        victim = Process(mib, threads, **options)
    except BaseException:
        _return_disk(disk)
        raise
    victim.also(lambda: _return_disk(disk), let_go=disk.thaw)
    with _finishing(victim):
        disk.freeze()
        wait_until(lambda: _is_stuck(victim), "D state")
    return victim


def _is_stuck(victim: Process) -> bool:
    """In D state, for good: fsync is in it for a moment each time."""

    def look() -> tuple[str, str]:
        status = victim.status()
        return status["State"], status["voluntary_ctxt_switches"]

    first = look()
    if first[0][0] != "D":
        return False
    time.sleep(0.01)
    return look() == first


def _group_to_hold(
    kind: type[Holding], version: int | None, options: Options
) -> Holding:
    """Add a group of a kind to those that a victim is to be in."""
    group = kind(version=version)
    groups: Sequence[Group] = options.get("groups", ())
    for other in groups:
        if group.version == other.version == 2:
            # A process is in one of them all: that of its meter.
            group.close()
            return kind(at=other.path)
    options["groups"] = [*groups, group]
    return group


def frozen(
    mib: int = 64,
    *,
    threads: int = 1,
    version: int = 1,
    **options: Unpack[Options],
) -> Process:
    """In a frozen cgroup: with version 1 it stays so when killed."""
    group = _group_to_hold(Freezer, version, options)
    try:
        victim = asleep(mib, threads=threads, **options)
    except BaseException:
        group.close()
        raise
    victim.also(group.close, let_go=group.let_go)
    with _finishing(victim):
        group.freeze()
    return victim


def frozen_v2(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """In a frozen cgroup of version 2: can be killed, and then ends."""
    return frozen(mib, threads=threads, version=2, **options)


def on_quota(
    mib: int = 64,
    *,
    threads: int = 1,
    percent: float = 2.0,
    **options: Unpack[Options],
) -> Process:
    """Asleep, with this share of one CPU from now on."""
    group = _group_to_hold(Quota, None, options)
    try:
        victim = asleep(mib, threads=threads, **options)
    except BaseException:
        group.close()
        raise
    victim.also(group.close, let_go=group.let_go)
    with _finishing(victim):
        group.limit(percent)
    return victim


def shared(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """Another process, facts["sharer"], has the same mm (CLONE_VM)."""
    options["sharer"] = True
    return asleep(mib, threads=threads, **options)


def zombie_leader(
    mib: int = 64, *, threads: int = 2, **options: Unpack[Options]
) -> Process:
    """The first thread has ended, the others live and have the memory."""
    options["zombie_leader"] = True
    victim = Process(mib, max(threads, 2), **options)
    with _finishing(victim):
        wait_until(
            lambda: (
                set(victim.states()[:1]) == {"Z"}
                and set(victim.states()[1:]) == {"S"}
            ),
            "dead leader",
        )
    return victim


def zombie(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """Ended, not waited for."""
    victim = asleep(mib, threads=threads, **options)
    with _finishing(victim):
        victim.popen.kill()
        if not victim.ended(TIMEOUT):
            raise TimeoutError("victim does not end")
    return victim


def swapped(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """Its anonymous memory is in swap."""
    use_swap()
    options["swap"] = True
    victim = asleep(mib, threads=threads, **options)
    with _finishing(victim):
        if victim.vm_swap() < mib * MIB // 2:
            raise Unavailable(
                f"MADV_PAGEOUT moved only {victim.vm_swap()} bytes to swap"
            )
    return victim


def mlocked(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """Its anonymous memory is locked."""
    options["mlock"] = True
    try:
        return asleep(mib, threads=threads, **options)
    except Unavailable as e:
        raise Unavailable(f"RLIMIT_MEMLOCK: {e}") from None


def huge(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """With 4 huge pages of hugetlb too."""
    count = options.setdefault("hugetlb", 4)
    pages = HugePages(count)
    try:
        victim = asleep(mib, threads=threads, **options)
    except BaseException:
        pages.close()
        raise
    victim.also(pages.close)
    return victim


def core_dumping(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """In the middle of a core dump, which does not go on.

    Where core_pattern is a plain name the core goes to the working
    directory: that is on a frozen file system. Else core_pattern is
    set to a program that reads nothing, if the machine is disposable.
    """
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        raise Unavailable("core dump: the hard limit RLIMIT_CORE is 0")
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    options["core"] = True
    if pattern and pattern[0] not in "|@/":
        return _core_dumping_to_frozen_disk(mib, threads, options)
    if os.environ.get("MRELEASE_TEST_DISPOSABLE") != "1":
        raise Unavailable(
            f"core dump: core_pattern is {pattern!r}, and changing it needs "
            "a disposable machine (MRELEASE_TEST_DISPOSABLE=1)"
        )
    return _core_dumping_to_pipe(mib, threads, options, pattern)


def _core_dumping_to_frozen_disk(
    mib: int, threads: int, options: Options
) -> Process:
    disk = _borrow_disk()
    try:
        options["cwd"] = disk.path
        victim = asleep(mib, threads=threads, **options)
    except BaseException:
        _return_disk(disk)
        raise
    victim.also(lambda: _return_disk(disk), let_go=disk.thaw)
    with _finishing(victim):
        disk.freeze()
        victim.popen.send_signal(signal.SIGABRT)
        wait_until(victim.core_dumping, "core dump in progress")
    return victim


def _core_dumping_to_pipe(
    mib: int, threads: int, options: Options, pattern: str
) -> Process:
    file = Path("/proc/sys/kernel/core_pattern")
    victim = asleep(mib, threads=threads, **options)
    with _finishing(victim):
        guard = Guard('printf %s "$1" > "$2"', pattern, str(file))
        victim.also(guard.close)
        try:
            file.write_text(f"|{binary()} --core-handler")
        except OSError as e:
            raise Unavailable(f"core_pattern: {e.strerror}") from None
        victim.popen.send_signal(signal.SIGABRT)
        wait_until(victim.core_dumping, "core dump in progress")
    return victim


def robust_holder(
    mib: int = 64, *, threads: int = 1, **options: Unpack[Options]
) -> Process:
    """Holds the robust lock in a shared file: options["robust"]."""
    folder: Path | None = None
    if "robust" not in options:
        folder = Path(tempfile.mkdtemp(prefix="mrelease-lock-"))
        options["robust"] = folder / "lock"
    try:
        victim = asleep(mib, threads=threads, **options)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder)
        raise
    if folder is not None:
        victim.also(functools.partial(shutil.rmtree, folder))
    return victim


def robust_waiter(path: str | os.PathLike[str]) -> Process:
    """Waits for a robust lock that is held; then got() has a result."""
    return asleep(0, robust_wait=path)


def got(waiter: Process, timeout: float = 10.0) -> str | None:
    """OK or EOWNERDEAD; None if the waiter still hangs at the timeout."""
    try:
        return waiter.read_line(timeout).removeprefix("got=")
    except TimeoutError:
        return None


def robust_churner(path: str | os.PathLike[str]) -> Process:
    """Takes and gives back a robust lock as fast as it can."""
    return Process(robust_churn=path)


def reaped_pid() -> int:
    """The pid of a child that is no more."""
    with Process() as victim:
        pass
    return victim.pid


def kernel_thread() -> int:
    """The pid of a kernel thread."""
    try:
        if status_of(2)["Name"] == "kthreadd":
            return 2
    except ProcessLookupError:
        pass
    raise Unavailable("no kernel threads in this pid namespace")


def _kind(factory: Callable[..., Process], **fixed: object) -> Factory:
    return functools.partial(factory, **fixed)


_KINDS: dict[str, Factory] = {
    "asleep": asleep,
    "asleep_8_threads": _kind(asleep, threads=8),
    "asleep_64_threads": _kind(asleep, threads=64),
    "spinning": spinning,
    "spinning_4_threads": _kind(spinning, threads=4),
    "starved": starved,
    "held": held,
    "held_64_threads": _kind(held, threads=64),
    "stopped": stopped,
    "in_d_state": in_d_state,
    "frozen": frozen,
    "frozen_v2": frozen_v2,
    "on_quota": on_quota,
    "shared": shared,
    "zombie_leader": zombie_leader,
    "zombie": zombie,
    "swapped": swapped,
    "mlocked": mlocked,
    "huge": huge,
    "core_dumping": core_dumping,
    "robust_holder": robust_holder,
}


def kinds() -> Mapping[str, Factory]:
    """All kinds by name; each takes (mib, threads=..., **options)."""
    return _KINDS


@functools.cache
def why_not(kind: str) -> str | None:
    """Why there can be no such victim here; None if there can."""
    try:
        if kind == "kernel_thread":
            kernel_thread()
        else:
            with _KINDS[kind](1):
                pass
    except Unavailable as e:
        return str(e)
    return None


def need(*kinds: str) -> None:
    """Skip the test, with the reason, if a kind is not to be had."""
    import pytest

    for kind in kinds:
        reason = why_not(kind)
        if reason is not None:
            pytest.skip(f"no victim of kind {kind!r}: {reason}")


def left_behind() -> list[str]:
    """Mounts, swap and folders that this module made and still exist."""
    mounts = Path("/proc/self/mountinfo").read_text()
    found = [
        f"mount {disk.path}"
        for disk in _idle_disks
        if str(disk.path) in mounts
    ]
    return found + [f"swap {swap.device}" for swap in _swap]


# --------------------------------------------------- one starved in execve()

_INTO_EXEC = """
import mmap, os, sys
input()  # until it is in its group
memory = mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
try:
    memory.madvise(15)  # no huge pages: they are torn down at once
except OSError:
    pass  # there are none
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print(flush=True)
os.execv("/bin/sleep", ["sleep", "600"])
"""


@contextlib.contextmanager
def starved_in_execve(
    groups: Sequence[Group] = (),
) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[bytes]]]:
    """A process that hardly gets to tear its old memory down, in execve().

    And who keeps it from that: without it, it is through in a moment.
    """
    cpu = max(os.sched_getaffinity(0))
    # More than is torn down in the milliseconds that it gets at a time.
    size = min(1 << 30, room() // 4)
    busy = subprocess.Popen(["sh", "-c", "while :; do :; done"])
    victim = subprocess.Popen(
        [sys.executable, "-I", "-c", _INTO_EXEC, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        os.sched_setaffinity(busy.pid, {cpu})
        os.sched_setaffinity(victim.pid, {cpu})
        assert victim.stdin is not None
        assert victim.stdout is not None
        for group in groups:
            group.add(victim.pid)
        victim.stdin.write("\n")
        victim.stdin.flush()
        assert victim.stdout.readline() == "\n"
        wait_until(
            lambda: _mrelease.is_in_exec(victim.pid), "it is in execve()"
        )
        yield victim, busy
    finally:
        busy.kill()
        busy.wait()
        victim.kill()
        victim.communicate()
