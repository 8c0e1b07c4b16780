"""Attacks on whoever kills: docs/threat-model.md, which names a test for each.

Those that fit another file's subject are there. Here is what an attacker makes
of paths, names, /proc and a victim of his own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from errno import EINVAL, ENOSYS, EPERM
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cgroups
import kernel_errors
import mrelease
import victims
from cgroups import Unavailable
from families import Family
from kernel_errors import ALLOW
from kill_ways import by_reaper
from mrelease import (
    CgroupRelease,
    Outcome,
    Reaper,
    Release,
    Victim,
    cli,
    kill_cgroup,
)
from mrelease.cgroup import Cgroup, kill_opened
from mrelease.directory import Distrusted, open_directory
from mrelease.printable import printable
from test_limits import own_mounts
from unflushed import Unflushed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from conftest import Unprivileged
    from kill_ways import Kill

    Answered = Callable[
        [dict[str, kernel_errors.Rule]], kernel_errors.answered
    ]

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "mrelease"]
MALLORY = 65532
_libc = ctypes.CDLL(None, use_errno=True)

needs_root = pytest.mark.needs("root")


class Plain(cgroups.Group):
    controller = "freezer"


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def version(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


def untouched(victim: victims.Process) -> bool:
    return not victim.ended(0.05) and victim.state() == "S"


def killed(victim: victims.Process) -> bool:
    return victim.ended(10.0)


# ----------------------------------------------- paths: links, mounts, swaps


def link_of(user: int, link: Path, target: Path | str) -> Path:
    link.symlink_to(target)
    os.lchown(link, user, user)
    return link


@needs_root
@pytest.mark.parametrize("where", ["last", "on the way", "behind another"])
def test_another_user_s_link_is_not_followed(
    where: str, version: int, tmp_path: Path
) -> None:
    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]) as victim,
    ):
        if where == "last":
            path = link_of(MALLORY, tmp_path / "his", group.path)
        else:
            link_of(MALLORY, tmp_path / "his", group.path.parent)
            path = tmp_path / "his" / group.path.name
        if where == "behind another":
            (tmp_path / "ours").symlink_to(tmp_path / "his")
            path = tmp_path / "ours" / group.path.name
        with pytest.raises(ValueError, match="neither root's nor") as caught:
            kill_cgroup(path)
        assert "'his'" in str(caught.value)
        assert f"user {MALLORY}'s" in str(caught.value)
        assert str(caught.value).endswith("nothing was signalled")
        assert untouched(victim)


@needs_root
def test_root_s_links_and_one_s_own_are_followed(
    tmp_path: Path, unprivileged: Unprivileged
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o011)
    link_of(0, tmp_path / "root's", "folder")
    link_of(65534, tmp_path / "nobody's", "../" + tmp_path.name + "/folder")

    def look(name: str) -> os.stat_result:
        fd = open_directory(f"{tmp_path}/{name}/./")
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    wanted = folder.stat().st_ino
    assert look("root's").st_ino == wanted
    assert unprivileged(look, "root's").st_ino == wanted
    assert unprivileged(look, "nobody's").st_ino == wanted
    with pytest.raises(Distrusted):
        look("nobody's")


def test_a_path_means_what_it_means_to_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another folder would be killed than the one that was named."""
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    (tmp_path / "to-c").symlink_to("a/b/c")
    (tmp_path / "to-a").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "to-file").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path / "a")
    paths = [
        "b", "./b/", "b//c", "..", "../..", "b/..", "b/c/../..", "up/a/b",
        "up/to-c/..", "../to-c/../c", "../to-a/b/", "/", "//", "/..", "/proc",
        "/proc/self", "/proc/thread-self/fd", ".", "", "none", "../file",
        "../file/", "../file/..", "../fifo", "../to-file", "../loop",
        "../nowhere", "../nowhere/x", "b/none/..", "x" * 300, "b/" * 3000,
        str(tmp_path),
        f"{tmp_path}/to-a/../a/b", "/" + "../" * 50 + "proc",
    ]  # fmt: skip
    for path in paths:
        expected: OSError | None = None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            expected = error
        if expected is not None:
            with pytest.raises(type(expected)) as caught:
                open_directory(path)
            assert caught.value.errno == expected.errno, path
            assert caught.value.filename == path
            continue
        ours = open_directory(path)
        try:
            assert os.path.sameopenfile(fd, ours), path
            assert not os.get_inheritable(ours)
        finally:
            os.close(fd)
            os.close(ours)
    with pytest.raises(ValueError, match="null"):
        open_directory("a\0b")


@needs_root
def test_links_of_proc_are_followed_to_files_of_one_s_own_only(
    version: int,
) -> None:
    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]) as victim,
        victims.asleep(0, cwd=group.path) as other,
    ):
        for path in (
            f"/proc/{other.pid}/cwd",
            f"/proc/{other.pid}/root{group.path}",
            f"/proc/self/root{group.path}",
        ):
            with pytest.raises(ValueError, match="one of /proc"):
                kill_cgroup(path)
        assert untouched(victim)
        fd = os.open(group.path, os.O_PATH)
        try:
            kill_cgroup(f"/proc/self/fd/{fd}", timeout=5)
        finally:
            os.close(fd)
        assert killed(victim)
        assert untouched(other)


def _bind(source: Path, target: Path) -> None:
    assert _libc.mount(
        os.fsencode(source), os.fsencode(target), None, 0x1000, None
    ) == 0, os.strerror(ctypes.get_errno())  # fmt: skip


