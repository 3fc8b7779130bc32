"""Share of answers that are exactly the expected ones."""

import datasets
import evaluate


_DESCRIPTION = """
Compares each answer with the expected one, character by character; only white space around them is left out. A cache
that loses a state answers fluently and wrongly, so nothing less than the whole answer counts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: answers, a list of str.
    references: the expected answers, a list of str of the same length.

Returns:
    exact_match: share of the answers that are right.
    right: for each answer, whether it is.

Examples:
    >>> exact_match = evaluate.load("measurements/exact_match")
    >>> exact_match.compute(predictions=["482", "17"], references=["482", "170"])
    {'exact_match': 0.5, 'right': [True, False]}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    """Share of exactly right answers."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):  # type: ignore[no-untyped-def]
        right = [answer.strip() == code.strip() for answer, code in zip(predictions, references, strict=True)]
        return {"exact_match": sum(right) / len(right), "right": right}
