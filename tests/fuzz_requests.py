"""Random requests against cold and stock runs, whatever happens in between.

A world is one tiny model, one store and one or two tenants, drawn from one seed. Step after step something happens to
it: prompts that branch from earlier ones, batches, threads, edits of the weights, evictions, `clear()`, a restart, a
save and its loading, allocations that fail. After each request its logits and every tensor of every layer are compared
with a cold run in bitwise mode, bit for bit, and with stock within rounding; after each step the store's books are
checked. `run` says how much of what was tried.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matrix import supported_families
from tiny_models import build, random_ids
from torch import Tensor

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.config import EXACTNESS, STORAGES
from hf_sparse_cache.errors import UnsupportedModelError
from hf_sparse_cache.exactness import Replay
from hf_sparse_cache.models import prefill, rounding, states
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.stats import RequestInfo


REPLAYABLE, BITWISE = EXACTNESS
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
POLICIES = ("learned", "balanced", "block", "dp", "junction", "last", "sqrt", "dyadic")
PLANTED = "planted"
LONGEST = 220


class Difference(AssertionError):
    """A warm run that was not what it had to be, with the seed and the steps that led there."""


class Planted(Exception):
    """What an interrupted forward raises."""


class World:
    """One model with its store, its tenants and what has happened so far.

    Attributes:
        families: labels of those that it may be of; None for all.
        modes: those that it may be in.
        policies: those that it may have.

    Args:
        seed: everything follows from it.
        tally: counts what was tried.
        sabotage: whether restored states are wiped, so that the comparison has something to find.
    """

    families: tuple[str, ...] | None = None
    modes: tuple[str, ...] = (BITWISE, REPLAYABLE)
    policies: tuple[str, ...] = POLICIES

    def __init__(self, seed: int, tally: Counter[str], sabotage: bool = False) -> None:
        self.seed, self.tally, self.sabotage = seed, tally, sabotage
        self.draw = random.Random(seed)
        self.family = self.draw.choice(self.families or supported_families())
        self.dtype = self.draw.choice((torch.float32, torch.float32, torch.float32, torch.bfloat16))
        self.mode = self.modes[0] if sabotage else self.draw.choice(self.modes)
        self.grid = self.draw.choice((16, 16, 32, 48))
        self.policy = "balanced" if sabotage else self.draw.choice(self.policies)
        self.model = build(self.family, self.dtype, seed=seed % 7)
        self.prompts: list[Tensor] = []
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-")) if self.draw.random() < 0.3 else None
        self.storage = "exact" if sabotage else self.kept()
        with self.make(policy="none") as probe:
            one = probe.size.state_bytes + 2 * self.grid * probe.size.kv_bytes_per_token
        self.budget = None if sabotage else self.draw.choice((None, one, 2 * one, 4 * one, 9 * one))
        self.eviction = self.draw.choice(("learned", "lru", "fifo"))
        self.handles: dict[str, SparsePrefixCache] = {}
        drawn = self.family, self.dtype, self.mode, "grid", self.grid, self.policy, self.storage, self.budget
        self.steps: list[str] = [" ".join(map(str, drawn))]
        self.open_store()
        tally[self.family] += 1
        tally[self.mode] += 1
        tally[f"storage: {self.storage}"] += 1

    # -- what a world is made of --------------------------------------------------------------------------------------

    def open_store(self) -> None:
        disk = {} if self.folder is None else {"disk_memory": "1GiB", "disk_dir": self.folder / "disk"}
        self.store = CheckpointStore(self.budget, self.eviction, **disk)
        self.open_handles()

    def open_handles(self) -> None:
        for handle in self.handles.values():
            handle.detach()
        names = ("", "b") if self.draw.random() < 0.3 else ("",)
        self.handles = {name: self.make(store=self.store, namespace=name) for name in names}

    def make(self, **options: Any) -> SparsePrefixCache:
        settings = {"grid": self.grid, "policy": self.policy, "exactness": self.mode, "storage": self.storage}
        return SparsePrefixCache(self.model, **{**settings, **options})

    def kept(self) -> str:
        """How states are kept; a family that refuses 8 bits keeps 16, and one that refuses these everything."""
        for storage in (self.draw.choice(("exact", "exact", *STORAGES)), "bf16"):
            self.storage = storage
            with suppress(UnsupportedModelError), self.make():
                return self.storage
        return "exact"

    @property
    def near_stock(self) -> bool:
        """Whether nothing is between a run and stock but the order of sums."""
        return self.dtype in TOLERANCE and self.storage == "exact"

    @property
    def handle(self) -> SparsePrefixCache:
        return self.draw.choice(list(self.handles.values()))

    def close(self) -> None:
        for handle in self.handles.values():
            handle.detach()
        self.store.close(flush=False)
        if self.folder is not None:
            shutil.rmtree(self.folder)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def prompt(self) -> Tensor:
        """A new prompt, an earlier one, or one that leaves an earlier one somewhere; `(1, length)`."""
        draw = self.draw
        length = draw.choice((draw.randint(1, 20), draw.randint(20, 140), draw.randint(60, 140)))
        fresh = random_ids(length, draw.randrange(1 << 30))
        if self.prompts and draw.random() < 0.8:
            earlier = draw.choice(self.prompts)
            kind = draw.random()
            if kind < 0.2:
                fresh = earlier
            elif kind < 0.4:  # a conversation that grows
                fresh = torch.cat([earlier, fresh], dim=1)
            else:
                cut = draw.choice(
                    (draw.randint(1, earlier.shape[1]), earlier.shape[1], self.grid, 2 * self.grid, 2 * self.grid + 1)
                )
                fresh = torch.cat([earlier[:, :cut], fresh[:, :50]], dim=1)
                if kind > 0.9:  # an edit in the middle
                    fresh = torch.cat([fresh, earlier[:, cut + 1 :]], dim=1)
        fresh = fresh[:, :LONGEST]
        self.prompts = [*self.prompts[-11:], fresh]
        return fresh

    # -- runs and their comparison ------------------------------------------------------------------------------------

    def generate(self, ids: Tensor, mask: Tensor, cache: Any, steps: int) -> tuple[Tensor, Any]:
        """Logits of every step `(steps, batch, vocabulary)`, and the cache that `generate()` ends with."""
        kwargs = {} if cache is None else {"past_key_values": cache}
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **kwargs,
        )
        return torch.stack(out.logits), out.get("cache", out.get("past_key_values"))

    def cold(
        self, ids: Tensor, mask: Tensor, steps: int, cache: SparsePrefixCache, info: RequestInfo | None = None
    ) -> tuple[Tensor, Any]:
        """On an empty store, with the same marks; or over the segments of a request, of the handle's last one."""
        with self.make(policy="none", max_memory=None) as twin:
            if self.mode == REPLAYABLE:
                info = cache.last_request if info is None else info
                assert info is not None
                twin.server = Replay(twin.server, Lineage.from_ends(info.segments))
            for prefix in cache.store.marks.prefixes(cache.server.space.now()[0]):
                twin.store.mark(prefix, twin.server.space.now()[0])
            return self.generate(ids, mask, twin, steps)

    def compare_cold(
        self,
        ids: Tensor,
        mask: Tensor,
        warm: tuple[Tensor, Any],
        steps: int,
        cache: SparsePrefixCache,
        info: RequestInfo | None = None,
    ) -> None:
        """Warm with cold, bit for bit; `info` is that of the request, where the last one may be another."""
        cold, state = self.cold(ids, mask, steps, cache, info)
        self.expect(torch.equal(warm[0], cold), "logits differ from those of a cold run", warm[0] - cold)
        self.expect(_same_states(warm[1], state), "states differ from those of a cold run")
        self.tally["compared with cold"] += len(ids)

    def compare(
        self,
        ids: Tensor,
        mask: Tensor,
        warm: tuple[Tensor, Any],
        steps: int,
        cache: SparsePrefixCache | None,
        infos: list[RequestInfo] | None = None,
    ) -> None:
        """Warm with cold and stock; `infos` are those of the rows, where the last request may be another one."""
        if cache is not None and (self.mode == BITWISE or len(ids) == 1):
            self.compare_cold(ids, mask, warm, steps, cache, infos[0] if infos else None)
        elif cache is not None and infos:
            for index, info in enumerate(infos):
                self.compare_row(ids[index : index + 1, mask[index].bool()], warm[0][0, index], info, cache)
        if self.near_stock:
            stock, _ = self.generate(ids, mask, None, steps)
            # From the first step at which a token differs, the runs read different texts.
            same = warm[0].argmax(-1) == stock.argmax(-1)
            valid = torch.cat([torch.ones_like(same[:1]), same[:-1].cumprod(0).bool()])
            apart = ((warm[0] - stock).abs().amax(-1) * valid).max()
            self.expect(bool(apart <= TOLERANCE[self.dtype]), f"logits are {apart:.1e} from stock")
            self.tally["compared with stock"] += len(ids)

    def compare_row(self, ids: Tensor, warm: Tensor, info: RequestInfo, cache: SparsePrefixCache) -> None:
        """The first logits of one row with those of a run of its own: what ran alone is the same, bit for bit."""
        cold, _ = self.cold(ids, torch.ones_like(ids), 1, cache, info)
        apart = (warm - cold[0, 0]).abs().max()
        if not info.batched:
            self.expect(bool(apart == 0), f"a row over {info.segments} differs from its cold run", apart)
        elif self.dtype in TOLERANCE:
            self.expect(bool(apart <= TOLERANCE[self.dtype]), f"a batched row is {apart:.1e} from its cold run")
        self.tally["rows batched" if info.batched else "rows alone"] += 1

    def expect(self, holds: bool, what: str, difference: Tensor | None = None) -> None:
        if not holds:
            size = "" if difference is None else f" by {difference.abs().max():.1e}"
            log = "\n  ".join(self.steps)
            raise Difference(f"world {self.seed}: {what}{size}, after\n  {log}")

    def books(self) -> None:
        """What has to hold between requests."""
        store = self.store
        store.verify()
        fits = store.max_memory is None or store.used_bytes <= store.max_memory
        # A budget that was made smaller than what marks keep: resize() warns, and nothing else stays.
        kept = {id(item) for _, item in store.marks.kept}
        self.expect(fits or all(id(item) in kept for item in store.stored()), "more is stored than may be")
        pinned = [item for item in store.stored() if item.pins]
        self.expect(len(pinned) <= len(store.marks.kept), f"{len(pinned)} checkpoints are pinned")

    # -- what may happen ----------------------------------------------------------------------------------------------

    def request(self) -> None:
        ids, cache, steps = self.prompt(), self.handle, self.draw.randint(1, 3)
        mask = torch.ones_like(ids)
        foretold = cache.explain(ids) if self.draw.random() < 0.3 else None
        warm = self.generate(ids, mask, cache, steps)
        info = cache.last_request
        assert info is not None
        self.note(f"request {ids.shape[1]} resumed {info.resumed_tokens} captured {info.captured}: {info.reason}")
        self.tally["resumed" if info.resumed_tokens else "from nothing"] += 1
        self.expect(info.resumed_tokens + info.computed_tokens == info.prompt_tokens == ids.shape[1], "tokens add up")
        if foretold is not None:
            self.expect(foretold.resumed_tokens == info.resumed_tokens, f"explain() foretold {foretold}")
        self.compare(ids, mask, warm, steps, cache)
        text = torch.cat([ids, warm[0].argmax(-1).T], dim=1)  # the next turn goes on behind the answer
        self.prompts = [*self.prompts[-11:], text] if text.shape[1] < LONGEST else self.prompts

    def handed(self) -> None:
        """`prefill()` alone, its logits, and what `generate()` makes of the live cache that it gives."""
        ids, cache = self.prompt(), self.handle
        tail = self.draw.randint(1, min(5, ids.shape[1]))
        given = cache.prefill(ids, logits_to_keep=tail)
        # Two tokens or more: one would be a step of decoding, which is further from a prefill in some families.
        grown = torch.cat([ids, random_ids(self.draw.randint(2, 9), self.draw.randrange(1 << 30))], dim=1)
        self.note(f"prefill {ids.shape[1]} with {tail} logits, continued to {grown.shape[1]}")
        with torch.no_grad():
            stock = self.model(ids).logits[:, -tail:]
        if self.near_stock:
            apart = (given.logits - stock).abs().max()
            self.expect(bool(apart <= TOLERANCE[self.dtype]), f"logits of a prefill are {apart:.1e} from stock")
        mask = torch.ones_like(grown)
        self.compare(grown, mask, self.generate(grown, mask, given.past_key_values, 2), 2, None)

    def batch(self) -> None:
        rows = [self.prompt() for _ in range(self.draw.randint(2, 4))]
        if self.draw.random() < 0.3:
            rows.append(rows[0])
        width = max(row.shape[1] for row in rows) + self.draw.choice((0, 0, 3))
        pad = [width - row.shape[1] for row in rows]
        ids = torch.cat([torch.nn.functional.pad(row, (left, 0)) for row, left in zip(rows, pad, strict=True)])
        mask = torch.cat([torch.arange(width)[None] >= left for left in pad]).long()
        steps = self.draw.randint(1, 2)
        self.note(f"batch {[row.shape[1] for row in rows]} in {width}")
        cache = self.handle
        with cache.record() as infos:
            warm = self.generate(ids, mask, cache, steps)
        self.note(f"of which were run {[info.segments for info in infos]}")
        for row, info in zip(rows, infos, strict=True):
            self.expect(
                info.resumed_tokens + info.computed_tokens == info.prompt_tokens == row.shape[1], "tokens add up"
            )
        self.expect(self.mode == REPLAYABLE or not any(info.batched for info in infos), "rows ran together")
        self.compare(ids, mask, warm, steps, cache, infos)

    def threads(self) -> None:
        """Threads that wait for each other's prompts where these begin alike; a forward of one may be interrupted."""
        asked = [(self.prompt(), self.handle) for _ in range(3)]
        if self.draw.random() < 0.5:
            stem = random_ids(self.draw.randint(40, 140), self.draw.randrange(1 << 30))
            asked = [(torch.cat([stem, ids[:, -40:]], dim=1), cache) for ids, cache in asked]
        fails = self.draw.random() < 0.3
        self.note(f"threads {[ids.shape[1] for ids, _ in asked]}{', one of which is interrupted' if fails else ''}")

        def run(ids: Tensor, cache: SparsePrefixCache) -> tuple[tuple[Tensor, Any], list[RequestInfo]] | None:
            with cache.record() as infos, suppress(Planted):
                return self.generate(ids, torch.ones_like(ids), cache, 2), infos
            return None

        with self.fault("interrupted") if fails else nullcontext(), ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(run, ids, cache) for ids, cache in asked]
            answers = [answer.result() for answer in waiting]
        self.expect(answers.count(None) <= fails, "a failure went over to another thread")
        for (ids, cache), answer in zip(asked, answers, strict=True):
            if answer is not None:
                warm, infos = answer
                self.tally["threads resumed" if infos[0].resumed_tokens else "threads from nothing"] += 1
                self.compare(ids, torch.ones_like(ids), warm, 2, cache, infos)

    def failing(self) -> None:
        """A request during which an allocation fails, or a forward is interrupted."""
        ids, cache = self.prompt(), self.handle
        mask = torch.ones_like(ids)
        kind = self.draw.choice(("capture", "restore", "forward", "forward twice", "interrupted"))
        with self.fault(kind):
            try:
                warm = self.generate(ids, mask, cache, 2)
            except (Planted, RuntimeError) as error:
                self.note(f"{kind} fails in a request of {ids.shape[1]}: {type(error).__name__}")
                # Rounded states go on from what is rounded, so there is no going on without.
                fatal = ("forward twice", "interrupted", *(["capture"] if self.storage != "exact" else []))
                self.expect(kind in fatal, f"{kind}: {error}")
                return
        self.note(f"{kind} fails in a request of {ids.shape[1]}, which goes on")
        self.compare(ids, mask, warm, 2, cache)

    @contextmanager
    def fault(self, kind: str) -> Iterator[None]:
        def allocate(*_: Any) -> None:
            if self.draw.random() < 0.5:
                raise torch.OutOfMemoryError(PLANTED)
            torch.empty(1 << 55)

        calls, at, own = itertools.count(1), self.draw.randint(1, 3), prefill._uncompiled

        def uncompiled(model: Any) -> Callable[..., Any]:
            """Where prefills get at the model's forward: what is put on its class would be another model."""

            def forward(**inputs: Any) -> Any:
                output = own(model)(**inputs)
                number = next(calls)  # of this call, whatever other threads call meanwhile
                if number == at or (kind == "forward twice" and number > at):
                    if kind == "interrupted":
                        raise Planted
                    allocate()
                return output

            return forward

        target: Any = {"capture": (rounding, "own"), "restore": (states, "restore")}.get(
            kind, (prefill, "_uncompiled")
        )
        with mock.patch.object(*target, uncompiled if target[0] is prefill else allocate):
            yield

    def weights(self) -> None:
        """An edit of some weights: nothing from before may be used."""
        parameter = self.draw.choice([p for p in self.model.parameters() if p.numel() > 8])
        self.note(f"weights of shape {tuple(parameter.shape)} change")
        with torch.no_grad():
            parameter.mul_(1 + 0.3 * self.draw.random())
        self.prompts = self.prompts[:1]

    def evict(self) -> None:
        for checkpoint in self.draw.sample(self.store.stored(), min(2, len(self.store))):
            if not checkpoint.pins:
                self.note(f"evicts {checkpoint.position}")
                self.store.evict(checkpoint)

    def mark(self) -> None:
        if self.prompts:
            ids = self.draw.choice(self.prompts)
            self.note(f"marks {ids.shape[1]}")
            with suppress(ValueError):  # shorter than the first cut
                self.handle.mark(ids)

    def clear(self) -> None:
        self.note("clears one tenant")
        cache = self.handle
        cache.clear()
        self.expect(cache.stats().checkpoints == cache.stats().kv_bytes == 0, "something is left of what was cleared")

    def resize(self) -> None:
        limit = None if self.budget is None else self.budget * self.draw.choice((1, 1, 2))
        self.note(f"resizes to {limit}")
        self.store.resize(limit)

    def reopen(self) -> None:
        self.note("new handles, and a new store" if self.folder else "new handles")
        if self.folder is None:
            self.open_handles()
            return
        for handle in self.handles.values():
            handle.detach()
        self.store.close(flush=self.draw.random() < 0.5)
        self.open_store()

    def save(self) -> None:
        """Save one tenant and go on with what is loaded, in a store of its own."""
        name, handle = self.draw.choice(list(self.handles.items()))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            saved = handle.save_pretrained(folder)
            loaded = SparsePrefixCache.from_pretrained(
                folder, self.model, policy=self.policy, max_memory=None, namespace=name
            )
        self.note(f"saves {saved}, loads {len(loaded.store)}")
        self.expect(len(loaded.store) == saved, "not all that was saved was loaded")
        ids = self.draw.choice(self.prompts) if self.prompts else self.prompt()
        with loaded:
            mask = torch.ones_like(ids)
            self.compare(ids, mask, self.generate(ids, mask, loaded, 2), 2, loaded)

    def note(self, what: str) -> None:
        self.steps.append(what)

    def end(self) -> None:
        """What is looked at when everything has happened."""

    def step(self) -> None:
        """One thing that happens, and the books afterwards."""
        rare: list[Callable[[], None]] = [
            *(self.weights, self.evict, self.mark, self.clear, self.resize, self.reopen, self.save),
            *(self.threads, self.threads, self.failing, self.failing, self.handed),
        ]
        happens = self.draw.choice([self.request] * 12 + [self.batch] * 3 + rare)
        if self.sabotage:
            happens = self.request
            self.prompts = self.prompts or [random_ids(120, 1)]
        self.tally[f"step: {happens.__name__}"] += 1
        happens()
        self.books()


