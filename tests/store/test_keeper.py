"""What the keeper of a shared store deletes and what it leaves, file by file, with ages that are set."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sharing import files_in, prompt, serve, written

from hf_sparse_cache.store import keeper
from hf_sparse_cache.store.keeper import DAY, GRACE_SECONDS, LEASE_SECONDS, Keeper
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.storage import Folder, ListedFile
from hf_sparse_cache.store.store import CheckpointStore


Joined = Callable[..., CheckpointStore]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at only now and then is looked at every time."""
    monkeypatch.setattr(keeper.random, "random", lambda: 0.0)


def aged(seconds: float, *paths: Path) -> None:
    then = time.time() - seconds
    for path in paths:
        os.utime(path, (then, then))


def fresh_keeper(root: Path, budget: int | None = None) -> Keeper:
    """One that has read nothing yet, as another process has."""
    return Keeper(Folder(root), Seal(None), budget)


def swept(root: Path, budget: int | None = None) -> Keeper:
    made = fresh_keeper(root, budget)
    made.sweep(time.monotonic())
    return made


@pytest.fixture
def root(joined: Joined, tmp_path: Path) -> Path:
    """A shared store with two texts that have nothing in common, of one unit each."""
    store = joined()
    for first in (1, 2):
        serve(store, prompt(first, 1000), (768,))
    assert written(store)["written"] == 2
    store.close()
    return tmp_path / "shared"


def kinds(root: Path) -> dict[str, list[Path]]:
    found = files_in(root)
    return {
        "state": [path for path in found if "-state-" in path.name],
        "kv": [path for path in found if path.parent.name == "kv"],
        "note": [path for path in found if path.name.startswith(("here-", "above-"))],
        "lease": [path for path in found if path.parent.name == "leases"],
    }


def test_what_is_needed_stays_however_old(root: Path) -> None:
    before = kinds(root)
    aged(6 * DAY, *files_in(root))
    assert swept(root).deleted == 0
    after = kinds(root)
    assert all(set(before[kind]) <= set(after[kind]) for kind in before)


@pytest.mark.parametrize("old", [False, True])
def test_a_damaged_unit_goes_once_nobody_can_be_writing_it(root: Path, old: bool) -> None:
    unit, other = kinds(root)["state"]
    unit.write_bytes(b"not a unit")
    aged(GRACE_SECONDS + 60 if old else GRACE_SECONDS - 60, unit)
    swept(root)
    assert unit.exists() == (not old) and other.exists()


@pytest.mark.parametrize("kind", ["kv", "note"])
@pytest.mark.parametrize("old", [False, True])
def test_what_no_unit_needs_goes_after_a_while(root: Path, kind: str, old: bool) -> None:
    unit, other = kinds(root)["state"]
    unit.unlink()
    aged(GRACE_SECONDS + 60 if old else GRACE_SECONDS - 60, *files_in(root))
    before = len(kinds(root)[kind])
    assert before >= 2
    swept(root)
    left = kinds(root)[kind]
    assert other.exists() and len(left) == (before / 2 if old else before)


def test_nothing_goes_that_a_unit_may_need_which_cannot_be_read(root: Path, joined: Joined) -> None:
    """A unit of another key: what it needs cannot be known."""
    sealed = joined(key=b"k" * 32)
    serve(sealed, prompt(3, 1000), (768,))
    assert written(sealed)["written"] == 1
    aged(6 * DAY, *files_in(root))
    before = kinds(root)
    assert len(before["state"]) == 3
    swept(root)
    after = kinds(root)
    assert [after[kind] for kind in ("state", "kv", "note")] == [before[kind] for kind in ("state", "kv", "note")]


@pytest.mark.parametrize(("age", "left"), [(7 * DAY - 60, True), (7 * DAY + 60, False)])
@pytest.mark.parametrize("place", ["leases", "quarantine"])
def test_leases_and_what_was_put_aside_stay_a_week(root: Path, place: str, age: float, left: bool) -> None:
    if place == "leases":
        fresh_keeper(root).beat(0.0, soon=True)
        path = kinds(root)["lease"][0]
    else:
        unit = kinds(root)["state"][0]
        path = root / "quarantine" / unit.name
        path.parent.mkdir()
        unit.rename(path)
    aged(age, path)
    swept(root)
    assert path.exists() == left


@pytest.mark.parametrize(("age", "left"), [(GRACE_SECONDS - 60, True), (GRACE_SECONDS + 60, False)])
def test_what_a_killed_writer_left_half_written_goes_after_an_hour(
    root: Path, monkeypatch: pytest.MonkeyPatch, age: float, left: bool
) -> None:
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(os, "unlink", lambda *_, **__: None)  # as one who is killed has no time for
    with pytest.raises(KeyboardInterrupt):
        Folder(root).put("leases/some", b"half")
    monkeypatch.undo()
    monkeypatch.setattr(keeper.random, "random", lambda: 0.0)
    assert os.replace is replace
    (half,) = [path for path in files_in(root) if path.name.endswith(".tmp")]
    aged(age, half)
    swept(root)
    assert half.exists() == left


