"""Interpreters: several in one process, modules made anew, flags.

A subinterpreter is made with a GIL of its own where Python can (3.12);
on 3.11 all share one. Each runs in a child of the test (a crash would
take the whole process along) and answers through a pipe.
"""

from __future__ import annotations

import ast
import importlib
import os
import select
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

import kernel_errors
import mrelease
import victims
from mrelease.closing import Closing

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

pytestmark = pytest.mark.any_kernel

OWN_GIL = sys.version_info >= (3, 12)
FREE_THREADED_3_13 = sys.version_info < (3, 14) and bool(
    sysconfig.get_config_var("Py_GIL_DISABLED")
)

# ------------------------------------------------------ a subinterpreter


class Interpreter(Closing):
    """A subinterpreter: run(code) gives what the code calls answer() with."""

    _prelude = """
import os
def answer(value):
    os.write({fd}, repr(value).encode() + b"\\n")
try:
{code}
except BaseException as error:
    import traceback
    answer("".join(traceback.format_exception(error)))
else:
    os.write({fd}, b"\\n")
"""

    def __init__(self) -> None:
        self._module: Any
        if sys.version_info >= (3, 13):
            # The same as concurrent.interpreters, which 3.13 has not yet.
            self._module = importlib.import_module("_interpreters")
            self._id = self._module.create("isolated")
            assert self._module.get_config(self._id).gil == "own"
        else:
            self._module = importlib.import_module("_xxsubinterpreters")
            self._id = self._module.create(isolated=True)

    def run(self, code: str) -> object:
        read_end, write_end = os.pipe()
        try:
            indented = "\n".join("    " + line for line in code.split("\n"))
            failed = self._module.run_string(
                self._id, self._prelude.format(fd=write_end, code=indented)
            )
            assert failed is None, failed
            assert select.select([read_end], [], [], 0)[0], "no answer"
            text = os.read(read_end, 65_536).decode().strip()
            value = ast.literal_eval(text) if text else None
            if isinstance(value, str) and value.startswith("Traceback"):
                raise RuntimeError(value)
            return value
        finally:
            os.close(read_end)
            os.close(write_end)

    def close(self) -> None:
        self._module.destroy(self._id)


def test_an_interpreter_answers_and_its_errors_are_seen() -> None:
    def run() -> object:
        with Interpreter() as other:
            assert other.run("answer(6 * 7)") == 42
            with pytest.raises(RuntimeError, match="ZeroDivisionError"):
                other.run("1 / 0")
            return other.run("import sys\nanswer('mrelease' in sys.modules)")

    # A fresh one: what this interpreter has imported is not there.
    assert kernel_errors.in_child(run) is False


@pytest.mark.skipif(not OWN_GIL, reason="3.11: all interpreters share a GIL")
def test_the_interpreters_used_here_have_their_own_gil() -> None:
    """Else the tests below would show nothing about the slot."""

    def run() -> int:
        switch = sys.getswitchinterval()
        with Interpreter() as other:
            # A setting of the GIL: a shared one has it in common.
            other.run("import sys\nsys.setswitchinterval(0.123)")
            assert sys.getswitchinterval() == switch
        return 1

    assert kernel_errors.in_child(run) == 1


# ------------------------------------------------------ import and kill

KILL = """
import mrelease
result = mrelease.kill({pid})
answer((result.outcome.value, result.freed, result.locks,
        result.footprint.anon, result.exited is not None))
"""


def check_answer(answer: object, victim: victims.Process) -> None:
    assert isinstance(answer, tuple)
    outcome, freed, locks, anon, exited = answer
    assert outcome in ("released", "exited")
    assert freed
    assert locks == "free"
    assert anon >= victim.facts["anon"]
    assert exited or outcome == "released"
    assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("release")
def test_import_and_kill_in_a_subinterpreter_after_the_main_one() -> None:
    assert "mrelease._mrelease" in sys.modules

    def run(pid: int) -> object:
        with Interpreter() as other:
            return other.run(KILL.format(pid=pid))

    with victims.asleep(16, threads=3) as victim:
        check_answer(kernel_errors.in_child(run, victim.pid), victim)


