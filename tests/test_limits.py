"""Limits: no fds, no /proc, odd victims, signals and others in between.

What a kill does where something that it normally uses is missing, or
where something happens that it can not prevent. It always kills or says
clearly why not, before anything is signalled.

Not shown, as it can not be made on order: a victim that holds mmap_lock
for writing. The call waits for it without a limit (process_mrelease's
documentation says so); test_threads holds the call inside the kernel and
shows what then goes on and what not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import random
import resource
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_errors
import mrelease
import victims
from cgroups import Unavailable
from kill_ways import sees_no_lock
from mrelease import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Unprivileged
    from kill_ways import Kill

NOBODY = 65534
MIB = victims.MIB

_libc = ctypes.CDLL(None, use_errno=True)


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status by field, whatever the name of the process is."""
    text = Path(f"/proc/{pid}/status").read_text(errors="surrogateescape")
    return {
        name: value.strip()
        for name, _, value in (x.partition(":") for x in text.split("\n"))
    }


def killed(victim: victims.Process) -> bool:
    """It was sent SIGKILL, or has ended by it (and may be reaped)."""
    try:
        status = victim.status()
    except ProcessLookupError:
        return True
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"][0] in "ZXt" or bool(
        pending >> (signal.SIGKILL - 1) & 1
    )


def check_untouched(victim: victims.Process) -> None:
    """Nothing was signalled, and it has all its memory."""
    assert not killed(victim)
    assert victim.state() == "S"
    assert victim.rss_anon() >= victim.facts.get("anon", 0)


def has_ended(result: mrelease.Release) -> bool:
    """As one may expect of a victim that nothing holds.

    One that is released, but does not get to run on a busy machine, is
    not waited for.
    """
    return result.exited is not None or result.outcome is Outcome.RELEASED


def check_gone(victim: victims.Process) -> None:
    """SIGKILL ended it, nothing else did."""
    assert victim.wait() == -signal.SIGKILL


# ----------------------------------------------------- file descriptors


def use_up_fds() -> None:
    """No file descriptor is left in this process from here on."""
    lowest = os.dup(0)
    os.close(lowest)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    with pytest.raises(OSError, match="Too many open files"):
        os.dup(0)


@pytest.mark.parametrize(
    "function",
    [mrelease.kill, mrelease.Victim],
    ids=["kill", "Victim"],
)
def test_without_a_free_fd_nothing_is_signalled_and_the_error_says_why(
    function: Callable[[int], object],
) -> None:
    with victims.asleep(16) as victim:

        def run() -> tuple[int | None, str]:
            use_up_fds()
            with pytest.raises(OSError) as caught:  # noqa: PT011
                function(victim.pid)
            return caught.value.errno, str(caught.value.strerror)

        code, text = kernel_errors.in_child(run)
        assert code == errno.EMFILE
        assert text == (
            f"cannot kill pid {victim.pid}: no file descriptor is left for "
            "it (RLIMIT_NOFILE); nothing was signalled. A Victim made in "
            "advance has its own"
        )
        check_untouched(victim)


def test_without_a_free_fd_from_pidfd_fails_by_errno() -> None:
    with victims.asleep(1) as victim:

        def run() -> int | None:
            use_up_fds()
            with pytest.raises(OSError) as caught:  # noqa: PT011
                mrelease.Victim.from_pidfd(victim.pidfd)
            return caught.value.errno

        assert kernel_errors.in_child(run) == errno.EMFILE
        check_untouched(victim)


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_without_a_free_fd_a_victim_made_in_advance_is_released() -> None:
    with victims.held(16) as victim:

        def run() -> mrelease.Release:
            with mrelease.Victim(victim.pid) as prepared:
                use_up_fds()
                return prepared.kill(timeout=0.2)

        result = kernel_errors.in_child(run)
        assert result.released is not None
        assert result.errno is None
        assert victim.rss_anon() == 0
        # It could not be looked at, so nothing is claimed.
        assert result.footprint is None
        assert result.locks == "unknown"
        assert "locks not checked" in str(result)
        victim.let_go()
        check_gone(victim)


