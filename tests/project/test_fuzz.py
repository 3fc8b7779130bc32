"""A slice of what `make fuzz` runs for minutes, and a world in which it must find something."""

import pytest
from fuzz_requests import Difference, run


def test_a_slice_of_random_requests() -> None:
    tally = run(20, worlds=2, steps=9)
    assert tally["worlds"] == 2 and tally["compared with cold"] and tally["resumed"]


def test_restored_states_that_were_wiped_are_found() -> None:
    with pytest.raises(
        Difference, match=r"(?s)world \d+: (logits|states) differ from those of a cold run.* resumed [1-9]"
    ):
        run(3, worlds=4, steps=12, sabotage=True)
