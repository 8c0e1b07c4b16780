"""What the kernel may refuse, at every place where the C code asks it.

Each fault is the kernel's own: a system call that fails or lies on order
(kernel_errors), or a victim that ends just then. The result must be honest
after each: nothing is called freed whose memory is there, nothing is raised
after a signal, and no file descriptor, thread or child is left. `make
coverage` shows that no branch of reap.c, locks.c and pool.c is left out; what
needs C is in native/drive.c.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import platform
import signal
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

import kernel_errors
import mrelease
import victims
from cgroups import Unavailable
from kernel_errors import ALLOW, BLOCK, ZERO, Call, Plain
from kill_ways import by_reaper, native_threads
from mrelease import Outcome
from mrelease.process import pin
from mrelease.protocol import Terms
from mrelease.reaper import Reaping, _job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import cgroups
    from conftest import Unprivileged
    from kill_ways import Kill

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]

pytestmark = pytest.mark.needs("seccomp", "release")

# There all waits are ppoll(2): they can not be told apart.
WITH_POLL = pytest.mark.skipif(
    platform.machine() == "aarch64", reason="aarch64 has no poll(2)"
)

MIB = victims.MIB
BACK = {Outcome.RELEASED, Outcome.EXITED}
LONG = 20.0
"""For what must not be cut short on a busy machine."""

_FUTEX_WAIT = 0
_F_DUPFD_QUERY = 1027


# ------------------------------------------------- what must hold after each


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def undisturbed(function: Callable[[], object]) -> object:
    """Run it, in a child; nothing of it is left after it."""
    before = len(open_fds())
    try:
        return function()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they keep what is open
        raise
    finally:
        gc.collect()
        victims.wait_until(lambda: not native_threads(), "no thread is left")
        assert len(open_fds()) == before, "file descriptors are left"
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def run(
    kernel: kernel_errors.answered, function: Callable[[], mrelease.Release]
) -> mrelease.Release:
    result = kernel.run(undisturbed, function)
    assert isinstance(result, mrelease.Release)
    return result


def result_of(
    job: kernel_errors.Job[object],
    kernel: kernel_errors.answered,
    patience: float = 0.0,
) -> object:
    """While it is waited for, whoever is blocked is let go."""
    time.sleep(patience)
    deadline = time.monotonic() + victims.TIMEOUT
    while True:
        kernel.release()
        try:
            return job.result(0.01)
        except TimeoutError:
            assert time.monotonic() < deadline


def killed_by(
    kernel: kernel_errors.answered,
    kill: Kill,
    victim: victims.Process,
    grace: float = 0.0,
    timeout: float = LONG,
) -> mrelease.Release:
    """Kill it under the faults; what is said of it is true."""
    release = run(
        kernel, lambda: kill(victim.pid, grace=grace, timeout=timeout)
    )
    check_honest(victim, release)
    return release


def check_honest(victim: victims.Process, release: mrelease.Release) -> None:
    if release.freed and victim.popen.returncode is None:
        assert victim.ended() or victim.rss_anon() < MIB
    if release.exited is not None:
        assert victim.popen.returncode is not None or victim.ended()
    if release.outcome is Outcome.RELEASED:
        assert release.released is not None
    if release.outcome is Outcome.ALIVE:
        assert victim.state() == "S"
        assert victim.rss_anon() >= victim.facts.get("anon", 0)


def check_untouched(victim: victims.Process) -> None:
    assert not victim.ended()
    assert victim.states().strip("S") == ""
    assert int(victim.status()["ShdPnd"], 16) == 0


# --------------------------------------------------------------------- rules


def opening(
    *, name: str, answer: Callable[[], Plain] | Plain, times: int = 1 << 30
) -> Callable[[Call], Plain]:
    """Of openat(): for a path that ends so, so many times."""
    left = [times]

    def rule(call: Call) -> Plain:
        if not call.string(1).endswith(name) or left[0] == 0:
            return ALLOW
        left[0] -= 1
        return answer() if callable(answer) else answer

    return rule


def sending(
    sig: int, answer: Callable[[], Plain] | Plain
) -> Callable[[Call], Plain]:
    """Of pidfd_send_signal(): for this signal."""

    def rule(call: Call) -> Plain:
        if call.args[1] != sig:
            return ALLOW
        return answer() if callable(answer) else answer

    return rule


def threads_of(
    victim: victims.Process, answer: Plain = ZERO
) -> dict[str, kernel_errors.Rule]:
    """The list of its threads is empty, or cannot be read.

    Of a process with a dead leader, no memory is seen then.
    """

    def rule(call: Call) -> Plain:
        path = os.readlink(f"/proc/{call.tid}/fd/{call.args[0]}")
        return answer if path == f"/proc/{victim.pid}/task" else ALLOW

    return {"getdents64": [rule]}


def end_of(
    victim: victims.Process, answer: Plain, *, reap: bool = False
) -> Callable[[], Plain]:
    """It ends while its killer is in a system call, and is waited for."""

    def rule() -> Plain:
        if victim.popen.returncode is None and not victim.ended():
            # Not popen.kill(), which would wait for it if it has ended.
            os.kill(victim.pid, signal.SIGKILL)
            victim.let_go()
            assert victim.ended(victims.TIMEOUT)
        if reap:
            victim.wait()
        return answer

    return rule


def is_worker(call: Call) -> bool:
    """Of a Reaper; its watcher is mrelease/w0."""
    try:
        return call.thread().removeprefix("mrelease/").isdigit()
    except FileNotFoundError:
        return False


# ------------------------------------------------------ a look at the locks


@contextmanager
def with_robust_list(
    head: bytes | None,
) -> Iterator[kernel_errors.Job[None]]:
    """A process whose only thread has told the kernel of such a list."""
    ready, told = os.pipe()

    def sleep() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        number = ctypes.c_long(kernel_errors.number("set_robust_list"))
        list_ = None if head is None else ctypes.create_string_buffer(head)
        assert libc.syscall(number, list_, ctypes.c_size_t(24)) == 0
        os.write(told, b"x")
        signal.pause()

    with kernel_errors.Job(sleep) as job:
        os.read(ready, 1)
        os.close(ready)
        os.close(told)
        yield job


ELSEWHERE = b"\xf8" * 8


@pytest.mark.parametrize(
    ("head", "locks"),
    [
        (bytes(24), "free"),
        (ELSEWHERE + bytes(16), "held"),
        (bytes(16) + ELSEWHERE, "held"),
        (None, "free"),
    ],
    ids=["never filled", "held", "pending", "none"],
)
def test_a_robust_list_is_read_as_it_is(
    head: bytes | None, locks: str, kill: Kill
) -> None:
    with with_robust_list(head) as job:
        release = kill(job.pid, timeout=LONG)
        assert release.locks == locks
        if locks == "held":
            assert release.outcome is Outcome.LOCKED
            assert release.attempts == 0
        else:
            assert release.outcome in BACK


def test_without_a_list_and_a_word_of_its_kind_it_is_unknown(
    answered: Answered, kill: Kill
) -> None:
    """Lists of 32 bits are not shown: it might have one of these."""
    with with_robust_list(None) as job:
        rule = opening(name=f"{job.pid}/auxv", answer=errno.EMFILE)
        release = run(
            answered({"openat": [rule]}), lambda: kill(job.pid, timeout=LONG)
        )
        assert release.locks == "unknown"
        assert release.outcome in BACK


@pytest.mark.needs("held")
@pytest.mark.parametrize("error", [errno.EPERM, errno.ESRCH])
def test_a_list_that_cannot_be_read(
    error: int, answered: Answered, kill: Kill
) -> None:
    """ESRCH: the thread has let go of its memory, and of its locks."""
    with victims.held(4) as victim:
        kernel = answered({"process_vm_readv": error})
        release = killed_by(kernel, kill, victim)
        assert release.locks == ("free" if error == errno.ESRCH else "unknown")
        assert release.outcome is Outcome.RELEASED


@pytest.mark.needs("robust_holder")
def test_the_first_of_many_threads_that_holds_a_lock_is_enough(
    kill: Kill,
) -> None:
    with victims.robust_holder(1, threads=80) as victim:
        release = kill(victim.pid, timeout=LONG)
        check_honest(victim, release)
        assert release.locks == "held"
        assert release.outcome is Outcome.LOCKED


@pytest.mark.needs("robust_holder")
def test_a_lock_of_one_of_very_many_threads_is_found(kill: Kill) -> None:
    """It is looked for after SIGKILL then."""
    with victims.robust_holder(1, threads=200) as victim:
        release = kill(victim.pid, timeout=LONG)
        check_honest(victim, release)
        assert release.locks in ("held", "free", "unknown")
        assert (release.locks == "held") is (release.outcome is Outcome.LOCKED)


@pytest.mark.needs("robust_holder")
def test_a_lock_does_not_matter_if_it_is_to_be_ignored(kill: Kill) -> None:
    with victims.robust_holder(1) as victim:
        release = kill(victim.pid, timeout=LONG, locks="ignore")
        check_honest(victim, release)
        assert release.outcome in BACK


@pytest.mark.needs("held")
@pytest.mark.parametrize("spare", [True, False])
def test_without_a_file_for_ever_the_locks_are_unknown(
    spare: bool, answered: Answered, kill: Kill
) -> None:
    """A worker gives up its own for it, and has it back, or not."""
    with victims.held(4, threads=2) as victim:

        def no_spare(call: Call) -> Plain:
            worker = is_worker(call)
            return errno.EMFILE if worker and not spare else ALLOW

        name = f"{victim.pid}/task"
        kernel = answered(
            {
                "openat": [opening(name=name, answer=errno.EMFILE)],
                "fcntl": [no_spare],
            }
        )
        release = killed_by(kernel, kill, victim)
        assert release.locks == "unknown"
        assert release.outcome is Outcome.RELEASED


# Where an answer takes longer than the look may, it can not be tried again.
@pytest.mark.any_kernel
@pytest.mark.needs("robust_holder")
@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE])
def test_without_a_file_for_the_threads_the_leaders_lock_is_found(
    error: int, answered: Answered, kill: Kill
) -> None:
    """The tasks cannot be listed; it is tried again, for a while."""
    with victims.robust_holder(1, threads=2) as victim:
        rule = opening(name=f"{victim.pid}/task", answer=error)
        release = killed_by(answered({"openat": [rule]}), kill, victim)
        assert release.locks == "held"
        assert release.outcome is Outcome.LOCKED


@pytest.mark.needs("held")
def test_the_memory_is_closed_for_a_look_at_the_locks(
    answered: Answered,
) -> None:
    """Somebody else took the last file descriptor, and gave it back."""
    with victims.held(4, threads=2) as victim:
        rule = opening(name=f"{victim.pid}/task", answer=errno.EMFILE, times=1)
        kernel = answered({"openat": [rule]})
        release = killed_by(kernel, mrelease.kill, victim)
        assert release.locks == "free"
        assert release.outcome is Outcome.RELEASED


@pytest.mark.needs("held")
@pytest.mark.parametrize("answer", [ZERO, errno.EIO], ids=["none", "EIO"])
def test_threads_that_are_not_all_told_of_are_unknown(
    answer: Plain, answered: Answered, kill: Kill
) -> None:
    """So often is it tried that the number of threads would have fallen."""
    with victims.held(4, threads=2) as victim:
        kernel = answered(threads_of(victim, answer))
        release = killed_by(kernel, kill, victim)
        assert release.locks == "unknown"
        assert release.outcome is Outcome.RELEASED
        assert release.freed
        assert kernel.count("getdents64") >= 64


@pytest.mark.needs("robust_holder")
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "EPERM"])
def test_a_lock_that_may_be_anothers_is_unknown(
    reaped: bool, answered: Answered
) -> None:
    """The victim was waited for while the worker looked."""

    def ask(call: Call) -> Plain:
        if call.args[1] != 0 or not is_worker(call):
            return ALLOW
        return BLOCK if reaped else errno.EPERM

    with victims.robust_holder(1) as victim:
        kernel = answered({"pidfd_send_signal": [ask]})
        job = kernel.start(
            undisturbed, lambda: by_reaper(victim.pid, timeout=LONG)
        )
        if reaped:
            kernel.blocked(victims.TIMEOUT)
            assert victim.ended(victims.TIMEOUT)
            victim.wait()
        release = result_of(job, kernel)
        assert isinstance(release, mrelease.Release)
        check_honest(victim, release)
        if reaped:
            assert release.locks == "unknown"
            assert release.outcome is Outcome.EXITED
        else:
            assert release.locks == "held"
            assert release.outcome is Outcome.LOCKED


# ------------------------------------------- a victim that has no memory


@pytest.mark.needs("zombie_leader")
def test_a_process_of_which_nothing_can_be_read_is_killed(
    answered: Answered, kill: Kill
) -> None:
    with victims.zombie_leader(4) as victim:
        rule = opening(name=f"{victim.pid}/stat", answer=errno.EMFILE)
        kernel = answered({**threads_of(victim), "openat": [rule]})
        release = killed_by(kernel, kill, victim)
        assert release.outcome in BACK
        assert release.signalled is not None


@pytest.mark.needs("zombie_leader")
def test_what_ends_while_it_is_read_of_is_not_signalled(
    answered: Answered, kill: Kill
) -> None:
    """After its grace, before SIGKILL."""
    with victims.zombie_leader(4, sigterm="ignore") as victim:
        opened: list[float] = []

        def second() -> Plain:
            opened.append(time.monotonic())
            return end_of(victim, ALLOW)() if len(opened) > 1 else ALLOW

        rule = opening(name=f"{victim.pid}/mem", answer=second)
        kernel = answered({**threads_of(victim), "openat": [rule]})
        release = killed_by(kernel, kill, victim, grace=0.02)
        assert release.outcome is Outcome.EXITED
        assert release.terminated is not None
        assert release.signalled is None
        assert release.freed


@pytest.mark.needs("zombie_leader")
def test_the_memory_of_a_thread_is_that_of_its_dead_leader(
    kill: Kill,
) -> None:
    with victims.zombie_leader(4) as victim:
        release = kill(victim.pid, timeout=LONG)
        check_honest(victim, release)
        assert release.footprint is not None
        assert release.footprint.anon >= 4 * MIB
        assert release.freed


@pytest.mark.needs("kernel_thread")
def test_a_kernel_thread_is_refused(kill: Kill) -> None:
    with pytest.raises(ValueError, match="kernel thread"):
        kill(victims.kernel_thread())


@pytest.mark.needs("held")
def test_without_any_file_it_is_killed_and_released(
    answered: Answered, kill: Kill
) -> None:
    """Nothing is known of it then."""
    with victims.held(4) as victim:
        rule = opening(name="", answer=errno.ENFILE)

        def of_the_victim(call: Call) -> Plain:
            its = call.string(1).startswith(f"/proc/{victim.pid}/")
            return rule(call) if its else ALLOW

        kernel = answered({"openat": [of_the_victim]})
        release = killed_by(kernel, kill, victim, timeout=0.1)
        assert release.footprint is None
        assert release.locks == "unknown"
        assert release.outcome in (Outcome.RELEASED, Outcome.PARTIAL)
        assert victim.rss_anon() < MIB


@pytest.mark.needs("zombie")
@pytest.mark.parametrize("grace", [0.0, 1.0], ids=["SIGKILL", "SIGTERM"])
def test_a_zombie_that_is_waited_for_is_gone(
    grace: float, answered: Answered, kill: Kill
) -> None:
    with victims.zombie(1) as victim:
        ask = end_of(victim, ALLOW, reap=True)
        kernel = answered({"pidfd_send_signal": [sending(0, ask)]})
        with pytest.raises(ProcessLookupError):
            killed_by(kernel, kill, victim, grace=grace)


@pytest.mark.needs("zombie")
@pytest.mark.parametrize("grace", [0.0, 1.0], ids=["SIGKILL", "SIGTERM"])
def test_a_zombie_that_cannot_be_asked_for_has_ended(
    grace: float, answered: Answered, kill: Kill
) -> None:
    with victims.zombie(1) as victim:
        rule = sending(0, errno.EPERM)
        kernel = answered({"pidfd_send_signal": [rule]})
        release = killed_by(kernel, kill, victim, grace=grace)
        assert release.outcome is Outcome.EXITED
        assert release.signalled is None


@pytest.mark.needs("zombie")
@pytest.mark.parametrize("error", [None, errno.EPERM])
def test_release_of_a_zombie_that_cannot_be_asked_for(
    error: int | None, answered: Answered
) -> None:
    with victims.zombie(1) as victim:
        rule = sending(0, ALLOW if error is None else error)
        kernel = answered({"pidfd_send_signal": [rule]})

        def release() -> mrelease.Release:
            with mrelease.Victim(victim.pid) as pinned:
                return pinned.release()

        assert run(kernel, release).outcome is Outcome.EXITED


# ----------------------------------------------------------- signals refused


def test_a_refused_sigterm_leaves_the_victim_alone(
    answered: Answered, kill: Kill
) -> None:
    with victims.asleep(1) as victim:
        rule = sending(signal.SIGTERM, errno.EPERM)
        kernel = answered({"pidfd_send_signal": [rule]})
        with pytest.raises(PermissionError, match="nothing was signalled"):
            killed_by(kernel, kill, victim, grace=1.0)
        check_untouched(victim)


def test_a_refused_sigkill_leaves_the_victim_alone(
    answered: Answered, kill: Kill
) -> None:
    with victims.asleep(1) as victim:
        rule = sending(signal.SIGKILL, errno.EPERM)
        kernel = answered({"pidfd_send_signal": [rule]})
        with pytest.raises(PermissionError, match="nothing was signalled"):
            killed_by(kernel, kill, victim)
        check_untouched(victim)


def test_a_sigkill_refused_after_sigterm_is_told_not_raised(
    answered: Answered, kill: Kill
) -> None:
    """It has become another user's since."""
    with victims.asleep(1, sigterm="ignore") as victim:
        rule = sending(signal.SIGKILL, errno.EPERM)
        kernel = answered({"pidfd_send_signal": [rule]})
        release = killed_by(kernel, kill, victim, grace=0.02)
        assert release.outcome is Outcome.ALIVE
        assert release.errno == errno.EPERM
        assert release.signalled is None
        assert not release.freed


