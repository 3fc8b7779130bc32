"""The steps of a prefill by themselves: what each forward is given, and what is made of what it gives."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.errors import out_of_memory
from hf_sparse_cache.models import answers, generation, handed, prefill, sitting
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.models.rounding import NotRoundableError
from hf_sparse_cache.models.rows import Filled
from hf_sparse_cache.models.watch import ChangedPrefillError, ModelChangedError
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.stats import Cause, Reason, RequestInfo


VOCABULARY = 5
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


class Forwards:
    """Stands in for the model's forward of a segment: logits that say of which token they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int, int]] = []
        monkeypatch.setattr(prefill, "segment", self.segment)

    def segment(self, binding: Any, live: Any, row: Row, end: int) -> Any:
        start, kept = live.length, row.kwargs.get("logits_to_keep", 1)
        kept = kept or end - start
        self.seen.append((start, end, kept))
        live.length = end
        told = torch.arange(end - kept, end).float()[None, :, None].expand(1, kept, VOCABULARY)
        return SimpleNamespace(logits=told)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    return Forwards(monkeypatch)


def lived(length: int = 0, **others: Any) -> Any:
    return SimpleNamespace(**{"length": length, "rounded": 0, "layers": [], "full_attention_layers": 0, **others})


BINDING: Any = SimpleNamespace(
    rounding=SimpleNamespace(name="int8", rounds=True), logits_to_keep=lambda count: {"logits_to_keep": count}
)


# -- logits of the last tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [1, 2, 5, 10])
@pytest.mark.parametrize("ends", [[10], [4, 10], [2, 4, 8, 10], [9, 10]])
def test_the_last_logits_are_gathered_over_segments(tail: int, ends: list[int], forwards: Forwards) -> None:
    row = Row(torch.arange(10), {"use_cache": True}, tail=tail)
    live, found = lived(), prefill.Tail(row)
    for end in ends:
        output = found.segment(BINDING, live, end)
    assert output.logits[0, :, 0].tolist() == list(range(10 - tail, 10))
    starts = [0, *ends[:-1]]
    assert forwards.seen == [(a, b, max(1, b - max(a, 10 - tail))) for a, b in zip(starts, ends, strict=True)]


def test_a_reader_is_asked_and_told_of_every_segment(forwards: Forwards) -> None:
    told: list[Any] = []

    class Reader:
        def wanted(self, start: int, end: int) -> int:
            told.append((start, end))
            return 3

        def read(self, start: int, end: int, logits: torch.Tensor) -> None:
            told.append((start, end, logits.shape[1]))

    row = Row(torch.arange(10), reader=Reader())
    output = prefill._read_segment(BINDING, lived(4), row, 9)
    assert told == [(4, 9), (4, 9, 3)] and forwards.seen == [(4, 9, 3)] and output.logits.shape[1] == 3
    assert prefill._read_segment(BINDING, lived(4), Row(torch.arange(10)), 9).logits.shape[1] == 1


def test_a_lineage_is_replayed_by_its_own_steps(forwards: Forwards, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[int] = []
    monkeypatch.setattr(prefill, "round_off_live", lambda binding, live, end: rounded.append(end))
    row = Row(torch.arange(20))
    output = prefill.replay(BINDING, lived(), row, Lineage.from_ends((4, (4, 4), (4, 7), 12, (12, 12), 20)))
    assert [(start, end) for start, end, _ in forwards.seen] == [(0, 4), (4, 5), (5, 6), (6, 7), (7, 12), (12, 20)]
    assert rounded == [4, 12] and output.logits[0, 0, 0] == 19


# -- rounding, resuming, joining --------------------------------------------------------------------------------------


def test_what_was_rounded_is_noted_and_what_cannot_be_is_no_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    live, given = lived(8, rounded=3), []
    monkeypatch.setattr(prefill.states, "round_off", lambda *args: given.append(args) or "kept")
    assert prefill.round_off_live(BINDING, live, 8) == "kept" and live.rounded == 8
    assert given == [(live, BINDING.rounding, 3, 8)]

    def refuses(*_: Any) -> None:
        raise NotRoundableError("infinite")

    monkeypatch.setattr(prefill.states, "round_off", refuses)
    with pytest.raises(ChangedPrefillError, match=r"infinite \(storage='int8'\)"):
        prefill.round_off_live(BINDING, live, 9)
    assert live.rounded == 8


def test_a_live_cache_is_brought_to_where_its_request_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Any] = []
    monkeypatch.setattr(prefill.states, "restore", lambda *args: restored.append(args))
    monkeypatch.setattr(prefill, "layer_tensors", lambda payload: f"tensors of {payload}")
    clock = iter((1.0, 3.5, 1.0, 3.5, 1.0, 3.5))
    monkeypatch.setattr(prefill.time, "perf_counter", lambda: next(clock))
    request: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(state="s"), kv_payloads=lambda: ["a", "b"], resumed_tokens=6
    )
    live = lived()
    assert prefill.resume_live(BINDING, live, request) == 2.5
    assert restored == [(live, "tensors of s", ["tensors of a", "tensors of b"], BINDING.rounding)]
    assert (live.length, live.rounded) == (6, 6)
    exact: Any = SimpleNamespace(rounding=SimpleNamespace(rounds=False))
    live = lived()
    prefill.resume_live(exact, live, request)
    assert (live.length, live.rounded) == (6, 0)
    request = SimpleNamespace(checkpoint=None, resumed_tokens=0)
    live = lived(rounded=2)
    prefill.resume_live(BINDING, live, request)
    assert (live.length, live.rounded, len(restored)) == (0, 2, 2)