@pytest.mark.needs("release")
def test_without_a_free_fd_a_victim_made_in_advance_ends() -> None:
    with victims.asleep(16, threads=4) as victim:

        def run() -> mrelease.Release:
            with mrelease.Victim(victim.pid) as prepared:
                use_up_fds()
                return prepared.kill()

        result = kernel_errors.in_child(run)
        assert result.outcome in (Outcome.RELEASED, Outcome.EXITED)
        assert result.signalled is not None
        assert has_ended(result)
        assert result.footprint is None
        assert result.locks == "unknown"
        check_gone(victim)


@pytest.mark.needs("robust_holder")
def test_without_a_free_fd_a_lock_held_by_the_leader_is_still_found() -> None:
    def run(pid: int) -> mrelease.Release:
        with mrelease.Victim(pid) as prepared:
            use_up_fds()
            return prepared.kill()

    # The look comes after SIGKILL: some have handed their lock on by then.
    for _ in range(10):
        with victims.robust_holder(16) as victim:
            result = kernel_errors.in_child(run, victim.pid)
            check_gone(victim)
        if result.outcome is not Outcome.EXITED:
            break
    assert result.outcome is Outcome.LOCKED
    assert result.locks == "held"
    assert result.attempts == 0


def test_without_a_free_fd_support_answers() -> None:
    def run() -> tuple[bool | None, bool | None]:
        use_up_fds()
        found = mrelease.support()
        return found.proc.works, found.seccomp

    # It can not read /proc: so it says, and does not raise.
    assert kernel_errors.in_child(run) == (False, None)


# ---------------------------------------------------------------- /proc


def own_mounts() -> None:
    """A mount namespace of its own for this process."""
    clone_newns, ms_rec, ms_private = 0x00020000, 0x4000, 1 << 18
    if _libc.unshare(clone_newns) != 0:
        raise Unavailable("mounts of one's own need root")
    if _libc.mount(b"none", b"/", None, ms_rec | ms_private, None) != 0:
        raise Unavailable("mounts can not be made private")


def take_away_proc() -> None:
    """No /proc for this process from here on."""
    own_mounts()
    while os.path.exists("/proc/self"):
        if _libc.umount2(b"/proc", 2) != 0:  # MNT_DETACH
            raise Unavailable("/proc can not be unmounted")


@pytest.mark.needs("root", "held")
@pytest.mark.needs("release")
def test_without_proc_the_victim_is_killed_and_released(kill: Kill) -> None:
    with victims.held(16, threads=4) as victim:

        def run() -> mrelease.Release:
            take_away_proc()
            return kill(victim.pid, timeout=0.2)

        result = kernel_errors.in_child(run)
        assert result.released is not None
        assert result.attempts == 1
        assert victim.rss_anon() == 0
        assert result.footprint is None
        assert result.locks == "unknown"
        # Without /proc it can not be told how far its own teardown is.
        assert result.outcome is Outcome.PARTIAL
        assert not result.freed
        victim.let_go()
        check_gone(victim)


@pytest.mark.needs("root")
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.needs("release")
def test_without_proc_the_victim_ends(threads: int, kill: Kill) -> None:
    with victims.asleep(16, threads=threads) as victim:

        def run() -> mrelease.Release:
            take_away_proc()
            return kill(victim.pid)

        result = kernel_errors.in_child(run)
        assert result.outcome in (Outcome.RELEASED, Outcome.EXITED)
        assert has_ended(result)
        assert result.footprint is None
        assert result.locks == "unknown"
        assert "unknown size" in str(result)
        check_gone(victim)


@pytest.mark.needs("root")
def test_without_proc_a_start_time_is_refused_and_nothing_signalled() -> None:
    with victims.asleep(16) as victim:
        started = victim.started()

        def run() -> OSError:
            take_away_proc()
            with pytest.raises(OSError) as caught:  # noqa: PT011
                mrelease.Victim(victim.pid, started=started)
            return caught.value

        error = kernel_errors.in_child(run)
        # Not ProcessLookupError: the process is there.
        assert not isinstance(error, ProcessLookupError)
        assert f"cannot kill pid {victim.pid}" in str(error)
        assert "/proc is not mounted" in str(error)
        check_untouched(victim)


