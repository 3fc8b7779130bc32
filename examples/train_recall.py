"""Train the small models that `hf-sparse-cache demo` asks: a manual is read, and codes are recalled from it.

    python examples/train_recall.py jamba --out recall-jamba     about half an hour of one core
    python examples/train_recall.py jamba --quick                a minute: does it learn at all?

Writes weights in bfloat16, the tokenizer and the curve (loss and exact match over steps) into a folder that
`from_pretrained` loads. All data is generated, from a seed.
"""

import argparse
import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Zamba2Config,
    Zamba2ForCausalLM,
    get_cosine_schedule_with_warmup,
)
from transformers.models.jamba import modeling_jamba
from transformers.models.mamba import modeling_mamba
from transformers.models.zamba2 import modeling_zamba2

from hf_sparse_cache.tools.machine import describe_machine
from hf_sparse_cache.tools.random_weights import cast_weights, draw_weights
from hf_sparse_cache.tools.recall import manual


PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
CURVE = "curve.jsonl"
IGNORED = -100  # labels that do not count, as everywhere in transformers
ANSWER_TOKENS, PLACE_TOKENS = manual.CODE_DIGITS + 1, 2  # with the end of the line
TOKENS_A_LINE = 7.7
LONGEST_WAY = 50  # lines between a place that is named and the first question there
_BLOCK_ELEMENTS = 2**18  # states of the Mamba-1 scan that are in work at a time


@dataclass(frozen=True)
class Stage:
    """A part of the training: sequences of one length, with so many places and rooms at most.

    Attributes:
        share: of all steps.
        told: of the length, that the manual takes at most, and at least half as much; questions fill the rest.
    """

    share: float
    length: int
    batch: int
    places: int
    rooms: int
    told: float = 0.6


