"""What a run has started and left running: found by a mark, and ended.

    leftovers.py NAME=VALUE [PID]

The mark stands in the environment of all that a run starts, and of what
that starts. One process that is busy for ever would slow down all that
comes after. With PID it waits until that process has ended, however it
did: killed, too, when nobody else is left to clean up. Who then ends by
itself has three seconds for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

__all__ = ["ancestors", "describe", "end", "has_mark"]


def has_mark(pid: int, mark: str) -> bool:
    """Whether it was started with this; False if nobody may know."""
    with contextlib.suppress(OSError):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        return mark.encode() in environ.split(b"\0")
    return False


def describe(pid: int) -> str:
    """Its number, name, state and command, as far as it still has them."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        fields = (line.partition(":\t") for line in status.splitlines())
        lines = {name: value for name, _, value in fields}
        command = Path(f"/proc/{pid}/cmdline").read_bytes()[:200]
        return f"{pid} {lines['Name']} ({lines['State']}) {command!r}"
    return f"{pid}"


def ancestors() -> set[int]:
    """This process and those that started it, as far as they are seen."""
    found: set[int] = set()
    pid = os.getpid()
    with contextlib.suppress(OSError):  # one that ends just now
        while pid > 0:
            found.add(pid)
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            pid = int(stat.rpartition(")")[2].split()[1])
    return found


def _end_one(pid: int, mark: str) -> str | None:
    # First the pidfd: who has the mark then is whom it means.
    pidfd = os.pidfd_open(pid)
    try:
        if not has_mark(pid, mark):
            return None
        what = describe(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # Some cannot end now: nobody waits for them for ever.
        select.select([pidfd], [], [], 10)
        return what
    finally:
        os.close(pidfd)


def _marked(mark: str, but: set[int]) -> set[int]:
    pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    return {pid for pid in pids - but if has_mark(pid, mark)}


def end(mark: str, patience: float = 0.0) -> list[str]:
    """SIGKILL to each with the mark, but for this one and its ancestors."""
    ended: list[str] = []
    seen = ancestors()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and _marked(mark, seen):
        time.sleep(0.05)
    # They may start others meanwhile.
    while found := _marked(mark, seen):
        seen |= found
        for pid in found:
            with contextlib.suppress(OSError):
                if what := _end_one(pid, mark):
                    ended.append(what)
    return ended


def main() -> None:
    """End those of the mark that is the first argument."""
    mark = sys.argv[1]
    if len(sys.argv) > 2:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(int(sys.argv[2]))], [], [])
    for process in end(mark, patience=3):
        print(f"left running, ended now: {process}", file=sys.stderr)


if __name__ == "__main__":
    main()
