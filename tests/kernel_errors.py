"""Errors made by the kernel itself, and functions run in a child process.

``in_child(f, ...)`` runs a Python function in a forked child and gives
back what it returned or raised.

``answered`` runs one under a seccomp filter that answers system calls:

    with answered({"process_mrelease": EAGAIN}) as kernel:
        kernel.run(f)                       # the same error every time
    with answered({"process_mrelease": [EAGAIN, EAGAIN, ALLOW]}) as kernel:
        kernel.run(f)                       # one after the other
        kernel.calls                        # what was called, when, answer
    with answered({"process_mrelease": BLOCK}) as kernel:
        job = kernel.start(f)
        kernel.blocked()                    # it is inside the call now
        kernel.release()                    # let it through (or an errno)
        job.result()
    with answered({"process_mrelease": KILL}) as kernel:
        kernel.run(f)                       # raises ChildKilled (SIGSYS)

A rule is an errno, ALLOW, ZERO, BLOCK, KILL, a function of the Call that
gives one of the first four, or a sequence of these, of which the last stays.
Errnos and KILL alone are answered by the filter. All else goes through
seccomp user notification: a thread of *this* process answers, so what
runs under the filter may block without Python taking part in it.

A filter stays for the life of its thread, hence the child. A filter is
also per thread: ``kernel.in_thread(f)`` runs f in a new thread of this
process which alone has it and which ends with f. There, code that
blocks in an answered call without dropping the GIL hangs for ever, as
the answering thread needs it; in a child it does not.

The filters are written as raw BPF: libseccomp is not on every machine,
its older versions know no process_mrelease by name, and its only Python
binding on the package index is no longer maintained. It is 40 lines.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
import pickle
import platform
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import (
    Any,
    Generic,
    NamedTuple,
    ParamSpec,
    TypeVar,
)

from cgroups import Unavailable
from mrelease.closing import Closing

P = ParamSpec("P")
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)

# ------------------------------------------------- a function in a child


class ChildKilled(Exception):
    """The child ended by a signal, or without a result."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.code = os.waitstatus_to_exitcode(status)
        self.signal = -self.code if self.code < 0 else None
        how = (
            signal.Signals(self.signal).name
            if self.signal is not None
            else f"exit code {self.code}"
        )
        super().__init__(f"child {pid} ended without a result: {how}")


class Job(Closing, Generic[T]):
    """A function that runs in a forked child of this process.

    The child is forked in start(), with all of this process's memory, so
    the function needs no pickling; its result or exception does.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # 3.12+: fork with threads. The child runs only the function.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _run_child(function, theirs)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)
        self._socket = ours
        self._data = bytearray()
        self._status: int | None = None
        self._done = False

    def result(self, timeout: float | None = 60.0) -> T:
        """What the function returned; raises what it raised."""
        if not self._done:
            self._collect(timeout)
        if not self._data:
            assert self._status is not None
            raise ChildKilled(self.pid, self._status)
        good, value = pickle.loads(self._data[8:])
        if good:
            return value  # type: ignore[no-any-return]
        raise value

    def _collect(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self.pidfd, select.POLLIN)
        whole = False
        while not whole:
            left = (
                None
                if deadline is None
                else max(0.0, deadline - time.monotonic()) * 1000
            )
            ready = dict(poll.poll(left))
            if not ready:
                raise TimeoutError(f"child {self.pid} has not finished")
            if self._socket.fileno() in ready:
                part = self._socket.recv(1 << 20)
                self._data += part
                whole = not part or (
                    len(self._data) >= 8
                    and len(self._data)
                    == 8 + int.from_bytes(self._data[:8], "little")
                )
            else:
                whole = True  # the child ended and has sent nothing
        self._reap()
        if len(self._data) < 8 or len(self._data) != 8 + int.from_bytes(
            self._data[:8], "little"
        ):
            self._data.clear()
        self._done = True

    def _reap(self) -> None:
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)

    def signal(self, number: int) -> None:
        """Send the child a signal; nothing once it is reaped."""
        if self._status is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """Kill the child if it still runs, and reap it."""
        if self.pidfd < 0:
            return
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()
        self._socket.close()
        os.close(self.pidfd)
        self.pidfd = -1


def _run_child(function: Callable[[], object], out: socket.socket) -> None:
    code = 1
    try:
        data: bytes
        try:
            data = pickle.dumps((True, function()))
        except BaseException as e:  # noqa: BLE001 - for the caller
            e.add_note(
                f"In child {os.getpid()}:\n{traceback.format_exc().rstrip()}"
            )
            try:
                data = pickle.dumps((False, e))
                pickle.loads(data)
            except BaseException:  # noqa: BLE001 - any __reduce__
                text = f"{type(e).__name__}: {e}"
                plain: Exception = RuntimeError(text)
                if type(e).__name__ == "Skipped":  # pytest.skip()
                    plain = Unavailable(str(e))
                plain.add_note(e.__notes__[-1])
                data = pickle.dumps((False, plain))
        out.sendall(len(data).to_bytes(8, "little") + data)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a forked child and give its result."""
    with Job(lambda: function(*args, **kwargs)) as job:
        return job.result()


PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38


def drop_privileges(uid: int = 65534) -> None:
    """Make this process an ordinary user's: no way back, so in a child.

    Lazy imports may fail from here on if Python is installed where
    only root may look.
    """
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # A change of user makes a process undumpable: its /proc files then
    # belong to root, unlike those of any process of a user.
    _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("CapEff:", "CapPrm:", "CapAmb:")):
            assert int(line.split()[1], 16) == 0, line


def leave_files(count: int) -> None:
    """Allow so many file descriptors more; there are no gaps below."""
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    for number in range(highest):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(0, number)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, hard))


# ---------------------------------------------------- system call numbers

_X86_64 = {
    "bpf": 321, "clock_nanosleep": 230, "clone": 56, "clone3": 435,
    "close": 3, "dup": 32, "epoll_create1": 291, "epoll_ctl": 233,
    "eventfd2": 290, "execve": 59, "fcntl": 72, "fstat": 5, "futex": 202,
    "get_robust_list": 274, "getdents64": 217, "getpid": 39, "ioctl": 16,
    "kcmp": 312, "kill": 62, "madvise": 28, "mlock2": 325, "mlockall": 151,
    "munlockall": 152, "nanosleep": 35, "newfstatat": 262, "openat": 257,
    "pipe2": 293, "poll": 7, "ppoll": 271, "prctl": 157, "prlimit64": 302,
    "process_vm_readv": 310, "read": 0, "readv": 19,
    "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "sched_getattr": 315,
    "sched_setaffinity": 203, "sched_setattr": 314, "set_robust_list": 273,
    "sched_setparam": 142, "sched_setscheduler": 144, "setpriority": 141,
    "sigaltstack": 131, "tgkill": 234, "tkill": 200, "wait4": 61,
    "waitid": 247, "write": 1,
}  # fmt: skip
# The table that newer architectures share: aarch64, riscv64, loongarch64.
_GENERIC = {
    "bpf": 280, "clock_nanosleep": 115, "clone": 220, "clone3": 435,
    "close": 57, "dup": 23, "epoll_create1": 20, "epoll_ctl": 21,
    "eventfd2": 19, "execve": 221, "fcntl": 25, "fstat": 80, "futex": 98,
    "get_robust_list": 100, "getdents64": 61, "getpid": 172, "ioctl": 29,
    "kcmp": 272, "kill": 129, "madvise": 233, "mlock2": 284, "mlockall": 230,
    "munlockall": 231, "nanosleep": 101, "newfstatat": 79, "openat": 56,
    "pipe2": 59, "ppoll": 73, "prctl": 167, "prlimit64": 261,
    "process_vm_readv": 270, "read": 63, "readv": 65,
    "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "sched_getattr": 275,
    "sched_setaffinity": 122, "sched_setattr": 274, "set_robust_list": 99,
    "sched_setparam": 118, "sched_setscheduler": 119, "setpriority": 140,
    "sigaltstack": 132, "tgkill": 131, "tkill": 130, "wait4": 260,
    "waitid": 95, "write": 64,
}  # fmt: skip
# Since 5.x a new call has the same number everywhere (but alpha, mips).
_COMMON = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434,
    "openat2": 437, "pidfd_getfd": 438, "faccessat2": 439,
    "process_madvise": 440, "epoll_pwait2": 441, "process_mrelease": 448,
}  # fmt: skip

# machine: numbers, number of seccomp(2), AUDIT_ARCH_*
_MACHINES = {
    "x86_64": (_X86_64, 317, 0xC000003E),
    "aarch64": (_GENERIC, 277, 0xC00000B7),
    "riscv64": (_GENERIC, 277, 0xC00000F3),
    "loongarch64": (_GENERIC, 277, 0xC0000102),
}


def number(name: str) -> int:
    """The number of a system call on this machine."""
    machine = platform.machine()
    if name in _COMMON:
        return _COMMON[name]
    if machine not in _MACHINES:
        raise NotImplementedError(f"system call numbers of {machine}")
    return _MACHINES[machine][0][name]


# -------------------------------------------------------------- answering


