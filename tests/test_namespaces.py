"""Whoever kills inside a PidNamespace reaches nobody outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import victims
from cgroups import Unavailable
from namespaces import NotAlone, PidNamespace

if TYPE_CHECKING:
    from collections.abc import Iterator

MAKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from namespaces import PidNamespace
inside = PidNamespace()
print(inside.start(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def inside() -> Iterator[PidNamespace]:
    try:
        namespace = PidNamespace()
    except Unavailable as why:
        pytest.skip(str(why))
    with namespace:
        yield namespace


def test_only_the_victim_and_the_peer_are_seen_inside(
    inside: PidNamespace,
) -> None:
    inside.only(None)
    with victims.asleep(1, pid_namespace=inside) as victim:
        peer = inside.start(["sleep", "60"])
        inside.only(victim.pid, peer.pid)
        assert inside.pids() == {
            1, inside.inner(victim.pid), inside.inner(peer.pid)
        }  # fmt: skip
    peer.kill()
    peer.wait()
    inside.only(None)


def test_one_more_process_inside_is_refused(inside: PidNamespace) -> None:
    with (
        victims.asleep(1, pid_namespace=inside) as victim,
        victims.asleep(1, pid_namespace=inside),
        pytest.raises(NotAlone, match=r"inside are \[1, "),
    ):
        inside.only(victim.pid)


def test_a_victim_outside_is_refused(inside: PidNamespace) -> None:
    with (
        victims.asleep(1) as victim,
        pytest.raises(NotAlone, match="in another pid namespace"),
    ):
        inside.only(victim.pid)


def test_a_peer_that_sees_another_proc_is_refused(
    inside: PidNamespace,
) -> None:
    with inside.entered():  # but not the mounts
        peer = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(NotAlone, match="sees another /proc"):
            inside.only(None, peer.pid)
    finally:
        peer.kill()
        peer.wait()


def test_a_peer_that_was_handed_a_pidfd_is_refused(
    inside: PidNamespace,
) -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        peer = inside.start(["sleep", "60"], stdin=pidfd)
    finally:
        os.close(pidfd)
    with pytest.raises(NotAlone, match="of outside"):
        inside.only(None, peer.pid)


def test_root_inside_kills_only_those_inside(inside: PidNamespace) -> None:
    with (
        victims.asleep(1, pid_namespace=inside) as victim,
        victims.asleep(1) as other,
    ):
        # All that it may signal, and by number what is not of its pids. It
        # waits until it is known to be inside, and makes sure itself.
        outside = os.readlink("/proc/self/ns/pid")
        script = (
            'read -r _; [ "$(readlink /proc/self/ns/pid)" = "$1" ] && exit 9;'
            'kill -KILL "$2"; kill -KILL 1; kill -KILL -1; exit 7'
        )
        peer = inside.start(
            ["sh", "-c", script, "sh", outside, str(other.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        inside.only(victim.pid, peer.pid)
        peer.communicate(b"\n", timeout=30)
        assert peer.returncode == 7  # the shell is not in its own -1
        assert victim.wait() == -signal.SIGKILL
        assert other.states() == "S"
        inside.only(None)  # its first process cannot be killed from inside


@pytest.mark.usefixtures("inside")  # so it is to be had
def test_it_does_not_outlive_its_maker() -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert maker.stdout is not None
        pidfd = os.pidfd_open(int(maker.stdout.readline()))
        try:
            maker.kill()
            victims.wait_until(lambda: _ended(pidfd), "the end of a peer")
        finally:
            os.close(pidfd)
    finally:
        maker.kill()
        maker.communicate()


def _ended(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False