@pytest.mark.needs("root")
def test_without_proc_from_pidfd_says_that_it_can_not_tell() -> None:
    with victims.asleep(16) as victim:

        def run() -> OSError:
            take_away_proc()
            with pytest.raises(OSError) as caught:  # noqa: PT011
                mrelease.Victim.from_pidfd(victim.pidfd)
            return caught.value

        error = kernel_errors.in_child(run)
        assert not isinstance(error, ProcessLookupError)
        assert (
            f"cannot tell which process pidfd {victim.pidfd} stands for: "
            "/proc is not mounted"
        ) in str(error)
        check_untouched(victim)


@pytest.mark.needs("root")
def test_without_proc_a_victim_has_no_start_and_no_footprint() -> None:
    with victims.asleep(16) as victim:

        def run() -> tuple[int | None, bool, OSError]:
            take_away_proc()
            with mrelease.Victim(victim.pid) as made:
                with pytest.raises(OSError) as caught:  # noqa: PT011
                    made.footprint()
                return made.started, made.exited, caught.value

        started, exited, error = kernel_errors.in_child(run)
        assert started is None
        assert not exited
        assert not isinstance(error, ProcessLookupError)
        assert f"/proc/{victim.pid}/status" in str(error)
        check_untouched(victim)


@pytest.mark.needs("root")
def test_without_proc_a_reaped_process_is_still_told_from_a_live_one() -> None:
    def run() -> str:
        victim = subprocess.Popen(["sleep", "60"])
        made = mrelease.Victim(victim)
        try:
            take_away_proc()
        finally:
            victim.kill()
            victim.wait()
        with made, pytest.raises(ProcessLookupError) as caught:
            made.kill()
        return str(caught.value)

    assert "it has ended" in kernel_errors.in_child(run)


@pytest.mark.needs("root")
@pytest.mark.needs("release")
def test_without_proc_support_says_so() -> None:
    def run() -> mrelease.Support:
        take_away_proc()
        return mrelease.support(probe=True)

    found = kernel_errors.in_child(run)
    assert found.proc.works is False
    assert "/proc is not mounted" in found.proc.why
    assert found.proc.advice
    assert found.seccomp is None
    assert found.release.works


# A /proc that hides from a user what is not the user's.


def hide_pids() -> None:
    """/proc with hidepid=2, as an unprivileged user from here on."""
    own_mounts()
    if _libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=2") != 0:
        raise Unavailable(
            f"no /proc with hidepid: {os.strerror(ctypes.get_errno())}"
        )
    kernel_errors.drop_privileges()
    assert not os.path.exists("/proc/1")


@pytest.mark.needs("root")
def test_with_hidepid_a_process_of_ones_own_is_killed_as_ever(
    kill: Kill,
) -> None:
    with victims.asleep(16, threads=4, user=NOBODY) as victim:

        def run() -> mrelease.Release:
            hide_pids()
            return kill(victim.pid)

        result = kernel_errors.in_child(run)
        assert result.freed
        assert result.footprint is not None
        assert result.footprint.anon >= 16 * MIB
        assert sees_no_lock(kill, result)
        check_gone(victim)


@pytest.mark.needs("root")
def test_with_hidepid_anothers_process_is_refused(kill: Kill) -> None:
    with victims.asleep(16) as victim:

        def run() -> None:
            hide_pids()
            assert not os.path.exists(f"/proc/{victim.pid}")
            kill(victim.pid)

        with pytest.raises(PermissionError, match="nothing was signalled"):
            kernel_errors.in_child(run)
        check_untouched(victim)


@contextlib.contextmanager
def undumpable(size: int) -> Iterator[kernel_errors.Job[None]]:
    """A process of user nobody that hidepid hides from nobody too."""
    ours, theirs = os.pipe()

    def run() -> None:
        kernel_errors.drop_privileges()
        memory = bytearray(b"x") * size
        _libc.prctl(kernel_errors.PR_SET_DUMPABLE, 0, 0, 0, 0)
        os.write(theirs, b"r")
        while memory:
            signal.pause()

    try:
        with kernel_errors.Job(run) as job:
            assert select.select([ours], [], [], victims.TIMEOUT)[0]
            yield job
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.needs("root")
@pytest.mark.needs("release")
def test_with_hidepid_a_hidden_process_that_may_be_killed_is(
    kill: Kill,
) -> None:
    with undumpable(16 * MIB) as job:

        def run() -> mrelease.Release:
            hide_pids()
            assert not os.path.exists(f"/proc/{job.pid}")
            return kill(job.pid)

        result = kernel_errors.in_child(run)
        assert result.outcome in (Outcome.RELEASED, Outcome.EXITED)
        assert has_ended(result)
        assert result.footprint is None
        assert result.locks == "unknown"
        with pytest.raises(kernel_errors.ChildKilled) as caught:
            job.result()
        assert caught.value.signal == signal.SIGKILL


