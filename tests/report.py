"""The last figures of what proves something, as JSON for the docs.

    python tests/report.py TARGET [NAME=VALUE...]

A flat object of names to numbers and strings, in the file that --json names,
and in TARGET.json in the folder that $MRELEASE_REPORT names.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there, too"
    )


def write(
    name: str,
    figures: Mapping[str, object],
    file: str | os.PathLike[str] | None = None,
) -> None:
    """Write the figures; those of other names that are there stay."""
    paths = [] if file is None else [Path(file)]
    folder = os.environ.get("MRELEASE_REPORT")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths.append(Path(folder, f"{name}.json"))
    head = {
        "target": name,
        "date": time.strftime("%Y-%m-%d"),
        "kernel": platform.release(),
    }
    for path in paths:
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(
            json.dumps(before | head | dict(figures), indent=2) + "\n"
        )


def main() -> None:
    target, *pairs = sys.argv[1:]
    figures: dict[str, float | str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        figures[name] = int(value) if value.isdecimal() else value
    write(target, figures)


if __name__ == "__main__":
    main()
