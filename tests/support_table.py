"""`make support`: run every cell of the exactness matrix and write `docs/support.md` from what was found.

The document is never edited by hand; `test_support_table` fails when a family or a call is missing from it. With
`--kept FILE` what is finished is kept there; `--only FAMILY` and `--mode` run some of it, and the document says how
much was run.
"""

import argparse
import json
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
import transformers
from matrix import BITWISE, DTYPES, NOT_ON_FLOOR, REPLAYABLE, TOLERANCE, Cell, runs, supported_families
from matrix import run_cell as run
from matrix_calls import CALLS
from tqdm import tqdm

from hf_sparse_cache.models.families import REFUSED


DOCUMENT = Path(__file__).parents[1] / "docs" / "support.md"
SIGNS = {"exact": "●", "batched": "◐", "uncached": "○", "not allowed": "–", "broken upstream": "✕", "FAILED": "FAILED"}
NOT_RUN = "·"
# What a reader must know about a row beyond its numbers.
LIMITS = {
    "Inkling2": "load with `from_pretrained(dtype=...)`: its router must stay in float32, or stock raises",
    "Inkling2-Loop": "load with `from_pretrained(dtype=...)`: its router must stay in float32, or stock raises",
    "Qwen4Exp": "sparse attention picks tokens by score: tied scores may be broken otherwise than in one pass",
    "GLM5Next": "sparse attention picks tokens by score: tied scores may be broken otherwise than in one pass",
    "Zamba2": "states produced by decoding differ from a prefill's and are never stored",
    "NemotronH": "states produced by decoding differ from a prefill's and are never stored",
}
Row = Iterable[str]
MODES = (REPLAYABLE, BITWISE)  # the default first


def cells(families: Iterable[str] = (), modes: Iterable[str] = MODES) -> Iterator[tuple[str, str, str, str]]:
    """Every (family, mode, dtype, call), of some families or of all, family first so that each model is built once."""
    for family, mode, dtype in product(families or supported_families(), modes, DTYPES):
        for call in CALLS:
            if runs(call, family, dtype):
                yield family, mode, dtype, call.name


def run_cells(family: str, mode: str) -> list[Cell]:
    """Run every cell of one family in one mode; a cell that fails is shown as such."""
    by_name, found = {call.name: call for call in CALLS}, []
    for _, _, dtype, name in tqdm([*cells([family], [mode])], f"{family}, {mode}", disable=not sys.stderr.isatty()):
        try:
            found.append(run(family, by_name[name], dtype, mode))
        except Exception as error:
            traceback.print_exc()
            found.append(Cell(family, name, dtype, mode, "FAILED", note=f"{type(error).__name__}: {error}"))
    return found


