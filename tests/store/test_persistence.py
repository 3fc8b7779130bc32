"""Saved caches, restarts and tenants, on pure, hybrid and shared-attention models."""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from persisting import GRID, all_tensors, cold_logits, counts_what_it_holds, handle, logits, question, small_store
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, fingerprint, states


def test_a_reloaded_cache_continues_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = tiny_models.build(family)
    cold = cold_logits(model, question(3))
    with handle(model) as cache:
        logits(model, question(2), cache)
        assert cache.save_pretrained(tmp_path / "a") == cache.stats().checkpoints > 0
        assert counts_what_it_holds(cache)
        bytes_before = cache.store.used_bytes
    del model, cache
    gc.collect()
    model = tiny_models.build(family)  # the same weights in new tensors: another process, as far as we can tell
    with SparsePrefixCache.from_pretrained(tmp_path / "a", model, policy="balanced") as cache:
        assert cache.grid == GRID and cache.store.used_bytes >= bytes_before and counts_what_it_holds(cache)
        assert torch.equal(logits(model, question(3), cache), cold)
        assert cache.last_request.resumed_tokens == 96
    with SparsePrefixCache.from_pretrained(tmp_path / "a", model, policy="none") as twin:  # the check can fail
        for tensor in all_tensors(twin):
            tensor.zero_()
        wiped = logits(model, question(3), twin)
        assert twin.last_request.resumed_tokens == 96 and not torch.equal(wiped, cold)


def test_a_disk_tier_is_found_again(family: str, tmp_path: Path, stores: list[CheckpointStore]) -> None:
    model = tiny_models.build(family)
    cold = [cold_logits(model, question(seed)) for seed in (2, 3, 4)]
    for life in range(2):
        model = tiny_models.build(family)  # the same weights in new tensors
        stores.append(small_store(model, tmp_path))
        with handle(model, store=stores[-1]) as cache:
            for seed, expected in zip((2, 3, 4), cold, strict=True):
                assert torch.equal(logits(model, question(seed), cache), expected)
                assert cache.last_request.resumed_tokens == (96 if life or seed > 2 else 0)
            assert stores[-1].evictions == 0 and (life or stores[-1].demotions > 0)
            assert counts_what_it_holds(cache)
        stores[-1].close()


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    with handle(model, **options) as cache:
        logits(model, question(2), cache)
        cache.save_pretrained(folder)
    return folder


def other_weights(model: PreTrainedModel) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[7] += 1e-6


REFUSALS: list[tuple[str, Callable[[Any], Any], dict[str, Any]]] = [
    ("other weights", other_weights, {}),
    ("other config .rms_norm_eps", lambda model: setattr(model.config, "rms_norm_eps", 1e-3), {}),
    ("other modules, adapters or hooks", lambda model: model.lm_head.register_forward_hook(lambda *_: None), {}),
    ("dtype", lambda model: model.to(torch.bfloat16), {}),
    ("attention eager", lambda model: setattr(model.config, "_attn_implementation", "sdpa"), {}),
    ("namespace '' instead of 'b'", lambda model: None, {"namespace": "b"}),
]


@pytest.mark.parametrize(("named", "change", "options"), REFUSALS)
def test_another_setting_is_refused_by_name(
    jamba: PreTrainedModel, tmp_path: Path, named: str, change: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    jamba.config._attn_implementation = "eager"
    saved(jamba, tmp_path / "a")
    change(jamba)
    with pytest.raises(ValueError, match=named):
        SparsePrefixCache.from_pretrained(tmp_path / "a", jamba, **options)
    with handle(jamba, **options) as cache, pytest.raises(ValueError, match=named):
        cache.save_pretrained(tmp_path / "a")
    assert "_prefill" not in jamba.__dict__


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "format", "threads", "devices", "kernels", "matmul precision"]
)
def test_another_environment_is_refused_by_name(jamba: PreTrainedModel, tmp_path: Path, name: str) -> None:
    manifest = saved(jamba, tmp_path / "a") / "sparse_cache.json"
    found = json.loads(manifest.read_text())
    found["fingerprint"][name] = "5.0"
    manifest.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"{name} 5.0 instead of"):
        SparsePrefixCache.from_pretrained(tmp_path / "a", jamba)


