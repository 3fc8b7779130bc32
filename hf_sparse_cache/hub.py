"""What configs and plans have in common: a JSON file in a folder or on the Hub, with a card that says what it is.

The conventions are those of transformers; sorted keys make two files easy to compare, the version inside says who
wrote them, and keys that a version does not know are ignored, so that older versions can read files of newer ones.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers.utils import PushToHubMixin


CARD_NAME = "README.md"
VERSION_KEY = "hf_sparse_cache_version"
_TAGS = ["hf_sparse_cache"]
_TEMPLATE = "[More Information Needed]"  # in the card that transformers makes up when a repository has none


class Shareable(PushToHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a small object that JSON can hold."""

    file_name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The content as JSON holds it."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The object from what `to_dict` gave; unknown keys are ignored."""
        raise NotImplementedError

    def card(self) -> str:
        """Markdown for people who find the file."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the object as JSON into a folder, with a card unless one is there. No prompt is in it.

        Args:
            save_directory: made when it is not there.
            push_to_hub: push it as well, to `repo_id` among `kwargs`, by default the folder's name.
            kwargs: passed on to `push_to_hub`.
        """
        from . import __version__

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.to_dict(), VERSION_KEY: __version__}, indent=2, sort_keys=True) + "\n"
        (folder / self.file_name).write_text(text, encoding="utf-8")
        if not (folder / CARD_NAME).exists():
            header = f"---\nlibrary_name: hf_sparse_cache\ntags:\n- {_TAGS[0]}\n---\n\n"
            (folder / CARD_NAME).write_text(header + self.card(), encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(self, repo_id: str, *, tags: list[str] | None = None, **kwargs: Any) -> Any:
        """Upload the file and, where the repository has none, its card.

        Args:
            repo_id: name of the repository, made when it is not there.
            tags: further tags of the card.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message` and what else transformers takes.
        """
        return super().push_to_hub(repo_id, tags=[*_TAGS, *(tags or [])], **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read the object from a folder or a Hub repository. Keys that this version does not know are ignored.

        Args:
            name_or_path: a folder, or a Hub id.
            kwargs: `revision`, `token`, `cache_dir` and what else `huggingface_hub.hf_hub_download` takes.

        Raises:
            FileNotFoundError: the folder does not hold the file.
            ValueError: the file does not hold such an object.
        """
        path = Path(name_or_path) / cls.file_name
        if Path(name_or_path).is_dir() and not path.is_file():
            raise FileNotFoundError(
                f"name_or_path={str(name_or_path)!r} holds no {cls.file_name}; give a folder that a {cls.__name__} "
                "was saved to, or a Hub id"
            )
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), cls.file_name, **kwargs))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}. Save the {cls.__name__} again.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not the fields of a {cls.__name__}.")
        return cls.from_dict(content)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # By now transformers has put a card here: the repository's own, which stays, or an empty form for a model.
        path = Path(working_dir) / CARD_NAME
        if path.exists() and _TEMPLATE in path.read_text(encoding="utf-8"):
            from huggingface_hub import ModelCard

            card = ModelCard.load(path)
            card.data.library_name = "hf_sparse_cache"
            card.text = self.card()
            card.save(path)
        return super()._upload_modified_files(working_dir, *args, **kwargs)
