"""Files that a command is told to write: what cannot be written is said before the work, not after it."""

import os
from pathlib import Path

from ..checks import shown


# As a picture has it, and no script or note that names the command.
PNG_MARK = b"Software\0hf-sparse-cache"
REPORT_MARK = b"<title>hf_sparse_cache bench</title>"
_MARKED_BYTES = 4096


def check_output(path: Path, option: str, mark: bytes) -> None:
    """Refuse a file that cannot be written, or that somebody else wrote; its folder is made when it is written.

    Args:
        option: the one that named it, for errors.
        mark: stands near the beginning of such files of ours, which alone are replaced.

    Raises:
        ValueError: it is a folder, a device or a file of another kind, its folder cannot be made, or it may not be
            written.
    """
    if os.path.isdir(path):
        _refuse(path, option, "is a folder", "give the name of a file in it")
    try:
        os.lstat(path)
    except FileNotFoundError:
        check_folder(path.parent, option)
    except OSError as error:  # a name that is too long, or below a file
        _refuse(path, option, f"cannot be a file ({error.strerror})", "give another name")
    else:
        if not os.path.isfile(path):
            _refuse(path, option, "is no regular file", "give another name")
        if not os.access(path, os.W_OK):
            _refuse(path, option, "cannot be written", "check its permissions, or give another name")
        with path.open("rb") as file:
            if mark not in file.read(_MARKED_BYTES):
                _refuse(path, option, "was not written by this command", "give another name, or move it away")


def check_folder(path: Path, option: str) -> None:
    """Refuse a folder that can neither be used nor made.

    Raises:
        ValueError: there is something else, or the folder it would lie in cannot be written.
    """
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        _refuse(path, option, "cannot be a folder", f"{nearest} is a file; give another name")
    if not os.access(nearest, os.W_OK):
        _refuse(path, option, "cannot be written", f"check the permissions of {nearest}, or give another name")


def _refuse(path: Path, option: str, what: str, remedy: str) -> None:
    raise ValueError(f"{option} {shown(str(path))} {what}; {remedy}.")
