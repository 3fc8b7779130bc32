"""Ray Serve's router for replicas of this cache: it asks `PrefixRouter`, and tells that what it has to know."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ..routing.digest import Digest
from ..routing.router import PrefixRouter, Rules
from .relay import Destination


class PrefixRequestRouter(RequestRouter):  # type: ignore[misc]  # ray has no types
    """Sends a call to the replica with the longest prefix of its prompt (see `PrefixRouter`)."""

    def initialize_state(
        self, rules: dict[str, Any] | None = None, router: Literal["prefix", "round_robin"] = "prefix"
    ) -> None:
        """Called by Ray with `request_router_kwargs`.

        Args:
            rules: fields of `Rules`.
            router: "prefix", or "round_robin", which is for comparing.
        """
        self._prefixes = PrefixRouter(Rules(**(rules or {})))
        self._turns = router == "round_robin"
        self._turn = 0
        self._published: dict[str, bytes] = {}
        self._running: Counter[str] = Counter()  # calls of this router's, by replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for a call, and those to take where it takes no more."""
        replicas = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        if not replicas:
            return []
        self._look(replicas)
        loads = {name: float(self._load(name, replica)) for name, replica in replicas.items()}
        if self._turns:
            chosen = sorted(replicas)[self._turn % len(replicas)]
            self._turn += 1
        else:
            way = _way(pending_request)
            chosen = self._prefixes.choose(way.names, way.session, loads)
        others = sorted((name for name in replicas if name != chosen), key=loads.__getitem__)
        return [[replicas[chosen]], *([replicas[name]] for name in others)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A call went to a replica."""
        way, name = _way(pending_request), str(replica_id.unique_id)
        self._running[name] += 1
        self._prefixes.routed(way.names, way.session, name)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A call came to its end, whatever that was."""
        self._running[str(replica_id.unique_id)] -= 1

    def _load(self, name: str, replica: RunningReplica) -> int:
        """What a replica has to do: as Ray last heard, or more where this router has just sent more."""
        return max(self._running[name], self.replica_queue_len_cache.get(replica.replica_id) or 0)

    def _look(self, replicas: dict[str, RunningReplica]) -> None:
        """Sees which replicas there are, and what they publish."""
        if self._published.keys() != replicas.keys():
            self._prefixes.keep(replicas)
            self._published = {name: self._published.get(name, b"") for name in replicas}
            self._running = Counter({name: count for name, count in self._running.items() if name in replicas})
        for name, replica in replicas.items():
            data = (replica.routing_stats or {}).get("prefixes")
            # As long as nothing new came it is the same object.
            if isinstance(data, bytes) and data is not self._published[name]:
                self._published[name] = data
                self._prefixes.published(name, Digest.from_bytes(data))


def _way(pending: PendingRequest | None) -> Destination:
    """What a call says for the router."""
    found = [] if pending is None else [arg for arg in pending.args if isinstance(arg, Destination)]
    return found[0] if found else Destination()
