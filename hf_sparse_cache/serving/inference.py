"""`generate()` on transformers' inference thread, with the handle of whoever asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, GenerationState, _StreamError
from transformers.utils import logging

from ..cache import SparsePrefixCache
from ..models.interrupts import interruptible
from .refusals import ApiError
from .stops import StopFilter
from .tickets import Cancelled, Ticket, current


logger = logging.get_logger(__name__)


class Generation(GenerateManager):
    """Runs one request after the other on one thread; the handle comes from the request's namespace.

    Args:
        handle_of: gives the handle of a namespace; called on the inference thread.
    """

    def __init__(self, handle_of: Callable[[str], SparsePrefixCache]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._handle_of = handle_of

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """See `BaseGenerateManager`; the queue and the streamer that feeds it."""
        _check(model, inputs, gen_config)
        ticket, loop, queue = current(), asyncio.get_running_loop(), asyncio.Queue[Any]()
        rust = getattr(processor, "tokenizer", processor).backend_tokenizer
        streamer = _Streamer(ticket, rust, loop, queue, response_parser)
        keywords = {**inputs, "generation_config": gen_config, "streamer": streamer, "tokenizer": processor}

        def job() -> None:
            try:
                self._run(ticket, model, keywords)
            except Exception:
                # What became of it is told by the ticket: a sentence of any kind would not survive upstream's quotes.
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError("failed"))

        self.submit(job)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """See `BaseGenerateManager`: text, tokens of the prompt, ids of the answer."""
        _check(model, inputs, gen_config)
        ticket = current()
        keywords = {**inputs, "generation_config": gen_config, "streamer": _Counter(ticket), "tokenizer": processor}
        sequences = await self.call(self._run, ticket, model, keywords)
        length = inputs["input_ids"].shape[-1]
        generated = sequences[0, length:]
        return processor.decode(generated, skip_special_tokens=True), length, generated

    async def call(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do something on the inference thread, in its turn.

        Who stops waiting leaves it to come to its end: the thread would not survive a future that was cancelled.
        """
        done = asyncio.wrap_future(self.submit(work, *args))
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        return await asyncio.shield(done)

    def _run(self, ticket: Ticket, model: Any, keywords: dict[str, Any]) -> torch.Tensor:
        """Runs on the inference thread, with the keywords of `generate()`; the ids of prompt and answer."""
        try:
            return self._generated(ticket, model, keywords)
        except Exception as error:
            ticket.error = error
            if not isinstance(error, Cancelled):
                logger.error(f"Request {ticket.id} failed: {type(error).__name__}: {error}", exc_info=error)
            raise

    def _generated(self, ticket: Ticket, model: Any, keywords: dict[str, Any]) -> torch.Tensor:
        ticket.check()  # who left while waiting costs nothing
        ticket.started = time.monotonic()
        handle = self._handle_of(ticket.namespace)
        scored = ticket.top_logprobs is not None
        if scored:  # the config is this request's own
            config = keywords["generation_config"]
            config.return_dict_in_generate = config.output_logits = True
        # A seed of one request is no other request's business.
        with interruptible(ticket.check), torch.random.fork_rng(enabled=ticket.seed is not None):
            if ticket.seed is not None:
                torch.manual_seed(ticket.seed)
            with handle.record() as ticket.requests:  # filled as soon as the prompt is read, before a stream ends
                output = model.generate(**keywords, past_key_values=handle)
        if not scored:
            sequences: torch.Tensor = output
            return sequences
        generated = output.sequences[0, keywords["input_ids"].shape[-1] :]
        ticket.logprobs = _logprobs(output.logits, generated, ticket.top_logprobs or 0)
        return output.sequences  # type: ignore[no-any-return]


class State(GenerationState):
    """One `Generation` for the one model that is served."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        return self._generation


class _Counter:
    """A streamer that counts tokens, and ends `generate()` when nobody waits for it."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket, self._prompt = ticket, True

    def put(self, value: Any) -> None:
        if self._prompt:  # what comes first is the prompt
            self._prompt = False
            self._ticket.check()
        else:
            self._ticket.decoded()

    def end(self) -> None:
        pass


class _Streamer(DirectStreamer):
    """Upstream's streamer of text, which counts as well, and holds back what may turn out to be a stop string."""

    def __init__(self, ticket: Ticket, rust: Any, loop: Any, queue: Any, response_parser: Any) -> None:
        self._ticket, self._stop, self._counter = ticket, StopFilter(ticket.stops), _Counter(ticket)
        super().__init__(rust, loop, queue, response_parser=response_parser)

    def put(self, value: Any) -> None:
        self._counter.put(value)
        super().put(value)

    def cancel(self) -> None:
        super().cancel()
        self._ticket.cancel("the client left")

    def _enqueue(self, item: Any) -> None:
        if item is None and (rest := self._stop.rest()):
            super()._enqueue(rest)
        if type(item) is str:  # not what was reasoned, which no stop string ends
            item = self._stop.feed(item)
            self._ticket.stopped = self._stop.found
            if not item:
                return
        super()._enqueue(item)


def _check(model: Any, inputs: Any, gen_config: Any) -> None:
    """Refuse what the model cannot begin with.

    Raises:
        ApiError: Names the field.
    """
    if inputs["input_ids"].shape[-1] == 0:
        raise ApiError(400, "the prompt has no tokens; give some text", code="invalid_value")
    rows = model.get_input_embeddings().num_embeddings
    wrong = [key[0] for key in gen_config.sequence_bias or () if key[0] >= rows]
    if wrong:
        raise ApiError(400, f"logit_bias: {wrong[0]} is no token of this model, which has {rows:,}", "logit_bias")


def _logprobs(logits: Any, generated: torch.Tensor, most: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """For each token its id, its log-probability under the model, and the likeliest tokens with theirs."""
    found = []
    for step, token in zip(logits, generated.tolist(), strict=True):
        scores = torch.log_softmax(step[0].float(), -1)
        top = torch.topk(scores, most) if most else None
        likely = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        found.append((token, float(scores[token]), likely))
    return found
