"""What all tests share: fixtures, options, the check that all is cleaned up.

Helpers, one module a concept: victims (processes to kill), cgroups
(measure and hold them), kernel_errors (system calls that fail on order,
functions in a child), shows (demo and bench from outside). And kill_ways,
of which each test of a kill tries all.

A test that hangs fails, or ends the run (see pyproject.toml); also
then nothing is left behind: victims and guards see the end of Python, and
leftovers.py ends all others.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import psutil
import pytest

import cgroups
import kernel_errors
import kill_ways
import leftovers
import report
import victims

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

P = ParamSpec("P")
T = TypeVar("T")

# ---------------------------------------------------- options and markers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mrelease")
    group.addoption(
        "--quick",
        action="store_true",
        help="a twentieth of the rounds in tests that repeat",
    )
    group.addoption(
        "--one-of-each",
        metavar="WORD",
        help="of a test's sets of parameters only one, which depends on WORD",
    )
    group.addoption(
        "--fail-on-skip",
        action="store_true",
        help="a skipped test is a failure: for machines that can do all",
    )


def _hear_signals() -> None:
    """Who started the tests may have had some ignored: nohup, `&` of a shell.

    So would all that they start, and what is to be interrupted never ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_memory(folder: str) -> bool:
    path = Path(folder).resolve()
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if path.is_relative_to(mount.mountpoint)
    ]
    # The longest path; of those at one place the last one is on top.
    mounts.sort(key=lambda mount: len(mount.mountpoint))
    return bool(mounts) and mounts[-1].fstype == "tmpfs"


def _use_a_disk() -> None:
    """Of a tmpfs what is mapped is shared memory: a victim's program, too."""
    if "TMPDIR" not in os.environ and _is_memory(tempfile.gettempdir()):
        os.environ["TMPDIR"] = tempfile.tempdir = "/var/tmp"


def _give_hypothesis_a_folder(root: Path) -> None:
    """It warns of one that it may not write to, and warnings are errors."""
    if not os.access(root, os.W_OK):
        os.environ.setdefault(
            "HYPOTHESIS_STORAGE_DIRECTORY",
            os.path.join(tempfile.gettempdir(), f"hypothesis-{os.getuid()}"),
        )


def pytest_configure(config: pytest.Config) -> None:
    _hear_signals()
    _use_a_disk()
    _give_hypothesis_a_folder(config.rootpath)
    # It is not marked itself, and waits for the end of this process.
    arguments = [sys.executable, "-I", leftovers.__file__, _MARK]
    os.posix_spawn(
        sys.executable, [*arguments, str(os.getpid())], os.environ, setsid=True
    )
    name, _, value = _MARK.partition("=")
    os.environ[name] = value
    config.addinivalue_line(
        "markers",
        "needs(*kinds): victims without which the test is skipped; names "
        "of victims.kinds(), 'kernel_thread', 'release', 'root', 'seccomp'",
    )
    config.addinivalue_line(
        "markers",
        "any_kernel: what it shows does not depend on the kernel; `make vm` "
        "leaves it out",
    )


