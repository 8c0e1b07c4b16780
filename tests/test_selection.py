"""kill_tree() and kill_group(): all that belongs, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import families
import kernel_errors
import mrelease
import victims
from families import Family, field
from mrelease import Outcome, Reaper, Release, kill_group, kill_tree, selection

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from conftest import Unprivileged

FREED = {Outcome.RELEASED, Outcome.EXITED}

CHAIN = """
for _ in range({depth}):
    if child():
        rest()
rest()
"""

BRUSH = """
for _ in range({width}):
    child() or rest()
rest()
"""

# Its children have children, in a session of their own.
SESSIONS = """
for _ in range(2):
    if child() == 0:
        os.setsid()
        for _ in range(2):
            child() or rest()
        rest()
rest()
"""

# Forks for ever, at most some 500 in 5 s; the children do nothing.
FORKER = """
while time.monotonic() < end - 55:
    child() or rest()
    time.sleep(0.01)
rest()
"""


def no_stopped(family: Family) -> bool:
    return "T" not in families.states(family.pids())


def assert_freed(releases: list[Release]) -> None:
    bad = [str(r) for r in releases if not r.freed and r.outcome is not
           Outcome.GONE]  # fmt: skip
    assert not bad, bad


# ---------------------------------------------------------------- kill_tree


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("rest()", 1),
        (CHAIN.format(depth=30), 31),
        (BRUSH.format(width=60), 61),
        (SESSIONS, 7),
    ],
    ids=["alone", "deep", "wide", "sessions"],
)
def test_a_tree_is_killed_whole_the_root_is_told_first(
    script: str, count: int
) -> None:
    with Family(script) as family:
        pids = family.wait_for(count)
        parents = {pid: int(field(pid, 4)) for pid in pids}
        releases = kill_tree(family.popen)
        assert family.left() == set()
        assert family.popen.wait() == -signal.SIGKILL
    told = [release.pid for release in releases]
    assert told[0] == family.pid
    assert set(told) == pids
    assert len(told) == count
    for pid in told[1:]:
        assert told.index(parents[pid]) < told.index(pid)
    assert_freed(releases)


def test_the_memory_of_a_tree_is_back(
    stack: contextlib.ExitStack,
) -> None:
    import cgroups

    meter = stack.enter_context(cgroups.Meter())
    grown = """
memory = b"x" * (16 << 20)
for _ in range(3):
    if child() == 0:
        own = b"y" * (16 << 20)
        rest()
rest()
"""
    with Family(grown, groups=[meter]) as family:
        family.wait_for(4)
        victims.wait_until(lambda: meter.usage() > 64 << 20, "64 MiB")
        releases = kill_tree(family.pid, timeout=10)
        assert meter.usage() < (4 << 20) + meter.slack
        assert family.left() == set()
    assert_freed(releases)
    assert all(r.footprint and r.footprint.anon for r in releases)


def test_what_is_not_in_the_tree_lives(stack: contextlib.ExitStack) -> None:
    other = stack.enter_context(victims.asleep(1))
    with Family(BRUSH.format(width=3)) as family:
        pids = family.wait_for(4)
        child = max(pids - {family.pid})
        releases = kill_tree(child)
        assert [release.pid for release in releases] == [child]
        victims.wait_until(lambda: child not in family.pids(), "dead")
        assert family.pids() == pids - {child}
        assert no_stopped(family)
    assert not other.ended()


def test_no_late_fork_is_left(rounds: Callable[[int], int]) -> None:
    for turn in range(rounds(30)):
        with Family(FORKER) as family:
            family.wait_for(2 + turn % 5)
            releases = kill_tree(family.pid, timeout=10)
            assert family.left() == set(), turn
        assert_freed(releases)


def test_a_storm_is_killed_to_the_last(rounds: Callable[[int], int]) -> None:
    for turn in range(rounds(10)):
        with Family(families.storm()) as family:
            family.wait_forks(5 + 4 * turn)
            kill_tree(family.pid, timeout=10)
            assert family.left() == set(), turn


def test_a_root_of_another_parent_is_not_seen_stopped() -> None:
    # As sudo does, which stops itself when its child is stopped.
    script = f"""
