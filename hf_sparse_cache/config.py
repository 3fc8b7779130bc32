"""`SparseCacheConfig`: the settings of a handle as one object that can be saved, shared and pushed to the Hub."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers.utils import PushToHubMixin

from .sizes import parse_bytes


CONFIG_NAME = "sparse_cache_config.json"
EXACTNESS = ("bitwise", "numerical")


@dataclass(frozen=True)
class SparseCacheConfig(PushToHubMixin):  # type: ignore[misc]
    """Settings of a `SparsePrefixCache`; the same names, defaults and errors as its keyword arguments.

    Args:
        max_memory: bytes that may be stored, as an integer or such as "2GiB"; None for no limit.
        max_checkpoints: most new checkpoints a prompt; None leaves it to the policy.
        exactness: "bitwise": a resumed run equals a cold run bit for bit, checkpoints sit on cuts that follow from the
            prompt alone. "numerical": checkpoints may sit anywhere, at the end of a prompt or where prompts diverge; a
            resumed run equals stock `generate()` to rounding.
        grid: tokens between regular cuts; None for the family's own.
        policy: name of the placement policy.
        namespace: a tenant; nothing stored under one is ever matched from another.

    Raises:
        ValueError: A value is out of range; the message names the argument.
    """

    max_memory: int | str | None = "2GiB"
    max_checkpoints: int | None = None
    exactness: str = "bitwise"
    grid: int | None = None
    policy: str = "learned"
    namespace: str = ""

    def __post_init__(self) -> None:
        parse_bytes(self.max_memory)
        if self.exactness not in EXACTNESS:
            raise ValueError(f"exactness must be 'bitwise' or 'numerical', not {self.exactness!r}.")
        if self.max_checkpoints is not None and self.max_checkpoints < 0:
            raise ValueError(f"max_checkpoints must be None or at least 0, not {self.max_checkpoints}.")
        if self.grid is not None and self.grid < 2:
            raise ValueError(f"grid must be at least 2 tokens, not {self.grid}; leave it out for the family's own.")

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the settings as JSON into a folder, and push it to the Hub if asked to. No prompt is in it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        from . import __version__

        content = {**asdict(self), "hf_sparse_cache_version": __version__}
        (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> "SparseCacheConfig":
        """Read settings from a folder or a Hub repository. Keys that this version does not know are ignored."""
        path = Path(name_or_path) / CONFIG_NAME
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, **kwargs))
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})