def test_other_settings_alone_are_no_fault_of_the_model(jamba: PreTrainedModel, tmp_path: Path) -> None:
    saved(jamba, tmp_path / "a", namespace="b")
    with pytest.raises(ValueError, match="The model fits: leave out namespace=, or pass namespace='b'"):
        SparsePrefixCache.from_pretrained(tmp_path / "a", jamba, grid=64, namespace="c")
    with handle(jamba, namespace="c") as cache, pytest.raises(ValueError, match="choose another folder"):
        cache.save_pretrained(tmp_path / "a")


def test_other_cuts_are_said_and_what_fits_is_resumed(
    jamba: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(jamba, tmp_path / "a")
    with SparsePrefixCache.from_pretrained(tmp_path / "a", jamba, grid=48) as cache:
        assert "were made with other cuts than this handle's settings give" in caplog.text
        logits(jamba, question(3), cache)
        assert cache.last_request.resumed_tokens == 0 and "cut otherwise" in cache.last_request.reason
    caplog.clear()
    with SparsePrefixCache.from_pretrained(tmp_path / "a", jamba, exactness="replayable") as cache:
        logits(jamba, question(3), cache)
        assert cache.last_request.resumed_tokens > 0 and "other cuts" not in caplog.text


def test_another_model_is_named_first_and_the_rest_is_short(jamba: PreTrainedModel, tmp_path: Path) -> None:
    other = tiny_models.build("Mamba")
    saved(jamba, tmp_path / "a")
    with pytest.raises(ValueError, match=r"another setting: model JambaForCausalLM instead of Mamba.* more") as told:
        SparsePrefixCache.from_pretrained(tmp_path / "a", other)
    assert len(str(told.value)) < 700 and "cannot continue its states" in str(told.value)


def test_every_tensor_and_byte_of_the_weights_counts(jamba: PreTrainedModel) -> None:
    seen = {fingerprint.weights_digest(jamba)}
    for number, tensor in enumerate([*jamba.parameters(), *jamba.buffers()]):
        flat = tensor.detach().view(-1)
        before = flat[-1].clone()
        with torch.no_grad():
            tensor.view(-1)[-1] = before * 1.01 + 1
        seen.add(fingerprint.weights_digest(jamba))
        assert len(seen) == number + 2
        with torch.no_grad():
            tensor.view(-1)[-1] = before
    assert fingerprint.weights_digest(jamba) in seen


def test_saved_files_are_private_and_a_save_replaces(jamba: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with handle(jamba) as cache:
        logits(jamba, question(2), cache)
        logits(jamba, tiny_models.random_ids(80, seed=9), cache)
        both = cache.save_pretrained(folder)
        files = set(os.listdir(folder))
        assert cache.save_pretrained(folder) == both and set(os.listdir(folder)) == files  # nothing is written twice
        cache.clear()
        logits(jamba, question(2), cache)
        assert cache.save_pretrained(folder) == len(cache.store) < both
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("kind", ["state", "kv"])
def test_a_damaged_unit_is_left_out_with_what_builds_on_it(
    jamba: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    cold = cold_logits(jamba, question(3))
    folder = saved(jamba, tmp_path / "a")
    before = set(os.listdir(folder))
    total = len(list(folder.glob("state*")))
    victim = max(folder.glob(f"{kind}*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-9] ^= 4
    victim.write_bytes(data)
    with SparsePrefixCache.from_pretrained(folder, jamba, policy="balanced") as cache:
        assert len(cache.store) == total - 1 if kind == "state" else len(cache.store) < total
        assert len([record for record in caplog.records if "lost" in record.message]) == 1
        assert torch.equal(logits(jamba, question(3), cache), cold)
    assert set(os.listdir(folder)) == before  # loading changes nothing


def test_no_pickle() -> None:
    for path in Path(states.__file__).parent.glob("*.py"):
        code = path.read_text().replace("safetensors.torch.load", "")
        assert "import pickle" not in code and "torch.load(" not in code, path


def test_what_every_core_family_saves_is_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    """Also where the configuration holds infinities, as the bounds of Mamba-2's time step do."""
    with handle(model) as cache:
        cold = logits(model, question(2), cache)
        saved = cache.save_pretrained(tmp_path)
    with SparsePrefixCache.from_pretrained(tmp_path, model) as cache:
        assert len(cache.store) == saved > 0
        assert torch.equal(logits(model, question(2), cache), cold)
        assert cache.last_request.resumed_tokens > 0


# -- tenants ----------------------------------------------------------------------------------------------------------

NAMES = ["", "a", "a\x1f", "\x1f", "\x1fa", "a\x1fb", "b", '","x":"', "é", "../..", "null"]


def serve_tokens(store: CheckpointStore, space: str, ids: list[int]) -> int:
    from prompting import begin
    from reference_store import Blob

    with begin(store, ids, space) as request:
        assert request.checkpoint is None or request.checkpoint.state.label == space
        for position in range(request.resumed_tokens + 2, len(ids) - 1, 2):
            request.add(position, Blob(10, space))
    return request.overlap_tokens


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.lists(st.integers(0, 1), min_size=5, max_size=9)), max_size=9),
    st.booleans(),
)
def test_no_namespace_sees_another(requests: list[tuple[str, list[int]]], restart: bool) -> None:
    import tempfile

    from reference_store import Blob, common

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse_cache.store.files.os.fsync", lambda descriptor: None)
        seen: list[tuple[str, list[int]]] = []
        store = CheckpointStore(20, "lru", disk_memory="1GiB", disk_dir=folder)
        for namespace, ids in requests:
            if restart:
                store.close()
                store = CheckpointStore(20, "lru", disk_memory="1GiB", disk_dir=folder)
            for tier in store.tiers:
                tier.reader = Blob.from_bytes
            space = fingerprint.durable_space({"weights": "same"}, namespace)
            own = [other for name, other in seen if name == namespace]
            shared = max((common(tuple(ids), tuple(other)) for other in own), default=0)
            assert serve_tokens(store, space, ids) <= shared
            seen.append((namespace, ids))
        store.close()


def test_tenants_do_not_share_states_or_statistics(jamba: PreTrainedModel, tmp_path: Path, stores: list[Any]) -> None:
    stores.append(small_store(jamba, tmp_path))
    with handle(jamba, store=stores[0], namespace="a") as a, handle(jamba, store=stores[0], namespace="b") as b:
        logits(jamba, question(2), a)
        assert b.stats().checkpoints == b.stats().checkpoint_bytes == b.stats().kv_bytes == b.stats().evictions == 0
        logits(jamba, question(2), b)
        assert b.last_request.resumed_tokens == b.last_request.overlap_tokens == 0
        assert b.last_request.reason == "nothing stored"
        b.save_pretrained(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "sparse_cache.json").read_text())
    assert manifest["namespace"] == "b"
    stores[0].close()
    stores.append(small_store(jamba, tmp_path))
    with handle(jamba, store=stores[1], namespace="c") as c:
        logits(jamba, question(2), c)
        assert c.last_request.resumed_tokens == 0
    with handle(jamba, store=stores[1], namespace="a") as a:
        logits(jamba, question(2), a)
        assert a.last_request.resumed_tokens == 96


def test_a_namespace_may_have_a_budget_of_its_own() -> None:
    store = CheckpointStore(100, "lru", namespace_memory={"a": 30})
    spaces = {name: fingerprint.durable_space({}, name) for name in ("a", "b")}
    for number in range(6):
        serve_tokens(store, spaces["b"], [7, number, 1, 1])
    for number in range(9):
        serve_tokens(store, spaces["a"], [number, *range(10)])
        assert store.account("a").used_bytes <= 30
    assert store.account("b").used_bytes == 60  # the tenant at its limit takes nothing from the others
    assert store.used_bytes == sum(account.used_bytes for account in store.accounts.values())
