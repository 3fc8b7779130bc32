"""Everything that a GPU is to say, by one command: which kernels run, whether all is exact on them, what it is worth.

    make gpu                                       9 minutes of one GPU; needs torch, transformers and a C compiler
    python benchmarks/gpu.py --budget-seconds 300  the rows that say the most first; once more for the rest
    python benchmarks/gpu.py --tables              what has been measured, without measuring
    python benchmarks/gpu.py --small --device cpu  a rehearsal of the whole program at toy size

Nothing is downloaded: weights are random, in configurations of known sizes. Each row is written to the file of results
when it is measured, and a run that finds rows there goes on behind them, if device and versions are the same. What
ends in an error is a row as well. Whatever decides which kernels run is decided when transformers is imported, so each
choice has processes of its own.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accelerator.building import built  # noqa: E402
from benchmarks.accelerator.ledger import Ledger, OtherMachineError  # noqa: E402
from benchmarks.accelerator.tables import tables  # noqa: E402


# At full size, and for rehearsals. `memory` is what a handle may store; the shares are those of the budget.
SIZES = {
    "full": {
        "families": [],  # all
        "grid": None,  # what suits the model
        "models": ["Zamba2-1.2B", "FalconH1-7B"],
        "prefixes": [4096, 16384, 65536],
        "suffix": 256,
        "grids": [256, 512, 1024, 2048],
        "batches": [8, 32],
        "batch_prefix": 2048,
        "new_tokens": 24,
        "repeats": 3,
        "memory": "24GiB",
    },
    "small": {
        "families": ["Mamba", "Jamba"],
        "grid": 32,
        "models": ["tiny"],
        "prefixes": [96, 160],
        "suffix": 12,
        "grids": [16],
        "batches": [2],
        "batch_prefix": 96,
        "new_tokens": 3,
        "repeats": 1,
        "memory": "256MiB",
    },
}
ON, OFF = "on", "off"


def main():
    arguments = _parser().parse_args()
    if arguments.child is not None:
        _child(json.loads(arguments.child))
        return
    if arguments.tables:
        print(tables(Ledger(arguments.results).rows()))
        return
    until = time.time() + arguments.budget_seconds
    built()
    machine, about = _machine(arguments)
    ledger = Ledger(arguments.results, until)
    try:
        ledger.open(machine, about)
    except OtherMachineError as error:
        sys.exit(f"{error}: give a file of their own with --results")
    if arguments.retry:
        ledger.forget_errors()
    done = True
    for child in _children(arguments):
        done = _run(ledger, child, arguments) and done
    print("\n" + tables(ledger.rows()))
    if not done:
        print(f"\nThe time was over before the last row. The rest:  {_command()}")


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-seconds", type=float, default=520.0, help="no row begins later (default: 520)")
    results = ROOT / "benchmarks" / "results" / "gpu" / "rows.jsonl"
    parser.add_argument("--results", type=Path, default=results, help=f"file of rows (default: {results})")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the large models (default: bfloat16)")
    parser.add_argument("--model", action="append", help="in place of both large models; repeat for more")
    parser.add_argument("--family", action="append", help="in place of all families; repeat for more")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retry", action="store_true", help="measure the rows anew that ended in an error")
    parser.add_argument("--tables", action="store_true", help="print what the file holds, and nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _machine(arguments):
    """What the rows hold for, and all that is known of the machine; without a device there are no rows."""
    import torch

    from hf_sparse_cache.tools.machine import describe_machine

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("No accelerator was found; --small --device cpu tries the program without one.")
    about = describe_machine()
    same = ("python", "torch", "transformers", "kernels", "accelerators")
    size = "small" if arguments.small else "full"
    chosen = {name: getattr(arguments, name) for name in ("device", "dtype", "seed")}
    return {**{name: about[name] for name in same}, **chosen, "size": size}, about


def _children(arguments):
    """What runs in processes of its own, in order of what it says, each with the most it may take of the budget."""
    sizes = SIZES["small" if arguments.small else "full"]
    common = {name: getattr(arguments, name) for name in ("device", "dtype", "seed")}
    common |= {"results": str(arguments.results.resolve()), "sizes": sizes}
    exact = {**common, "what": "exactness", "families": arguments.family or sizes["families"]}
    hybrids = [{**common, "what": "hybrid", "model": name} for name in arguments.model or sizes["models"]]
    return [
        {**exact, "kernels": ON, "share": 0.3},
        *({**hybrid, "kernels": ON, "share": 0.4} for hybrid in hybrids),
        {**exact, "kernels": OFF, "share": 1.0},
    ]


def _run(ledger, child, arguments):
    """One process; returns whether it came to its end. One that dies is a row, and the next one runs."""
    left = ledger.until - time.time()
    if left <= 0:
        return False
    until = min(ledger.until, time.time() + child["share"] * arguments.budget_seconds)
    name = ", ".join(str(child[key]) for key in ("what", "model", "kernels") if key in child)
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--child", json.dumps({**child, "until": until})]
    try:
        # Whoever is in the middle of a row when the time is over may finish it, unless that takes too long.
        done = subprocess.run(command, timeout=until - time.time() + 15, check=False)
    except subprocess.TimeoutExpired:
        ledger.add({"section": "cut off", "case": f"{name}, {time.time():.0f}", "error": "a row took too long"})
        return False
    if done.returncode not in (0, _LEFT):
        error = f"the process ended with {done.returncode}; what it said is above"
        ledger.add({"section": "ended early", "case": f"{name}, {time.time():.0f}", "error": error})
    return done.returncode == 0


_LEFT = 3  # a child's exit status where the time was over before its last row


def _child(setting):
    from benchmarks.accelerator import kernels

    if setting["kernels"] == OFF:
        kernels.hidden()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    ledger = Ledger(Path(setting["results"]), setting["until"])
    packages = kernels.importable()
    name = f"kernels {setting['kernels']}"
    ledger.measure("environment", name, lambda: {"importable": packages, **kernels.environment()})
    if setting["kernels"] == OFF and not _importable_where_on(ledger):
        return  # there is nothing to turn off: those rows would be the same once more
    if torch.device(setting["device"]).index is not None:
        torch.cuda.set_device(setting["device"])
    if setting["what"] == "exactness":
        from benchmarks.accelerator.exact import measure
    else:
        from benchmarks.accelerator.hybrid import measure
    measure(ledger, setting)
    if ledger.over:
        sys.exit(_LEFT)


def _importable_where_on(ledger):
    rows = [row for row in ledger.rows() if (row["section"], row["case"]) == ("environment", f"kernels {ON}")]
    return any(row.get("importable") for row in rows)


def _command():
    return shlex.join(["python", *sys.argv])


if __name__ == "__main__":
    main()
