"""kill_cgroup(): of version 1 and 2, whatever is mounted here."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cgroups
import families
import victims
from cgroups import Unavailable
from families import Family
from mrelease import CgroupRelease, Outcome, Reaper, Release, kill_cgroup

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from conftest import Unprivileged


class Plain(cgroups.Group):
    """A cgroup that needs no controller but to be one."""

    controller = "freezer"


class Bounded(cgroups.Group):
    controller = "pids"
    controller_v2 = "pids"


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def group(request: pytest.FixtureRequest) -> Iterator[Plain]:
    with Plain(version=request.param) as group:
        yield group


@pytest.fixture
def v2() -> Iterator[Plain]:
    with Plain(version=2) as group:
        yield group


def untouched(victim: victims.Process) -> bool:
    return not victim.ended(0.05) and victim.state() == "S"


# ----------------------------------------------------------------- it kills


@pytest.mark.needs("release")
def test_all_are_killed_and_released(group: Plain) -> None:
    with (
        victims.asleep(16, groups=[group]) as a,
        victims.asleep(16, threads=4, groups=[group]) as b,
        victims.asleep(1) as other,
    ):
        result = kill_cgroup(group.path, timeout=10)
        assert a.ended()
        assert b.ended()
        assert untouched(other)
    assert group.pids() == []
    assert result.freed
    assert not result.populated
    assert result.emptied is not None
    assert result.emptied < 10
    assert result.version == group.version
    assert result.path == str(group.path)
    assert result.unseen == 0
    assert {release.pid for release in result.releases} == {a.pid, b.pid}
    for release in result.releases:
        assert release.outcome in (Outcome.RELEASED, Outcome.EXITED)
        assert release.freed


def test_bytes_before_and_after_are_those_of_the_kernel(
    meter: cgroups.Meter,
) -> None:
    with (
        victims.asleep(64, groups=[meter]),
        victims.asleep(32, groups=[meter]),
    ):
        before = meter.usage()
        result = kill_cgroup(meter.path, timeout=10)
        after = meter.usage()
    assert result.freed
    assert result.before is not None
    assert result.after is not None
    assert abs(result.before - before) <= meter.slack
    assert abs(result.after - after) <= meter.slack + (1 << 20)
    assert result.before >= 96 << 20
    assert result.after < 8 << 20


def test_without_a_memory_controller_there_are_no_bytes() -> None:
    with Plain() as group:
        if (group.path / "memory.current").exists():
            pytest.skip("every cgroup has the memory controller here")
        result = kill_cgroup(group.path)
    assert (result.before, result.after) == (None, None)


def test_an_empty_cgroup_is_no_error(group: Plain) -> None:
    result = kill_cgroup(group.path)
    assert result.releases == ()
    assert result.freed
    assert not result.populated
    assert result.emptied is not None


def test_cgroups_in_it_are_included(group: Plain) -> None:
    below = group.path / "a" / "b"
    below.mkdir(parents=True)
    try:
        with (
            victims.asleep(8, groups=[group]) as a,
            victims.asleep(8) as b,
            victims.asleep(8) as c,
        ):
            (group.path / "a" / "cgroup.procs").write_text(str(b.pid))
            (below / "cgroup.procs").write_text(str(c.pid))
            result = kill_cgroup(group.path, timeout=10)
            assert a.ended()
            assert b.ended()
            assert c.ended()
            assert len(result.releases) == 3
            assert result.freed
    finally:
        remove(below)
        remove(below.parent)


def remove(path: Path) -> None:
    def gone() -> bool:
        try:
            path.rmdir()
        except OSError:
            return False
        return True

    victims.wait_until(gone, f"{path} removed", 10)


def test_only_what_is_below_is_killed(group: Plain) -> None:
    below = group.path / "a"
    below.mkdir()
    try:
        with (
            victims.asleep(1, groups=[group]) as above,
            victims.asleep(1) as inside,
        ):
            (below / "cgroup.procs").write_text(str(inside.pid))
            result = kill_cgroup(below)
            assert inside.ended()
            assert untouched(above)
            assert len(result.releases) == 1
    finally:
        remove(below)


@pytest.mark.parametrize("how", ["str", "path", "relative", "link"])
def test_the_path_in_all_its_forms(
    group: Plain, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(group.path.parent)
    paths: dict[str, Path | str] = {
        "str": str(group.path),
        "path": group.path,
        "relative": Path(group.path.name),
        "link": link / group.path.name,
    }
    path = paths[how]
    monkeypatch.chdir(group.path.parent)
    with victims.asleep(1, groups=[group]) as victim:
        result = kill_cgroup(path)
        assert victim.ended()
        assert result.path == str(path)


@pytest.mark.needs("robust_holder")
def test_locks_are_protected(group: Plain) -> None:
    with victims.robust_holder(8, groups=[group]):
        (release,) = kill_cgroup(group.path).releases
    # Or the look took too long, and it ended before any release; without the
    # system call that is the outcome then.
    assert release.outcome in (
        Outcome.LOCKED,
        Outcome.EXITED,
        Outcome.UNSUPPORTED,
    )
    with victims.robust_holder(8, groups=[group]):
        (release,) = kill_cgroup(group.path, locks="ignore").releases
    assert release.locks == "ignored"


def test_a_reaper_that_is_given_is_used_and_stays_open(group: Plain) -> None:
    with Reaper(1) as reaper:
        for _ in range(3):
            with victims.asleep(4, groups=[group]):
                assert kill_cgroup(group.path, reaper=reaper).freed
        assert not reaper.closed


def test_a_frozen_cgroup_of_version_2_is_killed() -> None:
    with (
        cgroups.Freezer(version=2) as group,
        victims.asleep(16, groups=[group]) as victim,
    ):
        group.freeze()
        result = kill_cgroup(group.path, timeout=10)
        assert victim.ended()
        assert result.freed


@pytest.mark.needs("release")
def test_what_cannot_end_leaves_it_populated_within_the_timeout() -> None:
    with (
        cgroups.Freezer(version=1) as group,
        victims.asleep(16, groups=[group]) as victim,
    ):
        group.freeze()
        begun = time.monotonic()
        result = kill_cgroup(group.path, timeout=0.3)
        assert time.monotonic() - begun < 3
        assert result.populated
        assert result.emptied is None
        assert not result.freed
        assert result.releases[0].freed  # its memory, though, is back
        group.thaw()
        assert victim.ended(10)


# ------------------------------------------------------------------- storms


def storm_in(group: cgroups.Group, turn: int) -> tuple[CgroupRelease, int]:
    with Family(families.storm(), groups=[group]) as family:
        family.wait_forks(5 + 4 * turn)
        result = kill_cgroup(group.path, timeout=10)
        return result, len(family.left())


def test_a_storm_is_killed_to_the_last(
    group: Plain, rounds: Callable[[int], int]
) -> None:
    for turn in range(rounds(8)):
        result, left = storm_in(group, turn)
        assert left == 0
        assert not result.populated, str(result)
        assert group.pids() == []
        assert result.freed, [str(r) for r in result.releases if not r.freed]


BOMB = """
def bomb():
    while time.monotonic() < end - 30:
        try:
            if child() == 0:
                bomb()
        except BlockingIOError:
            pass
        time.sleep(0.004)
    os._exit(0)
