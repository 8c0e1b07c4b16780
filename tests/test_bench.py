"""`mrelease bench`: real victims, honest words, and nothing left of it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from errno import ENOSYS, EPERM
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mrelease
import victims
from kernel_errors import KILL, Do, answered
from mrelease import bench, chart, holds, stage
from mrelease.meter import room
from shows import (
    Running,
    descendants,
    groups_of,
    python_for_all,
    skip_if_it_cannot,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Unprivileged

    Answered = Callable[[dict[str, int | Do]], answered]

MIB = 1 << 20
COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "mrelease"]
BENCH = [*COMMAND, "bench"]
FEW = ["--sizes", "16", "--n", "2", "--give-up", "1"]


def run(*args: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*BENCH, *args], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, env=os.environ | env, timeout=180,
    )  # fmt: skip
    skip_if_it_cannot(done.stderr)
    return done.returncode, done.stdout, done.stderr


def cells_of(path: Path) -> dict[tuple[str, str], Any]:
    report = json.loads(path.read_text())
    return {(c["kind"], c["method"]): c for c in report["cells"]}


CHARTS = importlib.util.find_spec("matplotlib") is not None
NEEDS_CHARTS = pytest.mark.skipif(
    not CHARTS, reason="matplotlib is not installed"
)

# ------------------------------------------------------------ what it tells


@pytest.mark.any_kernel
def test_it_measures_all_kinds_and_methods_and_ends_within_a_minute(
    tmp_path: Path,
) -> None:
    found = tmp_path / "found.json"
    picture = tmp_path / "found.svg"
    drawn = ("--chart", str(picture)) if CHARTS else ()
    begun = time.monotonic()
    status, out, err = run("--quick", "--json", str(found), *drawn)
    assert time.monotonic() - begun < 60
    assert (status, err) == (0, "")
    report = json.loads(found.read_text())
    left_out = set(report["left_out"]) & set(stage.KINDS)
    assert set(cells_of(found)) == {
        (kind, method)
        for kind in set(stage.KINDS) - left_out
        for method in bench.METHODS
    }
    for kind in left_out:
        assert f"Left out: {stage.KINDS[kind].text}: " in out
    conditions = report["conditions"]
    assert conditions["kernel"].startswith(os.uname().release)
    assert f"seed {conditions['seed']}" in out
    assert f"{conditions['cpus']} usable CPUs" in out
    for cell in report["cells"]:
        if f"{cell['kind']}, 64.0 MiB" in report["left_out"]:
            continue  # too much else was going on
        assert 1 <= cell["n"] == len(cell["seconds"]) <= 3
        assert sum(cell["outcomes"].values()) == cell["n"]
        if cell["median"] is not None:
            low, high = cell["quartiles"]
            assert 0 < low <= cell["median"]
            assert high is None or cell["median"] <= high
    assert "Until the memory is back, 64.0 MiB, in ms" in out
    assert "So many times as fast as SIGKILL alone" in out
    assert "Released too late" in out
    assert re.search(r"^Reaper is faster than SIGKILL alone for \d+ of \d+",
                     out, re.MULTILINE)  # fmt: skip
    if drawn:
        assert ET.parse(picture).getroot().tag.endswith("svg")


def test_every_kind_that_tests_can_have_it_has_too() -> None:
    """What this machine allows is not left out for a fault of the bench."""
    same = {
        "starved": "starved", "quota": "on_quota", "disk": "in_d_state",
        "frozen": "frozen_v2",
    }  # fmt: skip
    if holds.mounted("freezer") is not None:
        same["frozen"] = "frozen"
    with stage.Stage() as shown:
        for kind in stage.KINDS:
            try:
                with shown.make(kind, MIB) as victim:
                    assert victims.status_of(victim.pid)["State"][0] in "SRDT"
            except stage.Impossible:
                if kind == "swapped":
                    # It uses the machine's swap, and makes none.
                    assert victims._free_swap() == 0
                    continue
                assert victims.why_not(same[kind]) is not None, kind


def test_a_victim_stands_as_its_kind_says() -> None:
    with stage.Stage() as shown:
        with shown.make("threads", MIB) as victim:
            assert victims.status_of(victim.pid)["Threads"] == "64"
        with shown.make("shared", 16 * MIB) as victim:
            status = victims.status_of(victim.pid)
            assert int(status["RssShmem"].split()[0]) >= 16 * 1024
        with shown.make("spinning", MIB) as victim:
            before = cpu_time(victim.pid)
            victims.wait_until(
                lambda: cpu_time(victim.pid) > before + 5, "CPU time"
            )
        with shown.make("starved", MIB) as victim:
            assert os.sched_getscheduler(victim.pid) == os.SCHED_IDLE
        if victims.why_not("in_d_state") is None:
            with shown.make("disk", MIB) as victim:
                assert victims.status_of(victim.pid)["State"][0] == "D"
        if victims.why_not("frozen") is None:
            with shown.make("frozen", 16 * MIB) as victim:
                os.kill(victim.pid, signal.SIGKILL)
                time.sleep(0.1)
                assert Path(f"/proc/{victim.pid}/status").exists()
                assert "VmRSS" in victims.status_of(victim.pid)
        if victims.why_not("on_quota") is None:
            with shown.make("quota", MIB) as victim:
                groups = Path(f"/proc/{victim.pid}/cgroup").read_text()
                assert "mrelease-" in groups


def cpu_time(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_swapped_out_where_there_is_swap() -> None:
    try:
        victims.use_swap()
    except holds.Unavailable as why:
        pytest.skip(str(why))
    try:
        with (
            stage.Stage() as shown,
            shown.make("swapped", 64 * MIB) as victim,
        ):
            swapped = victims.status_of(victim.pid)["VmSwap"]
            assert int(swapped.split()[0]) >= 32 * 1024
        with stage.Stage() as shown:
            found = shown.measure("swapped", 64 * MIB, mrelease.kill, 10)
            assert found.held >= (64 * MIB if shown.meter.exact else 0)
            assert found.seconds is not None
    finally:
        victims.close_all()


@pytest.mark.any_kernel
def test_the_order_is_by_chance_in_rounds_and_the_seed_gives_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = stage.Stage.measure
    seen: list[tuple[str, str]] = []

    def measure(
        self: stage.Stage, name: str, size: int,
        kill: Callable[[int], object], give_up: float,
    ) -> stage.Measure:  # fmt: skip
        found = real(self, name, size, kill, give_up)
        seen.append((name, str(found.result)))
        return found

    def order(seed: int) -> list[str]:
        seen.clear()
        plan = bench.Plan(
            ["asleep", "spinning", "shared"], ["sigkill"], [MIB], count=4,
            seed=seed,
        )  # fmt: skip
        bench.Run(plan).run(lambda *_: None)
        return [name for name, _ in seen]

    monkeypatch.setattr(stage.Stage, "measure", measure)
    first, again, other = order(1), order(1), order(2)
    assert first == again != other
    for turn in range(4):
        assert set(first[3 * turn : 3 * turn + 3]) == {
            "asleep", "spinning", "shared",
        }  # fmt: skip


def test_where_sigkill_alone_never_ends_it_is_given_up_twice(
    tmp_path: Path,
) -> None:
    victims.need("in_d_state")
    found = tmp_path / "found.json"
    status, out, _ = run(
        "--kinds", "disk", "--methods", "sigkill,kill", "--sizes", "16",
        "--n", "4", "--give-up", "0.3", "--json", str(found),
    )  # fmt: skip
    assert status == 0
    cells = cells_of(found)
    assert cells["disk", "sigkill"]["seconds"] == [None, None]
    assert cells["disk", "sigkill"]["median"] is None
    assert cells["disk", "kill"]["n"] == 4
    assert re.search(r"waiting for a disk +never ", out)
    assert re.search(r"waiting for a disk +> \d+", out)
    assert "kill() is faster than SIGKILL alone for 1 of 1." in out


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_it_stops_when_its_time_is_over_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = bench.Plan(["asleep"], None, [MIB], count=1000, quick=True)
    assert plan.seconds < 60
    plan.seconds = 1.0
    begun = time.monotonic()
    assert bench.bench(plan) == 0
    assert time.monotonic() - begun < 30
    out = capsys.readouterr().out
    assert re.search(r"^Stopped after 1 s, with \d+ of 4000 kills: ", out,
                     re.MULTILINE)  # fmt: skip


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_an_interruption_shows_what_there_is(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    popen = subprocess.Popen(
        [*BENCH, "--kinds", "asleep,spinning", "--sizes", "16", "--n", "1000",
         "--json", str(found)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with popen:
        time.sleep(4)
        popen.send_signal(signal.SIGINT)
        out, err = popen.communicate(timeout=60)
    assert popen.returncode == 130
    assert err == "\ninterrupted; all that was started has ended\n"
    assert "Stopped early: the rest is left out." in out
    assert "Until the memory is back, 16.0 MiB" in out
    assert sum(cell["n"] for cell in cells_of(found).values()) > 0


# ------------------------------------------------------------ nothing is left


KINDS_THAT_HOLD = {
    "disk": lambda pid: "write=" in command(pid),
    "frozen": lambda pid: "mrelease-hold" in groups(pid),
    "starved": lambda pid: scheduler(pid) == os.SCHED_IDLE,
}


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def groups(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cgroup").read_text()
    return ""


def scheduler(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.sched_getscheduler(pid)
    return None


def leftovers(pid: int) -> list[str]:
    """Groups and mounts that a bench made and that are still there."""
    found = [str(path) for path in groups_of(pid)]
    for name in ("freezer", "cpu", "cgroup2"):
        root = holds.mounted(name)
        if root is not None:
            found += [str(p) for p in root.rglob(f"{holds.PREFIX}{pid}-*")]
    return found


def mounts() -> set[str]:
    text = Path("/proc/self/mountinfo").read_text()
    return set(re.findall(r"\S*/mrelease-disk-\S+", text))


@pytest.mark.any_kernel
@pytest.mark.parametrize("kind", KINDS_THAT_HOLD)
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL],
)
def test_ended_by_a_signal_it_leaves_nothing(
    kind: str, number: signal.Signals
) -> None:
    needs = {"disk": "in_d_state", "frozen": "frozen", "starved": "starved"}
    victims.need(needs[kind])
    before = mounts()
    running = Running(
        [*BENCH, "--kinds", kind, "--methods", "sigkill", "--sizes", "32",
         "--n", "2", "--give-up", "60"],
        KINDS_THAT_HOLD[kind],
    )  # fmt: skip
    with contextlib.closing(running):
        running.popen.send_signal(number)
        out, err = running.popen.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert running.all_ended(30)
            # A guard thaws and unmounts; what a memory cgroup leaves, the
            # next one removes.
            victims.wait_until(lambda: mounts() <= before, "unmounted")
            victims.wait_until(
                lambda: (
                    not any(
                        holds.PREFIX in path
                        for path in leftovers(running.popen.pid)
                    )
                ),
                "no group that holds",
            )
            with stage.Stage():
                pass
        else:
            assert running.popen.returncode == 128 + number
            assert "interrupted; all that was started has ended" in err
            assert running.all_ended(0)
        assert "Traceback" not in out + err
        assert leftovers(running.popen.pid) == []
        assert mounts() <= before


@pytest.mark.needs("in_d_state")
def test_a_disk_is_thawed_also_if_the_freeze_was_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a signal that came while the kernel froze it."""
    thaw = 0xC0045878
    with contextlib.closing(holds.Disk()) as disk:
        real = disk._ioctl

        def ioctl(request: int) -> None:
            real(request)
            raise KeyboardInterrupt

        monkeypatch.setattr(disk, "_ioctl", ioctl)
        with pytest.raises(KeyboardInterrupt):
            disk.freeze()
        monkeypatch.undo()
        disk.thaw()
        with pytest.raises(OSError, match="Invalid argument"):
            disk._ioctl(thaw)  # it is not frozen
        disk.thaw()  # nothing to do


