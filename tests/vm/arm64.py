"""What a machine of another architecture, aarch64, needs to run the tests.

All is Debian's: a tree with Python, its libraries and the tools of the tests,
unpacked and not installed. mrelease itself is cross-built here into a wheel
(Debian's gcc-aarch64-linux-gnu, for the stable ABI), and with what else the
tests need unpacked as pip would. Only what is compiled is different from the
other machines: the tests are the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from debian import Suite, Unreachable

SUITE = "trixie"
PYTHON = "/usr/bin/python3.13"
COMPILER = "aarch64-linux-gnu-gcc"

PACKAGES = (
    *("python3.13", "busybox-static", "e2fsprogs", "mount", "util-linux"),
    *("dash", "libc-bin", "libgcc-s1", "libseccomp2"),
)
HEADERS = "libpython3.13-dev"
"""Python's alone: the compiler has the C library's of its own."""
UNUSED = (
    *("usr/share/doc", "usr/share/locale", "usr/share/man"),
    *("usr/lib/python3.13/config-3.13-aarch64-linux-gnu", "usr/lib/systemd"),
)


class Missing(Exception):
    """Something is not installed here; the text says what."""


def compiler() -> str:
    found = shutil.which(COMPILER)
    if found is None:
        raise Missing(
            f"{COMPILER} is missing; apt-get install --no-install-recommends"
            " gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
        )
    return found


def tree(home: Path) -> Path:
    """Give the unpacked Debian, fetched once."""
    done = home / "tree"
    if done.exists():
        return done
    archives = home / "archives"
    shutil.rmtree(archives, ignore_errors=True)
    (archives / "partial").mkdir(parents=True)
    apt = Suite(home, SUITE, architecture="arm64")
    print(f"looking for {SUITE}'s Python for aarch64", flush=True)
    apt.update()
    asked = ("--download-only", "--no-install-recommends", "-y")
    if not (
        apt.get("install", *asked, *PACKAGES)
        and apt.get("download", HEADERS, cwd=archives)
    ):
        raise Unreachable("Debian's packages for aarch64 can not be had")
    new = home / "tree.new"
    shutil.rmtree(new, ignore_errors=True)
    # Links to where everything lies today, which some packages rely on.
    for name in ("bin", "sbin", "lib"):
        (new / "usr" / name).mkdir(parents=True)
        (new / name).symlink_to(f"usr/{name}")
    for package in sorted(archives.glob("*.deb")):
        # dpkg-deb -x replaces a link by a folder; tar can be told not to.
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
        ) as unpacked:
            subprocess.run(
                ["tar", "-x", "--keep-directory-symlink", "-C", new],
                stdin=unpacked.stdout,
                check=True,
            )
    for name in UNUSED:
        shutil.rmtree(new / name, ignore_errors=True)
    shutil.rmtree(archives)
    shutil.rmtree(done, ignore_errors=True)
    new.rename(done)
    return done


def packages(home: Path, requirements: list[str]) -> Path:
    """Give a folder with what the tests import, for that Python."""
    folder = home / "packages"
    stamp = folder / "asked-for"
    wanted = "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    # fmt: off
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet",
            "--disable-pip-version-check", "--target", folder,
            "--only-binary", ":all:", "--python-version", "3.13",
            *(f"--platform=manylinux_2_{n}_aarch64" for n in (17, 28)),
            "--platform=manylinux2014_aarch64", *requirements,
        ],
        check=True,
    )
    # fmt: on
    stamp.write_text(wanted)
    return folder


def builder() -> str:
    """A Python that builds for the stable ABI, which 3.11 does not."""
    versions = Path(
        os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions"
    )
    for name in (
        sys.executable,
        *(shutil.which(f"python3.{n}") or "" for n in range(12, 16)),
        *map(str, sorted(versions.glob("3.1[2-9].*/bin/python3"))),
    ):
        test = "import ensurepip, sys; sys.exit(sys.version_info < (3, 12))"
        if (
            name
            and not subprocess.run(
                [name, "-c", test], stderr=subprocess.DEVNULL, check=False
            ).returncode
        ):
            return name
    raise Missing("the wheel for aarch64 is built by Python 3.12 or later")


def wheel(work: Path, root: Path, debian: Path) -> Path:
    """Cross-build the package as it is now; give the wheel."""
    source, built = work / "source", work / "wheels"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src"):
        origin = root / name
        if origin.is_dir():
            ignored = shutil.ignore_patterns("*.so", "*.egg-info")
            shutil.copytree(origin, source / name, ignore=ignored)
        else:
            shutil.copy(origin, source / name)
    gcc = compiler()
    headers = debian / "usr/include"
    environment = os.environ | {
        "CC": gcc,
        "LDSHARED": f"{gcc} -shared",
        # Debian's pyconfig.h includes the one of the architecture.
        "CFLAGS": f"-I{headers}/python3.13 -I{headers}",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }
    with tempfile.TemporaryDirectory(dir=work) as name:
        venv = Path(name)
        subprocess.run([builder(), "-m", "venv", venv], check=True)
        # fmt: off
        subprocess.run(
            [
                venv / "bin/python", "-m", "pip", "wheel", "--quiet",
                "--no-deps", "--disable-pip-version-check",
                "--wheel-dir", built, source,
            ],
            env=environment,
            check=True,
        )
        # fmt: on
    (made,) = built.glob("mrelease-*-abi3-linux_aarch64.whl")
    return made
