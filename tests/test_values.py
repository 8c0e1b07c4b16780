"""Release, Outcome, Footprint, Support, Feature: what they are as values."""

from __future__ import annotations

import copy
import errno
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest

import mrelease
from mrelease import Feature, Footprint, Outcome, Release, Support
from mrelease.footprint import in_units

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.any_kernel

MIB = 1 << 20
GIB = 1 << 30
FOOTPRINT = Footprint(1 * GIB, 5 * MIB, 3 * MIB, 0, 2 * MIB)
RELEASE = Release(
    4711,
    Outcome.RELEASED,
    True,
    FOOTPRINT,
    None,
    0.00002,
    0.0144,
    0.0151,
    None,
    1,
    "free",
    True,
)
FEATURE = Feature("release", False, "why not", "what to do")
SUPPORT = Support("6.18", False, *[FEATURE] * 8)
AnyValue = Footprint | Release | Feature | Support
VALUES: list[AnyValue] = [FOOTPRINT, RELEASE, FEATURE, SUPPORT]
each_value = pytest.mark.parametrize(
    "value", VALUES, ids=[type(value).__name__ for value in VALUES]
)


def others(value: AnyValue) -> list[AnyValue]:
    """The same value but for one field, for each field."""
    kind: Any = type(value)
    fields = [getattr(value, name) for name in value.__slots__]
    return [
        kind(*fields[:i], "something else", *fields[i + 1 :])
        for i in range(len(fields))
    ]


@each_value
def test_a_value_cannot_be_changed(value: AnyValue) -> None:
    for name in (*value.__slots__, "new"):
        with pytest.raises(AttributeError, match="is immutable"):
            setattr(value, name, 1)
        with pytest.raises(AttributeError, match="is immutable"):
            delattr(value, name)
    with pytest.raises(TypeError):
        vars(value)


@each_value
def test_values_are_equal_if_all_fields_are(value: AnyValue) -> None:
    kind: Any = type(value)
    same = kind(*[getattr(value, n) for n in value.__slots__])
    assert same is not value
    assert same == value
    assert hash(same) == hash(value)
    assert len({same, value}) == 1
    for other in others(value):
        assert other != value


@each_value
def test_a_value_is_not_equal_to_another_kind(value: AnyValue) -> None:
    fields = tuple(getattr(value, n) for n in value.__slots__)
    assert value != fields
    assert value != None  # noqa: E711
    assert [value == other for other in VALUES].count(True) == 1


@each_value
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *[
            lambda v, p=protocol: pickle.loads(pickle.dumps(v, p))
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
        ],
    ],
)
def test_a_value_can_be_copied_and_pickled(
    value: AnyValue, duplicate: Callable[[AnyValue], AnyValue]
) -> None:
    made = duplicate(value)
    assert made == value
    assert type(made) is type(value)
    assert repr(made) == repr(value)


@each_value
def test_repr_can_be_evaluated(value: AnyValue) -> None:
    names = {name: getattr(mrelease, name) for name in mrelease.__all__}
    text = repr(value).replace(repr(Outcome.RELEASED), "Outcome('released')")
    assert eval(text, names) == value


@each_value
def test_as_dict_is_ready_for_json_and_has_every_field(
    value: AnyValue,
) -> None:
    told = value.as_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert set(value.__slots__) <= set(told)


# --------------------------------------------------------------- Release


def test_the_line_of_a_release() -> None:
    release = Release(
        4711,
        Outcome.RELEASED,
        True,
        Footprint(GIB, 0, 0, 0, 0),
        signalled=0.00002,
        released=0.0144,
        exited=0.0151,
        attempts=1,
        locks="free",
    )
    assert str(release) == (
        "pid 4711 released: 1.0 GiB in 14.4 ms "
        "(signalled 0.02 ms, exited 15.1 ms)"
    )


def line(outcome: Outcome, freed: bool = False, **given: object) -> str:
    """What is said of a kill, without the footprint's details."""
    fields: dict[str, Any] = {
        "footprint": Footprint(64 * MIB, 0, 0, 0, 0),
        "signalled": 0.00003,
        "attempts": 1,
        "locks": "free",
    } | given
    text = str(Release(7, outcome, freed, **fields))
    assert text.startswith(f"pid 7 {outcome.value}: ")
    return text.removeprefix(f"pid 7 {outcome.value}: ")


