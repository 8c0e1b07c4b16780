"""Whatever a run of the tests leaves running is ended after it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import leftovers
import victims

if TYPE_CHECKING:
    import contextlib

pytestmark = pytest.mark.any_kernel

_MARK = f"MARK=of-{os.getpid()}"
_MARKED = {**os.environ, "MARK": f"of-{os.getpid()}"}
_HANGS = """
import os, subprocess, sys
subprocess.Popen(["sleep", "600"], start_new_session=True)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(stack: contextlib.ExitStack) -> subprocess.Popen[str]:
    """A marked Python that waits, and has started a `sleep` of its own."""
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", _HANGS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_MARKED,
        )
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _end(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", leftovers.__file__, *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )


def _of(run: subprocess.Popen[str]) -> int:
    victims.wait_until(lambda: bool(victims.children(run.pid)), "its child")
    (child,) = victims.children(run.pid)
    victims.wait_until(
        lambda: victims.status_of(child)["Name"] == "sleep", "its exec"
    )
    return child


def test_what_a_killed_run_has_started_is_ended(
    run: subprocess.Popen[str],
) -> None:
    child = _of(run)
    pidfd = os.pidfd_open(child)
    try:
        with _end(_MARK, str(run.pid)) as ending:
            assert leftovers.has_mark(child, _MARK)
            run.kill()
            _, said = ending.communicate(timeout=60)
        assert select.select([pidfd], [], [], 60) == ([pidfd], [], [])
    finally:
        os.close(pidfd)
    assert ending.returncode == 0
    assert f"left running, ended now: {child} sleep (S (sleeping))" in said


def test_who_has_another_mark_is_let_alone(
    run: subprocess.Popen[str],
) -> None:
    child = _of(run)
    with _end(f"{_MARK}0") as ending:
        _, said = ending.communicate(timeout=60)
    assert (ending.returncode, said) == (0, "")
    assert victims.status_of(child)["State"].startswith("S")
    assert leftovers.end(_MARK)[0].startswith((f"{child} ", f"{run.pid} "))


def test_who_looks_is_not_ended_by_it() -> None:
    """Nor those that started it, who are of the same run."""
    with subprocess.Popen(
        ["sh", "-c", '"$@"; echo here', "sh", sys.executable, "-I",
         leftovers.__file__, _MARK],
        stdout=subprocess.PIPE,
        text=True,
        env=_MARKED,
    ) as shell:  # fmt: skip
        out, _ = shell.communicate(timeout=60)
    assert (shell.returncode, out) == (0, "here\n")
