"""A whole run: every model on every workload, as often as asked, into one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub import replace_whole
from . import metrics, page, plots
from .results import RunFolder
from .runner import run_trial
from .workloads import Workload


def run_all(
    folder: RunFolder,
    load: Callable[[str], Workload],
    *,
    report: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measures what a folder does not hold yet, then writes metrics, plots and, if asked, the report.

    Args:
        folder: of the results, which knows the settings.
        load: a workload by the name in `settings.datasets`.
        report: an HTML file to write.
        say: told of every trial as it begins.

    Returns:
        The rows of `metrics.measure`.
    """
    settings = folder.settings
    for repeat in range(settings.repeats):  # the first round shows everything once
        for dataset in settings.datasets:
            workload = None
            for model in settings.models:
                name = _name(dataset)
                if folder.holds(model, name, repeat):
                    continue
                workload = workload or load(dataset)
                say(f"{model} on {name}, repeat {repeat + 1} of {settings.repeats}")
                trial = run_trial(settings, model, workload, repeat)
                trial.summary["dataset"] = name
                folder.save(trial)
    rows, summaries = folder.finish()
    measured = metrics.summed_up(rows, summaries)
    folder.write("metrics.json", {"measured": measured, "units": summaries})
    _draw(folder.path, rows, measured, list(settings.policies))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(report, page.report_page(folder.config, rows, summaries, measured))
    return measured


def _draw(out: Path, rows: Any, measured: list[dict[str, Any]], policies: list[str]) -> None:
    (out / "plots").mkdir(exist_ok=True)
    for (model, dataset), unit in rows.groupby(["model", "dataset"], sort=False):
        own = [row for row in measured if (row["model"], row["dataset"]) == (model, dataset)]
        for title, svg in plots.draw(unit, own, policies).items():
            name = "-".join(
                f"{Path(str(model)).name} {dataset} {title}".lower().replace(",", "").replace("/", " ").split()
            )
            replace_whole(out / "plots" / f"{name}.svg", svg)


def _name(dataset: str) -> str:
    """A dataset's name in tables: of a path, its last part."""
    return Path(dataset).name if Path(dataset).exists() else dataset
