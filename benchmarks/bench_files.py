"""What files take and how fast they are read, beside plain safetensors: `python -m benchmarks.bench_files`.

Built-in models serve prompts and save what they hold, each file twice, packed and plain. Reading is what a store does
(`files.read`, then the payload): the bytes from the page cache, their checksum, unpacking, the tensors. CPU time, both
in turns; each figure is the median of the ratios of all files of a kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.store import files, planes
from hf_sparse_cache.store.headers import canonical
from hf_sparse_cache.tools.builtin import build_model
from hf_sparse_cache.tools.machine import describe_machine


MODELS = ("mamba-21m", "jamba-30m", "zamba2-30m", "bamba-27m", "qwen3.5-29m", "jamba-134m", "qwen3.5-143m")
RESULTS = Path(__file__).parent / "results" / "files.json"
TOKENS, PROMPTS = 2048, 2


def read(path: Path) -> None:
    """A file as a store reads it."""
    LayerTensors.from_bytes(files.read(path))


def load(path: Path) -> None:
    """A file as safetensors reads it, proving nothing."""
    LayerTensors.from_bytes(path.read_bytes())


def spent(call: Callable[[], Any], rounds: int) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    for _ in range(rounds):
        call()
    return (time.process_time() - started) / rounds


def compared(plain: bytes, folder: Path, kind: str, pairs: int) -> dict[str, Any]:
    """One file, packed and plain."""
    paths = []
    for data in (plain, planes.packed(plain)):
        paths.append(folder / files.new_name(kind, data))
        files.write(paths[-1], data)
    rounds = max(1, 2**22 // len(plain))
    times: dict[str, list[float]] = {"read plain": [], "read packed": [], "load plain": []}
    for _ in range(pairs):
        times["read plain"].append(spent(lambda: read(paths[0]), rounds))
        times["read packed"].append(spent(lambda: read(paths[1]), rounds))
        times["load plain"].append(spent(lambda: load(paths[0]), rounds))
    median = {name: statistics.median(each) for name, each in times.items()}
    return {
        "bytes": len(plain),
        "size": paths[1].stat().st_size / len(plain),
        "speed": median["read plain"] / median["read packed"],
        "speed beside no proof": median["load plain"] / median["read packed"],
        "write seconds per GB": spent(lambda: planes.packed(plain), 1) / len(plain) * 1e9,
    }


@torch.no_grad()
def measure(name: str, dtype: torch.dtype, storage: str, pairs: int) -> dict[str, Any]:
    """The files of one model, by kind."""
    model = build_model(name).to(dtype).eval()
    found: dict[str, list[dict[str, Any]]] = {"state": [], "kv": []}
    options: dict[str, Any] = {"max_memory": None, "prove": False, "storage": storage}
    with SparsePrefixCache(model, **options) as cache, tempfile.TemporaryDirectory() as folder:
        for seed in range(PROMPTS):
            ids = torch.randint(3, 8192, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
            model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
        seen: set[int] = set()
        for _, tokens, checkpoint in cache.store.checkpoints():
            parts = [("state", checkpoint.state, tokens), *(("kv", part.payload, ()) for part in checkpoint.chain())]
            for kind, payload, ids in parts:
                if id(payload) not in seen and len(found[kind]) < 4:
                    seen.add(id(payload))
                    held = torch.tensor(ids, dtype=torch.int32).numpy()
                    plain = canonical(payload.to_bytes(json.dumps({"format": 3}), held))
                    found[kind].append(compared(plain, Path(folder), kind, pairs))
    return {
        kind: {key: statistics.median(item[key] for item in each) for key in each[0]} | {"files": len(each)}
        for kind, each in found.items()
        if each
    }


def main() -> None:
    """Measures the models that are named, or seven of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default: seven of 21 to 143 M parameters")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=results_file, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found: dict[str, Any] = {"machine": describe_machine(), "pairs": asked.pairs, "models": {}}
    for name in asked.models or MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            for storage in ("exact", "bf16") if name == "qwen3.5-29m" else ("exact",):
                key = f"{name} {str(dtype).removeprefix('torch.')} {storage}"
                found["models"][key] = measured = measure(name, dtype, storage, asked.pairs)
                for kind, each in measured.items():
                    print(f"{key}, {kind}: " + ", ".join(f"{k} {v:.3g}" for k, v in each.items()), flush=True)
    write_results(asked.out, found)


if __name__ == "__main__":
    main()
