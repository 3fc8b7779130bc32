"""The tables of `bench_policies`, in Markdown, and the figures they are held against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np


TARGETS = {
    "docqa_squality": 40,
    "sysprompts_open": 36,
    "chat_oasst": 31,
    "agent_tau_airline": 35,
    "rev_rustbook": 340,
    "trace_mooncake_conversation": 85,
}
OWN = ("learned", "learned + LRU", "junction + LRU")
Cells = dict[tuple[str, str, str], list[float]]  # workload, budget, contender: one value a seed


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """One Markdown table."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def collect(rows: dict[str, dict[str, float]], field: str) -> Cells:
    """Values by cell; of the variants of a contender the best one in each arrival order."""
    best: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for cell, row in rows.items():
        workload, seed, budget, contender, _ = cell.split("|")
        kept = best[workload, budget, contender]
        kept[seed] = max(kept.get(seed, -np.inf), row[field])
    return {key: list(values.values()) for key, values in best.items()}


def shown(values: list[float] | None, digits: int) -> str:
    """Mean and, with several arrival orders, the standard deviation."""
    if not values:
        return ""
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def write_tables(rows: dict[str, dict[str, float]], budgets: list[str], out: Path, machine: str) -> None:
    """Writes all tables to `out`."""
    capture, recomputed = collect(rows, "capture"), collect(rows, "recomputed")
    workloads = [name for name in TARGETS if any(key[0] == name for key in capture)]
    workloads += sorted({key[0] for key in capture} - set(workloads))
    contenders = list(dict.fromkeys(key[2] for key in capture if key[1] in budgets))
    rivals = [name for name in contenders if name not in (*OWN, "clairvoyant")]
    policies = list(dict.fromkeys(key[2] for key in capture if key[1] == "no limit"))
    seeds = max((len(values) for values in capture.values()), default=0)
    text = ["# Placement and eviction against every rival\n"]
    text.append(
        "Made by `python -m benchmarks.bench_policies WORKLOADS` (what each part is: `benchmarks/bench_policies.py`,"
    )
    text.append("`rivals.py`, `clairvoyant.py`). 60 % warms up, 40 % measured, 64-token grid (512 for block hashes).")
    text.append(f"Mean ± standard deviation over up to {seeds} arrival orders; {machine}.\n")
    text.append("## Shared tokens recomputed a request, at most 4 new checkpoints a prompt, no memory limit\n")
    text.append(
        table(
            ["workload", "target", *policies],
            (
                [name, str(TARGETS.get(name, ""))]
                + [shown(recomputed.get((name, "no limit", policy)), 1) for policy in policies]
                for name in workloads
            ),
        )
    )
    text.append("## Capture rate at equal memory\n")
    text.append(
        "Checkpoints without KV (64, 256, 1024); bytes at 26.8 MB a state and 64 KiB of KV a token (2, 10, 40 GB).\n"
    )
    for budget in budgets:
        text.append(f"### {budget}\n")
        lines = [
            [name, *(shown(capture.get((name, budget, contender)), 3) for contender in contenders)]
            for name in workloads
        ]
        text.append(table(["workload", *contenders], lines))
    text += summary(capture, workloads, budgets, contenders, rivals)
    text += timing(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text), encoding="utf-8")


def summary(
    capture: Cells, workloads: list[str], budgets: list[str], contenders: list[str], rivals: list[str]
) -> list[str]:
    """Mean uncaptured share, against the best single rival; cells below the bar."""

    def uncaptured(contender: str, chosen: list[str]) -> float:
        values = [capture.get((name, budget, contender)) for name in workloads for budget in chosen]
        return float(np.mean([1.0 - np.mean(value) for value in values if value])) if any(values) else float("nan")

    groups = {"all budgets": budgets, "without KV": budgets[:3], "with KV": budgets[3:]}
    complete = [r for r in rivals if all((name, budget, r) in capture for name in workloads for budget in budgets)]
    measured = {
        who: sum((name, budget, who) in capture for name in workloads for budget in budgets) for who in contenders
    }
    cells = len(workloads) * len(budgets)
    label = {who: who if measured[who] == cells else f"{who} ({measured[who]} of {cells} cells)" for who in contenders}
    lines = [[label[who], *(f"{uncaptured(who, chosen):.3f}" for chosen in groups.values())] for who in contenders]
    ratios = []
    for (group, chosen), target in zip(groups.items(), (0.79, 0.68, 0.89), strict=True):
        best = min(complete, key=lambda who: uncaptured(who, chosen)) if complete else ""
        if best:
            ratio = uncaptured("learned", chosen) / uncaptured(best, chosen)
            ratios.append([group, best, f"{ratio:.3f}", str(target)])
    misses = []
    for name in workloads:
        for budget in budgets:
            values = {
                who: float(np.mean(capture[name, budget, who])) for who in rivals if (name, budget, who) in capture
            }
            if not values or (name, budget, "learned") not in capture:
                continue
            best = max(values, key=lambda who: values[who])
            own, bar = float(np.mean(capture[name, budget, "learned"])), values[best]
            if own < (0.95 * bar if bar >= 0.2 else bar - 0.03):
                misses.append([name, budget, f"{own:.3f}", f"{best} {bar:.3f}"])
    text = ["## Mean uncaptured share (1 - capture rate)\n", table(["contender", *groups], lines)]
    text.append(table(["budgets", "best single rival", "learned ÷ that", "target at most"], ratios))
    text.append(
        "## Cells where `learned` is below 0.95 × the best rival (or 0.03 below it, where that is under 0.2)\n"
    )
    text.append(table(["workload", "budget", "learned", "best rival"], misses) if misses else "None.\n")
    return text


def timing(rows: dict[str, dict[str, float]]) -> list[str]:
    """Speed of the simulator and time to decide, for `learned`."""
    lines = []
    seen = set()  # one arrival order
    for cell, row in rows.items():
        workload, _, budget, contender, _ = cell.split("|")
        if contender == "learned" and budget in ("no limit", "256", "10 GB") and (workload, budget) not in seen:
            seen.add((workload, budget))
            speed = row["tokens"] / row["seconds"] / 1e6
            plan = 1e3 * row["plan_seconds"] / row["requests"]
            lines.append([workload, budget, f"{speed:.2f}", f"{plan:.2f}"])
    header = ["workload", "budget", "million prompt tokens a second", "ms to decide a request"]
    return ["## Speed of the simulator with `learned`\n", table(header, lines)]
