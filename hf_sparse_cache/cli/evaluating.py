"""The command `eval`: the command line of lm-evaluation-harness, with the model `hf-sparse`."""

import importlib.util
import sys
from typing import Annotated

import typer


def evaluate(
    arguments: Annotated[list[str] | None, typer.Argument(help="Options of lm-evaluation-harness.")] = None,
) -> None:
    """Evaluate with lm-evaluation-harness, its own command line, where prompts that begin alike are computed once.

    Example: `hf-sparse-cache eval --model_args pretrained=FOLDER,max_memory=4GiB --tasks arc_easy --num_fewshot 25`
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("eval needs lm_eval: pip install 'hf_sparse_cache[eval]'")
    from lm_eval.__main__ import cli_evaluate

    from ..evaluation import harness

    given = list(arguments or ())
    if given[:1] not in (["ls"], ["validate"]):
        given = given[1:] if given[:1] == ["run"] else given
        named = any(option.partition("=")[0] in ("--model", "-M") for option in given)
        asked = {"-h", "--help"} & set(given)
        given = ["run", *given] if named or asked else ["run", "--model", harness.MODEL_NAME, *given]
    called, sys.argv = sys.argv, ["hf-sparse-cache eval", *given]
    try:
        cli_evaluate()
    finally:
        sys.argv = called
