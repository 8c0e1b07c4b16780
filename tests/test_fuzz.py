"""Arguments and sequences of calls that hypothesis draws.

$MRELEASE_FUZZ=20 draws 20 times as many, others each time, and takes its time
to find the shortest that fails; --quick draws fewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import dis
import faulthandler
import gc
import io
import os
import pickle
import re
import select
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings, stateful
from hypothesis import strategies as st

import hostile
import kernel_errors
import mrelease
import report
import soak
import victims
from hostile import ANYTHING, Boom, processes, says, terms
from kill_ways import native_threads
from mrelease import (
    Outcome,
    Reaper,
    Reaping,
    Release,
    Victim,
    _mrelease,
    cli,
)
from mrelease.process import read_fields
from mrelease.selection import _stat_of
from namespaces import PidNamespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kernel_errors import Call

LONG = "MRELEASE_FUZZ" in os.environ
ENOUGH = None if LONG else 280.0
"""For a child that draws, in seconds: before the test is ended for hanging."""

_drawn: dict[str, int] = {}


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> Callable[[int], settings]:
    """budget(200): how many examples hypothesis may draw."""
    times = float(os.environ.get("MRELEASE_FUZZ", "1"))
    share = 4 if request.config.getoption("--quick") else 1
    if LONG:
        faulthandler.cancel_dump_traceback_later()

    def make(examples: int) -> settings:
        count = max(5, int(examples * times) // share)
        _drawn[request.node.name] = count
        return settings(
            max_examples=count,
            derandomize=not LONG,
            phases=[Phase.generate, Phase.shrink][: 1 + LONG],
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )

    return make


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """gc.collect() need not look at all of pytest, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _report() -> Iterator[None]:
    yield
    report.write("fuzz", {"examples": sum(_drawn.values())})


# ------------------------------------------------------------ the sandbox
#
# Where a drawn pid can be nobody's: a pid namespace of its own, with two
# bystanders in it, and every signal is refused by the kernel and noted.

_SIGNUM = {
    "kill": 1, "tkill": 1, "tgkill": 2, "pidfd_send_signal": 1,
    "rt_sigqueueinfo": 1, "rt_tgsigqueueinfo": 2,
}  # fmt: skip
"""Which argument the signal is."""


def refuse(call: Call) -> kernel_errors.Plain:
    """Signal 0 only asks whether there is somebody."""
    signum = call.args[_SIGNUM[call.name]] & 0xFFFFFFFF
    return kernel_errors.ALLOW if signum == 0 else 1  # EPERM


class Here(NamedTuple):
    """What there is in the sandbox, by pids of it."""

    own: int
    bystanders: tuple[int, ...]


def in_sandbox(function: Callable[[Here], None]) -> None:
    """Run it in there; nothing may be signalled by it."""
    libc = ctypes.CDLL(None, use_errno=True)
    rules: dict[str, kernel_errors.Rule] = dict.fromkeys(_SIGNUM, refuse)
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(PidNamespace())
        others = [
            stack.enter_context(victims.Process(1, pid_namespace=inside))
            for _ in range(2)
        ]
        numbers = tuple(inside.inner(each.pid) for each in others)
        mounts = os.open(f"/proc/{inside.pid}/ns/mnt", os.O_RDONLY)
        stack.callback(os.close, mounts)

        def run() -> None:
            with inside.entered(), kernel_errors.Job(enter) as job:
                job.result(ENOUGH)

        def enter() -> None:
            assert libc.setns(mounts, 0) == 0
            os.setsid()
            assert sorted(map(int, filter(str.isdigit, os.listdir("/proc")))
                          ) == sorted([1, os.getpid(), *numbers])  # fmt: skip
            function(Here(os.getpid(), numbers))

        kernel = stack.enter_context(kernel_errors.answered(rules))
        kernel.start(run).result(ENOUGH)
        sent = [call for call, answer in kernel.calls if answer == 1]
        assert not sent, sent
        for each in others:
            assert not each.ended()
            assert each.rss_anon() >= victims.MIB


# ------------------------------------------------------- what may be raised

_PACKAGE = os.path.dirname(mrelease.__file__)
_RAISE = dis.opmap["RAISE_VARARGS"]

_BY_PYTHON = re.compile(
    "is not iterable|cannot be interpreted as an integer"
    "|expected str, bytes or os.PathLike object, not"
    r"|expected .*__fspath__\(\) to return str or bytes, not"
)
"""What the interpreter says as clearly."""
_BY_C = re.compile(
    "(pidfd|flags) must be from -?[0-9]+ to [0-9]+$"
    "|pidfd must be an int or an object with a fileno"
    r"|argument must be an int, or have a fileno\(\) method"
    r"|file descriptor cannot be a negative integer \(-?[0-9]+\)"
    r"|fileno\(\) returned a non-integer|fileno\(\) must return an int"
    "|cannot be interpreted as an integer"
    "|Python int too large to convert to C int"
    r"|__index__ returned non-int \(type "
)


