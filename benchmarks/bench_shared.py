"""What does a shared store cost: to open, to look up, and to start warm from?

    python -m benchmarks.bench_shared
    python -m benchmarks.bench_shared opening looking --json benchmarks/results/shared.json

A minute or two each, printed as they are measured; those that are run take their places in the file.

opening     a store on a folder with 10,000 units, against one on a folder with 10
looking     up a prompt of 100,000 tokens that parts from what is stored: places looked at, and CPU time against
            matching it in memory, in a tree of 10,000 prompts that part from it along its way, and in one of 10,000
            that part from it at its first token
warm        wall time of the first request about a document that a process finds in the folder, against the larger of
            reading (the bytes of the files that it needs, and proving and unpacking them, one after the other) and
            computing (the same request out of memory)

Each pair runs both ways in alternating order. Printed are the median of the ratios and the interval that holds it with
95 % confidence, from order statistics.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from benchmarks.bench_new_tokens import bounds
from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.store import files
from hf_sparse_cache.store.addresses import Text, file_of
from hf_sparse_cache.store.seal import Seal
from hf_sparse_cache.store.shelf import Shelf
from hf_sparse_cache.store.storage import Folder
from hf_sparse_cache.store.unit import Unit
from hf_sparse_cache.store.unit_files import Packing
from hf_sparse_cache.tools.builtin import build_model
from hf_sparse_cache.tools.machine import describe_machine


LONG = 100_000
VOCABULARY = 8192
CASES = ("opening", "looking", "warm")


class Payload:
    """A state of a kilobyte."""

    nbytes = 1024

    def moved_to(self, tier):
        return self

    def to_bytes(self, record, tokens):
        return safetensors.numpy.save({"tokens": tokens, "data": np.zeros(1024, np.uint8)}, {"unit": record})


def filled(folder, count, long):
    """A folder with so many units, all but three of prompts of their own; those three lie on `long`."""
    storage, shelf = Folder(folder), Shelf(Folder(folder))
    packing, draw = Packing(Seal(), files.same_name, steady=True), np.random.RandomState(0)
    texts = [draw.randint(0, VOCABULARY, draw.randint(300, 3000)).astype(np.int32) for _ in range(count - 3)]
    for tokens in [long[:512], long[:65_792], long[:90_112], *texts]:
        text, lineage = Text(Seal(), "", tokens), Lineage([len(tokens)])
        name, data = packing.state(Unit("", tokens, lineage, Payload()), [])
        storage.put(text.name(lineage, False, name), data)
        shelf.post(text, lineage, shelf.way(text))
    return folder


def ratios(one, other, pairs, clock=time.process_time, rounds=1):
    """Ratios of what two calls take, `rounds` times each; each leads every second pair."""
    found, spent = [], {}
    for index in range(pairs):
        for call in (one, other) if index % 2 else (other, one):
            gc.collect()
            started = clock()
            for _ in range(rounds):
                call()
            spent[call] = clock() - started
        found.append(spent[one] / spent[other])
    return found


def opening(few, many, pairs):
    """CPU time of opening many units over that of opening few."""

    def opened(folder):
        CheckpointStore(shared=folder).close(flush=False)

    return ratios(lambda: opened(many), lambda: opened(few), pairs, rounds=20)


def tree(long, along):
    """A store in memory that remembers 10,000 prompts."""
    store, draw = CheckpointStore("1GiB", max_remembered=None), np.random.RandomState(1)
    store.remember(long)
    for index in reversed(range(10_000)):  # the same tree in any order; so none has to walk past all the others
        common = (index + 1) * len(long) // 10_001 if along else 0
        tail = draw.randint(VOCABULARY, 2 * VOCABULARY, 64).astype(np.int32)
        store.remember(np.concatenate([long[:common], tail]))
    return store


def looking(folder, long, pairs):
    """Places looked at, and CPU time over that of matching in memory; prompts leave the text here and there."""
    prompts = []
    for common in (99_000, 70_000, 5_000):
        tail = np.full(LONG - common, 2 * VOCABULARY + common, dtype=np.int32)
        prompts.append(np.concatenate([long[:common], tail]).astype(np.int32))
    deepest = (90_112, 65_792, 512)

    def looked(prompt, position=None):
        shelf, text = Shelf(Folder(folder)), Text(Seal(), "", prompt)

        def fits(unit):
            return unit.position < len(prompt) and unit.tokens == text.digest(unit.position)[:16]

        found, _ = shelf.find(text, fits, 0, lambda name: False)
        assert position is None or found[0].position == position
        return shelf.looks

    looks = [looked(prompt, position) for prompt, position in zip(prompts, deepest, strict=True)]
    found = {"most places looked at": max(looks)}
    for name, along in (("part along the way", True), ("part at once", False)):
        store = tree(long, along)

        def match(store=store):
            for prompt in prompts:
                store.match(prompt)

        found[name] = ratios(lambda: [looked(prompt) for prompt in prompts], match, pairs)
    return found


def needed(folder, position):
    """The files that a prompt needs which resumes at a position: of the state, and of the keys and values below it."""
    paths = {file_of(path.name): path for path in Path(folder).rglob("*.safetensors")}
    for path in Path(folder).rglob("*-state-*.safetensors"):
        record, _ = files.peek(path)
        if record["position"] == position:
            return [path, *(paths[name] for *_, name in record["kv"])]
    raise FileNotFoundError(f"no state at {position}")


def warm_start(model_name, tokens, pairs, folder):
    """Wall time of a warm start over the larger of reading and computing."""
    model, draw = build_model(model_name), np.random.RandomState(2)
    document = draw.randint(3, 1000, tokens)

    def question(index):
        return torch.from_numpy(np.concatenate([document, draw.randint(3, 1000, 32), [index + 3]])).long()[None]

    def served(cache, ids):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1, pad_token_id=0
        )
        return cache.last_request.resumed_tokens

    first = CheckpointStore(None, shared=folder)
    with SparsePrefixCache(model, store=first) as cache:
        cache.mark(torch.from_numpy(document))
        served(cache, question(0))
        first.flush()
        seconds = []
        found, start, paths = [], time.perf_counter, needed(folder, tokens)
        for index in range(1, pairs + 1):
            ids, fresh = question(index), question(1_000 + index)  # the store may keep the end of one it was asked
            spent = {}
            for what in ("read", "computed", "warm")[:: 1 if index % 2 else -1]:
                first.flush()  # what was stored before is not written meanwhile
                gc.collect()
                if what == "read":
                    began = start()
                    for path in paths:
                        files.proved(path, path.read_bytes())
                elif what == "computed":
                    began = start()
                    assert served(cache, ids) == tokens
                else:
                    with SparsePrefixCache(model, store=CheckpointStore(None, shared=folder)) as other:
                        other.mark(torch.from_numpy(document))
                        # What any first request costs, such as a look at the weights; others have stored it, too.
                        served(other, torch.tensor([[5, 6, 7]]))
                        other.store.flush()
                        before = other.stats().shared.get("resumed from", 0)
                        began = start()
                        resumed = served(other, fresh)
                        spent[what] = start() - began
                        read = other.stats().shared["resumed from"] - before
                        assert (resumed, read) == (tokens, 1), other.last_request
                        other.store.close()
                    continue
                spent[what] = start() - began
            found.append(spent["warm"] / max(spent["read"], spent["computed"]))
            seconds.append(spent)
    first.close(flush=False)
    medians = {what: statistics.median(spent[what] for spent in seconds) for what in seconds[0]}
    return {"ratio": found, "seconds": medians, "bytes": sum(path.stat().st_size for path in paths)}


def summary(values):
    """Median and the interval that holds it."""
    low, high = bounds(values)
    return {"median": statistics.median(values), "low": low, "high": high, "pairs": len(values)}


def shown(found):
    parts = ", ".join(f"{what} {1000 * seconds:.1f} ms" for what, seconds in found.get("seconds", {}).items())
    return "{median:.3f} ({low:.3f} to {high:.3f})".format(**found) + (f"; medians: {parts}" if parts else "")


def measured(case, arguments, folder):
    """The figures of one case, each as it is there."""
    long = np.random.RandomState(3).randint(0, VOCABULARY, LONG).astype(np.int32)
    if case == "warm":
        for name in arguments.model or ("mamba-21m", "zamba2-30m"):
            found = warm_start(name, arguments.tokens, arguments.pairs, Path(folder, name))
            yield f"warm start, {name}", {**summary(found.pop("ratio")), **found}
        return
    many = Path(folder, "many")
    if not many.exists():
        print(f"{arguments.units:,} units are filed", flush=True)
        filled(many, arguments.units, long)
    if case == "opening":
        few = filled(Path(folder, "few"), 10, long)
        yield f"opening {arguments.units:,} units over opening 10", summary(opening(few, many, arguments.pairs))
        return
    looked = looking(many, long, arguments.pairs)
    yield "most places looked at", looked.pop("most places looked at")
    for name, found in looked.items():
        yield f"look-up over memory, 10,000 prompts that {name}", summary(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--model", action="append", help="a built-in model; default mamba-21m and zamba2-30m")
    parser.add_argument("--tokens", type=int, default=2048, help="of the document of the warm start")
    parser.add_argument("--json", type=results_file)
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))}: give some of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases or CASES:
            results = {}
            for name, found in measured(case, arguments, folder):
                results[name] = found
                print(f"{name}: {found if isinstance(found, int) else shown(found)}", flush=True)
            if arguments.json is not None:
                keep(arguments.json, case, results)


def keep(path, case, results):
    """Puts the figures of one case into a file, beside those of others."""
    said = json.loads(path.read_text()) if path.exists() else {}
    command = shlex.join(["python", "-m", "benchmarks.bench_shared", *sys.argv[1:]])
    said[case] = {"command": command, "machine": describe_machine(), "results": results}
    write_results(path, said)


if __name__ == "__main__":
    main()