@pytest.mark.parametrize("reaped", [True, False], ids=["ESRCH", "EPERM"])
def test_an_end_at_the_very_end_of_the_grace_is_told(
    reaped: bool, answered: Answered, kill: Kill
) -> None:
    """Between the look at its end and SIGKILL."""
    with victims.asleep(1, sigterm="ignore") as victim:
        ask = end_of(victim, ALLOW if reaped else errno.EPERM, reap=reaped)
        rule = sending(signal.SIGKILL, ask)
        kernel = answered({"pidfd_send_signal": [rule]})
        release = killed_by(kernel, kill, victim, grace=0.02)
        assert release.outcome is Outcome.EXITED
        assert release.terminated is not None
        assert release.signalled is None
        assert release.exited is not None
        # What was waited for may be a stranger: nothing is known of it.
        assert release.freed is not reaped


@pytest.mark.needs("shared")
def test_a_worker_that_has_released_nothing_is_heard(
    answered: Answered,
) -> None:
    """It was ahead of a SIGKILL that failed, as the victim had ended; what it
    shared is still used.
    """
    with victims.shared(4, sigterm="ignore") as victim:
        ask = end_of(victim, errno.EPERM)
        kernel = answered(
            {
                "pidfd_send_signal": [sending(signal.SIGKILL, ask)],
                "process_mrelease": errno.EINVAL,
            }
        )
        release = killed_by(kernel, by_reaper, victim, grace=0.02)
        assert release.outcome is Outcome.SHARED
        assert release.attempts == 0
        assert not release.freed


