"""A cache in a user's hands, and an answer that is kept, step by step and without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse_cache.models import answers, handed
from hf_sparse_cache.models.families import CACHE_NAMES
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.models.rounding import NotRoundableError
from hf_sparse_cache.stats import Cause, Reason, Recorder, RequestInfo


NAME, OTHER = CACHE_NAMES[:2]
IDS = torch.arange(4)[None]


def lived(**what: Any) -> Any:
    """A live cache of no model, which a user holds."""
    made = LiveCache.__new__(LiveCache)
    made.layers = []
    standing = {"length": 5, "text": IDS[0], "unfinished": False, "recurrent_only": True, "full_attention_layers": 1}
    made.__dict__.update({**standing, **what})
    return made


class Takes(torch.nn.Module):
    def forward(self, input_ids: Any = None, position_ids: Any = None) -> None: ...


class Without(torch.nn.Module):
    def forward(self, input_ids: Any = None) -> None: ...


# -- a forward of one's own -------------------------------------------------------------------------------------------


def test_what_is_given_away_holds_its_text_and_its_last_logits() -> None:
    live, logits = lived(text=None), torch.arange(6.0).reshape(1, 3, 2)
    found = handed.hand_out(live, IDS[0], logits)
    assert found.logits is logits and found.cache is found.past_key_values is live
    assert live.text.tolist() == [0, 1, 2, 3] and live.last_logits.tolist() == [[[4.0, 5.0]]]


def test_positions_are_those_behind_what_a_cache_holds() -> None:
    for name in CACHE_NAMES:
        live = lived()
        args, kwargs = handed.before_body(Takes(), (IDS,), {name: live, "use_cache": True})  # type: ignore[misc]
        assert args == (IDS,) and kwargs["position_ids"].tolist() == [[5, 6, 7, 8]] and live.unfinished
        assert set(kwargs) == {name, "use_cache", "position_ids"} and kwargs[name] is live
    live = lived()
    _, kwargs = handed.before_body(Takes(), (), {"inputs_embeds": torch.zeros(1, 2, 8), NAME: live})  # type: ignore[misc]
    assert kwargs["position_ids"].tolist() == [[5, 6]]
    _, kwargs = handed.before_body(Takes(), (), {"input_ids": IDS, NAME: lived(), "position_ids": None})  # type: ignore[misc]
    assert kwargs["position_ids"].tolist() == [[5, 6, 7, 8]]


def test_positions_that_are_given_or_that_nobody_takes_stay_as_they_are() -> None:
    for module, kwargs in ((Takes(), {"position_ids": IDS}), (Without(), {})):
        live = lived()
        assert handed.before_body(module, (IDS,), {NAME: live, **kwargs}) is None and live.unfinished


@pytest.mark.parametrize("live", [None, "their cache", lived(text=None)])
def test_caches_that_were_not_given_away_are_left_alone(live: Any) -> None:
    assert handed.before_body(Takes(), (IDS.repeat(2, 1),), {NAME: live}) is None
    assert not getattr(live, "unfinished", False)


def test_a_cache_is_found_behind_names_that_hold_nothing_or_another() -> None:
    live = lived()
    assert handed._handed_out({NAME: lived(text=None), OTHER: live}) is live
    assert handed._handed_out({NAME: None, OTHER: live}) is live and handed._handed_out({}) is None


def test_a_forward_with_several_rows_or_behind_one_that_failed_is_refused() -> None:
    live = lived()
    with pytest.raises(ValueError, match="holds one prompt, and the forward has 2 rows"):
        handed.before_body(Takes(), (IDS.repeat(2, 1),), {NAME: live})
    assert not live.unfinished
    with pytest.raises(ValueError, match=r"has failed halfway.*prefill\(\) it anew"):
        handed.before_body(Takes(), (IDS,), {NAME: lived(unfinished=True)})


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_forward_that_ends_is_counted_where_nothing_else_counts_it(recurrent: bool) -> None:
    for text in (None, IDS[0]):  # of every live cache, also while generate() decodes
        live = lived(recurrent_only=recurrent, unfinished=True, text=text)
        handed.after_body(Takes(), (IDS[:, :3],), {NAME: None, OTHER: live}, "output")
        assert not live.unfinished and live.length == (8 if recurrent else 5)
    handed.after_body(Takes(), (IDS,), {NAME: "their cache"}, "output")
    handed.after_body(Takes(), (IDS,), {}, "output")


def test_what_is_compiled_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    live = lived(unfinished=True)
    assert handed.before_body(Takes(), (IDS,), {NAME: live}) is None
    handed.after_body(Takes(), (IDS,), {NAME: live}, "output")
    assert live.unfinished and live.length == 5


# -- an answer --------------------------------------------------------------------------------------------------------


class Answer:
    """What is open of an answer; notes what is kept."""

    def __init__(self, planned: list[int], fails: Exception | None = None) -> None:
        self.planned, self.fails = planned, fails
        self.captured: list[int] = []
        self.added: list[Any] = []
        self.done: list[str] = []

    def __enter__(self) -> Answer:
        self.done.append("in")
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.append("out")

    def add(self, position: int, state: Any, kv: Any) -> None:
        if self.fails is not None and self.captured:
            raise self.fails
        self.captured.append(position)
        self.added.append((position, state, None if kv is None else kv(3, position)))


class Kept:
    """Keeps answers of a prompt of three tokens, on a binding that is none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, live: Any) -> None:
        self.opened, self.asked, self.why, self.live = Answer([6]), [], "", live
        self.said: list[str] = []
        monkeypatch.setattr(answers.logger, "warning_once", self.said.append)
        monkeypatch.setattr(answers, "open_answer", self.open)
        monkeypatch.setattr(
            answers, "_why_not", lambda binding, turn, position: self.asked.append(position) or self.why
        )
        monkeypatch.setattr(answers.states, "capture_state", lambda live, rounding: ("state", live, rounding))
        monkeypatch.setattr(answers.states, "capture_kv", lambda live, a, b, rounding: ("kv", live, a, b, rounding))
        self.recorder = Recorder()
        self.info = RequestInfo(3, captured=(2,), reason=Reason(Cause.RESUMED))
        self.recorder.add(self.info)
        read: Any = SimpleNamespace(prompt=SimpleNamespace(ids=np.asarray([1, 2, 3], dtype=np.int32)))
        self.turn = answers.Turn(live, read, "name", self.info)  # type: ignore[arg-type]

    def open(self, read: Any, answer: Any) -> Any:
        self.answer = (read, answer.tolist())
        return self.opened

    def keep(self, ids: list[int]) -> tuple[int, ...]:
        """What is recorded as captured afterwards."""
        answers.keep(SimpleNamespace(rounding="r"), self.recorder, self.turn, torch.tensor([ids]))  # type: ignore[arg-type]
        assert self.recorder.last is not None
        return self.recorder.last.captured


