"""Where a prompt goes: to its session's replica, or to that with its longest prefix, unless it has too much to do."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .digest import Digest
from .index import Index
from .names import Names


# A conversation waits so many times as long for its own replica as a prompt does for what it shares with others.
CONSTANCY = 4


@dataclass(frozen=True)
class Rules:
    """How a router decides.

    Attributes:
        most_ahead: so many requests more than the least loaded replica one may have and still be given another for the
            sake of its prefix; `CONSTANCY` times as many where that is half of the prompt or more, or its session's.
            Beyond, the less loaded of two chosen at random takes it.
        most_share: nor is a replica given one for a shorter prefix where it got more than so many times its fair share
            of what was asked lately: what few tokens bring together must not keep growing on one replica.
        least_tokens: a shorter prefix is not worth going anywhere for.
        most_sessions: so many sessions are remembered, those used last.
    """

    most_ahead: int = 4
    most_share: float = 1.25
    least_tokens: int = 64
    most_sessions: int = 2**17

    def __post_init__(self) -> None:
        for name, least in (("most_ahead", 0), ("most_share", 1), ("least_tokens", 1), ("most_sessions", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}")


class Lately:
    """How many requests each replica got of the last ones; older ones count less and less.

    Args:
        memory: so many requests a replica until one counts for a third of a new one.
    """

    def __init__(self, memory: int = 64) -> None:
        self._memory, self._new = memory, 1.0  # a new one counts more, in place of all others less
        self._got: dict[str, float] = {}

    def keep(self, replicas: Collection[str]) -> None:
        """These are all there are; a new one begins with what is fair, or all that is new would go there."""
        fair = sum(self._got.values()) / len(self._got) if self._got else 0.0
        self._got = {name: self._got.get(name, fair) for name in replicas}

    def sent(self, replica: str) -> None:
        """One more went to a replica."""
        self._got[replica] = self._got.get(replica, 0.0) + self._new
        self._new *= 1.0 + 1.0 / (self._memory * len(self._got))
        if self._new > 1e9:
            self._got = {name: got / self._new for name, got in self._got.items()}
            self._new = 1.0

    def of(self, replica: str) -> float:
        """What a replica got, in requests of now."""
        return self._got.get(replica, 0.0) / self._new

    def with_room(self, replicas: Iterable[str], most_share: float) -> list[str]:
        """Those that got no more than `most_share` times what is fair, and one for luck."""
        fair = sum(self._got.values()) / max(1, len(self._got)) / self._new
        return [replica for replica in replicas if self.of(replica) <= most_share * fair + 1.0]


class PrefixRouter:
    """Decides for one prompt after the other; it waits for nobody, and asks nobody.

    Args:
        rules: how.
        seed: of the random choices; None for one that nobody knows.
    """

    def __init__(self, rules: Rules | None = None, seed: int | None = None) -> None:
        self.rules, self.index = rules or Rules(), Index()
        self._random = random.Random(seed)
        self._lately = Lately()
        self._sessions: OrderedDict[int, str] = OrderedDict()

    def keep(self, replicas: Collection[str]) -> None:
        """These are all the replicas there are now: they came, went, or died."""
        self.index.keep(replicas)
        self._lately.keep(replicas)

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
        least, ahead = min(loads.values()), self.rules.most_ahead
        # A conversation that moves is computed once more from its beginning, and burdens all for what one gains.
        faithful = least + CONSTANCY * ahead
        stays = None if session is None else self._sessions.get(session)
        if stays is not None and stays in loads and loads[stays] <= faithful:
            return stays
        free = [name for name, load in loads.items() if load <= least + ahead]
        if names is not None:
            tokens, holders = self._holders(names, loads)
            if tokens >= max(self.rules.least_tokens, names.length / 2):
                found = [name for name in holders if loads[name] <= faithful]
            else:
                found = self._lately.with_room([name for name in holders if name in free], self.rules.most_share)
            if found and tokens >= self.rules.least_tokens:
                return self._least_loaded(found, loads)
        return self._less_loaded(free, loads)

    def routed(self, names: Names | None, session: int | None, replica: str) -> None:
        """A prompt went to a replica, chosen by this router or not."""
        self._lately.sent(replica)
        if names is not None:
            self.index.routed(names, replica)
        if session is not None:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            while len(self._sessions) > self.rules.most_sessions:
                self._sessions.popitem(last=False)

    def _holders(self, names: Names, among: Collection[str]) -> tuple[int, list[str]]:
        """The longest prefix that any has, in tokens, and who has it: those first that read most of the prompt."""
        stored, holders = self.index.longest(names, among)
        read, readers = self.index.seen(names, holders)
        return max(stored, read), readers

    def _least_loaded(self, among: list[str], loads: Mapping[str, float]) -> str:
        """The one with least to do; of several, the one that got least lately."""
        least = min(loads[name] for name in among)
        equal = [name for name in among if loads[name] == least]
        few = min(self._lately.of(name) for name in equal)
        return self._random.choice([name for name in equal if self._lately.of(name) == few])

    def _less_loaded(self, among: list[str], loads: Mapping[str, float]) -> str:
        """Of two chosen at random, the one that got less lately; of those, the one with less to do now."""
        two = among if len(among) < 2 else self._random.sample(among, 2)
        return min(two, key=lambda name: (self._lately.of(name), loads[name]))