def _reason(need: str) -> str | None:
    if need == "root":
        return None if os.geteuid() == 0 else "needs root"
    if need == "release":
        if kernel_errors.has_the_call():
            return None
        return f"no process_mrelease(2) in Linux {os.uname().release}"
    if need == "seccomp":
        return kernel_errors.why_not()
    reason = victims.why_not(need)
    return None if reason is None else f"no victim {need!r}: {reason}"


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    word = config.getoption("--one-of-each")
    if word is None:
        return
    sets: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        sets[item.nodeid.partition("[")[0]].append(item)
    kept = {
        each[zlib.crc32(f"{word} {name}".encode()) % len(each)]
        for name, each in sets.items()
    }
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for need in marker.args:
            reason = _reason(need)
            if reason is not None:
                pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """What a test can not have here is a skip, with the reason."""
    try:
        return (yield)
    except cgroups.Unavailable as e:
        pytest.skip(str(e))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, object, object]:
    """The same for what a fixture can not have."""
    try:
        return (yield)
    except cgroups.Unavailable as e:
        pytest.skip(str(e))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and item.config.getoption("--fail-on-skip")
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped, with --fail-on-skip: {_why(report)}"
    return report


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> None:
    """Each skip with its reason, however pytest was called."""
    skipped = Counter(
        (report.nodeid, _why(report))
        for report in terminalreporter.stats.get("skipped", ())
    )
    if skipped:
        terminalreporter.section("skipped tests, and why")
        for (test, why), _ in sorted(skipped.items()):
            terminalreporter.write_line(f"{test}: {why}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With $MRELEASE_REPORT: what became of all tests, for the docs."""
    config = session.config
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not (
        config.getoption("--quick") or config.getoption("--one-of-each")
    )
    folder = os.environ.get("MRELEASE_REPORT")
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if folder is None or reporter is None or not whole:
        return
    tests: dict[str, Counter[str]] = defaultdict(Counter)
    for word in ("passed", "failed", "error", "skipped"):
        for each in reporter.stats.get(word, ()):
            tests[each.nodeid.partition("[")[0]][word] += 1
    counts = {name: dict(found) for name, found in sorted(tests.items())}
    report.write(
        "test", {"python": platform.python_version(), "tests": counts}
    )


# ------------------------------------------------- nothing is left behind


_MARK = f"MRELEASE_TEST_RUN={os.getpid()}"
"""In the environment of all that is started, and in that of its children."""


def _orphans() -> set[int]:
    """Processes of this run whose parents have ended.

    They are children of process 1 now, or of another ancestor of this one.
    """
    own = os.getpid()
    return {
        child
        for pid in leftovers.ancestors() - {own}
        for child in victims.children(pid) - {own}
        if leftovers.has_mark(child, _MARK)
    }


# Python keeps this one to its end; it is no test's.
_HELPERS = ("resource_tracker", "forkserver")


def _end_orphans(before: set[int]) -> list[str]:
    """Give those that did not end by themselves, and end them.

    One that is busy for ever would slow down all that comes after it.
    """
    with contextlib.suppress(TimeoutError):
        victims.wait_until(lambda: not _orphans() - before, "no orphan", 10)
    left = []
    for pid in _orphans() - before:
        with contextlib.suppress(ProcessLookupError):
            left.append(f"orphan {leftovers.describe(pid)}")
            os.kill(pid, signal.SIGKILL)
    return left


def _strangers(before: set[int]) -> set[int]:
    left = victims.children() - before - cgroups.guards()
    for pid in set(left):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            if any(name in command for name in _HELPERS):
                left.discard(pid)
    return left


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """At the end: no child, mount, control group or swap of ours."""
    before = victims.children()
    yield
    victims.close_all()
    left = [f"child {leftovers.describe(pid)}" for pid in _strangers(before)]
    left += [f"guard {pid}" for pid in cgroups.guards()]
    left += [f"cgroup {path}" for path in cgroups.left_behind()]
    left += victims.left_behind()
    assert not left, f"left behind by the tests: {left}"


@pytest.fixture(autouse=True)
def _no_child_left(_nothing_left_behind: None) -> Iterator[None]:
    """After each test: no child that it started, dead or alive; no orphan."""
    before, orphans = victims.children(), _orphans()
    yield
    left = [leftovers.describe(pid) for pid in _strangers(before)]
    if _orphans() - orphans:
        left += _end_orphans(orphans)
    assert not left, f"processes left behind by this test: {left}"


# --------------------------------------------------------------- fixtures


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """stack.enter_context(victims.held(64)): closed after the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def meter() -> Iterator[cgroups.Meter]:
    """A memory control group: victims.asleep(64, groups=[meter])."""
    with cgroups.Meter() as group:
        yield group


@pytest.fixture
def answered() -> Iterator[
    Callable[[dict[str, kernel_errors.Rule]], kernel_errors.answered]
]:
    """answered({"process_mrelease": EAGAIN}).run(f): see kernel_errors."""
    reason = kernel_errors.why_not()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield lambda rules: stack.enter_context(kernel_errors.answered(rules))


def _as_user(function: Callable[[], T]) -> T:
    kernel_errors.drop_privileges()
    return function()


class Unprivileged(Protocol):
    def __call__(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...


@pytest.fixture
def unprivileged() -> Unprivileged:
    """unprivileged(f, ...): f in a child, as user nobody, no capability."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    victims.binary()

    def run(
        function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return kernel_errors.in_child(
            _as_user, lambda: function(*args, **kwargs)
        )

    return run


@pytest.fixture(params=kill_ways.WAYS)
def kill(request: pytest.FixtureRequest) -> kill_ways.Kill:
    """kill(pid, ...): the test runs with each way to kill a process."""
    return kill_ways.WAYS[request.param]


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """rounds(1000): so many, or a twentieth of it with --quick.

    A fifth with a Reaper, where the test runs with kill() too.
    """
    share = 20 if request.config.getoption("--quick") else 1
    if (
        "kill" in request.fixturenames
        and request.getfixturevalue("kill") is kill_ways.by_reaper
    ):
        share *= 5
    return lambda count: count if share == 1 else max(3, count // share)
