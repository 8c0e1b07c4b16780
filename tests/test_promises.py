"""The page of promises is made of the reports, and names tests that exist."""

from __future__ import annotations

import ast
import json
import re

import pytest

import promises
from promises import ROOT, Promise

pytestmark = pytest.mark.any_kernel

ALL = [promise for part in promises.parts().values() for promise in part]


@pytest.mark.parametrize("promise", ALL, ids=lambda promise: promise.text)
def test_what_a_promise_is_shown_by_exists(promise: Promise) -> None:
    assert promise.tests or promise.targets
    for name in promise.tests:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        names = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert not function or function in names, name
        assert any(each.startswith("test_") for each in names), name
    if promise.targets:
        if not (ROOT / "Makefile").exists():
            pytest.skip("this source distribution has no Makefile")
        made = (ROOT / "Makefile").read_text()
        for target in promise.targets:
            assert re.search(rf"^{target}:.* ## ", made, re.MULTILINE), target


def test_the_page_is_what_is_made_of_the_reports() -> None:
    kept = json.loads(promises.KEPT.read_text())
    assert promises.PAGE.read_text() == promises.page(kept)


def test_counts_are_of_the_function_or_of_the_whole_file() -> None:
    tests = {
        "tests/test_a.py::test_b": {"passed": 2, "skipped": 1},
        "tests/test_a.py::test_bc": {"passed": 3},
        "tests/test_ab.py::test_b": {"passed": 4},
    }
    one = promises.of_test("tests/test_a.py::test_b", tests)
    assert one == {"passed": 2, "skipped": 1}
    whole = promises.of_test("tests/test_a.py", tests)
    assert whole == {"passed": 5, "skipped": 1}


def test_a_machine_that_was_booted_alone_replaces_its_own_row() -> None:
    def row(kernel: str, user: str, passed: int) -> dict[str, object]:
        return {"kernel": kernel, "arch": "x", "user": user, "passed": passed}

    before = {
        "date": "then",
        "pytest": "some",
        "rows": [row("6.1.0-1", "root", 1), row("6.1.0-1", "nobody", 2)],
    }
    now = {
        "date": "now",
        "pytest": "all",
        "rows": [row("6.1.0-2", "root", 3)],
    }
    assert promises.newest(before, now) == [
        {"date": "now", "pytest": "all", **row("6.1.0-2", "root", 3)},
        {"date": "then", "pytest": "some", **row("6.1.0-1", "nobody", 2)},
    ]
    # What is kept knows of each row when it was found.
    again = {"date": "later", "pytest": "few", "rows": []}
    kept = {**now, "rows": promises.newest(before, now)}
    assert promises.newest(kept, again) == promises.newest(before, now)
