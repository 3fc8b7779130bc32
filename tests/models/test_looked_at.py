"""What is looked at beside a forward: its inputs, what layers hold, values of weights, rotary lengths, costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from handmade import empty, feed

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.models import layout as layouts
from hf_sparse_cache.models import lazy_kv, rope, samples, states, watch
from hf_sparse_cache.models.cost import prefill_cost
from hf_sparse_cache.models.deviation import INT8, UNKNOWN, Deviation
from hf_sparse_cache.models.layout import Layout
from hf_sparse_cache.models.rounding import EXACT, PARTS, Rounding, rounding_of
from hf_sparse_cache.models.samples import Samples, checksum
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.models.weights import identity


# -- the inputs of a segment ------------------------------------------------------------------------------------------

LIVE: Any = object()
IDS = torch.arange(5)[None]


def refused(inputs: dict[str, Any], replaced: bool = False, asked: Any = None) -> str:
    """Why inputs are not what was asked for; "" where they are."""
    model = SimpleNamespace(**{"prepare_inputs_for_generation": None} if replaced else {})
    try:
        watch.check_inputs(model, {"cache": LIVE, **inputs}, {"input_ids": IDS} if asked is None else asked, LIVE)
    except watch.ChangedPrefillError as error:
        return str(error).removeprefix("prepare_inputs_for_generation ")
    return ""


@pytest.mark.parametrize("replaced", [False, True])
def test_inputs_are_those_that_were_asked_for(replaced: bool) -> None:
    assert refused({"input_ids": IDS.clone(), "inputs_embeds": None, "use_cache": True}, replaced) == ""
    assert refused({"input_ids": IDS[None]}, replaced) == ""  # as positions of several kinds
    assert refused({"input_ids": IDS, "inputs_embeds": IDS}, replaced) == "puts embeddings in the place of tokens"
    other = "puts another cache in the place of the request's own"
    assert refused({"input_ids": IDS, "cache": object()}, replaced) == other
    wrong: list[Any] = [None, 3, IDS[:, 1:], IDS.flip(-1), IDS + 1]
    for found in wrong:
        assert refused({"input_ids": found}, replaced) == "changes input_ids"
    assert refused({}, replaced) == "changes input_ids"
    more = {"input_ids": IDS, "note": 3, "mask": torch.ones(1, 5)}
    assert refused(more, replaced) == ("adds mask" if replaced else "")
    asked = {"input_ids": IDS, "position_ids": IDS}
    assert refused({"input_ids": IDS, "position_ids": IDS + 1}, replaced, asked) == "changes position_ids"
    assert refused({"input_ids": IDS, "position_ids": IDS}, replaced, asked) == ""


def test_values_on_an_accelerator_are_compared_only_where_somebody_replaced_the_method() -> None:
    far = IDS.to("meta")
    assert refused({"input_ids": far}, False, {"input_ids": far}) == ""
    assert refused({"input_ids": far[:, 1:]}, False, {"input_ids": far}) == "changes input_ids"
    with pytest.raises((NotImplementedError, RuntimeError)):
        refused({"input_ids": far}, True, {"input_ids": far})


def test_layers_hold_the_tokens_that_were_computed() -> None:
    cache = feed(empty(), 9)
    watch.check_filled(cache, 9)
    for tokens in (8, 10):
        with pytest.raises(watch.ChangedPrefillError, match=f"^layer 1 holds keys of 9 tokens where {tokens} are due"):
            watch.check_filled(cache, tokens)
    cache.layers[5].cumulative_length = 3
    with pytest.raises(watch.ChangedPrefillError, match="layer 5 holds a window of 3 tokens where 9 are due"):
        watch.check_filled(cache, 9)


# -- values of weights ------------------------------------------------------------------------------------------------


def test_every_value_of_a_small_tensor_is_in_the_sample_and_one_a_stretch_of_a_large_one() -> None:
    assert samples._places(2048, 7).tolist() == list(range(2048))
    for rows, width in ((2049, 1), (3000, 3), (64, 1000), (3, 5001), (1, 9000), (2048, 5), (300, 7)):
        places = samples._places(rows * width, width)
        each = max(1, min(width, -(-2048 // rows)))
        stretches = [width * index // each for index in range(each + 1)]
        assert len(set(places.tolist())) == len(places) == rows * each
        for row in {0, rows // 2, rows - 1}:
            columns = [place - row * width for place in places[row * each : (row + 1) * each]]
            assert all(
                low <= column < high for low, column, high in zip(stretches, columns, stretches[1:], strict=False)
            )
    columns = samples._places(64 * 5000, 5000).reshape(64, 32) % 5000
    assert len({tuple(row) for row in columns.tolist()}) == 64  # another one in every row


def test_shares_of_the_sample_come_by_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once where the weights are small; in as many looks as there are shares where they are not."""
    monkeypatch.setattr(samples, "_PORTION", 10)
    own = Samples._holds
    for limit, most, looks in (
        (10**6, 128, 1),
        (100 * 4 - 1, 128, 3),
        (100 * 4, 128, 1),
        (10**6, 4, 3),
        (10**6, 3, 4),
    ):
        monkeypatch.setattr(samples, "_CACHED_BYTES", limit)
        monkeypatch.setattr(samples, "_PORTIONS", most)
        for edited in range(0, 100, 7):
            for look in range(looks):
                value = torch.zeros(100)
                kept = Samples([value, torch.zeros(3, device="meta")])
                assert all(kept.hold() for _ in range(look))
                value[edited] = 1
                assert not kept.all_hold()
                assert not min([kept.hold() for _ in range(looks)])
        looked: list[int] = []
        monkeypatch.setattr(Samples, "_holds", lambda self, index, looked=looked: looked.append(index) or True)
        kept = Samples([torch.zeros(100)])
        for look in range(2):
            assert kept.hold() and len(looked) == -(-10 // looks) * (look + 1)
        monkeypatch.setattr(Samples, "_holds", own)
    nothing = Samples([])
    assert nothing.hold() and nothing.hold() and nothing.all_hold()


def test_every_value_of_a_line_is_in_the_sample_and_of_a_row_some() -> None:
    for shape, count in (((5000,), 5000), ((100, 1000), 2100), ((4, 25, 1000), 2100), ((5000, 1), 5000), ((9,), 9)):
        value = torch.zeros(shape)
        portions = [places for _, places, _ in Samples([value])._portions]
        where, width = np.concatenate(portions), shape[-1] if len(shape) > 1 else 1
        assert len(where) == len(set(where.tolist())) == count and max(map(len, portions)) <= 8192
        assert len(set((where // width).tolist())) == value.numel() // width  # none is left out


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_values_are_not_sampled_and_all_of_them_count() -> None:
    value, other = (torch.quantize_per_tensor(torch.tensor([1.0, last]), 1.0, 0, torch.qint8) for last in (2.0, 3.0))
    assert samples._flat(value) is None and Samples([value, other]).all_hold()
    assert checksum(value) == checksum(value.clone()) != checksum(other)


def test_only_plain_values_in_main_memory_are_sampled() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool):
        value = torch.zeros(3, 4).to(dtype)
        flat = samples._flat(value)
        assert flat.shape == (12,) and flat.itemsize == value.element_size() and not flat.any()
        assert flat.ctypes.data == value.data_ptr()
    assert samples._flat(torch.ones(2, requires_grad=True)).shape == (2,)
    odd = [torch.ones(2, device="meta"), torch.ones(2, 3).T, torch.ones(0), torch.ones(2).to_sparse()]
    odd += [torch.ones(2, dtype=torch.complex128)]
    assert all(samples._flat(value) is None for value in odd)


def test_a_checksum_is_of_every_bit() -> None:
    """Of whole words, in one step or several, and of what is left behind them."""
    for count in (0, 1, 7, 8, 9, 40, 72, 73, 90, 200):
        value = torch.arange(count, dtype=torch.uint8)
        for place in range(count):
            for bit in (1, 128):
                other = value.clone()
                other[place] ^= bit
                assert checksum(other) != checksum(value)
    value = torch.arange(36.0).reshape(6, 6)
    assert checksum(value) == checksum(value.T.contiguous().T) and checksum(value).startswith("torch.float32(6, 6)")
    assert checksum(value) != checksum(value.reshape(36)) and checksum(value) != checksum(value.int())
    assert not torch.is_grad_enabled() or checksum(torch.ones(3, requires_grad=True)) == checksum(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("words", [64, 1 << 17])
def test_a_checksum_is_of_every_sign(dtype: torch.dtype, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of single values, of lines, and of rectangles: a top bit was 2^63 in two sums, and so nothing."""
    monkeypatch.setattr(samples, "_WORDS", words)
    value = torch.randint(1, 128, (32, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    found = {checksum(value)}
    edits: list[Any] = [(row, slice(column, column + 1)) for row in range(32) for column in range(32)]
    for line in range(32):
        edits += [
            (line, slice(None)),
            (slice(None), line),
            (line, slice(1, None, 2)),
            (line, [3, 5]),
            ([2, 7, 9], line),
        ]
    edits += [(slice(row, row + 2), slice(row + 1, None, 2)) for row in range(30)]
    edits += [(slice(None), slice(column, column + 2)) for column in range(31)]
    for edit in edits:
        other = value.clone()
        other[edit] = -other[edit] if dtype.is_floating_point else other[edit] ^ -128
        found.add(checksum(other))
    assert len(found) == 1 + len(edits)


# -- rotary positions -------------------------------------------------------------------------------------------------


def rotary(kinds: Any, parameters: Any = None, **more: Any) -> Any:
    module = torch.nn.Module()
    module.rope_type = kinds
    module.config = SimpleNamespace(max_position_embeddings=512, rope_parameters=parameters)
    for name, value in more.items():
        setattr(module, name, value)
    return module


ROTARY: list[tuple[Any, int]] = [
    (rotary("default"), 0),
    (rotary("dynamic"), 512),
    (rotary("dynamic", {"original_max_position_embeddings": 128}), 128),
    (rotary("dynamic", {}, original_max_seq_len=100), 100),
    (rotary("dynamic", {"original_max_position_embeddings": 64}, original_max_seq_len=100), 64),
    (rotary("longrope"), 513),
    (rotary("longrope", {"original_max_position_embeddings": 128}), 129),
    (rotary("longrope", {"original_max_position_embeddings": 33}), 34),
    (rotary({"full": "longrope", "other": "default"}, {"full": {"original_max_position_embeddings": 32}}), 33),
    (rotary({"full": "longrope", "other": "dynamic"}, {"full": {}, "other": {}}), 512),
    (torch.nn.Linear(2, 2), 0),
]


@pytest.mark.parametrize(("module", "limit"), ROTARY, ids=range(len(ROTARY)))
def test_the_first_length_that_matters_is_that_of_the_strictest(module: Any, limit: int) -> None:
    whole = torch.nn.Sequential(module)
    assert rope.length_limit(whole) == identity(whole).length_limit == limit
    assert rope.length_limit(torch.nn.ModuleList([module, rotary("longrope", None, original_max_seq_len=20)])) in (
        21,
        limit,
    )
    for name in ("inv_freq", "full_inv_freq", "max_seq_len_cached", "attention_scaling"):
        assert rope.set_by_forward(module, name) is bool(limit)
    assert rope.set_by_forward(module, "rope_deltas") is True and rope.set_by_forward(module, "weight") is False


def test_what_a_long_prompt_left_is_taken_back() -> None:
    for prefix, kinds in (("", "dynamic"), ("full_", {"full": "dynamic", "other": "default"})):
        module = rotary(kinds, None, original_max_seq_len=7)
        module.register_buffer(f"{prefix}inv_freq", torch.zeros(3), persistent=False)
        setattr(module, f"{prefix}original_inv_freq", torch.ones(3))
        setattr(module, f"{prefix}max_seq_len_cached", 99)
        rope.as_loaded(torch.nn.Sequential(module))
        assert torch.equal(getattr(module, f"{prefix}inv_freq"), torch.ones(3)) and not module.state_dict()
        assert getattr(module, f"{prefix}max_seq_len_cached") == 7
    long = rotary("longrope")
    rope.as_loaded(long)
    assert not hasattr(long, "max_seq_len_cached") and not dict(long.named_buffers())


# -- costs and deviations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "channels"),
    [({"num_attention_heads": 4, "head_dim": 5, "hidden_size": 12}, 20),
     ({"num_attention_heads": 4, "hidden_size": 12}, 12),
     ({"num_attention_heads": 4, "head_dim": None, "hidden_size": 12}, 12), ({"hidden_size": 12}, 0),
     ({"num_attention_heads": None, "head_dim": 5}, 0), ({"num_attention_heads": 1}, 0)],
    ids=str,
)  # fmt: skip
def test_a_prefill_costs_its_tokens_and_their_pairs(config: dict[str, Any], channels: int) -> None:
    asked: list[Any] = []
    shape = SimpleNamespace(**config)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda decoder: asked.append(decoder) or shape),
        parameters=lambda: [torch.ones(3, 5), torch.ones(25)],
    )
    found = prefill_cost(model, 2)(np.array([0, 1, 10]))
    curvature = 2 * channels / 40
    assert found.dtype == np.float64 and found.tolist() == pytest.approx([0, 1 + curvature, 10 + 100 * curvature])
    assert asked == [True]
    model.parameters = list
    assert prefill_cost(model, 1)(np.array([2.0])).tolist() == [2.0 + channels * 4]


def test_a_family_says_which_storage_moves_it_too_far() -> None:
    for parts, half in (((), 0.0), ((), 0.24), (("conv",), 0.0), (("conv",), 0.24)):
        one = Deviation(parts, 0.5, half)
        assert one.shortcoming("F", "exact") == ""
        said = one.shortcoming("F", "bf16")
        assert bool(said) is bool(half) and (not said or ("'exact'" in said and "F by up to 0.24" in said))
        said = one.shortcoming("F", "int8")
        assert bool(said) is not bool(parts)
        assert not said or ("F by up to 0.5" in said and f"use storage={'exact' if half else 'bf16'!r}" in said)
    assert Deviation((), 1.0) == Deviation((), 1.0, 0.0) and UNKNOWN.shortcoming("F", "int8")
    assert not UNKNOWN.shortcoming("F", "bf16") and all(set(one.parts) <= set(PARTS) for one in INT8.values())


# -- layouts ----------------------------------------------------------------------------------------------------------


def layout_of(rounding: Rounding, *kinds: str) -> tuple[Layout, list[int]]:
    """Of layers made by hand; and how often they were probed."""
    asked: list[int] = []

    def probe() -> tuple[Any, Any]:
        asked.append(1)
        return feed(empty(*kinds), 2), SimpleNamespace(logits=torch.zeros(1, 2, 50))

    return Layout(probe, rounding), asked


@pytest.mark.parametrize("rounding", [EXACT, rounding_of("int8")], ids=lambda each: each.name)
@pytest.mark.parametrize("tokens", [1, 3, 5, 6, 20])
def test_a_layout_knows_the_states_of_every_length(rounding: Rounding, tokens: int) -> None:
    layout, asked = layout_of(rounding)
    assert not asked
    cache = feed(empty(), tokens)
    state, kv = states.capture_state(cache, rounding), states.capture_kv(cache, 0, tokens, rounding)
    last = states.with_logits(state, torch.zeros(1, tokens, 50))
    held = sum(value.nbytes for value in state.tensors())
    assert layout.state_bytes(tokens) == held and layout.state_bytes(tokens, final=True) == held + 200
    assert layout.kv_bytes(3, 3 + tokens) == sum(value.nbytes for value in kv.tensors()) and layout.has_kv is True
    layout.check_state(state, tokens), layout.check_state(last, tokens, final=True), layout.check_kv(kv, 0, tokens)
    for wrong, final in ((state, True), (last, False)):
        with pytest.raises(DamagedFileError, match=r"^it has \d layers, the model has \d"):
            layout.check_state(wrong, tokens, final=final)
    for beside in (tokens - 1, tokens + 1):
        with pytest.raises(DamagedFileError):
            layout.check_state(state, beside)
        with pytest.raises(DamagedFileError, match="of shape"):
            layout.check_kv(kv, 0, beside)
    assert asked == [1] and layout_of(rounding, "linear", "window")[0].has_kv is False


def test_it_is_measured_for_whatever_is_asked_first() -> None:
    cache = feed(empty("full", "window"), 3)
    state, kv = states.capture_state(cache), states.capture_kv(cache, 0, 3)
    asked: list[Any] = [
        lambda layout: layout.has_kv is True, lambda layout: layout.kv_bytes(0, 3) == 3 * layout.kv_bytes(2, 3) > 0,
        lambda layout: layout.state_bytes(3) > 0, lambda layout: layout.check_state(state, 3) is None,
        lambda layout: layout.check_kv(kv, 0, 3) is None,
    ]  # fmt: skip
    for question in asked:
        layout, probes = layout_of(EXACT, "full", "window")
        assert question(layout) and question(layout) and probes == [1]


def test_scales_of_a_state_that_lead_beyond_halves_are_no_state() -> None:
    rounding, cache = rounding_of("int8"), feed(empty("window"), 2)
    for name in ("keys", "values"):
        setattr(cache.layers[0], name, getattr(cache.layers[0], name).half())
    layout = Layout(lambda: (cache, SimpleNamespace(logits=torch.zeros(1, 2, 50))), rounding)
    state = states.capture_state(cache, rounding)
    layout.check_state(state, 2)
    (layer,) = state.layers
    layer["keys:scale"].fill_(255)
    with pytest.raises(DamagedFileError, match="^'keys:float16' of layer 0 stands for values that are not finite"):
        layout.check_state(LayerTensors((layer,)), 2)


def test_of_several_names_that_are_odd_the_first_is_said() -> None:
    layout, _ = layout_of(EXACT, "full", "window")
    full, window = states.capture_state(feed(empty("full", "window"), 3)).layers
    for change, said in (
        ({"b": 1, "a": 2, "c": 3}, "layer 1 has 'a'"), ({"keys": None, "values": None}, "layer 1 lacks 'keys'"),
        ({"seen": None, "a": 1}, "layer 1 has 'a'"), ({"keys": None, "z": 1}, "layer 1 lacks 'keys'"),
    ):  # fmt: skip
        layer = {name: value for name, value in {**window, **change}.items() if value is not None}
        with pytest.raises(DamagedFileError, match=f"^{said}$"):
            layout.check_state(LayerTensors((full, layer)), 3)
    for devices in (("cpu",), ("cpu", "cpu", "cpu"), ("cpu", "cuda:0")):
        with pytest.raises(DamagedFileError, match=r"not from where the model's are, which is \('cpu', 'cpu'\)"):
            layout.check_state(LayerTensors((full, window), devices), 3)
    layout.check_state(LayerTensors((full, window), ("cpu", "cpu")), 3)
    for value, said in ((3, "is no tensor"), (window["values"] / 0, "has values that are not finite")):
        with pytest.raises(DamagedFileError, match=f"^'values' of layer 1 {said}$"):
            layout.check_state(LayerTensors((full, {**window, "values": value})), 3)
    for wrong in (window["keys"].double(), window["keys"][..., :-1]):
        with pytest.raises(
            DamagedFileError, match="^'keys' of layer 1 is .* of shape .*, and must be torch.float32 of"
        ):
            layout.check_state(LayerTensors((full, {**window, "keys": wrong})), 3)
    assert layouts._finite(torch.empty(0))


def test_what_counts_tokens_is_a_whole_number_that_does() -> None:
    layout, _ = layout_of(EXACT, "window")
    (layer,) = states.capture_state(feed(empty("window"), 3)).layers
    layout.check_state(LayerTensors((layer,)), 3)
    for seen in (2, 4, 3.0, "3", True, None):
        with pytest.raises(DamagedFileError, match=r"^'seen' of layer 0 is .*, and must be 3$"):
            layout.check_state(LayerTensors(({**layer, "seen": seen},)), 3)


def test_scales_that_lead_beyond_halves_are_no_state() -> None:
    rounding, cache = rounding_of("int8"), feed(empty("full"), 2)
    for name in ("keys", "values"):
        setattr(cache.layers[0], name, getattr(cache.layers[0], name).half())
    layout = Layout(lambda: (cache, SimpleNamespace(logits=torch.zeros(1, 2, 50))), rounding)
    kv = states.capture_kv(cache, 0, 2, rounding)
    layout.check_kv(kv, 0, 2)
    (layer,) = kv.layers
    layer["values:scale"].fill_(255)
    with pytest.raises(DamagedFileError, match="^'values:float16' of layer 0 stands for values that are not finite"):
        layout.check_kv(LayerTensors((layer,)), 0, 2)
    assert layouts._finite(torch.ones(2)) and not layouts._finite(torch.tensor([1.0, float("-inf")]))


# -- layers that wait -------------------------------------------------------------------------------------------------


def test_a_layer_that_waits_knows_only_what_it_waits_for() -> None:
    keys, values = torch.randn(2, 1, 2, 3, 16)
    (layer,) = empty("full").layers
    held = lazy_kv.waiting(layer, [keys], [values])
    told: list[str] = []
    held.ready = lambda: told.append("ready")
    with pytest.raises(AttributeError, match=r"'WaitingDynamicLayer' object has no attribute 'other'"):
        _ = held.other
    assert (
        held.get_seq_length() == 3 and told == [] and type(held) is type(lazy_kv.waiting(*[layer], [keys], [values]))
    )
    assert torch.equal(held.values, values) and told == ["ready"] and list(held.spans) == ["keys"]
    assert held.get_seq_length() == 3 and torch.equal(held.keys, keys) and held.spans == {}
    assert told == ["ready", "ready"] and held.get_seq_length() == 3 and type(held)._layer_type is None
    new = torch.randn(2, 1, 2, 1, 16)
    found = held.update(*new)
    assert torch.equal(found[0], torch.cat([keys, new[0]], -2)) and torch.equal(
        found[1], torch.cat([values, new[1]], -2)
    )
    unmade = type(held).__new__(type(held))
    with pytest.raises(AttributeError):
        _ = unmade.keys


@pytest.mark.parametrize("first", ["keys", "values"])
def test_a_layer_of_which_a_part_was_read_goes_on_with_all_of_it(first: str) -> None:
    parts, new = torch.randn(2, 2, 1, 2, 3, 16), torch.randn(2, 1, 2, 1, 16)
    (layer,) = empty("full").layers
    held = lazy_kv.waiting(layer, [*parts[0]], [*parts[1]])
    assert getattr(held, first).shape[-2] == 6
    found = held.update(*new)
    for value, part, last in zip(found, parts, new, strict=True):
        assert torch.equal(value, torch.cat([*part, last], -2))
    assert held.get_seq_length() == 7 and torch.equal(held.keys, found[0]) and torch.equal(held.values, found[1])
