"""The advisor's pictures in one PNG: readable without colour, every line with its own marker and stroke."""

import io
from pathlib import Path
from typing import Any

from ..checks import printable
from ..hub import replace_whole
from ..stats import format_bytes
from .outputs import PNG_MARK


_STYLES = (("#2166ac", "o", "-"), ("#d6604d", "s", "--"))
_FLOOR = {"color": "#333333", "linestyle": ":", "linewidth": 1.2}


def check_installed() -> None:
    """Before a long run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("--png needs matplotlib: pip install 'hf_sparse_cache[bench]'") from None


def draw_advice(found: dict[str, Any], path: Path) -> None:
    """Draw what `advise` found: policies side by side, where prompts part, and memory against recomputation."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.05, 1.0, 1.0))
        trace = found["trace"]
        shared = trace["overlap_tokens"] / max(1, trace["prompt_tokens"])
        kv = f" and {format_bytes(found['kv_bytes_per_token'])} a token" if found["kv_bytes_per_token"] else ""
        figure.suptitle(
            f"{printable(trace['name'])}: {trace['requests']:,} requests, {shared:.0%} of their tokens shared with "
            f"earlier prompts; a checkpoint takes {format_bytes(found['state_bytes'])}{kv}; {found['exactness']} mode",
            fontsize=10,
            parse_math=False,
        )
        _policies(left, found)
        _depths(middle, found)
        _frontier(right, found)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=130, format="png", metadata=dict([PNG_MARK.decode().split("\0")]))
    replace_whole(path, drawn.getvalue())


def _floor(found: dict[str, Any]) -> str:
    """What the least is that could be computed again."""
    return "a checkpoint at every cut" if found["exactness"] == "bitwise" else "all that is shared resumed"


def _policies(axes: Any, found: dict[str, Any]) -> None:
    ranked = sorted(found["policies"].items(), key=lambda item: float(item[1]["recomputed_tokens"]))
    names = [name for name, _ in ranked]
    tokens = [row["recomputed_tokens"] for _, row in ranked]
    axes.barh(names, tokens, color="#92c5de", edgecolor="#2166ac", linewidth=0.8)
    for index, (_, row) in enumerate(ranked):
        label = f" {row['recomputed_tokens']:,.0f}  ({row['capture_rate']:.0%} of the overlap resumed)"
        axes.annotate(label, (row["recomputed_tokens"], index), va="center", fontsize=8)
    floor = found["every_cut"]["recomputed_tokens"]
    axes.axvline(floor, **_FLOOR, label=f"{_floor(found)}: {floor:,.0f}")
    axes.invert_yaxis()
    axes.margins(x=0.0)
    axes.set_xlim(0, 2.1 * max(*tokens, floor, 1.0))  # room for what is written behind the longest bar
    axes.set_xlabel("shared tokens computed again, mean a request")
    axes.set_title(f"Policies under {format_bytes(found['max_memory'])}", fontsize=10, pad=22)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 0.99))


def _depths(axes: Any, found: dict[str, Any]) -> None:
    histogram = found["histogram"]
    width = histogram["width_tokens"]
    axes.bar(
        histogram["starts"],
        histogram["requests"],
        width=width,
        align="edge",
        color="#d9d9d9",
        edgecolor="#555555",
        linewidth=0.8,
        label=f"requests, by {width:,} tokens",
    )
    axes.plot(
        histogram["positions"],
        [-0.03] * len(histogram["positions"]),
        "|",
        color="#2166ac",
        markersize=9,
        alpha=0.6,
        clip_on=False,
        transform=axes.get_xaxis_transform(),
        label=f"checkpoints of {found['best']}",
    )
    axes.tick_params(axis="x", pad=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("requests that share so many tokens")
    axes.set_title("Where prompts part", fontsize=10, pad=22)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 0.99), borderaxespad=0.2)


def _frontier(axes: Any, found: dict[str, Any]) -> None:
    rows = found["frontier"]
    names = list(dict.fromkeys(row["policy"] for row in rows))
    for name, (colour, marker, stroke) in zip(names, _STYLES, strict=False):
        own = [row for row in rows if row["policy"] == name]
        axes.plot(
            [max(row["max_memory"], 1) for row in own],
            [row["recomputed_tokens"] for row in own],
            color=colour,
            marker=marker,
            linestyle=stroke,
            label=name,
        )
    axes.axhline(found["every_cut"]["recomputed_tokens"], **_FLOOR, label=_floor(found))
    axes.axvline(found["max_memory"], color="#999999", linewidth=0.8, zorder=0)
    axes.annotate(
        "budget",
        (found["max_memory"], 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -2),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=8,
        color="#555555",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.tick_params(axis="x", labelrotation=30)
    axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes that may be stored")
    axes.set_ylabel("shared tokens computed again, mean a request")
    axes.set_title("What memory is worth", fontsize=10, pad=22)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 0.99), borderaxespad=0.2)
