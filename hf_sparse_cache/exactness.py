"""`check_exactness`: proof, on a user's own model and prompts, that reuse changes nothing.

Every prompt runs three times through `generate()`: stock (no handle), cold (an empty store), and warm (resumed). Warm
must equal cold bit for bit, in the logits of every step and in the state of every layer at the end of the prefill; and
warm must equal stock within rounding. Tokens alone would prove nothing: they often agree with the state wiped.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .cache import SparsePrefixCache
from .checks import MOST_ID, shown, whole_number
from .models import states
from .models.inputs import as_ids, check_ids, input_device
from .models.live import LiveCache
from .stats import table


# Warm against stock, for the dtypes where segments of a prefill are only rounding away from one shot. In 16 bits one
# ulp can send a token to another expert, so only warm against cold is bounded there.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


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
    """

    prompt_tokens: int
    resumed_tokens: int
    logits_bitwise: bool
    states_bitwise: bool
    max_abs_logit_diff: float
    tokens_equal: bool
    reason: str


@dataclass(frozen=True)
class ExactnessReport:
    """The verdict of `check_exactness`; printing it gives a table.

    Attributes:
        rows: one per prompt.
        tolerance: the bound on `max_abs_logit_diff`; None where the dtype has none.
        mode: what the cache promises: "bitwise", or "numerical", where only the tolerance counts.
    """

    rows: tuple[ExactnessRow, ...]
    tolerance: float | None
    mode: str = "bitwise"

    @property
    def bitwise(self) -> bool:
        """Warm equals cold bit for bit, in logits and in states."""
        return all(row.logits_bitwise and row.states_bitwise for row in self.rows)

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
        """Something was resumed, bitwise equal to cold (in bitwise mode), and within the tolerance of stock."""
        close = self.tolerance is None or self.max_abs_logit_diff <= self.tolerance
        kept = self.bitwise if self.mode == "bitwise" else self.tolerance is not None
        return self.resumed_tokens > 0 and kept and close

    def __str__(self) -> str:
        columns = (
            "prompt",
            "resumed",
            "logits = cold",
            "states = cold",
            "max |Δ logit| to stock",
            "same tokens",
            "reason",
        )
        body = [
            (
                f"{row.prompt_tokens:,}",
                f"{row.resumed_tokens:,}",
                "yes" if row.logits_bitwise else "NO",
                "yes" if row.states_bitwise else "NO",
                f"{row.max_abs_logit_diff:.1e}",
                "yes" if row.tokens_equal else "no",
                row.reason,
            )
            for row in self.rows
        ]
        if self.passed:
            how = "warm equals cold bit for bit" if self.bitwise else f"warm equals stock within {self.tolerance:.0e}"
            verdict = f"exact: {self.resumed_tokens:,} tokens resumed, {how}"
        elif self.resumed_tokens == 0:
            verdict = "NOT PROVED: nothing was resumed, so nothing was tested"
        else:
            verdict = (
                "NOT EXACT"
                if not self.bitwise and self.mode == "bitwise"
                else f"NOT EXACT: further than {self.tolerance:.0e} from stock"
            )
        return f"{table(columns, body)}\n\n{verdict}; max logit difference to stock {self.max_abs_logit_diff:.1e}"


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
) -> ExactnessReport:
    """Run every prompt stock, cold and warm, and compare logits and states.

    Args:
        model: the model to prove.
        prompts: token ids of shape `(length,)` or `(1, length)`, or strings when the cache has a tokenizer. Prompts
            shorter than two grid steps have nothing to resume.
        cache: the handle to prove, with whatever it has stored; default a fresh one with default settings. It serves
            each prompt once to warm up where it resumes nothing of it yet.
        max_new_tokens: tokens to decode greedily after each prefill.

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
    return ExactnessReport(rows, _TOLERANCE.get(model.dtype), warm_handle.config.exactness)


def _check(model: Any, ids: torch.Tensor, handle: SparsePrefixCache, max_new_tokens: int) -> ExactnessRow:
    stock = _run(model, ids, None, max_new_tokens)
    with _empty_twin(handle) as twin:
        cold = _run(model, ids, twin, max_new_tokens)
    warm = _run(model, ids, handle, max_new_tokens)
    if handle.last_request is not None and handle.last_request.resumed_tokens == 0:
        warm = _run(model, ids, handle, max_new_tokens)
    info = handle.last_request
    assert info is not None
    differ = (warm.tokens != stock.tokens).nonzero()
    steps = int(differ[0]) + 1 if len(differ) else len(stock.tokens)
    return ExactnessRow(
        prompt_tokens=ids.shape[1],
        resumed_tokens=info.resumed_tokens,
        logits_bitwise=torch.equal(warm.logits, cold.logits),
        states_bitwise=_equal(warm.state, cold.state),
        max_abs_logit_diff=float((warm.logits[:steps].double() - stock.logits[:steps].double()).abs().max()),
        tokens_equal=len(differ) == 0 and torch.equal(warm.tokens, cold.tokens),
        reason=info.reason,
    )


def _empty_twin(handle: SparsePrefixCache) -> SparsePrefixCache:
    """A handle with the same cuts and an empty store: what it serves first, it serves cold."""
    exactness = handle.config.exactness
    return SparsePrefixCache(
        handle.model, handle.tokenizer, max_memory=None, grid=handle.grid, policy="none", exactness=exactness
    )


def _run(model: Any, ids: torch.Tensor, handle: SparsePrefixCache | None, max_new_tokens: int) -> _Run:
    state: list[states.LayerTensors] = []

    def keep(live: LiveCache) -> None:
        state.extend((states.capture_state(live), states.capture_kv(live, 0, ids.shape[1])))

    options: dict[str, Any] = {}
    if handle is not None:
        options["past_key_values"] = handle
        handle.server.on_prefill = keep
    try:
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            # Every step counts: a model that stops at once would prove nothing.
            min_new_tokens=max_new_tokens,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
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
