"""Whole calls of `generate()` on a stand-in accelerator: one device, few waits of the host, few launches.

None of this needs a GPU, and all of it would be slow or wrong on one if it failed here (see `standin`).
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import standin
import torch
from matrix import BITWISE, REPLAYABLE, Bench, left_padded, supported_families
from tiny_models import build, random_ids

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.models import prefill, rounding, states, streams, watch
from hf_sparse_cache.models.inputs import Prompts
from hf_sparse_cache.models.mamba1 import needs_hook


pytestmark = pytest.mark.skipif(standin.MISSING or not hasattr(os, "fork"), reason="no device of one's own here")
# Waits of the host beyond stock's: for the tokens of a prompt, and for those of an answer that is kept.
OF_A_PROMPT, OF_AN_ANSWER = 1, 1
NEW = 3
# Families whose own forward reads from the device: each segment waits as often as a forward of stock.
READS_IN_EVERY_FORWARD = ("GLM5Next",)


def bench_on(label: str, mode: str) -> Bench:
    return Bench(label, model=standin.move(build(label)), mode=mode)


def asked(bench: Bench, *seeds: int) -> dict[str, Any]:
    """One prompt, or several of different lengths in a batch."""
    prompts = [bench.prompt(seed) for seed in seeds]
    given = left_padded(prompts) if len(prompts) > 1 else {"input_ids": prompts[0]}
    return {name: standin.on_device(value) for name, value in given.items()}


def run(bench: Bench, handle: SparsePrefixCache | None, given: dict[str, Any], new: int = NEW) -> tuple[Any, Any]:
    """What a call gave, in main memory, and what it asked of the device."""
    options = {name: value for name, value in given.items() if name != "input_ids"}
    with standin.counted() as found:
        outcome = bench.generate(given["input_ids"], handle, max_new_tokens=new, **options)
    return (standin.on_host(outcome.tokens), *map(standin.on_host, outcome.logits)), found


def same(one: Any, other: Any) -> bool:
    return all(map(torch.equal, one, other))


def near(one: Any, other: Any) -> bool:
    """The same tokens, and logits within the tolerance."""
    pairs = zip(one[1:], other[1:], strict=True)
    return torch.equal(one[0], other[0]) and all((a - b).abs().max() < 1e-4 for a, b in pairs)


def in_bitwise_mode(label: str) -> None:
    bench = bench_on(label, BITWISE)
    single, batch = asked(bench, 3), asked(bench, 4, 5, 4)
    stock, waits = zip(*(run(bench, None, given) for given in (single, batch)), strict=True)
    with bench.handle(policy="none") as handle:
        cold = [run(bench, handle, given)[0] for given in (single, batch)]
    with bench.handle(store=CheckpointStore("64MiB", host_memory="64MiB")) as handle:
        run(bench, handle, asked(bench, 0), 1)
        for index, given in enumerate((single, batch)):
            for tier in ("memory", "host"):
                if tier == "host":
                    handle.store.give_back()
                    assert handle.store.used_bytes == 0 < handle.store.below.used_bytes
                warm, found = run(bench, handle, given)
                assert handle.last_request.reason == "resumed" and handle.last_request.resumed_tokens
                assert same(warm, cold[index]) and near(warm, stock[index])
                further = found.waits - waits[index].waits
                if label not in READS_IN_EVERY_FORWARD:
                    assert found.waited <= waits[index].waited + OF_A_PROMPT, further


def in_replayable_mode(label: str) -> None:
    bench = bench_on(label, REPLAYABLE)
    single = asked(bench, 3)
    stock, beside = run(bench, None, single)
    with bench.handle() as handle:
        for seed in (0, 9):
            run(bench, handle, asked(bench, seed))
        warm, found = run(bench, handle, single)
        assert handle.last_request.reason == "resumed" and near(warm, stock)
        assert found.waited <= beside.waited + OF_A_PROMPT + OF_AN_ANSWER, found.waits - beside.waits


@pytest.mark.parametrize("label", supported_families())
def test_every_family(label: str) -> None:
    standin.in_a_process_of_its_own(in_bitwise_mode, label)


@pytest.mark.parametrize("label", ["Mamba2", "Jamba", "Qwen3.5"])
def test_in_replayable_mode(label: str) -> None:
    standin.in_a_process_of_its_own(in_replayable_mode, label)


# -- what a segment and a restore cost --------------------------------------------------------------------------------


def costs(label: str) -> None:
    bench = bench_on(label, BITWISE)
    found = {}
    with bench.handle(policy="none") as handle:
        for count in (2, 3, 6):
            ids = standin.on_device(random_ids(count * bench.step, seed=7))
            _, found[count] = run(bench, handle, {"input_ids": ids}, 1)
    assert found[6].waited == found[2].waited, found[6].waits - found[2].waits
    each = found[3].launched - found[2].launched
    live = handle.server.binding.live_cache()
    with standin.counted() as forward, torch.no_grad():
        prefill.segment(handle.server.binding, live, prefill.Row(ids[0], {"use_cache": True}), bench.step)
    if not needs_hook(bench.model.config.model_type):  # a scan from a state is another one than a scan from nothing
        assert each <= forward.launched + 8
    payload, kv = states.capture_state(live), states.capture_kv(live, 0, bench.step)
    count = sum(torch.is_tensor(value) for part in (payload, kv) for layer in part.layers for value in layer.values())
    with standin.counted() as captured:
        states.capture_state(live), states.capture_kv(live, 0, bench.step)
    fresh = handle.server.binding.live_cache()
    with standin.counted() as restored:
        states.restore(fresh, payload, [kv])
        prefill.settle(fresh.layers)
    for told in (captured, restored):
        assert told.launched <= count and not told.waited


@pytest.mark.parametrize("label", ["Mamba", "Jamba", "Zamba2", "Qwen3.5", "LFM3"])
def test_segments_wait_for_nothing_and_a_tensor_is_restored_by_one_launch(label: str) -> None:
    standin.in_a_process_of_its_own(costs, label)


# -- one allocation a payload -----------------------------------------------------------------------------------------


def allocations(payload: Any) -> dict[int, int]:
    """Where the memory behind a payload's tensors begins, and its bytes."""
    values = [value for layer in payload.layers for value in layer.values() if torch.is_tensor(value)]
    storages = [getattr(value, "inner", value).untyped_storage() for value in values]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def what_is_stored_lies_together(storage: str) -> None:
    bench = bench_on("Jamba", BITWISE)
    with bench.handle(store=CheckpointStore("64MiB", host_memory="64MiB"), storage=storage, prove=False) as handle:
        run(bench, handle, asked(bench, 0), 1)
        store = handle.store
        for tier in ("device", "host", "device"):
            if tier == "host":
                store.give_back()
                assert store.used_bytes == 0 < store.below.used_bytes
                continue
            run(bench, handle, asked(bench, 3), 1)
            payloads = {}
            for _, _, checkpoint in store.checkpoints():
                payloads[id(checkpoint.state)] = checkpoint.state, 1 + checkpoint.final  # logits have one of their own
                payloads |= {id(segment.payload): (segment.payload, 1) for segment in checkpoint.chain()}
            memory = [(allocations(item), most, len([*item.tensors()])) for item, most in payloads.values()]
            if not store.below.used_bytes:  # what comes back from host memory lies as it did there, in some blocks
                assert all(len(found) <= most for found, most, _ in memory), "a tensor has memory of its own"
            assert sum(len(found) for found, _, _ in memory) < 0.5 * sum(count for _, _, count in memory)
            assert store.used_bytes == sum(sum(found.values()) for found, _, _ in memory) > 0


