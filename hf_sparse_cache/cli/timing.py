"""One `generate()`, timed: when its first token came, what it said, and how much of the processor it got meanwhile."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..models import ambient


@dataclass(frozen=True)
class Reply:
    """What one `generate()` said, and after how many seconds its first token came."""

    seconds: float
    text: str


class _FirstToken(BaseStreamer):
    """Notes when the first new token comes; before it the prompt is announced."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self._announced = False
        self.wall = self.own = 0.0

    def put(self, value: torch.Tensor) -> None:
        if self._announced and not self.wall:
            self._finish()
            self.wall, self.own = time.perf_counter(), time.thread_time()
        self._announced = True

    def end(self) -> None:
        pass


class Asker:
    """Asks one model, greedily.

    Args:
        model, tokenizer: of transformers.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._wall = self._own = 0.0

    @property
    def cpu_share(self) -> float:
        """Share of the timed seconds in which the processor worked for this thread; 1 where an accelerator does.

        A thread that waits for the others of its operation still runs, so less than 1 means other processes.
        """
        return min(1.0, self._own / self._wall) if self._wall else 1.0

    def warm_up(self, prompt: torch.Tensor) -> None:
        """Pay what only the first call costs, such as starting threads."""
        self.reply(prompt[:, :16], 1)
        self._wall = self._own = 0.0

    def reply(self, prompt: torch.Tensor, tokens: int, **options: Any) -> Reply:
        """Generate at least one token and time the first.

        Args:
            prompt: token ids `(1, length)`.
            tokens: how many to generate; none counts as one.
            options: for `generate()`, such as `past_key_values`.
        """
        finish: Callable[[], None] = torch.cuda.synchronize if prompt.is_cuda else lambda: None
        finish()
        first = _FirstToken(finish)
        wall, own = time.perf_counter(), time.thread_time()
        with ambient.off():
            written = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max(1, tokens),
                streamer=first,
                **options,
            )
        if prompt.device.type == "cpu":
            self._wall += first.wall - wall
            self._own += first.own - own
        text: str = self.tokenizer.decode(written[0, prompt.shape[1] :])
        return Reply(first.wall - wall, text.strip())
