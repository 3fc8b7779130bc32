"""What is compiled: the planner, and the inner loops of every request; this is the only module that touches it."""

from pathlib import Path


def _why_missing(root: Path, error: ImportError) -> str:
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


try:
    from .._planner import (
        ABSOLUTE,
        AGAIN,
        BEYOND,
        CUTS_FROM_END,
        FROM_END,
        JUNCTIONS,
        RATIO,
        UNIFORM,
        Histogram,
        Leaving,
        Problem,
        Waits,
        appended,
        chain_bytes,
        counted,
        credited,
        edges_of,
        gained,
        held_bytes,
        junctions,
        leaning,
        levels,
        looked_up,
        nearest_above,
        returned,
        segment_ends,
        shares,
        sound,
        viewed,
        walk,
    )
except ImportError as error:  # no silent Python fallback: it would be a thousand times slower
    raise ImportError(_why_missing(Path(__file__).parents[2], error)) from None

__all__ = [
    "ABSOLUTE",
    "AGAIN",
    "BEYOND",
    "CUTS_FROM_END",
    "FROM_END",
    "JUNCTIONS",
    "RATIO",
    "UNIFORM",
    "Histogram",
    "Leaving",
    "Problem",
    "Waits",
    "appended",
    "chain_bytes",
    "counted",
    "credited",
    "edges_of",
    "gained",
    "held_bytes",
    "junctions",
    "leaning",
    "levels",
    "looked_up",
    "nearest_above",
    "returned",
    "segment_ends",
    "shares",
    "sound",
    "viewed",
    "walk",
]