bomb()
"""


def test_a_fork_bomb_at_its_limit_is_emptied() -> None:
    for _ in range(2):
        with Bounded() as group:
            group.write("pids.max", "60")
            with Family(BOMB, groups=[group]) as family:
                family.wait_for(30)
                result = kill_cgroup(group.path, timeout=10)
                assert not result.populated, str(result)
                assert family.left() == set()
                assert len(result.releases) >= 30


def test_the_bytes_of_a_storm_come_back(meter: cgroups.Meter) -> None:
    script = "memory = b'x' * (1 << 22)\n" + families.storm(most=30)
    with Family(script, groups=[meter]) as family:
        family.wait_forks(20)
        result = kill_cgroup(meter.path, timeout=10)
        assert family.left() == set()
    assert not result.populated
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before
    assert abs(result.after - meter.usage()) < meter.slack + (4 << 20)


# ------------------------------------------------------------------ refused


def assert_refused(path: Path | str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        kill_cgroup(path)
    assert str(caught.value).endswith("; nothing was signalled")


def test_what_is_no_cgroup_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "it is not a cgroup")
    assert_refused("/proc/self", "it is not a cgroup")
    file = tmp_path / "file"
    file.touch()
    assert_refused(file, "it is not a directory")
    with pytest.raises(FileNotFoundError):
        kill_cgroup(tmp_path / "nothing")


@pytest.mark.parametrize("controller", ["memory", "freezer", "cgroup2"])
def test_a_root_is_refused(controller: str) -> None:
    root = cgroups.mounted(controller)
    if root is None:
        raise Unavailable(f"{controller} is not mounted")
    if controller == "cgroup2" and (root / "cgroup.events").exists():
        raise Unavailable("in a cgroup namespace")
    assert_refused(root, "root")


def test_a_file_of_a_cgroup_is_refused(group: Plain) -> None:
    assert_refused(group.path / "cgroup.procs", "it is not a directory")


def test_a_threaded_cgroup_is_refused(v2: Plain) -> None:
    below = v2.path / "threads"
    below.mkdir()
    try:
        with victims.asleep(4, threads=3, groups=[v2]) as victim:
            (below / "cgroup.type").write_text("threaded")
            thread = victim.tids()[1]
            (below / "cgroup.threads").write_text(str(thread))
            assert_refused(below, "threaded")
            assert untouched(victim)
            # Its domain can be killed.
            result = kill_cgroup(v2.path, timeout=10)
            assert victim.ended()
            assert [r.pid for r in result.releases] == [victim.pid]
            assert result.freed
    finally:
        remove(below)


def test_the_callers_own_and_those_above_are_refused(group: Plain) -> None:
    below = group.path / "own"
    below.mkdir()
    code = """