def same_payloads(one: Any, two: Any) -> bool:
    """Whether two captured states, or keys and values, are the same in every layer, bit for bit."""
    for mine, other in zip(one.layers, two.layers, strict=True):
        if mine.keys() != other.keys():
            return False
        if not all(torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in mine.items()):
            return False
    return True


def _same_states(one: Any, two: Any) -> bool:
    """Whether every tensor of every layer is the same, bit for bit."""
    layers = [[_tensors(vars(layer)) for layer in cache.layers] for cache in (one, two)]
    if len(layers[0]) != len(layers[1]):
        return False
    for mine, other in zip(*layers, strict=True):
        if mine.keys() != other.keys() or not all(torch.equal(value, other[name]) for name, value in mine.items()):
            return False
    return True


def _tensors(values: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if torch.is_tensor(value):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            found |= _tensors(value, f"{prefix}{name}.")
    return found


@contextmanager
def _wiped(sabotage: bool) -> Iterator[None]:
    """Restored recurrent, conv and window states are zero: a fault that every comparison must find."""
    own = states.restore

    def restore(cache: Any, *args: Any) -> None:
        own(cache, *args)
        for layer in cache.layers:
            for value in _tensors({k: v for k, v in vars(layer).items() if k != "spans"}).values():
                value.zero_()

    with mock.patch.object(states, "restore", restore) if sabotage else nullcontext():
        yield


def run(
    seed: int,
    *,
    worlds: int | None = None,
    seconds: float | None = None,
    steps: int = 14,
    sabotage: bool = False,
    kind: type[World] = World,
) -> Counter[str]:
    """Make worlds, one after the other, and let things happen in each.

    Args:
        seed: of the first world; the next ones count on from it.
        worlds, seconds: when to stop, whichever comes first.
        steps: things that happen in one world.
        sabotage: see `World`.
        kind: of the worlds.

    Returns:
        How much of what was tried.

    Raises:
        Difference: something was not as it had to be; names the world and its steps.
    """
    tally: Counter[str] = Counter()
    started = time.monotonic()
    while (worlds is None or tally["worlds"] < worlds) and (seconds is None or time.monotonic() - started < seconds):
        world = kind(seed + tally["worlds"], tally, sabotage)
        try:
            with _wiped(sabotage):
                for _ in range(steps):
                    world.step()
                world.end()
        except Difference:
            raise
        except Exception as error:
            log = "\n  ".join(world.steps)
            raise Difference(f"world {world.seed}: {type(error).__name__}: {error}, after\n  {log}") from error
        finally:
            world.close()
        tally["worlds"] += 1
    return tally