@pytest.mark.needs("root")
def test_with_hidepid_a_start_time_that_can_not_be_read_is_refused() -> None:
    with undumpable(MIB) as job:
        stat = Path(f"/proc/{job.pid}/stat").read_text()
        started = int(stat.rpartition(")")[2].split()[19])

        def run() -> OSError:
            hide_pids()
            with pytest.raises(OSError) as caught:  # noqa: PT011
                mrelease.Victim(job.pid, started=started)
            return caught.value

        error = kernel_errors.in_child(run)
        # It has not ended, so it must not be said to have.
        assert not isinstance(error, ProcessLookupError), str(error)
        assert "cannot be told" in str(error)
        assert victims.status_of(job.pid)["State"][0] == "S"


# ------------------------------------------- signals that arrive meanwhile


def wait_in(pid: int, name: str) -> None:
    """Wait until a process is inside this system call."""
    file = Path(f"/proc/{pid}/syscall")
    number = str(kernel_errors.number(name))

    def inside() -> bool:
        try:
            return file.read_text().split()[0] == number
        except OSError:
            return False

    victims.wait_until(inside, f"{pid} is in {name}")


@pytest.mark.needs("held")
@pytest.mark.parametrize("given", ["pid", "Victim"])
@pytest.mark.needs("release")
def test_ctrl_c_comes_out_of_the_wait_and_the_victim_is_released(
    given: str,
) -> None:
    # It has shared memory, which only its end gives back: kill() waits.
    with victims.held(16, shared_anon=4) as victim:

        def run() -> None:
            if given == "Victim":
                with mrelease.Victim(victim.pid) as made:
                    made.kill(timeout=600)
            mrelease.kill(victim.pid, timeout=600)

        with kernel_errors.Job(run) as job:
            victims.wait_held(victim)
            wait_in(job.pid, "ppoll")
            assert victim.rss_anon() == 0
            job.signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                job.result()
        victim.let_go()
        check_gone(victim)


def test_ctrl_c_comes_out_of_the_grace_and_the_victim_is_killed() -> None:
    with victims.asleep(16, sigterm="ignore") as victim:

        def run() -> None:
            mrelease.kill(victim.pid, grace=600)

        with kernel_errors.Job(run) as job:
            wait_in(job.pid, "ppoll")
            check_untouched(victim)
            job.signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                job.result()
        # Killed before the exception came out, so it needs no time limit.
        assert killed(victim)
        check_gone(victim)


def test_an_exception_of_a_handler_comes_out_and_the_victim_is_killed() -> (
    None
):
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    def run(pid: int) -> str:
        signal.signal(signal.SIGUSR1, stop)
        with mrelease.Victim(pid) as made:
            try:
                made.kill(grace=600)
            except Stop:
                return "Stop"
        return "no exception"

    with victims.asleep(16, sigterm="ignore") as victim:
        with kernel_errors.Job(lambda: run(victim.pid)) as job:
            wait_in(job.pid, "ppoll")
            job.signal(signal.SIGUSR1)
            assert job.result() == "Stop"
        assert killed(victim)
        check_gone(victim)


@pytest.mark.needs("held", "seccomp")
@pytest.mark.needs("release")
def test_ctrl_c_inside_the_release_comes_out_after_it() -> None:
    rules = {"process_mrelease": [kernel_errors.BLOCK]}
    with (
        victims.held(16, shared_anon=4) as victim,
        kernel_errors.answered(rules) as kernel,
    ):
        job = kernel.start(lambda: mrelease.kill(victim.pid, timeout=600))
        kernel.blocked()
        job.signal(signal.SIGINT)
        victims.wait_until(
            lambda: (
                int(victims.status_of(job.pid)["ShdPnd"], 16) == 0
                or victims.status_of(job.pid)["State"][0] in "SD"
            ),
            "SIGINT is there",
        )
        kernel.release()
        with pytest.raises(KeyboardInterrupt):
            job.result()
        assert victim.rss_anon() == 0
        victim.let_go()
        check_gone(victim)


