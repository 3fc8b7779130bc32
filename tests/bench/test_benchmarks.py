"""The benchmark programs run at toy size, and the README's tables come out of their results."""

import importlib
import json
import sys
from pathlib import Path

import pytest


pytest.importorskip("pandas")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def run(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    importlib.import_module(f"benchmarks.{program}").main()


def test_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ("overhead", "short", "tiny-budget", "cold-start", "one-token", "decode", "big-store")
    size = (
        "--tokens",
        "120",
        "--prompts",
        "1",
        "--repeats",
        "1",
        "--new-tokens",
        "3",
        "--store",
        "20",
        "--grid",
        "32",
    )
    chosen = [word for case in cases for word in ("--only", case)]
    run(monkeypatch, "bench_costs", "--model", "jamba-3m", *size, *chosen, "--json", str(tmp_path / "costs.json"))
    content = json.loads((tmp_path / "costs.json").read_text())
    assert list(dict.fromkeys(result["case"] for result in content["results"])) == list(cases)
    assert all(len(result["values"]) == 1 and result["values"][0] >= 0 for result in content["results"])
    assert "over" in capsys.readouterr().out and content["machine"]["torch"]


def test_costs_where_stock_refuses_chunks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--tokens", "80", "--prompts", "1", "--repeats", "1", "--grid", "32")
    run(monkeypatch, "bench_costs", "--model", "mamba-3m", *size, "--only", "overhead")
    printed = capsys.readouterr().out
    assert "one shot" in printed and "same chunks" not in printed


def test_readme_tables_come_from_the_results(tmp_path: Path) -> None:
    table = importlib.import_module("benchmarks.readme_table")
    machine = {"cores": 2, "threads": 2, "cpu": "a chip", "torch": "2", "transformers": "5", "python": "3"}
    ratio = {"median": 16.04, "low": 15.0, "high": 17.0}
    row = {"model": "m", "dataset": "d", "first_token_again_p50": 8.0, "sooner_again": None, "over_limit": None}
    own = {**row, "contender": "learned", "first_token_again_p50": 0.5, "sooner_again": ratio, "over_limit": ratio}
    own |= {"resumed_tokens": 9, "prompt_tokens": 10, "peak_bytes": 2**20, "checked_bitwise": 2, "checked_resumed": 2}
    (tmp_path / "run").mkdir()
    config = {"machine": machine, "command": "bench it", "settings": {"policies": ["learned"]}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"measured": [{**row, "contender": "stock"}, own]}))
    costs = [
        {"model": "m", "case": "memory", "what": "memory taken / 9 MiB", "values": [1.0, 1.02], "bound": "<= 1.10"}
    ]
    (tmp_path / "costs.json").write_text(json.dumps({"machine": machine, "command": "cost it", "results": costs}))
    counts = {"question": 16, "second": 140, "the same prompt again": 0}
    counts |= {"third and later, median": 16, "third and later, most": 19}
    asked = {"model": "m", "exactness": "replayable", "computed": counts, "first token / limit": ratio}
    content = {"machine": machine, "command": "ask it", "results": [asked]}
    (tmp_path / "new_tokens.json").write_text(json.dumps(content))
    text = table.tables(tmp_path)
    assert "in bitwise mode" in text  # of which the results say nothing
    for words in (
        "| m     | replayable | 16 ",
        "16 (at most 19)",
        "16.04 (15.00 to 17.00)",
        "ask it",
        "8.00 s",
        "500 ms",
        "**16.0×** (15.0 to 17.0)",
        "90%",
        "1.0 MiB",
        "bench it",
        "1.010 (1.000 to 1.020)",
    ):
        assert words in text
    once = table.rewritten("# Title\n\nMEASURED_TABLE\n\n## Next\n", text)
    assert once == table.rewritten(once, text) and once.startswith("# Title") and once.endswith("## Next\n")
    with pytest.raises(ValueError, match="README"):
        table.rewritten("nothing", text)
    short = table.summary(table.ROOT / "benchmarks" / "results").splitlines()
    heads = [cell.strip() for cell in short[0].strip("|").split("|")]
    assert len(short) - 2 <= table.MOST_ROWS and heads == ["", "mode", "Mamba", "Jamba", "Zamba2"]


def test_deciding_at_toy_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [[*range(100 * (turn % 3), 100 * (turn % 3) + 90), 9000 + turn, *range(50)] for turn in range(9)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    size = ("--model", "jamba-3m", "--grid", "32", "--requests", "9", "--stored", "80", "--max-memory", "2MiB")
    size += ("--memory-requests", "40", "--remembered", "1000")
    run(monkeypatch, "bench_deciding", str(trace), *size, "--json")
    found = json.loads(capsys.readouterr().out)
    deciding = found["deciding"]
    # The second prompt of each document says where the third leaves it.
    assert deciding["cold"]["requests"] == 6 and deciding["resumed"]["requests"] == 3 and deciding["evictions"] > 0
    for kind in ("cold", "resumed", "all"):
        row = deciding[kind]
        assert row["deciding_seconds"] == pytest.approx(
            sum(row[part] for part in ("cuts", "match and plan", "add", "close"))
        )
        assert 0 < row["deciding_seconds"] < row["prefill_seconds"]
    assert [row["requests"] for row in found["held"]] == [10, 20, 30, 40]
    assert found["held"][-1]["remembered_tokens"] <= 1000 + 200 * 150
    run(monkeypatch, "bench_deciding", str(trace), *size)
    assert "bound 1 %" in capsys.readouterr().out