pid = child()
if pid == 0:
    {BRUSH.format(width=5).replace(chr(10), chr(10) + "    ")}
status = os.waitpid(pid, os.WUNTRACED)[1]
say("stopped" if os.WIFSTOPPED(status) else "killed")
rest()
"""
    for _ in range(10):
        with Family(script) as family:
            family.wait_for(7)
            (root,) = children(family.pid)
            releases = kill_tree(root, timeout=10)
            assert family.read_line() == "killed"
            assert releases[0].pid == root
            assert len(releases) == 6
            victims.wait_until(
                lambda family=family: family.pids() == {family.pid},  # type: ignore[misc]
                "all but its parent dead", 5,
            )  # fmt: skip


def test_what_was_stopped_before_is_killed_too() -> None:
    with Family(BRUSH.format(width=2)) as family:
        pids = family.wait_for(3)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        assert len(kill_tree(family.pid)) == 3
        assert family.left() == set()


def test_threads_fork_too() -> None:
    script = """
import threading
def run():
    child() or rest()
    rest()
for _ in range(3):
    threading.Thread(target=run).start()
rest()
"""
    with Family(script) as family:
        family.wait_for(4)
        assert len(kill_tree(family.pid)) == 4
        assert family.left() == set()


def test_a_daemon_that_left_the_tree_before_is_left_alone() -> None:
    script = """
if child() == 0:
    if child() == 0:
        os.setsid()
        rest()
    os._exit(0)
os.wait()
say("left")
rest()
"""
    with Family(script) as family:
        assert family.read_line() == "left"
        daemon = family.wait_for(2) - {family.pid}
        releases = kill_tree(family.pid)
        assert [release.pid for release in releases] == [family.pid]
        time.sleep(0.05)
        assert family.pids() == daemon
        assert no_stopped(family)


def test_zombies_are_told_as_ended() -> None:
    with Family("child() or os._exit(0)\nsay('forked')\nrest()") as family:
        family.read_line()
        (dead,) = children(family.pid)
        victims.wait_until(lambda: field(dead, 3) == "Z", "zombie")
        root, zombie = kill_tree(family.pid)
        assert (root.pid, zombie.pid) == (family.pid, dead)
        assert zombie.outcome in (Outcome.EXITED, Outcome.GONE)


def test_a_root_that_has_ended_is_told_as_ended() -> None:
    with victims.zombie(1) as victim:
        (release,) = kill_tree(victim.popen)
        assert (release.outcome, release.freed) == (Outcome.EXITED, True)


def children(pid: int) -> list[int]:
    found = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{tid}/children") as file:
            found += [int(each) for each in file.read().split()]
    return found


def test_children_are_found_by_a_scan_as_well() -> None:
    with Family(BRUSH.format(width=3)) as family:
        family.wait_for(4)
        found = selection._children_by_scan(family.pid)
        assert sorted(found) == sorted(children(family.pid))


def test_a_number_that_came_to_be_anothers_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> None:
    strangers: list[victims.Process] = []

    def listed(pid: int) -> list[int]:
        # As if a child had died after this, and its pid been given away.
        del pid
        strangers.append(stack.enter_context(victims.asleep(1)))
        return [strangers[-1].pid]

    monkeypatch.setattr(selection, "_children_of", listed)
    with victims.asleep(1) as parent, victims.asleep(1) as root:
        del parent
        # Its parent is this process, not root.
        assert len(kill_tree(root.pid)) == 1
    assert strangers
    for stranger in strangers:
        assert not stranger.ended(0.02)
        assert stranger.state() == "S"


def test_the_callers_own_tree_is_refused() -> None:
    code = """
