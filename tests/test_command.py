"""The command `mrelease`: kill and support, as a user in a shell sees them."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from errno import EACCES, EAGAIN, ENOSYS
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import families
import victims
from cgroups import Meter
from families import Family
from kernel_errors import ALLOW, Call, Do, answered, in_child
from mrelease import Outcome, Release, cli, holds, support
from mrelease.meter import room
from test_limits import own_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from conftest import Unprivileged

    Answered = Callable[[dict[str, object]], answered]

# Loaded now: an ordinary user may not be able to read Python's files.
codecs.lookup("ascii")

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "mrelease"]


def mrelease(*args: str | int | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def in_process(argv: Sequence[str | int]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr: where no program can be started."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def assert_untouched(victim: victims.Process) -> None:
    """It lives, and no signal waits for it."""
    status = victim.status()
    assert int(status["SigPnd"], 16) == int(status["ShdPnd"], 16) == 0
    assert not victim.ended(0.05)


# ---------------------------------------------------------------- kill


@pytest.mark.needs("release")
def test_kill_prints_the_release_and_exits_with_0() -> None:
    with victims.asleep(16) as victim:
        done = mrelease("kill", victim.pid)
        assert victim.ended()
        assert victim.wait() == -signal.SIGKILL
    assert done.returncode == 0, done
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.startswith((
        f"pid {victim.pid} released: 16.",
        f"pid {victim.pid} exited: 16.",
    )), line  # fmt: skip
    assert "signalled " in line


@pytest.mark.any_kernel
def test_the_installed_script_does_the_same() -> None:
    script = Path(sysconfig.get_path("scripts"), "mrelease")
    if not script.exists():
        pytest.skip(f"not installed: {script}")
    with victims.asleep(16) as victim:
        done = subprocess.run(
            [script, "kill", str(victim.pid)], capture_output=True, text=True
        )
        assert victim.ended()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"pid {victim.pid} ")


@pytest.mark.any_kernel
def test_each_pid_gets_its_line_in_the_order_given() -> None:
    with victims.asleep(16) as a, victims.asleep(16) as b:
        done = mrelease("kill", b.pid, a.pid)
        assert a.ended()
        assert b.ended()
    assert done.returncode == 0
    told = [line.split()[:2] for line in done.stdout.splitlines()]
    assert told == [["pid", str(b.pid)], ["pid", str(a.pid)]]


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_json_is_a_document_a_line_with_all_of_the_release() -> None:
    gone = victims.reaped_pid()
    with victims.asleep(16) as victim:
        done = mrelease("kill", "--json", victim.pid, gone)
        assert victim.ended()
    assert done.returncode == 3
    assert done.stderr == ""
    first, second = map(json.loads, done.stdout.splitlines())
    keys = list(Release(1, Outcome.GONE).as_dict())
    assert list(first) == keys
    assert first["pid"] == victim.pid
    assert first["freed"] is True
    assert first["outcome"] in ("released", "exited")
    assert first["footprint"]["anon"] >= 16 << 20
    assert list(second) == [*keys, "error"]
    assert second["pid"] == gone
    assert (second["outcome"], second["errno"]) == ("gone", "ESRCH")
    assert second["error"].startswith(f"cannot kill pid {gone}: ")


@pytest.mark.any_kernel
def test_a_pid_that_is_gone_does_not_stop_the_others() -> None:
    gone = victims.reaped_pid()
    with victims.asleep(16) as victim:
        done = mrelease("kill", gone, victim.pid)
        assert victim.ended()
    assert done.returncode == 3
    assert done.stderr == (
        f"mrelease: cannot kill pid {gone}: there is no such process\n"
    )
    assert done.stdout.startswith(f"pid {victim.pid} ")


@pytest.mark.any_kernel
@pytest.mark.needs("shared")
@pytest.mark.needs("release")
def test_memory_that_is_not_back_exits_with_1() -> None:
    with victims.shared(16) as victim:
        done = mrelease("kill", "--timeout", "0.05", victim.pid)
        assert victim.ended(10)
    assert done.returncode == 1, done
    assert done.stdout.startswith(f"pid {victim.pid} shared: ")


@pytest.mark.any_kernel
@pytest.mark.needs("shared")
def test_the_worst_pid_decides_the_exit_code() -> None:
    gone = victims.reaped_pid()
    with victims.shared(16) as kept, victims.asleep(16) as freed:
        done = mrelease("kill", "--timeout", "0.05", kept.pid, gone, freed.pid)
        assert kept.ended(10)
        assert freed.ended(10)
    assert done.returncode == 3, done


def test_anothers_process_exits_with_4_and_does_not_stop_the_others(
    unprivileged: Unprivileged,
) -> None:
    gone = victims.reaped_pid()

    def run(pid: int) -> tuple[int, str, str, int]:
        with victims.asleep(16) as own:
            code, out, err = in_process(["kill", pid, own.pid, gone])
            assert own.ended(10)
            return code, out, err, own.pid

    with victims.asleep(16) as roots:
        code, out, err, own = unprivileged(run, roots.pid)
        assert_untouched(roots)
    assert code == 4
    assert out.startswith(f"pid {own} ")
    denied, not_there = err.splitlines()
    assert denied.startswith(f"mrelease: cannot kill pid {roots.pid}: it bel")
    assert denied.endswith("nothing was signalled")
    assert not_there.startswith(f"mrelease: cannot kill pid {gone}: ")


@pytest.mark.any_kernel
def test_denied_is_told_in_json(unprivileged: Unprivileged) -> None:
    with victims.asleep(16) as roots:
        code, out, err = unprivileged(
            in_process, ["kill", "--json", roots.pid]
        )
    assert (code, err) == (4, "")
    told = json.loads(out)
    assert (told["outcome"], told["errno"]) == ("denied", "EPERM")
    assert told["freed"] is False


BAD_PIDS = ["0", "-1", "1", "abc", "", "1.5", "1_0", " 7", "\u0663", "-",
            "0x10", str(2**31), str(2**70), "-0"]  # fmt: skip


@pytest.mark.any_kernel
@pytest.mark.parametrize("bad", BAD_PIDS)
def test_a_malformed_pid_is_wrong_usage_and_nothing_is_signalled(
    bad: str,
) -> None:
    with victims.asleep(1) as victim:
        done = mrelease("kill", victim.pid, bad)
        assert_untouched(victim)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("usage: mrelease kill ")
    assert "Traceback" not in done.stderr
    assert bad.strip("-") in done.stderr


@pytest.mark.any_kernel
def test_the_command_itself_is_refused() -> None:
    with victims.asleep(1) as victim:
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" "$$"', "sh", *COMMAND, "kill",
             str(victim.pid)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert_untouched(victim)
    assert done.returncode == 2, done
    assert "it is the caller itself; nothing was signalled" in done.stderr


@pytest.mark.needs("kernel_thread")
def test_a_kernel_thread_is_refused() -> None:
    with victims.asleep(1) as victim:
        done = mrelease("kill", victim.pid, victims.kernel_thread())
        assert_untouched(victim)
    assert done.returncode == 2, done
    assert "it is a kernel thread" in done.stderr


@pytest.mark.any_kernel
def test_a_thread_is_refused() -> None:
    with victims.asleep(1, threads=2) as victim:
        thread = victim.tids()[1]
        done = mrelease("kill", victim.pid, thread)
        assert_untouched(victim)
    assert done.returncode == 2, done
    assert f"it is a thread of pid {victim.pid}" in done.stderr


@pytest.mark.any_kernel
@pytest.mark.parametrize("option", ["--grace", "--timeout"])
@pytest.mark.parametrize("bad", ["-1", "nan", "soon", ""])
def test_a_malformed_time_is_wrong_usage(option: str, bad: str) -> None:
    with victims.asleep(1) as victim:
        done = mrelease("kill", victim.pid, option, bad)
        assert_untouched(victim)
    assert done.returncode == 2, done
    assert done.stderr.startswith("usage: mrelease kill ")
    assert "Traceback" not in done.stderr


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    "args",
    [
        [],
        ["kill"],
        ["kill", "--locks", "break", "9"],
        ["frob"],
        ["kill", "-x"],
    ],
)
def test_wrong_arguments_exit_with_2_and_say_how(args: list[str]) -> None:
    done = mrelease(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: mrelease")
    assert "Traceback" not in done.stderr


@pytest.mark.any_kernel
def test_a_pid_given_twice_is_killed_once() -> None:
    with victims.asleep(1) as victim:
        done = mrelease("kill", victim.pid, victim.pid)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.any_kernel
@pytest.mark.needs("seccomp")
def test_all_are_pinned_before_the_first_is_killed() -> None:
    def let(call: Call) -> Do:
        del call
        return ALLOW

    with (
        answered({"pidfd_open": let, "pidfd_send_signal": let}) as kernel,
        victims.asleep(1) as a,
        victims.asleep(1) as b,
    ):
        done = kernel.command([*COMMAND, "kill", str(a.pid), str(b.pid)])
        assert done.returncode == 0, done
        calls = [
            (call.name, call.args[0 if call.name == "pidfd_open" else 1])
            for call, _ in kernel.calls
        ]
    kills = [i for i, call in enumerate(calls)
             if call == ("pidfd_send_signal", signal.SIGKILL)]  # fmt: skip
    pins = [calls.index(("pidfd_open", pid)) for pid in (a.pid, b.pid)]
    assert len(kills) == 2
    assert max(pins) < min(kills)


@pytest.mark.any_kernel
def test_more_victims_than_the_soft_limit_of_files() -> None:
    def limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard))

    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(victims.Process()) for _ in range(30)]
        done = subprocess.run(
            [*COMMAND, "kill", *(str(v.pid) for v in many)],
            capture_output=True, text=True, preexec_fn=limit,
        )  # fmt: skip
        assert done.returncode == 0, done
        assert all(victim.ended() for victim in many)


@pytest.mark.any_kernel
def test_without_file_descriptors_exit_code_4_and_the_pinned_are_killed() -> (
    None
):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))

    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(victims.Process()) for _ in range(30)]
        done = subprocess.run(
            [*COMMAND, "kill", *(str(v.pid) for v in many)],
            capture_output=True, text=True, preexec_fn=limit,
        )  # fmt: skip
        killed = [v for v in many if v.ended()]
        assert done.returncode == 4, done
        assert 0 < len(killed) < 30
        assert len(done.stdout.splitlines()) == len(killed)
    assert done.stderr.count("no file descriptor is left") == 30 - len(killed)
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------- grace, locks


@pytest.mark.any_kernel
def test_grace_lets_it_end_by_sigterm() -> None:
    with victims.asleep(16, sigterm="exit") as victim:
        done = mrelease("kill", "--grace", "30", victim.pid)
        assert victim.wait() >= 0  # its handler called _exit()
    assert done.returncode == 0, done
    assert done.stdout.startswith(f"pid {victim.pid} exited: ")
    assert "terminated " in done.stdout
    assert "signalled " not in done.stdout


@pytest.mark.any_kernel
def test_after_the_grace_it_is_killed() -> None:
    with victims.asleep(16, sigterm="ignore") as victim:
        done = mrelease("kill", "--grace", "0.05", "--json", victim.pid)
        assert victim.wait() == -signal.SIGKILL
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert told["terminated"] < 0.05 <= told["signalled"]


@pytest.mark.needs("robust_holder")
def test_robust_locks_are_protected_unless_they_are_to_be_ignored() -> None:
    with victims.robust_holder(16) as victim:
        done = mrelease("kill", victim.pid)
        assert victim.ended()
    assert done.returncode == 0, done  # its end brought the memory back
    assert done.stdout.startswith(f"pid {victim.pid} locked: ")
    with victims.robust_holder(16) as victim:
        done = mrelease("kill", "--json", "--locks", "ignore", victim.pid)
        assert victim.ended()
    told = json.loads(done.stdout)
    assert told["locks"] == "ignored"
    assert told["outcome"] != "locked"


@pytest.mark.any_kernel
@pytest.mark.needs("held")
def test_timeout_bounds_the_wait() -> None:
    with victims.held(16) as victim:
        victim.popen.kill()
        victims.wait_held(victim)
        done = mrelease("kill", "--timeout", "0", "--json", victim.pid)
    assert done.returncode in (0, 1), done
    assert json.loads(done.stdout)["exited"] is None


# -------------------------------------------------------------- dry run


@pytest.mark.any_kernel
@pytest.mark.needs("seccomp")
@pytest.mark.needs("release")
def test_dry_run_sends_nothing() -> None:
    def let(call: Call) -> Do:
        del call
        return ALLOW

    calls = ("pidfd_send_signal", "kill", "tgkill", "tkill",
             "rt_tgsigqueueinfo", "process_mrelease", "sched_setattr",
             "sched_setscheduler", "sched_setaffinity",
             "setpriority")  # fmt: skip
    with (
        answered(dict.fromkeys(calls, let)) as kernel,
        victims.asleep(16) as victim,
    ):
        done = kernel.command(
            [*COMMAND, "kill", "--dry-run", "--grace", "1", str(victim.pid)]
        )
        assert_untouched(victim)
        assert done.returncode == 0, done
        assert done.stderr == ""
        made = [call for call, _ in kernel.calls]
    assert made
    for call in made:
        if call.name == "pidfd_send_signal":
            assert call.args[1] == 0, call
        elif call.name == "process_mrelease":
            assert call.args[0] & 0xFFFFFFFF == 0xFFFFFFFF, call
        elif call.name in ("sched_setattr", "sched_setaffinity"):
            assert call.args[0] & 0xFFFFFFFF == 0x7FFFFFFF, call  # nobody
        else:
            pytest.fail(f"a dry run made {call}")
    assert victim.pid not in {call.args[0] for call in made}


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_dry_run_says_what_would_happen() -> None:
    with victims.asleep(16) as victim:
        done = mrelease("kill", "--dry-run", victim.pid)
        assert_untouched(victim)
    assert done.returncode == 0, done
    assert done.stdout.startswith(
        f"pid {victim.pid} would get SIGKILL and be released: 16."
    )


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_dry_run_tells_the_grace() -> None:
    with victims.asleep(16) as victim:
        done = mrelease("kill", "--dry-run", "--grace", "2.5", victim.pid)
        assert_untouched(victim)
    assert "would get SIGTERM, after 2.5 s SIGKILL and be" in done.stdout


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_dry_run_in_json() -> None:
    gone = victims.reaped_pid()
    with victims.asleep(16) as victim:
        done = mrelease("kill", "--dry-run", "--json", victim.pid, gone)
        assert_untouched(victim)
    assert done.returncode == 3
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["dry_run"] is second["dry_run"] is True
    assert (first["pid"], first["would"]) == (victim.pid, "release")
    assert first["locks"] == "free"
    assert first["release"]["works"] is True
    assert first["footprint"]["releasable"] >= 16 << 20
    assert (second["pid"], second["outcome"]) == (gone, "gone")


@pytest.mark.needs("robust_holder")
@pytest.mark.needs("release")
def test_dry_run_looks_at_the_locks() -> None:
    with victims.robust_holder(16) as victim:
        done = mrelease("kill", "--dry-run", victim.pid)
        ignoring = mrelease(
            "kill", "--dry-run", "--locks", "ignore", victim.pid
        )
        assert_untouched(victim)
    assert done.returncode == 1, done
    assert "withheld for its robust locks" in done.stdout
    assert ignoring.returncode == 0
    assert "withheld" not in ignoring.stdout


@pytest.mark.parametrize("locks", ["protect", "ignore"])
def test_dry_run_checks_the_permission(
    unprivileged: Unprivileged, locks: str
) -> None:
    with victims.asleep(16) as roots:
        code, out, err = unprivileged(
            in_process, ["kill", "--dry-run", "--locks", locks, roots.pid]
        )
    assert (code, out) == (4, "")
    assert "belongs to another user" in err


@pytest.mark.needs("release")
def test_dry_run_says_if_the_locks_cannot_be_checked(
    answered: Answered,
) -> None:
    with victims.asleep(16) as victim:
        done = answered({"get_robust_list": EACCES}).command(
            [*COMMAND, "kill", "--dry-run", str(victim.pid)]
        )
        assert_untouched(victim)
    assert done.returncode == 0, done
    assert done.stdout.endswith("(locks cannot be checked)\n")


@pytest.mark.any_kernel
def test_dry_run_says_if_there_would_be_no_release(
    answered: Answered,
) -> None:
    with victims.asleep(16) as victim:
        done = answered({"process_mrelease": ENOSYS}).command(
            [*COMMAND, "kill", "--dry-run", str(victim.pid)]
        )
        assert_untouched(victim)
    assert done.returncode == 1, done
    assert "SIGKILL, no release of 16." in done.stdout
    assert "ENOSYS" in done.stdout


@pytest.mark.any_kernel
@pytest.mark.parametrize("bad", ["0", "1", "abc"])
def test_dry_run_refuses_what_kill_refuses(bad: str) -> None:
    assert mrelease("kill", "--dry-run", bad).returncode == 2


@pytest.mark.any_kernel
def test_dry_run_of_what_has_ended_would_send_nothing() -> None:
    with victims.zombie(1) as victim:
        done = mrelease("kill", "--dry-run", victim.pid)
    assert done.returncode == 0, done
    assert "has ended already" in done.stdout


# ------------------------------------------------ nobody reads, interrupts


# Without what would hide that text is left in a buffer at the end.
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}


def run_into(stdout: int, *args: str | int) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=BUFFERED,
    )
    return done.returncode, done.stderr


@pytest.mark.any_kernel
def test_a_broken_pipe_does_not_matter_for_the_kills() -> None:
    read, write = os.pipe()
    os.close(read)
    with victims.asleep(1) as a, victims.asleep(1) as b:
        code, err = run_into(write, "kill", a.pid, b.pid)
        os.close(write)
        assert a.ended()
        assert b.ended()
    assert (code, err) == (0, "")


@pytest.mark.any_kernel
def test_a_full_disk_does_not_matter_for_the_kills() -> None:
    with (
        open("/dev/full", "w") as full,
        victims.asleep(1) as a,
        victims.asleep(1) as b,
    ):
        code, err = run_into(full.fileno(), "kill", a.pid, b.pid)
        assert a.ended()
        assert b.ended()
    assert (code, err) == (0, "")


@pytest.mark.any_kernel
def test_closed_streams_do_not_matter_for_the_kills() -> None:
    gone = victims.reaped_pid()
    with victims.asleep(1) as a, victims.asleep(1) as b:
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *COMMAND,
             "kill", str(a.pid), str(gone), str(b.pid)],
        )  # fmt: skip
        assert a.ended()
        assert b.ended()
    assert done.returncode == 3


@pytest.mark.any_kernel
def test_a_broken_pipe_ends_support_without_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    code, err = run_into(write, "support")
    os.close(write)
    assert (code, err) == (128 + signal.SIGPIPE, "")


def start_in_grace(
    victim: victims.Process, *args: str | int
) -> subprocess.Popen[str]:
    """Start a kill of a stopped victim; return when it is in the grace."""
    started = subprocess.Popen(
        [*COMMAND, "kill", "--grace", "600", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    bit = 1 << (signal.SIGTERM - 1)
    victims.wait_until(
        lambda: bool(int(victim.status()["ShdPnd"], 16) & bit), "SIGTERM"
    )
    return started


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_interrupted_in_a_grace_all_are_killed_at_once(
    number: signal.Signals,
) -> None:
    with (
        victims.stopped(16) as first,
        victims.asleep(1) as ended,
        victims.stopped(1) as second,
        start_in_grace(second, first.pid, ended.pid, second.pid) as started,
    ):
        assert ended.ended(10)
        started.send_signal(number)
        out, err = started.communicate(timeout=30)
        assert started.returncode == 128 + number
        assert first.wait() == second.wait() == -signal.SIGKILL
    told = out.splitlines()
    assert told[0] == (
        f"pid {first.pid} killed: interrupted, its memory is back"
    )
    assert told[1].startswith(f"pid {ended.pid} exited: ")
    assert told[2] == (
        f"pid {second.pid} killed: interrupted, its memory is back"
    )
    assert err == ""


@pytest.mark.any_kernel
def test_interrupted_it_tells_in_json_too() -> None:
    gone = victims.reaped_pid()
    with (
        victims.stopped(16) as victim,
        start_in_grace(victim, "--json", victim.pid, gone) as started,
    ):
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=30)
    assert started.returncode == 130
    assert err == ""
    killed, not_there = map(json.loads, out.splitlines())
    assert killed["pid"] == victim.pid
    assert killed["error"].endswith("interrupted, its memory is back")
    assert (not_there["pid"], not_there["outcome"]) == (gone, "gone")


@pytest.mark.any_kernel
def test_a_signal_that_was_ignored_from_the_start_stays_ignored() -> None:
    with (
        victims.stopped(16) as victim,
        subprocess.Popen(
            ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *COMMAND,
             "kill", "--grace", "600", str(victim.pid)],
            stdout=subprocess.PIPE, text=True,
        ) as started,
    ):  # fmt: skip
        bit = 1 << (signal.SIGTERM - 1)
        victims.wait_until(
            lambda: bool(int(victim.status()["ShdPnd"], 16) & bit), "SIGTERM"
        )
        started.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(0.5)
        started.terminate()
        assert started.wait(30) == 128 + signal.SIGTERM


@pytest.mark.any_kernel
def test_two_commands_at_once_on_the_same_victims() -> None:
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(victims.asleep(16)) for _ in range(4)]
        pids = [str(victim.pid) for victim in many]
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [*COMMAND, "kill", *pids],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )
            for _ in range(2)
        ]  # fmt: skip
        told = [process.communicate(timeout=60) for process in started]
        assert all(victim.ended() for victim in many)
        # They are zombies of ours, so they are never gone.
        assert [process.returncode for process in started] == [0, 0], told
        assert all(err == "" for _, err in told)


# --------------------------------------------------- trees, groups, cgroups

TREE = """
for _ in range(3):
    child() or rest()
