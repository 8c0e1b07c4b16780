"""The command: mrelease kill, support, demo, bench.

`mrelease kill` prints a line for each victim and exits with the highest of

    0  the memory of every victim is back
    1  killed, but the memory is not back, or not known to be
    2  wrong usage; nothing was signalled
    3  there is no such process (process group, control group)
    4  permission denied, or the system cannot kill it safely

and with 128 plus its number when a signal interrupted it (130: Ctrl-C).
With --dry-run nothing is sent, and 1 means that a kill would not release.
Where its lines cannot be written it kills all the same, and says nothing.

`mrelease support` exits with 0 if a kill can be followed by a release, with 1
if not or if that is not known.  `mrelease demo` exits with 0 if the memory was
back, with 1 if not or if it cannot be shown; `mrelease bench` with 0 if it was
measured, with 1 if it cannot be.  All three exit with 74 where what they found
cannot be written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
from errno import EPERM, ESRCH, errorcode
from time import monotonic, sleep

from mrelease import __version__, _mrelease
from mrelease.cgroup import Cgroup, find_cgroup, kill_opened
from mrelease.footprint import in_units
from mrelease.printable import printable
from mrelease.progress import Progress, WatchedReaper
from mrelease.protocol import Terms, may_signal, refusal
from mrelease.release import Outcome, Release
from mrelease.selection import find_group, find_tree, kill_group, kill_tree
from mrelease.signals import Stopped, not_now, stoppable
from mrelease.support import Feature, support
from mrelease.victim import Victim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Literal, NoReturn, TextIO

    from mrelease.cgroup import CgroupRelease
    from mrelease.reaper import Reaping

    _Locks = Literal["protect", "ignore"]

_DESCRIPTION = """\
Kill processes, and have their memory back at once: SIGKILL and
process_mrelease(2) leave together, and what became of the memory is told."""

_KILL_EPILOG = """\
Every process is pinned by a pidfd before the first is killed.  Then all are
sent SIGKILL, the biggest first, and released in parallel; with --tree, --group
and --cgroup, one tree or group after the other, each in parallel.  What cannot
be killed is told on stderr and does not stop the others; but what must never
be killed (pid 0, negative, 1, a kernel thread, a thread, this command itself,
a tree or a group that it is in, a root cgroup) is wrong usage, and then
nothing is signalled at all.

exit code, the highest of all victims:
  0  the memory of every victim is back
  1  killed, but the memory is not back, or not known to be
  2  wrong usage; nothing was signalled
  3  there is no such process (process group, control group)
  4  permission denied, or the system cannot kill it safely
  128 + N  interrupted by signal N (130: Ctrl-C): what was begun is killed at
     once, and the trees and groups whose turn had not come are left alone
With --dry-run, 1 means that it would be killed, but not released."""

_SUPPORT_EPILOG = """\
exit code:
  0  a kill can be followed by a release here
  1  it cannot, or that is not known (see --probe)
  74  what was found cannot be written"""

_DEMO_EPILOG = """\
It takes some 5 to 20 seconds and up to 1 GiB, at most a quarter of what is
free.  Nothing that it starts outlives it.

exit code:
  0  with mrelease the memory was back
  1  it was not, or the demo cannot be shown here
  74  what was found cannot be written"""


_BENCH_EPILOG = """\
Kinds of victims: asleep, spinning, threads (64 of them), starved, quota (2 %
of a CPU), disk (waiting for one: D state), frozen, swapped, shared.  Methods:
sigkill (alone), call (SIGKILL, then process_mrelease), kill, reaper.  What
cannot be had here is left out, and it says why.

No victim gets more than half of the free memory.  All that is started or
changed (processes, control groups, a mount) ends with the benchmark, however
that ends.  Ctrl-C: what was measured by then is shown.

