"""The shared store: what one process stored another resumes; nothing else is ever served, and nothing holds it up."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import sharing
from cutting import every
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_store import Blob
from sharing import begin, drained, failing, files_in, hanging, prompt, serve, slow, written

from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import addresses, ahead, files, keeper, shared
from hf_sparse_cache.store.addresses import Text, traces
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.shelf import MOST_LOOKS, Shelf
from hf_sparse_cache.store.store import CheckpointStore


Joined = Callable[..., CheckpointStore]
KEY = "a secret of more than sixteen bytes"


@pytest.mark.parametrize("where", [None, "memory://shared/one"])
@pytest.mark.parametrize(
    "options", [{}, {"key": KEY}, {"key": KEY, "encrypt": True}], ids=["plain", "keyed", "hidden"]
)
def test_what_one_stored_another_resumes(joined: Joined, where: Any, options: dict[str, Any]) -> None:
    where = where and f"{where}/{len(options)}"
    first, second = joined(where, **options), joined(where, **options)
    assert serve(first, prompt(1, 3000), (128, 1024, 2048)) == 0
    assert written(first)["written"] == 3
    assert serve(second, prompt(1, 3000, 2100)) == 2048
    assert serve(second, prompt(1, 3000, 1500, 7)) == 1024
    assert serve(joined(where, **options), prompt(1, 400, 250)) == 128
    assert second.shared is not None and second.shared.counts["resumed from"] == 2


class NeedsFolders(LocalFileSystem):
    """A storage, such as one over SFTP, in which a folder is made before a file is put there."""

    protocol = "folders"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("folders://")))


def test_folders_are_made_where_a_storage_needs_them(joined: Joined, tmp_path: Path) -> None:
    fsspec.register_implementation("folders", NeedsFolders, clobber=True)
    where = f"folders://{tmp_path / 'there'}"
    first = joined(where)
    assert serve(first, prompt(1, 1000), (512,)) == 0 and written(first)["written"] == 1
    assert serve(joined(where), prompt(1, 1000)) == 512


def test_what_comes_from_a_shared_store_lies_in_memory_also_beside_a_disk(joined: Joined, tmp_path: Path) -> None:
    serve(one := joined(), prompt(1, 700), (512,))
    written(one)
    other = joined(disk_dir=tmp_path / "disk", disk_memory="1GiB")
    assert serve(other, prompt(1, 700)) == 512
    assert [tier.ledger.checkpoint_count for tier in other.tiers] == [1, 0]


def test_a_twin_that_must_miss(joined: Joined) -> None:
    ids = prompt(1, 1200)
    first = joined(key=KEY)
    serve(first, ids, (960,), space="model\x1fone")
    written(first)
    off = [*ids[:959], ids[959] + 1, *ids[960:]]
    assert serve(joined(key=KEY), ids, space="model\x1fone") == 960
    assert serve(joined(key=KEY), off, space="model\x1fone") == 0
    assert serve(joined(key=KEY), ids, space="model\x1ftwo") == 0
    assert serve(joined(key=KEY), ids, space="other\x1fone") == 0
    assert serve(joined(), ids, space="model\x1fone") == 0
    assert serve(joined(key=KEY + "!"), ids, space="model\x1fone") == 0


def test_names_tell_nothing_of_namespace_or_tokens_without_the_key(joined: Joined, tmp_path: Path) -> None:
    serve(store := joined(key=KEY), prompt(1, 600), (512,), space="model\x1fsecret tenant")
    written(store)
    names = {part for path in files_in(tmp_path) for part in path.parts}
    ids = np.asarray(prompt(1, 600), dtype=np.int32)
    for seal, held in ((Seal(), False), (Seal("another key of 16 bytes"), False), (Seal(KEY), True)):
        text = Text(seal, "model\x1fsecret tenant", ids)
        assert (text.root in names) is (text.digest(512) in names) is held
        assert (addresses.namespace_folder(seal, "secret tenant").partition("/")[2] in names) is held


def test_bytes_are_stored_once(joined: Joined, tmp_path: Path) -> None:
    for options in ({}, {"key": KEY}, {"key": KEY, "encrypt": True}):
        where = tmp_path / str(len(options))
        serve(one := joined(where, **options), prompt(1, 1300), (512, 1024))
        written(one)
        sizes = {path: path.stat().st_size for path in files_in(where, "kv-")}
        serve(two := joined(where, **options), prompt(1, 1300), (512, 1024))  # resumes
        alone = joined(where, **options)
        assert alone.shared is not None
        alone.shared.reader = lambda data: Blob(0)  # it computes all by itself, and must arrive at the same
        alone.shared.tier.reader = None  # type: ignore[assignment]
        assert serve(alone, prompt(1, 1300), (512, 768, 1024)) == 0
        assert written(alone)["already there"] >= 2 and written(two)
        again = {path: path.stat().st_size for path in files_in(where, "kv-")}
        assert {path: size for path, size in again.items() if path in sizes} == sizes
        assert len(again) == len(sizes)
        assert len(files_in(where, "-state-")) == 3


def test_several_lineages_and_kept_ends_lie_at_one_position(joined: Joined, tmp_path: Path) -> None:
    ids = prompt(1, 700)
    for rule, position in ((every(64), 576), (every(96), 576), (every(192), 576)):
        with begin(store := joined(tmp_path / "one"), ids, rule=rule) as request:
            assert request.resumed_tokens == 0
            request.add(position, Blob(10, (1, position, str(rule))), lambda a, b: Blob(b - a, "kv"))
        written(store)
    with begin(store := joined(tmp_path / "one"), ids[:576]) as request:  # and as the end of a prompt
        request.add(576, Blob(10, "end"), lambda a, b: Blob(b - a, "kv"))
    written(store)
    assert len(files_in(tmp_path / "one", "-state-")) == 4
    for rule in (every(64), every(96), every(192)):
        with begin(joined(tmp_path / "one"), ids, rule=rule) as request:
            assert request.checkpoint is not None and request.resumed_tokens == 576
            assert request.checkpoint.state.label in ((1, 576, str(rule)), "end")
    with begin(joined(tmp_path / "one"), ids[:576]) as request:
        assert request.checkpoint is not None and request.checkpoint.state.label == "end"
        assert request.segments == []


# -- looking ----------------------------------------------------------------------------------------------------------


def test_opening_touches_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(shared=tmp_path / "never made")
    assert not (tmp_path / "never made").exists()
    store.close()
    assert not (tmp_path / "never made").exists()


def test_a_unit_leaves_a_trace_at_each_digit_of_its_block() -> None:
    assert traces(0) == [] and traces(1) == [1] and traces(35) == [32, 34, 35] and traces(390) == [256, 384, 388, 390]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(2, 12_000), st.integers(0, 12_000)), min_size=1, max_size=12),
    st.integers(0, 3),
    st.integers(4, 12_000),
    st.integers(0, 12_000),
)
def test_the_deepest_unit_is_found_with_few_looks(
    tmp_path_factory: pytest.TempPathFactory,
    units: list[tuple[int, int, int]],
    asked: int,
    length: int,
    shared_tokens: int,
) -> None:
    """Units filed in any order by writers that know nothing of each other; an oracle compares all tokens."""
    storage = sharing.storage_of(tmp_path_factory.mktemp("shelf"))
    filed: list[list[int]] = []
    for other, position, common in units:
        ids = prompt(1, position, min(common, position), other)
        text, shelf = Text(Seal(), "s", np.asarray(ids, np.int32)), Shelf(storage)
        lineage = Lineage([position])
        name = text.name(lineage, False, f"state-{'0' * 12}-{'0' * 32}.safetensors")
        digits = "0" * 32
        own = f"state-{addresses.files.own_tag(digits)[:12]}-{digits}.safetensors"
        storage.put(text.name(lineage, False, own), b"x")
        assert name != text.name(lineage, False, own)
        shelf.post(text, lineage, shelf.way(text))
        filed.append(ids)
    ids = prompt(1, length, min(shared_tokens, length), asked)
    best = max((len(unit) for unit in filed if len(unit) <= length - 2 and ids[: len(unit)] == unit), default=0)
    text = Text(Seal(), "s", np.asarray(ids, np.int32))

    def fits(unit: addresses.Filed) -> bool:
        return unit.position <= length - 2 and unit.tokens == text.digest(unit.position)[:16]

    shelf = Shelf(storage)
    found, doubtful = shelf.find(text, fits, 0, lambda name: False)
    assert shelf.looks <= MOST_LOOKS
    deepest = max((unit.position for unit in found), default=0)
    assert deepest <= best and (deepest == best or doubtful or best < length)
    if deepest // 256 != best // 256 and doubtful:
        shelf.survey(text)
        found, _ = Shelf(storage).find(text, fits, 0, lambda name: False)
        assert max((unit.position for unit in found), default=0) // 256 >= min(best, deepest) // 256


def test_a_prompt_of_a_hundred_thousand_tokens_takes_ten_looks_at_most(joined: Joined) -> None:
    ids = prompt(1, 100_000)
    for position in (512, 65_792, 99_968):
        serve(store := joined(), ids, (position,))
        written(store)
    for common, deepest in ((99_990, 99_968), (99_000, 65_792), (60_000, 512)):
        looker = joined()
        assert looker.shared is not None
        looked = looker.shared.tier.look(np.asarray(prompt(1, 100_000, common), np.int32), None, "", 0)
        assert looked is not None
        found, _ = looked
        assert found[0].position == deepest and looker.shared.tier.shelf.looks <= 10


def test_a_tail_that_is_to_be_computed_is_left(joined: Joined) -> None:
    """Where the logits of the last tokens are asked for, a unit among them is of no use."""
    ids = np.asarray(prompt(1, 1024), np.int32)
    with begin(store := joined(), ids.tolist()) as request:
        for position in (512, 960):
            request.add(position, Blob(10, position), lambda a, b: Blob(b - a, "kv"))
        request.add(1024, Blob(10, "end"), lambda a, b: Blob(b - a, "kv"))
    written(store)
    other = joined()
    assert other.shared is not None
    for tail, deepest in ((1, 1024), (2, 960), (64, 960), (65, 512), (512, 512), (513, 0)):
        found = other.shared.resume(ids, None, "", 0, tail)
        assert (0 if found is None else found.filed.position) == deepest, tail
        again = joined()
        again.leave(visit := again.open(ids, replace(every(64), tail=tail)))
        assert visit.prompt.resumed == deepest, tail


def test_planning_asks_nothing_of_the_shared_store(joined: Joined) -> None:
    """Rows and threads are planned with what is here; each prompt looks there when it is opened."""
    ids = prompt(1, 1300)
    serve(first := joined(), ids, (1024,))
    written(first)
    calls: list[str] = []
    store = joined(rule=lambda verb, name: calls.append(verb))
    assert store.foretell(np.asarray(ids, np.int32), every(64)).stored == 0 and calls == []
    assert serve(store, ids) == 1024 and calls


# -- what is damaged --------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)


DAMAGE: list[Callable[[Path], None]] = [
    flip,
    flip_header,
    lambda path: path.write_bytes(path.read_bytes()[:-3]),
    lambda path: path.write_bytes(b""),
    Path.unlink,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=["flipped", "flipped header", "cut short", "emptied", "deleted"])
@pytest.mark.parametrize("kind", ["-state-", "kv-"])
def test_what_is_damaged_is_put_aside_and_never_served(
    joined: Joined, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    written(store)
    root = tmp_path / "shared"
    for path in files_in(root, kind):
        damage(path)
    other = joined()
    assert serve(other, prompt(1, 1300)) == 0
    counts = written(other)
    gone = damage is Path.unlink and kind == "-state-"
    assert gone or any(what.startswith("put aside") for what in counts), counts
    assert gone or kind == "kv-" or files_in(root, kind) == []
    if not gone:
        reasons = list((root / "quarantine").glob("*.reason"))
        assert reasons and all(path.read_text() for path in reasons)
        assert any("put aside" in what for what in counts)
        told = other.shared.reach(np.asarray(prompt(1, 1300), np.int32), None, "", 0)[1]  # type: ignore[union-attr]
        assert "put aside" in told
    assert serve(joined(), prompt(1, 1300), (512, 1024)) == 0
    third = joined()
    serve(third, prompt(1, 1300), (512, 1024))
    written(third)
    assert serve(joined(), prompt(1, 1300)) == 1024


@pytest.mark.parametrize("kind", ["-state-", "kv-"])
def test_files_that_are_mostly_a_hole_are_put_aside_unread(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They take no room and no time to make, and all of the memory to read."""
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    written(store)
    for path in files_in(tmp_path / "shared", kind):
        os.truncate(path, 2**40)
    monkeypatch.setattr(shared, "_MOST_ASIDE_BYTES", 2**16)
    monkeypatch.setattr(shared.UnitReader, "most", lambda *_: 2**16)  # as a model's layers bound it
    other = joined()
    assert serve(other, prompt(1, 1300), (512, 1024)) == 0
    counts = written(other)
    assert any(what.startswith("put aside: it has more than") for what in counts)
    assert not any("Memory" in what for what in counts) and counts["written"]
    assert all(path.stat().st_size < 2**17 for path in (tmp_path / "shared").rglob("*"))
    assert serve(joined(), prompt(1, 1300)) == 1024


