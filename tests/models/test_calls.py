"""Every call that was given a handle is counted, whatever way transformers takes, and says why it was not served."""

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from matrix import Bench, supported_families
from tiny_models import build, random_ids
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import attachment, calls, mamba1, versions
from hf_sparse_cache.models.families import CACHE_NAMES, cache_name_of
from hf_sparse_cache.tools.builtin import load


GRID, PROMPT = 32, 100
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def handle(model: PreTrainedModel, **options: Any) -> SparsePrefixCache:
    return SparsePrefixCache(model, **{"grid": GRID, "policy": "balanced", **options})


def step(model: Any, input_ids: torch.Tensor, kwargs: dict[str, Any], first: bool) -> tuple[torch.Tensor, Any]:
    further = {"is_first_iteration": True} if first else {"next_sequence_length": 1}
    output = model(**model.prepare_inputs_for_generation(input_ids, **further, **kwargs), return_dict=True)
    kwargs = model._update_model_kwargs_for_generation(output, kwargs)
    return torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], 1), kwargs


def own_loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """What a user gives as `custom_generate`: three steps without the prefill of transformers."""
    for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus"):
        kwargs.pop(name, None)
    for index in range(3):
        input_ids, kwargs = step(model, input_ids, kwargs, first=index == 0)
    return input_ids


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    yield
    assert calls._thread.innermost is None


@pytest.mark.parametrize("family", supported_families())
def test_every_name_serves_generate_and_is_refused_by_a_forward(family: str) -> None:
    bench = Bench(family)
    with bench.handle() as cache:
        bench.warm(cache)
        results = []
        for name in CACHE_NAMES:
            result = bench.model.generate(
                bench.prompt(1), **{name: cache}, **GREEDY, output_logits=True, return_dict_in_generate=True
            )
            results.append(torch.cat(result.logits))
            assert cache.last_request is not None and cache.last_request.resumed_tokens > 0, name
        assert all(torch.equal(result, results[0]) for result in results)
        served = cache.stats().requests
        for name in CACHE_NAMES:
            for forward in (bench.model, bench.model.base_model):
                with (
                    torch.no_grad(),
                    pytest.raises(ValueError, match=f"{name} is a SparsePrefixCache in a direct call"),
                ):
                    forward(bench.prompt(1), use_cache=True, **{name: cache})
                with torch.no_grad(), pytest.raises(ValueError, match=f"{name} is the class SparsePrefixCache"):
                    forward(bench.prompt(1), use_cache=True, **{name: SparsePrefixCache})
            with pytest.raises(ValueError, match=f"{name} is the class SparsePrefixCache"):
                bench.model.generate(bench.prompt(1), **{name: SparsePrefixCache}, **GREEDY)
        assert cache.stats().requests == served == 4
    with torch.no_grad():
        bench.model(bench.prompt(1))  # nothing of it stays


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_the_class_is_refused_by_models_that_have_no_handle(family: str) -> None:
    model = build(family)
    for call, options in ((model.generate, GREEDY), (model, {"use_cache": True})):
        with torch.no_grad(), pytest.raises(ValueError, match="is the class SparsePrefixCache"):
            call(random_ids(PROMPT), **{cache_name_of(model): SparsePrefixCache}, **options)
    assert SparsePrefixCache._is_user_defined.fset is not None  # which transformers would have written to


def test_an_empty_handle_is_true(jamba: PreTrainedModel) -> None:
    with handle(jamba) as cache:
        assert bool(cache) and len(cache) == 0 and (cache if cache else None) is cache


def test_two_caches_are_refused(jamba: PreTrainedModel) -> None:
    other = transformers.DynamicCache(config=jamba.config)
    with handle(jamba) as cache, handle(jamba) as second:
        for beside in (other, second):
            with pytest.raises(ValueError, match="cache and past_key_values are two caches"):
                jamba.generate(random_ids(PROMPT), past_key_values=cache, cache=beside, **GREEDY)
        jamba.generate(random_ids(PROMPT), past_key_values=cache, cache=cache, cache_params=None, **GREEDY)
        assert cache.stats().requests == 1


def test_generate_looks_as_it_did(jamba: PreTrainedModel) -> None:
    import inspect

    before = inspect.signature(jamba.generate)
    with handle(jamba):
        assert inspect.signature(jamba.generate) == before


