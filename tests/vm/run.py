"""Run the test suite on another kernel, in a machine of its own.

    python tests/vm/run.py --kernel bullseye tests/test_kill.py -k dumping

Debian's stock cloud kernel of the suite is booted under QEMU, emulating the
processor (no KVM is needed), with an initramfs that holds the Python which
runs this script, pytest, the *installed* mrelease, the tests, a static
victim and busybox. There is no disk and no network. All arguments that are
not this script's own go to pytest, whose output is printed as it comes and
whose exit code is returned.

Inside, the tests are root with all capabilities (or --user), cgroup v2 is
mounted with every controller enabled, there are loop devices and 512 MiB of
zram swap, and MRELEASE_TEST_DISPOSABLE=1 says that the machine may be
changed in any way. Files keep the path that they have outside; all is in
memory (tmpfs: what is mapped counts as RssShmem), only $TMPDIR, where the
victim's program lies too, is ext4.

Kernels are fetched by apt, which checks them, from the mirror that this
machine's own apt uses for Debian (or $MRELEASE_VM_MIRROR), with lists of
their own: nothing is installed and the system's lists are not touched. They
are kept in --cache; --update looks for a newer one.

Needs: qemu-system-x86_64, busybox-static, apt, a C compiler, and a Python
that has mrelease and pytest installed. On 2 CPUs the machine is up after
10 s and runs the first test after 18 s.
Exit codes of its own, out of pytest's way: 69 something is missing here, 70
the machine ended without a result, 75 no kernel could be had, 124 timeout.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import fcntl
import importlib.metadata
import importlib.util
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
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from debian import Suite, Unreachable, by_number  # noqa: E402

MISSING = 69
NO_RESULT = 70
NO_KERNEL = 75
TIMEOUT = 124

SUITES = ("bullseye", "bookworm", "trixie", "sid")

# lzo-rle is what zram compresses with by default up to 6.1; nothing depends
# on it by name. What a kernel has built in, or lacks, is left out.
MODULES = ("lzo-rle", "zram", "loop")

# Taken from this machine where it has them; busybox has the rest. Its shell
# would prefer its own fsfreeze, mount and so on, whatever PATH says.
TOOLS = (
    *("chrt", "flock", "fsfreeze", "ldconfig", "losetup", "mkfs.ext4"),
    *("mount", "setpriv", "sh", "swapoff", "swapon", "umount", "unshare"),
)
LIBRARIES = ("gcc_s", "seccomp")

# Parts of the standard library that no test needs.
UNNEEDED = {
    *("ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"),
    *("test", "tests", "tkinter", "turtledemo"),
}
REPOSITORY = ("pyproject.toml", "setup.py", "README.md", "src", "tests")


class Kernel(NamedTuple):
    version: str
    image: Path
    modules: list[Path]


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


def fetch(home: Path, suite: str) -> None:
    """Put the suite's newest kernel that can be downloaded into home."""
    apt = Suite(home, suite)
    print(f"looking for the kernel of {suite}", flush=True)
    apt.update()
    names = apt.cache("pkgnames", "linux-").split()
    packages: dict[str, dict[str, str]] = {}
    for name in names:
        match = re.fullmatch(
            r"linux-(image|binary|modules)-(\d.*-cloud-amd64)", name
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
            final = home / version
            if final.exists():
                shutil.rmtree(final)
            ready.rename(final)
        return
    fail(NO_KERNEL, f"no kernel of {suite} could be downloaded")


def kernel_of(suite: str, cache: Path, update: bool) -> Kernel:
    home = cache / suite
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if update or not list(home.glob("*/vmlinuz")):
            try:
                fetch(home, suite)
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

    Everything belongs to root and everyone may read it. A file keeps its
    path, but for /bin, /sbin and /lib*, which are links into /usr.
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


def distributions() -> list[importlib.metadata.Distribution]:
    """mrelease, the packages of its test group, all that they require."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        groups = tomllib.load(file).get("dependency-groups", {})
    wanted = ["mrelease", "pytest"]
    wanted += [text for text in groups.get("test", ()) if type(text) is str]
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


def add_python(archive: Archive) -> None:
    """The interpreter that runs this, with what the tests import."""
    archive.add(sys.executable)
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists():
        archive.add(config)
    for key in ("stdlib", "platstdlib"):
        archive.add(sysconfig.get_path(key, vars={"base": sys.base_prefix}))
    for distribution in distributions():
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


def victim(work: Path) -> Path | None:
    """The victim program of the tests, static: it needs nothing inside."""
    ready = os.environ.get("MRELEASE_TEST_VICTIM")
    if ready:
        return Path(ready)
    source = ROOT / "tests/native/victim.c"
    if not source.exists():
        return None
    program = work / "victim"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        fail(MISSING, "a C compiler is missing; apt-get install gcc libc6-dev")
    flags = ("-std=c11", "-O2", "-static", "-pthread")
    subprocess.run([compiler, *flags, "-o", program, source], check=True)
    return program


def pack(
    file: BinaryIO, work: Path, kernel: Kernel, user: str, arguments: list[str]
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
    archive.add(busybox, "/bin/busybox")
    for name in TOOLS:
        tool = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if tool:
            archive.add(tool)
    for name in LIBRARIES:
        path = library(name)
        if path:
            archive.add(path)
    add_python(archive)
    for name in REPOSITORY:
        if (ROOT / name).exists():
            archive.add(ROOT / name)
    for argument in arguments:
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
    program = victim(work)
    if program:
        archive.add(program, "/victim")
        environment["MRELEASE_TEST_VICTIM"] = "/var/tmp/victim"
    environment |= {
        "MRELEASE_TEST_DISPOSABLE": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin",
        "HOME": "/root" if user == "root" else "/tmp",
        "TMPDIR": "/var/tmp",
        "PYTHONUNBUFFERED": "1",
    }
    version = "import platform; print('@vm python', platform.python_version())"
    # No cache: the tests' folder may belong to somebody else.
    color = "yes" if sys.stdout.isatty() else "no"
    tests = ["-m", "pytest", "-p", "no:cacheprovider", f"--color={color}"]
    tests += arguments
    lines = [
        "#!/bin/sh",
        f"cd {shlex.quote(str(ROOT))} || exit",
        *(f"export {k}={shlex.quote(v)}" for k, v in environment.items()),
        shlex.join([sys.executable, "-c", version]),
        f"exec {shlex.join([sys.executable, *tests])}",
    ]
    text = "\n".join(lines) + "\n"
    if user != "root":
        archive.write("/run-as-user", text.encode(), executable=True)
        text = f"#!/bin/sh\nexec su -s /bin/sh -c /run-as-user {user}\n"
    archive.write("/run-tests", text.encode(), executable=True)

    for path in ("/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/mke2fs.conf"):
        if os.path.exists(path):
            archive.add(path)
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


def boot(command: list[str], limit: float) -> tuple[int, dict[str, float]]:
    """Run the machine; its result, and when it said what, in seconds."""
    began = time.monotonic()
    said: dict[str, float] = {}
    code = NO_RESULT
    late = threading.Event()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as machine:

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
                    print(line, flush=True)
        finally:
            timer.cancel()
            machine.kill()
    said["off"] = time.monotonic() - began
    return TIMEOUT if late.is_set() else code, said


def run(
    qemu: str, suite: str, options: argparse.Namespace, arguments: list[str]
) -> tuple[int, str]:
    """Boot one kernel; the result, and a line that tells it."""
    kernel = kernel_of(suite, options.cache, options.update)
    work = Path(tempfile.mkdtemp(prefix="mrelease-vm-"))
    try:
        began = time.monotonic()
        initramfs = work / "initramfs"
        with open(initramfs, "wb") as file:
            pack(file, work, kernel, options.user, arguments)
        packing = time.monotonic() - began
        size = initramfs.stat().st_size / 2**20

        command = [qemu, "-machine", "q35", "-accel", "tcg,thread=multi"]
        # QEMU 7.2 leaves wrong flags behind cmpxchg16b: 6.12, which uses it
        # in kmalloc(), crashed in 3 of 5 boots.
        command += ["-cpu", "max,cx16=off", "-smp", "2", "-m", options.memory]
        command += ["-display", "none", "-monitor", "none", "-nic", "none"]
        command += ["-serial", "stdio", "-no-reboot"]
        command += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        command += ["-append", "console=ttyS0 quiet panic=-1"]
        print(f"== {suite}: Linux {kernel.version}", flush=True)
        if options.keep:
            print(shlex.join(command), flush=True)
        code, said = boot(command, options.limit)
    finally:
        if not options.keep:
            shutil.rmtree(work)

    result = {
        0: "passed",
        NO_RESULT: "ended without a result",
        TIMEOUT: f"not done after {options.limit:g} s",
    }.get(code, f"pytest's exit code {code}")
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
    return code, f"{suite} {kernel.version}: {result} ({', '.join(times)})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run the tests on another kernel; see the docstring.",
        epilog="All other arguments go to pytest.",
        allow_abbrev=False,
    )
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    add = parser.add_argument
    add(
        "--kernel",
        choices=SUITES,
        action="append",
        help="that of this Debian suite (bookworm); may be repeated",
    )
    add("--user", choices=("root", "nobody"), default="root")
    add("--memory", default="3G", help="of the machine")
    add("--limit", type=float, default=900, help="seconds to the hard end")
    add("--keep", action="store_true", help="keep the initramfs")
    add("--update", action="store_true", help="look for a newer kernel")
    add(
        "--cache",
        type=Path,
        default=Path(cache, "mrelease-vm").expanduser(),
        help="where kernels are kept",
    )
    options, arguments = parser.parse_known_args()

    qemu = shutil.which("qemu-system-x86_64")
    if not qemu or not shutil.which("busybox"):
        fail(
            MISSING,
            "needs QEMU and busybox: apt-get install --no-install-recommends"
            " qemu-system-x86 busybox-static",
        )
    for name in ("pytest", "mrelease"):
        if importlib.util.find_spec(name) is None:
            fail(MISSING, f"{sys.executable} has no {name}: install it there")

    # SIGTERM as an exception, so that no machine is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    suites = options.kernel or ["bookworm"]
    codes, lines = [], []
    for suite in suites:
        code, line = run(qemu, suite, options, arguments)
        codes.append(code)
        lines.append(line)
    print(*lines, sep="\n")
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
