"""The rows as tables, and beside each figure what was set as its bound."""

_BOUNDS = {"sooner_than_stock": "at 64k ≥ 50", "over_limit": "≤ 1.10", "bitwise": "≤ 1.05", "replayable": "≤ 1.01"}


def tables(rows):
    """Markdown of all rows of a file of results."""
    parts = [_machine(rows), _exactness(rows), _warm(rows), _cold(rows), _batches(rows), _rest(rows), _errors(rows)]
    return "\n\n".join(part for part in parts if part)


def _of(rows, section):
    return [row for row in rows if row["section"] == section and "error" not in row]


def _table(columns, cells):
    if not cells:
        return ""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _machine(rows):
    found = next((row for row in rows if row["section"] == "machine"), {})
    return ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("section", "case"))


def _exactness(rows):
    groups = {}
    for row in [row for row in rows if row["section"] == "exactness"]:
        family, _, how = row["case"].partition(", ")
        groups.setdefault(how, []).append((family, row))
    cells = []
    for how, found in groups.items():
        exact = [family for family, row in found if row.get("passed") and row.get("bitwise")]
        missed = [family for family, row in found if row.get("sabotage_noticed") is False]
        others = [family for family, row in found if family not in exact]
        cells.append((how, f"{len(exact)} of {len(found)}", ", ".join(others) or "none", ", ".join(missed) or "none"))
    return _table(("exactness", "exact", "not exact, or an error", "wrong states not noticed"), cells)


def _warm(rows):
    cells = []
    for row in _of(rows, "warm"):
        seconds = [
            _seconds(row.get(f"{name}_first_token_seconds")) for name in ("stock", "deepcopy", "limit", "cache")
        ]
        over = _inverse(row.get("sooner_than_limit"))
        peak = row.get("cache_peak_bytes", 0) - row.get("baseline_bytes", 0)
        decode = _ratio(row.get("decode_over_stock"))
        sooner = _ratio(row.get("sooner_than_stock"))
        cells.append((row["case"], *seconds, sooner, over, decode, f"{peak / 2**30:.2f} GiB", row.get("bitwise")))
    columns = ("warm", "stock", "deepcopy", "limit", "cache", f"sooner ({_BOUNDS['sooner_than_stock']})")
    return _table((*columns, f"over limit ({_BOUNDS['over_limit']})", "decoding", "peak", "equals cold"), cells)


def _cold(rows):
    cells = [
        (row["case"], row["grid"], row["segments"], _seconds(row["stock_seconds"]), _ratio(row["over_stock"]))
        for row in _of(rows, "cold")
    ]
    bound = f"cache / stock (bitwise {_BOUNDS['bitwise']}, replayable {_BOUNDS['replayable']})"
    return _table(("cold", "grid", "segments", "stock", bound), cells)


def _batches(rows):
    states = ("unrelated", "cold", "warm")
    cells = [(row["case"], *(_ratio(row[f"{state}_over_stock"]) for state in states)) for row in _of(rows, "batch")]
    return _table(("batch", *(f"{state} / stock" for state in states)), cells)


def _rest(rows):
    cells = []
    for row in (row for section in ("handle", "profile", "host tier") for row in _of(rows, section)):
        left_out = ("section", "case", "kernels_taken_up", "baseline_bytes", "took_seconds")
        said = "; ".join(f"{name} {_told(value)}" for name, value in row.items() if name not in left_out)
        cells.append((f"{row['section']}: {row['case']}", said))
    return _table(("further", "found"), cells)


def _errors(rows):
    cells = [(f"{row['section']}: {row['case']}", row["error"].replace("\n", " ")) for row in rows if "error" in row]
    return _table(("error", "what was said"), cells)


def _seconds(value):
    return "" if value is None else f"{value * 1e3:.1f} ms"


def _ratio(spread):
    return "" if spread is None else f"{spread['median']:.3f}× ({spread['low']:.3f} to {spread['high']:.3f})"


def _inverse(spread):
    if spread is None:
        return ""
    return _ratio({"median": 1 / spread["median"], "low": 1 / spread["high"], "high": 1 / spread["low"]})


def _told(value):
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_told(inner)}" for name, inner in value.items() if name != "longest") + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