import os, sys, mrelease
parent = os.getpid()
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    if os.fork() == 0:
        for who in (parent, os.getppid()):
            try:
                mrelease.kill_tree(who)
            except ValueError as error:
                os.write(write, f"{error}\\n".encode())
        os._exit(0)
    os.wait()
    os._exit(0)
os.waitpid(pid, 0)
os.close(write)
print(os.read(read, 10000).decode(), end="")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("the caller is in it; nothing was signalled" in line
               for line in lines)  # fmt: skip


@pytest.mark.parametrize("bad", [0, -1, 1, True, 2**40])
def test_wrong_roots_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="pid"):
        kill_tree(bad)


def test_no_process_at_all_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        kill_tree("4711")  # type: ignore[arg-type]


BAD_TERMS: list[dict[str, Any]] = [
    {"timeout": -1},
    {"timeout": "soon"},
    {"grace": float("nan")},
    {"grace": True},
    {"locks": "break"},
]


@pytest.mark.parametrize("terms", BAD_TERMS, ids=str)
def test_wrong_terms_are_told_before_anything_is_signalled(
    terms: dict[str, Any],
) -> None:
    with Family("rest()", new_session=True) as family:
        for kill in (kill_tree, kill_group):
            with pytest.raises((TypeError, ValueError)):
                kill(family.pid, **terms)
        assert family.wait_for(1) == {family.pid}
        assert no_stopped(family)


def test_a_root_that_is_gone_raises() -> None:
    with pytest.raises(ProcessLookupError):
        kill_tree(victims.reaped_pid())


def test_a_closed_reaper_is_told_before_anything_is_signalled() -> None:
    reaper = Reaper(1)
    reaper.close()
    with Family(BRUSH.format(width=2), new_session=True) as family:
        pids = family.wait_for(3)
        for kill in (kill_tree, kill_group):
            with pytest.raises(ValueError, match="closed"):
                kill(family.pid, reaper=reaper)
        assert family.pids() == pids
        assert no_stopped(family)


def test_a_reaper_that_is_given_is_used_and_stays_open() -> None:
    with Reaper(1) as reaper:
        for _ in range(3):
            with Family(BRUSH.format(width=2), new_session=True) as family:
                family.wait_for(3)
                kill = (kill_tree, kill_group)[_ % 2]
                assert_freed(kill(family.pid, reaper=reaper))
                assert family.left() == set()
        assert not reaper.closed


@pytest.mark.needs("release")
def test_what_may_not_be_signalled_is_denied_the_rest_is_killed(
    unprivileged: Unprivileged,
) -> None:
    script = """
if child() == 0:
    child() or (os.setresuid(65534, 65534, 65534), rest())
    rest()
time.sleep(0.05)
os.setresuid(65534, 65534, 65534)
say("nobody")
rest()
"""
    with Family(script) as family:
        family.read_line()
        family.wait_for(3)
        (roots,) = children(family.pid)
        below = family.pids() - {family.pid, roots}
        victims.wait_until(
            lambda: {victims.status_of(pid)["Uid"].split()[0]
                     for pid in below} == {"65534"}, "nobody"
        )  # fmt: skip
        told = unprivileged(_outcomes, family.pid)
        assert told[family.pid] in FREED
        assert told[roots] is Outcome.DENIED
        assert all(told[pid] in FREED for pid in below)
        victims.wait_until(lambda: family.pids() == {roots}, "the rest dead")
        assert no_stopped(family)


def _outcomes(pid: int) -> dict[int, Outcome]:
    return {release.pid: release.outcome for release in kill_tree(pid)}


def test_a_root_that_may_not_be_signalled_raises(
    unprivileged: Unprivileged,
) -> None:
    def run(pid: int) -> tuple[str, str]:
        found = []
        for kill in (kill_tree, kill_group):
            try:
                kill(pid)
            except PermissionError as error:
                found.append(str(error))
        return found[0], found[1]

    with Family(BRUSH.format(width=2), new_session=True) as family:
        pids = family.wait_for(3)
        for text in unprivileged(run, family.pid):
            assert "nothing was signalled" in text
        assert family.pids() == pids
        assert no_stopped(family)