@pytest.mark.needs("release")
def test_a_signal_each_ms_changes_nothing_in_200_kills(
    rounds: Callable[[int], int],
    kill: Kill,
) -> None:
    count = rounds(200)

    def run() -> tuple[list[mrelease.Release], int]:
        heard = 0

        def hear(*_: object) -> None:
            nonlocal heard
            heard += 1

        results = []
        signal.signal(signal.SIGALRM, hear)
        for _ in range(count):
            with victims.asleep(4, threads=2) as victim:
                # The first of them while kill() is at work: it is over
                # in a few ms.
                signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.001)
                try:
                    results.append(kill(victim.pid, timeout=30))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                check_gone(victim)
        return results, heard

    with kernel_errors.Job(run) as job:
        results, heard = job.result(240)
    assert len(results) == count
    for result in results:
        assert result.outcome in (Outcome.RELEASED, Outcome.EXITED), result
        assert result.freed, result
        assert has_ended(result)
        assert result.footprint is not None
        assert result.footprint.anon >= 4 * MIB
        assert sees_no_lock(kill, result)
    print(f"{count} kills, {heard} signals")
    assert heard >= count // 10


@pytest.mark.needs("held")
@pytest.mark.needs("release")
def test_a_signal_each_ms_does_not_change_how_long_is_waited(
    kill: Kill,
) -> None:
    with victims.held(16, shared_anon=4) as victim:

        def run() -> tuple[float, int, mrelease.Release]:
            heard = 0

            def hear(*_: object) -> None:
                nonlocal heard
                heard += 1

            signal.signal(signal.SIGALRM, hear)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            begun = time.monotonic()
            result = kill(victim.pid, timeout=0.6)
            taken = time.monotonic() - begun
            signal.setitimer(signal.ITIMER_REAL, 0)
            return taken, heard, result

        taken, heard, result = kernel_errors.in_child(run)
        print(f"{taken:.3f} s for 0.6 s, {heard} signals")
        assert heard >= 20
        # It would be ten times as long if each signal began the wait anew,
        # and no wait at all if one ended it.
        assert 0.6 <= taken < 6
        assert result.released is not None
        assert result.exited is None


# ------------------------------------------------- limits of the machine


@pytest.mark.needs("root")
def test_rlimit_nproc_does_not_hinder_a_kill(
    unprivileged: Unprivileged,
) -> None:
    with victims.asleep(16, user=NOBODY) as victim:

        def run() -> tuple[mrelease.Release, mrelease.Support]:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            with pytest.raises(BlockingIOError):
                os.fork()
            result = mrelease.kill(victim.pid)
            return result, mrelease.support(probe=True)

        result, found = unprivileged(run)
        assert result.freed
        assert has_ended(result)
        # A probe needs a child: it says that it got none.
        assert found.release.works is None
        assert "child" in found.release.why
        check_gone(victim)


@pytest.mark.parametrize("count", [500, 5_000, 65_000])
@pytest.mark.needs("root")
def test_the_footprint_is_right_with_thousands_of_groups(count: int) -> None:
    with groups_holder() as (pid, set_groups):
        set_groups(range(100_000, 100_000 + count))
        check_footprint(pid)


@pytest.mark.needs("root")
def test_the_footprint_is_right_wherever_the_line_of_groups_ends() -> None:
    # Around the sizes at which a reader's buffer might be full.
    with groups_holder() as (pid, set_groups):
        for size in (1024, 2048, 4096, 8192):
            for length in range(size - 200, size + 20, 7):
                # Each is six digits and a space; the last one fills up.
                count, rest = divmod(length, 7)
                groups = [*range(100_000, 100_000 + count)]
                groups.append(10 ** max(rest - 1, 0))
                set_groups(groups)
                check_footprint(pid)