@pytest.mark.any_kernel
def test_two_at_once_and_nothing_is_left_of_them() -> None:
    both = [
        subprocess.Popen(
            [*BENCH, *FEW, "--kinds", "asleep,starved,quota,shared"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [popen.communicate(timeout=120) for popen in both]
    for _, err in told:
        skip_if_it_cannot(err)
    assert [popen.returncode for popen in both] == [0, 0], told
    assert all(err == "" for _, err in told)
    assert [leftovers(popen.pid) for popen in both] == [[], []]


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_after_an_error_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: int) -> str:
        raise RuntimeError("no starving")

    monkeypatch.setattr(stage, "starve", broken)
    before = descendants(os.getpid())
    with pytest.raises(RuntimeError, match="no starving"):
        bench.bench(bench.Plan(["starved"], None, [MIB], count=1))
    assert descendants(os.getpid()) == before
    assert leftovers(os.getpid()) == []


@pytest.mark.any_kernel
def test_a_broken_pipe_ends_it() -> None:
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash for PIPESTATUS")
    done = subprocess.run(
        [shell, "-c", '"$@" | head -n 0; exit ${PIPESTATUS[0]}', "bash",
         *BENCH, *FEW, "--kinds", "asleep"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGPIPE, done
    assert done.stderr == ""


# ------------------------------------------------------------- wrong usage


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--kinds", "asleep,nothing"], "'nothing' is no kind: asleep, "),
        (["--methods", "kill,hope"], "'hope' is no method: sigkill, "),
        (["--sizes", "0"], "a victim of 0 B: at least 1 MiB"),
        (["--sizes", "64K"], "'64K' is no size: 64, 64M and 1G are"),
        (["--sizes", "-1"], "'-1' is no size"),
        (["--n", "0"], "0 kills of each: at least 1"),
        (["--give-up", "0"], "give up after 0 s: more than 0"),
        (["--give-up", "nan"], "give up after nan s: more than 0"),
        (["--chart", "x.pdf"], "a chart is a .svg or a .png file, not"),
        pytest.param(
            ["--chart", "/nowhere/x.svg"], "/nowhere/x.svg cannot be written",
            marks=NEEDS_CHARTS,
        ),
        (["--json", "/"], "/ cannot be written"),
        (["--json", ""], "'' is not the name of a file"),
        (["--json", "/nowhere/"], "'/nowhere/' is not the name of a file"),
    ],
)  # fmt: skip
def test_wrong_usage_is_told_and_nothing_is_started(
    args: list[str], why: str
) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert why in err
    assert "nothing was started" in err or "argument" in err


@pytest.mark.any_kernel
def test_more_than_half_of_the_free_memory_is_refused() -> None:
    most = room()
    status, _, err = run("--sizes", f"{most // MIB * 3 // 4}")
    assert status == 2
    assert "is more than half of the free memory, which is " in err


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_what_no_longer_fits_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = bench.Plan(["asleep"], ["kill"], [MIB, 16 * MIB], count=1)
    alone = bench.Plan(["asleep"], ["kill"], [16 * MIB], count=1)
    monkeypatch.setattr(bench, "room", lambda: 31 * MIB)
    assert bench.bench(plan) == 0
    why = "asleep, 16.0 MiB: it is more than half of what is free"
    assert f"Left out: {why}." in capsys.readouterr().out
    assert bench.bench(alone) == 1
    assert capsys.readouterr().err == f"mrelease bench cannot be run: {why}\n"


@pytest.mark.any_kernel
def test_without_a_size_it_takes_what_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free, sizes in ((4096, [64, 1024]), (1024, [64]), (64, [16])):
        monkeypatch.setattr(bench, "room", lambda free=free: free * MIB)
        assert bench.Plan().sizes == [size * MIB for size in sizes]
    monkeypatch.setattr(bench, "room", lambda: 31 * MIB)
    with pytest.raises(ValueError, match="too little free memory"):
        bench.Plan()


@pytest.mark.any_kernel
def test_a_chart_without_matplotlib_is_refused_and_says_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'mrelease\[bench\]'"):
        bench.bench(bench.Plan(), chart="x.svg")


# ------------------------------------------------- without rights, or the call


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
            plan = bench.Plan(
                ["asleep", "disk", "frozen"], ["sigkill", "kill"],
                [256 * MIB], count=1, give_up=3,
            )  # fmt: skip
            code = bench.bench(plan)
        return code, out.getvalue(), err.getvalue()

    code, out, err = unprivileged(show)
    assert (code, err) == (0, "")
    assert "Run as user 65534." in out
    assert re.search(r"Left out: waiting for a disk: .*root", out)
    if holds.mounted("freezer") is not None:
        assert "Left out: frozen: may not make a control group in " in out
    if "MemAvailable" in out:  # else a group was delegated to this user
        assert "This is coarser: other processes count too." in out
    assert re.search(r"asleep +[\d.]+ ", out) or "too much else" in out


@pytest.mark.parametrize(
    ("rule", "why"),
    [(ENOSYS, "ENOSYS"), (EPERM, "EPERM"), (KILL, "kills whoever calls it")],
)
def test_where_the_call_is_missing_it_says_why_and_starts_nothing(
    answered: Answered, rule: int | Do, why: str
) -> None:
    kernel = answered({"process_mrelease": rule})
    done = kernel.command([*BENCH, *FEW])
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("mrelease bench cannot be run: process_mrel")
    assert why in done.stderr


# ----------------------------------------------------------- with a terminal


def in_terminal(*args: str, **env: str) -> tuple[int, str]:
    """Run it with a terminal of 100 columns; what was shown there."""
    ours, theirs = os.openpty()
    popen = subprocess.Popen(
        [*BENCH, *args], stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"COLUMNS": "100", "TERM": "xterm"} | env,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with popen, contextlib.suppress(OSError):
        while select.select([ours], [], [], 120)[0]:
            piece = os.read(ours, 65536)
            if not piece:
                break
            shown += piece
    os.close(ours)
    skip_if_it_cannot(shown.decode())
    return popen.returncode, shown.decode()


@pytest.mark.any_kernel
def test_in_a_terminal_progress_has_the_time_left_and_tables_lines() -> None:
    status, shown = in_terminal(*FEW, "--kinds", "asleep")
    assert status == 0, shown
    assert re.search(r"\d+ of 8 ", shown), shown
    assert re.search(r"about \d+ s left", shown)
    assert "┃" in shown  # rich


@pytest.mark.any_kernel
def test_without_rich_a_terminal_has_progress_and_plain_tables(
    tmp_path: Path,
) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError('not here')\n")
    status, shown = in_terminal(
        *FEW, "--kinds", "asleep", PYTHONPATH=str(tmp_path)
    )
    assert status == 0, shown
    assert re.search(r"\d+ of 8, about \d+ s left", shown), shown
    assert "┃" not in shown
    assert "  victim  SIGKILL alone" in shown


@pytest.mark.any_kernel
def test_without_a_terminal_there_are_no_control_codes() -> None:
    _, out, err = run(*FEW, "--kinds", "asleep", TERM="xterm", FORCE_COLOR="1")
    assert err == ""
    assert all(c.isprintable() or c == "\n" for c in out), repr(out)


# ---------------------------------------------------------------- the words


def cell(
    method: str, *ms: float, kind: str = "asleep", outcome: str = "released"
) -> bench.Cell:
    made = bench.Cell(kind, method, MIB)
    made.seconds = [None if math.isinf(v) else v / 1e3 for v in ms]
    made.outcomes = [outcome] * len(ms)
    return made


def run_of(*cells: bench.Cell) -> bench.Run:
    made = bench.Run(bench.Plan(sizes=[MIB]))
    made.cells = {(c.kind, c.method, c.size): c for c in cells}
    return made


@pytest.mark.any_kernel
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_medians_and_quartiles_are_those_of_statistics(count: int) -> None:
    values = [float(n * n + 1) for n in range(count)]
    made = cell("kill", *reversed(values))
    assert made.median() * 1e3 == pytest.approx(statistics.median(values))
    if count > 1:
        low, _, high = statistics.quantiles(values, method="inclusive")
        assert made.quartiles() == pytest.approx((low / 1e3, high / 1e3))


@pytest.mark.any_kernel
def test_what_was_given_up_is_longer_than_all_else() -> None:
    made = cell("sigkill", 5, math.inf, math.inf)
    assert made.median() == math.inf
    assert made.as_dict()["median"] is None
    assert cell("sigkill", 5, 6, math.inf).median() == 0.006


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("alone", "ours", "said"),
    [
        ((9, 10, 11), (1, 2, 3), "faster than SIGKILL alone for 1 of 1."),
        ((9, 10, 11), (8, 9.5, 10), "0 of 1; no clear difference: asleep"),
        ((1, 2, 3), (9, 10, 11), "0 of 1; SLOWER: asleep, 1.0 MiB."),
        ((math.inf,) * 2, (9, 10), "faster than SIGKILL alone for 1 of 1."),
        # Few kills: one that is among the others is no clear difference.
        ((9, 10, 11), (1, 2, 9.5), "no clear difference"),
        ((9, 10, 11, 12, 13), (1, 2, 3, 4, 9.5), "for 1 of 1."),
    ],
)  # fmt: skip
def test_the_verdict_says_where_it_pays_and_where_it_harms(
    alone: tuple[float, ...], ours: tuple[float, ...], said: str
) -> None:
    (line,) = bench.verdict(run_of(cell("sigkill", *alone),
                                   cell("kill", *ours)))  # fmt: skip
    assert line.startswith("kill() is ")
    assert said in line


@pytest.mark.any_kernel
def test_the_share_that_came_too_late() -> None:
    made = cell("kill", 1, 2, 3, 4)
    made.outcomes = ["released", "exited", "exiting", "released"]
    assert made.late() == 0.5
    assert cell("sigkill", 1).late() is None


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_two_calls_that_come_too_late_are_told() -> None:
    with victims.zombie() as victim:
        assert bench._two_calls(victim.pid) == "exiting"
    with victims.held() as victim:
        assert bench._two_calls(victim.pid) == "released"


# --------------------------------------------------------------- the chart


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    made = run_of(
        cell("sigkill", 9, 10, 11), cell("kill", 1, 2, 3),
        cell("sigkill", math.inf, math.inf, kind="disk"),
        cell("kill", 4, 4.4, 5, kind="disk"),
    )  # fmt: skip
    made.conditions = {
        "kernel": "6.99 test", "cpus": 3, "huge_pages": "never", "user": 0,
        "mrelease": "9.9", "meter": "memory cgroup (version 9)", "back": 0.95,
        "give_up": 5.0, "seed": 42,
    }  # fmt: skip
    return made.as_dict()


@pytest.fixture
def drawn(report: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "drawn.svg"
    chart.draw(report, str(path), "svg")
    return path.read_text()


@pytest.mark.any_kernel
@NEEDS_CHARTS
def test_the_chart_has_labels_units_and_conditions(drawn: str) -> None:
    text = " ".join(ET.fromstring(drawn).itertext())
    for wanted in (
        "time until the memory is back, ms", "victims of 1.0 MiB", "asleep",
        "waiting for a disk", "SIGKILL alone", "kill()", "not after 5000 ms",
        "6.99 test", "3 CPUs", "n = 2 to 3", "seed 42", "lines: quartiles",
        "memory cgroup (version 9)",
    ):  # fmt: skip
        assert wanted in text, wanted


@pytest.mark.any_kernel
@NEEDS_CHARTS
def test_the_chart_is_readable_on_light_and_on_dark(drawn: str) -> None:
    for paper in chart.PAPERS:
        assert chart.contrast(chart.INK, paper) >= 4
    used = set(re.findall(r"#[0-9a-f]{6}\b", drawn)) - {"#ffffff"}
    assert used >= {chart.INK, chart.COLOURS["sigkill"], chart.COLOURS["kill"]}
    # White is used on bars only, black not at all, and there is no paper.
    for colour in used:
        for paper in chart.PAPERS:
            assert chart.contrast(colour, paper) >= 3, colour
    for colour in chart.COLOURS.values():
        for paper in (*chart.PAPERS, "#ffffff"):
            assert chart.contrast(colour, paper) >= 3, colour


@pytest.mark.any_kernel
def test_contrast_is_that_of_wcag() -> None:
    assert chart.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert chart.contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.any_kernel
@NEEDS_CHARTS
def test_a_png_is_one(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "drawn.png"
    chart.draw(report, str(path), "png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.any_kernel
def test_a_file_that_was_there_stays_if_the_new_one_fails(
    tmp_path: Path,
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("kept")

    def fail(_: str) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        bench._write(str(path), fail)
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.any_kernel
@pytest.mark.parametrize("kind", ["pipe", "link", "dangling", "stdout"])
def test_what_is_no_file_is_written_into_and_stays(
    kind: str, tmp_path: Path
) -> None:
    """Not even root's /dev/null is replaced by a file."""
    path = tmp_path / "out"
    target = tmp_path / "target"
    few = ["--kinds", "asleep", "--methods", "sigkill,kill", *FEW]
    if kind == "pipe":
        os.mkfifo(path)
        with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
            code, _, _ = run(*few, "--json", str(path))
            text, _ = cat.communicate(timeout=60)
        assert path.is_fifo()
    elif kind == "stdout":
        with target.open("w") as out:
            code = subprocess.run(
                [*BENCH, *few, "--json", "/dev/stdout"], stdout=out, text=True
            ).returncode
        table, brace, rest = target.read_text().partition("\n{\n")
        assert "Until the memory is back" in table
        text = (brace + rest).encode()
    else:
        if kind == "link":
            target.write_text("before")
        path.symlink_to("target")
        code, _, _ = run(*few, "--json", str(path))
        assert path.is_symlink()
        text = target.read_bytes()
    assert code == 0
    assert json.loads(text)["cells"]


@pytest.mark.any_kernel
def test_a_name_that_is_too_long_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    code, out, err = run("--json", str(tmp_path / ("x" * 300)))
    assert (code, out) == (2, "")
    assert "cannot be written: File name too long" in err
    assert "nothing was started" in err


@pytest.mark.needs("release")
def test_it_measures_without_stdout_and_stderr() -> None:
    few = ["--kinds", "asleep", "--methods", "kill", *FEW]
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&- 2>&-', "sh", *BENCH, *few],
        stdin=subprocess.DEVNULL, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0
