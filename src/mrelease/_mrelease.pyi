from typing import Literal, Protocol, TypeAlias, final

# Of the stub alone: what reap() and Job.result() give.
_Result: TypeAlias = tuple[
    str,
    bool,
    tuple[int, int, int, int, int] | None,
    float | None,
    float | None,
    float | None,
    float | None,
    int,
    int,
    Literal["free", "held", "unknown", "ignored"],
    bool,
]

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

def process_mrelease(pidfd: int | _HasFileno, flags: int = 0, /) -> None: ...

@final
class Pidfd:
    def fileno(self, /) -> int: ...
    def close(self, /) -> None: ...

def pidfd_open(pid: int, /) -> Pidfd: ...
def pidfd_dup(pidfd: int | _HasFileno, /) -> Pidfd: ...
def pidfd_state(
    pidfd: int | _HasFileno, /
) -> Literal["running", "ended", "reaped"]: ...
def proc_is_ours() -> bool: ...
def read_footprint(
    pid: int, /
) -> tuple[int, tuple[int, int, int, int, int]]: ...
def read_stat(pid: int, /) -> tuple[int, bool]: ...
def look_at_locks(pid: int, /) -> Literal["free", "held", "unknown"]: ...
def reap(
    pidfd: int,
    pid: int,
    begun: int,
    grace: int,
    timeout: int,
    escalate: int,
    locks: bool,
    send: bool,
    /,
) -> int | _Result: ...

@final
class Job:
    def fileno(self, /) -> int: ...
    def done(self, /) -> bool: ...
    def wait(self, timeout: int, /) -> bool: ...
    def result(self, /) -> int | _Result: ...
    def entered(self, /) -> float | None: ...

_State: TypeAlias = Literal["open", "closed", "forked"]

@final
class Pool:
    def state(self, /) -> _State: ...
    def hurry(self, /) -> None: ...
    def close(self, timeout: int, /) -> bool: ...

def pool_new(
    threads: int,
    spares: int,
    best: int,
    least: int,
    cpus: list[int] | None,
    /,
) -> tuple[Pool, tuple[int, int, int, int, list[int]]]: ...
def job_new(
    pidfd: int,
    pid: int,
    begun: int,
    grace: int,
    timeout: int,
    escalate: int,
    locks: bool,
    /,
) -> Job: ...
def submit(pool: Pool, jobs: list[Job], /) -> _State: ...
def probe(in_child: bool, /) -> dict[str, int]: ...
