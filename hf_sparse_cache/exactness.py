"""`check_exactness`: proof, on a user's own model and prompts, that reuse changes nothing.

Every prompt runs three times through `generate()`: stock (no handle), warm (resumed), and cold: from nothing, in
bitwise mode on an empty store, in replayable mode over the segments that are behind the result of the warm run. Warm
must equal cold bit for bit, in the logits of every step and in the state of every layer at the end of the prefill; and
warm must equal stock within rounding. Tokens alone would prove nothing: they often agree with the state wiped.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cache import SparsePrefixCache
from .checks import MOST_ID, shown, whole_number
from .models import ambient, prefill, states
from .models.inputs import Row, as_ids, check_ids, input_device
from .models.live import LiveCache
from .models.server import Server
from .models.sitting import Served
from .planning.lineage import Lineage
from .stats import html_table, table


# Warm against stock, for the dtypes where segments of a prefill are only rounding away from one shot. In 16 bits one
# ulp can send a token to another expert, so only warm against cold is bounded there.
_ROUNDED = (torch.float32, torch.float64)


TOLERANCE = 1e-4
_COLUMNS = (
    "prompt",
    "resumed",
    "logits = cold",
    "states = cold",
    "max |Δ logit| to stock",
    "same tokens",
    "reason",
)
TOLERANCES = {"exact": TOLERANCE, "bf16": 5e-3, "int8": 1e-2}  # by how states are kept


@dataclass(frozen=True)
class ExactnessRow:
    """One prompt.

    Attributes:
        prompt_tokens, resumed_tokens: of the warm run.
        logits_bitwise: warm logits of every step equal cold ones bit for bit.
        states_bitwise: so does every tensor of every layer at the end of the prefill.
        max_abs_logit_diff: warm against stock, over the steps before the first differing token and that one.
        tokens_equal: warm, cold and stock chose the same tokens.
        reason: why not more was resumed, or "resumed".
        batched: whether the warm run computed part of it in one forward with other prompts. No run repeats that bit
            for bit, so warm is compared with cold as it is with stock, within the tolerance.
    """

    prompt_tokens: int
    resumed_tokens: int
    logits_bitwise: bool
    states_bitwise: bool
    max_abs_logit_diff: float
    tokens_equal: bool
    reason: str
    batched: bool = False

    def equals_cold(self, bitwise: bool) -> str:
        """What a table says of one comparison of warm with cold."""
        return "batched" if self.batched else "yes" if bitwise else "NO"


@dataclass(frozen=True)
class ExactnessReport:
    """The verdict of `check_exactness`; printing it gives a table.

    Attributes:
        rows: one per prompt.
        tolerance: the bound on `max_abs_logit_diff`; None where the dtype has none.
        mode: what cold means: in "bitwise" mode a run on an empty store, in "replayable" mode one from nothing over
            the segments of the warm run.
        storage: how the states were kept; rounded ones take a warm run, and the cold one with it, away from stock.
    """

    rows: tuple[ExactnessRow, ...]
    tolerance: float | None
    mode: str = "bitwise"
    storage: str = "exact"

    @property
    def bitwise(self) -> bool:
        """Warm equals cold bit for bit, in logits and in states, wherever a run can be repeated."""
        return all(row.batched or (row.logits_bitwise and row.states_bitwise) for row in self.rows)

    @property
    def max_abs_logit_diff(self) -> float:
        """Largest difference of a logit, warm against stock."""
        return max((row.max_abs_logit_diff for row in self.rows), default=0.0)

    @property
    def tokens_equal(self) -> bool:
        """Warm, cold and stock chose the same tokens on every prompt."""
        return all(row.tokens_equal for row in self.rows)

    @property
    def resumed_tokens(self) -> int:
        """Tokens that the warm runs skipped."""
        return sum(row.resumed_tokens for row in self.rows)

    @property
    def passed(self) -> bool:
        """Something was resumed, bitwise equal to cold, and within the tolerance of stock."""
        close = self.tolerance is None or self.max_abs_logit_diff <= self.tolerance
        return self.resumed_tokens > 0 and self.bitwise and close

    def __str__(self) -> str:
        return f"{table(_COLUMNS, self._cells())}\n\n{self._verdict()}"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        title = "Exact" if self.passed else "NOT EXACT" if self.resumed_tokens else "Not proved"
        return html_table(_COLUMNS, self._cells(), title=title, note=self._verdict(), words=(len(_COLUMNS) - 1,))

    def _cells(self) -> list[tuple[str, ...]]:
        """A row of texts for each prompt."""
        return [
            (
                f"{row.prompt_tokens:,}",
                f"{row.resumed_tokens:,}",
                row.equals_cold(row.logits_bitwise),
                row.equals_cold(row.states_bitwise),
                f"{row.max_abs_logit_diff:.1e}",
                "yes" if row.tokens_equal else "no",
                row.reason,
            )
            for row in self.rows
        ]

    def _verdict(self) -> str:
        """What the rows amount to, in a sentence."""
        if self.passed:
            replayed = "" if self.mode == "bitwise" else ", run over the same segments"
            word = "exact" if self.storage == "exact" else f"repeatable (storage={self.storage!r})"
            verdict = f"{word}: {self.resumed_tokens:,} tokens resumed, warm equals cold{replayed} bit for bit"
        elif self.resumed_tokens == 0:
            verdict = "NOT PROVED: nothing was resumed, so nothing was tested"
        else:
            verdict = "NOT EXACT" if not self.bitwise else f"NOT EXACT: further than {self.tolerance:.0e} from stock"
        batched = sum(row.batched for row in self.rows)
        if batched:
            verdict += f"; {batched} ran batched, which no run repeats bit for bit: compared within the tolerance"
        return f"{verdict}; max logit difference to stock {self.max_abs_logit_diff:.1e}"


@dataclass(frozen=True)
class _Run:
    tokens: torch.Tensor
    logits: torch.Tensor  # (steps, vocabulary)
    state: tuple[states.LayerTensors, ...]


def check_exactness(
    model: Any,
    prompts: Iterable[torch.Tensor | str],
    *,
    cache: SparsePrefixCache | None = None,
    max_new_tokens: int = 8,
    tolerance: float | None = None,
) -> ExactnessReport:
    """Run every prompt stock, warm and cold, and compare logits and states.

    Args:
        model: the model to prove.
        prompts: token ids of shape `(length,)` or `(1, length)`, or strings when the cache has a tokenizer. Prompts
            shorter than two grid steps have nothing to resume.
        cache: the handle to prove, with whatever it has stored; default a fresh one with default settings. It serves
            each prompt once to warm up where it resumes nothing of it yet.
        max_new_tokens: tokens to decode greedily after each prefill.
        tolerance: most that a logit may differ, warm against stock. By default 1e-4, 5e-3 where states are kept as
            "bf16" and 1e-2 as "int8"; and models in 16 bits have no bound, as a rounding may send a token to another
            expert there, in stock runs just as well.

    Returns:
        The report. It passes only if something was resumed.

    Raises:
        ValueError: `prompts` is empty, or a prompt has a wrong shape, or is a string and the cache has no tokenizer.
    """
    whole_number("max_new_tokens", max_new_tokens, 1, "it counts the tokens to decode after each prefill", MOST_ID)
    if not isinstance(prompts, Iterable) or isinstance(prompts, str):
        raise ValueError(f"prompts is {shown(prompts)}: give a list of token id tensors or strings.")
    own = cache is None
    warm_handle = SparsePrefixCache(model) if cache is None else cache
    try:
        ids = [as_ids(prompt, warm_handle.tokenizer, "prompts").to(input_device(model)) for prompt in prompts]
        if not ids:
            raise ValueError("prompts is empty: give at least one prompt to check.")
        for prompt in ids:  # before a stock run, which would fail in its embeddings
            check_ids(prompt, model.get_input_embeddings().num_embeddings, "prompts")
        rows = tuple(_check(model, prompt, warm_handle, max_new_tokens) for prompt in ids)
    finally:
        if own:
            warm_handle.detach()
    mode, storage = warm_handle.config.exactness, warm_handle.config.storage
    if tolerance is None and model.dtype in _ROUNDED:
        tolerance = TOLERANCES[storage]
    return ExactnessReport(rows, tolerance, mode, storage)


def _check(model: Any, ids: torch.Tensor, handle: SparsePrefixCache, max_new_tokens: int) -> ExactnessRow:
    stock = _run(model, ids, None, max_new_tokens)
    warm = _run(model, ids, handle, max_new_tokens)
    if handle.last_request is not None and handle.last_request.resumed_tokens == 0:
        warm = _run(model, ids, handle, max_new_tokens)
    info = handle.last_request
    assert info is not None
    with empty_twin(handle) as twin:
        if handle.config.exactness == "replayable":
            twin.server = Replay(twin.server, Lineage.from_ends(info.segments))
        cold = _run(model, ids, twin, max_new_tokens)
    furthest = _distance(warm, stock) if not info.batched else max(_distance(warm, stock), _distance(warm, cold))
    return ExactnessRow(
        prompt_tokens=ids.shape[1],
        resumed_tokens=info.resumed_tokens,
        logits_bitwise=torch.equal(warm.logits, cold.logits),
        states_bitwise=_equal(warm.state, cold.state),
        max_abs_logit_diff=furthest,
        tokens_equal=torch.equal(warm.tokens, stock.tokens) and torch.equal(warm.tokens, cold.tokens),
        reason=info.reason,
        batched=info.batched,
    )


def _distance(one: _Run, other: _Run) -> float:
    """Largest difference of a logit, up to and with the first step at which the runs choose different tokens."""
    differ = (one.tokens != other.tokens).nonzero()
    steps = int(differ[0]) + 1 if len(differ) else len(other.tokens)
    return float((one.logits[:steps].double() - other.logits[:steps].double()).abs().max())


def empty_twin(handle: SparsePrefixCache) -> SparsePrefixCache:
    """A handle with the same cuts and an empty store: what it serves first, it serves cold."""
    config = replace(handle.config, max_memory=None, grid=handle.grid, policy="none", ambient=False)
    twin = SparsePrefixCache(handle.model, handle.tokenizer, prove=handle.server.proof.wanted, config=config)
    space, own = twin.server.space.now()[0], handle.server.space.now()[0]
    for prefix in handle.store.marks.prefixes(own):  # which cut as well
        twin.store.mark(prefix, space)
    return twin


class Replay(Server):
    """Serves every prompt from nothing, over given segments."""

    def __init__(self, server: Server, lineage: Lineage) -> None:
        super().__init__(server.binding, server.store, server.policy, server.recorder, server.proof)
        self._lineage = lineage

    def serve_row(self, live: LiveCache, row: Row) -> Served:
        return Served(prefill.replay(self.binding, live, row, self._lineage))


def greedy(ids: torch.Tensor, max_new_tokens: int) -> dict[str, Any]:
    """Keywords with which two runs of `generate()` on the same ids can be compared, token by token and by logits."""
    return {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "num_beams": 1,
        # Every step counts: a model that stops at once would prove nothing.
        "min_new_tokens": max_new_tokens,
        "max_new_tokens": max_new_tokens,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


def _run(model: Any, ids: torch.Tensor, handle: SparsePrefixCache | None, max_new_tokens: int) -> _Run:
    state: list[states.LayerTensors] = []

    def keep(live: LiveCache) -> None:
        state.extend((states.capture_state(live), states.capture_kv(live, 0, ids.shape[1])))

    options: dict[str, Any] = {}
    if handle is not None:
        options["past_key_values"] = handle
        handle.server.on_prefill = keep
    try:
        with ambient.off():
            result = model.generate(ids, **greedy(ids, max_new_tokens), **options)
    finally:
        if handle is not None:
            handle.server.on_prefill = None
    return _Run(result.sequences[0, ids.shape[1] :], torch.cat(result.logits).cpu(), tuple(state))


def _equal(one: tuple[states.LayerTensors, ...], other: tuple[states.LayerTensors, ...]) -> bool:
    if len(one) != len(other):  # a call that was not served to its end left none
        return False
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left.layers, right.layers, strict=True):
            if a.keys() != b.keys():
                return False
            for name, value in a.items():
                if not (torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]):
                    return False
    return len(one) > 0