@needs_root
@pytest.mark.parametrize("what", ["folder", "procs"])
def test_what_is_mounted_in_a_cgroup_is_not_entered(
    what: str, version: int
) -> None:
    with (
        Plain(version=version) as group,
        Plain(version=version) as other,
        victims.asleep(1, groups=[group]) as victim,
        victims.asleep(1, groups=[other]) as stranger,
    ):
        below = group.path / "below"
        below.mkdir()

        def run() -> str:
            own_mounts()
            if what == "folder":
                _bind(other.path, below)
                assert str(stranger.pid) in (below / "cgroup.procs").read_text(
                ).split()  # fmt: skip
            else:
                _bind(other.path / "cgroup.procs", group.path / "cgroup.procs")
            with pytest.raises(ValueError, match="mounted in it") as caught:
                kill_cgroup(group.path)
            return str(caught.value)

        try:
            assert kernel_errors.in_child(run).endswith("was signalled")
            assert untouched(victim)
            assert untouched(stranger)
            # The mount is seen there alone.
            kill_cgroup(group.path, timeout=5)
            assert killed(victim)
        finally:
            below.rmdir()


@needs_root
@pytest.mark.needs("seccomp")
def test_without_openat2_links_are_still_not_followed(
    answered: Answered, version: int
) -> None:
    """In a cgroup there are none; nothing else may take its place either."""
    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]) as victim,
    ):
        result = answered({"openat2": ENOSYS}).run(
            kill_cgroup, group.path, timeout=5.0
        )
        assert killed(victim)
        assert [release.pid for release in result.releases] == [victim.pid]

    def follow() -> None:
        at = os.open("/proc", os.O_PATH)
        mrelease._mrelease.open_inside(at, "self", os.O_RDONLY)

    for rules in ({"openat2": ENOSYS}, {"openat2": [ALLOW]}):
        with pytest.raises(OSError, match="symbolic links"):
            answered(rules).run(follow)  # type: ignore[arg-type]
    for name in ("..", "a/b", "/proc"):
        with pytest.raises(OSError, match="Invalid argument"):
            mrelease._mrelease.open_inside(0, name, os.O_RDONLY)


def test_in_a_cgroup_no_link_can_be_made(version: int) -> None:
    """So the owner of a delegated subtree has none to lead elsewhere."""
    with Plain(version=version) as group:
        with pytest.raises(PermissionError):
            (group.path / "link").symlink_to("/sys/fs/cgroup")
        with pytest.raises(PermissionError):
            os.link(group.path / "cgroup.procs", group.path / "other")


def after_the_checks(change: Callable[[], None]) -> None:
    """Run this when a cgroup was checked, just before it is killed.

    The hook is for good: in a child.
    """

    def hook(event: str, args: tuple[object, ...]) -> None:
        del args
        if event == "mrelease.kill_cgroup":
            change()

    sys.addaudithook(hook)


@needs_root
def test_a_link_that_is_swapped_after_the_checks_changes_nothing(
    version: int, tmp_path: Path
) -> None:
    with (
        Plain(version=version) as group,
        Plain(version=version) as other,
        victims.asleep(1, groups=[group]) as victim,
        victims.asleep(1, groups=[other]) as stranger,
    ):
        link = tmp_path / "link"
        link.symlink_to(group.path)

        def swap() -> None:
            (tmp_path / "new").symlink_to(other.path)
            (tmp_path / "new").rename(link)

        def run() -> CgroupRelease:
            after_the_checks(swap)
            return kill_cgroup(link, timeout=5)

        result = kernel_errors.in_child(run)
        assert link.resolve() == other.path.resolve()
        assert [release.pid for release in result.releases] == [victim.pid]
        assert killed(victim)
        assert untouched(stranger)


@needs_root
def test_a_cgroup_that_is_made_again_by_that_name_is_left_alone(
    version: int,
) -> None:
    with (
        Plain(version=version) as group,
        victims.asleep(1) as stranger,
    ):
        path = group.path / "job"
        path.mkdir()
        inner = Plain.__new__(Plain)
        inner.path = path
        victim = victims.asleep(1, groups=[inner])

        def replace() -> None:
            # The members move up, the folder goes, and comes again.
            group.add(victim.pid)
            path.rmdir()
            path.mkdir()
            (path / "cgroup.procs").write_text(str(stranger.pid))

        def run() -> CgroupRelease:
            after_the_checks(replace)
            return kill_cgroup(path, timeout=1.0)

        with victim:
            result = kernel_errors.in_child(run)
            # It was in the group that was named, and pinned, so it is killed.
            assert [release.pid for release in result.releases] == [victim.pid]
            assert killed(victim)
            assert not result.populated
            assert untouched(stranger)
        # The guard empties it no further.
        group.add(stranger.pid)
        path.rmdir()
        Path(group.path.parent / "cgroup.procs").write_text(str(stranger.pid))


@needs_root
def test_what_is_moved_into_a_cgroup_is_killed_with_it(version: int) -> None:
    """Also after the checks: who is in it belongs to it."""
    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]),
        victims.asleep(1) as late,
    ):

        def run() -> CgroupRelease:
            after_the_checks(lambda: group.add(late.pid))
            return kill_cgroup(group.path, timeout=10)

        result = kernel_errors.in_child(run)
        assert killed(late)
        # One that cgroup.kill killed may have gone before it was looked at.
        if version == 1:
            assert late.pid in {release.pid for release in result.releases}


