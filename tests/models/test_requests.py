"""What can happen around a request: copies, threads, several handles and models, interruptions."""

import contextlib
import copy
import gc
import pickle
import threading
from typing import Any

import pytest
import torch
from matrix import Bench, supported_families
from tiny_models import build
from torch.nn.modules.module import register_module_forward_hook

from hf_sparse_cache import CheckpointStore, prefill


SCANNING = [family for family in ("Mamba", "Zamba") if family in supported_families()]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_a_handle_says_what_to_do(duplicate: Any) -> None:
    bench = Bench("Jamba")
    with bench.handle() as cache, pytest.raises(TypeError, match="pass the same handle"):
        duplicate(cache)


def test_copy_of_an_attached_model_is_a_model_of_its_own() -> None:
    bench = Bench("Jamba", model=build("Jamba"))
    expected = bench.generate(bench.prompt(1), None)
    with bench.handle() as cache:
        twin = Bench("Jamba", model=copy.deepcopy(bench.model))
        assert twin.generate(twin.prompt(1), None).equals(expected)
        with pytest.raises(ValueError, match="made for another model"):
            twin.generate(twin.prompt(1), cache)
        with twin.handle() as own:
            twin.warm(own)
            assert twin.generate(twin.prompt(1), own).distance(expected) <= 1e-4
            assert own.last_request.resumed_tokens > 0
            assert cache.stats().requests == 0
        assert twin.generate(twin.prompt(1), None).equals(expected)
    assert bench.generate(bench.prompt(1), None).equals(expected)


def test_pickling_an_attached_model_says_what_to_do() -> None:
    bench = Bench("Jamba", model=build("Jamba"))
    with bench.handle(), pytest.raises(TypeError, match="detach"):
        pickle.dumps(bench.model)
    pickle.dumps(bench.model)


def test_saving_an_attached_model_is_untouched(tmp_path: Any) -> None:
    bench = Bench("Jamba", model=build("Jamba"))
    with bench.handle():
        bench.model.save_pretrained(tmp_path)
        loaded = type(bench.model).from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in bench.model.state_dict().items())


def test_two_handles_on_one_model() -> None:
    bench = Bench("Jamba")
    with bench.handle() as first, bench.handle(grid=2 * bench.step) as second:
        bench.warm(first)
        bench.warm(second)
        one, two = (bench.generate(bench.prompt(1), cache) for cache in (first, second))
        assert (first.last_request.resumed_tokens, second.last_request.resumed_tokens) == (
            2 * bench.step,
            2 * bench.step,
        )
        assert one.distance(two) <= 1e-4
        first.detach()
        assert bench.generate(bench.prompt(1), second).equals(two)


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_two_models_with_one_store(family: str) -> None:
    one, two = (Bench(family, model=build(family, seed=seed)) for seed in (0, 1))
    expected = [bench.generate(bench.prompt(1), None) for bench in (one, two)]
    store = CheckpointStore("64MiB")
    with one.handle(store=store) as first, two.handle(store=store) as second:
        one.warm(first)
        assert two.generate(two.prompt(1), second).distance(expected[1]) <= 1e-4
        assert second.last_request.overlap_tokens == 0
        assert one.generate(one.prompt(1), first).distance(expected[0]) <= 1e-4
        assert first.last_request.resumed_tokens > 0


@pytest.mark.parametrize("family", SCANNING)
def test_threads_on_two_models_of_one_family(family: str) -> None:
    """The resumed scan is a hook on the modeling file, which both models share."""
    benches = [Bench(family, model=build(family, seed=seed)) for seed in (0, 1)]
    expected = [bench.generate(bench.prompt(1), None) for bench in benches]
    handles = [bench.handle() for bench in benches]
    for bench, cache in zip(benches, handles, strict=True):
        bench.warm(cache)
    found: dict[int, list[float]] = {0: [], 1: []}

    def work(index: int) -> None:
        for turn in range(4):
            cache = handles[index] if turn % 2 else None
            found[index].append(benches[index].generate(benches[index].prompt(1), cache).distance(expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache in handles:
        cache.detach()
    assert all(len(distances) == 4 and max(distances) <= 1e-4 for distances in found.values())


@pytest.mark.parametrize("family", ["Mamba", "Zamba", "Zamba2", "Qwen3.5"])
def test_interrupted_prefill_leaves_the_next_request_right(family: str) -> None:
    """Interrupted in every module in turn, between the announced state and the scan among them."""
    bench = Bench(family, model=build(family))
    stock = bench.generate(bench.prompt(1), None)
    with bench.handle() as cache:
        bench.warm(cache)
        expected = bench.generate(bench.prompt(1), cache)
        places = [module for module in bench.model.modules() if not list(module.children())]
        for place in places[:: max(1, len(places) // 8)]:

            def interrupt(module: torch.nn.Module, *_: Any, place: torch.nn.Module = place) -> None:
                if module is place:
                    raise KeyboardInterrupt

            hook = register_module_forward_hook(interrupt)  # on the model itself it would be a change of the model
            with contextlib.suppress(KeyboardInterrupt):  # not raised where the module has no part in a prefill
                bench.generate(bench.prompt(2), cache)
            hook.remove()
            assert bench.generate(bench.prompt(1), None).equals(stock)
            assert bench.generate(bench.prompt(1), cache).equals(expected)
            assert cache.last_request.resumed_tokens > 0
        assert not any(checkpoint.pins for _, _, checkpoint in cache.store.checkpoints())


def test_interrupted_capture_leaves_the_store_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("Jamba", model=build("Jamba"))
    expected = bench.generate(bench.prompt(1), None)
    with bench.handle() as cache:
        with monkeypatch.context() as patch:

            def interrupted(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(prefill.states, "capture_kv", interrupted)
            with pytest.raises(KeyboardInterrupt):
                bench.warm(cache)
        assert bench.generate(bench.prompt(1), cache).distance(expected) <= 1e-4
        assert bench.generate(bench.prompt(1), cache).distance(expected) <= 1e-4
        assert cache.last_request.resumed_tokens > 0


def test_handle_collected_while_another_remains() -> None:
    bench = Bench("Mamba", model=build("Mamba"))
    kept = bench.handle()
    bench.warm(kept)
    bench.handle()
    gc.collect()
    bench.generate(bench.prompt(1), kept)
    assert kept.last_request.resumed_tokens > 0
    kept.detach()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_switched_off_in_either_way(mode: Any) -> None:
    """What one mode stored, the other can use."""
    bench = Bench("Jamba")
    expected = bench.generate(bench.prompt(1), None)
    with bench.handle() as cache:
        with mode():
            bench.warm(cache)
        for again in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with again():
                assert bench.generate(bench.prompt(1), cache).distance(expected) <= 1e-4
            assert cache.last_request.resumed_tokens > 0
