"""When the kernel saw a SIGKILL, and what process_mrelease(2) answered.

Of programs that do not tell it. A trace instance of our own, in a tracefs
mounted in a folder of our own, tells SIGKILLs sent and process_mrelease(2)
entered and left, on the monotonic clock. While it is there, system calls of
all processes take the slower way through the kernel, by some 0.1 us.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import NamedTuple

from cgroups import Guard, Unavailable

_REMOVE = """
rmdir "$1/instances/$2" 2>/dev/null
umount "$1" && rmdir "$1"
"""
_EVENTS = {
    "signal/signal_generate": "sig == 9",
    "syscalls/sys_enter_process_mrelease": None,
    "syscalls/sys_exit_process_mrelease": None,
}
_LINE = re.compile(
    r"-(?P<who>\d+) +\[\d+\] +\S+ +(?P<when>\d+\.\d+): (?P<what>.*)"
)


class Event(NamedTuple):
    when: int
    """Nanoseconds of the monotonic clock, rounded to microseconds."""
    who: int
    """The thread that did it."""
    what: str
    """kill, enter or exit."""
    value: int
    """The pid that is killed, or the call's errno (0: it succeeded)."""


class Tracer:
    """Events since the last look."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise Unavailable("tracing: only root may")
        folder = tempfile.mkdtemp(prefix="mrelease-trace-")
        name = f"mrelease-{os.getpid()}"
        done = subprocess.run(
            ["mount", "-t", "tracefs", "none", folder],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            os.rmdir(folder)
            raise Unavailable(f"tracing: {done.stderr.strip()}")
        self._guard = Guard(_REMOVE, folder, name)
        self._path = f"{folder}/instances/{name}"
        self._pipe = -1
        try:
            os.mkdir(self._path)
            self._write("trace_clock", "mono")
            self._write("buffer_size_kb", "256")
            for event, only in _EVENTS.items():
                if only is not None:
                    self._write(f"events/{event}/filter", only)
                self._write(f"events/{event}/enable", "1")
            self._pipe = os.open(
                f"{self._path}/trace_pipe",
                os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC,
            )
            self._try()
        except OSError as error:
            self.close()
            raise Unavailable(f"tracing: {error}") from None
        except BaseException:
            self.close()
            raise

    def _write(self, name: str, value: str) -> None:
        with open(f"{self._path}/{name}", "w") as file:
            file.write(value)

    def _try(self) -> None:
        """It tells pids of the first pid namespace: is that ours?"""
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        child.kill()
        child.communicate()
        killed = [event for event in self.look() if event.what == "kill"]
        if child.pid not in [event.value for event in killed]:
            raise Unavailable("tracing: it does not tell a SIGKILL of ours")

    def look(self) -> list[Event]:
        """What was not told yet."""
        text = b""
        while True:
            try:
                more = os.read(self._pipe, 1 << 16)
            except BlockingIOError:
                break
            if not more:
                break
            text += more
        events = []
        for line in text.decode(errors="replace").splitlines():
            found = _LINE.search(line)
            if not found:
                continue
            seconds, _, rest = found["when"].partition(".")
            when = int(seconds) * 10**9 + int(rest.ljust(9, "0"))
            what = found["what"]
            if what.startswith("signal_generate:"):
                pid = re.search(r" pid=(\d+)", what)
                assert pid is not None, line
                kind, value = "kill", int(pid[1])
            elif "->" in what:
                answer = int(what.rpartition("-> ")[2], 16)
                kind, value = "exit", (1 << 64) - answer if answer else 0
            else:
                kind, value = "enter", 0
            events.append(Event(when, int(found["who"]), kind, value))
        return events

    def close(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self._guard.close()
