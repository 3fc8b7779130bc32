"""What a policy is and may look at: one prompt, how it met the tree, and where the memory stands.

A policy may be a user's own: what is not a policy, or not an answer, is said in one clear line.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import is_whole, shown
from .cuts import Positions, Tokens
from .overlap import EXTENDS, Forecast
from .views import Shape


_RIGHT = "give a name such as 'learned', or an object of a class that inherits hf_sparse_cache.policies.Policy"


@dataclass(frozen=True, slots=True)
class Terms:
    """Where the memory stands, for the policy that places new checkpoints.

    Attributes:
        known_rate: expected prompts a request that come back along the part of the path that was shared.
        new_rate: the same for the part that is new.
        price: what a byte earns at the margin, in saved tokens a request; 0 while there is room.
        resumed_rate: the same at the resumed checkpoint; `known_rate` if no other prompts leave in between.
    """

    known_rate: float = 1.0
    new_rate: float = 1.0
    price: float = 0.0
    resumed_rate: float = 1.0


@dataclass
class Prompt:
    """What a policy may look at.

    Attributes:
        ids: tokens of shape `(N,)`.
        cuts: where checkpoints may sit, ascending.
        overlap: tokens shared with earlier prompts.
        resumed: position the prefill resumes at; only cuts behind it can be captured.
        path_ends: ends of the tree's edges on the shared path (the last one may lie behind `overlap`).
        path_passes: number of earlier prompts along the whole of each such edge.
        limit: most new checkpoints, or None.
        latest: shape of the latest prompt along the last of these edges, if the policy left one.
        terms: what new checkpoints would earn and cost.
        state_bytes, kv_bytes_per_token: sizes, averaged over what is stored; 0 before anything is.
        resumed_bytes: size of the state the prefill resumes from.
        message_start: where the last message begins, as special tokens tell; 0 where none does.
        seconds: when it was opened, by a clock that never goes back.
        cut_tokens: what a cut costs besides the checkpoint, in tokens of prefill; 0 where every prompt is cut anyway.
        shape, forecast: what the policy makes of the prompt, for the eviction and for later prompts.
    """

    ids: Tokens
    cuts: Positions
    overlap: int
    resumed: int
    path_ends: NDArray[np.int64]
    path_passes: NDArray[np.int64]
    limit: int | None = None
    latest: Shape | None = None
    terms: Terms = Terms()
    state_bytes: float = 0.0
    kv_bytes_per_token: float = 0.0
    resumed_bytes: int = 0
    message_start: int = 0
    cut_tokens: float = 0.0
    seconds: float = 0.0
    shape: Shape | None = None
    forecast: Forecast | None = None

    @property
    def open_cuts(self) -> Positions:
        """The cuts that this prefill passes: those behind the resumed position."""
        return self.cuts[self.cuts.searchsorted(self.resumed, side="right") :]

    def share(self, position: int, planned: list[int]) -> float:
        """Of the prompts that will enter the edge of `position`, those expected to leave between it and the next
        planned checkpoint.
        """
        if self.forecast is None:
            return 1.0
        after = [other for other in planned if other > position][:1]
        leaves = position <= self.overlap and bool(after) and after[0] > self.overlap
        known = self.terms.known_rate
        following = [self._onward_rate / known if leaves and known else 1.0] * len(after)
        start = self.overlap
        if position <= self.overlap:
            start = max((end for end in self.path_ends.tolist() if end < position), default=0)
        positions = [position, *after]
        return self.forecast.shares(positions, [start] * len(positions), [*following, 0.0])[0][0]

    @property
    def _onward_rate(self) -> float:
        """Passes a request behind the overlap: as many as before it where nothing else runs on from there."""
        extends = self.shape is not None and self.shape.kind == EXTENDS
        return self.terms.known_rate if extends else self.terms.new_rate

    def refund(self, position: int) -> float:
        """Bytes of the resumed state that a checkpoint at `position` makes superfluous."""
        if self.forecast is None or not self.resumed:
            return 0.0
        rate = self._onward_rate if position > self.overlap else self.terms.known_rate
        here, there = self.forecast.passing(np.asarray([self.resumed, position])).tolist()
        share = min(rate / self.terms.resumed_rate, 1.0) if self.terms.resumed_rate else 1.0
        return self.resumed_bytes * share * there / here if here else 0.0

    def snap(self, positions: Iterable[float]) -> list[int]:
        """The deepest open cut at or before each position, ascending and distinct; none where there is none."""
        cuts = self.open_cuts
        index = np.unique(np.searchsorted(cuts, np.fromiter(positions, dtype=np.float64), side="right")) - 1
        found: list[int] = cuts[index[index >= 0]].tolist()
        return found


class Policy:
    """Base of all policies: `place` is the verb; `observe` sees the prompt again when its request closed well."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def place(self, prompt: Prompt) -> list[int]:
        """Returns the positions to capture."""
        raise NotImplementedError

    def observe(self, prompt: Prompt) -> None:
        """Learns from a prompt; most policies do not."""


class Limited(Policy):
    """Another policy that is allowed so many new checkpoints a prompt, marks not counted."""

    def __init__(self, policy: Policy, limit: int) -> None:
        self._policy, self._limit, self.lock = policy, limit, policy.lock

    def place(self, prompt: Prompt) -> list[int]:
        """What the other policy places; it knows the limit, and `Request` keeps the deepest where it places more."""
        prompt.limit = self._limit
        return self._policy.place(prompt)

    def observe(self, prompt: Prompt) -> None:
        """The other policy learns."""
        self._policy.observe(prompt)


def limited(policy: Policy, max_checkpoints: int | None) -> Policy:
    """A policy that places at most so many new checkpoints a prompt; None leaves it to the policy.

    Raises:
        ValueError: the number is negative, or none.
    """
    if max_checkpoints is None:
        return policy
    if not is_whole(max_checkpoints, 0):
        raise ValueError(f"max_checkpoints must be at least 0 or None, got {shown(max_checkpoints)}")
    return Limited(policy, max_checkpoints)


def check_policy(policy: Any) -> None:
    """Refuse what can never place anything, before the first request.

    Raises:
        TypeError: it is a class, no `Policy`, has no `place`, or was not initialised as one.
    """
    if isinstance(policy, type):
        raise TypeError(f"policy is the class {policy.__name__}: give an object of it, policy={policy.__name__}()")
    kind = type(policy).__name__
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is {policy!r} ({kind}): {_RIGHT}")
    if getattr(policy.place, "__func__", None) is Policy.place:
        raise TypeError(f"policy is a {kind}, which has no place: add place(self, prompt), which returns positions")
    if not hasattr(policy, "lock"):
        raise TypeError(f"policy is a {kind}, whose __init__ leaves out super().__init__(): call it there")


def placed(policy: Policy, prompt: Prompt) -> list[int]:
    """What a policy places.

    Raises:
        TypeError: it is no list of whole numbers.
    """
    found: Any = policy.place(prompt)
    try:
        return [operator.index(position) for position in found]
    except TypeError:
        said = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:80]}…"
        raise TypeError(
            f"{type(policy).__name__}.place returned {said}: return a list of positions, which are whole numbers of "
            "tokens; prompt.snap(...) makes cuts of any numbers"
        ) from None
