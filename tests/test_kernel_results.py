"""Every result that process_mrelease(2) can give, from the real kernel.

For each one: what process_mrelease() raises, and, where it can come up in a
kill, what kill() and Victim.release() make of it. What no victim brings
about (EAGAIN, EINTR, EPERM, ENOSYS) is answered by seccomp, so it comes from
the system call all the same.

The sections have the order of the kernel's checks.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

import cgroups
import kernel_errors
import victims
from kernel_errors import ALLOW, BLOCK, Call
from kill_ways import by_reaper
from mrelease import Outcome, Release, Victim, process_mrelease

if TYPE_CHECKING:
    from contextlib import ExitStack

    from kill_ways import Kill

MIB = 1 << 20
SIZE = 16

Answered: TypeAlias = Callable[
    [dict[str, kernel_errors.Rule]], kernel_errors.answered
]


def failed(pidfd: object, *flags: object) -> str:
    """The name of the errno with which process_mrelease() fails."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - by its errno
        process_mrelease(pidfd, *flags)  # type: ignore[arg-type]
    assert caught.value.errno is not None
    # The subclass belongs to the errno: as if made by Python itself.
    assert type(caught.value) is type(OSError(caught.value.errno, ""))
    assert caught.value.strerror == os.strerror(caught.value.errno)
    return errno.errorcode[caught.value.errno]


def in_a_child(
    kill: Kill, kernel: kernel_errors.answered, pid: int, **terms: float
) -> Release:
    """kill() in a child for which the kernel answers as told."""
    return kernel.run(functools.partial(kill, pid, **terms))  # type: ignore[arg-type]


def check_calls(
    kernel: kernel_errors.answered, count: int, kill: Kill
) -> None:
    made = kernel.count("process_mrelease")
    # The thread of a Reaper may call some times before SIGKILL is sent.
    assert made == count or (kill is by_reaper and made > count)


def is_plain_success(release: Release) -> bool:
    return (
        release.outcome is Outcome.RELEASED
        and release.freed
        and release.errno is None
        and release.released is not None
    )


# -------------------------------------------------- EINVAL: the flags, first


@pytest.mark.parametrize("flags", [1, 2, 1 << 31, (1 << 32) - 1, True])
@pytest.mark.needs("release")
def test_einval_for_flags_which_are_looked_at_before_the_fd(
    flags: int,
) -> None:
    assert failed(-1, flags) == "EINVAL"
    assert failed(victims.PAGE, flags) == "EINVAL"


@pytest.mark.needs("release")
def test_einval_for_flags_on_a_dying_victim_whose_memory_stays() -> None:
    with victims.held(SIZE, killed=True) as victim:
        assert failed(victim.pidfd, 1) == "EINVAL"
        assert victim.rss_anon() >= SIZE * MIB


# ----------------------------------------------------------- EBADF: the fd


@pytest.mark.needs("release")
def test_ebadf_for_a_closed_fd() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    assert failed(fd) == "EBADF"
    with pytest.raises(ValueError, match="not open"):
        Victim.from_pidfd(fd)


@pytest.mark.needs("release")
def test_ebadf_for_a_closed_pidfd() -> None:
    with victims.held(SIZE, killed=True) as victim:
        fd = os.dup(victim.pidfd)
        os.close(fd)
        assert failed(fd) == "EBADF"


@pytest.mark.parametrize("fd", [-1, -(1 << 31), (1 << 31) - 1])
@pytest.mark.needs("release")
def test_ebadf_for_a_number_that_is_no_fd(fd: int) -> None:
    assert failed(fd) == "EBADF"


@pytest.mark.needs("release")
def test_ebadf_for_an_ordinary_file() -> None:
    with tempfile.TemporaryFile() as file:
        assert failed(file.fileno()) == "EBADF"
        assert failed(file) == "EBADF"
        with pytest.raises(ValueError, match="not a pidfd"):
            Victim.from_pidfd(file)