@needs_root
def test_a_path_that_is_swapped_all_the_time_kills_one_or_the_other(
    version: int, tmp_path: Path
) -> None:
    """Never what was not checked, and never both: 40 races."""
    link = tmp_path / "link"
    stop = threading.Event()
    with Plain(version=version) as good, Plain(version=version) as file:
        link.symlink_to(good.path)

        def swap() -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                new = tmp_path / "new"
                new.symlink_to([good.path, file.path, tmp_path][turn % 3])
                if turn % 2:
                    os.lchown(new, MALLORY, MALLORY)
                new.rename(link)

        swapper = threading.Thread(target=swap)
        swapper.start()
        why: set[str] = set()
        try:
            with (
                victims.asleep(0, groups=[good]) as one,
                victims.asleep(0, groups=[file]) as two,
                Reaper(1) as reaper,
            ):
                for _ in range(40):
                    try:
                        result = kill_cgroup(link, reaper=reaper, timeout=5)
                    except ValueError as error:
                        why.add(str(error).split(" is refused: ")[1][:12])
                        continue
                    pids = {release.pid for release in result.releases}
                    assert pids in ({one.pid}, {two.pid}, set())
                    for victim in (one, two):
                        if victim.pid in pids:
                            assert killed(victim)
        finally:
            stop.set()
            swapper.join()
        assert why  # refused now and then, for one of these
        assert why <= {"the link 'li", "it is not a "}


def test_a_cgroup_that_was_removed_before_its_turn_is_empty(
    version: int,
) -> None:
    """And not taken for a root, which has as few files."""
    with Plain(version=version) as group:
        path = group.path / "job"
        path.mkdir()
        first = Cgroup(str(path))
        again = first.again()
        path.rmdir()
        try:
            assert first.pids() == again.pids() == (set(), 0)
            assert not again.populated()
            result = kill_opened(again, time.monotonic(), 1.0, "protect", None)
            assert result.emptied is not None
            assert result.releases == ()
            if version == 2:
                with pytest.raises(FileNotFoundError) as caught:
                    first._check()
                assert caught.value.filename == str(path)
        finally:
            first.close()


