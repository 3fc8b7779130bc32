"""Log-probabilities read segment by segment: those of all logits at once, in whatever parts they were read before."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference_store import common

from hf_sparse_cache.models import scores
from hf_sparse_cache.models.scores import LogitRows, Reading, Score, most_rows


VOCABULARY = 7


def logits_of(tokens: list[int]) -> torch.Tensor:
    """`(1, length, vocabulary)`: of each token by all tokens up to it, so that no two prefixes have the same."""
    rows = []
    for end in range(1, len(tokens) + 1):
        generator = torch.Generator().manual_seed(hash(tuple(tokens[:end])) % 2**31)
        rows.append(torch.randn(VOCABULARY, generator=generator))
    return torch.stack(rows)[None]


def plain(tokens: list[int], start: int, target: int) -> tuple[float, bool]:
    """Of the tokens from `start` on and of a further one: the sum, and whether each is the likeliest."""
    found = logits_of(tokens)[0].log_softmax(-1)
    targets = [*tokens[start:], target]
    rows = found[start - 1 :]
    values = [float(row[token]) for row, token in zip(rows, targets, strict=True)]
    return math.fsum(values), all(int(row.argmax()) == token for row, token in zip(rows, targets, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_scored_as_softmax_says(dtype: torch.dtype) -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, best = LogitRows(logits), logits.argmax(-1)
    wide = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
    for count in (1, 3, 5):
        targets = [int(best[0]), 2, int(best[2]), 4, 0][:count]
        values, likeliest = rows.scored(np.asarray(targets, dtype=np.int32))
        assert values.dtype == np.float64 and values.shape == likeliest.shape == (count,)
        assert values == pytest.approx([float(wide[at, token]) for at, token in enumerate(targets)], rel=1e-6)
        assert likeliest.tolist() == [int(best[at]) == token for at, token in enumerate(targets)]


def test_a_score_is_the_sum_and_greedy_where_every_token_is() -> None:
    one = Score(np.asarray([-1.0, -2.0]), np.asarray([True, True]))
    assert one.total == (-3.0, True)
    assert one.then(np.asarray([-0.5]), np.asarray([False])).total == (-3.5, False)
    assert one.then(np.asarray([-0.5]), np.asarray([True])).total == (-3.5, True) and one.total == (-3.0, True)


def drawn_texts(draw: random.Random) -> list[list[int]]:
    """Texts that begin as the one before did, for some tokens."""
    found: list[list[int]] = []
    for _ in range(4):
        before = found[-1] if found else []
        kept = draw.randrange(len(before) + 1)
        found.append(before[:kept] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(2, 9))])
    return found


def read_on(reading: Reading, draw: random.Random, tokens: list[int], most: int | None) -> None:
    """Read a text from a position that `begin` allows, in parts, with more logits than are wanted now and then."""
    start = draw.randrange((len(tokens) - 1 if most is None else most) + 1)
    all_logits = logits_of(tokens)
    while start < len(tokens):
        end = draw.randrange(start + 1, len(tokens) + 1)
        wanted = reading.wanted(start, end)
        assert 1 <= wanted <= end - start
        given = draw.randrange(wanted, end - start + 1)
        reading.read(start, end, all_logits[:, end - given : end])
        start = end


def test_what_is_read_in_any_parts_is_what_all_logits_say() -> None:
    draw = random.Random(3)
    reused = 0
    for _ in range(60):
        reading, before = Reading(), [-1]
        for tokens in drawn_texts(draw):
            shared = common(tuple(before), tuple(tokens))
            first = draw.randrange(len(tokens))
            most = reading.begin(np.asarray(tokens, dtype=np.int32), first, shared)
            assert reading.last is None
            assert most is None or first <= most < len(tokens) - 1
            reused += most is not None and most > first
            read_on(reading, draw, tokens, most)
            start = draw.randrange(first + 1, len(tokens) + 1)
            target = draw.randrange(VOCABULARY)
            value, greedy = reading.of(start, target).total
            expected = plain(tokens, start, target)
            assert value == pytest.approx(expected[0], abs=1e-5) and greedy == expected[1]
            before = tokens
    assert reused > 5


def test_how_deep_a_text_may_be_resumed() -> None:
    """From where its first unknown logits are; from anywhere where only those behind its last token are wanted."""
    reading, tokens = Reading(), [1, 2, 3, 4, 5, 6]
    text = np.asarray(tokens, dtype=np.int32)
    assert reading.begin(text, 2, 0) == 2
    assert reading.begin(text, 4, 0) == 4
    assert reading.begin(text, 5, 0) is None
    assert reading.begin(text, 2, 0) == 2
    assert [reading.wanted(0, end) for end in (1, 2, 3, 6)] == [1, 1, 1, 4] and reading.wanted(4, 6) == 2
    reading.read(0, 6, logits_of(tokens))
    assert reading.begin(text, 2, 5) == 4  # what follows the last shared token is another
    reading.read(4, 6, logits_of(tokens)[:, 4:])
    assert reading.begin(text, 1, 5) == 1  # what was never read is not known
    reading.read(1, 6, logits_of(tokens)[:, 1:])
    reading.forget()
    assert reading.begin(text, 1, 6) == 1


def test_logits_that_nobody_wants_are_not_read() -> None:
    reading, tokens = Reading(), [1, 2, 3, 4]
    reading.begin(np.asarray(tokens, dtype=np.int32), 3, 0)
    for end in (2, 3):
        assert reading.wanted(0, end) == 1
        reading.read(0, end, torch.full((1, 1, VOCABULARY), torch.nan))
        assert reading.last is None and reading.wanted(2, 4) == 1
    reading.read(3, 4, logits_of(tokens)[:, 3:])
    assert reading.of(4, 5).total[0] == pytest.approx(plain(tokens, 4, 5)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("most", "vocabulary", "chunk", "rows"),
    [
        (4 * 100 * 1000, 100, 8, 1000),
        (4 * 100 * 1000 + 4 * 7 * 100, 100, 8, 1000),  # whole chunks
        (4 * 100 * 1000 - 1, 100, 8, 992),
        (0, 100, 8, 64),  # never none
        (0, 100, 256, 256),
        (0, 100, 24, 48),
    ],
)
def test_how_many_rows_of_logits_are_in_memory_together(
    most: int, vocabulary: int, chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "MOST_LOGIT_BYTES", most)
    assert most_rows(vocabulary, chunk) == rows


# -- what is behind a stem --------------------------------------------------------------------------------------------


def scoring(texts: list[tuple[list[int], int]], alone: bool, most: int = 64) -> Any:
    """A call for pairs of these tokens and starts, of which only what it shares is asked."""
    from hf_sparse_cache.models.scoring import Scoring

    made = Scoring.__new__(Scoring)
    pairs = [
        SimpleNamespace(tokens=np.asarray(tokens), start=start, read=np.asarray(tokens[:-1], dtype=np.int32))
        for tokens, start in texts
    ]
    made._pairs, made._alone, made._most = pairs, alone, most
    return made


def drawn_pairs(draw: random.Random) -> list[tuple[list[int], int]]:
    found = []
    contexts = [[draw.randrange(3) for _ in range(draw.randrange(1, 4))] for _ in range(2)]
    for _ in range(draw.randrange(1, 9)):
        context = draw.choice(contexts)
        found.append((context + [draw.randrange(3) for _ in range(draw.randrange(1, 6))], len(context)))
    return found


@pytest.mark.parametrize("alone", [False, True])
def test_stems_are_what_pairs_have_in_common(alone: bool) -> None:
    """As a plain sort of the pairs says it: by context, or by the whole where that is short or its rest is long."""
    draw = random.Random(4)
    for _ in range(150):
        texts, most = drawn_pairs(draw), draw.choice([2, 3, 64])
        expected: dict[tuple[Any, ...], list[int]] = {}
        for index, (tokens, start) in enumerate(texts):
            apart = start >= 2 and len(tokens) - 1 - start <= most
            stem = tuple(tokens[:start] if apart else tokens[:-1])
            expected.setdefault((stem, start if alone else None), []).append(index)
        found = scoring(texts, alone, most)._stems()
        assert [(tuple(stem.tokens.tolist()), stem.pairs) for stem in found] == [
            (stem, pairs) for (stem, _), pairs in expected.items()
        ]
        assert [stem.first for stem in found] == [min(texts[i][1] for i in pairs) - 1 for pairs in expected.values()]


@pytest.mark.parametrize("alone", [False, True])
def test_rows_behind_a_stem_serve_every_pair_once(alone: bool) -> None:
    draw = random.Random(5)
    joined = 0
    for _ in range(150):
        texts = [([1, 1, *tokens[start:]], 2) for tokens, start in drawn_pairs(draw)]
        call = scoring(texts, alone)
        stem = call._stems()[0]
        rows = call._rows(stem)
        rests = {index: texts[index][0][2:-1] for index in stem.pairs}
        assert sorted(index for row in rows for index in row.pairs) == [i for i in stem.pairs if rests[i]]
        assert [len(row.tokens) for row in rows] == sorted((len(row.tokens) for row in rows), reverse=True)
        for row in rows:
            whole = row.tokens.tolist()
            assert rests[row.pairs[0]] == whole  # the first of them needs all of it
            assert all(rests[index] == whole[: len(rests[index])] for index in row.pairs)
            assert not alone or all(rests[index] == whole for index in row.pairs)
        distinct = {tuple(rest) for rest in rests.values() if rest}
        longest = {one for one in distinct if not any(one != other and other[: len(one)] == one for other in distinct)}
        assert {tuple(row.tokens.tolist()) for row in rows} == (distinct if alone else longest)
        joined += len(distinct) - len(longest)
    assert joined > 20


def test_a_rest_that_is_longer_than_a_text_of_its_own_is_part_of_its_stem() -> None:
    from hf_sparse_cache.models.scoring import LONGEST_TAIL_TOKENS

    for rest, apart in ((LONGEST_TAIL_TOKENS, True), (LONGEST_TAIL_TOKENS + 1, False)):
        (stem,) = scoring([([1, 2, *[3] * rest, 4], 2)], False, most=10**6)._stems()
        assert len(stem.tokens) == (2 if apart else 2 + rest)
