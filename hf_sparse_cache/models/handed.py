"""A live cache in a user's hands: `cache.prefill()` gives it, a forward, a loop of one's own or `generate()` goes on.

transformers leaves to the caller what a cache of purely recurrent layers cannot say, how many tokens it holds; some
models count positions from 0 whatever it holds; and `generate()` runs a text again whose cache holds all of it. Here
each forward of the model is counted on the cache it is given, positions are filled in where they are missing, and what
does not continue the text is refused.
"""

import inspect
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch

from . import mamba1, prefill
from .binding import Binding
from .families import CACHE_NAMES
from .inputs import Row
from .live import LiveCache
from .watch import ChangedPrefillError


@dataclass(frozen=True)
class Prefilled:
    """What `SparsePrefixCache.prefill` gives.

    Attributes:
        logits: of the last tokens, `(1, tokens, vocabulary)`.
        past_key_values: a live cache that holds the prompt. A forward of the model goes on from it, given under the
            name that the model has for its cache, and so does `generate()` with the prompt and what follows it.
    """

    logits: torch.Tensor
    past_key_values: LiveCache

    @property
    def cache(self) -> LiveCache:
        """The same, by the name that transformers has for it from 5.24 on."""
        return self.past_key_values


def hand_out(live: LiveCache, ids: torch.Tensor, logits: torch.Tensor) -> Prefilled:
    """Give a live cache at the end of the prompt `(length,)` away; `logits` are those of its last tokens."""
    live.text, live.last_logits = ids, logits[:, -1:]
    return Prefilled(logits, live)


# -- a forward of one's own -------------------------------------------------------------------------------------------


def before_body(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Before a forward of the model's body on such a cache: the positions that it lacks."""
    live = _handed_out(kwargs)
    if live is None or torch.compiler.is_compiling():
        return None
    rows, tokens = _shape(args, kwargs)
    if rows != 1:
        raise ValueError(f"This cache holds one prompt, and the forward has {rows} rows: give it one.")
    if live.unfinished:
        raise ValueError(
            "A forward on this cache has failed halfway, so that its layers hold different tokens; prefill() it anew."
        )
    live.unfinished = True
    kind: Any = type(module)
    if kwargs.get("position_ids") is not None or not _takes_positions(kind):
        return None
    held = live.get_seq_length()
    device = next(value.device for value in (*args, *kwargs.values()) if torch.is_tensor(value))
    return args, {**kwargs, "position_ids": torch.arange(held, held + tokens, device=device)[None]}


def after_body(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """After a forward of the model's body: nothing else says how many tokens a purely recurrent cache holds."""
    live = next((kwargs[name] for name in CACHE_NAMES if isinstance(kwargs.get(name), LiveCache)), None)
    if live is None or torch.compiler.is_compiling():
        return
    live.unfinished = False
    if live.recurrent_only:
        live.length += _shape(args, kwargs)[1]


def _handed_out(kwargs: dict[str, Any]) -> LiveCache | None:
    for name in CACHE_NAMES:
        live = kwargs.get(name)
        if isinstance(live, LiveCache) and live.text is not None:
            return live
    return None


def _shape(args: Any, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and tokens that a forward of the body is given."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    ids = next(value for value in given if torch.is_tensor(value))
    return ids.shape[0], ids.shape[1]


@cache
def _takes_positions(kind: Hashable) -> bool:
    return "position_ids" in inspect.signature(cast(Any, kind).forward).parameters


# -- generate() -------------------------------------------------------------------------------------------------------


def continued(
    binding: Binding, live: LiveCache, input_ids: torch.Tensor, mask_length: int, kwargs: dict[str, Any]
) -> Any:
    """The prefill of a call of `generate()` that is given such a cache: what it does not hold yet, in one forward.

    Args:
        binding: of the model that it was made for.
        live: the cache.
        input_ids: `(1, length)`: the whole text, or with a longer mask only what is new.
        mask_length: tokens that the call's mask covers.
        kwargs: further keywords for the model.

    Raises:
        ValueError: They are not what continues it; nothing has been changed.
    """
    assert live.text is not None and live.last_logits is not None
    held, known = live.get_seq_length(), len(live.text)
    if len(input_ids) != 1:
        rows = len(input_ids)
        raise ValueError(
            f"This cache holds one prompt, and the call has {rows} rows: give a SparsePrefixCache instead."
        )
    if live.unfinished:
        raise ValueError("A forward on this cache has failed halfway: prefill() it anew.")
    if live.recurrent_only and getattr(binding.model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "Forwards of a compiled model are not counted on this cache: give a SparsePrefixCache instead."
        )
    row = input_ids
    if mask_length != input_ids.shape[1]:  # as transformers tells new tokens from the whole text
        if mask_length != held + input_ids.shape[1]:
            raise ValueError(
                f"attention_mask covers {mask_length} tokens, and the cache holds {held} beside the "
                f"{input_ids.shape[1]} given: give the whole text, or a mask of {held + input_ids.shape[1]}."
            )
        row = torch.cat([input_ids.new_zeros(1, held), input_ids], dim=1)
    else:
        _check_text(live.text.to(row.device), row[0], held)
    if row.shape[1] == held == known:
        return binding.output(live.last_logits.clone(), live)
    if row.shape[1] <= held:
        raise ValueError(
            f"The cache holds {held} tokens, all that input_ids has: there is nothing left to compute. Give at least "
            "one token behind them, or call prefill() again."
        )
    live.length = held
    try:
        with mamba1.held(binding.model):
            return prefill.segment(binding, live, Row(row[0], kwargs), row.shape[1])
    except ChangedPrefillError as error:
        raise ValueError(f"This cache cannot be continued: {error}. Give a SparsePrefixCache instead.") from error


def _check_text(text: torch.Tensor, row: torch.Tensor, held: int) -> None:
    shared = min(len(text), len(row))
    differ = (text[:shared] != row[:shared]).nonzero()
    if len(differ) or len(row) < held:
        where = f"differs at token {int(differ[0])}" if len(differ) else f"has {len(row)} tokens"
        raise ValueError(
            f"The cache holds {held} tokens of another text: input_ids {where}. Give the text that it was prefilled "
            "with and what follows, or the SparsePrefixCache itself, which resumes what the two share."
        )
