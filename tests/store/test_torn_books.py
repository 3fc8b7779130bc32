"""Ctrl-C at every place of a request and of all else that writes in the books: they stay right, or start over.

Some places are tried each time; HF_SPARSE_CACHE_TEST_INTERRUPTS=all tries every one, which takes minutes.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cutting import Anywhere
from interrupting import Interrupter
from reference_store import LIVE, Blob

from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.foresight import Foresight
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.planning.policy import Policy, Prompt
from hf_sparse_cache.planning.segments import Replayable, Segmenting
from hf_sparse_cache.request import Request, open_request
from hf_sparse_cache.store.answer import open_answer
from hf_sparse_cache.store.audit import WrongBooksError
from hf_sparse_cache.store.holding import Holding
from hf_sparse_cache.store.store import CheckpointStore


PLACES = os.environ.get("HF_SPARSE_CACHE_TEST_INTERRUPTS", "2")
BUDGET, TENANT = 90, 50
CUTS = [2, 4, 6, 8]
SPACES = ["m\x1fa", "m\x1fb"]
PROMPTS = [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
TIERS = ["memory", "host", "disk", "host and disk"] if PLACES == "all" else ["memory", "host and disk"]


@dataclass
class Shop:
    """A store with its policy, as a handle has them."""

    store: CheckpointStore
    policy: Policy
    segmenting: Segmenting = field(default_factory=lambda: Anywhere(CutRule(1), CUTS))

    @classmethod
    def opened(cls, tiers: str, folder: Path) -> Shop:
        lower = {"host_memory": 100} if "host" in tiers else {}
        disk = {"disk_memory": 20_000, "disk_dir": folder} if "disk" in tiers else {}
        store = CheckpointStore(BUDGET, namespace_memory={"b": TENANT}, **lower, **disk)  # type: ignore[arg-type]
        for tier in store.tiers:
            tier.reader = Blob.from_bytes
        return cls(store, make_policy("learned"))

    def begin(self, ids: list[int], space: str) -> Request:
        return open_request(self.store, self.policy, np.asarray(ids, np.int32), self.segmenting, space=space)

    def ask(self, ids: list[int], space: str, holding: Holding | None = None) -> Request:
        """One prompt, as a model would have it computed; what it finds is its own."""
        with self.begin(ids, space) as request:
            if request.checkpoint is not None:
                assert request.checkpoint.state.label == (space, tuple(ids)[: request.resumed_tokens])
            ends = [payload.label[3] for payload in request.kv_payloads()]
            labels = [(space, tuple(ids[:b]), a, b) for a, b in zip([0, *ends], ends, strict=False)]
            assert [payload.label for payload in request.kv_payloads()] == labels
            if holding is not None:
                request.hold_for(holding)
            for cut in CUTS:
                if request.resumed_tokens < cut <= len(ids) - 2 and cut in request.segments:
                    request.add(cut, Blob(10, (space, tuple(ids[:cut]))), self.kv(ids, space))
        return request

    @staticmethod
    def kv(ids: list[int], space: str) -> Callable[[int, int], Blob]:
        return lambda a, b: Blob(2 * (b - a), (space, tuple(ids[:b]), a, b))

    def answer(self, request: Request, ids: list[int], space: str) -> None:
        whole = [*ids, 7, 7, 7]
        answer = open_answer(request.read, np.asarray(whole[len(ids) :], np.int32))
        if answer is not None:
            with answer:
                for end in answer.planned:
                    answer.add(end, Blob(10, (space, tuple(whole[:end]))), self.kv(whole, space))

    def warm(self) -> None:
        for ids in PROMPTS[:2]:
            for space in SPACES:
                self.ask(ids, space)

    def check(self) -> None:
        """All is as if nothing had happened, but for what may be lost."""
        self.store.verify()
        self.free()
        for ids in [*PROMPTS, *PROMPTS]:
            for space in SPACES:
                self.ask(ids, space)
        self.store.verify()
        self.free()
        for tier in self.store.tiers:
            assert not tier.ledger.in_use and not tier.ledger.chains.footings
            assert tier.max_memory is None or tier.used_bytes + tier.reserved_bytes <= tier.max_memory
            kept = {id(item) for _, item in tier.ledger.marks.kept}
            assert all(item.pins == (id(item) in kept) for item in tier.stored())
        assert self.store.account("b").used_bytes <= TENANT
        assert self.store.match(np.asarray(PROMPTS[0], np.int32), SPACES[0]).overlap == len(PROMPTS[0])
        self.store.clear()
        self.store.verify()
        for tier in self.store.tiers:
            assert (tier.used_bytes, len(tier), tier.tree_bytes, tier.reserved_bytes) == (0, 0, 0, 0)
        if LIVE:
            gc.collect()  # a traceback may keep itself alive
        assert not LIVE

    def free(self) -> None:
        """No lock is held, as another thread finds."""
        locks = [*(tier.lock for tier in self.store.tiers), self.policy.lock, self.store.promises.lock]
        found: list[bool] = []

        def try_all() -> None:
            for lock in locks:
                found.append(lock.acquire(blocking=False))
                if found[-1]:
                    lock.release()

        thread = threading.Thread(target=try_all)
        thread.start()
        thread.join()
        assert found == [True] * len(locks)


def one_request(shop: Shop) -> None:
    shop.ask(PROMPTS[2], SPACES[0])


def a_tenant(shop: Shop) -> None:
    shop.ask(PROMPTS[2], SPACES[1])


def resumed(shop: Shop) -> None:
    shop.ask(PROMPTS[1], SPACES[0])


class Everywhere(Policy):
    """Captures at every cut, and behind the answer."""

    def place(self, prompt: Prompt) -> list[int]:
        found: list[int] = prompt.cuts.tolist()
        return found


def answered(shop: Shop) -> None:
    shop.segmenting, shop.policy = Replayable(CutRule(1), step=2), Everywhere()
    request = shop.ask(PROMPTS[1], SPACES[0])
    shop.answer(request, PROMPTS[1], SPACES[0])


def marked(shop: Shop) -> None:
    shop.store.mark(np.asarray(PROMPTS[1][:4], np.int32), SPACES[0])
    shop.store.mark(np.asarray(PROMPTS[2][:7], np.int32), SPACES[0])
    shop.ask(PROMPTS[2], SPACES[0])


def cleared_meanwhile(shop: Shop) -> None:
    with shop.begin(PROMPTS[1], SPACES[0]) as request:
        request.add(8, Blob(10, (SPACES[0], tuple(PROMPTS[1][:8]))), shop.kv(PROMPTS[1], SPACES[0]))
        shop.store.clear(SPACES[0])


def cleared(shop: Shop) -> None:
    shop.store.clear()


def dropped(shop: Shop) -> None:
    shop.store.drop(SPACES[0])


def resized(shop: Shop) -> None:
    shop.store.resize(40)
    shop.store.resize(BUDGET)


def resized_meanwhile(shop: Shop) -> None:
    with shop.begin(PROMPTS[1], SPACES[0]):
        shop.store.resize(5)
    shop.store.resize(BUDGET)


def given_back(shop: Shop) -> None:
    shop.store.give_back()


def flushed(shop: Shop) -> None:
    shop.store.flush()


def held_for_a_call(shop: Shop) -> None:
    holding = Holding(shop.store)
    try:
        for place, ids in enumerate(PROMPTS):
            foresight = Foresight(shop.policy, {4: 2}, place, holding.staying)
            holding.begin(foresight, place)
            shop.ask(ids, SPACES[0], holding)
    finally:
        holding.close()


SCENES = [
    one_request, a_tenant, resumed, answered, marked, cleared_meanwhile, cleared, dropped, resized, resized_meanwhile,
    given_back, flushed, held_for_a_call,
]  # fmt: skip


def interrupted(
    scene: Callable[[Shop], None], tiers: str, folder: Path, place: int | None
) -> tuple[Shop, Interrupter]:
    """A store in which a scene ran, up to a place."""
    LIVE.clear()
    shop = Shop.opened(tiers, folder)
    shop.warm()
    interrupter = Interrupter(place)
    interrupter.strikes(lambda: scene(shop))
    assert bool(interrupter.where) == (place is not None)
    return shop, interrupter


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("scene", SCENES)
def test_the_books_outlive_an_interrupt(
    scene: Callable[[Shop], None], tiers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse_cache.store.files.os.fsync", lambda _: None)
    shop, counter = interrupted(scene, tiers, tmp_path / "counted", None)
    shop.check()
    shop.store.close(flush=False)
    drawn: Sequence[int] = range(len(counter.places))
    if PLACES != "all":
        drawn = random.Random(7).sample(drawn, min(int(PLACES), len(drawn)))
    failed = []
    for place in drawn:
        shop, interrupter = interrupted(scene, tiers, tmp_path / str(place), place)
        try:
            shop.check()
        except Exception as error:
            failed.append(f"{place} at {interrupter.where}: {type(error).__name__}: {error}")
        shop.store.close(flush=False)
    assert not failed, f"{len(failed)} of {len(drawn)}\n" + "\n".join(failed)


def test_it_is_noticed_where_nothing_mends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, counter = interrupted(one_request, "memory", tmp_path, None)
    place = next(index for index, where in enumerate(counter.places) if where.startswith("chains.py _count "))
    shop, _ = interrupted(one_request, "memory", tmp_path, place)
    shop.check()
    monkeypatch.setattr(CheckpointStore, "mend", lambda self, error: None)
    shop, _ = interrupted(one_request, "memory", tmp_path, place)
    with pytest.raises(WrongBooksError, match="kv_bytes"):
        shop.check()


def test_an_interrupt_in_a_forward_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop.opened("memory", tmp_path)
    shop.warm()
    before = len(shop.store)
    with pytest.raises(KeyboardInterrupt), shop.begin(PROMPTS[1], SPACES[0]):
        raise KeyboardInterrupt
    assert len(shop.store) == before > 0 and not shop.store.ledger.in_use
    assert "starts over" not in caplog.text
    shop.check()


def test_books_that_start_over_say_so_and_keep_what_was_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop.opened("memory", tmp_path)
    shop.store.mark(np.asarray(PROMPTS[1][:4], np.int32), SPACES[0])
    shop.warm()
    _, counter = interrupted(one_request, "memory", tmp_path, None)
    place = next(index for index, where in enumerate(counter.places) if where.startswith("chains.py _count "))
    Interrupter(place).strikes(lambda: one_request(shop))
    assert caplog.text.count("starts over") == 1 and len(shop.store) == 0
    assert shop.store.marks.tokens == 4 and not shop.store.marks.kept
    shop.ask(PROMPTS[1], SPACES[0])
    assert [item.position for _, item in shop.store.marks.kept] == [4]
    shop.store.verify()


def test_another_request_that_was_open_goes_on(tmp_path: Path) -> None:
    shop = Shop.opened("memory", tmp_path)
    shop.warm()
    _, counter = interrupted(one_request, "memory", tmp_path, None)
    place = next(index for index, where in enumerate(counter.places) if where.startswith("chains.py _count "))
    with shop.begin(PROMPTS[1], SPACES[0]) as other:
        found = other.checkpoint
        Interrupter(place).strikes(lambda: one_request(shop))
        assert other.checkpoint is found is not None and not other.add(8, Blob(10))
        assert [payload.label[3] for payload in other.kv_payloads()][-1] == other.resumed_tokens
    shop.store.verify()
    shop.free()
    shop.ask(PROMPTS[1], SPACES[0])
    assert shop.ask(PROMPTS[1], SPACES[0]).resumed_tokens


@pytest.mark.parametrize("struck", [KeyboardInterrupt, MemoryError])
def test_an_error_while_an_interrupt_is_dealt_with_is_itself(struck: type[BaseException], tmp_path: Path) -> None:
    shop = Shop.opened("memory", tmp_path)
    shop.warm()
    held = len(shop.store)
    try:
        raise struck
    except struck:
        with pytest.raises(ValueError, match="max_memory"):
            shop.store.resize("much")
    assert len(shop.store) == held > 0
    shop.check()
