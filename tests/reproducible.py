"""Build sdist and wheel again, elsewhere and otherwise: the same bytes?

    python tests/reproducible.py BUILDER PYTHON DIST

PYTHON builds the wheel and BUILDER (it has `build`) the sdist, of the sdist in
DIST. Folder, dates, umask, time zone, language and home are others. Prints
what was compared; exit code 1 if something differs.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

OTHERWISE = {
    "TZ": "Pacific/Kiritimati",
    "LC_ALL": "C",
    "LANG": "tr_TR.UTF-8",
    "PYTHONHASHSEED": "4711",
    "USER": "somebody",
}


def contents(data: bytes) -> dict[str, tuple[object, ...]]:
    """Each file: what is told about it, and the digest."""
    found: dict[str, tuple[object, ...]] = {}
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            for each in wheel.filelist:
                digest = hashlib.sha256(wheel.read(each)).hexdigest()
                about = (each.date_time, oct(each.external_attr >> 16))
                found[each.filename] = (*about, digest)
        return found
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            digest = hashlib.sha256(file.read() if file else b"").hexdigest()
            found[member.name] = (member.mtime, oct(member.mode), digest)
    return found


def same(one: Path, other: Path) -> bool:
    ours, theirs = one.read_bytes(), other.read_bytes()
    if ours == theirs:
        print(f"{one.name}: the same {len(ours):,} bytes")
        return True
    print(f"{one.name}: it differs")
    before, after = contents(ours), contents(theirs)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            print(f"  {name}: {before.get(name)} {after.get(name)}")
    return False


def again(builder: str, python: str, dist: Path) -> bool:
    source = next(dist.glob("*.tar.gz"))
    with tempfile.TemporaryDirectory(prefix="reproducible-") as folder:
        work = Path(folder) / ("a-longer-name-" * 5)
        home = work / "home"
        home.mkdir(parents=True)
        subprocess.run(["tar", "-xzf", source, "-C", work], check=True)
        tree = work / source.name.removesuffix(".tar.gz")
        for path in tree.rglob("*"):
            os.utime(path, (1234567890, 1234567890))
            path.chmod(0o700 & path.stat().st_mode)
        environment = os.environ | OTHERWISE | {"HOME": str(home)}
        environment.pop("SOURCE_DATE_EPOCH", None)
        out = work / "out"
        for argv in (
            [python, "-m", "pip", "wheel", "--quiet", "--no-deps",
             "--no-cache-dir", "--wheel-dir", str(out), str(tree)],
            [builder, "-m", "build", "--sdist", "--outdir", str(out),
             str(tree)],
        ):  # fmt: skip
            subprocess.run(
                argv, env=environment, umask=0o077, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        made = sorted(out.iterdir())
        assert len(made) == 2, made
        results = [same(dist / each.name, each) for each in made]
        return all(results)


if __name__ == "__main__":
    sys.exit(not again(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
