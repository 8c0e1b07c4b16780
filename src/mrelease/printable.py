"""Names that somebody else chose, in a line that is meant for people.

The path of a cgroup may hold line breaks, codes that a terminal obeys, marks
that turn the direction of text, and bytes that are no UTF-8.  In JSON and in
the fields of results it stands as it is.
"""

from __future__ import annotations


def printable(name: str) -> str:
    """Give a name as it is, or in quotes and with escapes, as repr() does.

    As it is only if all of it can be seen and none of it be taken for another
    part of the line: no blanks, no quote at its begin.
    """
    plain = name.isprintable() and " " not in name
    return name if plain and name[:1] not in ("", "'", '"') else repr(name)
