"""What hangs where: nodes of a radix tree over prompt tokens, and the checkpoints and KV segments on them.

A node owns one edge, the tokens `start .. end` of every prompt that passes it. It remembers its prompts after their
states are gone, so that overlap depths and junctions can still be learned. `forest` lets nodes come and go.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ..planning.compiled import held_bytes, nearest_above
from ..planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from ..planning.lineage import Lineage, Span
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

    A segment is the one that continues `parent` by the forwards of its span. Another one over the same tokens, made
    behind another chain or by other forwards, is another segment: its bytes may differ in their last bits.

    `refs` counts the checkpoints and child segments that need it, `holds` the open requests that build on it.
    """

    __slots__ = ("end", "holds", "nbytes", "node", "owner", "parent", "payload", "refs", "span", "start")

    def __init__(self, span: Span, payload: Payload, parent: KVSegment | None, node: Node, owner: Account) -> None:
        self.span, self.start, self.end = span, span.start, span.end
        self.payload, self.parent, self.node, self.owner = payload, parent, node, owner
        self.refs = 0
        self.holds = 0
        self.nbytes = int(payload.nbytes)


class Checkpoint:
    """The fixed-size state of every layer after `position` tokens of one path, with the end of its KV chain.

    `final` says that it was taken at the end of a prompt and keeps the logits of the last token: of the same prompt
    nothing is left to compute.
    """

    __slots__ = (
        "__weakref__",
        "doomed",
        "final",
        "held",
        "hits",
        "kv",
        "last_used",
        "lineage",
        "nbytes",
        "node",
        "onward",
        "owner",
        "pins",
        "position",
        "refund",
        "share",
        "slot",
        "state",
    )

    def __init__(self, lineage: Lineage, state: Payload, node: Node, owner: Account, now: int) -> None:
        self.lineage, self.state, self.node, self.owner = lineage, state, node, owner
        self.position = lineage.end
        self.final = False
        self.kv: KVSegment | None = None  # the end of its chain; None without full attention
        self.pins = 0
        self.doomed = False  # goes as soon as nothing pins it: its space was cleared
        self.hits = 0
        self.last_used = now
        self.nbytes = int(state.nbytes)
        self.held = self.nbytes  # bytes that go if it goes: the state and the KV that only it needs
        self.share = (
            1.0  # of the prompts that enter its edge, those expected to leave between it and the next checkpoint
        )
        self.onward = 0.0  # of the same, those expected to go on to the next checkpoint of the latest prompt
        self.refund = 0.0  # bytes of checkpoints that it makes superfluous
        self.slot = -1  # place in the eviction's tables

    @property
    def stored(self) -> bool:
        """Whether it is still in its tree; one that was evicted may live on in a request that uses it."""
        return any(checkpoint is self for checkpoint in self.node.checkpoints)

    def chain(self) -> list[KVSegment]:
        """Its KV segments, from position 0 upwards."""
        found, segment = [], self.kv
        while segment is not None:
            found.append(segment)
            segment = segment.parent
        return found[::-1]

    def held_bytes(self) -> int:
        """Counts `held` anew: the state, and its KV chain down to the first segment that something else needs."""
        return held_bytes(self)

    def above(self) -> Checkpoint | None:
        """The nearest checkpoint nearer to the start of the prompt."""
        found: Checkpoint | None = nearest_above(self)
        return found

    def below(self, limit: int = 16) -> list[Checkpoint]:
        """The next checkpoints on every path that runs on from here, looking at `limit` nodes at most."""
        for checkpoint in self.node.checkpoints:
            if checkpoint.position > self.position:
                return [checkpoint]
        nearest: list[Checkpoint] = []
        level = list(self.node.children.values())
        while level and limit > 0:
            limit -= len(level)
            nearest += [node.checkpoints[0] for node in level if node.checkpoints]
            level = [child for node in level if not node.checkpoints for child in node.children.values()]
        return nearest


# What a node and a description take, with their places in dictionaries and in the heap; tokens and arrays apart. Found
# by counting the objects of trees of many shapes, which a test does again.
NODE_BYTES = 736
DESCRIPTION_BYTES = 440
TOKEN_BYTES = 4


_serials = itertools.count(1)


