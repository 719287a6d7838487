"""The one error a user sees: what happened, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ForewordError(Exception):
    """Something the user can mend.

    The command line prints it as three lines and exits with code 2; Python callers
    can read the three parts from the attributes.

    Args:
        what: what went wrong, one sentence.
        where: the file, row, key or model it is about.
        fix: what to do about it.
    """

    def __init__(self, what: str, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"error: {self.what}\nwhere: {self.where}\n  fix: {self.fix}"


def closest(word: str, known: Iterable[str]) -> str:
    """The known word most like ``word``, whatever its case; empty when none is near."""
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'train.lr'?``, or an empty string when nothing is near."""
    found = closest(word, known)
    return f"did you mean '{found}'?" if found else ""