def is_own(error: BaseException) -> bool:
    """Whether the package raised it itself, with words of its own."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return (
        code.co_filename.startswith(_PACKAGE)
        and code.co_code[trace.tb_lasti] == _RAISE
    )


def check_error(error: Exception, *, by_c: bool) -> None:
    """It is documented, and says what is wrong."""
    if isinstance(error, Boom):
        return
    if by_c:
        assert isinstance(error, OSError) or _BY_C.search(str(error)), error
        return
    if isinstance(error, OSError) and error.filename is not None:
        return  # of the file system, which names the file
    assert isinstance(error, (TypeError, ValueError, OSError)), error
    told = str(error)
    assert is_own(error) or _BY_PYTHON.search(told), repr(error)
    assert len(told.split()) > 3, told
    assert "\0" not in told, repr(told)


class Asked(NamedTuple):
    """One call with drawn arguments."""

    function: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]

    def __repr__(self) -> str:
        try:
            return f"{self.function}(*{self.args!r}, **{self.kwargs!r})"[:500]
        except (Boom, ValueError):
            return f"{self.function}, arguments that cannot be printed"


FOUR = ("grace", "escalate_on", "timeout", "locks")
THREE = ("grace", "timeout", "locks")

Strategy = st.SearchStrategy[Any]


def asked(
    function: Callable[..., object],
    first: Strategy,
    kwargs: Strategy,
) -> Strategy:
    return st.builds(
        lambda one, rest: Asked(function, (one,), rest), first, kwargs
    )


def with_reaper(kwargs: Strategy, reapers: Strategy) -> Strategy:
    return st.builds(lambda a, b: a | {"reaper": b}, kwargs, reapers)


class Api:
    """The public functions, each with what may be drawn for it."""

    def __init__(self, here: Here) -> None:
        self.here = here
        self.victim = mrelease.Victim(here.bystanders[0])
        self.reaper = mrelease.Reaper(1, spares=1)
        self.closed = mrelease.Reaper(1, spares=0)
        self.closed.close()
        group = os.getpgrp()
        self.dangers = [0, 1, -1, here.own, -here.own, group, -group]
        self.pids = st.one_of(
            st.sampled_from(self.dangers),
            st.integers(-5, 60),
            st.integers(2**22 - 5, 2**22 + 5),
        ).filter(lambda pid: abs(pid) not in here.bystanders)
        self.nobody = processes(self.pids, self.dangers)
        self.somebody = st.sampled_from([self.victim, here.bystanders[1]])
        self.odd_reapers = st.one_of(
            st.just(self.closed), ANYTHING.filter(lambda x: x is not None)
        )

    def close(self) -> None:
        self.victim.close()
        self.reaper.close()

    def any_kill(
        self, function: Callable[..., object], names: Sequence[str]
    ) -> Strategy:
        """Nobody on any terms, or somebody on bad ones."""
        return st.one_of(
            asked(function, self.nobody, terms(names, bad=False)),
            asked(function, self.nobody, terms(names, bad=True)),
            asked(function, self.somebody, terms(names, bad=True)),
        )

    def reaped(self, function: Callable[..., object]) -> Strategy:
        """The same of what takes a reaper, too."""
        good = st.sampled_from([None, self.reaper])
        good_terms = terms(THREE, bad=False)
        bad_terms = terms(THREE, bad=True)
        return st.one_of(
            asked(function, self.nobody, with_reaper(good_terms, good)),
            asked(function, self.somebody, with_reaper(bad_terms, good)),
            asked(function, self.somebody,
                  with_reaper(good_terms, self.odd_reapers)),
        )  # fmt: skip

    def lists(self) -> Strategy:
        """Of which at least one must not be killed."""
        bad = self.pids.filter(
            lambda pid: pid in (0, 1, self.here.own) or pid < 0
        )
        return st.one_of(
            st.builds(
                lambda some, one, more: [*some, one, *more],
                st.lists(self.somebody, max_size=2),
                st.one_of(bad, st.none(), hostile.TEXTS, st.booleans()),
                st.lists(self.nobody, max_size=2),
            ),
            st.builds(hostile.endless),
            hostile.NUMBERS,
        )

    def kill(self) -> Strategy:
        return self.any_kill(mrelease.kill, FOUR)

    def reaper_kill(self) -> Strategy:
        return self.any_kill(self.reaper.kill, FOUR)

    def closed_reaper_kill(self) -> Strategy:
        return asked(self.closed.kill, self.somebody, terms(FOUR, bad=False))

    def victim_kill(self) -> Strategy:
        return st.builds(
            lambda rest: Asked(self.victim.kill, (), rest),
            terms(FOUR, bad=True),
        )

    def victim_release(self) -> Strategy:
        return st.builds(
            lambda rest: Asked(self.victim.release, (), rest),
            terms(("timeout", "locks"), bad=True),
        )

    def kill_many(self) -> Strategy:
        good = terms(THREE, bad=False)
        bad = terms(THREE, bad=True)
        both: Strategy = st.sampled_from(
            [self.reaper.kill_many, mrelease.kill_many]
        )
        return st.one_of(
            both.flatmap(lambda f: asked(f, self.lists(), good)),
            both.flatmap(lambda f: asked(f, st.lists(self.somebody), bad)),
            asked(mrelease.kill_many, st.lists(self.somebody, min_size=1),
                  with_reaper(good, self.odd_reapers)),
        )  # fmt: skip

    def kill_tree(self) -> Strategy:
        return self.reaped(mrelease.kill_tree)

    def kill_group(self) -> Strategy:
        return self.reaped(mrelease.kill_group).filter(
            lambda call: not isinstance(call.args[0], mrelease.Victim)
        )

    def kill_cgroup(self) -> Strategy:
        paths = st.one_of(
            hostile.TEXTS,
            st.sampled_from(
                ["/", "/proc", "/etc/passwd", "x" * 5000, "/\udcff", "\ud800",
                 b"/", "/proc/self/mem", "/proc/1/cwd", "."]
            ),
            says(hostile.PathLike, st.one_of(hostile.TEXTS, hostile.SAID)),
            ANYTHING,
        )  # fmt: skip
        names = ("timeout", "locks")
        return st.one_of(
            asked(mrelease.kill_cgroup, paths, terms(names, bad=False)),
            asked(mrelease.kill_cgroup, paths, terms(names, bad=True)),
            asked(mrelease.kill_cgroup, paths,
                  with_reaper(terms(names, bad=False), self.odd_reapers)),
        )  # fmt: skip

    def victim_made(self) -> Strategy:
        started = st.one_of(st.none(), ANYTHING)
        return st.builds(
            lambda one, two: Asked(_make_victim, (one,), {"started": two}),
            st.one_of(self.nobody, self.somebody),
            started,
        )

    def from_pidfd(self) -> Strategy:
        fds = st.one_of(
            ANYTHING,
            st.integers(-3, 20),
            says(hostile.HasFileno, hostile.SAID),
        )
        return asked(_from_pidfd, fds, st.just({}))

    def reaper_made(self) -> Strategy:
        counts = st.one_of(
            st.none(), st.integers(-2, 3), ANYTHING.filter(
                lambda x: not isinstance(x, int) or not 3 < x <= 1024)
        )  # fmt: skip
        cpus = st.one_of(
            st.none(), ANYTHING, st.lists(ANYTHING, max_size=2),
            st.lists(st.integers(-1, 1025), max_size=3),
            st.builds(hostile.endless),
        )  # fmt: skip
        policies = st.one_of(
            ANYTHING, st.sampled_from(["auto", "fifo", "nice", "none"])
        )
        return st.builds(
            lambda **rest: Asked(_make_reaper, (), rest),
            threads=counts, spares=counts, cpus=cpus, policy=policies,
        )  # fmt: skip

    def waits(self) -> Strategy:
        done = self.reaper.kill_many([2**22])[0]
        return asked(
            _wait, st.sampled_from([self.closed.close, done.result]),
            st.builds(
                lambda x: {"timeout": x},
                st.one_of(hostile.BAD_SECONDS, hostile.GOOD_SECONDS),
            ),
        )  # fmt: skip

    def process_mrelease(self) -> Strategy:
        return st.builds(
            lambda *args: Asked(mrelease.process_mrelease, args, {}),
            st.one_of(ANYTHING, says(hostile.HasFileno, hostile.SAID),
                      st.just(self.victim)),
            st.one_of(ANYTHING, says(hostile.Index, hostile.SAID)),
        )  # fmt: skip

    def support(self) -> Strategy:
        return st.builds(
            lambda x: Asked(mrelease.support, (), {"probe": x}),
            ANYTHING.filter(lambda x: not isinstance(x, bool)),
        )

    def harden(self) -> Strategy:
        names = ["memory", "oom", "scheduling", "warm_up"]
        odd = ANYTHING.filter(lambda x: not isinstance(x, bool))
        return st.builds(
            lambda x: Asked(mrelease.harden, (), x),
            st.dictionaries(st.sampled_from(names), odd, min_size=1),
        )


def _make_victim(process: object, started: object) -> None:
    with mrelease.Victim(process, started=started) as victim:  # type: ignore[arg-type]
        assert victim.pid not in (0, 1, os.getpid())
        assert repr(victim).startswith("<Victim pid=")


def _from_pidfd(pidfd: object) -> None:
    with mrelease.Victim.from_pidfd(pidfd) as victim:  # type: ignore[arg-type]
        assert victim.pid not in (0, 1, os.getpid())


def _make_reaper(**kwargs: object) -> None:
    with mrelease.Reaper(**kwargs) as reaper:  # type: ignore[arg-type]
        assert not reaper.closed


def _wait(wait: Callable[..., object], timeout: object) -> None:
    assert wait(timeout=timeout)


MAY_SUCCEED = {
    "victim_made", "from_pidfd", "reaper_made", "waits", "kill_many",
}  # fmt: skip
APIS = [
    name
    for name in vars(Api)
    if not name.startswith("_")
    and name not in ("close", "any_kill", "reaped", "lists")
]


def open_files() -> list[str]:
    """What they are, not which."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{number}")
            found.append(re.sub("[0-9]+", "N", target))
    return sorted(found)


