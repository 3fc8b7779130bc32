"""Where new checkpoints go: one small class a policy, one verb, `place`.

A policy sees one prompt and answers with positions. It may answer with more than it needs to: the request drops what
is not a cut or lies at or before the resumed position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from .overlap import Forecast, OverlapModel, shape_of
from .planner import plan_checkpoints  # here, so that what is not compiled is said before the first request
from .policy import Policy as Policy
from .policy import Prompt as Prompt
from .views import Floats


MIN_GAIN_TOKENS = 4  # fewer tokens, such as the first words that two questions have in common, are no junction
FIRST_SIGHT_OBSERVATIONS = 8  # overlaps after which the learned views know better
FIRST_SIGHT_DISTANCES = (8, 136, 264)  # from the end of a prompt
UNKNOWN_SHARE = 0.03  # of the prefill that the cuts of a prompt may cost which shares nothing with earlier ones


class NoCheckpoints(Policy):
    """`none`: never stores anything."""

    def place(self, prompt: Prompt) -> list[int]:
        """No position."""
        return []


class Block(Policy):
    """`block`: every `size` tokens, in blocks doubled until they are few enough."""

    def __init__(self, size: int = 512) -> None:
        super().__init__()
        self.size = size

    def place(self, prompt: Prompt) -> list[int]:
        """Multiples of the block."""
        limit, size = prompt.limit, self.size
        if limit == 0:
            return []
        while limit is not None and len(prompt.ids) // size - prompt.resumed // size > limit:
            size *= 2
        return prompt.snap(range(size, len(prompt.ids) + 1, size))


class Balanced(Policy):
    """`balanced`: equal spans from the resumed position to the end."""

    default_limit = 8

    def count(self, prompt: Prompt) -> int:
        """Number of checkpoints when the caller sets no limit."""
        return self.default_limit

    def place(self, prompt: Prompt) -> list[int]:
        """The inner borders of `count + 1` equal spans."""
        count = self.count(prompt) if prompt.limit is None else min(prompt.limit, self.count(prompt))
        span = (len(prompt.ids) - prompt.resumed) / (count + 1)
        return prompt.snap(prompt.resumed + span * (i + 1) for i in range(count))


class Sqrt(Balanced):
    """`sqrt`: as many equal spans as the square root of the number of cuts."""

    def count(self, prompt: Prompt) -> int:
        """The square root of the cuts this prefill passes."""
        return math.isqrt(len(prompt.open_cuts))


class Dyadic(Policy):
    """`dyadic`: at a half, three quarters, seven eighths ... of the prompt, so that late divergence costs least."""

    default_limit = 8

    def place(self, prompt: Prompt) -> list[int]:
        """`N (1 - 2**-i)`."""
        count = self.default_limit if prompt.limit is None else prompt.limit
        span = len(prompt.ids) - prompt.resumed
        return prompt.snap(prompt.resumed + span * (1 - 0.5**i) for i in range(1, count + 1))


class Boundary(Policy):
    """`boundary`: the ends of the prompt's segments, found by the tokens that end them; the deepest if too many."""

    default_limit = 8

    def __init__(self, cut_ids: Iterable[int] = ()) -> None:
        super().__init__()
        self.cut_ids = np.unique(np.fromiter(cut_ids, dtype=np.int64))

    def place(self, prompt: Prompt) -> list[int]:
        """Cuts at or just before the segment ends, and the last cut."""
        ends = np.flatnonzero(np.isin(prompt.ids, self.cut_ids)) + 1
        positions = prompt.snap([*ends.tolist(), len(prompt.ids)])
        count = self.default_limit if prompt.limit is None else prompt.limit
        return positions[len(positions) - min(count, len(positions)) :]


class Last(Policy):
    """`last`: the end of the prompt."""

    def place(self, prompt: Prompt) -> list[int]:
        """The last cut."""
        return prompt.snap([len(prompt.ids)]) if prompt.limit != 0 else []


class Junction(Policy):
    """`junction`: where this prompt leaves the stored path, and its end."""

    def place(self, prompt: Prompt) -> list[int]:
        """The last cut, and the deepest cut of the overlap when the limit leaves room for it."""
        limit = 2 if prompt.limit is None else prompt.limit
        return prompt.snap([len(prompt.ids), prompt.overlap][:limit])


