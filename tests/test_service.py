"""A killer as a service: which rights it needs, and what each one is for.

docs/examples/mrelease-killer.service is applied with what there is without
systemd: capabilities, limits, no_new_privs, a file system that cannot be
written, and its SystemCallFilter, of which systemd itself tells the groups.
The victim is another user's; its memory can only come back by the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_errors
import mrelease
import victims
from cgroups import Unavailable
from mrelease import Outcome, Reaper
from test_limits import own_mounts

if TYPE_CHECKING:
    from collections.abc import Mapping

UNIT = (
    Path(__file__).resolve().parent.parent
    / "docs" / "examples" / "mrelease-killer.service"
)  # fmt: skip
SERVICE, OTHER = 65531, 65532
NUMBERS = {
    "CAP_KILL": 5,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_NICE": 23,
    "CAP_SYS_RESOURCE": 24,
}
MEMLOCK = 64 << 10
_libc = ctypes.CDLL(None, use_errno=True)

pytestmark = pytest.mark.needs("root", "held")


# ------------------------------------------------------------ to become one


def _prctl(option: int, *args: int) -> int:
    four = [*args, 0, 0, 0, 0][:4]
    return int(_libc.prctl(option, *(ctypes.c_ulong(arg) for arg in four)))


def may(name: str) -> bool:
    """Do the tests have it to give?"""
    have = int(victims.status_of(os.getpid())["CapPrm"], 16)
    return bool(have >> NUMBERS[name] & 1)


def become(names: set[str]) -> None:
    """A user of its own, with these capabilities and no other, for good."""
    numbers = {NUMBERS[name] for name in names}
    mask = sum(1 << number for number in numbers)
    assert _prctl(kernel_errors.PR_SET_NO_NEW_PRIVS, 1) == 0
    for number in range(64):
        if number not in numbers:
            _prctl(24, number)  # PR_CAPBSET_DROP
    assert _prctl(8, 1) == 0  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(SERVICE, SERVICE, SERVICE)
    os.setresuid(SERVICE, SERVICE, SERVICE)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    halves = [mask & 0xFFFFFFFF] * 3 + [mask >> 32] * 3
    if _libc.capset(header, (ctypes.c_uint32 * 6)(*halves)) != 0:
        raise Unavailable(f"may not keep {sorted(names)}")
    for number in numbers:
        assert _prctl(47, 2, number) == 0  # PR_CAP_AMBIENT_RAISE
    # A change of user makes undumpable; a service is started by execve().
    assert _prctl(kernel_errors.PR_SET_DUMPABLE, 1) == 0
    status = victims.status_of(os.getpid())
    for field in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(status[field], 16) == mask, field


def found_by(pid: int) -> dict[str, bool]:
    """Harden, make a Reaper, kill: what of it there was."""
    hardening = mrelease.harden()
    with Reaper() as reaper:
        policy = reaper.scheduling.policy
        try:
            release = reaper.kill(pid, timeout=0.5).result()
        except PermissionError:
            release = mrelease.Release(pid, Outcome.DENIED)
    found = {
        "killed": release.signalled is not None,
        "released": release.outcome is Outcome.RELEASED,
        "locks seen": release.locks == "free",
        "victim raised": release.raised,
        "real-time threads": policy == "SCHED_FIFO",
        "scheduling": hardening.scheduling.status == "done",
        "memory": hardening.memory.status == "done",
        "warm up": hardening.warm_up.status == "done",
        "oom": hardening.oom.now == -1000,
    }
    hardening.undo()
    return found


OF_THE_KILL = {"killed", "released", "locks seen", "victim raised"}
LOST = {
    "CAP_KILL": OF_THE_KILL,
    "CAP_SYS_PTRACE": {"locks seen"},
    "CAP_SYS_NICE": {"victim raised", "real-time threads", "scheduling"},
    "CAP_IPC_LOCK": {"memory"},
    "CAP_SYS_RESOURCE": {"oom"},
    "LimitMEMLOCK": {"memory"},
    "OOMScoreAdjust": {"oom"},
    "process_mrelease": {"released"},
}


def check(found: Mapping[str, bool], without: str | None, *never: str) -> None:
    """Only that is lost, and what cannot be had here."""
    lost = set(never) if without is None else LOST[without] | set(never)
    if not kernel_errors.has_the_call():
        lost.add("released")
    assert {name for name, there in found.items() if not there} == lost


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    victims.binary()  # not as another user


@pytest.mark.parametrize("without", [None, *NUMBERS])
def test_each_capability_is_for_what_the_document_says(
    without: str | None,
) -> None:
    """Without any limit that would stand in for one."""
    if without is not None and not may(without):
        pytest.skip(f"the tests have no {without} themselves")
    names = {name for name in NUMBERS if may(name) and name != without}

    def run(pid: int) -> dict[str, bool]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK, MEMLOCK))
        become(names)
        return found_by(pid)

    with victims.held(4, threads=2, user=OTHER) as victim:
        found = kernel_errors.in_child(run, victim.pid)
        assert found["killed"] == (without != "CAP_KILL")
    check(found, without, *([] if may("CAP_SYS_RESOURCE") else ["oom"]))


# ------------------------------------------------------------------ the unit


def settings() -> dict[str, list[str]]:
    """Each setting of the unit, and the values that it is given in turn."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def analyze(*args: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze (Debian: apt-get install systemd)")
    return subprocess.run(
        [program, *args], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, env=os.environ | {"SYSTEMD_PAGER": "cat", "LC_ALL": "C"},
    )  # fmt: skip