def ask_all(name: str, here: Here, how: settings) -> None:
    api = Api(here)

    @how
    @given(getattr(api, name)())
    def ask(call: Asked) -> None:
        before = open_files()
        try:
            found = call.function(*call.args, **call.kwargs)
        except Exception as error:  # noqa: BLE001 - it is what is looked at
            check_error(error, by_c=name == "process_mrelease")
        else:
            assert name in MAY_SUCCEED, found
            for each in found if isinstance(found, list) else ():
                told = each.result() if isinstance(each, Reaping) else each
                assert told.outcome is Outcome.GONE, told
        assert open_files() == before

    try:
        ask()
    finally:
        api.close()


@pytest.mark.any_kernel
@pytest.mark.needs("root", "seccomp")
@pytest.mark.parametrize("name", APIS)
def test_arguments_of_any_kind_are_refused_and_nothing_is_signalled(
    name: str, budget: Callable[[int], settings]
) -> None:
    how = budget(300)
    in_sandbox(lambda here: ask_all(name, here, how))


def kernel_threads() -> list[int]:
    found = [victims.kernel_thread()]
    for name in filter(str.isdigit, os.listdir("/proc")):
        stat = _stat_of(int(name))
        if stat is not None and stat.parent == found[0]:
            found.append(int(name))
    return found[:20]


