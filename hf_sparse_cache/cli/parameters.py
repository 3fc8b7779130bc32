"""Options that several commands have."""

from typing import Annotated

import typer

from ..checks import MOST_ID
from ..config import EXACTNESS, POLICY_NAMES, STORAGES, SparseCacheConfig
from ..tools import recall
from ..tools.builtin_sizes import SIZES


# What stands below the help of every command that takes a model.
MODELS_HELP = (
    f"**Built-in models**, which need no download. Trained, to answer questions about manuals: "
    f"{', '.join(recall.MANUALS)}. With random weights, to show time, memory and exactness: {', '.join(SIZES)}."
)
ALL_POLICIES = f"{', '.join(POLICY_NAMES[:-1])} or {POLICY_NAMES[-1]}"


def _mode(value: str) -> str:
    return SparseCacheConfig(exactness=value).exactness  # which says what there is


Exactness = Annotated[
    str, typer.Option(help=f"Mode of exactness: {' or '.join(EXACTNESS)}.", callback=_mode, show_default=True)
]
StorageMode = Annotated[
    str,
    typer.Option(
        help=f"How states are kept: {', '.join(STORAGES[:-1])} or {STORAGES[-1]}.",
        callback=lambda value: SparseCacheConfig(storage=value).storage,
        show_default=True,
    ),
]
Grid = Annotated[
    int | None, typer.Option(help="Tokens between cuts; default: what suits the model.", min=2, max=MOST_ID)
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")]
