"""`mrelease demo`: real, starved, bounded, and nothing left of it."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from errno import ENOSYS, EPERM
from pathlib import Path
from time import monotonic_ns
from typing import TYPE_CHECKING

import pytest

import mrelease
import victims
from kernel_errors import KILL, Do, answered
from mrelease import demo, stage
from mrelease.meter import (
    AvailableMeter,
    CgroupMeter,
    Meter,
    Watch,
    open_meter,
    room,
)
from mrelease.stage import Stage
from shows import (
    Running,
    descendants,
    groups_of,
    python_for_all,
    skip_if_it_cannot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import cgroups
    from conftest import Unprivileged

    Answered = Callable[[dict[str, int | Do]], answered]

# Loaded now: an ordinary user may not be able to read Python's files.
codecs.lookup("ascii")

MIB = 1 << 20
PYTHON = [sys.executable, "-X", "dev", "-W", "error", "-c"]


def code(mib: int, give_up: float = 15.0) -> str:
    """The command, with a victim of another size."""
    return (
        "import sys; from mrelease import cli, demo;"
        f"demo.demo.__kwdefaults__.update(size={mib << 20}, "
        f"give_up={give_up});"
        "sys.exit(cli.main(['demo']))"
    )


def run(mib: int, give_up: float = 15.0, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*PYTHON, code(mib, give_up)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | env,
        timeout=120,
    )
    skip_if_it_cannot(done.stderr.decode())
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def policy(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.sched_getscheduler(pid)
    return None


def starved_demo(mib: int = 64) -> Running:
    """Run it until it has a starved victim."""
    return Running(
        [*PYTHON, code(mib)], lambda pid: policy(pid) == os.SCHED_IDLE
    )


@pytest.fixture
def running() -> Iterator[Running]:
    started = starved_demo()
    try:
        yield started
    finally:
        started.close()


# --------------------------------------------------------- what it shows


def test_it_shows_both_times_as_bars_of_one_scale() -> None:
    status, out, err = run(64)
    # Who may not raise the victim may lose the race, where it takes him long.
    lost = "too late to release" in out and "cannot be raised" in out
    assert status == 0 or lost, out
    assert err == ""
    assert "Two processes, each with 64.0 MiB of private memory" in out
    cpus = len(os.sched_getaffinity(0))
    assert f"{cpus} usable CPUs, {2 * cpus} busy processes" in out
    assert f"Linux {os.uname().release}, " in out
    first, second = out.index("SIGKILL alone ("), out.index("mrelease.kill()")
    assert first < second
    times = r"[█▏▎▍▌▋▊▉]+  ([\d.]+ m?s|not yet \(given up after 15 s\))"
    alone = re.search(rf"^SIGKILL alone +{times}$", out, re.MULTILINE)
    released = re.search(rf"^mrelease +{times}$", out, re.MULTILINE)
    assert alone, out
    assert released, out
    assert lost or "not yet" not in released[1]
    assert re.search(r"^With mrelease .*\.$", out, re.MULTILINE)
    assert re.search(
        r"^pid \d+ (released|exited|partial|exiting): ", out, re.MULTILINE
    )
    assert "the longest time between two looks was " in out


@pytest.mark.any_kernel
def test_without_a_terminal_there_are_no_control_codes() -> None:
    _, out, _ = run(16, TERM="xterm-256color", FORCE_COLOR="1")
    assert all(character.isprintable() or character == "\n"
               for character in out), repr(out)  # fmt: skip


@pytest.mark.any_kernel
def test_where_stdout_takes_ascii_only_the_bars_are_ascii() -> None:
    status, out, err = run(
        16, LC_ALL="C", PYTHONIOENCODING="", PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert out.isascii()
    assert re.search(r"^SIGKILL alone  [#|]+  ", out, re.MULTILINE), out


@pytest.mark.any_kernel
def test_in_a_tiny_terminal_the_bars_fit() -> None:
    status, out, err = run(16, COLUMNS="20")
    assert (status, err) == (0, "")
    bars = re.findall(r"^[█▏▎▍▌▋▊▉]+$", out, re.MULTILINE)
    assert len(bars) == 2, out
    assert all(0 < len(bar) < 20 for bar in bars)
    assert any(len(bar) >= 18 for bar in bars)


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_the_plain_kill_is_given_up_and_shown_as_not_yet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A kill that never comes is as good as one that takes too long.
    monkeypatch.setattr(demo, "kill_alone", lambda _: None)
    begun = time.monotonic()
    demo.demo(size=16 * MIB, give_up=0.5)
    assert time.monotonic() - begun < 14  # it would be 15 of its own
    out, err = capsys.readouterr()
    skip_if_it_cannot(err)
    assert "not yet (given up after 0.5 s)" in out
    assert "With mrelease" in out
    assert "more than " in out or "not back either" in out


# -------------------------------------------------------- it is starved


def test_the_victim_is_starved_by_twice_as_many_processes_as_cpus(
    running: Running,
) -> None:
    running.popen.send_signal(signal.SIGSTOP)  # and now look
    victim = running.victim()
    assert victim is not None
    try:
        victims.wait_until(
            lambda: os.getpriority(os.PRIO_PROCESS, victim) == 19, "nice 19", 1
        )
    except TimeoutError:
        pytest.fail("not nice 19")
    # One more only waits for the busy ones: their parent.
    busy = {pid for pid in descendants(running.popen.pid) - {victim}
            if not descendants(pid)}  # fmt: skip
    assert len(busy) == 2 * len(os.sched_getaffinity(0))
    assert {os.sched_getscheduler(pid) for pid in busy} == {os.SCHED_OTHER}
    own = os.getpriority(os.PRIO_PROCESS, running.popen.pid)
    assert {os.getpriority(os.PRIO_PROCESS, p) for p in busy} == {own}
    # They are busy: each uses CPU time.
    before = {pid: cpu_time(pid) for pid in busy}
    victims.wait_until(
        lambda: all(cpu_time(p) > t for p, t in before.items()), "all busy"
    )


def cpu_time(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def groups_and_cpus(pid: int) -> tuple[str, ...]:
    autogroup = Path(f"/proc/{pid}/autogroup")
    return (
        Path(f"/proc/{pid}/cgroup").read_text(),
        autogroup.read_text() if autogroup.exists() else "",
        str(os.sched_getaffinity(pid)),
    )


@pytest.mark.any_kernel
def test_victim_and_busy_processes_compete_in_the_same_groups() -> None:
    for _ in range(20):
        with contextlib.closing(starved_demo()) as running:
            running.popen.send_signal(signal.SIGSTOP)
            victim = running.victim()
            if victim is None:
                continue
            expected = groups_and_cpus(victim)
            found = [
                groups_and_cpus(pid)
                for pid in descendants(running.popen.pid) - {victim}
            ]
            # The demo may have killed it before it was stopped itself, and
            # what has let go of its memory leaves its groups next.
            if "VmRSS" not in victims.status_of(victim):
                continue
            assert found
            assert set(found) == {expected}
            return
    pytest.fail("the victim had ended each time")


@pytest.mark.any_kernel
def test_the_victim_holds_private_memory_that_is_touched() -> None:
    with Stage() as stage, stage.make("starved", 32 * MIB) as child:
        status = victims.status_of(child.pid)
        assert int(status["RssAnon"].split()[0]) * 1024 >= 32 * MIB


# ------------------------------------------------------ nothing is left


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_interrupted_it_cleans_up_and_says_so(
    running: Running, number: signal.Signals
) -> None:
    running.popen.send_signal(number)
    out, err = running.popen.communicate(timeout=60)
    assert running.popen.returncode == 128 + number
    assert running.all_ended(0)
    assert groups_of(running.popen.pid) == []
    assert err == "\ninterrupted; all that was started has ended\n"
    assert "Traceback" not in out


@pytest.mark.any_kernel
def test_a_second_ctrl_c_does_not_stop_the_cleaning_up(
    running: Running,
) -> None:
    running.popen.send_signal(signal.SIGINT)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(5):
            running.popen.send_signal(signal.SIGINT)
            time.sleep(0.01)
    _, err = running.popen.communicate(timeout=60)
    assert running.popen.returncode == 130
    assert running.all_ended(0)
    assert groups_of(running.popen.pid) == []
    assert "Traceback" not in err


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_ctrl_c_for_the_whole_group_leaves_nothing_and_no_traceback() -> None:
    popen = subprocess.Popen(
        [*PYTHON, code(32)], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        process_group=0,
    )  # fmt: skip
    with popen:
        victims.wait_until(
            lambda: len(descendants(popen.pid)) > 2, "its children"
        )
        pids = descendants(popen.pid)
        pidfds = [os.pidfd_open(pid) for pid in pids]
        os.killpg(popen.pid, signal.SIGINT)
        out, err = popen.communicate(timeout=60)
        for fd in pidfds:
            assert select.select([fd], [], [], 10)[0]
            os.close(fd)
    assert popen.returncode == 130
    assert "Traceback" not in out + err
    assert groups_of(popen.pid) == []


@pytest.mark.any_kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_at_any_moment_of_its_start_no_busy_process_is_left(
    number: signal.Signals,
) -> None:
    """Those left would be found by the check after each test."""
    for moment in range(20):
        popen = subprocess.Popen(
            [*PYTHON, code(16)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with popen:
            while not descendants(popen.pid) and popen.poll() is None:
                time.sleep(0.0005)
            time.sleep(moment / 1000)
            popen.send_signal(number)
            popen.communicate(timeout=60)


def test_killed_it_takes_busy_processes_and_victims_with_it(
    running: Running,
) -> None:
    running.popen.kill()
    running.popen.communicate()
    assert running.all_ended(30)
    # What a killed one cannot remove, the next one does.
    if groups_of(running.popen.pid):
        victims.wait_until(
            lambda: all(
                not (group / "cgroup.procs").read_text()
                for group in groups_of(running.popen.pid)
            ),
            "empty groups",
        )
        with victims.Process() as child:
            made = open_meter(child.pid)[0]
        made.close()
    assert groups_of(running.popen.pid) == []


@pytest.mark.any_kernel
def test_killed_it_takes_a_victim_with_it_that_was_not_killed_yet() -> None:
    program = (
        "from mrelease.stage import Stage\n"
        "with Stage() as stage, stage.make('starved', 16 << 20) as victim:\n"
        "    print(victim.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as popen:  # fmt: skip
        assert popen.stdout is not None
        pidfd = os.pidfd_open(int(popen.stdout.readline()))
        assert not select.select([pidfd], [], [], 0)[0]
        popen.kill()
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)
    victims.wait_until(
        lambda: all(
            not (group / "cgroup.procs").read_text()
            for group in groups_of(popen.pid)
        ),
        "empty groups",
    )
    for group in groups_of(popen.pid):
        group.rmdir()


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_after_an_error_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(pid: int) -> str:
        raise RuntimeError(f"no starving of {pid}")

    monkeypatch.setattr(stage, "starve", broken)
    before = descendants(os.getpid())
    with pytest.raises(RuntimeError, match="no starving"):
        demo.demo(size=16 * MIB)
    assert descendants(os.getpid()) == before
    assert groups_of(os.getpid()) == []
    assert threading.active_count() == 1


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_on_a_full_disk_it_says_that_it_cannot_be_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PYTHON, code(16)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 74, done
    assert done.stderr.startswith("mrelease: what was found cannot be told: ")


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_a_broken_pipe_ends_it_and_nothing_is_left() -> None:
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash for PIPESTATUS")
    done = subprocess.run(
        [shell, "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash",
         *PYTHON, code(16)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGPIPE, done
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_two_demos_at_once() -> None:
    both = [
        subprocess.Popen(
            [*PYTHON, code(32)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [popen.communicate(timeout=120) for popen in both]
    assert [popen.returncode for popen in both] == [0, 0], told
    assert all(err == "" for _, err in told)
    assert [groups_of(popen.pid) for popen in both] == [[], []]


# ------------------------------------------------- without rights or room


@pytest.mark.needs("release")
def test_an_ordinary_user_sees_it_too_and_what_is_different(
    unprivileged: Unprivileged,
) -> None:
    python = python_for_all()
    if python is None:
        pytest.skip("no Python that an ordinary user may run")

    def show() -> tuple[int, str, str]:
        sys.executable = python
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = demo.demo(size=256 * MIB, give_up=3.0)
        return code, out.getvalue(), err.getvalue()

    for _ in range(5):
        code, out, err = unprivileged(show)
        if "too much else is going on" not in err:
            break  # MemAvailable is the whole machine's
    assert err == ""
    assert "Run as user 65534: a dying victim cannot be raised" in out
    assert "SCHED_IDLE, nice 19" in out
    assert "in a thread of normal priority" in out
    assert re.search(r"^pid \d+ \w+: ", out, re.MULTILINE)
    assert code in (0, 1)
    if "MemAvailable" in out:  # else a group was delegated to this user
        assert "This is coarser: other processes count too." in out
        assert "No memory cgroup of its own" in out


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_where_no_cgroup_can_be_made_it_says_why(
    answered: Answered,
) -> None:
    rules: dict[str, int | Do] = {"mkdir": EPERM, "mkdirat": EPERM}
    import kernel_errors

    kernel_errors._X86_64.setdefault("mkdir", 83)
    kernel_errors._X86_64.setdefault("mkdirat", 258)
    kernel_errors._GENERIC.setdefault("mkdirat", 34)
    if "mkdir" not in kernel_errors._MACHINES[os.uname().machine][0]:
        del rules["mkdir"]
    kernel = answered(rules)
    for _ in range(5):
        done = kernel.command([*PYTHON, code(256, 3.0)])
        if "too much else is going on" not in done.stderr:
            break
    assert done.stderr == ""
    assert "Measured by: MemAvailable of the whole machine" in done.stdout
    assert "Operation not permitted" in done.stdout


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_where_scheduling_cannot_be_set_nice_is_used_and_told(
    answered: Answered,
) -> None:
    kernel = answered({"sched_setscheduler": EPERM, "sched_setattr": EPERM})
    done = kernel.command([*PYTHON, code(16, 3.0)])
    assert done.stderr == ""
    assert "starved by: nice 19." in done.stdout
    if os.geteuid() == 0:
        assert "in a thread of nice -20;" in done.stdout
    assert "a dying victim cannot be raised" in done.stdout


@pytest.mark.parametrize(
    ("rule", "why"),
    [(ENOSYS, "ENOSYS"), (EPERM, "EPERM"), (KILL, "kills whoever calls it")],
)
def test_where_the_call_is_missing_it_says_why_and_starts_nothing(
    answered: Answered, rule: int | Do, why: str
) -> None:
    kernel = answered({"process_mrelease": rule})
    done = kernel.command([*PYTHON, code(16)])
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith(
        "mrelease demo cannot be shown: process_mrelease: "
    )
    assert why in done.stderr
    assert "Allow process_mrelease" in done.stderr


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_a_victim_that_gets_no_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        stage, "_VICTIM",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 29, 1 << 29))\n"
        + stage._VICTIM,
    )  # fmt: skip
    assert demo.demo(size=1 << 30) == 1
    assert "a victim of 1.0 GiB cannot be made: " in capsys.readouterr().err


@pytest.mark.any_kernel
def test_the_size_is_a_quarter_of_the_room_and_1_gib_at_most() -> None:
    size = demo._fitting()
    assert 0 < size <= 1 << 30
    assert size % (16 * MIB) == 0
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    # Others come and go between the two looks.
    assert size <= available / 4 + 256 * MIB
    assert room() <= available + 1024 * MIB


FITTING = """
from mrelease import demo
try:
    print(demo._fitting())
