"""Pairs of a context and a continuation, as strings or as ids: read, tokenised, and refused in words.

The seam between the two is tokenised as lm-evaluation-harness does it, so that results can be compared: white space at
the end of a context belongs to the continuation, the whole text is tokenised at once, and what lies behind as many
tokens as the context alone has is the continuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..checks import shown, text, token_ids, whole_number
from ..planning.cuts import Tokens
from .binding import Binding
from .inputs import check_ids


logger = logging.get_logger(__name__)

_PAIR = "give (context, continuation), both strings or both token ids"


@dataclass(frozen=True, eq=False)
class Pair:
    """One continuation to be scored.

    Attributes:
        tokens: context and continuation, int32 `(N,)`.
        start: where the continuation begins, from 1 to N - 1.
    """

    tokens: Tokens
    start: int

    @property
    def read(self) -> Tokens:
        """What the model reads to score it: all but the last token."""
        return self.tokens[:-1]


def read_pairs(binding: Binding, pairs: Any, window: int | None) -> list[Pair]:
    """Pairs as tokens.

    Args:
        binding: the model, and the tokenizer of strings.
        pairs: of `(context, continuation)`, both strings or both ids.
        window: most tokens that the model may read; a longer context loses its beginning, with one warning.

    Raises:
        ValueError: one of them is no such pair; the message names it by its index.
    """
    found = []
    for index, pair in enumerate(_listed("pairs", pairs, _PAIR)):
        name = f"pairs[{index}]"
        if isinstance(pair, (str, bytes, dict, set)) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise ValueError(f"{name} is {shown(pair)}, which is no pair: {_PAIR}.")
        context, continuation = pair
        if isinstance(context, str) != isinstance(continuation, str):
            raise ValueError(f"{name} has a string and {_kind(context, continuation)}: {_PAIR}.")
        if isinstance(context, str):
            context, continuation = _encoded(binding, context, continuation, name)
        else:
            context = _ids(binding, context, f"the context of {name}")
            continuation = _ids(binding, continuation, f"the continuation of {name}")
        if not len(context):
            raise ValueError(
                f"{name} has an empty context, which gives its first token no probability: put the token before it "
                "that texts of this model begin with, such as the tokenizer's bos_token or eos_token."
            )
        if not len(continuation):
            raise ValueError(f"{name} has an empty continuation, which has nothing to score: leave the pair out.")
        found.append(_fitting(Pair(np.concatenate([context, continuation]), len(context)), window, name))
    return found


def read_texts(binding: Binding, texts: Any) -> list[Tokens]:
    """Whole texts as tokens, at least one each.

    Raises:
        ValueError: one of them is neither a string nor ids, or is empty; the message names it by its index.
    """
    found = []
    for index, given in enumerate(_listed("texts", texts, "give strings or token ids")):
        name = f"texts[{index}]"
        tokens = _tokenised(binding, given, name) if isinstance(given, str) else _ids(binding, given, name)
        if not len(tokens):
            raise ValueError(f"{name} is empty, which has nothing to score: leave it out.")
        found.append(tokens)
    return found


def prefix_token(binding: Binding, given: int | None) -> int:
    """The token before the first one of a text: as given, or that of the tokenizer.

    Raises:
        ValueError: There is none, or it is no id of this model.
    """
    tokenizer, most = binding.tokenizer, binding.model.get_input_embeddings().num_embeddings - 1
    known = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    token = next((token for token in known if token is not None), None) if given is None else given
    if token is None:
        raise ValueError("prefix is None, and no tokenizer has a token that begins texts: give prefix=<token id>.")
    return whole_number("prefix", token, 0, "it is the id of the token before a text", most)


def windows(tokens: Tokens, prefix: int, window: int) -> list[Pair]:
    """A text in windows that do not overlap, each of which sees the one token before it, as lm-evaluation-harness has
    them: together they score every token once.

    Args:
        tokens: the text, int32 `(N,)`.
        prefix: the token before the first one.
        window: most tokens that the model may read, at least 1.
    """
    text = np.concatenate([np.asarray([prefix], dtype=np.int32), tokens])
    found = []
    for start in range(1, len(text), window):
        end = min(start + window, len(text))
        # As much context as the window has room for: the last one is filled from before.
        begin = start - 1 if start == 1 or end - start == window else max(0, end - 1 - window)
        found.append(Pair(text[begin:end], start - begin))
    return found


def _listed(name: str, given: Any, remedy: str) -> list[Any]:
    if isinstance(given, (str, bytes, dict)) or not isinstance(given, Iterable):
        raise ValueError(f"{name} is {shown(given)}: {remedy}, in a list.")
    return list(given)


def _kind(*values: Any) -> str:
    return next(type(value).__name__ for value in values if not isinstance(value, str))


def _ids(binding: Binding, given: Any, name: str) -> Tokens:
    if not isinstance(given, (Sequence, np.ndarray, torch.Tensor)):
        raise ValueError(f"{name} is {shown(given)}: give a string or integer token ids of shape (N,).")
    tokens = token_ids(given, name, empty=True)
    return _known(binding, tokens, name)


def _known(binding: Binding, tokens: Tokens, name: str) -> Tokens:
    if len(tokens):
        check_ids(torch.from_numpy(tokens), binding.model.get_input_embeddings().num_embeddings, name)
    return tokens


def _tokenised(binding: Binding, given: str, name: str) -> Tokens:
    if binding.tokenizer is None:
        raise ValueError(f"{name} is a string, but there is no tokenizer: SparsePrefixCache(model, tokenizer).")
    ids = binding.tokenizer(text(name, given, "give text in UTF-8"))["input_ids"]
    return _known(binding, np.asarray(ids, dtype=np.int32), name)


def _encoded(binding: Binding, context: str, continuation: str, name: str) -> tuple[Tokens, Tokens]:
    """Both parts of a text: the whole is tokenised, and cut where the context alone would end."""
    if not context or not continuation:
        return np.empty(0 if not context else 1, np.int32), np.empty(0, np.int32)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = _tokenised(binding, context + continuation, name)
    alone = _tokenised(binding, context, name)
    return alone, whole[len(alone) :]


def _fitting(pair: Pair, window: int | None, name: str) -> Pair:
    """A pair of which the model can read all but the last token at once."""
    continuation, over = len(pair.tokens) - pair.start, len(pair.tokens) - 1 - (window or len(pair.tokens))
    if window is None or over <= 0:
        return pair
    if continuation > window:
        raise ValueError(
            f"{name} has a continuation of {continuation:,} tokens, more than the {window:,} of the model's context "
            "window: score it in windows with loglikelihood_rolling(), or give a larger max_length."
        )
    logger.warning_once(
        f"{name} has {len(pair.tokens):,} tokens, more than fit the context window of {window:,}: its context loses "
        "its beginning, and so does that of every such pair. Give a larger max_length where the model can read more."
    )
    return Pair(pair.tokens[over:], pair.start - over)
