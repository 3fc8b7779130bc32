"""What a call asks for, by itself: prompts, masks, positions, ids, and why a prefill would not be reused."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_sparse_cache.models import inputs
from hf_sparse_cache.models.inputs import Prompts, Row, as_ids, check_ids, unpadded_rows, why_uncached


EVALUATED = SimpleNamespace(training=False)
IDS = torch.arange(3, 9).reshape(2, 3)


def why(model: Any = EVALUATED, config: Any = None, ids: torch.Tensor = IDS, **kwargs: Any) -> str:
    return why_uncached(model, Prompts.of(ids, kwargs), config, kwargs)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_hold_what_the_call_gave() -> None:
    bare = Prompts.of(IDS, {"attention_mask": None, "position_ids": [1, 2]})
    assert bare.ids is IDS and torch.equal(bare.read, IDS) and bare.mask is None and bare.positions is None
    mask, positions = torch.tensor([[0, 7, -1], [1, 1, 1]]), torch.arange(6).reshape(1, 2, 3)
    both = Prompts.of(IDS, {"attention_mask": mask, "position_ids": positions})
    assert torch.equal(both.mask, torch.tensor([[False, True, True], [True] * 3]))
    assert torch.equal(both.positions, positions)
    only = Prompts.of(IDS, {"position_ids": positions})
    assert only.mask is None and torch.equal(only.positions, positions)


def test_what_lies_on_one_accelerator_comes_over_in_one_piece_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device stands in for an accelerator: tensors that say they are on it, and count how often they are copied."""
    copies: list[int] = []

    class There(torch.Tensor):
        device = torch.device("meta")

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            copies.append(self.numel())
            return self.as_subclass(torch.Tensor)

    parts = [torch.arange(6).reshape(2, 3), torch.tensor([[True, False]]), torch.arange(4, dtype=torch.int32)]
    found = inputs._fetched([part.as_subclass(There) for part in parts])
    assert copies == [12]
    for part, copy in zip(parts, found, strict=True):
        assert copy.shape == part.shape and torch.equal(copy.long(), part.long())

    class Elsewhere(There):
        device = torch.device("cpu")

    copies.clear()
    assert torch.equal(inputs._fetched([parts[0].as_subclass(There), parts[2].as_subclass(Elsewhere)])[1], parts[2])
    assert copies == [6, 4]
    copies.clear()
    inputs._fetched([part.as_subclass(Elsewhere) for part in parts])
    assert copies == [6, 2, 4]


# -- why a prefill would not be reused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"inputs_embeds": None},
        {"use_cache": True, "logits_to_keep": 1, "tokenizer": object(), "assistant_tokenizer": object()},
        {"past_key_values": object(), "cache_params": object(), "cache": object()},
        {"pixel_values": None, "image_sizes": [], "video_x": (), "audio_lengths": False, "input_features": {}},
        {"mm_encoder_outputs": {"a": None, "b": {"c": []}}},
        {"output_hidden_states": False, "anything": None, "a_list": []},
        {"token_type_ids": torch.zeros(2, 3, dtype=torch.long), "mm_token_type_ids": torch.zeros(2, 3)},
        {"attention_mask": torch.ones(2, 3), "position_ids": torch.arange(3).expand(2, 3)},
        {"position_ids": torch.arange(3).expand(3, 2, 3)},
    ],
)
def test_what_leaves_a_prefill_as_it_is(kwargs: dict[str, Any]) -> None:
    assert why(**kwargs) == ""


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"inputs_embeds": torch.zeros(1)}, "inputs_embeds has no tokens to match"),
        ({"pixel_values": 1}, "pixel_values: a prompt with images, video or audio is not only its tokens"),
        ({"image_sizes": [1]}, "image_sizes: a prompt with images"),
        ({"mm_encoder_outputs": {"a": None, "b": {"c": [1]}}}, "mm_encoder_outputs: a prompt with images"),
        ({"plain": None, "audio_x": torch.zeros(1)}, "audio_x: a prompt with images"),
        ({"odd": 3, "video_x": 1}, "video_x: a prompt with images"),  # the plainer reason of the two
        ({"output_hidden_states": True}, "output_hidden_states changes what the prefill computes"),
        ({"odd": 0}, "odd changes what the prefill computes"),
        ({"odd": {"a": [], "b": 1}}, "odd changes"),
        ({"use_cache": True, "odd": torch.zeros(0)}, "odd changes"),
        ({"token_type_ids": torch.tensor([[0, 1, 0]])}, "token_type_ids changes"),
        ({"token_type_ids": [0, 0]}, "token_type_ids changes"),
        ({"zeros": torch.zeros(2)}, "zeros changes"),
        ({"token_type_ids": torch.zeros(2), "odd": 1}, "odd changes"),
        ({"logits_to_keep": 2}, "logits_to_keep asks for the logits of skipped tokens"),
        ({"logits_to_keep": 0}, "logits_to_keep asks for the logits of skipped tokens"),
        ({"logits_to_keep": torch.tensor([1])}, "logits_to_keep asks for the logits of skipped tokens"),
        ({"logits_to_keep": None}, "logits_to_keep asks for the logits of skipped tokens"),
        ({"position_ids": torch.arange(1, 4).expand(2, 3)}, "position_ids do not count the tokens from 0"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "attention_mask leaves out tokens inside a prompt"),
    ],
)
def test_what_a_prefill_cannot_reuse_is_named(kwargs: dict[str, Any], said: str) -> None:
    assert why(**kwargs).startswith(said)


