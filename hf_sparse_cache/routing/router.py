"""Where a prompt goes: to its session's replica, or to that with its longest prefix, unless it has too much to do."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .digest import Digest
from .index import Index
from .names import Names


@dataclass(frozen=True)
class Rules:
    """How a router decides.

    Attributes:
        most_ahead: so many requests more than the least loaded replica one may have and still be given another for the
            sake of its prefix; beyond, the less loaded of two chosen at random takes it.
        least_tokens: a shorter prefix is not worth going anywhere for.
        most_sessions: so many sessions are remembered, those used last.
    """

    most_ahead: int = 4
    least_tokens: int = 64
    most_sessions: int = 2**17

    def __post_init__(self) -> None:
        for name, least in (("most_ahead", 0), ("least_tokens", 1), ("most_sessions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}")


class PrefixRouter:
    """Decides for one prompt after the other; it waits for nobody, and asks nobody.

    Args:
        rules: how.
        seed: of the random choices; None for one that nobody knows.
    """

    def __init__(self, rules: Rules | None = None, seed: int | None = None) -> None:
        self.rules, self.index = rules or Rules(), Index()
        self._random = random.Random(seed)
        self._sessions: OrderedDict[int, str] = OrderedDict()

    def keep(self, replicas: Collection[str]) -> None:
        """These are all the replicas there are now: they came, went, or died."""
        self.index.keep(replicas)

    def published(self, replica: str, digest: Digest) -> None:
        """A replica says what it stores now."""
        self.index.published(replica, digest)

    def choose(self, names: Names | None, session: int | None, loads: Mapping[str, float]) -> str:
        """The replica for a prompt.

        Args:
            names: of the prompt; None where it is not known.
            session: the name of its session; None for none.
            loads: requests that each replica has now, of those that may be chosen.

        Raises:
            ValueError: there is no replica to choose from.
        """
        if not loads:
            raise ValueError("loads is empty: there is no replica that a request could go to")
        most = min(loads.values()) + self.rules.most_ahead
        free = [name for name, load in loads.items() if load <= most]
        stays = None if session is None else self._sessions.get(session)
        if stays is not None and stays in free:
            return stays
        if names is not None:
            found = self._holder(names, list(loads), loads)
            if found is not None and found in free:
                return found
        return self._less_loaded(free, loads)

    def routed(self, names: Names | None, session: int | None, replica: str) -> None:
        """A prompt went to a replica, chosen by this router or not."""
        if names is not None:
            self.index.routed(names, replica)
        if session is not None:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            while len(self._sessions) > self.rules.most_sessions:
                self._sessions.popitem(last=False)

    def _holder(self, names: Names, among: list[str], loads: Mapping[str, float]) -> str | None:
        """Who has the longest prefix; of several, one that read most of the prompt; of those, the least loaded."""
        stored, holders = self.index.longest(names, among)
        read, readers = self.index.seen(names, holders)
        if max(stored, read) < self.rules.least_tokens:
            return None
        return self._least_loaded(readers, loads)

    def _least_loaded(self, among: list[str], loads: Mapping[str, float]) -> str:
        least = min(loads[name] for name in among)
        return self._random.choice([name for name in among if loads[name] == least])

    def _less_loaded(self, among: list[str], loads: Mapping[str, float]) -> str:
        """Of two chosen at random, the one with less to do."""
        two = among if len(among) < 2 else self._random.sample(among, 2)
        return min(two, key=lambda name: loads[name])
