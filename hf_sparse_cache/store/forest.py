"""The radix trees over prompt tokens, one a space, under one bound: how paths come, are found, and are forgotten.

Tokens are compared, never only hashed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from ..planning.compiled import walk
from ..planning.cuts import Tokens
from ..planning.views import Shape
from .tree import DESCRIPTION_BYTES, NODE_BYTES, TOKEN_BYTES, Departure, Node, Tree, nearest


class Forest:
    """One tree of tokens a space (a fingerprint and a namespace), under one bound on what is remembered."""

    def __init__(self) -> None:
        self.trees: dict[str, Tree] = {}
        self.leaving: set[Tree] = set()  # cleared trees, of which something is still in use
        self.tokens = 0  # remembered tokens, summed over the edges
        self.overhead_bytes = 0  # of nodes and descriptions
        self.version = 0  # changes with the shape of any tree
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (last_used, tie, node): what to forget first
        self._ties = 0

    @property
    def roots(self) -> dict[str, Node]:
        """The root of each space."""
        return {space: tree.root for space, tree in self.trees.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all trees."""
        return TOKEN_BYTES * self.tokens + self.overhead_bytes

    def nodes(self, space: str) -> Iterator[Node]:
        """Every node of a space but its root, parents before children."""
        if space in self.trees:
            yield from self.trees[space].edges()

    def walk(self, ids: Tokens, space: str) -> tuple[list[Node], int]:
        """Follows `ids` as far as the space knows them.

        Returns:
            The nodes entered, shallow to deep, and the number of tokens shared; the last node may be shared in part.
        """
        if space not in self.trees:
            return [], 0
        return walk(self.trees[space].root.children, np.ascontiguousarray(ids, dtype=np.int32))

    def departure(self, ids: Tokens, space: str, most: int) -> Departure:
        """Where `ids` have another token than what the space knows, with `most` of the tokens that stand there."""
        path, depth = self.walk(ids, space)
        nodes = path[-1:] or [tree.root for tree in [self.trees.get(space)] if tree is not None]
        if nodes and nodes[0].end == depth:
            nodes = sorted(nodes[0].children.values(), key=lambda node: node.last_used)[-1:]
        if not nodes or depth == len(ids):
            return Departure(depth, ids[:0], False)
        (node,) = nodes
        runs = (step for item in nearest([node]) for step in item.lineage.steps() if step.decoded)
        generated = node.generated or any(run.start <= depth < run.end for run in runs)
        return Departure(depth, node.tokens[depth - node.start :][:most].copy(), generated)

    def insert(self, ids: Tokens, space: str, now: int) -> list[Node]:
        """Makes the path of `ids` exist, with a node that ends exactly where they end, and returns its nodes."""
        return self.extend(*self.walk(ids, space), ids, space, now)

    def extend(self, path: list[Node], depth: int, ids: Tokens, space: str, now: int) -> list[Node]:
        """Goes on from what `walk` found of `ids`, the nodes and how far they share them, to the path of all."""
        if path and depth < path[-1].end:
            path = [*path[:-1], self._split(path[-1], depth)]
        if depth < len(ids):
            parent = path[-1] if path else self._tree(space).root
            leaf = Node(ids[depth:].astype(np.int32, copy=True), depth, parent, parent.tree)
            leaf.last_used = now
            parent.children[int(ids[depth])] = leaf
            self._count(leaf, 1)
            self._offer(leaf)
            path = [*path, leaf]
        return path

    def describe(self, path: list[Node], shape: Shape | None) -> None:
        """Notes the policies' description of the latest prompt on its path, as far as it is still remembered."""
        path = [node for node in path if node.parent is not None]
        for node in path:
            node.latest = shape
            if node.described:
                self._count_description(node, 0)
        if shape is not None and path:
            arrays = shape.ends.nbytes + shape.stops.nbytes + shape.cuts.nbytes
            self._count_description(path[-1], DESCRIPTION_BYTES + arrays)

    # -- what goes ----------------------------------------------------------------------------------------------------

    def released(self, node: Node) -> None:
        """Something that a node held is gone."""
        if node.tree.leaving:
            self._prune(node)
        else:
            self._offer(node)

    def forget(self, limit: int) -> None:
        """Drops the least recently used tokens that no checkpoint needs, and their nodes, until all that is left takes
        at most `limit` bytes.
        """
        while self.nbytes > limit and self._leaves:
            stamp, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if node.children or node.parent is None:
                continue
            if node.last_used != stamp:
                self._offer(node)
            elif node.checkpoints or node.segments:
                self._shorten(node)
            else:
                parent = node.parent
                self._remove(node)
                self._offer(parent)

    def clear(self, space: str | None = None) -> None:
        """Forgets one space, or all: no prompt meets it again, and what is in use goes as soon as it is not."""
        for name in list(self.trees) if space is None else [space]:
            tree = self.trees.pop(name, None)
            if tree is None:
                continue
            self.version += 1
            tree.leaving = True
            self.leaving.add(tree)
            for node in reversed(list(tree.edges())):  # children before parents
                node.latest = node.recent = None
                self._count_description(node, 0)
                self._prune(node)
        self._leaves = [entry for entry in self._leaves if entry[2].parent is not None and not entry[2].tree.leaving]
        heapq.heapify(self._leaves)

    def _prune(self, node: Node) -> None:
        """Removes a leaf that holds nothing any more, and those above that were kept for it."""
        while node.parent is not None and not node.children:
            if node.checkpoints or node.segments:
                self._shorten(node)
                return
            node, gone = node.parent, node
            self._remove(gone)

    def _shorten(self, node: Node) -> None:
        """Cuts a leaf behind what it holds."""
        kept = node.kept
        if kept < node.end:
            self.version += 1
            self.tokens -= node.end - kept
            node.tree.tokens -= node.end - kept
            node.tokens, node.end = node.tokens[: kept - node.start].copy(), kept

    def _remove(self, node: Node) -> None:
        """Takes a leaf that holds nothing out of its tree, and the tree out of the forest with its last one."""
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[int(node.tokens[0])]
        if node.described:
            described = node.described if parent.latest is node.latest else 0
            self._count_description(node, 0)
            self._count_description(parent, parent.described + described)
        self._count(node, -1)
        above: Node | None = parent
        while above is not None:  # a split leaves the node as the latest one of nodes further up
            if above.recent is node:
                above.recent = None
            above = above.parent
        node.parent = None
        node.tokens = node.tokens[:0].copy()  # whoever still looks at the node has no use for another's prompt
        if parent.parent is None and not parent.children:
            self._count_description(parent, 0)
            if parent.tree.leaving:
                self.leaving.discard(parent.tree)
            else:
                del self.trees[parent.tree.space]
            self.overhead_bytes -= NODE_BYTES

    def _offer(self, node: Node) -> None:
        """Lets a leaf be forgotten when its turn comes; harmless for any other node."""
        if not node.children and node.parent is not None and not node.queued:
            self._ties += 1
            node.queued = True
            heapq.heappush(self._leaves, (node.last_used, self._ties, node))

    # -- how trees grow -----------------------------------------------------------------------------------------------

    def _tree(self, space: str) -> Tree:
        if space not in self.trees:
            self.trees[space] = Tree(space)
            self.overhead_bytes += NODE_BYTES
        return self.trees[space]

    def _split(self, node: Node, depth: int) -> Node:
        """Splits an edge at `depth`; checkpoints and segments go to the half that holds their end."""
        offset = depth - node.start
        assert node.parent is not None
        # Whatever takes memory is made first: where there is none, the edge is as it was.
        upper = Node(node.tokens[:offset].copy(), node.start, node.parent, node.tree)
        upper.passes, upper.last_used, upper.latest = node.passes, node.last_used, node.latest
        upper.generated, upper.batched = node.generated, node.batched
        tokens = node.tokens[offset:].copy()
        upper.children[int(tokens[0])] = upper.recent = node
        upper.checkpoints = [checkpoint for checkpoint in node.checkpoints if checkpoint.position <= depth]
        checkpoints = node.checkpoints[len(upper.checkpoints) :]
        upper.segments = {key: segment for key, segment in node.segments.items() if key[1].end <= depth}
        segments = {key: segment for key, segment in node.segments.items() if key[1].end > depth}
        node.parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.start, node.parent = tokens, depth, upper
        node.checkpoints, node.segments = checkpoints, segments
        for checkpoint in upper.checkpoints:
            checkpoint.node = upper
        for segment in upper.segments.values():
            segment.node = upper
        if 0 < node.lost <= depth:
            upper.lost, node.lost = node.lost, 0
        if 0 < node.refused <= depth:
            upper.refused, node.refused = node.refused, 0
        self._count_node(upper, 1)
        return upper

    def _count(self, node: Node, sign: int) -> None:
        """Counts a node with its tokens."""
        self.tokens += sign * len(node.tokens)
        node.tree.tokens += sign * len(node.tokens)
        self._count_node(node, sign)

    def _count_node(self, node: Node, sign: int) -> None:
        self.version += 1
        self.overhead_bytes += sign * NODE_BYTES
        node.tree.nodes += sign

    def _count_description(self, node: Node, nbytes: int) -> None:
        self.overhead_bytes += nbytes - node.described
        node.tree.described_bytes += nbytes - node.described
        node.described = nbytes


class Trail:
    """The way of one text through its tree, walked again only after the shape of a tree has changed.

    Attributes:
        ids: the text.
    """

    def __init__(self, forest: Forest, ids: Tokens, space: str) -> None:
        self.forest, self.ids, self.space = forest, ids, space
        self._path: list[Node] = []
        self._depth = 0
        self._version = -1

    def known(self) -> tuple[list[Node], int]:
        """The nodes that it enters, and how many tokens they share with it (see `Forest.walk`)."""
        if self._version != self.forest.version:
            self._path, self._depth = self.forest.walk(self.ids, self.space)
            self._version = self.forest.version
        return self._path, self._depth

    def grown(self, now: int) -> list[Node]:
        """The nodes of the whole text, which exist from now on."""
        path, depth = self.known()
        if depth < len(self.ids) or (path and path[-1].end > depth):
            self._path = self.forest.extend(path, depth, self.ids, self.space, now)
            self._depth, self._version = len(self.ids), self.forest.version
        return self._path
