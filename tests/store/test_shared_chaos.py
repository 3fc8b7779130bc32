"""A slice of `chaos_shared`: several processes on one folder, killed and damaged at random."""

from __future__ import annotations

import os

import chaos_shared
import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL is POSIX")
def test_nothing_wrong_is_served_and_nothing_hangs() -> None:
    found = chaos_shared.main(processes=3, requests=40, seed=1, most_seconds=240, budget=250_000)
    assert found["errors"] == []
    assert found["requests"] >= 100 and found["resumed"] > 10


def test_a_wrong_answer_is_noticed() -> None:
    """The twin: a state that says another position than its name is an error of the process that resumes it."""
    import sharing

    ids = sharing.prompt(1, 300)
    assert sharing.label(ids, 64) != sharing.label(ids, 128) != sharing.label(sharing.prompt(2, 300), 128)
    served = {"resumed": 0, "seconds": 0.1, "deleted": 0, "counts": {}}
    judged = chaos_shared.judged(
        [served] * 501, chaos_shared.Counter(), (10 * chaos_shared.BUDGET, chaos_shared.BUDGET), []
    )
    assert any("bytes at the most" in error for error in judged["errors"])
    assert any("nothing was deleted" in error for error in judged["errors"])
    assert any("no failure is named" in error for error in judged["errors"])
    assert any("nothing was resumed" in error for error in judged["errors"])