class HistogramDP(Policy):
    """`dp`: the paper's planner (arXiv 2605.05219): an exact plan on one decayed histogram of absolute depths.

    A small uniform mass makes it work before anything was learned; without observations the plan is the balanced one.
    """

    default_limit = 16

    def __init__(self, decay: float = 0.99, bin_tokens: int = 16, prior: float = 0.1) -> None:
        super().__init__()
        self.decay, self.bin_tokens, self.prior = decay, bin_tokens, prior
        self._weights = np.zeros(64)

    def place(self, prompt: Prompt) -> list[int]:
        """Plans the open cuts for the depths that this prompt can share."""
        cuts = prompt.open_cuts
        limit = self.default_limit if prompt.limit is None else prompt.limit
        if not len(cuts) or not limit:
            return []
        bins = np.arange(len(self._weights)) * self.bin_tokens
        index = np.searchsorted(cuts, bins[bins <= len(prompt.ids)], side="right")
        weights = np.bincount(index, self._weights[: len(index)], minlength=len(cuts) + 1)
        spans = np.diff(np.concatenate([[prompt.resumed], cuts, [len(prompt.ids)]]))
        weights = weights + self.prior * spans / spans.sum()
        cost = np.concatenate([[0.0], (cuts - prompt.resumed).astype(np.float64)])
        plan = plan_checkpoints(weights, limit, prefill_cost=cost)
        return [int(cuts[i - 1]) for i in plan.positions]

    def observe(self, prompt: Prompt) -> None:
        """Adds the overlap depth to the histogram."""
        self._weights *= self.decay
        if prompt.overlap:
            index = prompt.overlap // self.bin_tokens
            if index >= len(self._weights):
                grown = np.zeros(2 * index)
                grown[: len(self._weights)] = self._weights
                self._weights = grown
            self._weights[index] += 1.0


def first_sight(prompt: Prompt) -> list[int]:
    """Where the next prompt most likely leaves one of which nothing is known yet, the likeliest first.

    At the start of its last message, where special tokens tell; a few tokens before its end; at a few depths below,
    since what is asked of a text is mostly short. As many as `affordable` allows.
    """
    length = len(prompt.ids)
    depths = [length - distance for distance in FIRST_SIGHT_DISTANCES]
    found: list[int] = []
    for wish in [prompt.message_start, *depths]:
        found += [position for position in prompt.snap([wish]) if position not in found]
    return found[: affordable(prompt, len(found))]


def affordable(prompt: Prompt, most: int) -> int:
    """How many cuts, `most` at most, a prompt may have that shares nothing with others, so that only hope pays."""
    if not prompt.cut_tokens or prompt.overlap >= MIN_GAIN_TOKENS:
        return most
    return min(most, int(UNKNOWN_SHARE * len(prompt.ids) / prompt.cut_tokens))