# ------------------------------------------------------------- the release


@pytest.mark.needs("held")
def test_a_release_that_did_nothing_is_partial(
    answered: Answered, kill: Kill
) -> None:
    """The call gives 0: the kernel's own OOM reaper has given up."""
    with victims.held(8) as victim:
        kernel = answered({"process_mrelease": [ZERO]})
        release = killed_by(kernel, kill, victim, timeout=0.1)
        assert release.outcome is Outcome.PARTIAL
        assert not release.freed
        assert victim.rss_anon() >= 8 * MIB


@pytest.mark.needs("held")
def test_an_end_in_the_last_moment_is_seen(
    answered: Answered, kill: Kill
) -> None:
    """While it is looked whether all was released."""
    with victims.held(4, shared_anon=2) as victim:
        kernel: kernel_errors.answered

        def at_last() -> Plain:
            if kernel.count("process_mrelease") == 0:
                return ALLOW
            return end_of(victim, ALLOW)()

        rule = opening(name=f"{victim.pid}/status", answer=at_last)
        kernel = answered({"openat": [rule], "process_mrelease": [ALLOW]})
        release = killed_by(kernel, kill, victim, timeout=0.2)
        assert release.outcome is Outcome.RELEASED
        assert release.freed
        assert release.exited is not None


@pytest.mark.needs("held")
def test_einval_without_a_status_is_shared(
    answered: Answered, kill: Kill
) -> None:
    """No file descriptor is left to see whether a core dump is written."""
    with victims.held(4) as victim:
        kernel: kernel_errors.answered

        def refused() -> Plain:
            tries = kernel.count("process_mrelease")
            return errno.EMFILE if tries else ALLOW

        rule = opening(name=f"{victim.pid}/status", answer=refused)
        kernel = answered(
            {"openat": [rule], "process_mrelease": [lambda _: errno.EINVAL]}
        )
        release = killed_by(kernel, kill, victim, timeout=0.05)
        assert release.outcome is Outcome.SHARED
        assert not release.freed