def test_keys_and_values_of_a_span_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Any] = []
    monkeypatch.setattr(
        prefill.states, "capture_kv", lambda live, a, b, rounding: captured.append((a, b, rounding)) or (a, b)
    )
    assert prefill._kv_of(BINDING, lived()) is None
    kv = prefill._kv_of(BINDING, lived(full_attention_layers=1))
    assert kv is not None
    assert [kv(0, 4), kv(4, 8), kv(0, 4)] == [(0, 4), (4, 8), (0, 4)] and len(captured) == 2


class Stacked:
    """A live cache that notes how it is filled."""

    length = 0

    def reorder_cache(self, order: torch.Tensor) -> None:
        self.order = order.tolist()


@pytest.mark.parametrize(
    ("rows", "order", "stacked", "reordered"),
    [
        ([1, 1, 1], [0, 1, 2], [0, 1, 2], None),
        ([1, 1, 1], [2, 0, 0, 1], [2, 0, 0, 1], None),
        ([2, 1], [0, 1, 2], [0, 1], [0, 1, 2]),
        ([2, 1], [2, 2, 0], [0, 1], [2, 2, 0]),
    ],
)
def test_rows_are_joined_in_their_order(
    rows: list[int], order: list[int], stacked: list[int], reordered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(prefill.states, "stack", lambda live, lives, width: given.append((list(lives), width)))
    binding: Any = SimpleNamespace(output=lambda logits, live: (logits, live))
    numbers = iter(range(9))
    outputs = [
        SimpleNamespace(logits=torch.tensor([[[-1.0], [float(next(numbers))]] for _ in range(count)]))
        for count in rows
    ]
    live: Any = Stacked()
    filled: Any = list(enumerate(outputs))
    logits, same = prefill.join_rows(binding, live, filled, order, 17)
    assert same is live and live.length == 17 and given == [(stacked, 17)]
    assert logits[:, :, 0].tolist() == [[float(one)] for one in order]
    assert getattr(live, "order", None) == reordered


def test_a_compiled_call_is_gone_round() -> None:
    class Model:
        _compiled_call_impl: Any = None

        def _call_impl(self) -> str:
            return "own"

        def __call__(self) -> str:
            return "called"

    model = Model()
    assert prefill._uncompiled(model)() == "called"
    model._compiled_call_impl = object()
    assert prefill._uncompiled(model)() == "own"
    model.forward = SimpleNamespace(_torchdynamo_orig_callable=lambda: "original")  # type: ignore[attr-defined]
    assert prefill._uncompiled(model)() == "original"


def test_a_forward_that_names_positions_is_given_them() -> None:
    class Takes:
        def forward(self, input_ids: Any, position_ids: Any = None) -> None: ...

    class Not:
        def forward(self, input_ids: Any) -> None: ...

    assert prefill._takes_positions(Takes()) and not prefill._takes_positions(Not())
    patched = Not()
    patched.forward = Takes().forward  # type: ignore[method-assign]
    assert prefill._takes_positions(patched)
    hidden = Takes()
    hidden.forward = Not().forward  # type: ignore[method-assign]
    assert prefill._takes_positions(hidden)


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])], ids=["whole", "padded"])
def test_a_forward_is_asked_for_what_is_new_behind_what_is_there(
    takes: bool, mask: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Any] = {}
    checked: list[Any] = []

    class Model:
        def forward(self, input_ids: Any, position_ids: Any = None) -> None: ...

        def prepare_inputs_for_generation(self, ids: torch.Tensor, **given: Any) -> dict[str, Any]:
            said.update(given, ids=ids)
            return {"input_ids": ids[:, 2:], "logits_to_keep": 99}  # of its configuration

        def __call__(self, **given: Any) -> dict[str, Any]:
            return given

    if not takes:
        Model.forward = lambda self, input_ids: None  # type: ignore[method-assign,assignment,misc]
    for name in ("check_inputs", "check_filled"):
        monkeypatch.setattr(prefill.watch, name, lambda *args: checked.append(args))
    settled: list[Any] = []
    monkeypatch.setattr(prefill, "settle", settled.append)
    binding: Any = SimpleNamespace(model=Model(), cache_name="past")
    live, ids = lived(2, layers=["layer"]), torch.arange(10).reshape(2, 5)
    kept = {"logits_to_keep": 3} if takes else {}
    output = prefill._forward(binding, live, Row(ids, {"use_cache": True, **kept}, ()), mask)
    assert output["logits_to_keep"] == (3 if takes else 99) and output["return_dict"] is True
    assert output["input_ids"].tolist() == [[2, 3, 4], [7, 8, 9]]
    assert said["ids"] is ids and said["past"] is live and said["use_cache"] is True and said["attention_mask"] is mask
    assert (said["next_sequence_length"], said["is_first_iteration"]) == (3, True)
    if takes:
        first = [2, 3, 4] if mask is None else [0, 1, 2]
        assert said["position_ids"].tolist() == [first, [2, 3, 4]]
    else:
        assert "position_ids" not in said
    model, inputs, asked, seen = checked[0]
    assert model is binding.model and seen is live and asked["input_ids"].tolist() == [[2, 3, 4], [7, 8, 9]]
    assert inputs["input_ids"] is output["input_ids"] and checked[1:] == [(live, 5)]
    assert live.length == 5 and settled == [["layer"]]


