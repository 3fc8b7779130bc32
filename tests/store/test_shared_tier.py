"""What one process makes of what others stored, asked of the tier itself: what it believes, counts, says and moves."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reference_store import Blob
from sharing import Memory, NotedLock, stored_unit

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import files
from hf_sparse_cache.store import shared as module
from hf_sparse_cache.store.addresses import Filed, Text, namespace_folder, read_place
from hf_sparse_cache.store.hands import BusyError
from hf_sparse_cache.store.headers import RefusedFileError
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.shared import SharedTier
from hf_sparse_cache.store.unit_files import Packing


IDS = np.arange(800, dtype=np.int32)


@pytest.fixture
def tier() -> SharedTier:
    """One that reads from memory, whose chores wait."""
    made = SharedTier(Memory(), None, Seal())
    made.reader = Blob.from_bytes
    made.chores = chores(made).append
    return made


def chores(tier: Any) -> list[Any]:
    return tier.__dict__.setdefault("waiting", [])


def filed(tier: Any, position: int = 700) -> Filed:
    name, _ = stored_unit(tier.storage, tier.seal, position, "s")
    (unit,) = read_place(position // 256, {name: 5}).units
    return unit


# -- what is said -----------------------------------------------------------------------------------------------------


def test_kinds_of_what_happened_are_told_apart_up_to_a_number(tier: SharedTier) -> None:
    for number in range(20):
        tier.count(f"kind {number}")
    tier.count("kind 3"), tier.count("kind 19")
    assert tier.counts["kind 15"] == 1 and tier.counts["kind 3"] == 2 and "kind 16" not in tier.counts
    assert tier.counts["something else failed"] == 5 and len(tier.counts) == 17


def test_a_kind_is_a_reason_without_what_is_of_one_file() -> None:
    assert module._kind("a/b/c it has 12 of kv-1.safetensors or x 7") == "it has ## of or x #"
    assert module._kind("word " * 60) == ("word " * 60)[:120]


def test_a_failure_says_what_was_done() -> None:
    assert module._said(TimeoutError(), "look-up") == "look-up took too long"
    assert module._said(TimeoutError("by itself"), "look-up") == "look-up: TimeoutError: by itself"
    assert module._said(OSError("x"), "look-up") == "look-up: OSError: x"
    assert module._said(ValueError(), "look-up") == "look-up: ValueError: "


def test_each_kind_of_warning_is_given_once(tier: SharedTier, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        tier.warn("one", "the first")
        tier.warn("two", "the second")
        tier.write_failed("full 12\x1b")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "the first" in said[0] and "the second" in said[1]
    assert "memory cannot be written: full 12" in said[2] and "\x1b" not in said[2]
    assert [count for what, count in tier.counts.items() if what.startswith("failed: full ##")] == [2]


def test_what_was_remembered_first_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BAD", 2)
    kept: OrderedDict[str, int] = OrderedDict()
    for number, name in enumerate(("a", "b", "a")):
        module._remember(kept, name, number)
    assert [*kept.items()] == [("b", 1), ("a", 2)]
    module._remember(kept, "c", 3)
    assert [*kept.items()] == [("a", 2), ("c", 3)]


# -- asking -----------------------------------------------------------------------------------------------------------


def fails(error: BaseException) -> Any:
    def job() -> None:
        raise error

    return job


def test_it_is_waited_for_longer_until_it_has_answered_once(tier: SharedTier, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    untils: list[float] = []
    monkeypatch.setattr(tier.hands, "begin", lambda job: job)
    monkeypatch.setattr(tier.hands, "wait", lambda job, until: (untils.append(until), job())[1])
    assert tier._asked(fails(OSError("x")), 102.0, "look-up") is None
    tier.trust.kept()
    assert tier._asked(lambda: 5, 102.0, "look-up") == 5 and tier._asked(lambda: 6, 102.0, "look-up") == 6
    assert untils == [110.0, 110.0, 102.0]
    tier.after_fork()
    assert not tier.counts and not tier._answered and tier.storage.calls[-1][0] == "after_fork"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "alone", "of_one"),
    [
        (OSError("x"), "failed: look-up: OSError: x", "failed: look-up: OSError: x"),
        (TimeoutError(), "failed: look-up took too long", "failed: look-up took too long"),
        (FileNotFoundError("x"), "failed: look-up: FileNotFoundError: x", "gone before it was read"),
        (DamagedFileError("x"), "failed: look-up: DamagedFileError: x", "put aside: x"),
        (RefusedFileError("x"), "failed: look-up: RefusedFileError: x", "not for this store: x"),
    ],
)
def test_what_fails_is_counted_and_what_is_of_one_file_is_no_failure(
    tier: SharedTier, error: Exception, alone: str, of_one: str
) -> None:
    unit = filed(tier)
    until = time.monotonic() + 60
    assert tier._asked(fails(error), until, "look-up", unit) is None and tier.counts == {of_one: 1}
    assert tier.trust.holds is not of_one.startswith("failed")
    assert tier.is_bad(unit.state) is of_one.startswith(("put", "not"))
    assert len(chores(tier)) == of_one.startswith("put")
    tier.counts.clear(), tier.trust.kept()
    assert tier._asked(fails(error), until, "look-up") is None and tier.counts == {alone: 1}
    assert not tier.trust.holds
    assert tier._asked(lambda: 5, until, "look-up") is None and tier.counts["not asked, as it failed lately"] == 1


def test_no_more_than_fits_is_read(tier: SharedTier) -> None:
    tier.storage.put("a", b"12345")
    assert bytes(tier._bytes("a", None)) == bytes(tier._bytes("a", 5)) == bytes(tier._bytes("a", 6)) == b"12345"
    with pytest.raises(DamagedFileError, match="more than the 4 bytes"):
        tier._bytes("a", 4)


# -- what a state says ------------------------------------------------------------------------------------------------


def test_a_state_is_held_against_its_name_and_what_was_asked(tier: SharedTier) -> None:
    unit = filed(tier)
    data, text = tier.storage.read(unit.name), Text(tier.seal, "s", IDS[:700])
    found = tier._fitting(unit, text, "s", Lineage([700, 800]), data)
    assert (found.space, found.lineage, found.final) == ("s", Lineage([700]), False)
    assert [*found.tokens] == [*range(700)] and found.state.path == Path(unit.state) and len(found.kv) == 1
    other = IDS[:700].copy()
    other[3] = 9
    for filed_as, of, space, expected, said in (
        (unit, text, "t", None, "another model or namespace"),
        (unit, Text(tier.seal, "s", other), "s", None, "another prompt"),
        (replace(unit, position=699), Text(tier.seal, "s", IDS[:699]), "s", None, "another prompt"),
        (replace(unit, lineage="0" * 16), text, "s", None, "otherwise than its name"),
        (replace(unit, final=True), text, "s", None, "otherwise than its name"),
        (unit, text, "s", Lineage([64, 700]), "other segments"),
    ):
        with pytest.raises(DamagedFileError, match=said):
            tier._fitting(filed_as, of, space, expected, data)


def test_a_unit_is_found_read_and_used(tier: SharedTier) -> None:
    unit = filed(tier)
    assert tier.resume(IDS, None, "s", 700) is None and tier.counts == {"nothing deeper there": 1}
    tier.storage.put(Text(tier.seal, "s", IDS).note(2), b"")
    found = tier.resume(IDS, None, "s", 0)
    assert found is not None and found.filed == replace(unit, nbytes=len(found.data)) and found.text.blocks == 2
    kept: list[int] = []
    assert len(chores(tier)) == 1, "where nothing was found, the place is surveyed"
    chores(tier).clear()
    made = tier.read(found, list(found.files.kv), lambda: kept.append(1))
    assert made is not None and kept == [1] and [payload.nbytes for payload in made.kv.values()] == [40]
    assert tier.counts["resumed from"] == 1 and len(chores(tier)) == 1 and tier.keeper._used
    chores(tier)[0]()
    assert [name for name in tier.storage.asked("put") if name.startswith("leases/")]  # type: ignore[attr-defined]
    assert tier.read(found, list(found.files.kv), lambda: None) is not None
    tier.reader = None
    assert tier.resume(IDS, None, "s", 0) is None


def test_where_nobody_can_read_a_request_goes_on(tier: SharedTier, monkeypatch: pytest.MonkeyPatch) -> None:
    filed(tier)
    tier.storage.put(Text(tier.seal, "s", IDS).note(2), b"")
    found = tier.resume(IDS, None, "s", 0)
    assert found is not None
    monkeypatch.setattr(tier.hands, "begin", fails_with(BusyError("all hang")))
    assert tier.read(found, list(found.files.kv), lambda: pytest.fail("it was not read")) is None
    assert (
        tier.counts["failed: reading: all hang"] == 1 and not tier.trust.holds and not tier.is_bad(found.filed.state)
    )


def fails_with(error: Exception) -> Any:
    return lambda *_: fails(error)()


# -- what is put aside ------------------------------------------------------------------------------------------------


def test_what_is_refused_is_not_looked_at_and_why_is_said(tier: SharedTier, caplog: pytest.LogCaptureFixture) -> None:
    unit, deep = filed(tier), filed(tier, 780)
    tier.refuse(unit, unit.state, DamagedFileError("it is 12 long"), "digest")
    tier.refuse(deep, "kv-x", DamagedFileError("another"), "digest")
    assert tier.is_bad(unit.state) and tier.is_bad(deep.state) and not tier.is_bad("x")
    assert tier.put_aside(IDS, "s") == "another" and tier.put_aside(IDS[:767], "s") == "it is 12 long"
    assert tier.put_aside(IDS[:768], "s") == "another" and tier.put_aside(IDS[:512], "s") == "it is 12 long"
    assert tier.put_aside(IDS[:511], "s") == tier.put_aside(IDS, "t") == tier.put_aside(IDS[1:], "s") == ""
    tier.forgive(unit.state)
    assert not tier.is_bad(unit.state) and tier.is_bad(deep.state)
    assert tier.counts == {"put aside: it is ## long": 1, "put aside: another": 1}
    assert f"{unit.state}: it is 12 long" in caplog.text


@pytest.mark.parametrize("wrong", [RefusedFileError("of another key"), DamagedFileError("of another key")])
def test_what_is_of_another_key_stays(tier: SharedTier, wrong: DamagedFileError) -> None:
    if not isinstance(wrong, RefusedFileError):
        wrong.__cause__ = RefusedFileError("x")
    unit = filed(tier)
    tier.refuse(unit, unit.state, wrong, "digest")
    assert tier.counts == {"not for this store: of another key": 1} and not chores(tier) and tier.is_bad(unit.state)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_put_aside_is_kept_with_its_reason(tier: SharedTier, own: bool) -> None:
    unit = filed(tier)
    state = tier.storage.read(unit.name)
    (kv,) = [name for name in tier.storage.files if "/kv/" in name]  # type: ignore[attr-defined]
    culprit = unit.state if own else kv.rpartition("/")[2]
    aside = (unit.name if own else kv).rpartition("/")[2]
    whole = tier.storage.read(unit.name if own else kv)
    tier.refuse(unit, culprit, DamagedFileError("it is broken"), module._digest(whole))
    (chore,) = chores(tier)
    tier.storage.calls.clear()  # type: ignore[attr-defined]
    chore()
    assert tier.storage.asked("remove") == [unit.name] + ([] if own else [kv]), "the state first"  # type: ignore[attr-defined]
    assert bytes(tier.storage.read(f"quarantine/{aside}")) == whole
    assert bytes(tier.storage.read(f"quarantine/{unit.name.rpartition('/')[2]}")) == state
    said = json.loads(tier.storage.read(f"quarantine/{aside}.reason"))
    assert said == {"file": unit.name if own else kv, "reason": "it is broken"} and not tier.is_bad(unit.state)
    assert (kv in tier.storage.files) is own and unit.name not in tier.storage.files  # type: ignore[attr-defined]


def test_what_was_refused_is_put_aside_as_long_as_it_is_what_it_was(tier: SharedTier) -> None:
    tier.storage.put("a", b"12345")
    seen = module._digest(b"12345")
    for name, digest, own, most, same in (
        ("a", seen, True, None, True), ("a", seen, False, 3, True), ("a", module._digest(b"x"), True, None, False),
        ("gone", seen, False, None, True), ("a", "", True, None, True), ("gone", "", False, None, True),
        ("a", "", False, None, False), ("a", "", False, 5, False), ("a", "", False, 4, True),
    ):  # fmt: skip
        assert tier._is_as_it_was(name, digest, own, most) is same, (name, own, most)


def test_of_one_that_is_too_long_the_beginning_is_kept(tier: SharedTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ASIDE_BYTES", 4)
    tier.storage.put("x/a", b"123456")
    tier._put_aside(["x/gone", "x/a"], "long")
    assert {name: data for name, (data, _) in tier.storage.files.items() if "reason" not in name} == {  # type: ignore[attr-defined]
        "quarantine/a": b"1234"
    }


def test_the_other_files_of_a_unit_that_was_damaged_are_looked_at(tier: SharedTier) -> None:
    unit = filed(tier)
    (kv,) = [name for name in tier.storage.files if "/kv/" in name]  # type: ignore[attr-defined]
    data = tier.storage.read(kv)
    tier._check({"x/gone": None, kv: len(data)})
    assert kv in tier.storage.files and not tier.counts  # type: ignore[attr-defined]
    broken = f"x/kv/{files.same_name('kv', b'other')}"
    tier.storage.put(broken, data)
    tier._check({broken: None, kv: len(data) - 1, unit.name: None})
    assert {*tier.storage.files} & {broken, kv, unit.name} == {unit.name}  # type: ignore[attr-defined]
    assert sorted(count for what, count in tier.counts.items() if what.startswith("put aside: ")) == [1, 1]


def test_what_is_known_of_files_is_changed_by_one_thread_at_a_time(tier: SharedTier) -> None:
    lock, unit = NotedLock(), filed(tier)
    tier._lock = lock  # type: ignore[assignment]
    tier._bad, tier._reasons, tier.counts = (lock.guards(kept) for kept in (OrderedDict(), OrderedDict(), tier.counts))
    tier.refuse(unit, unit.state, DamagedFileError("x"), "digest")
    assert tier.put_aside(IDS, "s") == "x"
    tier.forgive(unit.state)
    assert tier.counts == {"put aside: x": 1}


# -- other spaces, and memory -----------------------------------------------------------------------------------------


def told(tier: Any, space: str, folder: str) -> str:
    name, data = Packing(tier.seal, files.same_name, steady=True).marks([], space)
    tier.storage.put(f"{folder}/{name}", data)
    return name


def test_other_spaces_of_a_namespace_are_those_that_say_so(tier: SharedTier) -> None:
    folder = namespace_folder(tier.seal, "")
    assert tier.others("mine") == []
    for space in ("mine", "one", "two", "three\x1ftenant"):
        told(tier, space, folder)
    tier.storage.put(f"{folder}/marks-notes.safetensors", b"mine")
    tier.storage.put(f"{folder}/notes", b"mine")
    assert tier.others("mine") == ["one", "two"] and tier.others("none") == ["mine", "one", "two"]
    for number in range(20):
        told(tier, f"more {number}", folder)
    assert len(tier.others("none")) == 16 - 3, "sixteen are looked at"


def test_what_was_handed_on_and_is_broken_leaves_memory(tier: SharedTier) -> None:
    lost: list[Any] = []
    tier.lose = lost.append
    broken = SimpleNamespace(pledge=SimpleNamespace(broken=True))
    whole, plain = SimpleNamespace(pledge=SimpleNamespace(broken=False)), SimpleNamespace()
    assert tier.stands(SimpleNamespace(kv={1: whole, 2: plain})) and lost == []  # type: ignore[arg-type]
    assert not tier.stands(SimpleNamespace(kv={1: whole, 2: broken})) and lost == [broken]  # type: ignore[arg-type]


def test_what_states_must_be_is_known_as_long_as_somebody_knows_it(tier: SharedTier) -> None:
    class Like:
        pass

    like: Any = Like()
    tier.expect("s", like)
    assert tier._expected.get("s") is like
    del like
    assert tier._expected.get("s") is None
