"""Stop strings, found across token borders and never shown."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Passes text on until a stop string comes; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be shown now that this text has come. After ``found`` nothing comes any more."""
        held = self._held + text
        at = min((i for stop in self.stops if (i := held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.found, self._held = True, ""
            return held[:at]
        keep = self._begun(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str) -> int:
        """Characters at the end of ``text`` that may be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        starts = range(max(len(text) - longest, 0), len(text))
        return next((len(text) - i for i in starts if any(s.startswith(text[i:]) for s in self.stops)), 0)
