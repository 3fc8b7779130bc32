"""Serves one workload on one model with every contender in turn, request by request."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from ..cache import SparsePrefixCache
from ..tools import builtin
from ..tools.machine import peak_process_bytes
from .clock import Timed, timed
from .contenders import Cached, Chunked, Contender, DeepCopy, EveryCut, Limit, Replayed
from .results import RunSettings, Trial
from .upstream import why_wrong
from .workloads import Workload, WorkloadRequest, common_prefixes


def run_trial(settings: RunSettings, name: str, workload: Workload, repeat: int) -> Trial:
    """Loads a model, serves a workload, and gives the model back.

    Args:
        name: of the model.
        repeat: number of this repetition; the arrivals are the same, the order of the contenders is not.
    """
    workload = workload.first(settings.requests, settings.per_group)
    model, tokenizer = builtin.load(name, workload.texts, settings.dtype, settings.device, settings.seed)
    if name in builtin.SIZES:
        tokenizer.model_max_length = int(1e9)
    requests = workload.requests(
        tokenizer,
        seed=settings.seed,
        max_prompt_tokens=settings.max_prompt_tokens,
        vocabulary=int(cast(Any, model.get_input_embeddings()).num_embeddings),
    )
    contenders, left_out = _contenders(settings, model, tokenizer, requests)
    try:
        _warm_up(model, tokenizer, requests)
        started = time.perf_counter()
        rows, exactness = _serve_all(settings, f"{name} · {workload.name}", contenders, requests, repeat)
        summary = {
            "model": name,
            "dataset": workload.name,
            "repeat": repeat,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "random_weights": name in builtin.SIZES,
            "mode": settings.exactness,
            "grid": _grid(contenders),
            "prompts": len(requests),
            "seconds": time.perf_counter() - started,
            "left_out": left_out,
            "exactness": exactness,
            "tier_bytes": {contender.name: contender.tier_bytes() for contender in contenders},
            "held_bytes": {contender.name: contender.held_bytes() for contender in contenders},
            "peak_bytes": {contender.name: contender.peak_bytes() for contender in contenders},
            "process_peak_bytes": peak_process_bytes(),
        }
    finally:
        for contender in contenders:
            contender.close()
    return Trial(rows, summary)


def _contenders(
    settings: RunSettings, model: Any, tokenizer: Any, requests: list[WorkloadRequest]
) -> tuple[list[Contender], dict[str, str]]:
    """Those that were asked for and are right on this model, and why the others are left out."""
    options: dict[str, Any] = {"grid": settings.grid, "exactness": settings.exactness}
    most = settings.max_memory
    policies = [Cached(model, tokenizer, policy, policy, max_memory=most, **options) for policy in settings.policies]
    grid = policies[0].handle.grid
    made: list[Contender] = []
    left_out: dict[str, str] = {}
    if "stock" in settings.rivals:
        made.append(Contender(model))
    prefixes = common_prefixes(requests)
    recipes: dict[str, Callable[[], Contender]] = {
        "chunked": lambda: Chunked(model, grid),
        "deepcopy": lambda: DeepCopy(model, prefixes),
    }
    for name, make in recipes.items():
        if name in settings.rivals:
            why = why_wrong(model, make, grid)
            if why:
                left_out[name] = why
            else:
                made.append(make())
    if "dense" in settings.rivals:
        made.append(Cached(model, tokenizer, "dense", EveryCut(), max_memory=None, **{**options, "grid": grid}))
    if "limit" in settings.rivals:
        made.append(Limit(policies[0]))
    return [*made, *policies], left_out


def _warm_up(model: Any, tokenizer: Any, requests: list[WorkloadRequest]) -> None:
    """What only the first calls pay: threads, kernels, imports."""
    with SparsePrefixCache(model, tokenizer, max_memory=None, policy="learned") as handle:
        ids = torch.from_numpy(requests[0].ids).long()[None, : handle.grid + 16].to(model.device)
        for _ in range(2):
            timed(model, ids, 2)
            timed(model, ids, 2, past_key_values=handle)


def _serve_all(
    settings: RunSettings, title: str, contenders: list[Contender], requests: list[WorkloadRequest], repeat: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    twin = _twin(contenders)
    checked = _checked(requests, settings.checked)
    seen: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    exactness: dict[str, Any] = {c.name: {"requests": 0, "bitwise": 0, "max_abs_logit_diff": 0.0} for c in contenders}
    # What is there already is left out of the collections between requests, which would be slow.
    gc.collect()
    gc.freeze()
    tokens = sum(len(asked.ids) for asked in requests) * len(contenders)
    with tqdm(total=tokens, desc=title, unit="tok", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for index, asked in enumerate(requests):
            turn = seen[asked.group] = seen.get(asked.group, -1) + 1
            for contender in contenders:
                contender.prepare(asked)
            served: dict[str, Timed] = {}
            # Each contender is first, last and in between equally often, and follows every other one.
            shift = (index + repeat) % len(contenders)
            for contender in contenders[shift:] + contenders[:shift]:
                gc.collect()
                result = contender.serve(asked, settings.max_new_tokens, index in checked)
                if result is not None:
                    served[contender.name] = result
                bar.update(len(asked.ids))
            if index in checked:
                _compare(asked, served, twin, settings.max_new_tokens, exactness)
            stock = served.get("stock")
            for contender in contenders:
                if contender.name in served:
                    result = served[contender.name]
                    equal = None if stock is None else bool(torch.equal(result.tokens, stock.tokens))
                    row = {"repeat": repeat, "request": index, "group": asked.group, "turn": turn}
                    rows.append({**row, "contender": contender.name, **result.row(), "tokens_equal": equal})
    gc.unfreeze()
    if twin is not None:
        twin.close()
    return rows, exactness


def _compare(
    asked: WorkloadRequest,
    served: dict[str, Timed],
    twin: Replayed | None,
    max_new_tokens: int,
    exactness: dict[str, Any],
) -> None:
    """Logits of the first new token: against stock for all, and bit for bit against a cold run where one resumed."""
    stock = served.get("stock")
    for name, result in served.items():
        found = exactness[name]
        assert result.logits is not None
        if stock is not None and stock.logits is not None:
            difference = float((result.logits - stock.logits).abs().max())
            found["max_abs_logit_diff"] = max(found["max_abs_logit_diff"], difference)
        if twin is not None and result.segments and result.resumed_tokens:
            cold = twin.replay(asked, result, max_new_tokens)
            assert cold.logits is not None
            found["requests"] += 1
            found["bitwise"] += int(
                torch.equal(result.logits, cold.logits) and torch.equal(result.tokens, cold.tokens)
            )


def _twin(contenders: list[Contender]) -> Replayed | None:
    """What serves cold; None where no contender has a cache."""
    first = next((contender for contender in contenders if isinstance(contender, Cached)), None)
    return None if first is None else Replayed(first)


def _checked(requests: list[WorkloadRequest], count: int) -> set[int]:
    """Requests whose logits are compared: spread over those of a group that has been seen before."""
    seen: set[str] = set()
    later = []
    for index, asked in enumerate(requests):
        if asked.group in seen:
            later.append(index)
        seen.add(asked.group)
    later = later or list(range(len(requests)))
    count = min(count, len(later))
    # The last one first: a group's second request may say only where its third will resume.
    return {later[-1 - step * (len(later) - 1) // max(1, count - 1)] for step in range(count)}


def _grid(contenders: list[Contender]) -> int:
    return next(contender.handle.grid for contender in contenders if isinstance(contender, Cached))
