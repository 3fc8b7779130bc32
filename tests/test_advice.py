"""Advice, followed: what `explain` and `last_request` say of real prompts is what a mark, a string or a mode saves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import build_tokenizer


WORKLOADS = [parent / "shared" / "workloads" for parent in Path(__file__).parents]
OWN = "A state is a sum of all that was read, and it cannot be cut. " * 30  # where there is no workload
WORDS = ("Who came", "All that was said", "Did they go", "How long was it")  # which part at their first letter
QUESTIONS = [f"\n\nQuestion: {words}?\nAnswer:" for words in WORDS]


def document() -> str:
    """The beginning of a real story."""
    for folder in WORKLOADS:
        texts = folder / "docqa_squality" / "texts.jsonl"
        if texts.is_file():
            with texts.open(encoding="utf-8") as lines:
                return str(max((json.loads(next(lines))["text"] for _ in range(8)), key=len))[:1500]
    return OWN


class Told:
    """A tiny model in bitwise mode that has answered two questions, and what it says of the third."""

    def __init__(self, **options: Any) -> None:
        self.text = document()
        self.tokenizer = build_tokenizer([self.text, *QUESTIONS], vocab_size=300)
        self.model = build("Jamba")
        self.model.resize_token_embeddings(len(self.tokenizer))
        self.options = options

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def computed(self, cache: SparsePrefixCache, middle: str = "") -> tuple[int, int]:
        """Tokens computed by the fourth question, and how many of them were shared."""
        for question in QUESTIONS:
            ids = self.ids(self.text + middle + question)
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0, past_key_values=cache
            )
        assert cache.last_request is not None
        return cache.last_request.computed_tokens, cache.last_request.recomputed_tokens

    def cache(self, **options: Any) -> SparsePrefixCache:
        given = {"exactness": "bitwise", "grid": 128, "policy": "junction", **self.options, **options}
        return SparsePrefixCache(self.model, self.tokenizer, **given)


@pytest.mark.parametrize(("grid", "where"), [(128, "behind the last cut"), (2048, "before the first cut")])
def test_the_advice_followed_saves_what_it_says(grid: int, where: str) -> None:
    told, shared = Told(grid=grid), "\n\nQuestion:"
    with told.cache() as cache:
        before, recomputed = told.computed(cache)
        said = cache.explain(told.ids(told.text + "\n\nQuestion: Where?"))
        promised = int(re.search(r"([\d,]+) shared tokens lie", said.remedy)[1].replace(",", ""))
        assert where in said.remedy and promised == said.recomputed_tokens > 8
    assert abs(recomputed - promised) <= 8  # questions may begin with the same letters
    ways = {"cache.mark()": {}, "cut_after=": {"cut_after": (shared,)}}
    ways |= {"exactness='replayable'": {"exactness": "replayable", "grid": None, "policy": "learned"}}
    for way, options in ways.items():
        assert way in said.remedy
        with told.cache(**options) as cache:
            if way == "cache.mark()":
                cache.mark(told.ids(told.text + shared))
            computed, left = told.computed(cache)
            assert before - computed >= promised - 8 and left <= 8, (way, before, promised, computed, left)


@pytest.mark.parametrize("words", [0, 20])
def test_a_special_token_is_advised_where_it_helps(words: int) -> None:
    """It needs a quarter of the grid to the cut before it."""
    told = Told(grid=128)
    text, length = told.text, 0
    while (length := told.ids(text).shape[1]) % 128 != 8 + 3 * words:
        text = text[:-1]
    told.text, before = text, {}
    assert length > 128
    for middle in ("", told.tokenizer.eos_token):
        with told.cache() as cache:
            before[middle] = told.computed(cache, middle)[0]
            said = cache.explain(told.ids(text + middle + "\n\nQuestion: Where?")).remedy
        if not middle:
            assert ("a special token there" in said) == bool(words)
    saved = before[""] - before[told.tokenizer.eos_token]
    assert saved > 3 * words - 2 if words else saved <= 0, (before, length)
