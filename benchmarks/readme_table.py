"""Re-makes the tables of measurements in README.md and docs/benchmarks.md from what lies in benchmarks/results/.

    python -m benchmarks.readme_table            rewrites both between their marks
    python -m benchmarks.readme_table --check    exit code 1 if they do not say what the results say

The README has one short table. In docs/benchmarks.md new_tokens.json (written by `python -m
benchmarks.bench_new_tokens`) gives the first table, every folder of `hf-sparse-cache bench --out
benchmarks/results/NAME` one more, costs.json (`python -m benchmarks.bench_costs`) the last. Each names the mode of
exactness; results of before it was noted are of bitwise mode.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from hf_sparse_cache.bench.metrics import seconds
from hf_sparse_cache.stats import format_bytes, table
from hf_sparse_cache.tools import recall


ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: begin, written by python -m benchmarks.readme_table -->", "<!-- measured: end -->"
PLACEHOLDER = "MEASURED_TABLE"
OLD_MODE = "bitwise"  # of results that do not say


MOST_ROWS = 12  # of the README's table
FAMILIES = ("mamba-21m", "jamba-30m", "zamba2-30m")
WORKLOADS = {"docqa_squality": "stories of 7,100 tokens", "agent_tau_airline": "an agent's steps"}


def summary(results):
    """The README's table: what a newcomer asks first, a column for each family."""
    rows = [row for row in (*_summed_questions(results), *_summed_workloads(results), *_summed_answers()) if row]
    if len(rows) > MOST_ROWS:
        raise ValueError(f"the README's table has {len(rows)} rows; {MOST_ROWS} are the most that a newcomer reads")
    return table(("", "mode", *(name.partition("-")[0].capitalize() for name in FAMILIES)), rows)


def _summed_questions(results):
    """Of a question of 16 tokens behind a long document, and of a prompt that shares nothing."""
    known = results / "new_tokens.json"
    if not known.is_file():
        return
    content = json.loads(known.read_text(encoding="utf-8"))["results"]
    found = {result["model"]: result for result in content if result["exactness"] == "replayable"}
    for what, name in (
        ("tokens computed for a third question of 16", "third and later, median"),
        ("tokens computed for the same prompt again", "the same prompt again"),
    ):
        yield what, "replayable", *(f"{found[model]['computed'][name]:,.0f}" for model in FAMILIES)
    for what, name in (
        ("first token of a third question, over the least time possible", "first token / limit"),
        ("a new prompt of 2,048 tokens, over stock", "cold / stock, 2,048 tokens"),
    ):
        yield what, "replayable", *(f"{found[model][name]['median']:.2f} ×" for model in FAMILIES)


def _summed_workloads(results):
    """Of every workload that `bench` served all families of, in the folder `default`."""
    known = results / "default" / "metrics.json"
    if not known.is_file():
        return
    measured = json.loads(known.read_text(encoding="utf-8"))["measured"]
    own = {(row["dataset"], row["model"]): row for row in measured if row["contender"] == "learned"}
    for dataset, words in WORKLOADS.items():
        rows = [own[dataset, model] for model in FAMILIES]
        yield f"first token sooner, {words}", OLD_MODE, *(f"{row['sooner_again']['median']:.1f} ×" for row in rows)
    rows = [own["docqa_squality", model] for model in FAMILIES]
    yield "memory of the stories", OLD_MODE, *(format_bytes(row["peak_bytes"]) for row in rows)
    exact = (f"{row['checked_bitwise']} of {row['checked_resumed']}" for row in rows)
    yield "resumed runs that equal a fresh one bit for bit", OLD_MODE, *exact


def _summed_answers():
    """Of the trained models, beside their weights."""
    figures = [
        json.loads((recall.folder(f"recall-{name.partition('-')[0]}") / "figures.json").read_text(encoding="utf-8"))
        for name in FAMILIES
    ]
    for what, way in (
        ("right answers of the small trained models, stock", "stock"),
        ("the same, with the cache", "cached"),
        ("the same, with the states of the cache wiped", "wiped"),
    ):
        yield what, "replayable", *(f"{found['exact_match'][way]:.1%}" for found in figures)


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
    """A page with the measurements in it.

    Raises:
        ValueError: it has no place for them.
    """
    block = f"{BEGIN}\n\n{text}\n\n{END}"
    if BEGIN in readme and END in readme:
        return readme[: readme.index(BEGIN)] + block + readme[readme.index(END) + len(END) :]
    if PLACEHOLDER in readme:
        return readme.replace(PLACEHOLDER, block, 1)
    raise ValueError(
        f"the page (README.md, docs/benchmarks.md) has neither {BEGIN!r} nor {PLACEHOLDER!r}; put one of them where "
        "the tables belong"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs/benchmarks.md")
    arguments = parser.parse_args()
    texts = {"README.md": summary(arguments.results), "docs/benchmarks.md": tables(arguments.results)}
    stale = 0
    for name, text in texts.items():
        page = arguments.root / name
        before = page.read_text(encoding="utf-8")
        after = rewritten(before, text)
        stale |= before != after
        if not arguments.check:
            page.write_text(after, encoding="utf-8")
    return int(arguments.check and stale)


if __name__ == "__main__":
    sys.exit(main())
