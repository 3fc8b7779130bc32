"""What configs and plans have in common: a JSON file in a folder or on the Hub, with a card that says what it is.

The conventions are those of transformers; sorted keys make two files easy to compare, the version inside says who
wrote them, and keys that a version does not know are ignored, so that older versions can read files of newer ones.
"""

import json
import os
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from . import jsontext
from .checks import path_of


CARD_NAME = "README.md"
VERSION_KEY = "hf_sparse_cache_version"
_TAGS = ["hf_sparse_cache"]


class Shareable(ABC):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a small object that JSON can hold."""

    file_name: ClassVar[str]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The content as JSON holds it."""

    @classmethod
    @abstractmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The object from what `to_dict` gave; unknown keys are ignored."""

    @abstractmethod
    def card(self) -> str:
        """Markdown for people who find the file."""

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the object as JSON into a folder, with a card unless one is there. No prompt is in it.

        Args:
            save_directory: made when it is not there.
            push_to_hub: push it as well, to `repo_id` among `kwargs`, by default the folder's name.
            kwargs: passed on to `push_to_hub`.

        Raises:
            ValueError: the folder holds a file of this name that was not written by `save_pretrained`.
        """
        from . import __version__

        folder = path_of("save_directory", save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.to_dict(), VERSION_KEY: __version__}, indent=2, sort_keys=True) + "\n"
        check_own(folder / self.file_name)
        replace_whole(folder / self.file_name, text)
        if not os.path.lexists(folder / CARD_NAME):
            header = f"---\nlibrary_name: hf_sparse_cache\ntags:\n- {_TAGS[0]}\n---\n\n"
            replace_whole(folder / CARD_NAME, header + self.card())
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tags: list[str] | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        **commit: Any,
    ) -> Any:
        """Upload the file and, where the repository has none, its card. A card that is there only gets the tags.

        Args:
            repo_id: name of the repository, made when it is not there.
            tags: further tags of the card.
            private: whether a repository that is made is private; None for what is usual there.
            token: of the Hub; None for the one that is logged in.
            commit: `revision`, `create_pr`, `commit_message` and what else `HfApi.create_commit` takes.

        Returns:
            The `huggingface_hub.CommitInfo`.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = {"commit_message": f"Upload {type(self).__name__}", **commit}
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder)
            _tag(folder / CARD_NAME, repo_id, [*_TAGS, *(tags or [])], token)
            if commit.get("revision"):
                _make_branch(api, repo_id, commit["revision"], bool(commit.get("create_pr")))
            files = [CommitOperationAdd(file.name, str(file)) for file in sorted(folder.iterdir())]
            return api.create_commit(repo_id, operations=files, **commit)

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
        path = path_of("name_or_path", name_or_path) / cls.file_name
        if Path(name_or_path).is_dir() and not path.is_file():
            raise FileNotFoundError(
                f"name_or_path={str(name_or_path)!r} holds no {cls.file_name}; give a folder that a {cls.__name__} "
                "was saved to, or a Hub id"
            )
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), cls.file_name, **kwargs))
        try:
            content = jsontext.read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}. Save the {cls.__name__} again.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not the fields of a {cls.__name__}.")
        return cls.from_dict(content)


def check_own(path: Path) -> None:
    """Refuse a file that may not be replaced.

    Raises:
        ValueError: something lies there that `save_pretrained` did not write.
    """
    if os.path.lexists(path):
        try:
            known = path.is_file() and isinstance(before := jsontext.read_json(path), dict) and VERSION_KEY in before
        except (OSError, ValueError):
            known = False
        if not known:
            raise ValueError(f"{path} was not written by save_pretrained; choose another folder, or move it away.")


def replace_whole(path: Path, data: bytes | str) -> None:
    """Puts a file in its place once all of it is written: a disk that is full costs nobody what was there before.

    Args:
        path: in a folder that is there; where a link leads to, the file is replaced.
        data: what it is to hold, text in UTF-8.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}.partial")  # a longer name might be none
    try:
        with temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _tag(card_file: Path, repo_id: str, tags: list[str], token: Any) -> None:
    """Put the card of a repository in the place of ours, where it has one, and the tags on it."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        card = ModelCard(card_file.read_text(encoding="utf-8"))
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(card_file)


def _make_branch(api: Any, repo_id: str, revision: str, create_pr: bool) -> None:
    """See to it that there is a branch to commit to; the commit itself makes those of pull requests."""
    from huggingface_hub.errors import HfHubHTTPError

    if revision.startswith("refs/pr"):
        return
    try:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:
        # A pull request to a repository of others: they have the branch, or the commit says that it is not there.
        if not create_pr or error.response.status_code != 403:
            raise
