"""The command line: what it prints, in which form, and with which exit code."""

import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from commands import Run

from hf_sparse_cache import SparsePrefixCache, __version__, cli, exactness
from hf_sparse_cache.cli import questions, sources, timing, verdicts, verifying
from hf_sparse_cache.cli.screen import Screen
from hf_sparse_cache.config import POLICY_NAMES
from hf_sparse_cache.planning.policies import POLICIES, Block
from hf_sparse_cache.stats import CacheStats
from hf_sparse_cache.tools import recall
from hf_sparse_cache.tools.builtin import load
from hf_sparse_cache.tools.builtin_sizes import SIZES


DEMO = ("demo", "--model", "jamba-3m", "--tokens", "600", "--grid", "64", "--uncached", "2")


def test_help_names_the_commands_with_an_example(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "verify", "plan", "simulate", "inspect"):
        assert command in out
        assert "Example:" in run(command, "--help")[1]


def test_help_lists_models_and_policies(run: Run) -> None:
    out = " ".join(run("--help")[1].split())
    for name in (*SIZES, *recall.MANUALS, *POLICIES):
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", out), name
    assert tuple(POLICIES) == POLICY_NAMES


@pytest.mark.parametrize("name", ["demo", "verify", "tune", "plan", "simulate", "inspect", "bench", "serve"])
def test_help_says_the_default_of_every_option(name: str) -> None:
    """Click shows those that are not None."""
    command: Any = typer.main.get_command(cli.app)
    for option in command.commands[name].params:
        if option.param_type_name == "option" and not option.is_flag:
            assert (option.default not in (None, "") and option.show_default) or "efault: " in option.help, option.name


def test_demo_times_and_proves(run: Run) -> None:
    code, out, err = run(*DEMO, "--json")
    result = json.loads(out)
    assert (code, err, result["passed"]) == (0, "", True)
    (model,) = result["models"]
    rows = model["questions"]
    assert len(rows) >= 6
    assert rows[0]["resumed_tokens"] == 0
    assert all(row["resumed_tokens"] >= 256 for row in rows[2:])
    assert all(row["prompt_tokens"] == row["resumed_tokens"] + row["computed_tokens"] for row in rows)
    assert all(row["cached_seconds"] > 0 and row["checkpoints"] > 0 and row["stored_bytes"] > 0 for row in rows)
    assert sum(row["uncached_seconds"] is not None for row in rows) == 2
    assert model["ratio_lowest"] > 0
    assert model["exactness"]["bitwise"] and 0 < model["exactness"]["max_abs_logit_diff"] <= 1e-4


def test_demo_writes_markdown_into_a_pipe_and_says_that_weights_are_random(run: Run) -> None:
    code, out, err = run(*DEMO)
    assert (code, err) == (0, "")
    assert "random weights" in out and "EXACT" in out and "\x1b" not in out
    assert sum(line.startswith("| ") for line in out.splitlines()) == 1 + len(sources.QUESTIONS)


def test_demo_reads_a_workload(run: Run, tmp_path: Path) -> None:
    texts = [{"id": "story", "text": "Once upon a time there was a state. " * 60}]
    texts += [{"id": f"q{i}", "text": f"\nWhat happened in part {i}?"} for i in range(6)]
    requests = [{"group_id": "g", "request_id": str(i), "segments": ["story", f"q{i}"]} for i in range(6)]
    for name, rows in (("texts.jsonl", texts), ("requests.jsonl", requests)):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    code, out, _ = run(*DEMO[:3], "--grid", "64", "--workload", str(tmp_path), "--json")
    (model,) = json.loads(out)["models"]
    assert code == 0
    assert [row["question"] for row in model["questions"]] == [f"What happened in part {i}?" for i in range(6)]
    assert model["questions"][-1]["resumed_tokens"] > 0


def test_demo_reads_a_document_and_a_model_from_a_folder(run: Run, tmp_path: Path) -> None:
    text = "A state is a summary of everything read so far. " * 40
    model, tokenizer = load("mamba-3m", [text])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = ("--model", str(tmp_path / "model"), "--document", str(tmp_path / "text.txt"), "--grid", "64")
    code, out, _ = run("demo", *options, "--question", "What is a state?", "--question", "Of what?", "--json")
    assert code == 0
    assert json.loads(out)["models"][0]["questions"][1]["resumed_tokens"] > 0
    code, _, err = run("demo", *options, "--question", "What is a state?")
    assert code == 2 and "--question" in err


