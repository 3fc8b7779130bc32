"""Stop strings, which end an answer and are no part of it."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What may be shown now that `text` came."""
        if self.found:
            return ""
        if not self._stops:
            return text
        self._held += text
        cut = first_stop(self._held, self._stops)
        if cut is not None:
            self.found, shown, self._held = True, self._held[:cut], ""
            return shown
        shown = self._held[: len(self._held) - self._doubtful()]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back and turned out to be text, at the end."""
        rest, self._held = self._held, ""
        return rest

    def _doubtful(self) -> int:
        """Characters at the end of what is held that begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        return next(
            (
                length
                for length in range(longest, 0, -1)
                if any(s.startswith(self._held[-length:]) for s in self._stops)
            ),
            0,
        )


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins; None where none is."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)
