"""The trained models: manuals, training, and answers that are right with the state and wrong without it."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_sparse_cache.cli import inspecting
from hf_sparse_cache.tools import recall
from hf_sparse_cache.tools.builtin import load
from hf_sparse_cache.tools.recall import manual


pytest.importorskip("evaluate")

ROOT = Path(__file__).parents[2]
NAMES = list(recall.MANUALS)
MEBIBYTE = 2**20


def program(name: str, folder: str) -> ModuleType:
    """A program of the checkout, which is not in the package."""
    path = str(ROOT / folder)
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return program("train_recall", "examples")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return program("benchmarks.bench_recall", "")


@pytest.fixture(scope="module")
def metric(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bench.evaluate.load(str(bench.METRIC), cache_dir=str(tmp_path_factory.mktemp("evaluate")))


# -- manuals ----------------------------------------------------------------------------------------------------------


def test_a_manual_answers_its_questions_and_nothing_else_does() -> None:
    written = recall.write_manual(3, lines=265, places=6, rooms=5)
    assert written == recall.write_manual(3, lines=265, places=6, rooms=5) != recall.write_manual(4, 265, 6, 5)
    lines = written.text.splitlines()
    assert len(lines) == 265 and len(written.questions) == 5
    place = next(line for line in reversed(lines) if line.startswith("You come"))
    assert sum(line == place for line in lines) == 2  # where its codes are told, and where the reader is at the end
    told = lines[lines.index(place) :]
    until = next(index for index, line in enumerate(told[1:], 1) if line.startswith("You come"))
    for question in written.questions:
        assert f"{question.text} {question.code}." in told[:until]
        assert sum(line.startswith(question.text) for line in lines) == 6  # once in every place


def test_a_manual_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="lines=50 cannot hold 6 × 5 codes; give 77 or more"):
        recall.write_manual(0, lines=50, places=6, rooms=5)
    assert len(recall.write_manual(0, lines=77, places=6, rooms=5).text.splitlines()) == 77
    for places, rooms in ((0, 1), (1, 0), (len(manual.PLACES) + 1, 1), (1, len(manual.ROOMS) + 1)):
        with pytest.raises(ValueError, match=f"places={places} and rooms={rooms}"):
            recall.write_manual(0, lines=500, places=places, rooms=rooms)
    with pytest.raises(ValueError, match="recall-gpt.*recall-jamba"):
        recall.folder("recall-gpt")


# -- training ---------------------------------------------------------------------------------------------------------


def test_tokens_are_words_digits_and_ends_of_lines(training: ModuleType) -> None:
    tokenizer = training.build_tokenizer()
    text = recall.write_manual(0, lines=200, places=6, rooms=5).text + "The code of room 17 is 482.\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    last = ["The", " code", " of", " room", " 17", " is", " 4", "8", "2", ".\n"]
    assert tokenizer.convert_ids_to_tokens(ids[-10:]) == last


def test_only_what_can_be_known_is_supervised(training: ModuleType) -> None:
    tokenizer = training.build_tokenizer()
    stage = training.Stage(1.0, 256, 4, 3, 4)
    for row in training.make_dataset(stage, 8, 0, tokenizer):
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["places"]) == 256
        asked = row["labels"] != training.IGNORED
        assert torch.equal(row["labels"][asked], row["input_ids"][asked]) and asked.sum() >= 8
        codes: dict[tuple[str, str], str] = {}
        position = 0
        place = ""
        for line in tokenizer.decode(row["input_ids"]).splitlines(keepends=True):
            tokens = len(tokenizer(line)["input_ids"])
            place = line if line.startswith("You come") else place
            supervised = int(asked[position : position + tokens].sum())
            where = [name for name in manual.PLACES if place == manual.arrival(name)]
            expected = manual.PLACES.index(where[0]) if where and line != place else training.IGNORED
            assert not line.endswith("\n") or bool((row["places"][position : position + tokens] == expected).all())
            if line == manual.stay(place[len(manual.arrival("")) - 2 : -2]):
                assert supervised == training.PLACE_TOKENS
            elif line.startswith("The code of room") and line.endswith(".\n"):
                key, code = (place, line[:20]), line[20:]
                assert supervised == (training.ANSWER_TOKENS if key in codes else 0)
                assert codes.setdefault(key, code) == code
            elif line.endswith("\n"):
                assert supervised == 0
            position += tokens


@pytest.mark.parametrize("family", ["mamba", "jamba", "zamba2"])
def test_the_scans_of_the_training_are_those_of_transformers(training: ModuleType, family: str) -> None:
    tokenizer = training.build_tokenizer()
    model = training.draw_weights(training.build_model(family, len(tokenizer))).train()
    batch = training.make_dataset(training.Stage(1.0, 128, 2, 2, 3), 2, 0, tokenizer)[:2]
    found = []
    for fast in (False, True):
        model.zero_grad()
        if fast:
            with training.fast_scans():
                loss, _ = training.answer_loss(model, batch)
                loss.backward()
        else:
            loss, _ = training.answer_loss(model, batch)
            loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (stock_loss, stock), (loss, fast_grads) = found
    assert loss == pytest.approx(stock_loss, abs=1e-5)
    assert len(stock) == len(fast_grads) > 10
    for one, other in zip(stock, fast_grads, strict=True):
        assert (one - other).abs().max() <= 1e-4 * (one.abs().max() + 1e-3)


@pytest.mark.parametrize("family", ["mamba", "zamba2"])
def test_a_few_steps_lower_the_loss(training: ModuleType, family: str, tmp_path: Path) -> None:
    places = 2 if family == "zamba2" else 1  # with two, the place is asked for below the attention
    stages = (training.Stage(0.5, 64, 8, 1, 2), training.Stage(0.5, 128, 4, places, 2))
    tokenizer = training.build_tokenizer()
    model = training.draw_weights(training.build_model(family, len(tokenizer)))
    stages_done = enumerate(training.train(model, tokenizer, stages, steps=32, seed=0, every=8), start=1)
    for finished, (curve, averaged) in stages_done:
        training.save(averaged, tokenizer, [{"command": "test", "curve": curve}], tmp_path)
        written = (tmp_path / "curve.jsonl").read_text(encoding="utf-8")
        assert json.loads(written)["curve"] == curve and len(curve) == 2 * finished
        assert model.dtype == torch.float32
    assert [row["step"] for row in curve] == [8, 16, 24, 32]
    assert [row["tokens"] for row in curve] == [64, 64, 128, 128]
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    again, words = load(str(tmp_path), [])
    assert again.dtype == torch.bfloat16 and words.get_vocab() == tokenizer.get_vocab()
    last = model.state_dict()
    for name, value in averaged.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), again.state_dict()[name].to(torch.bfloat16)), name
    assert any(not torch.equal(value, last[name]) for name, value in averaged.state_dict().items())


def test_the_place_is_asked_at_every_token_behind_the_line_that_names_it(training: ModuleType) -> None:
    tokenizer = training.build_tokenizer()
    rows = training.make_dataset(training.Stage(1.0, 768, 4, 6, 5), 4, 0, tokenizer)
    named = {tokenizer.convert_tokens_to_ids(f" {place}"): index for index, place in enumerate(recall.manual.PLACES)}
    furthest = 0
    for row in rows:
        here, since = None, 0
        for token, place in zip(row["input_ids"].tolist(), row["places"].tolist(), strict=True):
            if token in named:
                here, since = named[token], 0
            since += 1
            if place != training.IGNORED:
                assert place == here
                furthest = max(furthest, since)
    assert furthest > 200  # as far as from the last place of a manual to its questions


def test_wrong_answers_are_counted_by_their_first_wrong_digit(bench: ModuleType) -> None:
    expected = ["482", "482", "482", "482", "482", "482"]
    assert bench.first_wrong(["482", "182", "472", "480", "48", "111"], expected) == [2, 1, 2]


# -- the committed models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_with_the_state_and_wrong_without(bench: ModuleType, metric: Any, name: str) -> None:
    """On shorter manuals than the committed figures are of, to be quick."""
    model, tokenizer = load(name, [])
    assert model.dtype == torch.float32
    size = {**recall.MANUALS[name], "lines": 100}
    found = bench.measure(metric, model, tokenizer, size, questions=20, seed=60_000)
    scores = found["exact_match"]
    usual = json.loads((recall.folder(name) / "figures.json").read_text(encoding="utf-8"))["exact_match"]["stock"]
    assert scores["cached"] == scores["stock"] >= usual - 0.15 and found["same_answers_cached_as_stock"]
    assert found["resumed_share"] > 0.8
    assert scores["wiped"] <= recall.chance(name) + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_figures_keep_what_is_promised(bench: ModuleType, name: str) -> None:
    folder = recall.folder(name)
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    runs = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = figures["exact_match"]
    assert figures["questions"] >= 200 and figures["tokens_a_prompt"] >= (1000 if name == "recall-mamba" else 2000)
    assert scores["stock"] == scores["cached"] > figures["chance"] + 0.3
    # The goal is 99 %; the cards of the other two say that they fall short.
    assert scores["stock"] >= {"recall-jamba": bench.GOAL, "recall-zamba2": 0.98, "recall-mamba": 0.95}[name]
    assert scores["wiped"] <= figures["chance"] + 0.03
    assert figures["machine"]["torch"] and "/tmp" not in str(runs)
    model, _ = load(name, [])
    assert (folder / "README.md").read_text(encoding="utf-8") == bench.card(name, model, figures, runs)


def test_they_are_small_and_in_bfloat16() -> None:
    weights = [recall.folder(name) / "model.safetensors" for name in NAMES]
    assert sum(path.stat().st_size for path in weights) <= 12 * MEBIBYTE
    for name in NAMES:
        assert load(name, [], dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_trained_model_brings_its_tokenizer() -> None:
    for name in NAMES:
        tokenizer = inspecting.load_tokenizer(name)
        assert tokenizer.decode(tokenizer(" 17 is 482.")["input_ids"]) == " 17 is 482."


def test_exact_match_counts_whole_answers(metric: Any) -> None:
    found = metric.compute(predictions=["482", " 17", "48"], references=["482", "17 ", "482"])
    assert found == {"exact_match": pytest.approx(2 / 3), "right": [True, True, False]}
