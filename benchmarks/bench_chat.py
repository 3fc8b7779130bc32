"""What the next turn of a chat costs, and whether decoding pays for it: python -m benchmarks.bench_chat [--out FILE]

Built-in models with random weights; every answer has a given length. Counted are tokens run through the model, and
torch's operations a decoded token; timed is CPU time of the thread: prefills over those of the limit, and steps of
decoding in turn with stock's, with a 95 % bound of the median. The limit of a chat is a live cache that is never given
back: a forward of what is new, and nothing else.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import decode_steps
from benchmarks.bench_new_tokens import bounds
from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.builtin import load
from hf_sparse_cache.tools.machine import describe_machine


TURNS, PAIRS = 8, 15
TEXT = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


class Operations(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def words(length: int, model: Any, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, model.config.vocab_size, (1, length), generator=generator)


def generate(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    """Greedy, exactly so many tokens."""
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


def over_ids(model: Any, system: int, message: int, answer: int) -> dict[str, Any]:
    """A chat whose answers are kept as ids: tokens computed each turn, and CPU time of its prefills over the limit."""
    computed, spent, limit = [], [], []
    with SparsePrefixCache(model) as cache:
        text = words(system, model, 0)
        live = cache.prefill(text).past_key_values
        cache.clear()
        done = system
        for turn in range(TURNS):
            text = torch.cat([text, words(message, model, 1 + turn)], dim=1)
            started = time.thread_time()
            cache.prefill(text)
            spent.append(time.thread_time() - started)
            computed.append(cache.last_request.computed_tokens)
            new = {cache.server.binding.cache_name: live, "use_cache": True, "logits_to_keep": 1}
            with torch.no_grad():
                started = time.thread_time()
                model(input_ids=text[:, done:], **new)
                limit.append(time.thread_time() - started)
            done = text.shape[1]
            text = generate(model, text, answer, past_key_values=cache)
            with torch.no_grad():
                for position in range(done, text.shape[1] - 1):
                    model(input_ids=text[:, position : position + 1], **new)
            done = text.shape[1] - 1
    return {
        "computed": computed,
        "prefill_over_limit": sum(spent[1:]) / sum(limit[1:]),
        "prefill_milliseconds": [round(1000 * one, 1) for one in spent],
        "limit_milliseconds": [round(1000 * one, 1) for one in limit],
    }


def over_text(model: Any, tokenizer: Any, answer: int) -> dict[str, Any]:
    """The same through a chat template: the answers as text, and put together from ids."""
    tokenizer.chat_template = TEMPLATE
    questions = [f"What does part {turn} of the text say of a checkpoint, and of a cut?" for turn in range(TURNS)]
    found: dict[str, list[int]] = {"text": [], "ids": [], "tokens_of_the_message": []}
    for way in ("text", "ids"):
        messages = [{"role": "system", "content": TEXT[:2000]}]
        text = torch.empty((1, 0), dtype=torch.long)
        with SparsePrefixCache(model, tokenizer) as cache:
            for question in questions:
                messages.append({"role": "user", "content": question})
                rendered = messages if way == "text" or not text.numel() else messages[-1:]
                ids = tokenizer.apply_chat_template(
                    rendered, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )["input_ids"]
                if way == "ids":
                    if text.numel():
                        found["tokens_of_the_message"].append(ids.shape[1])
                    ids = torch.cat([text, ids], dim=1)
                text = generate(model, ids, answer, past_key_values=cache)
                found[way].append(cache.last_request.computed_tokens)
                said = tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": said})
    return found


def decoding(model: Any, tokens: int = 48) -> dict[str, float]:
    """Operations and CPU time of decoding with a handle, over stock."""
    ids = words(200, model, 7)

    def operations(count: int, **options: Any) -> int:
        with Operations() as mode:
            generate(model, ids, count, **options)
        return mode.count

    with SparsePrefixCache(model) as cache:
        given = {"past_key_values": cache}
        generate(model, ids, tokens, **given)
        # The prefill is the same each time (nothing is left to compute), so what is longer is decoding.
        steps = {
            name: operations(tokens, **way) - operations(tokens - 16, **way)
            for name, way in (("stock", {}), ("ours", given))
        }
        pairs = [
            pair
            for repeat in range(PAIRS)
            for pair in decode_steps.steps(model, cache, words(200, model, repeat)[0].numpy(), tokens, repeat)
        ]
    # Each step against its neighbour, and one median a prompt: a machine drifts by more in a second.
    ratios = [
        statistics.median(own / stock for stock, own in pairs[start : start + tokens])
        for start in range(0, len(pairs), tokens)
    ]
    low, high = bounds(ratios)
    return {
        "operations_a_token_stock": steps["stock"] / 16,
        "operations_a_token_ours": steps["ours"] / 16,
        "cpu_over_stock": statistics.median(ratios),
        "bound_95": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["jamba-3m", "mamba-130m", "jamba-134m"])
    parser.add_argument("--out", type=results_file, default=Path(__file__).parent / "results" / "chat.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": describe_machine()}
    for name in args.models:
        model, tokenizer = load(name, [TEXT])
        model.generation_config.eos_token_id = None
        found[name] = {}
        short = over_ids(model, 400, 40, 60)
        found[name]["beside_llama_cpp"] = {**short, "sum": sum(short["computed"]), "llama_cpp": 727}
        print(name, found[name]["beside_llama_cpp"], flush=True)
        for part, run in (("decoding", decoding), ("answers_of_150", lambda one: over_ids(one, 400, 40, 150))):
            found[name][part] = run(model)
            print(name, part, found[name][part], flush=True)
        found[name]["over_text"] = over_text(model, tokenizer, 60)
        print(name, "over_text", found[name]["over_text"], flush=True)
    write_results(args.out, found)


if __name__ == "__main__":
    main()
