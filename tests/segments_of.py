"""Which segments made what a call returned, row by row, and the same call again over them from nothing."""

from __future__ import annotations

import threading
from collections import defaultdict

from hf_sparse_cache.models import prefill
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.models.rows import Filled
from hf_sparse_cache.models.server import Server
from hf_sparse_cache.models.sitting import Served
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.stats import Recorder


class Kept(Server):
    """Serves as another server does, and remembers the segments behind every prompt, by its tokens.

    Attributes:
        resumed_tokens: of the prompts that it served.
        batched: how many of them ran in one forward with others, which no run can repeat bit for bit.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server.binding, server.store, server.policy, server.recorder, server.proof)
        self._found: dict[bytes, list[Lineage]] = defaultdict(list)
        self._lock = threading.Lock()
        self.resumed_tokens = self.batched = 0

    def _serve(self, prompts: list[Row], live: LiveCache) -> tuple[list[Filled], list[Served]]:
        filled, served = super()._serve(prompts, live)
        with self._lock:
            for row, one in zip(prompts, served, strict=True):
                assert one.info is not None
                self._found[_key(row)].append(Lineage.from_ends(one.info.segments))
                self.resumed_tokens += one.info.resumed_tokens
                self.batched += one.info.batched
        return filled, served

    def next(self, row: Row) -> Lineage:
        """Of the prompts with these tokens, in the order in which they were served, that of the next one."""
        with self._lock:
            return self._found[_key(row)].pop(0)


class Retraced(Server):
    """Serves every prompt from nothing, over the segments that another server ran it by."""

    def __init__(self, server: Server, kept: Kept) -> None:
        super().__init__(server.binding, server.store, server.policy, Recorder(), server.proof)
        self._kept = kept

    def _serve(self, prompts: list[Row], live: LiveCache) -> tuple[list[Filled], list[Served]]:
        filled, served = [], []
        for index, row in enumerate(prompts):
            own = live if len(prompts) == 1 else self.binding.live_cache()
            served.append(Served(prefill.replay(self.binding, own, row, self._kept.next(row))))
            filled.append(Filled(own, served[-1].output, (index,)))
        return filled, served


def _key(row: Row) -> bytes:
    return bytes(row.ids.cpu().numpy().tobytes())
