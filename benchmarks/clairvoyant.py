"""The ceiling: a greedy that knows the whole trace and serves it through the same store.

It captures the cuts at which later requests will leave a prompt, and evicts what saves least per byte and request
until its next use. Greedy, so a ceiling to compare with rather than an optimum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

from hf_sparse_cache.planning.cuts import Tokens
from hf_sparse_cache.planning.policies import Policy, Prompt
from hf_sparse_cache.planning.views import Floats
from hf_sparse_cache.store.forest import Forest
from hf_sparse_cache.store.tree import Checkpoint, Node
from hf_sparse_cache.store.value import Scored


NEVER = 2**40


class Future:
    """Who passes where, and when: the tree of all prompts, each edge with the requests that run along it."""

    def __init__(self, trace: Iterable[Tokens]) -> None:
        self.forest = Forest()
        self._visits: dict[Node, list[int]] = {}
        prompts = list(trace)
        for ids in prompts:
            self.forest.insert(ids, "", 0)
        for number, ids in enumerate(prompts, 1):
            for node in self.forest.walk(ids, "")[0]:
                self._visits.setdefault(node, []).append(number)

    def path(self, ids: Tokens) -> list[Node]:
        """The edges of one prompt."""
        return self.forest.walk(ids, "")[0]

    def after(self, node: Node, now: int) -> list[int]:
        """Requests behind `now` that run along an edge."""
        visits = self._visits[node]
        return visits[bisect_right(visits, now) :]


class ClairvoyantPolicy(Policy):
    """Captures where the next requests along this prompt will leave it."""

    def __init__(self, future: Future, most: int = 8) -> None:
        super().__init__()
        self.future, self.most, self.now = future, most, 0

    def place(self, prompt: Prompt) -> list[int]:
        """The leaving points of the nearest future requests, at most `most`."""
        self.now += 1
        path = self.future.path(prompt.ids)
        leaving: dict[int, int] = {}
        for node, after in zip(path, [*path[1:], None], strict=True):
            deeper = set(self.future.after(after, self.now)) if after is not None else set()
            first = next((number for number in self.future.after(node, self.now) if number not in deeper), None)
            if first is not None:
                leaving[node.end] = first
        nearest = sorted(leaving, key=lambda end: leaving[end])[: self.most if prompt.limit is None else prompt.limit]
        return prompt.snap(nearest)


class ClairvoyantEviction(Scored):
    """Evicts the least `saved tokens / (requests until the next use x bytes)`."""

    def __init__(self, future: Future, trace: Sequence[Tokens]) -> None:
        super().__init__()
        self.future, self.trace = future, trace
        self._path: list[Node] = []

    def passed(self, path: Sequence[Node], overlap: int, resumed: Checkpoint | None, now: int) -> None:
        """Looks at the next use of every checkpoint that this request could have used."""
        self.now = now
        self._path = self.future.path(self.trace[now - 1])
        for node in path:
            for checkpoint in node.checkpoints:
                if checkpoint.position <= overlap:
                    self._look(checkpoint)

    def settled(self, path: Sequence[Node], forecast: object, now: int) -> None:
        """Looks again once the new checkpoints are in."""
        for node in path:
            for checkpoint in node.checkpoints:
                self._look(checkpoint)

    def stored(self, checkpoint: Checkpoint) -> None:
        """A newcomer changes the next use of those around it."""
        super().stored(checkpoint)
        self._look(checkpoint)

    def _edge(self, position: int) -> Node:
        return next(node for node in self._path if node.end >= position)

    def _next_use(self, checkpoint: Checkpoint) -> int:
        coming = self.future.after(self._edge(checkpoint.position), self.now)
        deeper = [other.position for node in self._stored_path(checkpoint) for other in node.checkpoints]
        behind = [position for position in deeper if position > checkpoint.position and position <= self._path[-1].end]
        taken = set(self.future.after(self._edge(min(behind)), self.now)) if behind else set()
        return next((number for number in coming if number not in taken), NEVER)

    @staticmethod
    def _stored_path(checkpoint: Checkpoint) -> list[Node]:
        return [checkpoint.node, *checkpoint.node.children.values()]

    def _look(self, checkpoint: Checkpoint) -> None:
        self.ticks[checkpoint.slot] = self._next_use(checkpoint)
        self.weigh(checkpoint)

    def gain(self, checkpoint: Checkpoint) -> float:
        """Tokens over the checkpoint before, for each byte."""
        above = checkpoint.above()
        return (checkpoint.position - (above.position if above else 0)) / checkpoint.held

    def values(self) -> Floats:
        """Saved tokens a byte and request."""
        wait = np.maximum(self.ticks - self.now, 1)
        values: Floats = np.where(self.ticks >= NEVER, 1e-12, 1.0) * self.gains / wait
        return values

    def victim(self, incoming: Checkpoint | None, need: int) -> Checkpoint | None:
        """The least valuable, unless the newcomer is worth less than all that would have to go."""
        order, values = self.ranked()
        first, freed, lost = None, 0.0, 0.0
        for slot in order.tolist():
            checkpoint = self.items[slot]
            if checkpoint.pins:
                continue
            first = first or checkpoint
            freed += self.held[slot]
            lost += self.held[slot] * values[slot]
            if freed >= need:
                break
        if incoming is not None:
            wait = max(self._next_use(incoming) - self.now, 1)
            if self.gain(incoming) * incoming.held / wait <= lost:
                return None
        return first
