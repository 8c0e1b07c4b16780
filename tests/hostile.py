"""Arguments that nobody should pass: for test_fuzz.py.

Strategies for hypothesis. Some objects raise, return what they must not, say
something else each time, or lie about themselves; what they raise of their
own is Boom, which may come through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AnyStrategy = st.SearchStrategy[Any]


class Boom(Exception):
    """What an object of the caller's raises by itself."""


BOOM = object()
"""In place of a value: raise Boom."""


class _Says:
    """Something else each time, and in the end the last for ever."""

    def __init__(self, *values: object) -> None:
        self._values = list(values)
        self._all = values

    def _say(self) -> Any:  # noqa: ANN401 - anything indeed
        values = self._values
        value = values.pop(0) if len(values) > 1 else values[0]
        if value is BOOM:
            raise Boom("said by an object of the caller's")
        return value

    def __repr__(self) -> str:
        said = ["BOOM" if v is BOOM else repr(v)[:40] for v in self._all]
        return f"{type(self).__name__}({', '.join(said)})"


class Index(_Says):
    def __index__(self) -> int:
        said: int = self._say()
        return said


class HasPid(_Says):
    @property
    def pid(self) -> int:
        said: int = self._say()
        return said


class Ended(HasPid):
    """As a Popen: it may have ended."""

    @property
    def returncode(self) -> object:
        return self._say()


class HasFileno(_Says):
    def fileno(self) -> int:
        said: int = self._say()
        return said


class PathLike(_Says):
    def __fspath__(self) -> str:
        said: str = self._say()
        return said


class Lying(int):
    """Compares as it likes, but not with itself."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __lt__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__
    __le__ = __gt__ = __ge__ = __ne__ = __lt__


class LyingFloat(float):
    def __lt__(self, other: object) -> bool:
        return False

    __le__ = __gt__ = __lt__

    def __ge__(self, other: object) -> bool:
        return True


class Agreeing(str):
    """Is like everything, and so is everything that is asked for."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class Unreadable:
    """Cannot even be printed."""

    def __repr__(self) -> str:
        raise Boom("repr")


def endless() -> Iterator[object]:
    yield 2**22
    raise Boom("in the middle of an iteration")


# -------------------------------------------------------------- strategies

# These have more digits than Python prints: not in a list that is printed.
POSITIVE = st.just(5000).map(lambda digits: 10**digits)
NEGATIVE = st.just(5000).map(lambda digits: -(10**digits))

HUGE = st.one_of(
    POSITIVE,
    NEGATIVE,
    st.sampled_from([2**64, 2**63, -(2**63), 2**31, -(2**31) - 1]),
)

TEXTS = st.one_of(
    st.text(st.characters(), max_size=12),
    st.text(st.characters(categories=["Cs", "Cc"]), max_size=6),
    st.sampled_from(["", "\0", "a\0b", "\x1b[2J", "\udcff", "protect ", "٣"]),
)

NUMBERS = st.one_of(
    st.integers(),
    HUGE,
    st.floats(),
    st.booleans(),
)

ANYTHING: AnyStrategy = st.one_of(
    st.none(),
    NUMBERS,
    TEXTS,
    st.binary(max_size=8),
    st.complex_numbers(),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(TEXTS, st.integers(), max_size=2),
    st.sampled_from([int, object, Boom, len, ..., NotImplemented]),
    st.builds(object),
    st.builds(Unreadable),
)

SAID = st.one_of(ANYTHING, st.just(BOOM))


def says(kind: type[_Says], values: AnyStrategy) -> AnyStrategy:
    return st.lists(values, min_size=1, max_size=3).map(lambda v: kind(*v))


BAD_SECONDS: AnyStrategy = st.one_of(
    st.floats(max_value=-1e-300),
    st.integers(max_value=-1),
    st.sampled_from([float("nan"), -float("inf")]),
    NEGATIVE,
    st.booleans(),
    TEXTS,
    st.binary(max_size=3),
    st.lists(st.floats(), max_size=2),
    st.complex_numbers(),
    st.builds(LyingFloat, st.sampled_from([float("nan"), -1.0])),
    st.builds(Index, st.just(1)),
    st.builds(object),
    st.builds(Unreadable),
)
GOOD_SECONDS: AnyStrategy = st.one_of(
    st.floats(min_value=0, allow_nan=False),
    st.integers(min_value=0),
    st.sampled_from([0, -0.0, float("inf"), 5e-324]),
    POSITIVE,
    st.builds(Lying, st.integers(0, 9)),
)

BAD_LOCKS: AnyStrategy = st.one_of(
    ANYTHING, st.sampled_from(["PROTECT", "ignore\0", b"protect"])
).filter(lambda x: not isinstance(x, str) or x not in ("protect", "ignore"))

BAD_ESCALATION: AnyStrategy = st.one_of(
    st.booleans(),
    st.integers(max_value=-1),
    st.integers(min_value=2**20),
    HUGE,
    TEXTS,
    st.floats(),
    says(HasFileno, st.one_of(st.just(BOOM), st.none(), TEXTS, st.floats(),
                              st.booleans(), st.integers(max_value=-1))),
    st.builds(object),
)  # fmt: skip


@st.composite
def terms(
    draw: st.DrawFn, names: Sequence[str], *, bad: bool
) -> dict[str, object]:
    """Keyword arguments of a kill; at least one of them bad, or none."""
    wrong = draw(st.sets(st.sampled_from(names), min_size=1)) if bad else set()
    chosen = draw(st.sets(st.sampled_from(names))) | wrong
    good: dict[str, AnyStrategy] = {
        "grace": GOOD_SECONDS,
        "timeout": GOOD_SECONDS,
        "locks": st.sampled_from(["protect", "ignore"]),
        "escalate_on": st.none(),
    }
    evil: dict[str, AnyStrategy] = {
        "grace": BAD_SECONDS,
        "timeout": BAD_SECONDS,
        "locks": BAD_LOCKS,
        "escalate_on": BAD_ESCALATION,
    }
    return {
        name: draw((evil if name in wrong else good)[name])
        for name in sorted(chosen)
    }


def processes(
    pids: st.SearchStrategy[int], dangers: Sequence[int]
) -> AnyStrategy:
    """What stands for a process, or does not; the pids are nobody's.

    Or they are dangers, which must never be killed.
    """
    liars = st.sampled_from(dangers).map(Lying)
    return st.one_of(
        st.one_of(liars, liars.map(Index), liars.map(HasPid)),
        pids,
        pids.map(Lying),
        says(Index, st.one_of(pids, SAID)),
        says(HasPid, st.one_of(pids, pids.map(Lying), SAID)),
        says(Ended, st.one_of(pids, st.none(), st.just(BOOM))),
        ANYTHING.filter(lambda x: not isinstance(x, int) or x not in range(
            2, 2**22)),
    )  # fmt: skip