def test_what_was_shared_once_is_not_called_freed(
    answered: Answered, kill: Kill
) -> None:
    """Who shared it may tear it down this very moment."""
    with victims.asleep(4) as victim:
        kernel = answered({"process_mrelease": errno.EINVAL})
        release = killed_by(kernel, kill, victim)
        assert release.outcome is Outcome.SHARED
        assert release.exited is not None
        assert not release.freed


@pytest.mark.needs("shared")
def test_what_is_shared_is_not_freed(kill: Kill) -> None:
    with victims.shared(4) as victim:
        release = kill(victim.pid, timeout=LONG)
        check_honest(victim, release)
        assert release.outcome is Outcome.SHARED
        assert release.exited is not None
        assert not release.freed


@pytest.mark.needs("held")
def test_what_the_sharer_lets_go_of_at_last_is_not_called_freed(
    answered: Answered,
) -> None:
    """It may be at its teardown still."""
    with victims.held(4, sharer=True) as victim:

        def end_sharer(_: Call) -> Plain:
            victim.end_sharer()
            return ALLOW

        end = end_of(victim, ALLOW)
        kernel = answered({"ppoll": [lambda _: end(), end_sharer, ALLOW]})
        release = killed_by(kernel, mrelease.kill, victim)
        assert kernel.count("ppoll") >= 2
        assert release.outcome is Outcome.SHARED
        assert release.exited is not None
        assert not release.freed


@pytest.mark.needs("held")
def test_who_shares_it_is_not_waited_for_beyond_the_timeout(
    answered: Answered,
) -> None:
    with victims.held(4, sharer=True) as victim:

        def at_last(_: Call) -> Plain:
            end_of(victim, ALLOW)()
            time.sleep(0.05)
            return ALLOW

        kernel = answered({"ppoll": [at_last]})
        release = killed_by(kernel, mrelease.kill, victim, timeout=0.05)
        assert release.outcome is Outcome.SHARED
        assert not release.freed


@pytest.mark.needs("shared")
@WITH_POLL
def test_ctrl_c_as_a_sharing_victim_ends_in_its_grace(
    answered: Answered,
) -> None:
    """Who shares it is not waited for then."""
    with victims.shared(4, sigterm="ignore") as victim:

        def interrupt(call: Call) -> Plain:
            end_of(victim, ALLOW)()
            os.kill(call.tid, signal.SIGINT)
            return errno.EINTR

        def kill() -> mrelease.Release:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return mrelease.kill(victim.pid, grace=LONG, timeout=LONG)

        kernel = answered({"ppoll": [interrupt, ALLOW]})
        with pytest.raises(KeyboardInterrupt):
            run(kernel, kill)
        assert kernel.count("ppoll") == 1


def released_by(
    kernel: kernel_errors.answered, victim: victims.Process, timeout: float
) -> mrelease.Release:
    """Only released, under the faults; what is said of it is true."""

    def release() -> mrelease.Release:
        with mrelease.Victim(victim.pid) as pinned:
            return pinned.release(timeout=timeout)

    found = run(kernel, release)
    check_honest(victim, found)
    assert found.signalled is None
    return found


@pytest.mark.needs("held")
@pytest.mark.parametrize("how", ["unreaped", "reaped", "EPERM"])
def test_release_of_what_ends_while_its_locks_are_looked_at(
    how: str, answered: Answered
) -> None:
    with victims.held(4, killed=True) as victim:
        end = end_of(victim, ALLOW, reap=how == "reaped")
        kernel = answered(
            {
                "get_robust_list": [lambda _: end()],
                "pidfd_send_signal": [
                    sending(0, errno.EPERM if how == "EPERM" else ALLOW)
                ],
            }
        )
        found = released_by(kernel, victim, LONG)
        assert found.outcome is Outcome.EXITED
        # What was waited for may be a stranger: nothing is known of it.
        assert found.freed is (how != "reaped")


@pytest.mark.needs("held")
@pytest.mark.parametrize("tries", [1, 2])
def test_release_of_what_begins_to_die_meanwhile(
    tries: int, answered: Answered
) -> None:
    """EINVAL once: SIGKILL may have come after the call."""
    with victims.held(4, killed=True) as victim:
        refused: list[kernel_errors.Answer] = [lambda _: errno.EINVAL] * tries
        kernel = answered({"process_mrelease": [*refused, ALLOW]})
        found = released_by(kernel, victim, LONG)
        assert found.outcome is Outcome.RELEASED
        assert found.freed
        assert found.attempts == tries + 1


def test_release_of_what_lives_does_nothing(answered: Answered) -> None:
    with victims.asleep(4) as victim:
        kernel = answered({"process_mrelease": [ALLOW]})
        found = released_by(kernel, victim, LONG)
        assert found.outcome is Outcome.ALIVE
        check_untouched(victim)


@pytest.mark.needs("robust_holder")
@pytest.mark.parametrize("dying", [True, False])
def test_release_of_who_holds_a_lock(dying: bool, answered: Answered) -> None:
    with victims.robust_holder(4) as victim:
        victims.hold(victim)
        if dying:
            victim.popen.kill()
            victims.wait_held(victim)
        kernel = answered({"process_mrelease": [ALLOW]})
        found = released_by(kernel, victim, 0.05)
        assert found.locks == "held"
        assert found.outcome is (Outcome.LOCKED if dying else Outcome.ALIVE)
        assert not found.freed
        assert kernel.count("process_mrelease") == 0


def test_eagain_of_a_process_that_lives_is_partial_and_it_goes_on(
    answered: Answered,
) -> None:
    with victims.asleep(4) as victim:
        kernel = answered({"process_mrelease": errno.EAGAIN})
        found = released_by(kernel, victim, 0.05)
        assert found.outcome is Outcome.PARTIAL
        assert not found.freed
        assert not found.raised
        check_untouched(victim)


@pytest.mark.needs("held")
@pytest.mark.parametrize("dying", [True, False])
def test_enosys_of_what_is_dying_is_waited_for(
    dying: bool, answered: Answered
) -> None:
    with victims.held(4, killed=dying) as victim:
        kernel = answered({"process_mrelease": errno.ENOSYS})
        begun = time.monotonic()
        timeout = 0.5 if dying else LONG
        found = released_by(kernel, victim, timeout)
        assert (time.monotonic() - begun >= timeout) is dying
        assert found.outcome is Outcome.UNSUPPORTED
        assert not found.freed


@pytest.mark.needs("held")
def test_eagain_is_tried_again_and_the_locks_are_looked_at_once(
    answered: Answered, kill: Kill
) -> None:
    with victims.held(4) as victim:
        kernel = answered(
            {
                "process_mrelease": [lambda _: errno.EAGAIN, ALLOW],
                "get_robust_list": [ALLOW],
            }
        )
        release = killed_by(kernel, kill, victim)
        assert release.outcome is Outcome.RELEASED
        assert release.attempts == 2
        assert kernel.count("get_robust_list") == 1


def test_ctrl_c_in_the_grace_ends_it(answered: Answered) -> None:
    with victims.asleep(4, sigterm="ignore") as victim:

        def interrupt(call: Call) -> Plain:
            os.kill(call.tid, signal.SIGINT)
            return errno.EINTR

        def kill() -> mrelease.Release:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return mrelease.kill(victim.pid, grace=3600.0, timeout=LONG)

        kernel = answered({"ppoll": [interrupt, ALLOW]})
        with pytest.raises(KeyboardInterrupt):
            run(kernel, kill)
        assert victim.ended(victims.TIMEOUT)


@pytest.mark.needs("held")
def test_what_only_the_end_gives_back_is_waited_for(kill: Kill) -> None:
    """Longer than there are signals to be looked for in one wait."""
    with victims.held(4, shared_anon=2) as victim:
        begun = time.monotonic()
        release = kill(victim.pid, timeout=0.4)
        assert time.monotonic() - begun >= 0.4
        check_honest(victim, release)
        assert release.outcome is Outcome.RELEASED


@pytest.mark.needs("held")
@WITH_POLL
def test_a_wait_that_begins_too_late_is_none(answered: Answered) -> None:
    """poll() took longer than there was time."""
    with victims.held(4, shared_anon=2) as victim:

        def slow(_: Call) -> Plain:
            time.sleep(0.1)
            return ALLOW

        # The first is before the victim is raised, the second in the wait.
        kernel = answered({"poll": [ALLOW, slow, ALLOW]})
        begun = time.monotonic()
        release = killed_by(kernel, mrelease.kill, victim, timeout=0.05)
        assert release.exited is None
        assert release.outcome is Outcome.RELEASED
        assert time.monotonic() - begun < LONG


# --------------------------------------------------------- many threads


@pytest.mark.parametrize(
    ("mib", "idle"), [(4, True), (128, False)], ids=["idle", "big"]
)
def test_a_crowd_that_cannot_end_soon_is_not_waited_for(
    mib: int, idle: bool, kill: Kill
) -> None:
    with victims.asleep(mib, threads=600, idle=idle) as victim:
        release = kill(victim.pid, timeout=LONG)
        check_honest(victim, release)
        assert release.outcome in BACK
        assert release.freed


@pytest.mark.parametrize("grace", [0.0, 0.02])
def test_a_crowd_is_given_the_time_to_end(grace: float, kill: Kill) -> None:
    with victims.asleep(4, threads=600, sigterm="ignore") as victim:
        release = kill(victim.pid, grace=grace, timeout=LONG)
        check_honest(victim, release)
        assert release.outcome in BACK


@pytest.mark.needs("held")
def test_a_crowd_that_cannot_end_is_released_by_kill() -> None:
    with victims.held(2, threads=600) as victim:
        release = mrelease.kill(victim.pid, timeout=LONG)
        check_honest(victim, release)
        assert release.outcome is Outcome.RELEASED
        assert release.released is not None
        assert release.signalled is not None
        assert release.released - release.signalled >= 600 * 50e-6


@pytest.mark.needs("held")
def test_a_crowd_that_does_not_end_is_released_at_its_time() -> None:
    """Though the graces of others are over meanwhile."""
    with ExitStack() as stack:
        crowd = stack.enter_context(victims.held(2, threads=2000))
        others = [
            stack.enter_context(victims.asleep(1, sigterm="ignore"))
            for _ in range(2)
        ]
        killed = [crowd, *others]

        def kill() -> list[mrelease.Release]:
            jobs = []
            with mrelease.Reaper(threads=2) as reaper:
                for victim, grace in zip(killed, (0, 0.02, 0.05), strict=True):
                    pidfd, pid = pin(victim.pid)
                    terms = Terms(grace, None, LONG, "protect")
                    jobs.append(_job(pidfd, pid, terms, time.monotonic_ns()))
                with suppress(PermissionError):
                    # The crowd is in no hurry, but the graces are short.
                    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
                reaper._submit(jobs[:1])
                reaper._submit(jobs[1:])
                return [
                    Reaping(victim.pid, reaper._pool, job).result()
                    for victim, job in zip(killed, jobs, strict=True)
                ]

        releases = kernel_errors.in_child(undisturbed, kill)
        assert isinstance(releases, list)
        assert releases[0].outcome is Outcome.RELEASED
        # Who is as nice as this process may be is not waited for.
        if os.getpriority(os.PRIO_PROCESS, 0) <= 0:
            assert releases[0].released - releases[0].signalled >= 2000 * 50e-6
        for victim, release in zip(killed, releases, strict=True):
            check_honest(victim, release)
            assert release.freed


@pytest.mark.needs("core_dumping")
def test_who_is_dumped_is_not_raised_before_the_release(kill: Kill) -> None:
    with victims.core_dumping(4, idle=True) as victim:
        release = kill(victim.pid, timeout=0.1)
        check_honest(victim, release)
        assert release.signalled is not None


# ------------------------------------------------------- making a Reaper


def make_reaper(policy: str = "auto", threads: int = 2) -> str:
    with mrelease.Reaper(threads=threads, spares=2, policy=policy) as reaper:  # type: ignore[arg-type]
        return repr(reaper.scheduling)


@pytest.mark.parametrize("policy", ["fifo", "nice"])
def test_what_cannot_be_asked_for_is_not_had(
    policy: str, answered: Answered
) -> None:
    """Where sched_getattr() is refused nothing was set."""
    kernel = answered({"sched_getattr": errno.ENOSYS})
    with pytest.raises((OSError, PermissionError)):
        kernel.run(undisturbed, lambda: make_reaper(policy))


@pytest.mark.parametrize("policy", ["auto", "none"])
def test_a_reaper_without_sched_getattr_kills(
    policy: str, answered: Answered
) -> None:
    with victims.asleep(4) as victim:

        def kill() -> mrelease.Release:
            with mrelease.Reaper(policy=policy) as reaper:  # type: ignore[arg-type]
                assert "FIFO" not in reaper.scheduling.policy
                assert bool(reaper.scheduling.why) is (policy == "auto")
                return reaper.kill(victim.pid, timeout=LONG).result()

        release = run(answered({"sched_getattr": errno.ENOSYS}), kill)
        check_honest(victim, release)
        assert release.outcome in BACK


def test_a_reaper_without_sched_setattr_says_so(answered: Answered) -> None:
    kernel = answered({"sched_setattr": errno.ENOSYS})
    told = kernel.run(undisturbed, make_reaper)
    assert isinstance(told, str)
    assert os.strerror(errno.ENOSYS) in told
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        kernel.run(undisturbed, lambda: make_reaper("fifo"))


def test_fifo_refused_and_nice_allowed_is_told(answered: Answered) -> None:
    if os.geteuid() != 0:
        pytest.skip("nice -20 needs root")
    first: set[int] = set()

    def refuse_first(call: Call) -> Plain:
        if call.tid in first:
            return ALLOW
        first.add(call.tid)
        return errno.EPERM

    kernel = answered({"sched_setattr": [refuse_first]})
    told = kernel.run(undisturbed, make_reaper)
    assert isinstance(told, str)
    assert "SCHED_FIFO is not allowed" in told
    assert "nice=-20" in told


