"""lm-evaluation-harness through the cache, beside its own model on the same tasks: the same, and less computed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_families import FAMILIES

from hf_sparse_cache import UnsupportedModelError
from hf_sparse_cache.cli import main
from hf_sparse_cache.evaluation.harness import SparseLM
from hf_sparse_cache.models import states
from hf_sparse_cache.tools.builtin import build_tokenizer
from hf_sparse_cache.tools.random_weights import draw_weights


pytestmark = pytest.mark.filterwarnings("default")

WORDS = "red green blue amber violet north south east west river stone lamp cloud fish drum seven".split()  # noqa: SIM905
TEMPLATE = "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}<|begin|>assistant: "
COMMON = (
    "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\nfewshot_split: test\n"
)
CHOICE = """task: tiny_choice
{common}output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
num_fewshot: 5
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """task: tiny_rolling
{common}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
GENERATE = """task: tiny_generate
{common}output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
num_fewshot: 3
generation_kwargs: {{until: ["\\n", "stone"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def said(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, and their questions."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    head = said(draw, 60)
    rows = [
        {
            "question": said(draw, 12),
            "choices": [f" {said(draw, 1 + choice)}" for choice in range(4)],
            "answer": index % 4,
            "text": f"{head} {said(draw, 40)}",
        }
        for index in range(8)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(common=COMMON.format(data=data)))
    return folder


def saved(family: str, folder: Path) -> Path:
    """A tiny model with a tokenizer, in a folder."""
    row = FAMILIES[family]
    tokenizer = build_tokenizer([said(random.Random(1), 2000), "Question: Answer: user: assistant: system:\n"])
    tokenizer.chat_template = TEMPLATE
    model_class = getattr(transformers, row.class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**row.config, "vocab_size": len(tokenizer)}))
    draw_weights(model, 0, row.embedding_scale)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["Jamba", "Mamba", "Zamba2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def evaluated(lm: Any, tasks: list[str], folder: Path, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return found


def values(found: dict[str, Any], task: str) -> list[float]:
    """The log-likelihoods of a task, in the order of its questions."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [
        float(answer[0] if isinstance(answer, (tuple, list)) else answer) for s in samples for (answer,) in s["resps"]
    ]


def metrics(found: dict[str, Any], task: str) -> dict[str, float]:
    return {name: value for name, value in found["results"][task].items() if isinstance(value, float)}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_and_metrics_are_those_of_the_harness(model: Path, folder: Path, batch_size: int) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "device": "cpu", "max_length": 2048}
    tasks = ["tiny_choice", "tiny_rolling"]
    plain = evaluated(HFLM(str(model), **options), tasks, folder)
    ours = SparseLM(str(model), **options)
    found = evaluated(ours, tasks, folder)
    for task in tasks:
        pairs = zip(values(plain, task), values(found, task), strict=True)
        assert max(abs(one - other) for one, other in pairs) < 2e-4 if task == "tiny_rolling" else 1e-4
        expected = metrics(plain, task)
        assert metrics(found, task) == (pytest.approx(expected, rel=1e-5) if task == "tiny_rolling" else expected)
    told = found["config"]["sparse_cache"]
    assert told["resumed_tokens"] > 0.5 * told["prompt_tokens"] and told["exactness"] == "replayable"
    json.dumps(found["config"]["sparse_cache"])
    ours.cache.detach()


@pytest.mark.parametrize(
    "chat", [{}, {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Be brief."}]
)
def test_generated_answers_are_those_of_the_harness(model: Path, folder: Path, chat: dict[str, Any]) -> None:
    options: dict[str, Any] = {"batch_size": 2, "device": "cpu", "max_length": 2048}
    plain = evaluated(HFLM(str(model), **options), ["tiny_generate"], folder, **chat)
    ours = SparseLM(str(model), **options)
    found = evaluated(ours, ["tiny_generate"], folder, **chat)
    answers = [[sample["resps"] for sample in result["samples"]["tiny_generate"]] for result in (plain, found)]
    assert answers[0] == answers[1]
    assert metrics(found, "tiny_generate") == metrics(plain, "tiny_generate")
    assert ours.cache.stats().resumed_tokens > 0
    ours.cache.detach()


def test_a_lost_state_is_noticed(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the tests above: with states wiped where they are restored, the scores are others."""
    options: dict[str, Any] = {"batch_size": 8, "device": "cpu", "max_length": 2048}
    plain = evaluated(HFLM(str(model), **options), ["tiny_choice"], folder)
    ours, own = SparseLM(str(model), **options), states.restore

    def wiped(cache: Any, *stored: Any) -> None:
        own(cache, *stored)
        for layer in cache.layers:
            for tensor in getattr(layer, "recurrent_states", {}).values():
                tensor.zero_()

    monkeypatch.setattr(states, "restore", wiped)
    found = evaluated(ours, ["tiny_choice"], folder)
    pairs = zip(values(plain, "tiny_choice"), values(found, "tiny_choice"), strict=True)
    assert max(abs(one - other) for one, other in pairs) > 1e-2
    ours.cache.detach()


def test_a_model_that_the_cache_refuses_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="not supported"):
        SparseLM(str(saved("RWKV", tmp_path)), device="cpu")


def test_the_command_line_is_the_harness_s_own(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "eval",
        "--model_args",
        f"pretrained={model},max_memory=64MiB,exactness=bitwise",
        "--tasks",
        "tiny_choice",
    ]
    arguments += [
        "--include_path",
        str(folder),
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--output_path",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["hf-sparse-cache", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    (written,) = tmp_path.rglob("results*.json")
    found = json.loads(written.read_text())
    assert found["config"]["model"] == "hf-sparse"
    told = found["config"]["sparse_cache"]
    assert told["exactness"] == "bitwise" and told["resumed_tokens"] > 0
    assert "acc" in capsys.readouterr().out
