"""Kill a process with all its descendants, or a process group.

What is found in /proc is a number only.  So each process that is found is
pinned by a pidfd first, and then it is read again that it belongs: what holds
while the pidfd is open holds of the pidfd.  A process that cannot be proven to
belong is left alone.
"""

from __future__ import annotations

import os
from errno import EMFILE, ENFILE, ENOENT, ENOMEM, EPERM, ESRCH
from time import CLOCK_BOOTTIME, clock_gettime, monotonic, sleep

from mrelease import _mrelease
from mrelease.process import (
    no_file_left,
    read_fields,
    read_proc,
    shown,
    take_files,
)
from mrelease.protocol import Terms, bounded, may_signal
from mrelease.reaper import Reaper, check_reaper, kill_pinned
from mrelease.release import Outcome, Release
from mrelease.victim import Victim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal, SupportsIndex

    from mrelease.process import HasPid
    from mrelease.reaper import Reaping

    _Locks = Literal["protect", "ignore"]

_PATIENCE = 0.01
"""How long to wait for processes to stop when none does, in seconds.  One
that forks is running, and stops within microseconds; one that does not get to
run does not fork either."""
_TURN = 0.004
"""As much more for each that waits for its turn on a CPU: where they are many,
one that does not get to run now does so before all are killed."""
_MORE = 0.1
"""How much longer to look for the children of what did not stop."""
_WATCH = 0.02
"""How often to look for new processes during a grace, in seconds."""
_FILES = 8
"""File descriptors kept for what is looked at after a signal."""
_SHORT = (EMFILE, ENFILE, ENOMEM)
"""What says nothing of the process that was asked for."""


# ------------------------------------------------------------------ /proc


class _Stat:
    """The fields of /proc/PID/stat that tell where a process belongs."""

    __slots__ = ("group", "parent", "started", "state")

    def __init__(self, text: bytes) -> None:
        # The name, in parentheses, may hold anything, also a parenthesis.
        fields = text.rpartition(b")")[2].split()
        self.state = fields[0]
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.started = int(fields[19])


def _stat_of(pid: int) -> _Stat | None:
    """Give None for a process that is gone or hidden.

    Like all of these, raises OSError for want of a file descriptor.
    """
    if _mrelease.is_in_exec(pid):
        return _stat_in_exec(pid)
    try:
        text = read_proc(f"/proc/{pid}/stat")
    except OSError as error:
        if error.errno in _SHORT:
            raise
        return None
    # The folder of another process may be mounted there.
    return _Stat(text) if text.startswith(b"%d " % pid) else None


def _stat_in_exec(pid: int) -> _Stat | None:
    """Give what its status tells: who reads its stat may wait for ever."""
    try:
        status = read_fields(f"/proc/{pid}/status")
        state, parent = status["State"][:1], int(status["PPid"])
        group = os.getpgid(pid)
    except OSError as error:
        if error.errno in _SHORT:
            raise
        return None
    except KeyError:
        return None
    # When it began is not told: not before anything else.
    rest = "0 " * 16 + str(2**63)
    return _Stat(f"() {state} {parent} {group} {rest}".encode())


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError as error:
        if error.errno in _SHORT:
            raise
        return []


def _children_of(pid: int) -> list[int]:
    """Give the pids of the children, of all threads of the process."""
    if not os.path.exists("/proc/thread-self/children"):
        return _children_by_scan(pid)  # without CONFIG_PROC_CHILDREN
    found: list[int] = []
    for tid in _tasks(pid):
        try:
            text = read_proc(f"/proc/{pid}/task/{tid}/children")
        except OSError as error:
            if error.errno in _SHORT:
                raise
            continue
        found += map(int, text.split())
    return found


def _children_by_scan(pid: int) -> list[int]:
    return [
        each
        for each in _all_pids()
        if (stat := _stat_of(each)) is not None and stat.parent == pid
    ]


def _stands(victim: Victim) -> bool:
    """Whether no thread of it can fork now: all are stopped or have ended."""
    if _mrelease.is_in_exec(victim.pid):
        return True  # when it is through, it stops
    states: set[bytes] = set()
    try:
        tids = _tasks(victim.pid)
    except OSError:
        return _ended(victim)
    for tid in tids:
        try:
            text = read_proc(f"/proc/{victim.pid}/task/{tid}/stat")
        except OSError as error:
            if error.errno in _SHORT:
                return _ended(victim)
            continue
        states.add(_Stat(text).state)
    return not states - {b"T", b"t", b"Z", b"X"} or _ended(victim)


