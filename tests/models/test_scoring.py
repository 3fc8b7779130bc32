"""Log-likelihoods with reuse: those of stock, whatever is shared; states are there for as long as they serve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build, random_ids
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import prefill, scores, sitting, states
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.models.scoring import Scoring
from hf_sparse_cache.tools.builtin import build_tokenizer


Pair = tuple[list[int], list[int]]
FAMILIES = ["Mamba", "FalconMamba", "Jamba", "Zamba", "Mamba2", "Zamba2", "Bamba", "Qwen3.5", "LFM2", "Zaya", "Llama"]
MODES = ["replayable", "bitwise"]
TOLERANCE = 1e-4


def words(length: int, seed: int) -> list[int]:
    found: list[int] = random_ids(length, seed=seed)[0].tolist()
    return found


def few_shot() -> list[Pair]:
    """Questions behind shared shots, with continuations of several lengths, and every odd way of sharing."""
    shots, pairs = words(150, 1), []
    for question in range(3):
        context = shots + words(10 + 3 * question, 10 + question)
        pairs += [(context, words(length, 100 + 10 * question + length)) for length in (1, 2, 5, 7)]
    pairs += [([*shots, 7], words(3, 51)), ([*shots, 8], words(3, 53)), (shots, words(4, 54))]  # one token apart
    pairs += [(shots[:1], words(5, 55)), (shots[:1], words(1, 56)), (shots[:2], words(1, 57))]
    long = words(300, 58)
    pairs += [(shots[:2], long), (shots[:2], long[:280] + words(20, 59)), (shots[:3], long[:270])]
    choice = words(40, 60)
    pairs += [(choice, [5, 6]), (choice, [5, 7]), (choice, [5, 7, 9]), (choice, [5, 6])]  # one of them twice
    return pairs


def stock(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A plain forward over everything."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation[:-1]]), use_cache=False).logits[0, -len(continuation) :]
    found, target = logits.float().log_softmax(-1), torch.tensor(continuation)
    return float(found.gather(-1, target[:, None]).double().sum()), bool((found.argmax(-1) == target).all())


def furthest(one: list[tuple[float, bool]], other: list[tuple[float, bool]]) -> float:
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    return max(abs(a - b) for (a, _), (b, _) in zip(one, other, strict=True))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows, new tokens and tokens with logits of every forward."""
    seen: list[tuple[int, int, int]] = []
    own = prefill.segment

    def segment(binding: Any, live: Any, row: Row, end: int) -> Any:
        width = end - live.length
        output = own(binding, live, row, end)
        seen.append((len(row.batch), width, output.logits.shape[1]))
        return output

    monkeypatch.setattr(prefill, "segment", segment)
    return seen


# -- what it must equal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_stock_computes(family: str, mode: str) -> None:
    model, pairs = build(family), few_shot()
    expected = [stock(model, *pair) for pair in pairs]
    with SparsePrefixCache(model, exactness=mode, grid=64) as cache:
        assert furthest(cache.loglikelihood(pairs), expected) < TOLERANCE
        skipped = cache.stats().resumed_tokens
        assert skipped > 0.6 * cache.stats().prompt_tokens
        assert furthest(cache.loglikelihood(pairs), expected) < TOLERANCE  # from what the policy kept
        cache.store.verify()


@pytest.mark.parametrize("family", ["Jamba", "Mamba", "Zamba2", "Qwen3.5"])
def test_bitwise_each_pair_is_what_it_is_alone(family: str) -> None:
    pairs = few_shot()
    with SparsePrefixCache(build(family), exactness="bitwise", grid=64) as cache:
        together = cache.loglikelihood(pairs)
        again = cache.loglikelihood(pairs, batch_size=1)
        alone = []
        for pair in pairs:
            cache.clear()
            alone += cache.loglikelihood([pair])
        assert together == again == alone


