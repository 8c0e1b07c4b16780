"""Packages of any Debian suite, fetched by apt and installed nowhere.

apt checks what it fetches. It takes it from the mirror that this machine's
own apt uses for Debian (or $MRELEASE_VM_MIRROR), with lists of its own in a
folder, so that the system's are not touched.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Unreachable(Exception):
    """A package can not be had; the text says why."""


def mirror() -> str:
    """The address that apt here uses for Debian's own packages."""
    chosen = os.environ.get("MRELEASE_VM_MIRROR")
    if chosen:
        return chosen
    filters = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *filters]
    try:
        known = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False
        ).stdout.split()
    except FileNotFoundError:
        raise Unreachable("there is no apt here") from None
    if not known:
        raise Unreachable(
            "apt here knows no Debian mirror: run apt-get update,"
            " or set MRELEASE_VM_MIRROR"
        )
    return known[0]


def by_number(version: str) -> list[tuple[int, str]]:
    """Sort key: 6.12 is newer than 6.9."""
    parts = re.findall(r"(\d*)(\D*)", version)
    return [(int(digits or 0), rest) for digits, rest in parts]


class Suite:
    """One suite as apt sees it, with lists of its own in home.

    kind is 'deb', or 'deb-src' for source packages.
    """

    def __init__(
        self,
        home: Path,
        name: str,
        kind: str = "deb",
        architecture: str = "amd64",
    ) -> None:
        lists = home / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        source = home / "sources.list"
        source.write_text(f"{kind} {options}{mirror()} {name} main\n")
        settings = (
            f"Dir::Etc::sourcelist={source}",
            "Dir::Etc::sourceparts=-",
            f"Dir::State::lists={lists}",
            "Dir::State::status=/dev/null",
            f"Dir::Cache={home}",
            "Acquire::Languages=none",
            # An archived suite stands still.
            "Acquire::Check-Valid-Until=false",
            "APT::Sandbox::User=",
            f"APT::Architecture={architecture}",
            f"APT::Architectures={architecture}",
        )
        self._options = [
            word for setting in settings for word in ("-o", setting)
        ]

    def update(self) -> None:
        self.get("update", check=True)

    def get(
        self, *args: str, cwd: Path | None = None, check: bool = False
    ) -> bool:
        """Run apt-get; whether it succeeded."""
        done = subprocess.run(
            ["apt-get", *self._options, "-qq", *args], cwd=cwd, check=check
        )
        return done.returncode == 0

    def cache(self, *args: str) -> str:
        """What apt-cache says."""
        return subprocess.check_output(
            ["apt-cache", *self._options, *args], text=True
        )

    def unpack(self, names: list[str], work: Path, tree: Path) -> bool:
        """Download packages into work and unpack them; whether it could."""
        if not self.get("download", *names, cwd=work):
            return False
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, tree], check=True)
        return True
