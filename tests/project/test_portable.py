"""Windows and macOS lack some modules and functions: everything imports without them, and files stay what they are."""

import sys
from pathlib import Path

import pytest
from test_imports import in_a_new_process

from hf_sparse_cache.tools import machine


# What Windows does not have is taken away; what it has instead is played.
ELSEWHERE = """
import os, subprocess, sys, types
import psutil, torch, transformers  # which look for the platform's modules themselves
try:
    import uvicorn, huggingface_hub.utils._cache_manager  # and so do these
except ImportError:
    pass
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("register_at_fork", "fork", "sched_getaffinity", "sysconf", "getuid", "O_CLOEXEC"):
    vars(os).pop(name, None)
held = set()

def locking(descriptor, mode, count):
    assert mode == 2 and count == 1
    about = os.fstat(descriptor).st_ino
    if about in held:
        raise PermissionError(13, "Permission denied")
    held.add(about)

sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
"""


def test_everything_imports(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil
import hf_sparse_cache
for module in pkgutil.walk_packages(hf_sparse_cache.__path__, "hf_sparse_cache."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # of an extra that is not installed here
            extras = {"lm_eval": "evaluation", "ray": "serving.ray_"}
            assert extras.get(error.name, "no such room") in module.name, (module.name, error)
from hf_sparse_cache.tools.machine import describe_machine, peak_process_bytes
described = describe_machine()
assert described["cores"] >= 1 and described["memory_bytes"] is None
memory = types.SimpleNamespace(rss=5, peak_wset=7)
sys.modules["psutil"] = types.SimpleNamespace(Process=lambda: types.SimpleNamespace(memory_info=lambda: memory))
assert peak_process_bytes() == 7
sys.modules["psutil"] = None
assert peak_process_bytes() is None
"""
    in_a_new_process(ELSEWHERE + code)


def test_a_disk_folder_is_still_for_one_process(tmp_path: Path) -> None:
    code = f"""
import logging
from hf_sparse_cache import CheckpointStore
logging.disable()
first = CheckpointStore(disk_memory="1MiB", disk_dir={str(tmp_path)!r})
second = CheckpointStore(disk_memory="1MiB", disk_dir={str(tmp_path)!r})
assert len(first.tiers) == 2 and len(second.tiers) == 1
"""
    in_a_new_process(ELSEWHERE + code)


def test_files_are_written_as_bytes(tmp_path: Path) -> None:
    """Without O_BINARY, Windows would write every byte that looks like a line end as two."""
    code = f"""
from pathlib import Path
flags = []
os.O_BINARY, opened = 1 << 15, os.open
os.open = lambda path, how, mode=0o777: flags.append(how) or opened(path, how & ~(1 << 15), mode)
from hf_sparse_cache.store import files
files.write(Path({str(tmp_path)!r}) / "state", b"\\n" * 9)
assert any(how & os.O_WRONLY for how in flags)
assert all(how & os.O_BINARY for how in flags if how & os.O_WRONLY), flags
"""
    in_a_new_process(ELSEWHERE + code)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count in another unit")
def test_the_peak_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.peak_process_bytes()
    assert here is not None and here > 50e6
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts in bytes and not in KiB
    assert machine.peak_process_bytes() * 512 < here * 2


def test_the_report_says_when_the_peak_is_unknown() -> None:
    page = pytest.importorskip("hf_sparse_cache.bench.page")
    config = {"machine": {}, "settings": {}, "command": "bench"}
    summary = {"model": "m", "parameters": 1, "dtype": "float32", "grid": 2, "random_weights": True, "seconds": 1.0}
    assert "an unknown amount of memory" in page._circumstances(config, [{**summary, "process_peak_bytes": None}])
    assert "took 2.0 KiB at most" in page._circumstances(config, [{**summary, "process_peak_bytes": 2048}])
