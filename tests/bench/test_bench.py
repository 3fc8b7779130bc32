"""The bench: what it loads, that it serves in turn and resumes a run, what it counts, and the page it writes."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pandas = pytest.importorskip("pandas")

from hf_sparse_cache import __version__, cli  # noqa: E402
from hf_sparse_cache.bench import metrics, page, workloads  # noqa: E402
from hf_sparse_cache.bench.results import RunFolder, RunSettings, Trial  # noqa: E402
from hf_sparse_cache.tools.builtin import build_tokenizer  # noqa: E402


STORY = "Once upon a time there was a state, and it summed up all that had been read before. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workload folder of two stories with three questions each."""
    path = tmp_path_factory.mktemp("stories")
    texts = [{"id": f"s{i}", "text": f"Story {i}. " + STORY * 25} for i in range(2)]
    texts += [{"id": f"q{i}", "text": f"\nWhat happened in part {i}?"} for i in range(3)]
    requests = [
        {"group_id": f"g{story}", "request_id": f"{story}-{question}", "segments": [f"s{story}", f"q{question}"]}
        for story in range(2)
        for question in range(3)
    ]
    for name, rows in (("texts.jsonl", texts), ("requests.jsonl", requests)):
        (path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (path / "meta.json").write_text(json.dumps({"template": "concat"}), encoding="utf-8")
    return path


def bench(folder: Path, out: Path, *more: str) -> tuple[str, ...]:
    return (
        *("bench", "--model", "zamba2-3m", "--dataset", str(folder), "--grid", "128", "--max-new-tokens", "2"),
        *("--checked", "1", "--requests", "6", "--per-group", "3", "--out", str(out), *more),
    )


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run with a report."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hf-sparse-cache", *bench(folder, out, "--report", str(out / "report.html"))])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 0
    return out


def test_every_contender_serves_every_request_in_turn(done: Path) -> None:
    rows = pandas.read_parquet(done / "requests.parquet")
    served = rows.groupby("contender").size().to_dict()
    # The second question says where the third will leave a text as short as this one.
    assert served == {"stock": 6, "chunked": 6, "deepcopy": 6, "dense": 6, "learned": 6, "limit": 2}
    learned = rows[rows["contender"] == "learned"]
    assert (learned["prompt_tokens"] == learned["resumed_tokens"] + learned["computed_tokens"]).all()
    assert (learned["resumed_tokens"] > 0).sum() == 2 and rows["tokens_equal"].all()
    parts = learned[list(metrics.COSTS)].sum(axis=1)
    assert (parts > 0).all() and (parts < learned["prefill_seconds"]).all()
    assert (learned["prefill_seconds"] <= learned["first_token_seconds"]).all()
    deepcopy = rows[(rows["contender"] == "deepcopy") & (rows["turn"] > 0)]
    assert (deepcopy["resumed_tokens"] >= learned[learned["turn"] > 0]["resumed_tokens"].max()).all()


def test_metrics_and_exactness(done: Path) -> None:
    content = json.loads((done / "metrics.json").read_text())
    (learned,) = (row for row in content["measured"] if row["contender"] == "learned")
    assert learned["checked_bitwise"] == learned["checked_resumed"] == 1
    assert learned["max_abs_logit_diff"] <= 1e-4 and learned["tokens_equal"] == 1.0
    assert learned["held_bytes"] == learned["checkpoint_bytes"] + learned["kv_bytes"] == learned["peak_bytes"] > 0
    assert (learned["sooner_again"]["count"], learned["over_limit"]["count"]) == (4, 2)
    assert learned["decode_tokens_per_second"] > 0
    (summary,) = content["units"]
    assert summary["random_weights"] and summary["left_out"] == {} and summary["grid"] == 128
    assert learned["mode"] == summary["mode"] == "replayable"
    assert all(row["mode"] is None for row in content["measured"] if row["contender"] in ("stock", "limit"))
    for columns, cells in (metrics.metrics_table(content["measured"]), metrics.costs(content["measured"])):
        shown = [row[columns.index("mode")] for row in cells if row[2] in ("learned", "dense")]
        assert shown == ["replayable"] * 2
    assert ", replayable mode: " in metrics.verdict(content["measured"], "learned")[0]
    config = json.loads((done / "config.json").read_text())
    assert config["settings"]["exactness"] == "replayable"
    assert config["machine"]["torch"] and config["settings"]["seed"] == 42 and "bench" in config["command"]
    assert len(list((done / "plots").glob("*.svg"))) == 4


def test_the_report_needs_nothing_from_outside(done: Path) -> None:
    text = (done / "report.html").read_text(encoding="utf-8")
    loading = re.findall(r"(?:src|<link[^>]*href|@import|url)\s*[=(]\s*[\"']?(?!#)([^\"')>\s]+)", text)
    assert [target for target in loading if not target.startswith("#")] == []
    assert "<script" not in text and text.count("<svg") == 4
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two pictures share an id"
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert text.index("verdict'") < text.index("<table")
    for what in ("random weights", "bench --model", "transformers", "seed", "medians, replayable mode", __version__):
        assert what in text


def test_no_picture_has_an_axis_below_zero_and_counts_are_whole(done: Path) -> None:
    """Text of pictures stays text: the labels of the axes are in the SVG."""
    for picture in (done / "plots").glob("*.svg"):
        labels = re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text(encoding="utf-8"))
        assert labels and not any(re.fullmatch(r"[\u2212-]\d.*", label) for label in labels), (picture.name, labels)
        if "overlap-and-checkpoints" in picture.name:
            assert not any("." in label for label in labels if label[:1].isdigit()), labels


