"""What works here, and for what does not: why, and what to do."""

from __future__ import annotations

import os
from errno import ENOSYS, EPERM, errorcode

from mrelease import _mrelease
from mrelease.printable import printable
from mrelease.process import next_child_is_init, read_fields, read_lines
from mrelease.value import Value

_CAP_KILL = 5
_CAP_SYS_PTRACE = 19
_CAP_SYS_NICE = 23


class Feature(Value):
    """One thing that a kill makes use of.

    name    what it is
    works   True, False, or None where it was not tried
    why     what was found
    advice  what to do about it; empty where it works
    """

    __slots__ = ("name", "works", "why", "advice")  # noqa: RUF023

    name: str
    works: bool | None
    why: str
    advice: str

    def __init__(
        self, name: str, works: bool | None, why: str, advice: str = ""
    ) -> None:
        self._set(name, works, why, advice)

    def as_dict(self) -> dict[str, object]:
        """Give the fields, ready for JSON."""
        return dict(zip(self.__slots__, self._fields(), strict=True))

    def __str__(self) -> str:
        mark = {True: "yes", False: "no", None: "not known"}[self.works]
        line = f"{self.name}: {mark}: {self.why}"
        return f"{line}\n    {self.advice}" if self.advice else line


class Support(Value):
    """What works for this process, on this kernel, now.

    kernel     the release of the running kernel
    seccomp    whether a seccomp filter is active on the calling thread; None
               if that cannot be told
    release    process_mrelease(2)
    signal     pidfd_open(2) and pidfd_send_signal(2): without them nothing
               is killed
    locks      whether robust locks of other processes can be looked at
    raising    whether a dying victim can be given a better scheduling
    others     whether processes of other users can be killed
    proc       /proc, for the footprint, identity and causes
    cgroup     the memory cgroup, and cgroup.kill
    pressure   pressure stall information (PSI)

    True in a boolean context if a kill can be followed by a release.
    """

    __slots__ = (  # noqa: RUF023
        "kernel",
        "seccomp",
        "release",
        "signal",
        "locks",
        "raising",
        "others",
        "proc",
        "cgroup",
        "pressure",
    )

    kernel: str
    seccomp: bool | None
    release: Feature
    signal: Feature
    locks: Feature
    raising: Feature
    others: Feature
    proc: Feature
    cgroup: Feature
    pressure: Feature

    def __init__(
        self,
        kernel: str,
        seccomp: bool | None,
        release: Feature,
        signal: Feature,
        locks: Feature,
        raising: Feature,
        others: Feature,
        proc: Feature,
        cgroup: Feature,
        pressure: Feature,
    ) -> None:
        self._set(
            kernel,
            seccomp,
            release,
            signal,
            locks,
            raising,
            others,
            proc,
            cgroup,
            pressure,
        )

    @property
    def features(self) -> tuple[Feature, ...]:
        """All of them, the most important first."""
        return tuple(
            field for field in self._fields() if isinstance(field, Feature)
        )

    def __bool__(self) -> bool:
        return bool(self.release.works and self.signal.works)

    def as_dict(self) -> dict[str, object]:
        """Give all of it, ready for JSON."""
        found: dict[str, object] = {
            "kernel": self.kernel,
            "seccomp": self.seccomp,
            "supported": bool(self),
        }
        for name, field in zip(self.__slots__, self._fields(), strict=True):
            if isinstance(field, Feature):
                found[name] = field.as_dict()
        return found

    def __str__(self) -> str:
        filtered = {True: "yes", False: "no", None: "not known"}[self.seccomp]
        head = f"Linux {self.kernel}, seccomp filter: {filtered}"
        return "\n".join([head, *map(str, self.features)])


class _Status:
    """What /proc/self/status says of the calling thread."""

    def __init__(self) -> None:
        self.readable = False
        self.seccomp: bool | None = None
        self.capabilities: int | None = None
        try:
            lines = read_fields("/proc/thread-self/status")
        except OSError:
            return
        self.readable = True
        if "Seccomp" in lines:
            self.seccomp = lines["Seccomp"] != "0"
        if "CapEff" in lines:
            self.capabilities = int(lines["CapEff"], 16)

    def has(self, capability: int) -> bool | None:
        if self.capabilities is None:
            return None
        return bool(self.capabilities >> capability & 1)


