"""Which releases of transformers everything here was tested with, and a word when the installed one is another."""

import transformers
from packaging import version
from transformers.utils import logging


logger = logging.get_logger(__name__)
# The oldest, and the first that is too new; pyproject.toml has the same bounds.
OLDEST, BEYOND = "5.15", "5.25"


def check_version() -> None:
    """Warn, once, when the installed transformers is outside the tested range."""
    installed = version.parse(transformers.__version__)
    if not version.parse(OLDEST).release <= installed.release < version.parse(BEYOND).release:
        logger.warning_once(
            f"transformers {installed} is outside the range that hf_sparse_cache was tested with, {OLDEST} to below "
            f"{BEYOND}: prove it on your model with check_exactness, or install 'transformers>={OLDEST},<{BEYOND}'."
        )