class TestUnserved:
    """Ways through transformers on which the handle has no part in the prefill."""

    def counted(self, cache: SparsePrefixCache, why: str, tokens: tuple[int, ...] = (PROMPT,)) -> None:
        recent = cache.server.recorder.recent[-len(tokens) :]
        assert cache.stats().requests == len(tokens)
        assert tuple(info.prompt_tokens for info in recent) == tokens
        assert all(why in info.reason and info.reason.startswith("call not supported: ") for info in recent)
        assert all(info.computed_tokens == info.prompt_tokens and not info.resumed_tokens for info in recent)

    @pytest.mark.parametrize("family", ["Jamba", "Mamba"])
    def test_a_loop_of_ones_own(self, family: str, caplog: pytest.LogCaptureFixture) -> None:
        model = build(family)
        expected = model.generate(random_ids(PROMPT), custom_generate=own_loop, **GREEDY)
        with handle(model) as cache:
            found = model.generate(random_ids(PROMPT), custom_generate=own_loop, past_key_values=cache, **GREEDY)
            assert torch.equal(found, expected)
            self.counted(cache, "custom_generate runs the prompt in a loop of its own")
        said = [record for record in caplog.records if "custom_generate runs the prompt" in record.getMessage()]
        assert len(said) <= 1  # once a process

    def test_a_loop_of_ones_own_may_use_the_prefill(self, jamba: PreTrainedModel) -> None:
        def loop(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
            for name in ("logits_processor", "stopping_criteria", "synced_gpus"):
                kwargs.pop(name, None)
            output = model._prefill(input_ids, generation_config, kwargs)
            return torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], 1)

        with handle(jamba) as cache:
            one, two = (
                jamba.generate(random_ids(PROMPT), custom_generate=loop, past_key_values=cache, **GREEDY)
                for _ in range(2)
            )
            assert torch.equal(one, two) and cache.stats().requests == 2
            assert cache.last_request.resumed_tokens > 0

    def test_code_from_a_repository(self, jamba: PreTrainedModel, tmp_path: Path) -> None:
        """It enters `generate()` again, through the class or through the model, or never does."""
        (tmp_path / "custom_generate").mkdir()
        code = tmp_path / "custom_generate" / "generate.py"
        ways = {
            "GenerationMixin.generate(model, inputs, **kwargs)": "nothing stored",
            "model.generate(inputs, **kwargs)": "nothing stored",
            "torch.zeros(1, 1)": "custom_generate runs the prompt",
        }
        names = "logits_processor=0, stopping_criteria=0, custom_generate=0, trust_remote_code=0"
        for number, (way, reason) in enumerate(ways.items()):
            code.write_text(
                "import torch\nfrom transformers import GenerationMixin\n"
                f"def generate(model, inputs=None, **kwargs):\n    for name in dict({names}):\n"
                f"        kwargs.pop(name, None)\n    return {way}  # {number}\n",
                encoding="utf-8",
            )
            with handle(jamba) as cache, warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of the class's generate, where it is called by itself
                jamba.generate(
                    random_ids(PROMPT), custom_generate=str(tmp_path), trust_remote_code=True, cache=cache, **GREEDY
                )
                assert cache.stats().requests == 1
                assert cache.last_request.prompt_tokens == PROMPT and reason in cache.last_request.reason

    def test_the_classs_generate(self, jamba: PreTrainedModel) -> None:
        """Without the model's own generate around it there is a prefill all the same."""
        with handle(jamba) as cache:
            for _ in range(2):
                GenerationMixin.generate(jamba, random_ids(PROMPT), **{cache_name_of(jamba): cache}, **GREEDY)
            assert cache.stats().requests == 2 and cache.last_request.resumed_tokens > 0
            GenerationMixin.generate(
                jamba, random_ids(PROMPT), **{cache_name_of(jamba): cache}, output_hidden_states=True, **GREEDY
            )
            assert cache.stats().requests == 3 and cache.last_request.prompt_tokens == PROMPT

    @pytest.mark.parametrize("family", ["Jamba", "Mamba2"])
    def test_a_prefill_that_has_another_name(self, family: str) -> None:
        model = build(family)
        expected = model.generate(random_ids(PROMPT), **GREEDY)
        with handle(model) as cache:
            del model.__dict__["_prefill"]  # as if transformers called another method
            found = model.generate(random_ids(PROMPT), past_key_values=cache, **GREEDY)
            assert torch.equal(found, expected)
            self.counted(cache, f"transformers {transformers.__version__} ran the prompt without announcing it")

    def test_assisted_decoding(self) -> None:
        model = build("Llama")
        with handle(model) as cache:
            model.generate(random_ids(PROMPT), past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
            self.counted(cache, "assisted decoding")

    def test_each_row_of_a_batch(self, jamba: PreTrainedModel) -> None:
        ids, mask = random_ids(PROMPT, batch=3), torch.ones(3, PROMPT, dtype=torch.long)
        mask[1, :40] = 0
        with handle(jamba) as cache:
            jamba.generate(ids, attention_mask=mask, past_key_values=cache, use_cache=False, num_beams=2, **GREEDY)
            self.counted(cache, "use_cache=False", (PROMPT, PROMPT - 40, PROMPT))

    def test_embeddings_have_no_tokens(self, jamba: PreTrainedModel) -> None:
        embedded = jamba.get_input_embeddings()(random_ids(PROMPT)).detach()
        with handle(jamba) as cache:
            jamba.generate(inputs_embeds=embedded, past_key_values=cache, **GREEDY)
            self.counted(cache, "inputs_embeds", (0,))

    def test_generators_are_counted_when_they_are_over(self, jamba: PreTrainedModel) -> None:
        def streaming(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Iterator[torch.Tensor]:
            for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus"):
                kwargs.pop(name, None)
            for index in range(3):
                input_ids, kwargs = step(model, input_ids, kwargs, first=index == 0)
                yield input_ids[:, -1:]

        with handle(jamba) as cache, torch.no_grad():
            tokens = jamba.generate(random_ids(PROMPT), custom_generate=streaming, past_key_values=cache, **GREEDY)
            assert cache.stats().requests == 0 and calls._thread.innermost is None
            jamba.generate(random_ids(50), past_key_values=cache, **GREEDY)  # in the meantime
            assert cache.last_request.prompt_tokens == 50
            assert len(list(tokens)) == 3
            del tokens
            gc.collect()
            assert cache.stats().requests == 2 and "custom_generate" in cache.last_request.reason

    def test_a_generator_that_uses_the_prefill_is_served_once(self, jamba: PreTrainedModel) -> None:
        def streaming(model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Iterator[torch.Tensor]:
            for name in ("logits_processor", "stopping_criteria", "synced_gpus"):
                kwargs.pop(name, None)
            yield model._prefill(input_ids, generation_config, kwargs).logits

        with handle(jamba) as cache, torch.no_grad():
            for _ in range(2):
                list(jamba.generate(random_ids(PROMPT), custom_generate=streaming, past_key_values=cache, **GREEDY))
            gc.collect()
            assert cache.stats().requests == 2 and cache.last_request.resumed_tokens > 0


class TestNested:
    def inside(self, work: Callable[[], object]) -> LogitsProcessorList:
        """Does some work once, in the middle of a call."""
        done: list[object] = []

        def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not done:
                done.append(work())
            return scores

        return LogitsProcessorList([processor])

    def test_calls_inside_of_calls(self, jamba: PreTrainedModel) -> None:
        other = build("Mamba", seed=5)
        outer, inner = random_ids(PROMPT), random_ids(70, seed=1)
        expected = jamba.generate(outer, **GREEDY), jamba.generate(inner, **GREEDY), other.generate(inner, **GREEDY)
        with handle(jamba) as cache, handle(other) as second:
            for work, want, requests in (
                (lambda: jamba.generate(inner, **GREEDY), expected[1], (1, 0)),
                (lambda: jamba.generate(inner, cache=cache, **GREEDY), expected[1], (2, 0)),
                (lambda: other.generate(inner, cache_params=second, **GREEDY), expected[2], (1, 1)),
                (lambda: other.generate(inner, cache=second, custom_generate=own_loop, **GREEDY), expected[2], (1, 1)),
            ):
                before = cache.stats().requests, second.stats().requests
                results: list[torch.Tensor] = []
                processors = self.inside(lambda work=work, results=results: results.append(work()))
                found = jamba.generate(outer, past_key_values=cache, logits_processor=processors, **GREEDY)
                after = cache.stats().requests, second.stats().requests
                assert torch.equal(found, expected[0]) and torch.equal(results[0], want)
                assert (after[0] - before[0], after[1] - before[1]) == requests

    def test_a_loop_around_served_calls_is_counted_with_them(self, jamba: PreTrainedModel) -> None:
        with handle(jamba) as cache:

            def best_of_two(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return [model.generate(input_ids, past_key_values=cache, **GREEDY) for _ in range(2)][1]

            jamba.generate(random_ids(PROMPT), custom_generate=best_of_two, past_key_values=cache, **GREEDY)
            assert cache.stats().requests == 2 and cache.last_request.resumed_tokens > 0

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_failures_leave_nothing_open(self, jamba: PreTrainedModel, error: type[BaseException]) -> None:
        def fail() -> None:
            raise error

        expected = jamba.generate(random_ids(PROMPT), **GREEDY)
        with handle(jamba) as cache:
            for _ in range(2):
                with pytest.raises(error):
                    jamba.generate(random_ids(50), cache=cache, logits_processor=self.inside(fail), **GREEDY)
                assert calls._thread.innermost is None
            with contextlib.suppress(error):
                jamba.generate(random_ids(50), cache=cache, custom_generate=lambda *_, **__: fail(), **GREEDY)
            assert torch.equal(jamba.generate(random_ids(PROMPT), cache=cache, **GREEDY), expected)
            assert cache.last_request.prompt_tokens == PROMPT

    def test_threads_have_calls_of_their_own(self, jamba: PreTrainedModel) -> None:
        with handle(jamba) as cache:

            def work(index: int) -> None:
                own = {"custom_generate": own_loop} if index % 2 else {}
                for _ in range(5):
                    jamba.generate(random_ids(50 + index), past_key_values=cache, **own, **GREEDY)
                    seen.append(calls._thread.innermost)

            seen: list[calls.Call | None] = []
            threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert cache.stats().requests == 20 and seen == [None] * 20
            recent = cache.server.recorder.recent
            assert all(("custom_generate" in info.reason) == (info.prompt_tokens in (51, 53)) for info in recent)


class TestAttaching:
    """A failure while a handle is made leaves nothing behind on the model."""

    def steps(self) -> Iterator[tuple[Any, str]]:
        yield mamba1.Scan, "hold"
        yield attachment.Override, "__init__"
        yield torch.nn.Module, "register_forward_pre_hook"
        yield attachment._Patch, "__init__"

    def marks(self, model: PreTrainedModel) -> Any:
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        return set(model.__dict__), hooks, dict(attachment._patches), dict(mamba1._bound)

    @pytest.mark.parametrize("family", ["Mamba", "Jamba", "Zamba2"])
    @pytest.mark.parametrize("nth", range(4))
    def test_each_step(self, family: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build(family)
        gc.collect()
        before = self.marks(model)
        for owner, name in self.steps():
            original, count = getattr(owner, name), 0

            def failing(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count > nth:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                with contextlib.suppress(KeyboardInterrupt):
                    handle(model).detach()
            assert self.marks(model) == before, name
        with handle(model) as cache:
            model.generate(random_ids(PROMPT), past_key_values=cache, **GREEDY)
            assert cache.stats().requests == 1
        assert self.marks(model) == before

    def test_a_second_handle_that_fails_leaves_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build("Mamba")
        with handle(model) as cache:
            before = self.marks(model)
            with monkeypatch.context() as patch, pytest.raises(ValueError, match="max_memory"):
                patch.setattr(mamba1.Scan, "hold", None)
                handle(model, max_memory=10)
            with monkeypatch.context() as patch, pytest.raises(TypeError):
                patch.setattr(mamba1.Scan, "hold", None)
                handle(model)
            assert self.marks(model) == before
            model.generate(random_ids(PROMPT), past_key_values=cache, **GREEDY)
            assert cache.stats().requests == 1


HARMLESS: dict[str, Any] = {
    "tokenizer": object(),
    "assistant_tokenizer": object(),
    "synced_gpus": False,
    "token_type_ids": torch.zeros(1, PROMPT, dtype=torch.long),
    "output_attentions": False,
    "output_hidden_states": None,
    "output_router_logits": False,
    "logits_to_keep": 1,
    "disable_compile": True,
    "max_time": 100.0,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 2,
    "trust_remote_code": False,
    "return_dict_in_generate": True,
    "pixel_values": None,
    "attention_mask": torch.ones(1, PROMPT, dtype=torch.long),
    "position_ids": torch.arange(PROMPT)[None],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_keywords_that_do_not_change_the_prefill(name: str) -> None:
    bench = Bench("Jamba")
    with handle(bench.model) as cache:
        for _ in range(2):
            with contextlib.suppress(ValueError):  # of transformers, for what this model does not take
                bench.model.generate(random_ids(PROMPT), past_key_values=cache, **{name: HARMLESS[name]}, **GREEDY)
        assert cache.last_request is None or cache.last_request.resumed_tokens > 0, cache.last_request.reason
        if name not in ("token_type_ids", "pixel_values"):
            assert cache.stats().requests == 2


def test_stop_strings() -> None:
    """They need the tokenizer, which has no part in the prefill."""
    text = "A state is a summary of everything read so far. " * 20
    model, tokenizer = load("jamba-3m", [text])
    with handle(model, tokenizer=tokenizer) as cache:
        for question in ("One?", "Two?"):
            inputs = tokenizer(text + question, return_tensors="pt")
            model.generate(**inputs, past_key_values=cache, tokenizer=tokenizer, stop_strings=["zq"], **GREEDY)
        assert cache.last_request.resumed_tokens > 0, cache.last_request.reason


def test_adapters_by_row() -> None:
    peft = pytest.importorskip("peft")
    model = build("Llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    wrapped.eval()
    ids = random_ids(PROMPT).repeat(2, 1)
    run = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.cat(wrapped.generate(input_ids=ids, adapter_names=["one", "two"], **run).logits)
    with handle(wrapped) as cache:
        wrapped.generate(input_ids=ids[:1], past_key_values=cache, **run)
        wrapped.generate(input_ids=ids[:1], past_key_values=cache, **run)
        assert cache.last_request.resumed_tokens > 0
        found = wrapped.generate(input_ids=ids, adapter_names=["one", "two"], past_key_values=cache, **run)
        assert torch.equal(torch.cat(found.logits), expected)
        assert "adapter_names" in cache.last_request.reason and cache.stats().requests == 4
        wrapped.generate(input_ids=ids[:1], past_key_values=cache, **run)
        assert cache.last_request.resumed_tokens > 0


def test_a_word_about_the_version(jamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(versions.logger, "warning_once", said.append)
    with handle(jamba):
        assert said == []
    for version, other in (
        ("5.14.1", True),
        ("5.15.0", False),
        ("5.24.3", False),
        ("5.25.0.dev0", True),
        ("6.0", True),
    ):
        said.clear()
        monkeypatch.setattr(versions.transformers, "__version__", version)
        with handle(jamba):
            assert [f"transformers {version} is outside" in text for text in said] == [True] * other


# -- a call by itself -------------------------------------------------------------------------------------------------


def test_the_prompts_of_a_call_are_the_first_ids_it_has() -> None:
    one, two, three = (torch.full((2, 3), value) for value in (1, 2, 3))
    flat = torch.zeros(3)
    assert calls.prompts_of((one, two), {"inputs": three, "attention_mask": "mask"}) == (one, "mask")
    assert calls.prompts_of((), {"inputs": two, "input_ids": three})[0] is two
    assert calls.prompts_of((None,), {"input_ids": three})[0] is three
    assert calls.prompts_of((flat,), {"inputs": flat, "input_ids": three})[0] is three
    assert calls.prompts_of((flat, one), {"other": one}) == (None, None)


def test_the_lengths_of_rows_leave_out_what_a_mask_of_their_shape_does() -> None:
    ids = torch.ones(2, 4)
    assert calls.row_lengths(ids) == (4, 4) == calls.row_lengths(ids, [[0, 1]])
    assert calls.row_lengths(ids, torch.tensor([[0, 0, 1, 1], [0, 5, -1, 1]])) == (2, 3)
    assert calls.row_lengths(ids, torch.zeros(2, 5)) == (4, 4)


def test_what_a_call_knows_of_its_prompts() -> None:
    handle: Any = object()
    bare = calls.Call(handle)
    assert (bare.given, bare.prompt_tokens) == (0, ()) and bare.ids is bare.mask is bare.outer is bare.turn is None
    assert not bare.own_loop and not bare.counted and not bare.decodes
    call = calls.Call(handle, torch.ones(2, 4), torch.tensor([[0, 0, 1, 1], [1] * 4]))
    assert (call.given, call.prompt_tokens) == (2, (2, 4))


def test_a_call_is_counted_with_those_around_it_that_have_its_handle() -> None:
    one: Any = object()
    other: Any = object()
    outermost, between, inner = calls.Call(one), calls.Call(other), calls.Call(one)
    assert calls.innermost(one) is None
    with calls.opened(outermost) as opened:
        assert opened is outermost and calls.innermost(one) is outermost
        with calls.opened(between), calls.opened(inner):
            assert calls.innermost(one) is inner and calls.innermost(other) is None
            inner.count()
        assert calls.innermost(one) is outermost
    assert (outermost.counted, between.counted, inner.counted) == (True, False, True)
    between.count()
    assert between.counted and outermost.counted


def test_a_call_that_fails_is_no_longer_the_innermost() -> None:
    handle: Any = object()
    with pytest.raises(KeyError), calls.opened(calls.Call(handle)):
        raise KeyError
    assert calls.innermost(handle) is None
