"""`check_exactness` on tiny models of all families, and its twin that must fail, in every dtype and mode."""

import sys

import torch

from .building import ROOT


sys.path.append(str(ROOT / "tests"))

from matrix import BITWISE, REPLAYABLE, Bench, supported_families
from tiny_models import build

from hf_sparse_cache import check_exactness
from hf_sparse_cache.tools.random_weights import cast_weights

from .kernels import taken_up


def measure(ledger, setting):
    """A row for each family, the dtypes and modes that matter most first."""
    families = setting["families"] or supported_families()
    for dtype, mode in ((torch.bfloat16, BITWISE), (torch.float16, BITWISE), (torch.bfloat16, REPLAYABLE)):
        for family in families:
            case = f"{family}, {str(dtype).partition('.')[2]}, {mode}, kernels {setting['kernels']}"
            there = ledger.measure("exactness", case, lambda: _row(family, dtype, mode, setting["device"]))  # noqa: B023
            if not there:
                return


def _row(family, dtype, mode, device):
    model = cast_weights(build(family), dtype).to(device)
    bench = Bench(family, model=model, mode=mode)
    prompts = [bench.prompt(seed).to(device) for seed in ((0, 1) if mode == BITWISE else (0, 9, 1))]
    with bench.handle() as handle:
        report = check_exactness(model, prompts, cache=handle, max_new_tokens=3)
    return {
        "passed": report.passed,
        "bitwise": report.bitwise,
        "resumed_tokens": report.resumed_tokens,
        "max_abs_logit_diff_to_stock": report.max_abs_logit_diff,
        "tokens_equal_stock": report.tokens_equal,
        "sabotage_noticed": _noticed(bench, prompts),
        "kernels_taken_up": {name: by for name, by in taken_up(model).items() if by != "torch"},
    }


def _noticed(bench, prompts):
    """Whether states that were set to zero where they are stored are told from honest ones."""
    with bench.handle() as handle:
        for prompt in prompts[:-1]:
            bench.generate(prompt, handle, max_new_tokens=1)
        _wipe(handle)
        report = check_exactness(bench.model, prompts[-1:], cache=handle, max_new_tokens=3)
    # A window of another length is noticed before anything is served.
    return not report.passed and (not report.bitwise or report.resumed_tokens == 0)


def _wipe(handle):
    """Set all stored states to zero; of families that have none, keys and values."""
    for _, _, checkpoint in handle.store.checkpoints():
        payloads = [checkpoint.state] if handle.size.state_bytes else []
        kv = None if handle.size.state_bytes else checkpoint.kv
        while kv is not None:
            payloads.append(kv.payload)
            kv = kv.parent
        for value in (value for payload in payloads for layer in payload.layers for value in layer.values()):
            if torch.is_tensor(value):
                value.zero_()
