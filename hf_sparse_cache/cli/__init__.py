"""The command line: `hf-sparse-cache --help`. One function a command; the work is in the modules beside this one.

What a command needs is imported inside it: help, errors in options and completion in a shell come without torch.
"""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..checks import MOST_ID, MOST_STATE_BYTES, MOST_TOKEN_BYTES, printable
from ..stats import parse_bytes
from ..tools import recall
from ..tools.builtin_sizes import SIZES
from .benching import bench
from .evaluating import evaluate
from .hosting import serve
from .outputs import PNG_MARK, check_output
from .parameters import ALL_POLICIES, MODELS_HELP, Dtype, Exactness, Grid, StorageMode
from .screen import Screen, fail


app = typer.Typer(
    name="hf-sparse-cache",
    help="Exact prefix reuse for recurrent and hybrid language models in Hugging Face transformers.",
    epilog=f"{MODELS_HELP}\n\n**Policies**, where checkpoints go: {ALL_POLICIES}; the default is learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", help="Write the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


Json = Annotated[bool, typer.Option("--json", help="Write one JSON object instead of tables.")]


def _model_names(incomplete: str) -> list[str]:
    return [name for name in (*recall.MANUALS, *SIZES) if name.startswith(incomplete)]


ModelName = Annotated[
    str, typer.Argument(help="Built-in model, named below, folder or Hub id.", autocompletion=_model_names)
]
Memory = Annotated[str, typer.Option(help="Bytes that may be stored, such as 500MB or 2GiB.")]
PolicyName = Annotated[str | None, typer.Option(help=f"Where checkpoints go: {ALL_POLICIES}; default: learned.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
SizesModel = Annotated[
    str | None,
    typer.Option(help="Take sizes and grid from this model; default: those given.", autocompletion=_model_names),
]
StateBytes = Annotated[
    int | None,
    typer.Option(help="Bytes of a checkpoint's states, without --model; default: 1 MiB.", min=1, max=MOST_STATE_BYTES),
]
KVBytes = Annotated[int, typer.Option(help="Bytes of KV a token, without --model.", min=0, max=MOST_TOKEN_BYTES)]
MaxCheckpoints = Annotated[
    int | None, typer.Option(help="Most new checkpoints a prompt; default: the policy's.", min=0)
]
Warmup = Annotated[float, typer.Option(help="Leading fraction that is served but not counted.")]
ManualTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a manual, or most of the project's own document; default: 2,000 (1,000 for recall-mamba), or "
        "5,600.",
        min=64,
        max=2**20,
    ),
]


# For texts of the user's own, of which the trained models do not know the words.
_UNTRAINED = {"mamba": "mamba-21m", "jamba": "jamba-30m", "zamba2": "zamba2-30m"}
_MANUALS, _QUICK_MANUALS, _UNCACHED = 20, 8, 3  # manuals a model; questions that are asked without the cache as well


DemoModels = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Built-in model, folder or Hub id; repeat for more. Default: {', '.join(recall.SHOWN)}; for a text "
        f"of your own {', '.join(_UNTRAINED.values())}.",
        autocompletion=_model_names,
    ),
]
WorkloadFolder = Annotated[
    Path | None,
    typer.Option(help="Folder with texts.jsonl and requests.jsonl: documents and questions; default: none."),
]
Documents = Annotated[
    int | None,
    typer.Option(
        help=f"Documents to take from the workload, default: 1; or manuals to write, default: {_MANUALS}, with "
        f"--quick {_QUICK_MANUALS}.",
        min=1,
    ),
]
Document = Annotated[Path | None, typer.Option(help="A text file of your own, with --question; default: none.")]
Questions = Annotated[
    list[str] | None, typer.Option(help="A question about the document; repeat for more; default: ours.")
]
Uncached = Annotated[
    int | None,
    typer.Option(
        help=f"Questions that are asked without the cache as well; default: all about manuals, else {_UNCACHED}.",
        min=0,
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help=f"{_QUICK_MANUALS} manuals a model, and 1,500 tokens of others.")]


