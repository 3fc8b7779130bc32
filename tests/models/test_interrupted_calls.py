"""Ctrl-C in `generate()`: what comes after it is as it always is."""

from __future__ import annotations

import random

import pytest
import torch
from interrupting import Interrupter
from persisting import cold_logits, handle, logits, question
from transformers import PreTrainedModel


@pytest.mark.parametrize("exactness", ["bitwise", "replayable"])
def test_a_call_after_an_interrupt_is_as_a_cold_one(jamba: PreTrainedModel, exactness: str) -> None:
    cold = cold_logits(jamba, question(3))
    with handle(jamba, exactness=exactness) as cache:
        logits(jamba, question(1), cache)
        counter = Interrupter()
        counter.strikes(lambda: logits(jamba, question(2), cache))
    for place in random.Random(7).sample(range(len(counter.places)), 8):
        with handle(jamba, exactness=exactness) as cache:
            logits(jamba, question(1), cache)
            interrupter = Interrupter(place)
            interrupter.strikes(lambda cache=cache: logits(jamba, question(2), cache))  # type: ignore[misc]
            assert interrupter.where
            cache.store.verify()
            assert not cache.store.ledger.in_use and not cache.store.promises._open, interrupter.where
            for _ in range(2):
                if exactness == "bitwise":
                    assert torch.equal(logits(jamba, question(3), cache), cold), interrupter.where
                else:
                    torch.testing.assert_close(logits(jamba, question(3), cache), cold, rtol=1e-4, atol=1e-4)
            assert cache.last_request.resumed_tokens > 0
            cache.store.verify()
