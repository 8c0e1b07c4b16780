"""How much memory a process holds, and how much of it a release can free."""

from __future__ import annotations

from mrelease.value import Value

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_units(size: int) -> str:
    """Give a size in bytes as people read it: 1073741824 is '1.0 GiB'."""
    number = float(size)
    for unit in _UNITS:
        # One decimal is shown: 1023.96 KiB would print as 1024.0 KiB.
        if number < 1023.95 or unit == _UNITS[-1]:
            break
        number /= 1024
    return f"{size} B" if unit == "B" else f"{number:.1f} {unit}"


class Footprint(Value):
    """The memory of a process, in bytes, from /proc/PID/status (proc(5)).

    anon     RssAnon: private anonymous memory, and written private copies
    file     RssFile: pages of mapped files, private or shared
    shmem    RssShmem: shared anonymous memory, memfd, tmpfs, System V
    swap     VmSwap: anonymous memory that is swapped out
    hugetlb  HugetlbPages: pages of a hugetlbfs

    Exact on Linux 6.18.  Older kernels count in batches and may be wrong by
    up to some 60 pages a thread or a CPU.
    """

    __slots__ = ("anon", "file", "shmem", "swap", "hugetlb")  # noqa: RUF023

    anon: int
    file: int
    shmem: int
    swap: int
    hugetlb: int

    def __init__(
        self, anon: int, file: int, shmem: int, swap: int, hugetlb: int
    ) -> None:
        self._set(anon, file, shmem, swap, hugetlb)

    @property
    def rss(self) -> int:
        """Resident memory in bytes: anon, file and shmem (VmRSS)."""
        return self.anon + self.file + self.shmem

    @property
    def releasable(self) -> int:
        """What process_mrelease(2) gives back, in bytes: anon and swap.

        An upper bound: pages that are still shared copy-on-write with a
        fork()ed relative are counted in both, and come back with the last.

        It unmaps private file mappings as well, but their pages are page
        cache, which the kernel counts as available already.  Shared memory
        and huge pages come back when the process has ended, and only if
        nobody else holds them.
        """
        return self.anon + self.swap

    def as_dict(self) -> dict[str, int]:
        """Give all sizes in bytes, ready for JSON."""
        return {
            "anon": self.anon,
            "file": self.file,
            "shmem": self.shmem,
            "swap": self.swap,
            "hugetlb": self.hugetlb,
            "rss": self.rss,
            "releasable": self.releasable,
        }

    def __str__(self) -> str:
        parts = [
            f"{in_units(size)} {name}"
            for name, size in (
                ("anon", self.anon),
                ("file", self.file),
                ("shmem", self.shmem),
                ("swap", self.swap),
                ("hugetlb", self.hugetlb),
            )
            if size
        ]
        return ", ".join(parts) or "no memory"