@app.command(epilog=MODELS_HELP)
def demo(
    model: DemoModels = None,
    workload: WorkloadFolder = None,
    documents: Documents = None,
    document: Document = None,
    question: Questions = None,
    tokens: ManualTokens = None,
    quick: Quick = False,
    uncached: Uncached = None,
    policy: PolicyName = None,
    max_memory: Memory = "2GiB",
    grid: Grid = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Ask questions about a long text, with the cache and without it, and check that nothing changed.

    Without a model or a text, small trained models are asked about manuals, and their answers are checked as well.

    Example: `hf-sparse-cache demo --quick`
    """
    from ..tools.machine import describe_machine
    from . import questions as work
    from . import sources
    from .manuals import manuals

    screen = Screen(json)
    own = workload is None and document is None and not question
    names = _demo_models(model, own, quick)
    _quiet()
    reading = None
    if any(name not in recall.MANUALS for name in names):
        length = min(tokens or sources.OWN_TOKENS, 1500 if quick else 2**20)
        reading = sources.reading(workload, documents or 1, document, question or [], length)
    if any(name in SIZES for name in names):
        screen.say(
            "Built-in models other than recall-* have random weights: what they would answer means nothing and is not "
            "shown. What is shown is time to first token, memory and exactness, which depend on the architecture.\n"
        )
    options: dict[str, Any] = {"max_memory": max_memory, "grid": grid, **({"policy": policy} if policy else {})}
    results = []
    for name in names:
        if name in recall.MANUALS or reading is None:
            tasks = manuals(name, documents or (_QUICK_MANUALS if quick else _MANUALS), tokens)
            loaded = sources.NamedModel.load(name, [], dtype, device)
        else:
            loaded = sources.NamedModel.load(name, reading.texts, dtype, device)
            tasks = reading.tasks(loaded.tokenizer)
        beside = uncached if uncached is not None else len(tasks) if name in recall.MANUALS else _UNCACHED
        results.append(work.run(loaded, tasks, screen, uncached=beside, **options))
    passed = all(result.passed for result in results)
    screen.emit({"passed": passed, "machine": describe_machine(), "models": [result.to_dict() for result in results]})
    raise typer.Exit(0 if passed else 1)


def _demo_models(asked: list[str] | None, own: bool, quick: bool) -> list[str]:
    """The models of a demo.

    Args:
        asked: those that were named.
        own: whether they are asked about texts of ours, and not of the user's.
        quick: whether small ones will do.

    Raises:
        ValueError: a model that was named does not know the words of the user's text.
    """
    untrained = [f"{family}-3m" if quick else size for family, size in _UNTRAINED.items()]
    names = asked or (list(recall.SHOWN) if own else untrained)
    strangers = [name for name in names if name in recall.MANUALS and not own]
    if strangers:
        raise ValueError(
            f"--model {strangers[0]} knows no words but those of its manuals; leave --workload, --document and "
            f"--question out, or take another model, such as {untrained[1]}."
        )
    return names


@app.command(epilog=MODELS_HELP)
def verify(
    model: ModelName,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each prompt; default: three grid steps.", min=8)
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts to check.", min=1, max=7)] = 3,
    document: Annotated[
        Path | None, typer.Option(help="A text file for the prompts; default: the documentation.")
    ] = None,
    policy: PolicyName = None,
    exactness: Exactness = "replayable",
    grid: Grid = None,
    storage: StorageMode = "exact",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Prove on this machine that reuse changes nothing: prompts run stock, cold and resumed.

    Exit code 1 if a difference is found.

    Example: `hf-sparse-cache verify jamba-3m`
    """
    from ..tools.machine import describe_machine
    from . import sources, verifying

    screen = Screen(json)
    _quiet()
    text = sources.read_document(document) if document else sources.own_document()[0]
    loaded = sources.NamedModel.load(model, [text], dtype, device)
    options = {"grid": grid, "exactness": exactness, "storage": storage, **({"policy": policy} if policy else {})}
    report, result = verifying.run(loaded, text, screen, tokens=tokens, prompts=prompts, **options)
    screen.emit({"model": model, **result, "machine": describe_machine()})
    raise typer.Exit(0 if report.passed else 1)


@app.command(epilog=MODELS_HELP)
def tune(
    model: ModelName,
    exactness: Exactness = "replayable",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each prompt; default: 2,048, or 8,192 on an accelerator.", min=8)
    ] = None,
    pairs: Annotated[int, typer.Option(help="How often each way is timed beside its rival.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder of the settings; default: tuned/MODEL.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure what suits this model on this machine: piece sizes, what a cut costs, and cold prompts beside stock.

    The settings are saved for `SparsePrefixCache(model, tokenizer, config=...)`.

    Example: `hf-sparse-cache tune zamba2-30m`
    """
    from . import tuning
    from .sources import NamedModel

    screen = Screen(json)
    _quiet()
    folder = tuning.output_folder(model, out)
    loaded = NamedModel.load(model, [""], dtype, device)
    screen.emit(tuning.run(loaded, tuning.Trials(exactness, tokens, pairs), folder, screen))


@app.command(epilog=MODELS_HELP)
def plan(
    trace: Annotated[
        Path | None,
        typer.Argument(help="Workload folder or .jsonl of token ids; default: prompts that part anywhere."),
    ] = None,
    model: SizesModel = None,
    state_bytes: StateBytes = None,
    kv_bytes_per_token: KVBytes = 0,
    max_memory: Memory = "2GiB",
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Of {ALL_POLICIES}; repeat to compare; default: all but none.")
    ] = None,
    max_checkpoints: MaxCheckpoints = None,
    cut_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Token id after which prompts may be cut, the end of a message; repeat; default: none.",
            min=0,
            max=MOST_ID,
        ),
    ] = None,
    exactness: Exactness = "bitwise",
    grid: Grid = None,
    storage: StorageMode = "exact",
    warmup: Warmup = 0.0,
    requests: Annotated[
        int | None, typer.Option(help="Only the first so many of the trace; default: all.", min=1)
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the three pictures into this file; default: none.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompts without a trace.", min=64, max=2**22)] = 8192,
    json: Json = False,
) -> None:
    """Advise before memory is spent: what each policy would reuse of a trace, where, and what memory would be worth.

    Example: `hf-sparse-cache plan trace.jsonl --model zamba2-30m --max-memory 2GiB --png plan.png`
    """
    from . import advising
    from .drawing import check_installed
    from .estimates import Inquiry

    screen = Screen(json)
    _quiet()
    if png is not None:
        check_output(png, "--png", PNG_MARK)
    sizes = _sizes(model, state_bytes, kv_bytes_per_token, grid, exactness=exactness, storage=storage)
    if trace is None:
        screen.emit({"model": model, **advising.without_trace(sizes, tokens, max_memory, png, screen)})
        return
    if png is not None:
        check_installed()
    cut_ids = tuple(cut_id or ())
    inquiry = Inquiry(
        name=trace.name,
        trace=advising.trace_of(trace, requests),
        sizes=sizes,
        policies=list(dict.fromkeys(policy or advising.default_policies(cut_ids))),
        max_memory=parse_bytes(max_memory),
        max_checkpoints=max_checkpoints,
        cut_ids=cut_ids,
        warmup=warmup,
    )
    screen.emit({"model": model, **advising.on_trace(inquiry, png, screen)})


@app.command(epilog=MODELS_HELP)
def simulate(
    trace: Annotated[Path, typer.Argument(help="Workload folder, or .jsonl with one list of token ids a line.")],
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Of {ALL_POLICIES}; repeat to compare; default: learned, dp, block.")
    ] = None,
    model: SizesModel = None,
    state_bytes: StateBytes = None,
    kv_bytes_per_token: KVBytes = 0,
    max_memory: Annotated[str | None, typer.Option(help="Budget, such as 2GiB; default: no limit.")] = None,
    max_checkpoints: MaxCheckpoints = None,
    exactness: Exactness = "bitwise",
    grid: Grid = None,
    storage: StorageMode = "exact",
    warmup: Warmup = 0.0,
    json: Json = False,
) -> None:
    """Serve a trace without a model, and show what each policy would reuse of it.

    Example: `hf-sparse-cache simulate trace.jsonl --max-memory 2GiB --policy learned --policy block`
    """
    from ..tools.traces import load_trace
    from .estimates import Inquiry, compare_policies

    screen = Screen(json)
    _quiet()
    inquiry = Inquiry(
        name=trace.name,
        sizes=_sizes(model, state_bytes, kv_bytes_per_token, grid, exactness=exactness, storage=storage),
        trace=load_trace(trace),
        policies=policy or ["learned", "dp", "block"],
        max_memory=parse_bytes(max_memory),
        max_checkpoints=max_checkpoints,
        warmup=warmup,
    )
    screen.emit({"trace": str(trace), "max_memory": max_memory, **compare_policies(inquiry, screen)})


@app.command()
def inspect(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR", help="Of save_pretrained, a disk_dir, or a shared store or its URL."),
    ],
    tree: Annotated[bool, typer.Option("--tree", help="Every checkpoint below the one that it continues.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id, to show text; default: token ids.")] = None,
    json: Json = False,
) -> None:
    """Show what a stored cache holds, by prefix and by byte. It changes nothing.

    Example: `hf-sparse-cache inspect my_cache --tree`
    """
    from . import inspecting

    screen = Screen(json)
    _quiet()
    decoder = None if tokenizer is None else inspecting.load_tokenizer(tokenizer)
    screen.emit(inspecting.run(folder if "://" in folder else Path(folder), decoder, tree, screen))


def _sizes(
    model: str | None, state_bytes: int | None, kv_bytes_per_token: int, grid: int | None, **settings: str
) -> Any:
    """Those of the model, where one is named; `settings` are of a handle."""
    from .estimates import Sizes

    if model is None:
        given = Sizes(state_bytes or 2**20, kv_bytes_per_token, grid or 64, exactness=settings["exactness"])
        given = given.kept(settings.get("storage", "exact"))
        return replace(given, assumed=state_bytes is None, grid_assumed=grid is None)
    from ..tools import builtin

    return Sizes.of(builtin.load(model, [""])[0], grid, **settings)


def _quiet() -> None:
    """Leave out what transformers says about kernels and padding: the screen belongs to the result."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


app.command(epilog=MODELS_HELP)(bench)
app.command(epilog=MODELS_HELP)(serve)
# Its options are those of the harness, help and all.
app.command(
    "eval", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)(evaluate)


def main() -> None:
    """Run the command line; what goes wrong becomes one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe on Windows may lack the signs we use
    try:
        sys.exit(app(standalone_mode=False))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if os.environ.get("HF_SPARSE_CACHE_DEBUG"):
            raise
        if message := _described(error):  # none where the help was shown in place of a command
            fail(message)
        sys.exit(2)


def _described(error: Exception) -> str:
    """What went wrong and what to do, in one line."""
    usage = getattr(error, "format_message", None)  # typer's own errors have it; it brings its copy of click
    if usage is not None:
        return str(usage())
    if isinstance(error, OSError) and error.strerror:  # of the system, which names no remedy
        where = "" if error.filename is None else f"{printable(str(error.filename))}: "
        return f"{where}{error.strerror}; check the path, its permissions and the room on its disk"
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({error}); ask for less: a smaller model, trace or budget, or fewer --tokens"
    return f"{type(error).__name__}: {error}; HF_SPARSE_CACHE_DEBUG=1 shows where it comes from"