def markdown(columns: Row, rows: Iterable[Row]) -> str:
    lines = [list(columns), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(status: Counter[str]) -> str:
    names = {
        "exact": "exact",
        "batched": "batched",
        "uncached": "uncached",
        "not allowed": "not allowed",
        "broken upstream": "broken upstream",
    }
    return ", ".join(f"{status[key]} {name}" for key, name in (names | {"FAILED": "FAILED"}).items() if status[key])


def document(found: list[Cell]) -> str:
    families, totals = list(dict.fromkeys(cell.family for cell in found)), Counter(cell.status for cell in found)
    numbers = {call.name: str(index) for index, call in enumerate(CALLS, 1)}
    modes = [mode for mode in MODES if any(cell.mode == mode for cell in found)]
    results = {(cell.family, cell.call, cell.dtype, cell.mode): cell for cell in found}

    def worst(family: str, dtype: str, mode: str) -> str:
        mine = [cell for cell in found if (cell.family, cell.dtype, cell.mode) == (family, dtype, mode)]
        if not mine:
            return NOT_RUN
        if all(cell.status == "broken upstream" for cell in mine):
            return "–"
        largest = max(cell.max_diff for cell in mine)
        return f"{largest:.0e}" if largest else "0"

    def call_row(call: object) -> Row:
        mine = [cell for cell in found if cell.call == call.name]
        notes = dict.fromkeys(cell.note for cell in mine if cell.note and cell.status in ("uncached", "not allowed"))
        shortened = {note.removeprefix("call not supported: ").split(" (")[0] for note in notes}
        return (
            numbers[call.name],
            call.name,
            *(summary(Counter(cell.status for cell in mine if cell.mode == mode)) for mode in modes),
            "; ".join(sorted(shortened)),
        )

    def matrix(dtype: str, mode: str) -> str:
        rows = (
            (
                family,
                *(
                    SIGNS[results[family, call.name, dtype, mode].status]
                    if (family, call.name, dtype, mode) in results
                    else NOT_RUN
                    for call in CALLS
                ),
            )
            for family in families
        )
        return markdown(("family", *numbers.values()), rows)

    family_rows = (
        (
            family,
            *(worst(family, dtype, mode) for mode in modes for dtype in DTYPES),
            "no" if family in NOT_ON_FLOOR else "yes",
            LIMITS.get(family, ""),
        )
        for family in families
    )
    bounds = ", ".join(f"{bound:.0e} ({dtype})" for dtype, bound in TOLERANCE.items() if bound)
    per_mode = ". ".join(
        f"`{mode}`: {summary(Counter(cell.status for cell in found if cell.mode == mode))}" for mode in modes
    )
    parts = {mode: {cell.family for cell in found if cell.mode == mode} for mode in MODES}
    partial = "".join(
        f"; in {mode} mode this document has {len(ran)} of {len(families)} families"
        for mode, ran in parts.items()
        if len(ran) < len(families)
    )
    largest = [f"{mode}, {dtype}" for mode in modes for dtype in DTYPES]
    matrices = (f"### {mode}, {dtype}\n\n{matrix(dtype, mode)}" for mode in modes for dtype in DTYPES)
    return f"""# What is supported, and how exactly

Written by `make support` (transformers {transformers.__version__}, torch {torch.__version__}, CPU). Do not edit.

Every cell is one way of calling `generate()` on one tiny model with random weights, whose logits show a lost state, in
one mode of exactness. It runs three times: without the cache (stock), with a cache that has served prompts with a
common prefix (warm), and from nothing (cold): with `exactness="bitwise"` on an empty cache, with
`exactness="replayable"`, the default, over the segments that made the warm result.

- {SIGNS["exact"]} **exact**: a prefix was resumed, warm equals cold bit for bit, and stock within {bounds}.
  In bfloat16 one rounding can send a token to another expert, in stock as well: only warm against cold is bounded.
- {SIGNS["batched"]} **batched**: in replayable mode, rows of a call that ran in one forward. They are within the same
  bounds of stock; no run can repeat them bit for bit, and nothing of them is stored.
- {SIGNS["uncached"]} **uncached**: nothing can be resumed in this call. It gives stock results, and
  `last_request.reason` says why.
- {SIGNS["not allowed"]} **not allowed**: transformers itself refuses this call on this model.
- {SIGNS["broken upstream"]} **broken upstream**: the model fails without the cache as well.
- {NOT_RUN} not run: tracing takes long, so it runs on some families only{partial}.

**{sum(totals.values()):,} cells: {summary(totals)}.** {per_mode}.

The sabotaged twin of every family, with states zeroed, of another prompt, or off by one token, is rejected
(`tests/models/test_sabotage.py`), and so is a replay over other segments (`tests/models/test_matrix.py`).

## Families

Largest difference of a logit from stock over all calls, in float32 as `generate()` returns them, by mode and dtype,
and what to know.

{markdown(("family", *largest, "on transformers 5.15.0", "known limit"), family_rows)}

Refused, with what would have to change upstream:

{markdown(("model_type", "reason"), REFUSED.items())}

## Calls

{markdown(("", "call", *modes, "why not"), map(call_row, CALLS))}

## The matrix

The columns are the numbers of the calls above.

{(chr(10) * 2).join(matrices)}
"""


def kept(file: Path | None) -> dict[tuple[str, str], list[Cell]]:
    """What earlier runs finished, by family and mode."""
    found: dict[tuple[str, str], list[Cell]] = {}
    if file is not None and file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            cell = Cell(**json.loads(line))
            found.setdefault((cell.family, cell.mode), []).append(cell)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", type=Path, help="file of what is finished")
    parser.add_argument("--only", action="append", default=[], choices=supported_families(), help="repeat for more")
    parser.add_argument("--mode", action="append", default=[], choices=MODES, help="default: both")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = kept(options.kept)
    for part in product(options.only or supported_families(), options.mode or MODES):
        if part not in found:
            found[part] = run_cells(*part)
            if options.kept is not None:
                with options.kept.open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(asdict(cell))}\n" for cell in found[part])
    parts = [*product(supported_families(), MODES)]
    every = [cell for part in parts for cell in found.get(part, ())]
    print(f"{len(found)} of {len(parts)} parts: {summary(Counter(cell.status for cell in every))}")
    DOCUMENT.write_text(document(every), encoding="utf-8")
    failed = [cell for cell in every if cell.status == "FAILED"]
    sys.exit(f"{len(failed)} cells failed" if failed else 0)


if __name__ == "__main__":
    main()
