"""Victims with so many threads that each costs more than is gained.

With more than 128 threads kill() sends SIGKILL before it looks at their locks.
With more than 512 and little memory nothing is done for a while: the victim
ends by itself, and if it does not, it is released as any other.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

import victims
from mrelease import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from kill_ways import Kill

SOME = 200
CROWD = 600
PATIENCE = CROWD * 50e-6
"""Seconds: src/reap.c, END_OF_THREAD."""


@pytest.mark.needs("release")
def test_a_crowd_with_little_memory_is_left_to_its_end(kill: Kill) -> None:
    with victims.asleep(16, threads=CROWD) as victim:
        release = kill(victim.pid)
        assert victim.ended()
    assert release.outcome in (Outcome.EXITED, Outcome.RELEASED), release
    assert release.freed
    if release.exited is not None and release.exited < PATIENCE:
        assert release.outcome is Outcome.EXITED
        assert release.attempts == 0
        # The threads of a Reaper are not as nice as this process may be.
        if os.getpriority(os.PRIO_PROCESS, 0) <= 0:
            assert not release.raised


@pytest.mark.needs("release")
def test_a_crowd_that_does_not_end_is_released_all_the_same(
    kill: Kill,
) -> None:
    with victims.held(64, threads=CROWD) as victim:
        begun = time.monotonic()
        release = kill(victim.pid, timeout=5.0)
        took = time.monotonic() - begun
        assert release.outcome is Outcome.RELEASED, release
        assert release.freed
        assert release.released is not None
        assert release.released > PATIENCE * 0.9
        assert took < 5.0
        assert victim.rss_anon() < 1 << 20


@pytest.mark.needs("release")
def test_a_crowd_with_much_memory_is_released_at_once(kill: Kill) -> None:
    with victims.held(256, threads=CROWD) as victim:
        release = kill(victim.pid, timeout=5.0)
        assert release.outcome is Outcome.RELEASED, release
        assert victim.rss_anon() < 1 << 20


@pytest.mark.needs("release")
def test_patience_is_at_most_half_of_the_timeout(kill: Kill) -> None:
    with victims.held(16, threads=CROWD) as victim:
        release = kill(victim.pid, timeout=0.02)
        assert release.outcome in (Outcome.RELEASED, Outcome.PARTIAL), release
        if release.released is not None:
            assert release.released > 0.009


@pytest.mark.needs("release")
def test_a_starved_crowd_does_not_have_to_wait(kill: Kill) -> None:
    with victims.held(16, threads=CROWD, idle=True) as victim:
        release = kill(victim.pid, timeout=5.0)
        assert release.outcome is Outcome.RELEASED, release
        assert release.released is not None


@pytest.mark.parametrize("threads", [SOME, CROWD])
def test_a_lock_that_one_of_many_holds_is_seen_after_sigkill(
    kill: Kill, threads: int, tmp_path: Path
) -> None:
    lock = tmp_path / "lock"
    with (
        victims.held(
            16, threads=threads, robust=lock, robust_in_thread=True
        ) as victim,
        victims.robust_waiter(lock) as waiter,
    ):
        release = kill(victim.pid, timeout=1.0)
        assert release.outcome is Outcome.LOCKED, release
        assert release.locks == "held"
        assert victim.rss_anon() >= 16 << 20
        victim.let_go()
        assert victims.got(waiter) == "EOWNERDEAD"


@pytest.mark.parametrize("threads", [SOME, CROWD])
def test_whoever_waits_for_a_lock_of_one_of_many_is_woken(
    kill: Kill, threads: int, tmp_path: Path
) -> None:
    for turn in range(20 if threads == SOME else 5):
        lock = tmp_path / f"lock-{turn}"
        with (
            victims.asleep(
                64, threads=threads, robust=lock, robust_in_thread=True
            ) as victim,
            victims.robust_waiter(lock) as waiter,
        ):
            release = kill(victim.pid)
            assert victims.got(waiter) == "EOWNERDEAD", (turn, release)


def test_sigkill_does_not_wait_for_a_look_at_many_threads() -> None:
    """kill(): as many lists of locks are read as there are threads."""
    import mrelease

    with victims.asleep(16, threads=4000) as victim:
        release = mrelease.kill(victim.pid)
    assert release.signalled is not None
    # The look takes 16 ms, and more on a busy machine.
    assert release.signalled < 0.01, release
