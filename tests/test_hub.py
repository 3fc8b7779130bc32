"""Configs and plans on disk and on the Hub: JSON that can be compared, a card, and nothing lost on the way."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hf_sparse_cache import CheckpointPlan, SparseCacheConfig, __version__, plan_checkpoints
from hf_sparse_cache.hub import Shareable, _make_branch, check_own, replace_whole


PLAN = plan_checkpoints([0.1, 0.0, 0.5, 0.2, 1.0], 2)
CONFIG = SparseCacheConfig(max_memory="64MiB", grid=128, namespace="anna")


@pytest.fixture(params=[CONFIG, PLAN], ids=["config", "plan"])
def shared(request: pytest.FixtureRequest) -> Shareable:
    return request.param


def test_round_trip(shared: Shareable, tmp_path: Path) -> None:
    shared.save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", shared.file_name]
    assert type(shared).from_pretrained(str(tmp_path / "new")) == shared
    text = (tmp_path / "new" / shared.file_name).read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["hf_sparse_cache_version"] == __version__
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"


def test_unknown_keys_are_tolerated(shared: Shareable, tmp_path: Path) -> None:
    content = {**shared.to_dict(), "hf_sparse_cache_version": "9.9", "from_the_future": [1]}
    (tmp_path / shared.file_name).write_text(json.dumps(content), encoding="utf-8")
    assert type(shared).from_pretrained(tmp_path) == shared


def test_a_card_that_is_there_stays(shared: Shareable, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    shared.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("text", ['{"grid": 64}', "mine", "[]", ""])
def test_a_file_of_somebody_else_stays(shared: Shareable, tmp_path: Path, text: str) -> None:
    (tmp_path / shared.file_name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{shared.file_name} was not written by save_pretrained"):
        shared.save_pretrained(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(shared.file_name, text)]


def test_what_is_no_file_stays(shared: Shareable, tmp_path: Path) -> None:
    for number, make in enumerate([os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/nowhere")]):
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number) / shared.file_name)
        with pytest.raises(ValueError, match="was not written by save_pretrained"):
            shared.save_pretrained(tmp_path / str(number))
        assert len(list((tmp_path / str(number)).iterdir())) == 1
    (tmp_path / "README.md").symlink_to(tmp_path / "nothing")
    shared.save_pretrained(tmp_path)
    assert not (tmp_path / "nothing").exists()


def test_a_save_that_fails_leaves_the_one_before(
    shared: Shareable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.save_pretrained(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            shared.save_pretrained(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    shared.save_pretrained(tmp_path)


class FakeHub:
    """Stands in for the Hub's API: keeps the files of one commit."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.options: dict[str, Any] = {}
        self.branches: list[str] = []

    def api(self, token: bool | str | None) -> "FakeHub":
        self.token = token
        return self

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        assert repo_id == self.repo_id and exist_ok
        self.branches.append(branch)

    def create_repo(self, repo_id: str, **options: Any) -> "FakeHub":
        self.repo_id, self.options = f"me/{repo_id}", options
        return self

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> str:
        assert repo_id == self.repo_id
        self.committed = options
        for operation in operations:
            self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_text(encoding="utf-8")
        return "committed"


def _push(shared: Shareable, monkeypatch: pytest.MonkeyPatch, existing_card: str | None, **options: Any) -> FakeHub:
    def load(repo_id: object, **_: Any) -> ModelCard:
        if isinstance(repo_id, Path):  # a file: not the Hub
            return ModelCard(repo_id.read_text(encoding="utf-8"))
        if existing_card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(existing_card)

    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake.api)
    monkeypatch.setattr(ModelCard, "load", load)
    assert shared.push_to_hub("thing", **options) == "committed"
    return fake


