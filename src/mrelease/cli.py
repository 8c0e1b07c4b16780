"""The command: mrelease kill, mrelease support, mrelease demo.

`mrelease kill` prints a line for each pid and exits with the highest of

    0  the memory of every victim is back
    1  killed, but the memory is not back, or not known to be
    2  wrong usage; nothing was signalled
    3  there is no such process
    4  permission denied, or the system cannot kill it safely

and with 128 plus its number when a signal interrupted it (130: Ctrl-C).
With --dry-run nothing is sent, and 1 means that a kill would not release.

`mrelease support` exits with 0 if a kill can be followed by a release, with 1
if not or if that is not known.  `mrelease demo` exits with 0 if the memory was
back, with 1 if not or if it cannot be shown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from errno import errorcode

from mrelease import __version__, _mrelease
from mrelease.footprint import in_units
from mrelease.protocol import Terms, refusal
from mrelease.release import Outcome, Release
from mrelease.support import Feature, support
from mrelease.victim import Victim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType
    from typing import TextIO

_DESCRIPTION = """\
Kill processes, and have their memory back at once: SIGKILL and
process_mrelease(2) leave together, and what became of the memory is told."""

_KILL_EPILOG = """\
Every process is pinned by a pidfd before the first is killed.  Then they are
killed one after the other, in the order given.  What cannot be killed is told
on stderr and does not stop the others; but a pid that must never be killed
(0, negative, 1, a kernel thread, a thread, this command itself) is wrong
usage, and then nothing is signalled at all.

exit code, the highest of all pids:
  0  the memory of every victim is back
  1  killed, but the memory is not back, or not known to be
  2  wrong usage; nothing was signalled
  3  there is no such process
  4  permission denied, or the system cannot kill it safely
  128 + N  interrupted by signal N (130: Ctrl-C): the victim whose turn it was
     is killed, those after it are left alone
With --dry-run, 1 means that it would be killed, but not released."""

_SUPPORT_EPILOG = """\
exit code:
  0  a kill can be followed by a release here
  1  it cannot, or that is not known (see --probe)"""

_DEMO_EPILOG = """\
It takes some 5 to 20 seconds and up to 1 GiB, at most a quarter of what is
free.  Nothing that it starts outlives it.

