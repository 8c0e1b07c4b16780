"""Rights: who may kill, look at locks, and raise; and what is then told.

Most of it runs as user nobody, in a forked child, without capabilities.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import warnings
from typing import TYPE_CHECKING

import pytest

import kernel_errors
import mrelease
import victims
from kill_ways import by_reaper
from mrelease import Outcome, Victim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Unprivileged
    from kill_ways import Kill

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]

NOBODY = 65534
OTHER = 65533
BACK = {Outcome.RELEASED, Outcome.EXITED}
RESET_ON_FORK = 0x40000000


def has_nice() -> bool:
    """Is CAP_SYS_NICE effective?"""
    return int(victims.status_of(os.getpid())["CapEff"], 16) >> 23 & 1 != 0


needs_nice = pytest.mark.skipif(not has_nice(), reason="needs CAP_SYS_NICE")
needs_root = pytest.mark.needs("root")


# ------------------------------------------------------ the own child


def _kill_own_child(kill: Kill, threads: int) -> mrelease.Release:
    assert os.geteuid() == NOBODY
    with victims.held(16, threads=threads) as victim:
        release = kill(victim.pid)
        assert victim.rss_anon() == 0
        assert victim.status()["Uid"].split()[0] == str(NOBODY)
        return release


@needs_root
@pytest.mark.needs("held_64_threads")
@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.needs("release")
def test_an_unprivileged_user_s_own_child_works_fully(
    threads: int, unprivileged: Unprivileged, kill: Kill
) -> None:
    release = unprivileged(_kill_own_child, kill, threads)
    assert release.outcome is Outcome.RELEASED
    assert release.freed
    assert release.locks == "free"
    assert release.errno is None
    assert release.footprint is not None
    assert release.footprint.anon >= 16 * victims.MIB
    assert not release.raised
    assert "locks" not in str(release)


@needs_root
@pytest.mark.needs("release")
def test_an_unprivileged_user_s_own_child_is_back_at_its_end(
    unprivileged: Unprivileged,
    kill: Kill,
) -> None:
    """Not held: whoever comes first, the memory is known to be back."""

    def run() -> mrelease.Release:
        with victims.asleep(16) as victim:
            release = kill(victim.pid, timeout=10.0)
            assert victim.wait() == -signal.SIGKILL
            return release

    release = unprivileged(run)
    assert release.outcome in BACK
    assert release.freed
    assert release.exited is not None


@needs_root
def test_an_unprivileged_user_s_locks_are_checked(
    unprivileged: Unprivileged, tmp_path: Path, kill: Kill
) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)

    def run() -> tuple[mrelease.Release, str | None]:
        path = tmp_path / "lock"
        with (
            victims.robust_holder(4, robust=path) as holder,
            victims.robust_waiter(path) as waiter,
        ):
            release = kill(holder.pid, timeout=10.0)
            return release, victims.got(waiter)

    release, got = unprivileged(run)
    # The look of a Reaper may come when the lock has been let go.
    if kill is not by_reaper or release.outcome not in BACK:
        assert release.outcome is Outcome.LOCKED
        assert release.locks == "held"
    assert got == "EOWNERDEAD"


# ----------------------------------------------- another user's process


@needs_root
@pytest.mark.parametrize("user", [0, OTHER])
@pytest.mark.parametrize("grace", [0.0, 0.2])
@pytest.mark.parametrize("way", ["kill", "kill of a Victim"])
@pytest.mark.needs("release")
def test_another_user_s_process_is_permission_error_and_nothing_happens(
    way: str, user: int, grace: float, unprivileged: Unprivileged, kill: Kill
) -> None:
    with victims.asleep(4, user=user, sigterm="exit") as victim:

        def run() -> PermissionError:
            with Victim(victim.pid) as pinned:
                # This needs no right.
                assert pinned.footprint().anon > 0
                process = pinned if way == "kill of a Victim" else victim.pid
                with pytest.raises(PermissionError) as caught:
                    kill(process, grace=grace)
                return caught.value

        error = unprivileged(run)
        assert error.errno == errno.EPERM
        assert f"cannot kill pid {victim.pid}" in str(error)
        assert "another user" in str(error)
        assert "nothing was signalled" in str(error)
        assert victim.states() == "S"
        assert victim.status()["ShdPnd"] == "0" * 16
        assert victim.rss_anon() >= 4 * victims.MIB
        assert os.sched_getscheduler(victim.pid) == os.SCHED_OTHER


@needs_root
@pytest.mark.needs("release")
def test_another_user_s_live_process_is_not_released(
    unprivileged: Unprivileged,
) -> None:
    with victims.asleep(4) as victim:

        def release() -> mrelease.Release:
            with Victim(victim.pid) as pinned:
                return pinned.release()

        result = unprivileged(release)
        assert result.outcome is Outcome.ALIVE
        assert not result.freed
        assert not result.raised
        assert result.locks == "unknown"
        assert victim.rss_anon() >= 4 * victims.MIB
        assert victim.states() == "S"


# ------------------------------------------- may signal, may not look


@contextlib.contextmanager
def _forked(become: Callable[[], None]) -> Iterator[int]:
    """A process with 16 MiB that has become what no program need be."""
    ready, hold = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(hold[1])
        memory = bytearray(16 * victims.MIB)
        memory[:: victims.PAGE] = b"x" * (len(memory) // victims.PAGE)
        become()
        os.write(ready[1], b"!")
        os.read(hold[0], 1)  # ends with the test, if not before
        os._exit(0)
    os.close(hold[0])
    os.close(ready[1])
    try:
        assert os.read(ready[0], 1) == b"!"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready[0])
        os.close(hold[1])


def _undumpable() -> None:
    """Its own user may signal it, but not trace it."""
    kernel_errors.drop_privileges(NOBODY)
    prctl = ctypes.CDLL(None).prctl
    assert prctl(kernel_errors.PR_SET_DUMPABLE, 0, 0, 0, 0) == 0


def _setuid_program() -> None:
    """What execve() of a setuid program makes of a process.

    Its real user may signal it; its effective and saved one is another.
    """
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, OTHER, OTHER)


_UNTRACEABLE = pytest.mark.parametrize(
    "become",
    [_undumpable, _setuid_program],
    ids=lambda f: f.__name__.strip("_"),
)


@needs_root
@pytest.mark.needs("held")
@_UNTRACEABLE
@pytest.mark.needs("release")
def test_without_ptrace_rights_the_lock_check_says_it_could_not_look(
    become: Callable[[], None], unprivileged: Unprivileged, kill: Kill
) -> None:
    with _forked(become) as pid, victims.Process(trace=pid):
        release = unprivileged(kill, pid)
        assert release.locks == "unknown"
        assert release.as_dict()["locks"] == "unknown"
        assert "locks not checked" in str(release)
        # And it was killed and released all the same.
        assert release.outcome is Outcome.RELEASED
        assert release.footprint is not None
        assert release.footprint.anon >= 16 * victims.MIB
        assert victims.status_of(pid)["RssAnon"].split() == ["0", "kB"]


@needs_root
@pytest.mark.needs("held")
@_UNTRACEABLE
@pytest.mark.needs("release")
def test_with_ptrace_rights_the_same_victims_are_looked_at(
    become: Callable[[], None],
    kill: Kill,
) -> None:
    """So that it is the right that was missing above."""
    with _forked(become) as pid, victims.Process(trace=pid):
        release = kill(pid)
        assert release.locks == "free"
        assert release.outcome is Outcome.RELEASED
        assert "locks" not in str(release)


# ------------------------------------------------------ raising: scheduling


def scheduling(victim: victims.Process) -> dict[int, tuple[int, int, int]]:
    """Policy, priority, nice of each thread."""
    return {
        tid: (
            os.sched_getscheduler(tid),
            os.sched_getparam(tid).sched_priority,
            os.getpriority(os.PRIO_PROCESS, tid),
        )
        for tid in victim.tids()
    }


FIFO = os.SCHED_FIFO | RESET_ON_FORK


@needs_nice
@pytest.mark.needs("held_64_threads")
@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("idle", [False, True])
def test_all_threads_of_a_held_victim_get_the_real_time_class(
    threads: int, idle: bool, kill: Kill
) -> None:
    with victims.held(4, threads=threads, idle=idle) as victim:
        before = set(scheduling(victim).values())
        assert before == {(os.SCHED_IDLE, 0, 19) if idle
                          else (os.SCHED_OTHER, 0, 0)}  # fmt: skip
        release = kill(victim.pid)
        assert release.raised
        after = scheduling(victim)
        assert len(after) == threads
        assert {policy for policy, _, _ in after.values()} == {FIFO}
        assert {priority for _, priority, _ in after.values()} == {1}


@needs_nice
@pytest.mark.needs("held_64_threads")
def test_all_threads_of_a_held_victim_may_use_all_cpus(kill: Kill) -> None:
    own = os.sched_getaffinity(0)
    if len(own) < 2:
        pytest.skip("one CPU")
    with victims.held(4, threads=8) as victim:
        for tid in victim.tids():
            os.sched_setaffinity(tid, {min(own)})
        kill(victim.pid)
        for tid in victim.tids():
            assert os.sched_getaffinity(tid) >= own


@needs_nice
@pytest.mark.needs("held")
def test_a_victim_whose_locks_are_held_is_raised_too(
    tmp_path: Path, kill: Kill
) -> None:
    """It has to finish by itself: nobody may release it."""
    with victims.held(4, robust=tmp_path / "lock") as holder:
        release = kill(holder.pid, timeout=0.05)
        assert release.outcome is Outcome.LOCKED
        assert release.raised
        assert {p for p, _, _ in scheduling(holder).values()} == {FIFO}


@needs_nice
@pytest.mark.needs("held")
def test_release_of_a_dying_victim_raises_it() -> None:
    with (
        victims.held(4, killed=True) as victim,
        Victim(victim.pid) as pinned,
    ):
        assert {p for p, _, _ in scheduling(victim).values()} == {0}
        assert pinned.release().raised
        assert {p for p, _, _ in scheduling(victim).values()} == {FIFO}


@needs_nice
@pytest.mark.needs("held")
def test_what_is_real_time_already_is_left_so(kill: Kill) -> None:
    with victims.held(4) as victim:
        os.sched_setscheduler(victim.pid, os.SCHED_RR, os.sched_param(7))
        assert kill(victim.pid).raised
        assert scheduling(victim)[victim.pid][:2] == (os.SCHED_RR, 7)


@needs_nice
@pytest.mark.needs("starved")
@pytest.mark.needs("release")
def test_all_threads_of_a_starved_victim_are_raised(kill: Kill) -> None:
    with victims.starved(4, threads=8) as victim:
        victims.hold(victim)
        assert {p for p, _, _ in scheduling(victim).values()} == {
            os.SCHED_IDLE
        }
        release = kill(victim.pid)
        assert release.raised
        assert release.freed
        victims.wait_held(victim)
        after = scheduling(victim)
        assert len(after) == 8
        assert {p for p, _, _ in after.values()} == {FIFO}


@needs_nice
@pytest.mark.needs("held")
def test_the_caller_s_own_scheduling_is_untouched(kill: Kill) -> None:
    def own() -> list[object]:
        tids = sorted(int(t) for t in os.listdir("/proc/self/task"))
        return [
            (
                tid,
                os.sched_getscheduler(tid),
                os.sched_getparam(tid).sched_priority,
                os.getpriority(os.PRIO_PROCESS, tid),
                os.sched_getaffinity(tid),
            )
            for tid in tids
        ]

    with victims.held(4, idle=True) as victim:
        before = own()
        assert kill(victim.pid).raised
        assert own() == before


@needs_nice
@pytest.mark.needs("starved")
@pytest.mark.needs("release")
def test_shared_memory_of_a_starved_victim_is_back_in_bounded_time(
    kill: Kill,
) -> None:
    """The call can not free it: only the victim, once it gets to run."""
    with victims.starved(16, shared_anon=64) as victim:
        release = kill(victim.pid, timeout=10.0)
        assert release.raised
        assert release.outcome in BACK
        assert release.footprint is not None
        assert release.footprint.shmem >= 64 * victims.MIB
        # It has ended, and so all of it is back; not at the deadline.
        assert release.exited is not None
        assert release.exited < 5.0
        assert victim.ended()


# --------------------------------------------- raising: who is not raised


@pytest.mark.needs("release")
def test_a_live_process_is_never_raised() -> None:
    with (
        victims.asleep(4, threads=8, idle=True) as victim,
        Victim(victim.pid) as pinned,
    ):
        before = scheduling(victim)
        assert set(before.values()) == {(os.SCHED_IDLE, 0, 19)}
        cpus = [os.sched_getaffinity(tid) for tid in victim.tids()]
        release = pinned.release()
        assert release.outcome is Outcome.ALIVE
        assert not release.raised
        assert scheduling(victim) == before
        assert [os.sched_getaffinity(tid) for tid in victim.tids()] == cpus


@pytest.mark.needs("release")
def test_a_live_process_with_stopped_threads_is_never_raised() -> None:
    with victims.stopped(4, idle=True) as victim, Victim(victim.pid) as pin:
        before = scheduling(victim)
        release = pin.release()
        assert release.outcome is Outcome.ALIVE
        assert not release.raised
        assert scheduling(victim) == before


@pytest.mark.needs("seccomp")
@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSYS,
        errno.EPERM,
        errno.EINVAL,
        errno.EAGAIN,
        errno.EINTR,
        errno.ESRCH,
    ],
)
def test_a_live_process_is_not_raised_whatever_the_kernel_says(
    number: int, answered: Answered
) -> None:
    with victims.asleep(4, idle=True) as victim:
        before = scheduling(victim)

        def release() -> mrelease.Release:
            with Victim(victim.pid) as pinned:
                return pinned.release(timeout=0.1)

        result = answered({"process_mrelease": number}).run(release)
        assert not result.raised
        assert not result.freed
        assert scheduling(victim) == before
        assert victim.states() == "S"


def test_a_process_in_its_grace_is_not_raised(kill: Kill) -> None:
    """It may handle SIGTERM as it likes, and live."""
    with victims.stopped(4, idle=True) as victim:
        before = scheduling(victim)
        event = os.eventfd(0)
        job = kernel_errors.Job(
            lambda: kill(
                victim.pid, grace=60.0, escalate_on=event, timeout=10.0
            )
        )
        with job:
            victims.wait_until(
                lambda: int(victim.status()["ShdPnd"], 16) & 1 << 14 != 0,
                "SIGTERM has been sent",
            )
            assert scheduling(victim) == before
            os.eventfd_write(event, 1)
            assert job.result().exited is not None
        os.close(event)


@needs_root
@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_without_cap_sys_nice_it_is_not_raised_and_killed_all_the_same(
    unprivileged: Unprivileged,
    kill: Kill,
) -> None:
    def run() -> tuple[mrelease.Release, set[tuple[int, int, int]]]:
        if resource.getrlimit(resource.RLIMIT_NICE)[0] > 1:
            pytest.skip("RLIMIT_NICE allows it")
        with victims.held(4, threads=4, idle=True) as victim:
            release = kill(victim.pid)
            return release, set(scheduling(victim).values())

    release, after = unprivileged(run)
    assert not release.raised
    assert release.outcome is Outcome.RELEASED
    assert after == {(os.SCHED_IDLE, 0, 19)}


@needs_root
def test_without_cap_sys_nice_a_running_victim_is_killed(
    unprivileged: Unprivileged,
    kill: Kill,
) -> None:
    def run() -> mrelease.Release:
        with victims.spinning(4, threads=4) as victim:
            return kill(victim.pid, timeout=10.0)

    release = unprivileged(run)
    assert not release.raised
    assert release.freed


def _raise_limit(limit: int, value: int) -> None:
    try:
        resource.setrlimit(limit, (value, value))
    except (ValueError, PermissionError):
        pytest.skip("raising a hard limit needs CAP_SYS_RESOURCE")


@needs_root
@pytest.mark.needs("held")
@pytest.mark.parametrize(("limit", "nice"), [(40, -20), (30, -10), (20, 0)])
@pytest.mark.needs("release")
def test_with_rlimit_nice_it_is_raised_by_nice(
    limit: int, nice: int, kill: Kill
) -> None:
    def run() -> tuple[mrelease.Release, set[tuple[int, int, int]]]:
        _raise_limit(resource.RLIMIT_NICE, limit)
        kernel_errors.drop_privileges()
        with victims.held(4, threads=4, idle=True) as victim:
            release = kill(victim.pid)
            return release, set(scheduling(victim).values())

    victims.binary()
    release, after = kernel_errors.in_child(run)
    assert release.raised
    assert release.outcome is Outcome.RELEASED
    assert after == {(os.SCHED_OTHER | RESET_ON_FORK, 0, nice)}


@needs_root
@pytest.mark.needs("held")
def test_with_rlimit_rtprio_it_gets_the_real_time_class(kill: Kill) -> None:
    def run() -> tuple[mrelease.Release, set[tuple[int, int, int]]]:
        _raise_limit(resource.RLIMIT_RTPRIO, 1)
        kernel_errors.drop_privileges()
        with victims.held(4, threads=4) as victim:
            release = kill(victim.pid)
            return release, set(scheduling(victim).values())

    victims.binary()
    release, after = kernel_errors.in_child(run)
    assert release.raised
    assert {policy for policy, _, _ in after} == {FIFO}


@needs_nice
@pytest.mark.needs("held", "seccomp")
def test_where_real_time_is_forbidden_it_gets_the_best_nice(
    answered: Answered,
    kill: Kill,
) -> None:
    """A control group without real-time budget answers EPERM so."""
    refused = iter([errno.EPERM])

    def rule(call: kernel_errors.Call) -> kernel_errors.Plain:
        if call.args[0] == 0:  # a thread of a Reaper, for itself
            return kernel_errors.ALLOW
        return next(refused, kernel_errors.ALLOW)

    with victims.held(4, threads=4, idle=True) as victim:
        release = answered({"sched_setattr": [rule]}).run(kill, victim.pid)
        assert release.raised
        assert set(scheduling(victim).values()) == {
            (os.SCHED_OTHER | RESET_ON_FORK, 0, -20)
        }


@pytest.mark.needs("held", "seccomp")
@pytest.mark.parametrize(
    "call", ["sched_setattr", "sched_setaffinity", "getdents64"]
)
@pytest.mark.needs("release")
def test_a_victim_that_can_not_be_raised_is_killed_and_released(
    call: str, answered: Answered, kill: Kill
) -> None:
    with victims.held(4, threads=4) as victim:
        release = answered({call: errno.EPERM}).run(kill, victim.pid)
        assert release.raised is (call == "sched_setaffinity" and has_nice())
        assert release.outcome is Outcome.RELEASED
        assert victim.rss_anon() == 0


@needs_nice
@pytest.mark.needs("seccomp")
def test_the_raise_comes_after_the_signal(
    answered: Answered, kill: Kill
) -> None:
    """Never before: until then it is a live process."""
    calls = ("pidfd_send_signal", "process_mrelease", "sched_setattr",
             "sched_setaffinity")  # fmt: skip
    with victims.stopped(4, threads=3) as victim:
        threads = set(victim.tids())
        kernel = answered({name: [kernel_errors.ALLOW] for name in calls})
        kernel.run(kill, victim.pid, timeout=10.0)
        seen = [
            (call.name, call.args[0] if "sched" in call.name else call.args[1])
            for call, _ in kernel.calls
            # Without what a Reaper does to its own threads.
            if "sched" not in call.name or call.args[0] in threads
        ]
    sent = seen.index(("pidfd_send_signal", signal.SIGKILL))
    assert not any("sched" in name for name, _ in seen[:sent])
    # And after the release; in a Reaper another thread releases meanwhile.
    if kill is not by_reaper:
        assert seen[sent + 1] == ("process_mrelease", 0)
        assert "sched" not in seen[sent + 1][0]


@needs_nice
@pytest.mark.needs("held", "seccomp")
@pytest.mark.needs("release")
def test_kill_first_raises_a_victim_that_is_behind_the_caller(
    answered: Answered,
) -> None:
    """There is no race to be lost, and it helps where all CPUs are busy."""
    calls = ("pidfd_send_signal", "process_mrelease", "sched_setattr")
    with victims.held(4, threads=3, idle=True) as victim:
        threads = set(victim.tids())
        kernel = answered({name: [kernel_errors.ALLOW] for name in calls})
        release = kernel.run(mrelease.kill, victim.pid)
        seen = [
            call.name
            for call, _ in kernel.calls
            # Signal 0 asks whether it is still the victim.
            if (call.name != "pidfd_send_signal" or call.args[1] != 0)
            and (call.name != "sched_setattr" or call.args[0] in threads)
        ]
    assert release.outcome is Outcome.RELEASED
    assert release.raised
    assert seen == [
        "pidfd_send_signal", *["sched_setattr"] * 3, "process_mrelease",
    ]  # fmt: skip
