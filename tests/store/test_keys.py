"""A key authenticates every file and the manifest, and encrypts them when asked to; it is seen nowhere."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from disks import UNIT, disk_of, files_of, serve
from forging import Saved
from persisting import cold_logits, handle, logits, question
from reference_store import Blob
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, DamagedFileError, SparsePrefixCache
from hf_sparse_cache.store.seal import VARIABLE, Seal, _derived


KEY, OTHER = "correct horse battery staple", b"another key of sufficient length"
pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(params=[False, True], ids=["signed", "encrypted"])
def encrypt(request: pytest.FixtureRequest) -> bool:
    if request.param:
        pytest.importorskip("cryptography")
    return bool(request.param)


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    with handle(model) as cache:
        logits(model, question(2), cache)
        cache.mark(question(2)[:, :64])
        cache.save_pretrained(folder, **options)
    return folder


def resumed(model: PreTrainedModel, folder: Path, cold: torch.Tensor, **options: Any) -> int:
    with SparsePrefixCache.from_pretrained(folder, model, policy="none", **options) as cache:
        assert torch.equal(logits(model, question(3), cache), cold)
        assert cache.last_request is not None
        return cache.last_request.resumed_tokens


def test_a_save_is_read_with_its_key_alone(jamba: PreTrainedModel, tmp_path: Path, encrypt: bool) -> None:
    cold = cold_logits(jamba, question(3))
    folder = saved(jamba, tmp_path / "a", key=KEY, encrypt=encrypt)
    assert resumed(jamba, folder, cold, key=KEY) == resumed(jamba, folder, cold, key=KEY.encode()) == 96
    with pytest.raises(DamagedFileError, match=f"it was written with a key; give key=, or set {VARIABLE}"):
        SparsePrefixCache.from_pretrained(folder, jamba)
    with pytest.raises(DamagedFileError, match="written with another key"):
        SparsePrefixCache.from_pretrained(folder, jamba, key=OTHER)
    plain = saved(jamba, tmp_path / "b")
    with pytest.raises(DamagedFileError, match="nobody vouches for it"):
        SparsePrefixCache.from_pretrained(plain, jamba, key=KEY)
    assert resumed(jamba, plain, cold) == 96


def test_each_of_two_keys_refuses_what_the_other_wrote() -> None:
    seals = [Seal(KEY), Seal(OTHER)]
    for own, other in (seals, seals[::-1]):
        assert own.refusal({"keyed": own.keyed}) is None
        assert "another key" in str(own.refusal({"keyed": other.keyed}))
        assert "nobody vouches" in str(own.refusal({})) and "give key=" in str(Seal().refusal({"keyed": own.keyed}))


def test_the_environment_gives_the_key(
    jamba: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = cold_logits(jamba, question(3))
    monkeypatch.setenv(VARIABLE, KEY)
    folder = saved(jamba, tmp_path / "a")
    assert resumed(jamba, folder, cold) == 96
    store = CheckpointStore(None, key=OTHER)
    with pytest.raises(DamagedFileError, match="another key"):
        SparsePrefixCache.from_pretrained(folder, jamba, store=store)
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ValueError, match=f"{VARIABLE}: key has 0 bytes .* or unset it"):
        CheckpointStore()
    monkeypatch.delenv(VARIABLE)
    assert resumed(jamba, folder, cold, key=KEY) == 96
    assert resumed(jamba, folder, cold, store=CheckpointStore(None, key=KEY)) == 96
    with SparsePrefixCache.from_pretrained(folder, jamba, key=KEY) as cache:  # and it is saved again with the same one
        cache.save_pretrained(tmp_path / "b")
    assert resumed(jamba, tmp_path / "b", cold, key=KEY) == 96


def test_nothing_that_was_made_without_the_key_is_believed(
    jamba: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cold = cold_logits(jamba, question(3))
    folder = saved(jamba, tmp_path / "a", key=KEY)
    for name, seal in (("no key", Seal()), ("another", Seal(OTHER))):
        forged = tmp_path / name
        shutil.copytree(folder, forged)
        poison = Saved(forged)
        for unit in poison.of("state"):
            unit.tensors = {n: (v if n == "tokens" else torch.randn_like(v)) for n, v in unit.tensors.items()}
        poison.write(seal)
        with pytest.raises(DamagedFileError, match="another key than key= or|is not that of the key"):
            SparsePrefixCache.from_pretrained(forged, jamba, key=KEY)
        # With the manifest as it was, its files are not there, and those that are there are not listed.
        shutil.copy(folder / "sparse_cache.json", forged / "sparse_cache.json")
        caplog.clear()
        assert resumed(jamba, forged, cold, key=KEY) == 0 and len(caplog.records) == 1
        # Under the names that are listed, their signatures do not fit.
        for path in forged.glob("*.safetensors"):
            path.unlink()
        for old, unit in Saved(folder).units.items():
            unit.tensors = {n: (v if n == "tokens" else torch.randn_like(v)) for n, v in unit.tensors.items()}
            (forged / old).write_bytes(unit.to_bytes())
        assert resumed(jamba, forged, cold, key=KEY) == 0


def test_authentic_files_cannot_stand_for_each_other(jamba: PreTrainedModel, tmp_path: Path) -> None:
    """Of another prompt, position, tenant or weights, all saved with the key: no name is another's."""
    cold = cold_logits(jamba, question(3))
    folder = saved(jamba, tmp_path / "a", key=KEY)
    with handle(jamba, namespace="b") as cache:
        logits(jamba, torch.flip(question(2), [1]), cache)
        cache.save_pretrained(tmp_path / "b", key=KEY)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    for other in (folder, tmp_path / "b"):
        for kind in ("state", "kv"):
            mixed = tmp_path / f"{other.name}-{kind}"
            shutil.copytree(folder, mixed)
            own = [name for name in names if name.startswith(kind)]
            theirs = sorted(other.glob(f"{kind}*"))
            for index, name in enumerate(own):
                shutil.copy(theirs[(index + 1) % len(theirs)], mixed / name)
            assert resumed(jamba, mixed, cold, key=KEY) == 0
    with pytest.raises(ValueError, match="namespace"):
        SparsePrefixCache.from_pretrained(tmp_path / "b", jamba, key=KEY, namespace="")