def support(*, probe: bool = False) -> Support:
    """Tell what works here, and for what does not, why and what to do.

    Nothing is killed and nothing is changed.  A seccomp policy may kill the
    caller of a system call that it forbids, so where a filter is active the
    calls are not tried (Feature.works is None), unless probe is true: then
    they are tried in a child process, which costs a fork (but not where that
    would be the init of a new pid namespace, and end it).  Raises nothing but
    TypeError for a probe that is no bool.
    """
    if not isinstance(probe, bool):
        raise TypeError(f"probe must be a bool, not {type(probe).__name__}")
    status = _Status()
    calls: dict[str, int | None]
    if probe and not next_child_is_init():
        calls = dict(_mrelease.probe(True))
    elif status.seccomp is False:
        calls = dict(_mrelease.probe(False))
    else:
        calls = {}
    return Support(
        os.uname().release,
        status.seccomp,
        _release(calls),
        _signal(calls),
        _locks(calls, status),
        _raising(calls, status),
        _others(status),
        _proc(status),
        _cgroup(),
        _pressure(),
    )


_ALLOW = (
    "Allow {name} in the seccomp policy (systemd: SystemCallFilter=, "
    "containers: the seccomp profile)."
)


def _call(name: str, calls: dict[str, int | None], since: str) -> Feature:
    """Judge one system call by what a trial gave."""
    result = calls.get(name)
    if result is None:
        return Feature(
            name,
            None,
            "a seccomp filter is active, and trying could kill this process",
            "Ask again with probe=True (mrelease support --probe): it is "
            "tried in a child.",
        )
    if result == 0:
        return Feature(name, True, "it works")
    allow = _ALLOW.format(name=name)
    if result == -1:
        return Feature(
            name,
            False,
            "a seccomp policy kills whoever calls it: do not use it here",
            allow,
        )
    if result == -2:
        return Feature(
            name,
            None,
            "no child process could be made to try it in",
            "Free some memory, or raise RLIMIT_NPROC.",
        )
    if result == ENOSYS:
        return Feature(
            name,
            False,
            "ENOSYS: the kernel has no such call, or a seccomp policy hides "
            "it",
            f"It needs Linux {since} or later. {allow}",
        )
    if result == EPERM:
        return Feature(
            name, False, "EPERM: a seccomp policy forbids it", allow
        )
    code = errorcode.get(result, str(result))
    return Feature(
        name, False, f"it fails with {code}", f"Unexpected. {allow}"
    )


def _first_bad(*features: Feature) -> Feature:
    for feature in features:
        if not feature.works:
            return feature
    return features[0]


def _named(name: str, feature: Feature) -> Feature:
    why = feature.why
    if not feature.works:
        why = f"{feature.name}: {why}"
    return Feature(name, feature.works, why, feature.advice)


def _release(calls: dict[str, int | None]) -> Feature:
    return _named("release", _call("process_mrelease", calls, "5.15"))


def _signal(calls: dict[str, int | None]) -> Feature:
    return _named(
        "signal",
        _first_bad(
            _call("pidfd_send_signal", calls, "5.1"),
            _call("pidfd_open", calls, "5.3"),
        ),
    )


def _locks(calls: dict[str, int | None], status: _Status) -> Feature:
    bad = _first_bad(
        _call("get_robust_list", calls, "2.6.17"),
        _call("process_vm_readv", calls, "3.2"),
    )
    if not bad.works:
        return _named("locks", bad)
    if status.has(_CAP_SYS_PTRACE):
        return Feature("locks", True, "CAP_SYS_PTRACE: of every process")
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as f:
            scope = int(f.read())
    except (OSError, ValueError):
        scope = 0
    if scope == 0:
        return Feature("locks", True, "of processes of the same user")
    if scope == 1:
        return Feature(
            "locks",
            True,
            "of descendants only (kernel.yama.ptrace_scope is 1)",
            "For others, grant CAP_SYS_PTRACE.",
        )
    return Feature(
        "locks",
        False,
        f"kernel.yama.ptrace_scope is {scope}: victims are released without "
        "a look at their robust locks",
        "Grant CAP_SYS_PTRACE, or lower kernel.yama.ptrace_scope.",
    )


