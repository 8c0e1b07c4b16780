"""What is promised, by which tests it is shown, and what they found last.

    python tests/promises.py FOLDER     take the reports in FOLDER, write
    python tests/promises.py            write again, after a change of words

FOLDER is what $MRELEASE_REPORT named when the targets ran: a report each, as
JSON. What is told of them stays in docs/promises.json, and docs/promises.md is
made of that alone; a test compares, and looks whether each test is there.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs/promises.json"
PAGE = ROOT / "docs/promises.md"

Reports = dict[str, Any]


class Promise(NamedTuple):
    """As in promises.toml."""

    text: str
    tests: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    found: str = ""


def parts() -> dict[str, list[Promise]]:
    text = (ROOT / "tests/promises.toml").read_text()
    return {
        part: [Promise(**promise) for promise in promises]
        for part, promises in tomllib.loads(text).items()
    }


def named(promise: Promise) -> list[str]:
    """The tests as pytest names them."""
    return [f"tests/{test}" for test in promise.tests]


def of_test(name: str, tests: dict[str, dict[str, int]]) -> dict[str, int]:
    """Add up what became of a file, or of a function with its parameters."""
    counts: dict[str, int] = {}
    for test, found in tests.items():
        if test == name or test.startswith(f"{name}::"):
            for word, count in found.items():
                counts[word] = counts.get(word, 0) + count
    return counts


def figures(promise: Promise, kept: Reports) -> str:
    told = []
    counts: dict[str, int] = {}
    for name in named(promise):
        for word, count in kept.get("test", {}).get(name, {}).items():
            counts[word] = counts.get(word, 0) + count
    told += [f"{count:,} {word}" for word, count in sorted(counts.items())]
    if promise.found:
        try:
            told.append(promise.found.format_map(kept))
        except KeyError:
            told.append("not run yet")
    return ", ".join(told) or "not run yet"


def page(kept: Reports) -> str:
    where = kept.get("conditions", {})
    lines = [
        "# What is promised, and how it is tested",
        "",
        "`make promises` wrote this, of the reports of the last runs.",
        "Tests are in `tests/`; where a file is named, all of it is meant.",
        "A test is skipped where the machine cannot do it; pytest says why.",
    ]
    if where:
        lines.append(
            f"The tests ran on {where['date']} with Python {where['python']} "
            f"on Linux {where['kernel']}."
        )
    for part, promises in parts().items():
        lines += ["", f"## {part}", "", "| promise | shown by | last found |"]
        lines += ["| --- | --- | --- |"]
        for promise in promises:
            shown = [f"`{name}`" for name in promise.tests]
            shown += [f"`make {target}`" for target in promise.targets]
            lines.append(
                f"| {promise.text} | {', '.join(shown)} "
                f"| {figures(promise, kept)} |"
            )
    if "vm" in kept:
        lines += ["", "## Every kernel", "", *machines(kept["vm"])]
    return "\n".join(lines) + "\n"


def machines(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    runs = list(dict.fromkeys((row["date"], row["pytest"]) for row in rows))
    lines = [
        "`make vm`: the installed wheel, in machines that are emulated, new",
        "each time. Of each machine, what its last run found:",
        "",
        "| kernel | architecture | user | passed | failed | skipped | run |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    reasons: dict[str, int] = {}
    for row in rows:
        run = runs.index((row["date"], row["pytest"])) + 1
        lines.append(
            f"| {row['kernel']} | {row['arch']} | {row['user']} "
            f"| {row['passed']:,} | {row['failed']:,} | {row['skipped']:,} "
            f"| {run} |"
        )
        for reason, count in row["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    lines += ["", "The runs, and what pytest was told:", ""]
    lines += [
        f"{number}. {date}: `{words}`"
        for number, (date, words) in enumerate(runs, 1)
    ]
    lines += ["", "Skipped, in all of these together, and why:", ""]
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        lines.append(f"- {count:,}: {re.sub('[|<>]', ' ', reason)}")
    return lines


def newest(before: dict[str, Any], now: dict[str, Any]) -> list[Any]:
    """Rows of machines that were not booted this time stay."""
    rows = {
        (*row["kernel"].split(".")[:2], row["arch"], row["user"]): {
            "date": run["date"],
            "pytest": run["pytest"],
            **row,
        }
        for run in (before, now)
        for row in run.get("rows", [])
    }
    return list(rows.values())


def collect(folder: Path, kept: Reports) -> Reports:
    """Take what the page tells of the reports in a folder."""
    kept = dict(kept)
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        name = report["target"]
        if name == "vm":
            report["rows"] = newest(kept.get("vm", {}), report)
        if name != "test":
            kept[name] = report
            continue
        kept["conditions"] = {
            key: report[key] for key in ("date", "kernel", "python")
        }
        kept["test"] = {
            name: of_test(name, report["tests"])
            for promises in parts().values()
            for promise in promises
            for name in named(promise)
        }
    return kept


def main(folders: list[str]) -> None:
    kept: Reports = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for folder in folders:
        kept = collect(Path(folder), kept)
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(json.loads(KEPT.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
