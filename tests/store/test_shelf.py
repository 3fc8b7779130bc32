"""Where units are filed, and how they are found again, held against all places of a text looked at one by one."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest
from sharing import Memory, NotedLock

from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import addresses, files
from hf_sparse_cache.store import shelf as module
from hf_sparse_cache.store.addresses import BLOCK, Filed, Text, read_place, traces
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.shelf import MOST_ABOVE, Shelf


SEEDS = range(14)
IDS = np.arange(41 * BLOCK, dtype=np.int32)


def text(tokens: int = 40 * BLOCK, space: str = "s") -> Text:
    return Text(Seal(), space, IDS[:tokens])


def state(number: int) -> str:
    digits = f"{number:032x}"
    return f"state-{files.own_tag(digits)[:12]}-{digits}.safetensors"


def filed(storage: Memory, position: int, number: int = 0, final: bool = False) -> str:
    """Files a unit without its traces."""
    name = text().name(Lineage([position]), final, state(number or position))
    storage.put(name, b"unit")
    return name


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def drawn(seed: int) -> tuple[random.Random, Memory, dict[int, set[int]]]:
    """A storage with notes and units at random places of one text; and the positions of the units, by block."""
    draw, storage = random.Random(seed), Memory()
    there: dict[int, set[int]] = {}
    for block in draw.sample(range(40), draw.randrange(1, 30)):
        if block and draw.random() < 0.7:
            storage.put(text().note(block), b"")
        for above in draw.sample(range(40), 2) if draw.random() < 0.3 else ():
            storage.put(text().note(block, above), b"")
        for _ in range(draw.choice((0, 1, 1, 3))):
            position = block * BLOCK + draw.randrange(not block, BLOCK)
            filed(storage, position, final=draw.random() < 0.3)
            there.setdefault(block, set()).add(position)
    return draw, storage, there


def names_at(storage: Memory, block: int) -> set[str]:
    return {name for name in storage.files if name.startswith(f"{text().folder(block)}/")}


def above_at(storage: Memory, block: int) -> set[int]:
    found = [name.rpartition("/")[2].split("-") for name in names_at(storage, block)]
    return {int(parts[1]) for parts in found if parts[0] == "above"}


def passed(storage: Memory, blocks: int) -> tuple[list[int], list[int]]:
    """The places that a search looks at, and those of them that are there."""
    looked, there, reached = [], [], 0
    for step in (32, 16, 8, 4, 2, 1):
        if reached + step <= blocks:
            looked.append(reached + step)
            if names_at(storage, reached + step):
                there.append(reached := reached + step)
    return looked, there


def looked_at(storage: Memory) -> list[int]:
    """The blocks that were looked at since last asked."""
    known = {text(41 * BLOCK).folder(block): block for block in range(41)}
    return [known[folder] for folder in storage.asked("list")]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_search_steps_on_where_something_is(seed: int, clock: Clock) -> None:
    draw, storage, _ = drawn(seed)
    blocks, shelf = draw.randrange(1, 40), Shelf(storage)
    asked = text(blocks * BLOCK + draw.randrange(BLOCK))
    looked, there = passed(storage, blocks)
    assert [place.block for place in shelf.way(asked)] == there and looked_at(storage) == looked
    assert shelf.looks == len(looked)
    again = [block for block in looked if block not in there] + there[-1:]
    clock.now += 29.0
    assert [(place.block, place.names) for place in shelf.way(asked)] == [
        (block, names_at(storage, block)) for block in there
    ]
    assert looked_at(storage) == again, "what was there a moment ago is passed, unless the way ends there"
    clock.now += 2.0
    for block in there[-1:]:
        filed(storage, block * BLOCK + 7, 7)
    last = shelf.way(asked)[-1:]
    assert [place.names for place in last] == [names_at(storage, block) for block in there[-1:]]
    assert looked_at(storage) == [block for block in looked if block not in there[-1:]] + there[-1:]


def test_a_place_that_is_gone_is_passed_no_more() -> None:
    storage = Memory()
    storage.put(text().note(2), b"")
    shelf = Shelf(storage)
    assert [place.block for place in shelf.way(text(3 * BLOCK))] == [2]
    storage.remove(text().note(2))
    assert not shelf.look(text(), 2).names and shelf.way(text(3 * BLOCK)) == []
    storage.put(text().note(2), b"")
    assert [place.block for place in shelf.way(text(3 * BLOCK))] == [2]


def test_what_was_looked_at_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KNOWN", 2)
    storage = Memory()
    for block in (32, 36, 38):
        storage.put(text().note(block), b"")
    shelf = Shelf(storage)
    shelf.look(text(), 36), shelf.look(text(), 32), shelf.look(text(), 36), looked_at(storage)
    shelf.look(text(), 38)
    assert list(shelf._there) == [text().folder(36), text().folder(38)]
    assert [place.block for place in shelf.way(text(39 * BLOCK))] == [32, 36, 38]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_deepest_that_fits_is_found_first(seed: int) -> None:
    draw, storage, there = drawn(seed)
    blocks = draw.randrange(1, 40)
    asked, above = text(blocks * BLOCK + 9), draw.choice((0, 0, 300, 2 * BLOCK, 255, 4 * BLOCK - 1))
    wrong = {position for positions in there.values() for position in positions if draw.random() < 0.2}
    bad = {state(position) for positions in there.values() for position in positions if draw.random() < 0.2}

    def fit(block: int) -> list[int]:
        found = there.get(block, ())
        return [
            position for position in found if position > above and position not in wrong and state(position) not in bad
        ]

    looked, way = passed(storage, blocks)
    expected = [position for block in way for position in fit(block)]
    named = {0, *(block for place in way for block in above_at(storage, place) if block <= blocks)} - {*way}
    for block in sorted(named, reverse=True):
        if block * BLOCK + BLOCK - 1 > above and len(looked) < 10:
            if any(position >= block * BLOCK for position in expected):
                continue  # nothing deeper can be there
            looked.append(block)
            expected += fit(block)
    shelf = Shelf(storage)
    found, doubtful = shelf.find(asked, lambda unit: unit.position not in wrong, above, bad.__contains__)
    positions = [unit.position for unit in found]
    assert positions == sorted(positions, reverse=True)
    assert positions[:1] == sorted(expected, reverse=True)[:1]
    assert {*positions} >= {position for block in way for position in fit(block)}
    assert {*positions} <= {position for block in {*way, *named} for position in fit(block)}
    assert looked_at(storage) == looked and len(looked) == shelf.looks <= 10
    assert doubtful == bool(way and max((position // BLOCK for position in positions), default=-1) < way[-1])


def test_at_one_position_the_end_of_a_prompt_comes_first() -> None:
    storage = Memory()
    filed(storage, 300, 1), filed(storage, 300, 2, final=True), filed(storage, 299, 3, final=True)
    found, doubtful = Shelf(storage).find(text(512), lambda unit: True, 0, lambda name: False)
    assert [(unit.position, unit.final) for unit in found] == [(300, True), (300, False), (299, True)]
    assert not doubtful


def test_the_last_position_of_a_place_is_deeper_than_the_one_before() -> None:
    storage = Memory()
    filed(storage, 511), filed(storage, 255)
    for above, deeper in ((510, [511]), (511, []), (254, [511, 255]), (255, [511])):
        found, _ = Shelf(storage).find(text(600), lambda unit: True, above, lambda name: False)
        assert [unit.position for unit in found] == (deeper if above > 255 else [511])


def test_only_so_many_places_are_looked_at_for_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Memory()
    for block in range(1, 33):
        storage.put(text().note(32, block), b"")
    shelf = Shelf(storage)
    for _ in range(2):  # how many others were looked at before does not count
        before = shelf.looks
        assert shelf.find(text(), lambda unit: True, 0, lambda name: False) == ([], True)
        assert shelf.looks - before == 10
    assert len(looked_at(storage)) == 20
    monkeypatch.setattr(module, "MOST_LOOKS", 1)
    assert Shelf(storage).find(text(), lambda unit: True, 0, lambda name: False)[0] == []
    assert len(looked_at(storage)) == 7, "of a text of forty blocks, whose digits are six"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_unit_leaves_its_traces_and_what_lies_above_is_named(seed: int) -> None:
    draw, storage, there = drawn(seed)
    position = draw.randrange(BLOCK // 2, 40 * BLOCK)
    block, shelf, asked = position // BLOCK, Shelf(storage), text(draw.choice((position, len(IDS))))
    filed(storage, position, 999)
    already = shelf.way(asked)
    before = {*storage.files}
    with_units = {place.block for place in already if place.units} | {block}
    with_units |= {above for place in already for above in place.above}
    expected: set[str] = set()
    for at in sorted({*traces(block)} | {place.block for place in already if place.block > block}):
        with_units |= above_at(storage, at) | ({at} if there.get(at) or at == block else set())
        expected |= {text().note(at)} if at != block else set()
        expected |= {text().note(at, item) for item in sorted(item for item in with_units if item < at)[-MOST_ABOVE:]}
    storage.calls.clear()
    made = shelf.post(asked if len(asked.tokens) == len(IDS) else text(), Lineage([position]), already)
    assert {*storage.files} - before == expected - before and made == len(expected - before)
    assert len(storage.asked("put")) == made, "what is there is not written again"
    assert {*looked_at(storage)}.isdisjoint(place.block for place in already)
    assert all(storage.files[name][0] == b"" for name in expected - before)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_survey_names_the_deepest_that_a_search_may_be_led_past(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, storage, there = drawn(seed)
    most = draw.choice((3, 8, 1000))
    monkeypatch.setattr(module, "_MOST_SURVEYED", most)
    shelf = Shelf(storage)
    way = passed(storage, 40)[1]
    before = {*storage.files}
    reachable = [
        block
        for block in range(1, 41)
        if way and block <= way[-1] and all(names_at(storage, at) for at in traces(block)[:-1])
    ]
    shelf.survey(text())
    looked = looked_at(storage)[len(passed(storage, 40)[0]) :]
    assert len(looked) == len({*looked}) == min(most, len(reachable)) and {*looked} <= {*reachable}
    found = {block for block in looked if there.get(block)}.union(*(above_at(storage, block) for block in looked))
    expected = (
        {text().note(way[-1], item) for item in sorted(item for item in found if item < way[-1])[-MOST_ABOVE:]}
        if way
        else set()
    )
    assert {*storage.files} - before == expected - before and len(storage.asked("put")) >= len(expected - before)


def test_a_text_is_surveyed_every_ten_minutes_at_most(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Memory()
    shelf = Shelf(storage)
    shelf.survey(text())
    assert looked_at(storage) == [32, 16, 8, 4, 2, 1], "nothing is there"
    for block in (4, 6, 8):
        storage.put(text().note(block), b"")

    def surveyed(tokens: int) -> bool:
        clock.now += 31  # nothing is remembered of the way
        shelf.survey(text(tokens))
        return 1 in looked_at(storage)[4:]

    assert surveyed(10 * BLOCK)
    clock.now += 560
    assert not surveyed(10 * BLOCK), "591 seconds later"
    assert surveyed(7 * BLOCK), "another place"
    clock.now += 10
    assert surveyed(10 * BLOCK)
    monkeypatch.setattr(module, "_MOST_KNOWN", 1)
    assert surveyed(5 * BLOCK)
    assert list(shelf._surveyed) == [text().folder(4)]


def test_what_is_remembered_is_changed_by_one_thread_at_a_time() -> None:
    storage, lock = Memory(), NotedLock()
    storage.put(text().note(4), b"")
    shelf = Shelf(storage)
    assert isinstance(shelf._there, OrderedDict)
    shelf._lock, shelf._there, shelf._surveyed = lock, lock.guards(OrderedDict()), lock.guards(OrderedDict())  # type: ignore[assignment]
    shelf.survey(text())
    assert list(shelf._there) == [text().folder(4)] == list(shelf._surveyed)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "final"), [(1, False), (255, True), (256, False), (511, True), (2560, False)])
def test_a_name_says_what_is_filed(position: int, final: bool) -> None:
    asked, lineage = text(), Lineage([position])
    name = asked.name(lineage, final, state(5))
    block = position // BLOCK
    assert name.startswith(f"{asked.root}/at/{asked.digest(block * BLOCK)}/") and addresses.is_unit(name)
    said = Filed(name, position, final, asked.digest(position)[:16], asked.lineage(lineage), 77)
    assert read_place(block, {name: 77}).units == (said,) and said.state == addresses.file_of(name) == state(5)
    assert addresses.file_of("a/b/kv-1") == "kv-1" and not addresses.is_note(name)


def test_names_of_others_are_nothing() -> None:
    folder, name = text().folder(3), text().name(Lineage([3 * BLOCK + 9]), False, state(5))
    own = name.rpartition("/")[2]
    note, above = text().note(3), text().note(3, 17)
    right = {name: 5, note: 0, above: 0}
    wrong = [
        f"{folder}/256{own[3:]}", f"{folder}/999{own[3:]}", f"{folder}/x{own}", f"{name}.tmp", own.replace("c-", "d-"),
        name.replace("state-", "state-0", 1), f"{name[:-13]}0.safetensors", note.replace("here", "there"),
        text().note(4), f"{folder}/{text().note(4, 9).rpartition('/')[2]}", above.replace("17", "18"), f"{note}0",
    ]  # fmt: skip
    found = read_place(3, {**dict.fromkeys(wrong, 1), **right})
    assert [unit.name for unit in found.units] == [name] and found.above == {17}
    assert found.block == 3 and found.names == {*wrong, *right}
    assert [each for each in [*right, *wrong] if addresses.is_note(each)] == [note, above, text().note(4)]
    odd = {each for each in wrong if addresses.is_unit(each)}
    assert odd == set(wrong[:2]) and addresses.is_unit(name)


GOLDEN = [
    "d29372610860",
    "15ac7cb0d9d1",
    "bcdb03694da2",
    "ee1f2a63d196",
    "7192d83e3636",
    "8e6b7d132861",
    "0860/kv/kv-1",
    "a514fadb8c58",
]


def test_names_stay_as_they_are() -> None:
    """What others have stored is found by them, also by the next version."""
    asked = Text(Seal("a secret of sixteen bytes"), "space", np.arange(700, dtype=np.int32))
    found = [asked.root, asked.digest(0), asked.digest(512), asked.lineage(Lineage([64, 512])), asked.note(2)]
    found += [asked.note(1, 0), asked.kv("kv-1"), addresses.namespace_folder(Seal(), "\ud800tenant")]
    assert [each[-12:] for each in found] == GOLDEN
    assert asked.kv("kv-1") == f"{asked.root}/kv/kv-1" and asked.blocks == 2
    others = [Text(Seal(), "space", asked.tokens), Text(Seal("a secret of sixteen bytes"), "other", asked.tokens)]
    assert len({each.root for each in [asked, *others]}) == len({each.digest(256) for each in [asked, *others]}) == 3
