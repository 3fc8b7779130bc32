"""Every family and every way of calling `generate()`: warm equals cold bit for bit, and stock within a tolerance.

In a usual session the core calls run on every family and the other calls on representative ones, in float32; other
dtypes run greedy and batched. Replayable mode runs the other calls on fewer families, and other dtypes greedy.
`--full-matrix` runs everything, as `make support` does.
"""

import pytest
import segments_of
from matrix import BITWISE, BROKEN_UPSTREAM, DTYPES, REPLAYABLE, REPRESENTATIVE, run_cell, runs, supported_families
from matrix_calls import BY_NAME, CALLS

from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.planning.lineage import Lineage


# Those on which every call runs in every session.
EVERY_CALL = {BITWISE: REPRESENTATIVE, REPLAYABLE: ("Mamba", "Jamba", "Qwen3.5")}
OTHER_DTYPES = {BITWISE: ("greedy", "left-padded batch"), REPLAYABLE: ("greedy",)}


def chosen(full: bool) -> list[tuple[str, str, str, str]]:
    """The (family, dtype, mode, call) of a session, family first so that each model is built once."""
    cells = []
    for family in supported_families():
        for dtype in DTYPES:
            for mode, families in EVERY_CALL.items():
                for call in CALLS:
                    every_call = call.core or (family in families and (not call.slow or family == REPRESENTATIVE[0]))
                    usual = every_call if dtype == "float32" else call.name in OTHER_DTYPES[mode]
                    if (full and runs(call, family, dtype)) or usual:
                        cells.append((family, dtype, mode, call.name))
    return cells


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = chosen(metafunc.config.getoption("--full-matrix"))
        metafunc.parametrize("cell", cells, ids=[" - ".join(cell) for cell in cells])


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_cell(cell: tuple[str, str, str, str]) -> None:
    family, dtype, mode, call = cell
    found = run_cell(family, BY_NAME[call], dtype, mode)
    if found.status == "broken upstream":
        assert dtype in BROKEN_UPSTREAM[family]
    elif not BY_NAME[call].reason and found.status != "not allowed":
        batches = mode == REPLAYABLE and "batch" in call
        assert (found.status == "exact" and found.resumed_tokens > 0) or (batches and found.status == "batched")


@pytest.mark.parametrize("call", ["greedy", "multi-turn", "three threads on one handle"])
def test_a_cell_of_replayable_mode_fails_over_other_segments(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = segments_of.Kept.next

    def joined(kept: segments_of.Kept, row: Row) -> Lineage:
        return Lineage([own(kept, row).end])  # all of them as one

    monkeypatch.setattr(segments_of.Kept, "next", joined)
    with pytest.raises(AssertionError, match="warm is not cold"):
        run_cell("Mamba", BY_NAME[call], "float32", REPLAYABLE)
