"""`explain` names the cause and the remedy without changing anything; `mark` keeps what was announced."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import build, random_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.explain import not_supported, remedy
from hf_sparse_cache.planning.policies import Block
from hf_sparse_cache.stats import Cause, Reason
from hf_sparse_cache.store.eviction import FIFO
from hf_sparse_cache.store.tree import Checkpoint


GRID = 32
DOCUMENT = random_ids(160, seed=1)


def prompt(seed: int, length: int = 40) -> torch.Tensor:
    return torch.cat([DOCUMENT, random_ids(length, seed=seed)], dim=1)


def serve(model: PreTrainedModel, cache: SparsePrefixCache, ids: torch.Tensor) -> None:
    model.generate(ids, past_key_values=cache, max_new_tokens=1)


def test_every_cause(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, policy="last", exactness="bitwise") as cache:
        first = cache.explain(prompt(2))
        assert first.reason == "nothing stored" and first.remedy and first.resumed_tokens == 0
        serve(jamba, cache, prompt(2))
        before = (cache.stats(), [c.hits for _, _, c in cache.store.checkpoints()])
        whole = cache.explain(prompt(2)[0])
        assert whole.reason == "resumed" and whole.resumed_tokens == 192 and whole.remedy == ""
        behind = cache.explain(prompt(3))
        assert (
            behind.reason == "overlap of 160 tokens ends before the first checkpoint at 192"
            and "mark" in behind.remedy
        )
        early = cache.explain(torch.cat([DOCUMENT[:, :20], random_ids(80, seed=9)], dim=1))
        assert early.reason == "diverges at token 20" and early.remedy.endswith(
            "A smaller grid cuts earlier: grid=16."
        )
        short = cache.explain(DOCUMENT[:, :10])
        assert short.reason.cause is Cause.TOO_SHORT and "grid=8." in short.remedy
        for _, _, checkpoint in cache.store.checkpoints():
            cache.store.evict(checkpoint)
        lost = cache.explain(prompt(2))
        assert lost.reason == "evicted" and "max_memory" in lost.remedy
        assert before[0].requests == cache.stats().requests == 1
        assert str(lost).startswith("Of 200 tokens, 200 are shared")
    with SparsePrefixCache(jamba, grid=GRID, policy="none", exactness="bitwise") as cache:
        serve(jamba, cache, prompt(2))
        unplanned = cache.explain(prompt(2))
        assert unplanned.reason.cause is Cause.NOT_PLACED
        assert "max_checkpoints" in unplanned.remedy


def test_explain_agrees_with_what_happens(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache:
        for seed in (2, 3, 4, 3):
            said = cache.explain(prompt(seed))
            serve(jamba, cache, prompt(seed))
            done = cache.last_request
            assert (said.reason, said.resumed_tokens, said.overlap_tokens) == (
                done.reason,
                done.resumed_tokens,
                done.overlap_tokens,
            )


def test_no_room_is_told_from_no_plan(jamba: PreTrainedModel) -> None:
    """A tenant whose share holds no checkpoint would otherwise miss for ever and be told that the policy wanted it."""
    store = CheckpointStore(namespace_memory={"a": 1})
    with SparsePrefixCache(
        jamba, grid=GRID, policy="balanced", store=store, namespace="a", exactness="bitwise"
    ) as cache:
        serve(jamba, cache, prompt(2))
        said = cache.explain(prompt(3))
        assert said.reason == "never captured: no room was made for a checkpoint on the first 160 tokens"
        assert "namespace_memory" in said.remedy
        serve(jamba, cache, prompt(3))
        assert cache.last_request.reason == said.reason


def test_changed_weights_are_named_until_a_request_was_told(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache:
        serve(jamba, cache, prompt(2))
        with torch.no_grad():
            next(jamba.parameters()).mul_(1.5)
        for _ in range(2):  # asking is not serving
            said = cache.explain(prompt(2))
            assert said.reason.cause is Cause.WEIGHTS_CHANGED and said.remedy
        serve(jamba, cache, prompt(2))
        assert cache.last_request.reason == said.reason
        assert cache.explain(prompt(2)).reason == "resumed"
        serve(jamba, cache, prompt(2))
        assert cache.last_request.reason == "resumed"


def test_a_call_that_is_not_supported(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache:
        serve(jamba, cache, prompt(2))
        jamba.train()
        said = cache.explain(prompt(2))
        assert said.reason == "call not supported: the model is in training mode" and said.resumed_tokens == 0
        assert said.remedy == "Call model.eval() first."
        serve(jamba, cache, prompt(2))
        assert cache.last_request.reason == said.reason
        jamba.eval()
        assert cache.explain(prompt(2)).reason == "resumed"


def test_every_cause_has_a_remedy_of_its_own() -> None:
    sentences = {
        Reason(Cause.NOTHING_STORED): "nothing stored",
        Reason(Cause.DIVERGES, token=3): "diverges at token 3",
        Reason(Cause.BEFORE_FIRST, tokens=3, position=9): "overlap of 3 tokens ends before the first checkpoint at 9",
        Reason(Cause.EVICTED): "evicted",
        Reason(Cause.TOO_SHORT): "never captured: the prompt is shorter than the first cut",
        Reason(Cause.BATCHED, tokens=9): "never captured: the first 9 tokens ran in one forward with other prompts",
        Reason(Cause.NOT_PLACED, tokens=9): "never captured: the policy placed no checkpoint on the first 9 tokens",
        Reason(
            Cause.CUT_OTHERWISE, tokens=9
        ): "cut otherwise: the checkpoints on the first 9 tokens were made with other settings",
        Reason(Cause.NO_ROOM, tokens=9): "never captured: no room was made for a checkpoint on the first 9 tokens",
        Reason(Cause.WEIGHTS_CHANGED): "weights changed: what was stored of them was dropped",
        Reason(Cause.TRAINING): "call not supported: the model is in training mode",
        not_supported(
            "inputs_embeds has no tokens to match"
        ): "call not supported: inputs_embeds has no tokens to match",
    }
    assert all(str(reason) == sentence for reason, sentence in sentences.items())
    assert {reason.cause for reason in sentences} == set(Cause) - {Cause.RESUMED}
    assert len({remedy(reason) for reason in sentences} - {""}) == len(sentences)
    assert remedy(Reason(Cause.RESUMED)) == ""


def test_another_namespace_cannot_be_noticed(jamba: PreTrainedModel) -> None:
    """Word for word the same, whether another tenant has stored the prompt or nobody has."""
    store = CheckpointStore()
    with (
        SparsePrefixCache(jamba, grid=GRID, store=store, namespace="a", exactness="bitwise") as one,
        SparsePrefixCache(jamba, grid=GRID, store=store, namespace="b", exactness="bitwise") as other,
    ):
        before = other.explain(prompt(2))
        serve(jamba, one, prompt(2))
        assert one.explain(prompt(2)).resumed_tokens > 0
        assert other.explain(prompt(2)) == before
        assert before.reason == "nothing stored" and "namespace 'b'" in before.remedy and "'a'" not in str(before)


def test_context_is_decoded(jamba: PreTrainedModel) -> None:
    text = "the quick brown fox jumps over the lazy dog again and again until it rests"
    words = Tokenizer(models.WordLevel({word: index + 3 for index, word in enumerate(sorted({*text.split(), "my"}))}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with SparsePrefixCache(jamba, tokenizer, grid=4, policy="balanced", exactness="bitwise") as cache:
        serve(jamba, cache, tokenizer(text, return_tensors="pt")["input_ids"])
        said = cache.explain("the quick brown fox jumps over my lazy dog again")
        assert (said.overlap_tokens, said.resumed_tokens) == (6, 4)
        assert "jumps over my lazy" in said.context and said.context in str(said)


@pytest.mark.parametrize("exactness", ["bitwise", "replayable"])
def test_a_mark_is_captured_and_never_evicted(jamba: PreTrainedModel, exactness: str) -> None:
    where = 171
    document = random_ids(171, seed=1)
    with SparsePrefixCache(jamba, grid=GRID, policy="none", exactness=exactness) as cache:
        cache.mark(document)
        cache.mark(document)  # twice is once
        serve(jamba, cache, torch.cat([document, random_ids(30, seed=2)], dim=1))
        assert cache.last_request.captured == (where,)
        serve(jamba, cache, torch.cat([document, random_ids(30, seed=3)], dim=1))
        assert cache.last_request.resumed_tokens == where
        cache.store.resize(1)  # nothing fits any more, but what was marked stays
        assert len(cache.store) == 1
        cache.clear()
        assert len(cache.store) == 0
        serve(jamba, cache, torch.cat([document, random_ids(30, seed=4)], dim=1))
        assert cache.last_request.captured == ()


def test_a_mark_keeps_what_is_stored_already(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", exactness="bitwise") as cache:
        serve(jamba, cache, prompt(2))
        cache.mark(prompt(2)[:, :160])
        cache.store.resize(1)
        assert [c.position for _, _, c in cache.store.checkpoints()] == [160]


def test_a_mark_that_no_prompt_can_be_cut_at_is_refused(jamba: PreTrainedModel) -> None:
    with (
        SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache,
        pytest.raises(ValueError, match="no segment has fewer than 2: mark a longer prefix"),
    ):
        cache.mark(DOCUMENT[:, :1])


def test_a_grid_that_suits_the_kernels_is_named_or_none() -> None:
    zamba2 = build("Zamba2")
    chunk = zamba2.config.chunk_size
    with SparsePrefixCache(zamba2, grid=4 * chunk, policy="last", exactness="bitwise") as cache:
        assert (
            cache.server.binding.smaller_grid(3 * chunk) == 2 * chunk
            and cache.server.binding.smaller_grid(chunk) == chunk
        )
        assert cache.server.binding.smaller_grid(chunk - 1) == 0
        serve(zamba2, cache, DOCUMENT)
        said = cache.explain(torch.cat([DOCUMENT[:, : chunk - 1], random_ids(5 * chunk, seed=5)], dim=1))
        assert said.reason.cause is Cause.DIVERGES and "grid" not in said.remedy


def budget(model: PreTrainedModel, position: int) -> int:
    """Bytes of one checkpoint."""
    with SparsePrefixCache(model, grid=GRID, exactness="bitwise") as cache:
        return cache.size.state_bytes + position * cache.size.kv_bytes_per_token


def test_what_cannot_fit_is_told_in_bytes(jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """`mark` on it would change nothing, so it warns, and nothing advises it."""
    first, last = budget(jamba, GRID), budget(jamba, 160)
    state = first - GRID * (last - first) // (160 - GRID)
    with SparsePrefixCache(jamba, grid=GRID, policy=Block(GRID), max_memory=last - 1, exactness="bitwise") as cache:
        for _ in range(2):
            serve(jamba, cache, DOCUMENT[:, :150])
            serve(jamba, cache, prompt(2))
        said = cache.explain(prompt(3))
        needed = last if not said.resumed_tokens else last + state
        assert f"give at least {needed:,} bytes" in said.remedy and "mark()" not in said.remedy
        cache.mark(DOCUMENT)
        assert "Nothing can be kept for this mark" in caplog.text and f"{needed:,} bytes" in caplog.text
        serve(jamba, cache, prompt(4))
        assert cache.last_request.captured == () or max(cache.last_request.captured) < 160
    with SparsePrefixCache(jamba, grid=GRID, policy=Block(GRID), max_memory=needed, exactness="bitwise") as cache:
        serve(jamba, cache, DOCUMENT[:, :150])
        caplog.clear()
        cache.mark(DOCUMENT)
        assert "Nothing can be kept" not in caplog.text
        serve(jamba, cache, prompt(2))
        assert cache.explain(prompt(3)).resumed_tokens == 160


def test_a_mark_takes_the_room_of_others(jamba: PreTrainedModel) -> None:
    """The eviction would refuse the newcomer: a mark is not asked what it is worth."""

    class Miser(FIFO):
        def victim(self, incoming: Checkpoint | None, need: int) -> Checkpoint | None:
            return None if incoming is not None else super().victim(None, need)

    store = CheckpointStore(budget(jamba, 192), eviction=Miser())
    with SparsePrefixCache(jamba, grid=GRID, policy="last", store=store, exactness="bitwise") as cache:
        other = random_ids(200, seed=7)
        serve(jamba, cache, other)
        serve(jamba, cache, prompt(2))
        said = cache.explain(prompt(2))
        assert said.reason.cause is Cause.NO_ROOM
        needed = int(re.search(r"at least ([\d,]+) bytes", said.remedy)[1].replace(",", ""))
        assert needed == 2 * budget(jamba, 192) and "in place of others" in said.remedy
        cache.mark(DOCUMENT)
        assert cache.explain(prompt(3)).remedy.startswith("It is marked")
        serve(jamba, cache, prompt(2))
        assert cache.last_request.captured == (160,) and cache.explain(prompt(3)).resumed_tokens == 160
        assert cache.explain(other).reason == "evicted"


def test_a_mark_holds_what_a_lower_tier_brings_up(jamba: PreTrainedModel, tmp_path: Path) -> None:
    store = CheckpointStore(budget(jamba, 192), disk_memory="1GiB", disk_dir=tmp_path)
    with SparsePrefixCache(
        jamba, grid=GRID, policy="balanced", max_checkpoints=1, store=store, exactness="bitwise"
    ) as cache:
        serve(jamba, cache, prompt(2))
        for seed in (5, 6):
            serve(jamba, cache, random_ids(200, seed=seed))
        depth = cache.explain(prompt(2)).resumed_tokens
        assert depth and depth not in [c.position for _, t, c in store.checkpoints() if t[0] == DOCUMENT[0, 0]]
        cache.mark(prompt(2)[:, :depth])
        serve(jamba, cache, prompt(2))
        assert cache.last_request.resumed_tokens == depth
        store.resize(1)
        assert [c.position for _, _, c in store.checkpoints()] == [depth]
    store.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_prompt_of_next_to_nothing_is_explained(jamba: PreTrainedModel, length: int) -> None:
    """Of one token fewer than none could be resumed, and no grid is small enough for that."""
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise") as cache:
        jamba.generate(random_ids(40, seed=1), past_key_values=cache, max_new_tokens=1)
        found = cache.explain(random_ids(40, seed=1)[:, :length])
        assert (found.prompt_tokens, found.resumed_tokens) == (length, 0) and "grid=0" not in found.remedy