rest()
"""


def pids_of(text: str) -> list[int]:
    return [int(line.split()[1]) for line in text.splitlines()]


@pytest.mark.any_kernel
@pytest.mark.parametrize("option", ["--tree", "--group"])
def test_a_tree_or_group_is_killed_and_told_line_by_line(option: str) -> None:
    with (
        Family(TREE, new_session=True) as one,
        Family(TREE, new_session=True) as two,
    ):
        first, second = one.wait_for(4), two.wait_for(4)
        done = mrelease("kill", option, two.pid, one.pid)
        assert one.left() == two.left() == set()
    assert done.returncode == 0, done
    assert done.stderr == ""
    told = pids_of(done.stdout)
    assert set(told[:4]) == second
    assert set(told[4:]) == first
    if option == "--tree":
        assert (told[0], told[4]) == (two.pid, one.pid)


def test_a_cgroup_is_killed_and_told() -> None:
    with Meter() as group, Family(TREE, groups=[group]) as family:
        pids = family.wait_for(4)
        done = mrelease("kill", "--cgroup", group.path)
        assert family.left() == set()
    assert done.returncode == 0, done
    *lines, last = done.stdout.splitlines()
    assert {int(line.split()[1]) for line in lines} == pids
    assert last.startswith(f"cgroup {group.path} empty in ")
    assert "4 processes, " in last


@pytest.mark.any_kernel
def test_trees_in_json_are_a_document_a_victim() -> None:
    gone = victims.reaped_pid()
    with Family(TREE) as family:
        pids = family.wait_for(4)
        done = mrelease("kill", "--tree", "--json", family.pid, gone)
    assert done.returncode == 3, done
    *told, last = map(json.loads, done.stdout.splitlines())
    assert {each["pid"] for each in told} == pids
    assert list(told[0]) == list(Release(1, Outcome.GONE).as_dict())
    assert (last["tree"], last["outcome"]) == (gone, "gone")
    assert last["errno"] == "ESRCH"


@pytest.mark.any_kernel
def test_a_cgroup_in_json_is_one_document() -> None:
    with Meter() as group, Family(TREE, groups=[group]) as family:
        pids = family.wait_for(4)
        done = mrelease(
            "kill", "--json", "--cgroup", group.path, group.path / "no"
        )
        assert family.left() == set()
    assert done.returncode == 3, done
    told, not_there = map(json.loads, done.stdout.splitlines())
    assert told["freed"] is True
    assert {each["pid"] for each in told["releases"]} == pids
    assert told["before"] >= told["after"]
    assert not_there["errno"] == "ENOENT"


@pytest.mark.any_kernel
@pytest.mark.parametrize("option", ["--tree", "--group", "--cgroup"])
@pytest.mark.needs("release")
def test_dry_run_lists_what_would_be_killed(option: str) -> None:
    with (
        Meter() as group,
        Family(TREE, groups=[group], new_session=True) as family,
    ):
        pids = family.wait_for(4)
        target = group.path if option == "--cgroup" else family.pid
        done = mrelease("kill", "--dry-run", option, target)
        assert family.pids() == pids
        assert "T" not in families.states(pids)
    assert done.returncode == 0, done
    assert set(pids_of(done.stdout)) == pids
    assert done.stdout.count("would get SIGKILL and be released") == 4


WRONG = [
    ("--tree", "0"),
    ("--tree", "1"),
    ("--tree", "abc"),
    ("--group", "1"),
    ("--group", "-1"),
    ("--cgroup", "/tmp"),
    ("--cgroup", "/proc/self"),
]


@pytest.mark.any_kernel
@pytest.mark.parametrize(("option", "bad"), WRONG)
def test_what_must_not_be_killed_is_told_before_anything_is_signalled(
    option: str, bad: str
) -> None:
    with (
        Meter() as group,
        Family(TREE, groups=[group], new_session=True) as family,
    ):
        pids = family.wait_for(4)
        target = group.path if option == "--cgroup" else family.pid
        done = mrelease("kill", option, target, bad)
        assert family.pids() == pids
        assert "T" not in families.states(pids)
    assert done.returncode == 2, done
    assert done.stderr.startswith("usage: mrelease kill ")
    assert "nothing was signalled" in done.stderr


@pytest.mark.any_kernel
def test_the_tree_and_the_group_of_the_command_are_refused() -> None:
    for option in ("--tree", "--group"):
        done = subprocess.run(
            ["/bin/sh", "-c", '"$@" "$$"', "sh", *COMMAND, "kill", option],
            capture_output=True, text=True, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 2, done
        assert "the caller is in it" in done.stderr


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    "args",
    [
        ("--tree", "--group", "9"),
        ("--tree", "--cgroup", "9"),
        ("--cgroup", "--grace", "1", "/tmp"),
        ("--tree",),
    ],
)
def test_options_that_exclude_each_other(args: tuple[str, ...]) -> None:
    assert mrelease("kill", *args).returncode == 2


@pytest.mark.any_kernel
def test_no_such_group_exits_with_3_and_does_not_stop_the_others() -> None:
    with Family(TREE, new_session=True) as family:
        family.wait_for(4)
        done = mrelease("kill", "--group", 2**22 + 1, family.pid)
        assert family.left() == set()
    assert done.returncode == 3, done
    assert "it has no members" in done.stderr
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.any_kernel
def test_a_tree_of_another_user_exits_with_4(
    unprivileged: Unprivileged,
) -> None:
    with Family(TREE) as family:
        pids = family.wait_for(4)
        code, out, err = unprivileged(
            in_process, ["kill", "--tree", family.pid]
        )
        assert family.pids() == pids
    assert (code, out) == (4, "")
    assert "belongs to another user" in err


@pytest.mark.any_kernel
def test_interrupted_in_a_grace_a_tree_is_told_and_the_next_left_alone() -> (
    None
):
    script = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{TREE}"
    with Family(script) as family, victims.asleep(1) as other:
        family.wait_for(4)
        started = subprocess.Popen(
            [*COMMAND, "kill", "--tree", "--grace", "600", str(family.pid),
             str(other.pid)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(1.5)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=30)
        assert started.returncode == 130
        assert family.left() == set()
        assert_untouched(other)
    assert out == ""
    assert (
        f"tree {family.pid} interrupted: 4 of the 4 processes that were found "
        "have ended"
    ) in err
    assert f"tree {other.pid} was left alone" in err


# ------------------------------------------------------------- the progress


def on_terminal(
    args: Sequence[str | int],
    *,
    term: str = "xterm",
    interrupt: float | None = None,
    stdout: int | None = None,
) -> tuple[int, str]:
    """Exit code and what came to the terminal."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        env=os.environ | {"TERM": term, "COLUMNS": "80"},
    )
    os.close(theirs)
    text = b""
    if interrupt is not None:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(interrupt)
        process.send_signal(signal.SIGINT)
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(ours)
    return process.wait(), text.decode()


