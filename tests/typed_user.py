"""A program of a user, for `mypy --strict` alone: it is checked by `make lint` and never run."""

from pathlib import Path
from typing import Any

from hf_sparse_cache import (
    CheckpointPlan,
    CheckpointStore,
    ExactnessReport,
    SimulationResult,
    SparseCacheConfig,
    SparsePrefixCache,
    UnsupportedModelError,
    check_exactness,
    plan_checkpoints,
    simulate,
)
from hf_sparse_cache.planning.policies import Policy, Prompt
from hf_sparse_cache.stats import RequestInfo


class LastCut(Policy):
    def place(self, prompt: Prompt) -> list[int]:
        return prompt.snap([prompt.overlap, len(prompt.ids)])


def serve(model: Any, tokenizer: Any, folder: Path) -> int:
    store = CheckpointStore("1GiB")
    config = SparseCacheConfig(max_memory=None, grid=512)
    config.save_pretrained(folder)
    same: SparseCacheConfig = SparseCacheConfig.from_pretrained(folder)
    try:
        cache = SparsePrefixCache(model, tokenizer, config=same, store=store)
    except UnsupportedModelError as error:
        return len(str(error))
    with cache, SparsePrefixCache(model, policy=LastCut(), max_memory=2**30, exactness="bitwise") as other:
        print(cache.explain("text").reason, other.stats().resumed_tokens)
    with cache.record() as requests:
        start = cache.prefill("text", logits_to_keep=2)
    print(start.logits.shape, [(info.batched, info.reason.cause) for info in requests], start.past_key_values)
    infos: list[RequestInfo] = requests
    with SparsePrefixCache(model, tokenizer, ambient=True) as unasked:
        print(unasked.config.ambient, sum(info.computed_tokens for info in infos))
    difference = cache.explain("text").difference
    if difference is not None:
        return difference.position if difference.same_text else difference.stored_token
    request = cache.last_request
    return 0 if request is None else request.resumed_tokens


def plan(trace: list[list[int]]) -> float:
    result: CheckpointPlan = plan_checkpoints([0.5, 0.5], 1)
    again: CheckpointPlan = CheckpointPlan.from_pretrained("folder")
    simulated: SimulationResult = simulate(trace, state_bytes=1, policy=LastCut())
    return result.expected_cost + again.positions[0] + simulated.capture_rate


def prove(model: Any) -> bool:
    report: ExactnessReport = check_exactness(model, ["prompt"], max_new_tokens=4)
    return report.passed and report.rows[0].logits_bitwise