exit code:
  0  with mrelease the memory was back
  1  it was not, or the demo cannot be shown here"""


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP came: finish, and say what was done."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.code: int = 128 + signum


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
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


def _silence(stream: TextIO) -> None:
    """Send what is still to be written nowhere: its reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _tell(text: str, stream: TextIO) -> None:
    """Print a line.  That nobody can read it must not stop a kill."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        _silence(stream)


class _Told:
    """What there is to say of one pid: a line, a document, an exit code."""

    def __init__(
        self,
        code: int,
        line: str,
        document: dict[str, object],
        *,
        error: bool = False,
    ) -> None:
        self.code = code
        self.line = line
        self.document = document
        self.error = error

    def tell(self, *, as_json: bool) -> int:
        """Print it; give the exit code."""
        if as_json:
            import json

            _tell(json.dumps(self.document), sys.stdout)
        elif self.error:
            _tell(f"mrelease: {self.line}", sys.stderr)
        else:
            _tell(self.line, sys.stdout)
        return self.code


def _told_of_error(pid: int, error: OSError) -> _Told:
    gone = isinstance(error, ProcessLookupError)
    outcome = Outcome.GONE if gone else Outcome.DENIED
    line = error.strerror or str(error)
    document = Release(pid, outcome).as_dict()
    document["errno"] = errorcode.get(error.errno or 0)
    document["error"] = line
    return _Told(3 if gone else 4, line, document, error=True)


def _told_of_release(release: Release) -> _Told:
    code = 0 if release.freed else 1
    if release.outcome is Outcome.ALIVE:
        code = 4  # SIGKILL was refused after a grace
    return _Told(code, str(release), release.as_dict())


def _told_of_stop(victim: Victim, *, begun: bool, locks: str) -> _Told:
    """Say what a signal to this command meant for a victim."""
    pid = victim.pid
    if begun:
        # It was sent SIGKILL, unless the signal came just before: ask.
        release = victim.release(
            timeout=0.5, locks="ignore" if locks == "ignore" else "protect"
        )
        if release.outcome is not Outcome.ALIVE:
            back = "is back" if release.freed else "is not known to be back"
            line = f"pid {pid} killed: interrupted, its memory {back}"
            document = release.as_dict() | {"error": line}
            return _Told(0, line, document)
    line = f"pid {pid} was left alone: interrupted before its turn"
    document = Release(pid, Outcome.ALIVE).as_dict() | {"error": line}
    return _Told(0, line, document, error=True)


def _pin(pids: list[int]) -> Iterator[tuple[int, Victim | OSError]]:
    """Pin each pid.  Raises ValueError for what must never be killed."""
    for pid in dict.fromkeys(pids):
        try:
            yield pid, Victim(pid)
        except OSError as error:
            yield pid, error


def _allow_files(count: int) -> None:
    """Each victim takes a file descriptor: raise the soft limit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _kill(args: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = args.parser
    _allow_files(len(args.pid))
    with contextlib.ExitStack() as stack:
        pinned: list[tuple[int, Victim | OSError]] = []
        try:
            Terms(args.grace, None, args.timeout, args.locks)
            for pid, victim in _pin(args.pid):
                if isinstance(victim, Victim):
                    stack.enter_context(victim)
                pinned.append((pid, victim))
        except ValueError as error:
            parser.error(f"{error}; nothing was signalled")
        if args.dry_run:
            return _dry_run(args, pinned)
        return _kill_pinned(args, pinned)


def _kill_pinned(
    args: argparse.Namespace, pinned: list[tuple[int, Victim | OSError]]
) -> int:
    worst = 0
    left = list(pinned)
    try:
        while left:
            told = _kill_one(args, *left[0])
            del left[0]
            worst = max(worst, told.tell(as_json=args.json))
    except Stopped as stop:
        for turn, (pid, victim) in enumerate(left):
            if isinstance(victim, OSError):
                told = _told_of_error(pid, victim)
            else:
                told = _told_of_stop(victim, begun=turn == 0, locks=args.locks)
            told.tell(as_json=args.json)
        return stop.code
    return worst


def _kill_one(
    args: argparse.Namespace, pid: int, victim: Victim | OSError
) -> _Told:
    if isinstance(victim, OSError):
        return _told_of_error(pid, victim)
    try:
        release = victim.kill(
            grace=args.grace, timeout=args.timeout, locks=args.locks
        )
    except OSError as error:
        return _told_of_error(pid, error)
    return _told_of_release(release)


# --------------------------------------------------------------- dry run


def _dry_run(
    args: argparse.Namespace, pinned: list[tuple[int, Victim | OSError]]
) -> int:
    call = support().release
    if call.works is None:
        # Not tried, for a filter that may kill: let a child try.
        call = support(probe=True).release
    worst = 0
    for pid, victim in pinned:
        if isinstance(victim, OSError):
            told = _told_of_error(pid, victim)
        else:
            try:
                told = _foresee(args, victim, call)
            except OSError as error:
                told = _told_of_error(pid, error)
        told.document["dry_run"] = True
        worst = max(worst, told.tell(as_json=args.json))
    return worst


def _may_signal(victim: Victim) -> None:
    """Raise ProcessLookupError or PermissionError if it cannot be signalled.

    With signal 0, which is never delivered.
    """
    try:
        if hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(victim.fileno(), 0)
        else:
            # A Python built on an old system.  The pid is the victim's as
            # long as that was not waited for.
            os.kill(victim.pid, 0)
    except OSError as error:
        raise refusal(victim.pid, error.errno or 0) from None


def _foresee(args: argparse.Namespace, victim: Victim, call: Feature) -> _Told:
    """Check all that a kill checks, and say what it would do."""
    pid = victim.pid
    _may_signal(victim)
    try:
        footprint = victim.footprint()
    except ProcessLookupError:
        raise
    except OSError:
        footprint = None  # no /proc
    if args.locks == "ignore":
        locks = "ignored"
    else:
        locks = _mrelease.look_at_locks(pid)
        _may_signal(victim)  # was it still the victim that was looked at?

    size = in_units(footprint.releasable) if footprint else "unknown size"
    sent = (
        f"SIGTERM, after {args.grace:g} s SIGKILL" if args.grace else "SIGKILL"
    )
    code = 1
    if victim.exited:
        code = 0
        would = "nothing"
        line = f"pid {pid} has ended already, nothing would be sent"
    elif locks == "held":
        would = "kill"
        line = (
            f"pid {pid} would get {sent}, the release of {size} withheld for "
            "its robust locks"
        )
    elif call.works:
        code = 0
        would = "release"
        line = f"pid {pid} would get {sent} and be released: {size}"
    else:
        would = "kill"
        line = f"pid {pid} would get {sent}, no release of {size}: {call.why}"
    if locks == "unknown" and would != "nothing":
        line += " (locks cannot be checked)"
    document: dict[str, object] = {
        "pid": pid,
        "would": would,
        "footprint": footprint and footprint.as_dict(),
        "locks": locks,
        "release": call.as_dict(),
    }
    return _Told(code, line, document)


# ----------------------------------------------------- support and demo


def _support(args: argparse.Namespace) -> int:
    found = support(probe=args.probe)
    if args.json:
        import json

        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(found)
    sys.stdout.flush()
    return 0 if found else 1


def _demo(args: argparse.Namespace) -> int:
    from mrelease.demo import demo

    del args
    try:
        return demo()
    except Stopped:
        _tell("\ninterrupted; all that was started has ended", sys.stderr)
        raise


# ------------------------------------------------------------ the parser


def _pid(text: str) -> int:
    # int() takes more: "1_0", " 7", digits of other scripts.
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a pid")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds"
        ) from None


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="mrelease", description=_DESCRIPTION, formatter_class=raw
    )
    parser.add_argument(
        "--version", action="version", version=f"mrelease {__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    kill = commands.add_parser(
        "kill",
        help="kill processes and release their memory",
        description="Kill processes and release their memory.",
        epilog=_KILL_EPILOG,
        formatter_class=raw,
    )
    kill.add_argument(
        "pid", metavar="PID", type=_pid, nargs="+", help="a process"
    )
    kill.add_argument(
        "--grace",
        metavar="S",
        type=_seconds,
        default=0.0,
        help="send SIGTERM first, SIGKILL after S seconds (default: 0, "
        "SIGKILL at once)",
    )
    kill.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=1.0,
        help="wait for the memory for S seconds after SIGKILL, each "
        "(default: %(default)g)",
    )
    kill.add_argument(
        "--locks",
        choices=["protect", "ignore"],
        default="protect",
        help="what to do about a victim that holds robust locks: protect "
        "withholds its release, so that those who wait for them are woken "
        "(default); ignore does not look",
    )
    kill.add_argument(
        "--dry-run",
        action="store_true",
        help="make every check and say what would happen, but send nothing",
    )
    kill.add_argument(
        "--json",
        action="store_true",
        help="a JSON document for each pid, one a line, on stdout, errors too",
    )
    kill.set_defaults(run=_kill, parser=kill)

    tell = commands.add_parser(
        "support",
        help="tell what works here, why not, and what to do",
        description="Tell what works here, and for what does not: why, and "
        "what to do.",
        epilog=_SUPPORT_EPILOG,
        formatter_class=raw,
    )
    tell.add_argument(
        "--probe",
        action="store_true",
        help="try the system calls in a child process, also where a seccomp "
        "filter might kill their caller",
    )
    tell.add_argument("--json", action="store_true", help="one JSON document")
    tell.set_defaults(run=_support)

    show = commands.add_parser(
        "demo",
        help="kill two starved processes, one with mrelease, and compare",
        description="Start two real processes that get hardly any CPU, kill "
        "one with\nSIGKILL alone and one with mrelease, and show how long it "
        "took until\nthe memory was back.",
        epilog=_DEMO_EPILOG,
        formatter_class=raw,
    )
    show.set_defaults(run=_demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code.

    Raises SystemExit for wrong usage (2), --help and --version (0).
    """
    try:
        with _stoppable():
            args = _parser().parse_args(argv)
            code: int = args.run(args)
            return code
    except Stopped as stop:
        return stop.code
    except BrokenPipeError:
        # As the shell shows a program that SIGPIPE ended.
        _silence(sys.stdout)
        return 128 + signal.SIGPIPE