@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_a_payload_has_one_allocation_which_the_budget_counts(storage: str) -> None:
    standin.in_a_process_of_its_own(what_is_stored_lies_together, storage)


# -- a device that is full --------------------------------------------------------------------------------------------


def full_as_long_as_anything_is_stored(restored: bool) -> None:
    """Forwards, or restores, fail for as long as the device holds a unit: all go to host memory, and come back."""
    bench = bench_on("Jamba", BITWISE)
    given = asked(bench, 3)
    with bench.handle(policy="none") as handle:
        cold = run(bench, handle, given)[0]
    with bench.handle(store=CheckpointStore("64MiB", host_memory="64MiB")) as handle:
        run(bench, handle, asked(bench, 0), 1)
        store, place, name = (
            handle.store,
            *((states, "restore") if restored else (type(bench.model), "forward")),
        )
        own = getattr(place, name)

        @functools.wraps(own)
        def full(*args: Any, **kwargs: Any) -> Any:
            if store.used_bytes:
                raise torch.OutOfMemoryError("no room")
            return own(*args, **kwargs)

        setattr(place, name, full)
        served = run(bench, handle, given)[0]
        setattr(place, name, own)
        assert same(served, cold) and handle.last_request.resumed_tokens == 0
        assert store.used_bytes == 0 < store.below.used_bytes and handle.stats().evictions == 0
        again = run(bench, handle, given)[0]
        assert same(again, cold) and handle.last_request.resumed_tokens


@pytest.mark.parametrize("restored", [False, True], ids=["a forward", "a restore"])
def test_without_room_states_leave_for_the_host_and_nothing_is_lost(restored: bool) -> None:
    standin.in_a_process_of_its_own(full_as_long_as_anything_is_stored, restored)


# -- the twins --------------------------------------------------------------------------------------------------------


def waiting_in_every_segment() -> None:
    own = watch.check_filled

    def waits(live: Any, tokens: int) -> None:
        own(live, tokens)
        assert bool((live.layers[1].keys == live.layers[1].keys).all())

    watch.check_filled = waits
    costs("Jamba")


def restored_elsewhere() -> None:
    bench = bench_on("Jamba", BITWISE)
    with bench.handle() as handle:
        run(bench, handle, asked(bench, 0))
        own = rounding.Rounding.restored
        rounding.Rounding.restored = lambda self, layer: {
            name: standin.on_host(value) for name, value in own(self, layer).items()
        }
        run(bench, handle, asked(bench, 3))


def copies_that_nobody_waits_for() -> None:
    standin.Event.arrive = lambda event: None
    in_bitwise_mode("Jamba")


def asking_twice() -> None:
    own = Prompts.of.__func__

    def again(cls: Any, input_ids: Any, kwargs: Any) -> Any:
        input_ids.cpu()
        return own(cls, input_ids, kwargs)

    Prompts.of = classmethod(again)
    in_bitwise_mode("Jamba")


def apart() -> None:
    streams.shared = lambda tensors: None
    what_is_stored_lies_together("exact")


FAULTS: dict[Callable[[], None], str] = {
    waiting_in_every_segment: "found.6..waited == found.2..waited",
    restored_elsewhere: "on the same device",
    copies_that_nobody_waits_for: "same.warm, cold",
    asking_twice: "OF_A_PROMPT",
    apart: "a tensor has memory of its own",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: Callable[[], None]) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        standin.in_a_process_of_its_own(fault)


def test_the_process_has_no_such_device() -> None:
    assert standin.in_a_process_of_its_own(len, "ab") == 2
    with pytest.raises(RuntimeError, match="standin"):
        torch.empty(1, device=standin.NAME)
