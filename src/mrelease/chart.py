"""Charts of benchmarks, readable on light and on dark backgrounds.

    check("out.svg")                    # ValueError: no matplotlib, other name
    draw(report, "out.svg", "svg")      # of `mrelease bench --json`

The background is transparent, and each colour has a contrast of 4 to 1 (text)
or 3 to 1 (the rest) to white as well as to a dark page.  Needs matplotlib, the
extra mrelease[bench].
"""

from __future__ import annotations

import importlib.util
import math
import textwrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#7b7b7b"
"""Of text and axes."""
PAPERS = ("#ffffff", "#0d1117")
"""The lightest and the darkest page that it is made for."""
COLOURS = {
    "sigkill": "#8a8a8a",
    "call": "#c9730a",
    "kill": "#1285d6",
    "reaper": "#1a9c6b",
    "other": "#b765cf",
    "more": "#d65a5a",
    "third": "#8f8414",
}
_KINDS = ("svg", "png")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mrelease",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def check(path: str) -> None:
    """Raise ValueError with a sentence if a chart cannot be drawn there."""
    if path.rpartition(".")[2] not in _KINDS or "." not in path:
        raise ValueError(f"a chart is a .svg or a .png file, not {path!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "a chart needs matplotlib: pip install 'mrelease[bench]'"
        )


def contrast(one: str, other: str) -> float:
    """Give the contrast of two colours, 1 to 21, as WCAG 2.2 defines it."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def panels(
    rows: int,
    columns: int = 1,
    *,
    width: float = 8.0,
    heights: Sequence[float],
) -> tuple[Figure, list[Axes]]:
    """Make a figure with so many panels, its style set; sizes in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as MakeFigure

    mpl.rcParams.update(_STYLE)
    figure = MakeFigure(figsize=(width, sum(heights)), layout="constrained")
    made = figure.subplots(
        rows, columns, squeeze=False, height_ratios=list(heights)
    )
    return figure, list(made.flat)


def save(
    figure: Figure, path: str, kind: str, caption: str, source: str = ""
) -> None:
    """Write it with a caption, which stands below it.

    source: of what it was drawn, for the metadata of an SVG.
    """
    width = int(figure.get_figwidth() * 15)
    text = "\n".join(
        line
        for part in caption.split("\n")
        for line in textwrap.wrap(part, width)
    )
    figure.supxlabel(text, fontsize=8, x=0.01, ha="left")
    metadata: dict[str, Any] = {}
    if kind == "svg":
        metadata = {"Date": None, "Source": source or None}
    figure.savefig(
        path, format=kind, transparent=kind == "svg", dpi=150,
        metadata=metadata,
    )  # fmt: skip


Value = tuple[float, float, float, float]
"""Median, lower and upper quartile, and when it was given up, in ms.

Infinite is what was given up, nan what is not there."""


def value(row: dict[str, Any] | None, give_up: float) -> Value:
    """Take it from a row of a report, which is in seconds."""
    if row is None:
        return math.nan, math.nan, math.nan, give_up * 1e3
    low, high = (_ms(seconds) for seconds in row["quartiles"])
    return _ms(row["median"]), low, high, give_up * 1e3


def _ms(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds * 1e3


def bars(
    axes: Axes,
    labels: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[Value]]],
    *,
    unit: str = "ms",
) -> None:
    """Draw bars on a scale of powers of ten, one group a label.

    series: (name, colour, values)
    """
    height = 0.8 / len(series)
    known = [
        min(low, give_up) for _, _, values in series
        for _, low, _, give_up in values if low > 0
    ]  # fmt: skip
    least = 10 ** math.floor(math.log10(min(known, default=1.0) * 0.99))
    for at, (name, colour, values) in enumerate(series):
        for row, (median, low, high, give_up) in enumerate(values):
            y = row + (at - (len(series) - 1) / 2) * height
            if math.isnan(median):
                continue
            never = math.isinf(median)
            axes.barh(
                y, (give_up if never else median) - least, height * 0.9,
                left=least, color="none" if never else colour,
                edgecolor=colour, hatch="////" if never else None,
                linewidth=0.8, label=name if row == 0 else None,
            )  # fmt: skip
            text = f"not after {give_up:g} {unit}" if never else _short(median)
            end = give_up if never else min(high, give_up)
            if not never:
                # On the bar and beside it.
                axes.plot([low, median], [y, y], color="#ffffff", linewidth=1)
                axes.plot([median, end], [y, y], color=colour, linewidth=1)
            axes.annotate(
                text, (end, y), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7.5, color=INK,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(least, axes.dataLim.x1 * 4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _short(value: float) -> str:
    return (
        f"{value:.2g}" if value < 1
        else f"{value:.1f}" if value < 100
        else f"{value:.0f}"
    )  # fmt: skip


def draw(
    report: dict[str, Any], path: str, kind: str, source: str = ""
) -> None:
    """Draw the chart of a report: a panel a size, a group of bars a kind."""
    from matplotlib.patches import Patch

    from mrelease.bench import METHODS
    from mrelease.footprint import in_units
    from mrelease.stage import KINDS

    cells = [cell for cell in report["cells"] if cell["n"]]
    sizes = sorted({cell["size"] for cell in cells})
    methods = [m for m in METHODS if any(c["method"] == m for c in cells)]
    kinds = [k for k in KINDS if any(c["kind"] == k for c in cells)]
    each = 0.45 + (0.16 * len(methods) + 0.12) * len(kinds)
    figure, made = panels(
        len(sizes), heights=[each + 0.5] * len(sizes) if sizes else [1]
    )
    conditions = report["conditions"]
    give_up = conditions["give_up"]
    for axes, size in zip(made, sizes, strict=True):
        found = {(c["kind"], c["method"]): c for c in cells
                 if c["size"] == size}  # fmt: skip
        bars(
            axes, [KINDS[k].text for k in kinds],
            [(METHODS[m], COLOURS[m],
              [value(found.get((k, m)), give_up) for k in kinds])
             for m in methods],
        )  # fmt: skip
        axes.set_title(f"victims of {in_units(size)}", loc="left", fontsize=10)
        axes.set_xlabel("time until the memory is back, ms")
    figure.legend(
        handles=[Patch(color=COLOURS[m], label=METHODS[m]) for m in methods],
        loc="outside upper left", ncols=len(methods),
    )  # fmt: skip
    counts = [cell["n"] for cell in cells]
    save(figure, path, kind, (
        f"Medians, lines: quartiles; n = {min(counts)} to {max(counts)}, "
        f"seed {conditions['seed']}. Back: {conditions['back']:.0%}, by "
        f"{conditions['meter']}.\nLinux {conditions['kernel']}, "
        f"{conditions['cpus']} CPUs, huge pages: {conditions['huge_pages']}, "
        f"uid {conditions['user']}, mrelease {conditions['mrelease']}."
    ), source)  # fmt: skip
