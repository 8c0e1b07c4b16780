"""The figures in README.md and docs/*.md: written between marks.

    <!-- figures: late-idle -->
    ...
    <!-- end of figures -->

What stands between the marks is made anew by `make figures`, and a test
compares it with docs/figures.json: no figure can be changed by hand.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from common import size_text
from mrelease.bench import METHODS, in_ms
from mrelease.footprint import in_units
from mrelease.stage import KINDS
from pressure import SWAPS, WAYS, circumstances, rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

Figures = dict[str, Any]
MARKED = re.compile(
    r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL
)


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(text: str, figures: Figures) -> str:
    """The text with all that is between marks made anew."""

    def block(found: re.Match[str]) -> str:
        return (
            found[1] + "\n".join(BLOCKS[found[2]](figures)) + "\n" + found[4]
        )

    return MARKED.sub(block, text)


def fill_all(figures: Figures, root: Path) -> Iterator[Path]:
    """Write the documents; gives those that have changed."""
    for path in documents(root):
        before = path.read_text()
        after = fill(before, figures)
        if after != before:
            path.write_text(after)
            yield path


# ----------------------------------------------------------------- words


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def conditions(part: dict[str, Any]) -> str:
    """How, when and on what a part was measured, as a sentence or two."""
    c = part["conditions"]
    kernel = c["kernel"].split("-")[0]
    pages = c.get("huge_pages")
    said = (
        f"`{part['command']}`, {part['date']}: Linux {kernel}, {c['cpus']} "
        "CPUs"
    )
    if pages:
        said += f", transparent huge pages: {pages}"
    if "seed" in c:
        said += f", seed {c['seed']}"
    return said + "."


def counts(rows: Sequence[dict[str, Any]]) -> str:
    found = {row["n"] for row in rows}
    least, most = min(found), max(found)
    return f"{least}" if least == most else f"{least} to {most}"


def percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"


def ms(seconds: float | None) -> str:
    return "never" if seconds is None else in_ms(seconds)


def spread(row: dict[str, Any] | None) -> str:
    """The median (quartiles) of a row in ms."""
    if row is None:
        return ""
    if row["median"] is None:
        return "never"
    low, high = row["quartiles"]
    return f"{ms(row['median'])} ({ms(low)}-{ms(high)})"


def picked(rows: Iterable[dict[str, Any]], **wanted: object) -> Any:  # noqa: ANN401 - a row
    """The one row that has these values; None if there is none."""
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    return None


def one_of(
    rows: Iterable[dict[str, Any]], kind: str, mib: int, way: str
) -> Any:  # noqa: ANN401 - a row
    """Of back.py or peers.py: munmap is the same for all kinds."""
    if way.startswith("unmap"):
        kind = "unmap"
    return picked(rows, kind=kind, mib=mib, way=way)


# ----------------------------------------------------------------- blocks


def demo(figures: Figures) -> Iterator[str]:
    part = figures["demo"]
    yield "```"
    yield from part["printed"]
    yield "```"


def bench(figures: Figures) -> Iterator[str]:
    part = figures["bench"]
    cells = [cell for cell in part["cells"] if cell["n"]]
    yield from table(
        ["victim", *METHODS.values()],
        [
            [f"{in_units(size)}, {kind.text}",
             *(spread(picked(cells, kind=name, size=size, method=method))
               for method in METHODS)]
            for size in dict.fromkeys(cell["size"] for cell in cells)
            for name, kind in KINDS.items()
            if picked(cells, kind=name, size=size)
        ],
    )  # fmt: skip
    yield ""
    yield (
        f"ms: median (quartiles) of {counts(cells)} kills; never: not within "
        f"{part['conditions']['give_up']:g} s. {conditions(part)}"
    )


def bench_verdict(figures: Figures) -> Iterator[str]:
    """The README's sentences."""
    part = figures["bench"]
    yield conditions(part)
    yield ""
    for line in part["verdict"]:
        yield f"- {line}"


LATE_KINDS = {
    "1": "1 thread asleep",
    "spin": "1 thread spinning",
    "8": "8 threads asleep",
    "64": "64 threads asleep",
    "512": "512 threads asleep",
}
LATE_WAYS = {
    "c": "C: two calls",
    "ctypes": "ctypes: two calls",
    "kill": "`kill()`",
    "reaper": '`Reaper(policy="none")`',
    "c-fifo": "C, `SCHED_FIFO`",
    "reaper-fifo": '`Reaper(policy="fifo")`',
}


