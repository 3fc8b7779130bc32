"""`inspect` on folders that somebody else filled: nothing steers the terminal, and no size is believed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from forging import Saved
from persisting import handle, logits, question
from sharing import joined, prompt, serve

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.cli import inspecting
from hf_sparse_cache.cli.screen import Screen


assert joined
ESCAPE = "\x1b[2J\x1b]0;owned\x07\r\u202e"


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return f"{ESCAPE}{ids[0]}"


def shown(folder: Path, capsys: Any, tokenizer: Any = None) -> tuple[str, dict[str, Any]]:
    found = inspecting.run(folder, tokenizer, True, Screen())
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and "owned" not in str(found["folder"])
    return out, found


def test_nothing_of_a_file_steers_the_terminal(jamba: Any, tmp_path: Path, capsys: Any) -> None:
    with handle(jamba, namespace=ESCAPE) as cache:
        logits(jamba, question(2), cache)
        count = cache.save_pretrained(tmp_path / "a")
    out, found = shown(tmp_path / "a", capsys, Tokenizer())
    assert r"\x1b[2J" in out and len(found["models"][0]["checkpoints"]) == count
    saved = Saved(tmp_path / "a")
    for number, unit in enumerate(saved.of("state")):
        about = f'{{"model": "\\u001b[31m", "dtype": ["\\u001b[32m", 1], "grid": "\\r"}}\x1f{ESCAPE}'
        unit.record["space"] = ("no JSON" + ESCAPE, "[1]", about, "{}", '{"model": {"a": 1}}')[number % 5]
    saved.write()
    out, found = shown(tmp_path / "a", capsys)
    assert sum(len(model["checkpoints"]) for model in found["models"]) == count


def test_sizes_and_times_are_those_of_the_files(jamba: Any, tmp_path: Path, capsys: Any) -> None:
    with handle(jamba, max_checkpoints=1) as cache:
        logits(jamba, question(2), cache)
        cache.save_pretrained(tmp_path / "a")
    saved = Saved(tmp_path / "a")
    (unit,) = saved.of("state")
    unit.payload = {"layers": 10**12, "devices": [], "plain": {}}
    saved.write()
    (state,) = (tmp_path / "a").glob("state*")
    os.utime(state, (2**40, 2**40))
    _, found = shown(tmp_path / "a", capsys)
    (checkpoint,) = found["models"][0]["checkpoints"]
    assert checkpoint["state_bytes"] == state.stat().st_size
    state.write_bytes((10**18).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="holds no checkpoint .*promise a header of 1000000000000000000 bytes"):
        inspecting.run(tmp_path / "a", None, True, Screen())


def test_how_states_are_kept_is_said(jamba: Any, tmp_path: Path, capsys: Any) -> None:
    for storage, said in (
        ("exact", "JambaForCausalLM (torch.float32, namespace"),
        ("int8", "kept in 16 bits in groups"),
    ):
        with handle(jamba, storage=storage, prove=False) as cache:
            logits(jamba, question(2), cache)
            cache.save_pretrained(tmp_path / storage)
        out, found = shown(tmp_path / storage, capsys)
        assert said in out.replace("\n", " ")
        assert (found["models"][0]["storage"] == "exact") == (storage == "exact")


def test_a_pipe_does_not_hold_it_up(tmp_path: Path, capsys: Any) -> None:
    model = tiny_models.build("Mamba")
    with handle(model) as cache:
        logits(model, question(2), cache)
        cache.save_pretrained(tmp_path / "a")
    before, _ = shown(tmp_path / "a", capsys)
    os.mkfifo(tmp_path / "a" / ("state-0123456789ab-" + "0" * 32 + ".safetensors"))
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    assert shown(tmp_path / "a", capsys)[0] == before


def test_units_of_a_shared_store_take_what_their_files_do(
    joined: Callable[..., CheckpointStore], tmp_path: Path
) -> None:
    store, where = joined(), tmp_path / "shared"
    ids = prompt(1, 1100)
    serve(store, ids, (512, 1024))
    store.flush()
    (first, second), taken = sorted(inspecting.stored_in(where), key=lambda one: len(one.tokens)), dict(sizes(where))
    assert (first.tokens.tolist(), second.tokens.tolist()) == (ids[:512], ids[:1024])
    assert first.kv_bytes + second.kv_bytes == sum(taken["kv"]) and first.kv_bytes > 0 < second.kv_bytes
    assert sorted([first.state_bytes, second.state_bytes]) == sorted(taken["state"])
    kv = max(where.rglob("kv-*"), key=lambda path: path.stat().st_mtime_ns)
    kv.unlink()
    (left,) = inspecting.stored_in(where)
    assert left.tokens.tolist() == ids[:512]
    for path in where.rglob("kv-*"):
        path.unlink()
    with pytest.raises(ValueError, match="keys and values it builds on are gone"):
        inspecting.stored_in(where)


def sizes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Bytes of the files of a kind."""
    for kind in ("kv", "state"):
        yield kind, [path.stat().st_size for path in folder.rglob("*") if path.is_file() and f"{kind}-" in path.name]