class Learned(Policy):
    """`learned`: an exact plan on the forecast for this very prompt, at the memory's current price.

    Args:
        prefill_cost: cost of prefilling to each of an array of positions; default the positions themselves. Give the
            model's own, with the attention term or in measured seconds, when they are not proportional.
    """

    default_limit = 32  # it is the price of memory that decides

    def __init__(self, prefill_cost: Callable[[Floats], Floats] | None = None) -> None:
        super().__init__()
        self.model = OverlapModel()
        self.prefill_cost = prefill_cost

    def place(self, prompt: Prompt) -> list[int]:
        """Minimises what the next prompt that comes this way recomputes, plus the memory at its price."""
        length = len(prompt.ids)
        prompt.shape = shape_of(
            length, prompt.overlap, prompt.path_ends, prompt.path_passes, prompt.cuts, prompt.latest
        )
        forecast = prompt.forecast = self.model.forecast(prompt.cuts, prompt.shape)
        limit = self.default_limit if prompt.limit is None else prompt.limit
        if not limit:
            return []
        sure = self._sure(prompt)[: (limit + 1) // 2]
        found = {*sure, *self._afforded(prompt, forecast, limit - len(sure), len(sure))}
        if prompt.terms.price == 0.0 and (prompt.limit is None or len(found) < limit):
            found.add(len(prompt.ids))  # the same prompt again has nothing left to compute
        return sorted(found)

    def _sure(self, prompt: Prompt) -> list[int]:
        """While there is room: the exact junction, and of a prompt of which nothing is known yet what leads there."""
        if prompt.terms.price > 0.0:
            return []
        if prompt.overlap in prompt.open_cuts and prompt.overlap - prompt.resumed >= MIN_GAIN_TOKENS:
            return [prompt.overlap]
        known = prompt.overlap >= MIN_GAIN_TOKENS or self.model.observations >= FIRST_SIGHT_OBSERVATIONS
        return [] if known else first_sight(prompt)

    def _afforded(self, prompt: Prompt, forecast: Forecast, limit: int, taken: int) -> list[int]:
        """The plan with so many cuts as the prompt may have, `taken` being placed; its end is none."""
        room = affordable(prompt, limit + taken) - taken
        for most in (limit, room + 1, room):
            found = self._planned(prompt, forecast, min(limit, most))
            if len([position for position in found if position < len(prompt.ids)]) <= room:
                break
        return found

    def _planned(self, prompt: Prompt, forecast: Forecast, limit: int) -> list[int]:
        """What the forecast and the price of memory say."""
        cuts = prompt.open_cuts
        if not limit or not len(cuts):
            return []
        first = len(prompt.cuts) - len(cuts)
        below = np.empty(len(prompt.cuts) + 2)
        below[0], below[1:-1], below[-1] = 0.0, forecast.below, 1.0
        weights = below[first + 1 :] - below[first:-1]  # of the cells before each cut, and of the one behind the last
        split = int(cuts.searchsorted(prompt.overlap, side="right"))  # cells from here on are new
        terms = prompt.terms
        known, new = weights[: split + 1].sum(), weights[split + 1 :].sum()
        weights[: split + 1] *= terms.known_rate / max(known + new, 1e-12)
        weights[split + 1 :] *= terms.new_rate / max(new, 1e-12)
        cut_price = prompt.cut_tokens * float(weights.sum())  # paid once, as what a pass saves is counted once
        self._charge(weights, terms.price * prompt.kv_bytes_per_token)
        cost = np.empty(len(cuts) + 1)
        cost[0], cost[1:] = prompt.resumed, cuts
        cost = cost - cost[0] if self.prefill_cost is None else self.prefill_cost(cost) - self.prefill_cost(cost[:1])
        price = terms.price * prompt.state_bytes
        plan = plan_checkpoints(weights, limit, prefill_cost=cost, checkpoint_cost=price + cut_price).positions
        if not plan and price > 0.0 and prompt.resumed:  # one that takes the resumed one's place may still pay
            plan = plan_checkpoints(weights, 1, prefill_cost=cost).positions
            if plan:
                saved = cost[plan[0]] * weights[plan[0] :].sum()
                if saved <= price + cut_price - terms.price * prompt.refund(int(cuts[plan[0] - 1])):
                    plan = ()
        return [int(cuts[index - 1]) for index in plan]

    @staticmethod
    def _charge(weights: Floats, price_per_token: float) -> None:
        """Takes the price of KV off the deepest weights.

        KV costs the same for each token up to the deepest checkpoint, so it lowers the gain of every token gained, the
        weight of all depths behind it, by one constant.
        """
        index = len(weights) - 1
        while price_per_token > 0.0 and index >= 0:
            taken = min(price_per_token, float(weights[index]))
            weights[index] -= taken
            price_per_token -= taken
            index -= 1

    def observe(self, prompt: Prompt) -> None:
        """Tells the overlap model where this prompt left the latest one before it."""
        if prompt.latest is not None:
            self.model.learn(prompt.overlap, prompt.cuts, prompt.latest)


POLICIES: dict[str, type[Policy]] = {
    "learned": Learned,
    "dp": HistogramDP,
    "block": Block,
    "balanced": Balanced,
    "sqrt": Sqrt,
    "dyadic": Dyadic,
    "boundary": Boundary,
    "last": Last,
    "junction": Junction,
    "none": NoCheckpoints,
}


def make_policy(
    name: str, cut_ids: Iterable[int] = (), prefill_cost: Callable[[Floats], Floats] | None = None
) -> Policy:
    """Builds a policy by name.

    Args:
        name: see `POLICIES`.
        cut_ids: the tokens that end a segment, for the policies that look at them.
        prefill_cost: G of the model, for the policies that weigh it; default the number of tokens.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is unknown; choose one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    if issubclass(kind, Boundary):
        return kind(cut_ids)
    return kind(prefill_cost) if issubclass(kind, Learned) else kind()
