"""Every family and every way of calling `generate()`: warm equals cold bit for bit, and stock within a tolerance.

In a usual session the core calls run on every family and the other calls on representative ones, in float32; other
dtypes run greedy and batched. `--full-matrix` runs everything, as `make support` does.
"""

import pytest
from matrix import BROKEN_UPSTREAM, DTYPES, REPRESENTATIVE, run_cell, runs, supported_families
from matrix_calls import BY_NAME, CALLS


OTHER_DTYPES = [dtype for dtype in DTYPES if dtype != "float32"]


def chosen(full: bool) -> list[tuple[str, str, str]]:
    """The (family, dtype, call) of a session, family first so that each model is built once."""
    cells = []
    for family in supported_families():
        for dtype in DTYPES:
            for call in CALLS:
                every_call = call.core or (family in REPRESENTATIVE and (not call.slow or family == REPRESENTATIVE[0]))
                usual = every_call if dtype == "float32" else call.name in ("greedy", "left-padded batch")
                if (full and runs(call, family, dtype)) or usual:
                    cells.append((family, dtype, call.name))
    return cells


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = chosen(metafunc.config.getoption("--full-matrix"))
        metafunc.parametrize("cell", cells, ids=[" - ".join(cell) for cell in cells])


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_cell(cell: tuple[str, str, str]) -> None:
    family, dtype, call = cell
    found = run_cell(family, BY_NAME[call], dtype)
    if found.status == "broken upstream":
        assert dtype in BROKEN_UPSTREAM[family]
    elif not BY_NAME[call].reason and found.status != "not allowed":
        assert found.status == "exact" and found.resumed_tokens > 0
