"""What is decided on traffic that is drawn here, as it was when somebody last looked: no constant moves unnoticed.

A change that is meant to decide otherwise writes it anew (`python tests/test_decisions.py`), and says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traffic import KINDS

from hf_sparse_cache.planning.policies import POLICIES
from hf_sparse_cache.simulator import simulate


DATA = Path(__file__).parent / "data" / "decisions.json"
REQUESTS = 160
BUDGETS: dict[str, dict[str, int]] = {
    "slots": {"max_memory": 8, "state_bytes": 1},
    "bytes": {"max_memory": 16_000, "state_bytes": 400, "kv_bytes_per_token": 1},
}
CELLS = [
    *(
        f"{kind}, {mode}, {budget}, learned"
        for kind in KINDS
        for mode in ("bitwise", "replayable")
        for budget in BUDGETS
    ),
    *(f"bursts, {mode}, slots, {policy}" for mode in ("bitwise", "replayable") for policy in POLICIES),
]


def decided(cell: str) -> dict[str, int]:
    """What is resumed, captured and evicted."""
    kind, mode, budget, policy = cell.split(", ")
    prompts = KINDS[kind](np.random.default_rng(5), REQUESTS)
    options: dict[str, Any] = {"exactness": mode, "policy": policy, "grid": 64, "warmup": 0.2, **BUDGETS[budget]}
    found = simulate(prompts, eviction="learned" if policy == "learned" else "lru", **options)
    return {"resumed": found.resumed_tokens, "captured": found.checkpoints, "evicted": found.evictions}


@pytest.mark.parametrize("cell", CELLS)
def test_decisions_are_what_they_were(cell: str) -> None:
    """But for a choice or two that another machine's last digit may turn."""
    assert decided(cell) == pytest.approx(json.loads(DATA.read_text(encoding="utf-8"))[cell], rel=0.003, abs=1)


if __name__ == "__main__":
    DATA.write_text(json.dumps({cell: decided(cell) for cell in CELLS}, indent=1) + "\n", encoding="utf-8")
