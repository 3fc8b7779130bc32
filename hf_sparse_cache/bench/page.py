"""The report: one HTML file that holds everything it shows and opens offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..stats import format_bytes
from . import metrics, plots


if TYPE_CHECKING:
    import pandas

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2026; background: #fff; margin: 0 auto; max-width: 76rem;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { background: #eef4fa; border-left: 4px solid #2166ac; padding: .6rem 1rem; margin: 0; }
.verdict p { margin: .4rem 0; }
.bad { background: #fbeae7; border-color: #b2182b; }
.numbers { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; }
.numbers b { display: block; font-size: 1.6rem; line-height: 1.2; }
.numbers span { color: #59616b; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; overflow-wrap: normal; }
th, td { text-align: right; padding: .25rem .4rem; border-bottom: 1px solid #e3e6ea; vertical-align: bottom; }
th { color: #59616b; font-weight: 600; }
.text3 td:nth-child(-n+3) { white-space: nowrap; }
.text3 :is(th, td):nth-child(-n+3), .text1 :is(th, td) { text-align: left; }
.text1 td { white-space: normal; }
tr.main td { background: #eef4fa; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: .9rem; font-weight: 600; }
svg { width: 100%; max-width: 34rem; height: auto; display: block; }
@media (max-width: 60rem) {  /* a row becomes a card: nothing is cut off, and nothing has to be moved sideways */
  .cards tr:first-child { display: none; }
  .cards tr { display: block; padding: .4rem 0; border-bottom: 2px solid #c9ced4; }
  .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem .2rem; }
  .cards td:empty { display: none; }
  .cards td::before { content: attr(data-of); color: #59616b; text-align: left; }
}
code { font-size: .85rem; background: #f3f4f6; padding: .1rem .3rem; }
.small { color: #59616b; font-size: .85rem; }
"""
_LEGEND = (
    "“Again” are requests of a group that was seen before. “Sooner” is the time to first token without a cache over "
    "this contender's, request by request: median, and 10th to 90th percentile. “Exact”: requests with the tokens of "
    "stock generate(), and checked runs equal to a fresh run bit for bit. “dense” keeps a checkpoint at every cut "
    "without a budget; “limit” runs only what is left to compute, from a live cache that is ready: nothing can be "
    "sooner, but for noise; “deepcopy” knows the common prefix of each group beforehand."
)
_COSTS_LEGEND = (
    "Seconds of all requests together. “Of what is possible”: time to first token over that of “limit”, 1 being the "
    "least there can be. “Cold, of stock in pieces”: prompts that share nothing, over stock generate() with "
    "prefill_chunk_size at the same cuts. Below 1 the cache is faster than stock without reusing anything: shorter "
    "pieces keep what the scans of Mamba-1 work on in the processor's own caches."
)


def report_page(
    config: dict[str, Any], rows: pandas.DataFrame, summaries: list[dict[str, Any]], measured: list[dict[str, Any]]
) -> str:
    """The page as text.

    Args:
        config: of the run's folder: settings, command, machine.
        rows, summaries: of every unit.
        measured: by `summed_up`.
    """
    settings = config["settings"]
    policies = list(settings["policies"])
    sentences = "".join(f"<p>{escape(line)}</p>" for line in metrics.verdict(measured, policies[0]))
    exact = all(row["checked_bitwise"] == row["checked_resumed"] for row in measured)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>hf_sparse_cache bench</title><style>{_STYLE}</style></head><body>",
        f"<h1>What the prefix cache is worth here</h1><p class='small'>{escape(_versions(config['machine']))}</p>",
        f"<div class='verdict{'' if exact else ' bad'}'>{sentences}</div>",
        _numbers(measured, policies[0]),
        f"<h2>Side by side</h2><p class='small'>{_LEGEND}</p>",
        _table(*metrics.metrics_table(measured), css="text3 cards", main=policies[0]),
        _left_out(summaries),
        f"<h2>Where the seconds went</h2><p class='small'>{_COSTS_LEGEND}</p>",
        _table(*metrics.costs(measured), css="text3 cards", main=policies[0]),
    ]
    parts += ["<h2>What is stored</h2>", _stored([summary for summary in summaries if summary["repeat"] == 0])]
    mode = settings.get("exactness", "bitwise")
    for number, (model, dataset, figures) in enumerate(_pictures(rows, measured, policies)):
        parts.append(f"<h2>{escape(model)} on {escape(dataset)}, {mode} mode</h2><div class='plots'>")
        parts += [
            f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
            for title, svg in _unique(figures, number)
        ]
        parts.append("</div>")
    parts += [_circumstances(config, summaries), "</body></html>\n"]
    return "\n".join(parts)


def _versions(machine: dict[str, Any]) -> str:
    """Of this page, and of what was measured."""
    measured = machine.get("hf-sparse-cache") or "an unknown version"
    of = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "python") if machine.get(name))
    return f"hf_sparse_cache {measured} with {of}; this page is by {__version__}."