def test_verify_is_a_badge(run: Run) -> None:
    options = ("verify", "mamba-3m", "--grid", "32", "--tokens", "120", "--prompts", "2")
    code, out, _ = run(*options)
    assert code == 0 and "exact: " in out and "torch.float32" in out
    code, out, _ = run(*options, "--json")
    assert code == 0 and json.loads(out)["bitwise"] and len(json.loads(out)["prompts"]) == 2


@pytest.mark.parametrize("command", [DEMO, ("verify", "mamba-3m", "--grid", "32", "--tokens", "120")])
def test_a_difference_is_an_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    def differing(*arguments: Any, **options: Any) -> exactness.ExactnessReport:
        report = exactness.check_exactness(*arguments, **options)
        return replace(report, rows=tuple(replace(row, logits_bitwise=False) for row in report.rows))

    for module in (questions, verifying):
        monkeypatch.setattr(module, "check_exactness", differing)
    code, out, _ = run(*command)
    assert code == 1 and "NOT EXACT" in out


def test_simulate_puts_policies_side_by_side(run: Run, trace: Path) -> None:
    options = ("simulate", str(trace), "--policy", "balanced", "--policy", "none", "--max-memory", "1GiB")
    code, out, _ = run(*options, "--json")
    result = json.loads(out)["policies"]
    assert code == 0 and list(result) == ["balanced", "none"]
    assert result["none"]["resumed_tokens"] == 0 < result["balanced"]["resumed_tokens"]
    assert result["balanced"]["overlap_tokens"] == 3 * 3 * 700
    assert "| balanced " in run(*options)[1]


def test_inspect_finds_everything_that_was_saved(run: Run, tmp_path: Path) -> None:
    text = "A state is a summary of everything read so far. " * 40
    model, tokenizer = load("jamba-3m", [text])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shared = torch.arange(10, 110)[None]
    with SparsePrefixCache(model, grid=32, policy=Block(32), exactness="bitwise") as cache:
        for branch in (500, 700):  # both leave the shared part between two cuts
            prompt = torch.cat([shared, torch.arange(branch, branch + 40)[None]], dim=1)
            model.generate(prompt, past_key_values=cache, max_new_tokens=1)
        saved = cache.save_pretrained(tmp_path / "saved")
        kept = cache.stats()
    code, out, _ = run("inspect", str(tmp_path / "saved"), "--json")
    (found,) = json.loads(out)["models"]
    assert code == 0 and found["model"] == "JambaForCausalLM"
    assert [item["position"] for item in found["checkpoints"]] == [32, 64, 96, 128, 128]
    assert [item["segments"] for item in found["checkpoints"]][2:4] == [[32, 64, 96], [32, 64, 96, 128]]
    assert [item["depth"] for item in found["checkpoints"]] == [0, 1, 2, 3, 3]
    assert len(found["checkpoints"]) == saved == kept.checkpoints
    # Files have headers, and are packed where that makes them smaller.
    for kind in ("state", "kv"):
        held = kept.checkpoint_bytes if kind == "state" else kept.kv_bytes
        assert 0.6 * held < sum(item[f"{kind}_bytes"] for item in found["checkpoints"]) < 1.3 * held
    code, out, _ = run("inspect", str(tmp_path / "saved"), "--tree", "--tokenizer", str(tmp_path / "tokenizer"))
    assert code == 0 and "|       128 " in out and "5 checkpoints" in out
    assert "In " not in out
    _, out, _ = run("inspect", str(tmp_path))
    assert f"In {tmp_path / 'saved'}:" in out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("verify", "no-such-model"), "no-such-model"),
        (("demo", "--nonsense"), "--nonsense"),
        (("demo", "--model", "mamba-3m", "--policy", "guess"), "guess"),
        (("demo", "--model", "mamba-3m", "--max-memory", "1KiB"), "max_memory"),
        (("demo", "--workload", "nowhere"), "nowhere"),
        (("verify", "mamba-3m", "--tokens", "300"), "--grid"),
        (("verify", "mamba-3m", "--dtype", "float7"), "float7"),
        (("simulate", "nowhere.jsonl"), "nowhere.jsonl"),
        (("inspect", "nowhere"), "nowhere"),
        (("plan", "--model", "mamba-3m", "--tokens", "100"), "256"),
        (("plan", "mamba-3m"), "--model mamba-3m"),
        (("plan", "nowhere.jsonl"), "nowhere.jsonl"),
        (("plan", "--png", "plan.png"), "TRACE"),
        (("nonsense",), "nonsense"),
        (("demo", "--question", "Why?"), "--document"),
        (("demo", "--document", "nowhere.txt", "--question", "a", "--question", "b"), "--document nowhere.txt"),
        (("verify", "mamba-3m", "--document", "nowhere.txt"), "--document nowhere.txt"),
        (("plan", "--model", "mamba-3m", "--device", "cpu"), "--device"),
        (("verify", "mamba-3m", "--device", "nowhere"), "device='nowhere'"),
        (("verify", "mamba-3m", "--dtype", "int8"), "dtype='int8'"),
        (("simulate", "."), "meta.json"),
        (("simulate", __file__), "line 1 is not JSON"),
        (("inspect", __file__), "DIR"),
        (("verify", "Nobody/no-such-model"), "MODEL Nobody/no-such-model is not in the local cache"),
        (("plan", "--model", "Nobody/no-such-model"), "built-in model, which needs no download: mamba-3m"),
        (("inspect", ".", "--tokenizer", "jamba-3m"), "--tokenizer jamba-3m"),
        (("inspect", ".", "--tokenizer", "Nobody/no-such-model"), "--tokenizer Nobody/no-such-model"),
        (("demo", "--model", "jamba-3m", "--tokens", "100"), "fewer than two grid steps of 256"),
        (("bench", "--rival", "guess"), "--rival guess"),
        (("bench", "--repeats", "0"), "--repeats"),
    ],
)
def test_errors_are_one_line(run: Run, arguments: tuple[str, ...], named: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and named in err
    assert err.startswith("hf-sparse-cache: ") and len(err.strip().splitlines()) == 1


def test_an_unknown_policy_is_answered_with_names(run: Run, trace: Path) -> None:
    err = run("simulate", str(trace), "--policy", "guess")[2]
    assert err.strip().endswith("junction, none")


def test_a_trace_that_cannot_be_read_is_named_to_the_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for content, said in (
        ("", f"trace {path} holds no prompt"),
        ('[1, 2]\n\n{"ids": [3]}', f"{path}: line 3 has a row with keys ['ids']"),
        ('[1, 2]\n["a"]', f"{path}: line 2 has a prompt"),
        ("[1, 2]\n[[1], [2, 3]]", f"{path}: line 2 has a prompt"),
    ):
        path.write_text(content, encoding="utf-8")
        assert said in run("simulate", str(path))[2]


def test_sizes_that_nobody_named_are_said_to_be_assumed(run: Run, trace: Path) -> None:
    for command in ("plan", "simulate"):
        given = (command, str(trace), "--policy", "last", "--max-memory", "1GiB")
        _, out, _ = run(*given)
        assert "1.0 MiB of states" in out and "(assumed; give --model or --state-bytes)" in out and "1.0 GiB" in out
        assert "cuts every 64 tokens" in out
        named = run(*given, "--state-bytes", "5000")[1]
        assert "(assumed; give" not in named and "(assumed, and finer" in named  # the grid, by nobody
        assert "assumed" not in run(*given, "--state-bytes", "5000", "--grid", "64")[1]
    assert "no limit" in run("simulate", str(trace), "--policy", "last")[1]


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "hf_sparse_cache", "--version"]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip() == __version__