@torch.no_grad()
def test_prompts_of_several_lengths_in_one_forward_are_what_each_is_alone(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, prove=False) as cache:
        binding, kwargs = cache.server.binding, {"use_cache": True, "logits_to_keep": 1}
        ids = [random_ids(length, seed=length)[0] for length in (9, 12, 4)]
        lives = [binding.live_cache() for _ in ids]
        together, output = prefill.gathered(binding, [Row(each, kwargs) for each in ids], lives)
        assert together.length == 12 and output.logits.shape[0] == 3
        for each, logits in zip(ids, output.logits, strict=True):
            alone = prefill.segment(binding, binding.live_cache(), Row(each, kwargs), len(each)).logits
            torch.testing.assert_close(logits[-1], alone[0, -1], rtol=0, atol=1e-4)
        prompts = [torch.cat([ids[0], random_ids(5, seed=seed)[0]]) for seed in (1, 2)]
        halves = [binding.live_cache() for _ in prompts]
        for half, prompt in zip(halves, prompts, strict=True):
            prefill.segment(binding, half, Row(prompt, kwargs), 9)
        together, output = prefill.gathered(binding, [Row(each, kwargs) for each in prompts], halves)
        assert together.length == 14 and [half.length for half in halves] == [9, 9]
        for prompt, logits in zip(prompts, output.logits, strict=True):
            alone = prefill.segment(binding, binding.live_cache(), Row(prompt, kwargs), 14).logits
            torch.testing.assert_close(logits[-1], alone[0, -1], rtol=0, atol=1e-4)


# -- one prompt while it is served ------------------------------------------------------------------------------------


def test_memory_that_runs_out_is_given_back_and_it_is_tried_once_more(caplog: pytest.LogCaptureFixture) -> None:
    assert out_of_memory(MEMORY)
    anew: list[Any] = []
    means: Any = SimpleNamespace(
        binding=SimpleNamespace(live_cache=lambda: "fresh"), store=SimpleNamespace(give_back=lambda: 2048)
    )
    live: Any = SimpleNamespace(start_anew=anew.append)
    tried: list[bool] = []

    def attempt(spacious: bool, fails: int, error: BaseException = MEMORY) -> str:
        tried.append(spacious)
        if len(tried) <= fails:
            raise error
        return "done"

    assert sitting.with_room(means, live, lambda spacious: attempt(spacious, 0)) == "done"
    assert tried == [True] and anew == []
    tried.clear()
    assert sitting.with_room(means, live, lambda spacious: attempt(spacious, 1)) == "done"
    assert tried == [True, False] and anew == ["fresh"]
    said = caplog.records[-1].getMessage()
    assert "(CUDA out of memory. Tried to allocate 2 GiB)" in said and "2.0 KiB of stored states" in said
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        sitting.with_room(means, live, lambda spacious: attempt(spacious, 2))
    assert tried == [True, False]
    tried.clear()
    with pytest.raises(KeyError):
        sitting.with_room(means, live, lambda spacious: attempt(spacious, 1, KeyError()))
    assert tried == [True] and len(anew) == 2


