"""The two ways to kill a process: mrelease.kill(), and a Reaper.

A test that takes the fixture ``kill`` runs with each, so that what is promised
of a kill is promised of both. Where they rightly differ the test says why, and
asks ``kill is by_reaper``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mrelease

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal, SupportsIndex

    from mrelease.process import HasPid
    from mrelease.protocol import HasFileno


class Kill(Protocol):
    """Of mrelease.kill(), and of what stands in for it."""

    def __call__(
        self,
        process: mrelease.Victim | HasPid | SupportsIndex,
        *,
        grace: float = ...,
        escalate_on: HasFileno | int | None = ...,
        timeout: float = ...,
        locks: Literal["protect", "ignore"] = ...,
    ) -> mrelease.Release: ...


def kill_of(reaper: mrelease.Reaper) -> Kill:
    """Kill with this Reaper, and wait for the result."""

    def kill(
        process: mrelease.Victim | HasPid | SupportsIndex,
        *,
        grace: float = 0.0,
        escalate_on: HasFileno | int | None = None,
        timeout: float = 1.0,
        locks: Literal["protect", "ignore"] = "protect",
    ) -> mrelease.Release:
        return reaper.kill(
            process,
            grace=grace,
            escalate_on=escalate_on,
            timeout=timeout,
            locks=locks,
        ).result()

    return kill


def by_reaper(
    process: mrelease.Victim | HasPid | SupportsIndex,
    *,
    grace: float = 0.0,
    escalate_on: HasFileno | int | None = None,
    timeout: float = 1.0,
    locks: Literal["protect", "ignore"] = "protect",
) -> mrelease.Release:
    """Kill with a Reaper that is made here.

    So it works wherever the caller is: in a forked child, and under a seccomp
    filter, which a thread has from the one that made it.
    """
    with mrelease.Reaper() as reaper:
        return kill_of(reaper)(
            process,
            grace=grace,
            escalate_on=escalate_on,
            timeout=timeout,
            locks=locks,
        )


@contextlib.contextmanager
def kept(kill: Kill) -> Iterator[Kill]:
    """The same way, of which a Reaper is closed at the end of the with.

    Its close() waits for what its threads do after the result is there.
    """
    if kill is by_reaper:
        with mrelease.Reaper() as reaper:
            yield kill_of(reaper)
    else:
        yield kill


def sees_no_lock(kill: Kill, release: mrelease.Release) -> bool:
    """Of a victim that can end. The look of a Reaper, which is not waited for
    without a bound, may come when its threads are ending, and cannot tell.
    """
    return release.locks == "free" or (
        kill is by_reaper and release.locks == "unknown"
    )


WAYS: dict[str, Kill] = {"kill": mrelease.kill, "reaper": by_reaper}


def native_threads() -> dict[int, str]:
    """The threads of all Reapers of this process: tid and name."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().rstrip("\n")
            if name.startswith("mrelease"):
                found[int(task.name)] = name
    return found