class Do(enum.Enum):
    ALLOW = "let the call through"
    ZERO = "return 0, and do nothing"
    BLOCK = "keep the caller inside the call until release()"
    KILL = "kill the process with SIGSYS"


ALLOW = Do.ALLOW
ZERO = Do.ZERO
BLOCK = Do.BLOCK
KILL = Do.KILL


class Call(NamedTuple):
    """A system call that was answered through notification."""

    name: str
    tid: int
    args: tuple[int, ...]
    time: float  # time.monotonic() when it was seen

    def string(self, number: int) -> str:
        """What this argument points to: a path, say."""
        with open(f"/proc/{self.tid}/mem", "rb", buffering=0) as memory:
            data = os.pread(memory.fileno(), 256, self.args[number])
        return os.fsdecode(data.partition(b"\0")[0])

    def thread(self) -> str:
        """The name of the caller's thread."""
        return Path(f"/proc/{self.tid}/comm").read_text().rstrip("\n")


Plain = int | Do
Answer = Plain | Callable[[Call], Plain]
Rule = Answer | Sequence[Answer]

_ERRNO = 0x00050000
_KILL_PROCESS = 0x80000000
_USER_NOTIF = 0x7FC00000
_ALLOW = 0x7FFF0000
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE = 1 << 5  # Linux 5.19
_RECEIVE = 0xC0502100
_SEND = 0xC0182101
_CONTINUE = 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def allow_only(numbers: Iterable[int], code: int = errno.EPERM) -> None:
    """Filter this thread, for good: all other calls fail with this errno."""
    _install(dict.fromkeys(numbers, _ALLOW), _ERRNO | code)


def _install(verdicts: Mapping[int, int], rest: int = _ALLOW) -> int:
    """Filter this thread: number -> verdict. The listener's fd, or -1."""
    _, seccomp, arch = _MACHINES[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, RET|K
    code = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, arch),
        (give, 0, 0, rest),
        (load, 0, 0, 0),  # seccomp_data.nr
    ]
    for nr, verdict in verdicts.items():
        code += [(equal, 0, 1, nr), (give, 0, 0, verdict)]
    code.append((give, 0, 0, rest))
    raw = b"".join(struct.pack("=HBBI", *c) for c in code)
    program = _Program(len(code), raw)
    if _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    # With WAIT_KILLABLE a caller in an answered call is woken by fatal
    # signals only, as in the wait of process_mrelease for mmap_lock.
    tries = [0]
    if _USER_NOTIF in verdicts.values():
        tries = [_NEW_LISTENER | _WAIT_KILLABLE, _NEW_LISTENER]
    for flags in tries:
        fd: int = _libc.syscall(
            ctypes.c_long(seccomp),
            ctypes.c_long(1),
            ctypes.c_long(flags),
            ctypes.byref(program),
        )
        if fd >= 0:
            return fd if flags else -1
    raise OSError(ctypes.get_errno(), "seccomp filter refused")


