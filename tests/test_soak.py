"""A short soak: see soak.py, of which `make soak` runs the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mrelease
from test_interpreters import FREE_THREADED_3_13

SOAK = Path(__file__).with_name("soak.py")


# In a machine it is `make soak ARGS=--machine`.
@pytest.mark.any_kernel
def test_20_seconds_of_soak() -> None:
    """In a process of its own: what it leaks and who it kills is counted."""
    if not mrelease.support():
        pytest.skip("no process_mrelease(2): there is nothing to release")
    # Free-threaded 3.13 yields the CPU 40 times before it takes a lock that it
    # holds already, as it does to close a file: beside busy processes, 0.2 s.
    busy = ["--busy=0"] if FREE_THREADED_3_13 else []
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(SOAK),
         "--minutes", "0.3", "--victims", "200", *busy],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=190,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout
