"""The tiny models can make a check of exactness fail: they depend on their states, and never change by themselves."""

import pytest
import torch
from tiny_families import FAMILIES
from tiny_models import available_families, build, carried_states, prefill, random_ids, state_sensitivity


CARRYING = [name for name in available_families() if FAMILIES[name].state != "none"]
CONVOLVING = [name for name in CARRYING if name not in ("MiniMax", "xLSTM")]


@pytest.mark.parametrize("name", available_families())
def test_same_seed_same_model(name):
    first, again, other = build(name), build(name), build(name, seed=1)
    ids = random_ids(24)
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, again(input_ids=ids).logits)
        assert not torch.allclose(first(input_ids=ids).logits, other(input_ids=ids).logits)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    build("Mamba")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", available_families())
def test_logits_are_near_unit_scale(name):
    model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        deviation = model(input_ids=random_ids(96)).logits.std()
    assert 0.3 < deviation < 2.0


@pytest.mark.parametrize("name", CARRYING)
def test_logits_depend_on_the_recurrent_state(name):
    kind = "conv" if FAMILIES[name].state == "conv" else "recurrent"
    assert state_sensitivity(build(name), kind) > 0.2


@pytest.mark.parametrize("name", CONVOLVING)
def test_logits_depend_on_the_convolution_state(name):
    assert state_sensitivity(build(name), "conv") > 0.2


@pytest.mark.parametrize("name", [name for name in CARRYING if FAMILIES[name].state == "recurrent" and name != "Zaya"])
def test_a_state_neither_vanishes_nor_explodes(name):
    """The first recurrent state after 96 tokens still knows the first 32. (Zaya's is one token by design.)"""
    model, ids = build(name), random_ids(96)
    changed = torch.cat([random_ids(32, seed=1), ids[:, 32:]], dim=1)
    states = [next(carried_states(model, prefill(model, prompt)[1], "recurrent")).clone() for prompt in (ids, changed)]
    assert (states[0] - states[1]).norm() > 0.02 * states[0].norm()
    assert states[0].abs().max() < 100


@pytest.mark.parametrize("name", available_families())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_dtype_runs_with_the_same_weights(name, dtype):
    if dtype == torch.float64 and not FAMILIES[name].float64:
        pytest.skip(f"transformers does not run {name} in float64")
    exact, cast = build(name), build(name, dtype=dtype)
    for key, value in exact.state_dict().items():
        converted = cast.state_dict()[key]
        assert converted.dtype in (dtype, torch.float32, torch.int64)
        assert torch.equal(value.to(converted.dtype), converted), key
    with torch.no_grad():
        assert torch.isfinite(cast(input_ids=random_ids(24)).logits).all()


def test_unknown_family_is_named():
    with pytest.raises(ValueError, match="Mamba3.*Jamba"):
        build("Mamba3")
