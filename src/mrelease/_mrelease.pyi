from typing import Literal, Protocol, final

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
) -> (
    int
    | tuple[
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
): ...
def probe(in_child: bool, /) -> dict[str, int]: ...
