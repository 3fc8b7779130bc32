"""The compiled planner in the checkout, where nobody has installed the package: a C compiler is enough.

    python -m benchmarks.accelerator.building    writes `planner.c.xz` anew, after a change of `_planner.pyx`

What Cython makes of `_planner.pyx` lies beside this file, as a GPU is often lent with torch and transformers and
nothing else, and no network. Imports nothing that has to be installed.
"""

import hashlib
import lzma
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
_KEPT = Path(__file__).with_name("planner.c.xz")
_REMEDY = "run `python -m benchmarks.accelerator.building` where Cython is installed"


def built(root=ROOT, kept=_KEPT):
    """The extension for this Python, in the package's folder; compiled if it is not there.

    Raises:
        SystemExit: It cannot be compiled; the message says what is missing.
    """
    target = root / "hf_sparse_cache" / f"_planner{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    source = lzma.decompress(kept.read_bytes())
    if not source.startswith(_made_of(root)):
        raise SystemExit(f"{kept.name} was made of another _planner.pyx: {_REMEDY}.")
    with tempfile.TemporaryDirectory() as folder:
        c, library = Path(folder) / "_planner.c", Path(folder) / target.name
        c.write_bytes(source)
        command = [*(sysconfig.get_config_var("CC") or "cc").split(), "-O2", "-shared", "-fPIC"]
        if sys.platform == "darwin":
            command += ["-undefined", "dynamic_lookup"]
        _run([*command, f"-I{sysconfig.get_paths()['include']}", str(c), "-o", str(library)])
        target.write_bytes(library.read_bytes())
    return target


def translate(root=ROOT):
    """What Cython makes of the planner, as it is kept: behind a line that says of which source."""
    with tempfile.TemporaryDirectory() as folder:
        # A copy, and from there: Cython names what lies below the current folder, such as itself, by its way from it.
        source = shutil.copy(root / "_planner.pyx", folder)
        options = ["-3", "-X", "emit_code_comments=False", "--module-name", "hf_sparse_cache._planner"]
        _run([sys.executable, "-m", "cython", *options, Path(source).name], folder)
        return _made_of(root) + Path(source).with_suffix(".c").read_bytes()


def _made_of(root):
    return f"/* of {hashlib.sha256((root / '_planner.pyx').read_bytes()).hexdigest()} */\n".encode()


def _run(command, folder=None):
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SystemExit(
            f"The planner has to be compiled, and there is no C compiler {command[0]!r}: {error}."
        ) from None
    if done.returncode:
        raise SystemExit(f"Compiling the planner failed: {' '.join(command)}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    _KEPT.write_bytes(lzma.compress(translate(), preset=9))
