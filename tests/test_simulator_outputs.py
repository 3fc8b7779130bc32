"""`simulate(store_outputs=True)`: what keeping the states of generated tokens would be worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_sparse_cache import simulate
from hf_sparse_cache.planning.policies import POLICIES, Last
from hf_sparse_cache.stats import RequestInfo
from hf_sparse_cache.tools.traces import load_trace


Row = dict[str, list[int]]


def chats(count: int = 5, turns: int = 4) -> list[Row]:
    """Conversations whose next prompt is the prompt, its answer and a new question."""
    draw = np.random.default_rng(11)
    histories: list[list[int]] = [draw.integers(0, 90, 100).tolist() for _ in range(count)]
    rows = []
    for _ in range(turns):
        for index, history in enumerate(histories):
            answer = draw.integers(0, 90, 60).tolist()
            rows.append({"input_ids": history, "output_ids": answer})
            histories[index] = [*history, *answer, *draw.integers(0, 90, 20).tolist()]
    return rows


def prompts(rows: list[Row]) -> list[list[int]]:
    return [row["input_ids"] for row in rows]


def test_the_next_turn_resumes_behind_the_answer() -> None:
    rows = chats(count=1, turns=2)
    found: list[RequestInfo] = []
    with_outputs = simulate(rows, policy="last", state_bytes=1, grid=16, store_outputs=True, on_request=found.append)
    without = simulate(rows, policy="last", state_bytes=1, grid=16)
    assert (without.overlap_tokens, without.resumed_tokens, without.checkpoints) == (100, 96, 2)
    assert (with_outputs.overlap_tokens, with_outputs.resumed_tokens, with_outputs.checkpoints) == (160, 144, 4)
    assert [row.captured for row in found] == [(96, 144), (176, 224)]  # two tokens are left of 160, and of 240
    assert [row.prompt_tokens for row in found] == [100, 180]


def test_no_checkpoint_of_the_output_lies_before_the_end_of_the_prompt() -> None:
    rows = [{"input_ids": list(range(97)), "output_ids": [5]}]  # the grid's 96 is a cut of the longer text only
    found: list[RequestInfo] = []
    simulate(rows, policy="last", state_bytes=1, grid=16, store_outputs=True, on_request=found.append)
    assert found[0].captured == (80,)
    rows = [{"input_ids": list(range(96)), "output_ids": [5, 6]}]
    simulate(rows, policy="last", state_bytes=1, grid=16, store_outputs=True, on_request=found.append)
    assert found[1].captured == (80, 96)  # the state at the end of the prompt is known once it was read


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kv", [0, 2])
def test_every_policy_places_on_outputs_within_its_limit(policy: str, kv: int) -> None:
    rows, found = chats(), []
    options: dict[str, Any] = {"policy": policy, "state_bytes": 40, "kv_bytes_per_token": kv, "grid": 16}
    options |= {"max_checkpoints": 2, "max_memory": 3000}
    result = simulate(rows, store_outputs=True, on_request=found.append, **options)
    plain = simulate(rows, **options)
    assert result.peak_bytes <= 3000
    assert result.overlap_tokens > plain.overlap_tokens
    for row, asked in zip(found, rows, strict=True):
        behind = [position for position in row.captured if position >= row.prompt_tokens]
        assert len(behind) <= 2 and len(row.captured) - len(behind) <= 2
        assert all(position <= len(asked["input_ids"]) + len(asked["output_ids"]) - 2 for position in row.captured)
    if policy == "learned" or (policy in ("last", "junction") and not kv):  # fixed rules know no price of memory
        assert result.resumed_tokens > plain.resumed_tokens
    if policy == "none":
        assert result.checkpoints == 0


def test_the_learned_policy_learns_where_whole_turns_end() -> None:
    """A next turn begins with prompt and answer: once that was seen, its end is where checkpoints go."""
    rows, found = chats(count=20), []
    result = simulate(rows, state_bytes=1, grid=16, store_outputs=True, warmup=0.5, on_request=found.append)
    assert result.recomputed_tokens <= 20.0
    assert all(max(row.captured, default=0) >= row.prompt_tokens for row in found[20:])


@pytest.mark.parametrize("policy", ["learned", "dp", "junction"])
def test_empty_outputs_change_nothing(policy: str) -> None:
    rows = [{**row, "output_ids": []} for row in chats()]
    found: list[list[RequestInfo]] = [[], []]
    for store_outputs in (False, True):
        simulate(
            rows,
            policy=policy,
            state_bytes=50,
            max_memory=1000,
            grid=16,
            store_outputs=store_outputs,
            on_request=found[store_outputs].append,
        )
    assert found[0] == found[1]


def test_outputs_come_from_every_kind_of_trace(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = chats()
    lines = tmp_path / "trace.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    results = {
        simulate(trace, state_bytes=1, grid=16, store_outputs=True).resumed_tokens for trace in (rows, lines, table)
    }
    assert len(results) == 1
    known = load_trace([rows[0], {"input_ids": [1, 2]}, [3, 4]]).outputs
    assert [len(output) for output in known] == [60, 0, 0]


def test_rows_add_up_to_the_result() -> None:
    found: list[RequestInfo] = []
    result = simulate(prompts(chats()), state_bytes=9, max_memory=100, grid=16, on_request=found.append)
    assert len(found) == result.requests == 20
    assert sum(row.resumed_tokens for row in found) == result.resumed_tokens > 0
    assert sum(row.overlap_tokens for row in found) == result.overlap_tokens
    assert sum(len(row.captured) for row in found) == result.checkpoints
    assert all(row.computed_tokens + row.resumed_tokens == row.prompt_tokens and row.reason for row in found)


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no outputs.*'output_ids'"):
        simulate(prompts(chats()), state_bytes=1, store_outputs=True)
    (tmp_path / "meta.json").write_text('{"template": "hash_ids", "block": 512}', encoding="utf-8")
    row = {"hash_ids": [0, 1], "input_length": 600, "output_length": 30}
    (tmp_path / "requests.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=r"hashes of blocks.*tokens of the outputs are not known.*'output_ids'"):
        simulate(tmp_path, state_bytes=1, store_outputs=True)
    with pytest.raises(ValueError, match=r"row with keys \['ids'\].*'input_ids'"):
        simulate([{"ids": [1]}], state_bytes=1)
    with pytest.raises(ValueError, match="prefill_cost is for policies by name, but policy is a Last object"):
        simulate([[1]], state_bytes=1, policy=Last(), prefill_cost=lambda positions: positions)