class answered(Closing):  # noqa: N801 - reads as contextlib's do
    """The kernel answers these system calls as told: see the module."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self.calls: list[tuple[Call, Plain]] = []
        """Calls that came by notification, with their answers."""
        self._verdicts: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._rest: dict[str, list[Answer]] = {}
        for name, rule in rules.items():
            nr = number(name)
            self._names[nr] = name
            if rule is KILL:
                self._verdicts[nr] = _KILL_PROCESS
            elif isinstance(rule, int):
                self._verdicts[nr] = _ERRNO | self._errno(rule)
            else:
                answers: list[Answer] = (
                    list(rule) if isinstance(rule, Sequence) else [rule]
                )
                if not answers or KILL in answers:
                    raise ValueError(f"{name}: KILL stands alone")
                self._rest[name] = answers
                self._verdicts[nr] = _USER_NOTIF
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._blocked: dict[int, tuple[int, Call]] = {}
        self._jobs: list[Job[Any]] = []
        self._threads: list[threading.Thread] = []
        self._stop_r, self._stop_w = os.pipe()

    @staticmethod
    def _errno(value: int) -> int:
        if isinstance(value, bool) or not 0 < value < 4096:
            raise ValueError(f"not an errno: {value!r}")
        return value

    # -- running

    def start(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Job[T]:
        """Run a function in a forked child under the filter."""
        ours, theirs = socket.socketpair()

        def run() -> T:
            ours.close()
            fd = _install(self._verdicts)
            socket.send_fds(theirs, [b"f"], [] if fd < 0 else [fd])
            theirs.recv(1)
            theirs.close()
            if fd >= 0:
                os.close(fd)
            return function(*args, **kwargs)

        job = Job(run)
        self._jobs.append(job)
        theirs.close()
        with ours:
            # A sanitizer's locks, held by a thread at the fork, stay locked.
            if not select.select([ours], [], [], 60)[0]:
                raise TimeoutError(f"child {job.pid} has no filter yet")
            data, fds, _, _ = socket.recv_fds(ours, 1, 1)
            if data:
                if fds:
                    self._serve(fds[0])
                # Not before: an answer needs this process.
                ours.sendall(b"g")
        return job

    def run(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a function in a child under the filter; its result."""
        return self.start(function, *args, **kwargs).result()

    def command(
        self, argv: Iterable[str], *, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command under the filter; its output is captured."""

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=env,
            )

        return self.run(run)

    def in_thread(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a function in a thread which alone has the filter."""
        result: list[T] = []
        error: list[BaseException] = []

        def run() -> None:
            try:
                fd = _install(self._verdicts)
                if fd >= 0:
                    self._serve(fd)
                result.append(function(*args, **kwargs))
            except BaseException as e:  # noqa: BLE001 - for the caller
                error.append(e)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join()
        if error:
            raise error[0]
        return result[0]

    # -- answering

    def _serve(self, fd: int) -> None:
        thread = threading.Thread(
            target=self._answer_all, args=(fd,), daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _answer_all(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._stop_r, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if self._stop_r in ready:
                    return
                if not ready.get(fd, 0) & select.POLLIN:
                    return  # POLLHUP: nobody has the filter any more
                self._answer_one(fd)
        finally:
            with self._lock:
                for key in [k for k, v in self._blocked.items() if v[0] == fd]:
                    del self._blocked[key]
                os.close(fd)

    def _answer_one(self, fd: int) -> None:
        data = bytearray(80)
        try:
            fcntl.ioctl(fd, _RECEIVE, data)
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.EINTR):
                return  # the caller is gone
            raise
        key, tid, _, nr, _, _, *args = struct.unpack("=QIIiIQ6Q", data)
        name = self._names[nr]
        call = Call(name, tid, tuple(args), time.monotonic())
        with self._lock:
            answers = self._rest[name]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        plain = answer(call) if callable(answer) else answer
        with self._lock:
            self.calls.append((call, plain))
            if plain is BLOCK:
                self._blocked[key] = (fd, call)
            else:
                self._send(fd, key, plain)
            self._changed.notify_all()

    def _send(self, fd: int, key: int, answer: Plain) -> None:
        if answer is ALLOW:
            data = struct.pack("=QqiI", key, 0, 0, _CONTINUE)
        elif answer is ZERO:
            data = struct.pack("=QqiI", key, 0, 0, 0)
        else:
            assert isinstance(answer, int), answer
            data = struct.pack("=QqiI", key, 0, -self._errno(answer), 0)
        try:
            fcntl.ioctl(fd, _SEND, data)
        except OSError as e:
            if e.errno != errno.ENOENT:  # the caller is gone
                raise

    def blocked(self, timeout: float = 10.0, *, count: int = 1) -> list[Call]:
        """Wait until so many callers are blocked; their calls."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(self._blocked) >= count, timeout
            ):
                raise TimeoutError(
                    f"{len(self._blocked)} of {count} calls are blocked"
                )
            return [call for _, call in self._blocked.values()]

    def release(self, answer: Plain = ALLOW) -> int:
        """Let all blocked callers go on, or give them an errno."""
        with self._lock:
            blocked, self._blocked = self._blocked, {}
            for key, (fd, _) in blocked.items():
                self._send(fd, key, answer)
        return len(blocked)

    def count(self, name: str) -> int:
        """How often a call came by notification."""
        with self._lock:
            return sum(call.name == name for call, _ in self.calls)

    def close(self) -> None:
        for job in self._jobs:
            job.close()
        self.release()
        os.write(self._stop_w, b"x")
        for thread in self._threads:
            thread.join(10)
        os.close(self._stop_r)
        os.close(self._stop_w)


def has_the_call() -> bool:
    """Whether this kernel has process_mrelease(2), asked without mrelease."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(number("process_mrelease"), -1, 0)
    return ctypes.get_errno() == errno.EBADF


def why_not() -> str | None:
    """Why seccomp filters or notification can not be used, or None."""
    if platform.machine() not in _MACHINES:
        return f"no seccomp recipe for {platform.machine()}"
    try:
        with answered({"sigaltstack": [errno.EDOM, ALLOW]}) as kernel:
            kernel.run(lambda: None)
    except OSError as e:
        return f"seccomp: {e}"
    return None
