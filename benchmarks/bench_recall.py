"""Are the trained models' answers right: stock, with the cache, and with the cache's states wiped?

    python -m benchmarks.bench_recall                          every trained model, on the manuals it is made for
    python -m benchmarks.bench_recall recall-jamba --write     figures and card into the model's folder

Every question is asked three times through `generate()`. Stock reads the whole manual. The cache has read the manual
before, so that only the question is computed. Wiped is the same cache after every recurrent and conv state in its
store was set to zero, keys and values kept: what a cache would answer that forgets them. Manuals are held out: their
seeds are none of the training's, and their codes are drawn at random.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import evaluate
import torch

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools import recall
from hf_sparse_cache.tools.builtin import load
from hf_sparse_cache.tools.machine import describe_machine
from hf_sparse_cache.tools.recall.asking import answer, lose_states, manual_ids


METRIC = Path(__file__).parents[1] / "measurements" / "exact_match"
CARD = Path(__file__).parent / "recall_card.md"
STRUCTURES = {
    "recall-mamba": "Three Mamba-1 layers",
    "recall-jamba": "Three Mamba-1 layers and one of attention, one of them with four experts, as in Jamba",
    "recall-zamba2": "Four Mamba-2 layers, before one of them a shared block of attention, as in Zamba2",
}
LEFT = {
    True: "Keys and values still tell the codes of a room, one for each place, but not where the reader is.",
    False: "There are no keys and values: with its state the model loses the whole manual, and guesses digits.",
}
GOAL = 0.99
VERDICT = {
    True: "The goal, 99 %, is reached.",
    False: "The goal, 99 %, was not reached in the time for training: the curve is below.",
}
WAYS = ("stock", "cached", "wiped")
GRID = 64


def ask(model: Any, tokenizer: Any, manual: recall.Manual, answers: dict[str, list[str]]) -> tuple[int, int]:
    """Every question of one manual in every way; the answers are added to `answers`.

    Returns:
        Tokens of the prompts, and how many of them the cache resumed.
    """
    document = manual_ids(tokenizer, manual)
    prompts = [manual_ids(tokenizer, manual, question.text) for question in manual.questions]
    answers["stock"] += [answer(model, tokenizer, prompt) for prompt in prompts]
    resumed = 0
    for way in ("cached", "wiped"):
        with SparsePrefixCache(model, grid=GRID) as cache:
            cache.mark(document)
            answer(model, tokenizer, document, past_key_values=cache)
            if way == "wiped":
                lose_states(cache.store)
            for prompt in prompts:
                answers[way].append(answer(model, tokenizer, prompt, past_key_values=cache))
                info = cache.last_request
                if info is None or not info.resumed_tokens:
                    raise RuntimeError(f"nothing was resumed ({info and info.reason}): the figures would mean nothing")
                resumed += info.resumed_tokens if way == "cached" else 0
    return sum(prompt.shape[1] for prompt in prompts), resumed


def first_wrong(given: list[str], expected: list[str]) -> list[int]:
    """How many wrong answers part from the right one at the first digit, at the second, and so on: a hybrid that does
    not know the place errs at the first, and a recurrent model where the way from the room to the digit is longest."""
    counts = [0] * recall.CODE_DIGITS
    for answer_given, code in zip(given, expected, strict=True):
        if answer_given != code:
            counts[next(at for at in range(len(code)) if answer_given[at : at + 1] != code[at])] += 1
    return counts


def measure(
    metric: Any, model: Any, tokenizer: Any, size: dict[str, int], questions: int, seed: int
) -> dict[str, Any]:
    """Exact match in every way over so many questions.

    Args:
        metric: of `evaluate`, with the answers as predictions.
        size: of the manuals, see `recall.MANUALS`.
        seed: of the first manual.
    """
    answers: dict[str, list[str]] = {way: [] for way in WAYS}
    expected: list[str] = []
    manuals = tokens = resumed = 0
    while len(expected) < questions:
        manual = recall.write_manual(seed + manuals, **size)
        manuals += 1
        expected += [question.code for question in manual.questions]
        read, skipped = ask(model, tokenizer, manual, answers)
        tokens, resumed = tokens + read, resumed + skipped
        print(f"{len(expected)} of {questions} questions", end="\r", file=sys.stderr, flush=True)
    scores = {
        way: metric.compute(predictions=given[:questions], references=expected[:questions])["exact_match"]
        for way, given in answers.items()
    }
    return {
        "exact_match": scores,
        "same_answers_cached_as_stock": answers["cached"] == answers["stock"],
        "first_wrong_digit": first_wrong(answers["stock"][:questions], expected[:questions]),
        "questions": questions,
        "manuals": manuals,
        "tokens_a_prompt": round(tokens / len(expected)),
        "resumed_share": resumed / tokens,
        "lines": size["lines"],
        "codes": size["places"] * size["rooms"],
    }


def card(name: str, model: Any, figures: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """What people read about a model; every number comes from the files beside it."""
    asked = recall.write_manual(figures["seed"], **recall.MANUALS[name]).questions[0]
    curve: list[dict[str, float]] = []
    for run in runs:
        before = curve[-1]["step"] if curve else 0
        curve += [{**row, "step": before + row["step"]} for row in run["curve"]]
    points = [*curve[: -1 : max(1, len(curve) // 16)], curve[-1]]
    rows = [
        f"| {row['step']:,} | {row['tokens']:,} | {row['loss']:.3f} | {row['exact_match']:.1%} |" for row in points
    ]
    return CARD.read_text(encoding="utf-8").format(
        name=name,
        structure=STRUCTURES[name],
        parameters=model.num_parameters(),
        question=asked.text,
        code=asked.code,
        training="\n".join(run["command"] for run in runs),
        steps=curve[-1]["step"],
        minutes=sum(run["seconds"] for run in runs) / 60,
        shortest=curve[0]["tokens"],
        longest=curve[-1]["tokens"],
        verdict=VERDICT[figures["exact_match"]["stock"] >= GOAL],
        left=LEFT[recall.MANUALS[name]["places"] > 1],
        curve="\n".join(rows),
        **{key: value for key, value in figures.items() if key != "exact_match"},
        **figures["exact_match"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(recall.MANUALS)}; default: all")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=10_000, help="of the first manual; the others follow")
    parser.add_argument("--write", action="store_true", help="write figures.json and README.md beside the weights")
    given = parser.parse_args()
    torch.manual_seed(given.seed)  # nothing is drawn; so that nothing ever is by chance
    metric = evaluate.load(str(METRIC))
    for name in given.names or recall.MANUALS:
        model, tokenizer = load(name, [])
        figures = measure(metric, model, tokenizer, recall.MANUALS[name], given.questions, given.seed)
        command = " ".join(["python -m benchmarks.bench_recall", *sys.argv[1:]])
        figures |= {
            "chance": recall.chance(name),
            "seed": given.seed,
            "dtype": str(model.dtype),
            "command": command,
            "machine": describe_machine(),
        }
        print(json.dumps({"model": name, **figures}, indent=2), flush=True)
        if given.write:
            folder = recall.folder(name)
            lines = (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
            runs = [json.loads(line) for line in lines]
            (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(card(name, model, figures, runs), encoding="utf-8")


if __name__ == "__main__":
    main()
