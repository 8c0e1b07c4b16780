"""What is closed at the end of a with statement."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import NoReturn, Self


class Closing:
    """Base of what has a close() and is a context manager by it."""

    __slots__ = ()

    def close(self) -> object:
        """Give back what it holds."""
        raise NotImplementedError

    def __reduce__(self) -> NoReturn:
        # A copy would close what the other one has.
        kind = type(self).__name__
        raise TypeError(f"a {kind} can be neither copied nor pickled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