def _late(part: dict[str, Any]) -> Iterator[str]:
    rows = part["rows"]
    ways = [w for w in LATE_WAYS if picked(rows, way=w)]
    yield from table(
        ["victim", "killed as", *(LATE_WAYS[way] for way in ways)],
        [
            [f"{LATE_KINDS[kind]}, {size_text(mib)}", user,
             *(percent(row["late"]) if row else "" for row in (
                 picked(rows, kind=kind, mib=mib, user=user, way=way)
                 for way in ways))]
            for kind in LATE_KINDS
            for mib in dict.fromkeys(row["mib"] for row in rows)
            for user in dict.fromkeys(row["user"] for row in rows)
            if picked(rows, kind=kind, mib=mib, user=user)
        ],
    )  # fmt: skip
    yield ""
    yield f"{counts(rows)} kills each. {conditions(part)}"


def late_summary(figures: Figures) -> Iterator[str]:
    """The README's sentence."""
    part = figures["late-idle"]
    rows = [row for row in part["rows"] if row["user"] == "nobody"]

    def most(way: str) -> str:
        return percent(max(r["late"] for r in rows if r["way"] == way))

    fifo = [r for r in part["rows"] if r["way"] == "reaper-fifo"]
    late = sum(round(r["late"] * r["n"]) for r in fifo)
    every = sum(r["n"] for r in fifo)
    yield (
        f"Of {counts(rows)} kills of each kind, up to {most('c')} came too "
        f"late with two system"
    )
    yield (
        f"calls in C and nothing between them, up to {most('ctypes')} by "
        f"ctypes, up to {most('kill')} by"
    )
    yield (
        f"`kill()`, and up to {most('reaper')} by a `Reaper` without "
        "privileges. With `SCHED_FIFO`"
    )
    yield (
        f'(`policy="auto"` takes it where it is allowed): {late} of {every:,}.'
    )


BACK_KINDS = {
    "asleep": "asleep",
    "spinning": "spinning",
    "8": "8 threads asleep",
    "64": "64 threads asleep",
    "starved": "starved (`SCHED_IDLE`)",
    "quota": "CPU quota 2 %",
    "d": "in D state",
    "frozen": "frozen (cgroup v1)",
    "shared": "shared memory",
}
BACK_WAYS = {
    "signal": "SIGKILL alone",
    "c": "C: two calls",
    "kill": "`kill()`",
    "reaper-auto": "`Reaper`",
    "unmap-1": "own `munmap`, 1 thread",
    "unmap-2": "2 threads",
}


def back(figures: Figures) -> Iterator[str]:
    part = figures["back"]
    rows = part["rows"]
    victims = dict.fromkeys(
        (row["kind"], row["mib"]) for row in rows if row["kind"] != "unmap"
    )

    yield from table(
        ["victim", *BACK_WAYS.values()],
        [
            [f"{size_text(mib)}, {BACK_KINDS[kind]}",
             *(spread(one_of(rows, kind, mib, way)) for way in BACK_WAYS)]
            for kind, mib in victims
        ],
    )  # fmt: skip
    yield ""
    yield (
        f"ms: median (quartiles) of {counts(rows)} kills. {conditions(part)}"
    )


LATENCY_STATES = {
    "alone": "alone",
    "threads": "8 busy Python threads in it",
    "load": "4 busy processes on 2 CPUs",
}
LATENCY_WAYS = {
    "thread": "thread and queue",
    "reaper": '`Reaper(policy="none")`',
    "reaper-auto": "`Reaper()`",
    "reaper-fifo": '`Reaper(policy="fifo")`',
}


def latency(figures: Figures) -> Iterator[str]:
    part = figures["latency"]
    rows = part["rows"]
    yield from table(
        ["killer", "as", "way", "p50, ms", "p99, ms", "too late"],
        [
            [text, row["user"], LATENCY_WAYS[way],
             ms(row["signalled"]["p50"]), ms(row["signalled"]["p99"]),
             percent(row["late"])]
            for state, text in LATENCY_STATES.items()
            for user in dict.fromkeys(row["user"] for row in rows)
            for way in LATENCY_WAYS
            if (row := picked(rows, state=state, user=user, way=way))
        ],
    )  # fmt: skip
    yield ""
    yield f"{counts(rows)} kills each. {conditions(part)}"


MANY_WAYS = {
    "signals": "`os.kill` for all",
    "kill": "`kill()` in turn",
    "kill-many": "`kill_many()`",
    "reaper": "`Reaper.kill_many()`",
}


def many(figures: Figures) -> Iterator[str]:
    part = figures["many"]
    rows = part["rows"]
    kinds = dict.fromkeys((r["victims"], r["mib"], r["cpus"]) for r in rows)
    yield from table(
        ["victims", "CPUs", *MANY_WAYS.values(), "`Reaper` to `os.kill`"],
        [
            [f"{count:,} of {size_text(mib)}", str(cpus),
             *(spread(of[way]) for way in MANY_WAYS),
             f"{of['reaper']['median'] / of['signals']['median']:.2f}"]
            for count, mib, cpus in kinds
            if (of := {way: picked(rows, victims=count, mib=mib, cpus=cpus,
                                   way=way) for way in MANY_WAYS})
        ],
    )  # fmt: skip
    yield ""
    yield (
        f"ms: median (quartiles) of {counts(rows)} rounds. {conditions(part)}"
    )


