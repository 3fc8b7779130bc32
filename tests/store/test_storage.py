"""What a shared store asks of the place it lies in: a folder and what fsspec reaches do the same."""

from __future__ import annotations

import datetime
import os
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from hf_sparse_cache.errors import DamagedFileError
from hf_sparse_cache.store import files, keeper
from hf_sparse_cache.store import storage as module
from hf_sparse_cache.store.storage import Folder, ListedFile, Objects, Storage, open_storage


@pytest.fixture(params=["folder", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "made" if request.param == "folder" else f"memory://{uuid.uuid4().hex}/there")


def test_what_is_put_is_read_whole_or_in_part(storage: Storage) -> None:
    data = bytes(range(100))
    storage.put("a/b/c", b"first")
    storage.put("a/b/c", data)
    assert storage.read("a/b/c") == data
    for start, end in ((0, 10), (5, 10), (5, None), (0, 100), (0, 200), (99, 100), (0, 0), (7, 7)):
        assert storage.read("a/b/c", start, end) == data[start:end], (start, end)
    assert storage.size("a/b/c") == 100
    for most in (None, 100, 101):
        *_, (whole, count) = storage.parts("a/b/c", most)
        assert bytes(whole) == data and count == 100
    with pytest.raises(DamagedFileError, match="more than the 99 bytes"):
        list(storage.parts("a/b/c", 99))
    storage.put("empty", b"")
    assert storage.read("empty") == b"" and storage.size("empty") == 0
    assert [bytes(data) for data, _ in storage.parts("empty", 0)] == [b""]


def test_what_is_not_there(storage: Storage) -> None:
    for _ in range(2):
        assert storage.size("a/b") is None and storage.list("a") == [] and list(storage.walk()) == []
        storage.remove("a/b")
        for read in (lambda: storage.read("a/b"), lambda: list(storage.parts("a/b", 5))):
            with pytest.raises(FileNotFoundError):
                read()
        storage.put("z", b"")
        storage.remove("z")


def test_files_are_listed_by_their_names_from_the_root(storage: Storage) -> None:
    sizes = {"a/one": 1, "a/b/two": 2, "a/b/three": 3, "four": 4, "ab/five": 5}
    for name, size in sizes.items():
        storage.put(name, bytes(size))

    def listed(found: Any) -> dict[str, int]:
        entries = list(found)
        assert all(isinstance(entry, ListedFile) and entry.modified > 1.6e9 for entry in entries)
        assert len({entry.name for entry in entries}) == len(entries)
        return {entry.name: entry.nbytes for entry in entries}

    assert listed(storage.walk()) == sizes
    assert listed(storage.list("a")) == {"a/one": 1} and listed(storage.list("a/b")) == {"a/b/two": 2, "a/b/three": 3}
    assert listed(storage.list("")) == {"four": 4}
    storage.remove("a/b/two")
    storage.after_fork()
    assert listed(storage.walk()) == {name: size for name, size in sizes.items() if name != "a/b/two"}


def test_what_is_below_a_file_is_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.put("a", b"file")
    assert folder.list("a") == folder.list("a/b") == [] and folder.size("a/b") is None
    with pytest.raises(DamagedFileError, match="a is a file, not a folder"):
        folder.read("a/b")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_what_is_made_in_a_folder_has_its_permissions(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for mode, made in ((0o750, 0o640), (0o777, 0o666)):
            root = tmp_path / oct(mode)
            root.mkdir(mode)
            Folder(root).put("a/b/c", b"x")
            modes = [(root / part).stat().st_mode & 0o777 for part in ("a", "a/b", "a/b/c")]
            assert modes == [mode, mode, made]
        Folder(tmp_path / "new").put("a/b", b"x")
        assert [(tmp_path / "new" / part).stat().st_mode & 0o777 for part in ("", "a", "a/b")] == [0o700, 0o700, 0o600]
    finally:
        os.umask(before)


@pytest.mark.parametrize("what", ["a folder", "a link", "a pipe"])
def test_what_lies_in_the_place_of_a_file_stays(tmp_path: Path, what: str) -> None:
    folder, path = Folder(tmp_path), tmp_path / "a"
    (tmp_path / "mine").write_text("mine")
    {"a folder": path.mkdir, "a link": lambda: path.symlink_to(tmp_path / "mine"), "a pipe": lambda: os.mkfifo(path)}[
        what
    ]()
    with pytest.raises(DamagedFileError, match=what):
        folder.put("a", b"x")
    with pytest.raises(DamagedFileError, match=what):
        folder.read("a")
    folder.remove("a")
    assert files.kind_of(path) is not None and sorted(os.listdir(tmp_path)) == ["a", "mine"]
    assert [entry.name for entry in folder.walk()] == [entry.name for entry in folder.list("")] == ["mine"]


def test_no_link_is_followed_to_files_that_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "b").write_text("mine")
    folder = Folder(tmp_path / "root")
    folder.put("c/d", b"x")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "mine")
    for does in (lambda: folder.put("a/b", b"x"), lambda: folder.remove("a/b"), lambda: list(folder.parts("a/b", 9))):
        with pytest.raises(DamagedFileError, match="a link"):
            does()
    assert folder.list("a") == [] and [entry.name for entry in folder.walk()] == ["c/d"]
    assert (tmp_path / "mine" / "b").read_text() == "mine"


