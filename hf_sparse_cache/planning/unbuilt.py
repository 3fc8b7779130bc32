"""Why the compiled planner cannot be imported, in one line with the remedy."""

from pathlib import Path


def why_missing(root: Path, error: ImportError) -> str:
    """What to say when `_planner` cannot be imported.

    Args:
        root: the folder that the package lies in.
        error: what the import said.
    """
    if (root / "_planner.pyx").exists():
        return (
            f"hf_sparse_cache._planner is not compiled: you are in the source folder {root}, which hides the "
            "installed package; leave it, or run `pip install -e .` there (this needs a C compiler)."
        )
    return (
        f"hf_sparse_cache._planner cannot be loaded ({error}): install hf_sparse_cache anew for this version of "
        "Python, from a wheel or with a C compiler."
    )
