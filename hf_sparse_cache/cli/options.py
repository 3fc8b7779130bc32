"""Options that several commands have."""

from typing import Annotated

import typer

from ..checks import MOST_ID
from ..config import EXACTNESS, SparseCacheConfig


def _mode(value: str) -> str:
    return SparseCacheConfig(exactness=value).exactness  # which says what there is


Exactness = Annotated[
    str, typer.Option(help=f"Mode of exactness: {' or '.join(EXACTNESS)}.", callback=_mode, show_default=True)
]
Grid = Annotated[
    int | None, typer.Option(help="Tokens between cuts; default: what suits the model.", min=2, max=MOST_ID)
]