def groups() -> dict[str, set[str]]:
    """The groups of system calls, as this systemd has them."""
    found: dict[str, set[str]] = {}
    members: set[str] = set()
    for line in analyze("syscall-filter").stdout.splitlines():
        word = line.strip()
        if line.startswith("@"):
            members = found.setdefault(word, set())
        elif word and not word.startswith("#"):
            members.add(word)
    return found


def calls(values: list[str], without: str | None = None) -> set[str]:
    """What SystemCallFilter= comes to."""
    known = groups()

    def expand(word: str) -> set[str]:
        if not word.startswith("@"):
            return {word}
        return {call for each in known[word] for call in expand(each)}

    allowed: set[str] = expand("@default")
    for value in values:
        listed = {
            call
            for word in value.lstrip("~").split()
            if word != without
            for call in expand(word)
        }
        allowed = allowed - listed if value[0] == "~" else allowed | listed
    return allowed


def numbers_of(names: set[str]) -> set[int]:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("no libseccomp.so.2")
    found = {
        library.seccomp_syscall_resolve_name(name.encode()) for name in names
    }
    return {number for number in found if number >= 0}


def limit(name: str, value: str) -> None:
    """As systemd would; as far as it goes without CAP_SYS_RESOURCE."""
    number = getattr(resource, name.replace("Limit", "RLIMIT_"))
    wanted = resource.RLIM_INFINITY if value == "infinity" else int(value)
    hard = resource.getrlimit(number)[1]
    with contextlib.suppress(ValueError):
        resource.setrlimit(number, (wanted, wanted))
        return
    resource.setrlimit(number, (hard, hard))


def apply(unit: dict[str, list[str]], without: str | None) -> None:
    """All of the unit that a process can do to itself, but the filter."""
    own_mounts()
    remount = 32 | 4096 | 1  # MS_REMOUNT, MS_BIND, MS_RDONLY
    assert _libc.mount(None, b"/", None, remount, None) == 0
    for name, values in unit.items():
        if name.startswith("Limit") and name != without:
            limit(name, values[-1])
    if without == "LimitMEMLOCK":
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK, MEMLOCK))
    if without != "OOMScoreAdjust":
        with contextlib.suppress(OSError):  # without CAP_SYS_RESOURCE
            Path("/proc/self/oom_score_adj").write_text(
                unit["OOMScoreAdjust"][-1]
            )
    become(set(unit["CapabilityBoundingSet"][-1].split()) - {without or ""})
    _prctl(65, 1)  # PR_SET_MDWE: MemoryDenyWriteExecute (Linux 6.3)


def in_filtered_thread(numbers: set[int], pid: int) -> dict[str, bool]:
    """What it starts has the filter too; who sends the result has not."""
    found: list[dict[str, bool]] = []
    refused: list[str] = []

    def run() -> None:
        kernel_errors.allow_only(numbers)
        for call in (lambda: os.fsync(0), socket.socket):
            try:
                call()
            except PermissionError:
                refused.append(str(call))
        found.append(found_by(pid))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(refused) == 2
    return found[0]


CAPABILITIES = ["CAP_KILL", "CAP_SYS_PTRACE", "CAP_SYS_NICE"]


@pytest.mark.needs("seccomp")
@pytest.mark.parametrize(
    "without",
    [None, *CAPABILITIES, "LimitMEMLOCK", "OOMScoreAdjust",
     "process_mrelease"],
)  # fmt: skip
def test_the_unit_gives_what_it_takes_and_no_more(
    without: str | None,
) -> None:
    unit = settings()
    assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"]
    assert unit["CapabilityBoundingSet"] == [" ".join(CAPABILITIES)]
    assert unit["SystemCallErrorNumber"] == ["EPERM"]
    allowed: set[int] = set()
    if shutil.which("systemd-analyze") or without == "process_mrelease":
        allowed = numbers_of(calls(unit["SystemCallFilter"], without))
        assert 100 < len(allowed) < 300
        assert (kernel_errors.number("process_mrelease") in allowed) == (
            without != "process_mrelease"
        )

    def run(pid: int) -> dict[str, bool]:
        apply(unit, without)
        with pytest.raises(OSError, match="Read-only"):
            Path("/tmp/mrelease-no").touch()
        return in_filtered_thread(allowed, pid) if allowed else found_by(pid)

    with victims.held(4, threads=2, user=OTHER) as victim:
        found = kernel_errors.in_child(run, victim.pid)
    never = set()
    if not may("CAP_SYS_RESOURCE"):  # systemd has it, and gives these
        never.add("oom")
        if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] >= 0:
            never.add("memory")
    check(found, without, *never)


@pytest.mark.any_kernel
def test_systemd_has_nothing_to_say_against_the_unit(tmp_path: Path) -> None:
    program, *_ = settings()["ExecStart"][-1].split()
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(program, sys.executable))
    done = analyze("verify", str(copy))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.any_kernel
def test_systemd_finds_the_unit_little_exposed() -> None:
    """2.0 of 10, where a service without any restriction has 9.6."""
    done = analyze(
        "security", "--offline=true", "--threshold=20", str(UNIT)
    )  # fmt: skip
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd before 250")
    assert done.returncode == 0, done.stdout + done.stderr
    level = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert level is not None, done.stdout
    assert float(level[1]) <= 2.0
