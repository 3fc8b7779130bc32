"""The radix tree over prompt tokens: what was seen, how often, and where checkpoints and KV segments hang.

A node owns one edge, the tokens `start .. end` of every prompt that passes it. Tokens are compared, never only hashed.
A node remembers its prompts after their states are gone, so that overlap depths and junctions can still be learned.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..planning.cuts import Tokens
from ..planning.views import Shape


class Payload(Protocol):
    """Anything that knows its own size; the store never looks inside."""

    @property
    def nbytes(self) -> int: ...


@dataclass(eq=False, slots=True)
class Account:
    """What one namespace holds in one tier, and at most may hold.

    Attributes:
        limit: bytes, or None without a budget of its own.
    """

    limit: int | None = None
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    kv_bytes: int = 0
    evictions: int = 0

    @property
    def used_bytes(self) -> int:
        return self.checkpoint_bytes + self.kv_bytes


class KVSegment:
    """Keys and values of the tokens `start .. end`: one link of a chain down to position 0.

    A segment is the one that continues `parent` up to `end`. Another one over the same span, made behind another
    chain, is another segment: its bytes may differ in their last bits.

    `refs` counts the checkpoints and child segments that need it, `holds` the open requests that build on it.
    """

    __slots__ = ("end", "holds", "nbytes", "node", "owner", "parent", "payload", "refs", "start")

    def __init__(self, end: int, payload: Payload, parent: KVSegment | None, node: Node, owner: Account) -> None:
        self.start = parent.end if parent is not None else 0
        self.end: int = end
        self.payload, self.parent, self.node, self.owner = payload, parent, node, owner
        self.refs = 0
        self.holds = 0
        self.nbytes = int(payload.nbytes)


class Checkpoint:
    """The fixed-size state of every layer after `position` tokens of one path, with the end of its KV chain."""

    __slots__ = (
        "__weakref__",
        "held",
        "hits",
        "kv",
        "last_used",
        "nbytes",
        "node",
        "owner",
        "pins",
        "position",
        "refund",
        "share",
        "slot",
        "state",
    )

    def __init__(self, position: int, state: Payload, node: Node, owner: Account, now: int) -> None:
        self.position, self.state, self.node, self.owner = position, state, node, owner
        self.kv: KVSegment | None = None  # the end of its chain; None without full attention
        self.pins = 0
        self.hits = 0
        self.last_used = now
        self.nbytes = int(state.nbytes)
        self.held = self.nbytes  # bytes that go if it goes: the state and the KV that only it needs
        self.share = (
            1.0  # of the prompts that enter its edge, those expected to leave between it and the next checkpoint
        )
        self.refund = 0.0  # bytes of checkpoints that it makes superfluous
        self.slot = -1  # place in the eviction's tables

    @property
    def stored(self) -> bool:
        """Whether it is still in its tree; one that was evicted may live on in a request that uses it."""
        return self.node.checkpoints.get(self.position) is self

    def chain(self) -> list[KVSegment]:
        """Its KV segments, from position 0 upwards."""
        found, segment = [], self.kv
        while segment is not None:
            found.append(segment)
            segment = segment.parent
        return found[::-1]

    def held_bytes(self) -> int:
        """Counts `held` anew: the state, and its KV chain down to the first segment that something else needs."""
        total, segment = self.nbytes, self.kv
        while segment is not None and segment.refs <= 1:
            total += segment.nbytes
            segment = segment.parent
        return total

    def above(self) -> Checkpoint | None:
        """The nearest checkpoint nearer to the start of the prompt."""
        node = self.node
        found = [position for position in node.checkpoints if position < self.position]
        while not found and node.parent is not None:
            node = node.parent
            found = list(node.checkpoints)  # all of them lie above
        return node.checkpoints[max(found)] if found else None

    def below(self, limit: int = 16) -> list[Checkpoint]:
        """The next checkpoints on every path that runs on from here, looking at `limit` nodes at most."""
        found = [position for position in self.node.checkpoints if position > self.position]
        if found:
            return [self.node.checkpoints[min(found)]]
        nearest: list[Checkpoint] = []
        level = list(self.node.children.values())
        while level and limit > 0:
            limit -= len(level)
            nearest += [node.checkpoints[min(node.checkpoints)] for node in level if node.checkpoints]
            level = [child for node in level if not node.checkpoints for child in node.children.values()]
        return nearest


class Node:
    """One edge of the tree: `tokens` cover the positions `start + 1 .. end` of the path."""

    __slots__ = (
        "checkpoints",
        "children",
        "end",
        "last_used",
        "latest",
        "lost",
        "parent",
        "passes",
        "recent",
        "refused",
        "segments",
        "space",
        "start",
        "tokens",
        "waiting",
    )

    def __init__(self, tokens: Tokens, start: int, parent: Node | None, space: str = "") -> None:
        self.tokens, self.start, self.parent = tokens, start, parent
        self.space = space  # of a root, the space whose prompts hang on it
        self.end = start + len(tokens)
        self.children: dict[int, Node] = {}
        self.checkpoints: dict[int, Checkpoint] = {}
        self.segments: dict[tuple[KVSegment | None, int], KVSegment] = {}  # by what each continues, and its end
        self.passes = 0  # prompts that ran along the whole edge
        self.last_used = 0
        self.recent: Node | None = None  # the child that the latest prompt ran on to, for the eviction
        self.latest: Shape | None = None  # the policies' description of the latest prompt that came this way
        self.lost = 0  # shallowest position of this edge whose checkpoint was evicted; 0 when none was
        self.refused = 0  # shallowest position of this edge for whose checkpoint no room was made; 0 when none was
        self.waiting: tuple[int, int] | None = None  # row of the survival tables it waits in, and since which tick

    @property
    def root(self) -> Node:
        """The root of its tree."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    def path_tokens(self) -> Tokens:
        """All tokens from the root to this node's end."""
        edges, node = [self.tokens], self.parent
        while node is not None:
            edges.append(node.tokens)
            node = node.parent
        return np.concatenate(edges[::-1])