PEER_WAYS = {
    "os-kill": "os.kill, waitid",
    "nohang": "nohang",
    "earlyoom": "earlyoom",
    "pkill": "pkill -m",
    "thread": "thread and queue",
    "ctypes": "ctypes",
    "kill": "`kill()`",
    "reaper-auto": "`Reaper`",
    "unmap-1": "own munmap, 1 thread",
    "unmap-2": "2 threads",
}


def peers(figures: Figures) -> Iterator[str]:
    part = figures["peers"]
    rows = part["rows"]
    ways = [way for way in PEER_WAYS if picked(rows, way=way)]
    kinds = dict.fromkeys(
        (row["kind"], row["mib"]) for row in rows if row["kind"] != "unmap"
    )

    yield from table(
        ["victim", *(PEER_WAYS[way] for way in ways)],
        [
            [f"{size_text(mib)}, {BACK_KINDS[kind]}",
             *(spread(one_of(rows, kind, mib, way)) for way in ways)]
            for kind, mib in kinds
        ],
    )  # fmt: skip
    yield ""
    yield (
        f"ms from SIGKILL: median (quartiles) of {counts(rows)} kills. "
        f"{conditions(part)}"
    )
    late = []
    for way in ways:
        outcomes: dict[str, int] = {}
        for row in rows:
            if row["way"] == way:
                for name, count in row["outcomes"].items():
                    outcomes[name] = outcomes.get(name, 0) + count
        every = sum(outcomes.values())
        missed = sum(outcomes.get(name, 0) for name in ("exited", "exiting"))
        if every and outcomes.get("released"):
            late.append(f"{PEER_WAYS[way]} {percent(missed / every)}")
    yield ""
    yield f"Came too late, of all kills of all kinds: {', '.join(late)}."
    for way in ("pkill", "earlyoom", "nohang"):
        if picked(rows, way=way):
            yield f"{PEER_WAYS[way]}: {part['conditions'][way]}."


GROWTH_CURVES = {
    "size": "MiB, small pages",
    "thp": "MiB, transparent huge pages",
    "threads": "threads",
    "vmas": "mappings",
    "victims": "victims",
}
GROWTH_WAYS = {
    "signal": "SIGKILL alone",
    "kill": "`kill()`",
    "reaper-auto": "`Reaper`",
    "unmap-1": "own `munmap`, 1 thread",
}


def _points(part: dict[str, Any], curve: str, way: str) -> list[Any]:
    return sorted(
        (row for row in part["rows"] if row["kind"] == "point"
         and row["curve"] == curve and row["way"] == way),
        key=lambda row: row["point"],
    )  # fmt: skip


def growth(figures: Figures) -> Iterator[str]:
    part = figures["growth"]
    rows = []
    for curve, text in GROWTH_CURVES.items():
        for way, name in GROWTH_WAYS.items():
            fit = picked(part["rows"], kind="fit", curve=curve, way=way,
                         measure="back")  # fmt: skip
            points = _points(part, curve, way)
            if fit is None or not points:
                continue
            power, line = fit["power"], fit["line"]
            exponent = "flat"
            if power:
                exponent = f"{power['exponent']:.2f}"
                if power["error"] is not None:
                    exponent += f" ± {power['error']:.2f}"
            least, most = points[0], points[-1]
            rows.append([
                text, name, f"{least['point']:,} to {most['point']:,}",
                " to ".join(ms(row["medians"]["back"])
                            for row in (least, most)),
                exponent, ms(line["fixed"]), f"{line['each'] * 1e6:.3g}",
            ])  # fmt: skip
    yield from table(
        ["x", "way", "from, to", "memory back, ms", "k", "fixed, ms",
         "each more, µs"],
        rows,
    )  # fmt: skip
    yield ""
    points = [row for row in part["rows"] if row["kind"] == "point"]
    yield f"Medians of {counts(points)} kills. {conditions(part)}"


STEPS = ("before SIGKILL", "release", "then: memory back", "then: the end")


def growth_steps(figures: Figures) -> Iterator[str]:
    part = figures["growth"]
    rows = []
    for curve, text in GROWTH_CURVES.items():
        for way in ("signal", "kill", "reaper-auto"):
            points = _points(part, curve, way)
            if points and points[-1]["shares"]:
                last = points[-1]
                rows.append([
                    f"{last['point']:,} {text}", GROWTH_WAYS[way],
                    ms(last["medians"]["ended"]),
                    *(f"{share:.1%}" for share in last["shares"]),
                ])  # fmt: skip
    yield from table(["victim", "way", "to its end, ms", *STEPS], rows)


