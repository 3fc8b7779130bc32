"""Re-makes the tables of measurements in README.md from what lies in benchmarks/results/.

    python -m benchmarks.readme_table            rewrites README.md between its two marks
    python -m benchmarks.readme_table --check    exit code 1 if README.md does not say what the results say

new_tokens.json (written by `python -m benchmarks.bench_new_tokens`) gives the first table, every folder of
`hf-sparse-cache bench --out benchmarks/results/NAME` one more, costs.json (`python -m benchmarks.bench_costs`) the
last. Each names the mode of exactness; results of before it was noted are of bitwise mode.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from hf_sparse_cache.bench.metrics import seconds
from hf_sparse_cache.stats import format_bytes, table


ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: begin, written by python -m benchmarks.readme_table -->", "<!-- measured: end -->"
PLACEHOLDER = "MEASURED_TABLE"
OLD_MODE = "bitwise"  # of results that do not say


def tables(results):
    """Markdown of all results in a folder."""
    parts = []
    new_tokens = results / "new_tokens.json"
    if new_tokens.is_file():
        content = json.loads(new_tokens.read_text(encoding="utf-8"))
        parts += ["What a question costs that follows a long document:", _new_tokens(content["results"])]
        parts.append(_circumstances(content, new_tokens.name))
    for folder in sorted(path.parent for path in results.glob("*/metrics.json")):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["measured"]
        parts += [
            f"Whole workloads, in {config['settings'].get('exactness', OLD_MODE)} mode:",
            _bench(measured, config["settings"]["policies"][0]),
            _circumstances(config, folder.relative_to(results)),
        ]
    costs = results / "costs.json"
    if costs.is_file():
        content = json.loads(costs.read_text(encoding="utf-8"))
        mode = content.get("exactness", OLD_MODE)
        parts += [f"What it costs where it cannot help, and beside what it must not cost, in {mode} mode:"]
        parts.append(_costs(content["results"]))
        parts.append(_circumstances(content, costs.name))
    return "\n\n".join(parts)


def _new_tokens(results):
    ratios = list(dict.fromkeys(name for result in results for name in result if " / " in name))
    columns = (
        "model",
        "mode",
        "tokens of a question",
        "computed by the second",
        "by later ones",
        "the same prompt again",
    )
    cells = []
    for result in results:
        computed = result["computed"]
        counts = ("question", "second", "third and later, median", "the same prompt again")
        shown = [f"{computed[name]:,.0f}" for name in counts]
        if computed["third and later, most"] != computed["third and later, median"]:
            shown[2] += f" (at most {computed['third and later, most']:,.0f})"
        cells.append((result["model"], result["exactness"], *shown, *(_interval(result.get(name)) for name in ratios)))
    return table((*columns, *ratios), cells)


def _interval(ratio):
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""


def _bench(measured, policy):
    columns = (
        "model",
        "workload",
        "first token, stock",
        "with the cache",
        "sooner",
        "limit",
        "skipped",
        "stored",
        "exact",
    )
    stock = {(row["model"], row["dataset"]): row for row in measured if row["contender"] == "stock"}
    cells = []
    for row in measured:
        sooner, limit = row["sooner_again"], row["over_limit"]
        if row["contender"] != policy or not sooner:
            continue
        cells.append(
            (
                row["model"],
                f"`{row['dataset']}`",
                seconds(stock[row["model"], row["dataset"]]["first_token_again_p50"]),
                seconds(row["first_token_again_p50"]),
                f"**{sooner['median']:.1f}×** ({sooner['low']:.1f} to {sooner['high']:.1f})",
                f"{limit['median']:.2f}×" if limit else "",
                f"{row['resumed_tokens'] / row['prompt_tokens']:.0%}",
                format_bytes(row["peak_bytes"]),
                f"{row['checked_bitwise']} of {row['checked_resumed']}",
            )
        )
    return table(columns, cells)


def _costs(results):
    columns = ("case", "ratio", "bound")
    names = list(dict.fromkeys(result["model"] for result in results))
    kinds = dict.fromkeys((result["case"], _ratio(result), result["bound"]) for result in results)
    cells = []
    for case, what, bound in kinds:
        row = [case, what, bound.replace("<=", "≤")]
        for name in names:
            values = [
                value
                for result in results
                if (result["model"], result["case"], _ratio(result)) == (name, case, what)
                for value in result["values"]
            ]
            row.append(f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
        cells.append(tuple(row))
    return table((*columns, *names), cells)


def _ratio(result):
    # How many bytes were stored differs from model to model; the ratio is the same kind for all.
    return "memory taken / stored" if result["case"] == "memory" else result["what"]


def _circumstances(content, where):
    machine = content["machine"]
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}; built-in models have random weights. "
        f"`benchmarks/results/{where}`, made by `{content['command']}`."
    )


def rewritten(readme, text):
    """README with the measurements in it.

    Raises:
        ValueError: it has no place for them.
    """
    block = f"{BEGIN}\n\n{text}\n\n{END}"
    if BEGIN in readme and END in readme:
        return readme[: readme.index(BEGIN)] + block + readme[readme.index(END) + len(END) :]
    if PLACEHOLDER in readme:
        return readme.replace(PLACEHOLDER, block, 1)
    raise ValueError(f"README.md has neither {BEGIN!r} nor {PLACEHOLDER!r}; put one of them where the tables belong")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    before = arguments.readme.read_text(encoding="utf-8")
    after = rewritten(before, tables(arguments.results))
    if arguments.check:
        return int(before != after)
    arguments.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
