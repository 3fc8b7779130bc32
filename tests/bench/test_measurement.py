"""The `evaluate` measurement: loadable offline, right on known numbers, and able to notice a lost state."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch


evaluate = pytest.importorskip("evaluate")
FOLDER = Path(__file__).parents[2] / "measurements" / "exactness"


@pytest.fixture(scope="module")
def exactness(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("evaluate")))


def compute(exactness: Any, tokens: Any, expected: Any, logits: Any, reference: Any) -> dict[str, Any]:
    found: dict[str, Any] = exactness.compute(
        predictions=tokens, references=expected, prediction_logits=logits, reference_logits=reference
    )
    return found


def test_equal_runs_are_bitwise(exactness: Any) -> None:
    logits = [[[0.0, 1.0], [2.0, 0.0]]]
    found = compute(exactness, [[1, 0]], [[1, 0]], logits, logits)
    assert found["bitwise"] and found["token_equality"] == 1.0 and found["first_divergence"] == [-1]
    assert found["max_abs_logit_diff"] == found["mean_abs_logit_diff"] == found["kl"] == 0.0


def test_known_numbers_up_to_the_first_divergence(exactness: Any) -> None:
    reference = [[[0.0, 0.0], [0.0, 1.0], [5.0, 0.0]], [[1.0, 0.0]]]
    logits = [[[0.0, 0.5], [1.0, 0.0], [0.0, 900.0]], [[1.0, 0.0]]]  # behind step 1 nothing counts
    found = compute(exactness, [[0, 0, 1], [0]], [[0, 1, 0], [0]], logits, reference)
    assert found["first_divergence"] == [1, -1] and found["token_equality"] == 0.5 and not found["bitwise"]
    assert found["max_abs_logit_diff"] == 1.0
    assert found["mean_abs_logit_diff"] == pytest.approx((0.0 + 0.5 + 1.0 + 1.0 + 0.0 + 0.0) / 6)
    steps = [
        torch.nn.functional.kl_div(
            torch.tensor(one).log_softmax(-1), torch.tensor(other).log_softmax(-1), log_target=True, reduction="sum"
        )
        for one, other in [*zip(logits[0][:2], reference[0][:2], strict=True), (logits[1][0], reference[1][0])]
    ]
    assert found["kl"] == pytest.approx(float(sum(steps)) / 3, abs=1e-6)


def test_lengths_that_differ_are_named(exactness: Any) -> None:
    with pytest.raises(ValueError, match="prompt 0: 2 predictions, 1 references"):
        compute(exactness, [[1, 0]], [[1]], [[[0.0], [0.0]]], [[[0.0]]])


def test_a_lost_state_is_noticed(exactness: Any) -> None:
    model = tiny_models.build("Mamba")
    ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))

    def run(prompt: torch.Tensor) -> tuple[list[list[int]], list[list[list[float]]]]:
        options = {"do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3, "return_dict_in_generate": True}
        result = model.generate(prompt, attention_mask=torch.ones_like(prompt), output_logits=True, **options)
        return [result.sequences[0, prompt.shape[1] :].tolist()], [[step[0].tolist() for step in result.logits]]

    whole, again, end = run(ids), run(ids), run(ids[:, 20:])
    assert compute(exactness, again[0], whole[0], again[1], whole[1])["bitwise"]
    found = compute(exactness, end[0], whole[0], end[1], whole[1])
    assert not found["bitwise"] and found["max_abs_logit_diff"] > 1e-2
