"""Running a command line in this process, and a trace for it to read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_sparse_cache import cli


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; returns exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-sparse-cache", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three documents of 700 tokens, four questions each."""
    lines = []
    for document in range(3):
        shared = [1000 * document + token for token in range(700)]
        lines += [json.dumps({"input_ids": [*shared, 5000 + question, *range(40)]}) for question in range(4)]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