PLACES = ["", "at", "kv", "leases", "about", "quarantine"]


@pytest.mark.parametrize("what", ["a link", "a file", "a pipe"])
@pytest.mark.parametrize("place", PLACES)
def test_what_stands_for_a_folder_is_not_written_through(
    joined: Joined, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, what: str
) -> None:
    """A link inside the store may lead to anything; what lies behind it would not even be counted."""
    root, mine = tmp_path / "shared", tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    space = Text(Seal(), "", np.zeros(1, np.int32)).root
    path = root / (place if place in PLACES[3:] else f"{space}/{place}".rstrip("/"))
    path.parent.mkdir(parents=True)
    if what == "a link":
        path.symlink_to(mine)
    elif what == "a file":
        path.write_text("mine")
    else:
        os.mkfifo(path)
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    serve(store, prompt(1, 1300), (512, 1024), space="another")
    counts = written(store)
    assert [entry.name for entry in mine.iterdir()] == ["notes"] and os.path.lexists(path)
    assert "not written: the storage failed lately" not in counts
    assert serve(joined(), prompt(1, 1300), space="another") == 1024, "one place is not the whole store"
    assert serve(joined(), prompt(1, 1300)) == (1024 if place in PLACES[3:] else 0)
    if place not in ("leases", "quarantine"):  # named when something is to be written there
        assert str(path) in caplog.text and what in caplog.text


