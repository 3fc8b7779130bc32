"""Types of the compiled module; its source is `_codec.pyx` at the top level."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

__test__: dict[str, str]

@disjoint_base
class Codec:
    def __init__(
        self,
        borders: NDArray[np.float32],
        scales: NDArray[np.float32],
        inverse: NDArray[np.float32],
        every: int,
        lowest: int,
        highest: int,
        limit: float,
    ) -> None: ...
    def encode(
        self, addresses: tuple[int, int, int], runs: tuple[int, int, int, int], wide: bool, half: bool
    ) -> bool: ...
    def decode(
        self, addresses: tuple[int, int, int], runs: tuple[int, int, int, int], wide: bool, half: bool
    ) -> None: ...