def test_no_command_is_a_question_for_help(run: Run) -> None:
    code, out, err = run()
    assert code == 2 and "simulate" in out and err == ""


def test_a_workload_that_lacks_a_column(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"id": "a"}', encoding="utf-8")
    (tmp_path / "requests.jsonl").write_text('{"group_id": "g", "segments": ["a"]}', encoding="utf-8")
    code, _, err = run("demo", "--workload", str(tmp_path))
    assert code == 2 and "'text' is missing" in err and "KeyError" not in err


def test_json_is_json_whatever_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Strictly: Python's NaN and Infinity are not JSON, and figures of numpy are figures."""
    Screen(True).emit({"nan": float("nan"), "n": np.int64(3), "x": [np.float32(0.5), float("inf")], "p": Path("a")})
    written = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert written == {"nan": None, "n": 3, "x": [0.5, None], "p": "a"}


def test_a_pipe_without_our_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["hf-sparse-cache", "verify", "mamba-3m", "--grid", "32", "--tokens", "120"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0 and b"max |? logit|" in written.getvalue()


def test_a_terminal_gets_a_drawn_table_without_colour_when_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    options = ("verify", "mamba-3m", "--grid", "32", "--tokens", "120", "--prompts", "1")
    assert "\x1b[32m" in run(*options)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = run(*options)[1]
    assert "────" in plain and "|----" not in plain and "\x1b[3" not in plain


def test_one_figure_is_not_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    report = exactness.ExactnessReport((exactness.ExactnessRow(600, 512, True, True, 0.0, True, "resumed"),), 1e-4)
    rows = [
        verdicts.Answered("d", "q", 600, 512, 512, 88, 1.0, seconds, 1, 1000, "resumed") for seconds in (3.31, 3.33)
    ]
    verdicts.show(verdicts.Result("m", 256, tuple(rows), report, CacheStats()), Screen())
    out = capsys.readouterr().out
    assert "came 3.3× sooner" in out and "EXACT: 1 prompt run" in out


def test_time_to_first_token_is_that_of_one_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stops when the first new token is handed out, not when all are there."""
    seen: list[dict[str, Any]] = []

    class Model:
        def generate(self, prompt: torch.Tensor, *, streamer: Any, **options: Any) -> torch.Tensor:
            seen.append(options)
            streamer.put(prompt)
            for step in range(3):
                time.sleep(0.05 if step == 0 else 0.25)
                streamer.put(torch.tensor([step]))
            streamer.end()
            return torch.cat([prompt, torch.tensor([[4, 8, 2]])], dim=1)

    class Words:
        def decode(self, ids: torch.Tensor) -> str:
            return " " + "".join(map(str, ids.tolist()))

    asker = timing.Asker(Model(), Words())
    reply = asker.reply(torch.zeros((1, 3), dtype=torch.long), 3)
    assert reply.text == "482" and 0.05 <= reply.seconds < 0.3
    assert seen[0]["max_new_tokens"] == 3 and seen[0]["do_sample"] is False
    assert asker.cpu_share < 0.5  # a thread that sleeps looks like one that others keep from running
    asker.reply(torch.zeros((1, 3), dtype=torch.long), 0)
    assert seen[1]["max_new_tokens"] == 1


def test_demo_shows_answers_and_what_lost_states_do_to_them(run: Run) -> None:
    options = ("demo", "--documents", "1", "--model", "recall-jamba", "--uncached", "1", "--tokens", "1000")
    code, out, err = run(*options, "--json")
    (model,) = json.loads(out)["models"]
    rows = model["questions"]
    assert (code, err) == (0, "")
    assert len(rows) == 5 and sum(row["resumed_tokens"] > 512 for row in rows) >= 3
    assert sum(row["answer"] == row["expected"] for row in rows) >= 4
    asked = [row for row in rows if row["uncached_answer"] is not None]
    assert len(asked) == 1 and asked[0]["answer"] == asked[0]["uncached_answer"]
    wiped = model["wiped"]
    assert wiped["rejected"] and len(wiped["questions"]) == 4 and wiped["right"] <= 1
    assert wiped["max_abs_logit_diff"] > 1e-2 and wiped["chance"] == 1 / 6
    code, out, _ = run(*options)
    assert code == 0 and "random weights" not in out
    assert out.count(" right |") >= 4 and "| states wiped: The code of room" in out and "| rejected " in out
    assert "of 5 right with the cache" in out and "the check rejects it" in out


def test_demo_fails_when_lost_states_are_not_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    report = exactness.ExactnessReport((exactness.ExactnessRow(600, 512, True, True, 0.0, True, "resumed"),), 1e-4)
    monkeypatch.setattr(questions, "check_exactness", lambda *arguments, **options: report)
    code, out, _ = run("demo", "--documents", "1", "--model", "recall-jamba", "--uncached", "0", "--tokens", "800")
    assert code == 1 and "AND THE CHECK DID NOT NOTICE" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--quick", "--tokens", "100"), "--tokens 100 is too short for a manual that recall-"),
        (
            ("--model", "recall-jamba", "--document", __file__, "--question", "a"),
            "--model recall-jamba knows no words",
        ),
        (("--model", "recall-jamba", "--workload", "."), "--model recall-jamba knows no words"),
    ],
)
def test_trained_models_read_manuals_only(run: Run, arguments: tuple[str, ...], named: str) -> None:
    code, _, err = run("demo", *arguments)
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1


def test_a_busy_machine_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    report = exactness.ExactnessReport((exactness.ExactnessRow(600, 512, True, True, 0.0, True, "resumed"),), 1e-4)
    rows = (verdicts.Answered("d", "q", 600, 512, 512, 88, 1.0, 3.3, 1, 1000, "resumed"),)
    for share, busy in ((0.4, True), (0.95, False)):
        result = verdicts.Result("m", 256, rows, report, CacheStats(), cpu_share=share)
        verdicts.show(result, Screen())
        assert ("THE MACHINE WAS BUSY" in capsys.readouterr().out) == busy == result.to_dict()["busy"]
