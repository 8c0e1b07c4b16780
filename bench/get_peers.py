"""Fetch the programs that peers.py compares with: Debian's packages.

    python bench/get_peers.py [--cache FOLDER] [--update]

They are unpacked into the cache, with the libraries and the ld.so of their
own suite, by which they are run: nothing is installed, and the machine's own
libraries may be older. Prints what it has, or why not. Needs apt and dpkg.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from debian import Suite, Unreachable, by_number


class Source(NamedTuple):
    package: str
    suites: tuple[str, ...]
    """The first that has what is needed is taken."""
    program: str
    needed: str = ""
    """What must be in its help."""
    script: bool = False
    """For Python: it needs no libraries."""


SOURCES = {
    # Since 4.0.5.
    "pkill": Source(
        "procps", ("sid", "testing"), "usr/bin/pkill", "--mrelease"
    ),
    "earlyoom": Source("earlyoom", ("trixie",), "usr/bin/earlyoom"),
    "nohang": Source(
        "nohang", ("trixie",), "usr/sbin/nohang", script=True
    ),
}  # fmt: skip


class Peer(NamedTuple):
    name: str
    argv: list[str]
    """How it is run."""
    said: str
    """Its package, version and suite."""
    tree: Path
    """What its package has; its paths begin there."""
    nice: int
    """What its systemd unit gives it."""


def default_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache, "mrelease-peers").expanduser()


def _libraries(apt: Suite, package: str) -> list[str]:
    """The packages of libraries that it needs."""
    found: list[str] = []
    left = [package]
    while left:
        for line in apt.cache("depends", left.pop()).splitlines():
            match = re.fullmatch(r" *\|?(?:Pre)?Depends: (lib\S+)", line)
            if match and match[1] not in found:
                found.append(match[1])
                left.append(match[1])
    return found


def _fetch(home: Path, source: Source, suite: str) -> None:
    """Put the suite's package, unpacked, into home/VERSION."""
    architecture = subprocess.check_output(
        ["dpkg", "--print-architecture"], text=True
    ).strip()
    apt = Suite(home, suite, architecture=architecture)
    apt.update()
    names = [source.package]
    if not source.script:
        names += _libraries(apt, source.package)
    with tempfile.TemporaryDirectory(dir=home) as name:
        work = Path(name)
        if not apt.unpack(names, work, work / "tree"):
            raise Unreachable(
                f"{source.package} of {suite} could not be downloaded"
            )
        (package,) = work.glob(f"{source.package}_*.deb")
        version = subprocess.check_output(
            ["dpkg-deb", "-f", package, "Version"], text=True
        ).strip()
        (work / "tree" / "suite").write_text(f"{version}, Debian {suite}")
        # An epoch's colon would end a --library-path.
        final = home / version.rpartition(":")[2]
        if final.exists():
            shutil.rmtree(final)
        (work / "tree").rename(final)


def _command(source: Source, tree: Path) -> list[str]:
    program = str(tree / source.program)
    if source.script:
        # Debian's own Python, where there is one, as its first line says.
        python = shutil.which("python3", path="/usr/bin:/bin")
        return [python or sys.executable, program]
    loaders = [
        path
        for path in sorted(tree.glob("**/ld-linux*.so.*"))
        if path.is_file() and not path.is_symlink()
    ]
    if not loaders:
        raise Unreachable(f"there is no ld.so in {tree}")
    folders = dict.fromkeys(
        str(path.parent) for path in sorted(tree.glob("**/lib*.so.*"))
    )
    return [str(loaders[0]), "--library-path", ":".join(folders), program]


def _ask(argv: list[str]) -> str:
    """Its help: so it runs."""
    done = subprocess.run(
        [*argv, "--help"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    if done.returncode != 0:
        raise Unreachable(f"it does not run: {done.stdout.strip()}")
    return done.stdout


def _peer(name: str, tree: Path) -> Peer:
    source = SOURCES[name]
    argv = _command(source, tree)
    said = _ask(argv)
    if source.needed not in said:
        raise Unreachable(f"{name} has no {source.needed}: {said}")
    nice = 0
    for unit in tree.glob(f"usr/lib/systemd/system/{name}.service"):
        found = re.search(r"(?m)^Nice=(-?\d+)", unit.read_text())
        nice = int(found[1]) if found else 0
    origin = (tree / "suite").read_text()
    return Peer(name, argv, f"{source.package} {origin}", tree, nice)


def get(name: str, cache: Path, update: bool = False) -> Peer:
    """A peer by its name in SOURCES; Unreachable tells why not."""
    source = SOURCES[name]
    whys = []
    for suite in source.suites:
        home = cache / f"{name}-{suite}"
        try:
            home.mkdir(parents=True, exist_ok=True)
            with open(home / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if update or not list(home.glob("*/suite")):
                    _fetch(home, source, suite)
            newest = max(
                home.glob("*/suite"), key=lambda path: by_number(str(path))
            ).parent
            return _peer(name, newest)
        except (
            Unreachable, OSError, subprocess.SubprocessError
        ) as error:  # fmt: skip
            whys.append(f"{suite}: {error}")
    raise Unreachable("; ".join(whys))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument(
        "--update", action="store_true", help="look for newer ones"
    )
    args = parser.parse_args()
    missing = 0
    for name in SOURCES:
        try:
            print(f"{name}: {get(name, args.cache, args.update).said}")
        except Unreachable as why:
            missing += 1
            print(f"{name}: {why}")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
