"""What would fit: the tightest budget for one checkpoint, beside what stays whatever is evicted."""

from __future__ import annotations

from typing import NamedTuple

from ..planning.cuts import Tokens
from .ledger import Ledger
from .tree import Account, Match
from .unit import namespace_of


class Bound(NamedTuple):
    """A budget that a checkpoint has to fit into.

    Attributes:
        name: the argument that sets it.
        limit: its bytes.
        used: those that are stored.
        kept: those of them that stay while the checkpoint is stored, and that it does not share.
    """

    name: str
    limit: int
    used: int
    kept: int


def tightest(ledger: Ledger, ids: Tokens, position: int, space: str = "") -> Bound | None:
    """The tightest budget for a checkpoint at `position` of `ids`; None without any."""
    with ledger.lock:
        account, path = ledger.account(namespace_of(space)), ledger.match(ids, space)
        bounds = []
        if ledger.max_memory is not None:
            kept = _kept_beside(ledger, path, position)
            bounds.append(Bound("max_memory", ledger.max_memory, ledger.used_bytes, kept))
        if account.limit is not None:
            kept = _kept_beside(ledger, path, position, account)
            bounds.append(Bound("namespace_memory", account.limit, account.used_bytes, kept))
        return min(bounds, key=lambda bound: bound.limit - bound.kept, default=None)


def _kept_beside(ledger: Ledger, path: Match, position: int, owner: Account | None = None) -> int:
    """Bytes that stay while a checkpoint at `position` of this path comes, less what it would share: what marks keep,
    and the checkpoint that its request resumes from.
    """
    nodes = set(path.path)
    staying = dict.fromkeys(checkpoint for _, checkpoint in ledger.marks.kept)
    staying |= dict.fromkeys(path.checkpoints(position - 1)[-1:])
    kept = [
        checkpoint
        for checkpoint in staying
        if not (checkpoint.node in nodes and checkpoint.position == position)
        and (owner is None or checkpoint.owner is owner)
    ]
    segments = ledger.chains.below(checkpoint.kv for checkpoint in kept)
    shared = min(path.overlap, position)
    alone = [segment for segment in segments if segment.node not in nodes or segment.end > shared]
    return sum(checkpoint.nbytes for checkpoint in kept) + sum(segment.nbytes for segment in alone)
