"""The command `bench`: its options, and what it prints. The measuring is done in `hf_sparse_cache.bench`."""

import hashlib
import importlib.util
import json as jsonlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..stats import parse_bytes
from .outputs import REPORT_MARK, check_folder, check_output
from .parameters import ALL_POLICIES, Exactness, Grid
from .screen import Screen


RIVALS = ("stock", "chunked", "deepcopy", "dense", "limit")
OWN = "documentation"
# How much is measured unless told otherwise, in full and with --quick; of some, 0 means all.
UNLIMITED = ("requests", "per_group", "max_prompt_tokens")
QUICK: dict[str, Any] = {"requests": 6, "per_group": 3, "max_prompt_tokens": 1024, "max_new_tokens": 2, "checked": 1}
MODELS = ("mamba-21m", "jamba-30m", "zamba2-30m")
IN_FULL: dict[str, Any] = {"requests": 5, "per_group": 5, "max_prompt_tokens": 0, "max_new_tokens": 8, "checked": 3}

Datasets = Annotated[
    list[str] | None,
    typer.Option(
        help="Hub id, .jsonl/.csv/.parquet/.txt file or workload folder; repeat for more; default: the project's "
        "documentation."
    ),
]


def _default(name: str) -> str:
    full, quick = (str(sizes[name]) if sizes[name] else "all" for sizes in (IN_FULL, QUICK))
    return f"default: {full}" if full == quick else f"default: {full}, with --quick {quick}"


Rivals = Annotated[
    list[str] | None, typer.Option(help=f"Of {', '.join(RIVALS)}; 'none' for none. Default: all that are right.")
]
Seed = Annotated[int, typer.Option(help="Of the arrivals, and of a built-in model's weights.", min=0, max=2**32 - 1)]
TaskFile = Annotated[
    Path | None,
    typer.Option(help="File or folder of questions with choices, in place of the workloads; default: none."),
]
QuickBench = Annotated[bool, typer.Option("--quick", help="Few and short prompts: minutes instead of half an hour.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the results, where an interrupted run goes on; default: bench-runs/…")
]


Models = Annotated[
    list[str] | None,
    typer.Option(help=f"Built-in model, folder or Hub id; repeat for more; default: {', '.join(MODELS)}."),
]
Columns = Annotated[
    str, typer.Option(help="Columns that make up a prompt, such as article,question; default: what is found.")
]
Policies = Annotated[list[str] | None, typer.Option(help=f"Of {ALL_POLICIES}; repeat for more; default: learned.")]
NewTokens = Annotated[
    int | None, typer.Option(help=f"Tokens to decode after each prompt; {_default('max_new_tokens')}.", min=1)
]
Requests = Annotated[
    int | None, typer.Option(help=f"How many of each dataset, 0 for all; {_default('requests')}.", min=0)
]
PerGroup = Annotated[
    int | None, typer.Option(help=f"How many of each document or chat, 0 for all; {_default('per_group')}.", min=0)
]
PromptTokens = Annotated[
    int | None, typer.Option(help=f"Shorten longer prompts, 0 for no; {_default('max_prompt_tokens')}.", min=0)
]
Checked = Annotated[
    int | None, typer.Option(help=f"Requests whose logits are compared; {_default('checked')}.", min=0)
]
Shots = Annotated[
    int | None, typer.Option(help="Examples before each question of a --task; default: all of its folder.", min=0)
]