@pytest.mark.any_kernel
@needs_root
@pytest.mark.needs("held")
def test_the_command_opens_a_path_once(version: int, tmp_path: Path) -> None:
    """What is checked at the start is what is killed when its turn comes."""
    with (
        Plain(version=version) as first,
        Plain(version=version) as second,
        Plain(version=version) as other,
        victims.held(1, groups=[first]) as slow,
        victims.asleep(1, groups=[second]) as victim,
        victims.asleep(1, groups=[other]) as stranger,
    ):
        link = tmp_path / "link"
        link.symlink_to(second.path)
        popen = subprocess.Popen(
            [*COMMAND, "kill", "--cgroup", "--timeout", "1.5",
             str(first.path), str(link)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        try:
            victims.wait_held(slow)
            assert untouched(victim)  # its turn has not come
            (tmp_path / "new").symlink_to(other.path)
            (tmp_path / "new").rename(link)
            said, _ = popen.communicate(timeout=30)
        finally:
            popen.kill()
            popen.communicate()
        assert f"cgroup {link} empty" in said
        assert killed(victim)
        assert untouched(stranger)


# ------------------------------------------------------- a process group


FORKS_WHEN_TOLD = """
signal.signal(signal.SIGUSR1, lambda *_: child())
say("ready")
rest()
"""


@pytest.mark.needs("seccomp")
@pytest.mark.parametrize("old", [False, True], ids=["6.9", "before"])
def test_a_group_is_signalled_by_pidfd_where_the_kernel_can(
    old: bool, answered: Answered
) -> None:
    """Its number could come to be another's before kill(2) is called."""
    told: list[int] = []
    whole: list[int] = []

    def rule(call: kernel_errors.Call) -> kernel_errors.Plain:
        if call.args[1] != signal.SIGKILL:
            return ALLOW
        if call.args[3]:  # flags
            whole.append(call.args[3])
            return EINVAL if old else ALLOW
        if not told:  # one more member, after all were found
            told.append(family.pid)
            os.kill(family.pid, signal.SIGUSR1)
            family.wait_for(2)
        return ALLOW

    with Family(FORKS_WHEN_TOLD, new_session=True) as family:
        assert family.read_line() == "ready"
        kernel = answered({"pidfd_send_signal": [rule], "kill": [ALLOW]})
        kernel.run(mrelease.kill_group, family.pid, timeout=10.0)
        assert family.left() == set()
        by_number = [
            call.args for call, _ in kernel.calls
            if call.name == "kill" and call.args[1] == signal.SIGKILL
        ]  # fmt: skip
    assert told
    assert set(whole) == {4}  # PIDFD_SIGNAL_PROCESS_GROUP
    if old or _kernel() < (6, 9):
        minus_pgid = (1 << 64) - family.pid
        assert {args[0] & ((1 << 64) - 1) for args in by_number} <= {
            minus_pgid, minus_pgid & 0xFFFFFFFF
        }  # fmt: skip
        assert by_number
    else:
        assert not by_number


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


# -------------------------------------------------- names in what is printed

HOSTILE = [
    "a\nkilled: pid 1",
    "a\r\x1b[2K\x1b[1Aall is well",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "a\u2028b\u2029c\x85d",
    "zero\u200bwidth",
    "caf\udce9 in latin 1",
    "\udcff\udcfe",
    "x empty in 0.1 ms: 0 processes",
    "'quoted'",
    "\x7f\x08\x08",
]
PLAIN = ["plain", "system-serial\\x2dgetty.slice", "caf\xe9", "\u6587\u4ef6"]


def check_line(line: str) -> None:
    """One line that a terminal shows and a log keeps as it is."""
    assert line.isprintable(), ascii(line)
    line.encode("utf-8")
    assert not any(
        unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for each in line
    )


@pytest.mark.any_kernel
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_shown_with_escapes(name: str) -> None:
    shown = printable(name)
    check_line(shown)
    assert shown == repr(name)
    assert shown[:1] in ("'", '"')
    told = CgroupRelease(f"/c/{name}", 2, (), 0, False, None, None, 0.1)
    check_line(str(told))
    check_line(repr(told))
    assert json.loads(json.dumps(told.as_dict()))["path"] == f"/c/{name}"
    assert "\n" not in json.dumps(told.as_dict())


@pytest.mark.any_kernel
@pytest.mark.parametrize("name", PLAIN, ids=ascii)
def test_a_plain_name_is_shown_as_it_is(name: str) -> None:
    assert printable(name) == name


@pytest.mark.any_kernel
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_errors_show_a_hostile_path_with_escapes(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    with pytest.raises(FileNotFoundError) as gone:
        kill_cgroup(folder)
    check_line(str(gone.value))
    folder.mkdir()
    with pytest.raises(ValueError, match="not a cgroup") as refused:
        kill_cgroup(folder)
    check_line(str(refused.value))
    if os.geteuid() == 0:
        link_of(MALLORY, tmp_path / f"{name}-", folder)
        with pytest.raises(ValueError, match="neither root's") as distrusted:
            kill_cgroup(tmp_path / f"{name}-")
        check_line(str(distrusted.value))


def run_in_terminal(args: Sequence[bytes]) -> tuple[int, bytes]:
    ours, theirs = os.openpty()
    popen = subprocess.Popen(
        [*(os.fsencode(word) for word in COMMAND), *args],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # all have closed it
                break
            if not part:
                break
            said += part
        return popen.wait(60), said
    finally:
        popen.kill()
        popen.wait()
        os.close(ours)


@pytest.mark.any_kernel
def test_a_hostile_path_gives_a_terminal_nothing_to_obey(
    version: int, tmp_path: Path
) -> None:
    """All of them in one call: a refused, a missing and a killed one."""
    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]) as victim,
    ):
        paths = [tmp_path / name for name in HOSTILE]
        paths[0].symlink_to(group.path)
        code, said = run_in_terminal(
            [b"kill", b"--cgroup", *map(os.fsencode, paths)]
        )
        assert killed(victim)
    assert code == 3  # of those that are missing
    lines = said.decode("utf-8").replace("\r\n", "\n").splitlines()
    for line in lines:
        check_line(line)
    # One for each, one of the victim: none is silenced, none makes two.
    assert len(lines) == len(HOSTILE) + 1
    for path in paths:
        assert sum(printable(str(path)) in line for line in lines) == 1


@pytest.mark.any_kernel
def test_the_command_s_json_is_one_ascii_line_whatever_the_path(
    version: int, tmp_path: Path
) -> None:
    with Plain(version=version) as group:
        paths = [tmp_path / name for name in HOSTILE]
        paths[-1].symlink_to(group.path)
        done = subprocess.run(
            [*COMMAND, "kill", "--cgroup", "--json", *paths],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr == b""
    lines = done.stdout.decode("ascii").splitlines()
    documents = [json.loads(line) for line in lines]
    assert len(documents) == len(HOSTILE)
    for path, document in zip(paths, documents, strict=True):
        assert document.get("cgroup", document.get("path")) == str(path)
        assert set(document.get("error", "x")) <= set(map(chr, range(32, 127)))


@pytest.mark.any_kernel
def test_wrong_usage_shows_arguments_with_escapes() -> None:
    for words in (
        [b"kill", b"1\x1b[2J"],
        [b"kill", b"--no\x1b]0;such\x07"],
        [b"kill", b"--json", b"1", b"--no\x1b]0;such\x07"],
        [b"kill", b"--locks", b"\x1b[2J\xff"],
        [b"kill", b"--cgroup", b"/\x1b[2J", b"--grace", b"1"],
        [b"\x9b2J\x1b[2J"],
    ):
        said = io.StringIO()
        with (
            contextlib.redirect_stderr(said),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main([os.fsdecode(word) for word in words])
        assert ended.value.code == 2
        lines = said.getvalue().splitlines()
        assert "mrelease" in lines[-1]
        for line in lines:
            check_line(line)


@pytest.mark.any_kernel
def test_what_an_encoding_lacks_silences_nobody(version: int) -> None:
    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]) as victim,
    ):
        path = group.path / "\u6587\u4ef6"
        path.mkdir()
        try:
            done = subprocess.run(
                [*COMMAND, "kill", "--cgroup", path, group.path],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
                env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
            )  # fmt: skip
        finally:
            assert killed(victim)
            path.rmdir()
    lines = done.stdout.decode("ascii").splitlines()
    assert len(lines) == 3, done
    assert r"\u6587\u4ef6 empty" in lines[0]
    assert f"{victim.pid}" in lines[1]


# ------------------------------------------------------- lying process names

