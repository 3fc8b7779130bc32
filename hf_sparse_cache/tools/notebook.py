"""What a notebook shows of a handle: the tree of what is stored in its space, and its last requests.

Plain HTML without scripts, style sheets or anything from outside; colours are those of the page, dark or light.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..stats import CacheStats, RequestInfo, format_bytes, html_table
from .outline import Branch, added_kv_bytes, outline


if TYPE_CHECKING:
    from ..models.server import Server
    from ..store.tier import Tier

Decode = Callable[[list[int]], str]
# What is shown of a tier: some dozens of edges, the deepest checkpoints of each, and the first tokens of its text.
_EDGES = 40
_CHECKPOINTS = 6
_TOKENS = 12
_REQUESTS = 10
_FAINT = "style='opacity:.7'"
_COLUMNS = ("prompt", "overlap", "resumed", "computed", "captured at", "reason")


def page(server: Server, stats: CacheStats) -> str:
    """What one handle serves from as a piece of HTML. Looks, and changes nothing."""
    binding, requests = server.binding, server.recorder.recent
    space = server.space.latest()  # empty when that is not known before the first prompt
    decode = None if binding.tokenizer is None else binding.tokenizer.decode
    trees = "".join(_tree(tier, space, decode) for tier in server.store.tiers)
    nothing = "Nothing is stored yet." if space else "What the disk holds for this model shows with the first prompt."
    namespace = binding.config.namespace
    tenant = f", namespace {namespace!r}" if namespace else ""
    title = f"{type(binding.model).__name__}, grid {binding.grid}{tenant}"
    return (
        f"<div><p><b>SparsePrefixCache</b> {escape(title)}<br>{escape(str(stats))}</p>"
        f"{trees or f'<p {_FAINT}>{nothing}</p>'}{_table(requests, stats.requests)}</div>"
    )


def _tree(tier: Tier, space: str, decode: Decode | None) -> str:
    """What one tier holds of a space as a nested list; empty when it holds nothing."""
    name, rows, left_out = tier.name, [], 0
    with tier.lock:  # tokens and figures are taken out under it, and decoded without it
        for branch in outline(tier.forest.roots.get(space), _EDGES):
            if branch.level:
                rows.append((branch.level, branch.node.tokens[: _TOKENS + 1].tolist(), _edge(branch, name)))
            else:
                left_out = branch.left_out
    items = [(level, f"{_text(beginning, decode)}{edge}") for level, beginning, edge in rows]
    if left_out:
        items.append((1, f"and {left_out:,} more"))
    return _nested(items)


def _nested(items: list[tuple[int, str]]) -> str:
    """A list in lists; every item is at most one level deeper than the one before."""
    out, depth = [], 0
    for level, item in items:
        out.append("<ul>" if level > depth else "</li>" + "</ul></li>" * (depth - level))
        out.append(f"<li>{item}")
        depth = level
    return "".join(out) + ("</li></ul>" * depth)


def _edge(branch: Branch, tier: str) -> str:
    """Its tokens, and its checkpoints each on a line."""
    node, before = branch.node, branch.before
    prompts = f", {node.passes:,} prompt{'s' * (node.passes != 1)}" if node.passes else ""
    lines = [f" <span {_FAINT}>{node.end - node.start:,} tokens up to {node.end:,}{prompts}</span>"]
    for checkpoint in branch.checkpoints:
        kv_bytes, before = added_kv_bytes(checkpoint, before), checkpoint.position
        size = format_bytes(checkpoint.nbytes) + (f" + {format_bytes(kv_bytes)} KV" if kv_bytes else "")
        hits = f"{checkpoint.hits:,} hit{'s' * (checkpoint.hits != 1)}"
        kept = ", kept" if checkpoint.pins else ""
        lines.append(f"◆ checkpoint at {checkpoint.position:,}: {size} in {tier}, {hits}{kept}")
    hidden = max(0, len(branch.checkpoints) - _CHECKPOINTS)
    if hidden:
        lines[1 : hidden + 1] = [f"◆ {hidden:,} more checkpoints"]
    if branch.left_out:
        lines.append(f"and {branch.left_out:,} more below")
    return "<br>".join(lines)


def _text(beginning: list[int], decode: Decode | None) -> str:
    shown = beginning[:_TOKENS]
    text = " ".join(map(str, shown)) if decode is None else decode(shown)
    return f"<code>{escape(repr(text)[1:-1])}{'…' * (len(beginning) > _TOKENS)}</code>"


def _table(requests: Sequence[RequestInfo], total: int) -> str:
    """The last requests, the latest first; figures are tokens."""
    if not requests:
        return ""
    shown = requests[: -_REQUESTS - 1 : -1]
    rows = []
    for info in shown:
        tokens = (info.prompt_tokens, info.overlap_tokens, info.resumed_tokens, info.computed_tokens)
        captured = " ".join(f"{position}" for position in info.captured[-_CHECKPOINTS:])
        more = "… " * (len(info.captured) > _CHECKPOINTS)
        rows.append((*(f"{count:,}" for count in tokens), more + captured, info.reason))
    caption = f"The last {len(shown)} of {total:,} requests, the latest first, in tokens:"
    return f"<p>{caption}</p>{html_table(_COLUMNS, rows, words=(4, 5))}"
