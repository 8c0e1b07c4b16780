"""Every figure in README and docs is one that was measured.

What stands between the marks is made from docs/figures.json; outside of them
there is no measured figure at all.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytestmark = pytest.mark.any_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import blocks  # noqa: E402
import charts  # noqa: E402
import figures as command  # noqa: E402
from mrelease import chart  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

# One is made of reports as a whole: test_promises.py.
DOCUMENTS = [
    path for path in blocks.documents(ROOT) if path.name != "promises.md"
]
UNIT = r"(?:%|ms|µs|us|ns|s|seconds?|times|x|KiB|MiB|GiB|kills)"
FIGURE = re.compile(rf"(?<![\w.])\d[\d.,]*(?:\d)?\s*{UNIT}(?![\w-])")

# Not measured: what is chosen, in the code or by the kernel, and where.
CONSTANTS = {
    "README.md": {
        "1.0 GiB": "an example of the form of a line",
        "14.4 ms": "an example of the form of a line",
        "0.02 ms": "an example of the form of a line",
        "15.1 ms": "an example of the form of a line",
        "5 seconds": "the example's grace",
    },
}  # fmt: skip
# What the code has, by file and name.
IN_CODE = {
    "0.3 ms": ("pool", "ARRIVE"),
    "0.05 ms": ("pool", "ARRIVE_LEAST"),
    "0.2 ms": ("pool", "PULLED"),
    "1 ms": ("pool", "LOOK"),
    "5 µs": ("pool", "LOOK_EACH"),
    "5 ms": ("pool", "UNRAISED"),
    "10 ms": ("pool", "STUCK"),
    "50 µs": ("reap", "END_OF_THREAD"),
    "160 KiB": ("reap", "WORTH_A_THREAD"),
    "1 MiB": ("reap", "WORTH_WAITING"),
}
UNITS = {
    "US": 1e-6, "µs": 1e-6, "MS": 1e-3, "ms": 1e-3,
    "<< 10": 1 << 10, "KiB": 1 << 10, "<< 20": 1 << 20, "MiB": 1 << 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command.FIGURES.read_text())
    return found


def outside(text: str) -> Iterator[str]:
    """What is not between marks, a line at a time."""
    yield from blocks.MARKED.sub("", text).splitlines()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_stands_between_marks_is_made_of_the_json(
    path: Path, figures: dict[str, Any]
) -> None:
    text = path.read_text()
    assert text.count("<!-- figures: ") == len(blocks.MARKED.findall(text))
    assert blocks.fill(text, figures) == text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_there_is_no_measured_figure_outside_of_the_marks(path: Path) -> None:
    known: set[str] = set(CONSTANTS.get(path.name, {}))
    if path.name == "never-late.md":
        known |= set(IN_CODE)
    found = [
        (figure, line)
        for line in outside(path.read_text())
        for figure in FIGURE.findall(line)
        if figure not in known
    ]
    assert not found, found


@pytest.mark.parametrize(("said", "where"), IN_CODE.items())
def test_what_the_docs_say_of_a_constant_is_what_the_code_has(
    said: str, where: tuple[str, str]
) -> None:
    file, name = where
    code = (ROOT / "src" / f"{file}.c").read_text()
    found = re.search(
        rf"^#define {name} \(?(?:INT64_C\((\d+)\) |(\d+) \* )?"
        r"(US|MS|<< 10|<< 20)\)?$",
        code,
        re.MULTILINE,
    )
    assert found is not None, name
    value = int(found[1] or found[2] or 1) * UNITS[found[3]]
    number, unit = said.split()
    assert float(number) * UNITS[unit] == pytest.approx(value)


def test_the_readme_has_figures() -> None:
    """Else the two tests above would not say anything."""
    inside = blocks.MARKED.findall((ROOT / "README.md").read_text())
    assert len(inside) >= 3
    assert sum(len(FIGURE.findall(body)) for _, _, body, _ in inside) > 20


def test_a_figure_that_was_changed_by_hand_is_seen(
    figures: dict[str, Any],
) -> None:
    text = (ROOT / "README.md").read_text()
    body = blocks.MARKED.search(text)
    assert body is not None
    number = re.search(r"\d(?= ms)", body[3])
    assert number is not None
    at = body.start(3) + number.start()
    changed = str((int(text[at]) + 1) % 10)
    forged = text[:at] + changed + text[at + 1 :]
    assert blocks.fill(forged, figures) != forged


def test_all_parts_are_there_with_their_command_and_conditions(
    figures: dict[str, Any],
) -> None:
    assert list(figures) == list(command.PARTS)
    for name, part in figures.items():
        assert part["command"].startswith(("make ", "mrelease ")), name
        assert part["conditions"]["cpus"] >= 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["date"])
        # A quick run is to try it, and is not to be quoted.
        assert "--quick" not in part["command"]


@pytest.mark.parametrize("name", charts.CHARTS)
def test_the_chart_is_of_these_figures_and_labelled(
    name: str, figures: dict[str, Any]
) -> None:
    text = (ROOT / "docs" / "charts" / f"{name}.svg").read_text()
    part = figures[charts.CHARTS[name][0]]
    assert charts.digest(part) in text
    words = " ".join(ET.fromstring(text).itertext())
    assert re.search(r", (ms|%)\s", words), "an axis with its unit"
    assert part["conditions"]["kernel"] in words
    assert f"{part['conditions']['cpus']} CPUs" in words
    assert "n = " in words
    assert str(part["conditions"]["seed"]) in words
    for colour in set(re.findall(r"#[0-9a-f]{6}\b", text)) - {"#ffffff"}:
        for paper in chart.PAPERS:
            assert chart.contrast(colour, paper) >= 3, colour


@pytest.mark.parametrize("name", charts.CHARTS)
def test_the_chart_stands_in_a_document(name: str) -> None:
    assert any(f"charts/{name}.svg" in path.read_text() for path in DOCUMENTS)


def test_a_json_has_neither_single_values_nor_what_is_no_number() -> None:
    found = command._short(
        {
            "rows": [
                {"median": float("inf"), "n": 3, "shots": [1], "x": 0.12345}
            ]
        }
    )
    assert found == {"rows": [{"median": None, "n": 3, "x": 0.1235}]}
    assert "Infinity" not in command.FIGURES.read_text()
    assert "NaN" not in command.FIGURES.read_text()