LIES = [b") R 1 1 1 1", b"x) Z 0 0 (y", b"a\nb) S 1 1", b"((((", b"\xff)\x1b["]

LIAR = """
import ctypes
names = [bytes.fromhex(name) for name in {names}]
for name in names:
    if child() == 0:
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)
        say("named")
        rest()
rest()
"""


@pytest.mark.parametrize("how", ["tree", "group"])
def test_a_name_can_not_hide_a_member(how: str) -> None:
    """Nor lend it another parent, group or state (fields 3 to 5)."""
    script = LIAR.format(names=[name.hex() for name in LIES])
    with Family(script, new_session=True) as family, victims.asleep(0) as by:
        for _ in LIES:
            assert family.read_line() == "named"
        pids = family.wait_for(len(LIES) + 1)
        names = {
            Path(f"/proc/{pid}/comm").read_bytes()[:-1] for pid in pids
        }  # fmt: skip
        assert {name[:15] for name in LIES} <= names
        kill = mrelease.kill_tree if how == "tree" else mrelease.kill_group
        releases = kill(family.pid, timeout=10.0)
        assert {release.pid for release in releases} == pids
        for release in releases:
            check_line(str(release))
            check_line(repr(release))
        assert family.left() == set()
        assert untouched(by)


# ----------------------------------------------------------- another /proc


@pytest.fixture
def two() -> Iterator[tuple[victims.Process, victims.Process]]:
    with victims.asleep(1) as one:
        started = one.started()
        victims.wait_until(
            lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
            * os.sysconf("SC_CLK_TCK") > started + 2,
            "another tick",
        )  # fmt: skip
        with victims.asleep(1) as other:
            yield one, other


def fake_proc(folder: Path, pid: int, of: int) -> None:
    """Files that say of one process what is true of another."""
    own_mounts()
    texts = {
        name: Path(f"/proc/{of}/{name}").read_bytes()
        for name in ("stat", "status")
    }
    assert _libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
    for number in (pid, os.getpid()):
        (folder / str(number)).mkdir()
        for name, text in texts.items():
            said = text.replace(b"%d (" % of, b"%d (" % number, 1).replace(
                b"Pid:\t%d\n" % of, b"Pid:\t%d\n" % number
            )
            (folder / str(number) / name).write_bytes(said)
    (folder / "self").symlink_to(str(os.getpid()))
    (folder / "thread-self").symlink_to(str(os.getpid()))


def look_at(pid: int, started: int) -> tuple[str, int | None]:
    """What comes of a pid that is said to have started then."""
    with Victim(pid) as victim:
        seen = victim.started
    try:
        with Victim(pid, started=started):
            return "taken for it", seen
    except OSError as error:
        return type(error).__name__, seen


@needs_root
def test_files_that_are_not_procfs_are_not_believed(
    two: tuple[victims.Process, victims.Process],
) -> None:
    one, other = two
    lie = one.started()
    assert lie != other.started()

    def run() -> tuple[tuple[str, int | None], str, bool]:
        fake_proc(Path("/proc"), other.pid, one.pid)
        assert os.readlink("/proc/self") == str(os.getpid())
        found = look_at(other.pid, lie)
        try:
            mrelease.kill_tree(other.pid)
            tree = "killed"
        except OSError as error:
            tree = str(error)
        proc = mrelease.support().proc
        return found, tree, bool(proc.works)

    found, tree, works = kernel_errors.in_child(run)
    assert found == ("FileNotFoundError", None)
    assert "nothing was signalled" in tree
    assert not works
    assert untouched(other)


@needs_root
def test_the_folder_of_another_process_is_not_believed(
    two: tuple[victims.Process, victims.Process],
) -> None:
    one, other = two

    def run() -> tuple[tuple[str, int | None], bool]:
        own_mounts()
        _bind(Path(f"/proc/{one.pid}"), Path(f"/proc/{other.pid}"))
        assert f"{one.pid} (" in Path(f"/proc/{other.pid}/stat").read_text()
        found = look_at(other.pid, one.started())
        with Victim(other.pid) as victim:
            try:
                victim.footprint()
                known = True
            except OSError:
                known = False
        return found, known

    found, known = kernel_errors.in_child(run)
    assert found == ("ProcessLookupError", None)
    assert not known
    assert untouched(other)


@needs_root
def test_a_file_that_is_mounted_on_one_of_procfs_is_not_believed(
    tmp_path: Path,
) -> None:
    """Here it says that a stranger is of the group, and a child."""
    with (
        Family("child() or rest()\nrest()", new_session=True) as family,
        victims.asleep(1) as stranger,
    ):
        pids = family.wait_for(2)

        def run() -> list[int]:
            own_mounts()
            stat = Path(f"/proc/{stranger.pid}/stat")
            head, _, rest = stat.read_text().rpartition(") ")
            fields = rest.split(" ")
            fields[1] = fields[2] = str(family.pid)
            lie = tmp_path / "stat"
            lie.write_text(f"{head}) {' '.join(fields)}")
            _bind(lie, stat)
            children = tmp_path / "children"
            children.write_text(f"{stranger.pid} ")
            for task in Path(f"/proc/{family.pid}/task").iterdir():
                _bind(children, task / "children")
            killed = mrelease.kill_group(family.pid, timeout=5)
            return [release.pid for release in killed]

        assert set(kernel_errors.in_child(run)) == pids
        assert family.left() == set()
        assert untouched(stranger)


