"""Every notebook runs from top to bottom in a fresh kernel, on the small built-in models, and is ready for Colab."""

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def text_of(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the libraries that run it
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if path.stem == "evaluation" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("it needs lm_eval, which `make test-eval` installs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    said = "".join(output["text"] for output in outputs if output.get("name") == "stderr")
    assert "Traceback" not in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_is_ready_for_the_hub(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    source = text_of(notebook)
    link = f"colab.research.google.com/github/hf-sparse-cache/hf_sparse_cache/blob/main/examples/notebooks/{path.name}"
    assert link in notebook.cells[0].source
    assert "%pip install" in notebook.cells[1].source
    assert re.search(r'^MODEL_ID = "(recall-\w+|[\w.]+-3m)"', source, flags=re.MULTILINE)
    assert "recall-jamba" in source  # trained: answers mean something
    for cell in notebook.cells:  # outputs are kept, small, and name no machine
        if cell.cell_type == "code":
            assert cell.execution_count, cell.source
            kept = json.dumps(cell.outputs)
            assert len(kept) < 60_000
            assert not re.search(r"site-packages|/home/|/tmp/", kept), kept[:500]
            assert f"{Path.home()}/" not in kept and str(Path(__file__).parents[2]) not in kept, kept[:500]
            assert not any(output.output_type == "error" for output in cell.outputs)
    assert path.stat().st_size < 200_000


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "chat_and_agent",
        "evaluation",
        "exactness",
        "long_document",
        "planning",
    ]
