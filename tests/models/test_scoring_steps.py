"""A call of scores, step by step and without a model: what is run, read, counted, tried again and left uncached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse_cache.models import scoring
from hf_sparse_cache.models.pairs import Pair
from hf_sparse_cache.models.scoring import Scoring
from hf_sparse_cache.models.sitting import Served
from hf_sparse_cache.models.watch import ChangedPrefillError, ModelChangedError
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.foresight import Foreseen
from hf_sparse_cache.planning.policies import Junction
from hf_sparse_cache.planning.policy import Limited
from hf_sparse_cache.planning.segments import Replayable
from hf_sparse_cache.stats import Cause, Reason, RequestInfo


MEMORY = torch.OutOfMemoryError("CUDA out of memory\nmore")
VOCABULARY = 11


class Model:
    """Any logits of a token and of its position: no two are alike."""

    training, device = False, torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def get_input_embeddings(self) -> Any:
        return None

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        self.asked.append((input_ids.tolist(), kwargs))
        return SimpleNamespace(logits=logits_of(input_ids))


def logits_of(ids: torch.Tensor) -> torch.Tensor:
    places = torch.arange(ids.shape[1])[None, :, None]
    return torch.sin((ids[..., None] + 1) * (torch.arange(VOCABULARY) + 1.5) + places)


def pair(context: list[int], continuation: list[int]) -> Pair:
    tokens = np.asarray([*context, *continuation], dtype=np.int32)
    return Pair(tokens, len(context))


class Serves:
    """A server that notes what it is asked."""

    def __init__(self, exactness: str = "replayable", max_checkpoints: int | None = None) -> None:
        self.policy, self.means = Junction(), "means"
        self.store = SimpleNamespace(given_back=0, give_back=self.give_back)
        self.binding = SimpleNamespace(
            model=Model(),
            config=SimpleNamespace(exactness=exactness, max_checkpoints=max_checkpoints),
            text_config=SimpleNamespace(vocab_size=VOCABULARY),
            chunk=8,
            segmenting=Replayable(CutRule(16), step=16, rounds=True),
            logits_to_keep=lambda tokens: {"logits_to_keep": tokens},
        )
        self.counted: list[Any] = []
        self.without: list[Any] = []
        self.looked: list[int] = []
        self.why = ""

    def give_back(self) -> int:
        self.store.given_back += 1
        return 0

    def live_cache(self) -> Any:
        return SimpleNamespace(length=0, found=None)

    def look(self, tokens: int) -> tuple[str, str]:
        self.looked.append(tokens)
        return self.why, "name"

    def count(self, rows: list[Served], order: Any) -> None:
        self.counted.append((rows, list(order)))

    def uncached(self, tokens: Any, why: str) -> None:
        self.without.append((tokens, why))


def call(pairs: list[Pair], batch_size: int = 8, **server: Any) -> Any:
    made = Scoring(Serves(**server), pairs, batch_size)  # type: ignore[arg-type]
    made._holding = SimpleNamespace(
        closed=0, begun=[], staying="staying", close=lambda: None, begin=lambda *args: made._holding.begun.append(args)
    )
    return made


def stem_of(one: Any) -> Any:
    (stem,) = one._stems()
    return stem


# -- the whole call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "alone"), [("replayable", False), ("bitwise", True)])
def test_in_bitwise_mode_each_pair_runs_alone(mode: str, alone: bool) -> None:
    one = call([pair([1, 2], [3])], batch_size=5, exactness=mode)
    assert one._alone is alone and one._batch_size == (1 if alone else 5) and one._device.type == "cpu"
    assert one._most == scoring.most_rows(VOCABULARY, 8) and one._found == [None] and one._scored_by == ""


def test_stems_are_run_in_turn_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    given: list[Any] = []

    @contextmanager
    def held(model: Any) -> Iterator[None]:
        done.append("held")
        yield
        done.append("let go")

    monkeypatch.setattr(scoring.mamba1, "held", held)

    def turns(texts: list[Any], firsts: list[int], share: bool) -> list[Any]:
        given.append(([text.tolist() for text in texts], firsts, share))
        return [SimpleNamespace(index=1), SimpleNamespace(index=0)]

    monkeypatch.setattr(scoring, "turns", turns)
    one = call([pair([1, 2, 3], [4]), pair([5, 6], [7]), pair([1, 2, 3], [8, 9])])
    one._done = done.append
    one._holding.close = lambda: done.append("closed")

    def stem(self: Scoring, stem: Any, turn: Any) -> None:
        done.append((stem.tokens.tolist(), torch.is_grad_enabled()))
        for index in stem.pairs:
            self._found[index] = (float(index), True)

    monkeypatch.setattr(Scoring, "_stem", stem)
    with torch.enable_grad():
        assert one.run() == [(0.0, True), (1.0, True), (2.0, True)]
    assert done == ["held", ([5, 6], False), 1, ([1, 2, 3], False), 2, "let go", "closed"]
    assert given == [([[1, 2, 3], [5, 6]], [2, 1], True)]

    def fails(*_: Any) -> None:
        raise KeyError

    monkeypatch.setattr(Scoring, "_stem", fails)
    done.clear()
    with pytest.raises(KeyError):
        one.run()
    assert done[-1] == "closed"


# -- one stem ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["served", "look", "training", "changed"])
def test_a_stem_that_cannot_be_served_is_scored_pair_by_pair(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = call([pair([1, 2, 3], [4, 5, 6]), pair([1, 2, 3], [7])])
    served: list[Any] = []

    def serve(self: Scoring, stem: Any, turn: Any, ids: torch.Tensor, found: Any) -> None:
        served.append((ids.tolist(), ids.dtype, turn, found))
        if how == "changed":
            raise ChangedPrefillError("a hook takes some out")

    monkeypatch.setattr(Scoring, "_served", serve)
    monkeypatch.setattr(Scoring, "_uncached", lambda self, pair, why: (len(pair.tokens), why))
    forgot: list[int] = []
    monkeypatch.setattr(one._reading, "forget", lambda: forgot.append(1))
    one._server.why = "it is unsound" if how == "look" else ""
    one._binding.model.training = how == "training"
    one._stem(stem_of(one), "turn")
    assert one._server.looked == [5]  # the longest that the model reads
    assert served == ([([1, 2, 3], torch.int64, "turn", "name")] if how in ("served", "changed") else [])
    why = {"look": "it is unsound", "training": "the model is in training mode", "changed": "a hook takes some out"}
    assert one._found == ([None, None] if how == "served" else [(6, why[how]), (4, why[how])])
    assert len(forgot) == (how != "served")


def test_a_pair_without_the_cache_is_scored_by_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(scoring.rope, "as_loaded", loaded.append)
    one = call([])
    model = one._binding.model
    for continuation in ([4], [4, 5, 6]):
        asked = pair([1, 2, 3], continuation)
        value, greedy = one._uncached(asked, "why")
        ids = torch.tensor([[1, 2, 3, *continuation[:-1]]])
        rows = logits_of(ids)[0, -len(continuation) :].log_softmax(-1)
        assert value == pytest.approx(float(rows[range(len(continuation)), continuation].sum()), rel=1e-5)
        assert greedy is bool((rows.argmax(-1) == torch.tensor(continuation)).all())
        assert model.asked.pop() == (ids.tolist(), {"use_cache": False, "logits_to_keep": len(continuation)})
        assert one._server.without.pop() == ((2 + len(continuation),), "why") and loaded.pop() is model
    best = int(logits_of(torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    assert one._uncached(pair([1, 2, 3], [best]), "why")[1] is True


@pytest.mark.parametrize(
    ("mode", "before", "shares"),
    [("replayable", "name", 2), ("replayable", "other", 0), ("replayable", "", 0), ("bitwise", "name", 0)],
)
@pytest.mark.parametrize("changes", [0, 1, 2])
def test_what_was_read_by_another_model_is_read_again(
    mode: str, before: str, shares: int, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = call([pair([1, 2, 3], [4])], exactness=mode)
    begun: list[Any] = []
    tried: list[Any] = []
    one._scored_by = before
    monkeypatch.setattr(
        one._reading,
        "begin",
        lambda tokens, first, shared: begun.append((tokens.tolist(), first, shared)) or len(begun),
    )
    monkeypatch.setattr(scoring, "identity", lambda model: "name of after")

    def scored(self: Scoring, stem: Any, turn: Any, ids: Any, most: Any, found: Any) -> None:
        tried.append((ids, most, found, self._scored_by))
        if len(tried) <= changes:
            raise ModelChangedError("changed")

    monkeypatch.setattr(Scoring, "_scored", scored)
    turn: Any = SimpleNamespace(first=2, shared=2)
    if changes == 2:
        with pytest.raises(ModelChangedError):
            one._served(stem_of(one), turn, "ids", "name")
    else:
        one._served(stem_of(one), turn, "ids", "name")
    assert begun == [([1, 2, 3], 2, shares), ([1, 2, 3], 2, 0)][: 1 + (changes > 0)]
    assert tried == [("ids", 1, "name", "name"), ("ids", 2, "name of after", "name of after")][: 1 + (changes > 0)]


@pytest.mark.parametrize(("most", "tail"), [(None, 1), (1, 2)])
def test_a_stem_is_served_with_what_is_known_of_the_pairs_to_come(
    most: int | None, tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair([1, 2, 3], [4]), pair([1, 2, 3], [4, 5]), pair([1, 2, 3], [4, 5, 6])]
    one = call(pairs, max_checkpoints=3)
    served: list[Any] = []
    alike = [True]
    info = RequestInfo(3, computed_tokens=3, reason=Reason(Cause.NOTHING_STORED), segments=(3,))
    monkeypatch.setattr(
        scoring, "serve_alone", lambda *args: served.append(args) or Served("o", info, {"prefill_seconds": 1.0})
    )
    monkeypatch.setattr(scoring, "unchanged", lambda model, found: alike[0] and found == "name")
    clock = iter((10.0, 14.0, 10.0, 14.0))
    monkeypatch.setattr(scoring, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    ids, everything = torch.tensor([1, 2, 3]), logits_of(torch.tensor([[1, 2, 3, 4, 5]]))
    one._reading.begin(stem_of(one).tokens, 2, 0)
    one._reading.read(0, 3, everything[:, :3])
    rows = scoring.LogitRows(everything[0, 3:5])
    stem = stem_of(one)
    tails = [scoring._Tail(np.asarray([4, 5], dtype=np.int32), [2, 1])]
    monkeypatch.setattr(Scoring, "_read", lambda self, stem, live, ids: iter([(tails[0], rows, (3, 5, 2))]))
    turn: Any = SimpleNamespace(keep={2: 9, 1: 8}, place=7, first=2)
    one._scored(stem, turn, ids, most, "name")
    ((means, live, asked),) = served
    assert (
        means == "means" and live.found == "name" and asked.row.ids is ids and asked.row.kwargs == {"use_cache": True}
    )
    way, base = asked.way, one._binding.segmenting
    assert asked.row.reader is one._reading and way.tail == tail and way.holding is one._holding
    assert isinstance(way.policy._policy, Limited) and way.policy._keep == {1: 8, 2: 9}
    assert way.segmenting.rounds and way.segmenting.rule.grid == 16 and one._holding.begun == [(way.policy, 7)]
    assert way.segmenting == Foreseen(base.rule, base, (1, 2), 2, one._most, rounds=True)
    table = everything[0].double().log_softmax(-1)
    for index, continuation in enumerate(([4], [4, 5], [4, 5, 6])):
        expected = float(table[range(2, 2 + len(continuation)), continuation].sum())
        assert one._found[index][0] == pytest.approx(expected, abs=1e-5)
    ((counted, order),) = one._server.counted
    assert order == [0, 1, 2] and counted[0].seconds == {"prefill_seconds": 5.0} and counted[1].seconds == {}
    assert [row.info.computed_tokens for row in counted] == [3, 0, 2]
    assert [row.info.segments for row in counted] == [(3,), (3, (3, 5, 2)), (3, (3, 5, 2))]
    alike[0] = False
    one._found = [None] * 3
    with pytest.raises(ModelChangedError, match="changed while the continuations were computed"):
        one._scored(stem, turn, ids, most, "name")
    assert one._found == [None] * 3 and len(one._server.counted) == 1


def test_every_pair_is_counted_and_the_first_with_what_the_stem_cost() -> None:
    pairs = [pair([1, 2, 3], [4, 5]), pair([1, 2, 3], [6]), pair([1, 2, 3], [7, 8, 9])]
    one = call(pairs)
    stem = stem_of(one)
    info = RequestInfo(
        3, overlap_tokens=2, resumed_tokens=1, computed_tokens=2, captured=(3,), segments=(1, 3),
        reason=Reason(Cause.DIVERGES, token=2),
    )  # fmt: skip
    one._count(stem, Served("o", info, {"plan_seconds": 3.0}), {0: 1, 1: 0, 2: 2}, {0: ((3, 4, 2),), 2: ((3, 5, 2),)})
    ((rows, order),) = one._server.counted
    first, second, third = (row.info for row in rows)
    assert order == [0, 1, 2] and [row.seconds for row in rows] == [{"plan_seconds": 3.0}, {}, {}]
    assert all(row.output is None for row in rows)
    assert [(each.prompt_tokens, each.resumed_tokens, each.computed_tokens) for each in (first, second, third)] == [
        (4, 1, 3), (3, 3, 0), (5, 3, 2),
    ]  # fmt: skip
    assert [each.overlap_tokens for each in (first, second, third)] == [2, 3, 3]
    assert [each.captured for each in (first, second, third)] == [(3,), (), ()]
    assert [each.segments for each in (first, second, third)] == [(1, 3, (3, 4, 2)), (1, 3), (1, 3, (3, 5, 2))]
    assert [each.reason.cause for each in (first, second, third)] == [Cause.DIVERGES, Cause.RESUMED, Cause.RESUMED]


# -- behind it --------------------------------------------------------------------------------------------------------


def read(one: Any, forwards: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(Scoring, "_forward", forwards)
    ids = torch.tensor([1, 2, 3])
    return [
        (tail.tokens.tolist(), rows._logits.shape[0], rows._logits.flatten().tolist(), end)
        for tail, rows, end in one._read(stem_of(one), "live", ids)
    ]


PAIRS = [pair([1, 2, 3], [*rest, 9]) for rest in ([4, 4, 4, 4], [5, 5, 5], [6, 6], [7])]


def forward(self: Scoring, chunk: list[Any], width: int, live: Any, ids: Any) -> torch.Tensor:
    """The first token of each row, and its place."""
    FORWARDS.append((len(chunk), width))
    assert live == "live" and ids.tolist() == [1, 2, 3]
    return torch.stack([row.tokens[0] * 10 + torch.arange(width).float() for row in chunk])[..., None]


FORWARDS: list[Any] = []


@pytest.mark.parametrize(
    ("size", "most", "groups"),
    [
        (8, 64, [(4, 4)]),
        (3, 64, [(3, 4), (1, 2)]),
        (8, 8, [(2, 4), (2, 2)]),
        (8, 7, [(1, 4), (2, 3), (1, 2)]),
        (8, 1, [(1, 4), (1, 3), (1, 2), (1, 2)]),
    ],
)
def test_rows_behind_a_stem_run_in_groups_that_fit(
    size: int, most: int, groups: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    FORWARDS.clear()
    one = call(PAIRS, size)
    stem = stem_of(one)
    one._most = most
    monkeypatch.setattr(Scoring, "_stems", lambda self: [stem])
    found = read(one, forward, monkeypatch)
    assert groups == FORWARDS
    assert [tokens for tokens, *_ in found] == [[4, 4, 4, 4], [5, 5, 5], [6, 6], [7]]
    place = iter([(rows, width) for rows, width in groups for _ in range(rows)])
    for tokens, count, logits, end in found:
        rows, width = next(place)
        assert count == len(tokens) and logits == [10.0 * tokens[0] + at for at in range(len(tokens))]
        behind = 3 + len(tokens)
        assert end == ((3, behind, rows) if rows > 1 or width > len(tokens) else behind)


def test_a_group_that_runs_out_of_memory_is_halved_and_stays_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def fails(self: Scoring, chunk: list[Any], width: int, *_: Any) -> torch.Tensor:
        sizes.append(len(chunk))
        if len(chunk) > 2:
            raise MEMORY
        return forward(self, chunk, width, *_)

    one = call(PAIRS)
    assert len(read(one, fails, monkeypatch)) == 4 and sizes == [4, 2, 2] and one._server.store.given_back == 1
    assert "4 continuations ran out of memory together (CUDA out of memory): half as many now." in caplog.text

    def never(self: Scoring, chunk: list[Any], *_: Any) -> torch.Tensor:
        sizes.append(len(chunk))
        raise MEMORY

    sizes.clear()
    with pytest.raises(torch.OutOfMemoryError):
        read(call(PAIRS), never, monkeypatch)
    assert sizes == [4, 2, 1]


def test_rows_are_run_behind_copies_of_the_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    one, stacked, ran = call(PAIRS), [], []
    monkeypatch.setattr(scoring.states, "stack", lambda copy, lives, tokens: stacked.append((copy, lives, tokens)))

    def segment(binding: Any, live: Any, row: Any, end: int) -> Any:
        ran.append((binding, live, live.length, row.ids.tolist(), row.kwargs, end))
        return SimpleNamespace(logits=torch.arange(2.0 * end).reshape(2, end, 1))

    monkeypatch.setattr(scoring.prefill, "segment", segment)
    chunk = [scoring._Tail(np.asarray(tokens, dtype=np.int32)) for tokens in ([4, 5, 6], [7])]
    logits = one._forward(chunk, 3, "live", torch.tensor([1, 2]))
    ((copy, lives, tokens),) = stacked
    assert lives == ["live", "live"] and tokens == 2
    ((binding, live, length, ids, kwargs, end),) = ran
    assert binding is one._binding and live is copy and length == 2 and end == 5
    assert ids == [[1, 2, 4, 5, 6], [1, 2, 7, 7, 7]] and kwargs == {"use_cache": True, "logits_to_keep": 3}
    assert logits[:, :, 0].tolist() == [[2.0, 3.0, 4.0], [7.0, 8.0, 9.0]]