exit code:
  0  it was measured
  1  it cannot be measured here
  2  wrong usage; nothing was started
  74  what was found cannot be written
  128 + N  interrupted by signal N"""


def _silence(stream: TextIO) -> None:
    """Send what is still to be written nowhere: its reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _is_read(stream: TextIO) -> bool:
    """Wait a moment until somebody reads what is written, if it is a pipe."""
    try:
        return bool(select.select([], [stream], [], 1.0)[1])
    except (OSError, ValueError):
        return True


def _tell(text: str, stream: TextIO | None, *, hurried: bool = False) -> None:
    """Print a line.  That nobody can read it must not stop a kill.

    Hurried: nor must one who does not read, who is waited for otherwise.
    """
    if stream is None:
        return  # it was closed before this began
    try:
        if hurried and not _is_read(stream):
            raise TimeoutError
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:  # nothing was written
            code = stream.encoding
            text = text.encode(code, "backslashreplace").decode(code)
            print(text, file=stream, flush=True)
    except (OSError, ValueError):
        _silence(stream)


class _Told:
    """What there is to say of one victim: a line, a document, a code."""

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

    def tell(self, *, as_json: bool, hurried: bool = False) -> int:
        """Print it; give the exit code."""
        text, stream = self.line, sys.stdout
        if as_json:
            import json

            text = json.dumps(self.document)
        elif self.error:
            text, stream = f"mrelease: {self.line}", sys.stderr
        _tell(text, stream, hurried=hurried)
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


def _told_of_member(release: Release) -> _Told:
    """Say what became of one of a tree or a group."""
    if release.outcome is Outcome.GONE:
        return _Told(0, str(release), release.as_dict())  # by itself
    if release.outcome is Outcome.DENIED:
        code = errorcode.get(release.errno or 0)
        line = f"{release}: {code}" if code else str(release)
        return _Told(4, line, release.as_dict(), error=True)
    return _told_of_release(release)


def _told_of_cgroup(result: CgroupRelease) -> _Told:
    code = 0 if result.freed else 1
    denied = any(r.outcome is Outcome.DENIED for r in result.releases)
    if result.populated and denied:
        code = 4
    return _Told(code, str(result), result.as_dict())


def _told_of_trouble(kind: str, target: int | str, error: OSError) -> _Told:
    """Say why nothing was signalled of a tree or a group."""
    gone = isinstance(error, (ProcessLookupError, FileNotFoundError))
    line = error.strerror or str(error)
    if error.filename is not None:
        line = f"{line}: {printable(str(error.filename))}"
    document: dict[str, object] = {
        kind: target,
        "outcome": (Outcome.GONE if gone else Outcome.DENIED).value,
        "errno": errorcode.get(error.errno or 0),
        "error": line,
    }
    return _Told(3 if gone else 4, line, document, error=True)


def _told_of_stop(
    victim: Victim, reaping: Reaping | None, locks: _Locks
) -> _Told:
    """Kill what is in its grace, and say so: this command was interrupted."""
    pid = victim.pid
    if reaping is not None and reaping.done():
        return _told_of_one(victim, reaping.result())
    if reaping is None:
        # One by one: was its turn begun?
        release = victim.release(timeout=0.5, locks=locks)
    else:
        try:
            # It was sent SIGKILL, but in a grace SIGTERM only.
            release = victim.kill(timeout=0.5, locks=locks)
        except ProcessLookupError:
            release = reaping.result()
        except OSError as error:
            return _told_of_error(pid, error)
    if release.outcome is Outcome.ALIVE:
        line = f"pid {pid} was left alone: interrupted before its turn"
        document = Release(pid, Outcome.ALIVE).as_dict() | {"error": line}
        return _Told(0, line, document, error=True)
    back = "is back" if release.freed else "is not known to be back"
    line = f"pid {pid} killed: interrupted, its memory {back}"
    document = release.as_dict() | {"error": line}
    return _Told(0, line, document)


def _pin(pids: list[int]) -> Iterator[tuple[int, Victim | OSError]]:
    """Pin each pid.  Raises ValueError for what must never be killed."""
    for pid in dict.fromkeys(pids):
        try:
            yield pid, Victim(pid)
        except OSError as error:
            yield pid, error


