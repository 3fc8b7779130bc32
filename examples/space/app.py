"""A Space: load a document, ask questions, and watch what is read again and what is not.

    python examples/space/app.py        then open the address that it prints; nothing is downloaded

The model is one of the small trained ones that come with the package: it answers questions about manuals of rooms and
codes, and knows no other words. Every visitor has a cache and a budget of their own.
"""

import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from html import escape

import gradio as gr
import torch
from transformers.generation.streamers import BaseStreamer

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.stats import html_table
from hf_sparse_cache.tools import recall
from hf_sparse_cache.tools.builtin import load


MODEL = "recall-jamba"
CODE_DIGITS = 3
MOST_TOKENS = 16_384
MOST_VISITORS = 16
COLUMNS = [
    "question",
    "answer",
    "without",
    "is it right",
    "resumed",
    "computed",
    "first token",
    "without cache",
    "sooner",
]
STYLE = """
.shown { overflow-x: auto; }
.shown table { font-size: .85rem; width: auto !important; }
.shown ul { padding-left: 1.1rem; }
.gradio-container { max-width: 60rem !important; }
"""

model, tokenizer = load(MODEL, [])
alone = threading.Lock()  # times mean something only when one question is answered at a time


@dataclass
class Visitor:
    """What belongs to one browser tab: a cache, and what was asked."""

    cache: SparsePrefixCache
    rows: list[list[str]] = field(default_factory=list)

    @property
    def table(self) -> str:
        """What was asked, the latest first."""
        return html_table(COLUMNS, self.rows, words=(1, 2, 3)) if self.rows else ""


visitors: "OrderedDict[str, Visitor]" = OrderedDict()


def visitor_of(request: gr.Request) -> Visitor:
    """The visitor's own; the one who asked longest ago makes room when there are too many."""
    name = request.session_hash or "alone"
    with alone:
        if name not in visitors:
            visitors[name] = Visitor(SparsePrefixCache(model, tokenizer, max_memory="4MiB", grid=64, namespace=name))
            while len(visitors) > MOST_VISITORS:
                visitors.popitem(last=False)[1].cache.detach()
        visitors.move_to_end(name)
        return visitors[name]


class FirstToken(BaseStreamer):
    """Notes when the first new token comes; before it `generate()` hands the prompt over."""

    def __init__(self) -> None:
        self.start, self.calls, self.seconds = time.perf_counter(), 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.seconds = time.perf_counter() - self.start

    def end(self) -> None:
        pass


def answer(text: str, **options: object) -> tuple[str, float]:
    """What the model says, and the seconds until it began to."""
    inputs = tokenizer(text, return_tensors="pt")
    first = FirstToken()
    with torch.inference_mode():
        written = model.generate(**inputs, do_sample=False, max_new_tokens=CODE_DIGITS, streamer=first, **options)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :]).strip(), first.seconds


def right_answer(document: str, question: str) -> str:
    """The code that the document tells for the place where it ends; "" where it tells none."""
    parts = re.split(r"You come to the (\w+)\.", document)
    room = re.search(r"The code of room (\d+) is\s*$", question.strip())
    told = [text for place, text in zip(parts[1::2], parts[2::2], strict=True) if place == parts[-2]] if room else []
    codes = (
        [code for text in told for code in re.findall(rf"The code of room {room[1]} is (\d+)\.", text)] if room else []
    )
    return codes[-1] if codes else ""


def write_document(seed: float) -> tuple[str, gr.Dropdown]:
    """A manual, and the questions that can be asked of it."""
    manual = recall.write_manual(int(seed), **recall.MANUALS[MODEL])
    questions = [question.text for question in manual.questions]
    return manual.text, gr.Dropdown(questions, value=questions[0])


def check(document: str) -> str:
    """The document as it is read.

    Raises:
        gr.Error: the model could not read it.
    """
    document = document.rstrip() + "\n"
    ids = tokenizer(document)["input_ids"]
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    if unknown:
        raise gr.Error(f"{unknown} words are not in the vocabulary of {MODEL}, which knows manuals only.")
    if not 64 <= len(ids) <= MOST_TOKENS:
        raise gr.Error(f"The document has {len(ids):,} tokens; give 64 to {MOST_TOKENS:,}.")
    return document