def test_models_that_train_and_assistants_are_named() -> None:
    assert why(SimpleNamespace(training=True)) == "the model is in training mode"
    assert why(config=SimpleNamespace(is_assistant=True)) == "an assistant model rolls its cache back"
    assert why(config=SimpleNamespace(is_assistant=False)) == why(config=SimpleNamespace()) == ""


def test_holes_in_masks() -> None:
    """As a plain look at each row says it: a token that counts, then one that does not, and the last one counts."""
    draw = random.Random(1)
    seen = set()
    for _ in range(300):
        width = draw.randrange(1, 6)
        rows = [[int(draw.random() < 0.7) for _ in range(width)] for _ in range(draw.randrange(1, 3))]
        expected = any(row[-1] and 0 in row[row.index(1) :] for row in rows)
        seen.add(expected)
        assert inputs._has_holes(torch.tensor(rows)) is expected, rows
    assert seen == {True, False} and inputs._has_holes(None) is False


def test_positions_that_count_the_tokens_that_there_are() -> None:
    draw = random.Random(2)
    seen = set()
    for _ in range(300):
        width, masked = draw.randrange(1, 5), draw.random() < 0.7
        mask = [[int(not masked or draw.random() < 0.6) for _ in range(width)] for _ in range(2)]
        right = [[sum(row[: at + 1]) - 1 if row[at] else draw.randrange(9) for at in range(width)] for row in mask]
        row, at = draw.randrange(2), draw.randrange(width)
        off = draw.choice([0, 0, 1, -1])
        given = [list(each) for each in right]
        given[row][at] += off
        expected = off == 0 or not mask[row][at]
        seen.add(expected)
        dims = draw.choice([(), (1,), (3,)])
        positions = torch.tensor(given).expand(*dims, 2, width)
        prompts = Prompts(IDS, torch.zeros(2, width), torch.tensor(mask) != 0 if masked else None, positions)
        assert inputs._positions_are_plain(prompts) is expected
    assert seen == {True, False}
    assert inputs._positions_are_plain(Prompts(IDS, IDS)) is True


# -- rows and ids -----------------------------------------------------------------------------------------------------


