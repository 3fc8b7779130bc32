"""What `generate()` answered is kept for the next turn: the state that its live cache holds when it returns.

It costs no compute, and nothing while tokens are decoded. One state is there, behind the last token that was read: of
`sequences` of N tokens the first N - 1, as the last one was chosen and never read. It is kept where a run from nothing
over the same segments, with the decoded tokens one by one, gives the same bits: in replayable mode, of one prompt, one
beam, and a loop that is transformers' own. Where one-token steps and a prefill are different arithmetic (a clamp that
only one of the two has), what was decoded would not be what a prompt computes: measured, not known by name.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.generation import utils
from transformers.generation.utils import GenerationMode
from transformers.utils import logging

from ..errors import out_of_memory
from ..stats import Recorder, RequestInfo
from ..store.answer import Read, open_answer
from . import mamba1, prefill, states, watch
from .binding import Binding
from .inputs import Row
from .live import LiveCache
from .proof import PROMPTS, SECOND_TOKENS, sample_prompt
from .rounding import NotRoundableError
from .weights import Identity, identity, unchanged


logger = logging.get_logger(__name__)

# Logits of decoded tokens may differ from a prefill's by this much; or in the mean by two roundings of 16 bits, where
# honest models stay below 1.6 and Zamba2, whose clamp shows there as well, is at 2.1 to 2.4; or, where every piece is
# rounded by a scale of its own, by twice what a prefill in two pieces differs by.
DECODING_TOLERANCE = 1e-4
_ROUNDINGS, _NOISE = 2.0, 2.0
# For each model object, by what it is proved by.
_measured: weakref.WeakKeyDictionary[Any, dict[str, Decoding]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Turn:
    """A prompt that was served, while its model answers.

    Attributes:
        live: the live cache that it decodes on.
        read: what the request left.
        made_of: name of the model that read it.
        info: what was recorded of the prompt.
    """

    live: LiveCache
    read: Read
    made_of: Identity
    info: RequestInfo


def may_be_kept(generation_mode: Any) -> bool:
    """Whether a call of `generate()` decodes one token after the other on one cache."""
    return generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@torch.no_grad()
def keep(binding: Binding, recorder: Recorder, turn: Turn, result: Any) -> None:
    """Keep the state behind an answer, if there is one; whatever is not as it should be, nothing is kept.

    Args:
        binding: the model.
        recorder: gets the new position as one that the request has captured.
        turn: the prompt.
        result: what `generate()` returned.
    """
    try:
        _keep(binding, recorder, turn, result)
    except Exception as error:
        # Whatever it was needed for, the proof of decoding among it: the answer itself is there, and stays.
        if not (out_of_memory(error) or isinstance(error, NotRoundableError)):
            raise
        logger.warning_once(f"An answer is not kept for the next turn: {error}")


def _keep(binding: Binding, recorder: Recorder, turn: Turn, result: Any) -> None:
    answer = _answer_in(result, turn.read)
    if answer is None:
        return
    why = _why_not(binding, turn, len(turn.read.prompt.ids) + len(answer) - 1)
    if why:
        logger.warning_once(f"An answer is not kept for the next turn, which will read it: {why}.")
        return
    opened = open_answer(turn.read, answer)
    if opened is None:
        return
    live, kept = turn.live, binding.rounding
    try:
        with opened:
            for position in opened.planned:
                kv = partial(states.capture_kv, live, rounding=kept) if live.full_attention_layers else None
                opened.add(position, states.capture_state(live, kept), kv)
    finally:
        if opened.captured:
            recorder.amend(turn.info, replace(turn.info, captured=(*turn.info.captured, *opened.captured)))


def _answer_in(result: Any, read: Read) -> Any:
    """The generated tokens, int32 `(M,)` with at least two, where the result is the prompt and what follows it."""
    sequences = result if torch.is_tensor(result) else getattr(result, "sequences", None)
    prompt = read.prompt.ids
    if not torch.is_tensor(sequences) or sequences.dim() != 2 or len(sequences) != 1:
        return None
    ids = sequences[0].to("cpu", torch.int32).numpy()
    return ids[len(prompt) :] if len(ids) >= len(prompt) + 2 and np.array_equal(ids[: len(prompt)], prompt) else None


def _why_not(binding: Binding, turn: Turn, position: int) -> str:
    """Why the live cache is not what a prompt of so many tokens would leave, "" where it is."""
    model, live = binding.model, turn.live
    deferred = getattr(utils, "DeferredStopCheck", None)
    device = binding.model.get_input_embeddings().weight.device
    if deferred is not None and any(
        deferred.is_supported(device, live, returned, False) for returned in (True, False)
    ):
        return f"on {device.type} transformers decodes one token more than it returns"
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model.forward, "_torchdynamo_orig_callable"):
        return "a compiled model rounds otherwise than the run that would replay it"
    held = live.length if live.recurrent_only else live.get_seq_length()
    if held != position:
        return f"its cache holds {held} tokens where {position} were read"
    try:
        watch.check_filled(live, position)
    except watch.ChangedPrefillError as error:
        return str(error)
    if not unchanged(model, turn.made_of):
        return "the model changed while it answered"
    return decoding(binding).shortcoming(type(model).__name__)


# -- decoding against prefill -----------------------------------------------------------------------------------------


class Decoding(NamedTuple):
    """How far logits of tokens that are decoded one by one lie from those of a prefill, and how far they may.

    Attributes:
        gap: the largest difference, on the prompt that the binding is proved with; in 16 bits the mean (of squares).
        bound: the tolerance, or what rounding alone explains on this model.
    """

    gap: float
    bound: float

    def shortcoming(self, name: str) -> str:
        """Why answers of a model cannot be kept, "" where they can."""
        if self.gap <= self.bound:
            return ""
        return (
            f"one-token steps of {name} are {self.gap:.2g} from its prefill, more than {self.bound:.2g}. In idle time "
            "cache.prefill(conversation) reads it ahead"
        )


def decoding(binding: Binding) -> Decoding:
    """Measured on the model as it is, once for each code that it is made of."""
    name = identity(binding.model).proved_by
    known = _measured.setdefault(binding.model, {})
    if name not in known:
        known[name] = _measure(binding)
    return known[name]


def _measure(binding: Binding) -> Decoding:
    # In 16 bits a token may go to another expert now and then; what is other arithmetic is so on every prompt.
    with torch.no_grad(), mamba1.held(binding.model):
        found = [_on_prompt(binding, sample_prompt(binding, seed)) for seed in range(PROMPTS)]
    return min(found, key=lambda one: one.gap / one.bound)


def _on_prompt(binding: Binding, ids: torch.Tensor) -> Decoding:
    end, kept = ids.shape[1], SECOND_TOKENS
    whole, pieces, steps = (_logits(binding, ids, ends) for ends in ([end], [end - kept, end], _single(end, kept)))
    info = torch.finfo(next(weight.dtype for weight in binding.model.parameters() if weight.is_floating_point()))
    if info.bits < 32:
        return Decoding(_rms(steps - whole), max(DECODING_TOLERANCE, _ROUNDINGS * info.eps * _rms(whole)))
    return Decoding(
        float((steps - whole).abs().max()), max(DECODING_TOLERANCE, _NOISE * float((pieces - whole).abs().max()))
    )


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _single(end: int, kept: int) -> list[int]:
    return [end - kept, *range(end - kept + 1, end + 1)]


def _logits(binding: Binding, ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Logits `(1, tokens, vocabulary)` of the last tokens of a text `(1, length)` that is run up to each of `ends`."""
    live, found = binding.live_cache(), []
    for end in ends:
        wanted = min(SECOND_TOKENS, end - live.length)
        row = Row(ids[0], {"use_cache": True, "logits_to_keep": wanted})
        found.append(prefill.segment(binding, live, row, end).logits[:, -wanted:].double())
    return torch.cat(found, dim=1)[:, -SECOND_TOKENS:]
