"""Make the killer itself able to kill when memory is short."""

from __future__ import annotations

import os
from _thread import get_native_id
from errno import EACCES, EAGAIN, EINVAL, ENOENT, ENOMEM, EPERM, EROFS
from time import monotonic_ns

from mrelease import _mrelease
from mrelease.footprint import in_units
from mrelease.killing import kill
from mrelease.process import next_child_is_init, read_fields
from mrelease.reaper import Reaper
from mrelease.scheduling import policy_name
from mrelease.value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Literal, Self

    Status = Literal["done", "not allowed", "not available", "skipped"]

_OOM_SCORE_ADJ = "/proc/self/oom_score_adj"
_OOM_LOWEST = -1000  # OOM_SCORE_ADJ_MIN: never chosen


class ThreadScheduling(Value):
    """How one thread is scheduled: sched(7).

    tid            the thread, as the kernel numbers it
    policy         its number: os.SCHED_OTHER, os.SCHED_FIFO and so on
    priority       of the real-time policies; 0 for others
    nice           of the others; 0 for real-time policies
    reset_on_fork  whether new threads and children begin as ordinary ones
    """

    __slots__ = (  # noqa: RUF023
        "tid",
        "policy",
        "priority",
        "nice",
        "reset_on_fork",
    )

    tid: int
    policy: int
    priority: int
    nice: int
    reset_on_fork: bool

    def __init__(
        self,
        tid: int,
        policy: int,
        priority: int,
        nice: int,
        reset_on_fork: bool,
    ) -> None:
        self._set(tid, policy, priority, nice, reset_on_fork)

    def as_dict(self) -> dict[str, object]:
        """Give the fields, ready for JSON."""
        return dict(zip(self.__slots__, self._fields(), strict=True))

    def __str__(self) -> str:
        name = policy_name(self.policy)
        if name in ("SCHED_FIFO", "SCHED_RR"):
            return f"{name} {self.priority}"
        return f"{name} nice {self.nice}"


class Step(Value):
    """What one step came to.

    name     memory, oom, scheduling or warm_up
    status   'done', 'not allowed' (a right, a limit or a policy forbids it),
             'not available' (the kernel has it not, or hides it; no /proc) or
             'skipped'
    why      what was found and, where something is missing, what to do
    changed  whether anything is different now
    before   what was there before, and
    now      what is there now, or None if it cannot be told or does not
             apply.  memory: locked bytes of address space (VmLck of
             /proc/PID/status); oom: oom_score_adj; scheduling: a
             ThreadScheduling; warm_up: only now, the milliseconds it took
    """

    __slots__ = (  # noqa: RUF023
        "name",
        "status",
        "why",
        "changed",
        "before",
        "now",
    )

    name: str
    status: Status
    why: str
    changed: bool
    before: ThreadScheduling | int | None
    now: ThreadScheduling | float | None

    def __init__(
        self,
        name: str,
        status: Status,
        why: str,
        changed: bool = False,
        before: ThreadScheduling | int | None = None,
        now: ThreadScheduling | float | None = None,
    ) -> None:
        self._set(name, status, why, changed, before, now)

    def as_dict(self) -> dict[str, object]:
        """Give the fields, ready for JSON."""
        return {
            name: (
                field.as_dict()
                if isinstance(field, ThreadScheduling)
                else field
            )
            for name, field in zip(self.__slots__, self._fields(), strict=True)
        }

    def __str__(self) -> str:
        return f"{self.name}: {self.status}: {self.why}"


