"""Runs the fuzz targets, tests/native/fuzz_*.c: ``make fuzz``.

Each first replays its corpus, tests/native/corpus/NAME, and then makes up
inputs of its own until its time is over; as many targets as there are CPUs
run at once. What crashes, hangs or is not as a second source has it is a
finding: its input is kept in build/fuzz/findings, and

    build/fuzz/fuzz_NAME FILE

repeats it. Inputs that reached something new are kept in build/fuzz/corpus,
for the next run. --minimize puts the smallest set of them that reaches all
into the corpus of the repository.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import report

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent / "build" / "fuzz"
CORPUS = HERE / "native" / "corpus"
FINDINGS = BUILT / "findings"

LONGEST = {"status": 6000, "procfs": 1200, "locks": 300, "limits": 16}
"""Inputs of so many bytes at most."""
KEPT = {"status": 600}
"""And of so many in the corpus, what was put there by hand apart."""
TIME = {"limits": 0.5}
"""Shares of the time other than 1."""
NOT_HERE = 86
"""The exit code of a target that cannot be run here; libFuzzer's own of a
finding is 77."""

# Sanitizers of clang 14 do not start where addresses are very random.
_FIXED = (
    ["setarch", "-R"]
    if shutil.which("setarch")
    and subprocess.run(
        ["setarch", "-R", "true"], capture_output=True, check=False
    ).returncode
    == 0
    else []
)


def targets() -> list[str]:
    return sorted(
        file.stem.removeprefix("fuzz_")
        for file in (HERE / "native").glob("fuzz_*.c")
    )


class Ran(NamedTuple):
    """What came of one target."""

    executions: int
    seconds: float
    trouble: str | None  # a finding
    left_out: str | None  # why it cannot be run here


def run(target: str, seconds: float) -> Ran:
    grown = BUILT / "corpus" / target
    grown.mkdir(parents=True, exist_ok=True)
    FINDINGS.mkdir(exist_ok=True)
    argv = [
        *_FIXED, str(BUILT / f"fuzz_{target}"),
        str(grown), str(CORPUS / target),
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={LONGEST[target]}",
        "-entropic_scale_per_exec_time=1", "-print_final_stats=1",
        "-timeout=10", "-rss_limit_mb=1024",
        f"-artifact_prefix={FINDINGS}/{target}-",
    ]  # fmt: skip
    words = CORPUS / f"{target}.dict"
    if words.exists():
        argv.append(f"-dict={words}")
    log = BUILT / f"{target}.log"
    begun = time.monotonic()
    with log.open("wb") as file:
        popen = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            code = popen.wait(seconds * 3 + 120)
        except BaseException:
            popen.kill()
            popen.wait()
            raise
    took = time.monotonic() - begun
    text = log.read_text(errors="replace")
    found = re.search(
        r"^stat::number_of_executed_units: (\d+)", text, re.MULTILINE
    )
    executions = int(found[1]) if found else 0
    if code == NOT_HERE:
        return Ran(0, took, None, text.strip().splitlines()[-1])
    trouble = None if code == 0 and executions else _trouble(code, text)
    return Ran(executions, took, trouble, None)


def _trouble(code: int, text: str) -> str:
    """The part of a log that tells what was wrong."""
    lines = text.splitlines()
    telling = re.compile("not so|ERROR|runtime error|cannot be")
    first = next(
        (i for i, line in enumerate(lines) if telling.search(line)), -20
    )
    return "\n".join([f"exit code {code}", *lines[first:][:60]])


def minimize(target: str) -> None:
    """Put what reaches all that is reached into the repository."""
    kept = CORPUS / target
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*_FIXED, str(BUILT / f"fuzz_{target}"), "-set_cover_merge=1",
             f"-max_len={KEPT.get(target, LONGEST[target])}", folder,
             str(kept), str(BUILT / "corpus" / target)],
            check=True, capture_output=True,
        )  # fmt: skip
        for file in kept.iterdir():
            if re.fullmatch("[0-9a-f]{40}", file.name):
                file.unlink()
        by_hand = {file.read_bytes() for file in kept.iterdir()}
        for file in Path(folder).iterdir():
            if file.read_bytes() not in by_hand:
                shutil.copy(file, kept / file.name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the fuzz targets.")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="all together"
    )
    parser.add_argument(
        "--only", metavar="LIST", help="of targets, with commas"
    )
    parser.add_argument("--minimize", action="store_true", help="see above")
    report.add_argument(parser)
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else targets()
    if asked.minimize:
        for name in names:
            minimize(name)
        return 0
    cpus = len(os.sched_getaffinity(0))
    shares = {name: TIME.get(name, 1.0) for name in names}
    whole = asked.seconds * min(cpus, len(names)) / sum(shares.values())
    print(f"{', '.join(names)}: {asked.seconds:g} s, on {cpus} CPUs")
    with ThreadPoolExecutor(cpus) as threads:
        ran = dict(
            zip(
                names,
                threads.map(
                    lambda name: run(name, whole * shares[name]), names
                ),
                strict=True,
            )
        )
    total = sum(each.executions for each in ran.values())
    wrong = {name: each for name, each in ran.items() if each.trouble}
    for name, found in ran.items():
        speed = found.executions / found.seconds
        print(
            f"{name:<10} {found.executions:>12,} executions "
            f"{speed:>10,.0f} a second"
            + (f"   left out: {found.left_out}" if found.left_out else "")
            + ("   FINDING" if found.trouble else "")
        )
    print(f"{'in all':<10} {total:>12,} executions, {len(wrong)} findings")
    for name, found in wrong.items():
        print(f"\n{name}: {found.trouble}")
        for file in sorted(FINDINGS.glob(f"{name}-*")):
            print(f"its input: {file}")
    report.write(
        "fuzz",
        {
            "seconds": asked.seconds,
            "cpus": cpus,
            "executions": total,
            "findings": len(wrong),
        }
        | {f"executions_{n}": each.executions for n, each in ran.items()},
        asked.json,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
