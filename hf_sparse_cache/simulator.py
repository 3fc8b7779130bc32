"""`simulate`: the live cache's store, cuts, policies and eviction, driven by token ids without a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from .checks import MOST_ID, is_whole, shown, token_ids, whole_number
from .config import EXACTNESS
from .planning.cuts import CutRule, Tokens
from .planning.policies import Policy, make_policy
from .planning.policy import check_policy, limited
from .planning.segments import Bitwise, Replayable, Segmenting
from .planning.views import Floats
from .request import Request, open_request
from .stats import RequestInfo, counted
from .store.answer import Read, open_answer
from .store.eviction import Eviction
from .store.store import CheckpointStore
from .tools.traces import load_trace


@dataclass(frozen=True, slots=True)
class Sized:
    """A payload that holds nothing and only has a size."""

    nbytes: int


@dataclass(frozen=True)
class SimulationResult:
    """What a trace would have reused.

    Attributes:
        requests: counted requests, those after the warm-up.
        prompt_tokens: tokens of the counted prompts.
        overlap_tokens: tokens they share with any earlier prompt of the trace, still stored or not: the dense limit.
        resumed_tokens: tokens they skipped thanks to a checkpoint.
        checkpoints: checkpoints captured over the whole run.
        peak_bytes: most bytes stored at any time of the whole run.
        evictions: checkpoints evicted over the whole run.
        seconds: wall time of the whole run.
        plan_seconds: the part of it spent deciding (matching, overlap model, plan).
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
        )


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
    cut_tokens: float = 0.0,
    pieces: int | None = None,
    store_outputs: bool = False,
    clock: Callable[[], float] | None = None,
    on_request: Callable[[RequestInfo], None] | None = None,
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
        cut_tokens: what a cut costs in tokens of prefill, in replayable mode.
        pieces: most tokens of a forward, in replayable mode.
        store_outputs: whether what was generated is stored behind each prompt as well, as a cache could that keeps
            states produced by decoding: in replayable mode the live cache does, wherever answers are kept (see
            "Concepts"); in bitwise mode it is as if each answer were read once more in idle time. The overlap then
            counts tokens shared with earlier outputs too.
        clock: gives seconds, for policies that look at time; default the time that passes meanwhile.
        on_request: called with what happened to each request, warm-up included, in order: what `cache.last_request`
            is for the live cache. With `store_outputs`, positions captured in the output lie behind the prompt.

        progress: whether a terminal shows a bar.

    Raises:
        ValueError: if an argument is out of range or a name unknown.
        TypeError: if `policy` is neither a name nor a `Policy` object, or places what are no positions.
    """
    sizes = _Sizes(state_bytes, kv_bytes_per_token, logits_bytes)
    if not isinstance(warmup, int | float) or not 0.0 <= warmup < 1.0:
        raise ValueError(
            f"warmup must be a fraction in [0, 1), got {shown(warmup)}; 0.6 leaves 40 % of the requests counted"
        )
    whole_number("grid", grid, 1, "it is the distance of the regular cuts in tokens", MOST_ID)
    specials = tuple(whole_number("cut_ids", cut, 0, "give token ids", MOST_ID) for cut in cut_ids)
    place = limited(_policy(policy, specials, prefill_cost), max_checkpoints)
    store = CheckpointStore(max_memory, eviction, max_remembered_tokens=None)
    prompts = load_trace(trace)
    outputs = prompts.outputs if store_outputs else None
    segmenting = _segmenting(exactness, CutRule(grid, specials), cut_tokens, pieces)
    for prefix in marks:
        store.mark(token_ids(prefix, "marks"))
    if clock is not None:
        store.ledger.seconds = clock
    tally = _Tally(skipped=int(len(prompts) * warmup))
    name = policy if isinstance(policy, str) else type(policy).__name__
    hidden = not progress or not sys.stderr.isatty()
    for index, ids in enumerate(tqdm(prompts, desc=f"simulate {name}", unit="req", disable=hidden, leave=False)):
        with open_request(store, place, ids, segmenting) as request:
            for position in request.planned:
                sizes.add(request, position, final=position == len(ids))
        info = request.info()
        if outputs is not None and len(outputs[index]):
            info = sizes.answer(request.read, outputs[index], info)
        tally.count(request, info)
        if on_request is not None:
            on_request(info)
    return tally.result(store)


@dataclass(frozen=True)
class _Sizes:
    """What the checkpoints of a model that is not there take, in bytes."""

    state_bytes: int
    kv_bytes_per_token: int
    logits_bytes: int

    def __post_init__(self) -> None:
        if not is_whole(self.state_bytes, 1):
            raise ValueError(
                f"state_bytes must be at least 1, got {shown(self.state_bytes)}; it is the size of one checkpoint"
            )
        if not is_whole(self.kv_bytes_per_token, 0):
            raise ValueError(
                f"kv_bytes_per_token must be at least 0, got {shown(self.kv_bytes_per_token)}; use 0 without full "
                "attention"
            )

    def add(self, request: Request, position: int, final: bool = False) -> None:
        """Stores a checkpoint of these sizes; the one at the end of a prompt is `final` and holds logits as well."""
        state = Sized(self.state_bytes + (self.logits_bytes if final else 0))
        request.add(position, state, self._kv if self.kv_bytes_per_token else None)

    def answer(self, read: Read | None, output: Tokens, info: RequestInfo) -> RequestInfo:
        """Stores what was generated behind a prompt; what is known of the prompt, with the positions of that."""
        answer = open_answer(read, output)
        if answer is None:
            return info
        with answer:
            for position in answer.planned:
                answer.add(position, Sized(self.state_bytes), self._kv if self.kv_bytes_per_token else None)
        return replace(info, captured=(*info.captured, *answer.captured))

    def _kv(self, start: int, end: int) -> Sized:
        return Sized((end - start) * self.kv_bytes_per_token)


class _Tally:
    """Counts a trace while it is served; the first `skipped` requests are served and not counted."""

    def __init__(self, skipped: int) -> None:
        self._skipped = skipped
        self._requests = self._captured = 0
        self._prompt_tokens = self._overlap_tokens = self._resumed_tokens = 0
        self._planning, self._started = 0.0, time.perf_counter()

    def count(self, request: Request, info: RequestInfo) -> None:
        """Takes a request that was served."""
        self._requests += 1
        self._captured += len(info.captured)
        self._planning += request.match_seconds + request.plan_seconds
        if self._requests > self._skipped:
            self._prompt_tokens += request.prompt_tokens
            self._overlap_tokens += request.overlap_tokens
            self._resumed_tokens += request.resumed_tokens

    def result(self, store: CheckpointStore) -> SimulationResult:
        """All of it, and what the store says."""
        return SimulationResult(
            requests=self._requests - self._skipped,
            prompt_tokens=self._prompt_tokens,
            overlap_tokens=self._overlap_tokens,
            resumed_tokens=self._resumed_tokens,
            checkpoints=self._captured,
            peak_bytes=store.peak_bytes,
            evictions=store.evictions,
            seconds=time.perf_counter() - self._started,
            plan_seconds=self._planning,
        )


def _policy(
    policy: str | Policy, specials: tuple[int, ...], prefill_cost: Callable[[Floats], Floats] | None
) -> Policy:
    """The policy that was named or given."""
    if isinstance(policy, str):
        return make_policy(policy, specials, prefill_cost)
    if prefill_cost is not None:
        raise ValueError(
            f"prefill_cost is for policies by name, but policy is a {type(policy).__name__} object; give it to that"
        )
    check_policy(policy)
    return policy


def _segmenting(exactness: str, rule: CutRule, cut_tokens: float, pieces: int | None) -> Segmenting:
    if exactness not in EXACTNESS:
        raise ValueError(f"exactness must be 'replayable' or 'bitwise', not {shown(exactness)}")
    return Bitwise(rule) if exactness == "bitwise" else Replayable(rule, rule.grid, pieces, cut_tokens)