@needs_root
def test_a_proc_of_another_pid_namespace_is_not_believed() -> None:
    """There, pid 2 is a kernel thread; here it is the victim."""

    def inside() -> tuple[int | None, list[str], bool]:
        pid = mrelease._mrelease.start_child()
        assert (os.getpid(), pid) == (1, 2)
        assert os.path.exists("/proc/2/stat")
        said = []
        for look in (
            lambda: Victim(pid, started=2),
            lambda: mrelease.kill_tree(pid),
            lambda: mrelease.kill_group(pid),
        ):
            with pytest.raises(OSError, match="of another pid nam") as caught:
                look()
            said.append(str(caught.value))
        with Victim(pid) as victim:
            started = victim.started
            release = victim.kill(timeout=5.0)
        mrelease._mrelease.end_child(pid)
        return started, said, release.exited is not None

    def run() -> tuple[int | None, list[str], bool]:
        if _libc.unshare(0x20000000) != 0:  # CLONE_NEWPID
            raise Unavailable("no pid namespace to be had")
        return kernel_errors.in_child(inside)

    if "kthreadd" not in Path("/proc/2/stat").read_text():
        pytest.skip("these tests are in a pid namespace themselves")
    started, said, ended = kernel_errors.in_child(run)
    assert started is None
    assert len(said) == 3
    assert ended


# ------------------------------------------------------------ robust lists

ROBUST = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
memory = (ctypes.c_ulong * 64)()
base = ctypes.addressof(memory)
memory[0], memory[1], memory[2] = {head}
address = {address}
size = 3 * ctypes.sizeof(ctypes.c_ulong)
number = {number}
assert libc.syscall(number, ctypes.c_void_p(address), size) == 0
say("registered")
rest()
"""
LISTS = {
    # where the head is said to be, what it holds, what is made of it
    "a cycle": ("base", "(base + 64, 0, 0)", "held"),
    "far pointers": ("base", "((1 << 62) - 8, 1 << 40, 0)", "held"),
    "a pending one nowhere": ("base", "(base, 0, 0xdead0000)", "held"),
    "a head that is not mapped": ("0xdead0000", "(0, 0, 0)", "unknown"),
    "a head in the kernel": ("(1 << 64) - 4096", "(0, 0, 0)", "unknown"),
}


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="number not known"
)
@pytest.mark.parametrize("kind", LISTS)
def test_a_hostile_robust_list_takes_no_time(kind: str, kill: Kill) -> None:
    """Only its head is read: what it points to is never followed."""
    address, head, expected = LISTS[kind]
    number = 273 if platform.machine() == "x86_64" else 99
    script = ROBUST.format(head=head, address=address, number=number)
    with Family(script) as family:
        # A cycle: each entry points to the next, the last to the first.
        assert family.read_line() == "registered"
        begun = time.monotonic()
        release = kill(family.pid, timeout=5.0)
        took = time.monotonic() - begun
        assert family.popen.wait(10) == -signal.SIGKILL
        assert release.signalled is not None
        assert release.signalled < 1.0
        assert took < 3.0
        if kill is not by_reaper:  # its look may come when it has ended
            assert release.locks == expected
            # That it says so costs it nothing but the release.
            assert (release.outcome is Outcome.LOCKED) == (expected == "held")


# ------------------------------------------------------ holding the mmap_lock

MAPPER = """
import ctypes, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 4
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
page = 4096
size = 16000 * page
area = libc.mmap(None, size, 3, 0x22, -1, 0)
for i in range(0, 16000, 2):  # each its own mapping
    libc.mprotect(area + i * page, page, 1)
def protect():
    while True:
        libc.mprotect(area, size, 3)
        for i in range(0, 400, 2):
            libc.mprotect(area + i * page, page, 1)
def populate():
    while True:
        at = libc.mmap(None, 64 << 20, 3, 0x22 | 0x8000, -1, 0)
        libc.munmap(at, 64 << 20)
for target in (protect, populate):
    threading.Thread(target=target, daemon=True).start()
say("busy")
rest()
"""


def test_one_that_keeps_its_mmap_lock_busy_is_killed_in_time() -> None:
    """By a Reaper, which waits for nobody's lock before it signals."""
    with Family(MAPPER) as family, Reaper() as reaper:
        assert family.read_line() == "busy"
        time.sleep(0.1)
        begun = time.monotonic()
        reaping = reaper.kill(family.pid, timeout=2.0)
        sent = time.monotonic() - begun
        release = reaping.result()
        took = time.monotonic() - begun
        assert family.popen.wait(10) == -signal.SIGKILL
    assert release.signalled is not None
    assert release.signalled < 1.0
    assert sent < 1.0
    assert took < 4.0


# ------------------------------------------------- namespaces, tracers, files


@needs_root
def test_a_victim_that_is_root_of_its_own_user_namespace(kill: Kill) -> None:
    script = """
import ctypes
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
say(str(ctypes.CDLL(None).unshare(0x10000000 | 0x20000)))
memory = bytearray(8 << 20)
rest()
"""
    with Family(script) as family:
        if family.read_line() != "0":
            raise Unavailable("no user namespace for a user here")
        release = kill(family.pid, timeout=10.0)
        assert family.popen.wait(10) == -signal.SIGKILL
        assert release.freed
        assert release.locks in ("free", "unknown")


PTRACE_ATTACH, PTRACE_DETACH = 16, 17


