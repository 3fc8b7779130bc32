"""Every way of calling `generate()`: the columns of the exactness matrix."""

import inspect
import threading
from typing import Any

import torch
from matrix import NEW_TOKENS, Bench, Call, Outcome, left_padded, vocabulary
from tiny_families import FIRST_WORD, PAD
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_sparse_cache import SparsePrefixCache


Handle = SparsePrefixCache | None


def _greedy(bench: Bench, handle: Handle, **options: Any) -> Outcome:
    return bench.generate(bench.prompt(1), handle, **options)


def _options(**options: Any) -> Any:
    return lambda bench, handle: _greedy(bench, handle, **options)


def _sampling(bench: Bench, handle: Handle, **options: Any) -> Outcome:
    torch.manual_seed(7)
    outcome = _greedy(bench, handle, do_sample=True, temperature=1.5, top_k=40, top_p=0.95, **options)
    return Outcome(outcome.tokens, outcome.logits, extra=torch.get_rng_state().sum().item())


def _ragged(bench: Bench) -> dict[str, Tensor]:
    """Rows of four lengths: two that share the stored prefix, one unknown, and one equal to another."""
    unknown = torch.flip(bench.prompt(2), dims=(1,))
    return left_padded([bench.prompt(1), unknown[:, : bench.step + 7], bench.prompt(3), bench.prompt(1)])


def _batch(bench: Bench, handle: Handle, **options: Any) -> Outcome:
    inputs = _ragged(bench)
    return bench.generate(inputs["input_ids"], handle, attention_mask=inputs["attention_mask"], **options)


def _rows_alone(bench: Bench, handle: Handle, **options: Any) -> Outcome:
    """The batch, each row on its own: what a batch is compared with where stock is not exact on padded batches."""
    inputs = _ragged(bench)
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    done = [bench.generate(ids[mask.bool()][None], None, **options) for ids, mask in rows]
    width = inputs["input_ids"].shape[1] + NEW_TOKENS
    tokens = torch.full((len(done), width), PAD)
    for row, outcome in enumerate(done):
        tokens[row, width - outcome.tokens.shape[1] :] = outcome.tokens[0]
    return Outcome(tokens, tuple(torch.cat(step) for step in zip(*(outcome.logits for outcome in done), strict=True)))


def _masked(bench: Bench, handle: Handle) -> Outcome:
    ids = bench.prompt(1)
    return bench.generate(ids, handle, attention_mask=torch.ones_like(ids))


