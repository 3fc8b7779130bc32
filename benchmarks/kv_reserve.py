"""What joining keys and values once a segment takes in a cold prefill, beside room reserved for the whole prompt.

    python -m benchmarks.kv_reserve                    CPU seconds of one thread

Both launch two copies a layer and segment: one that writes what is held and what is new into a new tensor, or one that
writes what is new where room was kept. The share is of the model's own forward of a shorter prompt, taken as often
as it fits: attention grows with the prompt, so the true share is smaller.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from hf_sparse_cache.tools.builtin import build_model


SEGMENT = 256


def joined(segments: list[torch.Tensor], count: int) -> None:
    """As transformers does: `(1, heads, length, dim)` anew in every segment."""
    held = segments
    for _ in range(count - 1):
        held = [torch.cat([old, new], dim=-2) for old, new in zip(held, segments, strict=True)]


def reserved(segments: list[torch.Tensor], count: int) -> None:
    """Into room for all of them."""
    room = [one.new_empty(*one.shape[:2], SEGMENT * count, one.shape[-1]) for one in segments]
    for index in range(count):
        for whole, new in zip(room, segments, strict=True):
            whole[:, :, index * SEGMENT : (index + 1) * SEGMENT].copy_(new)


def least(call: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds, the least of some, after one to warm up."""
    call()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["jamba-30m", "zamba2-30m"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--forward", type=int, default=1024, help="tokens of the forward that both are compared with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        model = build_model(name)
        ids = torch.randint(3, 8000, (1, options.forward))
        with torch.no_grad():
            layers = model(ids[:, :SEGMENT], use_cache=True).past_key_values.layers
            forward = least(partial(model, ids), 1) * options.tokens / options.forward
        held = [(one.keys, one.values) for one in layers if getattr(one, "keys", None) is not None]
        segments = [tensor for pair in held for tensor in pair]
        count = options.tokens // SEGMENT
        cat, room = (least(partial(way, segments, count)) for way in (joined, reserved))
        print(
            f"{name}, {options.tokens:,} tokens, {len(segments) // 2} layers: joined {1000 * cat:.1f} ms, reserved "
            f"{1000 * room:.1f} ms; reserving saves at most {(cat - room) / forward:.2%} of {forward:.2f} s"
        )


if __name__ == "__main__":
    main()
