"""What the keeper of a shared store counts and decides, held against plain sums over files with ages that are set."""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
from sharing import Memory, NotedLock, stored_unit

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.store import files
from hf_sparse_cache.store import keeper as module
from hf_sparse_cache.store.addresses import Text
from hf_sparse_cache.store.keeper import Keeper, _Census, _Needs
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.storage import ListedFile


SEEDS = range(25)


@pytest.fixture(autouse=True)
def constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ages, so that many files are exactly as old as may be; nothing is left to chance."""
    for name, value in {"GRACE_SECONDS": 6.0, "LEASE_SECONDS": 4.0, "FRESH_SECONDS": 2.0, "DAY": 2.0}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.random, "random", lambda: 0.99)


def kept(budget: int | None = None, storage: Memory | None = None, seal: Seal | None = None) -> Keeper:
    return Keeper(storage or Memory(), seal or Seal(), budget)


def drawn(seed: int, keeper: Keeper) -> tuple[random.Random, _Census]:
    """A look at units of two spaces, whose needs are known, at keys and values, and at notes."""
    draw, census = random.Random(seed), _Census(20.0)
    for space in ("one", "two"):
        for number in range(draw.randrange(6)):
            name = f"{space}/kv/{number}"
            census.kv[name] = ListedFile(name, draw.randrange(1, 40), float(draw.randrange(21)))
        for number in range(draw.randrange(4)):
            name = f"{space}/at/place{number}/here"
            census.notes[name] = ListedFile(name, 0, float(draw.randrange(10, 18)))
        for number in range(draw.randrange(5)):
            name = f"{space}/at/{draw.choice(('place0', 'place1', 'own'))}/{space}{number}"
            census.units[name] = ListedFile(name, draw.randrange(0, 30), float(draw.randrange(21)))
            kv = tuple(f"{space}/kv/{item}" for item in sorted(draw.sample(range(7), draw.randrange(4))))
            places = frozenset(f"{space}/at/place{item}" for item in draw.sample(range(4), 1))
            needs = _Needs(kv, places, draw.randrange(1, 50))
            needs = draw.choices((needs, module._FOREIGN, module._DAMAGED), (8, 1, 1))[0]
            keeper._needs[f"{space}{number}"] = needs
            if draw.random() < 0.4:
                census.used[f"{space}{number}"] = float(draw.randrange(21)), draw.randrange(1, 4)
    census.total = sum(entry.nbytes for kind in (census.kv, census.units) for entry in kind.values())
    return draw, census


def own(name: str) -> str:
    return name.rpartition("/")[2]


def space_of(name: str) -> str:
    return name.partition("/")[0]


def foreign(keeper: Keeper, census: _Census) -> set[str]:
    return {space_of(name) for name in census.units if keeper._needs[own(name)] is module._FOREIGN}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_worth_least_goes_until_the_rest_fits(seed: int) -> None:
    keeper = kept(0)
    draw, census = drawn(seed, keeper)
    keeper.budget = int(census.total * draw.choice((0.3, 0.6, 0.9, 1.2))) + 1
    needs = {name: keeper._needs[own(name)] for name in census.units}
    units, kv = dict(census.units), dict(census.kv)
    by_worth = {}
    sharing = Counter(name for each in needs.values() for name in each.kv)
    for name, entry in units.items():
        last, count = census.used.get(own(name), (0.0, 0))
        nbytes = entry.nbytes + sum(kv[item].nbytes / sharing[item] for item in needs[name].kv if item in kv)
        age = 20.0 - max(last, entry.modified) + 2.0
        by_worth[name] = needs[name].tokens * (1 + count) / max(nbytes, 1.0) / age, name

    def left(gone: list[str]) -> int:
        """Bytes that remain without some units, what they alone need, and what nobody needs."""
        needed = {item for name in units if name not in gone for item in needs[name].kv}
        theirs = {item for name in gone for item in needs[name].kv} - needed
        stays = foreign(keeper, census) if not gone else blocked
        loose = {
            name for name, entry in kv.items()
            if name not in sharing and space_of(name) not in stays and 20.0 - entry.modified > 6.0
        }  # fmt: skip
        return (
            census.total
            - sum(units[name].nbytes for name in gone)
            - sum(kv[item].nbytes for item in (theirs | loose) & {*kv})
        )

    blocked, gone = foreign(keeper, census), []
    for name in sorted(units, key=by_worth.__getitem__):
        if left(gone) <= 0.8 * keeper.budget:
            break
        if 20.0 - census.used.get(own(name), (0.0, 0))[0] >= 4.0 and 20.0 - units[name].modified >= 2.0:
            gone.append(name)
    still = {item for name in units if name not in gone for item in needs[name].kv}
    freed = [item for name in gone for item in reversed(needs[name].kv) if item not in still and item in kv]
    victims = [entry.name for entry in keeper._victims(census)]
    assert victims == [*gone, *dict.fromkeys(freed)]
    assert {*census.units} == {*units} - {*gone} and {*census.kv} == {*kv} - {*freed}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_nobody_needs_is_what_no_unit_names_and_is_old(seed: int) -> None:
    keeper = kept()
    _, census = drawn(seed, keeper)
    keeper._needs["gone"] = _Needs()
    others = foreign(keeper, census)
    expected = []
    for name, entry in {**census.kv, **census.notes}.items():
        needed = any(
            name in keeper._needs[own(unit)].kv
            or (name in census.notes and name.rpartition("/")[0] in keeper._needs[own(unit)].places)
            or (name in census.notes and name.rpartition("/")[0] == unit.rpartition("/")[0])
            for unit in census.units
        )
        if not needed and space_of(name) not in others and entry.modified < 14.0:
            expected.append(name)
    expected += [
        name for name, entry in census.units.items()
        if keeper._needs[own(name)] is module._DAMAGED and entry.modified < 14.0
    ]  # fmt: skip
    assert [entry.name for entry in keeper._orphans(census)] == expected
    assert {*keeper._needs} == {own(name) for name in census.units}, (
        "what is known of units that are gone is forgotten"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_what_stays_for_a_time_goes_after_it_or_takes_a_twentieth_of_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    keeper = kept(draw.choice((None, 400, 1200)))
    census = _Census(40.0)
    for kind in ("leases", "quarantine", "unfinished"):
        for number in range(draw.randrange(8)):
            entry = ListedFile(f"{kind}/{number}", draw.randrange(1, 30), float(draw.randrange(20, 41)))
            getattr(census, kind).append(entry)
    expected = {entry.name for entry in census.unfinished if entry.modified < 34.0}
    for kind in ("leases", "quarantine"):
        room = float("inf") if keeper.budget is None else keeper.budget / 20
        for entry in sorted(getattr(census, kind), key=lambda entry: entry.modified, reverse=True):
            room -= entry.nbytes
            in_use = kind == "leases" and entry.modified >= 32.0
            if entry.modified < 26.0 or (room < 0 and not in_use):
                expected.add(entry.name)
    found = [entry.name for entry in keeper._stale(census)]
    assert sorted(found) == sorted(expected), "each once"


# -- room -------------------------------------------------------------------------------------------------------------


def admitting(budget: int | None, rooms: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[Keeper, list[float]]:
    keeper, swept = kept(budget), []

    def sweep(now: float) -> None:
        swept.append(now)
        keeper._room = rooms.pop(0)

    monkeypatch.setattr(keeper, "sweep", sweep)
    return keeper, swept


def test_room_is_looked_for_when_there_may_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, swept = admitting(1000, [700, 50, 800], monkeypatch)
    assert not keeper.admits(801, 1.0) and swept == []
    assert keeper.admits(10, 2.0) and swept == [2.0], "nothing is known yet"
    assert keeper.admits(15, 3.0) and keeper.admits(15, 3.0) and swept == [2.0]
    monkeypatch.setattr(module.random, "random", lambda: 0.0)
    assert not keeper.admits(51, 4.0) and swept == [2.0, 4.0], "by chance; there are 50"
    monkeypatch.setattr(module.random, "random", lambda: 0.999)
    keeper._room = 799
    assert keeper.admits(800, 5.0) and swept == [2.0, 4.0, 5.0], "all of it"
    assert keeper._room == 0


def test_room_is_used_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, swept = admitting(10**6, [30, 0, 5], monkeypatch)
    assert keeper.admits(10, 1.0) and keeper.admits(20, 1.0) and swept == [1.0]
    assert not keeper.admits(1, 2.0) and swept == [1.0, 2.0]
    assert keeper.admits(5, 3.0) and keeper._room == 0


def test_how_much_is_written_between_two_looks_is_a_part_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, swept = admitting(6400, [6000] * 9, monkeypatch)
    assert keeper.admits(1, 0.0)
    for chance, nbytes, due in (
        (0.5, 50, False),
        (0.5, 51, True),
        (0.25, 25, False),
        (0.25, 26, True),
        (0.0, 1, True),
    ):
        swept.clear()
        monkeypatch.setattr(module.random, "random", lambda chance=chance: chance)
        assert keeper.admits(nbytes, 1.0) and bool(swept) is due


def test_without_a_budget_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, swept = admitting(None, [], monkeypatch)
    assert keeper.admits(10**15, 0.0) is True and swept == []


# -- what is used -----------------------------------------------------------------------------------------------------


def test_a_lease_says_when_and_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_USED", 2)
    storage = Memory()
    keeper = kept(storage=storage)
    said = [keeper.uses(name, when) for name, when in (("a", 1.0), ("b", 2.0), ("a", 3.25), ("c", 4.0))]
    assert said == [True, False, False, False], "the first since others were told"
    keeper.beat(10.0)
    (name,) = storage.files
    assert name.startswith("leases/") and module._is_lease(name.rpartition("/")[2])
    assert json.loads(storage.files[name][0]) == {"used": {"a": [6.8, 2], "c": [6.0, 1]}}
    assert keeper.uses("c", 11.0) is True and keeper.uses("c", 12.0) is False
    keeper.beat(69.75), keeper.beat(70.0), keeper.beat(500.0)
    assert len(storage.asked("put")) == 2
    assert json.loads(storage.files[name][0]) == {"used": {"a": [66.8, 2], "c": [58.0, 3]}}
    keeper.beat(500.0, soon=True)
    assert len(storage.asked("put")) == 1 and {*storage.files} == {name}, "one for each process"
    assert [*kept(storage=storage)._lease.partition("/")][1:] != [*keeper._lease.partition("/")][1:]


def test_what_is_used_is_changed_by_one_thread_at_a_time() -> None:
    keeper, lock = kept(), NotedLock()
    keeper._lock, keeper._used = lock, lock.guards(OrderedDict())  # type: ignore[assignment]

    class Watched(OrderedDict):  # type: ignore[type-arg]
        def items(self) -> Any:
            assert lock.held
            return super().items()

    keeper.uses("a", 1.0)
    keeper._used = Watched(keeper._used)
    keeper.beat(2.0)
    assert not lock.held


def test_leases_of_all_processes_add_up() -> None:
    storage = Memory()
    keeper, other = kept(storage=storage), kept(storage=storage)
    for each, now, used in ((keeper, 100.0, {"a": [5, 2], "b": [1, 1]}), (other, 90.0, {"a": [0, 3], "c": [-7, -4]})):
        storage.now = now
        storage.put(each._lease, json.dumps({"used": used}).encode())
    storage.put("leases/notes", b"mine")
    census = keeper._census()
    assert census.used == {"a": (95.0, 5), "b": (99.0, 1), "c": (90.0, 0)}
    assert census.now == 100.0 and len(census.leases) == 2 and kept(storage=storage)._census().now == 0.0
    storage.put(other._lease, b" " * 2**20 + storage.files[other._lease][0])
    assert "c" not in keeper._census().used, "one of more than a megabyte says nothing"
    storage.put(other._lease, b" " * (2**20 - 60) + json.dumps({"used": {"c": [0, 1]}}).encode())
    assert "c" in keeper._census().used
    for odd in (b"", b"[]", b'{"used": 5}', b'{"used": {"d": [1]}}', b'{"used": {"d": 1, "e": [0, 1]}}'):
        storage.put(other._lease, odd)
        assert {*keeper._census().used} == {"a", "b"} | ({"e"} if b'e"' in odd[10:] and b'"e"' in odd else set())


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, True), (1.5, True), (-1, True), (True, False), ("1", False), (1e12, False), (-1e12, False)],
)
def test_what_is_a_number(value: object, number: bool) -> None:
    assert module._is_number(value) is number


# -- what there is ----------------------------------------------------------------------------------------------------


def test_what_a_unit_needs() -> None:
    storage, seal = Memory(), Seal()
    name, kv = stored_unit(storage, seal)
    text = Text(seal, "s", np.arange(700, dtype=np.int32))
    keeper = kept(storage=storage)
    entry = ListedFile(name, len(storage.files[name][0]), 0.0)
    needs = keeper._needs_of(entry)
    assert needs == _Needs((kv,), frozenset({text.folder(2)}), 700)
    storage.calls.clear()
    assert keeper._needs_of(entry) is needs and storage.calls == [], "a file never changes"
    assert kept(storage=storage, seal=Seal("a secret of sixteen bytes"))._needs_of(entry) is module._FOREIGN


@pytest.mark.parametrize(
    ("error", "needs", "once"),
    [
        (FileNotFoundError(), module._DAMAGED, False),
        (OSError(5, "x"), module._FOREIGN, False),
        (module.RefusedFileError("x"), module._FOREIGN, True),
        (DamagedFileError("x"), module._DAMAGED, True),
        (ValueError("x"), module._DAMAGED, True),
    ],
)
def test_what_a_unit_needs_that_cannot_be_read(error: Exception, needs: _Needs, once: bool) -> None:
    storage = Memory()
    name, _ = stored_unit(storage, Seal())
    keeper, entry, asked = kept(storage=storage), ListedFile(name, len(storage.files[name][0]), 0.0), []

    def read(*_: Any) -> bytes:
        asked.append(1)
        raise error

    whole, storage.read = storage.read, read  # type: ignore[method-assign]
    assert keeper._needs_of(entry) is needs and keeper._needs_of(entry) is needs
    assert len(asked) == (1 if once else 2)
    storage.read = whole  # type: ignore[method-assign]
    assert (keeper._needs_of(entry) is needs) is once
    other = f"other/{name.partition('/')[2]}"
    storage.put(other, storage.files[name][0])
    assert kept(storage=storage)._needs_of(entry._replace(name=other)) is module._DAMAGED


def test_everything_is_counted_by_its_kind_and_nothing_of_others() -> None:
    storage, seal = Memory(), Seal()
    keeper = kept(storage=storage)
    unit, kv = stored_unit(storage, seal)
    text = Text(seal, "s", np.arange(700, dtype=np.int32))
    keeper.beat(0.0, soon=True)
    aside = unit.rpartition("/")[2].partition("c-")[2].partition("-")[2].partition("-")[2]
    ours = {"units": [unit], "kv": [kv], "notes": [text.note(1)], "leases": [keeper._lease]}
    ours["quarantine"] = [f"quarantine/{aside}", f"quarantine/{aside}.reason"]
    ours["unfinished"] = [f"x/abc-{files.own_tag('abc')}{files.TEMPORARY}"]
    for name in [*ours["notes"], *ours["quarantine"], *ours["unfinished"]]:
        storage.put(name, b"12")
    total = sum(len(data) for data, _ in storage.files.values())
    tag, place = files.own_tag("abc"), text.root
    odd = ["notes.txt", "leases/mine", f"leases/-{files.own_tag('')[:12]}", f"leases/{aside}", "leases", tag]
    odd += ["quarantine/mine", f"{place}/kv/mine", kv.replace("/kv/", "/"), f"{place}/at/mine"]
    odd += [unit.replace("/at/", "/"), text.note(2).replace("/at/", "/")]
    odd += ["x/abc-1.tmp", f"x/abc-{tag}", f"x/abc-{tag}.tmp.x"]
    for name in odd:
        storage.put(name, b"mine")
    census = keeper._census()
    found = {kind: [getattr(item, "name", item) for item in getattr(census, kind)] for kind in ours}
    assert found == ours and census.total == total


def test_a_sweep_deletes_units_first_and_counts_what_is_left() -> None:
    storage, seal = Memory(), Seal()
    unit, kv = stored_unit(storage, seal)
    small, other = stored_unit(storage, seal, 600, "t")
    storage.put(unit, storage.files[unit][0] + b"")
    storage.now = 100.0
    keeper = kept(10**9, storage)
    keeper.sweep(5.0)
    total = sum(len(data) for data, _ in storage.files.values())
    assert keeper._room == 10**9 - total and keeper.deleted == 0 and keeper._lease in storage.files
    keeper.budget = 1000
    storage.calls.clear()
    keeper.sweep(6.0)
    removed = storage.asked("remove")
    assert {*removed} == {unit, kv, small, other} and {*removed[:2]} == {unit, small}
    assert keeper.deleted == 4 and keeper._room == 1000 - len(storage.files[keeper._lease][0])
    assert {*storage.files} == {keeper._lease}


@pytest.mark.parametrize(("chance", "goes"), [(0.0, True), (0.09, True), (0.11, False)])
def test_what_nobody_needs_is_looked_for_now_and_then(
    chance: float, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Memory()
    _, kv = stored_unit(storage, Seal())
    for name in [name for name in storage.files if name != kv]:
        storage.remove(name)
    storage.now = 100.0
    monkeypatch.setattr(module.random, "random", lambda: chance)
    kept(10**6, storage).sweep(0.0)
    assert (kv not in storage.files) is goes
    kept(None, storage).sweep(0.0)
    assert kv not in storage.files, "without a budget, each time"


def test_what_is_written_beyond_the_budget_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made from 95 % of it; what lies in the place of a lease is no reason to stop."""
    storage = Memory()
    stored_unit(storage, Seal())
    storage.now, keeper = 100.0, kept(None, storage)
    total = sum(len(data) for data, _ in storage.files.values()) + len(b'{"used": {}}')

    def put(name: str, data: bytes) -> None:
        raise DamagedFileError("something else lies there")

    keeper.sweep(0.0)
    keeper.budget = int(total / 0.95) + 2
    keeper.sweep(0.0)
    assert keeper.deleted == 0
    monkeypatch.setattr(storage, "put", put)
    keeper.budget = int(total / 0.95) - 2
    keeper.sweep(0.0)
    assert keeper.deleted == 2