@pytest.mark.needs("release")
def test_ebadf_for_a_directory_of_proc() -> None:
    """pidfd_send_signal(2) takes one, this call does not."""
    with victims.held(SIZE, killed=True) as victim:
        fd = os.open(f"/proc/{victim.pid}", os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert failed(fd) == "EBADF"
            with pytest.raises(ValueError, match="not a pidfd"):
                Victim.from_pidfd(fd)
        finally:
            os.close(fd)
        assert victim.rss_anon() >= SIZE * MIB


# --------------------------------------------- ESRCH: nobody, or no memory


@pytest.mark.needs("release")
def test_esrch_for_a_reaped_process(kill: Kill) -> None:
    with victims.asleep(SIZE) as victim, Victim(victim.pid) as pinned:
        victim.popen.kill()
        victim.wait()
        assert failed(victim.pidfd) == "ESRCH"
        with pytest.raises(ProcessLookupError, match=f"pid {victim.pid}"):
            kill(pinned)
        release = pinned.release()
        assert release.outcome is Outcome.EXITED
        assert release.signalled is None
        assert release.attempts == 0
    with pytest.raises(ProcessLookupError, match=f"pid {victim.pid}"):
        kill(victim.pid)


@pytest.mark.needs("release")
def test_esrch_for_a_zombie(kill: Kill) -> None:
    with victims.zombie(SIZE) as victim:
        assert failed(victim.pidfd) == "ESRCH"
        with Victim(victim.pid) as pinned:
            for release in (kill(pinned), pinned.release()):
                assert release.outcome is Outcome.EXITED
                assert release.exited is not None
        # It is the parent's business still.
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("kernel_thread")
@pytest.mark.needs("release")
def test_esrch_for_a_kernel_thread(kill: Kill) -> None:
    pid = victims.kernel_thread()
    fd = os.pidfd_open(pid)
    try:
        assert failed(fd) == "ESRCH"
        with pytest.raises(ValueError, match="kernel thread"):
            Victim.from_pidfd(fd)
    finally:
        os.close(fd)
    with pytest.raises(ValueError, match="kernel thread"):
        kill(pid)


def open_thread_pidfd(tid: int) -> int:
    """pidfd_open(2) with PIDFD_THREAD (Linux 6.9), which is O_EXCL."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(
        ctypes.c_long(kernel_errors.number("pidfd_open")),
        ctypes.c_int(tid),
        ctypes.c_uint(os.O_EXCL),
    )
    if fd < 0:
        if ctypes.get_errno() == errno.EINVAL:
            raise cgroups.Unavailable("no PIDFD_THREAD before Linux 6.9")
        raise OSError(ctypes.get_errno(), "pidfd_open")
    return fd


def test_esrch_for_a_thread_that_is_not_the_leader(kill: Kill) -> None:
    with victims.held(SIZE, threads=2) as victim:
        tid = victim.tids()[1]
        fd = open_thread_pidfd(tid)
        try:
            victim.popen.kill()
            victims.wait_held(victim)
            assert failed(fd) == "ESRCH"
            with pytest.raises(ValueError, match="thread"):
                Victim.from_pidfd(fd)
            with pytest.raises(ValueError, match="thread"):
                kill(tid)
            assert victim.rss_anon() >= SIZE * MIB
            # By the leader's it is within reach.
            process_mrelease(victim.pidfd)
            assert victim.rss_anon() == 0
        finally:
            os.close(fd)


def out_of_reach(
    stack: ExitStack, meter: cgroups.Meter
) -> tuple[victims.Process, Victim]:
    """A victim past exit_mm() in the midst of a long exit_mmap().

    It has SCHED_IDLE and nearly no CPU: what follows exit_mm() takes it
    seconds. Was much of it done before anybody could look, another is tried.
    """
    for _ in range(10):
        victim = stack.enter_context(victims.starved(128, groups=[meter]))
        pinned = stack.enter_context(Victim(victim.pid))
        victim.popen.kill()
        victims.wait_until(lambda v=victim: not v.has_mm(), "past exit_mm()")  # type: ignore[misc]
        if not victim.ended() and meter.usage() > 96 * MIB:
            return victim, pinned
        victim.close()
    raise cgroups.Unavailable("10 victims were not starved enough")


@pytest.mark.needs("starved", "seccomp")
@pytest.mark.needs("release")
def test_esrch_for_a_victim_out_of_reach_with_its_memory_still_held(
    stack: ExitStack, meter: cgroups.Meter, answered: Answered
) -> None:
    # Not raised, or it would be gone.
    kernel = answered({"sched_setattr": errno.EPERM})
    for _ in range(5):
        victim, pinned = out_of_reach(stack, meter)
        assert failed(victim.pidfd) == "ESRCH"
        held = meter.usage()
        first = kernel.in_thread(pinned.release, timeout=0)
        if not victim.ended():
            break
        assert first.outcome in (Outcome.EXITING, Outcome.EXITED), first
        victim.close()
    else:
        raise cgroups.Unavailable("5 victims were not starved enough")

    assert held > 16 * MIB
    assert meter.usage() > 8 * MIB

    # Not ended at the deadline: on its way.
    for release in (first, kernel.in_thread(pinned.kill, timeout=0)):
        assert release.outcome is Outcome.EXITING, release
        assert not release.freed
        assert release.errno == errno.ESRCH
        assert release.exited is None
        assert release.attempts == 1
        assert not release.raised
    assert not victim.ended()
    assert meter.usage() > 8 * MIB

    # Later, raised or not, it has ended.
    later = pinned.release(timeout=60)
    assert later.outcome is Outcome.EXITED
    assert later.exited is not None
    assert victim.ended()
    assert meter.usage() < 8 * MIB


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_esrch_without_an_end_is_exiting_at_the_deadline(
    answered: Answered,
    kill: Kill,
) -> None:
    with victims.held(SIZE) as victim:
        kernel = answered({"process_mrelease": errno.ESRCH})
        release = in_a_child(kill, kernel, victim.pid, timeout=0.05)
        assert release.outcome is Outcome.EXITING
        assert not release.freed
        assert release.errno == errno.ESRCH
        assert release.exited is None
        assert victim.rss_anon() >= SIZE * MIB


@pytest.mark.needs("seccomp")
def test_esrch_and_an_end_before_the_deadline_is_exited(
    answered: Answered,
    kill: Kill,
) -> None:
    with victims.asleep(SIZE) as victim:
        kernel = answered({"process_mrelease": errno.ESRCH})
        release = in_a_child(kill, kernel, victim.pid, timeout=30)
        assert release.outcome is Outcome.EXITED
        assert release.freed
        assert release.errno == errno.ESRCH
        assert release.exited is not None
        assert release.released is None
        assert victim.ended()


# --------------------------------------- EINVAL: not dying, dumping, shared


@pytest.mark.needs("release")
def test_einval_for_a_live_process_which_goes_on() -> None:
    with victims.spinning(SIZE) as victim, Victim(victim.pid) as pinned:
        assert failed(victim.pidfd) == "EINVAL"
        release = pinned.release(timeout=30)
        assert release.outcome is Outcome.ALIVE
        assert not release.freed
        assert release.errno == errno.EINVAL
        assert release.attempts == 1
        assert release.signalled is None
        assert not release.raised
        assert victim.rss_anon() >= SIZE * MIB
        assert victim.state() == "R"


@pytest.mark.parametrize("kind", ["asleep", "stopped", "frozen"])
@pytest.mark.needs("release")
def test_einval_for_a_live_process_that_does_not_run(kind: str) -> None:
    victims.need(kind)
    with victims.kinds()[kind](SIZE) as victim:
        assert failed(victim.pidfd) == "EINVAL"
        with Victim(victim.pid) as pinned:
            release = pinned.release(timeout=30)
        assert release.outcome is Outcome.ALIVE
        assert not release.freed
        assert victim.rss_anon() >= SIZE * MIB


@pytest.mark.needs("release")
def test_einval_after_a_signal_that_the_victim_handles_or_ignores() -> None:
    with victims.asleep(SIZE, sigterm="ignore") as victim:
        victim.popen.terminate()
        assert failed(victim.pidfd) == "EINVAL"
        assert victim.rss_anon() >= SIZE * MIB


@pytest.mark.needs("release")
def test_einval_for_a_dead_leader_with_live_threads(kill: Kill) -> None:
    with victims.zombie_leader(SIZE) as victim:
        assert failed(victim.pidfd) == "EINVAL"
        with Victim(victim.pid) as pinned:
            release = pinned.release(timeout=30)
            assert release.outcome is Outcome.ALIVE
            assert not release.freed
            assert not victim.ended()
            assert victim.states() == "ZS"

            release = kill(pinned, timeout=30)
        assert release.outcome in (Outcome.RELEASED, Outcome.EXITED)
        assert release.freed
        assert release.exited is not None
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("release")
def test_a_dead_leader_is_no_hindrance_once_the_threads_are_dying(
    kill: Kill,
) -> None:
    with (
        cgroups.Freezer(version=1) as group,
        victims.zombie_leader(SIZE, groups=[group]) as victim,
    ):
        victim.also(let_go=group.let_go)
        group.freeze()
        release = kill(victim.pid)
        assert is_plain_success(release), release
        assert release.exited is None
        assert not victim.ended()
        # The leader has no memory: the thread that has it tells.
        status = Path(f"/proc/{victim.pid}/task/{victim.tids()[1]}/status")
        assert "RssAnon:\t       0 kB" in status.read_text()


@pytest.mark.needs("release")
def test_einval_for_memory_shared_with_a_live_process() -> None:
    with victims.held(SIZE, sharer=True, killed=True) as victim:
        assert failed(victim.pidfd) == "EINVAL"
        with Victim(victim.pid) as pinned:
            release = pinned.release(timeout=0.05)
            assert release.outcome is Outcome.SHARED
            assert not release.freed
            assert release.errno == errno.EINVAL
            assert victim.rss_anon() >= SIZE * MIB

            # The sharer dies: now it is the victim's alone.
            victim.end_sharer()
            assert is_plain_success(pinned.release())
        assert victim.rss_anon() == 0


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.needs("release")
def test_kill_tells_that_a_live_process_shares_the_memory(
    threads: int, meter: cgroups.Meter, kill: Kill
) -> None:
    with victims.shared(SIZE, threads=threads, groups=[meter]) as victim:
        release = kill(victim.pid, timeout=0.2)
        assert release.outcome is Outcome.SHARED, release
        assert not release.freed
        assert victim.wait() == -signal.SIGKILL
        assert meter.usage() > SIZE * MIB


@pytest.mark.needs("core_dumping")
@pytest.mark.needs("release")
def test_einval_while_a_core_dump_is_in_progress(kill: Kill) -> None:
    with victims.core_dumping(SIZE) as victim:
        assert failed(victim.pidfd) == "EINVAL"
        with Victim(victim.pid) as pinned:
            for call in (pinned.release, functools.partial(kill, pinned)):
                release = call(timeout=0.05)
                assert release.outcome is Outcome.DUMPING, release
                assert not release.freed
                assert release.errno == errno.EINVAL
                assert not release.raised
                assert victim.core_dumping()
                assert victim.rss_anon() >= SIZE * MIB
            victim.let_go()
            release = pinned.release(timeout=30)
            assert release.outcome in (Outcome.EXITED, Outcome.RELEASED)
        assert victim.ended()


# ----------------------------------------------------------------- success


@pytest.mark.needs("release")
def test_success_for_a_victim_that_is_dying_and_has_not_ended() -> None:
    with victims.held(SIZE, killed=True) as victim:
        assert victim.rss_anon() >= SIZE * MIB
        process_mrelease(victim.pidfd)
        assert victim.rss_anon() == 0
        assert not victim.ended()


@pytest.mark.needs("release")
def test_success_in_kill(kill: Kill) -> None:
    with victims.held(SIZE) as victim:
        release = kill(victim.pid)
        assert is_plain_success(release), release
        assert release.attempts == 1
        assert victim.rss_anon() == 0


@pytest.mark.needs("release")
def test_success_in_release_after_another_s_kill() -> None:
    with victims.held(SIZE) as victim, Victim(victim.pid) as pinned:
        victim.popen.kill()
        release = pinned.release()
        assert is_plain_success(release), release
        assert release.signalled is None
        assert victim.rss_anon() == 0


@pytest.mark.needs("frozen")
@pytest.mark.needs("release")
def test_success_at_once_before_the_victim_has_run_at_all() -> None:
    """SIGKILL marks the whole process as dying when it is sent."""
    with victims.frozen(SIZE) as victim:
        victim.popen.kill()
        process_mrelease(victim.pidfd)
        assert victim.rss_anon() == 0
        assert not victim.ended()


@pytest.mark.needs("in_d_state")
@pytest.mark.needs("release")
def test_success_after_a_sigterm_of_which_the_victim_dies() -> None:
    """It marks the process as dying when it is sent, too.

    Not so in a stopped, traced or (version 1) frozen one, which takes
    any signal but SIGKILL only when it runs again.
    """
    with victims.in_d_state(SIZE, sigterm="default") as victim:
        assert failed(victim.pidfd) == "EINVAL"
        victim.popen.terminate()
        process_mrelease(victim.pidfd)
        assert victim.rss_anon() == 0


@pytest.mark.needs("release")
def test_success_again_for_the_second_call(kill: Kill) -> None:
    with victims.held(SIZE, killed=True) as victim:
        process_mrelease(victim.pidfd)
        process_mrelease(victim.pidfd)
        with Victim(victim.pid) as pinned:
            assert is_plain_success(pinned.release())
            assert is_plain_success(kill(pinned))


# -------------------------------------------------------------- EAGAIN


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_eagain_is_raised_by_process_mrelease_and_not_retried(
    answered: Answered,
) -> None:
    with victims.held(SIZE, killed=True) as victim:
        kernel = answered({"process_mrelease": [errno.EAGAIN, ALLOW]})

        def twice() -> str:
            first = failed(victim.pidfd)
            process_mrelease(victim.pidfd)
            return first

        assert kernel.run(twice) == "EAGAIN"
        assert kernel.count("process_mrelease") == 2
        assert victim.rss_anon() == 0


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_eagain_then_success_is_released_with_its_attempts_counted(
    answered: Answered,
    kill: Kill,
) -> None:
    with victims.held(SIZE) as victim:
        kernel = answered({"process_mrelease": [errno.EAGAIN] * 2 + [ALLOW]})
        release = in_a_child(kill, kernel, victim.pid, timeout=30)
        assert is_plain_success(release), release
        assert release.attempts == 3
        check_calls(kernel, 3, kill)
        assert victim.rss_anon() == 0
        first, second, third = (call.time for call, _ in kernel.calls[:3])
        assert second - first >= 0.0005  # a pause, no spinning
        assert third - second >= 0.0005


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_eagain_then_success_in_release(answered: Answered) -> None:
    with victims.held(SIZE, killed=True) as victim:
        kernel = answered({"process_mrelease": [errno.EAGAIN] * 4 + [ALLOW]})

        def release() -> Release:
            with Victim(victim.pid) as pinned:
                return pinned.release(timeout=30)

        result = kernel.run(release)
        assert is_plain_success(result), result
        assert result.attempts == 5


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_eagain_for_ever_is_partial_at_the_deadline(
    answered: Answered,
    kill: Kill,
) -> None:
    with victims.held(SIZE) as victim:
        kernel = answered({"process_mrelease": errno.EAGAIN})
        begin = time.monotonic()
        release = in_a_child(kill, kernel, victim.pid, timeout=0.2)
        assert time.monotonic() - begin >= 0.2
        assert release.outcome is Outcome.PARTIAL
        assert not release.freed
        assert release.errno == errno.EAGAIN
        assert release.attempts > 5
        assert release.released is None
        assert release.exited is None
        assert victim.rss_anon() >= SIZE * MIB


@pytest.mark.needs("seccomp")
def test_eagain_for_ever_is_exited_if_the_victim_can_end(
    answered: Answered,
    kill: Kill,
) -> None:
    with victims.asleep(SIZE) as victim:
        kernel = answered({"process_mrelease": errno.EAGAIN})
        release = in_a_child(kill, kernel, victim.pid, timeout=30)
        assert release.outcome is Outcome.EXITED
        assert release.freed
        assert release.errno == errno.EAGAIN
        assert release.exited is not None
        assert release.exited < 30


# --------------------------------------------------------------- EINTR


def interrupts(call: Call) -> int:
    """The signal is there when the call returns."""
    os.kill(call.tid, signal.SIGUSR1)
    return errno.EINTR


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_eintr_then_success_in_kill(answered: Answered, kill: Kill) -> None:
    with victims.held(SIZE) as victim:
        kernel = answered({"process_mrelease": [errno.EINTR] * 2 + [ALLOW]})
        release = in_a_child(kill, kernel, victim.pid, timeout=30)
        assert is_plain_success(release), release
        assert release.attempts == 3
        check_calls(kernel, 3, kill)
        assert victim.rss_anon() == 0


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_eintr_is_retried_by_process_mrelease_after_the_handler_has_run(
    answered: Answered,
) -> None:
    """PEP 475."""
    with victims.held(SIZE, killed=True) as victim:
        kernel = answered({"process_mrelease": [interrupts] * 3 + [ALLOW]})

        def run() -> int:
            runs = []
            signal.signal(signal.SIGUSR1, lambda *_: runs.append(1))
            process_mrelease(victim.pidfd)
            return len(runs)

        assert kernel.run(run) == 3
        assert kernel.count("process_mrelease") == 4
        assert victim.rss_anon() == 0


class Enough(Exception):
    """What the handler of the test below raises."""


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_eintr_ends_process_mrelease_if_the_handler_raises(
    answered: Answered,
) -> None:
    """PEP 475 too."""
    with victims.held(SIZE, killed=True) as victim:
        kernel = answered({"process_mrelease": [interrupts, ALLOW]})

        def handler(*_: object) -> None:
            raise Enough

        def run() -> None:
            signal.signal(signal.SIGUSR1, handler)
            process_mrelease(victim.pidfd)

        with pytest.raises(Enough):
            kernel.run(run)
        assert kernel.count("process_mrelease") == 1
        assert victim.rss_anon() >= SIZE * MIB


@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_only_a_fatal_signal_ends_the_wait_inside_the_call(
    answered: Answered,
) -> None:
    """What stands for mmap_lock here is killable, as that wait is."""
    with victims.held(SIZE, killed=True) as victim:
        kernel = answered({"process_mrelease": BLOCK})
        job = kernel.start(process_mrelease, victim.pidfd)
        kernel.blocked()
        job.signal(signal.SIGKILL)
        with pytest.raises(kernel_errors.ChildKilled) as caught:
            job.result()
        assert caught.value.signal == signal.SIGKILL
        assert victim.rss_anon() >= SIZE * MIB


# ------------------------------------------------------- EPERM and ENOSYS


@pytest.mark.needs("seccomp")
@pytest.mark.parametrize("name", ["EPERM", "ENOSYS"])
def test_eperm_and_enosys_are_raised_by_process_mrelease(
    name: str, answered: Answered
) -> None:
    kernel = answered({"process_mrelease": getattr(errno, name)})
    assert kernel.run(failed, -1) == name


@pytest.mark.needs("seccomp")
@pytest.mark.parametrize("name", ["EPERM", "ENOSYS"])
def test_eperm_and_enosys_the_kill_and_the_wait_for_the_end_still_happen(
    name: str, answered: Answered, kill: Kill
) -> None:
    with victims.asleep(SIZE) as victim:
        kernel = answered({"process_mrelease": getattr(errno, name)})
        release = in_a_child(kill, kernel, victim.pid, timeout=30)
        assert release.outcome is Outcome.UNSUPPORTED
        assert release.errno == getattr(errno, name)
        assert release.attempts == 1
        assert release.signalled is not None
        assert release.released is None
        assert release.exited is not None
        assert release.freed
        assert victim.wait() == -signal.SIGKILL
        assert name in str(release)


@pytest.mark.needs("seccomp")
@pytest.mark.parametrize("name", ["EPERM", "ENOSYS"])
@pytest.mark.needs("release")
def test_eperm_and_enosys_nothing_is_freed_while_the_victim_is_held(
    name: str, answered: Answered, kill: Kill
) -> None:
    with victims.held(SIZE) as victim:
        kernel = answered({"process_mrelease": getattr(errno, name)})
        begin = time.monotonic()
        release = in_a_child(kill, kernel, victim.pid, timeout=0.2)
        assert time.monotonic() - begin >= 0.2
        assert release.outcome is Outcome.UNSUPPORTED
        assert release.errno == getattr(errno, name)
        assert release.exited is None
        assert not release.freed
        assert victim.rss_anon() >= SIZE * MIB
        victims.wait_held(victim)


@pytest.mark.needs("seccomp")
@pytest.mark.parametrize("name", ["EPERM", "ENOSYS"])
def test_eperm_and_enosys_release_leaves_a_live_process_alone(
    name: str, answered: Answered
) -> None:
    with victims.asleep(SIZE) as victim:
        kernel = answered({"process_mrelease": getattr(errno, name)})

        def release() -> Release:
            with Victim(victim.pid) as pinned:
                return pinned.release(timeout=30)

        result = kernel.run(release)
        assert result.outcome is Outcome.UNSUPPORTED
        assert not result.freed
        assert result.exited is None
        assert not result.raised
        assert victim.state() == "S"


@pytest.mark.needs("release")
def test_the_call_itself_asks_for_no_permission(
    unprivileged: Callable[[Callable[[int], None], int], None],
) -> None:
    """Whoever has the pidfd of a dying process may release it."""
    with victims.held(SIZE, killed=True) as victim:
        unprivileged(process_mrelease, victim.pidfd)
        assert victim.rss_anon() == 0


# --------------------------------------------- process_mrelease's arguments


class WithFileno:
    def __init__(self, value: object) -> None:
        self.value = value

    def fileno(self) -> object:
        return self.value


@pytest.mark.needs("release")
def test_an_object_with_fileno_stands_for_its_fd() -> None:
    with victims.held(SIZE, killed=True) as victim:
        given = WithFileno(victim.pidfd)
        process_mrelease(given)  # type: ignore[arg-type]
        assert victim.rss_anon() == 0
        process_mrelease(given, 0)  # type: ignore[arg-type]


@pytest.mark.needs("release")
def test_a_victim_stands_for_its_pidfd() -> None:
    with victims.held(SIZE) as victim, Victim(victim.pid) as pinned:
        assert failed(pinned) == "EINVAL"
        victim.popen.kill()
        process_mrelease(pinned)
        assert victim.rss_anon() == 0


@pytest.mark.needs("release")
def test_an_open_file_stands_for_its_fd() -> None:
    with victims.held(SIZE, killed=True) as victim:
        with open(os.dup(victim.pidfd), closefd=True, opener=None) as file:
            process_mrelease(file)
        assert victim.rss_anon() == 0


@pytest.mark.parametrize(
    ("pidfd", "error"),
    [
        (True, TypeError),
        (False, TypeError),
        (1.0, TypeError),
        ("3", TypeError),
        (b"3", TypeError),
        (None, TypeError),
        ([3], TypeError),
        (Path("/"), TypeError),
        (object(), TypeError),
        (1 << 31, OverflowError),
        (1 << 40, OverflowError),
        (1 << 200, OverflowError),
        (-(1 << 31) - 1, OverflowError),
        (-(1 << 200), OverflowError),
        (WithFileno("3"), TypeError),
        (WithFileno(None), TypeError),
        (WithFileno(-1), ValueError),
        (WithFileno(1 << 40), OverflowError),
    ],
    ids=repr,
)
def test_what_is_no_fd_is_refused(
    pidfd: object, error: type[Exception]
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - exact type
        process_mrelease(pidfd)  # type: ignore[arg-type]
    assert caught.type is error


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (-1, OverflowError),
        (-(1 << 200), OverflowError),
        (1 << 32, OverflowError),
        (1 << 200, OverflowError),
        (0.0, TypeError),
        ("0", TypeError),
        (None, TypeError),
    ],
    ids=repr,
)
def test_flags_that_are_no_unsigned_int_are_refused(
    flags: object, error: type[Exception]
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - exact type
        process_mrelease(-1, flags)  # type: ignore[arg-type]
    assert caught.type is error


@pytest.mark.parametrize("args", [(), (-1, 0, 0), (-1, 0, 0, 0)])
def test_the_wrong_number_of_arguments_is_a_type_error(
    args: tuple[int, ...],
) -> None:
    with pytest.raises(TypeError, match=f"got {len(args)}"):
        process_mrelease(*args)


def test_the_arguments_are_positional_only() -> None:
    with pytest.raises(TypeError, match="keyword"):
        process_mrelease(pidfd=-1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="keyword"):
        process_mrelease(-1, flags=0)  # type: ignore[call-arg]


def test_what_fileno_raises_comes_out() -> None:
    class Closed:
        def fileno(self) -> int:
            raise Enough

    with pytest.raises(Enough):
        process_mrelease(Closed())