class Hardening(Value):
    """What harden() did and could not do: a Step for each of its arguments.

    memory, oom, scheduling, warm_up

    A context manager: at the end of the with statement, undo() is called.
    """

    __slots__ = ("memory", "oom", "scheduling", "warm_up")

    memory: Step
    oom: Step
    scheduling: Step
    warm_up: Step

    def __init__(
        self, memory: Step, oom: Step, scheduling: Step, warm_up: Step
    ) -> None:
        self._set(memory, oom, scheduling, warm_up)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in the order in which they were taken."""
        return self.memory, self.oom, self.scheduling, self.warm_up

    def undo(self) -> tuple[Step, ...]:
        """Put back what was there before, and tell what came of it.

        The latest first: what somebody else has changed since is left as it
        is, so a second undo() changes nothing.  Raises nothing.

        Not put back:
        - what was locked by mlock(2), before or since, is unlocked too:
          munlockall(2) knows no difference;
        - the scheduling, when called from another thread or in a forked
          child: theirs was not changed;
        - reset-on-fork, where the thread has no CAP_SYS_NICE (sched(7));
        - the lowest oom_score_adj that is allowed without CAP_SYS_RESOURCE,
          which the kernel sets along with the value and shows to nobody;
        - the warm-up.
        """
        return (
            _guarded("scheduling", lambda: _undo_scheduling(self.scheduling)),
            _guarded("oom", lambda: _undo_oom(self.oom)),
            _guarded("memory", lambda: _undo_memory(self.memory)),
        )

    def as_dict(self) -> dict[str, object]:
        """Give all of it, ready for JSON."""
        return {step.name: step.as_dict() for step in self.steps}

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def harden(
    *,
    memory: bool = True,
    oom: bool = True,
    scheduling: bool = True,
    warm_up: bool = True,
) -> Hardening:
    """Prepare this process to kill when memory is short; tell what was done.

    A killer is needed when the machine thrashes: then its own pages have been
    taken away, it does not get to run, or it is the OOM killer's choice.  Call
    this at start, from the thread that will kill, after giving up privileges.
    A step that is not allowed or not available is told, and the others go on.

    memory: mlockall(2), each page from its first use on (MCL_ONFAULT, Linux
    4.4): big stacks that are hardly used take no memory.  For the whole
    process, and children do not inherit it.  Needs CAP_IPC_LOCK or a
    RLIMIT_MEMLOCK without a limit.  With a finite limit, mappings to come
    would fail when it is reached, malloc() with them, and the main thread
    would die when its stack grows.  So then only what is mapped now is locked,
    if the limit has room for it and for the main stack, else nothing.  The
    same threatens a process that gives up CAP_IPC_LOCK later.

    oom: oom_score_adj of -1000, where the kernel's OOM killer never chooses
    the process; needs CAP_SYS_RESOURCE.  Without, the lowest that is allowed:
    the last value set by somebody with that right (proc(5)).  Children inherit
    it and are protected too, unless they write another value to their own
    /proc/self/oom_score_adj, which needs no right.

    scheduling: of the calling thread alone: SCHED_FIFO 1, else the best nice
    that is allowed (CAP_SYS_NICE, RLIMIT_RTPRIO, RLIMIT_NICE).  New threads
    and children begin as ordinary ones (SCHED_RESET_ON_FORK).  No SCHED_FIFO
    where RLIMIT_RTTIME is set: a thread that computes for long would be
    killed.  Where it waits for Python's GIL it waits for threads that were
    not raised.

    warm_up: two children are forked; one is killed and released by a Reaper,
    where there can be one, then the other by kill(), so that what a kill
    needs is in memory, and stays there if it is locked.  They send no SIGCHLD
    and are not seen by wait(); audit hooks do hear mrelease.kill.

    Raises TypeError if an argument is no bool, before anything is changed;
    nothing else.  A seccomp policy that kills the caller of mlockall(2) or
    sched_setattr(2), rather than to answer with an error, kills this process:
    leave that step out.
    """
    for name, value in (
        ("memory", memory),
        ("oom", oom),
        ("scheduling", scheduling),
        ("warm_up", warm_up),
    ):
        if not isinstance(value, bool):
            raise TypeError(
                f"{name} must be a bool, not {type(value).__name__}"
            )
    # The warm-up comes last: what it brings in is locked then.
    return Hardening(
        _step("memory", memory, _lock_memory),
        _step("oom", oom, _protect),
        _step("scheduling", scheduling, _raise_thread),
        _step("warm_up", warm_up, _warm_up),
    )


def _step(name: str, wanted: bool, take: Callable[[], Step]) -> Step:
    if not wanted:
        return Step(name, "skipped", "not asked for")
    return _guarded(name, take)


def _guarded(name: str, take: Callable[[], Step]) -> Step:
    """Take a step; an error that it does not expect is what it came to."""
    try:
        return take()
    except OSError as error:
        status, why = _refusal(error)
        return Step(name, status, why)
    except Exception as error:  # noqa: BLE001 - an audit hook raises anything
        kind = type(error).__name__
        return Step(name, "not available", f"{kind}: {error}")


def _refusal(error: OSError) -> tuple[Status, str]:
    refused = (EPERM, EACCES, EROFS, ENOMEM, EAGAIN)
    why = error.strerror or str(error)
    if error.filename is not None:
        why = f"{error.filename}: {why}"
    return "not allowed" if error.errno in refused else "not available", why


# ------------------------------------------------------------------ memory


def _sizes() -> dict[str, int]:
    """Read VmSize, VmLck, VmStk, in bytes; without /proc, nothing."""
    try:
        # Not /proc/self: of a main thread that has ended it tells nothing.
        fields = read_fields("/proc/thread-self/status")
        return {
            name: int(fields[name].split()[0]) * 1024
            for name in ("VmSize", "VmLck", "VmStk")
        }
    except Exception:  # noqa: BLE001 - see _guarded(); it is told as None
        return {}


_GRANT_LOCK = (
    "grant CAP_IPC_LOCK, or raise RLIMIT_MEMLOCK (systemd: "
    "LimitMEMLOCK=infinity)"
)


def _lock_memory() -> Step:
    import resource

    sizes = _sizes()
    before = sizes.get("VmLck")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if _mrelease.locks_future():
        return Step(
            "memory",
            "done",
            "it was locked before, by an earlier mlockall()",
            before=before,
            now=before,
        )
    future = _mrelease.may_lock_all()
    if not future:
        problem = _no_room(limit, sizes)
        if problem:
            return Step(
                "memory",
                "not allowed",
                f"{problem}: {_GRANT_LOCK}",
                before=before,
                now=before,
            )
    try:
        _mrelease.lock_memory(future)
    except OSError as error:
        status, why = _refusal(error)
        if error.errno == EINVAL:
            why = f"{why}: MCL_ONFAULT needs Linux 4.4"
        elif error.errno == EPERM and future:
            why = f"{why}: a security policy (seccomp) forbids mlockall"
        elif error.errno in (EPERM, ENOMEM):
            why = f"{why}: {_GRANT_LOCK}"
        return Step(
            "memory", status, f"mlockall: {why}", before=before, now=before
        )
    now = _sizes().get("VmLck")
    size = "" if now is None else f", {in_units(now)} of address space"
    if future:
        why = "what is mapped now or later is locked once it is used" + size
    else:
        why = (
            f"what is mapped now is locked once it is used{size}; not what "
            f"is mapped later, which could fail with a RLIMIT_MEMLOCK of "
            f"{in_units(limit)}: {_GRANT_LOCK}"
        )
    return Step("memory", "done", why, True, before, now)


def _no_room(limit: int, sizes: dict[str, int]) -> str | None:
    """Say why locking what is mapped now would be refused or dangerous."""
    import resource

    allowed = f"RLIMIT_MEMLOCK is {in_units(limit)}"
    if not sizes:
        return (
            f"{allowed}, and whether that is enough cannot be told: "
            "/proc/thread-self/status cannot be read"
        )
    # A locked stack that may not grow any more is a SIGSEGV (mm/mmap.c,
    # acct_stack_growth()).  Other locked mappings grow by mremap() alone,
    # which may fail: realloc() then copies.
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if stack == resource.RLIM_INFINITY:
        return f"{allowed}, and the main stack may grow without a limit"
    need = sizes["VmSize"] + max(0, stack - sizes["VmStk"])
    if need > limit:
        return (
            f"{allowed}, and this process and its main stack may need "
            f"{in_units(need)}"
        )
    return None


def _undo_memory(step: Step) -> Step:
    if not step.changed:
        return Step("memory", "skipped", "nothing was changed")
    before = _sizes().get("VmLck")
    if not before and not _mrelease.locks_future():
        return Step(
            "memory",
            "skipped",
            "nothing is locked (any more, or in this child)",
            before=before,
            now=before,
        )
    _mrelease.unlock_memory()
    now = _sizes().get("VmLck")
    why = "all is unlocked"
    if step.before:
        why += (
            f", also {in_units(int(_number(step.before)))} that were locked "
            "before"
        )
    return Step("memory", "done", why, True, before, now)


# --------------------------------------------------------------------- oom


def _open_oom(flags: int) -> int:
    try:
        return os.open(_OOM_SCORE_ADJ, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != ENOENT:
            raise
        raise OSError(
            ENOENT, "not there: is /proc mounted?", _OOM_SCORE_ADJ
        ) from None


def _read_oom(fd: int) -> int:
    return int(os.pread(fd, 32, 0))


def _may_write_oom(fd: int, value: int) -> bool:
    try:
        os.write(fd, b"%d" % value)
    except PermissionError:
        return False
    return True


def _lowest_oom(fd: int, before: int) -> int:
    """Set the lowest that is allowed, which can only be tried out."""
    if _may_write_oom(fd, _OOM_LOWEST):
        return _OOM_LOWEST
    refused, allowed = _OOM_LOWEST, before
    while allowed - refused > 1:
        middle = (allowed + refused) // 2
        if _may_write_oom(fd, middle):
            allowed = middle
        else:
            refused = middle
    return allowed


_GRANT_OOM = "grant CAP_SYS_RESOURCE (systemd: OOMScoreAdjust=-1000)"


def _protect() -> Step:
    fd = _open_oom(os.O_RDWR)
    try:
        before = _read_oom(fd)
        if before == _OOM_LOWEST:
            return Step("oom", "done", "it was -1000", False, before, before)
        now = _lowest_oom(fd, before)
    finally:
        os.close(fd)
    if now == _OOM_LOWEST:
        why = f"oom_score_adj is -1000, was {before}; children inherit it"
        return Step("oom", "done", why, True, before, now)
    if now < before:
        why = (
            f"oom_score_adj is {now}, the lowest that is allowed, was "
            f"{before}; children inherit it; for -1000, {_GRANT_OOM}"
        )
        return Step("oom", "done", why, True, before, now)
    why = f"oom_score_adj stays {before}: {_GRANT_OOM}"
    return Step("oom", "not allowed", why, False, before, before)


def _number(value: ThreadScheduling | float | None) -> float:
    assert isinstance(value, (int, float))
    return value


def _undo_oom(step: Step) -> Step:
    if not step.changed:
        return Step("oom", "skipped", "nothing was changed")
    wanted = int(_number(step.before))
    fd = _open_oom(os.O_RDWR)
    try:
        before = _read_oom(fd)
        if before != step.now:
            why = f"oom_score_adj is {before}, which harden() did not set"
            return Step("oom", "skipped", why, False, before, before)
        os.write(fd, b"%d" % wanted)
    finally:
        os.close(fd)
    why = f"oom_score_adj is {wanted} again"
    return Step("oom", "done", why, True, before, wanted)


# -------------------------------------------------------------- scheduling


def _scheduling() -> ThreadScheduling:
    return ThreadScheduling(get_native_id(), *_mrelease.get_scheduling())


def _raise_thread() -> Step:
    import resource

    before = _scheduling()
    unlimited = resource.RLIM_INFINITY
    realtime = resource.getrlimit(resource.RLIMIT_RTTIME)[0] == unlimited
    reason = "" if realtime else ", not real-time since RLIMIT_RTTIME is set"
    try:
        _mrelease.raise_scheduling(realtime)
    except OSError as error:
        status, why = _refusal(error)
        if error.errno == EPERM:
            why = (
                f"this thread stays {before}{reason}: grant CAP_SYS_NICE, "
                "or raise RLIMIT_RTPRIO or RLIMIT_NICE"
            )
        else:
            why = f"sched_setattr: {why}"
        return Step("scheduling", status, why, False, before, before)
    now = _scheduling()
    if now == before:
        why = f"this thread was {before}"
    else:
        why = f"this thread is {now}{reason}, was {before}"
    return Step("scheduling", "done", why, now != before, before, now)


def _undo_scheduling(step: Step) -> Step:
    wanted = step.before
    if not step.changed or not isinstance(wanted, ThreadScheduling):
        return Step("scheduling", "skipped", "nothing was changed")
    before = _scheduling()
    if before.tid != wanted.tid:
        why = (
            f"thread {wanted.tid} was raised, and this is thread {before.tid}"
        )
        return Step("scheduling", "not available", why, False, before, before)
    if before != step.now:
        why = f"this thread is {before}, which harden() did not set"
        return Step("scheduling", "skipped", why, False, before, before)
    policy, priority, nice = wanted.policy, wanted.priority, wanted.nice
    try:
        _mrelease.set_scheduling(policy, priority, nice, wanted.reset_on_fork)
    except PermissionError:
        # To go down is always allowed, to drop this flag is not.
        _mrelease.set_scheduling(policy, priority, nice, True)
    now = _scheduling()
    why = f"this thread is {now} again"
    if now.reset_on_fork != wanted.reset_on_fork:
        why += "; reset-on-fork stays without CAP_SYS_NICE"
    return Step("scheduling", "done", why, True, before, now)


# ----------------------------------------------------------------- warm-up


def _warm_up() -> Step:
    if next_child_is_init():
        return Step(
            "warm_up",
            "not available",
            "the child would be the init of a new pid namespace (unshare), "
            "and end it: have one there first",
        )
    begun = monotonic_ns()
    without = ""
    children: list[int] = []
    try:
        # Both before any is killed: a fork makes the first write to each page
        # a fault, and those of a kill are to be behind us.
        children.append(_mrelease.start_child())
        try:
            children.append(_mrelease.start_child())
            with Reaper(1, spares=0) as reaper:
                reaper.kill(children[0]).result()
        except OSError as error:
            without = f", without a Reaper: {error.strerror}"
        release = kill(children[-1])
    except OSError as error:
        status, why = _refusal(error)
        return Step("warm_up", status, f"no child could be made: {why}")
    finally:
        for pid in children:
            _mrelease.end_child(pid)
    took = (monotonic_ns() - begun) / 1e6
    why = (
        f"a child was forked and killed in {took:.1f} ms ({release}){without}"
    )
    return Step("warm_up", "done", why, now=took)