def test_rows_without_their_padding() -> None:
    ids = torch.arange(1, 13).reshape(3, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    assert [row.tolist() for row in unpadded_rows(ids, mask)] == [[3, 4], [5, 6, 7, 8], [12]]
    assert [row.tolist() for row in unpadded_rows(ids, None)] == ids.tolist()


@pytest.mark.parametrize("row", [[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]])
def test_a_row_that_is_not_padded_on_the_left_is_named(row: list[int]) -> None:
    with pytest.raises(ValueError, match="^attention_mask row 1 is not left-padded"):
        unpadded_rows(torch.ones(2, 4), torch.tensor([[0, 1, 1, 1], row]))


def test_ids_that_a_model_has_no_embedding_for_are_named() -> None:
    check_ids(torch.tensor([[0, 9]]), 10)
    check_ids(torch.tensor([[3, 4]]), 10)
    for high in (10, 12):
        with pytest.raises(ValueError, match=rf"^prompts contains {high}, outside the model's vocabulary 0\.\.9\."):
            check_ids(torch.tensor([[0, high]]), 10, "prompts")
    with pytest.raises(ValueError, match="contains -1"):
        check_ids(torch.tensor([[-1, 3]]), 10)
    with pytest.raises(ValueError, match=r"^input_ids contains -1, outside the model's vocabulary 0\.\.9\."):
        check_ids(torch.tensor([[-1, 10]]), 10)


def test_a_row_is_as_long_as_its_tokens_and_alone_in_its_batch() -> None:
    one, several = Row(torch.arange(5)), Row(torch.zeros(3, 7))
    assert (len(one), one.batch.shape, one.tail, one.reader, one.read) == (5, (1, 5), 1, None, None)
    assert (len(several), several.batch.shape) == (7, (3, 7))
    assert one.kwargs == {} and one.position_dims == ()


def test_where_a_model_takes_its_ids() -> None:
    def placed(**hook: Any) -> Any:
        embeddings = SimpleNamespace(**hook)
        return SimpleNamespace(device=torch.device("cpu"), get_input_embeddings=lambda: embeddings)

    assert inputs.input_device(placed()) == torch.device("cpu")
    assert inputs.input_device(placed(_hf_hook=SimpleNamespace())) == torch.device("cpu")
    assert inputs.input_device(placed(_hf_hook=SimpleNamespace(execution_device=None))) == torch.device("cpu")
    assert inputs.input_device(placed(_hf_hook=SimpleNamespace(execution_device="meta"))) == torch.device("meta")


@pytest.mark.parametrize("given", [[3, 4], [[3, 4]], torch.tensor([3, 4]), torch.tensor([[3, 4]], dtype=torch.uint8)])
def test_one_prompt_in_any_shape(given: Any) -> None:
    found = as_ids(given, None)
    assert found.shape == (1, 2) and found.tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.tensor(3), r"shape \(\); give"),
        (torch.zeros(2, 3, dtype=torch.long), r"shape \(2, 3\); give"),
        (torch.zeros(1, 0, dtype=torch.long), r"shape \(1, 0\); give"),
        (torch.zeros(0, dtype=torch.long), r"shape \(0,\); give"),
        (torch.zeros(0, 3, dtype=torch.long), r"shape \(0, 3\); give"),
        (torch.zeros(1, 1, 3, dtype=torch.long), r"shape \(1, 1, 3\); give"),
        (torch.zeros(3), r"torch\.float32; give integer"),
        (torch.zeros(3, dtype=torch.complex64), r"torch\.complex64; give integer"),
        (torch.zeros(3, dtype=torch.bool), r"torch\.bool; give integer"),
    ],
)
def test_what_is_no_prompt_is_named(given: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^where holds a tensor of {said}"):
        as_ids(given, None, "where")


@pytest.mark.parametrize("given", [object(), [[1], [2, 3]], ["a"], [2**70], None, {}])
def test_what_no_tensor_can_be_made_of_is_named(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^where is .*; give token ids of shape \(length,\) or \(1, length\)\.$"):
        as_ids(given, None, "where")


def test_a_string_is_read_by_the_tokenizer() -> None:
    def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    assert as_ids("ab", tokenizer).tolist() == [[97, 98]]
    with pytest.raises(ValueError, match="^where holds a string, but there is no tokenizer"):
        as_ids("ab", None, "where")
    with pytest.raises(ValueError, match="^where is .* half of a surrogate pair"):
        as_ids("a\ud800", tokenizer, "where")
    with pytest.raises(ValueError, match=r"shape \(1, 0\)"):
        as_ids("", tokenizer)
