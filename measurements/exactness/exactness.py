"""How far two runs of a causal language model are apart: tokens and logits of the steps that they decoded."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Compares greedy decoding of the same prompts by two runs of a language model, one of them the reference. Tokens alone
prove
little: they often agree although a state was lost. So the logits of every step are compared as well, up to and
including the first step at which the tokens differ; behind it the two runs read different texts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each prompt, the new tokens of the run to be judged, a list of int.
    references: for each prompt, those of the reference run, of the same length.
    prediction_logits: for each prompt, the logits of each step, steps x vocabulary, as float.
    reference_logits: the same of the reference run.

Returns:
    token_equality: share of the prompts whose tokens are all equal.
    max_abs_logit_diff: largest difference of any logit.
    mean_abs_logit_diff: mean over all logits compared.
    kl: mean Kullback-Leibler divergence of a step, in nats, from the reference's distribution to the prediction's.
    bitwise: whether all tokens and all logits are equal.
    first_divergence: for each prompt, the index of the first step with different tokens, -1 where there is none.

Examples:
    >>> exactness = evaluate.load("measurements/exactness")
    >>> logits = [[[0.0, 1.0], [2.0, 0.0]]]
    >>> exactness.compute(predictions=[[1, 0]], references=[[1, 0]], prediction_logits=logits, reference_logits=logits)
    {'token_equality': 1.0, 'max_abs_logit_diff': 0.0, 'mean_abs_logit_diff': 0.0, 'kl': 0.0, 'bitwise': True, \
'first_divergence': [-1]}
"""

_CITATION = """
@misc{sparse-prefix-caching,
  title  = {Sparse Prefix Caching for Hybrid and Recurrent LLM Serving},
  year   = {2026},
  eprint = {2605.05219},
  archivePrefix = {arXiv}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Exactness(evaluate.Measurement):
    """Equality of tokens and distance of logits between two runs."""

    def _info(self) -> evaluate.MeasurementInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        logits = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            module_type="measurement",
            features=datasets.Features(
                {"predictions": tokens, "references": tokens, "prediction_logits": logits, "reference_logits": logits}
            ),
        )

    def _compute(self, predictions, references, prediction_logits, reference_logits):  # type: ignore[no-untyped-def]
        divergences, differences, kls = [], [], []
        rows = zip(predictions, references, prediction_logits, reference_logits, strict=True)
        for index, (tokens, expected, logits, reference) in enumerate(rows):
            one, other = np.asarray(logits, dtype=np.float64), np.asarray(reference, dtype=np.float64)
            if not len(tokens) == len(expected) == len(one) == len(other) or one.shape != other.shape:
                raise ValueError(
                    f"prompt {index}: {len(tokens)} predictions, {len(expected)} references, logits {one.shape} and "
                    f"{other.shape}; all four need the same number of steps, and logits the same vocabulary"
                )
            differ = np.flatnonzero(np.asarray(tokens) != np.asarray(expected))
            divergences.append(int(differ[0]) if len(differ) else -1)
            steps = divergences[-1] + 1 if len(differ) else len(one)
            differences.append(np.abs(one[:steps] - other[:steps]).ravel())
            expected_log, found_log = _log_softmax(other[:steps]), _log_softmax(one[:steps])
            kls.append((np.exp(expected_log) * (expected_log - found_log)).sum(-1))
        difference, kl = np.concatenate(differences), np.concatenate(kls)
        equal = [step == -1 for step in divergences]
        largest = float(difference.max(initial=0.0))
        return {
            "token_equality": float(np.mean(equal)),
            "max_abs_logit_diff": largest,
            "mean_abs_logit_diff": float(difference.mean()) if len(difference) else 0.0,
            "kl": float(kl.mean()) if len(kl) else 0.0,
            "bitwise": all(equal) and largest == 0.0,
            "first_divergence": divergences,
        }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
