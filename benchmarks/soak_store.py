"""Does the store's memory stay flat? 20,000 requests over real workloads, without a model.

    python benchmarks/soak_store.py ../shared/workloads [--requests 20000] [--disk]

Payloads are real arrays, so what leaks shows in the resident memory of the process: its mean over the last quarter of
the requests must lie within 2 % of that over the second. Skipped, with a line, when the folder is absent.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.planning.policy import limited
from hf_sparse_cache.planning.segments import Bitwise
from hf_sparse_cache.request import open_request
from hf_sparse_cache.tools.traces import load_trace


GRID, STATE_BYTES, KV_BYTES = 256, 64 * 1024, 16
FOLDERS = ("sysprompts_open", "docqa_squality", "chat_oasst", "agent_tau_airline", "rev_rustbook")


class Array:
    """A payload that takes the memory it says."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.ones(nbytes, np.uint8)
        self.nbytes = nbytes

    def moved_to(self, tier: str) -> "Array":
        return self

    def to_bytes(self, record: str, tokens: np.ndarray) -> bytes:
        return safetensors.numpy.save({"tokens": tokens, "data": self.data}, {"unit": record})

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> "Array":
        return cls(len(safetensors.numpy.load(bytes(data))["data"]))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--disk", action="store_true", help="with a disk tier of 256 MiB in a temporary folder")
    options = parser.parse_args()
    if not options.workloads.is_dir():
        print(f"{options.workloads} is absent: nothing to soak the store with")
        return
    traces = [load_trace(options.workloads / name) for name in FOLDERS]
    prompts = [np.ascontiguousarray(ids, dtype=np.int32) for trace in traces for ids in trace]
    order = np.random.default_rng(0).permutation(len(prompts))
    with tempfile.TemporaryDirectory() as folder:
        disk = {"disk_memory": "256MiB", "disk_dir": folder} if options.disk else {}
        store = CheckpointStore("64MiB", max_remembered=2**23, **disk)
        for tier in store.tiers:
            tier.reader = Array.from_bytes
        policy = limited(make_policy("learned"), 8)
        resident, resumed, total, start = [], 0, 0, time.perf_counter()
        for index in itertools.islice(itertools.cycle(order), options.requests):
            ids = prompts[index]
            with open_request(store, policy, ids, Bitwise(CutRule(GRID))) as request:
                for position in request.planned:
                    request.add(position, Array(STATE_BYTES), lambda a, b: Array(KV_BYTES * (b - a)))
            resumed, total = resumed + request.resumed_tokens, total + len(ids)
            assert all(tier.used_bytes + tier.reserved_bytes <= (tier.max_memory or 0) for tier in store.tiers)
            store.verify()
            resident.append(resident_bytes())
        store.close(flush=False)
    quarter = len(resident) // 4
    second, last = np.mean(resident[quarter : 2 * quarter]), np.mean(resident[-quarter:])
    found = {
        "requests": len(resident),
        "seconds": round(time.perf_counter() - start, 1),
        "resident_second_quarter_bytes": int(second),
        "resident_last_quarter_bytes": int(last),
        "growth": round(float(last / second - 1), 4),
        "flat": bool(abs(last / second - 1) <= 0.02),
        "evictions": store.evictions,
        "demotions": store.demotions,
        "resumed_share": round(resumed / total, 3),
        "remembered_tokens": store.remembered_tokens,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
