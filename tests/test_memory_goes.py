"""What is gone after a release, and what is still there, to the page.

The victims can not end: what is gone was released by the call, not by
their own exit. Footprint tells before the kill what will go; the status
of the victim and its memory cgroup tell after it what went.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import victims
from mrelease import Footprint, Outcome, Victim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cgroups import Meter
    from kill_ways import Kill

MIB = 1 << 20
PAGE = victims.PAGE


def footprint_of(victim: victims.Process) -> Footprint:
    """Read by the test itself, not by the package."""
    return Footprint(
        anon=victim.rss_anon(),
        file=victim.rss_file(),
        shmem=victim.rss_shmem(),
        swap=victim.vm_swap(),
        hugetlb=victim.hugetlb(),
    )


class Mapping(NamedTuple):
    name: str
    inode: int
    rss: int  # bytes
    shared: bool  # MAP_SHARED
    start: int
    size: int


def mappings(victim: victims.Process) -> list[Mapping]:
    """/proc/PID/smaps: the victim stands still, so it may be read."""
    found = []
    head: list[str] = []
    for line in Path(f"/proc/{victim.pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if " " in key or "-" in key:
            head = line.split(maxsplit=5)
        elif key == "Size":
            size = int(value.split()[0]) * 1024
        elif key == "Rss":
            rss = int(value.split()[0]) * 1024
            found.append(
                Mapping(
                    head[5] if len(head) > 5 else "",
                    int(head[4]),
                    rss,
                    head[1][3] == "s",
                    int(head[0].split("-")[0], 16),
                    size,
                )
            )
    return found


def resident(victim: victims.Process, name: str) -> int:
    """Bytes resident of all mappings of a file."""
    found = [m.rss for m in mappings(victim) if m.name == name]
    assert found, f"{name} is not mapped"
    return sum(found)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 4 * MIB)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other"
    path.write_bytes(b"y" * 6 * MIB)
    return path


# ------------------------------------------ held in PTRACE_EVENT_EXIT


@pytest.mark.needs("release")
def test_anonymous_memory_of_a_held_victim_is_gone(
    meter: Meter, kill: Kill
) -> None:
    with victims.held(64, groups=[meter]) as victim:
        before = meter.usage()
        assert before >= 64 * MIB
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert release.freed
        assert release.exited is None
        assert not victim.ended()
        assert victim.has_mm()
        assert victim.rss_anon() == 0
        assert victim.vm_swap() == 0
        # Not only by the counters of the victim.
        assert meter.usage() < 2 * MIB


@pytest.mark.needs("release")
def test_swapped_memory_of_a_held_victim_is_gone(
    meter: Meter, kill: Kill
) -> None:
    victims.use_swap()
    with victims.held(64, swap=True, groups=[meter]) as victim:
        swapped = victim.vm_swap()
        assert swapped >= 32 * MIB
        on_the_device = meter.swap_usage()
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert release.footprint is not None
        assert release.footprint.swap == swapped
        assert not victim.ended()
        assert victim.has_mm()
        assert victim.vm_swap() == 0
        assert victim.rss_anon() == 0
        if on_the_device:  # swap is accounted by cgroup
            assert on_the_device >= 32 * MIB
            assert meter.swap_usage() < MIB


@pytest.mark.needs("release")
def test_mlocked_memory_of_a_held_victim_is_gone(
    meter: Meter, kill: Kill
) -> None:
    with victims.held(16, mlock=True, groups=[meter]) as victim:
        assert victim.vm_locked() >= 16 * MIB
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert not victim.ended()
        assert victim.rss_anon() == 0
        assert meter.usage() < 2 * MIB


@pytest.mark.needs("release")
def test_memory_in_many_mappings_of_a_held_victim_is_gone(
    meter: Meter, kill: Kill
) -> None:
    with victims.held(64, vmas=5000, groups=[meter]) as victim:
        # The kernel did not merge them.
        assert len(mappings(victim)) > 5000
        assert victim.rss_anon() >= 64 * MIB
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert release.freed
        assert not victim.ended()
        assert victim.rss_anon() == 0
        # The mappings themselves are left: some 0.4 KiB each.
        assert meter.usage() < 8 * MIB


def transparent(victim: victims.Process) -> int:
    """Bytes in transparent huge pages."""
    text = Path(f"/proc/{victim.pid}/smaps_rollup").read_text()
    found = next(x for x in text.splitlines() if x.startswith("AnonHuge"))
    return int(found.split()[1]) * 1024


@pytest.mark.parametrize("thp", ["on", "off"])
@pytest.mark.needs("release")
def test_transparent_huge_pages_of_a_held_victim_are_gone(
    meter: Meter, kill: Kill, thp: str
) -> None:
    with victims.held(64, thp=thp, groups=[meter]) as victim:
        if thp == "off":
            assert transparent(victim) == 0
        elif transparent(victim) < 32 * MIB:
            pytest.skip("the kernel gave no transparent huge pages")
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert release.freed
        assert not victim.ended()
        assert victim.rss_anon() == 0
        assert meter.usage() < 2 * MIB


@pytest.mark.needs("release")
def test_private_file_mappings_of_a_held_victim_are_gone(
    data: Path, other: Path, kill: Kill
) -> None:
    with victims.held(8, file=data, dirty_file=other) as victim:
        assert resident(victim, str(data)) == 4 * MIB
        assert resident(victim, str(other)) == 6 * MIB
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert not victim.ended()
        assert resident(victim, str(data)) == 0
        assert resident(victim, str(other)) == 0
        # Written copies count as anonymous, read pages as file.
        assert release.footprint is not None
        assert release.footprint.anon >= (8 + 6) * MIB
        assert release.footprint.file >= 4 * MIB
        assert victim.rss_anon() == 0
        # Only the mapping is gone: the file is what it was.
        assert data.read_bytes() == b"x" * 4 * MIB
        assert other.read_bytes() == b"y" * 6 * MIB


@pytest.mark.needs("release")
def test_a_private_memfd_of_a_held_victim_is_gone_from_it(kill: Kill) -> None:
    with victims.held(8, private_memfd=4) as victim:
        assert victim.rss_shmem() == 4 * MIB
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert not victim.ended()
        assert victim.rss_shmem() == 0


@pytest.mark.needs("release")
def test_map_shared_of_a_held_victim_is_untouched(
    data: Path, meter: Meter, kill: Kill
) -> None:
    with victims.held(
        8, shared_anon=4, shared_memfd=2, shared_file=data, groups=[meter]
    ) as victim:
        before = [m for m in mappings(victim) if m.shared]
        assert sum(m.rss for m in before) == (4 + 2 + 4) * MIB
        release = kill(victim.pid, timeout=0.05)
        assert release.outcome is Outcome.RELEASED
        assert not victim.ended()
        assert [m for m in mappings(victim) if m.shared] == before
        assert victim.rss_anon() == 0
        assert victim.rss_shmem() == (4 + 2) * MIB
        assert meter.usage() >= (4 + 2) * MIB


@pytest.mark.needs("release")
def test_not_a_page_of_private_memory_is_left(
    data: Path, other: Path, kill: Kill
) -> None:
    with victims.held(
        8, threads=4, file=data, dirty_file=other, shared_anon=2, mlock=True
    ) as victim:
        kill(victim.pid, timeout=0.05)
        assert not victim.ended()
        left = [
            m
            for m in mappings(victim)
            # What the kernel itself maps is not memory of the victim.
            if m.rss and not m.shared and not m.name.startswith("[v")
        ]
        assert left == []


@pytest.mark.needs("huge")
@pytest.mark.needs("release")
def test_huge_pages_of_a_held_victim_stay_until_its_end(kill: Kill) -> None:
    pages = victims.HugePages(4)
    try:
        with victims.held(8, hugetlb=4) as victim:
            release = kill(victim.pid, timeout=0.05)
            assert release.outcome is Outcome.RELEASED
            assert victim.rss_anon() == 0
            assert victim.hugetlb() == 8 * MIB
    finally:
        pages.close()


# --------------------------------------- the same for other victims


def d_state() -> victims.Process:
    return victims.in_d_state(32, shared_anon=2)


def threads() -> victims.Process:
    return victims.held(32, threads=64, shared_anon=2)


def frozen() -> victims.Process:
    return victims.frozen(32, shared_anon=2)


def frozen_threads() -> victims.Process:
    return victims.frozen(32, threads=64, shared_anon=2)


@pytest.mark.parametrize(
    "make",
    [d_state, threads, frozen, frozen_threads],
    ids=lambda f: f.__name__,
)
@pytest.mark.needs("release")
def test_it_is_the_same_for_a_victim_in(
    make: Callable[[], victims.Process],
    kill: Kill,
) -> None:
    with make() as victim:
        before = footprint_of(victim)
        states = victim.states()
        assert before.anon >= 32 * MIB
        release = kill(victim.pid, timeout=0.2)
        assert release.outcome is Outcome.RELEASED, release
        assert release.freed
        assert release.exited is None
        assert release.footprint == before
        assert not victim.ended()
        assert victim.has_mm()
        assert victim.rss_anon() == 0
        assert victim.vm_swap() == 0
        assert victim.rss_shmem() == before.shmem == 2 * MIB
        if make in (d_state, frozen):
            assert victim.states() == states


@pytest.mark.needs("swapped", "in_d_state")
@pytest.mark.needs("release")
def test_swapped_memory_of_a_victim_in_d_state_is_gone(kill: Kill) -> None:
    victims.use_swap()
    with victims.in_d_state(32, swap=True) as victim:
        assert victim.vm_swap() >= 16 * MIB
        release = kill(victim.pid)
        assert release.outcome is Outcome.RELEASED
        assert not victim.ended()
        assert victim.vm_swap() == 0
        assert victim.rss_anon() == 0


@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.needs("release")
def test_a_stopped_victim_ends_or_is_released(
    threads: int, meter: Meter, kill: Kill
) -> None:
    """SIGKILL wakes it: unlike the others it can end."""
    with victims.stopped(32, threads=threads, groups=[meter]) as victim:
        release = kill(victim.pid, timeout=30)
        assert release.outcome in (Outcome.RELEASED, Outcome.EXITED)
        assert release.freed
        assert meter.usage() < 5 * MIB
        assert victim.ended(10)


# ---------------------------------- Footprint predicts it to the page


class Kind(NamedTuple):
    name: str
    make: Callable[[Path, Path], victims.Process]


KINDS = [
    Kind("held", lambda _a, _b: victims.held(32)),
    Kind("threads", lambda _a, _b: victims.held(32, threads=64)),
    Kind("mlocked", lambda _a, _b: victims.held(16, mlock=True)),
    Kind("swapped", lambda _a, _b: victims.held(32, swap=True)),
    Kind(
        "shared",
        lambda a, _b: victims.held(
            8, shared_anon=4, shared_memfd=2, shared_file=a
        ),
    ),
    Kind(
        "files",
        lambda a, b: victims.held(
            8, file=a, dirty_file=b, private_memfd=3, shared_anon=1
        ),
    ),
    Kind("frozen", lambda a, b: victims.frozen(16, file=a, shared_file=b)),
    Kind("d state", lambda a, b: victims.in_d_state(16, file=a, dirty_file=b)),
    Kind("huge", lambda _a, _b: victims.held(8, hugetlb=4, shared_anon=2)),
]


@pytest.fixture
def huge_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.callspec.params["kind"].name != "huge":
        yield
        return
    pages = victims.HugePages(4)
    yield
    pages.close()


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.needs("release")
def test_footprint_predicts_to_the_page_what_goes_and_what_stays(
    kind: Kind, data: Path, other: Path, kill: Kill
) -> None:
    if kind.name == "swapped":
        victims.use_swap()
    with kind.make(data, other) as victim:
        with Victim(victim.pid) as pinned:
            predicted = pinned.footprint()
            # What the kernel tells the test is what it tells the package.
            assert predicted == footprint_of(victim)
            resident_before = [m for m in mappings(victim) if m.rss]
            release = kill(pinned, timeout=0.05)
            assert release.outcome is Outcome.RELEASED
            # Read again just before the kill: nothing has changed.
            assert release.footprint == predicted
            after = pinned.footprint()
        assert after == footprint_of(victim)
        assert victim.facts["anon"] <= predicted.releasable

        # anon and swap go, all of it ...
        assert after.anon == 0
        assert after.swap == 0
        assert predicted.releasable - after.releasable == (
            predicted.releasable
        )
        # ... hugetlb stays, all of it ...
        assert after.hugetlb == predicted.hugetlb
        assert after.hugetlb == victim.facts.get("hugetlb", 0)
        # ... and of shmem and file what is mapped shared.
        shared = sum(
            victim.facts.get(key, 0) for key in ("shared_anon", "shared_memfd")
        )
        assert after.shmem == shared
        assert predicted.shmem == shared + victim.facts.get("private_memfd", 0)
        assert after.file == victim.facts.get("shared_file", 0)
        private_file = sum(
            m.rss
            for m in resident_before
            if m.inode and not m.shared and m.name.startswith("/")
        )
        assert private_file > 0  # the program itself, at least
        assert predicted.file > after.file


@pytest.mark.needs("release")
def test_footprint_counts_what_the_victim_touched(data: Path) -> None:
    with (
        victims.asleep(0) as empty,
        victims.asleep(
            16, shared_anon=4, shared_memfd=2, shared_file=data
        ) as victim,
        Victim(empty.pid) as of_empty,
        Victim(victim.pid) as of_victim,
    ):
        base = of_empty.footprint()
        full = of_victim.footprint()
        assert full.shmem - base.shmem == 6 * MIB
        assert full.hugetlb == full.swap == base.swap == 0
        # A few pages of the stack and of libc's data differ by run.
        assert abs(full.anon - base.anon - 16 * MIB) <= 64 * PAGE
        # Pages of libc are mapped around a fault as they are cached.
        assert abs(full.file - base.file - 4 * MIB) <= MIB


@pytest.mark.needs("release")
def test_what_stays_comes_back_at_the_end_of_the_victim(
    meter: Meter, kill: Kill
) -> None:
    with victims.held(8, shared_anon=16, groups=[meter]) as victim:
        release = kill(victim.pid, timeout=0.05)
        assert release.outcome is Outcome.RELEASED
        assert meter.usage() >= 16 * MIB
        victim.let_go()
        assert victim.ended(30)
        assert meter.usage() < 2 * MIB


def test_without_the_release_nothing_goes() -> None:
    """What makes the tests above mean something."""
    with victims.held(16, killed=True, shared_anon=2) as victim:
        before = footprint_of(victim)
        assert before.anon >= 16 * MIB
        with Victim(victim.pid) as pinned:
            assert pinned.footprint() == before
        assert victim.rss_anon() == before.anon


# --------------------------------------- the footprint of a Victim


def test_footprint_of_a_zombie_is_zero() -> None:
    with victims.zombie(8) as victim, Victim(victim.pid) as pinned:
        assert pinned.footprint() == Footprint(0, 0, 0, 0, 0)


def test_footprint_of_a_reaped_process_is_process_lookup_error() -> None:
    with victims.asleep(8) as victim, Victim(victim.pid) as pinned:
        victim.popen.kill()
        victim.wait()
        with pytest.raises(ProcessLookupError, match=str(victim.pid)):
            pinned.footprint()


def test_footprint_of_a_dead_leader_is_that_of_its_threads(kill: Kill) -> None:
    with victims.zombie_leader(16) as victim, Victim(victim.pid) as pinned:
        assert pinned.footprint().anon >= 16 * MIB
        release = kill(pinned, timeout=30)
        assert release.footprint is not None
        assert release.footprint.anon >= 16 * MIB


# ----------------------------------------------- Footprint arithmetic


def test_rss_and_releasable() -> None:
    it = Footprint(anon=1, file=20, shmem=300, swap=4000, hugetlb=50000)
    assert it.rss == 321
    assert it.releasable == 4001


def test_rss_is_that_of_the_kernel() -> None:
    with (
        victims.asleep(8, shared_anon=2) as victim,
        Victim(victim.pid) as pinned,
    ):
        assert pinned.footprint().rss == victim.vm_rss()


def test_as_dict_is_all_of_it_in_bytes() -> None:
    it = Footprint(anon=1, file=20, shmem=300, swap=4000, hugetlb=50000)
    assert it.as_dict() == {
        "anon": 1,
        "file": 20,
        "shmem": 300,
        "swap": 4000,
        "hugetlb": 50000,
        "rss": 321,
        "releasable": 4001,
    }


@pytest.mark.parametrize(
    ("footprint", "text"),
    [
        (Footprint(0, 0, 0, 0, 0), "no memory"),
        (Footprint(1 << 30, 0, 0, 0, 0), "1.0 GiB anon"),
        (
            Footprint(4096, 1 << 20, 3 << 19, 1 << 40, 2 << 20),
            (
                "4.0 KiB anon, 1.0 MiB file, 1.5 MiB shmem, 1.0 TiB swap, "
                "2.0 MiB hugetlb"
            ),
        ),
        (Footprint(0, 0, 0, 1000, 0), "1000 B swap"),
        # Never "1024.0 KiB".
        (Footprint((1 << 20) - 1, 0, 0, 0, 0), "1.0 MiB anon"),
        (Footprint(1 << 60, 0, 0, 0, 0), "1048576.0 TiB anon"),
    ],
)
def test_str_is_for_people(footprint: Footprint, text: str) -> None:
    assert str(footprint) == text


def test_a_footprint_is_a_value() -> None:
    it = Footprint(1, 2, 3, 4, 5)
    assert it == Footprint(1, 2, 3, 4, 5)
    assert it != Footprint(1, 2, 3, 4, 6)
    assert hash(it) == hash(Footprint(1, 2, 3, 4, 5))
    assert repr(it) == (
        "Footprint(anon=1, file=2, shmem=3, swap=4, hugetlb=5)"
    )
    with pytest.raises(AttributeError, match="immutable"):
        it.anon = 2
    with pytest.raises(AttributeError, match="immutable"):
        del it.anon
