"""Traffic whose truth is known: who comes back is drawn here, and what a cache could save at most can be computed.

`bound` looks at everything that a cache could keep, from one request to the next, and at all that fits together: no
cache, whatever it knows of the future, can resume more. A test holds it against the true optimum of small traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_sparse_cache.store.forest import Forest
from hf_sparse_cache.store.tree import Node


Prompts = list[np.ndarray]
VOCABULARY = 50_000


def text(generator: np.random.Generator, tokens: float) -> np.ndarray:
    """So many tokens that nobody sends again by chance."""
    return generator.integers(0, VOCABULARY, max(2, round(tokens))).astype(np.int32)


def documents(generator: np.random.Generator, requests: int, asked: int = 5, alive: int = 12) -> Prompts:
    """Long documents, each asked exactly so many times, so many at a time."""
    prompts: Prompts = []
    left: dict[int, tuple[np.ndarray, int]] = {}
    while len(prompts) < requests:
        while len(left) < alive:
            left[len(prompts) * alive + len(left)] = text(generator, generator.uniform(800, 1600)), asked
        key = int(generator.choice(list(left)))
        document, times = left.pop(key)
        prompts.append(np.concatenate([document, text(generator, 40)]))
        if times > 1:
            left[key] = document, times - 1
    return prompts


def sessions(
    generator: np.random.Generator, requests: int, end: float = 0.25, alive: int = 16, hub: int = 0
) -> Prompts:
    """Conversations that grow turn by turn and end after each with the same probability; all begin with a hub."""
    prompts: Prompts = []
    head = text(generator, hub) if hub else np.zeros(0, dtype=np.int32)
    open_ones: Prompts = []
    while len(prompts) < requests:
        while len(open_ones) < alive:
            open_ones.append(head)
        index = int(generator.integers(alive))
        prompts.append(np.concatenate([open_ones[index], text(generator, generator.exponential(150) + 20)]))
        open_ones[index] = np.concatenate([prompts[-1], text(generator, 60)])
        if generator.random() < end:
            open_ones.pop(index)
    return prompts


def edits(generator: np.random.Generator, requests: int, texts: int = 6) -> Prompts:
    """Texts that are sent again and again, each time changed from some place on."""
    versions = [text(generator, generator.uniform(1200, 2000)) for _ in range(texts)]
    prompts: Prompts = []
    while len(prompts) < requests:
        index = int(generator.integers(texts))
        prompts.append(versions[index])
        kept = int(generator.uniform(0.1, 1.0) * len(versions[index]))
        versions[index] = np.concatenate([versions[index][:kept], text(generator, len(versions[index]) - kept)])
    return prompts


def hubs(generator: np.random.Generator, requests: int, count: int = 60) -> Prompts:
    """Prompts of assistants, some popular and most not, each with a question that is never asked again."""
    heads = [text(generator, generator.uniform(300, 2500)) for _ in range(count)]
    popularity = 1.0 / np.arange(1, count + 1)
    chosen = generator.choice(count, requests, p=popularity / popularity.sum())
    return [np.concatenate([heads[index], text(generator, 50)]) for index in chosen.tolist()]


def bursts(generator: np.random.Generator, requests: int) -> Prompts:
    """Sessions, with a document now and then that is asked many times within a few requests and then never again."""
    prompts: Prompts = []
    background = sessions(generator, requests + 12, 0.1, 8)[::-1]
    while len(prompts) < requests:
        prompts += [background.pop() for _ in range(int(generator.integers(3, 12)))]
        document = text(generator, 1500)
        prompts += [np.concatenate([document, text(generator, 30)]) for _ in range(int(generator.integers(4, 9)))]
    return prompts[:requests]


def once(generator: np.random.Generator, requests: int) -> Prompts:
    """Documents asked three times, among as many that are never sent again."""
    asked = documents(generator, requests, 3, 6)[::-1]
    return [asked.pop() if generator.random() < 0.5 else text(generator, 1300) for _ in range(requests)]


KINDS: dict[str, Callable[[np.random.Generator, int], Prompts]] = {
    "documents": documents,
    "sessions": sessions,
    "sessions behind a hub": lambda generator, requests: sessions(generator, requests, hub=700),
    "edits": edits,
    "hubs": hubs,
    "bursts": bursts,
    "once": once,
}


@dataclass(frozen=True)
class Stay:
    """A state at a junction, kept from one request that passes it to the next, `first` to `last`."""

    position: int
    own: int  # tokens since the junction above
    first: int
    last: int


def stays(prompts: Sequence[np.ndarray]) -> list[Stay]:
    """Everything that it can make sense to keep, whoever decides."""
    forest = Forest()
    for ids in prompts:
        forest.insert(ids, "", 0)
    passed: dict[Node, int] = {}
    found = []
    for now, ids in enumerate(prompts):
        for node in forest.walk(ids, "")[0]:
            if node in passed:
                found.append(Stay(node.end, len(node.tokens), passed[node], now))
            passed[node] = now
    return found


def bound(
    prompts: Sequence[np.ndarray],
    max_memory: float,
    state_bytes: float,
    kv_bytes: float = 0.0,
    counted: int = 0,
    steps: int = 600,
) -> float:
    """Most tokens that any cache of this size can resume, from request number `counted` on.

    Each request resumes at one state, whose stay ends with it. At every moment the stays fit into the memory, each
    with its state and, at least, the keys and values behind the junction above. Every price of memory over time gives
    an upper bound (the Lagrangian dual), and the least one is sought by steps against the subgradient.
    """
    kept = [stay for stay in stays(prompts) if stay.last >= counted]
    if not kept:
        return 0.0
    worth = np.asarray([stay.position for stay in kept], dtype=float)
    size = np.asarray([state_bytes + kv_bytes * stay.own for stay in kept])
    first, last = (np.asarray([getattr(stay, name) for stay in kept]) for name in ("first", "last"))
    price = np.zeros(len(prompts))  # of a byte, from each request to the next
    best = np.inf
    for step in range(steps):
        paid = np.concatenate([[0.0], np.cumsum(price)])
        gain = worth - size * (paid[last] - paid[first])
        order = np.lexsort((gain, last))
        chosen = order[
            np.append(last[order][1:] != last[order][:-1], True)
        ]  # the best stay that ends with each request
        chosen = chosen[gain[chosen] > 0]
        value = max_memory * price.sum() + gain[chosen].sum()
        best = min(best, float(value))
        used = np.zeros(len(prompts) + 1)
        np.add.at(used, first[chosen], size[chosen])
        np.add.at(used, last[chosen], -size[chosen])
        excess = np.cumsum(used)[:-1] - max_memory
        excess[(price == 0.0) & (excess < 0)] = 0.0
        if not excess.any():
            break
        length = 0.3 * value / (excess @ excess) / (1.0 + step / 60)
        price = np.maximum(price + length * excess, 0.0)
    return best
