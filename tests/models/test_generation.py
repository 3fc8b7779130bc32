"""The four methods that a handle replaces, each by itself: what is passed on, counted, refused and given back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.utils import GenerationMode

from hf_sparse_cache.models import calls, generation
from hf_sparse_cache.models.calls import Call
from hf_sparse_cache.models.families import CACHE_NAMES
from hf_sparse_cache.models.handle import Handle
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.models.watch import ChangedPrefillError, ModelChangedError


IDS = torch.arange(3, 9).reshape(2, 3)
NAME = CACHE_NAMES[0]
OTHER = CACHE_NAMES[1]


class Model:
    """Any object will do."""


MODEL: Any = Model()


def lived(**what: Any) -> LiveCache:
    """A live cache of no model."""
    made = LiveCache.__new__(LiveCache)
    made.layers = []
    standing = {"call": None, "origin": None, "found": None, "length": 0, "text": None, "turn": None}
    made.__dict__.update({**standing, "recurrent_only": False, "_scan_forgets": True, **what})
    return made


class Serves:
    """A server that notes what it is asked."""

    def __init__(self, model: Any) -> None:
        self.binding = SimpleNamespace(model=model, cache_name=NAME)
        self.means = SimpleNamespace(
            binding=SimpleNamespace(live_cache=lived), store=SimpleNamespace(give_back=lambda: 0)
        )
        self.counted: list[Any] = []
        self.answers: list[Any] = []
        self.served: list[Any] = []
        self.looks: list[int] = []
        self.why, self.fails = "", None

    def uncached(self, tokens: Any, why: str) -> None:
        self.counted.append((tokens, why))

    def answered(self, turn: Any, result: Any) -> None:
        self.answers.append((turn, result))

    def live_cache(self) -> LiveCache:
        return lived()

    def look(self, tokens: int) -> tuple[str, str]:
        self.looks.append(tokens)
        return self.why, "name"

    def serve(self, live: Any, asked: Any, kwargs: Any, given: int) -> str:
        self.served.append((live, asked, dict(kwargs), given))
        if self.fails is not None:
            raise self.fails
        live.turn = "a turn"
        return "output"


def handle(model: Any = MODEL, alive: bool = True) -> Any:
    return Handle(Serves(model), SimpleNamespace(alive=alive))  # type: ignore[arg-type]


class Own:
    """The model's own method, which notes what it is given; `inside` is done meanwhile."""

    def __init__(self, result: Any = "result", inside: Any = lambda: None) -> None:
        self.given: list[Any] = []
        self.result, self.inside = result, inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given.append((args, kwargs))
        self.inside()
        return self.result


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    yield
    assert calls._thread.innermost is None


# -- generate ---------------------------------------------------------------------------------------------------------


