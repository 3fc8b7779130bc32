"""Every notebook runs as it stands, offline, on the small built-in models, and is kept with its outputs."""

import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(path.parent)
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for index, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {index + 1}", "exec"), names)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert all(cell["execution_count"] for cell in cells)


def test_there_are_four() -> None:
    assert len(NOTEBOOKS) == 4