def test_the_unit_that_is_worth_least_goes_and_what_is_used_or_new_does_not(root: Path, joined: Joined) -> None:
    store = joined()
    for first in (3, 4):
        serve(store, prompt(first, 1000), (768,))
    written(store)
    oldest, older, in_use, new = kinds(root)["state"]
    aged(2000.0, *files_in(root))
    aged(3000.0, oldest)
    aged(9000.0, in_use)
    aged(0.0, new)
    reader = fresh_keeper(root)
    reader.uses(in_use.name[in_use.name.index("state-") :], time.monotonic())
    reader.beat(time.monotonic(), soon=True)
    total = sum(path.stat().st_size for path in files_in(root))
    swept(root, int(total / keeper.FULL) - 200)  # a little too much
    assert [path.exists() for path in (oldest, older, in_use, new)] == [False, True, True, True]
    aged(LEASE_SECONDS + 30, *kinds(root)["lease"])
    swept(root, 6_000)  # far too much: all goes that nobody uses
    assert [path.exists() for path in (older, in_use, new)] == [False, False, True]


def test_what_a_unit_is_worth() -> None:
    """Its tokens for each byte, its part of what others share among them, by uses, over the time since it was used."""

    def worth(
        modified: float = 0.0, last: float = 0.0, uses: int = 0, kv: tuple[str, ...] = (), sharing: int = 1
    ) -> float:
        entry = ListedFile("s/at/b/000c-0-0-state-1", 100, modified)
        files = {name: ListedFile(name, 300, 0.0) for name in ("one", "two")}
        census = keeper._Census(1000.0, kv=files, used={"000c-0-0-state-1": (last, uses)} if last or uses else {})
        return keeper._worth(entry, keeper._Needs(kv, tokens=50), census, dict.fromkeys(files, sharing))

    assert worth() == 50 / 100 / 1010
    assert worth(modified=400) == worth(last=400) == worth(modified=400, last=100) == 50 / 100 / 610
    assert worth(uses=3) == 4 * worth() and worth(modified=5000.0) == 50 / 100 / 10
    assert worth(kv=("one",)) == 50 / 400 / 1010 and worth(kv=("one", "two", "gone"), sharing=2) == 50 / 400 / 1010


@pytest.mark.parametrize(
    "said", [[True, 1], [0, True], ["0", 1], [0, "1"], [1e13, 1], [0, 1e300], [0], [0, 1, 2], None, 5]
)
def test_a_lease_that_somebody_wrote_says_nothing(root: Path, said: object) -> None:
    """It lies where leases lie and proves itself by its name, but what it says of one unit is no use of it."""
    unit = kinds(root)["state"][0]
    used = {unit.name[unit.name.index("state-") :]: said}
    fresh_keeper(root).beat(0.0, soon=True)
    lease = kinds(root)["lease"][0]
    aged(2 * DAY, *files_in(root))
    lease.write_text(json.dumps({"used": used}))
    swept(root, 10)
    assert not unit.exists()
    lease.write_text(json.dumps({"used": [used]}))
    swept(root, 10)


def test_a_keeper_says_what_it_uses_at_most_once_a_minute(tmp_path: Path) -> None:
    made = fresh_keeper(tmp_path)

    def said() -> bool:
        """Whether a lease was written since last asked."""
        found = list((tmp_path / "leases").glob("*")) if (tmp_path / "leases").exists() else []
        for path in found:
            path.unlink()
        return bool(found)

    made.beat(0.0)
    assert not said(), "nothing was used"
    made.uses("state-a", 1.0)
    made.beat(1.0)
    assert said()
    made.uses("state-b", 2.0)
    made.beat(60.0)
    assert not said(), "59 seconds later"
    made.beat(61.5)
    assert said()
    made.beat(200.0)
    assert not said(), "nothing new was used"


def test_a_budget_is_asked_before_each_file_and_never_exceeded(root: Path) -> None:
    total = sum(path.stat().st_size for path in files_in(root))
    made = fresh_keeper(root, total + 20_000)
    assert made.admits(8_000, 0.0) and made.admits(8_000, 0.0)
    (root / "leases").mkdir(exist_ok=True)
    assert not made.admits(int(keeper.EASED * (total + 20_000)) + 1, 0.0), "more than all that is left after easing"
    assert fresh_keeper(root, None).admits(10**15, 0.0)
