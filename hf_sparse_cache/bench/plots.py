"""Four pictures of one model on one dataset, as SVG text that needs nothing from outside."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .metrics import COSTS


if TYPE_CHECKING:
    import pandas

_COLOURS = {"stock": "#8a8f98", "chunked": "#c2c6cc", "deepcopy": "#e08214", "dense": "#7b3294", "limit": "#1b7837"}
_POLICIES = ("#2166ac", "#d6604d", "#4d9221", "#b8860b", "#01665e", "#c51b7d", "#5e4fa2", "#543005")
_PARTS = ("#67a9cf", "#2166ac", "#1b7837", "#e08214", "#b2182b")


def colour(name: str, policies: list[str]) -> str:
    """The same colour for a contender in every picture."""
    return _COLOURS.get(name) or _POLICIES[policies.index(name) % len(_POLICIES)]


def draw(rows: pandas.DataFrame, measured: list[dict[str, Any]], policies: list[str]) -> dict[str, str]:
    """SVG by title.

    Args:
        rows: requests of one model on one dataset.
        measured: rows of `summed_up` for them.
        policies: the cache's own contenders; the first one is the one whose overlap and checkpoints are shown.
    """
    first = rows[rows["contender"] == policies[0]]
    return {
        "Time to first token against overlap": _figure(lambda axes: _against_overlap(axes, rows, first, policies)),
        "Memory against recomputation": _figure(lambda axes: _memory(axes, measured, policies)),
        overlap_title(policies[0]): _figure(lambda axes: _overlap(axes, first)),
        "Where the other seconds went": _figure(lambda axes: _seconds(axes, measured)),
    }


def overlap_title(policy: str) -> str:
    """Of the one picture that is often the same for several models, as they read the same prompts."""
    return f"Overlap, and checkpoints of {policy}"


def _figure(fill: Callable[[Any], None]) -> str:
    import matplotlib

    # Text stays text, and the same data give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_sparse_cache", "font.size": 9}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        fill(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _against_overlap(axes: Any, rows: Any, first: Any, policies: list[str]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    depth = first.set_index(["repeat", "request"])["overlap_tokens"]
    for name, served in rows.groupby("contender", sort=False):
        times = served.set_index(["repeat", "request"])["first_token_seconds"]
        shared = depth.reindex(times.index)
        wide = name in policies or name == "stock"
        axes.scatter(
            shared,
            times,
            s=26 if wide else 12,
            alpha=0.8,
            label=name,
            color=colour(name, policies),
            linewidths=0,
            clip_on=False,  # what lies at 0 is shown whole
        )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("tokens shared with earlier prompts")
    axes.set_ylabel("seconds to first token")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.45, 1.0))


def _memory(axes: Any, measured: list[dict[str, Any]], policies: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = [row for row in measured if row["contender"] not in ("limit", "chunked")]
    for index, row in enumerate(shown):
        recomputed, name = row["computed_tokens"] / row["requests"], row["contender"]
        held = row["peak_bytes"] / 2**20
        axes.scatter(held, recomputed, s=40, color=colour(name, policies), zorder=3, clip_on=False)
        offset = (6, 6 + 11 * (index % 3))  # neighbours lie close together
        axes.annotate(name, (held, recomputed), xytext=offset, textcoords="offset points", fontsize=8)
    axes.margins(x=0.2, y=0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("most bytes stored, MiB")
    axes.set_ylabel("tokens computed a request")


def _overlap(axes: Any, first: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    deepest = max(1, int(first["overlap_tokens"].max()))
    axes.hist(first["overlap_tokens"], bins=24, range=(0, deepest), color="#92c5de")
    captured = [position for positions in first["captured"] for position in positions]
    if captured:
        height = [0.97] * len(captured)
        axes.plot(captured, height, "|", color="#2166ac", markersize=9, transform=axes.get_xaxis_transform())
    axes.margins(y=0.2)
    axes.set_xlim(left=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens; ticks on top: checkpoints stored")
    axes.set_ylabel("requests that share so many")


def _seconds(axes: Any, measured: list[dict[str, Any]]) -> None:
    cached = [row for row in measured if row["prefill_seconds"]]
    names = [row["contender"] for row in cached]
    left = [0.0] * len(cached)
    for part, shade in zip(COSTS, _PARTS, strict=True):
        width = [1000 * row[part] / row["requests"] for row in cached]
        axes.barh(names, width, left=left, color=shade, label=part.removesuffix("_seconds"))
        left = [a + b for a, b in zip(left, width, strict=True)]
    for index, row in enumerate(cached):
        share = left[index] * row["requests"] / 1000 / row["prefill_seconds"]
        axes.annotate(f" {share:.1%} of prefill", (left[index], index), va="center", fontsize=8)
    axes.margins(x=0.35)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a request")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.45, 1.2))
