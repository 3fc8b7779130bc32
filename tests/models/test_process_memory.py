"""What a process takes that stores: no more than is stored, and with tensors in the heap a good part more."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parents[2]
WARM_UP = 3  # prompts in which the process takes what every process does
SERVE = "from benchmarks import process_memory; process_memory.main()"
IN_THE_HEAP = "from hf_sparse_cache.models import tensors; tensors.slotted = lambda *layers: None; "
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory comes from the heap")


def growth(before=""):
    """What a process grows by over what it stores meanwhile, with no other beside it to take off what both take."""
    asked = ["zamba2-30m", "--one", "all", "--tokens", "512", "--prompts", "14"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", before + SERVE, *asked]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    (found,) = json.loads(done.stdout.splitlines()[-1])
    taken, stored = (found[name][-1] - found[name][WARM_UP] for name in ("resident", "stored"))
    assert stored > 80 * 2**20
    return taken / stored


@linux
def test_a_process_grows_by_what_it_stores():
    assert 0.9 < growth() < 1.2


@linux
def test_the_twin_that_keeps_tensors_in_the_heap_grows_by_more():
    assert growth(IN_THE_HEAP) > 1.22