ERASE = "\r\x1b[K"
CLONE_THREAD = 0x10000  # linux/sched.h


@pytest.fixture
def many() -> Iterator[list[str]]:
    """More than a few that ignore SIGTERM."""
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + TREE.replace(
        "3", "11"
    )
    with Family(script) as family:
        pids = family.wait_for(12)
        yield [str(pid) for pid in sorted(pids)]


@pytest.mark.any_kernel
def test_progress_of_many_is_shown_on_a_terminal_and_erased(
    many: list[str],
) -> None:
    code, text = on_terminal(["kill", "--grace", "1", *many])
    assert code == 0, text
    assert f"{ERASE}[" in text
    assert "0/12 done, 0 B back" in text
    drawn, _, lines = text.rpartition(ERASE)
    assert "pid " not in drawn.rpartition("[")[2]
    assert len(lines.split("\r\n")) >= 1
    assert text.count("\r\npid ") + text.count(f"{ERASE}pid ") == 12


@pytest.mark.any_kernel
def test_the_progress_of_a_tree(many: list[str]) -> None:
    code, text = on_terminal(["kill", "--tree", "--grace", "1", many[0]])
    assert code == 0, text
    assert "/12 done, " in text
    assert f"{ERASE}pid " in text


@pytest.mark.any_kernel
def test_no_progress_where_it_is_not_for_eyes(many: list[str]) -> None:
    code, text = on_terminal(["kill", "--grace", "0.3", *many], term="dumb")
    assert code == 0
    assert "\x1b" not in text


