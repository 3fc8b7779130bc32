"""The different prompts of one call: what they share is computed once, and short ones run in one forward.

Those that others take over from run first, each by itself (see `planning.batch`). The others are looked at together:
where nothing is lost by it, those that are equally far run in one forward. Prompts that run together differ in their
last bits from prompts alone, so their requests say so and nothing of them is stored.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..errors import UnprovedError, out_of_memory
from ..planning.batch import padded_groups, plan_rows
from ..planning.policies import MIN_GAIN_TOKENS
from ..request import Request
from . import prefill
from .live import LiveCache
from .prefill import Timing
from .sitting import Asked, Means, Served, Sitting, serve_alone
from .watch import ModelChangedError
from .weights import Identity, identity


@dataclass(frozen=True)
class Filled:
    """A live cache, the model's output for it, and whose prompts it holds, from its first row to its last."""

    live: LiveCache
    output: Any
    prompts: tuple[int, ...]


class Rows:
    """The different prompts of one call, while they are served.

    Args:
        means: what they are served with.
        prompts: all of them, no two equal.
        found: what the model is now; None where nobody has looked.

    Attributes:
        served: what became of each.
        filled: the live caches that hold them.
    """

    def __init__(self, means: Means, prompts: list[Asked], found: Identity | None = None) -> None:
        self._means, self._prompts = means, prompts
        self._found = identity(means.binding.model) if found is None else found
        self.served: dict[int, Served] = {}
        self.filled: list[Filled] = []

    def serve(self) -> None:
        """Run all of them, so that each comes behind the one that it takes over from."""
        means, segmenting = self._means, self._means.binding.segmenting
        space, _ = means.space.now(found=self._found)
        rows = [means.store.foretell(asked.tokens, segmenting, space) for asked in self._prompts]
        number = {id(row): index for index, row in enumerate(rows)}
        leaves = []
        for row in plan_rows(rows, segmenting):
            asked = self._prompts[number[id(row)]]
            if row.source is not None:
                asked.source, asked.meeting = self._prompts[number[id(row.source)]], row.meeting
            asked.junctions = row.junctions
            if row.junctions:
                self._alone(number[id(row)], self._found)
            else:
                leaves.append(number[id(row)])
        self._leaves(leaves)

    def _alone(self, index: int, found: Identity | None = None) -> None:
        live = self._means.binding.live_cache()
        live.found = found
        self.served[index] = serve_alone(self._means, live, self._prompts[index])
        self.filled.append(Filled(live, self.served[index].output, (index,)))

    def _leaves(self, indices: list[int]) -> None:
        """Those that nobody takes over from; where they cannot be looked at together, each by itself."""
        before, done = len(self.filled), False
        try:
            self._together(indices)
            done = True
        except Exception as error:
            if not (isinstance(error, ModelChangedError | UnprovedError) or out_of_memory(error)):
                raise
        if not done:  # behind the block, where the traceback no longer holds what had been allocated
            del self.filled[before:]
            for index in indices:
                self._alone(index)

    def _together(self, indices: list[int]) -> None:
        results: dict[int, tuple[Any, Timing]] = {}
        sittings = {index: Sitting(self._means, self._prompts[index], self._found) for index in indices}
        for sitting in sittings.values():  # before anything is pinned
            sitting.wait()
        try:
            with ExitStack() as stack:
                for sitting in sittings.values():
                    stack.enter_context(sitting.opened())
                for group in _groups(sittings, self._means):
                    if len(group) > 1:
                        results.update(self._gathered({index: sittings[index] for index in group}))
                    else:
                        live = self._means.binding.live_cache()
                        results[group[0]] = sittings[group[0]].run(live)
                        self.filled.append(Filled(live, results[group[0]][0], (group[0],)))
        except BaseException as error:
            for sitting in sittings.values():
                sitting.let_go(error)
            raise
        for index, sitting in sittings.items():
            self.served[index] = sitting.told(*results[index])

    def _gathered(self, sittings: dict[int, Sitting]) -> dict[int, tuple[Any, Timing]]:
        """Run what is left of some prompts in one forward."""
        binding, clock = self._means.binding, time.perf_counter()
        ready: dict[int, LiveCache] = {}
        for sitting in sittings.values():  # those that resume from one state share one restored copy of it
            sitting.request.run_with(len(sittings))
            key = id(sitting.request.checkpoint)
            if key not in ready:
                ready[key] = binding.live_cache()
                prefill.resume_live(binding, ready[key], sitting.request)
        asked = [sitting.asked for sitting in sittings.values()]
        lives = [ready[id(sitting.request.checkpoint)] for sitting in sittings.values()]
        timing = Timing(0.0, (time.perf_counter() - clock) / len(asked))
        live, output = prefill.gathered(binding, [one.row for one in asked], lives)
        next(iter(sittings.values())).check()
        self.filled.append(Filled(live, output, tuple(sittings)))
        return dict.fromkeys(sittings, (output, timing))


def _groups(sittings: dict[int, Sitting], means: Means) -> list[list[int]]:
    """Which prompts run in one forward; those in a group of one run by themselves."""
    segmenting = means.binding.segmenting
    found: list[list[int]] = []
    equal: dict[tuple[int, int], list[int]] = defaultdict(list)
    fresh: list[int] = []
    for index, sitting in sittings.items():
        request = sitting.request
        left = request.prompt_tokens - request.resumed_tokens
        if not left or not segmenting.together(left, bool(request.planned)) or _returns(request):
            found.append([index])
        elif request.resumed_tokens:
            equal[request.resumed_tokens, left].append(index)
        else:
            fresh.append(index)
    lengths = [sittings[index].request.prompt_tokens for index in fresh]
    padded = padded_groups(lengths, segmenting.forward_tokens)
    return [*found, *equal.values(), *([fresh[position] for position in group] for group in padded)]


def _returns(request: Request) -> bool:
    """Whether what is to be captured is known to come back: announced, or seen before and not stored."""
    if not request.planned:
        return False
    return request.announced or request.overlap_tokens - request.resumed_tokens >= MIN_GAIN_TOKENS