# -- what is read ahead -----------------------------------------------------------------------------------------------


def test_nothing_leaves_before_it_is_proved(joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are unpacked while they are proved; what is made of them waits for the last proof."""
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    written(store)
    proof, release = threading.Event(), threading.Event()
    prove = files.prove

    def late(path: Path, data: Any, seal: Seal, *checksum: str) -> None:
        if path.name.startswith("kv-"):
            proof.set()
            assert release.wait(60)
        prove(path, data, seal, *checksum)

    monkeypatch.setattr(ahead.files, "prove", late)
    resumed: list[int] = []
    other = joined()
    thread = threading.Thread(target=lambda: resumed.append(serve(other, prompt(1, 1300))))
    thread.start()
    assert proof.wait(60)
    thread.join(0.2)
    assert thread.is_alive() and not resumed and len(other) == 0
    release.set()
    thread.join(60)
    assert resumed == [1024]


@pytest.mark.parametrize("options", [{}, {"key": KEY}, {"key": KEY, "encrypt": True}], ids=["plain", "key", "hidden"])
def test_with_a_key_nothing_is_looked_at_before_it_is_proved(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    serve(store := joined(**options), prompt(1, 1300), (512, 1024))
    written(store)
    proved: list[bytes] = []
    early: list[bytes] = []
    prove, unsealed = files.prove, files.unsealed

    def slowly(path: Path, data: Any, seal: Seal, *checksum: str) -> None:
        time.sleep(0.3 if path.name.startswith("kv-") else 0.0)
        prove(path, data, seal, *checksum)
        proved.append(bytes(data))

    def looked(data: Any, seal: Seal, most: int | None, *there: Any) -> Any:
        early.extend([] if bytes(data) in proved else [bytes(data)])
        return unsealed(data, seal, most, *there)

    monkeypatch.setattr(ahead.files, "prove", slowly)
    monkeypatch.setattr(ahead.files, "unsealed", looked)
    assert serve(joined(**options), prompt(1, 1300)) == 1024
    assert bool(early) is not bool(options), "without a key, the time of proving is used"


def test_the_reason_is_that_it_is_not_proved_whatever_else_is_wrong(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    written(store)
    for path in files_in(tmp_path / "shared", "kv-"):
        flip_header(path)
    other = joined()
    assert serve(other, prompt(1, 1300)) == 0
    counts = written(other)
    assert any("does not match its checksum" in what for what in counts if "put aside" in what), counts


def test_whatever_fails_on_what_is_not_proved_is_no_error(joined: Joined, tmp_path: Path) -> None:
    """Other than all else that is read here, a payload's maker may know nothing of files that anybody has written."""
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    written(store)
    for path in files_in(tmp_path / "shared", "kv-"):
        flip(path)
    other = joined()

    def brittle(data: Any) -> Blob:
        return Blob.from_bytes(data) if b"position" in bytes(data) else Blob(1 // 0)

    other.read_with(brittle)
    assert serve(other, prompt(1, 1300)) == 0
    assert any("checksum" in what for what in written(other))
    serve(third := joined(), prompt(1, 1300), (512, 1024))
    written(third)
    other.read_with(lambda data: 1 // 0)  # of what is proved it is one
    with pytest.raises(ZeroDivisionError):
        serve(other, prompt(1, 1300))


def test_the_twin_whose_proof_is_skipped_is_served_what_is_damaged(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(store := joined(), prompt(1, 1300), (512, 1024))
    written(store)
    for path in files_in(tmp_path / "shared", "kv-"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")  # in the last number of a payload
    monkeypatch.setattr(ahead.files, "prove", lambda path, data, seal, *checksum: None)
    assert serve(joined(), prompt(1, 1300)) == 1024
    monkeypatch.undo()
    assert serve(joined(), prompt(1, 1300)) == 0


@pytest.mark.parametrize("kind", ["-state-", "kv-"])
def test_what_was_written_anew_is_not_put_aside(joined: Joined, tmp_path: Path, kind: str) -> None:
    """One that comes late with its finding, as another has mended it meanwhile, takes nothing away."""
    ids = prompt(1, 1300)
    serve(store := joined(), ids, (512, 1024))
    written(store)
    late = joined()
    chores: list[Callable[[], None]] = []
    late.shared.tier.chores = chores.append  # type: ignore[union-attr]
    for path in files_in(tmp_path / "shared", kind):
        flip(path)
    assert serve(late, ids) == 0 and chores
    serve(second := joined(), ids, (512, 1024))
    assert any("put aside" in what for what in written(second))
    assert serve(joined(), ids) == 1024
    for chore in chores:
        chore()
    assert serve(joined(), ids) == 1024
    assert serve(late, ids) == 1024, "what was refused once is used when it is whole again"


def test_what_was_put_aside_and_written_anew_is_used(joined: Joined, tmp_path: Path) -> None:
    ids = prompt(1, 1300)
    serve(store := joined(), ids, (512, 1024))
    written(store)
    for path in files_in(tmp_path / "shared", "-state-"):
        flip(path)
    finder = joined()
    assert serve(finder, ids) == 0 and written(finder)
    serve(second := joined(), ids, (512, 1024))
    written(second)
    assert serve(finder, ids) == 1024


@pytest.mark.parametrize("what", ["another prompt's state", "another prompt's keys and values"])
def test_a_whole_file_under_another_name_is_refused(joined: Joined, tmp_path: Path, what: str) -> None:
    serve(store := joined(), prompt(1, 700), (512,))
    serve(store, prompt(2, 700), (512,))
    written(store)
    kind = "-state-" if "state" in what else "kv-"
    pair = files_in(tmp_path / "shared", kind)
    one, two = (pair[0], pair[1]) if kind == "-state-" else (pair[0], pair[-1])
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    if kind == "-state-":  # whole and under a name that is right for its bytes, in the place of another prompt
        first, second = (path.name.partition("-state-")[2] for path in (one, two))
        one.rename(one.with_name(one.name.replace(first, second)))
        two.rename(two.with_name(two.name.replace(second, first)))
    resumed = [serve(joined(), prompt(first, 700)) for first in (1, 2)]
    assert 0 in resumed and (kind == "kv-" or resumed == [0, 0])


def test_a_store_with_a_key_cannot_be_poisoned(joined: Joined, tmp_path: Path) -> None:
    """Whoever has no key writes a whole file of his own in the place of one that has a right name."""
    serve(good := joined(key=KEY), prompt(1, 700), (512,))
    serve(bad := joined(tmp_path / "bad"), [1, *range(100, 799)], (512,))
    written(good), written(bad)
    (ours,) = files_in(tmp_path / "shared", "-state-")
    (theirs,) = files_in(tmp_path / "bad", "-state-")
    ours.write_bytes(theirs.read_bytes())
    assert serve(joined(key=KEY), prompt(1, 700)) == 0


# -- storage that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("verbs", [("list",), ("read",), ("put",), ("list", "read", "put", "size", "walk", "remove")])
def test_failing_storage_costs_no_request(joined: Joined, code: int, verbs: tuple[str, ...]) -> None:
    serve(first := joined(), prompt(1, 1300), (1024,))
    written(first)
    store = joined(rule=failing(code, *verbs))
    started = time.monotonic()
    assert serve(store, prompt(1, 1300), (512, 1280)) == (1024 if verbs == ("put",) else 0)
    assert serve(store, prompt(2, 1300), (512,)) == 0
    counts = written(store)
    assert time.monotonic() - started < 20
    assert any(errno.errorcode[code] in what or "failed" in what for what in counts), counts
    told = store.shared.reach(np.asarray(prompt(3, 1300), np.int32), None, "", 0)[1]  # type: ignore[union-attr]
    assert "lately" in told
    assert serve(joined(), prompt(1, 1300)) in (1024, 1280)  # nothing of others was harmed


@pytest.mark.parametrize("verbs", [("list",), ("read",), ("put",)])
def test_storage_that_hangs_is_not_waited_for(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, verbs: tuple[str, ...]
) -> None:
    monkeypatch.setattr(shared, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(shared, "READ_SECONDS", 0.2)
    monkeypatch.setattr(shared, "FIRST", 1)
    monkeypatch.setattr("hf_sparse_cache.store.behind._STALLED_SECONDS", 0.3)
    serve(first := joined(), prompt(1, 1300), (1024,))
    written(first)
    rule, release = hanging(*verbs)
    store = joined(rule=rule)
    started = time.monotonic()
    for first_token in (1, 2, 3, 4):
        assert serve(store, prompt(first_token, 1300), (512,)) == (
            1024 if verbs == ("put",) and first_token == 1 else 0
        )
    assert time.monotonic() - started < 20
    store.flush()  # says that it did not get on
    assert time.monotonic() - started < 30
    counts = store.shared.counts  # type: ignore[union-attr]
    assert verbs == ("put",) or any("took too long" in what for what in counts), counts
    release.set()


def test_slow_storage_that_works_is_used(joined: Joined) -> None:
    serve(first := joined(), prompt(1, 1300), (1024,))
    written(first)
    assert serve(joined(rule=slow(0.02)), prompt(1, 1300)) == 1024


def test_a_folder_that_another_process_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place whose last file is deleted goes, also when another process is about to write there."""
    storage, left = sharing.Folder(tmp_path), [3]
    made = storage._made

    def removed(folder: Path) -> None:
        made(folder)
        if left[0]:
            left[0] -= 1
            folder.rmdir()

    monkeypatch.setattr(storage, "_made", removed)
    storage.put("a/b", b"x")
    assert storage.read("a/b") == b"x" and left == [0]
    left[0] = 100
    with pytest.raises(FileNotFoundError):
        storage.put("c/d", b"x")


@pytest.mark.parametrize("size", [2**22 - 1, 2**22, 2**22 + 3])
def test_large_files_are_read_as_small_ones_are(tmp_path: Path, size: int) -> None:
    storage, data = sharing.Folder(tmp_path), np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    storage.put("a", data)
    assert storage.read("a") == data and storage.read("a", 0, size + 1) == data
    assert storage.read("a", 7, size - 5) == data[7 : size - 5] and storage.read("a", 0, 2) == data[:2]
    assert storage.read("a", size) == storage.read("a", size + 2, size + 9) == b""


def test_a_folder_that_vanishes_and_comes_back(joined: Joined, tmp_path: Path) -> None:
    serve(first := joined(), prompt(1, 1300), (1024,))
    written(first)
    os.rename(tmp_path / "shared", tmp_path / "away")
    store = joined()
    assert serve(store, prompt(1, 1300)) == 0
    os.rename(tmp_path / "away", tmp_path / "shared")
    assert serve(store, prompt(1, 1300)) == 1024


def test_too_many_that_wait_are_left_out_and_counted(joined: Joined) -> None:
    rule, release = hanging("put")
    store = joined(rule=rule)
    for first in range(80):
        serve(store, prompt(first, 300), (256,))
    assert store.shared is not None and store.shared.counts["not written: too many wait"] >= 10
    release.set()
    drained(store)
    assert 0 < store.shared.counts["written"] < 80
    assert written(store)["written"] == 80  # what was left out is written when it is asked for


def test_a_flush_that_does_not_get_on_ends_and_says_so(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_sparse_cache.store.behind._STALLED_SECONDS", 0.3)
    rule, release = hanging("put")
    store = joined(rule=rule)
    serve(store, prompt(1, 300), (256,))
    store.flush()
    assert "took not all that was to be written" in caplog.text
    release.set()
    written(store)
    caplog.clear()
    store.flush()  # the twin
    assert "took not all" not in caplog.text


def test_what_waits_keeps_no_state_alive(joined: Joined) -> None:
    rule, release = hanging("put", "size")
    writing = threading.Event()

    def noted(verb: str, name: str) -> None:
        if verb in ("put", "size"):
            writing.set()
        rule(verb, name)

    store = joined(rule=noted, max_memory=10 + 256 * sharing.KV)
    serve(store, prompt(0, 300), (256,))
    assert writing.wait(60)  # the first is bytes by now, and no longer pinned
    for first in range(1, 10):
        serve(store, prompt(first, 300), (256,))  # each drives the one before it out
    release.set()
    counts = written(store)
    assert counts["not written: evicted before its turn"] == 8


# -- the budget -------------------------------------------------------------------------------------------------------


def total(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_the_budget_holds(joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "GRACE_SECONDS", 0.0)
    budget = 120_000
    stores = [joined(shared_memory=budget) for _ in range(3)]
    for first in range(60):
        serve(stores[first % 3], prompt(first, 700), (512,))
        drained(stores[first % 3])
        assert total(tmp_path / "shared") <= budget * 1.05
    assert sum(store.shared.tier.keeper.deleted for store in stores if store.shared) > 20
    assert [serve(joined(), prompt(first, 700)) for first in (58, 59)] == [512, 512]


@pytest.mark.parametrize("harm", ["emptied", "unreadable now and then", "gone when it is looked at"])
def test_room_is_made_among_files_that_are_not_whole(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(keeper, "FRESH_SECONDS", 1e-9)
    monkeypatch.setattr(keeper, "GRACE_SECONDS", 0.0)
    budget, reads = 60_000, [0]

    def rule(verb: str, name: str) -> None:
        reads[0] += verb == "read" and "/at/" in name
        if harm != "emptied" and verb == "read" and "/at/" in name and reads[0] % 2:
            raise OSError(errno.EIO, name) if "readable" in harm else FileNotFoundError(name)

    stores = [joined(shared_memory=budget, rule=None if harm == "emptied" else rule) for _ in range(2)]
    for first in range(60):
        store = stores[first > 30]  # the second has never seen those files whole
        units = [path for path in files_in(tmp_path / "shared") if "at" in path.parts]
        if harm == "emptied" and first % 2 and units:
            units[-1].write_bytes(b"")
        serve(store, prompt(first, 700), (512,))
        drained(store)
        assert total(tmp_path / "shared") <= budget * 1.05
    assert sum(store.shared.tier.keeper.deleted for store in stores if store.shared) > 5
    named = [what for store in stores if store.shared for what in store.shared.counts if "failed: writing" in what]
    assert not [what for what in named if "OSError" not in what], named


def test_what_others_use_is_not_deleted_under_them(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "GRACE_SECONDS", 0.0)
    budget = 120_000
    writer, reader = joined(shared_memory=budget), joined(shared_memory=budget)
    serve(writer, prompt(0, 700), (512,))
    written(writer)
    assert serve(reader, prompt(0, 700)) == 512
    reader.shared.tier.keeper.beat(time.monotonic(), soon=True)  # type: ignore[union-attr]
    for first in range(1, 40):
        serve(writer, prompt(first, 700), (512,))
        drained(writer)
    assert serve(joined(), prompt(0, 700)) == 512
    assert serve(joined(), prompt(1, 700)) == 0


def test_leases_of_those_that_are_gone_take_little_of_the_budget(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, root = 100_000, tmp_path / "shared"
    old = time.time() - 3600
    for index in range(100):
        store = joined()
        assert store.shared is not None
        for used in range(20):
            store.shared.tier.keeper.uses(f"state-{index}-{used}", time.monotonic())
        store.shared.tier.keeper.beat(time.monotonic(), soon=True)
    leases = files_in(root / "leases")
    assert len(leases) == 100 and sum(path.stat().st_size for path in leases) > budget / 3
    for path in leases[10:]:
        os.utime(path, (old, old))
    serve(last := joined(shared_memory=budget), prompt(1, 700), (512,))
    assert written(last)["written"] == 1
    left = files_in(root / "leases")
    assert set(leases[:10]) < set(left), "those that are in use stay"
    assert sum(path.stat().st_size for path in left if path not in leases[:10]) <= budget / 20
    assert serve(joined(), prompt(1, 700)) == 512


def test_what_killed_writers_leave_goes_and_is_never_served(
    joined: Joined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    root = tmp_path / "shared"
    for left in range(12):
        calls = iter(range(10**6))

        def rule(verb: str, name: str, calls: Any = calls, left: int = left) -> None:
            if verb == "put" and next(calls) >= left:
                raise Killed

        monkeypatch.setattr("threading.excepthook", lambda args: None)
        store = joined(rule=rule)
        serve(store, prompt(left, 1300), (512, 1024))
        time.sleep(0.05)
    beside = root / "notes.txt"
    beside.write_text("mine")
    mine = next(path for path in root.iterdir() if len(path.name) == 32) / "kv" / "mine.safetensors"
    mine.write_bytes(b"mine")
    for left in range(12):
        assert serve(joined(), prompt(left, 1300)) in (0, 512, 1024)
    monkeypatch.setattr(keeper, "GRACE_SECONDS", -1.0)
    monkeypatch.setattr(keeper.random, "random", lambda: 0.0)
    last = joined()
    serve(last, prompt(99, 1300), (512,))
    written(last)
    last.shared.tier.keeper.sweep(time.monotonic())  # type: ignore[union-attr]
    needed = set()
    for path in files_in(root, "-state-"):
        record, _ = sharing.peek(path)
        needed |= {name for *_, name in record["kv"]}
    assert {path.name for path in files_in(root, "kv-")} == needed
    assert beside.read_text() == "mine" and mine.read_bytes() == b"mine"


# -- life -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_reads_and_writes_with_threads_of_its_own(joined: Joined) -> None:
    store = joined()
    serve(store, prompt(1, 1300), (1024,))
    written(store)
    child = os.fork()
    if child == 0:
        try:
            fine = serve(store, prompt(1, 1300)) == 1024 and serve(store, prompt(2, 1300), (512,)) == 0
            written(store)
            os._exit(0 if fine else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert serve(joined(), prompt(2, 1300)) == 512
    assert serve(store, prompt(3, 1300), (512,)) == 0


def test_closing_writes_what_waits_and_then_nothing(joined: Joined) -> None:
    store = joined()
    serve(store, prompt(1, 1300), (1024,))
    shared = store.shared
    assert shared is not None
    with mock.patch.object(shared, "close", side_effect=shared.close) as closed:
        store.close()
    assert closed.called and store.shared is None
    assert serve(joined(), prompt(1, 1300)) == 1024
    assert serve(store, prompt(2, 1300), (512,)) == 0
    store.flush()
    assert serve(joined(), prompt(2, 1300)) == 0


@pytest.mark.parametrize("bad", ["", "nosuchthing://x", 7, "  "])
def test_bad_places_are_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="shared"):
        CheckpointStore(shared=bad)
    with pytest.raises(ValueError, match="shared_memory"):
        CheckpointStore(shared="/tmp/x", shared_memory="much")


def test_an_idle_writer_says_what_its_process_uses(joined: Joined, tmp_path: Path) -> None:
    serve(store := joined(), prompt(1, 1300), (1024,))
    written(store)
    reader = joined()
    assert serve(reader, prompt(1, 1300)) == 1024 and reader.shared is not None

    def told() -> bool:
        leases = [json.loads(path.read_bytes()) for path in (tmp_path / "shared" / "leases").iterdir()]
        return any("state-" in name for lease in leases for name in lease.get("used", {}))

    until = time.monotonic() + 60
    while not told() and time.monotonic() < until:
        drained(reader)
        time.sleep(0.05)
    assert told()


def test_a_storage_that_answers_again_is_trusted_as_before(joined: Joined) -> None:
    serve(store := joined(), prompt(1, 1300), (1024,))
    written(store)
    reader = joined()
    assert reader.shared is not None
    trust = reader.shared.tier.trust
    trust.broken("once")
    trust._until = 0.0  # its pause is over
    assert trust.reason and serve(reader, prompt(1, 1300)) == 1024
    drained(reader)
    assert trust.holds and not trust.reason