@pytest.mark.parametrize("family", ["Jamba", "Zamba2"])
def test_in_float64_nothing_but_rounding_differs(family: str) -> None:
    model, pairs = build(family, torch.float64), few_shot()
    with SparsePrefixCache(model, grid=64) as cache:
        found = cache.loglikelihood(pairs)
    for (value, _), pair in zip(found, pairs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([pair[0] + pair[1][:-1]]), use_cache=False).logits[0, -len(pair[1]) :]
        stock = float(logits.log_softmax(-1).gather(-1, torch.tensor(pair[1])[:, None]).sum())
        assert value == pytest.approx(stock, rel=1e-7)  # Zamba2 normalises in float32, whatever the dtype


@pytest.mark.parametrize("what", ["wiped", "another prompt's", "one token off"])
@pytest.mark.parametrize("family", ["Jamba", "Zamba2"])
def test_a_wrong_state_is_noticed(family: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins of the tests above: what they compare moves by far more than they allow."""
    model, pairs = build(family), few_shot()[:12]
    expected = [stock(model, *pair) for pair in pairs]
    own = states.restore

    def restore(cache: Any, *stored: Any) -> None:
        own(cache, *stored)
        with SparsePrefixCache(model, policy="none", prove=False) as other:
            position = sum(span.tokens for span in ()) or 150
            text = pairs[0][0][:position] if what == "one token off" else words(position, 999)
            text = [*text[1:], 5] if what == "one token off" else text
            live = other.server.live_cache()
            prefill.segment(other.server.binding, live, Row(torch.tensor(text), {"use_cache": True}), len(text))
        wrong = states.capture_state(live)
        for layer, found in zip(cache.layers, wrong.layers, strict=True):
            for name, value in found.items():
                kind, _, index = name.partition(".")
                if kind == "recurrent":
                    layer.recurrent_states[int(index)].copy_(value if what != "wiped" else torch.zeros_like(value))

    monkeypatch.setattr(states, "restore", restore)
    with SparsePrefixCache(model, prove=False) as cache:
        found = cache.loglikelihood(pairs)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)) > 100 * TOLERANCE


# -- what is computed -------------------------------------------------------------------------------------------------


def test_shared_tokens_run_once_and_only_scored_ones_give_logits(forwards: list[tuple[int, int, int]]) -> None:
    shots = words(200, 1)
    pairs = [(shots + words(20, 10 + q), words(4, 100 + 4 * q + c)) for q in range(5) for c in range(4)]
    with SparsePrefixCache(build("Llama"), policy="none", prove=False) as cache:
        del forwards[:]
        cache.loglikelihood(pairs)
        assert cache.stats().computed_tokens == 200 + 5 * 20 + 20 * 3
    assert sum(rows * width for rows, width, _ in forwards) == 200 + 5 * 20 + 20 * 3
    assert all(logits == (1 if rows == 1 else width) for rows, width, logits in forwards)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["Jamba", "Zamba2"])
def test_no_segment_is_a_single_token(family: str, mode: str, forwards: list[tuple[int, int, int]]) -> None:
    shots = words(70, 1)  # its end and the places where pairs part lie next to each other, and next to the grid
    contexts = [shots[:n] + words(k, 9 + k) for n in (62, 63, 64, 65, 69, 70) for k in (0, 1, 2)]
    with SparsePrefixCache(build(family), exactness=mode, grid=64, prove=False) as cache:
        del forwards[:]
        for _ in range(2):
            cache.loglikelihood([(context, words(n, 30)) for context in contexts for n in (1, 2, 3)])
    assert min(width for _, width, _ in forwards) == 2


def test_continuations_of_one_token_need_no_forward_of_their_own(forwards: list[tuple[int, int, int]]) -> None:
    context = words(100, 1)
    with SparsePrefixCache(build("Zamba2"), prove=False) as cache:
        del forwards[:]
        found = cache.loglikelihood([(context, [token]) for token in range(3, 100)])
    assert forwards == [(1, 100, 1)]
    assert sum(np.exp(value) for value, _ in found) < 1
    assert sum(greedy for _, greedy in found) <= 1


def test_a_row_serves_every_continuation_that_begins_with_it(forwards: list[tuple[int, int, int]]) -> None:
    context = words(60, 1)
    pairs = [(context, [5, token]) for token in range(3, 60)] + [(context, [5, 6, 7]), (context, [5, 6, 8])]
    model = build("Jamba")
    with SparsePrefixCache(model, prove=False) as cache:
        del forwards[:]
        found = cache.loglikelihood(pairs)
    assert forwards == [(1, 60, 1), (1, 2, 2)]
    assert furthest(found, [stock(model, *pair) for pair in pairs]) < TOLERANCE


def test_rows_of_a_forward_keep_within_the_batch_size_and_are_named(forwards: list[tuple[int, int, int]]) -> None:
    context = words(60, 1)
    with SparsePrefixCache(build("Jamba"), prove=False) as cache:
        del forwards[:]
        cache.loglikelihood([(context, words(4, seed)) for seed in range(7)], batch_size=3)
        assert [rows for rows, _, _ in forwards] == [1, 3, 3, 1]
        named = [info.segments for info in cache.server.recorder.recent]
    assert sorted(map(str, named)) == ["(60, (60, 63, 3))"] * 6 + ["(60, 63)"]


def test_what_ran_alone_is_replayed_bit_for_bit() -> None:
    """The segments that a request names, run from nothing, end in the very logits that were scored."""
    context, continuation = words(150, 1), words(9, 2)
    seen: list[Tensor] = []
    with SparsePrefixCache(build("Zamba2")) as cache, pytest.MonkeyPatch.context() as patch:
        own = prefill.segment

        def segment(*args: Any) -> Any:
            seen.append((output := own(*args)).logits[0].clone())
            return output

        patch.setattr(prefill, "segment", segment)
        cache.loglikelihood(
            [([*context[:100], 3, *words(9, 3)], continuation), ([*context[:100], 4, 5], continuation)]
        )
        info = cache.last_request
        assert info is not None and info.resumed_tokens == 100
        assert info.segments == (100, 102, 110)
        live, text = cache.server.live_cache(), [*context[:100], 4, 5, *continuation]
        with torch.no_grad():
            for end, keep in zip((100, 102, 110), (1, 1, 8), strict=True):
                row = Row(torch.tensor(text), {"use_cache": True, "logits_to_keep": keep})
                again = own(cache.server.binding, live, row, end).logits[0]
    assert torch.equal(seen[-1], again)


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_a_forward_are_bounded(
    mode: str, forwards: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "MOST_LOGIT_BYTES", 4 * 128 * 64)
    model, text = build("Jamba"), words(700, 1)
    with SparsePrefixCache(model, exactness=mode, grid=256, prove=False) as cache:
        del forwards[:]
        found = cache.loglikelihood([(text[:9], text[9:]), (text[:9], text[9:200]), (text[:9], text[9:60])])
    assert max(rows * logits for rows, _, logits in forwards) <= 64
    assert furthest(found, [stock(model, text[:9], text[9:end]) for end in (700, 200, 60)]) < 5 * TOLERANCE


# -- what is kept -----------------------------------------------------------------------------------------------------


def shared_twice() -> list[Pair]:
    shots = words(128, 1)
    groups = [shots + words(64, 20 + group) for group in range(3)]
    return [(group + words(12, 30 + q), words(3, 40 + q)) for group in groups for q in range(4)]


@pytest.mark.parametrize("mode", MODES)
def test_states_lie_where_pairs_part_whatever_the_policy_and_leave_with_the_call(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SparsePrefixCache(build("Jamba"), exactness=mode, grid=64, policy="none") as cache:
        put, kept = cache.store.put, []

        def noting(unit: Any, *args: Any, **options: Any) -> Any:
            kept.append(unit.position)
            return put(unit, *args, **options)

        monkeypatch.setattr(cache.store, "put", noting)
        cache.loglikelihood(shared_twice())
        assert sorted(kept) == [128, 192, 192, 192]
        assert len(cache.store) == 0 and cache.store.used_bytes == 0
        assert cache.stats().computed_tokens == 128 + 3 * 64 + 12 * (12 + 2)
        cache.store.verify()


def test_what_the_policy_wants_stays() -> None:
    with SparsePrefixCache(build("Jamba"), policy="junction") as cache:
        cache.loglikelihood(shared_twice())
        positions = {checkpoint.position for checkpoint in cache.store.stored()}
        assert {192, 204} <= positions
        before = cache.stats().computed_tokens
        cache.loglikelihood(shared_twice())
        assert cache.stats().computed_tokens - before < 12 * 14
        cache.store.verify()


def test_what_was_there_before_stays_though_no_policy_wants_it() -> None:
    pairs = shared_twice()
    with SparsePrefixCache(build("Jamba"), policy="none") as cache:
        cache.mark(torch.tensor(pairs[0][0][:128]))
        cache.loglikelihood(pairs)
        assert [checkpoint.position for checkpoint in cache.store.stored()] == [128]
        assert cache.loglikelihood(pairs[:1]) and cache.last_request is not None
        assert cache.last_request.resumed_tokens == 128


@pytest.mark.parametrize("policy", ["none", "learned", "block"])
def test_the_budget_holds_throughout(policy: str) -> None:
    pairs, model = shared_twice() + few_shot(), build("Jamba")
    expected = [stock(model, *pair) for pair in pairs]
    with SparsePrefixCache(model, grid=64, policy=policy) as cache:
        unit = cache.size.state_bytes + 300 * cache.size.kv_bytes_per_token
    for units in (1, 2, 4):
        with SparsePrefixCache(model, grid=64, policy=policy, max_memory=units * unit) as cache:
            assert furthest(cache.loglikelihood(pairs), expected) < TOLERANCE
            assert cache.store.peak_bytes <= units * unit
            cache.store.verify()


def test_a_call_that_fails_in_the_middle_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with SparsePrefixCache(build("Jamba"), policy="none") as cache:
        own, calls = sitting.prefill.prefill_row, iter(range(99))

        def failing(*args: Any) -> Any:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return own(*args)

        monkeypatch.setattr(sitting.prefill, "prefill_row", failing)
        with pytest.raises(KeyboardInterrupt):
            cache.loglikelihood(shared_twice())
        assert cache.store.used_bytes == 0
        cache.store.verify()
        monkeypatch.undo()
        assert len(cache.loglikelihood(shared_twice())) == 12


@pytest.fixture
def questions() -> list[Pair]:
    """One context, and eight continuations that share no first token."""
    return [(words(40, 60), [100 + index, *words(3, index)]) for index in range(8)]


def test_continuations_that_run_out_of_memory_together_run_in_smaller_groups(
    questions: list[Pair], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it was too much it stays halved; the twin fails otherwise, and one alone is not halved."""
    model, own, sizes = build("Jamba"), Scoring._forward, list[int]()
    room, error = 3, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def forward(self: Scoring, chunk: Any, *args: Any) -> Any:
        sizes.append(len(chunk))
        if len(chunk) > room:
            raise error
        return own(self, chunk, *args)

    monkeypatch.setattr(Scoring, "_forward", forward)
    with SparsePrefixCache(model) as cache:
        found = cache.loglikelihood(questions)
        assert sizes == [8, 4, 2, 2, 2, 2] and "4 continuations ran out of memory together" in caplog.text
        assert furthest(found, [stock(model, *pair) for pair in questions]) < TOLERANCE
        room = 0
        with pytest.raises(RuntimeError, match="allocate memory"):
            cache.loglikelihood(questions)
        sizes.clear()
        room, error = 3, RuntimeError("something else")
        with pytest.raises(RuntimeError, match="something else"):
            cache.loglikelihood(questions)
        assert sizes == [8]
        cache.store.verify()


def test_a_model_that_changes_while_it_scores(questions: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was read with the weights before is read again; one that goes on changing is read uncached."""
    model, own, times = build("Jamba"), Scoring._forward, iter([True, False, False])

    def forward(self: Scoring, *args: Any) -> Any:
        logits = own(self, *args)
        if next(times):
            with torch.no_grad():
                model.model.layers[0].mamba.in_proj.weight.mul_(1.2)
        return logits

    monkeypatch.setattr(Scoring, "_forward", forward)
    before = [stock(model, *pair) for pair in questions]
    with SparsePrefixCache(model) as cache:
        found = cache.loglikelihood(questions)
        after = [stock(model, *pair) for pair in questions]
        assert furthest(found, after) < TOLERANCE
        assert max(abs(one - other) for (one, _), (other, _) in zip(before, after, strict=True)) > 10 * TOLERANCE
        assert furthest(cache.loglikelihood(questions), after) < TOLERANCE
        times = iter([True] * 9)
        found = cache.loglikelihood(questions)
        assert furthest(found, [stock(model, *pair) for pair in questions]) < TOLERANCE
        assert "changed while the continuations" in cache.last_request.reason
        cache.store.verify()


def test_other_weights_give_other_scores() -> None:
    model, pairs = build("Jamba"), few_shot()[:12]
    with SparsePrefixCache(model) as cache:
        cache.loglikelihood(pairs)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
            next(model.model.layers[0].parameters()).mul_(1.2)
        assert furthest(cache.loglikelihood(pairs), [stock(model, *pair) for pair in pairs]) < TOLERANCE


# -- whole texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_rolling_is_the_sum_over_windows(mode: str) -> None:
    model = build("Zamba2")
    head = words(90, 1)
    texts = [head + words(150, 2), head + words(40, 3), words(7, 4), words(1, 5)]
    with SparsePrefixCache(model, exactness=mode, grid=32) as cache:
        found = cache.loglikelihood_rolling(texts, max_length=100, prefix=1)
        shared = cache.stats().resumed_tokens
    for value, text in zip(found, texts, strict=True):
        expected = 0.0
        for start in range(0, len(text), 100):
            window = text[start : start + 100]
            before = [1] if not start else text[max(0, start + len(window) - 101) : start]
            expected += stock(model, before, window)[0]
        assert abs(value - expected) < TOLERANCE
    assert shared >= 89 if mode == "replayable" else True  # the head was scored once


# -- the seam ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(["the cat sat on the mat, and then the cat sat again \n Question: what? Answer: it"] * 4)


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> Any:
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("context", ["the cat sat on", "the cat sat on ", "Question: what?\n\n", "th", "the ca"])
def test_the_seam_is_where_the_harness_puts_it(tokenizer: Any, reader: Any, context: str) -> None:
    with SparsePrefixCache(reader, tokenizer) as cache:
        for continuation in (" the mat", "the mat", "e mat", "t sat", " ", "\n"):
            spaces = len(context) - len(context.rstrip())
            left, right = context, continuation
            if spaces:
                left, right = context[:-spaces], context[-spaces:] + continuation
            alone = tokenizer(left)["input_ids"]
            target = tokenizer(left + right)["input_ids"][len(alone) :]
            if target:
                found = cache.loglikelihood([(context, continuation)])
                assert furthest(found, [stock(reader, alone, target)]) < TOLERANCE
            else:
                with pytest.raises(ValueError, match=r"pairs\[0\] has an empty continuation"):
                    cache.loglikelihood([(context, continuation)])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("", "the mat"), "an empty context"),
        (("  ", "the mat"), "an empty context"),
        (("", ""), "an empty context"),
        (("the cat", ""), "an empty continuation"),
    ],
)
def test_a_text_without_one_of_its_parts_is_no_pair(tokenizer: Any, reader: Any, pair: Any, said: str) -> None:
    with SparsePrefixCache(reader, tokenizer) as cache, pytest.raises(ValueError, match=rf"pairs\[1\] has {said}"):
        cache.loglikelihood([("the cat", " sat"), pair])


GOOD: Pair = ([5, 6, 7], [8])


@pytest.mark.parametrize(
    ("pairs", "words_"),
    [
        ([GOOD, ([], [5])], ["pairs[1]", "empty context", "bos_token"]),
        ([GOOD, ([5], [])], ["pairs[1]", "empty continuation", "leave the pair out"]),
        ([GOOD, GOOD, [5]], ["pairs[2]", "no pair"]),
        ([GOOD, (5, 6, 7)], ["pairs[1]", "no pair"]),
        ([GOOD, 7], ["pairs[1]", "no pair"]),
        ([GOOD, "ab"], ["pairs[1]", "no pair"]),
        ([GOOD, None], ["pairs[1]", "no pair"]),
        ([GOOD, ("a", "b")], ["pairs[1]", "no tokenizer", "SparsePrefixCache(model, tokenizer)"]),
        ([GOOD, ("a", [5])], ["pairs[1]", "a string and list"]),
        ([GOOD, ([5], [10_000])], ["continuation of pairs[1]", "10000", "vocabulary"]),
        ([GOOD, ([-1], [5])], ["context of pairs[1]", "-1"]),
        ([GOOD, ([0.5], [5])], ["context of pairs[1]", "integer"]),
        ([GOOD, ([[1, 2], [3, 4]], [5])], ["context of pairs[1]", "integer"]),
        ([GOOD, ([5], {3: 4})], ["continuation of pairs[1]"]),
        ("ab", ["pairs is 'ab'", "list"]),
        (None, ["pairs is None"]),
        ({"a": "b"}, ["pairs is", "list"]),
    ],
)
def test_what_is_no_pair_is_refused_before_anything_runs(pairs: Any, words_: list[str]) -> None:
    with SparsePrefixCache(build("Llama")) as cache:
        first = cache.loglikelihood([GOOD])
        with pytest.raises(ValueError) as error:
            cache.loglikelihood(pairs)
        assert all(word in str(error.value) for word in words_), str(error.value)
        assert cache.stats().requests == 1
        assert cache.loglikelihood([GOOD]) == first


def test_what_does_not_fit_the_window(caplog: pytest.LogCaptureFixture) -> None:
    model, text = build("Llama"), words(60, 1)
    with SparsePrefixCache(model) as cache:
        with pytest.raises(ValueError, match=r"pairs\[1\] has a continuation of 41 tokens, more than the 40"):
            cache.loglikelihood([GOOD, (text[:5], text[5:46])], max_length=40)
        found = cache.loglikelihood([(text[:50], text[50:])], max_length=40)
        assert furthest(found, [stock(model, text[19:50], text[50:])]) < TOLERANCE
        for name, value in (("batch_size", 0), ("max_length", 0), ("batch_size", 1.5), ("max_length", "9")):
            with pytest.raises(ValueError, match=name):
                cache.loglikelihood([GOOD], **{name: value})
        for texts in ("ab", [[]], ["a"], [[5], None]):
            with pytest.raises(ValueError, match="texts"):
                cache.loglikelihood_rolling(texts, prefix=1)
        with pytest.raises(ValueError, match="prefix"):
            cache.loglikelihood_rolling([[5]])
        assert cache.loglikelihood([]) == [] and cache.loglikelihood_rolling([], prefix=1) == []
    with pytest.raises(ValueError, match="detached"):
        cache.loglikelihood([GOOD])


def test_a_model_in_training_mode_is_scored_uncached_and_says_so() -> None:
    model = build("Jamba").train()
    with SparsePrefixCache(model) as cache:
        found = cache.loglikelihood([(words(50, 1), words(5, 2))])
        assert furthest(found, [stock(model, words(50, 1), words(5, 2))]) < TOLERANCE
        assert cache.last_request is not None and "training mode" in cache.last_request.reason


def test_a_learned_prompt_is_not_left_out() -> None:
    """A wrapper of PEFT puts it before the tokens; the model inside, which is asked here, knows nothing of it."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    ids, pair = torch.tensor(words(30, 1)), (words(30, 1), words(4, 2))
    tuned = get_peft_model(build("Jamba"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with SparsePrefixCache(tuned) as cache:
        for call in (lambda: cache.loglikelihood([pair]), lambda: cache.prefill(ids)):
            with pytest.raises(ValueError, match=r"learned prompt of PEFT \(PROMPT_TUNING\)"):
                call()
    torch.manual_seed(0)
    adapted = get_peft_model(build("Llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with SparsePrefixCache(adapted) as cache:  # which lies in the layers themselves
        assert furthest(cache.loglikelihood([pair]), [stock(adapted, *pair)]) < TOLERANCE