def test_what_another_prompt_hands_over_is_taken_from_the_same_model_alone() -> None:
    source = sitting.Asked(Row(torch.arange(4)), handovers={3: "at three"}, made_of="m")  # type: ignore[dict-item]
    assert sitting.Asked(Row(torch.arange(4))).given("m") is None
    for meeting, made_of, expected in ((3, "m", "at three"), (2, "m", None), (3, "other", None)):
        asked = sitting.Asked(Row(torch.arange(4)), source=source, meeting=meeting)
        assert asked.given(made_of) == expected


def test_the_tokens_of_a_prompt_are_those_that_were_copied_already() -> None:
    copied = sitting.Asked(Row(torch.arange(4), read=torch.tensor([7, 8])))
    assert copied.tokens.tolist() == [7, 8] and str(copied.tokens.dtype) == "int32"
    assert sitting.Asked(Row(torch.arange(3))).tokens.tolist() == [0, 1, 2]


def test_an_answer_goes_on_only_from_a_prompt_of_which_all_is_known() -> None:
    known: dict[str, Any] = {"info": RequestInfo(3, reason=Reason(Cause.RESUMED)), "read": "read", "made_of": "m"}
    live: Any = object()
    turn = sitting.Served("output", **known).turn(live)
    assert turn == answers.Turn(live, "read", "m", known["info"])  # type: ignore[arg-type]
    for name in known:
        assert sitting.Served("output", **{**known, name: None}).turn(live) is None


