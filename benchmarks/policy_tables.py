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
BARS = (0.70, 0.58, 0.80)  # of the uncaptured share over that of the best single rival
COVER = 0.45
Cells = dict[tuple[str, str, str], dict[str, float]]  # workload, budget, contender: one value an arrival order


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
    return dict(best)


def shown(by_order: dict[str, float] | None, digits: int) -> str:
    """Mean and, with several arrival orders, the standard deviation."""
    if not by_order:
        return ""
    values = list(by_order.values())
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def write_tables(rows: dict[str, dict[str, float]], budgets: list[str], out: Path, notes: list[str]) -> None:
    """Writes all tables to `out`; `notes` say how and where the rows were measured."""
    capture, recomputed = collect(rows, "capture"), collect(rows, "recomputed")
    workloads = [name for name in TARGETS if any(key[0] == name for key in capture)]
    workloads += sorted({key[0] for key in capture} - set(workloads))
    contenders = sorted({key[2] for key in capture if key[1] in budgets}, key=lambda who: (who not in OWN, who))
    whole = [name for name in workloads if any((name, budget, "clairvoyant") in capture for budget in budgets)]
    rivals = [name for name in contenders if name not in (*OWN, "clairvoyant")]
    policies = list(dict.fromkeys(key[2] for key in capture if key[1] == "no limit"))
    seeds = max((len(values) for values in capture.values()), default=0)
    text = ["# Placement and eviction against every rival\n"]
    text.append(
        "Made by `python -m benchmarks.bench_policies WORKLOADS` (what each part is: `benchmarks/bench_policies.py`,"
    )
    text.append("`rivals.py`, `clairvoyant.py`). 60 % warms up, 40 % measured, 64-token grid (512 for block hashes).")
    text.append(f"Mean ± standard deviation over up to {seeds} arrival orders. An empty cell was not measured.")
    text += [*notes, ""]
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
    other = list(dict.fromkeys(key[1] for key in capture if key[1].startswith("replayable ")))
    if other:
        text.append("## The same in replayable mode, rivals at their own positions\n")
        text += [replayed(capture, workloads, contenders, budget) for budget in other]
    text += summary(capture, whole, budgets, contenders, rivals)
    if whole != workloads:
        text.append(
            f"From the mean uncaptured share on, all of this is about {', '.join(whole)}; "
            "the rest was measured in part.\n"
        )
    text += timing(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text), encoding="utf-8")


def replayed(capture: Cells, workloads: list[str], contenders: list[str], budget: str) -> str:
    """One budget in replayable mode."""
    who = [name for name in contenders if any((workload, budget, name) in capture for workload in workloads)]
    lines = [
        [workload, *(shown(capture.get((workload, budget, name)), 3) for name in who)]
        for workload in workloads
        if any((workload, budget, name) in capture for name in who)
    ]
    return table([budget.removeprefix("replayable "), *who], lines)


def summary(
    capture: Cells, workloads: list[str], budgets: list[str], contenders: list[str], rivals: list[str]
) -> list[str]:
    """Mean uncaptured share, against the best single rival; the way to the clairvoyant; cells below the bar."""

    def uncaptured(contender: str, chosen: list[str]) -> float:
        values = [capture.get((name, budget, contender)) for name in workloads for budget in chosen]
        means = [1.0 - np.mean(list(value.values())) for value in values if value]
        return float(np.mean(means)) if means else float("nan")

    groups = {"all budgets": budgets, "without KV": budgets[:3], "with KV": budgets[3:]}
    complete = [r for r in rivals if all((name, budget, r) in capture for name in workloads for budget in budgets)]
    measured = {
        who: sum((name, budget, who) in capture for name in workloads for budget in budgets) for who in contenders
    }
    cells = len(workloads) * len(budgets)
    lines = [
        [who, *(f"{uncaptured(who, chosen):.3f}" for chosen in groups.values())]
        for who in contenders
        if measured[who] == cells
    ]
    ratios = []
    for (group, chosen), bar in zip(groups.items(), BARS, strict=True):
        best = min(complete, key=lambda who: uncaptured(who, chosen)) if complete else ""
        if best:
            ratio = uncaptured("learned", chosen) / uncaptured(best, chosen)
            ratios.append([group, best, f"{ratio:.3f}", str(bar)])
    text = ["## Mean uncaptured share (1 - capture rate)\n", table(["contender", *groups], lines)]
    text.append("Contenders that were not measured in every cell are left out.\n")
    text.append(table(["budgets", "best single rival", "learned ÷ that", "bar"], ratios))
    if complete and all((name, budget, "clairvoyant") in capture for name in workloads for budget in budgets):
        text += covered(
            {budget: {who: 1.0 - uncaptured(who, [budget]) for who in contenders} for budget in budgets}, complete
        )
    inside = {key: values for key, values in capture.items() if key[0] in workloads and key[1] in budgets}
    return text + below(inside, rivals)


