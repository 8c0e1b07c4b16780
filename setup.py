"""Builds the extension, and archives that are the same wherever it is done.

Everything else stands in pyproject.toml.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import uuid
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

if sys.platform != "linux":
    sys.exit(
        "mrelease requires Linux: process_mrelease(2) is a Linux system "
        f"call, and this is {sys.platform}."
    )

SOURCES = ["_mrelease", "pool", "reap", "locks", "raise", "scheduling"]
SOURCES += ["procfs", "probe", "child", "harden"]

# The stable ABI from 3.12 on: a module built for 3.11's cannot be imported in
# a subinterpreter that has its own GIL.  Free-threaded Python has one from
# 3.15 on (PEP 803).
floor = 15 if sysconfig.get_config_var("Py_GIL_DISABLED") else 12
stable = sys.version_info >= (3, floor)

# MRELEASE_CFLAGS is for sanitizers, coverage, -g or -Werror; compiler and
# linker.  Without it the module is made small, since it is locked into memory
# where memory is short, and its time is the kernel's: no debug information, no
# symbols, no tables to unwind the stack (there is nothing that would), and the
# instructions as they come, which repeats more and packs better.
flags = ["-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-pthread"]
given = shlex.split(os.environ.get("MRELEASE_CFLAGS", ""))
small = ["-Os", "-g0", "-s", "-fno-asynchronous-unwind-tables"]
small += ["-fno-schedule-insns2"]
# Bound when it is loaded: nothing is looked up on the way of the first kill.
small += ["-fno-plt", "-Wl,-z,now"]
# Nor the folder that it was built in.
small += [f"-ffile-prefix-map={os.getcwd()}=."]
flags += ["-O2", *given] if given else small

# The date of all files in the archives, unless another one is given: the
# first that a wheel can have (https://reproducible-builds.org/specs/).
EPOCH = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800"))


def mode_of(path: Path) -> int:
    """Whatever the umask was."""
    return 0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644


def bill_of_materials(name: str, version: str) -> dict[str, object]:
    """What the wheel is made of: CycloneDX 1.6, for PEP 770."""
    purl = f"pkg:pypi/{name}@{version}"
    # The files of Python are in the wheel, and their digests in its RECORD.
    files = [
        {
            "type": "file",
            "name": str(path),
            "hashes": [
                {
                    "alg": "SHA-256",
                    "content": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
            ],
        }
        for path in sorted(Path("src").glob("*.[ch]"))
    ]
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    compiler = shlex.split(os.environ.get("CC", "")) or compiler
    said = subprocess.run(
        [compiler[0], "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    tools = [
        {"type": "application", "name": "setuptools",
         "version": setuptools.__version__},
        {"type": "application", "name": "compiler", "version": said},
        {"type": "platform", "name": "CPython",
         "version": sysconfig.get_python_version()},
    ]  # fmt: skip
    contents = json.dumps([files, tools])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, contents)}",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": tools},
            "component": {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": version,
                "purl": purl,
                "licenses": [{"license": {"id": "MIT"}}],
            },
        },
        "components": files,
        # It needs nothing but Python and the C library.
        "dependencies": [{"ref": purl, "dependsOn": []}],
        "compositions": [
            {"aggregate": "complete", "assemblies": [purl]},
        ],
    }


class Wheel(bdist_wheel):  # type: ignore[misc]
    """With a bill of materials, and the same bytes each time."""

    def write_wheelfile(self, wheelfile_base: str, *args: str) -> None:
        """The last step before all is packed."""
        super().write_wheelfile(wheelfile_base, *args)
        name = self.distribution.get_name()
        folder = Path(wheelfile_base) / "sboms"
        folder.mkdir(exist_ok=True)
        bill = bill_of_materials(name, self.distribution.get_version())
        (folder / f"{name}.cdx.json").write_text(
            json.dumps(bill, separators=(",", ":")) + "\n"
        )
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(mode_of(path))


class Source(sdist):  # type: ignore[misc]
    """The same bytes each time."""

    def make_archive(
        self, base_name: str, kind: str, *args: str, **options: str
    ) -> str:
        """Pack the folder that is named base_name."""
        if kind != "gztar":
            return str(super().make_archive(base_name, kind, *args, **options))
        archive = f"{base_name}.tar.gz"
        root = Path(options["base_dir"])
        with (
            open(archive, "wb") as file,
            gzip.GzipFile("", "wb", 9, file, mtime=EPOCH) as packed,
            tarfile.open(
                fileobj=packed, mode="w", format=tarfile.PAX_FORMAT
            ) as tar,
        ):
            for path in sorted([root, *root.rglob("*")]):
                entry = tar.gettarinfo(path)
                entry.mode = mode_of(path)
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = ""
                entry.mtime = EPOCH
                if path.is_file():
                    with path.open("rb") as content:
                        tar.addfile(entry, content)
                else:
                    tar.addfile(entry)
        return archive


setup(
    cmdclass={"bdist_wheel": Wheel, "sdist": Source},
    ext_modules=[
        Extension(
            "mrelease._mrelease",
            sources=[f"src/{name}.c" for name in SOURCES],
            define_macros=(
                [("Py_LIMITED_API", f"0x03{floor:02x}0000")] if stable else []
            ),
            py_limited_api=stable,
            extra_compile_args=flags,
            extra_link_args=flags,
        )
    ],
    options=(
        {"bdist_wheel": {"py_limited_api": f"cp3{floor}"}} if stable else {}
    ),
)
