"""The advisor, `hf-sparse-cache plan`: policies side by side, where prompts part, and what memory is worth."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run

from hf_sparse_cache import simulate
from hf_sparse_cache.cli import advising, estimates
from hf_sparse_cache.planning.policies import POLICIES, Policy
from hf_sparse_cache.store.slabs import PAGE_BYTES, taken
from hf_sparse_cache.tools.traces import load_trace


OPTIONS = ("--state-bytes", "1000", "--grid", "100")


def advice(run: Run, trace: Path, *options: str) -> dict[str, Any]:
    code, out, err = run("plan", str(trace), *OPTIONS, *options, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_every_policy_beside_the_most_that_the_cuts_allow(run: Run, trace: Path) -> None:
    found = advice(run, trace, "--max-memory", "6000")
    assert set(found["policies"]) == set(POLICIES) - {"none", "boundary"}
    assert found["trace"] == {"name": "trace.jsonl", "requests": 12, "prompt_tokens": 8892, "overlap_tokens": 6300}
    every = found["every_cut"]
    assert (every["checkpoints"], every["peak_bytes"], every["resumed_tokens"]) == (21, 21_000, 6300)
    for name, row in found["policies"].items():
        result = simulate(trace, policy=name, max_memory=6000, state_bytes=1000, grid=100)
        assert (row["resumed_tokens"], row["evictions"]) == (result.resumed_tokens, result.evictions)
        assert row["recomputed_tokens"] == pytest.approx((6300 - result.resumed_tokens) / 12)
        assert row["regret_tokens"] == pytest.approx(row["recomputed_tokens"] - every["recomputed_tokens"])
        assert row["peak_bytes"] <= 6000
    most = max(row["resumed_tokens"] for row in found["policies"].values())
    alike = {name for name, row in found["policies"].items() if most - row["resumed_tokens"] <= 6}  # of 6,300
    assert set(found["tied"]) == alike and found["best"] == found["tied"][0]
    held = [found["policies"][name]["peak_bytes"] for name in found["tied"]]
    assert held == sorted(held)


def test_a_tie_is_called_one_and_the_cheapest_is_recommended(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps([*range(10, 410), question]) for question in range(8)), encoding="utf-8")
    policies = ("--policy", "learned", "--policy", "dp", "--policy", "last", "--policy", "none")
    found = advice(run, path, *policies)
    resumed = {name: row["resumed_tokens"] for name, row in found["policies"].items()}
    assert resumed["learned"] == resumed["dp"] == resumed["last"] > resumed["none"]
    assert found["tied"] == ["last", "dp", "learned"] and found["best"] == "last"
    out = run("plan", str(path), *OPTIONS, *policies)[1]
    assert "last, dp and learned tie" in out and "Of them last holds the fewest bytes, 1000 B" in out
    alone = run("plan", str(path), *OPTIONS, "--policy", "learned", "--policy", "none")[1]
    assert "Most is resumed by learned." in alone and " tie" not in alone


def test_a_plan_has_one_row_for_a_number_of_checkpoints(run: Run, trace: Path) -> None:
    rows = advice(run, trace, "--policy", "last")["plans"]
    assert [row["checkpoints"] for row in rows] == [1]  # all part at one place: a second would save nothing
    spread = json.loads(run("plan", *OPTIONS, "--tokens", "500", "--json")[1])["plans"]
    assert [row["checkpoints"] for row in spread] == [1, 2, 4, 5]


@pytest.mark.parametrize("exactness", ["bitwise", "replayable"])
def test_a_plan_promises_no_more_than_is_resumed(run: Run, tmp_path: Path, exactness: str) -> None:
    """Prompts that end a token behind what they share can resume less of it, as two tokens are always computed."""
    path = tmp_path / "trace.jsonl"
    ids = [[*range(10, 410), question] for question in range(500, 508)]
    path.write_text("\n".join(map(json.dumps, ids)), encoding="utf-8")
    (row,) = advice(run, path, "--policy", "last", "--exactness", exactness)["plans"]

    class Planned(Policy):
        def place(self, prompt: Any) -> list[int]:
            return list(row["positions"])

    kept = simulate(path, policy=Planned(), state_bytes=1000, grid=100, exactness=exactness)
    assert row["positions"] == [300] and row["recomputed_tokens"] == pytest.approx(7 * 100 / 8)
    assert kept.recomputed_tokens <= row["recomputed_tokens"]


def test_the_grid_is_said_to_be_assumed(run: Run, trace: Path) -> None:
    for options, assumed in ((("--state-bytes", "1000"), True), (OPTIONS, False), (("--model", "mamba-3m"), False)):
        out = run("plan", str(trace), *options, "--policy", "last")[1]
        assert ("finer than that of most models" in out) == assumed, options


def test_every_cut_is_what_a_checkpoint_at_every_cut_resumes(run: Run, trace: Path) -> None:
    """Beside the store itself, with a policy that keeps them all."""
    every = advice(run, trace, "--policy", "last", "--kv-bytes-per-token", "3", "--warmup", "0.25")["every_cut"]

    class All(Policy):
        def place(self, prompt: Any) -> list[int]:
            return list(prompt.cuts)

    kept = simulate(trace, policy=All(), eviction="lru", state_bytes=1000, kv_bytes_per_token=3, grid=100, warmup=0.25)
    for name in ("resumed_tokens", "checkpoints", "peak_bytes", "capture_rate", "recomputed_tokens"):
        assert every[name] == pytest.approx(getattr(kept, name)), name


def test_the_histogram_counts_each_request_once(run: Run, trace: Path) -> None:
    histogram = advice(run, trace, "--policy", "last", "--policy", "none")["histogram"]
    width = histogram["width_tokens"]
    counts = dict(zip(histogram["starts"], histogram["requests"], strict=True))
    assert counts[0] == 3 and counts[700 // width * width] == 9 and sum(counts.values()) == 12
    assert histogram["positions"] == [700] and sum(histogram["checkpoints"]) == 3


def test_the_frontier_knows_less_and_more_memory(run: Run, trace: Path) -> None:
    found = advice(run, trace, "--max-memory", "6000", "--policy", "learned", "--policy", "block", "--policy", "dp")
    rows = found["frontier"]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    assert policies[0] == "learned" and len(policies) == 2
    for name in policies:
        own = [row for row in rows if row["policy"] == name]
        assert [row["max_memory"] for row in own] == sorted({row["max_memory"] for row in own})
        assert all(row["peak_bytes"] <= row["max_memory"] for row in own)
        assert own[0]["recomputed_tokens"] >= own[-1]["recomputed_tokens"]
        assert any(row["max_memory"] == 6000 for row in own)
        assert own[0]["max_memory"] < 6000
        again = simulate(trace, policy=name, max_memory=own[0]["max_memory"], state_bytes=1000, grid=100)
        assert again.recomputed_tokens == pytest.approx(own[0]["recomputed_tokens"])


def test_no_budget_is_below_one_checkpoint(run: Run, trace: Path) -> None:
    rows = advice(run, trace, "--max-memory", "6000", "--policy", "last", "--kv-bytes-per-token", "2")["frontier"]
    assert min(row["max_memory"] for row in rows) >= 1000 + 100 * 2


def test_the_trace_is_loaded_once(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    keep = Path.open

    def noted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path)
        return keep(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", noted)
    advice(run, trace)
    assert opened.count(trace) == 1
    opened.clear()
    run("simulate", str(trace), "--json")
    assert opened.count(trace) == 1


def test_sizes_come_from_the_model_and_the_request_count_from_the_caller(run: Run, trace: Path) -> None:
    code, out, _ = run("plan", str(trace), "--model", "jamba-3m", "--grid", "100", "--requests", "8", "--json")
    found = json.loads(out)
    assert code == 0 and found["kv_bytes_per_token"] > 0 and found["trace"]["requests"] == 8
    (one,) = found["plans"][:1]
    assert one["positions"] == [700] and one["recomputed_tokens"] == pytest.approx(0)
    spans = 7 * taken(100 * found["kv_bytes_per_token"])  # a checkpoint's keys and values have a slot for each segment
    assert found["page_bytes"] == PAGE_BYTES and one["bytes_per_prompt"] == taken(found["state_bytes"]) + spans


def test_storage_is_planned_for_and_its_worth_is_said(run: Run, trace: Path) -> None:
    """Without a model as float32, with one as measured on it; beside what the same budget holds exactly."""
    exact, small = (advice(run, trace, "--max-memory", "999", "--storage", kept) for kept in ("exact", "int8"))
    assert (exact["state_bytes"], small["state_bytes"], small["storage"]) == (1000, 266, "int8")
    assert exact["kept_exactly"] is None
    told = simulate(
        load_trace(trace), policy=small["best"], max_memory=999, state_bytes=1000, grid=100, storage="int8"
    )
    best, without = small["policies"][small["best"]], small["kept_exactly"]
    assert (best["resumed_tokens"], best["peak_bytes"]) == (told.resumed_tokens, told.peak_bytes)
    assert without["resumed_tokens"] < best["resumed_tokens"] and without["peak_bytes"] <= 999
    code, out, _ = run("plan", str(trace), *OPTIONS, "--max-memory", "999", "--storage", "int8")
    assert code == 0 and "Kept as int8 it resumes" in " ".join(out.split())
    for command in ("plan", "simulate"):
        options = ("--model", "jamba-3m", "--grid", "100", "--policy", "learned", "--storage", "int8", "--json")
        found = json.loads(run(command, str(trace), *options)[1])
        assert found["storage"] == "int8" and found["state_bytes"] < 0.5 * 113_000


def test_a_model_is_planned_for_with_its_own_prefill_cost() -> None:
    from hf_sparse_cache.tools.builtin import build_model

    sizes = estimates.Sizes.of(build_model("jamba-3m"), 100)
    cost = sizes.options["prefill_cost"](np.asarray([0.0, 1000.0, 2000.0]))
    assert cost[2] > 2 * cost[1] > 0


def test_cut_ids_cut_and_bring_boundary_in(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    ids = [[*range(10, 150), 5, *range(200, 240), question] for question in range(300, 306)]
    path.write_text("\n".join(map(json.dumps, ids)), encoding="utf-8")
    found = advice(run, path, "--cut-id", "5", "--max-checkpoints", "1")
    assert "boundary" in found["policies"] and found["every_cut"]["resumed_tokens"] == 5 * 141
    assert load_trace(path)[0][140] == 5


def test_tables_on_the_screen(run: Run, trace: Path) -> None:
    code, out, err = run("plan", str(trace), *OPTIONS, "--max-memory", "6000", "--policy", "learned")
    assert (code, err) == (0, "")
    for words in (
        "12 requests",
        "| policy, bitwise ",
        "| learned ",
        "| every cut, no limit ",
        "█",
        "budget",
        "positions",
        "cuts every 100",
    ):
        assert words in out


def test_replayable_mode_is_simulated_and_named(run: Run, tmp_path: Path) -> None:
    trace, both = tmp_path / "trace.jsonl", {}
    lines = [[*range(730), 5000 + question, *range(40)] for question in range(6)]
    trace.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for mode in ("bitwise", "replayable"):
        code, out, _ = run("plan", str(trace), *OPTIONS, "--policy", "learned", "--exactness", mode, "--json")
        assert code == 0
        both[mode] = json.loads(out)
        assert both[mode]["exactness"] == mode
        assert mode in run("plan", str(trace), *OPTIONS, "--policy", "learned", "--exactness", mode)[1]
        assert f"policy, {mode}" in run("simulate", str(trace), "--policy", "learned", "--exactness", mode)[1]
    resumed = {mode: found["policies"]["learned"]["resumed_tokens"] for mode, found in both.items()}
    assert resumed["replayable"] > resumed["bitwise"]  # junctions are exact there
    assert both["replayable"]["every_cut"]["resumed_tokens"] >= resumed["replayable"]
    assert (
        run("plan", str(trace), "--exactness", "numerical")[2].count("'replayable' took the place of 'numerical'") == 1
    )


def test_without_a_trace_it_spreads(run: Run) -> None:
    code, out, _ = run("plan", "--model", "mamba-3m", "--tokens", "1000", "--grid", "10", "--json")
    plans = json.loads(out)["plans"]
    assert code == 0 and plans[0]["positions"] == [500]
    costs = [row["recomputed_tokens"] for row in plans]
    assert costs == sorted(costs, reverse=True)
    assert "cuts every 10 tokens" in run("plan", "--grid", "10")[1]


def test_pictures(run: Run, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = tmp_path / "plan.png"
    options = ("plan", str(trace), *OPTIONS, "--max-memory", "6000", "--png", str(pictures))
    code, out, _ = run(*options)
    content = pictures.read_bytes()
    assert code == 0 and str(pictures) in out and content.startswith(b"\x89PNG") and len(content) > 20_000
    run(*options[:4], "--policy", "last", "--png", str(pictures))
    assert pictures.read_bytes() != content


def test_pictures_without_matplotlib_name_the_extra(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(advising, "advise", lambda *_: pytest.fail("served the trace before it looked"))
    code, _, err = run("plan", str(trace), *OPTIONS, "--policy", "last", "--png", "plan.png")
    assert code == 2 and "hf_sparse_cache[bench]" in err


def test_a_trace_that_shares_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("[1, 2, 3]\n[4, 5, 6]", encoding="utf-8")
    code, _, err = run("plan", str(path))
    assert code == 2 and "nothing to plan" in err
