"""What `import mrelease` costs and gives, and where it refuses."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mrelease
from mrelease import _mrelease

pytestmark = pytest.mark.any_kernel

SOURCES = Path(mrelease.__file__).parent

HEAVY = {
    "argparse", "asyncio", "collections", "contextlib", "ctypes",
    "dataclasses", "inspect", "json", "logging", "multiprocessing", "pathlib",
    "psutil", "random", "re", "resource", "selectors", "shutil", "signal",
    "socket", "subprocess", "tempfile", "threading", "traceback", "typing",
    "warnings",
}  # fmt: skip


def fresh(*args: str) -> subprocess.CompletedProcess[str]:
    """Run Python with nothing but the package on its path."""
    return subprocess.run(
        [sys.executable, "-I", "-S", *args], capture_output=True, text=True
    )


def on_path(code: str) -> str:
    return f"import sys; sys.path.insert(0, {str(SOURCES.parent)!r}); {code}"


def modules_after(code: str) -> set[str]:
    done = fresh("-c", on_path(f"{code}; print(*sys.modules, sep='\\n')"))
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    # os comes with Python's own start where that has site.  What enum is
    # built on comes with enum (functools, and with it collections).
    bare = modules_after("import enum, os, __future__")
    loaded = modules_after("import mrelease") - bare
    assert "mrelease" in loaded
    assert loaded & HEAVY == set()
    rest = {name for name in loaded if not name.startswith("mrelease")}
    assert rest <= {"errno", "time", "_thread"}, rest


def test_import_does_not_load_the_command_or_the_demo() -> None:
    loaded = modules_after("import mrelease")
    own = {name for name in loaded if name.startswith("mrelease.")}
    assert not own & {
        "mrelease.cli", "mrelease.demo", "mrelease.meter",
        "mrelease.__main__",
    }  # fmt: skip


def test_importtime_names_no_heavy_module() -> None:
    bare = fresh("-X", "importtime", "-c", on_path("import enum, os"))
    done = fresh("-X", "importtime", "-c", on_path("import mrelease"))
    assert done.returncode == 0, done.stderr

    def names(text: str) -> set[str]:
        return {x.rpartition("|")[2].strip() for x in text.splitlines()}

    imported = names(done.stderr)
    assert "mrelease._mrelease" in imported
    assert (imported - names(bare.stderr)) & HEAVY == set()


def test_a_kill_loads_nothing_more() -> None:
    code = (
        "import mrelease, os; before = set(sys.modules);"
        "pid = os.fork();"
        "pid or os.read(os.pipe()[0], 1);"
        "r = mrelease.kill(pid); str(r), r.as_dict(); os.waitpid(pid, 0);"
        "print(sorted(set(sys.modules) - before))"
    )
    done = fresh("-c", on_path(code))
    assert done.stdout == "[]\n", done


def test_elsewhere_than_on_linux_import_says_what_it_requires() -> None:
    for platform in ("darwin", "win32", "freebsd14", "android"):
        code = on_path(f"sys.platform = {platform!r}; import mrelease")
        done = fresh("-c", code)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            "ImportError: mrelease requires Linux"
        ), (platform, done)


@pytest.mark.parametrize("name", mrelease.__all__)
def test_a_public_name_exists_and_is_described(name: str) -> None:
    found = getattr(mrelease, name)
    text = inspect.getdoc(found)
    assert text, name
    assert len(text) > 20
    if inspect.isclass(found) and found.__doc__ is not None:
        # Its own, not that of a base class.
        assert found.__doc__ != getattr(found.__base__, "__doc__", None)


def public_members() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name in mrelease.__all__:
        item = getattr(mrelease, name)
        if inspect.isclass(item):
            found += [
                (f"{name}.{member}", value)
                for member, value in vars(item).items()
                if not member.startswith("_")
                and (
                    inspect.isroutine(value)
                    or isinstance(value, property | classmethod)
                )
            ]
    return found


@pytest.mark.parametrize(
    ("name", "member"), public_members(), ids=lambda x: str(x)[:40]
)
def test_a_public_method_is_described(name: str, member: object) -> None:
    assert inspect.getdoc(member), name


def test_all_is_sorted_complete_and_unique() -> None:
    assert list(mrelease.__all__) == sorted(set(mrelease.__all__))
    public = {
        name
        for name, value in vars(mrelease).items()
        if not name.startswith("_")
        and name not in ("annotations", "sys")
        and not inspect.ismodule(value)
    }
    # support, the function, covers support, the module.
    assert public == set(mrelease.__all__)


def test_star_import_gives_exactly_all() -> None:
    names: dict[str, object] = {}
    exec("from mrelease import *", names)
    del names["__builtins__"]
    assert set(names) == set(mrelease.__all__)


def native_functions() -> list[str]:
    return [
        name
        for name, value in vars(_mrelease).items()
        if inspect.isbuiltin(value)
    ]


def test_there_are_native_functions() -> None:
    assert {"process_mrelease", "reap", "probe"} <= set(native_functions())


@pytest.mark.parametrize("name", native_functions())
def test_a_native_function_has_a_signature(name: str) -> None:
    """And the public one a description; others have it in the source."""
    function = getattr(_mrelease, name)
    assert function.__text_signature__ is not None
    assert function.__text_signature__.startswith("($module")
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.kind is parameter.POSITIONAL_ONLY, parameter
    if hasattr(mrelease, name):
        assert function.__doc__.startswith("Release the memory")


def test_the_native_signatures_are_those_of_the_stub() -> None:
    stub = ast.parse((SOURCES / "_mrelease.pyi").read_text())
    declared = {
        node.name: [argument.arg for argument in node.args.posonlyargs]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    built = {
        name: list(inspect.signature(getattr(_mrelease, name)).parameters)
        for name in native_functions()
    }
    assert built == declared


def test_it_says_that_it_is_typed() -> None:
    assert (SOURCES / "py.typed").is_file()
    assert (SOURCES / "_mrelease.pyi").is_file()


def test_python_dash_m_is_the_command() -> None:
    done = fresh("-c", on_path(
        "import runpy; sys.argv = ['x', '--version'];"
        "runpy.run_module('mrelease', run_name='__main__')"
    ))  # fmt: skip
    assert done.returncode == 0, done
    assert done.stdout == f"mrelease {mrelease.__version__}\n"
