"""Do the books agree with what is there? Counts one ledger anew, from the trees up, and names what differs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from ..planning.lineage import Lineage
from .ledger import Ledger
from .tree import DESCRIPTION_BYTES, Account, Checkpoint, KVSegment, Node, Tree


class WrongBooksError(RuntimeError):
    """What a store has counted is not what it holds."""


def audit(ledger: Ledger) -> None:
    """Compares every count of a ledger with what can be reached.

    Raises:
        WrongBooksError: all that differs, each with what was counted and what was found.
    """
    with ledger.lock:
        found = [*_trees(ledger), *_entries(ledger), *_users(ledger), *_sums(ledger), *_orders(ledger)]
    if found:
        raise WrongBooksError("; ".join(found))


def _differ(what: str, counted: object, there: object) -> Iterator[str]:
    if counted != there:
        yield f"{what}: {counted} counted, {there} found"


def _all_trees(ledger: Ledger) -> list[Tree]:
    return [*ledger.forest.trees.values(), *ledger.forest.leaving]


def _nodes(ledger: Ledger) -> list[Node]:
    return [node for tree in _all_trees(ledger) for node in tree.edges()]


def _checkpoints(ledger: Ledger) -> list[Checkpoint]:
    return [checkpoint for node in _nodes(ledger) for checkpoint in node.checkpoints]


def _segments(ledger: Ledger) -> list[KVSegment]:
    return [segment for node in _nodes(ledger) for segment in node.segments.values()]


def _where(node: Node) -> str:
    return f"edge {node.start}..{node.end} of space {node.tree.space!r}"


# -- trees ------------------------------------------------------------------------------------------------------------


def _trees(ledger: Ledger) -> Iterator[str]:
    """Edges join, tokens and nodes are counted, every leaf will be forgotten when its turn comes."""
    forest = ledger.forest
    for tree in _all_trees(ledger):
        edges = list(tree.edges())
        name = f"tree of space {tree.space!r}"
        yield from _differ(f"{name}, tokens", tree.tokens, sum(len(node.tokens) for node in edges))
        yield from _differ(f"{name}, nodes", tree.nodes, 1 + len(edges))
        yield from _differ(f"{name}, description bytes", tree.described_bytes, _description_bytes(edges))
        if not edges:
            yield f"{name} is empty and still there"
        for node in edges:
            yield from _edge(node, tree)
    for space, tree in forest.trees.items():
        yield from _differ(f"tree of space {tree.space!r}, its place", space, tree.space)
    trees = _all_trees(ledger)
    yield from _differ("tokens of all trees", forest.tokens, sum(tree.tokens for tree in trees))
    yield from _differ("bytes of all trees", forest.nbytes, sum(tree.nbytes for tree in trees))
    yield from _queue(ledger)


def _edge(node: Node, tree: Tree) -> Iterator[str]:
    parent = node.parent
    if node.tree is not tree or parent is None or parent.children.get(int(node.tokens[0])) is not node:
        yield f"{_where(node)} does not hang where it says"
    elif parent.end != node.start or node.end - node.start != len(node.tokens):
        yield f"{_where(node)} has {len(node.tokens)} tokens and follows one that ends at {parent.end}"


def _description_bytes(edges: Iterable[Node]) -> int:
    """Of the descriptions that can be reached, each once."""
    shapes = {id(node.latest): node.latest for node in edges if node.latest is not None}
    arrays = (array for shape in shapes.values() for array in (shape.ends, shape.stops, shape.cuts))
    return DESCRIPTION_BYTES * len(shapes) + sum(array.nbytes for array in arrays)


def _queue(ledger: Ledger) -> Iterator[str]:
    queued = Counter(node for _, _, node in ledger.forest._leaves)
    alive = {node for tree in ledger.forest.trees.values() for node in tree.edges()}
    for node, count in queued.items():
        if node not in alive:
            yield f"{_where(node)} is gone and still waits to be forgotten"
        elif count > 1 or not node.queued:
            yield f"{_where(node)} waits {count} times to be forgotten"
    for node in alive - set(queued):
        if node.queued or not (node.children or node.checkpoints or node.segments):
            yield f"{_where(node)} will never be forgotten"


# -- entries ----------------------------------------------------------------------------------------------------------


def _entries(ledger: Ledger) -> Iterator[str]:
    """Everything hangs on the edge that covers it, once, and chains lead down to position 0 on one path."""
    for node in _nodes(ledger):
        positions = [checkpoint.position for checkpoint in node.checkpoints]
        if positions != sorted(positions):
            yield f"checkpoints on {_where(node)} are out of order: {positions}"
        for checkpoint in node.checkpoints:
            position = checkpoint.position
            if checkpoint.node is not node or checkpoint.lineage.end != position:
                yield f"checkpoint at {position} is owned by two places, one of them {_where(node)}"
            elif not node.start < position <= node.end:
                yield f"checkpoint at {position} hangs on {_where(node)}"
            elif node.find(checkpoint.lineage) is not checkpoint:
                yield f"checkpoint at {position} is stored twice under one lineage"
            yield from _chain(checkpoint)
        for (parent, span), segment in node.segments.items():
            below = parent.end if parent is not None else 0
            if segment.node is not node or segment.parent is not parent or segment.span != span:
                yield f"segment {segment.start}..{segment.end} is owned by two places, one of them {_where(node)}"
            elif not node.start < segment.end <= node.end or segment.start != below:
                yield f"segment {segment.start}..{segment.end} hangs on {_where(node)}"
    payloads = Counter(id(entry) for entry in [*_checkpoints(ledger), *_segments(ledger)])
    if any(count > 1 for count in payloads.values()):
        yield "an entry is stored in two places"


def _chain(checkpoint: Checkpoint) -> Iterator[str]:
    path, node = set(), checkpoint.node
    while node.parent is not None:
        path.add(node)
        node = node.parent
    name, end = f"checkpoint at {checkpoint.position}", checkpoint.position
    for segment in reversed(checkpoint.chain()):
        if segment.end != end or segment.node not in path:
            yield f"{name} needs a segment {segment.start}..{segment.end} that is not on its way"
        if segment.node.segments.get((segment.parent, segment.span)) is not segment:
            yield f"{name} needs a segment {segment.start}..{segment.end} that is not stored"
        end = segment.start
    if checkpoint.kv is not None and end != 0:
        yield f"{name} has no keys and values below {end}"
    made = checkpoint.lineage.unrounded
    if checkpoint.kv is not None and Lineage.of(segment.span for segment in checkpoint.chain()) != made:
        yield f"{name} was made by other segments than its keys and values"


# -- who uses them ----------------------------------------------------------------------------------------------------


def _users(ledger: Ledger) -> Iterator[str]:
    """Pins, references and holds are those of marks, users, chains and footings."""
    refs = Counter(item.kv for item in _checkpoints(ledger) if item.kv is not None)
    refs.update(item.parent for item in _segments(ledger) if item.parent is not None)
    holds = Counter(footing.chain[-1] for footing in ledger.chains.footings if footing.chain)
    yield from _differ("held segments", dict(ledger.chains.held), dict(holds))
    for segment in {*_segments(ledger), *holds}:
        name = f"segment {segment.start}..{segment.end} on {_where(segment.node)}"
        yield from _differ(f"{name}, references", segment.refs, refs[segment])
        yield from _differ(f"{name}, holds", segment.holds, holds[segment])
        if not segment.refs and not segment.holds:
            yield f"{name} is kept for nothing"
    known: Counter[Checkpoint] = Counter(item for _, item in ledger.marks.kept)
    known.update(ledger.in_use)
    for item in {*_checkpoints(ledger), *known, *ledger.pinned.values()}:
        name = f"checkpoint at {item.position} on {_where(item.node)}"
        yield from _differ(f"{name}, pins", item.pins, known[item])
        yield from _differ(f"{name}, pinned", id(item) in ledger.pinned, item.pins > 0)
    for _, item in ledger.marks.kept:
        if not item.stored:
            yield f"a mark keeps a checkpoint at {item.position} that is not stored"


# -- sums -------------------------------------------------------------------------------------------------------------


def _sums(ledger: Ledger) -> Iterator[str]:
    """Counts and bytes, in all and by namespace; the budget holds."""
    checkpoints, segments = _checkpoints(ledger), _segments(ledger)
    yield from _differ("checkpoints", ledger.checkpoint_count, len(checkpoints))
    yield from _differ("checkpoint_bytes", ledger.checkpoint_bytes, sum(item.nbytes for item in checkpoints))
    yield from _differ("kv_bytes", ledger.kv_bytes, sum(item.nbytes for item in segments))
    yield from _differ("kv_tokens", ledger.chains.tokens, sum(item.end - item.start for item in segments))
    payloads = [(item, item.state) for item in checkpoints] + [(item, item.payload) for item in segments]
    for entry, payload in payloads:
        if entry.nbytes != int(payload.nbytes):
            yield f"a payload of {payload.nbytes} bytes is counted as {entry.nbytes}"
    held: defaultdict[Account, list[int]] = defaultdict(lambda: [0, 0, 0])
    for checkpoint in checkpoints:
        held[checkpoint.owner][0] += 1
        held[checkpoint.owner][1] += checkpoint.nbytes
    for segment in segments:
        held[segment.owner][2] += segment.nbytes
    accounts = {account: name for name, account in ledger.accounts.items()}
    for account in {*held, *accounts}:
        counted = [account.checkpoints, account.checkpoint_bytes, account.kv_bytes]
        yield from _differ(f"checkpoints and bytes of namespace {accounts.get(account)!r}", counted, held[account])
        if account not in accounts:
            yield f"{held[account][0]} checkpoints belong to an account that was closed"
    if ledger.reserved_bytes < 0:
        yield f"reserved_bytes is {ledger.reserved_bytes}"
    if ledger.over_budget and any(not item.pins for item in checkpoints):
        yield f"max_memory is {ledger.max_memory}, {ledger.used_bytes + ledger.reserved_bytes} bytes are used"


def _orders(ledger: Ledger) -> Iterator[str]:
    """The eviction knows each checkpoint once, and nothing else."""
    known = ledger.eviction.known()
    if known is not None:
        yield from _differ("checkpoints that the eviction knows", Counter(known), Counter(_checkpoints(ledger)))