def _raising(calls: dict[str, int | None], status: _Status) -> Feature:
    import resource

    call = _first_bad(
        _call("sched_setattr", calls, "3.14"),
        _call("sched_getattr", calls, "3.14"),
        _call("sched_setaffinity", calls, "2.6"),
    )
    if not call.works:
        return _named("raising", call)
    if status.has(_CAP_SYS_NICE):
        return Feature("raising", True, "CAP_SYS_NICE: every victim")
    if resource.getrlimit(resource.RLIMIT_RTPRIO)[0] != 0:
        return Feature("raising", True, "RLIMIT_RTPRIO: own victims")
    if resource.getrlimit(resource.RLIMIT_NICE)[0] > 20:
        return Feature("raising", True, "RLIMIT_NICE: own victims, by nice")
    return Feature(
        "raising",
        False,
        "no CAP_SYS_NICE, RLIMIT_RTPRIO or RLIMIT_NICE: what a release "
        "cannot free waits until the victim gets to run",
        "Grant CAP_SYS_NICE (systemd: AmbientCapabilities=CAP_SYS_NICE).",
    )


def _others(status: _Status) -> Feature:
    if status.has(_CAP_KILL):
        return Feature("others", True, "CAP_KILL: processes of every user")
    return Feature(
        "others",
        False if status.readable else None,
        f"only processes of user {os.getuid()}",
        "To kill processes of other users, grant CAP_KILL.",
    )


def _proc(status: _Status) -> Feature:
    if not status.readable:
        return Feature(
            "proc",
            False,
            "/proc is not mounted: no footprint, no start times, no causes",
            "Mount it: mount -t proc proc /proc",
        )
    if not _mrelease.proc_is_ours():
        return Feature(
            "proc",
            False,
            "/proc is of another pid namespace, where pids mean others: it "
            "is not used",
            "Mount one of this namespace: mount -t proc proc /proc",
        )
    # hidepid hides other users' processes from /proc
    if not os.path.exists("/proc/1/stat"):
        return Feature(
            "proc",
            True,
            "of own processes only (hidepid)",
            "For others, grant CAP_SYS_PTRACE or the group of gid=.",
        )
    return Feature("proc", True, "it is mounted")


def _mounts() -> list[list[str]]:
    try:
        return [line.split(" ") for line in read_lines("/proc/self/mounts")]
    except OSError:
        return []


def _cgroup() -> Feature:
    for _, where, kind, options, *_ in _mounts():
        if kind == "cgroup2":
            try:
                with open(
                    f"{where}/cgroup.controllers", encoding="ascii"
                ) as f:
                    controllers = f.read().split()
            except OSError:
                continue
            if "memory" in controllers:
                return Feature(
                    "cgroup", True, f"version 2 at {printable(where)}"
                )
        elif kind == "cgroup" and "memory" in options.split(","):
            return Feature(
                "cgroup",
                True,
                f"version 1 at {printable(where)}, without cgroup.kill",
            )
    return Feature(
        "cgroup",
        False,
        "no memory cgroup is mounted",
        "Mount cgroup2 with the memory controller.",
    )


def _pressure() -> Feature:
    path = "/proc/pressure/memory"
    try:
        # Opening alone tells nothing: a disabled PSI fails at read().
        with open(path, encoding="ascii") as file:
            file.read()
    except OSError as error:
        return Feature(
            "pressure",
            False,
            f"{path}: {error.strerror}",
            "It needs CONFIG_PSI, and psi=1 at boot where it is off.",
        )
    return Feature("pressure", True, path)
