"""Multimodal classes built on supported text models: text is reused, images run uncached with one warning."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from matrix import POLICY
from tiny_families import DELTA, FAMILIES, PLAIN
from tiny_models import random_ids

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.tools.random_weights import draw_weights


IMAGE = 120
QWEN_VISION = {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 16}


def qwen() -> Any:
    config = transformers.Qwen3_5Config(
        text_config={**PLAIN, **DELTA},
        vision_config={**SMALL, **QWEN_VISION, "temporal_patch_size": 1, "num_position_embeddings": 64},
        image_token_id=IMAGE,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
        tie_word_embeddings=False,
    )
    return draw_weights(transformers.Qwen3_5ForConditionalGeneration(config))


def gemma() -> Any:
    config = transformers.Gemma3Config(
        text_config=dict(FAMILIES["Gemma3"].config),
        vision_config={**SMALL, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=122,
        eoi_token_index=123,
        tie_word_embeddings=False,
    )
    return draw_weights(transformers.Gemma3ForConditionalGeneration(config), embedding_scale=0.125)


CASES = {
    "Qwen3.5": (qwen, 64, "mm_token_type_ids", {"pixel_values": (16, 48), "image_grid_thw": [[1, 4, 4]]}),
    "Gemma3": (gemma, 16, "token_type_ids", {"pixel_values": (1, 3, 16, 16)}),
}


class Case:
    """A multimodal model with prompts of text and with an image."""

    def __init__(self, label: str) -> None:
        make, self.step, self.types, self.media = CASES[label]
        self.model = make().eval()
        self.model.generation_config.eos_token_id = None

    def text(self, seed: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.cat([random_ids(2 * self.step + 5, seed=1), random_ids(20, seed=seed)], dim=1)}

    def typed(self, seed: int) -> dict[str, torch.Tensor]:
        """What a processor makes of text."""
        ids = self.text(seed)["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), self.types: torch.zeros_like(ids)}

    def image(self, seed: int) -> dict[str, torch.Tensor]:
        image = torch.tensor([[122, *[IMAGE] * 4, 123]])
        ids = torch.cat([self.text(seed)["input_ids"], image, random_ids(9, seed=8)], dim=1)
        torch.manual_seed(seed)
        media = {
            name: torch.randn(shape) if isinstance(shape, tuple) else torch.tensor(shape)
            for name, shape in self.media.items()
        }
        return {"input_ids": ids, self.types: (ids == IMAGE).long(), **media}

    def logits(self, **inputs: Any) -> torch.Tensor:
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        found = self.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        return torch.stack(found.logits)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield Case(request.param)


def test_text_is_reused_and_images_are_not(case: Case) -> None:
    with SparsePrefixCache(case.model, grid=case.step, policy=POLICY, exactness="bitwise") as cache:
        case.logits(**case.text(2), past_key_values=cache)
        for inputs in (case.text(3), case.typed(4)):
            expected = case.logits(**inputs)
            torch.testing.assert_close(case.logits(**inputs, past_key_values=cache), expected, rtol=0, atol=1e-4)
            assert cache.last_request.resumed_tokens == 2 * case.step
        for seed in (3, 5):
            expected = case.logits(**case.image(seed))
            assert torch.equal(case.logits(**case.image(seed), past_key_values=cache), expected)
            assert cache.last_request.resumed_tokens == 0
            assert "images" in cache.last_request.reason
        expected = case.logits(**case.text(6))  # an image before it leaves nothing behind
        torch.testing.assert_close(case.logits(**case.text(6), past_key_values=cache), expected, rtol=0, atol=1e-4)
        assert cache.last_request.resumed_tokens == 2 * case.step


def test_an_image_changes_the_reply(case: Case) -> None:
    """Otherwise the test above would prove nothing."""
    assert not torch.allclose(
        case.logits(**case.image(3)), case.logits(**case.image(3) | {"pixel_values": case.image(4)["pixel_values"]})
    )