LINES = [
    (
        line(Outcome.RELEASED, True, released=0.002),
        "64.0 MiB in 2.00 ms (signalled 0.03 ms, not ended yet)",
    ),
    (
        line(Outcome.EXITED, True, exited=0.0123, attempts=0,
             signalled=None, terminated=0.00001),
        "64.0 MiB in 12.3 ms (terminated 0.01 ms, exited 12.3 ms)",
    ),
    (
        line(Outcome.EXITED, True, exited=0.0123, errno=errno.ESRCH),
        ("64.0 MiB in 12.3 ms, too late to release (signalled 0.03 ms, "
         "exited 12.3 ms)"),
    ),
    (
        line(Outcome.EXITED, False, exited=0.0123, errno=errno.ESRCH),
        ("64.0 MiB in 12.3 ms, too late to release, not known if it is shared "
         "(signalled 0.03 ms, exited 12.3 ms)"),
    ),
    (
        line(Outcome.EXITING, errno=errno.ESRCH),
        ("64.0 MiB still held, too late to release (signalled 0.03 ms, not "
         "ended yet)"),
    ),
    (
        line(Outcome.PARTIAL, errno=errno.EAGAIN, attempts=130),
        ("part of 64.0 MiB may still be held (signalled 0.03 ms, not ended "
         "yet, 130 attempts, last EAGAIN)"),
    ),
    (
        line(Outcome.SHARED, errno=errno.EINVAL, exited=0.001),
        ("64.0 MiB held by a process that shares it (signalled 0.03 ms, "
         "exited 1.00 ms)"),
    ),
    (
        line(Outcome.DUMPING, errno=errno.EINVAL),
        ("64.0 MiB held until its core dump is written (signalled 0.03 ms, "
         "not ended yet)"),
    ),
    (
        line(Outcome.ALIVE, errno=errno.EPERM, attempts=0, signalled=None,
             terminated=0.00001),
        "64.0 MiB held, it is not dying (terminated 0.01 ms, not ended yet)",
    ),
    (
        line(Outcome.LOCKED, True, exited=0.02, attempts=0, locks="held"),
        ("release withheld for its robust locks, 64.0 MiB came back with its "
         "exit in 20.0 ms (signalled 0.03 ms, exited 20.0 ms)"),
    ),
    (
        line(Outcome.LOCKED, False, attempts=0, locks="held"),
        ("release withheld for its robust locks, 64.0 MiB still held "
         "(signalled 0.03 ms, not ended yet)"),
    ),
    (
        line(Outcome.UNSUPPORTED, True, errno=errno.ENOSYS, exited=0.02),
        ("no process_mrelease (ENOSYS), 64.0 MiB came back with its exit in "
         "20.0 ms (signalled 0.03 ms, exited 20.0 ms)"),
    ),
    (
        line(Outcome.UNSUPPORTED, False, errno=errno.EPERM),
        ("no process_mrelease (EPERM), 64.0 MiB still held (signalled 0.03 "
         "ms, not ended yet)"),
    ),
    (
        line(Outcome.GONE, signalled=None, attempts=0),
        "no such process",
    ),
    (
        line(Outcome.DENIED, signalled=None, attempts=0),
        "may not be signalled",
    ),
    (
        line(Outcome.RELEASED, True, released=0.002, footprint=None,
             locks="unknown", exited=0.003),
        ("unknown size in 2.00 ms (signalled 0.03 ms, exited 3.00 ms, locks "
         "not checked)"),
    ),
    (
        line(Outcome.RELEASED, True, released=0.002, exited=2.5,
             locks="ignored", footprint=Footprint(MIB, 0, 0, MIB, 0)),
        "2.0 MiB in 2.00 ms (signalled 0.03 ms, exited 2500.0 ms)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("said", "expected"), LINES)
def test_the_line_of_each_outcome(said: str, expected: str) -> None:
    assert said == expected


def test_there_is_a_line_for_each_outcome_with_anything_missing() -> None:
    needed = (Outcome.UNSUPPORTED, Outcome.PARTIAL)  # they have an errno
    for outcome in Outcome:
        for freed in (False, True):
            for when in (None, 0.001):
                for size in (None, FOOTPRINT):
                    text = str(
                        Release(
                            7,
                            outcome,
                            freed,
                            size,
                            signalled=when,
                            released=when,
                            exited=when,
                            errno=4095 if outcome in needed else None,
                        )
                    )
                    assert text.startswith(f"pid 7 {outcome.value}: ")
                    assert "\n" not in text
                    assert "None" not in text
                    assert text.isascii()


def test_outcomes_are_named_like_their_values() -> None:
    assert [outcome.value for outcome in Outcome] == [
        outcome.name.lower() for outcome in Outcome
    ]
    assert [outcome.name for outcome in Outcome] == [
        "RELEASED", "EXITED", "EXITING", "PARTIAL", "SHARED", "DUMPING",
        "ALIVE", "LOCKED", "UNSUPPORTED", "GONE", "DENIED",
    ]  # fmt: skip


def test_release_as_dict_has_names_bytes_and_seconds() -> None:
    assert RELEASE.as_dict() == {
        "pid": 4711,
        "outcome": "released",
        "freed": True,
        "footprint": FOOTPRINT.as_dict(),
        "terminated": None,
        "signalled": 0.00002,
        "released": 0.0144,
        "exited": 0.0151,
        "errno": None,
        "attempts": 1,
        "locks": "free",
        "raised": True,
    }
    late = Release(7, Outcome.EXITING, errno=errno.ESRCH).as_dict()
    assert (late["errno"], late["freed"]) == ("ESRCH", False)
    assert late["footprint"] is None


def test_a_release_is_not_freed_unless_it_is_said() -> None:
    for outcome in Outcome:
        assert Release(7, outcome).freed is False


# ------------------------------------------------------------- Footprint


def test_footprint_sums() -> None:
    footprint = Footprint(anon=1, file=10, shmem=100, swap=1000, hugetlb=10000)
    assert footprint.rss == 111
    assert footprint.releasable == 1001
    assert footprint.as_dict() == {
        "anon": 1, "file": 10, "shmem": 100, "swap": 1000, "hugetlb": 10000,
        "rss": 111, "releasable": 1001,
    }  # fmt: skip


def test_footprint_in_words() -> None:
    assert str(FOOTPRINT) == (
        "1.0 GiB anon, 5.0 MiB file, 3.0 MiB shmem, 2.0 MiB hugetlb"
    )
    assert str(Footprint(0, 0, 0, 4096, 0)) == "4.0 KiB swap"
    assert str(Footprint(0, 0, 0, 0, 0)) == "no memory"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),
        (MIB, "1.0 MiB"),
        (1023 * MIB + 960 * 1024, "1023.9 MiB"),
        (GIB - 1, "1.0 GiB"),
        (GIB, "1.0 GiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (1 << 40, "1.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert in_units(size) == text


# --------------------------------------------------------------- Support


def test_support_is_true_if_it_can_kill_and_release() -> None:
    def made(release: bool | None, signal: bool | None) -> Support:
        rest = [FEATURE] * 6
        return Support(
            "6.18",
            None,
            Feature("release", release, ""),
            Feature("signal", signal, ""),
            *rest,
        )

    assert bool(made(True, True)) is True
    for release in (True, False, None):
        for signal in (True, False, None):
            if not (release and signal):
                assert bool(made(release, signal)) is False


def test_support_in_words_tells_each_feature_and_what_to_do() -> None:
    features = [
        Feature("a", True, "fine"),
        Feature("b", False, "broken", "Mend it."),
        Feature("c", None, "not tried", "Try it."),
        *[Feature("d", True, "fine")] * 5,
    ]
    text = str(Support("6.18", True, *features))
    assert text.splitlines()[:6] == [
        "Linux 6.18, seccomp filter: yes",
        "a: yes: fine",
        "b: no: broken",
        "    Mend it.",
        "c: not known: not tried",
        "    Try it.",
    ]
    assert "seccomp filter: no\n" in str(Support("6", False, *features))
    assert "seccomp filter: not known\n" in str(Support("6", None, *features))


def test_the_features_in_order() -> None:
    names = [n for n in Support.__slots__ if n not in ("kernel", "seccomp")]
    features = [Feature(name, True, "") for name in names]
    support = Support("6.18", False, *features)
    assert support.features == tuple(features)
    assert names[0] == "release"
