"""The log-likelihood of continuations: shared prefixes once, then the continuations of each context.

What several pairs have in common is a *stem*: a context, or, where a continuation is long, the whole of what the model
reads. Stems are prompts like any other, matched, cut and counted, in an order in which each follows the one that it
shares most with (see `planning.foresight`). Behind a context its continuations run as rows of one forward, padded on
the right: every scored token lies before the padding, and the states behind it are thrown away. In bitwise mode each
runs alone, so that a pair gives the same bits whatever else is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers.utils import logging

from ..errors import out_of_memory
from ..planning.cuts import MIN_SUFFIX_TOKENS, Tokens
from ..planning.foresight import Foreseen, Foresight, TextInTurn, turns
from ..planning.policy import limited
from ..stats import Cause, Reason
from ..store.holding import Holding
from . import mamba1, prefill, rope, states
from .inputs import Prompts, Row, input_device, why_uncached
from .live import LiveCache
from .pairs import Pair
from .scores import LogitRows, Reading, most_rows
from .server import Server
from .sitting import Asked, Served, Way, serve_alone
from .watch import ChangedPrefillError, ModelChangedError
from .weights import Identity, identity, unchanged


logger = logging.get_logger(__name__)

# A longer continuation is a text of its own: checkpoints may be taken inside it, and others share its beginning.
LONGEST_TAIL_TOKENS = 256


@dataclass
class _Stem:
    """What some pairs have in common, and the index of each of them."""

    tokens: Tokens
    first: int
    pairs: list[int] = field(default_factory=list)


@dataclass
class _Tail:
    """Tokens behind a stem that a forward reads, and the pairs that they serve, those that need all of them first."""

    tokens: Tokens
    pairs: list[int] = field(default_factory=list)


class Scoring:
    """One call.

    Args:
        server: the model and its store.
        pairs: what is to be scored.
        batch_size: most rows of a forward, in replayable mode.
        done: called with the number of pairs that were scored since.
    """

    def __init__(
        self, server: Server, pairs: Sequence[Pair], batch_size: int, done: Callable[[int], object] = lambda _: None
    ) -> None:
        self._server, self._binding, self._pairs, self._done = server, server.binding, pairs, done
        self._alone = self._binding.config.exactness == "bitwise"
        self._batch_size = 1 if self._alone else batch_size
        self._device = input_device(self._binding.model)
        self._most = most_rows(self._binding.text_config.vocab_size, self._binding.chunk)
        self._reading = Reading()
        self._scored_by = ""  # the model behind what the reading knows
        self._holding = Holding(server.store)
        self._found: list[tuple[float, bool] | None] = [None] * len(pairs)

    @torch.no_grad()
    def run(self) -> list[tuple[float, bool]]:
        """The sum of the log-probabilities of each continuation, and whether greedy decoding would give it."""
        stems = self._stems()
        order = turns([stem.tokens for stem in stems], [stem.first for stem in stems], share=not self._alone)
        try:
            with mamba1.held(self._binding.model):
                for turn in order:
                    self._stem(stems[turn.index], turn)
                    self._done(len(stems[turn.index].pairs))
        finally:
            self._holding.close()
        return [found for found in self._found if found is not None]

    # -- what is shared -----------------------------------------------------------------------------------------------

    def _stems(self) -> list[_Stem]:
        found: dict[tuple[bytes, int], _Stem] = {}
        for index, pair in enumerate(self._pairs):
            behind = len(pair.tokens) - 1 - pair.start
            apart = pair.start >= MIN_SUFFIX_TOKENS and behind <= min(LONGEST_TAIL_TOKENS, self._most)
            tokens, first = (pair.read[: pair.start] if apart else pair.read), pair.start - 1
            # Alone, a pair computes the logits that it needs and no others, since their number shows in their bits.
            stem = found.setdefault((tokens.tobytes(), first if self._alone else 0), _Stem(tokens, first))
            stem.first = min(stem.first, first)
            stem.pairs.append(index)
        return list(found.values())

    def _rows(self, stem: _Stem) -> list[_Tail]:
        """The distinct texts behind a stem; a text that another one begins with needs no row of its own."""
        length = len(stem.tokens)
        tails: dict[bytes, _Tail] = {}
        for index in stem.pairs:
            tokens = self._pairs[index].read[length:]
            if len(tokens):
                tails.setdefault(tokens.astype(">i4").tobytes(), _Tail(tokens)).pairs.append(index)
        found: list[_Tail] = []
        for key in sorted(tails, reverse=True):
            row = tails[key]
            if found and not self._alone and np.array_equal(found[-1].tokens[: len(row.tokens)], row.tokens):
                found[-1].pairs += row.pairs
            else:
                found.append(row)
        return sorted(found, key=lambda row: -len(row.tokens))

    # -- one stem -----------------------------------------------------------------------------------------------------

    def _stem(self, stem: _Stem, turn: TextInTurn) -> None:
        longest = max(len(self._pairs[index].read) for index in stem.pairs)
        ids = torch.from_numpy(stem.tokens).long().to(self._device)
        why, found = self._server.look(longest)
        why = why_uncached(self._binding.model, Prompts.of(ids[None], {}), None, {}) or why
        if not why:
            try:
                self._served(stem, turn, ids, found)
                return
            except ChangedPrefillError as error:
                why = str(error)
        self._reading.forget()
        for index in stem.pairs:
            self._found[index] = self._uncached(self._pairs[index], why)

    def _served(self, stem: _Stem, turn: TextInTurn, ids: torch.Tensor, found: Identity) -> None:
        """Scores the pairs of a stem; once more where the model changes meanwhile."""
        shared = 0 if self._alone else turn.shared
        if str(found) != self._scored_by:
            shared, self._scored_by = 0, str(found)
        most = self._reading.begin(stem.tokens, turn.first, shared)
        try:
            self._scored(stem, turn, ids, most, found)
        except ModelChangedError:
            found = identity(self._binding.model)
            most, self._scored_by = self._reading.begin(stem.tokens, turn.first, 0), str(found)
            self._scored(stem, turn, ids, most, found)

    def _scored(self, stem: _Stem, turn: TextInTurn, ids: torch.Tensor, most: int | None, found: Identity) -> None:
        server, live = self._server, self._server.live_cache()
        live.found = found
        policy = limited(server.policy, self._binding.config.max_checkpoints)
        foresight = Foresight(policy, turn.keep, turn.place, self._holding.staying)
        self._holding.begin(foresight, turn.place)
        base = self._binding.segmenting
        segmenting = Foreseen(base.rule, base, tuple(sorted(turn.keep)), turn.first, self._most, rounds=base.rounds)
        row, last = Row(ids, {"use_cache": True}, reader=self._reading), 1 if most is None else len(ids) - most
        served = serve_alone(server.means, live, Asked(row, way=Way(foresight, segmenting, last, self._holding)))
        started = time.perf_counter()
        ends: dict[int, tuple[int | tuple[int, int, int], ...]] = {}
        scores = {}
        for index in stem.pairs:
            pair = self._pairs[index]
            scores[index] = self._reading.of(pair.start, int(pair.tokens[len(stem.tokens)]))
        computed = dict.fromkeys(stem.pairs, 0)
        for tail, rows, end in self._read(stem, live, ids):
            computed[tail.pairs[0]] = len(tail.tokens)
            for index in tail.pairs:
                scores[index] = scores[index].then(*rows.scored(self._pairs[index].tokens[len(stem.tokens) + 1 :]))
                ends[index] = (end,)
        if not unchanged(self._binding.model, found):
            raise ModelChangedError("the model changed while the continuations were computed")
        for index in stem.pairs:
            self._found[index] = scores[index].total
        served.seconds["prefill_seconds"] += time.perf_counter() - started
        self._count(stem, served, computed, ends)

    def _count(
        self,
        stem: _Stem,
        served: Served,
        computed: dict[int, int],
        ends: dict[int, tuple[int | tuple[int, int, int], ...]],
    ) -> None:
        """Counts every pair as a request: the first one with what the stem cost, the others as resumed behind it."""
        info, rows = served.info, []
        assert info is not None
        for index in stem.pairs:
            tokens = len(self._pairs[index].read)
            first = index == stem.pairs[0]
            done = computed[index] + (info.computed_tokens if first else 0)
            counted = replace(
                info,
                prompt_tokens=tokens,
                overlap_tokens=info.overlap_tokens if first else tokens - done,
                resumed_tokens=tokens - done,
                computed_tokens=done,
                captured=info.captured if first else (),
                segments=info.segments + ends.get(index, ()),
                reason=info.reason if first else Reason(Cause.RESUMED),
            )
            rows.append(Served(None, counted, served.seconds if first else {}))
        self._server.count(rows, range(len(rows)))

    # -- behind it ----------------------------------------------------------------------------------------------------

    def _read(
        self, stem: _Stem, live: LiveCache, ids: torch.Tensor
    ) -> Iterator[tuple[_Tail, LogitRows, int | tuple[int, int, int]]]:
        """Runs what is behind a stem: each row with the logits of its tokens, and the end of its segment."""
        waiting, size = self._rows(stem), self._batch_size
        while waiting:
            width = max(MIN_SUFFIX_TOKENS, len(waiting[0].tokens))
            chunk = waiting[: max(1, min(size, self._most // width))]
            try:
                logits = self._forward(chunk, width, live, ids)
            except Exception as error:
                if not out_of_memory(error) or len(chunk) == 1:
                    raise
                said = str(error).partition("\n")[0]
                logits = None
            if logits is None:  # behind the block, where the traceback no longer holds what was allocated
                self._server.store.give_back()
                logger.warning(f"{len(chunk)} continuations ran out of memory together ({said}): half as many now.")
                size = len(chunk) // 2
                continue
            for row, found in zip(chunk, logits, strict=True):
                end = len(ids) + len(row.tokens)
                together = len(chunk) > 1 or width > len(row.tokens)
                yield row, LogitRows(found[: len(row.tokens)]), (len(ids), end, len(chunk)) if together else end
            waiting = waiting[len(chunk) :]

    def _forward(self, chunk: list[_Tail], width: int, live: LiveCache, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(rows, width, vocabulary)` of rows behind the text of a live cache, which stays as it is."""
        block = np.stack([np.pad(row.tokens, (0, width - len(row.tokens)), mode="edge") for row in chunk])
        tails = torch.from_numpy(block).long().to(self._device)
        copy = self._server.live_cache()
        states.stack(copy, [live] * len(chunk), len(ids))
        copy.length = len(ids)
        rows = torch.cat([ids.expand(len(chunk), -1), tails], dim=1)
        together = Row(rows, {"use_cache": True, **self._binding.logits_to_keep(width)})
        logits: torch.Tensor = prefill.segment(self._binding, copy, together, len(together)).logits[:, -width:]
        return logits

    # -- without the cache --------------------------------------------------------------------------------------------

    def _uncached(self, pair: Pair, why: str) -> tuple[float, bool]:
        """One pair as if there were no handle."""
        model, behind = self._binding.model, len(pair.tokens) - pair.start
        self._server.uncached((len(pair.read),), why)
        rope.as_loaded(model)
        ids = torch.from_numpy(pair.read).long().to(self._device)[None]
        logits = model(input_ids=ids, use_cache=False, **self._binding.logits_to_keep(behind)).logits[0, -behind:]
        values, likeliest = LogitRows(logits).scored(pair.tokens[pair.start :])
        return float(values.sum()), bool(likeliest.all())