def _ended(victim: Victim) -> bool:
    return _mrelease.pidfd_state(victim) != "running"


def _reaped(victim: Victim) -> bool:
    return _mrelease.pidfd_state(victim) == "reaped"


def _need_proc(what: str) -> None:
    if not _mrelease.proc_is_ours():
        raise OSError(
            ENOENT,
            f"cannot tell {what}: /proc is not mounted, or is of another pid "
            "namespace; nothing was signalled",
        )


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _tick() -> int:
    """Give the time that a process which starts now has in its stat."""
    return int(clock_gettime(CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


class _Patience:
    """Wait a little, several times."""

    __slots__ = ("_begun", "_longest", "_times")

    def __init__(self, processes: int) -> None:
        self._begun = monotonic()
        self._longest = _PATIENCE + _TURN * (processes // _cpus())
        self._times = 0

    def wait(self) -> bool:
        """Wait a moment; True instead when it is enough."""
        # Time alone will not do: the caller may not have had a CPU.
        if self._times >= 8 and monotonic() - self._begun > self._longest:
            return True
        self._times += 1
        sleep(0.0002)
        return False


# -------------------------------------------------------------- selections


class _Files:
    """Some that are taken in advance, and are free while a block runs."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: list[_mrelease.Pidfd] = []

    def take(self) -> None:
        """Take them, or as many as there are."""
        self._taken += take_files(_FILES - len(self._taken))

    def close(self) -> None:
        """Give them back."""
        self._taken.clear()

    def __enter__(self) -> None:
        self.close()

    def __exit__(self, *_: object) -> None:
        self.take()


class Selection:
    """Processes that belong together; each is pinned."""

    def __init__(self) -> None:
        self.victims: list[Victim] = []
        self.lost: dict[int, Release] = {}
        """Found, but not to be pinned: no file descriptor was left."""
        self.unseen: dict[int, Release] = {}
        """What could not be looked at for more, likewise."""
        self.files: _Files = _Files()
        self.signalled = False
        # Some must be left to read /proc by, else nothing is seen at all.
        self._most_files: int = os.sysconf("SC_OPEN_MAX") - 16
        self._by_pid: dict[int, Victim] = {}

    def look(self) -> list[Victim]:
        """Find and pin what belongs and is not known yet."""
        raise NotImplementedError

    def look_at(self, parent: Victim) -> list[Victim]:
        """Find and pin the new ones that came of one process."""
        raise NotImplementedError

    def hold(self, victims: list[Victim], limit: float) -> None:
        """Before SIGKILL: see to it that nothing new can come of them."""

    def unheld(self) -> list[Victim]:
        """Give what hold() leaves alone: killed first, looked at at once."""
        return []

    def look_again(self) -> list[Victim]:
        """After SIGKILL: find what came into being just before it."""
        return self.look()

    def let_go(self) -> None:
        """Undo hold().  What was sent SIGKILL takes no notice."""

    def add(self, victim: Victim) -> Victim:
        """Take in a process that belongs."""
        self.victims.append(victim)
        self._by_pid[victim.pid] = victim
        return victim

    def pin(
        self, pid: int, belongs: Callable[[Victim], bool]
    ) -> Victim | None:
        """Pin a process and ask whether it belongs; None if not.

        Raises what Victim() does as long as nothing was signalled.
        """
        known = self._by_pid.get(pid)
        if pid in self.lost or (known is not None and not _reaped(known)):
            return None
        try:
            victim = Victim(pid)
            if victim.fileno() > self._most_files:
                victim.close()
                raise no_file_left(pid, EMFILE)
        except ProcessLookupError:
            return None
        except (OSError, ValueError) as error:
            if not self.signalled:
                raise
            if isinstance(error, OSError):
                self.lose(pid, error)
            return None
        try:
            # The last is asked last: only then was all read of this process.
            if belongs(victim) and not _reaped(victim):
                return self.add(victim)
        except OSError as error:
            victim.close()
            if not self.signalled:
                raise
            self.lose(pid, error)
            return None
        victim.close()
        return None

    def lose(self, pid: int, error: OSError) -> None:
        """Note a process that cannot be killed for want of something."""
        self.lost[pid] = Release(pid, Outcome.DENIED, errno=error.errno)

    def close(self) -> None:
        """Let go of all pidfds."""
        self.files.close()
        for victim in self.victims:
            victim.close()


class _Tree(Selection):
    """A process and its descendants, parents before children.

    A child that is forked after a look at its parent's children would be left
    over, and when its parent is dead nothing tells whose child it was.  So the
    parents are stopped, and looked at again, before they are killed.
    """

    def __init__(self, root: Victim) -> None:
        # Not at the top, where it would make `import mrelease` slow; and not
        # later, when processes are stopped.
        from signal import SIGCONT, SIGSTOP

        super().__init__()
        self._begun = _tick()
        self._stop_signal: int = SIGSTOP
        self._continue_signal: int = SIGCONT
        self.root = self.add(root)
        self._held: list[Victim] = []
        self._open: list[Victim] = []
        """Not seen to stand: they may have forked after the last look."""
        # The caller knows what it does, and no init waits for stopped ones.
        stat = _stat_of(root.pid)
        self._may_stop_root = stat is not None and (
            stat.parent in (os.getpid(), 1)
        )

    def collect(self, limit: float) -> None:
        """Pin the tree as it is, before anything is signalled."""
        for victim in self.victims:  # it grows meanwhile
            if monotonic() < limit or self._is_old(victim):
                self.look_at(victim)

    def _is_old(self, victim: Victim) -> bool:
        """Whether it was there at the call; a tree may grow for ever."""
        try:
            stat = _stat_of(victim.pid)
        except OSError:
            if not self.signalled:
                raise
            return False
        return stat is not None and stat.started <= self._begun

    def look_at(self, parent: Victim) -> list[Victim]:
        """Pin the new children of one process."""
        tick = _tick()

        def belongs(child: Victim) -> bool:
            stat = _stat_of(child.pid)
            if stat is None:
                return False
            if stat.parent == parent.pid and not _reaped(parent):
                return True
            # Its parent has died since.  If it is old enough, then it had
            # this pid already when that was in the list of children.
            return stat.started < tick

        if _reaped(parent):
            return []
        try:
            pids = _children_of(parent.pid)
        except OSError as error:
            if not self.signalled:
                raise
            self.unseen[parent.pid] = Release(
                parent.pid, Outcome.DENIED, errno=error.errno
            )
            return []
        self.unseen.pop(parent.pid, None)
        if _reaped(parent):
            return []  # the list may be that of another process
        found: list[Victim] = []
        for pid in pids:
            if pid == os.getpid():
                if not self.signalled:
                    raise _contains_caller(self.root.pid)
                continue
            child = self.pin(pid, belongs)
            if child is not None:
                found.append(child)
        return found

    def look(self) -> list[Victim]:
        found: list[Victim] = []
        for victim in list(self.victims):
            if not _ended(victim):
                found += self.look_at(victim)
        for victim in found:  # it grows meanwhile
            found += self.look_at(victim)
        return found

    def _stop(self, victim: Victim) -> None:
        try:
            stat = _stat_of(victim.pid)
        except OSError:
            pass  # to continue it is better than to miss what it forks
        else:
            if stat is None or stat.state in (b"T", b"t"):
                return  # somebody else stopped it: not ours to continue
        self._held.append(victim)  # first: an interrupt may come between
        try:
            _mrelease.pidfd_signal(victim, self._stop_signal)
        except OSError:
            self._held.pop()

    def hold(self, victims: list[Victim], limit: float) -> None:
        self.signalled = True
        late = self._hold(
            [v for v in victims if v not in self.unheld()], limit
        )
        # Those that stand take no CPU time from the others any more.
        late = self._hold(late, limit)
        late += [v for v in victims if v in self.unheld()]
        for victim in late:  # it grows meanwhile
            if monotonic() < limit + _MORE or self._is_old(victim):
                late += self._look_and_stop(victim)
        self._open += late

    def _hold(self, victims: list[Victim], limit: float) -> list[Victim]:
        """Stop them, and what they forked; give those that do not stop."""
        late: list[Victim] = []
        waiting = list(victims)
        for victim in waiting:
            self._stop(victim)
        patient = _Patience(len(waiting))
        while waiting:
            still: list[Victim] = []
            found: list[Victim] = []
            for victim in waiting:
                if _stands(victim):  # then nothing is born after this look
                    found += self._look_and_stop(victim)
                else:
                    still.append(victim)
            if monotonic() > limit:
                return late + still + found
            if len(still) < len(waiting):
                patient = _Patience(len(still))
            elif patient.wait():
                late += still
                for victim in still:
                    found += self._look_and_stop(victim)
                still = []
                patient = _Patience(len(found))
            waiting = still + found
        return late

    def _look_and_stop(self, victim: Victim) -> list[Victim]:
        found = self.look_at(victim)
        for child in found:
            self._stop(child)
        return found

    def unheld(self) -> list[Victim]:
        return [self.root] if not self._may_stop_root else []

    def look_again(self) -> list[Victim]:
        # A fork that was under way when SIGKILL was sent fails, and until a
        # dying process has ended its children are still listed as such.
        found: list[Victim] = []
        for victim in self._open:
            found += self.look_at(victim)
        return found

    def let_go(self) -> None:
        try:
            self._continue()
        except BaseException:  # of a signal handler: not out yet
            self._continue()
            raise

    def _continue(self) -> None:
        while self._held:
            victim = self._held[-1]
            try:
                _mrelease.pidfd_signal(victim, self._continue_signal)
            except OSError:
                pass
            self._held.pop()


def _contains_caller(pid: int) -> ValueError:
    return ValueError(
        f"the tree of pid {pid} is refused: the caller is in it; nothing was "
        "signalled"
    )


def _refuse_ancestor(root: Victim) -> None:
    """Raise ValueError if the caller is a descendant."""
    pid = os.getpid()
    while pid > 1:
        if pid == root.pid and not _reaped(root):
            raise _contains_caller(pid)
        stat = _stat_of(pid)
        pid = 0 if stat is None else stat.parent


class _Group(Selection):
    """A process group.  Its members stay in it when their parent dies."""

    def __init__(self, pgid: int) -> None:
        from signal import SIGKILL  # see _Tree

        super().__init__()
        self._kill_signal: int = SIGKILL
        self._missed: int | None = None
        """A look was not whole, for want of file descriptors: the errno."""
        self.pgid = pgid

    def look(self) -> list[Victim]:
        before = list(self.victims)

        def belongs(victim: Victim) -> bool:
            stat = _stat_of(victim.pid)
            if stat is None or stat.group != self.pgid:
                return False
            # A group that has become empty leaves its number to others; one
            # that has a member yet, be it a zombie, does not.
            return not before or not all(map(_reaped, before))

        found: list[Victim] = []
        self._missed = None
        self.unseen.clear()
        try:
            for pid in _all_pids():
                stat = _stat_of(pid)
                if stat is None or stat.group != self.pgid:
                    continue
                victim = self.pin(pid, belongs)
                if victim is not None:
                    found.append(victim)
        except OSError as error:
            if not self.signalled:
                raise
            self._missed = error.errno
        return found

    def look_again(self) -> list[Victim]:
        found = self.look()
        late = self._missed is not None or not all(map(_ended, found))
        if late and os.getpgrp() != self.pgid:
            # They may fork faster than they can be found.  The kernel signals
            # a group at once, those that are being forked as well.
            self._kill_whole()
        return found

    def _kill_whole(self) -> None:
        leader = self._by_pid.get(self.pgid)
        if leader is not None:
            try:
                # By its pidfd: no other group can come to be meant, though
                # all of this one have ended meanwhile.
                _mrelease.pidfd_signal(leader, self._kill_signal, True)
                return
            except OSError:
                pass  # before Linux 6.9, or none is left
        # By number: of the same group, since there was a living member in it
        # a moment ago.
        if all(map(_ended, self.victims)):
            if self._missed is not None:
                self.unseen[self.pgid] = Release(
                    self.pgid, Outcome.DENIED, errno=self._missed
                )
            return
        try:
            os.killpg(self.pgid, self._kill_signal)
        except OSError:
            pass


# ------------------------------------------------------------- the killing


class _Killing:
    """One call: from a selection to releases."""

    def __init__(
        self,
        reaper: Reaper,
        selection: Selection,
        grace: float,
        timeout: float,
        locks: _Locks,
        begun: float,
    ) -> None:
        self._selection = selection
        self._begun = begun
        self._reaper = reaper
        self._grace = grace
        self._timeout = timeout
        self._locks: _Locks = locks
        self._reapings: dict[Victim, Reaping] = {}

    def _submit(
        self, victims: list[Victim], grace: float, timeout: float
    ) -> None:
        """Hand those to the reaper that it does not have yet."""
        rest = [v for v in victims if v not in self._reapings]
        if not rest:
            return

        def kill() -> list[Reaping]:
            return kill_pinned(
                self._reaper,
                rest,
                grace,
                timeout,
                self._locks,
                signalled=self._selection.signalled,
            )

        try:
            reapings = kill()
        except OSError:
            # Those for later are needed now.
            self._selection.files.close()
            reapings = kill()
        self._selection.signalled = True
        self._reapings.update(zip(rest, reapings, strict=True))

    def _watch(self, until: float) -> None:
        """Wait for the end of the grace, or of all processes.

        What starts meanwhile gets no SIGTERM: it may be what cleans up.
        """
        selection = self._selection
        pause = _WATCH
        while True:
            left = until - monotonic()
            if left <= _PATIENCE or all(map(_ended, selection.victims)):
                return
            sleep(min(pause, left - _PATIENCE))
            begun = monotonic()
            with selection.files:
                selection.look()
            # A grace may be long: a tenth of a CPU at most.
            pause = max(_WATCH, 10 * (monotonic() - begun))

    def run(self) -> list[Release]:
        selection = self._selection
        begun = self._begun
        selection.files.take()
        try:
            if self._grace:
                self._submit(selection.victims, self._grace, self._timeout)
                begun = monotonic() + self._grace
                self._watch(begun)
            deadline = begun + self._timeout
            if not self._grace:
                for victim in selection.unheld():
                    selection.look_at(victim)
                    self._kill([victim], deadline)
                    with selection.files:
                        selection.look_at(victim)
            with selection.files:
                selection.hold(
                    [v for v in selection.victims if not _ended(v)],
                    begun + self._timeout / 2,
                )
            if not all(map(_ended, selection.victims)):
                # In a grace, not before the reaper kills those that it has:
                # they would see the others die.
                sleep(max(0.0, begun - monotonic()))
            self._kill(selection.victims, deadline)
            while found := self._look_again():
                with selection.files:
                    selection.hold(found, deadline)
                self._kill(selection.victims, deadline)
                if monotonic() > deadline:
                    break
            releases = [self._result(victim) for victim in selection.victims]
        finally:
            # A process that was stopped must not stay so, whatever happened.
            selection.let_go()
        lost = [*selection.lost.values(), *selection.unseen.values()]
        return [each for each in releases if each is not None] + lost

    def _look_again(self) -> list[Victim]:
        with self._selection.files:
            return self._selection.look_again()

    def _result(self, victim: Victim) -> Release | None:
        reaping = self._reapings.get(victim)
        return None if reaping is None else reaping.result()

    def _kill(self, victims: list[Victim], deadline: float) -> None:
        self._submit(victims, 0.0, max(0.0, deadline - monotonic()))


def _run(
    selection: Selection,
    reaper: Reaper | None,
    grace: float,
    timeout: float,
    locks: _Locks,
    begun: float,
) -> list[Release]:
    killing = (selection, grace, timeout, locks, begun)
    if reaper is not None:
        return _Killing(reaper, *killing).run()
    with Reaper() as own:
        try:
            return _Killing(own, *killing).run()
        except BaseException:
            own.close(0)  # cuts the grace short
            raise


def _check(
    grace: float, timeout: float, locks: _Locks, reaper: Reaper | None
) -> None:
    Terms(grace, None, timeout, locks)
    check_reaper(reaper)


def kill_tree(
    process: Victim | HasPid | SupportsIndex,
    *,
    grace: float = 0.0,
    timeout: float = 1.0,
    locks: Literal["protect", "ignore"] = "protect",
    reaper: Reaper | None = None,
) -> list[Release]:
    """Kill a process and all its descendants; the results, the root's first.

    process is what kill() takes.  The tree is pinned, parents before children.
    Then its processes are stopped (SIGSTOP), so that none can fork any more,
    and looked at again, and only then killed and released in parallel, by the
    reaper or by one that is made for the call.  What does not get to run, and
    so does not stop, is waited for only some milliseconds.  A root whose
    parent is neither the caller nor pid 1 is not stopped: that parent might
    see it, and stop as well, for good (sudo does).  Such a root is killed
    first; what it forked just before is found if it has not ended by then.

    With a grace, in seconds, all get SIGTERM first, and what is left at its
    end is stopped and killed.  What is started during the grace gets no
    SIGTERM, since it may be what cleans up.

    A descendant is what can be proven to be one: a child whose parent has
    ended before it could be seen belongs to nobody any more, and is left alone
    (daemons are meant to be; kill_cgroup() finds them).

    The call takes at most grace + timeout, about, and what it takes to find
    all that are there; the times in each Release count from when it was handed
    to the reaper.  DENIED: a process of another user (its own children are
    killed all the same, if permitted), or one for which no file descriptor was
    left (errno EMFILE), or none to look for its children, at the end of the
    list then.  If the reaper is closed meanwhile, the rest is killed in the
    caller's thread.

    Raises, before anything was signalled: what kill() does, for the root;
    ValueError if the caller is in the tree; OSError if /proc cannot be read or
    no file descriptor is left.  After that nothing is raised but what a signal
    handler or an audit hook of the caller's raises; what was stopped then
    continues, unless it was killed.  If the caller itself is killed in the
    milliseconds in which they are stopped, they stay so.
    """
    _check(grace, timeout, locks, reaper)
    begun = monotonic()
    grace, timeout = bounded(grace), bounded(timeout)
    tree = find_tree(process, timeout / 4)
    try:
        return _run(tree, reaper, grace, timeout, locks, begun)
    finally:
        tree.close()


def find_tree(
    process: Victim | HasPid | SupportsIndex, seconds: float
) -> Selection:
    """Pin a process and its descendants; raises as kill_tree() does.

    In at most so many seconds, about: a tree may grow faster.  But all that
    are there already are found.
    """
    _need_proc("the children of a process")
    limit = monotonic() + seconds
    root = Victim(process)
    try:
        tree = _Tree(root)
    except BaseException:
        root.close()
        raise
    try:
        _refuse_ancestor(root)
        may_signal(root.fileno(), root.pid)
        tree.collect(limit)
    except BaseException:
        tree.close()
        raise
    return tree


def kill_group(
    pgid: int,
    *,
    grace: float = 0.0,
    timeout: float = 1.0,
    locks: Literal["protect", "ignore"] = "protect",
    reaper: Reaper | None = None,
) -> list[Release]:
    """Kill all processes of a process group, and release their memory.

    All are pinned, then killed and released in parallel, by the reaper or by
    one that is made for the call.  Then the group is looked at again, until
    none is left that was not killed; what was forked meanwhile is killed with
    the group as a whole (kill(2)), which no fork escapes.

    With a grace, in seconds, all get SIGTERM first.  What is started during
    the grace gets no SIGTERM, since it may be what cleans up; SIGKILL it gets.
    If the reaper is closed meanwhile, it gets it in the caller's thread.

    The call takes at most grace + timeout, about; the times in each Release
    count from when it was handed to the reaper.  DENIED: a process of another
    user, or one for which no file descriptor was left (errno EMFILE).

    Raises, before anything was signalled: TypeError, ValueError for bad
    arguments, 0, 1, negative numbers, bool, the caller's own group;
    ProcessLookupError if there is no such group; PermissionError if none of
    it may be signalled; OSError if /proc cannot be read or no file descriptor
    is left.  After that nothing is raised but what a signal handler or an
    audit hook of the caller's raises.
    """
    _check(grace, timeout, locks, reaper)
    begun = monotonic()
    group = find_group(pgid)
    grace, timeout = bounded(grace), bounded(timeout)
    try:
        return _run(group, reaper, grace, timeout, locks, begun)
    finally:
        group.close()


def find_group(pgid: int) -> Selection:
    """Pin the members of a process group; raises as kill_group() does."""
    if isinstance(pgid, bool):
        raise ValueError(f"{pgid} is not a process group: a bool is refused")
    if not isinstance(pgid, int):
        raise TypeError(
            "expected the number of a process group (int), not "
            f"{type(pgid).__name__}"
        )
    pgid = int(pgid)
    if pgid <= 1:
        raise ValueError(
            f"process group {shown(pgid)} is refused: to the kernel, 0 is the "
            "caller's own, and 1 and negative numbers mean everybody"
        )
    if pgid == os.getpgrp():
        raise ValueError(
            f"process group {pgid} is refused: the caller is in it"
        )
    _need_proc("the members of a process group")
    group = _Group(pgid)
    try:
        if not group.look():
            raise ProcessLookupError(
                ESRCH,
                f"cannot kill process group {shown(pgid)}: it has no members",
            )
        _may_signal_any(group)
    except BaseException:
        group.close()
        raise
    return group


def _may_signal_any(group: _Group) -> None:
    for victim in group.victims:
        try:
            may_signal(victim.fileno(), victim.pid)
        except PermissionError:
            continue
        except ProcessLookupError:
            return
        return
    raise PermissionError(
        EPERM,
        f"cannot kill process group {group.pgid}: all its members belong to "
        "other users and this process has no CAP_KILL; nothing was signalled",
    )