@pytest.mark.any_kernel
def test_no_progress_beside_json_on_the_same_terminal(
    many: list[str],
) -> None:
    code, text = on_terminal(["kill", "--json", "--grace", "0.3", *many])
    assert code == 0
    assert "\x1b" not in text


@pytest.mark.any_kernel
def test_progress_beside_json_that_goes_elsewhere(many: list[str]) -> None:
    with open(os.devnull, "w") as nowhere:
        code, text = on_terminal(
            ["kill", "--json", "--grace", "0.5", *many],
            stdout=nowhere.fileno(),
        )
    assert code == 0
    assert "/12 done" in text
    assert text.endswith(ERASE)


@pytest.mark.any_kernel
def test_no_progress_of_a_few(many: list[str]) -> None:
    code, text = on_terminal(["kill", "--grace", "0.3", *many[:8]])
    assert code == 0
    assert "\x1b" not in text


@pytest.mark.any_kernel
def test_interrupted_the_progress_is_erased(many: list[str]) -> None:
    code, text = on_terminal(["kill", "--grace", "60", *many], interrupt=2.5)
    assert code == 130
    assert "/12 done" in text
    assert "/12 done" not in text.rpartition(ERASE)[2]
    assert text.count(" killed: interrupted, its memory is back") == 12


@pytest.mark.any_kernel
def test_where_no_thread_can_be_made_there_is_no_progress_but_the_kills(
    many: list[str], answered: Answered
) -> None:
    def no_thread(call: Call) -> int | Do:
        return EAGAIN if call.args[0] & CLONE_THREAD else ALLOW

    kernel = answered({"clone": no_thread, "clone3": ENOSYS})
    code, text = kernel.run(on_terminal, ["kill", *many])
    assert any(call.args[0] & CLONE_THREAD for call, _ in kernel.calls)
    assert code == 0, text
    assert "\x1b" not in text
    assert text.count("pid ") == 12


