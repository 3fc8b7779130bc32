"""Log-probabilities of the tokens of one text after the other, where each begins as the one before it did.

Only the logits of scored tokens are ever computed, those of one forward at a time, and one number of each is kept.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ..planning.cuts import Tokens


# Bytes of logits that one forward may give, in float32.
MOST_LOGIT_BYTES = 2**28


def most_rows(vocabulary: int, chunk: int) -> int:
    """Tokens whose logits may be in memory together, in whole kernel chunks."""
    return max(chunk, 64, MOST_LOGIT_BYTES // (4 * vocabulary)) // chunk * chunk


class LogitRows:
    """Logits of some tokens, of which any next token may be scored.

    Args:
        logits: `(n, vocabulary)`.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits
        # Row by row: in 16 bits each is rounded up alone, and a row gives the same whatever is beside it.
        whole = [row.to(torch.promote_types(row.dtype, torch.float32)) for row in logits]
        self._totals = torch.stack([row.logsumexp(-1) for row in whole])
        self._best = torch.stack([row.argmax(-1) for row in whole])

    def scored(self, targets: Tokens) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Of the tokens `(m,)` behind the first m rows: log-probabilities, and whether each is the likeliest."""
        wanted = torch.from_numpy(np.asarray(targets, dtype=np.int64)).to(self._logits.device)
        count = len(wanted)
        chosen = self._logits[:count].gather(-1, wanted[:, None])[:, 0].to(self._totals.dtype)
        found = (chosen - self._totals[:count]).double().cpu().numpy()
        return found, (self._best[:count] == wanted).cpu().numpy()


class Reading:
    """What is known of the text that is being read: a `Reader` of the prefill (see `prefill`).

    Attributes:
        last: the logits behind the last token.
    """

    def __init__(self) -> None:
        self._tokens: Tokens = np.empty(0, dtype=np.int32)
        self._first = self._next = 0  # the tokens whose logits are known
        self._scores = np.empty(0)
        self._likeliest = np.empty(0, dtype=np.bool_)
        self.last: LogitRows | None = None

    def begin(self, tokens: Tokens, first: int, shared: int) -> int | None:
        """Goes on to a text, int32 `(N,)`.

        Args:
            tokens: the text.
            first: the first token whose logits are wanted.
            shared: tokens that it shares with the text before it, whose scores still hold.

        Returns:
            The deepest position from which what is missing can be read; None for any.
        """
        known = min(self._next, shared - 1)  # the last shared token is followed by another one here
        scores, likeliest = np.zeros(len(tokens)), np.zeros(len(tokens), dtype=np.bool_)
        if self._first <= first < known:
            scores[:known], likeliest[:known] = self._scores[:known], self._likeliest[:known]
        else:
            self._first = known = first
        self._tokens, self._next, self._scores, self._likeliest = tokens, known, scores, likeliest
        self.last = None
        return self._next if self._next < len(tokens) - 1 else None

    def forget(self) -> None:
        """What is known is that of another model."""
        self._next = self._first

    def wanted(self, start: int, end: int) -> int:
        return max(1, end - max(start, self._next))

    def read(self, start: int, end: int, logits: torch.Tensor) -> None:
        first, length = max(start, self._next), len(self._tokens)
        if first >= end:
            return
        kept = logits[0, first - end :]
        inner = min(end, length - 1)
        if inner > first:
            found = slice(first, inner)
            rows = LogitRows(kept[: inner - first])
            self._scores[found], self._likeliest[found] = rows.scored(self._tokens[first + 1 : inner + 1])
        if end == length:
            self.last = LogitRows(kept[-1:].clone())
        self._next = end

    def of(self, start: int, target: int) -> Score:
        """The score of the tokens from `start` on, with `target` behind the last one."""
        assert self.last is not None
        inner = slice(start - 1, len(self._tokens) - 1)
        return Score(self._scores[inner], self._likeliest[inner]).then(*self.last.scored(np.asarray([target])))


class Score:
    """Log-probabilities of the tokens of one continuation, and whether each of them is the likeliest."""

    def __init__(self, values: NDArray[np.float64], likeliest: NDArray[np.bool_]) -> None:
        self._values, self._likeliest = values, likeliest

    def then(self, values: NDArray[np.float64], likeliest: NDArray[np.bool_]) -> Score:
        """With further tokens behind it."""
        return Score(np.append(self._values, values), np.append(self._likeliest, likeliest))

    @property
    def total(self) -> tuple[float, bool]:
        """The sum, and whether greedy decoding would give the whole."""
        return math.fsum(self._values.tolist()), bool(self._likeliest.all())