def covered(means: dict[str, dict[str, float]], rivals: list[str]) -> list[str]:
    """How far `learned` comes from the best single rival of each budget to the clairvoyant."""
    lines, parts = [], []
    for budget, mean in means.items():
        best = max(rivals, key=lambda who: mean[who])
        room = mean["clairvoyant"] - mean[best]
        parts.append((mean["learned"] - mean[best]) / room)
        numbers = [f"{mean[who]:.3f}" for who in ("learned", best, "clairvoyant")]
        lines.append([budget, numbers[0], f"{numbers[1]} {best}", numbers[2], f"{parts[-1]:.2f}"])
    lines.append(["mean", "", "", "", f"{np.mean(parts):.2f} (bar {COVER})"])
    header = ["budget", "learned", "best single rival", "clairvoyant", "of the way"]
    return ["## From the best single rival to the clairvoyant\n", table(header, lines)]


def below(capture: Cells, rivals: list[str]) -> list[str]:
    """The cells, one for each arrival order, in which `learned` is below the best rival there."""
    found = []
    for (workload, budget, contender), values in capture.items():
        if contender != "learned":
            continue
        for order, own in values.items():
            known = {who: capture.get((workload, budget, who), {}).get(order, -1.0) for who in rivals}
            best = max(known, key=lambda who: known[who])
            if known[best] > 0.0:
                found.append((own / known[best], workload, budget, order, own, best, known[best]))
    found.sort()
    worst = [row for row in found if row[0] < 0.95]
    lines = [
        [workload, budget, order, f"{own:.3f}", f"{best} {bar:.3f}", f"{ratio:.2f}"]
        for ratio, workload, budget, order, own, best, bar in worst
    ]
    header = ["workload", "budget", "order", "learned", "best rival", "ratio"]
    text = ["## Cells where `learned` is below 0.95 × the best rival\n"]
    if found:
        deep = sum(row[0] < 0.85 for row in found)
        text.append(
            f"{len(worst)} of {len(found)} cells of one arrival order ({len(worst) / len(found):.1%}; bar 5 %), "
            f"{deep} of them below 0.85 (bar 0).\n"
        )
    return [*text, table(header, lines) if lines else ""]


def timing(rows: dict[str, dict[str, float]]) -> list[str]:
    """Speed of the simulator and time to decide, for `learned`."""
    lines = []
    seen = set()  # one arrival order
    for cell, row in rows.items():
        workload, _, budget, contender, _ = cell.split("|")
        if (
            "cpu_seconds" in row
            and contender == "learned"
            and budget in ("no limit", "256", "10 GB")
            and (workload, budget) not in seen
        ):
            seen.add((workload, budget))
            seconds = row["cpu_seconds"]
            whole = 1e3 * seconds / row["requests"]
            lines.append([workload, budget, f"{row['tokens'] / seconds / 1e6:.2f}", f"{whole:.2f}"])
    header = ["workload", "budget", "million prompt tokens a CPU second", "CPU ms a request, all of it"]
    return ["## Speed of the simulator with `learned`\n", table(header, lines)]