@pytest.mark.parametrize("changes", [0, 1, 2])
def test_a_model_that_changes_is_served_anew_once(changes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    anew: list[Any] = []
    tried: list[Any] = []

    def serve(*args: Any) -> str:
        tried.append(args)
        if len(tried) <= changes:
            raise ModelChangedError("changed")
        return "served"

    monkeypatch.setattr(sitting, "_serve_proved", serve)
    means: Any = SimpleNamespace(binding=SimpleNamespace(live_cache=lambda: "fresh"))
    live: Any = SimpleNamespace(start_anew=anew.append)
    asked: Any = "asked"
    if changes < 2:
        assert sitting.serve_alone(means, live, asked) == "served"
    else:
        with pytest.raises(ModelChangedError):
            sitting.serve_alone(means, live, asked)
    assert tried == [(means, live, asked)] * min(2, changes + 1) and anew == ["fresh"] * min(1, changes)


@pytest.mark.parametrize("unproved", [0, 1, 2, 3])
def test_what_proves_wrong_is_resumed_from_twice_at_most(unproved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    anew: list[Any] = []
    resumes: list[bool] = []

    def serve(*_: Any, resumes_: bool = True, **options: Any) -> str:
        resumes.append(options.get("resumes", resumes_))
        if len(resumes) <= unproved:
            raise sitting.UnprovedError("not what was written")
        return "served"

    monkeypatch.setattr(sitting, "_serve_alone", serve)
    means: Any = SimpleNamespace(binding=SimpleNamespace(live_cache=lambda: "fresh"))
    live: Any = SimpleNamespace(start_anew=anew.append)
    asked: Any = "asked"
    if unproved < 3:
        assert sitting._serve_proved(means, live, asked) == "served"
    else:
        with pytest.raises(sitting.UnprovedError):
            sitting._serve_proved(means, live, asked)
    assert resumes == [True, True, False][: unproved + 1] and anew == ["fresh"] * min(2, unproved)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_which_results_hold_an_answer_to_one_prompt() -> None:
    read: Any = SimpleNamespace(prompt=SimpleNamespace(ids=torch.tensor([1, 2, 3], dtype=torch.int32).numpy()))

    def found(result: Any) -> Any:
        answer = answers._answer_in(result, read)
        return None if answer is None else answer.tolist()

    assert found(torch.tensor([[1, 2, 3, 8, 9]])) == [8, 9]
    assert found(SimpleNamespace(sequences=torch.tensor([[1, 2, 3, 8, 9, 7]]))) == [8, 9, 7]
    for other in ([[1, 2, 3, 8]], [[1, 2, 3]], [[1, 2, 4, 8, 9]], [[1, 2, 3, 8, 9]] * 2, [1, 2, 3, 8, 9]):
        assert found(torch.tensor(other)) is None
    assert found(SimpleNamespace()) is found("text") is found(SimpleNamespace(sequences=[[1, 2, 3, 8, 9]])) is None


def test_only_plain_decoding_of_one_cache_is_kept() -> None:
    modes = answers.GenerationMode
    kept = {mode for mode in modes if answers.may_be_kept(mode)}
    assert kept == {modes.GREEDY_SEARCH, modes.SAMPLE}


def test_steps_that_are_too_far_from_a_prefill_are_named() -> None:
    assert answers.Decoding(1.0, 1.0).shortcoming("M") == "" == answers.Decoding(0.5, 1.0).shortcoming("M")
    said = answers.Decoding(1.25, 1.0).shortcoming("M")
    assert said.startswith("one-token steps of M are 1.2 from its prefill, more than 1. In idle time cache.prefill(")
    assert answers._rms(torch.tensor([3.0, 4.0, 0.0, 0.0])) == 2.5
    assert answers._single(10, 4) == [6, 7, 8, 9, 10]


def test_decoding_is_measured_on_the_prompt_where_it_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([answers.Decoding(3.0, 1.0), answers.Decoding(4.0, 4.0), answers.Decoding(2.0, 1.0)])
    monkeypatch.setattr(answers, "PROMPTS", 3)
    monkeypatch.setattr(answers, "sample_prompt", lambda binding, seed: seed)
    monkeypatch.setattr(answers, "_on_prompt", lambda binding, ids: next(found))
    assert answers._measure(SimpleNamespace(model=build("Mamba2"))) == answers.Decoding(4.0, 4.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "found", "expected"),
    [
        (torch.float32, (1.0, 1.5, 3.0), (2.0, 1.0)),  # twice what two pieces are off
        (torch.float32, (1.0, 1.0, 3.0), (2.0, answers.DECODING_TOLERANCE)),
        (torch.bfloat16, (4.0, 9.0, 6.0), (2.0, 2 * torch.finfo(torch.bfloat16).eps * 4.0)),
        (torch.bfloat16, (0.0, 9.0, 6.0), (6.0, answers.DECODING_TOLERANCE)),
    ],
)
def test_how_far_decoding_may_be_from_a_prefill(
    dtype: torch.dtype, found: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, asked = answers.SECOND_TOKENS, []
    values = dict(zip(("whole", "pieces", "steps"), found, strict=True))

    def logits(binding: Any, ids: Any, ends: list[int]) -> torch.Tensor:
        asked.append(ends)
        name = {1: "whole", 2: "pieces"}.get(len(ends), "steps")
        return torch.full((1, 2, VOCABULARY), values[name], dtype=torch.float64)

    monkeypatch.setattr(answers, "_logits", logits)
    weights = [torch.zeros(2, dtype=torch.int8), torch.zeros(2, dtype=dtype)]
    binding: Any = SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter(weights)))
    one = answers._on_prompt(binding, torch.zeros(1, 40))
    assert (one.gap, one.bound) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert asked == [[40], [40 - kept, 40], answers._single(40, kept)]


def test_logits_of_the_last_tokens_whatever_the_ends(forwards: Forwards) -> None:
    kept = answers.SECOND_TOKENS
    binding: Any = SimpleNamespace(live_cache=lambda: lived())
    for ends in ([40], [40 - kept, 40], answers._single(40, kept)):
        found = answers._logits(binding, torch.zeros(1, 40), ends)
        assert found.dtype is torch.float64 and found[0, :, 0].tolist() == list(range(40 - kept, 40))


# -- a cache in a user's hands ----------------------------------------------------------------------------------------


class Held:
    """A live cache that holds some tokens of a text."""

    def __init__(self, text: list[int], held: int | None = None, **others: Any) -> None:
        self.text = torch.tensor(text)
        self.last_logits = torch.tensor([[[float(text[-1])]]])
        self.held = len(text) if held is None else held
        self.length = 0
        self.unfinished = others.get("unfinished", False)
        self.recurrent_only = others.get("recurrent_only", False)

    def get_seq_length(self) -> int:
        return self.held