def test_nothing_stays_stopped_when_an_audit_hook_refuses() -> None:
    # In a process of its own: a hook stays.  It must be the parent of the
    # root, which is not stopped otherwise.
    code = """
import sys, mrelease, families, victims
def hook(event, args):
    if event == "mrelease.kill":
        print("stopped:", "T" in families.states(pids))
        raise RuntimeError("refused")
with families.Family(sys.argv[1]) as family:
    pids = family.wait_for(4)
    sys.addaudithook(hook)
    try:
        mrelease.kill_tree(family.pid)
    except RuntimeError as error:
        print(error)
    assert family.pids() == pids
    victims.wait_until(lambda: "T" not in families.states(pids), "going on", 5)
    print("going on")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, BRUSH.format(width=3)],
        capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
    )  # fmt: skip
    assert done.stdout == "stopped: True\nrefused\ngoing on\n", done


@pytest.mark.parametrize("kill", [kill_tree, kill_group])
def test_a_signal_handler_ends_the_grace_and_all_are_killed(
    kill: Callable[..., list[Release]],
) -> None:
    class Enough(Exception):
        pass

    def stop(*_: object) -> None:
        raise Enough

    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
{BRUSH.format(width=3)}
"""
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with Family(script, new_session=True) as family:
            family.wait_for(4)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            begun = time.monotonic()
            with pytest.raises(Enough):
                kill(family.pid, grace=40)
            assert time.monotonic() - begun < 10
            assert family.left() == set()
            assert family.popen.wait() == -signal.SIGKILL
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.needs("held")
def test_timeout_bounds_the_call() -> None:
    with victims.held(16) as victim:
        begun = time.monotonic()
        (release,) = kill_tree(victim.pid, timeout=0.2)
        assert time.monotonic() - begun < 2
        assert release.exited is None


@pytest.mark.parametrize("depth", [10, 200])
@pytest.mark.parametrize("timeout", [0, 0.001])
def test_without_time_all_is_killed_all_the_same(
    timeout: float, depth: int
) -> None:
    with Family(CHAIN.format(depth=depth)) as family:
        family.wait_for(depth + 1)
        assert len(kill_tree(family.pid, timeout=timeout)) == depth + 1
        assert family.left() == set()


# ---------------------------------------------------------------- the grace

CLEANS_UP = """
def clean_up(number, frame):
    pid = child()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep({work})
        say("clean")
        {after}
    os.waitpid(pid, 0)
    os._exit(0)
signal.signal(signal.SIGTERM, clean_up)
child() or (signal.signal(signal.SIGTERM, signal.SIG_DFL), say("up"), rest())
rest()
"""


@pytest.mark.parametrize("kill", [kill_tree, kill_group])
def test_grace_lets_them_clean_up(kill: Callable[..., list[Release]]) -> None:
    script = CLEANS_UP.format(work=0.1, after="os._exit(0)")
    with Family(script, new_session=True) as family:
        assert family.read_line() == "up"
        begun = time.monotonic()
        releases = kill(family.pid, grace=30)
        assert time.monotonic() - begun < 20
        assert family.read_line() == "clean"
        assert family.popen.wait() == 0
        assert family.left() == set()
    assert all(r.terminated is not None for r in releases[:2])
    assert all(r.signalled is None for r in releases[:2])


@pytest.mark.parametrize("kill", [kill_tree, kill_group])
def test_after_the_grace_all_is_killed_also_what_started_in_it(
    kill: Callable[..., list[Release]],
) -> None:
    script = CLEANS_UP.format(work=0, after="rest()")
    with Family(script, new_session=True) as family:
        assert family.read_line() == "up"
        begun = time.monotonic()
        releases = kill(family.pid, grace=0.4)
        assert 0.35 < time.monotonic() - begun < 10
        assert family.read_line() == "clean"
        assert family.popen.wait() == -signal.SIGKILL
        assert family.left() == set()
    assert len(releases) == 3
    assert releases[0].signalled is not None
    assert releases[2].terminated is None  # it had no SIGTERM