def test_a_folder_that_is_left_empty_goes_but_not_the_root(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "root")
    for name in ("a/b", "a/c", "d"):
        folder.put(name, b"x")
    folder.remove("a/b")
    assert (tmp_path / "root" / "a").is_dir()
    folder.remove("a/c"), folder.remove("d")
    assert not (tmp_path / "root" / "a").exists() and (tmp_path / "root").is_dir()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, beside = Folder(tmp_path), []
    folder.put("a", b"before")

    def full(source: Path, target: Path) -> None:
        beside.append(Path(source).name)
        assert os.listdir(tmp_path) and Path(source).read_bytes() == b"x"
        raise OSError(28, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        folder.put("a", b"x")
    assert os.listdir(tmp_path) == ["a"] and folder.read("a") == b"before"
    assert keeper._is_unfinished(beside[0]), "one who is killed leaves what others know as unfinished"


def test_a_folder_is_made_again_five_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tries = Folder(tmp_path), [0]
    monkeypatch.setattr(folder, "_made", lambda path: tries.__setitem__(0, tries[0] + 1))
    with pytest.raises(FileNotFoundError):
        folder.put("a/b", b"x")
    assert tries == [6]


def test_much_memory_and_little_is_as_large_as_asked_for() -> None:
    for size in (0, 1, 2**20 - 1, 2**20, 2**20 + 1):
        memory = module._memory(size)
        assert len(memory) == size and not memory.readonly
        assert isinstance(memory.obj, bytearray) is (size < 2**20)


@pytest.mark.parametrize("where", ["{}", "file://{}", "local://{}"])
def test_a_folder_may_be_given_as_a_url(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_storage(where.format(tmp_path))
    assert isinstance(made, Folder) and made.root == tmp_path and made.where == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here, home = open_storage("here"), open_storage(Path("~/there"))
    assert isinstance(here, Folder) and here.root == tmp_path / "here"
    assert isinstance(home, Folder) and home.root == tmp_path / "home" / "there"


@pytest.mark.parametrize("bad", ["", "  ", "a\0b", 7, None, b"bytes"])
def test_what_is_no_place_is_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="shared is"):
        open_storage(bad)


# -- objects ----------------------------------------------------------------------------------------------------------


def objects(fs: Any, root: str = "bucket/prefix") -> Objects:
    made = Objects("memory://bucket/prefix")
    made._fs, made._root = fs, root
    return made


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError(f"no package for {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        ImportError, match=r"shared='s3://b'.*no package for s3.*pip install 'hf_sparse_cache\[shared\]'"
    ):
        open_storage("s3://b")


def test_it_is_connected_once_and_anew_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def connected(url: str, **options: Any) -> Any:
        made.append((url, options))
        return SimpleNamespace(info=lambda path: {"size": path.count("/")}), "bucket/prefix/"

    storage = open_storage("memory://bucket/prefix")
    assert storage.where == "memory://bucket/prefix" and storage.least_tokens > 2
    monkeypatch.setattr(fsspec.core, "url_to_fs", connected)
    assert storage.size("a/b") == 3 == storage.size("a/b"), "one slash between the root and a name"
    storage.after_fork()
    storage.size("a/b")
    assert made == [("memory://bucket/prefix", {"use_listings_cache": False, "skip_instance_cache": True})] * 2


def test_no_more_is_asked_for_than_is_needed() -> None:
    calls: list[Any] = []
    fs = SimpleNamespace(
        cat_file=lambda path, **part: calls.append((path, part)) or b"12345",
        makedirs=lambda path, exist_ok: calls.append((path, exist_ok)),
        pipe_file=lambda path, data: calls.append((path, data)),
    )
    storage = objects(fs)
    storage.read("a"), storage.read("a", 0, 3), storage.read("a", 2), list(storage.parts("a", 5))
    parts = [part for _, part in calls]
    assert parts == [{}, {"start": 0, "end": 3}, {"start": 2, "end": None}, {"start": 0, "end": 6}]
    calls.clear()
    storage.put("a/b", b"x")
    assert calls == [("bucket/prefix/a", True), ("bucket/prefix/a/b", b"x")]
    fs.async_impl = True  # folders are made by themselves
    calls.clear()
    storage.put("a/b", b"x")
    assert calls == [("bucket/prefix/a/b", b"x")]


def test_what_a_listing_says_is_understood_in_every_form() -> None:
    when = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
    entry = objects(None)._entry
    file = {"type": "file", "name": "bucket/prefix/a/b", "size": 7}
    assert entry(file) == ListedFile("a/b", 7, 0.0)
    assert entry({**file, "name": "/bucket/prefix/a/b/", "size": None}) == ListedFile("a/b", 0, 0.0)
    for found in ({"LastModified": when, "created": 5}, {"mtime": 12.5}, {"last_modified": when}, {"created": "9"}):
        seconds = entry({**file, **found}).modified  # type: ignore[union-attr]
        assert seconds == {"mtime": 12.5, "created": 9.0}.get(next(iter(found)), when.timestamp())
    assert entry({**file, "mtime": None}) == ListedFile("a/b", 7, 0.0)
    assert entry({**file, "type": "directory"}) is None and entry({**file, "name": "bucket/prefix2/a"}) is None
    assert entry({**file, "name": "other/a"}) is None and entry({"name": "bucket/prefix/a"}) is None
    whole = objects(None, "/")
    assert whole._entry({**file, "name": "/a/b"}) == ListedFile("a/b", 7, 0.0)
    assert [objects(SimpleNamespace(), "/")._at(name)[1] for name in ("", "a")] == ["/", "/a"]


def test_a_folder_is_not_among_the_files_in_it() -> None:
    marker = {"type": "file", "name": "bucket/prefix/a", "size": 0}
    fs = SimpleNamespace(ls=lambda path, detail: [marker, {**marker, "name": "bucket/prefix/a/b"}][: 2 * detail])
    assert [entry.name for entry in objects(fs).list("a")] == ["a/b"]
    fs.ls = lambda path, detail: (_ for _ in ()).throw(NotADirectoryError)
    assert objects(fs).list("a") == []