def _allow_files(count: int) -> None:
    """Each victim takes file descriptors: raise the soft limit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * count + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_MANY = 16384
"""How many may be in a tree or a group: file descriptors are had for them."""


def _kill(args: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = args.parser
    try:
        Terms(args.grace, None, args.timeout, args.locks)
        if args.kind == "cgroup":
            if args.grace:
                raise ValueError("--grace is not for --cgroup")
            _allow_files(_MANY)
            return _kill_each(args, list(dict.fromkeys(args.target)))
        numbers = list(dict.fromkeys(map(_pid, args.target)))
        if args.kind == "pid":
            return _kill_pids(args, numbers)
        _allow_files(_MANY)
        return _kill_each(args, numbers)
    except (ValueError, argparse.ArgumentTypeError) as error:
        text = str(error).removesuffix("; nothing was signalled")
        parser.error(f"{text}; nothing was signalled")


def _reaper(stack: contextlib.ExitStack) -> WatchedReaper | None:
    """Make a Reaper; None without the means (threads, file descriptors)."""
    try:
        reaper = WatchedReaper()
    except OSError:
        return None
    stack.callback(reaper.close, 1.0)
    return reaper


def _progress(
    args: argparse.Namespace, reaper: WatchedReaper | None
) -> Progress:
    # JSON on the same terminal is for eyes as well: leave it alone.
    shown = not (args.json and Progress.on(sys.stdout))
    return Progress(
        reaper.reapings if reaper else [], sys.stderr if shown else None
    )


# ------------------------------------------------------------- plain pids


def _kill_pids(args: argparse.Namespace, pids: list[int]) -> int:
    _allow_files(len(pids))
    with contextlib.ExitStack() as stack:
        # First: it cannot do without file descriptors, a kill can.
        reaper = None if args.dry_run else _reaper(stack)
        pinned: list[tuple[int, Victim | OSError]] = []
        for pid, victim in _pin(pids):
            if isinstance(victim, Victim):
                stack.enter_context(victim)
            pinned.append((pid, victim))
        if args.dry_run:
            return _dry_run(args, pinned)
        with not_now():  # its thread keeps them back for good
            progress = stack.enter_context(_progress(args, reaper))
        return _kill_pinned(args, pinned, reaper, progress)


def _kill_pinned(
    args: argparse.Namespace,
    pinned: list[tuple[int, Victim | OSError]],
    reaper: WatchedReaper | None,
    progress: Progress,
) -> int:
    worst = 0
    left = list(pinned)
    victims = [v for _, v in pinned if isinstance(v, Victim)]
    reapings: dict[Victim, Reaping] = {}

    try:
        if reaper is not None:
            # If that has no file descriptors left: one by one.
            with contextlib.suppress(OSError):
                found = reaper.kill_many(
                    victims,
                    grace=args.grace,
                    timeout=args.timeout,
                    locks=args.locks,
                )
                reapings.update(zip(victims, found, strict=True))
        while left:
            pid, victim = left[0]
            if isinstance(victim, OSError):
                told = _told_of_error(pid, victim)
            else:
                told = _told_of_kill(args, victim, reapings.get(victim))
            del left[0]
            with progress.aside():
                worst = max(worst, told.tell(as_json=args.json))
    except Stopped as stop:
        if reaper is not None and not reapings:
            # It came before all had their turn: SIGKILL for the others.
            reaper.close(0)
        for pid, victim in left:
            if isinstance(victim, OSError):
                told = _told_of_error(pid, victim)
            else:
                told = _told_of_stop(victim, reapings.get(victim), args.locks)
            with progress.aside():
                told.tell(as_json=args.json, hurried=True)
        return stop.code
    return worst


def _told_of_kill(
    args: argparse.Namespace, victim: Victim, reaping: Reaping | None
) -> _Told:
    if reaping is not None:
        return _told_of_one(victim, reaping.result())
    try:
        release = victim.kill(
            grace=args.grace, timeout=args.timeout, locks=args.locks
        )
    except OSError as error:
        return _told_of_error(victim.pid, error)
    return _told_of_release(release)


def _told_of_one(victim: Victim, release: Release) -> _Told:
    """Say what became of a victim that was named by its pid."""
    if release.outcome not in (Outcome.GONE, Outcome.DENIED):
        return _told_of_release(release)
    why = release.errno or (
        ESRCH if release.outcome is Outcome.GONE else EPERM
    )
    error = refusal(victim.pid, why)
    assert isinstance(error, OSError)
    return _told_of_error(victim.pid, error)


# ------------------------------------------------------- trees and groups


def _find(
    args: argparse.Namespace,
    target: int | str,
    opened: dict[str, Cgroup],
    stack: contextlib.ExitStack,
) -> list[Victim]:
    """Pin what would be killed; who calls closes it.

    A cgroup is opened now: what the path means later is of no account.

    Raises what the kill would raise.
    """
    if isinstance(target, str):
        cgroup = opened[target] = Cgroup(target)
        stack.callback(cgroup.close)
        killing = find_cgroup(
            cgroup.again(), monotonic(), args.timeout, args.locks
        )
        with contextlib.closing(killing):
            return [Victim(victim) for victim in killing.victims]
    found = (
        find_tree(target, 1.0) if args.kind == "tree" else find_group(target)
    )
    with contextlib.closing(found):
        return [Victim(victim) for victim in found.victims]


def _kill_each(args: argparse.Namespace, targets: Sequence[int | str]) -> int:
    """Kill trees, process groups or control groups, one after the other."""
    worst = 0
    with contextlib.ExitStack() as stack:
        ready: list[tuple[int | str, list[Victim] | OSError]] = []
        opened: dict[str, Cgroup] = {}
        for target in targets:
            # All of them: what is wrong usage must come before any signal.
            try:
                found = _find(args, target, opened, stack)
            except OSError as error:
                ready.append((target, error))
                continue
            for victim in found:
                stack.enter_context(victim)
            ready.append((target, found))
        if args.dry_run:
            return _dry_run_each(args, ready)
        reaper = _reaper(stack)
        with not_now():
            progress = stack.enter_context(_progress(args, reaper))
        killed: set[object] = set()
        for turn, (target, victims) in enumerate(ready):
            if _had_its_turn(args, victims, killed):
                continue
            told: list[_Told] | None = None
            try:
                told = _kill_one(args, target, victims, opened, reaper)
                killed.update(each.document.get("pid") for each in told)
                while told:
                    each = told.pop(0)
                    with progress.aside():
                        worst = max(worst, each.tell(as_json=args.json))
            except Stopped as stop:
                if reaper is not None:
                    reaper.close(0)  # cuts the graces short
                with progress.aside():
                    for each in told or ():
                        each.tell(as_json=args.json, hurried=True)
                    if told is not None:
                        turn += 1  # noqa: PLW2901 - its turn is over
                    _tell_of_stop(args, ready[turn:], begun=told is None)
                return stop.code
    return worst


def _had_its_turn(
    args: argparse.Namespace,
    found: list[Victim] | OSError,
    killed: set[object],
) -> bool:
    """Whether it is a tree in another one, and was killed and told with it."""
    return (
        args.kind == "tree"
        and not isinstance(found, OSError)
        and found[0].pid in killed
        and found[0].exited
    )


def _kill_one(
    args: argparse.Namespace,
    target: int | str,
    victims: list[Victim] | OSError,
    opened: dict[str, Cgroup],
    reaper: WatchedReaper | None,
) -> list[_Told]:
    try:
        if isinstance(victims, OSError):
            raise victims
        return _kill_found(args, target, victims, opened, reaper)
    except OSError as error:
        return [_told_of_trouble(args.kind, target, error)]
    except ValueError as error:
        # It was good before: somebody changed it since.  That must not stop
        # the others.
        changed = OSError(EPERM, str(error))
        return [_told_of_trouble(args.kind, target, changed)]


def _kill_found(
    args: argparse.Namespace,
    target: int | str,
    victims: list[Victim],
    opened: dict[str, Cgroup],
    reaper: WatchedReaper | None,
) -> list[_Told]:
    if isinstance(target, str):
        result = kill_opened(
            opened[target].again(),
            monotonic(),
            args.timeout,
            args.locks,
            reaper,
        )
        told = (
            []
            if args.json
            else [_told_of_member(each) for each in result.releases]
        )
        return [*told, _told_of_cgroup(result)]
    if args.kind == "tree":
        releases = kill_tree(
            victims[0],  # the root, as it was found
            grace=args.grace,
            timeout=args.timeout,
            locks=args.locks,
            reaper=reaper,
        )
    else:
        if all(_mrelease.pidfd_state(each) == "reaped" for each in victims):
            # It has become empty, and the number may be another group's.
            raise ProcessLookupError(
                ESRCH, f"cannot kill process group {target}: it has ended"
            )
        releases = kill_group(
            target,
            grace=args.grace,
            timeout=args.timeout,
            locks=args.locks,
            reaper=reaper,
        )
    return [_told_of_member(release) for release in releases]


def _count_ended(victims: list[Victim], seconds: float = 0.5) -> int:
    """Count those that have ended; give them a moment to do so."""
    limit = monotonic() + seconds
    while not all(victim.exited for victim in victims):
        if monotonic() > limit:
            break
        sleep(0.001)
    return sum(victim.exited for victim in victims)


def _tell_of_stop(
    args: argparse.Namespace,
    left: list[tuple[int | str, list[Victim] | OSError]],
    *,
    begun: bool,
) -> None:
    """Say what a signal to this command meant for trees and groups."""
    for turn, (target, found) in enumerate(left):
        name = f"{args.kind} {printable(str(target))}"
        if isinstance(found, OSError):
            told = _told_of_trouble(args.kind, target, found)
        else:
            line = f"{name} was left alone: interrupted before its turn"
            if turn == 0 and begun:
                line = (
                    f"{name} interrupted: {_count_ended(found)} of the "
                    f"{len(found)} processes that were found have ended"
                )
            document: dict[str, object] = {args.kind: target, "error": line}
            told = _Told(0, line, document, error=True)
        told.tell(as_json=args.json, hurried=True)


def _dry_run_each(
    args: argparse.Namespace,
    ready: list[tuple[int | str, list[Victim] | OSError]],
) -> int:
    worst = 0
    for target, found in ready:
        if isinstance(found, OSError):
            told = _told_of_trouble(args.kind, target, found)
            told.document["dry_run"] = True
            worst = max(worst, told.tell(as_json=args.json))
        else:
            pinned: list[tuple[int, Victim | OSError]] = [
                (victim.pid, victim) for victim in found
            ]
            worst = max(worst, _dry_run(args, pinned))
    return worst


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


def _foresee(args: argparse.Namespace, victim: Victim, call: Feature) -> _Told:
    """Check all that a kill checks, and say what it would do."""
    pid = victim.pid
    may_signal(victim.fileno(), pid)
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
        may_signal(victim.fileno(), pid)  # was it still the victim?

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

        print(json.dumps(found.as_dict(), indent=2), flush=True)
    else:
        print(found, flush=True)
    return 0 if found else 1


def _demo(args: argparse.Namespace) -> int:
    from mrelease.demo import demo

    del args
    try:
        return demo()
    except Stopped:
        _tell("\ninterrupted; all that was started has ended", sys.stderr)
        raise


def _bench(args: argparse.Namespace) -> int:
    from mrelease.bench import Plan, bench

    parser: argparse.ArgumentParser = args.parser
    try:
        plan = Plan(
            args.kinds,
            args.methods,
            args.sizes,
            count=args.n,
            seed=args.seed,
            give_up=args.give_up,
            quick=args.quick,
        )
        return bench(plan, json_file=args.json, chart=args.chart)
    except ValueError as error:
        parser.error(f"{error}; nothing was started")
    except Stopped:
        _tell("\ninterrupted; all that was started has ended", sys.stderr)
        raise


# ------------------------------------------------------------ the parser


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _sizes(text: str) -> list[int]:
    found = []
    for word in _words(text):
        number, gib = word.removesuffix("G"), word.endswith("G")
        number = number.removesuffix("M")
        if not (number.isascii() and number.isdigit()):
            raise argparse.ArgumentTypeError(
                f"{word!r} is no size: 64, 64M and 1G are (MiB, MiB, GiB)"
            )
        found.append(int(number) << (30 if gib else 20))
    return found


def _pid(text: str) -> int:
    # int() takes more: "1_0", " 7", digits of other scripts.
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a pid")
    if len(text) > 4000:  # more digits than int() takes
        raise argparse.ArgumentTypeError(f"{text[:9]}... is not a pid")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds"
        ) from None


class _Parser(argparse.ArgumentParser):
    """One that shows arguments as they can be shown."""

    def error(self, message: str) -> NoReturn:
        # It repeats some as they are.
        if not message.isprintable():
            message = printable(message)
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
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
        "target",
        metavar="PID",
        nargs="+",
        help="a process; with the options below, a tree, a group, a path",
    )
    kinds = kill.add_mutually_exclusive_group()
    for kind, text in (
        ("tree", "each PID with all its descendants, late forks too"),
        ("group", "each PID is the number of a process group"),
        ("cgroup", "each PID is the path of a control group"),
    ):
        kinds.add_argument(
            f"--{kind}",
            action="store_const",
            dest="kind",
            const=kind,
            default="pid",
            help=text,
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
        help="a JSON document for each victim (of --cgroup, for each cgroup), "
        "one a line, on stdout, errors too",
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

    measure = commands.add_parser(
        "bench",
        help="compare ways to kill for kinds of victims: does it pay here?",
        description="Kill victims of many kinds in several ways, in an order "
        "by chance, and\ncompare how long it takes until the memory is back.",
        epilog=_BENCH_EPILOG,
        formatter_class=raw,
    )
    measure.add_argument(
        "--quick", action="store_true", help="few small ones, in a minute"
    )
    measure.add_argument(
        "--kinds", metavar="LIST", type=_words, help="of victims, with commas"
    )
    measure.add_argument(
        "--methods", metavar="LIST", type=_words, help="ways to kill"
    )
    measure.add_argument(
        "--sizes", metavar="LIST", type=_sizes,
        help="of a victim: MiB, or with M or G (default: 64M,1G; quick: 64M)",
    )  # fmt: skip
    measure.add_argument(
        "--n", type=int, metavar="N", help="kills of each (7; quick: 3)"
    )
    measure.add_argument(
        "--seed", type=int, help="of the order; printed in each run"
    )
    measure.add_argument(
        "--give-up", type=_seconds, metavar="S",
        help="memory that is not back then is never back (5; quick: 1)",
    )  # fmt: skip
    measure.add_argument("--json", metavar="FILE", help="write all values")
    measure.add_argument(
        "--chart", metavar="FILE",
        help="draw a chart (.svg, .png; needs mrelease[bench])",
    )  # fmt: skip
    measure.set_defaults(run=_bench, parser=measure)
    return parser


def _run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
    except BrokenPipeError:
        raise
    except OSError as error:
        if args.run is _kill:
            raise
        _silence(sys.stdout)
        _tell(f"mrelease: what was found cannot be told: {error}", sys.stderr)
        return 74  # EX_IOERR of sysexits.h
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code.

    Raises SystemExit for wrong usage (2), --help and --version (0).
    """
    try:
        with stoppable():
            args = _parser().parse_args(argv)
            return _run(args)
    except Stopped as stop:
        return stop.code
    except BrokenPipeError:
        # As the shell shows a program that SIGPIPE ended.
        _silence(sys.stdout)
        return 128 + signal.SIGPIPE
