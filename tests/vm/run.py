"""Run the test suite on other kernels, in machines of their own.

    python tests/vm/run.py --kernel bullseye tests/test_kill.py -k dumping
    python tests/vm/run.py --kernel sid --kernel trixie/aarch64 --user nobody

Debian's stock cloud kernel of the suite is booted under QEMU, emulating the
processor (no KVM is needed), with an initramfs that holds the Python which
runs this script, pytest, the *installed* mrelease, the tests, a static
victim and busybox. For another architecture they are Debian's Python and a
cross-built wheel (arm64.py). There is no disk and no network. All arguments
that are not this script's own go to pytest, whose output is printed as it
comes; with --program they are a Python program of the repository, and its
arguments, to be run in place of pytest, without the packages of the tests.
{machine} in them is replaced by the name of each. Several machines run at
once (--at-once); then each line begins with that name.
At the end is a table, kernel by kernel, with what passed, failed, and
was skipped for which reason; the exit code is the first that is not 0.

Inside, the tests are root with all capabilities (or --user), cgroup v2 is
mounted with every controller enabled, there are loop devices and 512 MiB of
zram swap (--swap), and MRELEASE_TEST_DISPOSABLE=1 says that the machine may be
changed in any way. Files keep the path that they have outside; all is in
memory (tmpfs: what is mapped counts as RssShmem), only $TMPDIR, where the
victim's program lies too, is ext4.

Kernels are fetched by apt, which checks them, from the mirror that this
machine's own apt uses for Debian (or $MRELEASE_VM_MIRROR), with lists of
their own: nothing is installed and the system's lists are not touched. They
are kept in --cache; --update looks for a newer one.

Needs: qemu-system-x86_64 (or -aarch64), busybox-static, apt, a C compiler,
and a Python that has mrelease and pytest installed. On 2 CPUs the machine is
up after 10 s and runs the first test after 18 s.
Exit codes of its own, out of pytest's way: 69 something is missing here, 70
the machine ended without a result, 75 no kernel could be had, 124 timeout.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes.util
import fcntl
import importlib.metadata
import importlib.util
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import arm64  # noqa: E402

from debian import Suite, Unreachable, by_number  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MISSING = 69
NO_RESULT = 70
NO_KERNEL = 75
TIMEOUT = 124

SUITES = ("bullseye", "bookworm", "trixie", "sid")

# lzo-rle is what zram compresses with by default up to 6.1; nothing depends
# on it by name. What a kernel has built in, or lacks, is left out.
MODULES = ("lzo-rle", "zram", "loop", "fuse")

# Taken from this machine where it has them; busybox has the rest. Its shell
# would prefer its own fsfreeze, mount and so on, whatever PATH says.
TOOLS = (
    *("chrt", "flock", "fsfreeze", "ldconfig", "losetup", "mkfs.ext4"),
    *("mount", "setpriv", "sh", "swapoff", "swapon", "umount", "unshare"),
)
LIBRARIES = ("gcc_s", "seccomp")

# Parts of the standard library that no test needs.
# It draws charts, which no kernel changes; numpy wants a processor with
# cmpxchg16b.
LEFT_OUT = ("matplotlib",)

PACKAGES = Path("/usr/local/lib/python3.13/dist-packages")
"""Where Debian's Python of another architecture looks for them."""

UNNEEDED = {
    *("ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"),
    *("test", "tests", "tkinter", "turtledemo"),
}
REPOSITORY = (
    *("pyproject.toml", "setup.py", "README.md", "CHANGELOG.md"),
    *("bench", "docs", "src", "tests"),
)


class Kernel(NamedTuple):
    version: str
    image: Path
    modules: list[Path]


class Machine(NamedTuple):
    """What QEMU emulates."""

    debian: str  # Debian's name of the architecture
    qemu: str
    package: str
    options: tuple[str, ...]
    console: str


MACHINES = {
    "x86_64": Machine(
        "amd64",
        "qemu-system-x86_64",
        "qemu-system-x86",
        # QEMU 7.2 leaves wrong flags behind cmpxchg16b: 6.12, which uses it
        # in kmalloc(), crashed in 3 of 5 boots.  It emulates a fast "rep
        # movsb" a byte at a time: a third of what a page fault takes.
        ("-machine", "q35", "-cpu", "max,cx16=off,erms=off,fsrm=off"),
        "ttyS0",
    ),
    "aarch64": Machine(
        "arm64",
        "qemu-system-aarch64",
        "qemu-system-arm",
        # The architecture's own pointer signatures take half of the time.
        ("-machine", "virt", "-cpu", "max,pauth-impdef=on"),
        "ttyAMA0",
    ),
}
HERE = os.uname().machine