def ask_for_dangers(threads: Sequence[int], how: settings) -> None:
    own = os.getpid()
    dangers = st.sampled_from([0, 1, -1, own, -own, *threads])
    wrapped = st.one_of(
        dangers,
        dangers.map(hostile.Lying),
        dangers.map(hostile.Index),
        dangers.map(hostile.HasPid),
    )
    with Reaper(1) as reaper:
        functions: list[Callable[[Any], object]] = [
            mrelease.kill,
            mrelease.kill_tree,
            mrelease.kill_group,
            reaper.kill,
            lambda process: reaper.kill_many([2**22, process]),
            lambda process: mrelease.kill(process, grace=0.01),
            lambda process: mrelease.kill(process, locks="ignore"),
            lambda process: Victim(process).close(),
            lambda _: mrelease.kill_group(os.getpgrp()),
        ]

        @how
        @given(st.sampled_from(functions), wrapped)
        def ask(function: Callable[[object], object], process: object) -> None:
            with pytest.raises((TypeError, ValueError, OSError)) as caught:
                function(process)
            check_error(caught.value, by_c=False)

        ask()


@pytest.mark.needs("kernel_thread", "seccomp")
def test_what_must_never_be_killed_is_refused_before_any_signal(
    budget: Callable[[int], settings],
) -> None:
    """Of this very machine, but the filter lets no signal through."""
    rules: dict[str, kernel_errors.Rule] = dict.fromkeys(_SIGNUM, refuse)
    threads = kernel_threads()
    how = budget(300)
    with kernel_errors.answered(rules) as kernel:
        kernel.start(ask_for_dangers, threads, how).result(ENOUGH)
        sent = [call for call, answer in kernel.calls if answer == 1]
        assert not sent, sent


# ------------------------------------------------------------- the command

WORDS = [
    "kill", "support", "--tree", "--group", "--cgroup", "--grace", "--timeout",
    "--locks", "protect", "ignore", "--dry-run", "--json", "--probe", "--",
    "-h", "--version", "0", "1", "-1", "4194301", "99999999999", "9" * 5000,
    "1e999", "nan", "-inf", "0x10", "1_0", "٣", "/", "/proc/self", "--pid",
    "--grace=-1", "--timeout=x", "--locks=", "-5", "",
]  # fmt: skip


def ask_the_command(here: Here, how: settings) -> None:
    words = st.one_of(
        st.sampled_from([*WORDS, str(here.own), f"-{here.own}"]),
        hostile.TEXTS.filter(lambda text: text not in ("demo", "bench")),
    )
    lines = st.one_of(
        st.lists(words, max_size=6),
        st.lists(words, max_size=5).map(lambda rest: ["kill", *rest]),
    )

    @how
    @given(lines)
    def ask(argv: list[str]) -> None:
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        before = open_files()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: object = cli.main(argv)
            except SystemExit as stop:
                code = stop.code
        out.seek(0)
        err.seek(0)
        told = err.read()
        # Under a filter, `support` does not know.
        assert code in (0, 2, 3, 4) or argv[0] == "support", (code, told)
        assert out.read() or told
        if code == 2:
            last = told.rstrip("\n").rpartition("mrelease")[2]
            assert "error: " in last, told
            assert "digits" not in last, told
        assert open_files() == before

    ask()


@pytest.mark.any_kernel
@pytest.mark.needs("root", "seccomp")
def test_the_command_refuses_words_of_any_kind(
    budget: Callable[[int], settings],
) -> None:
    how = budget(300)
    in_sandbox(lambda here: ask_the_command(here, how))


# -------------------------------------------------------------- the values

SIZES = st.integers(-(2**63), 2**63)
TIMES = st.one_of(st.none(), st.floats())

FOOTPRINTS = st.builds(mrelease.Footprint, *[SIZES] * 5)
RELEASES = st.builds(
    mrelease.Release,
    pid=SIZES,
    outcome=st.sampled_from(Outcome),
    freed=st.booleans(),
    footprint=st.one_of(st.none(), FOOTPRINTS),
    terminated=TIMES,
    signalled=TIMES,
    released=TIMES,
    exited=TIMES,
    errno=st.one_of(st.none(), SIZES),
    attempts=SIZES,
    locks=st.sampled_from(["free", "held", "unknown", "ignored"]),
    raised=st.booleans(),
)


@pytest.mark.any_kernel
def test_values_of_any_size_print_on_one_line_and_compare(
    budget: Callable[[int], settings],
) -> None:
    @budget(300)
    @given(st.one_of(FOOTPRINTS, RELEASES))
    def check(value: mrelease.Footprint | mrelease.Release) -> None:
        line = str(value)
        assert line
        assert line.isprintable()
        again = pickle.loads(pickle.dumps(value))
        assert repr(again) == repr(value)
        assert list(again.as_dict()) == list(value.as_dict())
        assert value == value
        assert hash(value) == hash(value)
        if "nan" not in repr(value):
            assert again == value
            assert hash(again) == hash(value)
        with pytest.raises(AttributeError):
            value.pid = 5

    check()


@pytest.mark.any_kernel
def test_values_hold_anything_and_stay_as_they_are(
    budget: Callable[[int], settings],
) -> None:
    plain = ANYTHING.filter(lambda x: not isinstance(x, hostile.Unreadable))

    @budget(200)
    @given(st.lists(plain, min_size=5, max_size=5))
    def check(fields: list[Any]) -> None:
        value = mrelease.Footprint(*fields)
        held = [getattr(value, name) for name in value.__slots__]
        assert all(a is b for a, b in zip(held, fields, strict=True))
        assert value != mrelease.Release(1, Outcome.GONE)
        assert (value == mrelease.Footprint(*fields)) in (True, False)

    check()


