"""`simulate`: the live cache's store, cuts, policies and eviction, driven by token ids without a model."""

from __future__ import annotations

import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .checks import MOST_ID, MOST_STATE_BYTES, MOST_TOKEN_BYTES, is_whole, shown, token_ids, whole_number
from .config import EXACTNESS, KEPT, check_storage
from .planning.cuts import CutRule, Tokens
from .planning.policies import Policy, make_policy
from .planning.policy import check_policy, limited
from .planning.segments import Bitwise, Replayable, Segmenting
from .planning.views import Floats
from .request import Request, open_request
from .routing.fleet import Arrival, Clocks, Fleet, FleetTimes, Router, SharedSizes, Sized, make_router
from .stats import RequestInfo, counted, format_bytes, html_table, parse_bytes
from .store.answer import Read, open_answer
from .store.eviction import Eviction
from .store.forest import Forest
from .store.slabs import taken
from .store.store import CheckpointStore
from .tools.traces import load_trace


@dataclass(frozen=True)
class SimulationResult:
    """What a trace would have reused.

    Attributes:
        requests: counted requests, those after the warm-up.
        prompt_tokens: tokens of the counted prompts.
        overlap_tokens: tokens they share with any earlier prompt of the trace, still stored or not: the dense limit.
        resumed_tokens: tokens they skipped thanks to a checkpoint.
        checkpoints: checkpoints captured over the whole run.
        peak_bytes: most bytes stored at any time of the whole run; of several replicas, the sum of what each had.
        evictions: checkpoints evicted over the whole run.
        seconds: wall time of the whole run.
        plan_seconds: the part of it spent deciding (matching, overlap model, plan).
        served: the fleet's times and bytes; None without replicas.
    """

    requests: int
    prompt_tokens: int
    overlap_tokens: int
    resumed_tokens: int
    checkpoints: int
    peak_bytes: int
    evictions: int = 0
    seconds: float = 0.0
    plan_seconds: float = 0.0
    served: FleetTimes | None = None

    @property
    def resume_rate(self) -> float:
        """Resumed tokens ÷ prompt tokens."""
        return self.resumed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def capture_rate(self) -> float:
        """Resumed tokens ÷ overlap tokens; 1 when nothing could be shared."""
        return self.resumed_tokens / self.overlap_tokens if self.overlap_tokens else 1.0

    @property
    def recomputed_tokens(self) -> float:
        """Mean shared tokens that a counted request computed all the same."""
        return (self.overlap_tokens - self.resumed_tokens) / self.requests if self.requests else 0.0

    def __str__(self) -> str:
        return (
            f"{counted(self.requests, 'request')} · {self.prompt_tokens:,} tokens · overlap {self.overlap_tokens:,} · "
            f"resumed {self.resumed_tokens:,} ({self.resume_rate:.1%} of the prompt, "
            f"{self.capture_rate:.1%} of the overlap) · "
            f"{counted(self.checkpoints, 'checkpoint')}, peak {self.peak_bytes:,} bytes"
            + (f" · first token after {self.served.mean_seconds:.3g} s" if self.served is not None else "")
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [
            ("requests counted", f"{self.requests:,}"),
            ("tokens of their prompts", f"{self.prompt_tokens:,}"),
            ("shared with earlier prompts", f"{self.overlap_tokens:,}"),
            ("resumed", f"{self.resumed_tokens:,}"),
            ("of the prompts", f"{self.resume_rate:.1%}"),
            ("of what is shared", f"{self.capture_rate:.1%}"),
            ("shared tokens computed again, mean", f"{self.recomputed_tokens:,.0f}"),
            ("checkpoints made", f"{self.checkpoints:,}"),
            ("evictions", f"{self.evictions:,}"),
            ("most bytes stored", format_bytes(self.peak_bytes)),
            *((("first token after, mean", f"{self.served.mean_seconds:.3g} s"),) if self.served is not None else ()),
        ]
        return html_table((), rows, title="What this trace would reuse")


def simulate(
    trace: Any,
    *,
    policy: str | Policy = "learned",
    max_memory: int | str | None = None,
    max_checkpoints: int | None = None,
    state_bytes: int,
    kv_bytes_per_token: int = 0,
    grid: int = 64,
    cut_ids: Iterable[int] = (),
    warmup: float = 0.0,
    eviction: str | Eviction = "learned",
    prefill_cost: Callable[[Floats], Floats] | None = None,
    exactness: str = "bitwise",
    marks: Iterable[Sequence[int]] = (),
    logits_bytes: int = 0,
    page_bytes: int = 1,
    cut_tokens: float = 0.0,
    pieces: int | None = None,
    storage: str = "exact",
    store_outputs: bool = False,
    clock: Callable[[], float] | None = None,
    on_request: Callable[[RequestInfo], None] | None = None,
    replicas: int = 1,
    router: str | Router | None = None,
    fleet: Fleet | None = None,
    progress: bool = True,
) -> SimulationResult:
    """Serves a trace with the live cache's own parts and counts what it reuses.

    With the settings of a live cache (`**cache.simulation()`) and its policy and eviction, every request is matched,
    captured and evicted for exactly as that cache would. Counts and bytes agree; seconds need a model.

    Args:
        trace: a workload folder, a `.jsonl` file, a `datasets.Dataset` with a column `input_ids`, or an iterable of
            token arrays; requests are served in the order given.
        policy: a policy by name, or an object.
        max_memory: budget in bytes or as a string; None for no limit.
        max_checkpoints: most new checkpoints a prompt; None leaves it to the policy.
        state_bytes: size of one checkpoint's fixed-size state.
        kv_bytes_per_token: size of keys and values a token; 0 for a pure recurrent model.
        grid: distance in tokens of the regular cuts; in replayable mode, of the positions that may be captured.
        cut_ids: token ids after which a prompt may be cut as well.
        warmup: leading fraction of the requests that is served but not counted.
        eviction: "learned", "lru", "fifo", or an object.
        prefill_cost: cost of prefilling to each of an array of positions, for the policies by name that weigh it;
            default the positions themselves. `cache.prefill_cost` is the one of a model.
        exactness: "bitwise" or "replayable", as of `SparsePrefixCache`.
        marks: announced prefixes, as of `SparsePrefixCache.mark`, each a list of token ids.
        logits_bytes: what the checkpoint at the end of a prompt holds besides its state.
        page_bytes: of what states, logits and the keys and values of a segment take multiples in memory, if they hold
            32 KiB or more: on Linux 4096 for a model on a CPU, as `cache.simulation()` says. By default every system
            is told the same: all takes what it holds.
        cut_tokens: what a cut costs in tokens of prefill, in replayable mode.
        pieces: most tokens of a forward, in replayable mode.
        storage: "bf16" or "int8" where the two sizes are those of float32 numbers as they are, and a checkpoint shall
            take what such a handle keeps of them with all parts of a state rounded. A handle made with `storage=`
            knows better, as a family may keep some parts in more bits: `cache.simulation()` has its sizes, as kept.
        store_outputs: whether what was generated is stored behind each prompt as well, as a cache could that keeps
            states produced by decoding: in replayable mode the live cache does, wherever answers are kept (see
            "Concepts"); in bitwise mode it is as if each answer were read once more in idle time. The overlap then
            counts tokens shared with earlier outputs too.
        clock: gives seconds, for policies that look at time; default the time that passes meanwhile.
        on_request: called with what happened to each request, warm-up included, in order: what `cache.last_request`
            is for the live cache. With `store_outputs`, positions captured in the output lie behind the prompt.
        replicas: how many serve the trace, each with a store, a policy and an eviction of its own, and `max_memory`.
        router: which one a request goes to: "prefix" (the default), "round_robin", "session", or a function that is
            given an `Arrival` and returns the number of a replica.
        fleet: how fast replicas, network and shared tier are; default `Fleet()`. Given, the times of one replica are
            told as well. What several replicas share with earlier prompts counts as overlap, whoever read it.
        progress: whether a terminal shows a bar.

    Raises:
        ValueError: if an argument is out of range or a name unknown.
        TypeError: if `policy` is neither a name nor a `Policy` object, or places what are no positions.
    """
    sizes = _Sizes(state_bytes, kv_bytes_per_token, logits_bytes, page_bytes).kept(storage)
    if not isinstance(warmup, int | float) or not 0.0 <= warmup < 1.0:
        raise ValueError(
            f"warmup must be a fraction in [0, 1), got {shown(warmup)}; 0.6 leaves 40 % of the requests counted"
        )
    whole_number("grid", grid, 1, "it is the distance of the regular cuts in tokens", MOST_ID)
    specials = tuple(whole_number("cut_ids", cut, 0, "give token ids", MOST_ID) for cut in cut_ids)
    whole_number("replicas", replicas, 1, "it is how many serve the trace", MOST_ID)
    places = [limited(one, max_checkpoints) for one in _policies(policy, specials, prefill_cost, replicas)]
    prompts = load_trace(trace)
    outputs = prompts.outputs if store_outputs else None
    segmenting = _segmenting(exactness, CutRule(grid, specials), cut_tokens, pieces)
    prefixes = [token_ids(prefix, "marks") for prefix in marks]
    several = replicas > 1 or router is not None or fleet is not None
    evictions = [eviction, *(copy.deepcopy(eviction) for _ in range(replicas - 1))]
    served_by = [
        _Replica(CheckpointStore(max_memory, goes, max_remembered=None), place, segmenting, sizes)
        for place, goes in zip(places, evictions, strict=True)
    ]
    for replica in served_by:
        replica.begin(prefixes, clock)
    tally = _Tally(skipped=int(len(prompts) * warmup))
    together = _Together(served_by, router, fleet or Fleet(), tally) if several else None
    name = policy if isinstance(policy, str) else type(policy).__name__
    hidden = not progress or not sys.stderr.isatty()
    for index, ids in enumerate(tqdm(prompts, desc=f"simulate {name}", unit="req", disable=hidden, leave=False)):
        output = None if outputs is None or not len(outputs[index]) else outputs[index]
        info = served_by[0].serve(ids, output, tally) if together is None else together.serve(index, ids, output)
        if on_request is not None:
            on_request(info)
    return tally.result([replica.store for replica in served_by], together)


@dataclass(frozen=True)
class _Sizes:
    """What the checkpoints of a model that is not there hold, in bytes, and of which bytes they take multiples."""

    state_bytes: int
    kv_bytes_per_token: int
    logits_bytes: int
    page_bytes: int

    def __post_init__(self) -> None:
        whole_number("state_bytes", self.state_bytes, 1, "it is the size of one checkpoint", MOST_STATE_BYTES)
        hint = "use 0 without full attention"
        whole_number("kv_bytes_per_token", self.kv_bytes_per_token, 0, hint, MOST_TOKEN_BYTES)
        whole_number("logits_bytes", self.logits_bytes, 0, "use 0 where no end of a prompt is kept", MOST_STATE_BYTES)
        whole_number("page_bytes", self.page_bytes, 1, "large payloads take multiples of it in memory", MOST_ID)

    def kept(self, storage: str) -> _Sizes:
        """What is kept of float32 states and keys and values under a storage; logits are kept as they are."""
        check_storage(storage)
        share = KEPT[storage]
        state, kv = (math.ceil(share * size) for size in (self.state_bytes, self.kv_bytes_per_token))
        return replace(self, state_bytes=state, kv_bytes_per_token=kv)

    def add(self, request: Request, position: int, final: bool = False) -> None:
        """Stores a checkpoint of these sizes; the one at the end of a prompt is `final` and holds logits as well."""
        state = self._sized(self.state_bytes, self.logits_bytes if final else 0)
        request.add(position, state, self._kv if self.kv_bytes_per_token else None)

    def answer(self, read: Read | None, output: Tokens, info: RequestInfo) -> RequestInfo:
        """Stores what was generated behind a prompt; what is known of the prompt, with the positions of that."""
        answer = open_answer(read, output)
        if answer is None:
            return info
        with answer:
            for position in answer.planned:
                answer.add(position, self._sized(self.state_bytes), self._kv if self.kv_bytes_per_token else None)
        return replace(info, captured=(*info.captured, *answer.captured))

    def _kv(self, start: int, end: int) -> Sized:
        return self._sized((end - start) * self.kv_bytes_per_token)

    def _sized(self, *parts: int) -> Sized:
        """A payload of parts that lie apart in memory and together in a file."""
        return Sized(sum(taken(part, self.page_bytes) for part in parts), sum(parts))


@dataclass(frozen=True)
class _Replica:
    """A store and those who decide what it holds, without a model."""

    store: CheckpointStore
    place: Policy
    segmenting: Segmenting
    sizes: _Sizes

    def begin(self, marks: Sequence[Tokens], clock: Callable[[], float] | None) -> None:
        """Announces prefixes, and gives its policies their time."""
        for prefix in marks:
            self.store.mark(prefix)
        if clock is not None:
            self.store.ledger.seconds = clock

    def serve(self, ids: Tokens, output: Tokens | None, tally: _Tally, overlap: int | None = None) -> RequestInfo:
        """One prompt, and what was generated behind it."""
        with open_request(self.store, self.place, ids, self.segmenting) as request:
            for position in request.planned:
                self.sizes.add(request, position, final=position == len(ids))
        info = request.info()
        if output is not None:
            info = self.sizes.answer(request.read, output, info)
        tally.count(request, info, overlap)
        return info


class _Together:
    """Several replicas that a router gives their requests."""

    def __init__(self, replicas: Sequence[_Replica], router: str | Router | None, fleet: Fleet, tally: _Tally) -> None:
        self._replicas, self._fleet, self._tally = replicas, fleet, tally
        self._clocks = Clocks(fleet, len(replicas))
        self._shared = (
            SharedSizes(parse_bytes(fleet.shared_memory, "shared_memory"), fleet.packing) if fleet.shared else None
        )
        self._router = make_router(router, [replica.store for replica in replicas], fleet, self._clocks)
        self._known = Forest()  # all prompts, whoever read them

    def serve(self, index: int, ids: Tokens, output: Tokens | None) -> RequestInfo:
        """The next request: comes, is sent to a replica, and waits there for its turn."""
        self._clocks.arrive()
        sessions = self._fleet.sessions
        if sessions is not None and index >= len(sessions):
            raise ValueError(f"Fleet.sessions has {len(sessions)} entries; give one for each request of the trace")
        session = None if sessions is None else sessions[index]
        chosen = self._router(Arrival(index, ids, session, self._clocks.loads))
        last = len(self._replicas) - 1
        if not is_whole(chosen, 0, last):
            raise ValueError(f"router gave {shown(chosen)} for request {index}; replicas are 0 to {last}")
        replica, fleet, shared = self._replicas[chosen], self._fleet, self._shared
        seconds, before = 0.0, 0 if shared is None else shared.fetched_bytes
        if shared is not None and shared.bring(replica.store, ids, replica.segmenting):
            seconds += fleet.lookup_seconds + (shared.fetched_bytes - before) / fleet.network_bytes_per_second
        info = replica.serve(ids, output, self._tally, self._overlap(ids, output))
        if shared is not None and info.captured:
            shared.write(replica.store, ids if output is None else np.concatenate([ids, output]), info.captured)
        seconds += info.computed_tokens / fleet.prefill_tokens_per_second
        self._clocks.serve(chosen, seconds, counted=self._tally.counting)
        return info

    def served(self) -> FleetTimes:
        """Times and bytes."""
        return self._clocks.served(self._shared, getattr(self._router, "digest_bytes", 0))

    def _overlap(self, ids: Tokens, output: Tokens | None) -> int:
        """Tokens of a prompt that any earlier one had, or its answer."""
        path, depth = self._known.walk(ids, "")
        self._known.extend(path, depth, ids, "", 0)
        if output is not None:
            self._known.insert(np.concatenate([ids, output]), "", 0)
        return depth


class _Tally:
    """Counts a trace while it is served; the first `skipped` requests are served and not counted."""

    def __init__(self, skipped: int) -> None:
        self._skipped = skipped
        self._requests = self._captured = 0
        self._prompt_tokens = self._overlap_tokens = self._resumed_tokens = 0
        self._planning, self._started = 0.0, time.perf_counter()

    @property
    def counting(self) -> bool:
        """Whether the request that came last is counted."""
        return self._requests > self._skipped

    def count(self, request: Request, info: RequestInfo, overlap: int | None = None) -> None:
        """Takes a request that was served; `overlap` in place of what its own replica knows."""
        self._requests += 1
        self._captured += len(info.captured)
        self._planning += request.match_seconds + request.plan_seconds
        if self.counting:
            self._prompt_tokens += request.prompt_tokens
            self._overlap_tokens += request.overlap_tokens if overlap is None else overlap
            self._resumed_tokens += request.resumed_tokens

    def result(self, stores: Sequence[CheckpointStore], together: _Together | None) -> SimulationResult:
        """All of it, and what the stores say."""
        return SimulationResult(
            requests=self._requests - self._skipped,
            prompt_tokens=self._prompt_tokens,
            overlap_tokens=self._overlap_tokens,
            resumed_tokens=self._resumed_tokens,
            checkpoints=self._captured,
            peak_bytes=sum(store.peak_bytes for store in stores),
            evictions=sum(store.evictions for store in stores),
            seconds=time.perf_counter() - self._started,
            plan_seconds=self._planning,
            served=None if together is None else together.served(),
        )


def _policies(
    policy: str | Policy, specials: tuple[int, ...], prefill_cost: Callable[[Floats], Floats] | None, count: int
) -> list[Policy]:
    """The policy that was named or given, for so many replicas: each has its own, as they learn."""
    if isinstance(policy, str):
        return [make_policy(policy, specials, prefill_cost) for _ in range(count)]
    if prefill_cost is not None:
        raise ValueError(
            f"prefill_cost is for policies by name, but policy is a {type(policy).__name__} object; give it to that"
        )
    check_policy(policy)
    # A lock cannot be copied, and is each one's own in any case.
    return [policy, *(copy.deepcopy(policy, {id(policy.lock): threading.Lock()}) for _ in range(count - 1))]


def _segmenting(exactness: str, rule: CutRule, cut_tokens: float, pieces: int | None) -> Segmenting:
    if exactness not in EXACTNESS:
        raise ValueError(f"exactness must be 'replayable' or 'bitwise', not {shown(exactness)}")
    return Bitwise(rule) if exactness == "bitwise" else Replayable(rule, rule.grid, pieces, cut_tokens)
