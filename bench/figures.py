"""All figures and charts of README and docs: `make figures`.

Runs the benchmarks one after the other, writes what they found to
docs/figures.json, draws the charts (charts.py), and writes the tables
between the marks of README.md and docs/*.md (blocks.py). A part can be
measured again alone: `make figures ARGS="--only late-idle,back"`. Without
measuring, from the JSON that is there: `ARGS=--draw`.

Every part has the command that prints it, its conditions and its date.
Single values are left out: `--json` of the command has them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import blocks
import charts
import mrelease

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIGURES = ROOT / "docs" / "figures.json"
SINGLE = ("shots", "found", "seconds")
"""Values of single kills."""


MADE = {"pressure": ROOT / "tests" / "pressure.py"}
"""Targets that are no benchmarks, with figures all the same."""


class Part(NamedTuple):
    target: str
    """Of the Makefile, or a command of mrelease."""
    args: str = ""
    quick: str = "--quick"


PARTS = {
    "demo": Part("demo", quick=""),
    "bench": Part("bench", "--n 5"),
    "late-idle": Part("bench-late", "--sizes 64 --load idle"),
    "late-big": Part(
        "bench-late", "--sizes 1024 --load idle --victims 1,8 --n 30 "
        "--ways c,kill,reaper,reaper-fifo",
    ),
    "late-busy": Part(
        "bench-late", "--sizes 64 --load busy --users root --n 100 "
        "--ways c,kill,reaper-fifo",
    ),
    "back": Part("bench-back", "--n 6 --no-watch-costs"),
    "latency": Part("bench-latency", "--n 300"),
    "many": Part("bench-many", "--n 7"),
    "peers": Part("bench-peers", "--n 3"),
    "growth": Part("bench-growth", "--n 3"),
    "pressure": Part("pressure", quick="--rounds 4 --block 2"),
}  # fmt: skip


def measure(part: Part, *, quick: bool) -> dict[str, Any]:
    """Run a part; what it found, without the values of single kills."""
    args = shlex.split(part.args)
    if quick:
        if "--n" in args:
            at = args.index("--n")
            del args[at : at + 2]
        args += shlex.split(part.quick)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        if part.target in MADE or part.target.startswith("bench-"):
            name = part.target.removeprefix("bench-")
            argv = [str(MADE.get(name, HERE / f"{name}.py"))]
            said = f"make {part.target}"
            if args:
                said += f' ARGS="{shlex.join(args)}"'
        else:
            argv = ["-m", "mrelease", part.target]
            said = shlex.join(["mrelease", part.target, *args])
        argv += args
        if part.target != "demo":
            argv += ["--json", str(file)]
        print(f"\n== {said}", flush=True)
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, *argv], stdout=subprocess.PIPE, text=True,
            cwd=ROOT, check=True,
        )  # fmt: skip
        print(done.stdout, flush=True)
        found: dict[str, Any] = {
            "command": said,
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "took": round(time.monotonic() - begun),
        }
        if part.target == "demo":
            found["conditions"] = {
                "kernel": f"{platform.release()} {platform.machine()}",
                "cpus": len(os.sched_getaffinity(0)),
                "mrelease": mrelease.__version__,
            }
            found["printed"] = done.stdout.splitlines()
            return found
        found |= json.loads(file.read_text())
    if part.target in MADE:  # a flat report
        found["conditions"] = {
            name: found.pop(name)
            for name in ("kernel", "cpus", "seed", "load", "host_cpus")
        }
    found.pop("benchmark", None)
    found["conditions"].get("options", {}).pop("json", None)  # gone by now
    short: dict[str, Any] = _short(found)
    return short


def _short(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Leave single values out; infinite is null; no more than 4 digits."""
    if isinstance(value, dict):
        return {
            key: _short(each) for key, each in value.items()
            if key not in SINGLE
        }  # fmt: skip
    if isinstance(value, list):
        return [_short(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def load() -> dict[str, Any]:
    """What was measured last; nothing if there is nothing."""
    if not FIGURES.exists():
        return {}
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--only", metavar="LIST", help=f"parts: {','.join(PARTS)}"
    )
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument(
        "--quick", action="store_true",
        help="few rounds of all: to try it, not to be quoted",
    )  # fmt: skip
    args = parser.parse_args()
    only = args.only.split(",") if args.only else list(PARTS)
    for name in only:
        if name not in PARTS:
            parser.error(f"{name!r} is not one of {', '.join(PARTS)}")
    figures = load()
    if not args.draw:
        for name in only:
            figures[name] = measure(PARTS[name], quick=args.quick)
            # After each: the whole takes long.
            FIGURES.write_text(
                json.dumps(
                    {n: figures[n] for n in PARTS if n in figures}, indent=1
                ) + "\n"
            )  # fmt: skip
    for path in charts.draw_all(figures, ROOT / "docs" / "charts"):
        print(f"drew {path.relative_to(ROOT)}")
    for path in blocks.fill_all(figures, ROOT):
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
