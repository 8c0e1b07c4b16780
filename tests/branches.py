"""Which lines and branches of the C code have run, for `make coverage`.

    branches.py --objects FOLDER --list FILE COUNTED...

COUNTED are folders of .gcda files that counters.c wrote, one a program; their
counts are added up. FOLDER has the .gcno files of the same objects. gcov
names the branches, in its order: 0 is the first of a line. The code is C,
compiled without optimization and without exceptions, so nothing of what gcov
names is left out: each stands for a condition in the source, or a case.

FILE lists the branches that nothing can take here, with the reason:

    pool.c finish 2
    if (job->queued && job->reap.exited != 0) {
    Why this is so.

The file, the function and the branches; the text of the line; the reason, up
to an empty line. Behind the branches may stand: ``by timing``, for what is
taken or not as it happens.

Of the files in GATED each branch must be taken or listed, and each function
must run; what is listed must be there, and not be taken, but by timing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

GATED = ("reap.c", "locks.c", "pool.c")
ALSO = ("raise.c", "procfs.c", "scheduling.c", "harden.c", "probe.c",
        "child.c")  # fmt: skip


class Line(NamedTuple):
    file: str
    function: str
    number: int


class Counted:
    """What gcov says, added up over all programs."""

    def __init__(self) -> None:
        self.lines: dict[Line, int] = defaultdict(int)
        self.branches: dict[Line, list[int]] = {}
        self.functions: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, objects: Path, counts: Path) -> None:
        """Of one program."""
        with tempfile.TemporaryDirectory() as folder:
            for name in (*GATED, *ALSO):
                stem = name.removesuffix(".c")
                shutil.copy(objects / f"{stem}.gcno", folder)
                shutil.copy(counts / f"{stem}.gcda", folder)
                done = subprocess.run(
                    ["gcov", "--json-format", "--stdout",
                     "--branch-probabilities", f"{stem}.gcda"],
                    cwd=folder,
                    capture_output=True,
                    check=True,
                    text=True,
                )  # fmt: skip
                self._take(name, json.loads(done.stdout))

    def _take(self, name: str, found: dict[str, object]) -> None:
        files = found["files"]
        assert isinstance(files, list)
        for file in files:
            if Path(file["file"]).name != name:
                continue  # a header
            for function in file["functions"]:
                key = (name, function["name"])
                self.functions[key] += function["execution_count"]
            for line in file["lines"]:
                at = Line(name, line["function_name"], line["line_number"])
                self.lines[at] += line["count"]
                counts = [b["count"] for b in line["branches"]]
                before = self.branches.setdefault(at, [0] * len(counts))
                assert len(before) == len(counts), at
                for i, count in enumerate(counts):
                    before[i] += count


class Entry(NamedTuple):
    """Of the list."""

    where: int  # its line there
    file: str
    function: str
    branches: tuple[int, ...]
    by_timing: bool
    text: str
    reason: str


def read_list(path: Path) -> list[Entry]:
    entries: list[Entry] = []
    text = [line.rstrip() for line in path.read_text().splitlines()]
    at = 0
    while at < len(text):
        if not text[at] or text[at].startswith("#"):
            at += 1
            continue
        end = at
        while end < len(text) and text[end]:
            end += 1
        words = text[at].split()
        by_timing = words[-2:] == ["by", "timing"]
        numbers = words[2 : -2 if by_timing else None]
        if end - at < 3 or len(words) < 3 or not numbers:
            sys.exit(f"{path}:{at + 1}: not an entry")
        entries.append(
            Entry(at + 1, words[0], words[1], tuple(map(int, numbers)),
                  by_timing, text[at + 1].strip(),
                  " ".join(text[at + 2 : end]))
        )  # fmt: skip
        at = end
    return entries


def share(good: int, of: int) -> float:
    return 100.0 if of == 0 else int(1000 * good / of) / 10


class Gate:
    """Compares what was counted with the list."""

    def __init__(self, counted: Counted, source: Path) -> None:
        self.counted = counted
        self.text = {
            name: (source / name).read_text().splitlines()
            for name in (*GATED, *ALSO)
        }
        self.wrong: list[str] = []
        self.listed: dict[tuple[Line, int], Entry] = {}

    def text_of(self, line: Line) -> str:
        return self.text[line.file][line.number - 1].strip()

    def take(self, path: Path, entries: list[Entry]) -> None:
        """Find what is listed."""
        for entry in entries:
            at = [
                line
                for line, counts in self.counted.branches.items()
                if (line.file, line.function) == (entry.file, entry.function)
                and counts
                and self.text_of(line) == entry.text
            ]
            name = f"{path}:{entry.where}: {entry.file} {entry.function}"
            if len(at) != 1:
                self.wrong.append(f"{name}: {len(at)} such lines")
                continue
            for branch in entry.branches:
                counts = self.counted.branches[at[0]]
                if branch >= len(counts):
                    self.wrong.append(f"{name}: no branch {branch}")
                    continue
                self.listed[at[0], branch] = entry
                if counts[branch] and not entry.by_timing:
                    self.wrong.append(f"{name}: branch {branch} is taken")

    def check(self) -> None:
        for line, counts in sorted(self.counted.branches.items()):
            if line.file not in GATED:
                continue
            missing = [
                str(i)
                for i, count in enumerate(counts)
                if not count and (line, i) not in self.listed
            ]
            if missing:
                self.wrong.append(
                    f"src/{line.file}:{line.number}: {line.function}: not "
                    f"taken: {' '.join(missing)} of {len(counts)}: "
                    f"{self.text_of(line)}"
                )
        for (file, function), count in self.counted.functions.items():
            if file in GATED and count == 0:
                self.wrong.append(f"src/{file}: {function}() has not run")

    def table(self) -> dict[str, float]:
        """Print it; the figures by name."""
        figures: dict[str, float] = {}
        print(f"  {'':14} {'lines':>18} {'branches':>18}  listed (by timing)")
        for name in (*GATED, *ALSO):
            lines = [
                count > 0
                for line, count in self.counted.lines.items()
                if line.file == name
            ]
            counts = {
                (line, i): count
                for line, all_of in self.counted.branches.items()
                if line.file == name
                for i, count in enumerate(all_of)
            }
            taken = sum(count > 0 for count in counts.values())
            listed = [e for key, e in self.listed.items() if key in counts]
            timing = sum(entry.by_timing for entry in listed)
            print(
                f"  {name:14}"
                f" {share(sum(lines), len(lines)):7} % of {len(lines):4}"
                f" {share(taken, len(counts)):7} % of {len(counts):4}"
                f"  {len(listed):6} ({timing})"
            )
            figures |= {
                f"{name} lines": len(lines),
                f"{name} lines percent": share(sum(lines), len(lines)),
                f"{name} branches": len(counts),
                f"{name} branches percent": share(taken, len(counts)),
                f"{name} branches listed": len(listed),
                f"{name} branches by timing": timing,
            }
        return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=Path, required=True)
    parser.add_argument("--list", type=Path, required=True)
    parser.add_argument("counted", type=Path, nargs="+")
    args = parser.parse_args()

    counted = Counted()
    for folder in args.counted:
        counted.add(args.objects, folder)
    gate = Gate(counted, Path(__file__).parent.parent / "src")
    gate.take(args.list, read_list(args.list))
    gate.check()
    figures = gate.table()
    report = os.environ.get("MRELEASE_REPORT")
    if report:
        data = {
            "target": "coverage",
            "date": time.strftime("%Y-%m-%d"),
            "kernel": os.uname().release,
            **figures,
            "listed": len(gate.listed),
            "wrong": len(gate.wrong),
        }
        Path(report).mkdir(parents=True, exist_ok=True)
        (Path(report) / "coverage.json").write_text(
            json.dumps(data, indent=2) + "\n"
        )
    for line in gate.wrong:
        print(line)
    sys.exit(1 if gate.wrong else 0)


if __name__ == "__main__":
    main()