# --------------------------------------------------------------- kill_group

GROUPS = """
for _ in range(3):
    child() or rest()
if child() == 0:
    os.setpgid(0, 0)
    say(str(os.getpid()))
    rest()
child() or os._exit(0)
rest()
"""


def test_a_group_is_killed_whole_and_no_other() -> None:
    with Family(GROUPS, new_session=True) as family:
        other = int(family.read_line())
        family.wait_for(5)
        victims.wait_until(
            lambda: (
                [field(pid, 3) for pid in children(family.pid)].count("Z") == 1
            ),
            "a zombie",
        )
        releases = kill_group(family.pid)
        assert len(releases) == 5
        assert_freed(releases)
        victims.wait_until(lambda: family.pids() == {other}, "the rest dead")


def test_members_are_found_when_the_leader_is_gone() -> None:
    script = "for _ in range(3):\n    child() or rest()\nsay('go')"
    with Family(script, new_session=True) as family:
        family.read_line()
        family.popen.wait()
        family.wait_for(3)
        assert len(kill_group(family.pid)) == 3
        assert family.left() == set()


def test_a_storm_in_a_group_is_killed_to_the_last(
    rounds: Callable[[int], int],
) -> None:
    for turn in range(rounds(10)):
        with Family(families.storm(), new_session=True) as family:
            family.wait_forks(5 + 4 * turn)
            kill_group(family.pid, timeout=10)
            assert family.left() == set(), turn


@pytest.mark.parametrize("bad", [0, 1, -1, True, False])
def test_wrong_groups_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="refused"):
        kill_group(bad)


def test_the_callers_own_group_is_refused() -> None:
    with pytest.raises(ValueError, match="the caller"):
        kill_group(os.getpgrp())


@pytest.mark.parametrize("bad", ["1", 4.0, None])
def test_no_number_at_all_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError, match="process group"):
        kill_group(bad)  # type: ignore[arg-type]


def test_no_such_group() -> None:
    with pytest.raises(ProcessLookupError, match="no members"):
        kill_group(2**22 + 1)


@pytest.mark.needs("release")
def test_denied_in_a_group(unprivileged: Unprivileged) -> None:
    script = """
child() or (os.setresuid(65534, 65534, 65534), say("nobody"), rest())
rest()
"""

    def run(pgid: int) -> list[Outcome]:
        return [release.outcome for release in kill_group(pgid, timeout=0.3)]

    with Family(script, new_session=True) as family:
        family.read_line()
        family.wait_for(2)
        told = unprivileged(run, family.pid)
        assert told[0] is Outcome.DENIED
        assert told[1] in FREED
        victims.wait_until(
            lambda: family.pids() == {family.pid}, "the other dead"
        )


# ------------------------------------------------------------ what is left


def test_no_file_descriptor_and_no_thread_is_left() -> None:
    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once(kill: Callable[..., object]) -> None:
        with Family(BRUSH.format(width=2), new_session=True) as family:
            family.wait_for(3)
            kill(family.pid)

    once(kill_tree)
    before = state()
    for kill in (kill_tree, kill_group):
        once(kill)
    assert state() == before


