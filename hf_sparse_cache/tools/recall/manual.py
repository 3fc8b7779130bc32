"""Manuals of a house, and questions whose answers can be checked: what the trained models learn from and are asked.

A manual walks through places, tells the codes of rooms there, and says a lot between them that nobody asks about:

    You come to the mill.
    The code of room 17 is 482.
    The green lamp is heavy.

Every place has the same room numbers with codes of its own, so "The code of room 17 is" can be answered only by who
knows where they are. The place stands long before the question: a recurrent layer has to carry it there.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


PLACES = ("mill", "tower", "harbor", "garden", "chapel", "library")
ROOMS = tuple(str(number) for number in range(11, 23))
CODE_DIGITS = 3
_ADJECTIVES = (
    "green",
    "heavy",
    "old",
    "quiet",
    "small",
    "broken",
    "wooden",
    "narrow",
    "yellow",
    "empty",
    "cold",
    "round",
    "clean",
    "dusty",
    "bright",
    "plain",
)
_NOUNS = (
    "lamp",
    "table",
    "door",
    "ladder",
    "window",
    "carpet",
    "mirror",
    "basket",
    "bottle",
    "curtain",
    "kettle",
    "shelf",
    "clock",
    "blanket",
    "hammer",
    "candle",
)
_FILLERS = (
    "The {adjective} {noun} is {other}.",
    "A {adjective} {noun} stands near the {thing}.",
    "Nobody moved the {noun} from the {thing}.",
    "There is a {adjective} {noun} and a {other} {thing}.",
)


@dataclass(frozen=True)
class ManualQuestion:
    """What follows a manual, such as "The code of room 17 is", and the code that is right there, such as "482"."""

    text: str
    code: str


@dataclass(frozen=True)
class Manual:
    """A text with questions about it.

    Attributes:
        text: ends where a question can follow.
        questions: one for each room of the place where the text ends.
    """

    text: str
    questions: tuple[ManualQuestion, ...]


@dataclass(frozen=True)
class House:
    """What a manual is about: `codes[place][room]`."""

    codes: dict[str, dict[str, str]]

    @staticmethod
    def build(rng: random.Random, places: int, rooms: int) -> "House":
        """As many places with as many rooms each; the numbers of the rooms are the same everywhere."""
        numbers = rng.sample(ROOMS, rooms)
        return House(
            {
                place: {room: "".join(rng.choices("0123456789", k=CODE_DIGITS)) for room in numbers}
                for place in rng.sample(PLACES, places)
            }
        )

    def told(self, place: str) -> list[str]:
        """The lines that tell all of one place."""
        return [arrival(place), *(code_line(room, code) for room, code in self.codes[place].items())]


def arrival(place: str) -> str:
    """The line that says where the reader is from here on."""
    return f"You come to the {place}.\n"


def stay(place: str) -> str:
    """A line that can be finished only by who knows where they are; for training."""
    return f"Nobody moved from the {place}.\n"


def question(room: str) -> str:
    """What a line about a code begins with; its code follows."""
    return f"The code of room {room} is"


def code_line(room: str, code: str) -> str:
    """The line that tells a code."""
    return f"{question(room)} {code}.\n"


def filler(rng: random.Random) -> str:
    """A line that no question is about."""
    adjective, other = rng.sample(_ADJECTIVES, 2)
    noun, thing = rng.sample(_NOUNS, 2)
    return rng.choice(_FILLERS).format(adjective=adjective, noun=noun, other=other, thing=thing) + "\n"


def mixed(rng: random.Random, told: Sequence[str], fillers: int) -> Iterator[str]:
    """The told lines in their order; between two of them, or behind the last, as many others as chance puts there."""
    gaps = Counter(rng.choices(range(len(told)), k=fillers))
    for index, line in enumerate(told):
        yield line
        yield from (filler(rng) for _ in range(gaps[index]))


def vocabulary() -> Iterator[str]:
    """Every token that a manual can have, as `examples/train_recall.py` gives them ids."""
    text = "".join(arrival(place) for place in PLACES) + " ".join(_FILLERS) + question("")
    words = text.replace(".", " ").replace("{", " {").split()
    named = [*_ADJECTIVES, *_NOUNS, *(word for word in words if "{" not in word and "}" not in word)]
    opening = {line.split()[0] for line in (*_FILLERS, arrival(""), question(""))}
    yield from dict.fromkeys(word if word in opening else f" {word}" for word in named)
    yield from (f" {room}" for room in ROOMS)
    for digit in "0123456789":
        yield from (f" {digit}", digit)
    yield from (".", "\n", ".\n")


def write_manual(seed: int, lines: int, places: int, rooms: int, tail: int = 40) -> Manual:
    """Write a manual.

    Args:
        seed: the same seed writes the same manual.
        lines: of the whole text, about 7.7 tokens each.
        places, rooms: how many, and how many rooms each place has.
        tail: lines between the last place that is named and the end.

    Raises:
        ValueError: the codes do not fit into so few lines, or there are not so many places or rooms.
    """
    if not (1 <= places <= len(PLACES) and 1 <= rooms <= len(ROOMS)):
        raise ValueError(
            f"places={places} and rooms={rooms} must be from 1 to {len(PLACES)} and from 1 to {len(ROOMS)}"
        )
    spare = lines - places * (rooms + 1) - 1 - tail
    if spare < 0:
        raise ValueError(f"lines={lines} cannot hold {places} × {rooms} codes; give {lines - spare} or more")
    rng = random.Random(seed)
    house = House.build(rng, places, rooms)
    here = rng.choice(list(house.codes))
    told = [line for place in house.codes for line in house.told(place)]
    text = "".join([*mixed(rng, told, spare), arrival(here), *(filler(rng) for _ in range(tail))])
    return Manual(text, tuple(ManualQuestion(question(room), code) for room, code in house.codes[here].items()))