@contextlib.contextmanager
def groups_holder() -> Iterator[
    tuple[int, Callable[[range | list[int]], None]]
]:
    """A process that sets its groups as told, and rests."""
    down_r, down_w = os.pipe()
    up_r, up_w = os.pipe()

    def run() -> None:
        os.close(down_w)
        with os.fdopen(down_r, "rb") as orders:
            while True:
                os.setgroups(pickle.load(orders))
                os.write(up_w, b"d")

    with (
        kernel_errors.Job(run) as job,
        os.fdopen(down_w, "wb", buffering=0) as orders,
    ):

        def set_groups(groups: range | list[int]) -> None:
            data = memoryview(pickle.dumps(list(groups)))
            while data:
                data = data[orders.write(data) :]
            assert select.select([up_r], [], [], victims.TIMEOUT)[0]
            assert os.read(up_r, 1) == b"d"
            found = victims.status_of(job.pid)["Groups"].split()
            assert [int(gid) for gid in found] == sorted(groups)
            victims.wait_until(
                lambda: victims.status_of(job.pid)["State"][0] == "S",
                "it rests",
            )

        yield job.pid, set_groups
    for fd in (down_r, up_r, up_w):
        os.close(fd)


def check_footprint(pid: int) -> None:
    """It is what /proc says, before and after."""

    def read() -> tuple[int, ...]:
        status = status_of(pid)
        return tuple(
            int(status[name].split()[0]) * 1024
            for name in (
                "RssAnon", "RssFile", "RssShmem", "VmSwap", "HugetlbPages"
            )
        )  # fmt: skip

    with mrelease.Victim(pid) as made:
        for _ in range(100):
            before = read()
            found = made.footprint()
            if before == read():
                break
        else:
            raise AssertionError(f"it never rests: {before} {read()}")
    assert (
        found.anon, found.file, found.shmem, found.swap, found.hugetlb
    ) == before  # fmt: skip
    assert found.anon > 0


# --------------------------------------------------------- odd victims

NAMES = [
    b") S 0 0 0 0 0",
    b") Z 0 0 0 0 0 4",
    b"(",
    b")",
    b"a (b) c) R 1",
    b"\nRssAnon:\t9 k",
    b"RssAnon: 99 kB",
    b"\n",
    b"\n\nState:\tZ\n",
    b"x\nShdPnd:\t100",
    b"\\n\\\n",
    b"\xff\xfe\x80",
    b" 1 2 3",
    b"kthreadd",
]