class _Collected(BaseStreamer):
    """Every token that was streamed, and whether the end was announced."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def _streamed(bench: Bench, handle: Handle) -> Outcome:
    streamer = _Collected()
    outcome = _greedy(bench, handle, streamer=streamer)
    assert streamer.ended and streamer.tokens == outcome.tokens.flatten().tolist()
    return outcome


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(vocabulary(), unk_token="<2>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", unk_token="<2>", padding_side="left")


def _pipeline(bench: Bench, handle: Handle, prompts: list[Tensor], **options: Any) -> Outcome:
    texts = [" ".join(f"<{token}>" for token in prompt[0].tolist()) for prompt in prompts]
    run = pipeline("text-generation", model=bench.model, tokenizer=_tokenizer(), device="cpu")
    given = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_tensors": True, **options}
    if handle is not None:
        given["past_key_values"] = handle
    found = run(texts, **given)
    return Outcome(torch.zeros(1, 1), extra=[row[0]["generated_token_ids"] for row in found])


def _embeddings(bench: Bench, handle: Handle) -> Outcome:
    embedded = bench.model.get_input_embeddings()(bench.prompt(1)).detach()
    return bench.generate(None, handle, inputs_embeds=embedded)


def _hidden(bench: Bench, handle: Handle) -> Outcome:
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "do_sample": False}
    given = {} if handle is None else {"past_key_values": handle}
    result = bench.model.generate(bench.prompt(1), max_new_tokens=NEW_TOKENS, pad_token_id=PAD, **options, **given)
    return Outcome(result.sequences, extra=[tuple(state.shape) for step in result.hidden_states for state in step])


def _scores(bench: Bench, handle: Handle) -> Outcome:
    given = {} if handle is None else {"past_key_values": handle}
    result = bench.model.generate(
        bench.prompt(1),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.3,
        **given,
    )
    assert len(result.scores) == len(result.logits) == NEW_TOKENS
    return Outcome(result.sequences, tuple(result.scores))


def _processed(bench: Bench, handle: Handle) -> Outcome:
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.5), MinLengthLogitsProcessor(bench.prompt(1).shape[1] + 3, FIRST_WORD)]
    )
    return _greedy(bench, handle, logits_processor=processors)


def _stopped(bench: Bench, handle: Handle) -> Outcome:
    criteria = StoppingCriteriaList([MaxLengthCriteria(bench.prompt(1).shape[1] + 3)])
    outcome = _greedy(bench, handle, stopping_criteria=criteria)
    assert outcome.tokens.shape[1] == bench.prompt(1).shape[1] + 3
    return outcome


def _constrained(bench: Bench, handle: Handle) -> Outcome:
    length = bench.prompt(1).shape[1]
    return _greedy(bench, handle, prefix_allowed_tokens_fn=lambda row, ids: [FIRST_WORD + len(ids) - length, 50])


def _turns(bench: Bench, handle: Handle) -> Outcome:
    """Three turns, each with the previous reply appended; the reply itself is prefilled anew, exactly."""
    ids, logits = bench.prompt(1), ()
    for turn in range(3):
        # Replies of random weights hold pad tokens, and without a mask transformers would mask them.
        outcome = bench.generate(ids, handle, max_new_tokens=16, attention_mask=torch.ones_like(ids))
        logits += outcome.logits
        ids = torch.cat([outcome.tokens, bench.prompt(4 + turn)[:, -7:]], dim=1)
    return Outcome(outcome.tokens, logits[-16:])


def _pad_token_inside(bench: Bench, handle: Handle) -> Outcome:
    """Without a mask, transformers masks the pad token in the middle of a prompt."""
    ids = bench.prompt(1)
    ids[0, 5] = PAD
    return bench.generate(ids, handle)


def _tiny_prompts(bench: Bench, handle: Handle) -> Outcome:
    done = [bench.generate(bench.prefix[:, :length], handle) for length in (1, 2, 3)]
    return Outcome(done[-1].tokens, done[-1].logits, extra=[outcome.tokens.tolist() for outcome in done])


def _no_prompt(bench: Bench, handle: Handle) -> Outcome:
    return bench.generate(None, handle, bos_token_id=1)


def _equal(bench: Bench, handle: Handle) -> Outcome:
    return bench.generate(bench.stored, handle)


def _shorter(bench: Bench, handle: Handle) -> Outcome:
    """Prefixes of the stored prompt that end on a checkpoint, and one token before and after it."""
    ends = [2 * bench.step + offset for offset in (-1, 0, 1, 2)]
    done = [bench.generate(bench.stored[:, :end], handle) for end in ends]
    return Outcome(done[-1].tokens, done[-1].logits, extra=[outcome.tokens.tolist() for outcome in done])


def _longer(bench: Bench, handle: Handle) -> Outcome:
    return bench.generate(torch.cat([bench.stored, bench.prompt(5)[:, -9:]], dim=1), handle)


def _short_greedy(bench: Bench, handle: Handle) -> Outcome:
    return _greedy(bench, handle, max_new_tokens=2)


def _compiled(bench: Bench, handle: Handle) -> Outcome:
    # The tracing is what can go wrong; generating machine code as well would only take minutes.
    bench.model.forward = torch.compile(type(bench.model).forward.__get__(bench.model), backend="eager")
    try:
        return _short_greedy(bench, handle)
    finally:
        del bench.model.forward
        torch.compiler.reset()


def _threads(bench: Bench, handle: Handle) -> Outcome:
    outcomes: dict[int, Outcome] = {}

    def work(seed: int) -> None:
        outcomes[seed] = bench.generate(bench.prompt(seed), handle)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Outcome(
        outcomes[1].tokens, outcomes[1].logits, extra=[outcomes[seed].tokens.tolist() for seed in (1, 2, 3)]
    )


def _stateful(model: PreTrainedModel) -> str:
    return "transformers refuses assisted decoding for stateful models" if model._is_stateful else ""


def _no_embeddings(model: PreTrainedModel) -> str:
    taken = "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters
    return "" if taken else "transformers does not forward inputs_embeds for this model"


def _without_attention(model: PreTrainedModel) -> str:
    return "the output of this model has no attentions" if "attentions" not in _output_fields(model) else ""


def _output_fields(model: PreTrainedModel) -> list[str]:
    with torch.no_grad():
        output = type(model(input_ids=torch.full((1, 2), FIRST_WORD)))
    return list(output.__dataclass_fields__)


CALLS = [
    Call("greedy", _greedy, core=True),
    Call("sampling", _sampling, core=True),
    Call("beams", _options(num_beams=3), core=True),
    Call("num_return_sequences", lambda bench, handle: _sampling(bench, handle, num_return_sequences=3)),
    Call("beams with returns", _options(num_beams=3, num_return_sequences=2)),
    Call("left-padded batch", _batch, core=True, reference=_rows_alone),
    Call("left-padded batch, beams", lambda bench, handle: _batch(bench, handle, num_beams=2)),
    Call("mask given", _masked),
    Call("streamer", _streamed),
    Call("pipeline", lambda bench, handle: _pipeline(bench, handle, [bench.prompt(1)])),
    Call(
        "pipeline, batched",
        lambda bench, handle: _pipeline(bench, handle, [bench.prompt(1), bench.prompt(3)], batch_size=2),
    ),
    Call("prefill_chunk_size", _options(prefill_chunk_size=11), reference=_greedy),
    Call("use_cache=False", _options(use_cache=False), reason="use_cache=False"),
    Call("inputs_embeds", _embeddings, reason="inputs_embeds", refused=_no_embeddings),
    Call("output_hidden_states", _hidden, reason="output_hidden_states"),
    Call(
        "output_attentions", _options(output_attentions=True), reason="output_attentions", refused=_without_attention
    ),
    Call("scores and logits", _scores),
    Call("logits processors", _processed),
    Call("stopping criteria", _stopped),
    Call("prefix_allowed_tokens_fn", _constrained),
    Call("prompt lookup", _options(prompt_lookup_num_tokens=3), reason="assisted", refused=_stateful),
    Call(
        "assistant_model",
        lambda bench, handle: _greedy(bench, handle, assistant_model=bench.model),
        reason="assisted",
        refused=_stateful,
    ),
    Call("multi-turn", _turns),
    Call("pad token inside, no mask", _pad_token_inside, reason="attention_mask leaves out"),
    Call("prompts of 1, 2 and 3 tokens", _tiny_prompts, reason="shorter than the first cut"),
    Call("no prompt", _no_prompt, reason="shorter than the first cut"),
    Call("prompt equal to a stored one", _equal),
    Call("prefixes of a stored prompt", _shorter),
    Call("stored prompt continued", _longer),
    Call("torch.compile(model.forward)", _compiled, reference=_short_greedy, slow=True),
    Call("three threads on one handle", _threads),
]
BY_NAME = {call.name: call for call in CALLS}
