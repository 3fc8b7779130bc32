"""`docs/support.md` has a row for every family and every call; `make support` writes it anew."""

import re

import pytest
from matrix import DTYPES, NOT_ON_FLOOR
from matrix_calls import CALLS
from support_table import DOCUMENT, SIGNS, cells
from tiny_families import FAMILIES

from hf_sparse_cache.models.families import REFUSED


@pytest.fixture(scope="module")
def text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def test_no_cell_is_missing(text: str) -> None:
    columns = [call.name for call in CALLS]
    for dtype in DTYPES:
        table = text.split(f"### {dtype}\n")[1].split("###")[0]
        rows = {
            line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")[1:] for line in table.splitlines()
        }
        for family, of_dtype, call in cells():
            if of_dtype == dtype:
                assert len(rows[family]) == len(columns), f"{family}: run `make support`"
                assert rows[family][columns.index(call)] in SIGNS.values(), f"{family}, {call}: run `make support`"


def test_calls_are_those_of_the_tests(text: str) -> None:
    listed = re.findall(r"^\| \d+ \| (.*?) \|", text, flags=re.MULTILINE)
    assert listed == [call.name for call in CALLS], "run `make support`"


def test_every_refused_family_is_listed(text: str) -> None:
    assert all(f"| {model_type} | {reason} |" in text for model_type, reason in REFUSED.items())


def test_nothing_failed(text: str) -> None:
    assert "FAILED" not in text


def test_no_release_lacks_other_families() -> None:
    absent = {label for label, family in FAMILIES.items() if not family.available}
    assert absent <= NOT_ON_FLOOR
