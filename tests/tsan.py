"""What ThreadSanitizer has found: prints it, and fails if there is anything.

    python tests/tsan.py FOLDER
    python tests/tsan.py --race LIBRARY

FOLDER has a file found.PID of each process that had something to report. The
second one has two threads in the function bump() of a library at once, which
is a race: what does not report it would report none.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

import report

BEGIN = "WARNING: ThreadSanitizer"
LINE = "=" * 18


def race(library: str) -> None:
    bump = ctypes.CDLL(library).bump
    begin = threading.Barrier(2)

    def run() -> None:
        begin.wait()
        bump()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    if sys.argv[1] == "--race":
        race(sys.argv[2])
        return
    folder = Path(sys.argv[1])
    found = [
        part
        for path in sorted(folder.glob("found.*"))
        for part in path.read_text(errors="replace").split(LINE)
        if part.strip()
    ]
    # What does not begin so says that it could not go on.
    ours = [part for part in found if "mrelease" in part]
    for part in sorted(set(found)):
        print(part)
    print(
        f"ThreadSanitizer: {len(found)} findings, {len(ours)} of them with"
        " a function of mrelease"
    )
    figures = {"findings": len(found), "with_mrelease": len(ours)}
    report.write("tsan", {**figures, "python": "3.13t"})
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
