"""The tree of one space as people look at it: from the root down, the most recently used branch first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from ..store.tree import Checkpoint, Node


class Branch(NamedTuple):
    """One edge, with everything below it still to come.

    Attributes:
        level: how many edges lie above it.
        checkpoints: its own, shallow to deep.
        above: how many checkpoints lie on its path above it.
        before: position of the deepest of those, or 0.
        left_out: how many branches below it are not shown.
    """

    node: Node
    level: int
    checkpoints: list[Checkpoint]
    above: int
    before: int
    left_out: int


def outline(root: Node | None, limit: int | None = None) -> Iterator[Branch]:
    """Every edge below a root, each before its own branches. Changes nothing; to be used under the store's lock.

    Args:
        root: of a space; its branch comes first. None for a space that holds nothing.
        limit: show so many edges, those used last; None for all.
    """
    if root is None:
        return
    shown = None if limit is None else _latest(root, limit)
    waiting = [(root, 0, 0, 0)]
    while waiting:
        node, level, above, before = waiting.pop()
        children = sorted(node.children.values(), key=_order)
        kept = children if shown is None else [child for child in children if id(child) in shown]
        checkpoints = list(node.checkpoints)
        yield Branch(node, level, checkpoints, above, before, len(children) - len(kept))
        above, before = above + len(checkpoints), checkpoints[-1].position if checkpoints else before
        waiting += [(child, level + 1, above, before) for child in reversed(kept)]


def added_kv_bytes(checkpoint: Checkpoint, before: int) -> int:
    """Bytes of the keys and values that a checkpoint needs beyond those up to the position `before`."""
    total, segment = 0, checkpoint.kv
    while segment is not None and segment.end > before:
        total, segment = total + segment.nbytes, segment.parent
    return total


def _order(node: Node) -> tuple[int, int]:
    return -node.last_used, int(node.tokens[0])


def _latest(root: Node, limit: int) -> set[int]:
    """The edges used last, none without those above it."""
    found: set[int] = set()
    waiting = [(*_order(child), id(child), child) for child in root.children.values()]
    heapq.heapify(waiting)
    while waiting and len(found) < limit:
        node = heapq.heappop(waiting)[-1]
        found.add(id(node))
        for child in node.children.values():
            heapq.heappush(waiting, (*_order(child), id(child), child))
    return found