def test_a_call_without_a_handle_is_passed_on_as_it_is() -> None:
    own = Own()
    assert generation._generate(MODEL, own, IDS, max_new_tokens=3, past_key_values=None) == "result"
    assert own.given == [((IDS,), {"max_new_tokens": 3, "past_key_values": None})]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_handle_is_passed_on_under_the_name_that_the_model_has(name: str) -> None:
    cache, mask = handle(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    seen: list[Any] = []
    own = Own(inside=lambda: seen.append(calls.innermost(cache)))
    assert generation._generate(MODEL, own, IDS, **{name: cache, OTHER: cache, "attention_mask": mask}) == "result"
    ((args, kwargs),) = own.given
    assert args == (IDS,) and list(kwargs) == ["attention_mask", NAME] and kwargs[NAME] is cache
    (call,) = seen
    assert call.handle is cache and call.ids is IDS and call.mask is mask and not call.own_loop
    said = f"transformers {transformers.__version__} ran the prompt without announcing it"
    assert call.counted and cache.server.counted == [((2, 3), said)] and not cache.server.answers


@pytest.mark.parametrize(
    ("own_loop", "turn", "kept"), [(False, "turn", True), (False, None, False), (True, "turn", False)]
)
def test_an_answer_is_kept_of_a_call_that_was_served(own_loop: bool, turn: Any, kept: bool) -> None:
    cache = handle()

    def serve() -> None:
        call = calls.innermost(cache)
        assert call is not None and call.own_loop is own_loop
        call.count()
        call.turn = turn

    given = {"custom_generate": "a loop"} if own_loop else {"custom_generate": None}
    generation._generate(MODEL, Own(inside=serve), IDS, past_key_values=cache, **given)
    assert cache.server.answers == ([("turn", "result")] if kept else []) and not cache.server.counted


def test_a_loop_of_ones_own_that_is_not_served_says_so() -> None:
    cache = handle()
    generation._generate(MODEL, Own(), IDS, past_key_values=cache, custom_generate=len)
    assert cache.server.counted == [((3, 3), "custom_generate runs the prompt in a loop of its own")]


def test_a_result_that_has_yet_to_begin_is_counted_once_it_is_gone() -> None:
    async def later() -> None: ...

    async def several() -> Any:
        yield 1

    for make in ((lambda: (one for one in ())), several, later):
        cache, made = handle(), make()
        result = generation._generate(MODEL, Own(made), IDS, past_key_values=cache)
        assert result is made and not cache.server.counted and not cache.server.answers
        if hasattr(made, "close"):
            made.close()
        del made, result
        assert len(cache.server.counted) == 1 and not cache.server.answers


def test_a_handle_that_cannot_be_used_is_refused_before_anything_runs() -> None:
    own, other = Own(), Model()
    with pytest.raises(ValueError, match=f"{OTHER} is a SparsePrefixCache that was detached"):
        generation._generate(MODEL, own, IDS, **{OTHER: handle(alive=False)})
    with pytest.raises(ValueError, match=f"{NAME} is a SparsePrefixCache made for another model"):
        generation._generate(MODEL, own, IDS, **{NAME: handle(other)})
    with pytest.raises(ValueError, match="cache_implementation='static' cannot be combined with a SparsePrefixCache"):
        generation._generate(MODEL, own, IDS, past_key_values=handle(), cache_implementation="static")
    assert not own.given


@pytest.mark.parametrize("asked", [None, "static"])
def test_a_handle_that_is_used_unasked_leaves_calls_that_ask_for_a_cache(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, own = handle(), Own()
    monkeypatch.setattr(generation.ambient, "handle_for", lambda model, kwargs: cache)
    monkeypatch.setattr(generation.ambient, "implementation", lambda model, kwargs: asked)
    assert generation._generate(MODEL, own, IDS, max_new_tokens=1) == "result"
    ((args, kwargs),) = own.given
    assert args == (IDS,) and (kwargs.get(NAME) is cache) is (asked is None)
    ((tokens, why),) = cache.server.counted
    assert tokens == (3, 3) and (why == "cache_implementation='static' asks for a cache of its own") is bool(asked)


def test_a_handle_that_is_given_is_not_asked_for() -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("nobody asks")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation.ambient, "handle_for", fails)
        patch.setattr(generation.ambient, "implementation", fails)
        generation._generate(MODEL, Own(), IDS, past_key_values=handle())


# -- live caches that are handed back ---------------------------------------------------------------------------------


def test_what_is_no_live_cache_is_left_as_it_is() -> None:
    given = {"past_key_values": handle(), "cache": None, "other": lived(recurrent_only=True, length=3)}
    assert generation._handed_back(MODEL, given) is given


def test_a_cache_that_was_prefilled_goes_on_under_the_models_name_for_it() -> None:
    cache = handle()
    live = lived(text=IDS[0], origin=weakref.ref(cache))
    found = generation._handed_back(MODEL, {"max_new_tokens": 3, OTHER: live, CACHE_NAMES[2]: None})
    assert found == {"max_new_tokens": 3, NAME: live}


@pytest.mark.parametrize("origin", ["none", "gone", "another model", "detached", "no handle"])
def test_a_cache_that_was_prefilled_elsewhere_is_refused(origin: str) -> None:
    kept = {"another model": handle(Model()), "detached": handle(alive=False), "no handle": Model()}.get(origin)
    reference: Any = {"none": None, "gone": lambda: None}.get(origin, lambda: kept)
    live = lived(text=IDS[0], origin=reference)
    with pytest.raises(
        ValueError, match=f"{OTHER} was prefilled by a SparsePrefixCache of another model, or one that"
    ):
        generation._handed_back(MODEL, {OTHER: live})


@pytest.mark.parametrize(
    ("recurrent", "length", "usable", "becomes"),
    [
        (True, 5, True, "handle"),
        (True, 5, False, "nothing"),
        (True, 0, True, "itself"),
        (False, 5, True, "itself"),
        (False, 5, False, "itself"),
    ],
)
def test_a_recurrent_cache_of_an_earlier_call_is_one_that_can_go_on(
    recurrent: bool, length: int, usable: bool, becomes: str
) -> None:
    cache = handle(alive=usable)
    live = lived(recurrent_only=recurrent, length=length, origin=weakref.ref(cache))
    given = {"max_new_tokens": 3, OTHER: live}
    found = generation._handed_back(MODEL, given)
    expected: dict[str, Any] = {"handle": {OTHER: cache}, "nothing": {}, "itself": {OTHER: live}}[becomes]
    assert found.pop("max_new_tokens") == 3 and list(found) == list(expected)
    assert all(found[name] is value for name, value in expected.items()) and given[OTHER] is live


# -- what is given ----------------------------------------------------------------------------------------------------


def test_the_handle_among_keywords() -> None:
    one, two = handle(), handle()
    assert generation._handle_in({}) == ("", None) == generation._handle_in({NAME: None, "other": one})
    assert generation._handle_in({NAME: "a cache", OTHER: None}) == ("", None)
    for given, name in (({NAME: one, OTHER: None}, NAME), ({OTHER: one}, OTHER), ({NAME: one, OTHER: one}, NAME)):
        found = generation._handle_in(given)
        assert found == (name, one) and found[1] is one
    for given in ({NAME: one, OTHER: two}, {NAME: one, OTHER: "a cache"}, {NAME: "a cache", OTHER: one}):
        with pytest.raises(ValueError, match=f"{NAME} and {OTHER} are two caches, of which a call can use one"):
            generation._handle_in(given)
    for given in ({OTHER: Handle}, {OTHER: Handle, CACHE_NAMES[2]: one}):
        with pytest.raises(ValueError, match=f"{OTHER} is the class SparsePrefixCache, not an object of it"):
            generation._handle_in(given)
    assert generation._handle_in({NAME: dict}) == ("", None)


def test_a_forward_refuses_a_handle_and_nothing_else() -> None:
    generation._before_forward(MODEL, (), {NAME: None, OTHER: "a cache", "other": handle(), CACHE_NAMES[2]: dict})
    for name in CACHE_NAMES:
        with pytest.raises(ValueError, match=rf"^{name} is a SparsePrefixCache in a direct call.*{name}=cache\)"):
            generation._before_forward(MODEL, (), {name: handle()})
        with pytest.raises(ValueError, match=f"^{name} is the class SparsePrefixCache"):
            generation._before_forward(MODEL, (), {name: Handle})


def test_a_handle_passes_the_validation_under_any_name() -> None:
    own, cache = Own(), handle()
    given = {OTHER: cache, "attention_mask": None, NAME: cache}
    assert generation._validate_model_kwargs(MODEL, own, given) is None
    assert own.given == [(({"attention_mask": None},), {})] and given[NAME] is cache
    generation._validate_model_kwargs(MODEL, own, {"x": 1})
    assert own.given[1] == (({"x": 1},), {})
    with pytest.raises(ValueError, match=f"{OTHER} is a SparsePrefixCache that was detached"):
        generation._validate_model_kwargs(MODEL, own, {OTHER: handle(alive=False)})
    assert len(own.given) == 2


# -- where a request begins -------------------------------------------------------------------------------------------


def configured(**what: Any) -> Any:
    return SimpleNamespace(**{"use_cache": True, "cache_implementation": None, **what})


def begin(kwargs: Any, config: Any = None, mode: Any = GenerationMode.GREEDY_SEARCH) -> tuple[Any, Own]:
    own = Own("their cache")
    config = config or configured()
    return generation._prepare_cache_for_generation(MODEL, own, config, kwargs, mode, 4, further=5), own


def test_a_request_without_a_handle_begins_as_ever() -> None:
    config, kwargs = configured(cache_implementation="static"), {NAME: "a cache"}
    found, own = begin(kwargs, config)
    assert found == "their cache" and kwargs == {NAME: "a cache"}
    assert own.given == [((config, kwargs, GenerationMode.GREEDY_SEARCH, 4), {"further": 5})]


@pytest.mark.parametrize(
    ("mode", "decodes"),
    [(GenerationMode.GREEDY_SEARCH, True), (GenerationMode.SAMPLE, True), (GenerationMode.BEAM_SEARCH, False)],
)
def test_a_request_with_a_handle_begins_with_a_live_cache(mode: Any, decodes: bool) -> None:
    cache = handle()
    kwargs: dict[str, Any] = {OTHER: cache, CACHE_NAMES[2]: None, "x": 1}
    with calls.opened(Call(cache)) as call:
        found, own = begin(kwargs, mode=mode)
    assert found is None and not own.given and set(kwargs) == {NAME, "x"}
    live = kwargs[NAME]
    assert isinstance(live, LiveCache) and live.call is call and live.origin() is cache and call.decodes is decodes
    assert not call.counted and not cache.server.counted
    again: dict[str, Any] = {NAME: cache}  # the class's generate, without a call around it
    begin(again)
    assert again[NAME].call.handle is cache and again[NAME].call is not call


@pytest.mark.parametrize(
    ("config", "mode", "why"),
    [
        (configured(use_cache=False), GenerationMode.GREEDY_SEARCH, "use_cache=False keeps no state to resume from"),
        (
            configured(),
            GenerationMode.ASSISTED_GENERATION,
            "assisted decoding runs the prompt and the first candidates",
        ),
    ],
)
def test_a_request_that_cannot_be_resumed_begins_as_ever(config: Any, mode: Any, why: str) -> None:
    cache = handle()
    kwargs = {NAME: cache, OTHER: cache, "x": 1}
    with calls.opened(Call(cache, IDS)) as call:
        found, own = begin(kwargs, config, mode)
    assert found == "their cache" and kwargs == {"x": 1} and call.counted
    assert own.given == [((config, {"x": 1}, mode, 4), {"further": 5})]
    ((tokens, said),) = cache.server.counted
    assert tokens == (3, 3) and said.startswith(why)


def test_a_request_that_asks_for_a_cache_by_its_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_implementation='static' cannot be combined"):
        begin({NAME: handle()}, configured(cache_implementation="static"))
    assert begin({NAME: handle()}, configured(use_cache=None))[0] is None  # only where it says no


# -- the prefill ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the prefill of a call, and tells what of the model was held, asked and loaded."""
    told = SimpleNamespace(held=[], loaded=[], why="")

    @contextmanager
    def held(model: Any) -> Iterator[None]:
        told.held.append("in")
        yield
        told.held.append("out")

    monkeypatch.setattr(generation.mamba1, "held", held)
    monkeypatch.setattr(generation.rope, "as_loaded", told.loaded.append)
    monkeypatch.setattr(generation, "why_uncached", lambda model, asked, config, kwargs: told.why)

    def run(kwargs: dict[str, Any], ids: Any = IDS) -> Any:
        told.own = Own("their output")
        return generation._prefill(MODEL, told.own, ids, "config", kwargs, 6, further=7)

    told.run = run
    return told


@pytest.mark.parametrize("kwargs", [{}, {NAME: "a cache"}, {NAME: lived()}, {"other": lived(call=Call(handle()))}])
def test_a_prefill_without_a_live_cache_of_a_call_is_the_models_own(kwargs: dict[str, Any], prefilled: Any) -> None:
    assert prefilled.run(kwargs) == "their output"
    assert prefilled.own.given == [((IDS, "config", kwargs, 6), {"further": 7})] and not prefilled.held


@pytest.mark.parametrize("decodes", [True, False])
def test_a_prefill_is_served_and_counted(decodes: bool, prefilled: Any) -> None:
    cache = handle()
    call = Call(cache, IDS, decodes=decodes)
    live = lived(call=call)
    kwargs = {OTHER: live, "attention_mask": None, "use_cache": True}
    assert prefilled.run(kwargs) == "output" and not prefilled.own.given and prefilled.held == ["in", "out"]
    ((given, asked, passed, prompts),) = cache.server.served
    assert given is live and asked.ids is IDS and passed == kwargs and prompts == 2
    assert cache.server.looks == [3] and live.found == "name" and live.call is None and live.turn is None
    assert call.counted and call.turn == ("a turn" if decodes else None) and not cache.server.counted


@pytest.mark.parametrize("who", ["call", "look", "serve", "model"])
def test_a_prefill_that_cannot_be_served_runs_as_if_there_were_no_handle(who: str, prefilled: Any) -> None:
    cache, mask = handle(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    prefilled.why = "the call" if who == "call" else ""
    cache.server.why = "the look" if who == "look" else ""
    cache.server.fails = {"serve": ChangedPrefillError("the serve"), "model": ModelChangedError("the model")}.get(who)
    call, other = Call(cache), lived()
    live = lived(call=call)
    kwargs = {NAME: live, OTHER: other, "attention_mask": mask}
    assert prefilled.run(kwargs) == "their output"
    ((args, further),) = prefilled.own.given
    assert args[0] is IDS and args[1] == "config" and args[3] == 6 and further == {"further": 7}
    passed = args[2]
    assert (passed[NAME] is live) is (who in ("call", "look"))  # half filled, it makes room for a fresh one
    assert isinstance(passed[NAME], LiveCache) and not passed[NAME]._scan_forgets and not other._scan_forgets
    assert passed[OTHER] is other and passed["attention_mask"] is mask
    assert cache.server.counted == [((2, 3), f"the {who}")] and call.counted and prefilled.loaded == [MODEL]
    assert cache.server.looks == ([] if who == "call" else [3]) and len(cache.server.served) == (
        who in ("serve", "model")
    )


def test_a_call_that_knows_its_prompts_is_counted_with_them(prefilled: Any) -> None:
    cache = handle()
    prefilled.why = "the call"
    call = Call(cache, IDS[:1], torch.tensor([[0, 0, 1]]))
    prefilled.run({NAME: lived(call=call)})  # in as many rows as there are beams
    assert cache.server.counted == [((1,), "the call")]


def test_a_look_that_runs_out_of_memory_is_taken_once_more(prefilled: Any) -> None:
    cache, looks = handle(), []

    def look(tokens: int) -> tuple[str, str]:
        looks.append(tokens)
        if len(looks) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "", "name"

    cache.server.look = look
    call = Call(cache, IDS)
    kwargs = {NAME: lived(call=call)}
    assert prefilled.run(kwargs) == "output" and looks == [3, 3] and call.counted


def test_an_error_of_the_prefill_passes(prefilled: Any) -> None:
    cache = handle()
    cache.server.fails = KeyError("else")
    call = Call(cache, IDS)
    with pytest.raises(KeyError):
        prefilled.run({NAME: lived(call=call)})
    assert not call.counted and not prefilled.own.given


@pytest.mark.parametrize(
    ("mask", "config", "length"),
    [
        (torch.ones(1, 9), SimpleNamespace(), 9),
        (None, SimpleNamespace(_mask_length=7), 7),
        (torch.ones(1, 9), SimpleNamespace(_mask_length=7), 9),
        (None, SimpleNamespace(), 3),
    ],
)
def test_a_prefilled_cache_is_continued(
    mask: Any, config: Any, length: int, prefilled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, given = handle(), []
    live = lived(text=IDS[0], origin=weakref.ref(cache))
    monkeypatch.setattr(generation.handed, "continued", lambda *args: given.append(args) or "continued")
    kwargs = {NAME: live, "use_cache": True, "logits_to_keep": 1, "position_ids": 3, "attention_mask": mask}
    assert generation._prefill(MODEL, Own(), IDS, config, kwargs) == "continued"
    binding = cache.server.binding
    assert given == [(binding, live, IDS, length, {"use_cache": True, "logits_to_keep": 1})]
    generation._prefill(MODEL, Own(), IDS, config, {NAME: live})
    assert given[1][4] == {}
