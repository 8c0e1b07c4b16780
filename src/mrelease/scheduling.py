"""How threads are scheduled, in words: sched(7)."""

from __future__ import annotations

from mrelease.value import Value

# By number: Python lacks some of these names where libc does (musl).
_POLICIES = {
    0: "SCHED_OTHER",
    1: "SCHED_FIFO",
    2: "SCHED_RR",
    3: "SCHED_BATCH",
    5: "SCHED_IDLE",
    6: "SCHED_DEADLINE",
    7: "SCHED_EXT",
}


def policy_name(number: int) -> str:
    """Give the kernel's name of a scheduling policy."""
    return _POLICIES.get(number, f"policy {number}")


class Scheduling(Value):
    """How the threads of a Reaper are scheduled: what was obtained.

    policy    'SCHED_FIFO', 'SCHED_OTHER', ... (sched(7))
    priority  of a real-time policy, else 0
    nice      of another policy, else 0
    cpus      the CPUs that they may use
    why       why it is no better, or empty
    """

    __slots__ = ("policy", "priority", "nice", "cpus", "why")  # noqa: RUF023

    policy: str
    priority: int
    nice: int
    cpus: tuple[int, ...]
    why: str

    def __init__(
        self,
        policy: str,
        priority: int,
        nice: int,
        cpus: tuple[int, ...],
        why: str = "",
    ) -> None:
        self._set(policy, priority, nice, cpus, why)

    def as_dict(self) -> dict[str, object]:
        """Give the fields, ready for JSON."""
        found = dict(zip(self.__slots__, self._fields(), strict=True))
        return found | {"cpus": list(self.cpus)}

    def __str__(self) -> str:
        level = self.priority or f"nice {self.nice}"
        cpus = ", ".join(map(str, self.cpus))
        line = f"{self.policy} {level} on CPUs {cpus}"
        return f"{line}: {self.why}" if self.why else line
