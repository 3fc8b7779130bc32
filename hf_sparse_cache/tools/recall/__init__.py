"""Small trained models that recall codes from a manual, and the manuals that they are asked about.

The folders beside this file hold the models: weights, tokenizer, card and figures, as `from_pretrained` and people
read them. `examples/train_recall.py` trained them and `benchmarks/bench_recall.py` measured them. Nothing heavy is
imported here, so that a shell can complete the names.
"""

from pathlib import Path

from .manual import CODE_DIGITS as CODE_DIGITS
from .manual import Manual as Manual
from .manual import ManualQuestion as ManualQuestion
from .manual import write_manual as write_manual


# Each with the lines of the manuals that it was measured on: some 2,000 tokens, or 1,000 where all that is known of
# them is in a state of fixed size; and with how many places, and rooms in each, they tell of.
MANUALS: dict[str, dict[str, int]] = {
    "recall-mamba": {"lines": 135, "places": 1, "rooms": 4},
    "recall-jamba": {"lines": 265, "places": 6, "rooms": 5},
    "recall-zamba2": {"lines": 265, "places": 6, "rooms": 5},
}
# Those that a newcomer is shown: a recurrent one and a hybrid, so that it does not take long.
SHOWN = ("recall-mamba", "recall-jamba")


def folder(name: str) -> Path:
    """Where a trained model's files are, for `from_pretrained`.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MANUALS:
        raise ValueError(f"name={name!r} is not a trained model; choose one of {', '.join(MANUALS)}")
    return Path(__file__).parent / name


def chance(name: str) -> float:
    """Share of right answers that is left to a model whose recurrent and conv states were wiped.

    Keys and values of a hybrid still tell the codes of a room, one for each place, but not where the reader is. What
    has no keys and values has lost the whole manual, and guesses digits.
    """
    places = MANUALS[name]["places"]
    return 1 / places if places > 1 else 0.1**CODE_DIGITS
