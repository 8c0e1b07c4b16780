"""From a path to an open directory, by links that can be trusted only.

Whoever owns a symbolic link may lead it elsewhere at any moment: who kills
with more rights than they have would kill what they choose.  So a link is
followed only if it is root's or the caller's own, and what was looked at is
what is followed: each component is opened by the directory before, and a link
is asked for its owner and its text through one file descriptor.  A check of
the whole path first and an open() of it later would be two different looks.
"""

from __future__ import annotations

import os
from errno import ELOOP, ENAMETOOLONG
from stat import S_ISLNK

from mrelease import _mrelease

PROC_SUPER_MAGIC = 0x9FA0
"""f_type of statfs(2)."""
_PROC_ROOT = 1  # PROC_ROOT_INO
_MOST_LINKS = 40  # MAXSYMLINKS, as in the kernel
_PATH_MAX = 4096
_LOOK = os.O_PATH | os.O_CLOEXEC


class Distrusted(Exception):
    """A link on the way was not followed; the text says why."""


def open_directory(path: str) -> int:
    """Open a directory for reading.

    Raises Distrusted; OSError as open(2) does, with the whole path;
    ValueError for a path with a zero byte in it.
    """
    try:
        if len(os.fsencode(path)) >= _PATH_MAX:
            raise OSError(ENAMETOOLONG, os.strerror(ENAMETOOLONG))
        at = _walk(path)
        try:
            return os.open(
                ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at
            )
        finally:
            os.close(at)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def _walk(path: str) -> int:
    """Give an O_PATH file descriptor of what the path leads to."""
    rest = path.split("/")[::-1]  # what comes next stands last
    at = os.open("/" if path[:1] == "/" else "." if path else "", _LOOK)
    links = 0
    try:
        while rest:
            name = rest.pop()
            if name in ("", "."):
                continue
            found = os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=at)
            status = os.fstat(found)
            if S_ISLNK(status.st_mode):
                try:
                    links += 1
                    if links > _MOST_LINKS:
                        raise OSError(ELOOP, os.strerror(ELOOP))
                    target = _follow(found, at, name, status.st_uid)
                finally:
                    os.close(found)
                if isinstance(target, str):
                    rest += target.split("/")[::-1]
                    if target[:1] != "/":
                        continue
                    target = os.open("/", _LOOK)
                found = target
            os.close(at)
            at = found
        return at
    except BaseException:
        os.close(at)
        raise


def _follow(link: int, at: int, name: str, owner: int) -> str | int:
    """Give the text of a link, or an O_PATH file descriptor of its target."""
    if owner not in (0, os.geteuid()):
        raise Distrusted(
            f"the link {name!r} on the way to it is neither root's nor the "
            f"caller's, but user {owner}'s: name what it leads to"
        )
    if (
        _mrelease.file_system(link) != PROC_SUPER_MAGIC
        or os.fstat(at).st_ino == _PROC_ROOT  # self, thread-self
    ):
        return os.readlink("", dir_fd=link)
    # The others of /proc lead to files, not to their text.  They are root's if
    # their process may not be traced, and lead where that process likes.
    if not os.path.samestat(os.fstat(at), os.stat("/proc/self/fd")):
        raise Distrusted(
            f"the link {name!r} on the way to it is one of /proc, and leads "
            "where a process likes: name what it leads to"
        )
    return os.open(name, _LOOK, dir_fd=at)
