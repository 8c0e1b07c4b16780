"""Kill a process and have its memory back at once.

    >>> import mrelease
    >>> print(mrelease.kill(4711))
    pid 4711 released: 1.0 GiB in 14.4 ms (signalled 0.02 ms, exited 15.1 ms)

The Linux system call process_mrelease(2) frees the memory of a process that is
being killed from the caller's thread, instead of waiting until the victim gets
to run.  kill() sends SIGKILL and makes that call as one native step, and tells
what became of the memory.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("mrelease requires Linux")

from mrelease._mrelease import process_mrelease
from mrelease.cgroup import CgroupRelease, kill_cgroup
from mrelease.footprint import Footprint
from mrelease.hardening import Hardening, harden
from mrelease.killing import kill, kill_many
from mrelease.reaper import Reaper, Reaping
from mrelease.release import Outcome, Release
from mrelease.scheduling import Scheduling
from mrelease.selection import kill_group, kill_tree
from mrelease.support import Feature, Support, support
from mrelease.victim import Victim

__version__ = "0.1.0"

__all__ = [
    "CgroupRelease",
    "Feature",
    "Footprint",
    "Hardening",
    "Outcome",
    "Reaper",
    "Reaping",
    "Release",
    "Scheduling",
    "Support",
    "Victim",
    "harden",
    "kill",
    "kill_cgroup",
    "kill_group",
    "kill_many",
    "kill_tree",
    "process_mrelease",
    "support",
]
