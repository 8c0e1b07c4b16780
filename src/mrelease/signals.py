"""Signals that end a command: once, and not in the middle of cleaning up."""

from __future__ import annotations

import contextlib
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP came: finish, and say what was done."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.code: int = 128 + signum


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at the first signal, and take no notice of the next.

    Not even afterwards: a signal in the last moments of the interpreter would
    end it with another exit code than the one that tells what happened.
    """
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    # Ignored ones were ignored by who started this: nohup, a shell's "&".
    caught = [n for n, action in before.items() if action != signal.SIG_IGN]

    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        del frame
        stopped = True
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    try:
        for number in caught:
            signal.signal(number, stop)
        yield
    finally:
        if not stopped:
            for number in caught:
                signal.signal(number, before[number])


@contextlib.contextmanager
def not_now() -> Iterator[None]:
    """Keep those signals back while the block runs.

    Threads that it starts keep them back for good.
    """
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
