"""Get a Python of another version or kind, once, and print its path.

    python tests/get_python.py [--cache FOLDER] NAME

NAME is a version, and after it

    nothing  Debian's own program, unpacked with the libraries and the ld.so
             of its suite, and made to use these
    t        free-threaded: --disable-gil
    t-tsan   the same, compiled by clang with ThreadSanitizer (-g -Og, so
             that its reports name lines); beside bin there is CPython's own
             list of what it has to report of itself, suppressions.txt
    d        --with-pydebug: it counts all references, and checks itself

The last three are built from Debian's source package, without Debian's
patches. All stay in the cache; nothing is installed in the system.

Needs: apt; to unpack also dpkg and patchelf; to build a C compiler, make,
and to be of use with pip the headers of zlib, OpenSSL and libffi. To build
takes some minutes on 2 CPUs.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from debian import Suite, Unreachable

# The first that has it is taken: a mirror may lack what is new.
SUITES = {
    "3.13": ("trixie",),
    "3.14": ("sid", "testing"),
    "3.15": ("sid", "testing"),
}


class Kind(NamedTuple):
    flags: str
    """Of the version, in the name of the program."""
    options: tuple[str, ...]
    sanitized: bool = False


KINDS = {
    "t": Kind("t", ("--disable-gil",)),
    "t-tsan": Kind("t", ("--disable-gil", "--with-thread-sanitizer"), True),
    "d": Kind("d", ("--with-pydebug",)),
}
NAMES = [version + kind for version in SUITES for kind in ("", *KINDS)]


# ------------------------------------------------------- unpack a package


def dependencies(apt: Suite, package: str) -> list[str]:
    """The package and all that it depends on, without what is virtual."""
    lines = apt.cache(
        "depends", "--recurse", "--no-recommends", "--no-suggests",
        "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances",
        package,
    ).splitlines()  # fmt: skip
    return [line for line in lines if line and line[0] not in " |<"]


def unpack(version: str, tree: Path, work: Path) -> None:
    """Debian's program; it finds its libraries however it is called."""
    for suite in SUITES[version]:
        apt = Suite(work / suite, suite)
        apt.update()
        names = dependencies(apt, f"python{version}")
        if apt.unpack(names, work / suite, tree):
            break
        shutil.rmtree(tree, ignore_errors=True)
    else:
        raise Unreachable(f"python{version} can not be downloaded")
    (libc,) = tree.glob("usr/lib/*/libc.so.6")
    (loader,) = libc.parent.glob("ld-linux-*.so.*")
    # DT_RPATH, not DT_RUNPATH: it is also for the libraries of its modules.
    command = ["patchelf", "--force-rpath", "--set-rpath", str(libc.parent)]
    command += ["--set-interpreter", str(loader)]
    program = tree / f"usr/bin/python{version}"
    subprocess.run([*command, program], check=True)


# ----------------------------------------------------- build from source


def download(version: str, folder: Path) -> Path:
    """Give the archive of the source, as released upstream."""
    package = f"python{version}"
    for suite in SUITES[version]:
        apt = Suite(folder / suite, suite, "deb-src")
        apt.update()
        if apt.get("source", "--download-only", package, cwd=folder):
            (archive,) = folder.glob("*.orig.tar.*[!c]")
            return archive
    raise Unreachable(f"the source of {package} can not be downloaded")


def fixed_addresses() -> list[str]:
    """For ThreadSanitizer, which may not start where they are too random."""
    command = ["setarch", "-R"]
    done = subprocess.run([*command, "true"], stderr=subprocess.DEVNULL)
    return command if done.returncode == 0 else []


def build(version: str, kind: Kind, prefix: Path, work: Path) -> None:
    with tarfile.open(download(version, work)) as archive:
        archive.extractall(work / "source", filter="tar")
    (source,) = (work / "source").iterdir()
    options = [f"--prefix={prefix}", "--disable-test-modules"]
    settings = dict(os.environ)
    before: list[str] = []
    if kind.sanitized:
        settings |= {"CC": "clang", "CXX": "clang++", "OPT": "-g -Og"}
        # What runs while it is built has races of its own.
        settings["TSAN_OPTIONS"] = "report_bugs=0"
        before = fixed_addresses()
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    log = prefix.with_name(f"{prefix.name}.log")
    print(f"building it takes minutes: {log}", file=sys.stderr)
    with open(log, "wb") as output:
        for command in (
            ["./configure", "-q", *options, *kind.options],
            ["make", "-s", jobs],
            ["make", "-s", "altinstall"],
        ):
            subprocess.run(
                [*before, *command],
                cwd=source,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
            )
    if kind.sanitized:
        shutil.copy(
            source / "Tools/tsan/suppressions_free_threading.txt",
            prefix / "suppressions.txt",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Gets a Python.")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser.add_argument(
        "--cache", type=Path, default=cache / "mrelease-python"
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME")
    asked = parser.parse_args()
    prefix = asked.cache.absolute() / asked.name
    prefix.parent.mkdir(parents=True, exist_ok=True)
    version = next(each for each in SUITES if asked.name.startswith(each))
    kind = KINDS.get(asked.name.removeprefix(version))
    # Others can be had at the same time.
    with open(f"{prefix}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # What was interrupted lacks it.
        done = prefix / "done"
        if not done.exists():
            shutil.rmtree(prefix, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=prefix.parent) as work:
                try:
                    if kind is None:
                        unpack(version, prefix, Path(work))
                    else:
                        build(version, kind, prefix, Path(work))
                except (
                    subprocess.CalledProcessError, FileNotFoundError,
                    Unreachable,
                ) as error:  # fmt: skip
                    sys.exit(f"tests/get_python.py: {error}")
            done.touch()
    if kind is None:
        print(prefix / f"usr/bin/python{version}")
    else:
        print(prefix / f"bin/python{version}{kind.flags}")


if __name__ == "__main__":
    main()