def fail(code: int, message: str) -> NoReturn:
    print(f"tests/vm/run.py: {message}", file=sys.stderr)
    sys.exit(code)


# -- Kernels -----------------------------------------------------------------


def normal(module: str) -> str:
    return module.replace("-", "_")


def read_module(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.check_output(["zstd", "-dcq", path])
    return path.read_bytes()


def unpack_modules(tree: Path, target: Path) -> None:
    """Write MODULES and what they depend on, numbered in order of loading."""
    found = {
        normal(path.name.split(".ko")[0]): path for path in tree.rglob("*.ko*")
    }
    done: set[str] = set()

    def unpack(name: str) -> None:
        if name in done or name not in found:
            return
        done.add(name)
        data = read_module(found[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends[1].decode().split(",") if depends else ():
            unpack(normal(other))
        number = len(list(target.glob("*.ko")))
        (target / f"{number:02}-{name}.ko").write_bytes(data)

    for name in MODULES:
        unpack(normal(name))


def fetch(home: Path, suite: str, debian: str) -> None:
    """Put the suite's newest kernel that can be downloaded into home."""
    apt = Suite(home, suite, architecture=debian)
    print(f"looking for the kernel of {suite}, {debian}", flush=True)
    apt.update()
    names = apt.cache("pkgnames", "linux-").split()
    packages: dict[str, dict[str, str]] = {}
    for name in names:
        match = re.fullmatch(
            rf"linux-(image|binary|modules)-(\d.*-cloud-{debian})", name
        )
        if match:
            packages.setdefault(match[2], {})[match[1]] = name

    for version in sorted(packages, key=by_number, reverse=True):
        kinds = packages[version]
        # A kernel is one package, or two and an empty one that names them.
        wanted = (
            [kinds["binary"], kinds["modules"]]
            if kinds.keys() >= {"binary", "modules"}
            else [kinds["image"]]
            if "image" in kinds
            else []
        )
        if not wanted:
            continue
        with tempfile.TemporaryDirectory(dir=home) as name:
            work = Path(name)
            tree, ready = work / "tree", work / "ready"
            if not apt.unpack(wanted, work, tree):
                continue
            ready.mkdir()
            (image,) = tree.rglob("vmlinuz*")
            shutil.copy(image, ready / "vmlinuz")
            unpack_modules(tree, ready)
            (ready / "modules").write_text(" ".join(MODULES))
            final = home / version
            if final.exists():
                shutil.rmtree(final)
            ready.rename(final)
        return
    fail(NO_KERNEL, f"no kernel of {suite} could be downloaded")


def has_all(image: Path) -> bool:
    """Whether its modules are those that are wanted today."""
    list_of = image.parent / "modules"
    return list_of.exists() and list_of.read_text() == " ".join(MODULES)


def kernel_of(suite: str, arch: str, cache: Path, update: bool) -> Kernel:
    home = cache / (suite if arch == "x86_64" else f"{suite}-{arch}")
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if update or not any(map(has_all, home.glob("*/vmlinuz"))):
            try:
                fetch(home, suite, MACHINES[arch].debian)
            except (subprocess.CalledProcessError, Unreachable) as error:
                fail(NO_KERNEL, f"{suite}: {error}")
        images = sorted(
            home.glob("*/vmlinuz"), key=lambda path: by_number(str(path))
        )
    newest = images[-1]
    modules = sorted(newest.parent.glob("*.ko"))
    return Kernel(newest.parent.name, newest, modules)


# -- The initramfs -----------------------------------------------------------


class Archive:
    """A cpio archive ("newc") as the kernel unpacks it into its root.

    Everything belongs to root and everyone may read it, and keep what is
    compiled of a Python file. A file keeps its path, but for /bin, /sbin and
    /lib*, which are links into /usr.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.names: set[str] = set()
        self._dynamic: list[str] = []
        for name in ("bin", "sbin", "lib", "lib64"):
            self.link(f"/{name}", f"usr/{name}")

    @staticmethod
    def _inside(path: str | Path) -> str:
        name = os.path.normpath(path).lstrip("/")
        return re.sub(r"^(bin|sbin|lib|lib64)/", r"usr/\1/", name)

    def _entry(
        self,
        name: str,
        mode: int,
        data: bytes = b"",
        mtime: float = 0,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self.names.add(name)
        encoded = os.fsencode(name) + b"\0"
        fields = (
            len(self.names),  # inode
            mode,
            0,  # user
            0,  # group
            1,  # links
            int(mtime),
            len(data),
            0,
            0,
            *device,
            len(encoded),
            0,  # no checksum
        )
        head = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (head + encoded, data):
            self._file.write(part + bytes(-len(part) % 4))

    def directory(self, path: str | Path, mode: int = 0o755) -> None:
        name = self._inside(path)
        if name not in self.names:
            self._parents(name)
            if os.path.basename(name) == "__pycache__":
                mode = 0o1777
            self._entry(name, stat.S_IFDIR | mode)

    def _parents(self, name: str) -> None:
        parent = os.path.dirname(name)
        if parent:
            self.directory(parent)

    def device(self, path: str, major: int, minor: int) -> None:
        name = self._inside(path)
        self._parents(name)
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def link(self, path: str | Path, target: str) -> None:
        name = self._inside(path)
        self._parents(name)
        self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def write(
        self,
        path: str | Path,
        data: bytes,
        executable: bool = False,
        mtime: float = 0,
    ) -> None:
        name = self._inside(path)
        self._parents(name)
        mode = 0o755 if executable else 0o644
        self._entry(name, stat.S_IFREG | mode, data, mtime)
        if name.endswith(".py"):
            self.directory(f"/{os.path.dirname(name)}/__pycache__")

    def add(self, source: str | Path, path: str | Path | None = None) -> None:
        """Add a file, or a tree; of a link, also what it points to."""
        source = Path(source)
        path = source if path is None else Path(path)
        if self._inside(path) in self.names:
            return
        if source.is_symlink():
            target = os.readlink(source)
            self.link(path, target)
            self.add(os.path.normpath(source.parent / target))
        elif source.is_dir():
            for child in sorted(source.iterdir()):
                if child.name not in UNNEEDED and not child.name.endswith(
                    (".a", ".opt-1.pyc", ".opt-2.pyc", ".o")
                ):
                    self.add(child, path / child.name)
        else:
            data = source.read_bytes()
            state = source.stat()
            executable = bool(state.st_mode & stat.S_IXUSR)
            self.write(path, data, executable, state.st_mtime)
            if data.startswith(b"\x7fELF"):
                self._dynamic.append(str(source))

    def add_root(self, tree: Path) -> None:
        """Add a tree that is to be the root; links point where they do."""
        for source in sorted(tree.rglob("*")):
            path = source.relative_to(tree)
            if self._inside(path) in self.names:
                continue
            if source.is_symlink():
                self.link(path, os.readlink(source))
            elif source.is_dir():
                self.directory(path)
            else:
                executable = bool(source.stat().st_mode & stat.S_IXUSR)
                self.write(path, source.read_bytes(), executable)

    def add_libraries(self) -> None:
        """Add the shared libraries of all programs and libraries in here."""
        listing = subprocess.run(
            ["ldd", *self._dynamic],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # static ones are complained about
            text=True,
            check=False,
        ).stdout
        for path in re.findall(r"(/\S+) \(0x", listing):
            self.add(path)

    def finish(self) -> None:
        self._entry("TRAILER!!!", 0)


def requirements() -> list[str]:
    """What the tests need, as pyproject.toml has it, but for LEFT_OUT."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        groups = tomllib.load(file)["dependency-groups"]
    return [
        text
        for text in groups["test-core"] + groups["test"]
        if type(text) is str and not text.startswith(LEFT_OUT)
    ]


def distributions(wanted: list[str]) -> list[importlib.metadata.Distribution]:
    """Give those, and all that they require."""
    wanted = list(wanted)
    found: dict[str, importlib.metadata.Distribution] = {}
    while wanted:
        requirement = wanted.pop()
        match = re.match(r"[\w.-]+", requirement)
        if not match or "extra ==" in requirement or match[0] in found:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[match[0]] = importlib.metadata.distribution(match[0])
            wanted += found[match[0]].requires or ()
    return list(found.values())


def add_python(archive: Archive, wanted: list[str]) -> None:
    """The interpreter that runs this, with these packages."""
    archive.add(sys.executable)
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists():
        archive.add(config)
    for key in ("stdlib", "platstdlib"):
        archive.add(sysconfig.get_path(key, vars={"base": sys.base_prefix}))
    for distribution in distributions(wanted):
        for file in distribution.files or ():
            path = Path(os.path.normpath(str(distribution.locate_file(file))))
            if path.is_file():
                archive.add(path)
    # Installed from the source tree ("editable"), it has no files of its own.
    package = importlib.util.find_spec("mrelease")
    if package and package.submodule_search_locations:
        site = Path(sysconfig.get_path("platlib"))
        for folder in package.submodule_search_locations:
            archive.add(folder, site / "mrelease")


def library(name: str) -> str | None:
    """The path of a shared library that something opens by its name."""
    soname = ctypes.util.find_library(name)
    listing = subprocess.run(
        ["/sbin/ldconfig", "-p"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    ).stdout
    match = re.search(rf"\t{re.escape(soname or '-')} .*=> (\S+)", listing)
    return match[1] if match else None


def victim(work: Path, arch: str) -> Path | None:
    """The victim program of the tests, static: it needs nothing inside."""
    ready = os.environ.get("MRELEASE_TEST_VICTIM")
    if ready and arch == HERE:
        return Path(ready)
    source = ROOT / "tests/native/victim.c"
    if not source.exists():
        return None
    program = work / "victim"
    if arch != HERE:
        compiler = arm64.compiler()
    elif not (compiler := shutil.which("cc") or shutil.which("gcc") or ""):
        fail(MISSING, "a C compiler is missing; apt-get install gcc libc6-dev")
    flags = ("-std=c11", "-O2", "-static", "-pthread")
    subprocess.run([compiler, *flags, "-o", program, source], check=True)
    return program


def fill_from_here(archive: Archive, wanted: list[str]) -> str:
    """What this machine has, at the same paths; the Python to run."""
    for name in TOOLS:
        tool = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if tool:
            archive.add(tool)
    for name in LIBRARIES:
        path = library(name)
        if path:
            archive.add(path)
    add_python(archive, wanted)
    for path in ("/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/mke2fs.conf"):
        if os.path.exists(path):
            archive.add(path)
    return sys.executable


def fill_from_debian(
    archive: Archive, wanted: list[str], work: Path, home: Path
) -> str:
    """A Debian for aarch64, and the wheel; the Python to run."""
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tree = arm64.tree(home)
        packages = arm64.packages(home, wanted) if wanted else None
    wheel = arm64.wheel(work, ROOT, tree)
    print(f"cross-built {wheel.name}", flush=True)
    if packages is not None:
        archive.add(packages, PACKAGES)
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            archive.write(PACKAGES / name, files.read(name))
    archive.add_root(tree)
    return arm64.PYTHON


def compile_tests(arguments: list[str]) -> None:
    """Have pytest keep what it compiles; in emulation that takes minutes."""
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    subprocess.run(
        [*pytest, "--collect-only", "-qq", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,  # without it all is slower
    )


def pack(
    file: BinaryIO, work: Path, job: Job, kernel: Kernel, options: Options
) -> None:
    """Write the initramfs."""
    archive = Archive(file)
    for name in ("proc", "sys", "root", "run", "mnt", "var"):
        archive.directory(f"/{name}")
    archive.directory("/tmp", 0o1777)
    archive.directory("/var/tmp")
    archive.device("/dev/console", 5, 1)
    init = ROOT / "tests/vm/init"
    archive.write("/init", init.read_bytes(), executable=True)

    busybox = shutil.which("busybox")
    if not busybox:
        fail(MISSING, "busybox is missing; apt-get install busybox-static")
    wanted = [] if options.program else requirements()
    if job.arch == HERE:
        archive.add(busybox, "/bin/busybox")
        python = fill_from_here(archive, ["mrelease", *wanted])
    else:
        home = options.cache / job.arch
        home.mkdir(parents=True, exist_ok=True)
        python = fill_from_debian(archive, wanted, work, home)
    for name in REPOSITORY:
        if (ROOT / name).exists():
            archive.add(ROOT / name)
    for argument in options.arguments:
        path = argument.split("::")[0]
        if os.path.isabs(path) and os.path.exists(path):
            archive.add(path)
    for module in kernel.modules:
        archive.add(module, f"/modules/{module.name}")

    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("MRELEASE_TEST_")
    }
    program = victim(work, job.arch)
    if program:
        archive.add(program, "/victim")
        environment["MRELEASE_TEST_VICTIM"] = "/var/tmp/victim"
    environment |= {
        "MRELEASE_TEST_DISPOSABLE": "1",
        "PATH": f"{Path(python).parent}:/usr/sbin:/usr/bin",
        "HOME": "/root" if job.user == "root" else "/tmp",
        "TMPDIR": "/var/tmp",
        "PYTHONUNBUFFERED": "1",
    }
    version = "import platform; print('@vm python', platform.python_version())"
    # No cache: the tests' folder may belong to somebody else.
    color = "yes" if sys.stdout.isatty() else "no"
    tests = ["-m", "pytest", "-p", "no:cacheprovider", f"--color={color}"]
    tests = [
        *([] if options.program else tests),
        *(t.replace("{machine}", name_of(job)) for t in options.arguments),
    ]
    lines = [
        "#!/bin/sh",
        f"cd {shlex.quote(str(ROOT))} || exit",
        *(f"export {k}={shlex.quote(v)}" for k, v in environment.items()),
        shlex.join([python, "-c", version]),
        f"exec {shlex.join([python, *tests])}",
    ]
    text = "\n".join(lines) + "\n"
    if job.user != "root":
        archive.write("/run-as-user", text.encode(), executable=True)
        # Not another su, which would ask PAM.
        su = f"busybox su -s /bin/sh -c /run-as-user {job.user}"
        text = f"#!/bin/sh\nexec {su}\n"
    archive.write("/run-tests", text.encode(), executable=True)

    archive.link("/etc/mtab", "/proc/self/mounts")
    archive.write("/etc/hosts", b"127.0.0.1 localhost vm\n")
    archive.write(
        "/etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\n"
        b"nobody:x:65534:65534:nobody:/tmp:/bin/sh\n",
    )
    archive.write("/etc/group", b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")
    archive.add_libraries()
    applets = subprocess.check_output([busybox, "--list"], text=True).split()
    for name in applets:
        if not {f"usr/bin/{name}", f"usr/sbin/{name}"} & archive.names:
            archive.link(f"/bin/{name}", "busybox")
    archive.finish()


# -- The machine -------------------------------------------------------------


class Job(NamedTuple):
    """One machine to boot."""

    suite: str
    arch: str
    user: str


def name_of(job: Job) -> str:
    return "-".join(job)


class Options(argparse.Namespace):
    kernel: list[tuple[str, str]]
    user: list[str]
    memory: str
    swap: str
    program: bool
    limit: float
    at_once: int
    keep: bool
    update: bool
    cache: Path
    json: Path | None
    arguments: list[str]


class Result(NamedTuple):
    """What became of it."""

    job: Job
    version: str
    code: int
    seconds: float
    counts: dict[str, int]  # passed, failed, skipped, rerun, ...
    skipped: dict[str, int]  # by reason
    line: str

    @property
    def failed(self) -> int:
        return sum(self.counts.get(name, 0) for name in ("failed", "error"))


class Off(Exception):
    """No more machines are wanted."""


class Room:
    """Where machines run; closed, all are switched off for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._machines: set[subprocess.Popen[bytes]] = set()
        self._open = True

    @contextlib.contextmanager
    def start(self, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        with self._lock:
            if not self._open:
                raise Off
            machine = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self._machines.add(machine)
        try:
            with machine:
                try:
                    yield machine
                finally:
                    machine.kill()
        finally:
            with self._lock:
                self._machines.remove(machine)

    def close(self) -> None:
        with self._lock:
            self._open = False
            for machine in self._machines:
                machine.kill()


def boot(
    command: list[str], limit: float, room: Room, say: Callable[[str], None]
) -> tuple[int, dict[str, float], list[str]]:
    """Run the machine: its result, when it said what (s), its lines."""
    began = time.monotonic()
    said: dict[str, float] = {}
    lines: list[str] = []
    code = NO_RESULT
    late = threading.Event()
    with room.start(command) as machine:

        def stop() -> None:
            late.set()
            machine.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert machine.stdout is not None
            for raw in machine.stdout:
                # A terminal shows what follows the last carriage return.
                line = raw.decode(errors="replace").rstrip("\r\n")
                line = line.rpartition("\r")[2]
                match = re.search(r"@vm (\w+) (\S+)", line)
                if match:
                    said[match[1]] = time.monotonic() - began
                    if match[1] == "exit":
                        code = int(match[2])
                else:
                    say(line)
                    lines.append(re.sub(r"\033\[[\d;]*m", "", line))
        finally:
            timer.cancel()
    said["off"] = time.monotonic() - began
    return TIMEOUT if late.is_set() else code, said, lines


def counted(lines: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Give pytest's counts, and how many were skipped for which reason."""
    counts: dict[str, int] = {}
    skipped: dict[str, int] = collections.Counter()
    for line in lines:
        if match := re.match(r"SKIPPED \[(\d+)\] [^ :]+(?::\d+)?: (.*)", line):
            skipped[match[2]] += int(match[1])
        elif re.match(r"(=+ )?\d+ \w+(, \d+ \w+)* in [\d.]+s", line):
            for number, word in re.findall(r"(\d+) ([a-z]+)", line):
                counts.setdefault(word.removesuffix("s"), int(number))
    return counts, skipped


def run(
    job: Job, options: Options, room: Room, say: Callable[[str], None]
) -> Result:
    """Boot one kernel, and run the tests in it."""
    machine = MACHINES[job.arch]
    kernel = kernel_of(job.suite, job.arch, options.cache, options.update)
    work = Path(tempfile.mkdtemp(prefix="mrelease-vm-"))
    try:
        began = time.monotonic()
        initramfs = work / "initramfs"
        with open(initramfs, "wb") as file:
            pack(file, work, job, kernel, options)
        packing = time.monotonic() - began
        size = initramfs.stat().st_size / 2**20

        command = [machine.qemu]
        command += [*machine.options, "-smp", "2", "-m", options.memory]
        command += ["-display", "none", "-monitor", "none", "-nic", "none"]
        command += ["-serial", "stdio", "-no-reboot"]
        command += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        # What the kernel does not know is in the environment of init.
        # An emulated processor has none of the faults that are mitigated.
        words = f"console={machine.console} quiet panic=-1 mitigations=off"
        command += ["-append", f"{words} swap={options.swap}"]
        command += ["-accel", "tcg,thread=multi"]
        say(f"== {job.suite}: Linux {kernel.version}, {job.arch}, {job.user}")
        if options.keep:
            say(shlex.join(command))
        code, said, lines = boot(command, options.limit, room, say)
        if code == NO_RESULT:
            # Emulation is not always true: code that one processor changes
            # while another runs it (a static key) has made a kernel crash.
            # Not so where they take turns in one thread, which is slower.
            say("the machine broke down: once more, in turns")
            command[-1] = "tcg,thread=single"
            code, said, lines = boot(command, options.limit, room, say)
    finally:
        if not options.keep:
            shutil.rmtree(work)

    result = {
        0: "passed",
        NO_RESULT: "ended without a result",
        TIMEOUT: f"not done after {options.limit:g} s",
    }.get(code, f"exit code {code}")
    times = [f"packed {size:.0f} MiB in {packing:.1f} s"]
    before = 0.0
    for word, meaning in (
        ("up", "booted"),
        ("python", "Python"),
        ("exit", "tests"),
        ("off", "off"),
    ):
        if word in said:
            times.append(f"{meaning} {said[word] - before:.1f} s")
            before = said[word]
    return Result(
        job,
        kernel.version,
        code,
        time.monotonic() - began,
        *counted(lines),
        f"{kernel.version}, {job.user}: {result} ({', '.join(times)})",
    )


def run_all(jobs: list[Job], options: Options) -> list[Result]:
    """Some at once; where they are, each line says of which it is."""
    room = Room()

    def one(job: Job) -> Result:
        name = "" if len(jobs) == 1 or options.at_once == 1 else name_of(job)

        def say(line: str) -> None:
            # At once: another thread may write, too.
            line = f"{name}: {line}\n" if name else f"{line}\n"
            print(line, end="", flush=True)

        return run(job, options, room, say)

    with concurrent.futures.ThreadPoolExecutor(options.at_once) as workers:
        try:
            return list(workers.map(one, jobs))
        except BaseException:
            room.close()
            workers.shutdown(cancel_futures=True)
            raise


def table(results: list[Result]) -> str:
    """Kernel by kernel; then the reasons, with how many where."""
    rows = [
        (
            *("kernel", "architecture", "user"),
            *("passed", "failed", "skipped", "minutes"),
        ),
        *(
            (
                result.version,
                result.job.arch,
                result.job.user,
                str(result.counts.get("passed", 0)),
                # Where the machine broke down, nothing is known to be good.
                str(result.failed or (result.code and f"({result.code})")),
                str(result.counts.get("skipped", 0)),
                f"{result.seconds / 60:.1f}",
            )
            for result in results
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if number < 3 else cell.rjust(width)
            for number, (cell, width) in enumerate(
                zip(row, widths, strict=True)
            )
        )
        for row in rows
    ]
    reasons = collections.Counter[str]()
    for result in results:
        reasons.update(result.skipped)
    if reasons:
        text += ["", "skipped, in the order of the rows, and why"]
    for reason, _ in sorted(reasons.items(), key=lambda item: -item[1]):
        numbers = "/".join(str(r.skipped.get(reason, 0)) for r in results)
        text.append(f"{numbers}  {reason}")
    return "\n".join(text)


def report(results: list[Result], arguments: list[str]) -> str:
    rows = [
        {
            "kernel": result.version,
            "arch": result.job.arch,
            "user": result.job.user,
            "code": result.code,
            "seconds": round(result.seconds),
            "passed": result.counts.get("passed", 0),
            "failed": result.failed,
            "skipped": result.counts.get("skipped", 0),
            "reasons": result.skipped,
        }
        for result in results
    ]
    made = {
        "target": "vm",
        "date": time.strftime("%Y-%m-%d"),
        "pytest": shlex.join(arguments),
        "rows": rows,
    }
    return json.dumps(made, indent=1) + "\n"


def room_for_machines() -> int:
    """One for each CPU, if there are 4 GiB for it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory >> 32))


def a_kernel(text: str) -> tuple[str, str]:
    suite, _, arch = text.partition("/")
    arch = arch or HERE
    if suite not in SUITES or arch not in MACHINES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(SUITES)}, with or without"
            f" one of /{', /'.join(MACHINES)}"
        )
    return suite, arch


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run the tests on other kernels; see the docstring.",
        epilog="All other arguments go to pytest.",
        allow_abbrev=False,
    )
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    add = parser.add_argument
    add(
        "--kernel",
        type=a_kernel,
        action="append",
        metavar="SUITE[/ARCH]",
        help="that of this Debian suite (bookworm); may be repeated",
    )
    add(
        "--user",
        choices=("root", "nobody"),
        action="append",
        help="as whom (root); may be repeated",
    )
    add("--memory", default="3G", help="of the machine")
    add("--swap", default="512M", help="so much, on zram; 0: none")
    add(
        "--program",
        action="store_true",
        help="run a Python program, not pytest",
    )
    add("--limit", type=float, default=3600, help="seconds to the hard end")
    add(
        "--at-once",
        type=int,
        default=room_for_machines(),
        metavar="N",
        help="so many machines (as many as CPUs, if the memory is enough)",
    )
    add("--keep", action="store_true", help="keep the initramfs")
    add("--update", action="store_true", help="look for a newer kernel")
    add("--json", type=Path, help="write the table there, too")
    add(
        "--cache",
        type=Path,
        default=Path(cache, "mrelease-vm").expanduser(),
        help="where kernels are kept",
    )
    options = Options()
    _, options.arguments = parser.parse_known_args(namespace=options)
    kernels = options.kernel or [("bookworm", HERE)]

    for _, arch in kernels:
        machine = MACHINES[arch]
        if not shutil.which(machine.qemu) or not shutil.which("busybox"):
            fail(
                MISSING,
                "needs QEMU and busybox: apt-get install"
                f" --no-install-recommends {machine.package} busybox-static",
            )
    for name in ("mrelease", *(() if options.program else ("pytest",))):
        if importlib.util.find_spec(name) is None:
            fail(MISSING, f"{sys.executable} has no {name}: install it there")

    # SIGTERM as an exception, so that no machine is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    jobs = [
        Job(suite, arch, user)
        for suite, arch in kernels
        for user in options.user or ["root"]
    ]
    if not options.program and any(job.arch == HERE for job in jobs):
        compile_tests(options.arguments)
    try:
        results = run_all(jobs, options)
    except arm64.Missing as error:
        fail(MISSING, str(error))
    print(*(result.line for result in results), sep="\n")
    print("\n" + table(results))
    if options.json is not None:
        options.json.write_text(report(results, options.arguments))
    return next(filter(None, (result.code for result in results)), 0)


if __name__ == "__main__":
    sys.exit(main())
