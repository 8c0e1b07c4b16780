"""Show what it is worth: two starved processes killed, one with mrelease.

Each victim is a real process with a lot of touched private memory that hardly
gets to run: SCHED_IDLE and nice 19, beside two busy processes for each CPU.
That is how a process often stands when a machine is short of everything.  One
is sent SIGKILL alone, the other is killed by mrelease.kill(); measured is how
long it takes until the memory is back, by a memory cgroup of their own where
one can be made.

Nothing outlives the demo: all it starts ends with it, even if it is killed.
"""

from __future__ import annotations

import os
import shutil
import sys

from mrelease.footprint import in_units
from mrelease.killing import kill
from mrelease.meter import room
from mrelease.stage import (
    Impossible,
    Measure,
    Stage,
    check_support,
    kill_alone,
)
from mrelease.support import Support, support

_MIB = 1 << 20
_LARGEST = 1024 * _MIB
_SMALLEST = 16 * _MIB


# ------------------------------------------------------------- the words


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    ms = seconds * 1e3
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms"


def _times(ratio: float) -> str:
    """Give a ratio with the two digits that such a measurement is good for."""
    if ratio < 10:
        return f"{ratio:.1f}"
    step = 10 ** (len(str(int(ratio))) - 2)
    return str(round(ratio / step) * step)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError, AttributeError):
        return False
    return True


def bar(share: float, width: int, *, blocks: bool = True) -> str:
    """Draw a share of the whole as a bar; the least is still seen."""
    if not blocks:
        return "#" * round(share * width) or "|"
    eighths = max(1, round(share * width * 8))
    parts = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"]
    return "█" * (eighths // 8) + parts[eighths % 8]


def chart(
    rows: list[tuple[str, float | None]],
    give_up: float,
    width: int,
    *,
    blocks: bool = True,
) -> list[str]:
    """Draw labelled times as bars of one scale; None was given up.

    In a narrow terminal a bar stands below its label and time.
    """
    longest = max(give_up if t is None else t for _, t in rows)
    column = max(len(label) for label, _ in rows)
    lines = []
    for label, seconds in rows:
        share = (give_up if seconds is None else seconds) / longest
        text = (
            f"not yet (given up after {give_up:g} s)"
            if seconds is None
            else _duration(seconds)
        )
        # The longest text is that of a time given up.
        space = min(60, width - column - 39)
        if space >= 12:
            drawn = bar(share, space, blocks=blocks)
            lines.append(f"{label:{column}}  {drawn}  {text}")
        else:
            drawn = bar(share, max(1, width - 1), blocks=blocks)
            lines += [f"{label}: {text}", drawn]
    return lines


def verdict(
    alone: float | None, released: float | None, give_up: float
) -> str:
    """Compare the two times in one sentence."""
    if released is None:
        return "With mrelease the memory was not back either."
    ratio = (give_up if alone is None else alone) / max(released, 1e-6)
    if alone is None:
        return (
            "With mrelease the memory was back more than "
            f"{_times(ratio)} times as fast."
        )
    if ratio < 1:
        return (
            "With mrelease it took longer: this victim was not starved, or "
            "something else disturbed the measurement."
        )
    return f"With mrelease the memory was back {_times(ratio)} times as fast."


def _who(found: Support) -> str:
    raising = (
        f"a dying victim is raised ({found.raising.why})"
        if found.raising.works
        else "a dying victim cannot be raised (no CAP_SYS_NICE)"
    )
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    return f"Run as {who}: {raising}."


class _Unsaid(Exception):
    def __init__(self, error: OSError) -> None:
        self.error = error


def _say(*lines: str) -> None:
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        raise _Unsaid(error) from None


def _fitting() -> int:
    """Give the size of a victim: a quarter of the room, 1 GiB at most."""
    try:
        size = min(_LARGEST, room() // 4) // _SMALLEST * _SMALLEST
    except OSError as error:
        raise Impossible(f"free memory is not known: {error}") from None
    if size < _SMALLEST:
        raise Impossible("there is too little free memory for a victim")
    return size


def _precision(measures: list[Measure]) -> str:
    looks = sum(measure.watch.looks for measure in measures)
    gap = max(measure.watch.gap for measure in measures)
    return (
        f"Looked {looks} times, in a thread of {measures[0].watch.scheduling};"
        f"\nthe longest time between two looks was {_duration(gap)}."
    )


def _show(size: int, give_up: float) -> int:
    _say(
        f"Two processes, each with {in_units(size)} of private memory, are "
        "killed while they hardly",
        "get any CPU. How long until the memory is back?",
        "",
    )
    with Stage() as stage:
        _say(
            f"Linux {os.uname().release}, {stage.cpus} usable CPUs, "
            f"{stage.busy} busy processes.",
            _who(support()),
            f"Measured by: {stage.meter.name}; "
            f"back is when {1 - stage.meter.slack:.0%} of it is.",
        )
        if not stage.meter.exact:
            _say(
                "This is coarser: other processes count too. No memory cgroup "
                "of its own:",
                f"{stage.why_not_better}.",
            )
        _say("", f"First, SIGKILL alone (given up after {give_up:g} s) ...")
        alone = stage.measure("starved", size, kill_alone, give_up)
        _say(f"The victim was starved by: {alone.starved_by}.")
        _say("Second, mrelease.kill() ...")
        released = stage.measure("starved", size, kill, give_up)
        rows = [
            ("SIGKILL alone", alone.seconds),
            ("mrelease", released.seconds),
        ]
        width = shutil.get_terminal_size().columns
        _say(
            "",
            *chart(rows, give_up, width, blocks=_can_print("█▏▎▍▌▋▊▉")),
            "",
            verdict(alone.seconds, released.seconds, give_up),
            str(released.result),
            _precision([alone, released]),
        )
    return 0 if released.seconds is not None else 1


def demo(*, size: int | None = None, give_up: float = 15.0) -> int:
    """Show it in the terminal; give the exit code.

    size of a victim in bytes: what fits, 1 GiB at most, if it is None.
    give_up: seconds after which memory that is not back is called that.

    0 if the memory was back with mrelease, 1 if not or if it cannot be shown.
    Raises OSError when its output cannot be written (BrokenPipeError: nobody
    reads it); all is cleaned up then, as after any exception.
    """
    try:
        check_support()
        return _show(_fitting() if size is None else size, give_up)
    except _Unsaid as unsaid:
        raise unsaid.error from None
    except (Impossible, OSError) as error:
        print(f"mrelease demo cannot be shown: {error}", file=sys.stderr)
        return 1
