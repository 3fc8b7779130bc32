"""Each family's sabotaged twin: a checkpoint with a wrong state, which the check of exactness must reject."""

from collections.abc import Callable, Iterator

import pytest
import torch
from matrix import Bench, supported_families

from hf_sparse_cache import SparsePrefixCache, check_exactness
from hf_sparse_cache.models.states import LayerTensors, capture_kv, capture_state
from hf_sparse_cache.store.tree import Checkpoint, KVSegment


def checkpoints(cache: SparsePrefixCache) -> list[Checkpoint]:
    return [checkpoint for _, _, checkpoint in cache.store.checkpoints()]


def segments(cache: SparsePrefixCache) -> Iterator[KVSegment]:
    """Every KV segment of a store with one prompt, deepest first."""
    segment = max(checkpoints(cache), key=lambda checkpoint: checkpoint.position).kv
    while segment is not None:
        yield segment
        segment = segment.parent


def has_state(cache: SparsePrefixCache) -> bool:
    """Whether the family carries a state of fixed size; of the others the keys and values are sabotaged."""
    return cache.size.state_bytes > 0


def zeroed(bench: Bench, cache: SparsePrefixCache) -> None:
    payloads = (
        [found.state for found in checkpoints(cache)] if has_state(cache) else [s.payload for s in segments(cache)]
    )
    for payload in payloads:
        for layer in payload.layers:
            for value in layer.values():
                if torch.is_tensor(value):
                    value.zero_()


def of_another_prompt(bench: Bench, cache: SparsePrefixCache) -> None:
    ids = torch.flip(bench.stored, dims=(1,))
    for position, put in wrong_places(cache):
        put(prefilled(bench, cache, ids[:, :position]), 0)


def off_by_one(bench: Bench, cache: SparsePrefixCache) -> None:
    """States of one token earlier; keys and values of one token later."""
    for position, put in wrong_places(cache):
        if has_state(cache):
            put(prefilled(bench, cache, bench.stored[:, : position - 1]), 0)
        else:
            put(prefilled(bench, cache, bench.stored[:, : position + 1]), 1)


def wrong_places(cache: SparsePrefixCache) -> Iterator[tuple[int, Callable[[object, int], None]]]:
    """Each position with a function that puts there what a live cache holds, `shift` tokens late."""
    if has_state(cache):
        for found in checkpoints(cache):
            yield found.position, lambda live, shift, found=found: setattr(found, "state", counted_as(found, live))
    else:
        for segment in list(segments(cache)):

            def put(live: object, shift: int, segment: KVSegment = segment) -> None:
                payload: LayerTensors = capture_kv(live, segment.start + shift, segment.end + shift)
                segment.payload = payload

            yield segment.end, put


def counted_as(found: Checkpoint, live: object) -> LayerTensors:
    """The state of a live cache with the counts of tokens of the checkpoint, so that no count betrays it."""
    counts = [
        {name: value for name, value in layer.items() if not torch.is_tensor(value)} for layer in found.state.layers
    ]
    both = zip(capture_state(live).layers, counts, strict=True)
    return LayerTensors(tuple(layer | honest for layer, honest in both))


def prefilled(bench: Bench, cache: SparsePrefixCache, ids: torch.Tensor) -> object:
    live = cache.server.live_cache()
    bench.model.generate(ids, max_new_tokens=1, pad_token_id=0, **{cache.server.binding.cache_name: live})
    return live


SABOTAGES = {"zeroed": zeroed, "of another prompt": of_another_prompt, "off by one": off_by_one}


@pytest.mark.parametrize("family", supported_families())
def test_sabotaged_twin_is_rejected(family: str) -> None:
    bench = Bench(family)
    for how, sabotage in SABOTAGES.items():
        with bench.handle() as cache:
            bench.warm(cache)
            honest = check_exactness(bench.model, [bench.prompt(1)], cache=cache, max_new_tokens=2)
            assert honest.passed, f"{how}: {honest}"
        with bench.handle() as cache:
            bench.warm(cache)
            sabotage(bench, cache)
            report = check_exactness(bench.model, [bench.prompt(1)], cache=cache, max_new_tokens=2)
            if report.resumed_tokens == 0:  # a window of another length is noticed before anything is served
                assert not report.passed and "are due" in report.rows[0].reason, f"{how}: {report}"
                continue
            assert not report.bitwise and not report.passed, f"{how} was not noticed"
            assert report.max_abs_logit_diff > 1e-3, (
                f"{how} changed the logits by {report.max_abs_logit_diff:.1e} only"
            )
