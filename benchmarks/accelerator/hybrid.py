"""What the cache is worth on one hybrid of a known size: cold, warm, in batches, decoding, between tiers, in memory.

Clocks are read when the device has finished; every ratio is of calls that ran in turn.
"""

import gc
import statistics
import time

import numpy as np
import torch

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.bench.clock import timed
from hf_sparse_cache.bench.contenders import Cached, Contender, DeepCopy, Limit, Replayed
from hf_sparse_cache.bench.workloads import WorkloadRequest

from . import hybrids
from .kernels import profiled, taken_up


REPLAYABLE, BITWISE = "replayable", "bitwise"


class Hybrid:
    """One model and the sizes of what it is asked.

    Args:
        ledger: where rows go.
        setting: `model`, `device`, `dtype`, `seed`, and the sizes (see `benchmarks.gpu`).
    """

    def __init__(self, ledger, setting):
        self.ledger, self.setting, self.name = ledger, setting, setting["model"]
        self.sizes = setting["sizes"]
        started = time.perf_counter()
        dtype = getattr(torch, setting["dtype"])
        self.model = hybrids.build(self.name, setting["device"], dtype, setting["seed"])
        _finish(self.model)
        self.built_seconds = time.perf_counter() - started
        self.draw = np.random.RandomState(setting["seed"])

    def measure(self):
        """All sections, those that say the most first; stops where the time is over."""
        sizes = self.sizes
        todo = [("handle", "made", self.handle), ("profile", "warm", self.profile)]
        shortest, *longer = sizes["prefixes"]
        grids = [(grid, shortest) for grid in sizes["grids"]]
        todo += [("warm", f"{mode}, {shortest}", self.warm, mode, shortest) for mode in (REPLAYABLE, BITWISE)]
        todo += [("cold", f"{mode}, {tokens}, {grid or 'default'}", self.cold, mode, tokens, grid)
                 for mode, tokens, grid in [(REPLAYABLE, shortest, None), (BITWISE, shortest, None)]]  # fmt: skip
        for prefix in longer:
            todo += [("warm", f"{mode}, {prefix}", self.warm, mode, prefix) for mode in (REPLAYABLE, BITWISE)]
        todo += [("cold", f"{BITWISE}, {tokens}, {grid}", self.cold, BITWISE, tokens, grid) for grid, tokens in grids]
        todo += [("batch", str(rows), self.batch, rows) for rows in sizes["batches"]]
        todo += [("host tier", str(shortest), self.host_tier, shortest)]
        if longer:
            middle = longer[0]
            todo += [
                ("cold", f"{mode}, {middle}, default", self.cold, mode, middle, None) for mode in (REPLAYABLE, BITWISE)
            ]
            todo += [
                ("cold", f"{BITWISE}, {middle}, {grid}", self.cold, BITWISE, middle, grid) for grid in sizes["grids"]
            ]
        for section, case, work, *arguments in todo:
            named = f"{self.name}, {case}, kernels {self.setting['kernels']}"
            if not self.ledger.measure(section, named, lambda: _freed(self.model, work, arguments)):  # noqa: B023
                return

    # -- sections -----------------------------------------------------------------------------------------------------

    def handle(self):
        """Time and memory of making a handle: the first one proves the model, and is what autotuning sees first."""
        baseline = _allocated(self.model)
        seconds = []
        for _ in range(2):
            _finish(self.model)
            started = time.perf_counter()
            with SparsePrefixCache(self.model, max_memory=self.sizes["memory"]) as cache:
                _finish(self.model)
                seconds.append(time.perf_counter() - started)
                grid, state, kv = cache.grid, cache.size.state_bytes, cache.size.kv_bytes_per_token
        return {
            "parameters": self.model.num_parameters(),
            "built_seconds": self.built_seconds,
            "first_seconds": seconds[0],
            "second_seconds": seconds[1],
            "peak_over_baseline_bytes": _peak(self.model) - baseline,
            "grid": grid,
            "state_bytes": state,
            "kv_bytes_per_token": kv,
            "attention": self.model.config._attn_implementation,
            "kernels_taken_up": taken_up(self.model),
        }

    def profile(self):
        """Launches and waits of the host in a warm call, beside stock on as many tokens."""
        first, second, third = self.questions(self.sizes["prefixes"][0], 3)
        stock, own = Contender(self.model), self.cached(REPLAYABLE)
        for asked in (first, second, third):
            own.serve(asked, 2, False)
        (fourth,) = self.questions(0, 1)
        again = WorkloadRequest("", np.concatenate([third.ids[: -len(fourth.ids)], fourth.ids]))
        tail = WorkloadRequest("", again.ids[-own.handle.last_request.computed_tokens :])
        for contender in (stock, own):
            contender.serve(tail, 2, False)  # shapes seen before
        ours = profiled(lambda: own.serve(again, 2, False))
        resumed = own.handle.last_request.resumed_tokens
        theirs = profiled(lambda: stock.serve(tail, 2, False))
        own.close()
        return {"resumed_tokens": resumed, "cache": ours, "stock_on_the_new_tokens": theirs}

    def cold(self, mode, tokens, grid=None):
        """A prompt of which nothing is stored, in turn with stock."""
        own, stock, ratios = self.cached(mode, grid=grid), Contender(self.model), []
        prompts = self.questions(0, 1 + self.sizes["repeats"], tokens)
        times = {"stock": [], "cache": []}
        for index, asked in enumerate(prompts):
            own.handle.clear()
            order = [stock, own] if index % 2 == 0 else [own, stock]
            took = {one.name: one.serve(asked, 1, False).first_token_seconds for one in order}
            if index:  # the first is for kernels that are chosen and compiled when they are first asked for
                ratios.append(took["cache"] / took["stock"])
                for name, seconds in took.items():
                    times[name].append(seconds)
        segments = len(own.handle.last_request.segments)
        found = {"grid": own.handle.grid, "segments": segments, "over_stock": _spread(ratios)}
        own.close()
        return {**found, **{f"{name}_seconds": statistics.median(values) for name, values in times.items()}}

    def warm(self, mode, prefix):
        """Questions about a known prefix: stock, `deepcopy`, the limit and the cache in turn; memory of each."""
        first, second, *again = self.questions(prefix, 2 + self.sizes["repeats"])
        own = self.cached(mode)
        limit, rows, failed = Limit(own), [], {}
        contenders = [Contender(self.model), DeepCopy(self.model, {"prefix": prefix}), limit, own]
        for asked in (first, second):  # of the second is learned where prompts part
            own.serve(asked, 2, False)
        for index, asked in enumerate(again):
            limit.prepare(asked)
            row = {}
            for one in contenders if index % 2 == 0 else contenders[::-1]:
                if one.name not in failed:
                    row[one.name] = self._try(one, asked, failed)
            rows.append({name: served for name, served in row.items() if served is not None})
        found = self._compared(rows, own.handle, failed)
        if rows and "cache" in rows[-1]:
            found.update(self._equal_to_cold(own, mode, again[-1], rows[-1]["cache"]))
        for one in (limit, own):
            one.close()
        return found

    def batch(self, rows):
        """A batch beside stock on the same: rows without anything in common, with a common prefix, and a known one."""
        size, ratios, resumed = self.sizes, {"unrelated": [], "cold": [], "warm": []}, 0
        with SparsePrefixCache(self.model, max_memory=size["memory"], grid=size["grid"]) as cache:
            for index in range(1 + size["repeats"]):
                head = self.tokens(size["batch_prefix"])
                for state, found in ratios.items():
                    if state != "warm":
                        cache.clear()
                    ids = self.rows(rows, None if state == "unrelated" else head)
                    ways = [{}, {"past_key_values": cache}]
                    ahead = 1 if index % 2 else -1
                    stock, ours = [timed(self.model, ids, 1, **way).total_seconds for way in ways[::ahead]][::ahead]
                    resumed = cache.last_request.resumed_tokens
                    if index:  # the first is for kernels that are chosen and compiled when they are first asked for
                        found.append(ours / stock)
        spreads = {f"{state}_over_stock": _spread(found) for state, found in ratios.items()}
        return {"tokens_in_common": size["batch_prefix"], "resumed_tokens": resumed, **spreads}

    def rows(self, count, head):
        """Ids of a batch, `(count, length)`, on the model's device."""
        length = self.sizes["batch_prefix"]
        drawn = [
            np.concatenate([self.tokens(length) if head is None else head, self.tokens(self.sizes["suffix"])])
            for _ in range(count)
        ]
        return torch.from_numpy(np.stack(drawn)).to(self.model.device)

    def host_tier(self, prefix):
        """States sent to pinned memory of the host and fetched from there."""
        store = CheckpointStore(self.sizes["memory"], host_memory=self.sizes["memory"])
        first, second, *again = self.questions(prefix, 2 + 2 * self.sizes["repeats"])
        down, device, host, bandwidth = [], [], [], []
        own = self.cached(REPLAYABLE, store=store)
        for asked in (first, second):
            own.serve(asked, 1, False)
        for near, far in zip(again[::2], again[1::2], strict=True):
            device.append(own.serve(near, 1, False).first_token_seconds)
            held = store.used_bytes
            _finish(self.model)
            started = time.perf_counter()
            store.give_back()
            _finish(self.model)
            down.append((held - store.used_bytes) / (time.perf_counter() - started))
            before = store.used_bytes
            host.append(own.serve(far, 1, False).first_token_seconds)
            moved = store.used_bytes - before
            if host[-1] > device[-1]:
                bandwidth.append(moved / (host[-1] - device[-1]))
        resumed = own.handle.last_request.resumed_tokens
        own.close()
        return {
            "resumed_tokens": resumed,
            "to_host_bytes_per_second": statistics.median(down),
            "from_device_seconds": statistics.median(device),
            "from_host_seconds": statistics.median(host),
            "from_host_bytes_per_second": statistics.median(bandwidth) if bandwidth else None,
            "host_bytes": store.below.used_bytes,
        }

    # -- what they have in common -------------------------------------------------------------------------------------

    def tokens(self, count):
        return self.draw.randint(3, self.model.config.get_text_config().vocab_size, count).astype(np.int64)

    def questions(self, prefix, count, suffix=None):
        """Prompts with a common prefix."""
        head = self.tokens(prefix)
        tails = [self.tokens(suffix or self.sizes["suffix"]) for _ in range(count)]
        return [WorkloadRequest("prefix", np.concatenate([head, tail]).astype(np.int32)) for tail in tails]

    def cached(self, mode, grid=None, **options):
        memory = {} if "store" in options else {"max_memory": self.sizes["memory"]}
        options = {"exactness": mode, "grid": grid or self.sizes["grid"], **memory, **options}
        return Cached(self.model, None, "cache", "learned", **options)

    def _try(self, one, asked, failed):
        """One request; a contender without room for it is left out from then on, and the others go on."""
        try:
            served = one.serve(asked, self.sizes["new_tokens"], True)
        except torch.OutOfMemoryError as error:
            failed[one.name] = str(error).partition("\n")[0][:200]
            gc.collect()
            torch.cuda.empty_cache()
            return None
        if served is not None and self.model.device.type == "cuda":
            served.reserved_bytes = torch.cuda.max_memory_reserved(self.model.device)
        return served

    def _compared(self, rows, handle, failed):
        names = [name for name in ("stock", "deepcopy", "limit", "cache") if all(name in row for row in rows)]
        found = {"resumed_tokens": handle.last_request.resumed_tokens, "left_out": failed}
        for name in names:
            served = [row[name] for row in rows]
            found[f"{name}_first_token_seconds"] = statistics.median(one.first_token_seconds for one in served)
            found[f"{name}_second_per_token"] = statistics.median(_per_token(one) for one in served)
            found[f"{name}_peak_bytes"] = max(one.device_peak_bytes for one in served)
            found[f"{name}_reserved_bytes"] = max(getattr(one, "reserved_bytes", 0) for one in served)
        for name in names[:-1] if "cache" in names else ():
            pairs = [(row[name], row["cache"]) for row in rows]
            ratio = _spread([one.first_token_seconds / ours.first_token_seconds for one, ours in pairs])
            found["sooner_than_" + name] = ratio
            found["decode_over_" + name] = _spread([_per_token(ours) / _per_token(one) for one, ours in pairs])
        account = handle.store.account(handle.config.namespace)
        found["stored_bytes"] = account.checkpoint_bytes + account.kv_bytes
        if "stock" in names and "cache" in names:
            last = rows[-1]
            found["max_abs_logit_diff_to_stock"] = float((last["cache"].logits - last["stock"].logits).abs().max())
        return found

    def _equal_to_cold(self, own, mode, asked, served):
        """Whether the last warm request equals a run from nothing over its segments, bit for bit."""
        twin = Replayed(own)
        try:
            fresh = twin.replay(asked, served, self.sizes["new_tokens"])
            return {
                "bitwise": bool(torch.equal(served.logits, fresh.logits) and torch.equal(served.tokens, fresh.tokens))
            }
        except torch.OutOfMemoryError as error:
            return {"bitwise": None, "not_compared": str(error).partition("\n")[0][:200]}
        finally:
            twin.close()


def measure(ledger, setting):
    Hybrid(ledger, setting).measure()


def _freed(model, work, arguments):
    """One row's work, with the memory of the rows before given back."""
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    baseline = _allocated(model)
    return {"baseline_bytes": baseline, **work(*arguments)}


def _per_token(served):
    return (served.total_seconds - served.first_token_seconds) / max(1, served.new_tokens - 1)


def _spread(values):
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def _allocated(model):
    return torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0


def _peak(model):
    return torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else 0


def _finish(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