def go_on(live: Any, ids: list[list[int]], mask: int | None = None, compiled: Any = None, **kwargs: Any) -> Any:
    model = build("Mamba2") if compiled is None else SimpleNamespace(_compiled_call_impl=compiled)
    binding: Any = SimpleNamespace(model=model, output=lambda logits, live: ("known", logits, live))
    given = torch.tensor(ids)
    return handed.continued(binding, live, given, given.shape[1] if mask is None else mask, kwargs)


def test_what_a_cache_holds_already_is_not_computed_again(forwards: Forwards) -> None:
    live = Held([1, 2, 3])
    word, logits, same = go_on(live, [[1, 2, 3]])
    assert word == "known" and same is live and torch.equal(logits, live.last_logits)
    assert logits is not live.last_logits and forwards.seen == []


def test_what_is_new_is_computed_behind_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(prefill, "segment", lambda binding, live, row, end: given.append((live.length, row, end)))
    for ids, mask, held in (([1, 2, 3, 4], None, 3), ([4, 5], 5, 3), ([1, 2, 3, 9, 4], None, 4)):
        live = Held([1, 2, 3], held)
        go_on(live, [ids], mask, use_cache=True)
        length, row, end = given.pop()
        assert length == live.length == held and row.kwargs == {"use_cache": True}
        assert row.ids.tolist() == (ids if mask is None else [0] * held + ids) and end == len(row.ids)


@pytest.mark.parametrize(
    ("live", "ids", "mask", "said"),
    [
        (Held([1, 2, 3]), [[1, 2, 3, 4]] * 2, None, "holds one prompt, and the call has 2 rows"),
        (Held([1, 2, 3], unfinished=True), [[1, 2, 3, 4]], None, "has failed halfway"),
        (Held([1, 2, 3]), [[1, 2, 3, 4]], 6, r"covers 6 tokens, and the cache holds 3 beside the 4 given.* of 7\."),
        (Held([1, 2, 3]), [[1, 9, 3, 4]], None, "holds 3 tokens of another text: input_ids differs at token 1"),
        (Held([1, 2, 3]), [[1, 2]], None, "of another text: input_ids has 2 tokens"),
        (Held([1, 2, 3], 5), [[1, 2, 3, 4]], None, "of another text: input_ids has 4 tokens"),
        (Held([1, 2, 3], 4), [[1, 2, 3, 4]], None, "holds 4 tokens, all that input_ids has"),
    ],
)
def test_what_does_not_continue_a_cache_is_named(
    live: Any, ids: Any, mask: Any, said: str, forwards: Forwards
) -> None:
    with pytest.raises(ValueError, match=said):
        go_on(live, ids, mask)
    assert forwards.seen == [] and live.length == 0


def test_a_compiled_model_cannot_count_what_a_recurrent_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compiled model are not counted"):
        go_on(Held([1, 2, 3], recurrent_only=True), [[1, 2, 3]], compiled=object())
    assert go_on(Held([1, 2, 3]), [[1, 2, 3]], compiled=object())[0] == "known"
    assert go_on(Held([1, 2, 3], recurrent_only=True), [[1, 2, 3]])[0] == "known"

    def changed(*_: Any) -> None:
        raise ChangedPrefillError("a hook")

    monkeypatch.setattr(prefill, "segment", changed)
    with pytest.raises(ValueError, match="cannot be continued: a hook"):
        go_on(Held([1, 2, 3]), [[1, 2, 3, 4]])


def test_rows_and_tokens_of_what_a_body_is_given() -> None:
    ids, embedded = torch.zeros(2, 3), torch.zeros(2, 4, 8)
    assert handed._shape((ids,), {"inputs_embeds": embedded}) == (2, 3) == handed._shape((), {"input_ids": ids})
    assert handed._shape((None,), {"inputs_embeds": embedded}) == (2, 4)


# -- the whole of one prompt ------------------------------------------------------------------------------------------


class Asks:
    """A request that notes what it is given."""

    def __init__(self, ends: list[int], planned: Any = (), junctions: Any = (), rounds: Any = ()) -> None:
        self.segments, self.planned, self.junctions = ends, set(planned), set(junctions)
        self.checkpoint, self.resumed_tokens, self.rounds = None, 0, rounds
        self.kept: list[Any] = []

    def steps(self) -> list[int]:
        return self.segments

    def rounds_at(self, end: int) -> bool:
        return end in self.rounds

    def hand_over(self, end: int, state: Any, kv: Any) -> None:
        self.kept.append(("handed", end, state))

    def add(self, end: int, state: Any, kv: Any) -> None:
        self.kept.append(("kept", end, state))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, forwards: Forwards) -> None:
    monkeypatch.setattr(prefill.states, "capture_state", lambda live, rounding: f"state {live.length}")
    monkeypatch.setattr(prefill.states, "round_off", lambda live, rounding, start, end: f"rounded {end}")
    monkeypatch.setattr(prefill.states, "with_logits", lambda state, logits: f"{state} and {logits.shape[1]} logits")


