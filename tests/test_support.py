"""support(): what works here, why not, what to do; nobody dies of asking."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mrelease
import victims
from cgroups import Unavailable
from kernel_errors import KILL, ChildKilled, Do, answered, in_child
from mrelease import Feature, Support, support

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Unprivileged

    Answered = Callable[[dict[str, int | Do]], answered]

# Loaded now: an ordinary user may not be able to read Python's files.
codecs.lookup("ascii")

WALL = 0x40000000  # wait for children that send no SIGCHLD too
CLONE_NEWNS = 0x00020000
MS_REC_PRIVATE = 0x4000 | 1 << 18
MNT_DETACH = 2


def described(feature: Feature) -> bool:
    """It says why, and what to do where something is missing."""
    assert feature.name
    assert feature.why
    return feature.works is True or feature.advice != ""


# ------------------------------------------------------------------ here


@pytest.mark.needs("release")
def test_here_a_kill_can_be_followed_by_a_release() -> None:
    found = support(probe=True)
    assert found.release == Feature("release", True, "it works")
    assert found.signal.works is True
    assert bool(found) is True


def test_it_tells_the_kernel_and_the_filter_as_the_kernel_does() -> None:
    found = support()
    assert found.kernel == os.uname().release
    status = victims.status_of(os.getpid())
    assert found.seccomp is (status["Seccomp"] != "0")


def test_where_there_is_no_filter_all_is_tried_without_a_child() -> None:
    if support().seccomp:
        pytest.skip("the tests run under a seccomp filter")
    assert support() == support(probe=True)
    assert None not in [f.works for f in support().features]


def test_every_feature_says_why_and_what_to_do() -> None:
    assert all(described(f) for f in support().features)


def test_it_answers_whatever_the_caller_is_called() -> None:
    def named() -> Support:
        name = "\N{LATIN SMALL LETTER U WITH DIAERESIS}\xff".encode()
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME
        return support()

    assert in_child(named) == support()


@pytest.mark.needs("root")
def test_root_may_raise_kill_and_look_at_everything() -> None:
    effective = int(victims.status_of(os.getpid())["CapEff"], 16)
    found = support(probe=True)
    for feature, capability in (
        (found.others, 5),
        (found.locks, 19),
        (found.raising, 23),
    ):
        if effective >> capability & 1:
            assert feature.works is True, feature
            assert "CAP_" in feature.why


def test_what_it_says_of_others_and_locks_is_true(
    unprivileged: Unprivileged,
) -> None:
    def tried(pid: int) -> tuple[Support, bool, str]:
        found = support()
        try:
            os.kill(pid, 0)
        except PermissionError:
            allowed = False
        else:
            allowed = True
        with victims.asleep(1) as own:
            release = mrelease.kill(own.pid)
        return found, allowed, release.locks

    with victims.asleep(1) as roots:
        found, others, locks = unprivileged(tried, roots.pid)
    assert found.others.works is others is False
    assert bool(found.locks.works) is (locks == "free")
    # As root, whom nothing is denied:
    with victims.asleep(1) as own:
        _, others, locks = tried(own.pid)
    assert others
    assert bool(support().locks.works) is (locks == "free")


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_as_dict_is_ready_for_json() -> None:
    told = support(probe=True).as_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["supported"] is True
    assert told["kernel"] == os.uname().release
    for name in ("release", "signal", "locks", "raising", "others", "proc",
                 "cgroup", "pressure"):  # fmt: skip
        feature = told[name]
        assert isinstance(feature, dict)
        assert list(feature) == ["name", "works", "why", "advice"]
        assert feature["name"] == name


@pytest.mark.any_kernel
def test_as_text_it_names_every_feature_once() -> None:
    found = support()
    lines = str(found).splitlines()
    assert lines[0].startswith(f"Linux {found.kernel}, seccomp filter: ")
    said = [line for line in lines[1:] if not line.startswith("    ")]
    assert [line.split(":")[0] for line in said] == [
        feature.name for feature in found.features
    ]
    advice = [line.strip() for line in lines if line.startswith("    ")]
    assert advice == [f.advice for f in found.features if f.advice]


@pytest.mark.any_kernel
@pytest.mark.parametrize("probe", [1, 0, None, "yes"])
def test_probe_must_be_a_bool(probe: object) -> None:
    with pytest.raises(TypeError, match="probe must be a bool, not "):
        support(probe=probe)  # type: ignore[arg-type]


# ------------------------------------------------------- seccomp policies

CALLS = [
    ("process_mrelease", "release"),
    ("pidfd_open", "signal"),
    ("pidfd_send_signal", "signal"),
    ("get_robust_list", "locks"),
    ("process_vm_readv", "locks"),
    ("sched_setattr", "raising"),
]
# Without a filter; an ordinary user may raise nobody.
WORKING = {f for _, f in CALLS if getattr(support(), f).works}
each_call = pytest.mark.parametrize(("call", "feature"), CALLS)
SEEN = [call for call in CALLS if call[0] != "pidfd_open"]


@each_call
@pytest.mark.parametrize("rule", [errno.ENOSYS, errno.EPERM, KILL])
def test_without_probe_a_filter_is_not_tried_and_the_caller_lives(
    answered: Answered, call: str, feature: str, rule: int | Do
) -> None:
    found = answered({call: rule}).run(support)
    assert found.seccomp is True
    judged: Feature = getattr(found, feature)
    assert judged.works is None
    assert "could kill this process" in judged.why
    assert "probe=True" in judged.advice
    assert not found


@each_call
@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOSYS, "ENOSYS: the kernel has no such call, or a seccomp"),
        (errno.EPERM, "EPERM: a seccomp policy forbids it"),
        (errno.EACCES, "it fails with EACCES"),
    ],
)
@pytest.mark.needs("release")
def test_probe_tells_which_call_is_refused_and_how(
    answered: Answered, call: str, feature: str, code: int, why: str
) -> None:
    found = answered({call: code}).run(support, probe=True)
    judged: Feature = getattr(found, feature)
    assert judged.works is False
    assert judged.why.startswith(f"{call}: {why}")
    assert f"Allow {call} in the seccomp policy" in judged.advice
    assert bool(found) is (feature not in ("release", "signal"))
    rest = [getattr(found, f) for f in WORKING - {feature}]
    assert all(other.works is True for other in rest), rest


def test_enosys_tells_the_kernel_that_is_needed(answered: Answered) -> None:
    rule: dict[str, int | Do] = {"process_mrelease": errno.ENOSYS}
    found = answered(rule).run(support, probe=True)
    assert "It needs Linux 5.15 or later." in found.release.advice


class Seen:
    """What a program notices of support(probe=True)."""

    def __init__(self) -> None:
        signals: list[int] = []
        signal.signal(signal.SIGCHLD, lambda n, _: signals.append(n))
        before = sorted(os.listdir("/proc/self/fd"))
        self.found = support(probe=True)
        self.files = sorted(os.listdir("/proc/self/fd")) == before
        self.signals = signals
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        try:
            os.waitpid(-1, os.WNOHANG | WALL)
        except ChildProcessError:
            self.children = False
        else:
            self.children = True


@each_call
def test_probe_tells_a_kill_policy_and_kills_nobody_else(
    answered: Answered, call: str, feature: str
) -> None:
    seen = answered({call: KILL}).run(Seen)
    judged: Feature = getattr(seen.found, feature)
    assert judged.works is False
    assert judged.why.startswith(f"{call}: a seccomp policy kills whoever")
    assert "Allow" in judged.advice
    rest = [getattr(seen.found, f) for f in WORKING - {feature}]
    assert all(other.works is True for other in rest), rest


@pytest.mark.parametrize("rule", [KILL, None])
@pytest.mark.needs("release")
def test_probe_leaves_no_child_no_file_and_no_sigchld(
    answered: Answered, rule: Do | None
) -> None:
    rules: dict[str, int | Do] = {}
    if rule is not None:
        rules = {"process_mrelease": rule, "pidfd_send_signal": rule}
    seen = answered(rules).run(Seen)
    assert seen.found.release.works is (rule is None)
    assert seen.signals == []
    assert seen.children is False
    assert seen.files
    assert seen.mask == set()


def test_the_policy_does_kill_who_calls(answered: Answered) -> None:
    """Shows that the tests above were about a policy that is there."""
    kernel = answered({"process_mrelease": KILL})
    with pytest.raises(ChildKilled) as killed:
        kernel.run(mrelease.process_mrelease, -1)
    assert killed.value.signal == signal.SIGSYS


def test_probe_says_if_no_child_can_be_made(
    unprivileged: Unprivileged,
) -> None:
    def probed() -> Support:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        return support(probe=True)

    found = unprivileged(probed)
    assert found.release.works is None
    assert "no child process could be made" in found.release.why
    assert "RLIMIT_NPROC" in found.release.advice
    assert not found


def test_probe_says_if_no_child_can_be_watched() -> None:
    def probed() -> Support:
        import mrelease.support  # noqa: F401 - all is loaded before

        support()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with contextlib.suppress(OSError):
            while True:
                os.dup(2)
        return support(probe=True)

    found = in_child(probed)
    assert found.release.works is None
    assert not found


# --------------------------------------------------------------- no /proc


def without_proc() -> tuple[Support, Support]:
    libc = ctypes.CDLL(None, use_errno=True)
    import mrelease.support  # noqa: F401 - loaded before /proc is gone

    steps = (
        (libc.unshare, CLONE_NEWNS),
        (libc.mount, None, b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None),
        (libc.umount2, b"/proc", MNT_DETACH),
    )
    for function, *args in steps:
        if function(*args) != 0:
            why = os.strerror(ctypes.get_errno())
            pytest.skip(f"/proc cannot be taken away: {why}")
    assert not Path("/proc/self").exists()
    return support(), support(probe=True)


@pytest.mark.needs("root")
@pytest.mark.needs("release")
def test_without_proc_it_says_so_and_tells_the_rest_by_probing() -> None:
    plain, probed = in_child(without_proc)
    for found in (plain, probed):
        assert found.proc.works is False
        assert "/proc is not mounted" in found.proc.why
        assert "mount -t proc" in found.proc.advice
        assert found.seccomp is None
        assert found.others.works is None
        assert found.cgroup.works is False
        assert found.pressure.works is False
        assert all(described(feature) for feature in found.features)
        assert "seccomp filter: not known" in str(found)
    # A filter may be there: nothing was tried that it could kill for.
    assert plain.release.works is None
    assert not plain
    assert probed.release.works is True
    assert probed


# ----------------------------------------------------------------- rights


@pytest.mark.needs("release")
def test_without_privileges_it_says_what_to_grant(
    unprivileged: Unprivileged,
) -> None:
    def asked() -> Support:
        for limit in (resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO):
            resource.setrlimit(limit, (0, 0))
        return support()

    found = unprivileged(asked)
    assert found.release.works is True  # the call asks for no permission
    assert found.others == Feature(
        "others",
        False,
        "only processes of user 65534",
        "To kill processes of other users, grant CAP_KILL.",
    )
    assert found.raising.works is False
    assert "Grant CAP_SYS_NICE" in found.raising.advice
    assert found


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("limit", "value", "works"),
    [
        (resource.RLIMIT_RTPRIO, 1, True),
        (resource.RLIMIT_NICE, 40, True),
        (resource.RLIMIT_NICE, 20, False),  # nice 0: what everybody may
    ],
)
def test_limits_that_allow_raising_are_seen(
    unprivileged: Unprivileged, limit: int, value: int, works: bool
) -> None:
    def asked() -> bool | None:
        return support().raising.works

    hard = resource.getrlimit(limit)[1]
    if hard != resource.RLIM_INFINITY and hard < value:
        try:
            in_child(resource.setrlimit, limit, (value, value))
        except ValueError:
            pytest.skip(f"the hard limit is {hard} and cannot be raised")

    def run() -> bool | None:
        for each in (resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO):
            resource.setrlimit(each, (0, resource.getrlimit(each)[1]))
        resource.setrlimit(limit, (value, max(value, hard)))
        return unprivileged(asked)

    assert in_child(run) is works


def test_a_cgroup_that_it_names_is_there() -> None:
    found = support().cgroup
    if not found.works:
        pytest.skip(found.why)
    where = Path(found.why.split(" at ")[1].split(",")[0])
    assert where.is_dir()
    version = 2 if "version 2" in found.why else 1
    assert (where / "cgroup.controllers").exists() is (version == 2)


def test_pressure_that_it_names_can_be_read() -> None:
    found = support().pressure
    if not found.works:
        pytest.skip(found.why)
    assert "some avg10=" in Path("/proc/pressure/memory").read_text()


@pytest.mark.needs("root")
def test_a_probe_is_not_the_init_of_a_new_pid_namespace() -> None:
    """It would end, and no other process could be made in there."""

    def run() -> None:
        if ctypes.CDLL(None).unshare(0x20000000) != 0:  # CLONE_NEWPID
            raise Unavailable("no pid namespaces here")
        assert support(probe=True).signal.works
        assert in_child(os.getpid) == 1

    in_child(run)
