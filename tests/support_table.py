"""`make support`: run every cell of the exactness matrix and write `docs/support.md` from what was found.

The document is never edited by hand; `test_support_table` fails when a family or a call is missing from it.
"""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from matrix import DTYPES, NOT_ON_FLOOR, TOLERANCE, Cell, runs, supported_families
from matrix import run_cell as run
from matrix_calls import CALLS
from tqdm import tqdm

from hf_sparse_cache.models.families import REFUSED


DOCUMENT = Path(__file__).parents[1] / "docs" / "support.md"
SIGNS = {"exact": "●", "uncached": "○", "not allowed": "–", "broken upstream": "✕", "FAILED": "FAILED"}
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


def cells() -> Iterator[tuple[str, str, str]]:
    """Every (family, dtype, call), family first so that each model is built once."""
    for family in supported_families():
        for dtype in DTYPES:
            for call in CALLS:
                if runs(call, family, dtype):
                    yield family, dtype, call.name


def run_all() -> list[Cell]:
    """Run every cell; a cell that fails is shown as such."""
    by_name, found = {call.name: call for call in CALLS}, []
    progress = tqdm(list(cells()), unit="cell", disable=not sys.stderr.isatty())
    for family, dtype, name in progress:
        progress.set_postfix_str(f"{family}, {name}")
        try:
            found.append(run(family, by_name[name], dtype))
        except Exception as error:
            traceback.print_exc()
            found.append(Cell(family, name, dtype, "FAILED", note=f"{type(error).__name__}: {error}"))
    return found


def markdown(columns: Row, rows: Iterable[Row]) -> str:
    lines = [list(columns), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(status: Counter[str]) -> str:
    names = {
        "exact": "exact",
        "uncached": "uncached",
        "not allowed": "not allowed",
        "broken upstream": "broken upstream",
    }
    return ", ".join(f"{status[key]} {name}" for key, name in (names | {"FAILED": "FAILED"}).items() if status[key])


def document(found: list[Cell]) -> str:
    families, totals = list(dict.fromkeys(cell.family for cell in found)), Counter(cell.status for cell in found)
    numbers = {call.name: str(index) for index, call in enumerate(CALLS, 1)}
    results = {(cell.family, cell.call, cell.dtype): cell for cell in found}

    def worst(family: str, dtype: str) -> str:
        mine = [cell for cell in found if (cell.family, cell.dtype) == (family, dtype)]
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
            summary(Counter(cell.status for cell in mine)),
            "; ".join(sorted(shortened)),
        )

    def matrix(dtype: str) -> str:
        rows = (
            (
                family,
                *(
                    SIGNS[results[family, call.name, dtype].status]
                    if (family, call.name, dtype) in results
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
            *(worst(family, dtype) for dtype in DTYPES),
            "no" if family in NOT_ON_FLOOR else "yes",
            LIMITS.get(family, ""),
        )
        for family in families
    )
    bounds = ", ".join(f"{bound:.0e} ({dtype})" for dtype, bound in TOLERANCE.items() if bound)
    return f"""# What is supported, and how exactly

Written by `make support` (transformers {transformers.__version__}, torch {torch.__version__}, CPU). Do not edit.

Every cell is one way of calling `generate()` on one tiny model with random weights, whose logits show a lost state. It
runs three times: without the cache (stock), with an empty cache (cold), and with a cache that has served a prompt with
a common prefix (warm).

- {SIGNS["exact"]} **exact**: a prefix was resumed, warm equals cold bit for bit, and stock within {bounds}.
  In bfloat16 one rounding can send a token to another expert, in stock as well: only warm against cold is bounded.
- {SIGNS["uncached"]} **uncached**: nothing can be resumed in this call. It gives stock results, and
  `last_request.reason` says why.
- {SIGNS["not allowed"]} **not allowed**: transformers itself refuses this call on this model.
- {SIGNS["broken upstream"]} **broken upstream**: the model fails without the cache as well.
- {NOT_RUN} not run: tracing takes long, so it runs on some families only.

**{sum(totals.values()):,} cells: {summary(totals)}.**

The sabotaged twin of every family, with states zeroed, of another prompt, or off by one token, is rejected
(`tests/models/test_sabotage.py`).

## Families

Largest difference of a logit from stock over all calls, in float32 as `generate()` returns them, and what to know.

{markdown(("family", *DTYPES, "on transformers 5.15.0", "known limit"), family_rows)}

Refused, with what would have to change upstream:

{markdown(("model_type", "reason"), REFUSED.items())}

## Calls

{markdown(("", "call", "cells", "why not"), map(call_row, CALLS))}

## The matrix

The columns are the numbers of the calls above.

{(chr(10) * 2).join(f"### {dtype}{chr(10) * 2}{matrix(dtype)}" for dtype in DTYPES)}
"""


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = run_all()
    DOCUMENT.write_text(document(found), encoding="utf-8")
    failed = [cell for cell in found if cell.status == "FAILED"]
    print(f"{DOCUMENT.name}: {summary(Counter(cell.status for cell in found))}")
    sys.exit(f"{len(failed)} cells failed" if failed else 0)


if __name__ == "__main__":
    main()
