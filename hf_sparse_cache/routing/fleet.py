"""A fleet on paper: replicas with clocks and queues, routers by name, and a shared tier, for `simulate`.

Each replica serves one request at a time, as `hf-sparse-cache serve` does: it looks into the shared tier, reads what
that has deeper, computes the rest of the prompt, and writes the answer. Others wait in its line meanwhile.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..checks import shown
from ..planning.cuts import Tokens
from ..planning.lineage import Span
from ..planning.segments import Segmenting
from ..stats import parse_bytes
from ..store.eviction import LRU
from ..store.ledger import Ledger
from ..store.store import CheckpointStore
from ..store.tier import Tier
from ..store.tree import Payload
from ..store.unit import Unit, unit_of
from .digest import Publisher
from .names import ANCHOR_TOKENS, PaperKeys
from .router import PrefixRouter, Rules


# Fewer new tokens are not looked up in the shared tier, as in the shared store.
LEAST_LOOKED_UP = 256


@dataclass(frozen=True)
class Fleet:
    """What replicas are made of, beside the store: how fast they are, and what lies between them.

    Attributes:
        shared: whether what one replica stored can be read by all.
        shared_memory: bytes of that; None for no limit.
        packing: what a file there takes of what it holds, both in bytes. It depends on the model's numbers, which have
            only a size here: 0.7 is near what was measured of 16-bit keys and values, 0.85 of 32-bit numbers, 0.95
            of what was rounded to 16 bits (see "Memory"); 1.0, the default, is the most.
        prefill_tokens_per_second: of one replica.
        network_bytes_per_second: at which one replica reads from the shared tier. Writing happens behind the requests.
        lookup_seconds: of a look into the shared tier, found or not.
        answer_seconds: that an answer keeps the model behind its prompt.
        requests_per_second: requests come at random at this rate; None for one at a time, when all replicas are idle.
        publish_seconds: time from one digest of a replica to its next; what a router knows is so old at most.
        sessions: the session of each request, in the order of the trace; None for no sessions.
        rules: of the router "prefix".
        block: distance of the anchors of digests, in tokens.
        seed: of arrivals and of random choices.

    Raises:
        ValueError: a rate is not positive, a time negative, or a share none.
    """

    shared: bool = False
    shared_memory: int | str | None = None
    packing: float = 1.0
    prefill_tokens_per_second: float = 5000.0
    network_bytes_per_second: float = 1e9
    lookup_seconds: float = 0.0
    answer_seconds: float = 0.0
    requests_per_second: float | None = None
    publish_seconds: float = 1.0
    sessions: Sequence[Hashable] | None = None
    rules: Rules = field(default_factory=Rules)
    block: int = ANCHOR_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_second", "network_bytes_per_second", "publish_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {shown(getattr(self, name))}")
        if not 0 < self.packing <= 1:
            raise ValueError(
                f"packing must be above 0 and at most 1, got {shown(self.packing)}; files that would not shrink are "
                "stored as they are"
            )
        for name in ("lookup_seconds", "answer_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {shown(getattr(self, name))}")
        if self.requests_per_second is not None and not self.requests_per_second > 0:
            given = shown(self.requests_per_second)
            raise ValueError(f"requests_per_second must be above 0, or None for one at a time, got {given}")
        parse_bytes(self.shared_memory, "shared_memory")


@dataclass(frozen=True)
class Arrival:
    """A request that has to go to one of the replicas: what a router of your own is given.

    Attributes:
        index: its place in the trace.
        ids: its prompt, int32 `(N,)`.
        session: of `Fleet.sessions`; None for none.
        loads: requests that each replica has now, running or waiting.
    """

    index: int
    ids: Tokens
    session: Hashable
    loads: Sequence[int]


Router = Callable[[Arrival], int]


@dataclass(frozen=True)
class FleetTimes:
    """What became of the requests of a fleet: times of the counted ones, bytes of all.

    Attributes:
        requests: how many went to each replica.
        mean_seconds, median_seconds, p95_seconds: from a request's arrival to its first token.
        busy: of the whole time, the share in which a replica works, over all replicas.
        seconds: from the first arrival to the end of the last answer.
        fetched_bytes, written_bytes: from the shared tier, and to it.
        digest_bytes: that replicas told the router.
    """

    requests: tuple[int, ...]
    mean_seconds: float
    median_seconds: float
    p95_seconds: float
    busy: float
    seconds: float
    fetched_bytes: int = 0
    written_bytes: int = 0
    digest_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sized:
    """A payload that holds nothing and only has a size.

    Attributes:
        nbytes: that it takes where it lies.
        apart: what it takes in a file, while it lies in memory, and in memory, while in a file; None where that is the
            same.
    """

    nbytes: int
    apart: int | None = None

    def moved(self) -> Sized:
        """The same on the other side."""
        return self if self.apart is None else Sized(self.apart, self.nbytes)


class SharedSizes(Tier):
    """A shared tier of payloads that only have a size.

    Args:
        max_memory: its budget in bytes of files; None for no limit.
        packing: what a file takes of what it holds.

    Attributes:
        fetched_bytes, written_bytes: of files, so far.
    """

    name = "shared"

    def __init__(self, max_memory: int | None, packing: float = 1.0) -> None:
        # One share for all: to count files in a budget is to count what they hold in a larger one.
        super().__init__(Ledger(None if max_memory is None else int(max_memory / packing), LRU()))
        self._packing = packing
        self.fetched_bytes = self.written_bytes = 0

    def fetch(self, unit: Unit, spans: list[Span]) -> Unit:
        """The unit, of which the state and some of the keys and values are read."""
        self.fetched_bytes += self._packed(unit.state.nbytes + sum(unit.kv[span].nbytes for span in spans))
        return _moved(unit)

    def accept(self, unit: Unit, demote: object = None) -> bool:
        """Takes a unit in, of which what is not there yet is written."""
        unit = _moved(unit)
        with self.ledger.footing(unit.tokens, unit.space) as footing:
            before = self.used_bytes, self.evictions
            missing = sum(unit.kv[span].nbytes for span in self.ledger.missing_spans(footing, unit.spans))
            stored = self.put(unit, footing=footing, urgent=True)
            if stored is not None and (self.used_bytes, self.evictions) != before:
                self.written_bytes += self._packed(unit.state.nbytes + missing)
        self.tidy()
        return stored is not None

    def _packed(self, nbytes: int) -> int:
        return math.ceil(self._packing * nbytes)

    def bring(self, store: CheckpointStore, ids: Tokens, segmenting: Segmenting) -> bool:
        """Has a replica look for a prompt, and read what goes deeper than what it has; whether it looked."""
        expected = segmenting.expected(segmenting.cuts(ids, store.marks.lengths(ids, "")), len(ids))
        own = next(store.match(ids).fitting(len(ids), expected), None)
        depth = 0 if own is None else own.position
        if len(ids) - depth <= LEAST_LOOKED_UP:
            return False
        match = self.match(ids)
        best = next(match.fitting(len(ids), expected), None)
        if best is not None and best.position > depth:
            store.bring_up(self, best, ids[: match.overlap])
        return True

    def write(self, store: CheckpointStore, ids: Tokens, positions: Sequence[int]) -> None:
        """Has a replica write what it captured of a prompt."""
        wanted = set(positions)
        units = [unit_of(item) for item in store.match(ids).checkpoints(len(ids)) if item.position in wanted]
        for unit in units:
            self.accept(unit)


def _moved(unit: Unit) -> Unit:
    """A unit between memory and files."""
    return replace(unit, state=_aside(unit.state), kv={span: _aside(payload) for span, payload in unit.kv.items()})


def _aside(payload: Payload) -> Payload:
    return payload.moved() if isinstance(payload, Sized) else payload


class Clocks:
    """When requests come, where they wait, and when they end.

    Args:
        fleet: how fast it is.
        replicas: how many there are.
    """

    def __init__(self, fleet: Fleet, replicas: int) -> None:
        self._fleet, self._random = fleet, np.random.default_rng(fleet.seed)
        self._free = [0.0] * replicas
        self._ends: list[tuple[float, int]] = []  # heap of what runs or waits, with its replica
        self._gaps: list[float] = []
        self._first: list[float] = []
        self._worked = 0.0
        self.loads = [0] * replicas
        self.requests = [0] * replicas
        self.now = 0.0

    def arrive(self) -> float:
        """The next request comes; what has ended by then no longer counts as a load."""
        rate = self._fleet.requests_per_second
        if rate is None:
            self.now = max(self._free)
        else:
            if not self._gaps:
                self._gaps = self._random.exponential(1.0 / rate, 4096).tolist()
            self.now += self._gaps.pop()
        while self._ends and self._ends[0][0] <= self.now:
            self.loads[heapq.heappop(self._ends)[1]] -= 1
        return self.now

    def serve(self, replica: int, first_seconds: float, counted: bool) -> None:
        """A replica takes the request that came last, and needs so long for its first token once it begins."""
        begun = max(self.now, self._free[replica])
        self._free[replica] = begun + first_seconds + self._fleet.answer_seconds
        self._worked += first_seconds + self._fleet.answer_seconds
        heapq.heappush(self._ends, (self._free[replica], replica))
        self.loads[replica] += 1
        self.requests[replica] += 1
        if counted:
            self._first.append(begun + first_seconds - self.now)

    def served(self, shared: SharedSizes | None, digest_bytes: int) -> FleetTimes:
        """All of it."""
        first, whole = np.asarray(self._first or [0.0]), max(self._free)
        return FleetTimes(
            requests=tuple(self.requests),
            mean_seconds=float(first.mean()),
            median_seconds=float(np.median(first)),
            p95_seconds=float(np.quantile(first, 0.95)),
            busy=self._worked / (whole * len(self._free)) if whole else 0.0,
            seconds=whole,
            fetched_bytes=0 if shared is None else shared.fetched_bytes,
            written_bytes=0 if shared is None else shared.written_bytes,
            digest_bytes=digest_bytes,
        )


class ByPrefix:
    """The router "prefix": `PrefixRouter` and the digests of the replicas' stores.

    Args:
        stores: one for each replica.
        fleet: how often they publish.
        clocks: tell the time.
    """

    def __init__(self, stores: Sequence[CheckpointStore], fleet: Fleet, clocks: Clocks) -> None:
        self._keys = PaperKeys(b"nothing to hide here", fleet.block)
        self._names = [str(number) for number in range(len(stores))]
        self._publishers = [Publisher(store, self._keys) for store in stores]
        self._fleet, self._clocks = fleet, clocks
        self._router = PrefixRouter(fleet.rules, fleet.seed)
        self._router.keep(self._names)
        # Not all at once, as in life.
        pause = fleet.publish_seconds / len(stores)
        self._due = [(pause * (1 + number), number) for number in range(len(stores))]
        self.digest_bytes = 0

    def __call__(self, arrival: Arrival) -> int:
        while self._due[0][0] <= self._clocks.now:
            due, number = self._due[0]
            heapq.heapreplace(self._due, (max(due, self._clocks.now) + self._fleet.publish_seconds, number))
            digest = self._publishers[number].digest()
            self._router.published(self._names[number], digest)
            self.digest_bytes += len(digest.to_bytes())
        names = self._keys.names("", arrival.ids)
        session = None if arrival.session is None else self._keys.session("", repr(arrival.session))
        loads = dict(zip(self._names, arrival.loads, strict=True))
        chosen = self._router.choose(names, session, loads)
        self._router.routed(names, session, chosen)
        return int(chosen)


def round_robin(arrival: Arrival) -> int:
    """The router "round_robin": one after the other."""
    return arrival.index % len(arrival.loads)


def by_session(arrival: Arrival) -> int:
    """The router "session": all requests of a session to the same replica, whatever they are."""
    digest = hashlib.blake2b(repr(arrival.session).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % len(arrival.loads)


ROUTERS = ("prefix", "round_robin", "session")


def make_router(
    router: str | Router | None, stores: Sequence[CheckpointStore], fleet: Fleet, clocks: Clocks
) -> Router:
    """A router by name, or the one that was given.

    Raises:
        ValueError: the name is unknown, or sessions are not.
        TypeError: it is neither a name nor can be called.
    """
    if router is None or router == "prefix":
        return ByPrefix(stores, fleet, clocks)
    if router == "round_robin":
        return round_robin
    if router == "session":
        if fleet.sessions is None:
            raise ValueError(
                "router='session' needs to know them: give Fleet(sessions=...), one for each request, such as the "
                "groups of a workload folder, load_trace(folder).groups"
            )
        return by_session
    if isinstance(router, str):
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, or a function, got {shown(router)}")
    if not callable(router):
        raise TypeError(f"router must be a name or a function of an Arrival, got {shown(router)}")
    return router
