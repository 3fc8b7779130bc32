"""Prompts that are served together know each other: what they share is computed once, by the first that needs it.

In the order of their tokens, the prompt before a prompt is one of those that share most with it. Each therefore takes
over from an earlier one, at their *meeting*, what that one computed on its way; a prompt that others take over from
captures there and runs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .cuts import MIN_SUFFIX_TOKENS, Positions, Tokens
from .segments import Segmenting


@dataclass
class Member:
    """One of the prompts.

    Attributes:
        ids: its tokens, int32 of shape `(N,)`.
        cuts: where it may be cut, whatever earlier prompts were.
        stored: tokens that what is stored lets it skip.
        marked: lengths of the announced prefixes that it begins with.
        source: the prompt that it takes over from; None where it shares too little with any.
        meeting: the position at which it does; 0 without a source.
        junctions: positions at which others take over from it, ascending.
    """

    ids: Tokens
    cuts: Positions
    stored: int = 0
    marked: Sequence[int] = ()
    source: Member | None = None
    meeting: int = 0
    junctions: list[int] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Where it begins to compute, should all go well."""
        return max(self.stored, self.meeting)


def shared_tokens(one: Tokens, other: Tokens) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def plan_rows(rows: Sequence[Member], segmenting: Segmenting) -> list[Member]:
    """Decides who takes over from whom, and where; fills `source`, `meeting` and `junctions`.

    A junction is one more forward for the prompt that captures there. It pays where those that take over from it skip
    more tokens together than that costs.

    Args:
        rows: the prompts, no two of them equal.
        segmenting: where they may be cut.

    Returns:
        The rows in an order in which each comes behind its source.
    """
    ordered = sorted(rows, key=lambda row: row.ids.tolist())
    for index, row in enumerate(ordered):
        _find_source(row, ordered[:index], segmenting)
    for source in ordered:
        for junction in {row.meeting for row in ordered if row.source is source}:
            takers = [row for row in ordered if row.source is source and row.meeting == junction]
            if sum(junction - row.stored for row in takers) <= max(segmenting.cut_tokens, MIN_SUFFIX_TOKENS):
                for row in takers:
                    row.source, row.meeting = None, 0
        source.junctions = sorted({row.meeting for row in ordered if row.source is source})
    return ordered


def _find_source(row: Member, earlier: Sequence[Member], segmenting: Segmenting) -> None:
    shared, nearest = len(row.ids), row
    for other in reversed(earlier):
        shared = min(shared, shared_tokens(nearest.ids, other.ids))
        nearest = other
        if shared <= max(row.stored, row.meeting):
            return
        meeting = segmenting.meeting(shared, row.cuts, len(row.ids), other.cuts, len(other.ids))
        near = [*other.junctions, *other.marked, *row.marked, other.start]
        while meeting and any(0 < abs(meeting - position) < MIN_SUFFIX_TOKENS for position in near):
            meeting = segmenting.meeting(meeting - 1, row.cuts, len(row.ids), other.cuts, len(other.ids))
        if meeting > max(row.start, other.start):
            row.source, row.meeting = other, meeting
            other.junctions.append(meeting)


def padded_groups(lengths: Sequence[int], forward_tokens: float) -> list[list[int]]:
    """Groups of prompts, each to be run in one forward, padded to its longest, so that all of it costs least.

    Args:
        lengths: tokens of each prompt.
        forward_tokens: what one more forward costs, in tokens.

    Returns:
        The indices of each group.
    """
    ranked = sorted(range(len(lengths)), key=lambda index: lengths[index])
    least, first = [0.0], [0]
    for end in range(1, len(ranked) + 1):
        width = lengths[ranked[end - 1]]
        costs = [least[start] + (end - start) * width + forward_tokens for start in range(end)]
        first.append(int(np.argmin(costs)))
        least.append(costs[first[-1]])
    groups, end = [], len(ranked)
    while end:
        groups.append(sorted(ranked[first[end] : end]))
        end = first[end]
    return groups[::-1]
