"""Which of transformers' own recipes are right on a model: tried on a short prompt before anything is timed.

A recipe that forgets the recurrent state is fast and wrong, and no rival. The tokens it writes may even agree, so the
logits are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .clock import timed
from .contenders import Contender, DeepCopy
from .workloads import WorkloadRequest


def why_wrong(model: Any, make: Callable[[], Contender], grid: int) -> str:
    """Why a rival is left out on this model, or an empty string when its logits are those of stock `generate()`.

    Args:
        make: a fresh contender, which has to serve a prompt of two and a half grid steps.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = np.random.RandomState(0).randint(3, vocabulary, 5 * grid // 2).astype(np.int32)
    try:
        contender = make()
        if isinstance(contender, DeepCopy):
            contender._prefixes = {"probe": grid + grid // 2}
        served = contender.serve(WorkloadRequest("probe", ids), 2, logits=True)
        stock = timed(model, contender.ids(WorkloadRequest("probe", ids)), 2, logits=True)
    except Exception as error:
        return f"it fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    assert served is not None and served.logits is not None and stock.logits is not None
    difference = float((served.logits - stock.logits).abs().max())
    # A lost state moves logits by their own size; rounding does not.
    allowed = (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1) * max(1.0, float(stock.logits.std()))
    return "" if difference <= allowed else f"its logits are wrong by {difference:.2g}"