def test_a_histogram_that_models_share_stands_once_and_names_them(done: Path) -> None:
    config = json.loads((done / "config.json").read_text(encoding="utf-8"))
    rows = pandas.read_parquet(done / "requests.parquet")
    summaries = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((done / "units").glob("*.json"))]
    twin = [{**summary, "model": "twin"} for summary in summaries]
    both = pandas.concat([rows, rows.assign(model="twin")], ignore_index=True)
    written = page.report_page(config, both, [*summaries, *twin], metrics.summed_up(both, [*summaries, *twin]))
    assert written.count("<svg") == 7 and written.count("the same for twin") == 1
    other = pandas.concat([rows, rows.assign(model="twin", overlap_tokens=7)], ignore_index=True)
    written = page.report_page(config, other, [*summaries, *twin], metrics.summed_up(other, [*summaries, *twin]))
    assert written.count("<svg") == 8 and "the same for" not in written


def test_a_range_of_one_value_is_one_value() -> None:
    assert metrics.ranged(4.96, 5.04, ".1f", "×") == "5.0×" and metrics.ranged(4.0, 5.0, ".1f") == "4.0 to 5.0"
    row = {"model": "m", "dataset": "d", "contender": "learned", "resumed_tokens": 1, "prompt_tokens": 2}
    ratio = {"median": 5.0, "low": 5.0, "high": 5.0}
    assert " to " not in metrics.verdict([{**row, "sooner_again": ratio, "checked_resumed": 0}], "learned")[0]


def test_a_finished_unit_is_not_served_again(
    done: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("served again")

    monkeypatch.setattr("hf_sparse_cache.bench.run.run_trial", refuse)
    run = _runner(monkeypatch)
    assert run(*bench(folder, done, "--json")) == 0
    assert {row["contender"] for row in json.loads(capsys.readouterr().out)["measured"]} >= {"stock", "learned"}
    next((done / "units").glob("*.json")).rename(done / "hidden")
    try:
        assert run(*bench(folder, done)) == 2  # what was interrupted is: here, it is refused
    finally:
        (done / "hidden").rename(done / "units" / "zamba2-3m--stories0--0.json")
    capsys.readouterr()
    assert run(*bench(folder, done, "--seed", "1")) == 2
    assert "other settings (seed)" in capsys.readouterr().err


def _runner(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["hf-sparse-cache", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    return run


def test_recipes_that_are_wrong_upstream_are_left_out() -> None:
    from hf_sparse_cache.bench.contenders import Chunked, Contender, DeepCopy
    from hf_sparse_cache.bench.upstream import why_wrong
    from hf_sparse_cache.tools.builtin import build_model

    jamba = build_model("jamba-3m")
    assert "wrong by" in why_wrong(jamba, lambda: Chunked(jamba, 64), 64)
    assert "wrong by" in why_wrong(jamba, lambda: DeepCopy(jamba, {}), 64)
    assert why_wrong(jamba, lambda: Contender(jamba), 64) == ""


def test_workloads_from_files(tmp_path: Path) -> None:
    rows = [{"article": "A long text.", "question": f"Why {i}?", "other": 1} for i in range(2)]
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    loaded = workloads.load_workload(str(tmp_path / "qa.jsonl"), columns=("article", "question"))
    assert list(loaded.data["text"]) == ["A long text.\n\nWhy 0?", "A long text.\n\nWhy 1?"]
    assert list(loaded.data["group"]) == ["A long text."] * 2
    with pytest.raises(ValueError, match="article"):
        workloads.load_workload(str(tmp_path / "qa.jsonl"), columns=("story",))
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        workloads.load_workload("nowhere.csv")
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}), encoding="utf-8")
    first, second = workloads.load_workload(str(tmp_path / "chat.jsonl")).data["text"]
    assert first.endswith("Hi<|im_end|>\n<|im_start|>assistant\n") and second.startswith(first + "\n"[:0] + "Hello")


def test_requests_keep_what_they_share() -> None:
    texts = [("a", STORY * 9 + "One?"), ("a", STORY * 9 + "Two?"), ("b", STORY + "Three?")]
    loaded = workloads.from_texts("own", texts)
    asked = loaded.requests(build_tokenizer(loaded.texts), seed=0, max_prompt_tokens=60, vocabulary=8192)
    assert sorted(len(one.ids) for one in asked)[-1] == 60
    assert workloads.common_prefixes(asked)["a"] >= 30
    assert len(loaded.first(2, 1).data) == 2 and set(loaded.first(2, 1).data["group"]) == {"a", "b"}


def test_block_hashes_become_tokens(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"template": "hash_ids", "block": 8}), encoding="utf-8")
    rows = [{"hash_ids": [5, 6], "input_length": 12}, {"hash_ids": [5, 7], "input_length": 16}]
    (tmp_path / "requests.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    asked = workloads.load_workload(str(tmp_path)).requests(None, seed=0, max_prompt_tokens=None, vocabulary=100)
    first, second = (one.ids for one in asked)
    assert (
        len(first) == 12
        and len(second) == 16
        and (first[:8] == second[:8]).all()
        and (first[8:] != second[8:12]).all()
    )


def test_a_failed_check_shows_in_the_verdict() -> None:
    row = {"model": "m", "dataset": "d", "contender": "learned", "sooner_again": None, "resumed_tokens": 1}
    row |= {"prompt_tokens": 2, "checked_resumed": 2, "checked_bitwise": 1}
    assert "ONLY 1 EQUAL" in metrics.verdict([row], "learned")[0]


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    trial = Trial([{"a": 1}], {"model": "m", "dataset": "d", "repeat": 0})
    RunFolder(tmp_path, RunSettings(("m",), ("d",)), "bench").save(trial)
    with pytest.raises(ValueError, match="max_memory, repeats"):
        RunFolder(tmp_path, RunSettings(("m",), ("d",), max_memory="1GiB", repeats=2), "bench")
