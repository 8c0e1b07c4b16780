"""What valgrind has found: prints it, and fails if any of it is ours.

    python tests/valgrind.py FOLDER

FOLDER has a file PROGRAM.PID of each process, in valgrind's XML; of one that
was killed it has no end. Of the C driver everything counts. Of Python two
kinds count only with a function of the package's C files in the stack:

- memory that is lost: CPython does not give back all that it has at its end,
  and a child of fork() does not have the stacks of other threads, which is
  where the addresses were;
- values that are not initialized: CPython 3.11 looks at the first digit of a
  number that has none (maybe_small_long(), times 0), and what comes of it is
  reported wherever it goes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import report

ERROR = re.compile(r"<error>.*?</error>", re.DOTALL)
FRAME = re.compile(
    r"<fn>([^<]*)</fn>(?:\s*<dir>[^<]*</dir>)?"
    r"(?:\s*<file>([^<]*)</file>\s*<line>(\d+)</line>)?"
)
KIND = re.compile(r"<kind>([^<]*)</kind>")
WHAT = re.compile(r"<(?:what|text)>([^<]*)</")
OURS = {
    path.name for path in (Path(__file__).parent.parent / "src").glob("*.[ch]")
}


def main() -> None:
    processes, errors, own = 0, 0, 0
    for path in sorted(Path(sys.argv[1]).iterdir()):
        processes += 1
        for error in ERROR.findall(path.read_text(errors="replace")):
            errors += 1
            (kind,) = KIND.findall(error)[:1]
            frames = FRAME.findall(error)
            if (
                path.name.startswith("pytest.")
                and kind.startswith(("Leak_", "Uninit"))
                and not any(file in OURS for _, file, _ in frames)
            ):
                continue
            own += 1
            print(f"{path.name}: {kind}: {WHAT.findall(error)}")
            for function, file, line in frames:
                print(f"    {function} ({file}:{line})")
    if processes == 0:
        sys.exit("tests/valgrind.py: nothing ran under valgrind")
    print(
        f"valgrind: {own} findings in {processes} processes; CPython's own:"
        f" {errors - own}"
    )
    figures = {"findings": own, "processes": processes}
    report.write("valgrind", {**figures, "of_cpython": errors - own})
    sys.exit(own > 0)


if __name__ == "__main__":
    main()
