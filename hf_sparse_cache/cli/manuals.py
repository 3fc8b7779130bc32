"""What the trained models are asked: manuals of their own, with questions whose answers are known."""

from ..tools import recall
from .sources import DocumentQuestion


TOKENS_A_LINE = 7.7
SEED = 2_000  # none of the seeds that the models were trained or measured with


def manuals(name: str, count: int, tokens: int | None) -> list[DocumentQuestion]:
    """Questions about manuals of the kind that a trained model knows, one manual after the other.

    Args:
        name: a trained model.
        count: how many manuals.
        tokens: about how long each of them is; None for what the model was measured on.

    Raises:
        ValueError: what the model is asked about does not fit into so few tokens.
    """
    size = dict(recall.MANUALS[name])
    if tokens is not None:
        size["lines"] = int(tokens / TOKENS_A_LINE)
    try:
        written = [recall.write_manual(SEED + index, **size) for index in range(count)]
    except ValueError as error:
        raise ValueError(
            f"--tokens {tokens} is too short for a manual that {name} is asked about: {error}, of {TOKENS_A_LINE} "
            "tokens each."
        ) from error
    return [
        DocumentQuestion(f"manual {index + 1}", question.text, manual.text + question.text, question.code)
        for index, manual in enumerate(written)
        for question in manual.questions
    ]
