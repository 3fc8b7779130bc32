"""What a handle is bound to, and where its prompts live: each rule by itself, with a model that is none."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from guarded import Held
from transformers import PreTrainedModel

from hf_sparse_cache import SparseCacheConfig, UnsupportedModelError
from hf_sparse_cache.models import binding as bindings
from hf_sparse_cache.models import space as spaces
from hf_sparse_cache.models.binding import Binding
from hf_sparse_cache.models.families import Family
from hf_sparse_cache.models.space import Space
from hf_sparse_cache.models.weights import Identity
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.segments import Bitwise, Replayable


CHUNKED = Family("Some", kernel_chunk=8, default_grid=20)


class Kept:
    def forward(self, input_ids: Any, logits_to_keep: int = 0) -> None: ...

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=50)


class Whole:
    def forward(self, input_ids: Any) -> None: ...


def bound(model: Any = None, **what: Any) -> Binding:
    standing: dict[str, Any] = {
        "model": Kept() if model is None else model, "tokenizer": None, "config": SparseCacheConfig(),
        "family": CHUNKED, "cache_name": "past", "text_config": SimpleNamespace(), "grid": 64, "cut_ids": (),
        "segmenting": None, "prefill_cost": None, "rounding": None, "output_type": SimpleNamespace,
        "size": SimpleNamespace(state_bytes=100, kv_bytes_per_token=10, page_bytes=4),
    }  # fmt: skip
    return Binding(**{**standing, **what})


# -- a binding --------------------------------------------------------------------------------------------------------


def test_the_logits_that_are_kept_are_asked_of_a_forward_that_takes_the_keyword() -> None:
    assert bound().logits_to_keep(3) == {"logits_to_keep": 3} and bound(Whole()).logits_to_keep(3) == {}


def test_an_output_holds_the_logits_and_the_cache_by_the_models_name() -> None:
    made = bound().output("logits", "live")  # type: ignore[arg-type]
    assert made == SimpleNamespace(logits="logits", past="live")


def test_one_prompt_is_int32_and_of_this_model() -> None:
    tokens = bound().tokens_of(torch.tensor([[3, 49]]))
    assert tokens.dtype == np.int32 and tokens.tolist() == [3, 49]
    with pytest.raises(ValueError, match=r"^ids contains 50, outside the model's vocabulary 0\.\.49"):
        bound().tokens_of(torch.tensor([50]))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        bound().tokens_of("text")
    words = bound(tokenizer=lambda text, return_tensors: {"input_ids": torch.tensor([[len(text)]])})
    assert words.tokens_of("four").tolist() == [4]


@pytest.mark.parametrize("chunk", [1, 8, 24])
def test_a_smaller_grid_is_the_first_half_that_cuts_in_whole_chunks(chunk: int) -> None:
    for grid in (24, 64, 192):
        one = bound(family=Family("Some", kernel_chunk=chunk), grid=grid)
        for tokens in (-3, 0, 1, 2, 7, 12, 23, 24, 47, 63, 64, 100, 191, 192, 500):
            halves = [grid // 2**power for power in range(12)]
            first = next(half for half in halves if (half <= max(0, tokens) and half < grid) or half == 0)
            whole = first // chunk * chunk
            assert one.smaller_grid(tokens) == (whole if whole >= 2 else 0), (grid, tokens)


def test_what_advice_knows_of_a_model() -> None:
    facts = bound().facts
    assert (facts.bytes_of(3), facts.decode) == (100 + 30, None) or facts.bytes_of(3) >= 130
    assert facts.smaller_grid(40) == 32 and (facts.state_bytes, facts.kv_bytes_per_token, facts.page_bytes) == (
        100,
        10,
        4,
    )
    assert bound(tokenizer=SimpleNamespace(decode=str)).facts.decode is str


@pytest.mark.parametrize(("asked", "warns"), [(None, False), (64, False), (60, True), (8, False), (4, True)])
def test_a_grid_is_as_asked_for_and_one_that_pads_is_told_of(
    asked: int | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(bindings.logger, "warning_once", said.append)
    monkeypatch.setattr(bindings, "input_device", lambda model: torch.device("cpu"))
    assert bindings._grid(Kept(), CHUNKED, SimpleNamespace(), asked) == (24 if asked is None else asked)
    assert len(said) == warns
    if warns:
        assert said[0].startswith(f"grid={asked} is not a multiple of the kernel chunk of 8 tokens of Kept")


@pytest.mark.parametrize("type_", ["cpu", "cuda"])
def test_pieces_are_the_smaller_of_what_is_asked_and_what_scans_well(
    type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "input_device", lambda model: torch.device(type_))
    model: Any = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace()), parameters=lambda: [torch.zeros(0)]
    )
    rule = CutRule(24)
    for scans in (False, True):
        family = Family("Some", kernel_chunk=8, default_grid=20, scans=scans)
        for pieces in (None, 16, 32):
            made = bindings._segmenting(model, family, rule, SparseCacheConfig(pieces=pieces))
            sizes = [size for size in (pieces, 24 if scans and type_ == "cpu" else None) if size is not None]
            assert isinstance(made, Replayable) and made.piece == (min(sizes) if sizes else None)
            assert made.gathers is (type_ != "cpu") and made.step % 8 == 0 and not made.rounds and made.rule is rule
            assert made.cut_tokens == family.cut_tokens(SimpleNamespace(), type_)
            assert made.forward_tokens == family.forward_tokens(SimpleNamespace(), type_, 1)
    measured = bindings._segmenting(model, CHUNKED, rule, SparseCacheConfig(cut_tokens=7))
    assert measured.cut_tokens == 7.0
    strict = bindings._segmenting(model, CHUNKED, rule, SparseCacheConfig(exactness="bitwise", storage="int8"))
    assert isinstance(strict, Bitwise) and strict.rounds and strict.rule is rule
    assert bindings._segmenting(model, CHUNKED, rule, SparseCacheConfig(storage="int8")).rounds
    assert not bindings._segmenting(model, CHUNKED, rule, SparseCacheConfig(exactness="bitwise")).rounds


def test_strings_are_looked_for_in_what_the_tokenizer_decodes() -> None:
    asked: list[Any] = []

    class Tokenizer:
        def decode(self, ids: list[int], **how: Any) -> str:
            asked.append((ids, how))
            return "x" * len(ids)

    assert bindings._text_ends(Tokenizer(), SparseCacheConfig()) is None
    assert bindings._text_ends(None, SparseCacheConfig()) is None
    config = SparseCacheConfig(cut_after=("###",))
    with pytest.raises(ValueError, match=r"cut_after=\('###',\) needs a tokenizer"):
        bindings._text_ends(None, config)
    ends = bindings._text_ends(Tokenizer(), config)
    assert ends is not None and ends.strings == ("###",) and ends._decode([4, 5]) == "xx"
    assert asked == [([4, 5], {"skip_special_tokens": False, "clean_up_tokenization_spaces": False})]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "^CUDA out of memory$"),
        (UnsupportedModelError("no layers"), UnsupportedModelError, "^no layers$"),
        (TypeError("takes no x"), UnsupportedModelError, "^Kept cannot be called as .* end in TypeError: takes no x$"),
        (KeyboardInterrupt("asked"), KeyboardInterrupt, "^asked$"),
    ],
)
def test_a_model_that_cannot_be_called_is_named(
    error: BaseException, kind: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(*given: Any) -> str:
        if given[2] == "fails":
            raise error
        return f"output for {given[1:]}"

    monkeypatch.setattr(bindings.states, "probe", probe)
    assert bindings._probed(Kept(), "probe", "past") == "output for ('probe', 'past')"  # type: ignore[arg-type]
    with pytest.raises(kind, match=said):
        bindings._probed(Kept(), "probe", "fails")  # type: ignore[arg-type]


def test_a_binding_looks_at_the_release_the_model_and_its_layers(
    jamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    kind = type(jamba.config)
    own, config = kind.get_text_config, SparseCacheConfig(grid=48, exactness="bitwise")
    monkeypatch.setattr(bindings, "check_version", lambda: done.append("release"))
    monkeypatch.setattr(bindings, "require_methods", lambda model: done.append(model))
    monkeypatch.setattr(bindings.states, "check_layers", lambda probe, name: done.append((len(probe.layers), name)))
    monkeypatch.setattr(bindings.states, "place_windows", lambda live, model: done.append((live, model)))
    monkeypatch.setattr(
        kind, "get_text_config", lambda self, decoder=None, **how: done.append(decoder) or own(self, decoder, **how)
    )
    tokenizer = SimpleNamespace(all_special_ids=[7, 3, 7])
    made = Binding.of(jamba, tokenizer, config)
    kinds = [one for one in done if not isinstance(one, bool | None)]
    assert kinds == ["release", jamba, (len(jamba.config.layers_block_type), "JambaForCausalLM")]
    assert made.model is jamba and made.tokenizer is tokenizer and made.config is config and made.cut_ids == (3, 7)
    assert made.grid == 48 and isinstance(made.segmenting, Bitwise) and made.segmenting.rule.cut_ids == (3, 7)
    assert made.family.name == "Jamba" and made.size.state_bytes > 0 and made.text_config is jamba.config
    assert Binding.of(jamba, None, config).cut_ids == ()
    done.clear()
    live = made.live_cache()
    assert done[-1] == (live, jamba) and live.get_seq_length() == 0


def test_in_eight_bits_are_those_parts_that_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "rounding_of", lambda *given: given)
    monkeypatch.setattr(bindings, "INT8", {"some": SimpleNamespace(parts=("kv",)), "none": SimpleNamespace(parts=())})
    config = SparseCacheConfig(storage="int8")
    for type_, parts in (
        ("some", ("kv",)),
        ("none", bindings.PARTS),
        ("unknown", bindings.UNKNOWN.parts or bindings.PARTS),
    ):
        assert bindings._rounding(SimpleNamespace(model_type=type_), config) == ("int8", parts)


# -- where its prompts live -------------------------------------------------------------------------------------------


class Store:
    def __init__(self, outlives_process: bool = False) -> None:
        self.outlives_process, self.dropped, self.expected = outlives_process, [], []

    def drop(self, space: str) -> None:
        self.dropped.append(space)

    def expect(self, space: str, layout: Any) -> None:
        self.expected.append((space, layout))


class World:
    """A model whose name is set by a test, and how its space is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.autocast, self.warned = Identity("w1", "s1", "c1"), "", []
        self.asked: list[Any] = []
        monkeypatch.setattr(spaces, "verified", lambda model: self.name)
        monkeypatch.setattr(spaces, "identity", lambda model: self.asked.append(model) or self.name)
        monkeypatch.setattr(spaces.fingerprint, "space_of", self.space_of)
        monkeypatch.setattr(spaces.logger, "warning_once", self.warned.append)

    def space_of(self, binding: Any, weights: Identity, durable: bool) -> str:
        return f"{weights.weights}/{weights.settings}{self.autocast}{' durable' if durable else ''}"

    def becomes(self, weights: str, settings: str = "s1") -> Identity:
        self.name = Identity(weights, settings, "c1")
        return self.name


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def space_in(store: Store) -> Space:
    binding = SimpleNamespace(model="model", rounding="rounding", cache_name="past", live_cache=lambda: "live")
    return Space(binding, store)  # type: ignore[arg-type]


