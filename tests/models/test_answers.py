"""Answers are kept at no compute: the next turn reads what is new in it, and every kept state replays bit for bit."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_replayable import differing
from tiny_families import LAST_WORD
from tiny_models import available_families, build, random_ids
from torch import Tensor

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, check_exactness, simulate
from hf_sparse_cache.models import answers


ALONE = sorted(set(available_families()) - {"MiniMax", "xLSTM", "RWKV", "RecurrentGemma"})
OTHER_STEPS = {"Zamba2", "NemotronH"}  # one-token steps leave out a clamp
CORE = ["Mamba", "Mamba2", "Jamba", "Qwen3.5", "LFM2", "Gemma3", "Llama"]
SYSTEM = random_ids(150, seed=1)
ANSWER = 13
OPTIONS: dict[str, Any] = {"max_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
LOGITS: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}


def ask(cache: SparsePrefixCache, ids: Tensor, **options: Any) -> Tensor:
    """The whole text after one turn."""
    given = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, **OPTIONS, **options}
    return cache.model.generate(ids, **given)


def next_turn(text: Tensor, seed: int = 5, length: int = 20) -> Tensor:
    return torch.cat([text, random_ids(length, seed=seed)], dim=1)


def kept(cache: SparsePrefixCache) -> list[int]:
    """Positions of stored states that were decoded."""
    return sorted(item.position for item in cache.store.stored() if isinstance(item.lineage.ends[-1], tuple))


@pytest.mark.parametrize("family", ALONE)
def test_the_next_turn_reads_what_is_new(family: str) -> None:
    model = build(family)
    with SparsePrefixCache(model) as cache:
        text = ask(cache, SYSTEM)
        if family in OTHER_STEPS:
            assert not kept(cache) and answers.decoding(cache.server.binding).gap > 1e-4
            return
        assert kept(cache) == [150 + ANSWER - 1] and cache.last_request.captured[-1] == 162
        for turn in range(3):
            text = ask(cache, next_turn(text, turn))
            info = cache.last_request
            assert info.computed_tokens == 21, info  # the last token of the answer was never read
            assert info.reason == "resumed" and (150, 162) in info.segments
        assert len(kept(cache)) == 4 and not differing(cache)
        ids = next_turn(text, 9)
        report = check_exactness(model, [ids], cache=cache)
        assert report.passed and report.resumed_tokens == ids.shape[1] - 21, report
        cache.store.verify()


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_replay_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    with SparsePrefixCache(build(family, dtype=dtype)) as cache:
        ask(cache, next_turn(ask(cache, SYSTEM)))
        assert cache.last_request.computed_tokens == 21 and len(kept(cache)) == 2 and not differing(cache)


def answer_of(cache: SparsePrefixCache) -> Any:
    """A stored state that an answer left: some of its tokens were decoded."""
    return next(item for item in cache.store.stored() if any(step.decoded for step in item.lineage.steps()))


@pytest.mark.parametrize("family", CORE)
def test_wrong_states_are_noticed(family: str) -> None:
    """The twins: the state wiped, that of another text, and one token off."""

    def wiped(cache: SparsePrefixCache, checkpoint: Any) -> None:
        for payload in [checkpoint.state, *(segment.payload for segment in checkpoint.chain())]:
            for layer in payload.layers:
                for value in layer.values():
                    if torch.is_tensor(value):
                        value.zero_()

    def of_another_text(cache: SparsePrefixCache, checkpoint: Any) -> None:
        with SparsePrefixCache(cache.model) as other:
            ask(other, random_ids(150, seed=7))
            replace_tensors(checkpoint, other)

    def one_token_off(cache: SparsePrefixCache, checkpoint: Any) -> None:
        with SparsePrefixCache(cache.model) as other:
            ids = SYSTEM.clone()
            ids[0, 20] = LAST_WORD - ids[0, 20] % 7
            ask(other, ids)
            replace_tensors(checkpoint, other)

    def replace_tensors(checkpoint: Any, other: SparsePrefixCache) -> None:
        given = answer_of(other)
        pairs = [(checkpoint.state, given.state)]
        pairs += [(one.payload, two.payload) for one, two in zip(checkpoint.chain(), given.chain(), strict=False)]
        for mine, theirs in pairs:
            for layer, its in zip(mine.layers, theirs.layers, strict=False):
                for name, value in layer.items():
                    if torch.is_tensor(value) and value.shape == its[name].shape:
                        value.copy_(its[name])

    for spoil in (wiped, of_another_text, one_token_off):
        with SparsePrefixCache(build(family)) as cache:
            text = ask(cache, SYSTEM)
            spoil(cache, answer_of(cache))
            assert differing(cache)
            assert not check_exactness(cache.model, [next_turn(text)], cache=cache, max_new_tokens=3).passed, spoil


class Stops(transformers.StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Streamer:
    def __init__(self, fails_at: int = -1) -> None:
        self.tokens: list[int] = []
        self.fails_at = fails_at

    def put(self, value: Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()
        if len(self.tokens) == self.fails_at:
            raise ConnectionError("the reader has gone")

    def end(self) -> None:
        pass


def early_eos(model: Any) -> dict[str, Any]:
    """The fifth token that greedy decoding gives ends the text."""
    token = int(model.generate(SYSTEM, attention_mask=torch.ones_like(SYSTEM), **OPTIONS)[0, 154])
    return {"eos_token_id": token}


WAYS: dict[str, Any] = {
    "greedy": lambda model: {},
    "dictionary": lambda model: LOGITS,
    "sampling": lambda model: {"do_sample": True, "temperature": 1.5, "top_k": 40},
    "streamer": lambda model: {"streamer": Streamer()},
    "early end": early_eos,
    "criteria": lambda model: {"stopping_criteria": transformers.StoppingCriteriaList([Stops(157)])},
    "penalty": lambda model: {"repetition_penalty": 1.3},
    "no mask": lambda model: {"attention_mask": None},
    "one token more": lambda model: {"max_new_tokens": 2},
}


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_decoding(family: str, way: str) -> None:
    model = build(family)
    options = WAYS[way](model)
    with SparsePrefixCache(model) as cache:
        result = ask(cache, SYSTEM, **options)
        text = result if torch.is_tensor(result) else result.sequences
        assert kept(cache) == [text.shape[1] - 1] and not differing(cache)
        ask(cache, next_turn(text))
        assert cache.last_request.resumed_tokens == text.shape[1] - 1
    if way in ("early end", "criteria"):
        assert text.shape[1] < 163


def failing(*_: Any, **__: Any) -> Any:
    raise KeyError("a criterion that fails")


NOT_KEPT: dict[str, tuple[Any, dict[str, Any]]] = {
    "one token": (None, {"max_new_tokens": 1}),
    "beams": (None, {"num_beams": 2}),
    "several samples": (None, {"num_return_sequences": 2, "do_sample": True}),
    "failing criterion": (KeyError, {"stopping_criteria": [failing]}),
    "abandoned streamer": (ConnectionError, {"streamer": lambda: Streamer(155)}),
    "uncached": (None, {"output_hidden_states": True}),
    "no cache": (None, {"use_cache": False}),
}


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
@pytest.mark.parametrize("way", NOT_KEPT)
def test_where_nothing_is_kept(family: str, way: str) -> None:
    error, options = NOT_KEPT[way]
    options = {name: value() if name == "streamer" else value for name, value in options.items()}
    with SparsePrefixCache(build(family)) as cache:
        if error is None:
            ask(cache, SYSTEM, **options)
        else:
            with pytest.raises(error):
                ask(cache, SYSTEM, **options)
        assert not kept(cache)
        cache.store.verify()
        assert not any(item.pins for item in cache.store.stored())


class Clamped(torch.nn.Module):
    """A part of a layer that gives a little less when it is asked for one token, as with a clamp in one kernel."""

    def __init__(self, inner: torch.nn.Module, less: float) -> None:
        super().__init__()
        self.inner, self.less = inner, less

    def forward(self, hidden: Tensor) -> Any:
        return self.inner(hidden) * (1.0 - self.less * (hidden.shape[1] == 1))


@pytest.mark.parametrize(("dtype", "less"), [(torch.float32, 0.01), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("off", [False, True])
def test_steps_a_little_off_their_prefill_keep_nothing(dtype: torch.dtype, less: float, off: bool) -> None:
    model = build("Jamba").to(dtype)
    model.lm_head = Clamped(model.lm_head, less if off else 0.0)
    with SparsePrefixCache(model, prove=False) as cache:
        ask(cache, SYSTEM)
        measured = answers.decoding(cache.server.binding)
        assert bool(kept(cache)) == (not off) == (measured.gap <= measured.bound)
        assert measured.gap < 0.1  # far below anything that a test of whole logits would call wrong


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_batches_and_padded_rows_keep_nothing(family: str) -> None:
    with SparsePrefixCache(build(family)) as cache:
        ask(cache, torch.cat([SYSTEM, random_ids(150, seed=3)]))
        padded = torch.nn.functional.pad(SYSTEM, (4, 0))
        ask(cache, padded, attention_mask=(torch.arange(154) >= 4).long()[None])
        assert not kept(cache)


def test_bitwise_mode_and_the_policy_none_keep_nothing() -> None:
    model = build("Jamba")
    for options in ({"exactness": "bitwise"}, {"policy": "none"}, {"max_checkpoints": 0}):
        with SparsePrefixCache(model, **options) as cache:
            ask(cache, SYSTEM)
            assert not kept(cache)


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_a_deferred_stop_check_keeps_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Defers:
        is_supported = staticmethod(lambda device, cache, cache_is_returned, is_assistant: True)

    # The real one needs a device with events.
    monkeypatch.setattr(answers, "utils", SimpleNamespace(DeferredStopCheck=Defers))
    with SparsePrefixCache(build(family)) as cache:
        ask(cache, SYSTEM)
        assert not kept(cache)


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_a_cache_that_holds_other_tokens_than_were_returned(family: str) -> None:
    """Something ran one forward more, whatever it was."""
    model = build(family)

    class Extra(Stops):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if input_ids.shape[1] == 155:
                name = cache.server.binding.cache_name
                model(input_ids=input_ids[:, -1:], **{name: lives[-1]}, use_cache=True)
            return super().__call__(input_ids, scores)

    with SparsePrefixCache(model) as cache:
        lives: list[Any] = []
        cache.server.on_prefill = lives.append
        ask(cache, SYSTEM, stopping_criteria=[Extra(160)])
        assert lives and not kept(cache)


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_layer_that_lost_keys_while_it_answered(dropped: int, caplog: pytest.LogCaptureFixture) -> None:
    """As a compressor of keys and values does it behind the last forward; the twin drops none."""

    class Drops(Stops):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if input_ids.shape[1] == 160:
                layer = lives[-1].layers[-1]
                layer.keys, layer.values = (x[:, :, : x.shape[2] - dropped] for x in (layer.keys, layer.values))
            return super().__call__(input_ids, scores)

    with SparsePrefixCache(build("Llama")) as cache:
        lives: list[Any] = []
        cache.server.on_prefill = lives.append
        ask(cache, SYSTEM, stopping_criteria=[Drops(160)])
        assert kept(cache) == ([] if dropped else [159])
        assert ("holds keys of 158 tokens where 159 are due" in caplog.text) is bool(dropped)
        cache.store.verify()


@pytest.mark.parametrize("where", ["_measure", "states.capture_state"])
def test_memory_that_runs_out_behind_an_answer_costs_the_next_turn_and_no_answer(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("Jamba")
    answers._measured.pop(model, None)
    stock = model.generate(SYSTEM, attention_mask=torch.ones_like(SYSTEM), **OPTIONS)

    def allocate(*_: Any) -> None:
        torch.empty(1 << 55)

    with SparsePrefixCache(model, policy="last") as cache, monkeypatch.context() as patch:
        patch.setattr(answers.states if "." in where else answers, where.rpartition(".")[2], allocate)
        text = ask(cache, SYSTEM)
        assert torch.equal(text, stock) and not kept(cache)
        cache.store.verify()
        patch.undo()
        ask(cache, next_turn(text))
        assert len(kept(cache)) == 1 and not differing(cache)


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_nothing_is_pinned_while_it_decodes(family: str) -> None:
    seen: list[bool] = []

    class Looks(Stops):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            stored = cache.store.stored()
            seen.append(any(item.pins for item in stored) or bool(cache.store.ledger.chains.footings))
            if input_ids.shape[1] == 155:
                gone.extend(weakref.ref(item.state) for item in stored)
                del stored
                cache.store.give_back()
            return super().__call__(input_ids, scores)

    with SparsePrefixCache(build(family)) as cache:
        gone: list[Any] = []
        ask(cache, SYSTEM)
        text = ask(cache, SYSTEM, stopping_criteria=[Looks(163)])
        assert seen and not any(seen) and gone and all(ref() is None for ref in gone)
        assert kept(cache) == [162] and not differing(cache)  # with the keys and values of all of it
        ask(cache, next_turn(text))
        assert cache.last_request.resumed_tokens == 162
        cache.store.verify()


@pytest.mark.parametrize("how", ["clear", "weights", "detach"])
def test_what_happens_while_it_decodes_is_respected(how: str) -> None:
    model = build("Jamba")

    class Meanwhile(Stops):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if input_ids.shape[1] == 155:
                if how == "clear":
                    cache.clear()
                elif how == "weights":
                    with torch.no_grad():
                        next(model.parameters()).add_(0.0)
                else:
                    cache.detach()
            return super().__call__(input_ids, scores)

    with SparsePrefixCache(model) as cache:
        ask(cache, SYSTEM, stopping_criteria=[Meanwhile(163)])
        assert (how == "detach") == bool(kept(cache))
        if how == "clear":
            assert not cache.store.stored() and cache.stats().tree_bytes == 0


def test_the_same_prompt_with_other_answers() -> None:
    with SparsePrefixCache(build("Jamba")) as cache:
        torch.manual_seed(0)
        texts = [ask(cache, SYSTEM, do_sample=True) for _ in range(3)]
        assert len(kept(cache)) == 3
        for text in texts:
            ask(cache, next_turn(text))
            assert cache.last_request.resumed_tokens == 162
        before = len(cache.store.stored())
        ask(cache, SYSTEM)
        ask(cache, SYSTEM)  # the same answer again is the same state
        assert len(cache.store.stored()) == before + 1
        cache.store.verify()


def test_threads() -> None:
    model, wrong = build("Jamba"), []
    with SparsePrefixCache(model) as cache:

        def chat(seed: int) -> None:
            text = random_ids(100, seed=seed)
            for turn in range(4):
                with cache.record() as requests:
                    text = ask(cache, next_turn(text, 10 * seed + turn))
                if (turn and requests[0].computed_tokens != 21) or requests[0].captured[-1] != text.shape[1] - 1:
                    wrong.append(requests)

        threads = [threading.Thread(target=chat, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and not differing(cache)
        cache.store.verify()


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_on_disk_and_saved(family: str, tmp_path: Path) -> None:
    model = build(family)
    store = CheckpointStore("1GiB", disk_memory="1GiB", disk_dir=tmp_path / "disk")
    with SparsePrefixCache(model, store=store) as cache:
        text = ask(cache, SYSTEM)
        cache.save_pretrained(tmp_path / "saved")
        store.close()
    for place in ("disk", "saved"):
        if place == "disk":
            again = CheckpointStore("1GiB", disk_memory="1GiB", disk_dir=tmp_path / place)
            handle = SparsePrefixCache(model, store=again)
        else:
            handle = SparsePrefixCache.from_pretrained(tmp_path / place, model)
        with handle:
            ask(handle, next_turn(text))
            info = handle.last_request
            assert info.resumed_tokens == 162 and (150, 162) in info.segments, place
            assert not differing(handle)
            handle.store.close()


# -- the simulator ----------------------------------------------------------------------------------------------------


def chats(model: Any, cache: SparsePrefixCache, turns: int = 6) -> Iterator[dict[str, list[int]]]:
    """Conversations in turn, as they happened."""
    texts = [random_ids(90, seed=30 + index) for index in range(4)]
    for turn in range(turns):
        for index, text in enumerate(texts):
            prompt = next_turn(text, seed=100 * turn + index, length=9 + 3 * index)
            texts[index] = ask(cache, prompt, do_sample=index == 1)
            yield {"input_ids": prompt[0].tolist(), "output_ids": texts[index][0, prompt.shape[1] :].tolist()}


@pytest.mark.parametrize("policy", ["learned", "last", "junction", "dp"])
@pytest.mark.parametrize("family", ["Mamba2", "Jamba"])
def test_the_simulator_does_what_the_live_cache_does(family: str, policy: str) -> None:
    model = build(family)
    torch.manual_seed(0)
    with SparsePrefixCache(model, policy="none") as sizes:
        budget = 9 * sizes.size.state_bytes + 700 * sizes.size.kv_bytes_per_token
    for memory in (budget, None):
        rows, live = [], []
        with SparsePrefixCache(model, policy=policy, max_memory=memory) as cache:
            for row in chats(model, cache):
                rows.append(row)
                live.append(cache.last_request)
            known = cache.simulation()
            evictions = cache.stats().evictions
        found: list[Any] = []
        result = simulate(rows, policy=policy, store_outputs=True, on_request=found.append, **known)
        assert found == live and result.evictions == evictions
        assert sum(max(info.captured, default=0) > info.prompt_tokens for info in found) > 4
        other: list[Any] = []
        simulate(rows, policy=policy, on_request=other.append, **known)  # the twin
        assert other != live
    assert all(info.computed_tokens <= 19 for info in found[4:])  # without pressure, at most what is new and one


def test_answers_are_evicted_like_prompts() -> None:
    model = build("Jamba")
    with SparsePrefixCache(model, policy="none") as sizes:
        budget = 4 * sizes.size.state_bytes + 400 * sizes.size.kv_bytes_per_token
    with SparsePrefixCache(model, max_memory=budget) as cache:
        for _ in chats(model, cache):
            assert cache.store.used_bytes <= budget
            cache.store.verify()
        assert cache.stats().evictions > 4


def test_the_answer_counts_as_no_prompt() -> None:
    with SparsePrefixCache(build("Jamba")) as cache:
        text = ask(cache, SYSTEM)
        assert cache.stats().requests == cache.store.clock == 1
        tokens = np.asarray(text[0], dtype=np.int32)
        match = cache.store.match(tokens, cache.server.space.now()[0])
        assert match.overlap == 163 and [node.passes for node in match.path] == [1] * len(match.path)