@pytest.mark.parametrize("full", [0, 2])
def test_an_answer_is_kept_behind_the_last_token_that_was_read(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    live = lived(full_attention_layers=full)
    kept = Kept(monkeypatch, live)
    assert (
        kept.keep([1, 2, 3, 7, 8, 9, 9]) == (2, 6)
        and kept.asked == [6]
        and kept.answer == (kept.turn.read, [7, 8, 9, 9])
    )
    assert kept.opened.done == ["in", "out"] and not kept.said
    assert kept.opened.added == [(6, ("state", live, "r"), ("kv", live, 3, 6, "r") if full else None)]


def test_answers_of_which_nothing_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(monkeypatch, lived())
    assert kept.keep([1, 2, 3, 7]) == (2,) and not kept.asked  # no token of it was read
    kept.why = "it rounds otherwise"
    assert kept.keep([1, 2, 3, 7, 8]) == (2,) and kept.asked == [4] and not kept.opened.done
    assert kept.said == ["An answer is not kept for the next turn, which will read it: it rounds otherwise."]
    kept.why, kept.opened = "", None
    assert kept.keep([1, 2, 3, 7, 8]) == (2,)
    kept.opened = Answer([])
    assert kept.keep([1, 2, 3, 7, 8]) == (2,) and kept.recorder.last is kept.info


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), NotRoundableError("infinite"), KeyError("other")]
)
def test_an_answer_that_cannot_be_captured_is_there_all_the_same(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(monkeypatch, lived())
    kept.opened = Answer([4, 6], error)
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            kept.keep([1, 2, 3, 7, 8, 9, 9])
    else:
        assert kept.keep([1, 2, 3, 7, 8, 9, 9]) == (2, 4)
        assert kept.said == [f"An answer is not kept for the next turn: {error}"]
    assert kept.recorder.last is not None and kept.recorder.last.captured == (2, 4)  # what was captured before counts
    assert kept.opened.done == ["in", "out"]


def test_an_answer_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, tracked = Kept(monkeypatch, lived()), []
    monkeypatch.setattr(answers.states, "capture_state", lambda *_: tracked.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        kept.keep([1, 2, 3, 7, 8])
    assert tracked == [False]


class Answering:
    """A model that is none, and what stands between it and an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, defers: Any = None) -> None:
        weight = SimpleNamespace(device=torch.device("cpu"))
        self.model: Any = SimpleNamespace(
            get_input_embeddings=lambda: SimpleNamespace(weight=weight), forward=lambda: None
        )
        self.alike, self.filled, self.short = True, None, ""
        monkeypatch.setattr(
            answers, "utils", SimpleNamespace(**({} if defers is None else {"DeferredStopCheck": defers}))
        )
        monkeypatch.setattr(answers, "unchanged", lambda model, name: self.alike and name == "name")
        monkeypatch.setattr(answers.watch, "check_filled", self.check)
        monkeypatch.setattr(
            answers,
            "decoding",
            lambda binding: SimpleNamespace(shortcoming=lambda name: f"{name}{self.short}" if self.short else ""),
        )

    def check(self, live: Any, tokens: int) -> None:
        if self.filled != tokens and self.filled is not None:
            raise answers.watch.ChangedPrefillError(f"holds {self.filled} of {tokens}")

    def why(self, live: Any, position: int = 7) -> str:
        turn: Any = SimpleNamespace(live=live, made_of="name")
        return answers._why_not(SimpleNamespace(model=self.model), turn, position)  # type: ignore[arg-type]


def holding(tokens: int, recurrent: bool = False) -> Any:
    return SimpleNamespace(
        recurrent_only=recurrent,
        length=tokens if recurrent else 99,
        get_seq_length=lambda: 99 if recurrent else tokens,
    )


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_cache_that_is_what_a_prompt_would_leave(recurrent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Answering(monkeypatch)
    assert model.why(holding(7, recurrent)) == ""
    for held in (6, 8):
        assert model.why(holding(held, recurrent)) == f"its cache holds {held} tokens where 7 were read"
    model.short = " is far"
    assert model.why(holding(7, recurrent)) == "SimpleNamespace is far"
    model.alike = False
    assert model.why(holding(7, recurrent)) == "the model changed while it answered"
    model.filled = 5
    assert model.why(holding(7, recurrent)) == "holds 5 of 7"


def test_a_compiled_model_keeps_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "a compiled model rounds otherwise than the run that would replay it"
    model = Answering(monkeypatch)
    model.model._compiled_call_impl = None
    assert model.why(holding(7)) == ""
    model.model._compiled_call_impl = len
    assert model.why(holding(7)) == said
    model.model._compiled_call_impl = None
    model.model.forward = SimpleNamespace(_torchdynamo_orig_callable=len)
    assert model.why(holding(7)) == said


@pytest.mark.parametrize("supported", [(), (True,), (False,), (True, False)])
def test_a_device_that_decodes_one_token_more_keeps_no_answers(
    supported: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Defers:
        @staticmethod
        def is_supported(device: Any, live: Any, returned: bool, assistant: bool) -> bool:
            asked.append((device.type, id(live), assistant))
            return returned in supported

    live = holding(7)
    said = Answering(monkeypatch, Defers).why(live)
    assert said == ("on cpu transformers decodes one token more than it returns" if supported else "")
    assert set(asked) == {("cpu", id(live), False)}


def test_decoding_is_measured_once_for_each_code(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    name = {"of": "one"}
    monkeypatch.setattr(answers, "identity", lambda model: SimpleNamespace(proved_by=name["of"]))
    monkeypatch.setattr(answers, "_measure", lambda binding: measured.append(binding) or f"measured {len(measured)}")
    one, two = (SimpleNamespace(model=Takes()) for _ in range(2))
    decoding: Any = answers.decoding
    assert [decoding(one), decoding(one), decoding(two)] == ["measured 1", "measured 1", "measured 2"]
    name["of"] = "another"
    assert decoding(one) == "measured 3"
    name["of"] = "one"
    assert decoding(one) == "measured 1" and measured == [one, two, one]
