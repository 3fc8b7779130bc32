"""What a call to `generate()` asks for: its prompts, and whether their prefill can reuse a prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..checks import shown, text
from ..explain import TRAINING_MODE
from .families import CACHE_NAMES


# Keywords that do not change what a prefill computes, or are checked on their own.
_PLAIN = frozenset(
    {"use_cache", "logits_to_keep", "attention_mask", "position_ids", "tokenizer", "assistant_tokenizer", *CACHE_NAMES}
)

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_MEDIA = ("pixel_values", "image_", "video_", "audio_", "input_features", "mm_encoder_outputs")


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a call, and copies in main memory to plan by, so that the host waits for the device once.

    Attributes:
        ids: `(batch, width)`, left-padded, where the model has them.
        read: the same in main memory.
        mask: 0 where `read` is padding, `(batch, width)` in main memory; None where nothing is.
        positions: `(..., batch, width)` in main memory; None where the call gives none.
    """

    ids: torch.Tensor
    read: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    @classmethod
    def of(cls, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Prompts:
        """Those of a call with these keywords."""
        found = {"read": input_ids}
        for name, key in (("mask", "attention_mask"), ("positions", "position_ids")):
            if torch.is_tensor(kwargs.get(key)):
                found[name] = kwargs[key] != 0 if name == "mask" else kwargs[key]
        return cls(input_ids, **dict(zip(found, _fetched([*found.values()]), strict=True)))


def _fetched(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of integers in main memory, in one transfer where all of them are on one accelerator."""
    if len({tensor.device for tensor in tensors}) > 1 or tensors[0].device.type == "cpu":
        return [tensor.cpu() for tensor in tensors]
    line = torch.cat([tensor.reshape(-1).long() for tensor in tensors]).cpu()
    parts = line.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def why_uncached(model: Any, prompts: Prompts, generation_config: Any, kwargs: dict[str, Any]) -> str:
    """Why the prefill of this call cannot reuse a prefix, or an empty string when it can."""
    if kwargs.get("inputs_embeds") is not None:
        return "inputs_embeds has no tokens to match"
    if model.training:
        return TRAINING_MODE
    if getattr(generation_config, "is_assistant", False):
        return "an assistant model rolls its cache back"
    for name, value in kwargs.items():
        if name.startswith(_MEDIA) and not _is_empty(value):
            return f"{name}: a prompt with images, video or audio is not only its tokens"
    for name, value in kwargs.items():
        if name in _TOKEN_TYPES and torch.is_tensor(value) and not bool(value.any()):
            continue  # what a processor gives for text
        if name not in _PLAIN and not _is_empty(value):
            return f"{name} changes what the prefill computes, or asks for the outputs of every token"
    if not isinstance(kwargs.get("logits_to_keep", 1), int) or kwargs.get("logits_to_keep", 1) != 1:
        return "logits_to_keep asks for the logits of skipped tokens"
    if not _positions_are_plain(prompts):
        return "position_ids do not count the tokens from 0"
    if _has_holes(prompts.mask):
        return "attention_mask leaves out tokens inside a prompt (generate() makes such a mask from pad tokens in it)"
    return ""


def _is_empty(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_empty(inner) for inner in value.values())
    return value is None or value is False or (isinstance(value, (list, tuple)) and not value)


def _has_holes(attention_mask: torch.Tensor | None) -> bool:
    """Whether a row whose last token counts leaves out an earlier one; right-padding is refused elsewhere."""
    if attention_mask is None:
        return False
    kept = attention_mask != 0
    ends = kept[:, :-1] & ~kept[:, 1:]
    return bool((ends.any(-1) & kept[:, -1]).any())


def _positions_are_plain(prompts: Prompts) -> bool:
    """Whether every token's position is its index in its row."""
    if prompts.positions is None:
        return True
    mask = torch.ones_like(prompts.read) if prompts.mask is None else prompts.mask.long()
    return bool(((prompts.positions == mask.cumsum(-1) - 1) | (mask == 0)).all())


class Reader(Protocol):
    """Reads the logits of a prefill on the way, for callers who want more than those of the last token."""

    def wanted(self, start: int, end: int) -> int:
        """For how many of the last tokens of the segment `start .. end` there are to be logits, at least 1."""

    def read(self, start: int, end: int, logits: torch.Tensor) -> None:
        """Takes logits `(1, k, vocabulary)` of the last tokens of a segment, k being at least what was wanted."""


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt of a call, as the model is to be given it, or several of one length.

    Attributes:
        ids: its tokens `(length,)`, without padding, or `(batch, length)`.
        kwargs: further keywords for the model, the same for every segment.
        position_dims: leading dimensions that the model's position ids have before `(batch, length)`.
        tail: of how many of the last tokens the logits are wanted.
        reader: reads the logits of every segment, in place of those of the last token.
        read: the tokens in main memory, `(length,)`; None where nobody has copied them yet.
    """

    ids: torch.Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)
    position_dims: tuple[int, ...] = ()
    tail: int = 1
    reader: Reader | None = None
    read: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[-1]

    @property
    def batch(self) -> torch.Tensor:
        """Its tokens `(batch, length)`."""
        return self.ids if self.ids.dim() == 2 else self.ids[None]


def unpadded_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows of a left-padded batch without their padding.

    Args:
        input_ids: `(batch, width)`.
        attention_mask: `(batch, width)` of 0 and 1, or None when nothing is padded.

    Raises:
        ValueError: A row is padded on the right, or is nothing but padding.
    """
    if attention_mask is None:
        return list(input_ids)
    kept = attention_mask.to(input_ids.device) != 0
    rows = []
    for index, (ids, mask) in enumerate(zip(input_ids, kept, strict=True)):
        length = int(mask.sum())
        if length == 0 or not bool(mask[-length:].all()):
            raise ValueError(
                f"attention_mask row {index} is not left-padded: after the first 1 every entry must be 1, as the "
                "recurrent state would otherwise consume the padding. Pad on the left (tokenizer.padding_side='left')."
            )
        rows.append(ids[-length:])
    return rows


def check_ids(input_ids: torch.Tensor, vocabulary: int, name: str = "input_ids") -> None:
    """Refuse ids for which the model has no embedding, before anything runs.

    Raises:
        ValueError: Names the id and the valid range.
    """
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name} contains {low if low < 0 else high}, outside the model's vocabulary 0..{vocabulary - 1}. "
            "Was the prompt made with another model's tokenizer?"
        )


def input_device(model: Any) -> torch.device:
    """Where the model takes its ids. Offloaded weights lie on "meta" between calls: `model.device` may not say it."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def as_ids(prompt: torch.Tensor | str, tokenizer: Any, name: str = "ids") -> torch.Tensor:
    """One prompt as token ids of shape `(1, length)`.

    Args:
        prompt: token ids of shape `(length,)` or `(1, length)`, or a string.
        tokenizer: turns a string into ids; None when there is none.
        name: the argument's name, for errors.

    Raises:
        ValueError: The shape is another, they are no integers, or it is a string and there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} holds a string, but there is no tokenizer: SparsePrefixCache(model, tokenizer).")
        prompt = tokenizer(text(name, prompt, "give text in UTF-8"), return_tensors="pt")["input_ids"]
    try:
        given = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is {shown(prompt)}; give token ids of shape (length,) or (1, length).") from error
    ids = given[None] if given.dim() == 1 else given
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"{name} holds a tensor of shape {tuple(given.shape)}; give (length,) or (1, length).")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name} holds a tensor of {given.dtype}; give integer token ids, as a tokenizer does.")
    return ids
