"""All fuzzers for a while: `python tests/fuzz.py --seconds 240 --seed 0`; `make fuzz` runs it.

Each is a module with `run(seed, seconds=...)`, which raises what it found, with the seed that brings it back, and
returns a `Counter` of what it tried. The last lines say what that was.
"""

import argparse
import importlib
import importlib.util
import time
from collections import Counter

import torch
from transformers.utils import logging


FUZZERS = ("fuzz_requests", "fuzz_conversations", "fuzz_files")


def main() -> None:
    """Share the time out evenly, and say what was tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="for all fuzzers together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the clock")
    parser.add_argument("--only", choices=FUZZERS, help="one of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    names = [options.only] if options.only else [name for name in FUZZERS if importlib.util.find_spec(name)]
    print(f"seed {options.seed}", flush=True)
    tallies: dict[str, Counter[str]] = {}
    for name in names:
        tallies[name] = importlib.import_module(name).run(options.seed, seconds=options.seconds / len(names))
        shown = ", ".join(f"{count:,} {what}" for what, count in sorted(tallies[name].items()))
        print(f"{name}: no fault in {shown}", flush=True)


if __name__ == "__main__":
    main()