def test_push_brings_the_file_and_a_card(shared: Shareable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = _push(shared, monkeypatch, None, private=True, tags=["mine"])
    assert fake.options["private"] is True
    assert sorted(fake.files) == ["README.md", shared.file_name]
    (tmp_path / shared.file_name).write_text(fake.files[shared.file_name], encoding="utf-8")
    assert type(shared).from_pretrained(tmp_path) == shared
    card = ModelCard(fake.files["README.md"])
    assert card.data.library_name == "hf_sparse_cache"
    assert card.data.tags == ["hf_sparse_cache", "mine"]
    assert shared.card().strip() in card.text
    assert "More Information Needed" not in card.text


def test_push_keeps_the_card_of_a_repository(shared: Shareable, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _push(shared, monkeypatch, "---\nlicense: mit\n---\n\nWritten by hand.\n")
    assert "Written by hand." in fake.files["README.md"]
    assert "license: mit" in fake.files["README.md"]


def test_push_keeps_a_card_with_blanks_in_it(shared: Shareable, monkeypatch: pytest.MonkeyPatch) -> None:
    form = ModelCard.from_template(ModelCardData(), model_description="This is the model card of a model.").content
    for card in (form + "\n## Mine\n", form.replace("## Uses", "## Uses\n\nMine."), "[More Information Needed] Mine."):
        assert _push(shared, monkeypatch, card).files["README.md"].count("Mine") == 1


def test_a_revision_is_made_and_a_pull_request_is_not(shared: Shareable, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _push(shared, monkeypatch, None, revision="v2", token="mine", commit_message="New", create_pr=False)
    assert fake.branches == ["v2"] and fake.token == "mine"
    assert fake.committed == {"revision": "v2", "commit_message": "New", "create_pr": False}
    fake = _push(shared, monkeypatch, None, revision="refs/pr/3")
    assert fake.branches == []
    assert fake.committed == {"revision": "refs/pr/3", "commit_message": f"Upload {type(shared).__name__}"}


@pytest.mark.parametrize(("status", "create_pr", "said"), [(403, True, False), (403, False, True), (500, True, True)])
def test_the_branch_of_a_repository_of_others(status: int, create_pr: bool, said: bool) -> None:
    answer: Any = SimpleNamespace(status_code=status, headers={}, request=None)

    class Refusing:
        def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
            raise HfHubHTTPError("no", response=answer)

    with pytest.raises(HfHubHTTPError) if said else nullcontext():
        _make_branch(Refusing(), "theirs/thing", "v2", create_pr)


def test_save_may_push(shared: Shareable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pushed: list[object] = []
    monkeypatch.setattr(Shareable, "push_to_hub", lambda self, repo_id, **kwargs: pushed.append((repo_id, kwargs)))
    shared.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    shared.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/other")
    assert pushed == [("name", {"private": True}), ("me/other", {})]


def test_a_folder_without_the_file(shared: Shareable, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=shared.file_name):
        type(shared).from_pretrained(tmp_path)
    for text, said in (("not JSON", "not JSON"), ("[1]", "holds a list")):
        (tmp_path / shared.file_name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            type(shared).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"positions": [1]}, "expected_cost is missing"),
        ({"positions": [2, 1], "expected_cost": 1.0}, "positions is"),
        ({"positions": [0], "expected_cost": 1.0}, "positions is"),
        ({"positions": ["a"], "expected_cost": 1.0}, "positions is 'a'"),
        ({"positions": 3.5, "expected_cost": 1.0}, "positions is 3.5"),
        ({"positions": [1], "expected_cost": -1}, "expected_cost is -1"),
    ],
)
def test_a_plan_that_is_none_is_refused(content: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CheckpointPlan.from_dict(content)


def test_folders_above_are_made_and_a_second_save_replaces(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    CONFIG.save_pretrained(folder)
    SparseCacheConfig(grid=32).save_pretrained(str(folder))
    assert SparseCacheConfig.from_pretrained(folder) == SparseCacheConfig(grid=32)
    assert "`128`" in (folder / "README.md").read_text(encoding="utf-8")  # the card of the first stays
    with pytest.raises(ValueError, match="save_directory is ''"):
        CONFIG.save_pretrained("")
    with pytest.raises(ValueError, match="name_or_path must be a path, got 7"):
        SparseCacheConfig.from_pretrained(7)  # type: ignore[arg-type]


def test_a_card_says_what_library_it_is_of(shared: Shareable, tmp_path: Path) -> None:
    shared.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == f"---\nlibrary_name: hf_sparse_cache\ntags:\n- hf_sparse_cache\n---\n\n{shared.card()}"


def test_what_is_no_folder_comes_from_the_hub(
    shared: Shareable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.save_pretrained(tmp_path / "hub")
    asked: list[Any] = []

    def download(repo_id: str, name: str, **options: Any) -> str:
        asked.append((repo_id, name, options))
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert type(shared).from_pretrained("me/thing", revision="v2", token="mine") == shared
    assert asked == [("me/thing", shared.file_name, {"revision": "v2", "token": "mine"})]
    assert type(shared).from_pretrained("hub") == shared and len(asked) == 1  # a folder of that name is there


def test_a_file_that_is_none_is_refused_with_the_remedy(shared: Shareable, tmp_path: Path) -> None:
    kind, path = type(shared).__name__, tmp_path / shared.file_name
    with pytest.raises(FileNotFoundError) as missing:
        type(shared).from_pretrained(tmp_path)
    assert str(missing.value) == (
        f"name_or_path={str(tmp_path)!r} holds no {shared.file_name}; give a folder that a {kind} was saved to, or a "
        "Hub id"
    )
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=f"holds a list, not the fields of a {kind}") as raised:
        type(shared).from_pretrained(tmp_path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=f"Save the {kind} again") as raised:
        type(shared).from_pretrained(tmp_path)
    assert str(path) in str(raised.value) and raised.value.__suppress_context__


def test_what_cannot_be_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONFIG.save_pretrained(tmp_path)

    def fails(path: Path) -> Any:
        raise PermissionError(13, "no")

    with monkeypatch.context() as patch:
        patch.setattr("hf_sparse_cache.jsontext.read_json", fails)
        with pytest.raises(ValueError, match="was not written by save_pretrained"):
            CONFIG.save_pretrained(tmp_path)
    check_own(tmp_path / CONFIG.file_name), check_own(tmp_path / "nothing")


@pytest.mark.parametrize("data", ["grün\n", b"\xff\x00"])
def test_a_file_is_replaced_whole(tmp_path: Path, data: str | bytes) -> None:
    expected = data.encode() if isinstance(data, str) else data
    target = tmp_path / "there" / "file"
    target.parent.mkdir()
    replace_whole(target, data)
    assert target.read_bytes() == expected
    target.write_bytes(b"before")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    replace_whole(tmp_path / "link", data)
    assert target.read_bytes() == expected and target.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink() and os.listdir(target.parent) == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    """All of it is on the disk before it takes the place of what was there."""
    (tmp_path / "file").write_text("before")
    steps: list[str] = []

    def noted(name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            steps.append(name)
            if name == step:
                (partial,) = tmp_path.glob(".*.partial")
                assert partial.read_bytes() == b"after" and (tmp_path / "file").read_text() == "before"
                raise error
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "chmod", "replace"):
            patch.setattr(os, name, noted(name, getattr(os, name)))
        with pytest.raises(type(error)):
            replace_whole(tmp_path / "file", b"after")
        assert steps == ["fsync", "chmod", "replace"][: len(steps)] and steps[-1] == step
        assert os.listdir(tmp_path) == ["file"]
        patch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(type(error)):  # the first error is the one that counts
            replace_whole(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_text() == "before"


def test_two_that_write_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, names = os.replace, list[str]()
    monkeypatch.setattr(os, "replace", lambda source, to: names.append(Path(source).name) or replace(source, to))
    for _ in range(2):
        replace_whole(tmp_path / "file", "x")
    assert len({*names}) == 2 and all(name.startswith(".") for name in names)


def test_a_push_says_what_it_was_told_and_no_more(shared: Shareable, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _push(shared, monkeypatch, None)
    assert fake.options == {"private": None, "exist_ok": True} and fake.token is None and fake.branches == []
    assert fake.committed == {"commit_message": f"Upload {type(shared).__name__}"}
    assert list(fake.files) == sorted(["README.md", shared.file_name])
    fake = _push(shared, monkeypatch, None, revision="")
    assert fake.branches == []


def test_tags_are_put_on_a_card_once_behind_its_own(shared: Shareable, monkeypatch: pytest.MonkeyPatch) -> None:
    card = "---\ntags:\n- theirs\n- mine\n---\n\nWritten by hand.\n"
    fake = _push(shared, monkeypatch, card, tags=["more", "mine"])
    assert ModelCard(fake.files["README.md"]).data.tags == ["theirs", "mine", "hf_sparse_cache", "more"]
    fake = _push(shared, monkeypatch, "Without any.\n")
    assert ModelCard(fake.files["README.md"]).data.tags == ["hf_sparse_cache"]


def test_the_card_of_a_repository_is_asked_for_with_the_token(
    shared: Shareable, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(repo_id: Any, token: Any = None) -> Any:
        asked.append((repo_id, token))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub().api)
    monkeypatch.setattr(ModelCard, "load", load)
    with pytest.raises(OSError, match="no network"):  # which does not say that there is none
        shared.push_to_hub("thing", token="mine")
    assert asked == [("me/thing", "mine")]


@pytest.mark.parametrize(("given", "told"), [({}, False), ({"create_pr": True}, True), ({"create_pr": None}, False)])
def test_a_branch_is_made_for_a_commit(
    shared: Shareable, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], told: bool
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("hf_sparse_cache.hub._make_branch", lambda api, *args: made.append(args))
    _push(shared, monkeypatch, None, revision="v2", **given)
    assert made == [("me/thing", "v2", told)]