def _pictures(
    rows: pandas.DataFrame, measured: list[dict[str, Any]], policies: list[str]
) -> list[tuple[str, str, dict[str, str]]]:
    """Model, dataset and its pictures. Where several models give the same histogram it stands once, and names them."""
    found: list[tuple[str, str, dict[str, str]]] = []
    for (model, dataset), unit in rows.groupby(["model", "dataset"], sort=False):
        own = [row for row in measured if (row["model"], row["dataset"]) == (model, dataset)]
        found.append((str(model), str(dataset), plots.draw(unit, own, policies)))
    title = plots.overlap_title(policies[0])
    sharing: dict[tuple[str, str], list[str]] = {}
    for model, dataset, figures in found:
        sharing.setdefault((dataset, figures[title]), []).append(model)
    for model, dataset, figures in found:
        models, svg = sharing[dataset, figures[title]], figures.pop(title)
        if model == models[0]:
            figures[title if len(models) == 1 else f"{title}; the same for {', '.join(models[1:])}"] = svg
    return found


def _numbers(measured: list[dict[str, Any]], policy: str) -> str:
    own = [row for row in measured if row["contender"] == policy]
    sooner = [row["sooner_again"]["median"] for row in own if row["sooner_again"]]
    over = [row["over_limit"]["median"] for row in own if row["over_limit"]]
    mode = own[0].get("mode", "bitwise") if own else ""
    share = [row["capture_restore_share"] for row in own if row["capture_restore_share"] is not None]
    shown = [
        (metrics.ranged(min(sooner), max(sooner), ".1f", "×") if sooner else "", f"sooner, medians, {mode} mode"),
        (f"{max(over):.2f} ×" if over else "", "the least time possible, highest median"),
        (f"{max(share):.2%}" if share else "", "of prefill spent on capture and restore, highest"),
        (format_bytes(max((row["peak_bytes"] for row in own), default=0)), "most bytes stored"),
    ]
    return (
        "<div class='numbers'>" + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in shown if a) + "</div>"
    )


def _table(columns: tuple[str, ...], cells: Sequence[tuple[str, ...]], css: str = "", main: str = "") -> str:
    kept = [index for index in range(len(columns)) if columns[index] == "" or any(row[index] for row in cells)]
    head = "".join(f"<th>{escape(columns[index])}</th>" for index in kept)
    body = []
    for row in cells:
        mark = " class='main'" if main and main in row[:3] else ""
        shown = "".join(
            f"<td data-of='{escape(columns[index], quote=True)}'>{_cell(row[index])}</td>" for index in kept
        )
        body.append(f"<tr{mark}>{shown}</tr>")
    return f"<table class='{css}'><tr>{head}</tr>{''.join(body)}</table>"


def _cell(text: str) -> str:
    """A figure and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=(?:m?s|tok/s|[KMGT]?i?B)\b)", "\N{NO-BREAK SPACE}", escape(text))


def _stored(summaries: list[dict[str, Any]]) -> str:
    cells = []
    for summary in summaries:
        for name, tiers in summary["tier_bytes"].items():
            if tiers:
                shown = ", ".join(f"{tier} {format_bytes(held)}" for tier, held in tiers.items())
                account, held = summary["peak_bytes"][name], summary["held_bytes"][name]
                cells.append(
                    (summary["model"], summary["dataset"], name, shown, format_bytes(account), format_bytes(held))
                )
    columns = ("model", "dataset", "served by", "at the end", "most accounted for", "storages at the end")
    return _table(columns, cells, css="text3 cards")


def _left_out(summaries: list[dict[str, Any]]) -> str:
    reasons = {
        f"{name} on {summary['model']}: {why}" for summary in summaries for name, why in summary["left_out"].items()
    }
    if not reasons:
        return ""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in sorted(reasons))
    return (
        f"<p class='small'>Left out, because transformers itself is not right there:</p><ul class='small'>{items}</ul>"
    )


def _unique(figures: dict[str, str], number: int) -> list[tuple[str, str]]:
    """Ids inside one SVG must not meet those of another in the same page."""
    unique = []
    for index, (title, svg) in enumerate(figures.items()):
        mark = f"f{number}-{index}-"
        for before in ('id="', 'href="#', "url(#"):
            svg = svg.replace(before, before + mark)
        unique.append((title, svg))
    return unique


def _circumstances(config: dict[str, Any], summaries: list[dict[str, Any]]) -> str:
    facts = [(name.replace("_", " "), _plain(value)) for name, value in config["machine"].items()]
    settings = [(name.replace("_", " "), _plain(value)) for name, value in config["settings"].items()]
    models = {
        f"{summary['model']}: {summary['parameters'] / 1e6:.1f} M parameters, {summary['dtype']}, "
        f"grid {summary['grid']}"
        + (
            ", seeded random weights: what it writes means nothing, time and memory do"
            if summary["random_weights"]
            else ""
        )
        for summary in summaries
    }
    total = sum(summary["seconds"] for summary in summaries)
    peaks = [summary["process_peak_bytes"] for summary in summaries]
    most = "an unknown amount of memory" if None in peaks else f"{format_bytes(max(peaks))} at most"
    return (
        "<h2>Circumstances</h2><ul>"
        + "".join(f"<li>{escape(model)}</li>" for model in sorted(models))
        + f"</ul><p>Served in {total:.0f} s; the process with all contenders took {most}.</p>"
        + f"<p>Made by <code>{escape(config['command'])}</code></p>"
        + _table(("machine", ""), facts, css="text1")
        + _table(("setting", ""), settings, css="text1")
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)
