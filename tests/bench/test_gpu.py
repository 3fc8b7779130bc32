"""`make gpu`, rehearsed on a CPU: the whole program at toy size, its rows, and what it does where something lacks."""

import importlib
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch


ROOT = Path(__file__).parents[2]
SECTIONS = {"machine", "environment", "exactness", "handle", "profile", "warm", "cold", "batch", "host tier"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    part("gpu").main()


def test_the_whole_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "rows.jsonl"
    small = ("--small", "--device", "cpu", "--family", "Jamba", "--results", str(results))
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *small]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    rows = part("accelerator.ledger").Ledger(results).rows()
    assert {row["section"] for row in rows} == SECTIONS and not any("error" in row for row in rows)
    assert len({(row["section"], row["case"]) for row in rows}) == len(rows)
    for row in rows:
        if row["section"] == "exactness":
            assert row["passed"] and row["sabotage_noticed"] and row["resumed_tokens"]
        if row["section"] == "warm":
            assert row["bitwise"] is True and row["resumed_tokens"] >= 96 and not row["left_out"]
            assert row["sooner_than_stock"]["median"] > 0 and row["sooner_than_limit"] and row["sooner_than_deepcopy"]
    grids = {
        row["grid"]: row["segments"] for row in rows if row["section"] == "cold" and "bitwise, 160" in row["case"]
    }
    assert grids[16] == 2 * grids[32] == 10
    assert all(row["over_stock"]["low"] > 0 for row in rows if row["section"] == "cold")
    assert next(row for row in rows if row["section"] == "profile")["cache"]["operators"] > 100
    # Once more: all rows are there, and without any time what is printed are those.
    before = results.read_bytes()
    main(monkeypatch, *small, "--budget-seconds", "0")
    assert results.read_bytes() == before and "time was over" in (said := capsys.readouterr().out)
    assert "| bfloat16, bitwise, kernels on | 1 of 1 | none | none |" in said
    main(monkeypatch, "--tables", "--results", str(results))
    assert "1 of 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="seed: 0 there, 1 here"):
        main(monkeypatch, *small, "--seed", "1")


def test_without_an_accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="No accelerator was found"):
        main(monkeypatch, "--results", str(tmp_path / "rows.jsonl"))
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_wiped_state_has_to_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = part("accelerator.exact")
    honest = exact._row("Mamba", torch.bfloat16, "bitwise", "cpu")
    assert honest["passed"] and honest["sabotage_noticed"]
    monkeypatch.setattr(exact, "_wipe", lambda handle: None)
    assert not exact._row("Mamba", torch.bfloat16, "bitwise", "cpu")["sabotage_noticed"]


def test_kernels_of_packages_are_named_and_hidden(tmp_path: Path) -> None:
    """A package is taken up by transformers where it can be imported, and is not where it is turned off."""
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("def causal_conv1d_fn(x, weight): return x\n")
    program = (
        "import sys, benchmarks.accelerator.kernels as kernels, torch\n"
        "if sys.argv[1] == 'off': kernels.hidden()\n"
        "from benchmarks.accelerator import hybrids\n"
        "model = hybrids.build('tiny', 'cpu', torch.float32)\n"
        "print(kernels.importable(), kernels.taken_up(model)['causal_conv1d_fn'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "HF_HUB_OFFLINE": "1"}
    said = [
        subprocess.run([sys.executable, "-c", program, way], capture_output=True, text=True, env=environment).stdout
        for way in ("on", "off")
    ]
    assert "causal_conv1d" in said[0].partition("]")[0] and said[0].endswith("causal_conv1d\n")
    assert said[1] == "[] torch\n"


# -- the file of rows -------------------------------------------------------------------------------------------------


def test_rows_outlast_what_cuts_them_off(tmp_path: Path) -> None:
    ledger = part("accelerator.ledger").Ledger(tmp_path / "rows.jsonl")
    ledger.open({"torch": "2"}, {"cpu": "a chip"})
    ledger.measure("warm", "one", lambda: {"seconds": 1.0})
    with ledger.path.open("a") as file:
        file.write('{"section": "warm", "case": "tw')  # a process that was killed
    ledger.open({"torch": "2"}, {"cpu": "another chip"})
    asked: list[str] = []
    for case in ("one", "two", "two"):
        assert ledger.measure("warm", case, lambda: asked.append(case) or {"seconds": 2.0})  # noqa: B023
    assert asked == ["two"]
    assert [row["case"] for row in ledger.rows()] == ["machine", "one", "two"]
    with pytest.raises(part("accelerator.ledger").OtherMachineError, match="torch: 2 there, 3 here"):
        ledger.open({"torch": "3"}, {})


def test_what_goes_wrong_is_a_row_and_may_be_tried_again(tmp_path: Path) -> None:
    ledger = part("accelerator.ledger").Ledger(tmp_path / "rows.jsonl")
    assert ledger.measure("warm", "one", lambda: 1 // 0)
    assert ledger.measure("warm", "two", lambda: {"seconds": 1.0})
    wrong, right = ledger.rows()
    assert "ZeroDivisionError" in wrong["error"] and "test_gpu.py" in wrong["at"] and "error" not in right
    assert "ZeroDivisionError" in part("accelerator.tables").tables(ledger.rows())
    ledger.forget_errors()
    assert [row["case"] for row in ledger.rows()] == ["two"]
    ledger.until = time.time() - 1
    assert not ledger.measure("warm", "one", lambda: {"seconds": 1.0}) and len(ledger.rows()) == 1


def test_a_process_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = part("gpu")
    monkeypatch.setattr(gpu, "_child", lambda setting: None)
    monkeypatch.setattr(gpu.sys, "executable", "false")
    results = tmp_path / "rows.jsonl"
    main(monkeypatch, "--small", "--device", "cpu", "--results", str(results))
    ended = [json.loads(line) for line in results.read_text().splitlines()][1:]
    assert [row["section"] for row in ended] == ["ended early"] * 3 and "ended with 1" in ended[0]["error"]


# -- the compiled planner ---------------------------------------------------------------------------------------------


def test_the_planner_that_is_brought_along_is_this_one() -> None:
    building = part("accelerator.building")
    kept = lzma.decompress(building._KEPT.read_bytes())
    assert kept.startswith(building._made_of(ROOT)), building._REMEDY
    if importlib.import_module("Cython").__version__ in kept[:200].decode():
        assert kept == building.translate(), building._REMEDY


def test_the_planner_compiles_with_nothing_but_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    building = part("accelerator.building")
    (tmp_path / "hf_sparse_cache").mkdir()
    source = tmp_path / "_planner.pyx"
    source.write_bytes((ROOT / source.name).read_bytes())
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(building.sysconfig, "get_config_var", lambda name: {"CC": "cc -O0", "EXT_SUFFIX": ".so"}[name])
    library = building.built(tmp_path)
    spec = importlib.util.spec_from_file_location("hf_sparse_cache._planner", library)
    assert spec is not None and spec.loader is not None
    assert hasattr(importlib.util.module_from_spec(spec), "__spec__")
    assert building.built(tmp_path) == library  # it is there
    library.unlink()
    monkeypatch.setattr(building.sysconfig, "get_config_var", lambda name: {"CC": "no-cc", "EXT_SUFFIX": ".so"}[name])
    with pytest.raises(SystemExit, match="no C compiler 'no-cc'"):
        building.built(tmp_path)
    source.write_text("# changed\n")
    with pytest.raises(SystemExit, match="made of another _planner.pyx"):
        building.built(tmp_path)
