"""What a run says: every request of every contender, summed up and compared with the others in the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..stats import format_bytes


if TYPE_CHECKING:
    import pandas

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
COSTS = ("match_seconds", "plan_seconds", "restore_seconds", "capture_seconds", "eviction_seconds")
LIMIT, STOCK = "limit", "stock"


def summed_up(rows: pandas.DataFrame, summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, dataset and contender.

    "Again" are the requests of a group that was seen before: later questions, turns, revisions. Ratios are taken
    request by request, against another contender's time for the same request in the same run.
    """
    measured = []
    for (model, dataset), unit in rows.groupby(["model", "dataset"], sort=False):
        own = [summary for summary in summaries if (summary["model"], summary["dataset"]) == (model, dataset)]
        for contender, served in unit.groupby("contender", sort=False):
            result = _one(served, unit, str(contender), own)
            measured.append({"model": model, "dataset": dataset, "contender": contender, **result})
    return measured


def _one(
    served: pandas.DataFrame, unit: pandas.DataFrame, contender: str, own: list[dict[str, Any]]
) -> dict[str, Any]:
    again, cold = served[served["turn"] > 0], served[served["turn"] == 0]
    decoded = int((served["new_tokens"] - 1).sum())
    decode_seconds = float((served["total_seconds"] - served["first_token_seconds"]).sum())
    spent = {name: float(served[name].sum()) for name in COSTS}
    prefill = float(served["prefill_seconds"].sum())
    exactness = [summary["exactness"][contender] for summary in own if contender in summary["exactness"]]
    equal = served["tokens_equal"].dropna()
    result: dict[str, Any] = {
        "mode": next((summary.get("mode", "bitwise") for summary in own), "bitwise")
        if exactness and prefill
        else None,
        "requests": len(served),
        "requests_again": len(again),
        "first_token_p50": _percentile(served, 50),
        "first_token_p95": _percentile(served, 95),
        "first_token_again_p50": _percentile(again, 50),
        "first_token_again_p95": _percentile(again, 95),
        "first_token_cold_p50": _percentile(cold, 50),
        "decode_tokens_per_second": decoded / decode_seconds if decoded else None,
        "prefill_seconds": prefill or None,
        **spent,
        "model_seconds": prefill - sum(spent.values()) if prefill else None,
        "capture_restore_share": (spent["capture_seconds"] + spent["restore_seconds"]) / prefill if prefill else None,
        **{
            f"{kind}_tokens": int(served[f"{kind}_tokens"].sum())
            for kind in ("prompt", "overlap", "resumed", "computed")
        },
        "checkpoint_bytes": int(served["checkpoint_bytes"].iloc[-1]),
        "kv_bytes": int(served["kv_bytes"].iloc[-1]),
        "held_bytes": max((summary["held_bytes"].get(contender, 0) for summary in own), default=0),
        "peak_bytes": max((summary["peak_bytes"].get(contender, 0) for summary in own), default=0),
        "device_peak_bytes": int(served["device_peak_bytes"].max()),
        "evictions": int(served["evictions"].sum()),
        "tokens_equal": float(equal.astype(float).mean()) if len(equal) else None,
        "checked_bitwise": sum(found["bitwise"] for found in exactness),
        "checked_resumed": sum(found["requests"] for found in exactness),
        "max_abs_logit_diff": max((found["max_abs_logit_diff"] for found in exactness), default=None),
        "sooner_again": ratios(unit, STOCK, contender, again=True),
        "sooner_cold": ratios(unit, STOCK, contender, again=False),
        "over_limit": ratios(unit, contender, LIMIT, again=True),
        "over_chunked_cold": ratios(unit, contender, "chunked", again=False),
    }
    return result


def ratios(unit: pandas.DataFrame, slower: str, faster: str, *, again: bool) -> dict[str, Any] | None:
    """Time to first token of one contender over another's, request by request.

    Returns:
        `median`, `low` and `high` (10th and 90th percentile of the requests), `lowest`, `total` (of summed times),
        `repeats` (the median of each repetition) and `count`; None where the two share no request.
    """
    key = ["repeat", "request"]
    chosen = unit[(unit["turn"] > 0) == again]
    one, other = (
        chosen[chosen["contender"] == name].set_index(key)["first_token_seconds"] for name in (slower, faster)
    )
    both = one.index.intersection(other.index)
    if slower == faster or not len(both):
        return None
    found = one[both] / other[both]
    return {
        "median": float(found.median()),
        "low": float(np.percentile(found, 10)),
        "high": float(np.percentile(found, 90)),
        "lowest": float(found.min()),
        "total": float(one[both].sum() / other[both].sum()),
        "repeats": [float(value) for value in found.groupby(level="repeat").median()],
        "count": len(found),
    }


