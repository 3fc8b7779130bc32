"""What writes to a shared store, turn by turn and without its thread: what waits, what is written, what is told."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reference_store import Blob
from sharing import KV, Memory, NotedLock, begin, prompt, serve, waiting

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.planning.lineage import Span
from hf_sparse_cache.store import behind as module
from hf_sparse_cache.store.addresses import Text
from hf_sparse_cache.store.behind import MOST_WAITING, SharedStore, Writer
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.store import CheckpointStore
from hf_sparse_cache.store.unit_files import StoredFile


Joined = Callable[..., CheckpointStore]


class Something:
    """What may wait to be written, as a checkpoint does."""


class Tier:
    """What a writer asks of the tier."""

    def __init__(self) -> None:
        self.seal, self.storage, self.room = Seal(), Memory(), True
        self.counts: Counter[str] = Counter()
        self.beats: list[float] = []
        self.failed: list[str] = []
        self.asked: list[int] = []
        self.keeper = SimpleNamespace(beat=self.beats.append, admits=self.admits)
        self.write_failed = self.failed.append
        self.chores: Any = None

    def admits(self, nbytes: int, now: float) -> bool:
        self.asked.append(nbytes)
        return self.room

    def count(self, what: str) -> None:
        self.counts[what] += 1


@pytest.fixture
def tier() -> Tier:
    return Tier()


@pytest.fixture
def writer(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """One that is given its turns by hand."""
    made = Writer(tier, None)  # type: ignore[arg-type]
    monkeypatch.setattr(made, "_awake", lambda: made._ready.notify_all())
    return made


# -- what waits -------------------------------------------------------------------------------------------------------


def test_so_many_wait_and_no_more(writer: Writer, tier: Tier) -> None:
    kept = [Something() for _ in range(MOST_WAITING + 2)]
    for each in kept:
        writer.offer(each, np.zeros(1, np.int32))  # type: ignore[arg-type]
    assert len(writer._waiting) == MOST_WAITING and tier.counts == {"not written: too many wait": 2}
    for _ in range(module._MOST_CHORES + 2):
        writer.do(lambda: None)
    assert len(writer._chores) == module._MOST_CHORES and tier.chores == writer.do
    writer.close()
    assert writer._left() == 0
    writer.offer(kept[0], np.zeros(1, np.int32)), writer.do(lambda: None)  # type: ignore[arg-type, func-returns-value]
    assert writer._left() == 0 and not writer.turn(0.0) and not writer.gets_on(-1)


def test_chores_come_first_and_each_has_a_turn(writer: Writer, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(writer, "_write", lambda checkpoint, ids: done.append((checkpoint, ids, writer._left())))
    one, two, gone = Something(), Something(), Something()
    for number, each in enumerate((one, gone, two)):
        writer.offer(each, number)  # type: ignore[arg-type]
    writer.do(lambda: done.append("first")), writer.do(lambda: done.append("second"))
    del gone, each
    left = []
    for _ in range(5):
        assert writer.turn(0.0) is True
        left.append(writer._left())
    assert done == ["first", "second", (one, 0, 3), (two, 2, 1)]
    assert left == [5, 4, 3, 2, 1], "what is being done counts until the next turn"
    assert tier.counts == {"not written: evicted before its turn": 1} and not tier.beats
    assert writer.turn(0.0) and writer._left() == 0 and len(tier.beats) == 1


def test_an_idle_turn_waits_and_one_that_is_closed_does_not(writer: Writer, tier: Tier) -> None:
    waits: list[float] = []
    ready = SimpleNamespace(
        wait=waits.append,
        notify_all=lambda: waits.append(-1.0),
        __enter__=lambda: None,
    )

    class Ready:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        wait, notify_all = staticmethod(ready.wait), staticmethod(ready.notify_all)

    writer._ready = Ready()  # type: ignore[assignment]
    assert writer.turn(7.0) and waits == [-1.0, 7.0], "whoever waits for it is told first"
    writer.do(lambda: None)
    waits.clear()
    assert writer.turn(7.0) and waits == []
    writer.close()
    waits.clear()
    assert not writer.turn(7.0) and 7.0 not in waits and len(tier.beats) == 1


def test_it_gets_on_as_long_as_something_is_done(writer: Writer) -> None:
    for _ in range(4):
        writer.do(lambda: None)
    waited = waiting(writer._ready, [writer._chores.pop] * 4)
    assert writer.gets_on(4) and waited == []
    assert writer.gets_on(1) is True and waited == [module._STALLED_SECONDS] * 3
    assert writer.gets_on(1) and writer.gets_on(0) and len(waited) == 4


def test_it_does_not_get_on_where_nothing_is_done_or_it_is_closed(writer: Writer) -> None:
    for _ in range(3):
        writer.do(lambda: None)
    waiting(writer._ready, [writer._chores.pop, lambda: None])
    assert writer.gets_on(0) is False and len(writer._chores) == 2
    waiting(writer._ready, [lambda: (writer._chores.pop(), setattr(writer, "_closed", True))])
    assert writer.gets_on(0) is False and len(writer._chores) == 1


def test_a_thread_is_started_when_there_is_none(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    release, started = threading.Event(), []

    def work(of: Any) -> None:
        started.append(threading.current_thread())
        release.wait(60)

    monkeypatch.setattr(module, "_work", work)
    writer = Writer(tier, None)  # type: ignore[arg-type]
    for _ in range(2):
        writer.do(lambda: None), writer.offer(Something(), None)  # type: ignore[arg-type, func-returns-value]
    release.set()
    assert writer._thread is not None
    writer._thread.join(60)
    writer.offer(Something(), None)  # type: ignore[arg-type]
    assert writer._thread is not None
    writer._thread.join(60)
    assert len(started) == 2, "one at a time, and another one where it came to an end"
    assert all(thread.daemon and thread.name == "sparse-cache-writes" for thread in started)
    writer.after_fork()
    assert writer._thread is None and writer._left() == 0


def test_the_thread_ends_with_its_writer(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[float] = []

    class Turning:
        def turn(self, seconds: float) -> bool:
            turns.append(seconds)
            return len(turns) < 3

    made = Turning()
    module._work(weakref.ref(made))  # type: ignore[arg-type]
    assert turns == [module._IDLE_SECONDS] * 3
    gone = weakref.ref(Turning())
    module._work(gone)  # type: ignore[arg-type]
    assert len(turns) == 3


def test_all_that_waits_is_changed_under_its_lock(writer: Writer) -> None:
    class Lock(NotedLock):
        notify_all = staticmethod(lambda: None)

        def wait(self, seconds: float) -> None:
            assert self.held

        def wait_for(self, done: Callable[[], bool], seconds: float) -> bool:
            assert self.held
            return done()

    lock = Lock()

    def asserting(name: str) -> Any:
        kept = getattr(writer, name)

        class Guarded(type(kept)):  # type: ignore[misc]
            def __len__(self) -> int:
                assert lock.held
                return super().__len__()

            def __bool__(self) -> bool:
                return len(self) > 0

        return Guarded()

    writer._lock = writer._ready = lock  # type: ignore[assignment]
    writer._waiting, writer._chores = asserting("_waiting"), asserting("_chores")
    writer._kv = lock.guards({})
    writer.offer(Something(), None), writer.do(lambda: None)  # type: ignore[arg-type, func-returns-value]
    assert not writer.gets_on(0) and writer.turn(0.0) and writer.turn(0.0) and writer.turn(0.0)
    writer._learn("chain", "name")
    cleared: list[bool] = []
    writer._waiting = SimpleNamespace(clear=lambda: cleared.append(lock.held))  # type: ignore[assignment]
    writer.close()
    assert cleared == [True]


# -- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "trusted"),
    [
        (OSError(5, "broken"), False),
        (ValueError("x"), False),
        (MemoryError(), True),
        (DamagedFileError("a link"), True),
    ],
)
def test_after_a_failure_the_storage_is_left_alone(
    writer: Writer, tier: Tier, error: Exception, trusted: bool
) -> None:
    def fails() -> None:
        raise error

    done: list[int] = []
    writer.do(fails), writer.do(lambda: done.append(1))  # type: ignore[func-returns-value]
    assert writer.turn(0.0) and writer.trust.holds is trusted
    said = f"writing: {type(error).__name__}: {error}"
    assert tier.failed == [said] and writer.trust.reason == ("" if trusted else said)
    assert writer.turn(0.0) and bool(done) is trusted
    assert tier.counts == ({} if trusted else {"not written: the storage failed lately": 1})
    writer.trust._until = 0.0
    writer.do(lambda: done.append(2))
    assert writer.turn(0.0) and done[-1] == 2 and writer.trust.reason == ""


# -- what is known of keys and values ---------------------------------------------------------------------------------


SPANS = [Span((0, 64)), Span((64, 128)), Span((128, 192))]
TEXT = Text(Seal(), "s", np.arange(200, dtype=np.int32))


def test_what_names_keys_and_values_is_the_text_and_each_forward_below(writer: Writer) -> None:
    chains = writer._chains(TEXT, SPANS)
    assert len({*chains}) == 3 and chains == writer._chains(TEXT, SPANS)
    assert writer._chains(TEXT, SPANS[:2]) == chains[:2]
    assert writer._chains(TEXT, [Span((0, 128)), SPANS[2]])[1] != chains[2]
    other = Text(Seal(), "s", np.concatenate([np.arange(150), np.zeros(50)]).astype(np.int32))
    assert [a == b for a, b in zip(writer._chains(other, SPANS), chains, strict=True)] == [True, True, False]


def test_what_was_learned_first_is_forgotten_first(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KNOWN", 3)
    before = time.monotonic()
    for name in ("a", "b", "c", "a", "d"):
        writer._learn(name, f"file {name}")
    assert [(chain, name) for chain, (name, _) in writer._kv.items()] == [(each, f"file {each}") for each in "cad"]
    assert all(before <= since <= time.monotonic() for _, since in writer._kv.values())


@pytest.mark.parametrize("there", [(), ("one",), ("one", "two"), ("two",)])
def test_unless_the_deepest_is_there_all_is_looked_for_again(
    writer: Writer, tier: Tier, there: tuple[str, ...]
) -> None:
    chains = writer._chains(TEXT, SPANS)
    writer.learn(
        TEXT, {span: StoredFile(Path(f"x/{name}"), 0) for span, name in zip(SPANS, ("one", "two"), strict=False)}
    )
    writer._learn("other", "other")
    for name in there:
        tier.storage.put(TEXT.kv(name), b"x")
    writer._check_known(TEXT, SPANS)
    assert tier.storage.asked("size") == [TEXT.kv("two")]
    assert {*writer._kv} == ({*chains[:2], "other"} if "two" in there else {"other"})
    if not there:
        writer._check_known(TEXT, SPANS)
        assert tier.storage.asked("size") == [] and {*writer._kv} == {"other"}, "nothing is known"


# -- what is written --------------------------------------------------------------------------------------------------


def packed(kv: dict[str, bytes | None]) -> Any:
    return module._Packed(TEXT, {f"chain {name}": name for name in kv}, kv, "state", b"12345")


def test_what_does_not_lie_there_is_written_and_the_state_last(writer: Writer, tier: Tier) -> None:
    storage = tier.storage
    for name, data in (("whole", b"123"), ("short", b"12")):
        storage.put(TEXT.kv(name), data)
    storage.calls.clear()
    assert writer._put(packed({"known": None, "whole": b"123", "short": b"123", "new": b"1234"}), "at/state", "t\x1fs")
    assert tier.asked == [5 + 3 + 4], "bytes that are to be written"
    about, *puts = storage.asked("put")
    assert about.startswith("about/") and puts == [TEXT.kv("short"), TEXT.kv("new"), "at/state"]
    assert storage.asked("size") == [TEXT.kv(name) for name in ("whole", "short", "new")]
    assert {chain: name for chain, (name, _) in writer._kv.items()} == {
        f"chain {name}": name for name in ("whole", "short", "new")
    }
    assert storage.files["at/state"][0] == b"12345" and tier.counts == {}


def test_without_room_nothing_is_written(writer: Writer, tier: Tier) -> None:
    tier.room = False
    assert writer._put(packed({"new": b"1"}), "at/state", "s") is False
    assert not tier.storage.files and not writer._kv and tier.counts == {"not written: no room within the budget": 1}


def test_a_space_is_told_once(writer: Writer, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    for space in ("t\x1fs", "t\x1fs", "t\x1fu"):
        writer._tell(space)
    assert len(tier.storage.asked("put")) == len({*tier.storage.files}) == 2 and tier.failed == []

    def put(name: str, data: bytes) -> None:
        raise DamagedFileError(f"{name} is a link")

    monkeypatch.setattr(tier.storage, "put", put)
    for _ in range(2):
        writer._tell("t\x1fv")
    assert len(tier.failed) == 1 and tier.failed[0].endswith("is a link")


def test_what_was_there_ten_minutes_ago_is_packed_again(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    payloads = {span: Blob(5, span.end) for span in SPANS}
    unit = SimpleNamespace(spans=SPANS, kv=payloads, space="s")
    named: list[Any] = []
    writer._packing = SimpleNamespace(  # type: ignore[assignment]
        kv=lambda payload, span, space: (f"kv {span.end} {space}", bytes(payload.nbytes)),
        state=lambda unit, names: named.append(names) or ("state", b"x"),
    )
    chains = writer._chains(TEXT, SPANS)
    writer._learn(chains[0], "old")
    clock.now += 599
    writer._learn(chains[1], "young")
    found = writer._packed(TEXT, unit)  # type: ignore[arg-type]
    assert found.kv == {"old": None, "young": None, "kv 192 s": bytes(5)} and named == [["old", "young", "kv 192 s"]]
    assert found.chains == dict(zip(chains, ["old", "young", "kv 192 s"], strict=True))
    assert (found.text, found.state, found.data) == (TEXT, "state", b"x")
    clock.now += 1
    assert [*writer._packed(TEXT, unit).kv] == ["kv 64 s", "young", "kv 192 s"]  # type: ignore[arg-type]


# -- with a store -----------------------------------------------------------------------------------------------------


def by_hand(store: CheckpointStore, storage: Memory) -> tuple[SharedStore, Memory]:
    """A store whose writer has no thread, in memory."""
    shared = store.shared
    assert shared is not None
    shared.tier.storage = storage
    shared.after_fork()
    shared.writer._awake = lambda: None  # type: ignore[method-assign]
    return shared, storage


def turned(shared: SharedStore) -> dict[str, int]:
    """What became of everything that waits."""
    while shared.writer._waiting or shared.writer._chores:
        shared.writer.turn(0.0)
    return shared.counts


def test_what_lies_there_is_not_written_again(joined: Joined) -> None:
    storage, ids = Memory(), prompt(1, 700)
    first, _ = by_hand(one := joined(), storage)
    serve(one, ids, (512,))
    assert turned(first) == {"nothing deeper there": 1, "written": 1}
    second, _ = by_hand(other := joined(), storage)
    other.read_with(None)  # type: ignore[arg-type]
    second.tier.reader = None
    serve(other, ids, (512,))
    before = {*storage.files}
    storage.calls.clear()
    assert turned(second)["already there"] == 1 and {*storage.files} == before and not storage.asked("read")
    state = next(name for name in storage.files if "-state-" in name)
    second.tier._bad[state[state.index("state-") :]] = None
    serve(other, ids, (512, 640))
    ((_, _, checkpoint), *_) = sorted(other.checkpoints(), key=lambda item: item[2].position)
    second.writer.offer(checkpoint, np.asarray(ids, np.int32))
    assert turned(second)["written"] >= 1, "what is of no use there is written anew"
    assert not second.tier.is_bad(state[state.index("state-") :])


def test_a_place_that_is_full_takes_no_more(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNITS", 2)
    shared, storage = by_hand(store := joined(), Memory())
    for position in (512, 576, 640):
        serve(store, prompt(1, 760), (position,))
    assert turned(shared)["written"] == 2 and shared.counts["not written: its place is full"] == 1
    assert sum("-state-" in name for name in storage.files) == 2
    monkeypatch.setattr(module, "MOST_UNITS", 1)  # as if others had written more at the same time
    serve(store, prompt(1, 760), (704,))
    assert turned(shared)["written"] == 2 and shared.counts["not written: its place is full"] == 2


def test_what_was_evicted_is_not_written(joined: Joined) -> None:
    shared, storage = by_hand(store := joined(max_memory=10 + 512 * KV), Memory())
    serve(store, prompt(1, 700), (512,))
    ((_, _, kept),) = store.checkpoints()
    serve(store, prompt(2, 700), (512,))
    assert turned(shared)["written"] == 1 and shared.counts["not written: evicted before its turn"] == 1, kept
    assert sum("-state-" in name for name in storage.files) == 1


def test_what_a_prompt_would_find_is_said(joined: Joined) -> None:
    shared, _ = by_hand(store := joined(), Memory())
    ids = np.asarray(prompt(1, 1300), np.int32)

    def reach(above: int = 0) -> tuple[int, str]:
        return shared.reach(ids, None, "", above)

    assert reach() == (0, "The shared store has nothing deeper.")
    serve(store, ids.tolist(), (1024,))
    turned(shared)
    assert reach() == (1024, "The shared store has its first 1,024 tokens.") and reach(1023)[0] == 1024
    assert reach(1024) == (0, "The shared store has nothing deeper.")
    shared.writer.trust.broken("full")
    assert reach(1024) == (0, "The shared store has nothing deeper. It could not be written lately (full).")
    shared.tier.trust.broken("gone\x1b")
    position, said = reach()
    assert position == 0 and "failed lately (gone" in said and "\x1b" not in said
    counts = shared.counts
    counts["mine"] = 1
    assert "mine" not in shared.counts


def test_a_flush_writes_in_the_order_of_use_until_it_does_not_get_on(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared, _ = by_hand(joined(), Memory())
    asked: list[int] = []
    offered: list[Any] = []
    answers = iter([True, True, False, False])
    monkeypatch.setattr(shared.writer, "gets_on", lambda most: (asked.append(most), next(answers))[1])
    monkeypatch.setattr(shared.writer, "offer", lambda checkpoint, ids: offered.append((checkpoint.last_used, ids)))
    shared.flush([("", used, SimpleNamespace(last_used=used)) for used in (3, 1, 4, 2)])  # type: ignore[misc]
    assert offered == [(1, 1), (2, 2)] and asked == [MOST_WAITING - 1] * 3 + [0]
    assert "took not all" in caplog.text
    answers = iter([True])
    caplog.clear()
    shared.tier._warned.clear()
    shared.flush([])
    assert caplog.text == ""


def test_a_request_that_stores_nothing_offers_nothing(joined: Joined) -> None:
    shared, _ = by_hand(store := joined(), Memory())
    with begin(store, prompt(1, 300)):
        pass
    assert shared.writer._left() == 0
