"""Every example runs as it stands, offline, on the small built-in models."""

import runpy
import sys
from pathlib import Path

import pytest


# The training has tests of its own, in test_recall.
FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "train_recall")


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "resumed" in printed
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_there_is_one_for_every_way_of_use() -> None:
    assert len(EXAMPLES) >= 10
