"""Is a token decoded as fast behind the cache as without it? A case of `bench_costs`.

A shared machine drifts by more in a second than the cache could cost a token. So the two live caches, the stock's and
the one that the handle filled, take every step in turn, and each step is compared with its own neighbour.
"""

import statistics
import time

import torch
from transformers import DynamicCache

from hf_sparse_cache.models.inputs import Prompts


def decode(arguments, model, handle, prompts):
    """Times of decoding steps on a live cache over those on the stock cache.

    Args:
        handle: the model's cache.
        prompts: int32 of shape `(length,)` each; all are decoded `arguments.new_tokens` tokens far in each repeat.

    Returns:
        The median ratio of neighbouring steps, one value a repeat.
    """
    values = []
    for repeat in range(arguments.repeats):
        pairs = [pair for ids in prompts for pair in steps(model, handle, ids, arguments.new_tokens, repeat)]
        values.append(statistics.median(own / stock for stock, own in pairs))
    return {"seconds a token, cache / stock": (values, "<= 1.01")}


@torch.no_grad()
def steps(model, handle, ids, count, repeat):
    """Seconds of CPU of each step without and with the cache."""
    name, row = handle.server.binding.cache_name, torch.from_numpy(ids).long()[None]
    stock = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(input_ids=row, use_cache=True, **{name: stock})
    own = handle.server.live_cache()
    handle.server.serve(own, Prompts.of(row, {}), {"use_cache": True})
    length = len(ids)
    for step in range(count):
        length += 1
        seconds = [0.0, 0.0]
        for which in (0, 1) if (step + repeat) % 2 else (1, 0):
            inputs = model.prepare_inputs_for_generation(
                torch.full((1, length), 7),
                next_sequence_length=1,
                is_first_iteration=False,
                use_cache=True,
                attention_mask=torch.ones(1, length, dtype=torch.long),
                **{name: (stock, own)[which]},
            )
            started = time.thread_time()
            model(**inputs, return_dict=True)
            seconds[which] = time.thread_time() - started
        yield seconds
