"""The paper's figure: made of any rows, and its verdict can go either way."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest


pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from benchmarks import bench_paper
from benchmarks.bench_paper import AWARE, BASELINES, Curve, gains_most_early, verdicts


def test_a_file_becomes_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(1)
    words = [f"word{number}" for number in range(400)]
    with (tmp_path / "asked.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(4):
            article = " ".join(draw.choice(words, 300))
            for _ in range(4):
                file.write(json.dumps({"article": article, "question": " ".join(draw.choice(words, 8))}) + "\n")
    command = ["bench_paper", str(tmp_path / "asked.jsonl"), "--columns", "article", "question", "--counts", "1", "4"]
    with mock.patch("sys.argv", [*command, "--model", "mamba-3m", "--out", str(tmp_path / "out")]):
        bench_paper.main()
    found = json.loads((tmp_path / "out" / "paper.json").read_text(encoding="utf-8"))
    curve = found["curves"][0]
    assert found["counts"] == [1, 4] and set(curve["tokens"]) == {*BASELINES, *AWARE}
    for policy, tokens in curve["tokens"].items():
        assert 0 <= tokens[1] <= tokens[0] + 64 <= curve["shared_tokens"] + 128, policy
        assert all(0 <= seconds < 10 for seconds in curve["seconds"][policy])
    assert "The claim for `learned`" in (tmp_path / "out" / "paper.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "paper.svg").read_text(encoding="utf-8").count("</svg>") == 1


@pytest.mark.parametrize(
    ("own", "held", "early"), [([10, 5, 2], "yes yes yes", True), ([90, 30, 2], "no yes yes", False)]
)
def test_the_claim_is_held_against_each_point(own: list[float], held: str, early: bool) -> None:
    rivals = {name: [80.0, 40.0, 8.0] for name in BASELINES} | {"block": [50.0, 60.0, 9.0]}
    curve = Curve("planted", 100.0, {**rivals, "learned": own, "dp": own})
    assert " ".join(row[-1] for row in verdicts(curve, (1, 4, 16), "learned")) == held
    assert verdicts(curve, (1, 4, 16), "learned")[0][1] == "block 50.0"
    assert gains_most_early(curve, (1, 4, 16), "learned") == early
