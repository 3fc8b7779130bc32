"""The one model that is served, loaded as transformers' server loads models, or built in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.cli.serving.model_manager import ModelManager

from ..tools import builtin, recall


# For a model that has none: each message behind its role, and a special token behind each, where prompts are cut.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        name: a built-in model, a folder, or a Hub id with or without a revision.
        device, dtype, attn_implementation, quantization, trust_remote_code: as transformers' server takes them.
        chat_template: a file that takes the place of the tokenizer's own template.
        learn_from: text from which the tokenizer of a built-in model learns.
    """

    name: str
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    quantization: str | None = None
    trust_remote_code: bool = False
    chat_template: Path | None = None
    learn_from: str = ""

    def manager(self) -> ModelManager:
        """A manager that holds the model, and serves no other.

        Raises:
            ValueError, OSError: The model or the template cannot be loaded; names it.
        """
        template = None if self.chat_template is None else _text_of(self.chat_template)
        if self.name in builtin.names():
            return _BuiltIn(self, template)
        if "/" not in self.name and not Path(self.name).exists():
            known = ", ".join(builtin.names())
            raise ValueError(f"MODEL {self.name!r} is no folder, Hub id or built-in model; built in are {known}")
        manager = ModelManager(
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            force_model=self.name,
        )
        _, processor = loaded(manager)
        if template is not None:
            getattr(processor, "tokenizer", processor).chat_template = template
        return manager

    def processor(self) -> Any:
        """The processor or tokenizer alone, as the manager has it.

        Raises:
            ValueError, OSError: as of `manager`.
        """
        if self.name in builtin.names():  # small enough to be loaded for its tokenizer
            return loaded(self.manager())[1]
        manager = ModelManager(device="cpu", trust_remote_code=self.trust_remote_code)
        processor = manager._load_processor(manager.process_model_name(self.name))
        if self.chat_template is not None:
            getattr(processor, "tokenizer", processor).chat_template = _text_of(self.chat_template)
        return processor


def loaded(manager: ModelManager) -> tuple[Any, Any]:
    """The model and its processor or tokenizer."""
    assert manager.force_model is not None
    name = manager.process_model_name(manager.force_model)
    model, processor = manager.load_model_and_processor(name)
    return model.eval(), processor


class _BuiltIn(ModelManager):
    """Serves a model that the package brings, under its own name."""

    def __init__(self, loading: Loading, template: str | None) -> None:
        self._loading, self._template = loading, template
        super().__init__(device="cpu", dtype="auto", force_model=loading.name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def _load_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        self._model, tokenizer = builtin.load(
            self._loading.name,
            [self._loading.learn_from] if self._loading.name not in recall.MANUALS else [],
            self._loading.dtype,
            "cpu" if self._loading.device == "auto" else self._loading.device,
        )
        tokenizer.chat_template = self._template or tokenizer.chat_template or PLAIN_TEMPLATE
        return tokenizer

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        return self._model


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--chat-template {path} cannot be read ({error}); give a Jinja template in UTF-8") from error
