"""Built-in models, for demos and benchmarks that download nothing: with seeded random weights, or trained.

What those with random weights write means nothing. They show time, memory and exactness, for which only the
architecture counts: each has the structure of its family at a few layers (see `builtin_sizes`). The trained ones are
small, and answer questions about manuals (see `recall`).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..checks import shown
from . import recall
from .builtin_sizes import SIZES as SIZES
from .random_weights import cast_weights, draw_weights


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [PAD, BOS, EOS]  # ids 0, 1 and 2


def build_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, vocab_size: int = 8192
) -> PreTrainedModel:
    """Build a model from config, with seeded random weights, in evaluation mode on the CPU.

    Args:
        name (`str`): one of `SIZES`.
        dtype (`torch.dtype`): floating dtype of the weights; they are drawn in float32 and then rounded.
        seed (`int`): the same seed gives the same weights on every machine.
        vocab_size (`int`): rows of the embeddings; at least the length of the tokenizer in use.

    Returns:
        `PreTrainedModel`: a causal language model of transformers. Ids 0, 1 and 2 pad, begin and end a text, as in
        `build_tokenizer`; `generate()` does not stop at the end token, which random weights would draw at random.

    Raises:
        ValueError: for an unknown name, or one whose family the installed transformers does not have.
    """
    model_class, config = _config(name, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the few values that draw_weights leaves as the family initialises them
        model = model_class(config)
    draw_weights(model, seed)
    model.generation_config.eos_token_id = None
    cast: PreTrainedModel = cast_weights(model, dtype).eval()
    return cast


def load(
    name: str, texts: Iterable[str], dtype: torch.dtype | str = "auto", device: str = "cpu", seed: int = 0
) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer, in evaluation mode, whether built in, trained, in a folder or on the Hub.

    Args:
        name (`str`): one of `names()`, a folder, or a Hub id.
        texts (`Iterable[str]`): for the tokenizer of a model with random weights to learn from; the others have one.
        dtype (`torch.dtype` or `str`): of the weights; "auto" is the checkpoint's own, float32 for built-in ones.
        device (`str`): where the model is put.
        seed (`int`): of a built-in model's weights.

    Raises:
        ValueError: when `name` can be none of the three, or there is no such dtype or device.
        OSError: when it cannot be read, from the folder or from the Hub.
    """
    check(name, dtype, device)
    model: Any
    if name in SIZES:
        model = build_model(name, _named(dtype), seed)
        return model.to(device), build_tokenizer(texts)
    source: str | Path = name
    if name in recall.MANUALS:  # kept in bfloat16, which is slower than float32 where there is no accelerator
        source, dtype = recall.folder(name), torch.float32 if dtype == "auto" else dtype
    there = os.path.exists(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a broken folder gives whatever it gives; the Hub, lines about connections and tokens
        if isinstance(error, OSError) and not there:
            raise OSError(
                f"MODEL {name} is not in the local cache of Hugging Face and cannot be fetched from the Hub; check "
                f"the name and the connection, or take a built-in model, which needs no download: {', '.join(names())}"
            ) from error
        said = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"MODEL {name} holds no model and tokenizer that transformers can load: {said}; give a folder written by "
            "save_pretrained, and a dtype of torch"
        ) from error
    return model.to(device).eval(), tokenizer


def check(name: str, dtype: torch.dtype | str = "auto", device: str = "cpu") -> None:
    """Whether `load` may find such a model, before anything else is done.

    Raises:
        ValueError: when `name` can be none of the three, or there is no such dtype or device.
    """
    try:
        torch.zeros(1, device=device).cpu()  # "meta" makes tensors, and holds none
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"device={shown(device)} cannot be used: {said}; choose another, such as cpu") from error
    if name in SIZES:
        if _named(dtype) not in _DTYPES:
            raise ValueError(f"dtype={shown(dtype)} is no dtype that models run in; use auto, float32 or bfloat16")
    elif name not in recall.MANUALS and (not name or ("/" not in name and not os.path.exists(name))):
        known = ", ".join(names())
        raise ValueError(f"name={shown(name)} is no folder, Hub id or built-in model; built in are {known}")


def _named(dtype: torch.dtype | str) -> Any:
    return torch.float32 if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def names() -> list[str]:
    """Every model that needs no download: those with random weights, then the trained ones."""
    return [*SIZES, *recall.MANUALS]


def parameter_count(name: str, vocab_size: int = 8192) -> int:
    """Parameters of a built-in model, counted without allocating them."""
    model_class, config = _config(name, vocab_size)
    with torch.device("meta"):
        return model_class(config).num_parameters()


def describe_model(name: str, vocab_size: int = 8192) -> str:
    """One line for a screen or a report: what the model is, and that its weights are random."""
    class_name = _config(name, vocab_size)[0].__name__
    return f"{name}: {class_name}, {parameter_count(name, vocab_size) / 1e6:.1f} M parameters, seeded random weights"


def _config(name: str, vocab_size: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    if name not in SIZES:
        raise ValueError(f"name={name!r} is not a built-in model; choose one of {', '.join(SIZES)}")
    class_name, make_config, hidden_size, layers = SIZES[name]
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise ValueError(
            f"name={name!r} needs {class_name}, which transformers {transformers.__version__} does not have; upgrade "
            "transformers, or choose another model"
        )
    config = model_class.config_class(
        vocab_size=vocab_size,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **make_config(hidden_size, layers),
    )
    config.name_or_path = name
    return model_class, config


def build_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`: deterministic, seconds for a few MB, and able to encode any text.

    Args:
        texts (`Iterable[str]`): what to learn from; the text to be encoded itself is a good choice.
        vocab_size (`int`): upper bound on its size; short texts give fewer tokens.

    Returns:
        `PreTrainedTokenizerFast`: pads on the left, adds no special tokens by itself.

    Raises:
        ValueError: when `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} cannot hold every byte and special token; use {smallest} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