@pytest.mark.skipif(
    sys.version_info < (3, 14), reason="concurrent.interpreters is 3.14's"
)
def test_concurrent_interpreters_kill_and_end_with_their_reapers() -> None:
    """The way that Python documents, with results by call()."""

    def run(pids: list[int]) -> list[object]:
        interpreters = importlib.import_module("concurrent.interpreters")
        before = len(os.listdir("/proc/self/fd"))
        found: list[object] = []
        for pid in pids:
            other = interpreters.create()
            other.prepare_main(pid=pid)
            other.exec(
                "import mrelease\n"
                "reaper = mrelease.Reaper(2, spares=1)\n"
                "freed = reaper.kill(pid).result().freed\n"
                "assert freed is True\n"
            )
            with pytest.raises(
                interpreters.ExecutionFailed, match="not a pid"
            ):
                other.exec("reaper.kill(0)")
            other.close()
            found.append(select.select([os.pidfd_open(pid)], [], [], 30)[0])
        until = time.monotonic() + 30
        # The threads of their Reapers end by themselves.
        while (
            len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < until
        ):
            time.sleep(0.01)
        return [
            len(found),
            len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")) - before - len(pids),
        ]

    with ExitStack() as stack:
        made = [stack.enter_context(victims.asleep(2)) for _ in range(3)]
        found = kernel_errors.in_child(run, [v.pid for v in made])
        assert found == [3, 1, 0]
        for victim in made:
            assert victim.wait() == -signal.SIGKILL


def test_import_and_kill_in_a_subinterpreter_before_the_main_one() -> None:
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
for name in [name for name in sys.modules if name.startswith("mrelease")]:
    raise SystemExit(name)
import importlib, os
{
        "import _interpreters as module"
        if sys.version_info >= (3, 13)
        else "import _xxsubinterpreters as module"
    }
other = module.create()
failed = module.run_string(other, "import mrelease; "
    "print(mrelease.kill(int(%r)).freed, flush=True)" % sys.argv[1])
assert failed is None, failed
import mrelease
print(mrelease.kill(int(sys.argv[2])).freed, flush=True)
module.destroy(other)
print(mrelease.kill(int(sys.argv[3])).freed, flush=True)
"""
    with ExitStack() as stack:
        made = [stack.enter_context(victims.asleep(4)) for _ in range(3)]
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", script,
             *(str(victim.pid) for victim in made)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert (done.stdout, done.stderr, done.returncode) == (
            "True\n" * 3, "", 0
        )  # fmt: skip
        for victim in made:
            assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("release")
def test_all_of_the_package_works_in_a_subinterpreter() -> None:
    code = """
import errno, mrelease
errors = []
for call in (lambda: mrelease.process_mrelease(-1),
             lambda: mrelease.process_mrelease(-1, 1),
             lambda: mrelease.process_mrelease("1"),
             lambda: mrelease.kill(0),
             lambda: mrelease.kill({gone})):
    try:
        call()
    except Exception as error:
        code = getattr(error, "errno", None)
        errors.append((type(error).__name__, errno.errorcode.get(code)))
with mrelease.Victim({pid}) as victim:
    started = victim.started
    anon = victim.footprint().anon
    with mrelease.Victim.from_pidfd(victim) as same:
        alive = same.release().outcome.value
    dead = victim.kill().freed
answer((errors, started, anon, alive, dead, victim.pid,
        bool(mrelease.support()), bool(mrelease.support(probe=True))))
"""

    def run(pid: int, gone: int) -> object:
        with Interpreter() as other:
            return other.run(code.format(pid=pid, gone=gone))

    gone = victims.reaped_pid()
    with victims.asleep(16) as victim:
        found = kernel_errors.in_child(run, victim.pid, gone)
        assert isinstance(found, tuple)
        errors, started, anon, alive, dead, pid, *supported = found
        assert errors == [
            ("OSError", "EBADF"),
            ("OSError", "EINVAL"),
            ("TypeError", None),
            ("ValueError", None),
            ("ProcessLookupError", "ESRCH"),
        ]
        assert started == victim.started()  # a zombie still has it
        assert anon >= 16 * victims.MIB
        assert (alive, dead, pid) == ("alive", True, victim.pid)
        assert supported == [bool(mrelease.support())] * 2
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.needs("release")
def test_8_interpreters_kill_at_once(rounds: Callable[[int], int]) -> None:
    turns = rounds(10)

    def run(pids: list[list[int]]) -> list[object]:
        answers: list[list[object]] = [[] for _ in pids]
        barrier = threading.Barrier(len(pids))

        def work(i: int) -> None:
            barrier.wait()
            answers[i] += [
                others[i].run(KILL.format(pid=pid)) for pid in pids[i]
            ]

        with ExitStack() as made_here:
            # One after the other: Python 3.12.1 crashes where interpreters
            # are made, import enum and end at once, also without mrelease.
            others = [made_here.enter_context(Interpreter()) for _ in pids]
            for other in others:
                other.run("import mrelease")
            threads = [
                threading.Thread(target=work, args=(i,))
                for i in range(len(pids))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return [answer for some in answers for answer in some]

    with ExitStack() as stack:
        made = [
            [stack.enter_context(victims.asleep(2)) for _ in range(turns)]
            for _ in range(8)
        ]
        answers = kernel_errors.in_child(
            run, [[victim.pid for victim in some] for some in made]
        )
        everybody = [victim for some in made for victim in some]
        assert len(answers) == len(everybody)
        for answer, victim in zip(answers, everybody, strict=True):
            check_answer(answer, victim)


@pytest.mark.needs("release")
def test_interpreters_that_come_and_go_leave_the_module_working() -> None:
    def run(pids: list[int]) -> list[object]:
        found: list[object] = []
        for pid in pids:
            with Interpreter() as other:
                found.append(other.run(KILL.format(pid=pid)))
            # The states of the others have gone with them.
            with pytest.raises(OSError, match="Bad file descriptor"):
                mrelease.process_mrelease(-1)
        return found

    with ExitStack() as stack:
        made = [stack.enter_context(victims.asleep(2)) for _ in range(20)]
        answers = kernel_errors.in_child(run, [v.pid for v in made])
        for answer, victim in zip(answers, made, strict=True):
            check_answer(answer, victim)


def test_an_audit_hook_hears_the_kills_of_its_own_interpreter() -> None:
    listen = """