@pytest.mark.any_kernel
def test_interrupted_where_files_are_for_some_only(many: list[str]) -> None:
    """The others wait for theirs: for the whole grace."""
    started = subprocess.Popen(
        ["/bin/sh", "-c", 'ulimit -n 44; exec "$@"', "sh", *COMMAND, "kill",
         "--grace", "600", *many],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(2)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=30)
    assert started.returncode == 130
    killed = [line.split()[1] for line in out.splitlines()]
    alone = [line.split()[2] for line in err.splitlines()]
    assert out.count(" killed: interrupted, its memory is back") == len(killed)
    assert err.count(" was left alone: interrupted before") == len(alone)
    assert killed
    assert alone
    assert sorted(killed + alone) == sorted(many)


# ------------------------------------------------------------- the rest


def test_kill_works_where_the_system_call_is_missing(
    answered: Answered,
) -> None:
    with victims.asleep(16) as victim:
        done = answered({"process_mrelease": ENOSYS}).command(
            [*COMMAND, "kill", "--json", str(victim.pid)]
        )
        assert victim.ended()
    told = json.loads(done.stdout)
    assert (told["outcome"], told["errno"]) == ("unsupported", "ENOSYS")
    assert done.returncode == (0 if told["freed"] else 1)


@pytest.mark.needs("release")
def test_support_tells_what_works_and_exits_with_0() -> None:
    done = mrelease("support", "--probe")
    assert done.returncode == 0, done
    assert done.stdout.startswith(f"Linux {os.uname().release}, ")
    assert "release: yes: " in done.stdout


