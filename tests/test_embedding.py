"""Python inside another program, which ends it and begins it again.

The program is tests/native/embed.c, compiled here with what this Python says
of itself: skipped without a compiler, its headers or its library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mrelease
import victims

pytestmark = pytest.mark.any_kernel

SOURCE = Path(__file__).parent / "native/embed.c"


def variable(name: str) -> str:
    return str(sysconfig.get_config_var(name) or "")


def library() -> list[str]:
    """How to link with this Python: shared, else static."""
    folders = [variable("LIBDIR"), variable("LIBPL")]
    for folder in folders:
        shared = Path(folder) / variable("LDLIBRARY")
        if shared.suffix == ".so" and shared.exists():
            return [str(shared), f"-Wl,-rpath,{folder}"]
    for folder in folders:
        static = Path(folder) / variable("LIBRARY")
        if static.suffix == ".a" and static.exists():
            words = " ".join(
                map(variable, ("LINKFORSHARED", "LIBS", "SYSLIBS"))
            )
            return [str(static), *shlex.split(words)]
    pytest.skip(f"no {variable('LDLIBRARY')}, no {variable('LIBRARY')}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        pytest.skip(f"there is no {include}/Python.h")
    made = tmp_path_factory.mktemp("embed") / "embed"
    command = [compiler, "-std=c11", "-D_GNU_SOURCE", "-g", "-isystem"]
    command += [include, str(SOURCE), "-o", str(made), *library()]
    done = victims.compiled(*command)
    assert done.returncode == 0, done.stderr
    return made


def run(program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    # It is no virtual environment: it has to be told where all is.
    parent = str(Path(mrelease.__file__).parents[1])
    settings = {
        "PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}",
        "PYTHONPATH": parent,
    }
    return subprocess.run(
        [program, *args], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, env=os.environ | settings, timeout=240,
    )  # fmt: skip


def test_finalized_with_a_reaper_that_has_a_kill_pending_and_begun_again(
    program: Path,
) -> None:
    """No crash, no hang, and no victim, thread or descriptor is left."""
    done = run(program, "5")
    assert (done.stderr, done.returncode) == ("", 0)
    # The caller's, the watcher, two workers and a spare one.
    assert done.stdout.splitlines() == [
        *(f"round {i}: 5 threads" for i in range(1, 6)),
        "ok",
    ]
