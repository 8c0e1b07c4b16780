"""References: in a debug build of Python no call keeps any.

sys.gettotalrefcount() counts all references of the interpreter. It is looked
at before and after thousands of calls, good ones and failing ones, of all
that test_no_leaks has: there it is what is resident that counts, here each
single reference. On 3.12 and later the counts of None and the like do not
change (they are immortal), so those of the classes and of small objects that
are shared are looked at one by one as well.
"""

from __future__ import annotations

import gc
import sys
from array import array
from contextlib import ExitStack
from typing import NamedTuple

import pytest

import kernel_errors
import test_no_leaks

pytestmark = pytest.mark.skipif(
    not hasattr(sys, "gettotalrefcount"),
    reason="not a debug build of Python (make debug)",
)

ROUNDS = 6
# Of its calls in each round, at most: a debug build is slow.
CALLS = 2_000


SHARED = test_no_leaks._SHARED


def total() -> int:
    gc.collect()
    return int(sys.gettotalrefcount())


class Measure(NamedTuple):
    """Of two rounds."""

    times: int
    """Each of the ways to call it was taken, in a round."""
    grown: int
    most_of_one: int
    """Growth of the one shared object whose count grew most."""
    allowed: int


def measure(name: str) -> Measure:
    make = {**test_no_leaks.CASES, **test_no_leaks.LEAKS}[name]
    with ExitStack() as stack:
        case = make(stack)
        each = len(case.good) + len(case.bad)
        times = max(min(CALLS, case.many // ROUNDS) // each, 2)
        # Made in advance: what is measured must not grow by measuring.
        totals = array("q", [0] * ROUNDS)
        shared = [array("q", [0] * len(SHARED)) for _ in range(ROUNDS)]
        for i in range(ROUNDS):
            test_no_leaks.call_all(case, times)
            totals[i] = total()
            for j, each_shared in enumerate(SHARED):
                shared[i][j] = sys.getrefcount(each_shared)
        # The first rounds fill caches. What is flat goes up and down.
        grown = min(totals[-2:]) - max(totals[1:3])
        moved = max(
            min(a, b) - max(c, d)
            for a, b, c, d in zip(*shared[-2:], *shared[1:3], strict=True)
        )
        # Caches of Python fill up only in the course of some hundred calls,
        # and some are made for fewer. Still one that is kept by one of the
        # ways to call it is 2 * times.
        few = case.many <= 10_000
        allowed = max(10, times if few else times // 10)
        return Measure(times, grown, moved, allowed)


@pytest.mark.parametrize("name", test_no_leaks.CASES)
def test_no_call_keeps_a_reference(name: str) -> None:
    found = kernel_errors.in_child(measure, name)
    print(f"{name}: {found}")
    assert found.grown < found.allowed
    assert found.most_of_one < found.allowed


@pytest.mark.parametrize("name", ["leak_of_a_block", "leak_of_a_reference"])
def test_a_reference_that_is_kept_is_seen(name: str) -> None:
    found = kernel_errors.in_child(measure, name)
    assert found.grown >= 2 * found.times > found.allowed