def trace(pid: int) -> int:
    """Attach to a process; the errno, or 0 and let go again."""
    _libc.ptrace.restype = ctypes.c_long
    if _libc.ptrace(PTRACE_ATTACH, pid, None, None) < 0:
        return ctypes.get_errno()
    os.waitpid(pid, 0)
    _libc.ptrace(PTRACE_DETACH, pid, None, None)
    return 0


@needs_root
def test_a_victim_of_another_user_can_not_trace_its_killer(
    unprivileged: Unprivileged,
) -> None:
    """One of the same user can: a killer is to have a user of its own."""
    assert unprivileged(trace, os.getpid()) == EPERM

    def same_user() -> int:
        with victims.asleep(0) as killer:
            return trace(killer.pid)

    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    if yama.exists() and yama.read_text().strip() in ("2", "3"):
        pytest.skip("ptrace_scope forbids it")
    assert unprivileged(same_user) == 0


@pytest.mark.needs("held")
def test_a_friend_that_holds_a_victim_by_ptrace_holds_no_memory(
    kill: Kill,
) -> None:
    """It can not end, and its memory is back all the same."""
    if not kernel_errors.has_the_call():
        pytest.skip("no process_mrelease here")
    with victims.held(16) as victim:
        release = kill(victim.pid, timeout=0.5)
        assert release.outcome is Outcome.RELEASED
        assert release.exited is None
        assert victim.rss_anon() == 0


def _open_files() -> dict[int, bool]:
    """Each file descriptor, and whether a program would inherit it."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            flags = fcntl.fcntl(int(name), fcntl.F_GETFD)
            found[int(name)] = not flags & fcntl.FD_CLOEXEC
    return found


def test_no_file_descriptor_is_inherited_by_programs(version: int) -> None:
    """Seen while all of them are open: a program could be started then."""
    before = set(_open_files())
    seen: list[dict[int, bool]] = []

    def run(path: Path, pid: int) -> list[dict[int, bool]]:
        before.update(_open_files())
        sys.addaudithook(
            lambda event, _: seen.append(_open_files())
            if event.startswith("mrelease.") else None
        )  # fmt: skip
        with Victim(pid) as victim, Reaper(2) as reaper:
            seen.append(_open_files())
            kill_cgroup(path, timeout=5, reaper=reaper)
            reaping = reaper.kill(victim, timeout=5)
            reaping.fileno()
            reaping.result()
            seen.append(_open_files())
            mrelease.kill_tree(mrelease._mrelease.start_child())
        return [
            {fd: open_ for fd, open_ in each.items() if fd not in before}
            for each in seen
        ]

    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]) as member,
        victims.asleep(1) as single,
    ):
        looks = kernel_errors.in_child(run, group.path, single.pid)
        assert killed(member)
        assert killed(single)
    assert len(looks) >= 4
    assert max(map(len, looks)) >= 5
    assert not any(inherited for look in looks for inherited in look.values())


# ------------------------------------------- arguments and the environment


@pytest.mark.any_kernel
@pytest.mark.parametrize("name", ["--dry-run", "-h"])
def test_after_two_dashes_a_path_is_no_option(
    name: str, version: int, tmp_path: Path
) -> None:
    """Before them it is: then nothing is signalled."""
    with (
        Plain(version=version) as group,
        victims.asleep(1, groups=[group]) as victim,
    ):
        (tmp_path / name).symlink_to(group.path)
        for words, code in (([name], (0, 2)), (["--", name], (0, 1))):
            done = subprocess.run(
                [*COMMAND, "kill", "--cgroup", *words],
                stdin=subprocess.DEVNULL, capture_output=True, text=True,
                cwd=tmp_path, timeout=60,
            )  # fmt: skip
            assert done.returncode in code, done
            if "--" not in words:
                assert untouched(victim)
        assert killed(victim)
        assert f"cgroup {name} empty" in done.stdout


@pytest.mark.any_kernel
def test_nothing_is_imported_from_where_the_command_is_started(
    tmp_path: Path,
) -> None:
    """By the script, and with -I. With -m alone it is: Python's own way."""
    (tmp_path / "argparse.py").write_text("raise SystemExit('owned')")
    script = Path(sys.executable).with_name("mrelease")
    ways: dict[str, Sequence[str | Path]] = {
        "-I": [sys.executable, "-I", "-m", "mrelease"],
        "-m": COMMAND,
    }
    if script.exists():
        ways["script"] = [script]
    for way, argv in ways.items():
        done = subprocess.run(
            [*argv, "--version"], cwd=tmp_path, stdin=subprocess.DEVNULL,
            capture_output=True, text=True,
            env=os.environ | (
                {"PYTHONPATH": str(tmp_path)} if way == "-I" else {}
            ),
        )  # fmt: skip
        owned = way == "-m"
        assert (done.returncode, done.stderr) == (
            (1, "owned\n") if owned else (0, "")
        ), way


# ------------------------------------------------------ the threat model


@pytest.mark.any_kernel
def test_the_threat_model_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert len(named) > 30
    assert len(re.findall(r"\btest_\w+\.py::", text)) == len(named)
    for file, test in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), (
            f"{file}.py has no {test}"
        )
    for line in text.splitlines():
        if line.startswith("| ") and "test_" in line:
            assert line.count(" |") + 1 in (4, 5), line
    # And each of this file is of use to it.
    ours = re.findall(
        r"^def (test_\w+)\(", Path(__file__).read_text(), re.MULTILINE
    )
    missing = set(ours) - {test for _, test in named}
    assert missing <= {"test_the_threat_model_names_tests_that_exist"}