def test_a_space_is_that_of_the_model_as_it_is(world: World) -> None:
    store = Store()
    space = space_in(store)
    first = space.layout
    assert space.now() == ("w1/s1", False) and space.layout is not first
    second = space.layout
    assert space.now(told=True) == ("w1/s1", False) and space.layout is second and not store.dropped
    world.autocast = " half"  # other types of the same weights: measured anew, and nothing changed
    assert space.now() == ("w1/s1 half", False) and space.layout is not second and not world.warned
    assert [name for name, _ in store.expected] == ["w1/s1", "w1/s1", "w1/s1 half"]
    assert [layout for _, layout in store.expected] == [second, second, space.layout] and world.asked == ["model"] * 3
    world.becomes("w9")
    assert space.now(found=Identity("w1", "s1", "c1")) == ("w1/s1 half", False) and len(world.asked) == 3


def test_what_is_stored_of_weights_that_are_gone_is_dropped(world: World) -> None:
    store = Store()
    space = space_in(store)
    space.now()
    world.becomes("w1", "s2")  # an adapter, which may come back
    assert space.now() == ("w1/s2", True) and not store.dropped and not world.warned
    world.becomes("w2", "s2")
    assert space.now()[0] == "w2/s2" and sorted(store.dropped) == ["w1/s1", "w1/s2"] and len(world.warned) == 1
    store.dropped.clear()
    world.becomes("w3", "s2")
    assert space.now()[0] == "w3/s2" and store.dropped == ["w2/s2"]  # the others are gone already
    store.dropped.clear()
    world.becomes("w3", "s3")
    assert space.now()[0] == "w3/s3" and not store.dropped


