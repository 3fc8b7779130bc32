"""How fast is a match among many stored prompts, and what do many questions on one document cost in bytes?

    python benchmarks/bench_store.py            a small table
    python benchmarks/bench_store.py --json     the same as one JSON object

1. Matching a prompt of 100,000 tokens against 10,000 stored prompts, relative to 100, and relative to the time in
   which the built-in Jamba of 30 M parameters prefills 256 tokens. The prompt is one of those stored, so all of it is
   compared. The worst case is reported too: all others leave this very prompt, each at a depth of its own.
2. Bytes stored for 100 questions on one document, relative to those of one question plus the questions' own.
3. What a restart costs: bytes of weights hashed a second, and a checkpoint written to and read from the disk tier.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from hf_sparse_cache import CheckpointStore, SparsePrefixCache, fingerprint
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.planning.policies import NoCheckpoints
from hf_sparse_cache.planning.segments import Bitwise
from hf_sparse_cache.request import open_request
from hf_sparse_cache.store.unit import Unit
from hf_sparse_cache.tools.builtin import build_model
from hf_sparse_cache.tools.machine import describe_machine


LONG, GRID, MODEL = 100_000, 256, "jamba-30m"


@dataclass(frozen=True)
class Sized:
    """A payload without content."""

    nbytes: int


def serve(store, ids, positions, kv_bytes=0):
    with open_request(store, NoCheckpoints(), ids, Bitwise(CutRule(GRID))) as request:
        for position in positions:
            if position > request.resumed_tokens:
                request.add(position, Sized(1000), (lambda a, b: Sized(kv_bytes * (b - a))) if kv_bytes else None)


def match_seconds(prompts: int, edited: bool = False) -> float:
    """Median seconds to match a stored prompt of LONG tokens.

    Args:
        prompts: stored prompts: questions on 100 documents as long as the target, which is one of them; or, if
            `edited`, prompts that leave the target at random depths, each of which splits an edge on its path.
    """
    draw = np.random.default_rng(0)
    store = CheckpointStore(None, "lru", max_remembered=None)
    documents = [draw.integers(0, 50_000, LONG - 600).astype(np.int32) for _ in range(1 if edited else 100)]
    for number in range(prompts):
        document = documents[number % len(documents)]
        depth = int(draw.integers(1, len(document))) if edited and number else len(document)
        target = np.concatenate([document[:depth], draw.integers(0, 50_000, 600).astype(np.int32)])
        store.put(Unit("", target, Lineage([len(target) - 50]), Sized(1000)))
        if not number:
            first = target
    times = []
    for _ in range(200):
        start = time.perf_counter()
        found = store.match(first)
        times.append(time.perf_counter() - start)
        assert found.overlap == LONG and len(store) == prompts
    return statistics.median(times)


def prefill_seconds(model) -> float:
    ids = torch.randint(3, 1000, (1, 256))
    times = []
    with torch.no_grad():
        for _ in range(7):
            start = time.perf_counter()
            model(ids, use_cache=True)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def bytes_of_questions() -> tuple[float, int, int]:
    draw = np.random.default_rng(1)
    document = draw.integers(0, 50_000, 8192).astype(np.int32)
    questions = [draw.integers(0, 50_000, 600).astype(np.int32) for _ in range(100)]

    def stored(count: int, with_document: bool = True) -> int:
        store = CheckpointStore(None, "lru")
        for question in questions[:count]:
            ids = np.concatenate([document, question])
            serve(store, ids, [4096, 8192, 8448] if with_document else [4096, 8192], kv_bytes=100)
        return store.used_bytes

    alone = stored(1, with_document=False)
    own = stored(1) - alone
    return stored(100) / (stored(1) + 99 * own), stored(1), stored(100)


def disk_seconds(model) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, SparsePrefixCache(model, grid=GRID, policy="balanced") as cache:
        ids = torch.randint(3, 1000, (1, 2100))
        model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0)
        fingerprint._digests.clear()
        start = time.perf_counter()
        fingerprint.weights_digest(model)
        hashed = time.perf_counter() - start
        start = time.perf_counter()
        count = cache.save_pretrained(folder)
        saved = time.perf_counter() - start
        start = time.perf_counter()
        with SparsePrefixCache.from_pretrained(folder, model, policy="balanced") as again:
            loaded = time.perf_counter() - start
            assert len(again.store) == count
        weights = sum(tensor.nbytes for tensor in model.parameters())
        return {
            "weights_bytes": weights,
            "hash_bytes_per_second": weights / hashed,
            "checkpoints": count,
            "stored_bytes": cache.store.used_bytes,
            "save_seconds": saved,
            "load_seconds": loaded,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = build_model(MODEL)
    few, many = match_seconds(100), match_seconds(10_000)
    worst = match_seconds(1000, edited=True)
    prefill = prefill_seconds(model)
    ratio, one, hundred = bytes_of_questions()
    found = {
        "match_seconds_100": few,
        "match_seconds_10000": many,
        "match_ratio": many / few,
        "match_seconds_1000_branches_on_the_path": worst,
        "prefill_256_seconds": prefill,
        "match_share_of_prefill": many / prefill,
        "bytes_ratio": ratio,
        "bytes_1_question": one,
        "bytes_100_questions": hundred,
        **disk_seconds(model),
        "machine": describe_machine(),
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"match of {LONG:,} tokens   {1e6 * few:,.0f} us among 100 prompts, {1e6 * many:,.0f} us among 10,000:")
    share = f"{100 * many / prefill:.2f} % of a prefill of 256 tokens (bound 5)"
    print(f"  {many / few:.2f} times as long (bound 1.5), {share}")
    print(f"  with 1,000 branches on its own path {1e6 * worst:,.0f} us, {100 * worst / prefill:.2f} % of it")
    print(f"bytes of 100 questions   {ratio:.4f} of one plus the questions' own (bound 1.05)")
    print(
        f"weights hashed at {found['hash_bytes_per_second'] / 1e9:.2f} GB/s; {found['checkpoints']} checkpoints, "
        f"{found['stored_bytes'] / 2**20:.1f} MiB, saved in {found['save_seconds']:.2f} s, loaded in "
        f"{found['load_seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()
