"""The exactness matrix: model family x way of calling `generate()` x dtype x mode of exactness.

A cell runs one call three times on one tiny model: stock (without a handle), warm (with a handle that has served
prompts with a common prefix) and cold (from nothing: in bitwise mode with a handle that has nothing, in replayable
mode over the segments of the warm run). Warm must equal cold bit for bit, and stock within a tolerance; and something
must have been resumed, or the request must say why not.

A new way of calling is one row in `matrix_calls.CALLS`; a new family is one row in `tiny_families.ROWS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from segments_of import Kept, Retraced
from tiny_families import PAD, VOCABULARY
from tiny_models import available_families, build, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.config import EXACTNESS
from hf_sparse_cache.models.families import REFUSED, family_of


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Warm against stock. Internal float32 islands bound float64; in 16 bits one ulp can send a token to another expert.
TOLERANCE = {"float32": 1e-4, "float64": 1e-5, "bfloat16": None}
NEW_TOKENS = 5
REPLAYABLE, BITWISE = EXACTNESS
POLICY = "balanced"  # short prompts have a checkpoint at every cut, so that reuse never depends on what was learned
# The same where cuts are further apart than these prompts are long: where prompts part, and at their end.
POLICIES = {BITWISE: POLICY, REPLAYABLE: "junction"}
# Families on which every call runs in every test session; the rest run the core calls only.
REPRESENTATIVE = ("Mamba", "Mamba2", "Jamba", "Zamba2", "Qwen3.5", "LFM3", "Gemma3")
# Families that the oldest supported transformers does not have.
NOT_ON_FLOOR = {"KimiLinear", "BailingHybrid", "Qwen4Exp", "GLM5Next", "LFM3", "Inkling2", "Inkling2-Loop", "LaraMini"}
# What upstream itself gets wrong, family -> dtype -> why; such cells are shown, not run.
_FLOAT32_ROUTER = {"float64": "stock routes in float32 and raises on other weights"}
BROKEN_UPSTREAM = {"Inkling2": _FLOAT32_ROUTER, "Inkling2-Loop": _FLOAT32_ROUTER}


def supported_families() -> list[str]:
    """Labels of the available families that a handle can serve."""
    return [label for label in available_families() if build_shared(label).config.model_type not in REFUSED]


@dataclass
class Outcome:
    """What one call returned.

    Attributes:
        tokens: `(rows, length)`, prompts included.
        logits: one `(rows, vocabulary)` tensor a step, or none where the call does not return them.
        extra: whatever else must be the same without the cache.
    """

    tokens: Tensor
    logits: tuple[Tensor, ...] = ()
    extra: Any = None

    def equals(self, other: "Outcome") -> bool:
        """Bit for bit."""
        return (
            torch.equal(self.tokens, other.tokens)
            and len(self.logits) == len(other.logits)
            and all(torch.equal(one, two) for one, two in zip(self.logits, other.logits, strict=True))
            and self.extra == other.extra
        )

    def distance(self, other: "Outcome") -> float:
        """Largest logit difference, up to and with the step at which the tokens of a row begin to differ."""
        largest = 0.0
        start = self.tokens.shape[1] - len(self.logits)
        for row in range(
            self.logits[0].shape[0] if self.logits and self.tokens.shape[0] == self.logits[0].shape[0] else 0
        ):
            for step, (one, two) in enumerate(zip(self.logits, other.logits, strict=False)):
                finite = torch.isfinite(one[row]) & torch.isfinite(two[row])
                largest = max(largest, float((one[row] - two[row])[finite].double().abs().max()))
                if self.tokens[row, start + step] != other.tokens[row, start + step]:
                    break
        return largest


@dataclass(frozen=True)
class Call:
    """One way of calling `generate()`.

    Attributes:
        name: its row in the support table.
        run: makes the call with a handle, or with None for stock.
        reason: "" when a prefix must be resumed, else a part of `last_request.reason` that says why none was.
        refused: why transformers itself does not allow it on this model, "" when it does.
        core: runs on every family in every session, not on the representative ones alone.
        slow: runs on one family in every session, on the representative ones in the full matrix.
        reference: the call to compare with where it is not the same call without the handle.
    """

    name: str
    run: Callable[["Bench", SparsePrefixCache | None], Outcome]
    reason: str = ""
    refused: Callable[[PreTrainedModel], str] = field(default=lambda model: "")
    core: bool = False
    slow: bool = False
    reference: Callable[["Bench", SparsePrefixCache | None], Outcome] | None = None


@dataclass(frozen=True)
class Cell:
    """The result of one cell."""

    family: str
    call: str
    dtype: str
    mode: str
    status: (
        # "exact", "batched" (rows in one forward, which no run repeats bit for bit), "uncached" (stock results, with
        # a reason), "not allowed" (by transformers), "broken upstream"
        str
    )
    resumed_tokens: int = 0
    max_diff: float = 0.0
    note: str = ""


def runs(call: Call, family: str, dtype: str) -> bool:
    """Whether a cell belongs to the full matrix: slow calls are run on the representative families in float32 only."""
    return not call.slow or (family in REPRESENTATIVE and dtype == "float32")


@lru_cache(maxsize=4)
def build_shared(label: str, dtype: str = "float32") -> PreTrainedModel:
    """A tiny model that the cells of one family share; no cell may change it."""
    model = build(label, DTYPES[dtype])
    if dtype == "float64":
        model.set_experts_implementation("eager")  # torch has no grouped matrix product in float64
    return model


class Bench:
    """One model with prompts whose length fits its kernel chunk, and the options that every call shares."""

    def __init__(
        self, label: str, dtype: str = "float32", model: PreTrainedModel | None = None, mode: str = BITWISE
    ) -> None:
        self.label, self.dtype, self.mode = label, dtype, mode
        self.model = build_shared(label, dtype) if model is None else model
        self.family = family_of(self.model)
        self.step = max(16, self.family.chunk(self.model.config.get_text_config()))
        self.prefix = random_ids(2 * self.step + 5, seed=1)

    def prompt(self, seed: int, suffix: int | None = None) -> Tensor:
        """`(1, length)`: the common prefix and a suffix of its own."""
        return torch.cat([self.prefix, random_ids(suffix or self.step // 2 + seed, seed=100 + seed)], dim=1)

    @cached_property
    def stored(self) -> Tensor:
        """The prompt that a warm handle has served."""
        return self.prompt(0, self.step // 2)

    def handle(self, model: Any = None, **options: Any) -> SparsePrefixCache:
        """A new handle on the model, or on a wrapper of it."""
        return SparsePrefixCache(
            self.model if model is None else model,
            **{"grid": self.step, "policy": POLICIES[self.mode], "exactness": self.mode} | options,
        )

    def warm(self, handle: SparsePrefixCache) -> None:
        """Serve the stored prompt; in replayable mode also one that shows where others leave it."""
        self.generate(self.stored, handle, max_new_tokens=1)
        if self.mode == REPLAYABLE:
            self.generate(self.prompt(9), handle, max_new_tokens=1)

    def generate(self, ids: Tensor | None, handle: SparsePrefixCache | None, **options: Any) -> Outcome:
        """One `generate()` call, greedy unless the options say otherwise."""
        given = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "pad_token_id": PAD,
            **options,
        }
        if handle is not None:
            given["past_key_values"] = handle
        result = self.model.generate(ids, **given)
        if isinstance(result, Tensor):
            return Outcome(result)
        return Outcome(result.sequences, tuple(result.logits or ()))


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """A batch of prompts of different lengths."""
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt[0]
        mask[row, width - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def run_cell(label: str, call: Call, dtype: str, mode: str = BITWISE) -> Cell:
    """Run one cell.

    Raises:
        AssertionError: warm is not cold, or not stock, or nothing was resumed and nobody says why.
    """
    broken = BROKEN_UPSTREAM.get(label, {}).get(dtype)
    if broken:
        return Cell(label, call.name, dtype, mode, "broken upstream", note=broken)
    bench = Bench(label, dtype, mode=mode)
    not_allowed = call.refused(bench.model)
    if not_allowed:
        return Cell(label, call.name, dtype, mode, "not allowed", note=not_allowed)
    stock = (call.reference or call.run)(bench, None)
    with bench.handle() as handle:
        bench.warm(handle)
        handle.server = kept = Kept(handle.server)
        warm = call.run(bench, handle)
        resumed, info = kept.resumed_tokens, handle.last_request
    with bench.handle(policy="none") as handle:
        if mode == REPLAYABLE:
            handle.server = Retraced(handle.server, kept)
        cold = call.run(bench, handle)
    assert info is not None
    assert kept.batched or warm.equals(cold), f"warm is not cold: {warm.distance(cold):.1e}"
    difference, tolerance = warm.distance(stock), TOLERANCE[dtype]
    if tolerance is not None:
        assert difference <= tolerance, f"{difference:.1e} from stock"
        assert torch.equal(warm.tokens, stock.tokens), f"tokens differ from stock, logits {difference:.1e}"
        assert warm.extra == stock.extra
    if call.reason:
        assert call.reason in info.reason, info.reason
        return Cell(label, call.name, dtype, mode, "uncached", 0, difference, info.reason)
    if kept.batched:  # of a short prompt more is gained by one forward for all rows than by a checkpoint
        assert mode == REPLAYABLE
        return Cell(label, call.name, dtype, mode, "batched", resumed, difference)
    assert resumed > 0, f"nothing was resumed: {info.reason}"
    return Cell(label, call.name, dtype, mode, "exact", resumed, difference)


def vocabulary() -> dict[str, int]:
    """Words of the tiny vocabulary, for calls that need a tokenizer."""
    return {f"<{index}>": index for index in range(VOCABULARY)}