def _percentile(served: pandas.DataFrame, percent: float) -> float | None:
    return float(np.percentile(served["first_token_seconds"], percent)) if len(served) else None


def verdict(measured: list[dict[str, Any]], policy: str) -> list[str]:
    """One sentence per model and dataset about the policy that the run is about."""
    sentences = []
    for row in measured:
        if row["contender"] != policy:
            continue
        sentence = f"{row['model']} on {row['dataset']}, {_mode(row)} mode: "
        sooner = row["sooner_again"]
        if sooner:
            middle = ranged(sooner["low"], sooner["high"], ".1f", "×")
            sentence += (
                f"repeated requests got their first token {sooner['median']:.1f}× sooner than without a cache"
                + (f" (80 % of them {middle})" if " to " in middle else "")
            )
        else:
            sentence += "nothing was asked twice, or not measured without a cache"
        sentence += f"; {_percent(row['resumed_tokens'], row['prompt_tokens'])} of all prompt tokens were skipped"
        if row["checked_resumed"]:
            same = row["checked_bitwise"] == row["checked_resumed"]
            how = "all equal" if same else f"ONLY {row['checked_bitwise']} EQUAL"
            sentence += f"; {row['checked_resumed']} resumed runs checked, {how} to a fresh run bit for bit"
        sentences.append(sentence + ".")
    return sentences


def metrics_table(measured: list[dict[str, Any]]) -> Table:
    """Columns and cells for people."""
    columns = (
        "model",
        "dataset",
        "served by",
        "mode",
        "first token",
        "again",
        "again p95",
        "sooner",
        "resumed",
        "bytes",
        "exact",
    )
    cells: list[tuple[str, ...]] = []
    for row in measured:
        sooner = row["sooner_again"]
        exact = "" if row["tokens_equal"] is None else f"{row['tokens_equal']:.0%}"
        if row["checked_resumed"]:
            exact += f", {row['checked_bitwise']}/{row['checked_resumed']} bits"
        cells.append(
            (
                row["model"],
                row["dataset"],
                row["contender"],
                _mode(row),
                "" if row["contender"] == LIMIT else seconds(row["first_token_p50"]),
                seconds(row["first_token_again_p50"]),
                seconds(row["first_token_again_p95"]),
                _sooner(sooner),
                "" if row["contender"] == LIMIT else _percent(row["resumed_tokens"], row["prompt_tokens"]),
                format_bytes(row["peak_bytes"]),
                exact,
            )
        )
    return columns, cells


def costs(measured: list[dict[str, Any]]) -> Table:
    """Where the seconds of each cached contender went: columns and cells for people."""
    columns = (
        "model",
        "dataset",
        "served by",
        "mode",
        "prefill",
        "in the model",
        *(name.removesuffix("_seconds") for name in COSTS),
    )
    columns += ("capture + restore", "of what is possible", "cold, of stock in pieces", "decode")
    cells: list[tuple[str, ...]] = []
    for row in measured:
        if row["prefill_seconds"] is None:
            continue
        decode = row["decode_tokens_per_second"]
        cells.append(
            (
                *(row[name] for name in ("model", "dataset", "contender")),
                _mode(row),
                seconds(row["prefill_seconds"]),
                seconds(row["model_seconds"]),
                *(seconds(row[name]) for name in COSTS),
                f"{row['capture_restore_share']:.2%}",
                *(
                    "" if not row[name] else f"{row[name]['median']:.2f}×"
                    for name in ("over_limit", "over_chunked_cold")
                ),
                f"{decode:.0f} tok/s" if decode else "",
            )
        )
    return columns, cells


def ranged(low: float, high: float, digits: str, unit: str = "") -> str:
    """A range as people say it; one value where the two read alike."""
    ends = dict.fromkeys(f"{value:{digits}}{unit}" for value in (low, high))
    return " to ".join(ends)


def _sooner(ratio: dict[str, Any] | None) -> str:
    if not ratio:
        return ""
    middle = ranged(ratio["low"], ratio["high"], ".1f")
    return f"{ratio['median']:.1f}×" + (f" ({middle})" if " to " in middle else "")


def _mode(row: dict[str, Any]) -> str:
    """The mode of a contender with a cache, "" of any other; rows of before it was noted are of bitwise mode."""
    return row.get("mode", "bitwise") or ""


def seconds(value: float | None) -> str:
    """Seconds or milliseconds with three digits."""
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
