"""On a Linux without process_mrelease(2) all works but the release.

The kernel itself lacks the call where `make vm` boots Linux 5.10; elsewhere
seccomp hides it. Everything runs in a new interpreter, as for a user.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from errno import ENOSYS
from typing import Any

import pytest

import kernel_errors
import victims

MIB = 1 << 20

Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python() -> Python:
    """Run Python where there is no such call."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-X", "dev", "-W", "error", *args]
        if not kernel_errors.has_the_call():
            return subprocess.run(argv, capture_output=True, text=True)
        if (reason := kernel_errors.why_not()) is not None:
            pytest.skip(reason)
        hidden = kernel_errors.answered({"process_mrelease": ENOSYS})
        with hidden as kernel:
            return kernel.in_thread(
                lambda: subprocess.run(argv, capture_output=True, text=True)
            )

    return run


def kill(python: Python, pid: int, *options: str) -> dict[str, Any]:
    done = python("-m", "mrelease", "kill", "--json", *options, str(pid))
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"code": done.returncode}


def test_everything_imports(python: Python) -> None:
    done = python("-c", "import mrelease; print(mrelease.__version__)")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_call_raises_enosys(python: Python) -> None:
    code = "import mrelease; mrelease.process_mrelease(-1)"
    done = python("-c", code)
    assert "OSError: [Errno 38] Function not implemented" in done.stderr


def test_a_kill_works_and_tells_unsupported(python: Python) -> None:
    with victims.asleep(16) as victim:
        found = kill(python, victim.pid)
        assert victim.wait() == -signal.SIGKILL
    assert found["outcome"] == "unsupported"
    assert found["errno"] == "ENOSYS"
    assert found["attempts"] == 1
    assert found["footprint"]["anon"] >= 16 * MIB
    assert found["signalled"] < found["exited"]
    assert found["freed"]
    assert found["code"] == 0


def test_what_is_not_back_is_not_called_freed(python: Python) -> None:
    with victims.held(16) as victim:
        found = kill(python, victim.pid, "--timeout", "0.1")
        assert victim.rss_anon() >= 16 * MIB
    assert found["outcome"] == "unsupported"
    assert found["exited"] is None
    assert not found["freed"]
    assert found["code"] == 1


def test_a_grace_works(python: Python) -> None:
    with victims.asleep(1, sigterm="exit") as victim:
        found = kill(python, victim.pid, "--grace", "30")
        assert victim.wait() == 0
    assert found["outcome"] == "exited"
    assert found["signalled"] is None


def test_robust_locks_are_still_seen(python: Python) -> None:
    with victims.robust_holder(1) as victim:
        found = kill(python, victim.pid)
    assert (found["outcome"], found["locks"]) == ("locked", "held")


def test_support_tells_why_and_what_to_do(python: Python) -> None:
    done = python("-m", "mrelease", "support", "--probe", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert not found["supported"]
    assert found["kernel"] == os.uname().release
    assert found["release"]["works"] is False
    assert "ENOSYS" in found["release"]["why"]
    assert "Linux 5.15" in found["release"]["advice"]
    assert found["signal"]["works"] is True