# ---------------------------------------------------------------- the names


def read_under_names(how: settings) -> None:
    pid = os.getpid()
    started = _mrelease.read_stat(pid)
    comm = os.open("/proc/self/comm", os.O_WRONLY)

    @how
    @given(st.one_of(
        st.binary(min_size=1, max_size=15),
        st.text(") (RSZT0123456789\n\t:", min_size=1, max_size=15).map(
            str.encode),
    ))  # fmt: skip
    def check(name: bytes) -> None:
        os.write(comm, name)
        assert _mrelease.read_stat(pid) == started
        tgid, sizes = _mrelease.read_footprint(pid)
        assert tgid == pid
        assert sizes[0] > 0
        stat = _stat_of(pid)
        assert stat is not None
        assert (stat.parent, stat.group) == (os.getppid(), os.getpgrp())
        assert (stat.started, stat.state) == (started[0], b"R")
        fields = read_fields(f"/proc/{pid}/status")
        assert fields["Pid"] == fields["Tgid"] == str(pid)

    check()


def test_a_process_may_have_any_name(
    budget: Callable[[int], settings],
) -> None:
    how = budget(200)
    kernel_errors.in_child(read_under_names, how)


# -------------------------------------------------------------- the sequences
#
# Calls in any order against real victims. What each result says is judged as
# in soak.py, by what the kernel says of the victim.

PATIENCE = soak.PATIENCE
SEQUENCE_KINDS = [
    "asleep", "asleep_8_threads", "spinning", "stopped", "held", "mlocked",
    "robust_holder", "shared", "zombie", "zombie_leader",
]  # fmt: skip
ALL_TERMS = st.builds(
    soak.Terms,
    st.sampled_from([0.0, 0.0, 0.001, 0.03]),
    st.sampled_from([0.0, 0.001, 0.05, 0.2]),
    st.sampled_from(["protect", "protect", "ignore"]),
    st.sampled_from([None, None, 0.0]),
)


