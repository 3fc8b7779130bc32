"""Shared by all tests: no network, one thread, tiny models built once."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import tiny_models
import torch
from transformers import PreTrainedModel


torch.set_num_threads(1)
# How long an example takes says how busy the machine is. `make test` tries the same examples every time, so that a
# change is judged by what it does; `make fuzz` draws new ones, and what it finds becomes an example of its own.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("drawn", deadline=None, print_blob=True)
# `make mutants` asks whether a test fails, not with which smallest example.
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
hypothesis.settings.register_profile("planted", deadline=None, derandomize=True, phases=PHASES)
hypothesis.settings.load_profile("same")

# Their fixtures are for several files.
pytest_plugins = ["persisting", "disks", "commands", "sharing"]

# The families of the name, for what need not run on all of them: pure Mamba-1 and 2, hybrids, shared attention.
CORE_FAMILIES = ("Mamba", "Mamba2", "FalconMamba", "Jamba", "Zamba", "Zamba2")


@pytest.fixture(params=CORE_FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A fresh tiny model of each core family: a test may attach to it and change it."""
    return tiny_models.build(request.param)


@pytest.fixture
def jamba() -> PreTrainedModel:
    """A fresh tiny hybrid, where one model is enough."""
    return tiny_models.build("Jamba")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-matrix", action="store_true", help="run every cell of the exactness matrix, as make support"
    )