@dataclass(eq=False, slots=True)
class Tree:
    """The tree of one space, and what it takes.

    Attributes:
        root: a node without tokens.
        tokens: remembered tokens, summed over the edges.
        nodes: edges, and the root.
        described_bytes: of the policies' descriptions of prompts.
        leaving: it was cleared, and stays only for what open requests use of it.
        serial: its number; no other tree of this process has it, nor one of the same space before or after.
    """

    space: str
    root: Node = field(init=False)
    tokens: int = 0
    nodes: int = 1
    described_bytes: int = 0
    leaving: bool = False
    serial: int = field(default_factory=lambda: next(_serials))

    def __post_init__(self) -> None:
        self.root = Node(np.empty(0, dtype=np.int32), 0, None, self)

    def edges(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        waiting = [self.root]
        while waiting:
            children = waiting.pop().children.values()
            yield from children
            waiting.extend(children)

    @property
    def nbytes(self) -> int:
        return TOKEN_BYTES * self.tokens + NODE_BYTES * self.nodes + self.described_bytes


class Node:
    """One edge of the tree: `tokens` cover the positions `start + 1 .. end` of the path."""

    __slots__ = (
        "batched",
        "checkpoints",
        "children",
        "described",
        "end",
        "generated",
        "last_used",
        "latest",
        "lost",
        "parent",
        "passes",
        "queued",
        "recent",
        "refused",
        "segments",
        "start",
        "tokens",
        "tree",
        "waiting",
    )

    def __init__(self, tokens: Tokens, start: int, parent: Node | None, tree: Tree) -> None:
        self.tokens, self.start, self.parent, self.tree = tokens, start, parent, tree
        self.end = start + len(tokens)
        self.children: dict[int, Node] = {}
        self.checkpoints: list[Checkpoint] = []  # shallow to deep; one position may hold several, each of its lineage
        self.segments: dict[tuple[KVSegment | None, Span], KVSegment] = {}  # by what each continues, and its span
        self.passes = 0  # prompts that ran along the whole edge
        self.last_used = 0  # request that passed it last
        self.queued = False  # whether it waits for its turn to be forgotten
        self.batched = False  # whether its tokens never ran but in one forward with other prompts
        self.generated = False  # whether a model wrote its tokens, in answer to a prompt that ends above
        self.recent: Node | None = None  # the child that the latest prompt ran on to, for the eviction
        self.latest: Shape | None = None  # the policies' description of the latest prompt that came this way
        self.described = 0  # bytes of the description of a prompt that ends here
        self.lost = 0  # shallowest position of this edge whose checkpoint was evicted; 0 when none was
        self.refused = 0  # shallowest position of this edge for whose checkpoint no room was made; 0 when none was
        self.waiting: tuple[int, int] | None = None  # row of the survival tables it waits in, and since which tick

    @property
    def kept(self) -> int:
        """The deepest position at which it holds something; 0 when it holds nothing."""
        held: list[Checkpoint | KVSegment] = [*self.checkpoints[-1:], *self.segments.values()]
        return max((item.position if isinstance(item, Checkpoint) else item.end for item in held), default=0)

    def find(self, lineage: Lineage) -> Checkpoint | None:
        """Its checkpoint of this lineage."""
        end = lineage.end
        return next((item for item in self.checkpoints if item.position == end and item.lineage == lineage), None)

    def path_tokens(self) -> Tokens:
        """All tokens from the root to this node's end."""
        edges, node = [self.tokens], self.parent
        while node is not None:
            edges.append(node.tokens)
            node = node.parent
        return np.concatenate(edges[::-1])


def nearest(nodes: Sequence[Node], limit: int = 256) -> list[Checkpoint]:
    """The checkpoints of the first node that holds any, on every path down from `nodes`; looks at `limit` nodes."""
    level, found = list(nodes), []
    while level and limit > 0:
        found += [checkpoint for node in level for checkpoint in node.checkpoints]
        limit -= len(level)
        level = [child for node in level if not node.checkpoints for child in node.children.values()]
    return found


class Departure(NamedTuple):
    """Where a text has another token than what a tree remembers.

    Attributes:
        position: tokens that are shared before it.
        stored: the next ones of the latest text that came so far; empty where none went on.
        generated: whether a model wrote these in answer to a prompt.
    """

    position: int
    stored: Tokens
    generated: bool


@dataclass
class Match:
    """What the tree knows of a prompt: the nodes on its path, and the tokens it shares with earlier prompts."""

    path: list[Node]
    overlap: int
    known: bool  # whether the space held anything at all

    def checkpoints(self, limit: int) -> list[Checkpoint]:
        """Stored checkpoints on the path at positions up to `limit`, shallow to deep."""
        limit = min(limit, self.overlap)
        return [checkpoint for node in self.path for checkpoint in node.checkpoints if checkpoint.position <= limit]

    def fitting(
        self, length: int, expected: Lineage | None, without: Container[Checkpoint] = (), tail: int = 1
    ) -> Iterator[Checkpoint]:
        """The checkpoints from which a prompt of this length may go on, deep to shallow.

        At least two tokens are left to compute, and all of its tail; or none at all where a checkpoint keeps what the
        last token gave and that is all the tail. What a prompt of one token left is the state of a decode
        step: only that very prompt goes on from it.

        Args:
            length: tokens of the prompt.
            expected: how the prompt itself would be cut; None where any lineage will do.
            without: checkpoints that are out of the question.
            tail: how many of the last tokens' logits are asked for.
        """
        most = length - max(MIN_SUFFIX_TOKENS, tail)
        for checkpoint in reversed(self.checkpoints(length)):
            reached = checkpoint.position
            inside = MIN_SUFFIX_TOKENS <= reached <= most
            leaves = inside or (reached == length and checkpoint.final and tail == 1)
            fits = expected is None or expected.begins_with(checkpoint.lineage)
            if leaves and fits and checkpoint not in without:
                yield checkpoint