def served(request: Any, row: Row, live: Any = None) -> tuple[Any, list[int]]:
    checked: list[int] = []
    live = live or lived()
    output, timing = prefill.prefill_row(BINDING, live, row, request, lambda: checked.append(live.length))
    assert live.length == len(row) and timing.capture_seconds >= 0 and timing.restore_seconds >= 0
    return output, checked


@pytest.mark.usefixtures("captures")
def test_what_is_planned_is_kept_and_what_others_wait_for_is_handed_over() -> None:
    row, request = Row(torch.arange(10)), Asks([3, 5, 7, 10], [3, 7, 10], [5, 7], [7])
    _, checked = served(request, row)
    assert request.kept == [
        ("kept", 3, "state 3"),
        ("handed", 5, "state 5"),
        ("handed", 7, "rounded 7"),
        ("kept", 7, "rounded 7"),
        ("kept", 10, "state 10 and 1 logits"),
    ]
    assert checked == [3, 5, 7, 10]
    request = Asks([3, 10])
    assert served(request, row)[1] == [10] and request.kept == []


@pytest.mark.usefixtures("captures")
def test_rows_of_logits_are_no_end_that_the_same_prompt_could_find() -> None:
    request = Asks([4, 10], [4, 10])
    output, checked = served(request, Row(torch.arange(10), tail=3))
    assert request.kept == [("kept", 4, "state 4")] and checked == [4, 10] and output.logits.shape[1] == 3

    class Reads:
        def __init__(self, count: int) -> None:
            self.count = count

        def wanted(self, start: int, end: int) -> int:
            return self.count

        def read(self, start: int, end: int, logits: torch.Tensor) -> None:
            pass

    for count, kept in ((1, ["state 4", "state 10 and 1 logits"]), (2, ["state 4"])):
        request = Asks([4, 10], [4, 10])
        served(request, Row(torch.arange(10), reader=Reads(count)))
        assert [state for _, _, state in request.kept] == kept


@pytest.mark.usefixtures("captures")
@pytest.mark.parametrize("error", [MEMORY, NotRoundableError("infinite"), KeyError("other")])
def test_a_checkpoint_that_cannot_be_captured_is_left_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(live: Any, rounding: Any) -> str:
        if live.length == 4:
            raise error
        return f"state {live.length}"

    monkeypatch.setattr(prefill.states, "capture_state", fails)
    request, row = Asks([4, 7, 10], [4, 7]), Row(torch.arange(10))
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            served(request, row)
    else:
        served(request, row)
        assert request.kept == [("kept", 7, "state 7")]


def test_the_very_prompt_takes_its_logits_from_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Reads:
        def read(self, start: int, end: int, logits: Any) -> None:
            told.append((start, end, logits))

    monkeypatch.setattr(prefill, "resume_live", lambda binding, live, request: setattr(live, "length", 10) or 1.5)
    monkeypatch.setattr(prefill, "layer_tensors", lambda payload: payload)
    monkeypatch.setattr(prefill.states, "logits_of", lambda state: f"logits of {state}")
    binding: Any = SimpleNamespace(output=lambda logits, live: (logits, live))
    request: Any = Asks([])
    request.checkpoint = SimpleNamespace(state="s")
    checked: list[None] = []
    for reader, expected in ((None, []), (Reads(), [(9, 10, "logits of s")])):
        live, row = lived(), Row(torch.arange(10), reader=reader)  # type: ignore[arg-type]
        output, timing = prefill.prefill_row(binding, live, row, request, lambda: checked.append(None))
        assert output == ("logits of s", live) and timing == prefill.Timing(0.0, 1.5) and told == expected
    assert len(checked) == 2


# -- what generate() is given -----------------------------------------------------------------------------------------


