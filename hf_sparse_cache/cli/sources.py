"""What the commands run on: a model by name, and questions about a long text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import text as checked_text
from ..tools import builtin
from ..tools.folders import read_requests


# The project's own documents in the order in which the demo reads them; the questions are about the first ones.
_DOCUMENTS = ("README.md", "docs/concepts.md", "docs/exactness.md", "docs/troubleshooting.md")

OWN_TOKENS = 5600  # of them that are read where nothing else is said

QUESTIONS = (
    "What is a checkpoint, and what does it hold?",
    "Why does the cache leave at least two tokens of every prompt to compute?",
    "What do a resumed run and a cold run have in common, and on which condition?",
    "Which models are refused, and why?",
    "How does the exactness check make sure that it can fail?",
    "Which policy suits text that is edited anywhere?",
    "What is not there yet?",
)


@dataclass(frozen=True)
class DocumentQuestion:
    """One question about one document; `prompt` is what the model reads.

    `answer` is what is right, a token a character; "" where nobody knows.
    """

    document: str
    question: str
    prompt: str
    answer: str = ""


@dataclass(frozen=True)
class Material:
    """What is to be read: the texts, for a tokenizer to learn from, and the tasks once there is a tokenizer."""

    texts: list[str]
    tasks: Callable[[Any], list[DocumentQuestion]]


def reading(
    workload: Path | None, documents: int, document: Path | None, questions: Sequence[str], tokens: int
) -> Material:
    """A workload, or a document with questions, or else the first `tokens` tokens of the project's own document.

    Raises:
        ValueError: Both are given, or too few questions.
    """
    if workload is not None and document is not None:
        raise ValueError("--workload and --document are both given; choose one.")
    if workload is not None:
        tasks = read_workload(workload, documents)
        return Material([task.prompt for task in tasks], lambda tokenizer: tasks)
    if questions and document is None:
        raise ValueError("--question is about a --document of yours; give both, or neither.")
    if document is not None:
        if len(questions) < 2:
            raise ValueError("--document needs at least two --question options: the first one pays for the others.")
        for question in questions:
            checked_text("--question", question, "give text in UTF-8")
        tasks = about(read_document(document), questions, document.name)
        return Material([task.prompt for task in tasks], lambda tokenizer: tasks)
    text, name = own_document()
    return Material([text], lambda tokenizer: about(shorten(text, tokenizer, tokens), QUESTIONS, name))


def read_document(path: Path) -> str:
    """The text of a file that the user named.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--document {path} cannot be read ({error}); give a text file in UTF-8.") from error


def own_document() -> tuple[str, str]:
    """A long text that we wrote, and its name: the documentation, or the source where only the package is there."""
    package = Path(__file__).resolve().parents[1]
    root = package.parent
    files = [root / name for name in _DOCUMENTS if (root / name).is_file()]
    name = "the project's documentation"
    if len(files) < len(_DOCUMENTS):
        files, name = sorted(package.glob("*.py")), "the project's source"
    else:
        files += sorted(path for path in (root / "docs").glob("*.md") if path not in files)
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in files), name


def about(document: str, questions: Sequence[str], name: str) -> list[DocumentQuestion]:
    """Tasks that share their document."""
    return [DocumentQuestion(name, question, f"{document}\n\nQuestion: {question}\nAnswer:") for question in questions]


def read_workload(folder: Path, groups: int) -> list[DocumentQuestion]:
    """The first groups of a workload of documents and questions.

    Args:
        folder: holds `texts.jsonl` (`id`, `text`) and `requests.jsonl` (`group_id`, `segments`: ids of the texts that
            make up a prompt, the last one the question).
        groups: how many documents to take.

    Raises:
        ValueError: The folder does not hold such a workload.
    """
    missing = [name for name in ("texts.jsonl", "requests.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--workload {folder}: no {' and no '.join(missing)} there; give a folder that has both.")
    tasks: list[DocumentQuestion] = []
    seen: dict[str, None] = {}
    try:
        for asked in read_requests(folder):
            seen.setdefault(asked.group)
            if len(seen) > groups:
                break
            *before, question = (segment["text"] for segment in asked.segments)
            said = question.strip().removeprefix("Question:").removesuffix("Answer:").strip()
            tasks.append(DocumentQuestion(f"{folder.name}/{asked.group}", said, "".join(before) + question))
    except ValueError as error:
        raise ValueError(f"--workload {folder}: {error}") from error
    if not tasks:
        raise ValueError(f"--workload {folder}: requests.jsonl is empty; give at least one request.")
    return tasks


@dataclass(frozen=True)
class NamedModel:
    """A model that is loaded, and what it was called on the command line."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str, texts: Sequence[str], dtype: str, device: str) -> "NamedModel":
        """A built-in model, whose tokenizer learns from `texts`, or one of a folder or the Hub."""
        return cls(name, *builtin.load(name, texts, dtype, device))

    @property
    def line(self) -> str:
        """What it is, in one line."""
        if self.name in builtin.SIZES:
            return builtin.describe_model(self.name)
        layers = getattr(self.model.config.get_text_config(decoder=True), "num_hidden_layers", "?")
        return f"{self.name}: {self.model.num_parameters() / 1e6:.1f} M parameters in {layers} layers"


def check_length(tokens: int, grid: int) -> None:
    """Refuse prompts of which nothing could be resumed.

    Args:
        tokens: of the longest prompt.
        grid: tokens between cuts.

    Raises:
        ValueError: They are too short.
    """
    if tokens < 2 * grid:
        raise ValueError(
            f"the prompts have {tokens} tokens, fewer than two grid steps of {grid}: nothing could be resumed. Give a "
            "longer --document, more --tokens or a smaller --grid."
        )


def shorten(document: str, tokenizer: Any, tokens: int) -> str:
    """The first paragraphs of a text, as many as fit into a number of tokens."""
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return document
    text: str = tokenizer.decode(ids[:tokens])
    return text[: text.rfind("\n\n")] if "\n\n" in text else text
