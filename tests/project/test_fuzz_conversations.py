"""A slice of the conversations that `make fuzz` holds for minutes, and worlds in which it must find something."""

import fuzz_conversations
import pytest
from fuzz_conversations import FAMILIES, run
from fuzz_requests import Difference

from hf_sparse_cache.planning.lineage import Lineage


def test_a_slice_of_conversations() -> None:
    tally = run(0, worlds=10, steps=30)
    assert tally["conversations"] >= 70 and tally["replayed after a resume"] >= 8
    assert sum(tally[family] > 0 for family in FAMILIES) >= 4 and tally["bitwise"] and tally["replayable"]


def test_restored_states_that_were_wiped_are_found() -> None:
    with pytest.raises(Difference, match=r"(?s)(logits|states) differ from those of a cold run.* resumed [1-9]"):
        run(3, worlds=4, steps=12, sabotage=True)


def test_stored_states_of_another_lineage_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fuzz_conversations.prefill.replay

    def joined(binding, live, row, lineage):
        return own(binding, live, row, Lineage([lineage.end]))

    monkeypatch.setattr(fuzz_conversations.prefill, "replay", joined)
    with pytest.raises(Difference, match="differ|a stored state|stored keys and values"):
        run(0, worlds=10, steps=30)