def test_a_negative_nice_stays_where_no_better_is_allowed() -> None:
    if os.geteuid() != 0:
        pytest.skip("a negative nice needs root")

    def nicer() -> str:
        os.setpriority(os.PRIO_PROCESS, 0, -5)
        kernel_errors.drop_privileges()
        return make_reaper("nice")

    assert "nice=-5" in kernel_errors.in_child(nicer)


def test_a_nice_that_is_not_allowed_is_refused(
    unprivileged: Unprivileged,
) -> None:
    with pytest.raises(PermissionError):
        unprivileged(make_reaper, "nice")
    assert "not allowed" in unprivileged(make_reaper)


def test_the_threads_of_who_is_real_time_are_so_too() -> None:
    if os.geteuid() != 0:
        pytest.skip("SCHED_FIFO needs root")

    def realtime() -> str:
        param = os.sched_param(3)
        os.sched_setscheduler(0, os.SCHED_FIFO, param)
        return make_reaper("none")

    told = kernel_errors.in_child(realtime)
    assert "SCHED_FIFO" in told
    assert "priority=3" in told


def cloning(rule: kernel_errors.Rule) -> dict[str, kernel_errors.Rule]:
    """Of the making of a thread: which call it is depends on the libc."""
    return {"clone3": rule, "clone": rule}