def test_an_encrypted_save_shows_no_prompt(jamba: PreTrainedModel, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    plain, hidden = saved(jamba, tmp_path / "a"), saved(jamba, tmp_path / "b", key=KEY, encrypt=True)
    ids = question(2)[0, :16].to(torch.int32).numpy().tobytes()
    floats = max((unit.tensors[name] for unit in Saved(plain).of("kv") for name in unit.tensors), key=len)
    for folder, shown in ((plain, True), (hidden, False)):
        data = b"".join(path.read_bytes() for path in folder.iterdir())
        # of packed numbers the two bytes that do not shrink lie there as they are
        low = floats.numpy().view("<u2")[..., ::2].tobytes()[:32]
        assert (ids in data) == shown and (low in data or not floats.numel()) == shown
        assert (b'"position"' in data) == shown or shown
    first = {path.name for path in hidden.glob("*.safetensors")}
    assert saved(jamba, hidden, key=KEY, encrypt=True) and not first & set(os.listdir(hidden))  # no nonce twice


def test_a_disk_tier_with_a_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encrypt: bool, stores: list[CheckpointStore]
) -> None:
    def opened(key: Any = KEY, memory: int = 10**6) -> CheckpointStore:
        for store in stores:
            store.close(flush=False)
        options = {"key": key, "encrypt": encrypt and key is not None}
        stores.append(CheckpointStore(UNIT, "lru", disk_memory=memory, disk_dir=tmp_path / "t", **options))
        for tier in stores[-1].tiers:
            tier.reader = Blob.from_bytes
        return stores[-1]

    store = opened()
    for first in range(4):
        serve(store, first)
    store = opened()
    assert [serve(store, first) for first in range(3)] == [4] * 3
    size = sum(path.stat().st_size for path in files_of(store))
    for key in (None, OTHER):
        caplog.clear()
        store = opened(key)
        tier = disk_of(store)
        assert len(tier) == 0 and len(caplog.records) == 1
        assert tier.reserved_bytes == size == sum(path.stat().st_size for path in files_of(store))
    store = opened()
    assert [serve(store, first) for first in range(3)] == [4] * 3  # a forgotten key costs nothing
    one = disk_of(store).used_bytes // len(disk_of(store))
    store = opened(None, size)
    for first in range(10, 16):  # what is of no use makes room first
        serve(store, first)
        assert sum(path.stat().st_size for path in files_of(store)) <= size
    assert disk_of(store).reserved_bytes < size - one and len(disk_of(store)) >= 3
    store.clear()
    assert files_of(store) == [] and disk_of(store).reserved_bytes == 0


