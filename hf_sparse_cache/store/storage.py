"""Where a shared store lies: a folder, local or on a network, or what fsspec reaches by a URL. Names have slashes.

A file is there in full or not at all: a folder's files are written beside their place and renamed, an object is put
once. Nothing here is proved; whoever reads does that.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from ..checks import shown
from ..errors import DamagedFileError
from . import files
from .headers import Plain


_TRIES = 5  # of making a folder that others remove
_PART_BYTES = 2**20


class ListedFile(NamedTuple):
    """One file: its name from the root, its bytes, and when it was written, in seconds, by the storage's clock."""

    name: str
    nbytes: int
    modified: float


class Storage(Protocol):
    """What a shared store asks of the place it lies in. Every verb may raise whatever the place raises.

    Attributes:
        where: as people call it.
        least_tokens: fewer are computed sooner than looked for.
    """

    where: str
    least_tokens: int

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start .. end` of a file, or as many as there are. Raises FileNotFoundError where there is none."""

    def parts(self, name: str, most: int | None) -> Iterator[tuple[Plain, int]]:
        """A whole file while it is read: its memory, and how many bytes of it have come, again and again.

        Raises:
            FileNotFoundError: there is none.
            DamagedFileError: it has more than `most` bytes.
        """

    def put(self, name: str, data: bytes) -> None:
        """Makes or replaces a file."""

    def list(self, folder: str) -> list[ListedFile]:
        """The files that lie in one folder itself; none where there is no such folder."""

    def walk(self) -> Iterator[ListedFile]:
        """Every file."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def remove(self, name: str) -> None:
        """Deletes a file; one that is gone is fine."""

    def after_fork(self) -> None:
        """In a child process: with connections of its own."""


class Folder:
    """A folder that all processes see. What it makes has the permissions of the folder; a new one is private."""

    def __init__(self, root: Path) -> None:
        self.root, self.where, self.least_tokens = root, str(root), 2

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Storage`; through no link, and from regular files alone."""
        with files.open_regular(self._at(name)) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            # Of what there is: memory for what there may be at most would be new each time, at four times the cost.
            return file.read(max(0, (size if end is None else min(end, size)) - start))

    def parts(self, name: str, most: int | None) -> Iterator[tuple[Plain, int]]:
        """See `Storage`."""
        with files.open_regular(self._at(name)) as file:
            size, come = os.fstat(file.fileno()).st_size, 0
            _check_size(size, most)
            found = _memory(size)
            yield found, 0
            while come < size:
                read = file.readinto(found[come : come + _PART_BYTES])  # type: ignore[attr-defined]
                if not read:
                    raise DamagedFileError(f"it was cut short to {come} bytes while it was read")
                come += read
                yield found, come

    def put(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        path = self._at(name)
        if files.kind_of(path) not in (None, "a file"):
            raise DamagedFileError(f"{path} is {files.kind_of(path)}, not a file that was written here")
        self._made(path.parent)
        beside = uuid.uuid4().hex[:12]
        temporary = path.with_name(f"{beside}-{files.own_tag(beside)}{files.TEMPORARY}")
        mode = os.stat(self.root).st_mode & 0o666
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | files.CAREFUL
        try:
            with self._opened(temporary, lambda at, _: os.open(at, flags, mode)) as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _at(self, name: str) -> Path:
        """Where a file lies.

        Raises:
            DamagedFileError: what stands for a folder on the way is none that was made here: a link, or a file.
        """
        path = self.where
        for part in name.split("/")[:-1]:
            path = f"{path}{os.sep}{part}"
            if (kind := files.kind_of(path)) not in (None, "a folder"):
                raise DamagedFileError(f"{path} is {kind}, not a folder that was made here")
        return self.root / name

    def _opened(self, path: Path, opener: Callable[[str, int], int]) -> IO[bytes]:
        """A new file, in a folder that another process may remove as empty just before."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                return open(path, "wb", opener=opener)
            self._made(path.parent)
        return open(path, "wb", opener=opener)

    def _made(self, folder: Path) -> None:
        if folder.is_dir():
            return
        files.private_folder(self.root)
        mode = os.stat(self.root).st_mode & 0o777
        for part in [*reversed(folder.relative_to(self.root).parents), folder.relative_to(self.root)]:
            with suppress(FileExistsError):
                (self.root / part).mkdir(mode=mode)

    def list(self, folder: str) -> list[ListedFile]:
        """See `Storage`."""
        return [entry for entry in self._scan(folder) if entry is not None and isinstance(entry, ListedFile)]

    def walk(self) -> Iterator[ListedFile]:
        """See `Storage`; links are not followed."""
        waiting = [""]
        while waiting:
            for entry in self._scan(waiting.pop()):
                if isinstance(entry, ListedFile):
                    yield entry
                else:
                    waiting.append(entry)

    def _scan(self, folder: str) -> Iterator[ListedFile | str]:
        """Files and, as strings, folders in one folder."""
        with suppress(DamagedFileError, NotADirectoryError):
            yield from self._entries(folder, self._at(f"{folder}/" if folder else ""))

    def _entries(self, folder: str, path: Path) -> Iterator[ListedFile | str]:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as found:
            for item in found:
                name = f"{folder}/{item.name}" if folder else item.name
                if item.is_dir(follow_symlinks=False):
                    yield name
                elif item.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        about = item.stat(follow_symlinks=False)
                        yield ListedFile(name, about.st_size, about.st_mtime)

    def size(self, name: str) -> int | None:
        """See `Storage`."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.lstat(self.root / name).st_size
        return None

    def remove(self, name: str) -> None:
        """See `Storage`; a folder that is left empty goes as well. Raises DamagedFileError as `put` does."""
        path = self._at(name)
        if files.kind_of(path) == "a file":
            with suppress(FileNotFoundError):
                os.unlink(path)
            with suppress(OSError):
                if path.parent != self.root:
                    os.rmdir(path.parent)

    def after_fork(self) -> None:
        """Nothing: a folder has no connections."""


class Objects:
    """What fsspec reaches by a URL such as "s3://bucket/prefix"; credentials and endpoints are those of its settings.

    Raises:
        ValueError: fsspec knows no such protocol.
        ImportError: the package that serves it is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.where, self.least_tokens = url, 256
        protocol = url.partition("://")[0]
        try:
            self._class = fsspec.get_filesystem_class(protocol)
        except ValueError as error:
            hint = f"fsspec knows no protocol {shown(protocol)}; give a folder, or a URL that it knows"
            raise ValueError(f"shared={shown(url)}: {hint}") from error
        except ImportError as error:
            hint = "for s3:// pip install 'hf_sparse_cache[shared]'"
            raise ImportError(f"shared={shown(url)}: {error}; {hint}") from error
        self._fs: Any = None

    def _at(self, name: str) -> tuple[Any, str]:
        if self._fs is None:
            import fsspec

            # A cache of listings would hide what others write, and an instance is not for two processes.
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            self._fs, self._root = fsspec.core.url_to_fs(self.where, **options)
        return self._fs, f"{self._root.rstrip('/')}/{name}" if name else self._root

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Storage`."""
        fs, path = self._at(name)
        part = {"start": start, "end": end} if start or end is not None else {}
        data: bytes = fs.cat_file(path, **part)
        return data

    def parts(self, name: str, most: int | None) -> Iterator[tuple[Plain, int]]:
        """See `Storage`; one part, as each would be a request."""
        data = self.read(name) if most is None else self.read(name, 0, most + 1)
        _check_size(len(data), most)
        yield data, len(data)

    def put(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        fs, path = self._at(name)
        if not getattr(fs, "async_impl", False):  # those with folders, which are not made by themselves
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path, data)

    def list(self, folder: str) -> list[ListedFile]:
        """See `Storage`."""
        fs, path = self._at(folder)
        try:
            found = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for item in found if (entry := self._entry(item)) is not None and entry.name != folder]

    def walk(self) -> Iterator[ListedFile]:
        """See `Storage`."""
        fs, path = self._at("")
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            return
        yield from (entry for item in found.values() if (entry := self._entry(item)) is not None)

    def _entry(self, item: dict[str, Any]) -> ListedFile | None:
        root = self._root.strip("/")
        name = str(item["name"]).strip("/")
        if item.get("type") != "file" or not name.startswith(f"{root}/" if root else ""):
            return None
        when = next((item[key] for key in ("LastModified", "mtime", "last_modified", "created") if key in item), 0.0)
        seconds = when.timestamp() if hasattr(when, "timestamp") else float(when or 0.0)
        return ListedFile(name[len(root) + 1 if root else 0 :], int(item.get("size") or 0), seconds)

    def size(self, name: str) -> int | None:
        """See `Storage`."""
        fs, path = self._at(name)
        with suppress(FileNotFoundError):
            return int(fs.info(path)["size"])
        return None

    def remove(self, name: str) -> None:
        """See `Storage`."""
        fs, path = self._at(name)
        with suppress(FileNotFoundError):
            fs.rm_file(path)

    def after_fork(self) -> None:
        """Connects anew."""
        self._fs = None


def _memory(size: int) -> memoryview:
    """New memory. The pages of much of it come one by one as they are filled, which takes longer than to fill them."""
    if size < _PART_BYTES:
        return memoryview(bytearray(size))
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    return memoryview(mmap.mmap(-1, size, **private))


def _check_size(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise DamagedFileError(f"it has more than the {most} bytes that what it is for has at most")


def open_storage(where: str | Path) -> Storage:
    """A folder, or what a URL names; nothing is touched yet.

    Raises:
        ValueError: it is neither.
        ImportError: the package that serves such a URL is not installed.
    """
    if not isinstance(where, str | Path) or not str(where).strip() or "\0" in str(where):
        raise ValueError(f"shared is {shown(where)}: give a folder, or a URL such as 's3://bucket/prefix'")
    if "://" not in str(where):
        return Folder(Path(where).expanduser().absolute())
    protocol, _, rest = str(where).partition("://")
    return Folder(Path(rest).absolute()) if protocol in ("file", "local") else Objects(str(where))