def test_a_stack_that_is_too_small_is_made_bigger(answered: Answered) -> None:
    """With much thread-local storage, which lies there."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only the GNU C library says EINVAL then")
    kernel = answered(cloning([lambda _: errno.EINVAL, ALLOW]))
    kernel.run(undisturbed, make_reaper)
    kernel = answered(cloning([lambda _: errno.EINVAL]))
    with pytest.raises(OSError, match="threads") as caught:
        kernel.run(undisturbed, make_reaper)
    assert caught.value.errno == errno.EINVAL
    assert len(kernel.calls) < 20


def test_any_thread_may_be_one_too_many(answered: Answered) -> None:
    """The first, the second, ...: nothing is left of those before it."""
    for good in range(5):
        rule: list[kernel_errors.Answer] = [ALLOW] * good
        kernel = answered(cloning([*rule, errno.EAGAIN]))
        with pytest.raises(OSError, match="threads") as caught:
            kernel.run(undisturbed, make_reaper)
        assert caught.value.errno == errno.EAGAIN
        assert len(kernel.calls) == good + 1


@pytest.mark.parametrize(
    ("name", "tries"),
    [
        ("epoll_create1", 1),
        ("eventfd2", 1),
        ("fcntl", 4),
        ("epoll_ctl", 1),
        ("write", 1),
    ],
)
def test_any_file_may_be_one_too_many(
    name: str, tries: int, answered: Answered
) -> None:
    for good in range(tries):
        rule: list[kernel_errors.Answer] = [ALLOW] * good
        kernel = answered({name: [*rule, errno.ENFILE]})
        with pytest.raises(OSError, match=r"Errno 23") as caught:
            kernel.run(undisturbed, make_reaper)
        assert caught.value.errno == errno.ENFILE


@pytest.mark.parametrize("good", [1, 2])
def test_a_victim_that_cannot_be_watched_is_not_signalled(
    good: int, answered: Answered
) -> None:
    """The second: what ends its grace cannot be watched."""
    with victims.asleep(1) as victim:
        ends = os.eventfd(0)
        rule: list[kernel_errors.Answer] = [ALLOW] * good
        kernel = answered({"epoll_ctl": [*rule, errno.ENOSPC]})
        with pytest.raises(OSError, match="nothing was signalled") as caught:
            run(
                kernel,
                lambda: by_reaper(victim.pid, grace=LONG, escalate_on=ends),
            )
        os.close(ends)
        assert caught.value.errno == errno.ENOSPC
        check_untouched(victim)


@pytest.mark.needs("held")
def test_a_killer_that_may_have_no_more_memory_kills(
    meter: cgroups.Meter,
) -> None:
    """The kernel would kill it if it took more than that (2 MiB, most of it
    for what Python touches of the memory that it shares since the fork).
    """
    with victims.held(64) as one, victims.held(64) as other:

        def kill() -> list[mrelease.Release]:
            v1 = meter.version == 1
            limit = "memory.limit_in_bytes" if v1 else "memory.max"
            with mrelease.Reaper() as reaper:
                meter.add(os.getpid())
                meter.write(limit, str(meter.usage() + 2 * MIB))
                releases = [
                    reaper.kill(one.pid, timeout=LONG).result(),
                    mrelease.kill(other.pid, timeout=LONG),
                ]
                meter.write(limit, "-1" if v1 else "max")
            return releases

        releases = kernel_errors.in_child(undisturbed, kill)
        assert isinstance(releases, list)
        for victim, release in zip((one, other), releases, strict=True):
            check_honest(victim, release)
            assert release.outcome is Outcome.RELEASED
            assert release.freed


# --------------------------------------------- a worker that comes too late


def asleep(call: Call) -> Plain:
    """Of futex(): keeps a worker asleep until it is let go."""
    waits = call.args[1] & 0x7F == _FUTEX_WAIT
    return BLOCK if waits and is_worker(call) else ALLOW


def late_kills(
    answered: Answered, count: int, cpus: tuple[int, int] | None = None
) -> int:
    """Kill so many, with a worker that wakes up when it is over.

    How often it was moved to the CPU of who kills. cpus: that one, and where
    the worker may run.
    """
    moved = 0

    def count_moves(call: Call) -> Plain:
        nonlocal moved
        moved += is_worker(call._replace(tid=call.args[0] or call.tid))
        moved -= call.args[0] == 0 and is_worker(call)  # back again
        return ALLOW

    kernel = answered({"futex": [asleep], "sched_setaffinity": [count_moves]})
    with ExitStack() as stack:
        killed = [stack.enter_context(victims.asleep(1)) for _ in range(count)]
        ready, go = os.pipe()
        stack.callback(os.close, ready)
        stack.callback(os.close, go)

        def kill() -> list[mrelease.Release]:
            wanted = None
            if cpus is not None:
                os.sched_setaffinity(0, [cpus[0]])
                wanted = [cpus[1]]
            with mrelease.Reaper(
                threads=1, spares=0, policy="none", cpus=wanted
            ) as reaper:
                releases = []
                for victim in killed:
                    os.read(ready, 1)
                    reaping = reaper.kill(victim.pid, timeout=LONG)
                    releases.append(reaping.result())
            return releases

        job = kernel.start(undisturbed, kill)
        for victim in killed:
            kernel.blocked(victims.TIMEOUT)
            os.write(go, b"x")
            assert victim.ended(victims.TIMEOUT)
            kernel.release()
        releases = result_of(job, kernel)
        assert isinstance(releases, list)
        for victim, release in zip(killed, releases, strict=True):
            check_honest(victim, release)
            assert release.outcome is Outcome.EXITED
    return moved


def test_a_worker_that_never_comes_in_time_is_waited_for_less_and_less(
    answered: Answered,
) -> None:
    assert late_kills(answered, 5) == 5


def test_a_worker_is_not_moved_to_a_cpu_that_it_may_not_use(
    answered: Answered,
) -> None:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("needs two CPUs")
    assert late_kills(answered, 1, (usable[0], usable[1])) == 0


@pytest.mark.parametrize("error", [None, errno.EPERM])
def test_a_worker_is_kept_off_the_cpu_of_who_kills(
    error: int | None, answered: Answered
) -> None:
    """Not if that is refused: it comes all the same."""
    usable = sorted(os.sched_getaffinity(0))
    if os.geteuid() != 0 or len(usable) < 2:
        pytest.skip("needs two CPUs, and SCHED_FIFO, so root")
    refused = 0

    def rule(call: Call) -> Plain:
        nonlocal refused
        its = call._replace(tid=call.args[0] or call.tid)
        if error is None or is_worker(call) or not is_worker(its):
            return ALLOW
        refused += 1
        return error

    with victims.asleep(1) as victim:

        def kill() -> mrelease.Release:
            with mrelease.Reaper(threads=1, spares=0) as reaper:
                (tid,) = (
                    tid
                    for tid, name in native_threads().items()
                    if name == "mrelease/0"
                )
                with open(f"/proc/self/task/{tid}/stat") as stat:
                    cpu = int(stat.read().rpartition(")")[2].split()[36])
                os.sched_setaffinity(0, [cpu])
                return reaper.kill(victim.pid, timeout=LONG).result()

        kernel = answered({"sched_setaffinity": [rule]})
        release = run(kernel, kill)
        check_honest(victim, release)
        assert release.outcome in BACK
        assert error is None or refused > 0


# ------------------------------------------ a worker that does not come back


@pytest.mark.needs("held")
def test_a_try_that_is_stuck_does_not_hide_what_the_one_before_found(
    answered: Answered,
) -> None:
    with victims.held(1) as victim:
        answers: list[float] = []

        def answer(_: Call) -> Plain:
            answers.append(time.monotonic())
            # Not before it is known to the Reaper that the kill went out.
            late = answers[-1] - answers[0] > 0.2
            return BLOCK if late else errno.EINVAL

        def kill() -> mrelease.Release:
            return mrelease.Reaper().kill(victim.pid, timeout=1).result()

        kernel = answered({"process_mrelease": [answer]})
        job = kernel.start(kill)
        kernel.blocked()
        release = job.result()
        assert release.outcome is Outcome.SHARED, release
        assert release.errno == errno.EINVAL
        assert not release.freed


@pytest.mark.needs("held")
def test_who_ends_in_the_queue_behind_another_leaves_it(
    answered: Answered,
) -> None:
    """The other, and the one that the worker is stuck with, do not end."""
    with (
        victims.held(1) as stuck,
        victims.held(8) as big,
        victims.asleep(1) as small,
    ):

        def kill() -> mrelease.Release:
            reaper = mrelease.Reaper(threads=1, spares=0)
            reaper.kill(stuck.pid, timeout=0.1).result()
            reaper.kill(big.pid, timeout=LONG)
            return reaper.kill(small.pid, timeout=LONG).result()

        release = answered({"process_mrelease": BLOCK}).run(kill)
        assert release.outcome is Outcome.EXITED, release
        assert release.freed
        assert release.attempts == 0


# ----------------------------------------------------------------- one CPU


def on_one_cpu(function: Callable[[mrelease.Reaper], object]) -> object:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with mrelease.Reaper(threads=1, spares=0, policy="none") as reaper:
        return function(reaper)


def test_one_cpu_and_no_priority_and_two_victims() -> None:
    with victims.asleep(4) as one, victims.asleep(4) as other:

        def kill(reaper: mrelease.Reaper) -> list[mrelease.Release]:
            found = reaper.kill_many([one.pid, other.pid], timeout=LONG)
            return [reaping.result() for reaping in found]

        releases = kernel_errors.in_child(
            undisturbed, lambda: on_one_cpu(kill)
        )
        assert isinstance(releases, list)
        for victim, release in zip((one, other), releases, strict=True):
            check_honest(victim, release)
            assert release.outcome in BACK


@pytest.mark.needs("held")
@pytest.mark.parametrize("refused", [0, 3])
def test_a_worker_that_loses_the_cpu_over_a_kill_is_helped(
    refused: int, answered: Answered
) -> None:
    """It had taken the kill upon itself. Who helps may fail at first."""
    tries = 0

    def kill_signal() -> Plain:
        nonlocal tries
        tries += 1
        return errno.ESRCH if tries <= refused else ALLOW

    def rule(call: Call) -> Plain:
        if call.args[1] != signal.SIGKILL:
            return ALLOW
        return BLOCK if is_worker(call) else kill_signal()

    with victims.held(4) as victim:
        kernel = answered({"pidfd_send_signal": [rule]})
        job = kernel.start(
            undisturbed,
            lambda: on_one_cpu(
                lambda reaper: reaper.kill(victim.pid, timeout=LONG).result()
            ),
        )
        kernel.blocked(victims.TIMEOUT)
        victims.wait_held(victim)
        release = result_of(job, kernel)
        assert isinstance(release, mrelease.Release)
        check_honest(victim, release)
        assert release.outcome is Outcome.RELEASED
        assert tries == refused + 1


@pytest.mark.needs("held")
def test_a_worker_that_sends_the_kill_in_time_is_not_helped(
    answered: Answered,
) -> None:
    """Who waits for it falls asleep too late, and finds that it was sent."""
    kernel: kernel_errors.answered
    helped: list[Call] = []

    def send(call: Call) -> Plain:
        if call.args[1] != signal.SIGKILL:
            return ALLOW
        if is_worker(call):
            return BLOCK
        helped.append(call)
        return errno.ESRCH

    def wait(call: Call) -> Plain:
        waits = call.args[1] & 0x7F == _FUTEX_WAIT
        if waits and not is_worker(call) and kernel.release():
            victims.wait_held(victim)
            time.sleep(0.05)
        return ALLOW

    with victims.held(4) as victim:
        kernel = answered({"pidfd_send_signal": [send], "futex": [wait]})
        release = run(
            kernel,
            lambda: on_one_cpu(  # type: ignore[arg-type,return-value]
                lambda reaper: reaper.kill(victim.pid, timeout=LONG).result()
            ),
        )
        check_honest(victim, release)
        assert release.outcome is Outcome.RELEASED
        assert not helped


# ------------------------------------------------- a trigger that many share


def _pressure(resource: str, trigger: bytes = b"") -> int:
    """A trigger; without one, poll() tells of an error for ever."""
    try:
        fd = os.open(f"/proc/pressure/{resource}", os.O_RDWR | os.O_NONBLOCK)
    except OSError as e:
        raise Unavailable(f"pressure triggers: {e.strerror}") from None
    try:
        if trigger:
            os.write(fd, trigger)
    except OSError as e:
        os.close(fd)
        raise Unavailable(f"pressure triggers: {e.strerror}") from None
    return fd


FIRES = b"some 2000 2000000\n"
"""2 ms in 2 s that somebody waited for a CPU."""


@pytest.mark.parametrize("query", ["F_DUPFD_QUERY", "kcmp", "number"])
def test_a_trigger_that_fires_is_meant_for_all_that_wait_for_it(
    query: str, answered: Answered, tmp_path: Path
) -> None:
    """And for nobody else: not for who waits for the same file opened by
    itself, for another file, for what is no such file, and for nothing.
    """
    none = [lambda _: errno.EPERM]
    rules: dict[str, kernel_errors.Rule] = {
        "kcmp": [ALLOW] if query == "kcmp" else list(none)
    }
    if query != "F_DUPFD_QUERY":
        rules["fcntl"] = [
            lambda call: (
                errno.EINVAL if call.args[1] == _F_DUPFD_QUERY else ALLOW
            )
        ]
    with ExitStack() as stack:
        triggers = [
            _pressure("cpu", FIRES),
            _pressure("cpu"),
            _pressure("memory"),
            os.eventfd(0),
            os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT),
        ]
        for fd in triggers:
            stack.callback(os.close, fd)
        waiting: list[int | None] = [*triggers, None]
        found = [
            stack.enter_context(victims.asleep(1, sigterm="ignore"))
            for _ in [0, 0, *waiting]
        ]

        def kill() -> tuple[list[mrelease.Release], list[bool]]:
            with mrelease.Reaper(threads=2) as reaper:
                reapings = [
                    reaper.kill(
                        victim.pid,
                        grace=3600.0,
                        escalate_on=trigger,
                        timeout=LONG,
                    )
                    for victim, trigger in zip(
                        found,
                        [triggers[0], triggers[0], *waiting],
                        strict=True,
                    )
                ]
                done = [r.result(LONG) for r in reapings[:3]]
                undone = [r.done() for r in reapings[3:]]
                reaper.close(0.0)
                return done, undone

        kernel = answered(rules)
        job = kernel.start(undisturbed, kill)
        with ExitStack() as busy:
            for _ in range(2 + len(os.sched_getaffinity(0))):
                busy.enter_context(victims.spinning(0))
            value = job.result()
        assert isinstance(value, tuple)
        done, undone = value
        assert not any(undone)
        for victim, release in zip(found[:3], done, strict=True):
            check_honest(victim, release)
            assert release.outcome in BACK
        for victim in found[3:]:
            assert victim.ended(victims.TIMEOUT)  # close() cut the grace


@pytest.mark.parametrize("good", [0, 1])
def test_a_trigger_that_cannot_be_looked_at_is_nobody_elses(
    good: int, answered: Answered
) -> None:
    left = [good]

    def rule(call: Call) -> Plain:
        """Of the watcher."""
        if not call.thread().startswith("mrelease/w"):
            return ALLOW
        left[0] -= 1
        return ALLOW if left[0] >= 0 else errno.EBADF

    with ExitStack() as stack:
        triggers = [_pressure("cpu", FIRES) for _ in range(2)]
        for fd in triggers:
            stack.callback(os.close, fd)
        found = [
            stack.enter_context(victims.asleep(1, sigterm="ignore"))
            for _ in triggers
        ]

        def kill() -> list[mrelease.Release]:
            with mrelease.Reaper(threads=2) as reaper:
                reapings = [
                    reaper.kill(
                        victim.pid,
                        grace=3600.0,
                        escalate_on=trigger,
                        timeout=LONG,
                    )
                    for victim, trigger in zip(found, triggers, strict=True)
                ]
                return [reaping.result(LONG) for reaping in reapings]

        # Which one fstat() is depends on the libc.
        kernel = answered({"fstat": [rule], "newfstatat": [rule]})
        job = kernel.start(undisturbed, kill)
        with ExitStack() as busy:
            for _ in range(2 + len(os.sched_getaffinity(0))):
                busy.enter_context(victims.spinning(0))
            releases = job.result()
        assert isinstance(releases, list)
        for victim, release in zip(found, releases, strict=True):
            check_honest(victim, release)
            assert release.outcome in BACK


# -------------------------------------------------------- fork, and the end


def test_a_child_that_drops_a_reaper_leaves_the_parents_alone() -> None:
    with victims.asleep(1) as victim, mrelease.Reaper() as reaper:
        holder = [reaper._pool]

        def drop() -> str:
            state = holder[0].state()
            holder.clear()
            object.__delattr__(reaper, "_pool")
            gc.collect()
            return state

        assert kernel_errors.in_child(drop) == "forked"
        release = reaper.kill(victim.pid, timeout=LONG).result()
        check_honest(victim, release)
        assert release.outcome in BACK


def test_graces_are_cut_while_the_watcher_has_not_buried_who_is_done(
    answered: Answered,
) -> None:
    """It reads of a victim whose grace is over, for long."""
    with ExitStack() as stack:
        first, second, third = (
            stack.enter_context(victims.asleep(1, sigterm="ignore"))
            for _ in range(3)
        )
        ready, go = os.pipe()
        stack.callback(os.close, ready)
        stack.callback(os.close, go)
        opened: list[float] = []

        def reads(call: Call) -> Plain:
            its = call.string(1) == f"/proc/{first.pid}/mem"
            if not its or not call.thread().startswith("mrelease/w"):
                return ALLOW
            opened.append(call.time)
            return BLOCK

        def kill() -> list[mrelease.Release]:
            with mrelease.Reaper(threads=1, spares=0) as reaper:
                reapings = [
                    reaper.kill(first.pid, grace=0.01, timeout=LONG),
                    reaper.kill(second.pid, grace=3600.0, timeout=LONG),
                ]
                os.read(ready, 1)
                reapings.append(reaper.kill(third.pid, timeout=0.0))
                assert reapings[2].done()
                reaper._pool.hurry()
                return [reaping.result(LONG) for reaping in reapings]

        kernel = answered({"openat": [reads]})
        job = kernel.start(undisturbed, kill)
        kernel.blocked(victims.TIMEOUT)
        os.write(go, b"x")
        assert third.ended(victims.TIMEOUT)
        releases = result_of(job, kernel, patience=0.2)
        assert isinstance(releases, list)
        assert opened
        killed = (first, second, third)
        for victim, release in zip(killed, releases, strict=True):
            check_honest(victim, release)
            assert release.signalled is not None
            assert victim.ended(victims.TIMEOUT)


def test_a_grace_of_a_year_can_be_cut_short() -> None:
    """It is longer than epoll_wait() can wait."""
    with victims.asleep(1, sigterm="ignore") as victim:
        with mrelease.Reaper() as reaper:
            reaping = reaper.kill(victim.pid, grace=3e7, timeout=LONG)
            time.sleep(0.05)
            assert not reaping.done()
            reaper.close(0.0)
            release = reaping.result(LONG)
        check_honest(victim, release)
        assert release.outcome in BACK


def test_a_kill_that_does_not_leave_is_not_waited_for_at_the_end(
    answered: Answered,
) -> None:
    """Of the interpreter; a second is enough."""
    with victims.asleep(1, sigterm="ignore") as victim:
        rule = sending(signal.SIGKILL, BLOCK)
        kernel = answered({"pidfd_send_signal": [rule]})

        def hurry() -> float:
            with mrelease.Reaper() as reaper:
                reaper.kill(victim.pid, grace=3600.0, timeout=LONG)
                begun = time.monotonic()
                reaper._pool.hurry()
                return time.monotonic() - begun

        job = kernel.start(undisturbed, hurry)
        kernel.blocked(victims.TIMEOUT)
        time.sleep(1.1)
        took = result_of(job, kernel)
        assert isinstance(took, float)
        assert 1.0 <= took < LONG
        assert victim.ended(victims.TIMEOUT)
