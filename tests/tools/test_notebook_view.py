"""What a notebook shows of a handle: all of it true, bounded, escaped, and without touching anything."""

import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from tiny_models import random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, check_exactness, plan_checkpoints, simulate
from hf_sparse_cache.explain import Explanation
from hf_sparse_cache.planning.policies import Block
from hf_sparse_cache.stats import Cause, Reason, format_bytes
from hf_sparse_cache.tools.builtin import build_tokenizer


GRID = 32
DOCUMENT = random_ids(128, seed=1)


def serve(model: PreTrainedModel, cache: SparsePrefixCache, *seeds: int, shared: torch.Tensor = DOCUMENT) -> None:
    for seed in seeds:
        ids = torch.cat([shared, random_ids(40, seed=seed)], dim=1)
        model.generate(ids, past_key_values=cache, max_new_tokens=1)


class Outline(HTMLParser):
    """Checks that tags are closed in order, and notes the depth of every list item and the text of every cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.items: list[tuple[int, str]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, Any]]) -> None:
        self.tags.add(tag)
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "li":
            self.items.append((self.open.count("ul"), ""))
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "li" in self.open:
            self.items[-1] = (self.items[-1][0], self.items[-1][1] + data)
        if "tr" in self.open:
            self.rows[-1].append(data)


def test_tree_and_requests(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", exactness="bitwise") as cache:
        assert "Nothing is stored yet" in cache._repr_html_()
        serve(jamba, cache, 2, 3)
        shown = Outline(cache._repr_html_())
        assert [depth for depth, _ in shown.items] == [1, 2, 2]
        root = shown.items[0][1]
        assert "128 tokens up to 128, 2 prompts" in root
        states = format_bytes(cache.size.state_bytes)
        kv = format_bytes(32 * cache.size.kv_bytes_per_token)
        assert f"◆ checkpoint at 32: {states} + {kv} KV in memory, 0 hits" in root
        assert f"◆ checkpoint at 128: {states} + {kv} KV in memory, 1 hit" in root
        assert sum("40 tokens up to 168, 1 prompt" in text for _, text in shown.items) == 2
        assert shown.rows[0] == ["prompt", "overlap", "resumed", "computed", "captured at", "reason"]
        assert shown.rows[1][:4] == ["168", "128", "128", "40"] and shown.rows[1][-1] == "resumed"
        assert shown.rows[2] == ["168", "0", "0", "168", "32 64 96 128", "nothing stored"]


def test_it_is_bounded(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=2, policy="block", exactness="bitwise") as cache:
        for seed in range(60):
            jamba.generate(random_ids(9, seed=seed), past_key_values=cache, max_new_tokens=1)
        page = cache._repr_html_()
        shown = Outline(page)
        branches = len(cache.store.forest.roots[cache.server.space.latest()].children)
        assert len(shown.items) == 41
        top = sum(depth == 1 for depth, _ in shown.items[:-1])
        assert shown.items[-1] == (1, f"and {branches - top} more") and branches > top
        assert len(shown.rows) == 11 and "The last 10 of 60 requests" in page
        # The latest prompt is among those shown.
        assert " ".join(map(str, random_ids(9, seed=59)[0].tolist()[:2])) in page


def test_text_is_escaped_and_nothing_is_loaded(jamba: PreTrainedModel) -> None:
    text = "<script>alert('&')</script> <b>bold</b> " * 8
    tokenizer = build_tokenizer([text * 3])
    ids = tokenizer(text, return_tensors="pt")["input_ids"] % 128
    with SparsePrefixCache(jamba, tokenizer, grid=2, policy="block", exactness="bitwise") as cache:
        tokenizer.decode = lambda tokens: text
        jamba.generate(ids, past_key_values=cache, max_new_tokens=1)
        page = cache._repr_html_()
    assert "&lt;script&gt;" in page
    assert Outline(page).tags <= {"div", "p", "b", "br", "ul", "li", "code", "span", "table", "tr", "th", "td"}
    assert not re.search(r"src=|href=|url\(|@import|(?<!-)color:", page)  # colours are the page's own


def test_looking_changes_nothing(jamba: PreTrainedModel) -> None:
    store = CheckpointStore("1MiB", "lru")
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", store=store, exactness="bitwise") as cache:
        serve(jamba, cache, 2, 3)
        cache.mark(DOCUMENT)

        def state() -> Any:
            nodes = list(store.forest.nodes(cache.server.space.latest()))
            held = [(item.hits, item.pins, item.last_used) for item in store.stored()]
            return store.clock, held, [(node.passes, node.last_used) for node in nodes], cache.stats(), len(store)

        before = state()
        for _ in range(3):
            cache._repr_html_()
        assert state() == before
        with torch.no_grad():
            next(jamba.parameters()).mul_(1.5)
        cache._repr_html_()  # would find other weights, and drops nothing for it
        assert state() == before
        assert cache.explain(DOCUMENT).reason.startswith("weights changed")


def test_other_namespaces_are_not_shown(jamba: PreTrainedModel) -> None:
    store = CheckpointStore()
    with (
        SparsePrefixCache(jamba, grid=GRID, store=store, namespace="a", exactness="bitwise") as one,
        SparsePrefixCache(jamba, grid=GRID, store=store, namespace="b", exactness="bitwise") as other,
    ):
        serve(jamba, one, 2)
        assert "168" in one._repr_html_()
        assert "Nothing is stored yet" in other._repr_html_()


def test_every_tier_is_shown(jamba: PreTrainedModel, tmp_path: Path) -> None:
    def made() -> CheckpointStore:
        return CheckpointStore(disk_memory="64MiB", disk_dir=tmp_path)

    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", store=made(), exactness="bitwise") as cache:
        serve(jamba, cache, 2)
        cache.store.flush()
        page = cache._repr_html_()
        assert "KV in memory, 0 hits" in page and "KV in disk, 0 hits" in page
        Outline(page)
        cache.store.close()
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", store=made(), exactness="bitwise") as cache:
        assert "shows with the first prompt" in cache._repr_html_()  # before it, the weights have no name on disk
        cache.store.close()


def test_it_waits_for_the_store(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache:
        serve(jamba, cache, 2)
        pages: list[str] = []
        looking = threading.Thread(target=lambda: pages.append(cache._repr_html_()))
        with cache.store.lock:
            looking.start()
            looking.join(timeout=0.2)
            assert pages == []
        looking.join(timeout=60)
        assert len(pages) == 1


def rows_of(shown: Any) -> dict[str, str]:
    """Of a table whose first cell says what the second is."""
    return {row[0]: row[1] for row in Outline(shown._repr_html_()).rows}


def test_results_are_tables_as_well(jamba: PreTrainedModel) -> None:
    tokenizer = build_tokenizer(["A state is a summary. " * 20])
    with SparsePrefixCache(jamba, tokenizer, grid=GRID, policy=Block(GRID), exactness="bitwise") as cache:
        serve(jamba, cache, 2, 3)
        info, explained = cache.last_request, cache.explain(torch.cat([DOCUMENT, random_ids(40, seed=4)], dim=1))
        report = check_exactness(jamba, [DOCUMENT], cache=cache, max_new_tokens=2)
        stats = cache.stats()
    assert info is not None
    told = rows_of(info)
    assert (told["resumed"], told["computed"]) == (f"{info.resumed_tokens:,}", f"{info.computed_tokens:,}")
    assert told["why not more was resumed"] == "resumed" and info.resumed_tokens > 0
    told = rows_of(stats)
    assert told["requests"] == f"{stats.requests}" and told["bytes of states"] == format_bytes(stats.checkpoint_bytes)
    assert told["resumed"].startswith(f"{stats.resumed_tokens:,} (")
    told = rows_of(explained)
    assert told["would be resumed"] == f"{explained.resumed_tokens:,}" and told["why not more"] == explained.reason
    table = Outline(report._repr_html_())
    assert table.rows[0][:2] == ["prompt", "resumed"] and table.rows[1][0] == "128"
    assert "bit for bit" in report._repr_html_() and "<b>Exact</b>" in report._repr_html_()
    lost = replace(report, rows=(replace(report.rows[0], states_bitwise=False),))
    assert "<b>NOT EXACT</b>" in lost._repr_html_()


def test_plans_and_simulations_are_tables() -> None:
    plan = plan_checkpoints([0.0, *[1.0] * 500], 40)
    rows = Outline(plan._repr_html_()).rows
    assert [int(row[1]) for row in rows[1:]] == list(plan.positions[:32]) and "And 8 more" in plan._repr_html_()
    result = simulate([[*range(200), end] for end in range(300, 306)], policy="last", state_bytes=2**20, grid=50)
    told = rows_of(result)
    assert told["resumed"] == f"{result.resumed_tokens:,}" and told["of the prompts"] == f"{result.resume_rate:.1%}"
    assert told["most bytes stored"] == format_bytes(result.peak_bytes)


def test_what_users_wrote_is_no_markup() -> None:
    explained = Explanation(9, 4, 0, Reason(Cause.NOT_SUPPORTED, why="<b>x"), remedy="<i>", context="<script>")
    assert {"b", "i", "script"} & Outline(explained._repr_html_()).tags == {"b"}  # of the title
    assert "&lt;script&gt;" in explained._repr_html_()


def test_a_namespace_is_named_to_those_who_set_one(jamba: PreTrainedModel) -> None:
    for namespace in ("", "ann"):
        with SparsePrefixCache(jamba, grid=GRID, namespace=namespace) as cache:
            said = f"{cache.explain(DOCUMENT)} {cache._repr_html_()}"
            assert ("namespace" in said) == bool(namespace)
