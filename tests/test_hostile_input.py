"""Hostile input to the command line and to public functions: one line that names argument, value and remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Run

from hf_sparse_cache import (
    CheckpointStore,
    SparseCacheConfig,
    SparsePrefixCache,
    check_exactness,
    plan_checkpoints,
    simulate,
)
from hf_sparse_cache.checks import printable, shown, token_ids
from hf_sparse_cache.cli.screen import Screen
from hf_sparse_cache.stats import parse_bytes
from hf_sparse_cache.tools.traces import Trace, load_trace


DEEP = "[" * 100_000
TEXTS = '{"id": "a", "text": "hello world"}'
REQUEST = '{"group_id": "g", "segments": ["a"]}'
NAMES = ("KeyError", "RecursionError", "OverflowError", "TypeError", "AttributeError", "IndexError", "Traceback")


def refused(run: Run, *arguments: str) -> str:
    """What a command says that fails: one line, with no name of an exception and nothing that steers a terminal."""
    code, out, err = run(*arguments)
    assert code == 2 and (out == "" or arguments[0] == "bench") and err.startswith("hf-sparse-cache: ")
    assert len(err.splitlines()) == 1 and err[:-1].isprintable()
    assert not [name for name in NAMES if name in err]
    return err


# One line of a trace, and what is said of it.
LINES = {
    DEEP: "nested too deep",
    "[1, 2, 999999999999999999999999999999]": "999999999999999999999999999999; ids go from 0 to 2,147,483,647",
    "[4294967296, 1]": "token id 4294967296",
    "[2147483648]": "token id 2147483648",
    "[18446744073709551615]": "token id 18446744073709551615",
    "[9223372036854775808, -1]": "token id 9223372036854775808",
    "[5, -7]": "token id -7",
    "[1, true]": "truth values",
    "[1.0, 2.0]": "give integer token ids",
    "[1, null]": "give integer token ids",
    "[NaN]": "NaN is no number of JSON",
    "1e999": "give integer token ids",
    "9" * 5000: "not JSON",
    "null": "give integer token ids",
    "[]": "an empty prompt",
    "[[]]": "an empty prompt",
    "[[1], [2, 3]]": "nested lists",
    '"abc"': "give integer token ids",
    "{}": "name the one with token ids 'input_ids'",
    '{"input_ids": [1], "input_ids": [2]}': "the key 'input_ids' comes twice",
    '{"input_ids": [1], "output_ids": [-1]}': "output_ids has a prompt with the token id -1",
    '{"\\u001b[31m": 1}': "keys ['\\x1b[31m']",
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:20])
def test_a_line_of_a_trace(run: Run, tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"[1, 2, 3]\n{line}\n")
    for command in ("simulate", "plan"):
        said = refused(run, command, str(path))
        assert LINES[line] in said and f"{path}: line 2" in said
    assert list(tmp_path.iterdir()) == [path]


FOLDERS = [
    # meta.json, requests.jsonl, texts.jsonl or None, what is said
    ("", REQUEST, TEXTS, "meta.json is not JSON"),
    (DEEP, REQUEST, TEXTS, "nested too deep"),
    ("[]", REQUEST, TEXTS, "give an object with 'template'"),
    ("{}", REQUEST, TEXTS, "template=None"),
    ('{"template": ["concat"]}', REQUEST, TEXTS, "template=['concat']"),
    ('{"template": "concat"}', REQUEST, None, "has no texts.jsonl"),
    ('{"template": "concat"}', "", TEXTS, "holds no prompt"),
    ('{"template": "concat"}', "5", TEXTS, "line 1 holds 5"),
    ('{"template": "concat"}', "{}", TEXTS, "'segments' is missing"),
    ('{"template": "concat"}', '{"segments": ["a"]}', TEXTS, "'group_id' is missing"),
    ('{"template": "concat"}', '{"group_id": ["g"], "segments": ["a"]}', TEXTS, "group_id must be a string"),
    ('{"template": "concat"}', '{"group_id": "g", "segments": []}', TEXTS, "segments is []"),
    ('{"template": "concat"}', '{"group_id": "g", "segments": "a"}', TEXTS, "segments is 'a'"),
    ('{"template": "concat"}', '{"group_id": "g", "segments": [["a"]]}', TEXTS, "['a'] is missing in texts.jsonl"),
    ('{"template": "concat"}', '{"group_id": "g", "segments": ["b"]}', TEXTS, "'b' is missing in texts.jsonl"),
    ('{"template": "concat"}', REQUEST, "[1]", "line 1 holds [1]"),
    ('{"template": "concat"}', REQUEST, '{"id": "a"}', "'text' is missing"),
    ('{"template": "concat"}', REQUEST, '{"id": "a", "text": 5}', "text must be a string"),
    ('{"template": "concat"}', REQUEST, '{"id": "a", "text": "\\ud800"}', "half of a surrogate pair"),
    ('{"template": "chatml"}', REQUEST, TEXTS, "role of the text 'a' must be a string, got None"),
    ('{"template": "hash_ids"}', "{}", None, "block in"),
    ('{"template": "hash_ids", "block": 0}', "{}", None, "got 0"),
    ('{"template": "hash_ids", "block": 1e400}', "{}", None, "got inf"),
    ('{"template": "hash_ids", "block": 1000000000000}', "{}", None, "got 1000000000000"),
    ('{"template": "hash_ids", "block": 16}', "{}", None, "'hash_ids' is missing"),
    ('{"template": "hash_ids", "block": 16}', '{"hash_ids": [1]}', None, "'input_length' is missing"),
    ('{"template": "hash_ids", "block": 16}', '{"hash_ids": [1], "input_length": "x"}', None, "got 'x'"),
    ('{"template": "hash_ids", "block": 16}', '{"hash_ids": [1], "input_length": 1e999}', None, "got inf"),
    ('{"template": "hash_ids", "block": 16}', '{"hash_ids": [1], "input_length": 17}', None, "stand for 1 to 16"),
    ('{"template": "hash_ids", "block": 16}', '{"hash_ids": [1, 2], "input_length": 16}', None, "stand for 17 to 32"),
    ('{"template": "hash_ids", "block": 16}', '{"hash_ids": [99999999999], "input_length": 16}', None, "token id 999"),
    ('{"template": "hash_ids", "block": 16}', '{"hash_ids": [], "input_length": 0}', None, "an empty prompt"),
]


@pytest.mark.parametrize(("meta", "requests", "texts", "said"), FOLDERS, ids=[case[3] for case in FOLDERS])
def test_a_workload_folder(
    run: Run, tmp_path: Path, meta: str, requests: str, texts: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SPARSE_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in (("meta.json", meta), ("requests.jsonl", requests), ("texts.jsonl", texts)):
        if content is not None:
            (folder / name).write_text(content)
    assert said in refused(run, "simulate", str(folder))
    assert not (tmp_path / "home").exists()
    if texts is not None and "template" not in said and "meta.json" not in said and "deep" not in said:
        options = ("--model", "mamba-3m", "--workload", str(folder))
        if "role" not in said:  # the demo reads texts, not turns
            expected = "requests.jsonl is empty" if "no prompt" in said else said
            assert expected in refused(run, "demo", *options)


HUGE, DIGITS = "1" + "0" * 30, "9" * 400
ARGUMENTS = [
    ("simulate", "TRACE", "--max-memory", DIGITS + "GiB"),
    ("simulate", "TRACE", "--max-memory", "0.5"),
    ("simulate", "TRACE", "--max-memory", "nan"),
    ("simulate", "TRACE", "--grid", HUGE),
    ("simulate", "TRACE", "--warmup", "nan"),
    ("simulate", "TRACE", "--state-bytes", "1e400"),
    ("simulate", "TRACE", "--state-bytes", HUGE),
    ("simulate", "TRACE", "--kv-bytes-per-token", HUGE),
    ("plan", "TRACE", "--state-bytes", HUGE, "--max-memory", DIGITS[:40]),
    ("simulate", "TRACE", "--policy", "\x1b[31mred"),
    ("simulate", "TRACE", "--model", "\x1b[31m/red"),
    ("simulate", "TRACE", "--model", "TRACE"),
    ("simulate", "TRACE", "--model", "x" * 5000 + "/y"),
    ("simulate", "x" * 5000),
    ("simulate", "\x1b[2Jtrace.jsonl"),
    ("plan", "TRACE", "--cut-id", HUGE),
    ("plan", "TRACE", "--cut-id", "-1"),
    ("plan", "--tokens", "99999999999"),
    ("plan", "TRACE", "--png", "FOLDER"),
    ("plan", "TRACE", "--png", "TRACE/plan.png"),
    ("plan", "TRACE", "--png", "x" * 300 + ".png"),
    ("verify", "mamba-3m", "--device", "meta"),
    ("verify", "mamba-3m", "--device", "\x1b[31m"),
    ("verify", "mamba-3m", "--dtype", "float8_e4m3fn"),
    ("verify", "FOLDER"),
    ("verify", ""),
    ("bench", "--seed", "4294967296"),
    ("bench", "--seed", "-1"),
    ("bench", "--max-memory", DIGITS + "TiB"),
    ("bench", "--quick", "--model", "mamba-3m", "--model", "nan"),
    ("bench", "--quick", "--model", "mamba-3m", "--device", "\x1b[31m"),
    ("bench", "--quick", "--model", "mamba-3m", "--dtype", "x" * 5000),
    ("bench", "--quick", "--model", "mamba-3m", "--dataset", "nowhere.jsonl"),
    ("bench", "--model", "mamba-3m", "--out", "TRACE"),
    ("bench", "--model", "mamba-3m", "--out", "TRACE/results"),
    ("bench", "--model", "mamba-3m", "--report", "FOLDER"),
    ("inspect", "\x1b[2J"),
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda given: " ".join(given)[:60])
def test_an_argument(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    if arguments[0] == "bench":
        pytest.importorskip("datasets")
    monkeypatch.chdir(trace.parent)
    given = [part.replace("TRACE", str(trace)).replace("FOLDER", str(trace.parent)) for part in arguments]
    before = {path: path.read_bytes() for path in trace.parent.rglob("*")}
    said = refused(run, *given)
    assert any(printable(part)[:20] in said or shown(part)[1:20] in said for part in given[1:])
    assert {path: path.read_bytes() for path in trace.parent.rglob("*")} == before


@pytest.mark.parametrize("content", ["", "[]", "5", '{"settings": 5}', DEEP, '{"settings": {"grid": 7}}'])
def test_a_results_folder_that_holds_something_else(run: Run, tmp_path: Path, content: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "config.json").write_text(content)
    said = refused(run, "bench", "--quick", "--model", "mamba-3m", "--out", str(tmp_path))
    assert str(tmp_path) in said and (tmp_path / "config.json").read_text() == content


def test_a_fault_of_ours_says_how_to_see_more(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("nothing")

    monkeypatch.setattr("hf_sparse_cache.cli.estimates.simulate", broken)
    code, _, err = run("simulate", str(trace))
    assert code == 2 and "KeyError: 'nothing'" in err and "HF_SPARSE_CACHE_DEBUG=1" in err


def test_text_of_users_does_not_steer_a_terminal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "story\x1b[2J\u202e$\\frac.jsonl"
    rows = [[*range(200), question, *range(30)] for question in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run("plan", str(path), "--policy", "last", "--grid", "32")
    assert (code, err) == (0, "") and "\\x1b[2J\\u202e" in out and out.replace("\n", "").isprintable()
    pytest.importorskip("matplotlib")
    assert run("plan", str(path), "--policy", "last", "--grid", "32", "--png", str(tmp_path / "new" / "a.png"))[0] == 0
    document = tmp_path / "text.txt"
    document.write_text("A state \x1b]0;title\x07 is [/bold] a | summary.\r" * 60)
    asked = ("demo", "--model", "mamba-3m", "--document", str(document), "--grid", "16", "--uncached", "0")
    monkeypatch.setenv("NO_COLOR", "1")
    for terminal in (False, True):
        if terminal:
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
            monkeypatch.setenv("TERM", "xterm-256color")
            monkeypatch.setenv("COLUMNS", "200")
        code, out, _ = run(*asked, "--question", "Why\x1b[31m [/red] | so?", "--question", "a\nb\x9b")
        assert code == 0 and "Why\\x1b[31m [/red]" in out
        assert not any(steers in out for steers in ("\x1b[31m", "\x1b]", "\x9b", "\x07", "\r"))
        assert terminal or "\x1b" not in out
        assert "a b\\x9b" in out


def test_a_cell_that_was_escaped_is_not_escaped_again(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().table(("a", "b"), [["x\\|y", "p|q"]])
    assert "| x\\|y | p\\|q |" in capsys.readouterr().out


BAD_IDS: list[Any] = [
    [2**31],
    [-1],
    [0.5],
    [True],
    [],
    [[1, 2], [3, 4]],
    ["a"],
    5,
    None,
    np.asarray([2**32], dtype=np.uint64),
    np.asarray([1.0]),
    torch.tensor([1.5]),
    torch.tensor([1.0], dtype=torch.bfloat16),
    torch.tensor([True]),
    torch.tensor([2**40]),
    torch.tensor(3),
]


@pytest.mark.parametrize("ids", BAD_IDS, ids=str)
def test_ids_that_are_none(ids: Any) -> None:
    for given in ([[1, 2], ids], iter([[1, 2], {"input_ids": ids}])):
        with pytest.raises(ValueError, match=r"trace\[1\]"):
            load_trace(given)
    with pytest.raises(ValueError, match="prompts"):
        token_ids(ids, "prompts")


def test_ids_that_are_some() -> None:
    for ids in ([0, 2**31 - 1], np.asarray([[0, 2**31 - 1]]), torch.tensor([0, 2**31 - 1]), (0, 2**31 - 1)):
        found = token_ids(ids, "ids")
        assert found.dtype == np.int32 and found.tolist() == [0, 2**31 - 1]


@pytest.mark.parametrize("trace", [5, None, object(), {"a": 1}, b"ab", "a\0b"])
def test_what_is_no_trace(trace: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="trace"):
        load_trace(trace)


def test_a_prompt_of_blocks_is_no_longer_than_it_says() -> None:
    assert Trace([np.arange(3, dtype=np.int32)], 4, [5])[0].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"state_bytes": float("nan")}, "state_bytes"),
        ({"state_bytes": True}, "state_bytes"),
        ({"state_bytes": "5"}, "state_bytes"),
        ({"state_bytes": 10**30}, "state_bytes"),
        ({"kv_bytes_per_token": 10**30}, "kv_bytes_per_token"),
        ({"logits_bytes": 10**30}, "logits_bytes"),
        ({"logits_bytes": -1}, "logits_bytes"),
        ({"page_bytes": 0}, "page_bytes"),
        ({"kv_bytes_per_token": float("inf")}, "kv_bytes_per_token"),
        ({"kv_bytes_per_token": 0.5}, "kv_bytes_per_token"),
        ({"grid": 2.5}, "grid"),
        ({"grid": 0}, "grid"),
        ({"grid": 10**30}, "grid"),
        ({"warmup": "x"}, "warmup"),
        ({"warmup": float("nan")}, "warmup"),
        ({"max_memory": float("inf")}, "max_memory"),
        ({"max_memory": float("nan")}, "max_memory"),
        ({"max_memory": []}, "max_memory"),
        ({"max_memory": DIGITS}, "max_memory"),
        ({"cut_ids": [2**31]}, "cut_ids"),
        ({"cut_ids": [0.5]}, "cut_ids"),
    ],
)
def test_arguments_of_the_simulator(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*got|{name}=.*(size|whole)"):
        simulate([[1, 2, 3]], **{"state_bytes": 1, **options})


@pytest.mark.parametrize(
    "call",
    [
        lambda: plan_checkpoints([1.0, float("nan")]),
        lambda: plan_checkpoints([1.0, float("inf")]),
        lambda: plan_checkpoints([1.0, -1.0]),
        lambda: plan_checkpoints([1, 10**400]),
        lambda: plan_checkpoints([1.0, 1.0], checkpoint_cost=10**400),
        lambda: plan_checkpoints([1.0, 1.0], -(10**5000)),
        lambda: plan_checkpoints([1.0, 1.0], checkpoint_cost=float("nan")),
        lambda: plan_checkpoints([1.0, 1.0], candidates=[10**400]),
        lambda: plan_checkpoints([1.0, 1.0], prefill_cost=[0, 10**400]),
    ],
)
def test_arguments_of_the_planner(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="weights|checkpoint_cost|max_checkpoints|candidates|prefill_cost") as caught:
        call()
    assert "Exceeds the limit" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"namespace": "\ud800"},
        {"namespace": 5},
        {"namespace": None},
        {"grid": 64.0},
        {"grid": True},
        {"grid": "64"},
        {"grid": 2**31},
        {"max_checkpoints": float("nan")},
        {"max_checkpoints": "3"},
        {"max_memory": float("inf")},
        {"exactness": 5},
        {"policy": ["learned"]},
    ],
)
def test_settings(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(content))):
        SparseCacheConfig.from_dict(content)
    SparseCacheConfig(namespace="a\x1fb")  # what separates a namespace from the rest is its first, not in a name


def test_sizes_are_exact() -> None:
    assert parse_bytes("9007199254740993") == 9007199254740993 and parse_bytes(" 1.5 KiB ") == 1536
    assert parse_bytes("2.0") == 2 and parse_bytes(np.int64(7)) == 7


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_remembered": 2.5}, "max_remembered"),
        ({"max_remembered": "x"}, "max_remembered"),
        ({"namespace_memory": {"\ud800": 1}}, "namespace_memory"),
        ({"namespace_memory": {5: 1}}, "namespace_memory"),
        ({"namespace_memory": {"a": float("inf")}}, r"namespace_memory\['a'\]"),
        ({"namespace_memory": [1]}, "namespace_memory"),
        ({"eviction": 5}, "eviction"),
        ({"max_memory": float("nan")}, "max_memory"),
    ],
)
def test_arguments_of_a_store(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CheckpointStore(**options)


@pytest.mark.parametrize("path", ["", " ", "nul\0x", 5, None, b"x", ["x"]])
def test_paths_that_nothing_can_be_called(
    jamba: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any
) -> None:
    """An empty one would be the folder that the process runs in, with all that lies there."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("save_directory", lambda: SparseCacheConfig().save_pretrained(path)),
        ("name_or_path", lambda: SparseCacheConfig.from_pretrained(path)),
        ("save_directory", lambda: SparsePrefixCache.from_pretrained(path, jamba)),
    ]
    if path is not None:  # which asks for the default, or for none
        calls += [
            ("disk_dir", lambda: CheckpointStore(disk_memory="1GiB", disk_dir=path)),
            ("shared", lambda: CheckpointStore(shared=path)),
        ]
    with SparsePrefixCache(jamba) as cache:
        for name, call in [*calls, ("save_directory", lambda: cache.save_pretrained(path))]:
            with pytest.raises(ValueError, match=rf"{name} (is|must be) .*; give|{name} is .*: give"):
                call()
    assert not any(tmp_path.iterdir())


def test_arguments_of_a_handle_and_of_the_checker(jamba: Any) -> None:
    for options in ({"store": 5}, {"tokenizer": 5}, {"namespace": "\ud800"}, {"grid": 2.5}, {"max_checkpoints": "x"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SparsePrefixCache(jamba, **options)
    assert "_prefill" not in jamba.__dict__
    for tokens in (0, -1, 2.5, True, None, 2**31):
        with pytest.raises(ValueError, match="max_new_tokens"):
            check_exactness(jamba, [[1, 2, 3]], max_new_tokens=tokens)  # type: ignore[arg-type]
    for prompts in (5, None, "abc", [], [[999]], [[-1, 2]], [[0.5]], [None], [torch.zeros(2, 3)]):
        with pytest.raises(ValueError, match="prompts"):
            check_exactness(jamba, prompts)  # type: ignore[arg-type]
    for limit in (-1, 2.5, "x", True):
        with pytest.raises(ValueError, match="max_checkpoints"):
            simulate([[1, 2, 3]], state_bytes=1, max_checkpoints=limit)  # type: ignore[arg-type]