@dataclass
class Match:
    """What the tree knows of a prompt: the nodes on its path, and the tokens it shares with earlier prompts."""

    path: list[Node]
    overlap: int
    known: bool  # whether the space held anything at all

    def checkpoints(self, limit: int) -> list[Checkpoint]:
        """Stored checkpoints on the path at positions up to `limit`, shallow to deep."""
        limit = min(limit, self.overlap)
        return [
            node.checkpoints[position]
            for node in self.path
            if node.checkpoints
            for position in sorted(node.checkpoints)
            if position <= limit
        ]


class Forest:
    """One tree of tokens a space (a fingerprint and a namespace), under one bound on what is remembered."""

    def __init__(self) -> None:
        self.roots: dict[str, Node] = {}
        self.tokens = 0  # remembered tokens, summed over the edges
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (last_used, tie, node): what to forget first
        self._ties = 0

    def walk(self, ids: Tokens, space: str) -> tuple[list[Node], int]:
        """Follows `ids` as far as the space knows them.

        Returns:
            The nodes entered, shallow to deep, and the number of tokens shared; the last node may be shared in part.
        """
        path: list[Node] = []
        depth, length = 0, len(ids)
        node = self.roots.get(space)
        while node is not None and depth < length:
            child = node.children.get(int(ids[depth]))
            if child is None:
                break
            path.append(child)
            span = min(child.end, length) - depth
            different = child.tokens[:span] != ids[depth : depth + span]
            first = int(different.argmax())
            if different[first]:
                return path, depth + first
            depth += span
            if depth < child.end:
                break
            node = child
        return path, depth

    def insert(self, ids: Tokens, space: str, now: int) -> list[Node]:
        """Makes the path of `ids` exist, with a node that ends exactly where they end, and returns its nodes."""
        path, depth = self.walk(ids, space)
        if path and depth < path[-1].end:
            path[-1] = self._split(path[-1], depth)
        if depth < len(ids):
            parent = path[-1] if path else self._root(space)
            leaf = Node(ids[depth:].astype(np.int32, copy=True), depth, parent)
            leaf.last_used = now
            parent.children[int(ids[depth])] = leaf
            self.tokens += len(leaf.tokens)
            self.offer(leaf)
            path.append(leaf)
        return path

    def nodes(self, space: str) -> Iterator[Node]:
        """Every node of a space but its root, parents before children."""
        waiting = [self.roots[space]] if space in self.roots else []
        while waiting:
            children = waiting.pop().children.values()
            yield from children
            waiting.extend(children)

    def _root(self, space: str) -> Node:
        if space not in self.roots:
            self.roots[space] = Node(np.empty(0, dtype=np.int32), 0, None, space)
        return self.roots[space]

    def _split(self, node: Node, depth: int) -> Node:
        """Splits an edge at `depth`; checkpoints and segments go to the half that holds their end."""
        offset = depth - node.start
        upper = Node(node.tokens[:offset].copy(), node.start, node.parent)
        upper.passes, upper.last_used, upper.latest = node.passes, node.last_used, node.latest
        assert node.parent is not None
        node.parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.start, node.parent = node.tokens[offset:].copy(), depth, upper
        upper.children[int(node.tokens[0])] = upper.recent = node
        for position in [p for p in node.checkpoints if p <= depth]:
            checkpoint = upper.checkpoints[position] = node.checkpoints.pop(position)
            checkpoint.node = upper
        for key in [k for k in node.segments if k[1] <= depth]:
            segment = upper.segments[key] = node.segments.pop(key)
            segment.node = upper
        if 0 < node.lost <= depth:
            upper.lost, node.lost = node.lost, 0
        if 0 < node.refused <= depth:
            upper.refused, node.refused = node.refused, 0
        return upper

    def offer(self, node: Node) -> None:
        """Lets a leaf be forgotten when its turn comes; harmless for any other node."""
        if not node.children and node.parent is not None:
            self._ties += 1
            heapq.heappush(self._leaves, (node.last_used, self._ties, node))

    def forget_space(self, space: str) -> None:
        """Drops all tokens of one space, unless an open request still keeps a checkpoint there."""
        nodes = list(self.nodes(space))
        if any(node.checkpoints or node.segments for node in nodes):
            return
        for node in nodes:
            self.tokens -= len(node.tokens)
            node.parent = None  # so that `forget` passes over it
        self.roots.pop(space, None)

    def forget(self, limit: int) -> None:
        """Drops the least recently used tokens that no checkpoint needs until at most `limit` are left."""
        while self.tokens > limit and self._leaves:
            stamp, _, node = heapq.heappop(self._leaves)
            if node.children or node.parent is None:
                continue
            if node.last_used != stamp:
                self.offer(node)
            elif node.checkpoints or node.segments:
                keep = max([*node.checkpoints, *(end for _, end in node.segments)])
                self.tokens -= node.end - keep
                node.tokens, node.end = node.tokens[: keep - node.start].copy(), keep
            else:
                parent = node.parent
                del parent.children[int(node.tokens[0])]
                parent.recent = None if parent.recent is node else parent.recent
                node.parent = None
                self.tokens -= len(node.tokens)
                self.offer(parent)
                if parent.parent is None and not parent.children:
                    del self.roots[parent.space]