def test_without_file_descriptors_it_raises_before_anything() -> None:
    code = """
import os, resource, sys, mrelease
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
for kill in (mrelease.kill_tree, mrelease.kill_group):
    try:
        kill(int(sys.argv[1]))
    except OSError as error:
        print(type(error).__name__, error.errno)
"""
    with Family(BRUSH.format(width=20), new_session=True) as family:
        pids = family.wait_for(21)
        done = subprocess.run(
            [sys.executable, "-c", code, str(family.pid)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == "OSError 24\n" * 2, done
        assert family.pids() == pids
        assert no_stopped(family)


def test_the_names_are_public() -> None:
    assert mrelease.kill_tree is kill_tree
    assert mrelease.kill_group is kill_group


@pytest.mark.parametrize("count", range(36, 46))
def test_a_group_that_there_are_just_files_for_is_killed(count: int) -> None:
    """Those that are kept for what comes later are not missing then."""

    def run(pid: int) -> list[Release]:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        kernel_errors.leave_files(60)
        return kill_group(pid, timeout=5)  # its Reaper takes some, too

    script = "for _ in range(%d):\n    child() or rest()\nrest()"
    with Family(script % (count - 1), new_session=True) as family:
        family.wait_for(count)
        releases = kernel_errors.in_child(run, family.pid)
        assert len(releases) == count
        victims.wait_until(lambda: family.left() == set(), "all are dead")


# --------------------------------------- after a signal nothing is raised

LATE = """
def handler(*_):
    if child() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("late")
        rest()
signal.signal(signal.SIGTERM, handler)
say("ready")
rest()
"""
"""What it forks at SIGTERM is found during the grace, or after it."""


@pytest.mark.parametrize("kill", [kill_tree, kill_group])
def test_what_comes_late_is_killed_though_all_files_are_taken_meanwhile(
    kill: Callable[..., list[Release]],
) -> None:
    def run(pid: int) -> list[Release]:
        with Reaper(threads=1, spares=0) as reaper:
            kernel_errors.leave_files(60)
            taken: list[int] = []
            over = threading.Event()

            def take() -> None:
                time.sleep(0.1)  # the signal is out
                while not over.wait(0.002):
                    try:
                        while True:
                            taken.append(os.open("/", os.O_PATH))
                    except OSError:
                        pass

            thread = threading.Thread(target=take)
            thread.start()
            try:
                return kill(pid, grace=0.6, timeout=5, reaper=reaper)
            finally:
                over.set()
                thread.join()
                for fd in taken:
                    os.close(fd)

    with Family(LATE, new_session=True) as family:
        assert family.read_line() == "ready"
        releases = kernel_errors.in_child(run, family.pid)
        victims.wait_until(lambda: family.left() == set(), "all are dead")
        assert family.pid in [each.pid for each in releases]


@pytest.mark.parametrize("kill", [kill_tree, kill_group])
def test_the_rest_is_killed_though_its_reaper_is_closed_meanwhile(
    kill: Callable[..., list[Release]],
) -> None:
    with Family(LATE, new_session=True) as family, Reaper() as reaper:
        assert family.read_line() == "ready"
        timer = threading.Timer(0.3, reaper.close)
        timer.start()
        releases = kill(family.pid, grace=0.8, timeout=5, reaper=reaper)
        timer.join()
        assert family.left() == set()
        assert len(releases) == 2
        assert all(each.freed for each in releases), releases


@pytest.mark.parametrize("kill", [kill_tree, kill_group])
def test_the_rest_is_killed_though_its_reaper_is_closed_in_the_first_portion(
    kill: Callable[..., list[Release]],
) -> None:
    """There are file descriptors for some only."""

    def run(pid: int) -> list[Release]:
        with Reaper(threads=1, spares=0) as reaper:
            kernel_errors.leave_files(58)
            timer = threading.Timer(0.3, reaper.close, [0])
            timer.start()
            try:
                return kill(pid, grace=0.8, timeout=5, reaper=reaper)
            finally:
                timer.join()

    script = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for _ in range(29):\n    child() or rest()\nrest()"
    )
    with Family(script, new_session=True) as family:
        family.wait_for(30)
        releases = kernel_errors.in_child(run, family.pid)
        assert {each.outcome for each in releases} & {Outcome.DENIED} == set()
        assert len(releases) == 30
        victims.wait_until(lambda: family.left() == set(), "all are dead")
