"""`hf-sparse-cache tune`: what it measures, the settings that follow, and that a handle takes them."""

import json
from pathlib import Path

import pytest
import torch
from commands import Run
from tiny_models import build

from hf_sparse_cache import SparseCacheConfig, SparsePrefixCache
from hf_sparse_cache.cli import tuning
from hf_sparse_cache.cli.tuning import Cost
from hf_sparse_cache.models import binding as binding_module
from hf_sparse_cache.models.binding import Binding
from hf_sparse_cache.tools.builtin import load


SHORT = ("--tokens", "256", "--pairs", "1")


@pytest.mark.parametrize("exactness", ["replayable", "bitwise"])
def test_it_measures_and_a_handle_takes_what_it_saves(run: Run, tmp_path: Path, exactness: str) -> None:
    out = tmp_path / "settings"
    code, printed, err = run("tune", "jamba-3m", *SHORT, "--exactness", exactness, "--out", str(out), "--json")
    found = json.loads(printed)
    assert (code, err) == (0, "")
    assert list(found["pieces"]) == ["128"] and found["pieces"]["128"]["median"] > 0
    assert found["cold_over_stock"]["median"] > 0 and found["cut_tokens"] >= 0
    config = SparseCacheConfig.from_pretrained(out)
    assert config.to_dict() == {**found["config"], "cut_after": ()}
    assert (config.exactness, config.cut_tokens) == (exactness, found["cut_tokens"])
    model, tokenizer = load("jamba-3m", [""])
    with SparsePrefixCache(model, tokenizer, config=config) as cache:
        assert cache.config == config
        if exactness == "replayable":
            assert cache.simulation()["cut_tokens"] == found["cut_tokens"]
        else:
            assert cache.grid == 128


def test_it_writes_tables_and_how_to_use_them(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("tune", "zamba2-3m", "--tokens", "512", "--pairs", "1", "--out", str(tmp_path / "settings"))
    assert code == 0
    for words in (
        "| tokens a piece |",
        "| 256 ",
        "One more cut costs",
        "of stock generate(), in replayable mode",
        "| grid ",
    ):
        assert words in out
    assert f"SparseCacheConfig.from_pretrained({str(tmp_path / 'settings')!r})" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "'nosuch' is no folder, Hub id or built-in model"),
        (["jamba-3m", "--tokens", "100"], "--tokens 100 is less than two pieces of 128 tokens; give at least 256"),
        (["jamba-3m", "--exactness", "exact"], "exactness must be 'replayable' or 'bitwise', not 'exact'"),
        (["jamba-3m", "--exactness", "numerical"], "'replayable' took the place of 'numerical'"),
        (["jamba-3m", "--pairs", "0"], "--pairs"),
    ],
)
def test_bad_input_is_named(run: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    code, out, err = run("tune", *arguments, "--out", str(tmp_path / "settings"))
    assert (code, out) == (2, "") or "JambaForCausalLM" in out
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "settings").exists()


def test_it_replaces_its_own_files_alone(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "run", lambda *_, **__: pytest.fail("measured before it looked where to write"))
    (tmp_path / "sparse_cache_config.json").write_text("{}")
    code, _, err = run("tune", "jamba-3m", *SHORT, "--out", str(tmp_path))
    assert code == 2 and "was not written by save_pretrained" in err
    file = tmp_path / "file"
    file.write_text("mine")
    code, _, err = run("tune", "jamba-3m", *SHORT, "--out", str(file))
    assert code == 2 and "--out" in err and file.read_text() == "mine"


def bound(family: str, device: str, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Binding:
    """As if the model lay on a device of another type."""
    monkeypatch.setattr(binding_module, "input_device", lambda model: torch.device(device))
    return Binding.of(build(family), None, SparseCacheConfig(**settings))


def costs(**medians: float) -> dict[int, Cost]:
    return {int(size[1:]): Cost(median, median, median) for size, median in medians.items()}


def test_the_settings_follow_from_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(family: str, exactness: str, pieces: dict[int, Cost]) -> SparseCacheConfig:
        monkeypatch.setattr(tuning, "input_device", lambda model: torch.device("cpu"))
        return tuning._settings(bound(family, "cpu", monkeypatch), exactness, 1000, pieces, 3.5)

    faster, slower = costs(_128=0.7, _256=0.69, _512=0.9), costs(_128=1.2, _256=1.02, _512=0.99)
    assert chosen("Mamba", "replayable", faster) == SparseCacheConfig(grid=256, cut_tokens=3.5)
    assert chosen("Mamba", "replayable", slower) == SparseCacheConfig(grid=1000, cut_tokens=3.5)  # in one shot
    assert chosen("Zamba2", "replayable", faster) == SparseCacheConfig(pieces=256, cut_tokens=3.5)
    assert chosen("Zamba2", "replayable", slower) == SparseCacheConfig(cut_tokens=3.5)
    assert chosen("Zamba2", "bitwise", faster) == SparseCacheConfig(exactness="bitwise", grid=128, cut_tokens=3.5)
    assert chosen("Zamba2", "bitwise", slower) == SparseCacheConfig(exactness="bitwise", grid=512, cut_tokens=3.5)


@pytest.mark.parametrize(("family", "grid"), [("Mamba", 1024), ("Zamba2", 1024), ("Qwen3.5", 1024), ("Llama", 1024)])
def test_an_accelerator_is_cut_less_often(family: str, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (bound(family, device, monkeypatch, exactness="bitwise") for device in ("cpu", "cuda"))
    assert there.grid == grid > here.grid
    assert bound(family, "xpu", monkeypatch, exactness="bitwise", grid=64).grid == 64  # as asked
    here, there = (bound(family, device, monkeypatch) for device in ("cpu", "cuda"))
    assert there.segmenting.cut_tokens > here.segmenting.cut_tokens  # a cut costs launches there
    assert there.segmenting.segments(0, [], there.segmenting.cuts(torch.zeros(5000).int().numpy()), 5000).tolist() == [
        5000
    ]


def test_the_grid_of_an_accelerator_is_in_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Zamba2")
    model.config.chunk_size = 384
    family = binding_module.family_of(model)
    assert family.grid(model.config, "cuda") == 1152 and family.grid(model.config, "cpu") == 384
