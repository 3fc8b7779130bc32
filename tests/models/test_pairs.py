"""Pairs and texts as they are read: which tokens, from where on, in which windows, and how what is none is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse_cache.models import pairs as reading
from hf_sparse_cache.models.pairs import Pair, prefix_token, read_pairs, read_texts, windows


MOST = 300  # ids that the model has an embedding for


def binding(tokenizer: Any = None) -> Any:
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=MOST))
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def letters(text: str) -> dict[str, list[int]]:
    """A token each, but two letters "ab" are one token, wherever they stand."""
    return {"input_ids": [299 if part == "\0" else ord(part) for part in text.replace("ab", "\0")]}


def told(pair: Pair) -> tuple[list[int], int]:
    return pair.tokens.tolist(), pair.start


KINDS: list[Callable[[list[int]], Any]] = [
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda ids: torch.tensor([ids]),
    lambda ids: np.array(ids, dtype=np.uint8),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_kind_are_read(kind: Callable[[list[int]], Any]) -> None:
    given = [(kind([1, 2, 3]), kind([4, 5])), (kind([7]), kind([255])), [kind([0]), [MOST - 1]]]
    found = read_pairs(binding(), iter(given), None)
    assert [*map(told, found)] == [([1, 2, 3, 4, 5], 3), ([7, 255], 1), ([0, MOST - 1], 1)]
    assert all(pair.tokens.dtype == np.int32 for pair in found) and found[0].read.tolist() == [1, 2, 3, 4]
    texts = read_texts(binding(), [kind([1, 2]), kind([3])])
    assert [text.tolist() for text in texts] == [[1, 2], [3]] and all(text.dtype == np.int32 for text in texts)
    assert read_pairs(binding(), [], None) == [] == read_texts(binding(), [])


SEAMS = [
    ("xy", "z", "xy", "z"),
    ("xy ", "z", "xy", " z"),
    ("xy \n", "z", "xy", " \nz"),
    (" x", "y ", " x", "y "),
    ("xa", "bz", "xa", "z"),  # the last letter of the context and the first of the rest are one token
    ("xab", "abz", "xab", "abz"),
]


@pytest.mark.parametrize(("context", "continuation", "left", "right"), SEAMS)
def test_white_space_at_the_end_of_a_context_belongs_to_what_follows(
    context: str, continuation: str, left: str, right: str
) -> None:
    (pair,) = read_pairs(binding(letters), [(context, continuation)], None)
    whole = letters(context + continuation)["input_ids"]
    assert told(pair) == (
        letters(left)["input_ids"] + whole[len(letters(left)["input_ids"]) :],
        len(left.replace("ab", "c")),
    )
    assert len(pair.tokens) - pair.start == len(letters(right)["input_ids"])


def test_texts_are_tokenised_and_kept_in_order() -> None:
    found = read_texts(binding(letters), ["ab", [5], "xy"])
    assert [text.tolist() for text in found] == [[299], [5], [120, 121]] and found[0].dtype == np.int32


REFUSED: list[tuple[Any, str]] = [
    ("ab", r"^pairs is 'ab': give \(context, continuation\), both strings or both token ids, in a list\."),
    (b"ab", "^pairs is b'ab': "),
    ({"a": "b"}, "^pairs is {'a': 'b'}: "),
    (7, "^pairs is 7: "),
    (["ab"], r"^pairs\[0\] is 'ab', which is no pair"),
    ([b"ab"], r"^pairs\[0\] is b'ab', which is no pair"),
    ([{1: 2, 3: 4}], r"^pairs\[0\] is {1: 2, 3: 4}, which is no pair"),
    ([{1, 2}], r"^pairs\[0\] is {1, 2}, which is no pair"),
    ([7], r"^pairs\[0\] is 7, which is no pair"),
    ([("x", "b"), ("a",)], r"^pairs\[1\] is \('a',\), which is no pair"),
    ([("a", "b", "c")], r"^pairs\[0\] is \('a', 'b', 'c'\), which is no pair"),
    ([("a", [5])], r"^pairs\[0\] has a string and list"),
    ([((5,), "a")], r"^pairs\[0\] has a string and tuple"),
    ([("a", None)], r"^pairs\[0\] has a string and NoneType"),
    ([([5], {6})], r"^the continuation of pairs\[0\] is \{6\}: give a string or integer token ids of shape \(N,\)\."),
    ([({6}, [5])], r"^the context of pairs\[0\] is \{6\}: "),
    ([([5], [MOST])], r"^the continuation of pairs\[0\] contains 300"),
    ([([MOST], [5])], r"^the context of pairs\[0\] contains 300"),
    ([([], [5])], r"^pairs\[0\] has an empty context"),
    ([([5], [])], r"^pairs\[0\] has an empty continuation"),
    ([("", "a")], r"^pairs\[0\] has an empty context"),
    ([("a", "")], r"^pairs\[0\] has an empty continuation"),
    ([("", "")], r"^pairs\[0\] has an empty context"),
    ([("  ", "a")], r"^pairs\[0\] has an empty context"),
    ([("a", "b\ud800")], r"^pairs\[0\] is 'ab\\ud800'"),
    ([("a", "\u0fff")], r"^pairs\[0\] contains 4095"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda value: None)
def test_what_is_no_pair_is_named(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_pairs(binding(letters), given, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ab", "^texts is 'ab': give strings or token ids, in a list"),
        (None, "^texts is None: "),
        ([[5], []], r"^texts\[1\] is empty, which has nothing to score"),
        ([""], r"^texts\[0\] is empty"),
        ([{5}], r"^texts\[0\] is \{5\}: give a string"),
        ([[MOST]], r"^texts\[0\] contains 300"),
        (["\u0fff"], r"^texts\[0\] contains 4095"),
        (["\ud800"], r"^texts\[0\] is '\\ud800'.*give text in UTF-8"),
    ],
)
def test_what_is_no_text_is_named(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_texts(binding(letters), given)


def test_strings_need_a_tokenizer() -> None:
    for call in (lambda: read_texts(binding(), ["a"]), lambda: read_pairs(binding(), [("a", "b")], None)):
        with pytest.raises(
            ValueError, match=r"\[0\] is a string, but there is no tokenizer: SparsePrefixCache\(model, "
        ):
            call()


# -- the token before a text ------------------------------------------------------------------------------------------


def test_the_token_before_a_text_is_the_given_one_or_the_tokenizers() -> None:
    both = binding(SimpleNamespace(bos_token_id=0, eos_token_id=4))
    assert prefix_token(both, None) == 0 and prefix_token(both, 7) == 7 and prefix_token(both, 0) == 0
    assert prefix_token(binding(SimpleNamespace(bos_token_id=None, eos_token_id=4)), None) == 4
    assert prefix_token(binding(SimpleNamespace(eos_token_id=4)), None) == 4
    assert prefix_token(binding(), MOST - 1) == MOST - 1
    for given in (binding(), binding(SimpleNamespace(bos_token_id=None))):
        with pytest.raises(ValueError, match="^prefix is None, and no tokenizer has a token that begins texts"):
            prefix_token(given, None)
    for wrong in (-1, MOST, 1.5):
        with pytest.raises(ValueError, match=f"^prefix must be a whole number, from 0 to 299, got {wrong}"):
            prefix_token(binding(), wrong)  # type: ignore[arg-type]


# -- windows ----------------------------------------------------------------------------------------------------------


def test_windows_score_every_token_once_with_all_the_context_that_fits() -> None:
    for length in range(1, 14):
        for window in range(1, 16):
            text = np.arange(10, 10 + length, dtype=np.int32)
            whole, scored = [1, *text.tolist()], []
            found = windows(text, 1, window)
            for index, pair in enumerate(found):
                assert (
                    pair.tokens.dtype == np.int32 and 1 <= pair.start < len(pair.tokens) and len(pair.read) <= window
                )
                scored += pair.tokens[pair.start :].tolist()
                end = 1 + len(scored)
                assert whole[end - len(pair.tokens) : end] == pair.tokens.tolist()
                last, full = index == len(found) - 1, len(scored) == window * (index + 1)
                if full or index == 0:
                    assert pair.start == 1  # one token before it, and no more
                elif last:
                    assert len(pair.read) == min(window, end - 1)
            assert scored == text.tolist() and len(found) == -(-length // window)


def fitted(context: int, continuation: int, window: int | None) -> tuple[list[int], int]:
    ids = list(range(1, 1 + context + continuation))
    return told(*read_pairs(binding(), [(ids[:context], ids[context:])], window))


def test_a_context_loses_its_beginning_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(reading.logger, "warning_once", said.append)
    for context in range(1, 8):
        for continuation in range(1, 6):
            ids = list(range(1, 1 + context + continuation))
            assert fitted(context, continuation, None) == (ids, context)
            for window in range(1, 14):
                said.clear()
                if continuation > window:
                    with pytest.raises(
                        ValueError, match=rf"pairs\[0\] has a continuation of {continuation} tokens, more"
                    ):
                        fitted(context, continuation, window)
                    continue
                kept = ids[-(window + 1) :]
                assert fitted(context, continuation, window) == (kept, len(kept) - continuation)
                assert bool(said) == (len(kept) < len(ids))
                assert all(f"pairs[0] has {len(ids)} tokens" in words and f"of {window}:" in words for words in said)


def test_pairs_are_themselves_and_stay_as_they_are() -> None:
    one, other = (Pair(np.array([1, 2], np.int32), 1) for _ in range(2))
    assert one != other and len({one, other}) == 2
    with pytest.raises(AttributeError):
        one.start = 2  # type: ignore[misc]
