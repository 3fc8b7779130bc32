"""Share of questions whose right choice is the likeliest: a measurement of `evaluate` that needs no Hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


class ChoiceAccuracy(evaluate.Metric):  # type: ignore[misc]
    """`ChoiceAccuracy().compute(predictions=[2, 0], references=[2, 1])` gives `{"accuracy": 0.5}`.

    Both are the indices of choices, and a question without a likeliest one has -1.
    """

    def _info(self) -> Any:
        index = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of questions whose right choice is the likeliest.",
            citation="",
            inputs_description="predictions, references: indices of choices, one for each question.",
            features=datasets.Features({"predictions": index, "references": index}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(chosen == answer for chosen, answer in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}
