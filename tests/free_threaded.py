"""Build a free-threaded Python, once, and print the path of it.

    python tests/free_threaded.py [--cache FOLDER] [--threads-sanitized]

It is CPython 3.13 from Debian trixie's source package, without Debian's
patches, configured with --disable-gil. With --threads-sanitized it is
compiled by clang with ThreadSanitizer (-g -Og, so that its reports name
lines). It stays in the cache, and nothing is installed in the system.

Needs: apt, a C compiler, make, and to be of use with pip the headers of
zlib, OpenSSL and libffi. Takes some minutes on 2 CPUs.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from debian import Suite, Unreachable

SUITE = "trixie"
PACKAGE = "python3.13"


def download(home: Path, folder: Path) -> Path:
    """Give the archive of the source, as released upstream."""
    apt = Suite(home, SUITE, "deb-src")
    apt.update()
    apt.get("source", "--download-only", PACKAGE, cwd=folder, check=True)
    (archive,) = folder.glob("*.orig.tar.*[!c]")
    return archive


def build(home: Path, python: Path, sanitized: bool) -> None:
    with tempfile.TemporaryDirectory(dir=home) as name:
        work = Path(name)
        with tarfile.open(download(home, work)) as archive:
            archive.extractall(work, filter="tar")
        (source,) = (path for path in work.iterdir() if path.is_dir())
        prefix = python.parents[1]
        options = [f"--prefix={prefix}", "--disable-gil"]
        options += ["--disable-test-modules"]
        settings = dict(os.environ)
        if sanitized:
            options += ["--with-thread-sanitizer"]
            settings |= {"CC": "clang", "CXX": "clang++", "OPT": "-g -Og"}
            # What runs while it is built has races of its own.
            settings["TSAN_OPTIONS"] = "report_bugs=0"
        jobs = f"-j{len(os.sched_getaffinity(0))}"
        log = home / f"{prefix.name}.log"
        print(f"building it takes minutes: {log}", file=sys.stderr)
        with open(log, "wb") as output:
            for command in (
                ["./configure", "-q", *options],
                ["make", "-s", jobs],
                ["make", "-s", "altinstall"],
            ):
                subprocess.run(
                    command,
                    cwd=source,
                    env=settings,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds Python 3.13t.")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser.add_argument(
        "--cache", type=Path, default=cache / "mrelease-python"
    )
    parser.add_argument("--threads-sanitized", action="store_true")
    asked = parser.parse_args()
    home = asked.cache.absolute()
    home.mkdir(parents=True, exist_ok=True)
    name = "3.13t-tsan" if asked.threads_sanitized else "3.13t"
    python = home / name / "bin/python3.13t"
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # What was interrupted lacks it.
        done = home / name / "done"
        if not done.exists():
            try:
                build(home, python, asked.threads_sanitized)
            except (subprocess.CalledProcessError, Unreachable) as error:
                sys.exit(f"tests/free_threaded.py: {error}")
            done.touch()
    print(python)


if __name__ == "__main__":
    main()
