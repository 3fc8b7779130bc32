"""Built-in models have the size their name says and depend on their states; the tokenizer is exact and repeatable."""

import pytest
import torch
from tiny_models import random_ids, state_sensitivity

from hf_sparse_cache.tools.builtin import SIZES, build_model, build_tokenizer, describe_model, parameter_count


SMALL = [name for name in SIZES if parameter_count(name) < 40e6]
TEXTS = [
    "A state is a summary of everything read so far.\n" * 20,
    "Größe, naïve, 数学, 🙂: every byte is a token.\n" * 5,
]


@pytest.mark.parametrize("name", SIZES)
def test_the_name_says_the_size(name):
    assert name.endswith(f"-{parameter_count(name) / 1e6:.0f}m")
    assert "random weights" in describe_model(name)


def test_there_is_a_small_one_of_every_family():
    assert {name.split("-")[0] for name in SMALL} == {"mamba", "jamba", "zamba2", "bamba", "qwen3.5"}


@pytest.mark.parametrize("name", SMALL)
def test_small_models_depend_on_their_states(name):
    model = build_model(name)
    assert model.num_parameters() == parameter_count(name)
    for kind in ("recurrent", "conv"):
        assert state_sensitivity(model, kind, prefix_tokens=48, steps=4) > 0.05


def test_same_seed_same_weights_in_every_dtype():
    first, cast, other = (
        build_model("mamba-21m"),
        build_model("mamba-21m", torch.bfloat16),
        build_model("mamba-21m", seed=1),
    )
    for key, value in first.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), cast.state_dict()[key]), key
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_generate_writes_as_many_tokens_as_asked():
    output = build_model("jamba-30m").generate(random_ids(8), max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 12)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="gpt-1m.*mamba-21m"):
        build_model("gpt-1m")


def test_tokenizer_encodes_any_text_and_back():
    tokenizer = build_tokenizer(TEXTS, vocab_size=400)
    text = "Something never seen: \t ключ 🚀\n"
    inputs = tokenizer(text, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    assert len(tokenizer) <= 400
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]


def test_tokenizer_is_repeatable_and_pads_on_the_left():
    tokenizer = build_tokenizer(TEXTS, vocab_size=400)
    assert tokenizer.get_vocab() == build_tokenizer(TEXTS, vocab_size=400).get_vocab()
    assert tokenizer(["a", "a longer text"], padding=True)["attention_mask"][0][0] == 0


def test_tokenizer_needs_room_for_every_byte():
    with pytest.raises(ValueError, match="vocab_size=100"):
        build_tokenizer(TEXTS, vocab_size=100)
