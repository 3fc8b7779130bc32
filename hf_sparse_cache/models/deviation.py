"""How far states in 8 bits lie from stock, family by family, and which of them may therefore be kept so.

Measured on the tiny models of the tests in float32, whose logits reach to 4 or 5: 200 prompts of 160 tokens, rounded
once at 128, largest difference of a logit of the last 9 tokens (`python -m benchmarks.bench_storage`). In 16
bits all families stay below 4e-3 but those in which a rounding sends a token to another expert: 1 to 4 prompts of 200
in Qwen3-Next, KimiLinear, GLM5Next and Inkling2-Loop, by up to 2.5; these refuse 16 bits. A part is kept in 8 bits
where all such parts together move no logit by more than `MOST`, on any prompt; a family without such a part refuses
8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass


MOST, MOST_HALF = 1e-2, 5e-3


@dataclass(frozen=True)
class Deviation:
    """What was measured of one family.

    Attributes:
        parts: of `rounding.PARTS`, those that may be kept in 8 bits.
        moved: by how much a logit is moved with everything in 8 bits, at most.
        half: the same in 16 bits, where it is more than `MOST_HALF`; 0 where it is not.
    """

    parts: tuple[str, ...]
    moved: float
    half: float = 0.0

    def shortcoming(self, name: str, storage: str) -> str:
        """Why a family called `name` cannot be kept so at all, "" where it can."""
        if storage == "exact":
            return ""
        if storage == "bf16":
            return self._too_far(name) if self.half else ""
        if self.parts:
            return ""
        return (
            f"storage='int8' moves logits of {name} by up to {self.moved:.1g}, measured on a tiny model of the family "
            f"with logits up to 5, more than {MOST:.0e}: use storage={'exact' if self.half else 'bf16'!r}, or "
            "prove=False if you know better"
        )

    def _too_far(self, name: str) -> str:
        return (
            f"storage='bf16' moves logits of {name} by up to {self.half:.2g} on 1 to 4 of 200 prompts, measured on a "
            f"tiny model of the family with logits up to 5, more than {MOST_HALF:.0e}, as a rounding can send a token "
            "to another expert: use storage='exact', or prove=False if you know better"
        )


_ATTENTION, _CONV, _RECURRENT = "attention", "conv", "recurrent"
_ALL = (_ATTENTION, _CONV, _RECURRENT)
# By `model_type` of the text config.
INT8: dict[str, Deviation] = {
    "mamba": Deviation((), 1.5e-2),
    "mamba2": Deviation((), 2.3e-2),
    "falcon_mamba": Deviation(_ALL, 4.2e-3),
    "jamba": Deviation((_RECURRENT,), 0.31),
    "zamba": Deviation((), 8.7e-2),
    "zamba2": Deviation((_RECURRENT,), 0.21),
    "bamba": Deviation(_ALL, 7.7e-3),
    "granitemoehybrid": Deviation((), 0.58),
    "nemotron_h": Deviation((_ATTENTION,), 0.24),
    "falcon_h1": Deviation((_CONV, _RECURRENT), 1.5e-2),
    "qwen3_next": Deviation((), 2.0, 0.24),
    "qwen3_5_text": Deviation((_ATTENTION,), 3.5e-2),
    "qwen3_5_moe_text": Deviation((_ATTENTION,), 1.1),
    "olmo_hybrid": Deviation((), 4.5e-2),
    "kimi_linear": Deviation((), 2.9, 0.67),
    "bailing_hybrid": Deviation((), 3.2),
    "qwen4_exp_text": Deviation((), 6.8e-2),
    "glm5_next_text": Deviation((), 2.3, 0.26),
    "lfm2": Deviation(_ALL, 7.1e-3),
    "lfm2_moe": Deviation((_CONV,), 1.0),
    "lfm3": Deviation((_CONV,), 1.3e-2),
    "zaya": Deviation((_CONV,), 0.73),
    "inkling_text": Deviation((), 0.38),
    "inkling2_text": Deviation((), 0.87),
    "inkling2_loop_text": Deviation((), 3.5, 2.5),
    "lara_mini": Deviation((), 1.7),
    "llama": Deviation((), 1.4e-2),
    "qwen3": Deviation((), 1.6e-2),
    "gemma3_text": Deviation((), 1.6e-2),
}
UNKNOWN = Deviation((), float("inf"))