def test_a_handle_is_found_under_any_name_and_no_second_cache_beside_it(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, prove=False) as cache:
        for name in generation.CACHE_NAMES:
            assert generation._handle_in({name: cache, "other": 1}) == (name, cache)
        one, other, *_ = generation.CACHE_NAMES
        assert generation._handle_in({one: cache, other: cache})[1] is cache
        assert generation._handle_in({one: None, other: cache}) == (other, cache)
        assert generation._handle_in({one: "a", other: "b"}) == ("", None) == generation._handle_in({})
        for given in ({one: "a", other: cache}, {one: cache, other: "a"}):
            with pytest.raises(ValueError, match=f"^{one} and {other} are two caches"):
                generation._handle_in(given)
        with pytest.raises(ValueError, match=f"^{other} is the class"):
            generation._handle_in({other: SparsePrefixCache})
    assert generation._refuse_implementation(None) is None  # type: ignore[func-returns-value]
    with pytest.raises(ValueError, match="^cache_implementation='static' cannot"):
        generation._refuse_implementation("static")


def test_what_stands_in_for_the_live_cache_of_an_earlier_call(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, prove=False) as cache:
        name = next(one for one in generation.CACHE_NAMES if one != cache.server.binding.cache_name)
        own = cache.server.binding.cache_name

        def handed_back(model: Any = jamba, **known: Any) -> dict[str, Any]:
            live = cache.server.live_cache()
            live.origin = known.pop("origin", weakref.ref(cache))
            for key, value in known.items():
                setattr(live, key, value)
            found = generation._handed_back(model, {"a": 1, name: live})
            return {key: "live" if value is live else value for key, value in found.items()}

        assert handed_back() == {"a": 1, name: "live"}
        assert handed_back(length=3) == {"a": 1, name: "live"}
        assert handed_back(recurrent_only=True) == {"a": 1, name: "live"}
        assert handed_back(recurrent_only=True, length=3) == {"a": 1, name: cache}
        assert handed_back(recurrent_only=True, length=3, origin=None) == {"a": 1}
        assert handed_back(recurrent_only=True, length=3, origin=lambda: None) == {"a": 1}
        assert handed_back(object(), recurrent_only=True, length=3) == {"a": 1}
        assert handed_back(text=torch.arange(3)) == {"a": 1, own: "live"}
        with pytest.raises(ValueError, match=f"^{name} was prefilled by a SparsePrefixCache of another model"):
            handed_back(object(), text=torch.arange(3))
        assert generation._handed_back(jamba, {name: "no live cache"}) == {name: "no live cache"}


# -- rows put together ------------------------------------------------------------------------------------------------


def test_rows_that_ran_together_as_they_were_asked_are_used_as_they_are(
    jamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[Any] = []
    monkeypatch.setattr(prefill, "join_rows", lambda binding, live, filled, places, width: joined.append(places))
    with SparsePrefixCache(jamba, prove=False) as cache:
        server, anew = cache.server, []
        logits = torch.arange(6.0).reshape(3, 2, 1)

        def put(order: list[int], prompts: list[tuple[int, ...]], length: int = 9) -> Any:
            live: Any = SimpleNamespace(start_anew=anew.append)
            filled: Any = [
                Filled(SimpleNamespace(length=length), SimpleNamespace(logits=logits), each)  # type: ignore[arg-type]
                for each in prompts
            ]
            return server._joined(live, filled, order, 9)

        assert put([0, 1, 2], [(0, 1, 2)]).logits.flatten().tolist() == [1.0, 3.0, 5.0] and len(anew) == 1
        assert put([2, 0, 1], [(2, 0, 1)]).logits.flatten().tolist() == [1.0, 3.0, 5.0] and joined == []
        for order, prompts, length in (
            ([0, 1, 2], [(2, 0, 1)], 9),
            ([0, 1, 2], [(0, 1, 2)], 8),
            ([0, 1, 2, 0], [(0, 1, 2)], 9),
            ([0, 1, 2], [(0,), (1, 2)], 9),
            ([1, 0, 2], [(2, 0), (1,)], 9),
        ):
            put(order, prompts, length)  # type: ignore[arg-type]
        assert joined == [[1, 2, 0], [0, 1, 2], [0, 1, 2, 0], [0, 1, 2], [2, 1, 0]] and len(anew) == 2


def test_prompts_that_ran_uncached_are_counted_and_told(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, prove=False) as cache, cache.record() as requests:
        cache.server.uncached((4, 6), "so")
        assert [(info.prompt_tokens, info.computed_tokens, str(info.reason)) for info in requests] == [
            (4, 4, "call not supported: so"),
            (6, 6, "call not supported: so"),
        ]
        cache.server.uncached((), "so")
        assert requests[-1].prompt_tokens == 0 and cache.stats().requests == 3 and cache.server.recorder._calls == 2