# ------------------------------------------ a victim that hangs in execve()

HANGS_IN_EXEC = """
import os, sys
os.open(sys.argv[1], os.O_RDONLY)  # closed by execv(), which comes to wait
os.execv("/bin/sleep", ["sleep", "60"])
"""
WAYS: dict[str, Callable[[int], object]] = {
    "kill": lambda pid: mrelease.kill(pid, timeout=0.5),
    "kill, locks ignored": lambda pid: mrelease.kill(
        pid, timeout=0.5, locks="ignore"
    ),
    "kill after a grace": lambda pid: mrelease.kill(
        pid, grace=0.1, timeout=0.5
    ),
    "release": lambda pid: Victim(pid).release(timeout=0.1),
    "Victim": lambda pid: Victim(pid).kill(timeout=0.5),
    "kill_many": lambda pid: mrelease.kill_many([pid], timeout=0.5),
    "kill_tree": lambda pid: mrelease.kill_tree(pid, timeout=0.5),
    "kill_group": lambda pid: mrelease.kill_group(pid, timeout=0.5),
    "a Reaper": lambda pid: one_thread(pid, 0.0),
    "a Reaper after a grace": lambda pid: one_thread(pid, 0.1),
    "the command": lambda pid: cli.main(
        ["kill", "--timeout", "0.5", str(pid)]
    ),
    "the command, of a tree": lambda pid: cli.main(
        ["kill", "--tree", str(pid)]
    ),
}


def one_thread(pid: int, grace: float) -> Release:
    with Reaper(threads=1, spares=1) as reaper:
        return reaper.kill(pid, grace=grace, timeout=0.5).result(5)


@needs_root
@pytest.mark.needs("release")
@pytest.mark.parametrize("way", WAYS)
def test_a_victim_that_hangs_in_execve_does_not_hold_its_kill_up(
    way: str, tmp_path: Path
) -> None:
    """It holds a lock for which others wait who open its memory."""
    with Unflushed(tmp_path) as file:
        victim = subprocess.Popen(
            [sys.executable, "-I", "-c", HANGS_IN_EXEC, file.path],
            start_new_session=True,
        )
        try:
            file.wait_for_close()
            # Linux 6.12 closes its files while it has its old memory yet.
            in_exec = mrelease._mrelease.is_in_exec(victim.pid)
            with kernel_errors.Job(lambda: WAYS[way](victim.pid)) as job:
                done = job.result(20)
            sent = victims.is_sent_sigkill(victim.pid)
            assert sent == (way != "release")
            if way == "release":
                assert isinstance(done, Release)
                assert done.outcome is Outcome.ALIVE
            if isinstance(done, Release) and way != "release":
                # Of the old memory nothing is known if it has a new one.
                released = Outcome.PARTIAL if in_exec else Outcome.RELEASED
                assert done.outcome is released
                assert done.freed == (not in_exec)
                assert done.locks in ("free", "ignored")
        finally:
            file.close()
            victim.kill()
            victim.wait()


HANGS_AT_SIGTERM = """
import os, signal, sys
os.open(sys.argv[1], os.O_RDONLY)
def hang(*_):
    os.execv("/bin/sleep", ["sleep", "60"])
signal.signal(signal.SIGTERM, hang)
print(flush=True)
while True:
    signal.pause()
"""


@needs_root
@pytest.mark.parametrize("grace", [0.0, 1.0])
def test_without_files_sigkill_is_sent_to_who_hangs_in_execve(
    grace: float, tmp_path: Path
) -> None:
    """That it hangs cannot be read then, and to ask for its locks may hang."""
    with Unflushed(tmp_path) as file:
        script = HANGS_AT_SIGTERM if grace else HANGS_IN_EXEC
        victim = subprocess.Popen(
            [sys.executable, "-I", "-c", script, file.path],
            stdout=subprocess.PIPE,
        )
        assert victim.stdout is not None
        try:
            if grace:
                victim.stdout.readline()
            else:
                file.wait_for_close()

            def run() -> Release:
                left = 0 if grace else 1  # for the pidfd
                timer = threading.Timer(
                    grace / 4, kernel_errors.leave_files, [left]
                )
                timer.start()
                if not grace:
                    timer.join()
                return mrelease.kill(victim.pid, grace=grace, timeout=0.5)

            with kernel_errors.Job(run):
                victims.wait_until(
                    lambda: victims.is_sent_sigkill(victim.pid),
                    "it is sent SIGKILL",
                )
        finally:
            file.close()
            victim.kill()
            victim.communicate()


@needs_root
def test_a_process_that_hangs_in_execve_does_not_keep_others_alive(
    tmp_path: Path,
) -> None:
    """Nor who reads of all processes, or kills one with it."""
    with Unflushed(tmp_path) as file:
        hanging = subprocess.Popen(
            [sys.executable, "-I", "-c", HANGS_IN_EXEC, file.path]
        )
        try:
            file.wait_for_close()
            with Family("child()\nrest()", new_session=True) as family:
                family.wait_for(2)
                job = kernel_errors.Job(
                    lambda: mrelease.kill_group(family.pid, timeout=5)
                )
                with job:
                    assert len(job.result(20)) == 2
                assert family.left() == set()
            assert "sleep" not in Path(f"/proc/{hanging.pid}/comm").read_text()
        finally:
            file.close()
            hanging.kill()
            hanging.wait()