def test_the_space_that_is_used_is_not_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    space = space_in(store)
    monkeypatch.setattr(spaces.fingerprint, "space_of", lambda *_, durable: "the same")
    space.now()
    world.becomes("w2")
    assert space.now() == ("the same", True) and not store.dropped


def test_a_change_is_said_until_a_request_was_told(world: World) -> None:
    space = space_in(Store())
    assert not space.now()[1]
    world.becomes("w2")
    assert [space.now()[1], space.now()[1], space.now(told=True)[1], space.now()[1]] == [True, True, True, False]
    world.becomes("w3")
    assert [space.now(told=True)[1], space.now(told=True)[1], space.now()[1]] == [True, False, False]


@pytest.mark.parametrize("durable", [False, True])
def test_the_space_of_the_latest_prompt_is_looked_up_without_noticing_anything(durable: bool, world: World) -> None:
    store = Store(durable)
    space = space_in(store)
    assert space.latest() == ("" if durable else "w1/s1") and not store.expected  # where it would read all weights
    space.now()
    world.becomes("w2")
    assert space.latest() == "w1/s1" + (" durable" if durable else "") and not store.dropped


def test_a_space_changes_under_its_lock(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    space, held = space_in(Store()), Held()
    space._lock = held  # type: ignore[assignment]
    depths: list[int] = []
    monkeypatch.setattr(spaces.fingerprint, "space_of", lambda *_, durable: depths.append(held.depth) or "space")
    space.now()
    assert depths == [1] and held.depth == 0
    space.after_fork()
    assert space._lock is not held and isinstance(space._lock, type(threading.Lock()))


def test_a_layout_is_measured_on_a_fresh_cache(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    probed: list[Any] = []
    monkeypatch.setattr(spaces, "Layout", lambda probe, rounding: made.append((probe, rounding)) or object())
    monkeypatch.setattr(spaces.states, "probe", lambda *args: probed.append(args) or "output")
    space_in(Store())
    ((probe, rounding),) = made
    assert rounding == "rounding" and probe() == ("live", "output") and probed == [("model", "live", "past")]


def test_names_of_spaces_over_many_changes(world: World) -> None:
    """As a plain list of what was named says it: of weights that go, all that is known of them goes."""
    draw = random.Random(3)
    store = Store()
    space = space_in(store)
    weights, known, told = "w1", set[str](), False
    before = "w1/s1"
    for _ in range(200):
        name = world.becomes(f"w{draw.choice([1, 1, 1, 2])}", f"s{draw.randrange(3)}")
        asks = draw.random() < 0.5
        now, changed = space.now(told=asks)
        assert now == f"{name.weights}/{name.settings}"
        assert changed is (told or now != before)
        gone = known - {now} if name.weights != weights else set()
        assert set(store.dropped) == gone
        known = {now} if name.weights != weights else known | {now}
        weights, before, told = name.weights, now, changed and not asks
        store.dropped.clear()