class Tracked:
    """A victim, and what was asked for it."""

    def __init__(self, subject: soak.Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        self.asked: list[soak.Terms] = []
        self.pending: list[Pending] = []
        self.over = False

    def ask(self, terms: soak.Terms, *, exact: bool = True) -> soak.Subject:
        """What to judge a kill by: one that is not alone proves less."""
        if self.asked or not exact:
            self.subject.others.append("another kill")
        self.asked.append(terms)
        judged = copy.copy(self.subject)
        judged.terms = terms
        return judged

    def end(self) -> None:
        """It must end by itself if it was asked for, and only then."""
        victim = self.subject.victim
        if not self.asked and self.subject.kind != "zombie":
            assert not victim.ended(), f"killed, but not asked: {self.subject}"
            return
        if self.over:
            return
        self.over = True
        victim.let_go()
        for each in self.pending:
            each.look(PATIENCE)
        assert victim.ended(PATIENCE), f"asked, but alive: {self.subject}"
        self.subject.code = victim.wait()
        self.subject.terms = soak.Terms(
            max((terms.grace for terms in self.asked), default=0.0)
        )
        lies = list(soak.lies_about_the_end(self.subject, None))
        assert not lies, lies
        if (
            self.subject.kind == "robust_holder"
            and self.asked
            and all(terms.locks == "protect" for terms in self.asked)
        ):
            with victims.Process(robust_wait=self.subject.lock) as waiter:
                assert victims.got(waiter) == "EOWNERDEAD"

    def close(self) -> None:
        self.subject.close()
        shutil.rmtree(self.folder)


class Pending:
    """A kill by a Reaper, under way or done."""

    def __init__(
        self, tracked: Tracked, judged: soak.Subject, reaping: Reaping
    ) -> None:
        self.tracked = tracked
        self.judged = judged
        self.reaping: Reaping | None = reaping
        self.begun = time.monotonic()
        self.told: Release | None = None
        tracked.pending.append(self)

    def look(self, timeout: float | None) -> None:
        """Its result, or TimeoutError; always the same."""
        if self.reaping is None:
            return
        was_done = self.reaping.done()
        try:
            found = self.reaping.result(timeout)
        except TimeoutError:
            assert not was_done
            assert timeout != PATIENCE
            return
        assert self.reaping.done()
        if self.told is None:
            self.told = found
            judge(self.judged, found, time.monotonic() - self.begun)
        assert found == self.told


def judge(s: soak.Subject, release: Release, took: float) -> None:
    """Nothing that it says is false; it is not said how soon it was asked."""
    known = [
        lie
        for lie in soak.lies(s, release, took)
        if not lie.startswith("told after")
        # Whoever finds it dead cannot know who had shared its memory.
        and not (s.others and s.kind == "shared" and "sharer" in lie)
    ]
    assert not known, f"{known}: {release!r} of {s}"


class Sequences(stateful.RuleBasedStateMachine):
    tracked = stateful.Bundle("tracked")
    handles = stateful.Bundle("handles")
    reapers = stateful.Bundle("reapers")
    pending = stateful.Bundle("pending")

    bystander: soak.Bystander

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.files = open_files()
        self.all: list[Tracked] = []
        self.pins: list[Victim] = []
        self.pools: list[tuple[Reaper, int]] = []
        self.undo = contextlib.ExitStack()

    # -- what there is

    @stateful.rule(
        target=tracked,
        kind=st.sampled_from(SEQUENCE_KINDS),
        mib=st.sampled_from([0, 1, 4]),
        sigterm=st.sampled_from(["ignore", "exit", "default"]),
    )
    def start(self, kind: str, mib: int, sigterm: str) -> object:
        if len(self.all) >= 6:
            return stateful.multiple()
        folder = Path(tempfile.mkdtemp(prefix="mrelease-fuzz-"))
        try:
            made = Tracked(soak.Subject(kind, mib, sigterm, folder), folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        self.all.append(made)
        return made

    @stateful.rule(
        target=handles, of=tracked, how=st.sampled_from(["pid", "popen", "fd"])
    )
    def pin(self, of: Tracked, how: str) -> object:
        process = of.subject.victim
        if of.over:
            # Its pid is anybody's now, its Popen and its pidfd are not.
            with pytest.raises(ProcessLookupError):
                Victim(process.popen)
            with pytest.raises(ProcessLookupError):
                Victim.from_pidfd(process.pidfd)
            return stateful.multiple()
        if how == "fd":
            victim = Victim.from_pidfd(process.pidfd)
        else:
            victim = Victim(of.subject.pid if how == "pid" else process.popen)
        assert victim.pid == of.subject.pid
        self.pins.append(victim)
        return victim, of

    @stateful.rule(
        target=reapers, threads=st.integers(1, 2), spares=st.integers(0, 2)
    )
    def open_reaper(self, threads: int, spares: int) -> object:
        if len(self.pools) >= 3:
            return stateful.multiple()
        reaper = Reaper(threads, spares=spares)
        self.pools.append((reaper, threads + spares + 1))
        return reaper

    # -- what is asked

    @stateful.rule(handle=handles)
    def look_at(self, handle: tuple[Victim, Tracked]) -> None:
        victim, of = handle
        repr(victim)
        if victim not in self.pins:
            for call in (victim.footprint, victim.kill, victim.release,
                         victim.fileno, lambda: Victim(victim)):  # fmt: skip
                with pytest.raises(ValueError, match="closed"):
                    call()
            return
        if of.over:
            assert victim.exited
            with pytest.raises(ProcessLookupError):
                victim.footprint()
            return
        had_ended = victim.exited
        found = victim.footprint()
        assert not had_ended or found.rss == 0
        if not of.asked and of.subject.kind != "zombie":
            size = of.subject.mib * victims.MIB
            assert found.anon >= size
            released = victim.release(timeout=0.01)
            assert released.outcome is Outcome.ALIVE
            assert not released.freed

    @stateful.rule(
        handle=handles, times=st.integers(1, 2), block=st.booleans()
    )
    def close_pin(
        self, handle: tuple[Victim, Tracked], times: int, block: bool
    ) -> None:
        victim, _ = handle
        if block:
            with pytest.raises(Boom), victim:
                raise Boom
        for _turn in range(times):
            victim.close()
        if victim in self.pins:
            self.pins.remove(victim)

    @stateful.rule(
        of=tracked, how=st.sampled_from(["kill", "many", "tree"]),
        terms=ALL_TERMS,
    )  # fmt: skip
    def kill(self, of: Tracked, how: str, terms: soak.Terms) -> None:
        if of.over:
            with pytest.raises(ProcessLookupError):
                mrelease.kill(of.subject.victim.popen)
            return
        judged = of.ask(terms, exact=how != "tree")
        rest: dict[str, Any] = terms._asdict()
        del rest["escalates"]
        judged.terms = terms._replace(escalates=None)
        begun = time.monotonic()
        if how == "kill":
            release = mrelease.kill(of.subject.pid, **rest)
        elif how == "many":
            [release] = mrelease.kill_many([of.subject.victim.popen], **rest)
        else:
            [release] = mrelease.kill_tree(of.subject.pid, **rest)
        judge(judged, release, time.monotonic() - begun)

    @stateful.rule(handle=handles, terms=ALL_TERMS)
    def kill_pinned(
        self, handle: tuple[Victim, Tracked], terms: soak.Terms
    ) -> None:
        victim, of = handle
        if victim not in self.pins:
            return
        if of.over:
            with pytest.raises(ProcessLookupError):
                victim.kill()
            return
        with self._escalation(terms) as escalate:
            judged = of.ask(terms)
            begun = time.monotonic()
            release = victim.kill(
                grace=terms.grace,
                timeout=terms.timeout,
                locks=terms.locks,
                escalate_on=escalate,
            )
        judge(judged, release, time.monotonic() - begun)

    @contextlib.contextmanager
    def _escalation(self, terms: soak.Terms) -> Iterator[int | None]:
        if terms.escalates is None:
            yield None
            return
        fd = os.eventfd(1)
        try:
            yield fd
        finally:
            os.close(fd)

    @stateful.rule(
        target=pending, reaper=reapers, handle=handles, terms=ALL_TERMS
    )
    def hand_over(
        self,
        reaper: Reaper,
        handle: tuple[Victim, Tracked],
        terms: soak.Terms,
    ) -> object:
        victim, of = handle
        if reaper.closed or victim not in self.pins:
            with pytest.raises(ValueError, match="closed"):
                reaper.kill(victim)
            return stateful.multiple()
        if of.over:
            with pytest.raises(ProcessLookupError):
                reaper.kill(victim)
            return stateful.multiple()
        with self._escalation(terms) as escalate:
            judged = of.ask(terms)
            reaping = reaper.kill(
                victim,
                grace=terms.grace,
                timeout=terms.timeout,
                locks=terms.locks,
                escalate_on=escalate,
            )
        return Pending(of, judged, reaping), reaper

    @stateful.rule(
        target=pending,
        reaper=reapers,
        some=st.lists(tracked, min_size=1, max_size=4, unique=True),
        terms=ALL_TERMS,
    )
    def hand_over_many(
        self, reaper: Reaper, some: list[Tracked], terms: soak.Terms
    ) -> object:
        terms = terms._replace(escalates=None)
        given = [of.subject.victim.popen for of in some]
        if reaper.closed:
            with pytest.raises(ValueError, match="closed"):
                reaper.kill_many(given)
            return stateful.multiple()
        judged = [None if of.over else of.ask(terms) for of in some]
        reapings = reaper.kill_many(
            given, grace=terms.grace, timeout=terms.timeout, locks=terms.locks
        )
        found = []
        for of, each, reaping in zip(some, judged, reapings, strict=True):
            if each is None:
                assert reaping.result().outcome is Outcome.GONE
            else:
                found.append((Pending(of, each, reaping), reaper))
        return stateful.multiple(*found)

    # -- how it is waited for

    @stateful.rule(
        kill=pending,
        how=st.sampled_from(
            ["result", "threads", "poll", "await", "fork", "drop"]
        ),
        seconds=st.sampled_from([0, 0.0005, 0.02, PATIENCE]),
    )
    def wait(
        self, kill: tuple[Pending, Reaper], how: str, seconds: float
    ) -> None:
        pending, reaper = kill
        reaping = pending.reaping
        if reaping is None or pending.tracked.over:
            return
        repr(reaping)
        if how == "result":
            pending.look(seconds)
        elif how == "threads":
            with ThreadPoolExecutor(3) as threads:
                found = list(threads.map(lambda f: f(), [reaping.result] * 3))
            assert found[0] == found[1] == found[2]
        elif how == "poll":
            poll = select.poll()
            poll.register(reaping.fileno(), select.POLLIN)
            assert poll.poll(seconds * 1000) == [] or reaping.done()
        elif how == "await":
            asyncio.run(self._await(reaping, seconds))
        elif how == "fork":
            with kernel_errors.Job(
                lambda: (
                    soak.in_child(reaper, [reaping], [])
                    if not reaper.closed
                    else []
                )
            ) as job:
                assert job.result() == []
        else:
            pending.reaping = None
            del reaping
            gc.collect()
            return
        if reaping.done():
            pending.look(0)

    async def _await(self, reaping: Reaping, seconds: float) -> None:
        async def one() -> Release:
            return await reaping

        tasks = [asyncio.create_task(one()) for _ in range(2)]
        await asyncio.wait(tasks, timeout=min(seconds, 0.02))
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for each in ended:
            if isinstance(each, Release):
                assert each == reaping.result(0)
            else:
                assert isinstance(each, asyncio.CancelledError)

    @stateful.rule(
        reaper=reapers, seconds=st.sampled_from([None, 0, 0.001, 0.1])
    )
    def close_reaper(self, reaper: Reaper, seconds: float | None) -> None:
        # Graces are cut short when the time is over.
        for of in self.all:
            for each in of.pending:
                each.judged.terms = each.judged.terms._replace(escalates=0.0)
        in_time = reaper.close(seconds)
        assert in_time or seconds is not None
        assert reaper.closed
        if in_time:
            self.pools = [
                (each, 0 if each is reaper else count)
                for each, count in self.pools
            ]

    @stateful.rule()
    def collect(self) -> None:
        gc.collect()

    @stateful.rule(of=tracked)
    def end(self, of: Tracked) -> None:
        of.end()

    # -- what is always so

    @stateful.invariant()
    def nobody_else_is_killed(self) -> None:
        assert self.bystander.harm() is None
        for of in self.all:
            if not of.asked and not of.over and of.subject.kind != "zombie":
                assert not of.subject.victim.ended(), of.subject

    @stateful.invariant()
    def no_more_threads_than_those_of_the_reapers(self) -> None:
        most = sum(count for _, count in self.pools)
        if len(native_threads()) > most:
            victims.wait_until(
                lambda: len(native_threads()) <= most, "no more threads", 10
            )

    def teardown(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                for of in self.all:
                    stack.callback(of.close)
                for victim in self.pins:
                    stack.callback(victim.close)
                for reaper, _ in self.pools:
                    stack.callback(reaper.close)
                for of in self.all:
                    of.end()
                for reaper, _ in self.pools:
                    assert reaper.close(PATIENCE)
        finally:
            # hypothesis has the arguments of the last step still.
            for of in self.all:
                for each in of.pending:
                    each.reaping = None
            self.all.clear()
            self.pins.clear()
            self.pools.clear()
        victims.wait_until(lambda: not native_threads(), "no threads", 10)
        gc.collect()
        found = open_files()
        assert found == self.files, (found, self.files)


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.needs("release")
def test_calls_in_any_order(budget: Callable[[int], settings]) -> None:
    bystander = soak.Bystander()
    try:
        Sequences.bystander = bystander
        how = settings(budget(60), stateful_step_count=20)
        stateful.run_state_machine_as_test(Sequences, settings=how)
        assert bystander.harm() is None
    finally:
        bystander.process.close()


# ---------------------------------------------------------------- the threads

NUMBER = st.integers(0, 4)
STEPS = st.one_of(
    st.tuples(st.just("kill"), NUMBER, ALL_TERMS),
    st.tuples(st.just("kill"), NUMBER, ALL_TERMS),
    st.tuples(st.just("kill pinned"), NUMBER, ALL_TERMS),
    st.tuples(st.just("kill many"), st.lists(NUMBER, min_size=1), ALL_TERMS),
    st.tuples(st.just("look"), NUMBER),
    st.tuples(st.just("wait")),
    st.tuples(st.just("close pin"), NUMBER),
    st.tuples(st.just("close"), st.sampled_from([0, 0.001, 0.05])),
    st.tuples(st.just("collect")),
)


class Crew:
    """Threads that share one Reaper and one Victim for each process."""

    def __init__(self, all_tracked: list[Tracked]) -> None:
        self.all = all_tracked
        self.pins = [Victim(of.subject.pid) for of in all_tracked]
        self.reaper = Reaper(2, spares=1)
        self.lock = threading.Lock()
        self.begin = threading.Event()
        self.reapings: list[tuple[Tracked, Reaping]] = []
        self.wrong: list[BaseException] = []

    def run(self, steps: Sequence[tuple[Any, ...]]) -> None:
        self.begin.wait()
        own: list[Reaping] = []
        try:
            for name, *args in steps:
                try:
                    self.take(own, name, *args)
                except ValueError as error:
                    if "closed" not in str(error):
                        raise
        except BaseException as error:  # noqa: BLE001 - for the test
            self.wrong.append(error)

    def take(self, own: list[Reaping], name: str, *args: Any) -> None:  # noqa: ANN401
        if name in ("kill", "kill pinned", "kill many"):
            which, terms = args
            rest = terms._asdict()
            del rest["escalates"]
            chosen = sorted(
                {n % len(self.all) for n in
                 (which if isinstance(which, list) else [which])}
            )  # fmt: skip
            given = [self.pins[n] for n in chosen]
            if name == "kill pinned":
                self.note(chosen, terms, [given[0].kill(**rest)])
                return
            reapings = (
                [self.reaper.kill(given[0], **rest)]
                if name == "kill"
                else self.reaper.kill_many(given, **rest)
            )
            own += reapings
            self.note(chosen, terms, reapings)
        elif name == "look":
            pin = self.pins[args[0] % len(self.pins)]
            repr(pin)
            pin.footprint()
            pin.release(timeout=0.001)
        elif name == "wait":
            for reaping in own:
                with contextlib.suppress(TimeoutError):
                    reaping.result(0.001)
        elif name == "close pin":
            self.pins[args[0] % len(self.pins)].close()
        elif name == "close":
            self.reaper.close(args[0])
            assert self.reaper.closed
        else:
            gc.collect()

    def note(
        self,
        chosen: Sequence[int],
        terms: soak.Terms,
        found: Sequence[Reaping | Release],
    ) -> None:
        """These were asked for, and nobody closed what does it before."""
        with self.lock:
            for number, each in zip(chosen, found, strict=True):
                of = self.all[number]
                of.asked.append(terms)
                assert each.pid == of.subject.pid
                if isinstance(each, Reaping):
                    self.reapings.append((of, each))

    def close(self) -> None:
        self.reaper.close()
        for pin in self.pins:
            pin.close()


def work_together(
    kinds: Sequence[str], plans: Sequence[Sequence[tuple[Any, ...]]]
) -> None:
    with contextlib.ExitStack() as stack:
        everybody: list[Tracked] = []
        for kind in kinds:
            folder = Path(tempfile.mkdtemp(prefix="mrelease-fuzz-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            of = Tracked(soak.Subject(kind, 1, "ignore", folder), folder)
            of.subject.others.append("all threads")
            stack.callback(of.close)
            everybody.append(of)
        crew = Crew(everybody)
        stack.callback(crew.close)
        threads = [
            threading.Thread(target=crew.run, args=(plan,), daemon=True)
            for plan in plans
        ]
        for thread in threads:
            thread.start()
        crew.begin.set()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not crew.wrong, crew.wrong
        assert crew.reaper.close(PATIENCE)
        with ThreadPoolExecutor(3) as readers:
            for of, reaping in crew.reapings:
                told = {
                    each.result()
                    for each in [
                        readers.submit(reaping.result) for _ in range(3)
                    ]
                }
                assert len(told) == 1
                judged = copy.copy(of.subject)
                judged.terms = soak.Terms(0.03, 0.0, _locks_of(told))
                judge(judged, told.pop(), PATIENCE)
        crew.reapings.clear()
        for of in everybody:
            of.end()


def _locks_of(told: set[Release]) -> Any:  # noqa: ANN401 - a Literal
    [release] = told
    return "ignore" if release.locks == "ignored" else "protect"


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.needs("release")
def test_several_threads_use_the_same_at_once(
    budget: Callable[[int], settings],
) -> None:
    bystander = soak.Bystander()

    @budget(40)
    @given(
        st.lists(st.sampled_from(SEQUENCE_KINDS), min_size=2, max_size=5),
        st.lists(st.lists(STEPS, max_size=8), min_size=2, max_size=5),
    )
    def check(kinds: list[str], plans: list[list[tuple[Any, ...]]]) -> None:
        gc.collect()
        before = open_files()
        work_together(kinds, plans)
        victims.wait_until(lambda: not native_threads(), "no threads", 10)
        gc.collect()
        assert open_files() == before
        assert bystander.harm() is None

    try:
        check()
    finally:
        bystander.process.close()
