"""Run the tests with the installed wheels on each interpreter: a table.

    python tests/interpreters.py FOLDER [--only NAME,...] [PYTEST ARGUMENT...]

FOLDER has a folder dist with the source distribution. From it the wheels are
built by 3.11 and, as the stable ABI, by 3.12; free-threaded ones build their
own. 3.11 to 3.13 are taken from the machine (or $PYTHON3_11 and so on), the
others from get_python.py, which unpacks or builds them once. Each gets an
environment of its own. Fails if a test failed; an interpreter that can not be
had is a line of the table, with the reason.

Needs a pip that knows --group (25.1) in the Python that runs this.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import get_python
import report

HERE = Path(__file__).parent
MACHINE = ("3.11", "3.12", "3.13")
NAMES = (*MACHINE, "3.13t", "3.13d", "3.14", "3.14t", "3.15", "3.15t")
# Some are not built for all of these; the tests do without.
EXTRAS = ("matplotlib>=3.9", "rich>=13")


Command = list[str | Path]


class Failed(Exception):
    """An interpreter can not be had, or not be used; the text says why."""


class Line(NamedTuple):
    name: str
    version: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: int = 0
    remark: str = ""


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def must(command: Command) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise Failed(last_line(done.stderr or done.stdout))
    return done.stdout


def find(name: str) -> str:
    """Give its program."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_machine = (
        os.environ.get("PYTHON" + name.replace(".", "_"), ""),
        shutil.which(f"python{name}") or "",
        *map(str, root.glob(f"versions/{name}.*/bin/python{name}")),
    )
    for program in on_machine if name in MACHINE else ():
        try:
            must([program, "-c", "import ensurepip"])
        except (Failed, OSError):
            continue
        return program
    if name not in get_python.NAMES:
        raise Failed("not on this machine")
    return last_line(must([sys.executable, HERE / "get_python.py", name]))


def environment(program: str, folder: Path) -> tuple[str, Command]:
    """Make one; its program, and how to call pip for it."""
    must([program, "-m", "venv", "--clear", "--without-pip", str(folder)])
    python = str(folder / "bin/python")
    # The pip of who runs this: Debian's own interpreters come without.
    return python, [sys.executable, "-m", "pip", "--python", python]


def build_wheels(folder: Path) -> None:
    dist = folder / "dist"
    (source,) = dist.glob("mrelease-*.tar.gz")
    for name in ("3.11", "3.12"):
        try:
            _, pip = environment(find(name), folder / f"build-{name}")
            must([*pip, "wheel", "-q", "--no-deps", "-w", str(dist), source])
        except Failed as error:
            print(f"    no wheel of {name}: {error}")


def install(program: str, folder: Path, dist: Path) -> str:
    """Make its environment with all that the tests need."""
    python, pip = environment(program, folder)
    # Not the newest of what it would have to build.
    must([*pip, "install", "-q", "--prefer-binary", "--group", "test-core"])
    for extra in EXTRAS:
        try:
            must([*pip, "install", "-q", "--only-binary", ":all:", extra])
        except Failed:
            print(f"    without {extra}")
    must([*pip, "install", "-q", "--no-deps", "setuptools>=84.2.1"])
    # The wheel that is for it, or else the source distribution.
    must([
        *pip, "install", "-q", "--no-index", "--no-deps",
        "--no-build-isolation", "--find-links", str(dist), "mrelease",
    ])  # fmt: skip
    return python


def count(path: Path) -> tuple[int, int, int]:
    """Read what pytest wrote for machines: passed, failed, skipped."""
    suite = ET.parse(path).getroot().find("testsuite")
    if suite is None:
        raise Failed("pytest told nothing")
    tests, failures, errors, skipped = (
        int(suite.get(key, "0"))
        for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return tests - failed - skipped, failed, skipped


def measure(name: str, folder: Path, dist: Path, args: list[str]) -> Line:
    version = "-"
    try:
        program = find(name)
        version = must([program, "-V"]).split()[1]
        python = install(program, folder, dist)
        gil = "t" in name
        where = must([python, "-c", "import mrelease; print(mrelease)"])
        if str(folder) not in where:
            raise Failed(f"not the wheel is tested: {where}")
        found = folder / "found.xml"
        begun = time.monotonic()
        done = subprocess.run(
            [python, "-X", "dev", "-m", "pytest", "-W", "error", "--quick",
             f"--junitxml={found}", *args],
            stdin=subprocess.DEVNULL,
            env=os.environ | ({"PYTHON_GIL": "0"} if gil else {}),
        )  # fmt: skip
        seconds = round(time.monotonic() - begun)
        if not found.exists():
            raise Failed(f"pytest ended with status {done.returncode}")
        return Line(name, version, *count(found), seconds)
    except Failed as error:
        return Line(name, version, remark=str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tests on interpreters.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","))
    asked, args = parser.parse_known_args()
    folder = asked.folder.absolute()
    print("== The wheels", flush=True)
    build_wheels(folder)
    lines = []
    for name in asked.only or NAMES:
        print(f"== Python {name}", flush=True)
        lines.append(measure(name, folder / name, folder / "dist", args))
    print(f"{'':8} {'version':10} {'passed':>6} {'failed':>6} {'skipped':>7}")
    figures: dict[str, int | float | str] = {}
    for line in lines:
        counts = f"{line.passed:6} {line.failed:6} {line.skipped:7}"
        if line.remark:
            counts = f"     - {line.remark}"
        print(f"{line.name:8} {line.version:10} {counts}")
        key = re.sub(r"\W", "_", line.name)
        figures[key] = line.remark or (
            f"{line.version}: {line.passed} passed, {line.failed} failed,"
            f" {line.skipped} skipped in {line.seconds} s"
        )
    report.write("interpreters", figures)
    sys.exit(any(line.failed for line in lines))


if __name__ == "__main__":
    main()