@pytest.mark.any_kernel
@pytest.mark.needs("release")
def test_support_in_json() -> None:
    done = mrelease("support", "--probe", "--json")
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert told["kernel"] == os.uname().release
    assert told["supported"] is True
    assert told["release"]["works"] is True


def test_support_says_why_not_and_exits_with_1(answered: Answered) -> None:
    kernel = answered({"process_mrelease": ENOSYS})
    done = kernel.command([*COMMAND, "support", "--probe"])
    assert done.returncode == 1, done
    assert "release: no: process_mrelease: ENOSYS" in done.stdout
    assert "It needs Linux 5.15 or later." in done.stdout


def test_support_does_not_guess_under_a_filter(answered: Answered) -> None:
    kernel = answered({"process_mrelease": ENOSYS})
    done = kernel.command([*COMMAND, "support"])
    assert done.returncode == 1, done
    assert "release: not known: " in done.stdout
    assert "mrelease support --probe" in done.stdout


EXIT_CODES = [
    "0  the memory of every victim is back",
    "1  killed, but the memory is not back, or not known to be",
    "2  wrong usage; nothing was signalled",
    "3  there is no such process (process group, control group)",
    "4  permission denied, or the system cannot kill it safely",
]


@pytest.mark.any_kernel
def test_the_exit_codes_stand_in_help_and_in_the_module() -> None:
    text = mrelease("kill", "--help").stdout
    assert cli.__doc__ is not None
    for line in EXIT_CODES:
        assert line in text
        assert line in cli.__doc__


