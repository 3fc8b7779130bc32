"""The kernels that these models run on a GPU, under Triton's interpreter: a resumed prompt equals a cold one.

mamba_ssm's chunk scan and flash-linear-attention's delta rule, in float16, which the interpreter has.
"""

import interpreted  # before anything that imports a kernel
import pytest
import tiny_families
import torch
from tiny_models import build, random_ids

from hf_sparse_cache import ExactnessReport, SparsePrefixCache, check_exactness
from hf_sparse_cache.models import states


pytestmark = [
    pytest.mark.skipif(bool(interpreted.MISSING), reason=interpreted.MISSING),
    pytest.mark.filterwarnings("ignore"),  # of packages that expect a GPU
]
LINEAR, FULL = tiny_families.LINEAR, tiny_families.FULL
SCAN, RULE = "_chunk_scan_fwd_kernel", "chunk_fwd_kernel_o"
# Family -> what makes it small enough for an interpreter, the grid, and a kernel that must have run.
FAMILIES = {
    "Mamba2": ({"num_heads": 2, "head_dim": 64, "n_groups": 1, "num_hidden_layers": 2}, 16, SCAN),
    "Zamba2": ({"n_mamba_heads": 2}, 16, SCAN),
    "Bamba": ({"mamba_n_heads": 2, "mamba_n_groups": 1, "num_hidden_layers": 2, "attn_layer_indices": [1]}, 16, SCAN),
    "GraniteMoeHybrid": (
        {"mamba_n_heads": 2, "mamba_n_groups": 1, "num_hidden_layers": 2, "layer_types": [LINEAR, FULL]},
        16,
        SCAN,
    ),
    "NemotronH": (
        {"mamba_num_heads": 2, "mamba_head_dim": 64, "n_groups": 1, "layers_block_type": [LINEAR, FULL, LINEAR]},
        16,
        SCAN,
    ),
    "FalconH1": ({"mamba_n_heads": 2, "mamba_n_groups": 1, "num_hidden_layers": 2}, 16, SCAN),
    "Qwen3.5": ({"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "linear_num_value_heads": 2}, 64, RULE),
}


def checked(label: str, monkeypatch: pytest.MonkeyPatch) -> ExactnessReport:
    smaller, grid, kernel = FAMILIES[label]
    for name, value in smaller.items():
        monkeypatch.setitem(tiny_families.FAMILIES[label].config, name, value)
    model = build(label, torch.float16)
    interpreted.ran.clear()
    shared = random_ids(2 * grid + 1, seed=5)
    prompts = [torch.cat([shared, random_ids(4, seed)], dim=1) for seed in (1, 2)]
    with SparsePrefixCache(model, grid=grid, exactness="bitwise", policy="balanced") as cache:
        report = check_exactness(model, prompts, cache=cache, max_new_tokens=3)
        held = {
            value.dtype
            for _, _, checkpoint in cache.store.checkpoints()
            for layer in checkpoint.state.layers
            for name, value in layer.items()
            if name.startswith("recurrent")
        }
    assert held == {torch.float32} and interpreted.ran[kernel]
    return report


@pytest.mark.parametrize("label", FAMILIES)
def test_kernels_resume_exactly(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = checked(label, monkeypatch)
    assert report.passed and report.resumed_tokens, str(report)
    assert report.max_abs_logit_diff == 0.0, "cut at a kernel's own chunks, even stock is met to the bit"


@pytest.mark.parametrize("label", ["Mamba2", "Qwen3.5"])
def test_a_wiped_state_is_seen(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resuming: list[bool] = []
    own = SparsePrefixCache.__enter__

    def restore(layer: object, fixed: states.Tensors, spans: object) -> object:
        if resuming:
            fixed = {name: value * 0 if name.startswith("recurrent") else value for name, value in fixed.items()}
        return part.restore(layer, fixed, spans)

    part = states._RECURRENT
    wiping = states.Part(part.fixed, part.span, restore, part.stack, part.tensors)
    rules = {kind: tuple(wiping if one is part else one for one in parts) for kind, parts in states._RULES.items()}
    monkeypatch.setattr(states, "_RULES", rules)

    def enter(self: SparsePrefixCache) -> SparsePrefixCache:
        resuming.append(True)  # behind the handle's own proof, which would refuse the model
        return own(self)

    monkeypatch.setattr(SparsePrefixCache, "__enter__", enter)
    assert not checked(label, monkeypatch).bitwise
