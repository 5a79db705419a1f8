"""What can go wrong for a user, each with the exit status it ends in."""

from __future__ import annotations

from collections.abc import Iterable


class SqueezeError(Exception):
    """It could not be read, measured or rewritten. The message names the remedy."""

    exit_status = 3


class UsageError(SqueezeError):
    """Bad usage: a missing input, an unknown name, an unwritable output."""

    exit_status = 2


class RuleError(UsageError):
    """A block, device or configuration file that doesn't hold what it must."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name nearest to `word`, else the list."""
    from difflib import get_close_matches

    known = list(known)
    match = get_close_matches(word, known, n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
