"""`docs/support.md` has a row for every family and every call; `make support` writes it anew."""

import re

import pytest
from matrix import NOT_ON_FLOOR
from matrix_calls import CALLS
from support_table import DOCUMENT, MODES, NOT_RUN, SIGNS, cells
from tiny_families import FAMILIES

from hf_sparse_cache.models.families import REFUSED


@pytest.fixture(scope="module")
def text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def test_no_cell_is_missing(text: str) -> None:
    columns = [call.name for call in CALLS]
    tables = {}
    for part in text.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        lines = (line.strip("| ").split(" | ") for line in body.split("\n#")[0].splitlines())
        tables[title] = {name: signs for name, *signs in lines}
    shown = [mode for mode in MODES if any(title.startswith(f"{mode}, ") for title in tables)]
    assert "bitwise" in shown
    for mode in set(MODES) - set(shown):
        assert f"in {mode} mode this document has 0 of" in text
    for family, mode, dtype, call in cells(modes=shown):
        signs = tables[f"{mode}, {dtype}"][family]
        assert len(signs) == len(columns), f"{family}: run `make support`"
        if set(signs) == {NOT_RUN}:  # a family that was not run in this mode, which the document says
            assert f"in {mode} mode this document has" in text and mode == MODES[0]
        else:
            assert signs[columns.index(call)] in SIGNS.values(), f"{family}, {mode}, {call}: run `make support`"


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