import sys
import mrelease
heard = []
def hear(event, args):
    if event == "mrelease.kill":
        heard.append(args)
sys.addaudithook(hear)
"""

    def run(one: int, two: int) -> tuple[object, object, object]:
        heard: list[object] = []

        def hear(event: str, args: tuple[object, ...]) -> None:
            if event == "mrelease.kill":
                heard.append(args)

        sys.addaudithook(hear)
        with Interpreter() as other:
            other.run(listen)
            mrelease.kill(one)
            before = other.run("answer(heard)")
            other.run(KILL.format(pid=two))
            return heard, before, other.run("answer(heard)")

    with victims.asleep(2) as one, victims.asleep(2) as two:
        mine, before, after = kernel_errors.in_child(run, one.pid, two.pid)
        assert mine == [(one.pid,)]
        assert before == []
        assert after == [(two.pid,)]


def test_a_hook_in_a_subinterpreter_prevents_its_kill_alone() -> None:
    refuse = """
import sys
import mrelease
def refuse(event, args):
    if event == "mrelease.kill":
        raise ValueError("not today")
sys.addaudithook(refuse)
try:
    mrelease.kill({pid})
except ValueError as error:
    answer(str(error))
"""

    def run(pid: int) -> tuple[object, bool, mrelease.Release]:
        with Interpreter() as other:
            refused = other.run(refuse.format(pid=pid))
            with mrelease.Victim(pid) as victim:
                return refused, victim.exited, victim.kill()

    with victims.asleep(2) as victim:
        refused, exited, result = kernel_errors.in_child(run, victim.pid)
        assert refused == "not today"
        assert not exited
        assert result.freed
        assert victim.wait() == -signal.SIGKILL


def test_each_interpreter_has_a_module_object_of_its_own() -> None:
    code = """
from mrelease import _mrelease
answer(getattr(_mrelease, "mark", None))
_mrelease.mark = {mark}
"""

    def run() -> list[object]:
        from mrelease import _mrelease

        _mrelease.mark = 1  # type: ignore[attr-defined]
        with Interpreter() as two, Interpreter() as three:
            found = [
                two.run(code.format(mark=2)),
                three.run(code.format(mark=3)),
                two.run(code.format(mark=2)),
                three.run(code.format(mark=3)),
            ]
        return [*found, _mrelease.mark]  # type: ignore[attr-defined]

    assert kernel_errors.in_child(run) == [None, None, 2, 3, 1]


# -------------------------------------------------- reload and re-import


def forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "mrelease"]:
        del sys.modules[name]


def test_after_reload_of_every_module_kills_work() -> None:
    def run(pid: int) -> bool:
        modules: list[ModuleType] = [
            module
            for name, module in sorted(sys.modules.items())
            if name.partition(".")[0] == "mrelease"
        ]
        assert len(modules) > 5
        for _ in range(3):
            for module in modules:
                importlib.reload(module)
        return mrelease.kill(pid).freed

    with victims.asleep(2) as victim:
        assert kernel_errors.in_child(run, victim.pid)
        assert victim.wait() == -signal.SIGKILL


def test_imported_again_both_the_old_and_the_new_module_work() -> None:
    def run(pids: list[int]) -> list[bool]:
        import gc

        old = mrelease
        made = old.Victim(pids[0])
        forget()
        new = importlib.import_module("mrelease")
        assert new is not old
        found = [made.kill().freed, new.kill(pids[1]).freed]
        made.close()
        # And again, with nobody left who has the one before.
        del new
        forget()
        gc.collect()
        new = importlib.import_module("mrelease")
        found += [new.kill(pids[2]).freed, old.kill(pids[3]).freed]
        # An object of the old classes is still one with a pid.
        with old.Victim(pids[4]) as foreign:
            found.append(new.kill(foreign).freed)
        return found

    with ExitStack() as stack:
        made = [stack.enter_context(victims.asleep(2)) for _ in range(5)]
        found = kernel_errors.in_child(run, [victim.pid for victim in made])
        assert found == [True] * 5
        for victim in made:
            assert victim.wait() == -signal.SIGKILL


def test_a_module_imported_100_times_leaves_nothing() -> None:
    if FREE_THREADED_3_13:
        # "Python support for free threading", Immortalization.
        pytest.skip("3.13t: modules are never freed, once there was a thread")

    def run() -> int:
        import gc

        def again() -> None:
            forget()
            importlib.import_module("mrelease._mrelease")

        for _ in range(20):
            again()
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(100):
            again()
        gc.collect()
        return sys.getallocatedblocks() - before

    # A module that is never freed is some hundred blocks.
    grown = kernel_errors.in_child(run)
    print(f"{grown} blocks")
    assert grown < 1000


# ----------------------------------------------------------------- flags

SCRIPT = """
import sys
sys.path.extend({path!r})
import mrelease
before = mrelease.Victim(int(sys.argv[1]))
print(before.footprint().anon > 0, before.kill().freed, before.exited)
before.close()
try:
    mrelease.kill(0)