import sys, mrelease
for path in sys.argv[1:]:
    try:
        mrelease.kill_cgroup(path)
    except ValueError as error:
        print(error)
"""
    inner = Plain.__new__(Plain)
    inner.path = below
    try:
        with victims.asleep(1, groups=[group]) as victim:
            done = subprocess.run(
                inner.enter(
                    [sys.executable, "-c", code, str(below), str(group.path)]
                ),
                capture_output=True,
                text=True,
            )
            assert untouched(victim)
    finally:
        remove(below)
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("the caller is in it" in line for line in lines)


BAD: list[tuple[Any, dict[str, Any]]] = [
    (7, {}),
    (None, {}),
    (b"/sys/fs/cgroup", {}),
    ("/sys/fs/cgroup", {"timeout": -1}),
    ("/sys/fs/cgroup", {"timeout": "1"}),
    ("/sys/fs/cgroup", {"locks": "no"}),
]


@pytest.mark.parametrize(("path", "terms"), BAD, ids=repr)
def test_wrong_arguments(path: object, terms: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        kill_cgroup(path, **terms)  # type: ignore[arg-type]


def test_a_closed_reaper_is_told_before_anything_is_signalled(
    group: Plain,
) -> None:
    reaper = Reaper(1)
    reaper.close()
    with victims.asleep(1, groups=[group]) as victim:
        with pytest.raises(ValueError, match="closed"):
            kill_cgroup(group.path, reaper=reaper)
        assert untouched(victim)


# ------------------------------------------------------------------- rights


def test_without_any_right_it_raises_before_anything(
    group: Plain, unprivileged: Unprivileged
) -> None:
    def run(path: str) -> str:
        try:
            kill_cgroup(path)
        except PermissionError as error:
            return str(error)
        return "no error"

    with victims.asleep(1, groups=[group]) as victim:
        text = unprivileged(run, str(group.path))
        assert untouched(victim)
    assert text.endswith("nothing was signalled")


@pytest.mark.needs("release")
def test_what_may_not_be_signalled_is_denied_the_rest_is_killed(
    group: Plain, unprivileged: Unprivileged
) -> None:
    def run(path: str) -> dict[int, Outcome]:
        result = kill_cgroup(path, timeout=0.3)
        assert result.populated
        assert not result.freed
        return {release.pid: release.outcome for release in result.releases}

    with (
        victims.asleep(1, groups=[group]) as roots,
        victims.asleep(1) as nobodys,
        Family("os.setresuid(65534, 65534, 65534)\nsay('nobody')\nrest()",
               groups=[group]) as family,
    ):  # fmt: skip
        del nobodys
        family.read_line()
        told = unprivileged(run, str(group.path))
        assert told[roots.pid] is Outcome.DENIED
        assert told[family.pid] in (Outcome.RELEASED, Outcome.EXITED)
        assert untouched(roots)


def test_cgroup_kill_suffices_where_it_may_be_written(
    v2: Plain, unprivileged: Unprivileged
) -> None:
    if not (v2.path / "cgroup.kill").exists():
        raise Unavailable("no cgroup.kill (Linux before 5.14)")
    os.chown(v2.path / "cgroup.kill", 65534, 65534)

    def run(path: str) -> CgroupRelease:
        return kill_cgroup(path, timeout=5)

    with victims.asleep(16, groups=[v2]) as victim:
        result = unprivileged(run, str(v2.path))
        assert victim.ended()
    assert not result.populated
    (release,) = result.releases
    # Not DENIED: it was killed, and released without a right over it.
    assert release.outcome in (Outcome.RELEASED, Outcome.EXITED)


def test_processes_without_a_pid_here_are_counted(v2: Plain) -> None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        raise Unavailable("needs unshare and root")
    if not (v2.path / "cgroup.kill").exists():
        raise Unavailable("no cgroup.kill (Linux before 5.14)")
    # Seen from another pid namespace, which the victim is not in.
    code = """