def ask(document: str, question: str, request: gr.Request) -> tuple[str, str, str, str]:
    """Answer with the cache, and once more without it."""
    visitor, document = visitor_of(request), check(document)
    if not (question or "").strip():
        raise gr.Error("Ask a question, such as: The code of room 17 is")
    prompt = document + question.strip()
    with alone:
        said, seconds = answer(prompt, past_key_values=visitor.cache)
        info = visitor.cache.last_request
        stock, stock_seconds = answer(prompt)
    code = right_answer(document, question)
    verdict = "nobody knows" if not code else "right" if said == code else f"WRONG, it is {code}"
    row = [question.strip(), said, stock, verdict, f"{info.resumed_tokens:,}", f"{info.computed_tokens:,}"]
    row += [f"{1000 * seconds:.0f} ms", f"{1000 * stock_seconds:.0f} ms", f"{stock_seconds / seconds:.1f}×"]
    visitor.rows.insert(0, row)
    return visitor.table, bars(seconds, stock_seconds), *looks(visitor, prompt)


def look(document: str, question: str, request: gr.Request) -> str:
    """What the question would reuse, without asking it."""
    if not (document or "").strip() or not (question or "").strip():
        return ""
    with alone:
        visitor = visitors.get(request.session_hash or "alone")
        return visitor.cache.explain(document.rstrip() + "\n" + question.strip())._repr_html_() if visitor else ""


def resize(kibibytes: float, request: gr.Request) -> str:
    """Another budget: what does not fit goes at once."""
    visitor = visitor_of(request)
    with alone:
        visitor.cache.store.resize(int(kibibytes) * 1024)
        return visitor.cache._repr_html_()


def forget(request: gr.Request) -> tuple[str, str, str]:
    """Empty the cache and the table."""
    visitor = visitor_of(request)
    with alone:
        visitor.cache.clear()
        visitor.rows.clear()
        return "", "", visitor.cache._repr_html_()


def looks(visitor: Visitor, prompt: str) -> tuple[str, str]:
    """What is stored, and what the same question would reuse now."""
    with alone:
        return visitor.cache._repr_html_(), visitor.cache.explain(prompt)._repr_html_()


def bars(seconds: float, stock: float) -> str:
    """Both times as bars of one scale."""
    longest = max(seconds, stock)

    def bar(name: str, value: float, colour: str) -> str:
        return (
            f"<div style='margin:.3rem 0'>{escape(name)}: {1000 * value:.0f} ms"
            f"<div style='background:{colour};height:.9rem;width:{max(0.5, 100 * value / longest):.1f}%'></div></div>"
        )

    return bar("First token with the cache", seconds, "#2166ac") + bar("without it", stock, "#8a8f98")


with gr.Blocks(title="hf_sparse_cache") as demo:
    gr.Markdown(
        "# What is read twice, and what is not\n"
        f"`{MODEL}`, a hybrid of Mamba and attention with {model.num_parameters() / 1e6:.1f} M parameters, reads a "
        "manual and is asked for codes of the place where it ends. The first question pays for reading; later ones "
        "resume from a stored state. Each is asked with the cache and without it, in turn."
    )
    with gr.Row():
        with gr.Column(scale=3):
            document = gr.Textbox(label="Document", lines=8, max_lines=8, elem_id="document")
        with gr.Column(scale=2):
            seed = gr.Number(label="Manual number", value=20_001, precision=0, minimum=0, elem_id="seed")
            write = gr.Button("Write this manual", elem_id="write")
            question = gr.Dropdown(label="Question", allow_custom_value=True, elem_id="question")
            go = gr.Button("Ask", variant="primary", elem_id="ask")
    times = gr.HTML(elem_id="times", label="First token")
    table = gr.HTML(elem_id="rows", elem_classes="shown")
    with gr.Row():
        memory = gr.Slider(32, 8192, value=4096, step=32, label="Memory for states, KiB", elem_id="memory")
        clear = gr.Button("Forget everything", elem_id="forget")
    gr.Markdown("### What is stored, as a tree of prefixes; ◆ are checkpoints")
    tree = gr.HTML(elem_id="tree", elem_classes="shown")
    gr.Markdown("### What the next question would reuse")
    reuse = gr.HTML(elem_id="reuse", elem_classes="shown")

    demo.load(write_document, seed, [document, question])
    write.click(write_document, seed, [document, question])
    go.click(ask, [document, question], [table, times, tree, reuse])
    question.change(look, [document, question], reuse)
    memory.release(resize, memory, tree)
    clear.click(forget, None, [table, times, tree])


if __name__ == "__main__":
    demo.queue(default_concurrency_limit=1).launch(css=STYLE)