def growth_perf(figures: Figures) -> Iterator[str]:
    part = figures["growth"]
    rows = []
    for row in part["rows"]:
        if row["kind"] != "perf":
            continue
        every = sum(sum(each) for _, each in row["samples"])
        top = sorted(row["samples"], key=lambda s: -sum(s[1]))[:5]
        rows.append([
            f"{row['point']:,} {GROWTH_CURVES[row['curve']]}",
            ", ".join(
                f"`{name}` {sum(each) / every:.0%}" for name, each in top
            ),
        ])  # fmt: skip
    if rows:
        yield from table(
            ["killed by a `Reaper`", "shares of the samples"], rows
        )
        yield ""
    yield f"{part['conditions']['perf']}."


def worse(figures: Figures) -> Iterator[str]:
    """Where a median of ours is above that of SIGKILL alone."""
    found: list[list[str]] = []
    for name, part in (("bench", figures["bench"]["cells"]),):
        for cell in part:
            base = picked(part, kind=cell["kind"], size=cell["size"],
                          method="sigkill")  # fmt: skip
            _worse(
                found, name, METHODS[cell["method"]],
                f"{KINDS[cell['kind']].text}, {in_units(cell['size'])}",
                cell if cell["method"] in ("kill", "reaper") else None, base,
            )  # fmt: skip
    for name, ways in (("back", BACK_WAYS), ("peers", PEER_WAYS)):
        rows = figures[name]["rows"]
        for row in rows:
            base = picked(
                rows, kind=row["kind"], mib=row["mib"],
                way="signal" if name == "back" else "os-kill",
            )  # fmt: skip
            _worse(
                found, name, ways.get(row["way"], ""),
                f"{BACK_KINDS.get(row['kind'], '')}, {size_text(row['mib'])}",
                row if row["way"] in ("kill", "reaper-auto") else None, base,
            )  # fmt: skip
    rows = figures["many"]["rows"]
    for row in rows:
        of = {"victims": row["victims"], "mib": row["mib"],
              "cpus": row["cpus"]}  # fmt: skip
        _worse(
            found, "many", MANY_WAYS[row["way"]],
            f"{row['victims']:,} of {size_text(row['mib'])}, CPUs: "
            f"{row['cpus']}",
            row if row["way"] in ("kill-many", "reaper") else None,
            picked(rows, **of, way="signals"),
        )  # fmt: skip
    rows = [r for r in figures["growth"]["rows"] if r["kind"] == "point"]
    for row in rows:
        _worse(
            found, "growth", GROWTH_WAYS[row["way"]],
            f"{row['point']:,} {GROWTH_CURVES[row['curve']]}",
            row if row["way"] in ("kill", "reaper-auto") else None,
            picked(rows, curve=row["curve"], point=row["point"],
                   way="signal"),
        )  # fmt: skip
    if not found:
        yield "No median of ours was above that of SIGKILL alone."
        return
    yield (
        "All cases of all runs above in which a median of ours is above that "
        "of SIGKILL alone:"
    )
    yield ""
    yield from table(
        ["run", "victims", "way", "ms", "SIGKILL alone, ms", "ratio",
         "clear"],
        found,
    )  # fmt: skip
    yield ""
    yield "clear: the quartiles do not overlap."


def _worse(
    found: list[list[str]], name: str, way: str, what: str,
    row: dict[str, Any] | None, base: dict[str, Any] | None,
) -> None:  # fmt: skip
    if row is None or base is None or base["median"] is None:
        return
    median = row["median"]
    if median is not None and median <= base["median"]:
        return
    top = base["quartiles"][1]
    low = row["quartiles"][0]
    clear = top is not None and (low is None or low > top)
    ratio = "" if median is None else f"{median / base['median']:.2f}"
    found.append([
        name, what, way, spread(row), spread(base), ratio,
        "yes" if clear else "no",
    ])  # fmt: skip


def pressure(figures: Figures) -> Iterator[str]:
    part = figures["pressure"]
    yield f"`{part['command']}`, {part['date']}."
    for swap in SWAPS:
        yield ""
        yield circumstances(part, swap)
        yield ""
        yield from table(
            ["median / 99 % / slowest", *WAYS],
            rows(part, swap),
        )


BLOCKS: dict[str, Callable[[Figures], Iterable[str]]] = {
    "demo": demo,
    "bench": bench,
    "bench-verdict": bench_verdict,
    "late-summary": late_summary,
    "late-idle": lambda figures: _late(figures["late-idle"]),
    "late-big": lambda figures: _late(figures["late-big"]),
    "late-busy": lambda figures: _late(figures["late-busy"]),
    "back": back,
    "latency": latency,
    "many": many,
    "peers": peers,
    "growth": growth,
    "growth-steps": growth_steps,
    "growth-perf": growth_perf,
    "worse": worse,
    "pressure": pressure,
}
