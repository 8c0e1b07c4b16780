"""The charts of README.md and docs/*.md, drawn from docs/figures.json.

Each SVG says in its metadata of which figures it was drawn (a digest), so
that a test sees when it is not of those that are there.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from blocks import (
    BACK_KINDS,
    LATE_KINDS,
    PEER_WAYS,
    counts,
    one_of,
    percent,
    picked,
)
from common import size_text
from mrelease import chart
from mrelease.chart import COLOURS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Figures = dict[str, Any]


def digest(part: dict[str, Any]) -> str:
    """Of the figures of a part."""
    text = json.dumps(part, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def draw_all(figures: Figures, folder: Path) -> Iterator[Path]:
    """Draw those whose figures are there and have changed."""
    folder.mkdir(exist_ok=True)
    for name, (part, draw) in CHARTS.items():
        if part not in figures:
            continue
        path = folder / f"{name}.svg"
        source = digest(figures[part])
        if path.exists() and source in path.read_text():
            continue
        draw(figures[part], str(path), source)
        yield path


def plain(text: str) -> str:
    return text.replace("`", "")


def _caption(part: dict[str, Any], first: str) -> str:
    c = part["conditions"]
    return (
        f"{first} Linux {c['kernel']}, {c['cpus']} CPUs, transparent huge "
        f"pages: {c['huge_pages']}; seed {c['seed']}; {part['date']}, "
        f"{plain(part['command'])}."
    )


# ------------------------------------------------------------- too late


def late(part: dict[str, Any], path: str, source: str) -> None:
    ways = {
        "c": ("C, two calls", COLOURS["sigkill"]),
        "ctypes": ("ctypes, two calls", COLOURS["call"]),
        "kill": ("kill()", COLOURS["kill"]),
        "reaper": ('Reaper, policy "none"', COLOURS["reaper"]),
    }
    rows = [row for row in part["rows"] if row["user"] == "nobody"]
    figure, (axes,) = chart.panels(1, heights=[4.6])
    height = 0.8 / len(ways)
    for at, (way, (text, colour)) in enumerate(ways.items()):
        for row, kind in enumerate(LATE_KINDS):
            found = picked(rows, kind=kind, way=way)
            if found is None:
                continue
            y = row + (at - (len(ways) - 1) / 2) * height
            axes.barh(
                y, found["late"] * 100, height * 0.9, color=colour,
                label=text if row == 0 else None,
            )  # fmt: skip
            axes.annotate(
                percent(found["late"]), (found["late"] * 100, y),
                xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=7.5, color=chart.INK,
            )  # fmt: skip
    axes.set_yticks(range(len(LATE_KINDS)), list(LATE_KINDS.values()))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, axes.dataLim.x1 * 1.12)
    axes.set_xlabel("kills in which the release came too late, %")
    figure.legend(loc="outside upper left", ncols=len(ways))
    chart.save(figure, path, "svg", _caption(
        part, f"Victims of {size_text(rows[0]['mib'])}, idle machine, killed "
        f"as an ordinary user; n = {counts(rows)}.",
    ), source)  # fmt: skip


# ---------------------------------------------------------- memory back


def _of(row: dict[str, Any] | None) -> chart.Value:
    return chart.value(row, 0.0 if row is None else row["give_up"])


def back(part: dict[str, Any], path: str, source: str) -> None:
    ways = {
        "signal": ("SIGKILL alone", COLOURS["sigkill"]),
        "c": ("C, two calls", COLOURS["call"]),
        "kill": ("kill()", COLOURS["kill"]),
        "reaper-auto": ("Reaper", COLOURS["reaper"]),
        "unmap-1": ("own munmap, 1 thread", COLOURS["other"]),
    }
    rows = part["rows"]
    largest = max(row["mib"] for row in rows if row["kind"] == "starved")
    kinds = [
        kind for kind in BACK_KINDS
        if picked(rows, kind=kind, mib=largest) or kind == "shared"
    ]  # fmt: skip

    def of(kind: str, way: str) -> chart.Value:
        if kind == "shared":
            mib = max(r["mib"] for r in rows if r["kind"] == "shared")
        else:
            mib = largest
        return _of(one_of(rows, kind, mib, way))

    figure, (axes,) = chart.panels(1, heights=[0.9 * len(kinds) + 1])
    chart.bars(
        axes, [plain(BACK_KINDS[kind]) for kind in kinds],
        [(text, colour, [of(kind, way) for kind in kinds])
         for way, (text, colour) in ways.items()],
    )  # fmt: skip
    axes.set_xlabel("time until the memory is back, ms")
    figure.legend(loc="outside upper left", ncols=len(ways))
    chart.save(figure, path, "svg", _caption(
        part, f"Victims of {size_text(largest)} (shared memory: less); n = "
        f"{counts(rows)}; medians, lines: quartiles.",
    ), source)  # fmt: skip


# ---------------------------------------------------------------- peers


def peers(part: dict[str, Any], path: str, source: str) -> None:
    colours = {
        "os-kill": COLOURS["sigkill"], "nohang": COLOURS["more"],
        "earlyoom": COLOURS["other"], "pkill": COLOURS["call"],
        "ctypes": COLOURS["third"], "kill": COLOURS["kill"],
        "reaper-auto": COLOURS["reaper"],
    }  # fmt: skip
    rows = part["rows"]
    ways = [way for way in colours if picked(rows, way=way)]
    sizes = sorted({row["mib"] for row in rows})
    kinds = {
        mib: [k for k in BACK_KINDS if picked(rows, kind=k, mib=mib)]
        for mib in sizes
    }
    figure, made = chart.panels(
        len(sizes),
        heights=[0.5 + (0.13 * len(ways) + 0.12) * len(kinds[mib])
                 for mib in sizes],
    )  # fmt: skip
    for axes, mib in zip(made, sizes, strict=True):
        chart.bars(
            axes, [plain(BACK_KINDS[kind]) for kind in kinds[mib]],
            [(plain(PEER_WAYS[way]), colours[way],
              [_of(picked(rows, kind=kind, mib=mib, way=way))
               for kind in kinds[mib]]) for way in ways],
            )  # fmt: skip
        axes.set_title(f"victims of {size_text(mib)}", loc="left", fontsize=10)
        axes.set_xlabel("time from SIGKILL until the memory is back, ms")
    figure.legend(
        handles=[Patch(color=colours[way], label=plain(PEER_WAYS[way]))
                 for way in ways],
        loc="outside upper left", ncols=len(ways), fontsize=9,
    )  # fmt: skip
    chart.save(figure, path, "svg", _caption(
        part, f"n = {counts(rows)}; medians, lines: quartiles.",
    ), source)  # fmt: skip


# --------------------------------------------------------------- growth

GROWTH = {
    "size": "size, MiB (small pages)",
    "thp": "size, MiB (transparent huge pages)",
    "threads": "threads (of a victim of {held})",
    "vmas": "mappings (of a victim of {held})",
    "victims": "victims at once (of 10 MiB)",
}
GROWTH_WAYS = {
    "signal": ("SIGKILL alone", COLOURS["sigkill"], "o"),
    "kill": ("kill()", COLOURS["kill"], "s"),
    "reaper-auto": ("Reaper", COLOURS["reaper"], "^"),
    "unmap-1": ("own munmap, 1 thread", COLOURS["other"], "x"),
}


def growth(part: dict[str, Any], path: str, source: str) -> None:
    rows = part["rows"]
    curves = [c for c in GROWTH if picked(rows, kind="point", curve=c)]
    lines = (len(curves) + 1) // 2
    figure, made = chart.panels(lines, 2, width=9, heights=[3.3] * lines)
    for axes in made[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(made, curves, strict=False):
        _curve(axes, curve, rows)
    handles: dict[str, Artist] = {}
    for axes in made:
        for handle, text in zip(
            *axes.get_legend_handles_labels(), strict=True
        ):
            handles.setdefault(text, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=4,
    )
    points = [row for row in rows if row["kind"] == "point"]
    chart.save(figure, path, "svg", _caption(
        part, "Both scales are logarithmic. k: the fitted exponent, time ~ "
        f"x^k, where the fixed cost no longer rules. n = {counts(points)}, "
        "medians.",
    ), source)  # fmt: skip


def _curve(axes: Axes, curve: str, rows: Sequence[dict[str, Any]]) -> None:
    points = [r for r in rows if r["kind"] == "point" and r["curve"] == curve]
    exponents = []
    for way, (text, colour, mark) in GROWTH_WAYS.items():
        found = sorted(
            (row["x"], row["medians"]["back"] * 1e3) for row in points
            if row["way"] == way and row["medians"]["back"]
        )  # fmt: skip
        if not found:
            continue
        fit = picked(rows, kind="fit", curve=curve, way=way, measure="back")
        power = fit and fit["power"]
        axes.plot(
            [x for x, _ in found], [y for _, y in found], color=colour,
            marker=mark, markersize=4, linewidth=1.3, label=text,
        )  # fmt: skip
        exponents.append(f"k = {power['exponent']:.2f}" if power else "flat")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8, rotation=30)
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(
        handles=axes.lines, labels=exponents, fontsize=7.5, loc="upper left"
    )
    held = {r["held"] for r in points if curve in ("threads", "vmas")}
    text = GROWTH[curve]
    if held:
        text = text.format(held=size_text(round(min(held) / 2**20 / 64) * 64))
    axes.set_xlabel(text)
    axes.set_ylabel("memory back, ms")


CHARTS: dict[str, tuple[str, Callable[[dict[str, Any], str, str], None]]] = {
    "bench": (
        "bench", lambda part, path, source: chart.draw(
            part, path, "svg", source
        ),
    ),
    "late": ("late-idle", late),
    "back": ("back", back),
    "peers": ("peers", peers),
    "growth": ("growth", growth),
}  # fmt: skip