@pytest.mark.any_kernel
@pytest.mark.parametrize("command", ["kill", "support", "demo", None])
def test_help_of_each_command(command: str | None) -> None:
    args = [command] if command else []
    done = mrelease(*args, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "usage: mrelease" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.any_kernel
def test_version() -> None:
    done = mrelease("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mrelease 0")


@pytest.mark.any_kernel
def test_all_output_is_ascii_where_the_locale_is_c() -> None:
    with victims.asleep(16) as victim:
        done = subprocess.run(
            [*COMMAND, "kill", str(victim.pid)],
            capture_output=True,
            env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
                 "PATH": os.environ.get("PATH", os.defpath)},
        )  # fmt: skip
    assert done.returncode == 0, done
    assert done.stdout.isascii()


@pytest.mark.any_kernel
def test_head_reads_one_line_and_all_are_killed() -> None:
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash for PIPESTATUS")
    with victims.asleep(1) as a, victims.asleep(1) as b:
        done = subprocess.run(
            [shell, "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash",
             *COMMAND, "kill", str(a.pid), str(b.pid)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert a.ended()
        assert b.ended()
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == 1


# ------------------------------------------------------ odd outputs


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads, and that is full: (read end, write end)."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.any_kernel
@pytest.mark.parametrize("kind", ["pid", "tree"])
def test_who_does_not_read_does_not_keep_it_from_its_end(kind: str) -> None:
    options = ["--tree"] if kind == "tree" else []
    with (
        full_pipe() as (_, write),
        victims.asleep(0) as one,
        victims.asleep(0) as two,
        subprocess.Popen(
            [*COMMAND, "kill", *options, str(one.pid), str(two.pid)],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        ) as command,
    ):
        assert one.ended(10)  # it is about to tell so
        victims.wait_until(
            lambda: victims.status_of(command.pid)["State"][0] == "S",
            "it waits",
        )
        time.sleep(0.5)
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=30)
        assert command.returncode == 128 + signal.SIGTERM
        if kind == "tree":
            assert f"tree {two.pid} was left alone" in errors
            assert not two.ended(0)
        else:
            assert two.ended()


@pytest.mark.any_kernel
def test_without_stderr_errors_do_not_go_to_stdout() -> None:
    gone = str(victims.reaped_pid())
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" 2>&-', "sh", *COMMAND, "kill", gone],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.any_kernel
def test_support_that_cannot_be_told_is_not_an_answer() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "support"], stdout=full, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    assert done.returncode == 74
    assert done.stderr.startswith("mrelease: what was found cannot be told: ")
    closed = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&-', "sh", *COMMAND, "support"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert closed.returncode in (0, 1)
    assert closed.stderr == ""


