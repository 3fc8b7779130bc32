"""A slice of the hostile files that `make fuzz` makes for minutes, and a world in which it must find something."""

import pytest
from fuzz_files import Difference, run


def test_a_slice_of_hostile_files() -> None:
    tally = run(2000, rounds=12)
    assert tally["rounds"] == tally["inspected"] == 12
    assert tally["resumed"] and tally["cold"] and tally["forged"] and tally["saved over"]


def test_files_whose_checksums_are_not_looked_at_are_found() -> None:
    with pytest.raises(Difference, match=r"tokens were resumed to other logits; after .*(flip|swapped|copied)"):
        run(100, rounds=300, sabotage=True)