def test_a_key_is_seen_nowhere(jamba: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = CheckpointStore(None, disk_memory=10**8, disk_dir=tmp_path / "d", key=KEY)
    with handle(jamba, store=store) as cache:
        logits(jamba, question(2), cache)
        cache.save_pretrained(tmp_path / "a")
        shown = [repr(store), repr(cache), repr(store.seal), str(store.seal), str(cache.config.to_dict())]
    store.close()
    with pytest.raises(ValueError, match="another key") as told:
        SparsePrefixCache.from_pretrained(tmp_path / "a", jamba, key=OTHER)
    shown += [caplog.text, str(told.value), repr(told.value)]
    data = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for key in (KEY.encode(), OTHER):
        assert key not in data and key.hex().encode() not in data
        assert not [text for text in shown if key.decode() in text]
    with pytest.raises(TypeError, match="not copied or pickled"):
        pickle.dumps(store.seal)
    for bad in ("short", b"", 7):
        with pytest.raises(ValueError, match="key ") as told:
            CheckpointStore(key=bad)  # type: ignore[arg-type]
        assert "short" not in str(told.value)
    with pytest.raises(ValueError, match="encrypt=True needs a key"):
        CheckpointStore(encrypt=True)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_sparse_cache\[encrypt\]'"):
        CheckpointStore(key=KEY, encrypt=True)
    assert CheckpointStore(key=KEY).seal.keyed


def test_marks_come_back_and_are_pinned_again(jamba: PreTrainedModel, tmp_path: Path) -> None:
    document = question(2)[:, :64]
    folder = saved(jamba, tmp_path / "a")
    with SparsePrefixCache.from_pretrained(folder, jamba) as cache:
        (kept,) = cache.store.marks.kept
        assert kept[1].position == 64 and kept[1].pins
        assert [prefix.tolist() for prefix in cache.store.marks.prefixes(kept[0])] == document.tolist()
        cache.save_pretrained(folder)
        cache.clear()
        cache.save_pretrained(folder)
    assert not list(folder.glob("marks*"))
    saved(jamba, folder)
    tight = kept[1].nbytes + 64 * 512  # room for little more than what is marked
    with handle(jamba) as cache:
        tight = cache.size.state_bytes + 96 * cache.size.kv_bytes_per_token
    with SparsePrefixCache.from_pretrained(folder, jamba, max_memory=tight) as cache:
        assert [item.position for _, item in cache.store.marks.kept] == [64]
        logits(jamba, tiny_models.random_ids(96, seed=8), cache)
        logits(jamba, question(4), cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens == 64


def test_threads_matter_where_more_than_rounding_is_promised(jamba: PreTrainedModel, tmp_path: Path) -> None:
    for mode in ("bitwise", "replayable"):
        folder = tmp_path / mode
        with handle(jamba, exactness=mode) as cache:
            logits(jamba, question(2), cache)
            cache.save_pretrained(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            with pytest.raises(ValueError, match=f"threads {threads} instead of {threads + 1}"):
                SparsePrefixCache.from_pretrained(folder, jamba)
        finally:
            torch.set_num_threads(threads)


def test_what_follows_from_a_key_stays_as_it_was() -> None:
    """Else nothing that an earlier version has signed, named or encrypted could be read."""
    found = [_derived(KEY.encode(), use).hex() for use in (b"sign", b"name")]
    assert found == [
        "308adcd102f259080ec853b1d5d6e080516dc937f5ebe93421640f36ffdbe72e",
        "b7f870fa2f40990b7dd2c35501c304f0305597a620e6f99f63db6bd11fc6e697",
    ]