def test_a_tree_in_another_one_is_told_once() -> None:
    with Family(TREE) as family:
        pids = family.wait_for(4)
        inner = max(pids - {family.pid})
        done = mrelease("kill", "--tree", family.pid, inner)
        assert family.left() == set()
    assert (done.returncode, done.stderr) == (0, "")
    told = sorted(int(line.split()[1]) for line in done.stdout.splitlines())
    assert told == sorted(pids)


@pytest.mark.any_kernel
def test_a_refusal_says_once_that_nothing_was_signalled() -> None:
    done = mrelease("kill", "--cgroup", "/")
    assert done.returncode == 2
    assert done.stderr.count("nothing was signalled") == 1


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ["a\rb", "a\udcffb", "a\x85b", "a - b"])
def test_mounts_may_have_any_name(name: str, tmp_path: Path) -> None:
    """They are in what is read of control groups and of memory."""

    def show() -> tuple[bool, object]:
        own_mounts()
        folder = tmp_path / name
        folder.mkdir()
        for each in ("cgroup2", "cgroup"):
            subprocess.run(["umount", "-a", "-l", "-t", each], check=False)
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
        found = support()
        return found.cgroup.works is None, (holds.mounted("cpu"), room() > 0)

    _, found = in_child(show)
    assert found == (None, True)