@contextlib.contextmanager
def named(
    folder: Path, name: bytes, *, mib: int
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The victim's program under another name: (child, anon bytes)."""
    path = os.path.join(os.fsencode(folder), name)
    os.symlink(os.fsencode(victims.binary()), path)
    with subprocess.Popen(
        [b"VmSwap: 77 kB\nRssAnon:\t1 kB) Z", b"--anon", str(mib).encode()],
        executable=path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as popen:
        try:
            assert popen.stdout is not None
            facts = popen.stdout.readline().decode().split()
            assert facts[0] == "ready"
            comm = Path(f"/proc/{popen.pid}/comm").read_bytes()
            assert comm[:-1] == name[:15]
            victims.wait_until(
                lambda: status_of(popen.pid)["State"][0] == "S", "it rests"
            )
            yield popen, mib * MIB
        finally:
            popen.kill()


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.needs("release")
def test_a_name_can_not_forge_identity_or_footprint(
    name: bytes, tmp_path: Path, kill: Kill
) -> None:
    with named(tmp_path, name, mib=8) as (popen, anon):
        raw = Path(f"/proc/{popen.pid}/stat").read_bytes()
        started = int(raw[raw.rindex(b") ") :].split()[20])
        check_footprint(popen.pid)
        with pytest.raises(ProcessLookupError):
            mrelease.Victim(popen.pid, started=started + 1)
        with mrelease.Victim(popen.pid, started=started) as made:
            assert made.started == started
            assert not made.exited
            # release() signals nothing: it must see that this one lives.
            assert made.release().outcome is Outcome.ALIVE
            assert popen.poll() is None
            result = kill(made)
        assert result.freed
        assert result.footprint is not None
        assert anon <= result.footprint.anon < anon + 2 * MIB
        assert result.footprint.swap == 0
        assert sees_no_lock(kill, result)
        assert popen.wait() == -signal.SIGKILL


@pytest.mark.needs("held", "seccomp")
@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.needs("release")
def test_a_name_can_not_hide_that_a_victim_is_dying(
    name: bytes, tmp_path: Path
) -> None:
    with (
        named(tmp_path, name, mib=8) as (popen, _),
        victims.Process(trace=popen.pid),
        mrelease.Victim(popen) as made,
    ):
        popen.kill()
        victims.wait_until(
            lambda: status_of(popen.pid)["State"][0] == "t",
            "held at its end",
        )
        # With EINVAL the cause is looked for: /proc/PID/stat tells whether
        # it is dying (then somebody must share its memory) or alive.
        rules = {"process_mrelease": errno.EINVAL}
        with kernel_errors.answered(rules) as kernel:
            result = kernel.run(lambda: made.release(timeout=0))
        assert result.outcome is Outcome.SHARED, result
        result = made.release()
        assert result.outcome is Outcome.RELEASED, result
        assert made.footprint().anon == 0


THREADS = 4000


@pytest.mark.needs("release")
def test_a_victim_with_4000_threads_is_killed_and_released(kill: Kill) -> None:
    with victims.asleep(16, threads=THREADS) as victim:
        result = kill(victim.pid, timeout=30)
        # With so many and so little memory it is first left to its end.
        assert result.outcome in (Outcome.RELEASED, Outcome.EXITED)
        assert result.freed
        assert result.locks in ("free", "unknown")
        check_gone(victim)
    with victims.held(16, threads=600) as victim:
        result = kill(victim.pid, timeout=30)
        assert result.outcome is Outcome.RELEASED
        assert result.freed
        assert result.locks == "free"


@pytest.mark.needs("robust_holder")
def test_the_one_of_4000_threads_that_holds_a_lock_is_found(
    kill: Kill,
) -> None:
    with victims.robust_holder(
        16, threads=THREADS, robust_in_thread=True
    ) as victim:
        result = kill(victim.pid, timeout=30)
        # It ends by itself, and hands on the lock.
        if result.locks == "held":
            assert result.outcome is Outcome.LOCKED
            assert result.attempts == 0
        check_gone(victim)
    with (
        victims.robust_holder(
            16, threads=600, robust_in_thread=True
        ) as victim,
        contextlib.ExitStack() as held,
    ):
        victims.hold(victim)
        held.callback(victim.let_go)
        result = kill(victim.pid, timeout=1)
        assert result.outcome is Outcome.LOCKED
        assert result.locks == "held"
        assert result.attempts == 0


# ------------------------------------------- who waits for the children


@pytest.mark.needs("release")
def test_with_sigchld_ignored_a_child_is_killed(kill: Kill) -> None:
    def run() -> tuple[mrelease.Release, bool]:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with victims.asleep(16) as victim:
            result = kill(victim.popen)
            # The kernel reaps it, at its end.
            gone = not os.path.exists(f"/proc/{victim.pid}")
        return result, gone

    for _ in range(20):
        result, gone = kernel_errors.in_child(run)
        assert result.outcome in (Outcome.RELEASED, Outcome.EXITED), result
        assert result.freed, result
        assert has_ended(result)
        assert result.footprint is not None
        assert result.footprint.anon >= 16 * MIB
        assert gone


@pytest.mark.needs("release")
def test_with_a_sigchld_handler_that_reaps_everything_children_are_killed(
    rounds: Callable[[int], int],
    kill: Kill,
) -> None:
    def run() -> list[tuple[mrelease.Release, int]]:
        reaped = []

        def reap(*_: object) -> None:
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    reaped.append(found)

        signal.signal(signal.SIGCHLD, reap)
        results = []
        for _ in range(rounds(100)):
            with victims.asleep(4) as victim:
                result = kill(victim.pid, timeout=30)
                victims.wait_until(
                    lambda pid=victim.pid: any(  # type: ignore[misc]
                        found == pid for found, _ in reaped
                    ),
                    "it is reaped",
                )
            status = next(s for pid, s in reaped if pid == victim.pid)
            results.append((result, os.waitstatus_to_exitcode(status)))
        return results

    for result, code in kernel_errors.in_child(run):
        assert result.outcome in (Outcome.RELEASED, Outcome.EXITED), result
        assert result.freed, result
        assert has_ended(result)
        assert code == -signal.SIGKILL


def test_after_fork_parent_and_child_kill_with_the_same_victims() -> None:
    with (
        victims.asleep(16) as one,
        victims.asleep(16) as two,
        mrelease.Victim(one.pid) as first,
        mrelease.Victim(two.pid) as second,
    ):

        def run() -> mrelease.Release:
            result = first.kill()
            first.close()
            second.close()
            return result

        assert kernel_errors.in_child(run).freed
        check_gone(one)
        # What the child closed is open here.
        assert first.exited
        with pytest.raises(ProcessLookupError):
            first.kill()
        check_untouched(two)
        assert second.kill().freed
        check_gone(two)


def test_a_forked_child_kills_by_pid_and_as_its_own_child(kill: Kill) -> None:
    def run(pid: int) -> list[mrelease.Release]:
        with victims.asleep(16) as own:
            return [kill(pid), kill(own.popen)]

    with victims.asleep(16) as victim:
        results = kernel_errors.in_child(run, victim.pid)
        assert [result.freed for result in results] == [True, True]
        check_gone(victim)


def test_after_fork_the_parents_popen_is_no_child_of_the_child(
    kill: Kill,
) -> None:
    with victims.asleep(1) as victim:
        # Popen objects are of children of their own process: refused.
        with pytest.raises(ProcessLookupError, match="not a child"):
            kernel_errors.in_child(lambda: kill(victim.popen))
        check_untouched(victim)


# ------------------------------------- killed by somebody else meanwhile


class Rival:
    """A thread that sends SIGKILL at about the same moment as we."""

    def __init__(self) -> None:
        self._go = threading.Barrier(2)

    def race(
        self, kill: Kill, victim: victims.Process, *, reap: bool
    ) -> tuple[mrelease.Release | None, ProcessLookupError | None]:
        pause = random.uniform(0, 300e-6)
        ours = random.uniform(0, 300e-6)

        def rival() -> None:
            self._go.wait()
            spin(pause)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(victim.pidfd, signal.SIGKILL)
            if reap:
                victim.wait()

        thread = threading.Thread(target=rival)
        thread.start()
        try:
            self._go.wait()
            spin(ours)
            return kill(victim.pid, timeout=30), None
        except ProcessLookupError as error:
            return None, error
        finally:
            thread.join()


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.needs("release")
def test_a_rival_that_kills_too_makes_no_exception_in_200_rounds(
    rounds: Callable[[int], int],
    kill: Kill,
) -> None:
    rival = Rival()
    seen: dict[str, int] = {}
    unsure = 0
    for turn in range(rounds(200)):
        with victims.asleep(8, threads=1 + turn % 4) as victim:
            result, error = rival.race(kill, victim, reap=False)
            # Not reaped, so its pid is still its own: no error at all.
            assert error is None
            assert result is not None
            assert result.outcome in (Outcome.RELEASED, Outcome.EXITED)
            assert victim.rss_anon() == 0
            if result.outcome is Outcome.EXITED:
                assert victim.ended()
            # It may have gone past its memory while it was looked at: then
            # nobody can tell whether that was shared, and it says so.
            assert result.freed or result.outcome is Outcome.EXITED, result
            unsure += not result.freed
            what = result.outcome.value
            if result.signalled is None:
                what += ", not signalled"
            seen[what] = seen.get(what, 0) + 1
            check_gone(victim)
    print(f"rival: {seen}, {unsure} not known to be freed")
    assert unsure <= rounds(200) // 2


@pytest.mark.needs("release")
def test_a_rival_that_kills_and_reaps_makes_process_lookup_error_only(
    rounds: Callable[[int], int],
    kill: Kill,
) -> None:
    rival = Rival()
    seen: dict[str, int] = {}
    for turn in range(rounds(200)):
        with victims.asleep(8, threads=1 + turn % 4) as victim:
            result, error = rival.race(kill, victim, reap=True)
            if result is not None:
                assert result.outcome in (Outcome.RELEASED, Outcome.EXITED)
                assert has_ended(result)
                assert result.pid == victim.pid
                what = result.outcome.value
            else:
                assert error is not None
                assert f"cannot kill pid {victim.pid}" in str(error)
                what = "ProcessLookupError"
            seen[what] = seen.get(what, 0) + 1
            assert victim.wait() == -signal.SIGKILL
    print(f"rival that reaps: {seen}")