def bench(
    model: Models = None,
    task: TaskFile = None,
    shots: Shots = None,
    dataset: Datasets = None,
    columns: Columns = "",
    config: Annotated[str | None, typer.Option(help="Configuration of the Hub dataset; default: its own.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    policy: Policies = None,
    rival: Rivals = None,
    max_memory: Annotated[str, typer.Option(help="Bytes that each policy may store.")] = "2GiB",
    exactness: Exactness = "replayable",
    grid: Grid = None,
    max_new_tokens: NewTokens = None,
    requests: Requests = None,
    per_group: PerGroup = None,
    max_prompt_tokens: PromptTokens = None,
    repeats: Annotated[int, typer.Option(help="How often everything is measured.", min=1)] = 1,
    checked: Checked = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")] = "auto",
    seed: Seed = 42,
    quick: QuickBench = False,
    out: Out = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report; default: none.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write one JSON object instead of tables.")] = False,
) -> None:
    """Serve a real workload with and without the cache, side by side, and report what it is worth on this machine.

    Example: `hf-sparse-cache bench --model jamba-30m --quick --report report.html`
    """
    _require_packages()
    from ..bench.results import RunSettings

    screen = Screen(json)
    settings = RunSettings(
        models=tuple(model or MODELS),
        datasets=tuple(dataset or (OWN,)),
        columns=tuple(part.strip() for part in columns.split(",") if part.strip()),
        config=config,
        split=split,
        policies=tuple(policy or ("learned",)),
        rivals=_rivals(rival),
        max_memory=max_memory,
        exactness=exactness,
        grid=grid,
        repeats=repeats,
        device=device,
        dtype=dtype,
        seed=seed,
        **_sizes(quick, (requests, per_group, max_prompt_tokens, max_new_tokens, checked)),
    )
    if task is not None:
        from .tasking import run as evaluate

        raise typer.Exit(0 if evaluate(task, shots, replace(settings, requests=requests), screen) else 1)
    raise typer.Exit(0 if _measure(settings, screen, out, report) else 1)


def _require_packages() -> None:
    """Say what is missing; of what is there, keep the progress bars to terminals."""
    import transformers

    missing = [
        name for name in ("datasets", "evaluate", "matplotlib", "pandas") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ImportError(f"bench needs {', '.join(missing)}: pip install 'hf_sparse_cache[bench]'")
    import datasets

    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _sizes(quick: bool, given: Sequence[int | None]) -> dict[str, Any]:
    """What was asked for, in the order of `IN_FULL`, the rest of it from there or from `QUICK`; None is no limit."""
    defaults = QUICK if quick else IN_FULL
    sizes = {
        name: default if value is None else value
        for (name, default), value in zip(defaults.items(), given, strict=True)
    }
    return {name: value or None if name in UNLIMITED else value for name, value in sizes.items()}


def _measure(settings: Any, screen: Screen, out: Path | None, report: Path | None) -> bool:
    """Run, and show what came out; whether every resumed request that was checked was exact."""
    from ..bench import metrics
    from ..bench.results import RunFolder
    from ..bench.run import run_all
    from ..tools import builtin

    for name in settings.models:  # the last one's name as well, before the first one is measured
        builtin.check(name, settings.dtype, settings.device)
    parse_bytes(settings.max_memory)
    folder = out or Path("bench-runs") / _digest(asdict(settings))
    check_folder(folder, "--out")
    if report is not None:
        check_output(report, "--report", REPORT_MARK)
    command = shlex.join(["hf-sparse-cache", *sys.argv[1:]])
    screen.say(f"Results go to {folder}; the same command goes on there if it is interrupted.\n")
    results = RunFolder(folder, settings, command)
    measured = run_all(results, lambda name: _load(name, settings), report=report, say=screen.say)
    screen.say()
    screen.table(*metrics.metrics_table(measured))
    screen.table(*metrics.costs(measured))
    for sentence in metrics.verdict(measured, settings.policies[0]):
        screen.say(sentence)
    screen.emit({"out": str(folder), "report": str(report) if report else None, "measured": measured})
    return all(row["checked_bitwise"] == row["checked_resumed"] for row in measured)


def _rivals(chosen: list[str] | None) -> tuple[str, ...]:
    if not chosen:
        return RIVALS
    unknown = [name for name in chosen if name not in (*RIVALS, "none")]
    if unknown:
        raise ValueError(f"--rival {unknown[0]}: choose from {', '.join(RIVALS)}, none")
    return tuple(name for name in RIVALS if name in chosen)


def _load(name: str, settings: Any) -> Any:
    from ..bench.workloads import from_texts, load_workload

    if name == OWN:
        from . import sources

        document, _ = sources.own_document()
        return from_texts(OWN, [(OWN, task.prompt) for task in sources.about(document, sources.QUESTIONS, OWN)])
    return load_workload(name, columns=settings.columns, config=settings.config, split=settings.split)


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(jsonlib.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