# First to tell rooms apart, then places as well; then the same over ever longer texts.
_HYBRID = (
    Stage(0.36, 128, 8, 1, 6),
    Stage(0.22, 128, 8, 2, 3),
    Stage(0.14, 256, 8, 4, 4),
    Stage(0.07, 512, 4, 6, 5),
    Stage(0.11, 1024, 2, 6, 5),
    Stage(0.10, 2048, 2, 6, 5),
)
# All that these know is in a state of fixed size, so there are fewer codes to know.
_RECURRENT = (
    Stage(0.35, 128, 8, 1, 4),
    Stage(0.25, 256, 8, 1, 6),
    Stage(0.20, 512, 4, 1, 6),
    Stage(0.20, 1024, 2, 1, 6),
)
# What is learned last: the place behind a long way, and the last digit of a code, when they are asked for once.
_HYBRID_END = (Stage(0.5, 768, 4, 6, 5, 0.8), Stage(0.5, 2048, 2, 6, 5, 0.9))
_RECURRENT_END = (Stage(0.6, 256, 8, 1, 5, 0.8), Stage(0.4, 1024, 2, 1, 5, 0.9))
_QUICK = (Stage(1.0, 64, 16, 1, 2),)
STAGES = {"mamba": _RECURRENT, "jamba": _HYBRID, "zamba2": _HYBRID}
LAST_STAGES = {"mamba": _RECURRENT_END, "jamba": _HYBRID_END, "zamba2": _HYBRID_END}
AVERAGED_STEPS = 100  # about as many last steps have a part in the weights that are saved


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, room number and digit; a line ends in one token. Decoding gives the text back."""
    words = [PAD, UNKNOWN, END, *manual.vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    pieces = Regex(r"\.\n| \d\d(?!\d)| ?\d| ?[A-Za-z]+|\n|\s|[^\w\s]|\w")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(family: str, vocab_size: int) -> PreTrainedModel:
    """A few narrow layers. The hybrids have one attention layer behind two recurrent ones: it can look a code up, but
    only the recurrent layers can tell it for which place."""
    common: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    common |= {"tie_word_embeddings": False, "hidden_size": 64}
    if family == "mamba":
        return MambaForCausalLM(MambaConfig(num_hidden_layers=3, state_size=16, **common))
    if family == "jamba":
        config = JambaConfig(
            num_hidden_layers=4,
            intermediate_size=128,
            num_attention_heads=2,
            num_key_value_heads=2,
            attn_layer_period=4,
            attn_layer_offset=2,
            num_experts=4,
            num_experts_per_tok=2,
            expert_layer_period=4,
            expert_layer_offset=3,
            mamba_d_state=8,
            **common,
        )
        return JambaForCausalLM(config)
    config = Zamba2Config(
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention"],
        intermediate_size=128,
        num_attention_heads=4,
        n_mamba_heads=4,
        mamba_d_state=32,
        chunk_size=64,
        **common,
    )
    return Zamba2ForCausalLM(config)


def write_example(rng: random.Random, stage: Stage, encode: Callable[[str], list[int]]) -> dict[str, list[int]]:
    """A manual with questions packed behind it.

    Supervised is what can be known and nothing else: every token of every answer, and here and there the place where
    the reader is, without which the recurrent layers would be long in finding out that it matters.
    """
    places = rng.randint(stage.places - stage.places // 3, stage.places)
    house = manual.House.build(rng, places, rng.randint(max(1, stage.rooms // 2), stage.rooms))
    ids: list[int] = []
    labels: list[int] = []
    wheres: list[int] = []

    def say(text: str, known: int = 0, here: str | None = None) -> None:
        new = encode(text)
        ids.extend(new)
        labels.extend([IGNORED] * (len(new) - known) + new[len(new) - known :])
        wheres.extend([manual.PLACES.index(here) if here else IGNORED] * len(new))

    told = sum(len(encode(line)) for place in house.codes for line in house.told(place))
    fillers = max(0, int((stage.length * rng.uniform(stage.told / 2, stage.told) - told) / TOKENS_A_LINE / places))
    for here in house.codes:
        arriving, *codes = house.told(here)
        for line in manual.mixed(rng, [arriving, *codes], fillers):
            say(line, here=None if line == arriving else here)
            if places > 1 and rng.random() < 0.1:
                say(manual.stay(here), known=PLACE_TOKENS, here=here)
    ahead: list[str] = []
    while len(ids) < stage.length:
        if not ahead:  # every place once before any is asked about again: what was just repeated is easier to know
            ahead = rng.sample(list(house.codes), places)
        here = ahead.pop()
        say(manual.arrival(here))
        for _ in range(rng.choice((0, 0, 1, rng.randint(0, LONGEST_WAY)))):
            say(manual.filler(rng), here=here)
        rooms = list(house.codes[here].items())
        for room, code in rng.sample(rooms, len(rooms)):
            say(manual.code_line(room, code), known=ANSWER_TOKENS, here=here)
            if rng.random() < 0.1:
                say(manual.filler(rng), here=here)
            if places > 1 and rng.random() < 0.1:
                say(manual.stay(here), known=PLACE_TOKENS, here=here)
    return {name: row[: stage.length] for name, row in (("input_ids", ids), ("labels", labels), ("places", wheres))}


def make_dataset(stage: Stage, rows: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Generated examples of one stage."""
    rng = random.Random(seed)
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in known:
            known[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return known[text]

    return Dataset.from_list([write_example(rng, stage, encode) for _ in range(rows)]).with_format("torch")


class _Scan(torch.autograd.Function):
    """y_t = C_t · h_t with h_t = exp(step_t A) h_{t-1} + u_t B_t, block by block; a block is computed again backwards,
    so that no states are kept but those between blocks."""

    @staticmethod
    def blocks(step: torch.Tensor, states: int) -> list[slice]:
        """Slices of time whose states fit into a processor's cache."""
        size = max(1, _BLOCK_ELEMENTS // (step[0].numel() * states))
        return [slice(start, start + size) for start in range(0, len(step), size)]

    @staticmethod
    def run(h: torch.Tensor, decay: torch.Tensor, u: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """All states of one block, `(block, batch, D, N)`, from the one before it."""
        states = u[..., None] * B[:, :, None, :]
        for now, keep in zip(states, decay, strict=True):
            h = now.addcmul_(keep, h)
        return states

    @staticmethod
    def forward(
        ctx: Any, step: torch.Tensor, u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> torch.Tensor:
        h = step.new_zeros(*step.shape[1:], A.shape[-1])
        before, outputs = [], []
        for block in _Scan.blocks(step, A.shape[-1]):
            before.append(h)
            states = _Scan.run(h, torch.exp(step[block, ..., None] * A), u[block], B[block])
            outputs.append(torch.matmul(states, C[block, ..., None]).squeeze(-1))
            h = states[-1].clone()
        ctx.save_for_backward(step, u, A, B, C, torch.stack(before))
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        step, u, A, B, C, before = ctx.saved_tensors
        to_step, to_u, to_B, to_C = (torch.empty_like(tensor) for tensor in (step, u, B, C))
        to_A, later = torch.zeros_like(A), torch.zeros_like(before[0])
        for h, block in reversed(list(zip(before, _Scan.blocks(step, A.shape[-1]), strict=True))):
            decay = torch.exp(step[block, ..., None] * A)
            states = _Scan.run(h, decay, u[block], B[block])
            to_C[block] = torch.matmul(grads[0][block][:, :, None], states).squeeze(2)
            grad = grads[0][block][..., None] * C[block][:, :, None, :]
            grad[-1] += later
            for index in range(len(grad) - 1, 0, -1):
                grad[index - 1].addcmul_(decay[index], grad[index])
            later = decay[0] * grad[0]
            to_u[block] = torch.matmul(grad, B[block, ..., None]).squeeze(-1)
            to_B[block] = torch.matmul(u[block][:, :, None], grad).squeeze(2)
            decay[1:].mul_(states[:-1])
            decay[0].mul_(h)
            grad.mul_(decay)  # towards step A, element by element
            to_A += torch.einsum("lbd,lbdn->dn", step[block], grad)
            to_step[block] = (grad * A).sum(-1)
        return to_step, to_u, to_A, to_B, to_C


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The scan of Mamba-1 for training: what transformers' loop computes, several times as fast.

    Args:
        x, dt, z: input, raw step sizes and gate `(batch, D, length)`.
        A: `(D, N)`. B, C: `(batch, N, length)`. D, delta_bias: `(D,)`.
    """
    step = F.softplus(dt + delta_bias[:, None]).permute(2, 0, 1).contiguous()  # (length, batch, D)
    B, C = (tensor.permute(2, 0, 1).contiguous() for tensor in (B, C))
    y = _Scan.apply(step, step * x.permute(2, 0, 1), A, B, C).permute(1, 2, 0)
    return (y + x * D[:, None]) * F.silu(z)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    **_: Any,
) -> torch.Tensor:
    """The scan of Mamba-2 for training, in products of matrices; one group of B and C.

    Args:
        x: `(batch, length, heads, P)`. dt: raw step sizes `(batch, length, heads)`. A, D, dt_bias: `(heads,)`.
        B, C: `(batch, length, 1, N)`.
    """
    batch, length, heads, width = x.shape
    chunk = min(chunk_size, 32)  # less work than longer ones
    if length % chunk:
        raise ValueError(f"length={length} must be a multiple of the chunk of {chunk} tokens")
    step = F.softplus(dt + dt_bias).clamp(*dt_limit)
    new = (x * step[..., None]).view(batch, -1, chunk, heads, width)
    B, C = (tensor.reshape(batch, length // chunk, chunk, -1) for tensor in (B, C))
    elapsed = (step * A).view(batch, -1, chunk, heads).cumsum(2).transpose(2, 3)  # (batch, chunks, heads, chunk)
    span = elapsed[..., :, None] - elapsed[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    weight = torch.where(later, span, -torch.inf).exp() * (C @ B.transpose(2, 3))[:, :, None]
    values = new.transpose(2, 3)  # (batch, chunks, heads, chunk, P)
    y = weight @ values
    to_end = (elapsed[..., -1:] - elapsed).exp()
    gained = (values * to_end[..., None]).transpose(3, 4) @ B[:, :, None]  # (batch, chunks, heads, P, N)
    state = torch.zeros_like(gained[:, 0])
    before = []
    for index in range(length // chunk):
        before.append(state)
        state = state * elapsed[:, index, :, -1, None, None].exp() + gained[:, index]
    y = y + (C[:, :, None] @ torch.stack(before, 1).transpose(3, 4)) * elapsed.exp()[..., None]
    return y.transpose(2, 3).reshape(batch, length, heads, width) + x * D[:, None]


@contextmanager
def fast_scans() -> Iterator[None]:
    """While training, transformers' modeling files call the scans above instead of their own."""
    swaps = (
        (modeling_mamba, "mamba_selective_scan", selective_scan),
        (modeling_jamba, "mamba_selective_scan", selective_scan),
        (modeling_zamba2, "mamba2_chunk_scan", chunk_scan),
    )
    stock = [(module, name, getattr(module, name)) for module, name, _ in swaps]
    try:
        for module, name, fast in swaps:
            setattr(module, name, fast)
        yield
    finally:
        for module, name, own in stock:
            setattr(module, name, own)


def answer_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the supervised tokens of a batch.

    Returns:
        The mean loss, and for each whole answer of the batch whether all its tokens are the likeliest ones.
    """
    hidden = model.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    asked = labels != IGNORED
    logits = model.get_output_embeddings()(hidden[asked]).float()
    right = torch.zeros_like(asked)
    right[asked] = logits.argmax(-1) == labels[asked]
    whole = asked.unfold(1, ANSWER_TOKENS, 1).all(-1)  # between two answers stands a question
    loss = F.cross_entropy(logits, labels[asked], reduction="sum") / max(1, len(logits))  # a batch may ask nothing
    return loss, right.unfold(1, ANSWER_TOKENS, 1).all(-1)[whole]


class PlaceProbe(nn.Module):
    """Asks the layer below the attention where the reader is, at every token; for training alone.

    Attention can find the code of a room by itself. It learns to heed the place once the layers below it carry that
    along, and these have little reason to before it does.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        self.head = nn.Linear(model.config.hidden_size, len(manual.PLACES))
        self.hidden = torch.empty(0)
        model.get_decoder().layers[layer].register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        self.hidden = output[0] if isinstance(output, tuple) else output

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """The loss of the last forward, for places `(batch, length)`."""
        return F.cross_entropy(self.head(self.hidden).flatten(0, 1), places.flatten(), ignore_index=IGNORED)


def make_optimizers(model: PreTrainedModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of linear layers, and AdamW for the rest: embeddings, convolutions, rates and norms."""
    head = model.get_output_embeddings()
    linear = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    known = {id(parameter) for parameter in linear}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        torch.optim.Muon(linear, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(
    stages: Sequence[Stage], steps: int, seed: int, tokenizer: PreTrainedTokenizerFast, accelerator: Accelerator
) -> Iterator[tuple[Stage, DataLoader[Any]]]:
    """The batches of each stage. No example comes twice: each is new to the model."""
    whole = sum(stage.share for stage in stages)
    ends = [round(steps * sum(stage.share for stage in stages[: end + 1]) / whole) for end in range(len(stages))]
    for number, (stage, start, end) in enumerate(zip(stages, [0, *ends], ends, strict=False)):
        if start < end:
            rows = make_dataset(stage, (end - start) * stage.batch, seed * len(stages) + number, tokenizer)
            yield stage, accelerator.prepare(DataLoader(rows, batch_size=stage.batch))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stages: Sequence[Stage],
    steps: int,
    seed: int,
    *,
    learning_rate: float = 3e-3,
    every: int = 20,
) -> Iterator[tuple[list[dict[str, float]], PreTrainedModel]]:
    """Train a model in place.

    Args:
        stages: parts of the training, one after the other.
        steps: of all stages together.
        seed: of the data.
        every: steps between two points of the curve.

    Yields:
        At the end of each stage the curve (per point the step, the length of its sequences, and since the point before
        the mean loss and the share of answers with every token right), and a model whose weights are the mean of those
        of the last steps, which waver less.
    """
    accelerator = Accelerator(cpu=True)
    set_seed(seed)
    model = accelerator.prepare(model.train())  # the same object on a CPU
    mean_model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / min(AVERAGED_STEPS, 1 + steps // 10)))
    probe = PlaceProbe(model, 1) if stages[-1].places > 1 else None
    optimizers = [accelerator.prepare(optimizer) for optimizer in make_optimizers(model, learning_rate)]
    if probe is not None:
        optimizers[-1].add_param_group({"params": list(probe.parameters())})
    warmup = min(100, steps // 10)
    schedulers = [get_cosine_schedule_with_warmup(optimizer, warmup, steps) for optimizer in optimizers]
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    answers: list[torch.Tensor] = []
    step = 0
    with fast_scans():
        for stage, batches in schedule(stages, steps, seed, tokenizer, accelerator):
            for batch in batches:
                step += 1
                loss, right = answer_loss(model, batch)
                accelerator.backward(loss if probe is None else loss + 0.3 * probe(batch["places"]))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                for each in (*optimizers, *schedulers):
                    each.step()
                model.zero_grad()
                mean_model.update_parameters(model)
                losses.append(loss.item())
                answers.append(right)
                if step % every == 0 or step == steps:
                    loss_now, exact = round(mean(losses), 5), round(torch.cat(answers).float().mean().item(), 5)
                    curve.append({"step": step, "tokens": stage.length, "loss": loss_now, "exact_match": exact})
                    print(" ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()), flush=True)
                    losses, answers = [], []
            yield curve, mean_model.module


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, runs: list[dict[str, Any]], out: Path) -> None:
    """Write everything that `from_pretrained` reads, in bfloat16, and a line of JSON for each run that led to it."""
    rounded = type(model)(copy.deepcopy(model.config))  # the training may go on with the model itself
    rounded.load_state_dict(model.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=out) as name:  # where the disk is full, the stage before stays whole
        folder = Path(name)
        cast_weights(rounded, torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CURVE).write_text("".join(f"{json.dumps(run)}\n" for run in runs), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)


def own_folder(name: str) -> Path:
    """The type of `--out`: a new folder, an empty one, or one that an earlier run wrote, and no other model's.

    Raises:
        argparse.ArgumentTypeError: it holds something else.
    """
    out = Path(name)
    if os.path.lexists(out) and not (out.is_dir() and ((out / CURVE).is_file() or not any(out.iterdir()))):
        raise argparse.ArgumentTypeError(f"{name} holds something else, which would be replaced; give a new folder")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=sorted(STAGES))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=own_folder, help="folder to write; nothing is written without it")
    parser.add_argument("--start", type=Path, help="go on from what an earlier run wrote, instead of random weights")
    parser.add_argument("--skip", type=int, default=0, help="stages to leave out at the beginning")
    parser.add_argument("--last", action="store_true", help="the stages that sharpen what was learned; with --start")
    parser.add_argument("--quick", action="store_true", help="200 steps on sequences of 64 tokens")
    given = parser.parse_args()
    chosen = LAST_STAGES if given.last else STAGES
    steps, stages = (200, _QUICK) if given.quick else (given.steps, chosen[given.family][given.skip :])
    if given.start:
        lines = (given.start / CURVE).read_text(encoding="utf-8").splitlines()
        before = [json.loads(line) for line in lines]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(given.start)
        model = AutoModelForCausalLM.from_pretrained(given.start, dtype=torch.float32)
    else:
        before, tokenizer = [], build_tokenizer()
        model = draw_weights(build_model(given.family, len(tokenizer)), given.seed)
    made = {
        "command": " ".join(["python", "examples/train_recall.py", *sys.argv[1:]]),
        "parameters": model.num_parameters(),
        "stages": [asdict(stage) for stage in stages],
        "machine": describe_machine(),
    }
    clock = time.perf_counter()
    for curve, averaged in train(model, tokenizer, stages, steps, given.seed, learning_rate=given.learning_rate):
        if given.out:  # after each stage, so that a run that is interrupted leaves what it reached
            seconds = round(time.perf_counter() - clock)
            save(averaged, tokenizer, [*before, {**made, "seconds": seconds, "curve": curve}], given.out)


if __name__ == "__main__":
    main()