except demo.Impossible as error:
    print(error)
"""


def fitting_in(group: cgroups.Meter, limit: int) -> str:
    group.write(
        "memory.max" if group.version == 2 else "memory.limit_in_bytes",
        str(limit),
    )
    done = subprocess.run(
        group.enter([sys.executable, "-c", FITTING]),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout.strip()


def test_the_size_fits_the_limit_of_its_own_memory_cgroup(
    meter: cgroups.Meter,
) -> None:
    size = int(fitting_in(meter, 512 * MIB))
    assert 96 * MIB <= size <= 128 * MIB


def test_with_too_little_room_it_says_so(meter: cgroups.Meter) -> None:
    told = fitting_in(meter, 60 * MIB)
    assert told == "there is too little free memory for a victim"


# ------------------------------------------------------------- the meter


def test_a_cgroup_meter_counts_the_victim_and_what_it_gives_back() -> None:
    with victims.Process() as child:
        try:
            made = CgroupMeter(child.pid)
        except OSError as error:
            pytest.skip(f"no memory cgroup: {error}")
    made.close()

    with Stage() as shown:
        meter = shown.meter
        if not meter.exact:
            pytest.skip(shown.why_not_better)
        before = meter.read()
        with shown.make("starved", 64 * MIB) as victim:
            held = meter.read() - before
            assert 64 * MIB <= held < 80 * MIB
            limit = before + int(64 * MIB * meter.slack)
            with Watch(meter, limit, give_up=30) as watch:
                assert watch.looks > 0
                begun = monotonic_ns()
                mrelease.kill(victim.pid)
                seconds = watch.wait(begun)
            assert seconds is not None
            assert 0 < seconds < 30
            assert meter.read() <= limit
        assert watch.gap > 0


@pytest.mark.any_kernel
def test_the_meter_of_the_machine_rises_when_memory_is_used() -> None:
    changes = []
    with AvailableMeter() as meter:
        for _ in range(7):  # others come and go
            before = meter.read()
            with victims.asleep(256):
                changes.append((meter.read() - before) // MIB)
    assert 192 < sorted(changes)[3] < 320, changes


class Fixed(Meter):
    """A meter that shows what it is told to."""

    def __init__(self, *values: int | OSError) -> None:
        super().__init__(-1)
        self.values = list(values)

    def read(self) -> int:
        value = self.values[0]
        if len(self.values) > 1:
            del self.values[0]
        if isinstance(value, OSError):
            raise value
        return value


@pytest.mark.any_kernel
def test_a_watch_tells_when_the_limit_is_reached() -> None:
    values = [100] * 50 + [11, 10]
    with Watch(Fixed(*values), 10, give_up=30) as watch:
        begun = monotonic_ns()
        seconds = watch.wait(begun)
    assert seconds is not None
    assert watch.looks == len(values)
    assert seconds < 30


@pytest.mark.any_kernel
def test_a_watch_gives_up() -> None:
    with Watch(Fixed(100), 10, give_up=0.05) as watch:
        begun = monotonic_ns()
        assert watch.wait(begun) is None
        assert monotonic_ns() - begun >= 45_000_000
    assert not watch._thread.is_alive()


@pytest.mark.any_kernel
def test_a_watch_raises_what_its_meter_raises() -> None:
    broken = OSError(5, "broken")
    with (
        Watch(Fixed(100, 100, broken), 10, give_up=30) as watch,
        pytest.raises(OSError, match="broken"),
    ):
        watch.wait(monotonic_ns())


@pytest.mark.any_kernel
def test_a_watch_raises_its_own_thread_alone() -> None:
    before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    with Watch(Fixed(100), 10, give_up=30) as watch:
        thread = watch._thread.native_id
        assert thread is not None
        given = os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        assert watch.scheduling == {
            (os.SCHED_FIFO, before[1]): "SCHED_FIFO 2",
            (os.SCHED_OTHER, -20): "nice -20",
        }.get((given, nice), "normal priority")
        now = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
        assert now == before


# ------------------------------------------------------ bars and sentences


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("share", "blocks", "drawn"),
    [
        (1.0, True, "████████"),
        (0.5, True, "████"),
        (0.0001, True, "▏"),
        (0.55, True, "████▍"),
        (1.0, False, "########"),
        (0.5, False, "####"),
        (0.0001, False, "|"),
    ],
)
def test_a_bar_shows_its_share(share: float, blocks: bool, drawn: str) -> None:
    assert demo.bar(share, 8, blocks=blocks) == drawn


@pytest.mark.any_kernel
def test_bars_have_one_scale() -> None:
    rows: list[tuple[str, float | None]] = [("a", 10.0), ("bb", 2.5)]
    assert demo.chart(rows, 15, 61, blocks=False) == [
        "a   ####################  10.0 s",
        "bb  #####  2.5 s",
    ]


@pytest.mark.any_kernel
def test_the_longest_bar_is_the_one_that_was_given_up() -> None:
    rows: list[tuple[str, float | None]] = [("a", None), ("b", 3.0)]
    assert demo.chart(rows, 15, 60, blocks=False) == [
        "a  ####################  not yet (given up after 15 s)",
        "b  ####  3.0 s",
    ]


@pytest.mark.any_kernel
@pytest.mark.parametrize("width", range(1, 200))
def test_no_line_of_the_chart_is_wider_than_the_terminal(width: int) -> None:
    rows: list[tuple[str, float | None]] = [
        ("SIGKILL alone", None),
        ("mrelease", 0.0123),
    ]
    lines = demo.chart(rows, 15, width)
    bars = [line for line in lines if line[0] in "█▏▎▍▌▋▊▉"]
    wide = lines if len(lines) == 2 else bars
    assert max(map(len, wide)) <= max(1, width)


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("alone", "released", "said"),
    [
        (11.0, 0.044, "back 250 times as fast."),
        (0.02, 0.0125, "back 1.6 times as fast."),
        (None, 0.05, "back more than 300 times as fast."),
        (12.345, 0.01, "back 1200 times as fast."),
        (None, None, "With mrelease the memory was not back either."),
        (1.0, None, "With mrelease the memory was not back either."),
        (0.02, 0.04, "With mrelease it took longer"),
    ],
)
def test_the_verdict(
    alone: float | None, released: float | None, said: str
) -> None:
    assert said in demo.verdict(alone, released, 15.0)