import sys, mrelease
result = mrelease.kill_cgroup(sys.argv[1], timeout=5)
print(result.unseen, len(result.releases), result.populated, result.freed)
"""
    with victims.asleep(4, groups=[v2]) as victim:
        done = subprocess.run(
            ["unshare", "--pid", "--fork", "--mount-proc", sys.executable,
             "-c", code, str(v2.path)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.stderr.startswith("unshare: "):
            raise Unavailable(f"a pid namespace: {done.stderr.strip()}")
        assert done.returncode == 0, done
        assert victim.ended(10)
    assert done.stdout == "1 0 False False\n"


# --------------------------------------------------------------- the result

RESULT = CgroupRelease(
    "/c/g",
    2,
    (
        Release(7, Outcome.RELEASED, True),
        Release(8, Outcome.GONE),
    ),
    0,
    False,
    3 << 20,
    1 << 20,
    0.0125,
)


def test_the_result_is_a_value_and_a_line() -> None:
    assert RESULT.freed
    assert pickle.loads(pickle.dumps(RESULT)) == RESULT
    with pytest.raises(AttributeError):
        RESULT.populated = True
    assert str(RESULT) == (
        "cgroup /c/g empty in 12.5 ms: 2 processes, 1 known to be back, "
        "3.0 MiB before, 1.0 MiB after"
    )
    told = RESULT.as_dict()
    assert told["freed"] is True
    assert [r["pid"] for r in told["releases"]] == [7, 8]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("releases", "unseen", "populated"),
    [
        ((Release(7, Outcome.SHARED),), 0, False),
        ((Release(7, Outcome.RELEASED, True),), 0, True),
        ((), 1, False),
    ],
)
def test_freed_is_false_where_memory_is_not_known_to_be_back(
    releases: tuple[Release, ...], unseen: int, populated: bool
) -> None:
    result = CgroupRelease("/c", 1, releases, unseen, populated, 1, 1, None)
    assert not result.freed


def test_few_file_descriptors_are_enough_for_a_storm(group: Plain) -> None:
    code = """
import resource, sys, mrelease
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
result = mrelease.kill_cgroup(sys.argv[1], timeout=20)
print(result.populated)
"""
    with Family(families.storm(), groups=[group]) as family:
        family.wait_forks(50)
        done = subprocess.run(
            [sys.executable, "-c", code, str(group.path)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == "False\n", done
        assert family.left() == set()


def test_no_file_descriptor_and_no_thread_is_left(
    group: Plain, stack: contextlib.ExitStack
) -> None:
    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    stack.enter_context(victims.asleep(1, groups=[group]))
    kill_cgroup(group.path)
    before = state()
    victim = stack.enter_context(victims.asleep(1, groups=[group]))
    kill_cgroup(group.path)
    victim.close()
    with pytest.raises(ValueError, match="not a cgroup"):
        kill_cgroup("/tmp")
    assert state() == before
