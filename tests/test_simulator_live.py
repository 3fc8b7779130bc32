"""One trace through `simulate` and through a live cache: the same matches, captures and evictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import FIRST_WORD, LAST_WORD
from tiny_models import available_families, build

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, simulate
from hf_sparse_cache.planning.policies import Learned
from hf_sparse_cache.stats import RequestInfo
from hf_sparse_cache.store.ledger import Ledger
from hf_sparse_cache.store.tree import Checkpoint


GRID = 16
PURE, HYBRID = "Mamba2", "Jamba"


@dataclass
class Events:
    """What happened: a row a request, and the prefix of each evicted checkpoint in the order in which they went."""

    rows: list[RequestInfo] = field(default_factory=list)
    evicted: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="module", params=[PURE, HYBRID])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param not in available_families():
        pytest.skip(f"this transformers has no {request.param}")
    return build(request.param)


@pytest.fixture
def evicted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Prefixes of the checkpoints that any store evicts, in order."""
    order: list[bytes] = []
    evict = Ledger.evict

    def noted(store: Ledger, checkpoint: Checkpoint, **options: Any) -> None:
        order.append(checkpoint.node.path_tokens()[: checkpoint.position].tobytes())
        evict(store, checkpoint, **options)

    monkeypatch.setattr(Ledger, "evict", noted)
    return order


def trace(count: int = 40) -> list[np.ndarray]:
    """Questions on four documents, some of them a second round of the same conversation."""
    draw = np.random.default_rng(7)

    def words(length: int) -> np.ndarray:
        return draw.integers(FIRST_WORD, LAST_WORD + 1, length).astype(np.int32)

    documents = [words(100) for _ in range(4)]
    prompts: list[np.ndarray] = []
    for index in range(count):
        before = prompts[-1] if index % 5 == 4 else documents[int(draw.integers(4))][: int(draw.integers(40, 101))]
        prompts.append(np.concatenate([before, words(int(draw.integers(8, 40)))]))
    return prompts


def live(
    model: Any, policy: Any, eviction: str, budget: int, evicted: list[bytes], mode: str = "bitwise", **options: Any
) -> tuple[Events, dict[str, Any]]:
    """What the live cache does, and what the simulator has to know of the model."""
    evicted.clear()
    store = CheckpointStore(budget, eviction)
    events = Events()
    with SparsePrefixCache(model, grid=GRID, policy=policy, store=store, exactness=mode, **options) as cache:
        for ids in trace():
            prompt = torch.from_numpy(ids).long()[None]
            model.generate(prompt, past_key_values=cache, max_new_tokens=1, do_sample=False)
            assert cache.last_request is not None
            events.rows.append(cache.last_request)
        events.evicted = list(evicted)
        known = {name: value for name, value in cache.simulation().items() if not name.startswith("max_")}
    assert store.used_bytes == store.checkpoint_bytes + store.kv_bytes <= budget
    return events, known


def simulated(evicted: list[bytes], **options: Any) -> Events:
    evicted.clear()
    events = Events()
    simulate(trace(), on_request=events.rows.append, **options)
    events.evicted = list(evicted)
    return events


def budget_of(model: Any) -> int:
    """Room for about eight checkpoints with their KV, of the thirty and more that the trace asks for."""
    with SparsePrefixCache(model, grid=GRID, policy="none", exactness="bitwise") as cache:
        return 8 * cache.size.state_bytes + 400 * cache.size.kv_bytes_per_token


@pytest.mark.parametrize("eviction", ["learned", "lru"])
@pytest.mark.parametrize("policy", ["learned", "dp", "junction"])
@pytest.mark.parametrize("mode", ["bitwise", "replayable"])
def test_the_live_cache_does_what_was_simulated(
    model: Any, evicted: list[bytes], policy: str, eviction: str, mode: str
) -> None:
    budget = budget_of(model)
    expected, known = live(model, policy, eviction, budget, evicted, mode)
    found = simulated(evicted, policy=policy, eviction=eviction, max_memory=budget, **known)
    assert found.rows == expected.rows
    assert found.evicted == expected.evicted
    assert len(expected.evicted) >= 4, "a budget that is never full proves nothing"
    assert sum(row.resumed_tokens > 0 for row in expected.rows) >= 8
    assert sum(len(row.captured) for row in expected.rows) >= 8


def unrounded(events: Events) -> list[RequestInfo]:
    """What happened to the requests, less where states were rounded, of which the simulator knows nothing."""
    ends = [tuple(end for end in row.segments if isinstance(end, int) or end[0] < end[1]) for row in events.rows]
    return [replace(row, segments=segments) for row, segments in zip(events.rows, ends, strict=True)]


@pytest.mark.parametrize("mode", ["bitwise", "replayable"])
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_rounded_storage_is_simulated_by_its_sizes(evicted: list[bytes], storage: str, mode: str) -> None:
    """In the bytes of four exact checkpoints; the sizes of an exact handle, as the twin, give something else."""
    model = build(HYBRID)
    budget = budget_of(model) // 2
    expected, known = live(model, "learned", "learned", budget, evicted, mode, storage=storage, prove=False)
    found = simulated(evicted, max_memory=budget, **known)
    assert found.rows == unrounded(expected) and found.evicted == expected.evicted
    assert len(expected.evicted) >= 2
    with SparsePrefixCache(model, grid=GRID, policy="none", exactness=mode) as cache:
        exact = {name: value for name, value in cache.simulation().items() if not name.startswith("max_")}
    assert simulated(evicted, max_memory=budget, **exact).rows != found.rows
    told = simulated(evicted, max_memory=budget, **exact, storage=storage)
    resumed = [sum(row.resumed_tokens for row in events.rows) for events in (found, told)]
    assert resumed[1] >= 0.95 * resumed[0]  # not knowing the family it takes all parts to be rounded alike


@pytest.mark.parametrize("wrong", ["grid", "max_memory", "eviction", "policy", "state_bytes"])
def test_sabotage_another_setting_is_noticed(model: Any, evicted: list[bytes], wrong: str) -> None:
    budget = budget_of(model)
    expected, known = live(model, "learned", "learned", budget, evicted)
    right = {"policy": "learned", "eviction": "learned", "max_memory": budget, **known}
    other = {"grid": 24, "max_memory": budget // 2, "eviction": "fifo", "policy": "last", "state_bytes": 1}
    assert simulated(evicted, **right) == expected
    assert simulated(evicted, **{**right, wrong: other[wrong]}) != expected


def test_sabotage_the_prefill_cost_matters(evicted: list[bytes]) -> None:
    """A cost that only the live cache knows moves checkpoints, so the simulator has to be told."""

    def steep(positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions + 0.5 * positions**2)

    model = build(PURE)
    budget = budget_of(model)
    expected, known = live(model, Learned(steep), "learned", budget, evicted)
    options = {**known, "max_memory": budget}
    assert simulated(evicted, **{**options, "prefill_cost": steep}) == expected
    assert simulated(evicted, **{**options, "prefill_cost": None}) != expected
