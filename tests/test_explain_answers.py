"""`explain` names the first token that a prompt has otherwise than what is stored, and says when it is an answer's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.explain import Difference


WORDS = {"a": 3, "b": 4, "ab": 5, "c": 6, "d": 7, "cd": 8, "<": 9, ">": 10}
TURNS = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
THINNED = "{% for m in messages %}<{{ m.content | replace('d', '') }}>{% endfor %}"  # leaves out what was thought
QUESTION = "acbc" * 20


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and two pairs that are one token wherever text is tokenised."""
    core = Tokenizer(models.BPE(WORDS, [("a", "b"), ("c", "d")]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TURNS)


def answered(cache: SparsePrefixCache, prompt: Tensor, answer: list[int]) -> Tensor:
    """The text behind a prompt that the model answers with these very tokens."""
    return cache.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=len(answer),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda _, ids: [answer[len(ids) - prompt.shape[1]]],
    )


def rendered(tokenizer: PreTrainedTokenizerFast, *contents: str) -> Tensor:
    messages = [{"role": "user", "content": content} for content in contents]
    return tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]


def test_an_answer_that_is_tokenised_otherwise(jamba: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with SparsePrefixCache(jamba, tokenizer) as cache:
        prompt = rendered(tokenizer, QUESTION)
        length = prompt.shape[1]
        assert cache.explain(prompt).difference is None  # nothing is stored
        text = answered(cache, prompt, [9, 6, 3, 4, 6, 10])  # < c a b c >
        again = rendered(tokenizer, QUESTION, "cabc", "b")
        said = cache.explain(again)
        assert said.difference == Difference(length + 2, 5, 3, "ab", "a", in_answer=True, same_text=True)
        assert said.overlap_tokens == length + 2 and said == cache.explain(again)
        where = (
            f"Token {length + 2} is 'ab' (5), and 'a' (3) in what is stored, in an answer: decoded, it was tokenised"
        )
        assert where in str(said) and "Keep the ids of answers" in str(said)
        kept = torch.cat([text, tokenizer("<b>", return_tensors="pt")["input_ids"]], dim=1)
        assert cache.explain(kept).difference is None and cache.explain(text).difference is None


def test_an_answer_that_a_template_rewrites(jamba: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with SparsePrefixCache(jamba, tokenizer) as cache:
        prompt = rendered(tokenizer, QUESTION)
        answered(cache, prompt, [9, 7, 3, 6, 10])
        tokenizer.chat_template = THINNED
        said = cache.explain(rendered(tokenizer, QUESTION, "dac", "b"))
        assert said.difference == Difference(prompt.shape[1] + 1, 3, 7, "a", "d", in_answer=True, same_text=False)
        assert "another text there, as where a template rewrites answers" in str(said)
        assert "tokenised differently" not in str(said)


@pytest.mark.parametrize("last", [0, 5])
def test_the_ends_of_an_answer_belong_to_it(jamba: PreTrainedModel, last: int) -> None:
    """Its first token leaves where the prompt ends, its last one was never read by the model; no tokenizer."""
    with SparsePrefixCache(jamba) as cache:
        prompt = torch.full((1, 90), 6)
        text = answered(cache, prompt, [3, 4, 3, 4, 3, 4])
        other = torch.cat([text[:, : 90 + last], torch.tensor([[7, 7, 7]])], dim=1)
        said = cache.explain(other)
        assert said.difference == Difference(90 + last, 7, int(text[0, 90 + last]), in_answer=True)
        assert f"Token {90 + last} is 7, and {text[0, 90 + last]} in what is stored" in str(said)
        assert "tokenised differently, or it was rewritten" in str(said)


def test_what_a_user_wrote_is_no_answer(jamba: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with SparsePrefixCache(jamba, tokenizer) as cache:
        text = answered(cache, rendered(tokenizer, QUESTION), [3, 6, 3])
        for seen in range(2):  # nor is the message behind an answer
            before, other = (rendered(tokenizer, QUESTION), 41) if not seen else (text, text.shape[1] + 4)
            grown = torch.cat([before, torch.full((1, 20), 6)], dim=1)
            answered(cache, grown, [4, 4])
            left = grown.clone()
            left[0, other] = 10
            found = cache.explain(left).difference
            assert (found.position, found.token, found.in_answer) == (other, 10, False)
            assert (
                str(found)
                == f"Token {other} is '>' (10), and {found.stored_text!r} ({found.stored_token}) in what is stored"
            )
        first = cache.explain("bb").difference
        assert (first.position, first.stored_text, first.in_answer) == (0, "<", False)


def test_the_latest_of_several_texts_is_named(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba) as cache:
        stem = torch.full((1, 80), 6)
        for token in (3, 4, 5):
            answered(cache, torch.cat([stem, torch.full((1, 10), token)], dim=1), [7, 7])
        found = cache.explain(torch.cat([stem, torch.full((1, 10), 9)], dim=1)).difference
        assert (found.position, found.token, found.stored_token) == (80, 9, 5)


def test_an_answer_is_one_after_saving_too(jamba: PreTrainedModel, tmp_path: Path) -> None:
    prompt = torch.full((1, 90), 6)
    other = torch.cat([prompt, torch.tensor([[3, 4, 7, 7]])], dim=1)
    with SparsePrefixCache(jamba, policy="last") as cache:
        answered(cache, prompt, [3, 4, 3, 4, 3, 4])
        cache.save_pretrained(tmp_path)
    with SparsePrefixCache.from_pretrained(tmp_path, jamba) as cache:
        assert cache.explain(other).difference == Difference(92, 7, 3, in_answer=True)
        early = torch.cat([prompt[:, :50], torch.tensor([[7, 7]])], dim=1)
        assert not cache.explain(early).difference.in_answer


def test_the_deepest_tier_that_knows_a_prompt_is_asked(jamba: PreTrainedModel, tmp_path: Path) -> None:
    text = torch.full((1, 90), 6)
    store = CheckpointStore(None, disk_memory="1GiB", disk_dir=tmp_path, max_remembered=2_000)
    with SparsePrefixCache(jamba, policy="last", store=store) as cache:
        answered(cache, text, [3])
        store.resize(1)
        answered(cache, torch.full((1, 90), 7), [3])
        assert store.match(text[0].int().numpy(), cache.server.space.now()[0]).overlap < 80
        left = text.clone()
        left[0, 80] = 4
        assert cache.explain(left).difference == Difference(80, 4, 6)
    store.close()
