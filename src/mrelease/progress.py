"""A line on a terminal that tells how far a kill of many has come."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading

from mrelease.footprint import in_units
from mrelease.reaper import Reaper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Literal, Self, SupportsIndex, TextIO

    from mrelease.process import HasPid
    from mrelease.reaper import Reaping
    from mrelease.victim import Victim

FEW = 8
"""Up to so many victims are told of by their lines alone."""
_PERIOD = 0.1  # seconds
_ERASE = "\r\x1b[K"


class WatchedReaper(Reaper):
    """A Reaper that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.reapings: list[Reaping] = []

    def kill_many(
        self,
        processes: Iterable[Victim | HasPid | SupportsIndex],
        *,
        grace: float = 0.0,
        timeout: float = 1.0,
        locks: Literal["protect", "ignore"] = "protect",
    ) -> list[Reaping]:
        """Kill many, and remember them."""
        reapings = super().kill_many(
            processes, grace=grace, timeout=timeout, locks=locks
        )
        self.reapings += reapings
        return reapings


def _line(reapings: list[Reaping], columns: int) -> str:
    done = [reaping for reaping in reapings if reaping.done()]
    releases = [reaping.result() for reaping in done]
    back = sum(
        release.footprint.releasable
        for release in releases
        if release.freed and release.footprint
    )
    text = f" {len(done)}/{len(reapings)} done, {in_units(back)} back"
    width = min(30, columns - len(text) - 3)
    if width < 5:
        return text.strip()[: max(0, columns - 1)]
    full = width * len(done) // len(reapings)
    return f"[{'#' * full}{'.' * (width - full)}]{text}"


class Progress:
    """Redraws the line while the block runs, and erases it at its end.

    Does nothing unless stream is a terminal that can erase a line.
    """

    def __init__(self, reapings: list[Reaping], stream: TextIO | None) -> None:
        self._reapings = reapings
        self._stream = stream
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._shown = False
        self._thread: threading.Thread | None = None

    @staticmethod
    def on(stream: TextIO | None) -> bool:
        """Whether the line can be shown there."""
        try:
            return (
                stream is not None
                and stream.isatty()
                and os.environ.get("TERM", "dumb") not in ("dumb", "")
            )
        except ValueError:  # it is closed
            return False

    def _write(self, text: str) -> None:
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):
                self._stream = None

    def _run(self) -> None:
        while not self._end.wait(_PERIOD):
            with self._lock:
                reapings = list(self._reapings)
                if len(reapings) > FEW:
                    columns = shutil.get_terminal_size().columns
                    self._shown = True
                    self._write(_ERASE + _line(reapings, columns))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Keep the line out of the way of what the block prints."""
        with self._lock:
            self._erase()
            yield

    def _erase(self) -> None:
        if self._shown:
            self._shown = False
            self._write(_ERASE)

    def __enter__(self) -> Self:
        if self.on(self._stream):
            thread = threading.Thread(
                target=self._run, name="mrelease-progress", daemon=True
            )
            # A kill does without it where no thread can be made.
            with contextlib.suppress(RuntimeError, MemoryError):
                thread.start()
                self._thread = thread
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._erase()
