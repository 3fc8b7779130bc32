"""A report can name the machine it was made on."""

import json

import torch

from hf_sparse_cache.tools.machine import describe_machine


def test_names_versions_and_processor():
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["torch"] == torch.__version__
    assert machine["transformers"] and machine["cpu"]
    assert machine["cores"] >= 1 and machine["threads"] >= 1