except ValueError as error:
    print(error)
print(bool(mrelease.support(probe=True)) in (True, False))
"""


@pytest.mark.parametrize(
    "flags",
    [
        "-X dev -W error",
        "-X dev -W error -I",
        "-I -S",
        "-E -s",
        "-O",
        "-OO",
        "-bb -W error",
        "-B -X frozen_modules=off",
        "-X utf8=0",
        "-X utf8=1 -X importtime",
        "-X tracemalloc",
        "-X int_max_str_digits=640",
    ],
)
def test_with_flags_of_python(flags: str) -> None:
    """No warning, no other answer."""
    # -S and -I hide where the package is; no warning may be hidden.
    path = [os.path.dirname(os.path.dirname(mrelease.__file__))]
    with victims.asleep(2) as victim:
        done = subprocess.run(
            [sys.executable, *flags.split(), "-c", SCRIPT.format(path=path),
             str(victim.pid)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            env={**os.environ, "LC_ALL": "C"}, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if "importtime" not in flags:
            assert done.stderr == ""
        assert done.stdout.splitlines() == [
            "True True True",
            (
                "0 is not a pid: to the kernel, 0 and negative numbers stand "
                "for groups of processes"
            ),
            "True",
        ]
        assert victim.wait() == -signal.SIGKILL


def test_a_victim_that_is_not_closed_warns_in_development_mode() -> None:
    script = (
        "import sys, mrelease\nv = mrelease.Victim(int(sys.argv[1]))\ndel v\n"
    )
    with victims.asleep(2) as victim:
        # A debug build of Python shows all warnings.
        debug = hasattr(sys, "gettotalrefcount")
        for flags, warns in ((["-X", "dev"], True), ([], debug)):
            done = subprocess.run(
                [sys.executable, *flags, "-c", script, str(victim.pid)],
                stdin=subprocess.DEVNULL, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0
            assert ("ResourceWarning: unclosed <Victim" in done.stderr) == (
                warns
            )
        assert not victim.ended()


def test_a_victim_that_is_left_at_the_end_of_python_is_no_error() -> None:
    script = (
        "import sys, mrelease\n"
        "keep = mrelease.Victim(int(sys.argv[1]))\n"
        "circle = [keep]; circle.append(circle)\n"
    )
    with victims.asleep(2) as victim:
        done = subprocess.run(
            [sys.executable, "-c", script, str(victim.pid)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert not victim.ended()


@pytest.mark.parametrize("kind", ["Victim", "Reaper"])
def test_what_outlives_its_module_at_the_end_is_no_error(kind: str) -> None:
    """Free-threaded Python 3.13 frees some objects after all modules."""
    module = f"mrelease.{kind.lower()}"
    script = (
        f"import os, sys, mrelease, {module}\n"
        f"kept = mrelease.{kind}(int(sys.argv[1]))\n"
        # So Python leaves a module.
        f"names = vars(sys.modules[{module!r}])\n"
        "for name in list(names):\n"
        "    if name != '__builtins__':\n"
        "        names[name] = None\n"
        "del kept\n"
        # What runs at the exit runs before that.
        "os._exit(0)\n"
    )
    with victims.asleep(2) as victim:
        argument = victim.pid if kind == "Victim" else 1
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", script, str(argument)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert not victim.ended()


# --------------------------------------------------------- free-threaded


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="not a free-threaded build of Python",
)
def test_importing_does_not_enable_the_gil() -> None:
    script = (
        "import sys\n"
        "assert not sys._is_gil_enabled(), 'before'\n"
        "import mrelease\n"
        "mrelease.support()\n"
        "assert not sys._is_gil_enabled(), 'after'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHON_GIL"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
