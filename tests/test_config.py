"""Settings: what each may be, and that they come back as they were."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from hf_sparse_cache.checks import MOST_ID
from hf_sparse_cache.config import EXACTNESS, STORAGES, SparseCacheConfig, check_storage


OTHER = SparseCacheConfig("1GiB", 3, "bitwise", 64, "last", "a", ("\n\n", "x"), 128, True, 2.5, "int8")


@pytest.mark.parametrize(
    "given",
    [
        {"max_memory": None},
        {"max_memory": 0},
        {"max_checkpoints": 0},
        {"max_checkpoints": None},
        {"grid": 2},
        {"grid": MOST_ID},
        {"pieces": 2},
        {"pieces": MOST_ID},
        {"ambient": True},
        {"cut_tokens": 0},
        {"cut_tokens": 0.0},
        {"cut_tokens": 1.5},
        {"cut_tokens": None},
        {"cut_after": ["a", "b"]},
        {"cut_after": ()},
        *({"exactness": one} for one in EXACTNESS),
        *({"storage": one} for one in STORAGES),
    ],
)
def test_what_a_setting_may_be(given: dict[str, Any]) -> None:
    made = SparseCacheConfig(**given)
    ((name, value),) = given.items()
    assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_memory", -1),
        ("exactness", "loose"),
        ("storage", "fp4"),
        ("storage", None),
        ("max_checkpoints", -1),
        ("max_checkpoints", 1.5),
        ("max_checkpoints", True),
        ("grid", 1),
        ("grid", MOST_ID + 1),
        ("grid", "64"),
        ("pieces", 1),
        ("pieces", MOST_ID + 1),
        ("ambient", 1),
        ("ambient", None),
        ("cut_tokens", -0.5),
        ("cut_tokens", inf),
        ("cut_tokens", nan),
        ("cut_tokens", True),
        ("cut_tokens", "3"),
        ("cut_after", "text"),
        ("cut_after", ("",)),
        ("cut_after", ("a", "")),
        ("cut_after", ("a", 3)),
        ("policy", 3),
        ("policy", "\ud800"),
        ("namespace", None),
        ("namespace", "\ud800"),
    ],
)
def test_what_a_setting_may_not_be_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        SparseCacheConfig(**{name: value})


def test_the_name_that_exactness_had_is_answered_by_the_one_it_has() -> None:
    with pytest.raises(ValueError, match=r"'replayable' took the place of 'numerical'\.$"):
        SparseCacheConfig(exactness="numerical")
    with pytest.raises(ValueError, match=r"not 'loose'\.$"):
        SparseCacheConfig(exactness="loose")
    with pytest.raises(ValueError, match=r"^storage must be 'exact', 'bf16' or 'int8', not 3\.$"):
        check_storage(3)


def test_settings_come_back_from_a_dictionary() -> None:
    content = OTHER.to_dict()
    assert content["cut_after"] == ("\n\n", "x") and content["storage"] == "int8" and len(content) == 11
    assert SparseCacheConfig.from_dict({**content, "later": 1}) == OTHER
    assert SparseCacheConfig.from_dict({}) == SparseCacheConfig() != OTHER
    assert SparseCacheConfig.from_dict({"grid": 8}) == SparseCacheConfig(grid=8)


def test_what_is_set_unless_said_otherwise() -> None:
    assert SparseCacheConfig().to_dict() == {
        "max_memory": "2GiB",
        "max_checkpoints": None,
        "exactness": "replayable",
        "grid": None,
        "policy": "learned",
        "namespace": "",
        "cut_after": (),
        "pieces": None,
        "ambient": False,
        "cut_tokens": None,
        "storage": "exact",
    }


def test_the_card_names_every_setting() -> None:
    lines = OTHER.card().split("\n")
    for name, value in OTHER.to_dict().items():
        assert any(line.startswith(f"| {name} ") and f"`{value!r}`" in line for line in lines)
