"""Builds the C extension; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig

from setuptools import Extension, setup

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
# symbols, no tables to unwind the stack (there is nothing that would).
flags = ["-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-pthread"]
given = shlex.split(os.environ.get("MRELEASE_CFLAGS", ""))
small = ["-Os", "-g0", "-s", "-fno-asynchronous-unwind-tables"]
flags += ["-O2", *given] if given else small

setup(
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
