"""The command `serve`: its options, and what it says. The serving is done in `hf_sparse_cache.serving`."""

import importlib.util
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..stats import format_bytes
from . import replicating
from .parameters import ALL_POLICIES, Dtype, Exactness, Grid, StorageMode
from .screen import Screen


if TYPE_CHECKING:
    from ..serving.service import Service

_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic", "prometheus_client", "jinja2")
_PIECES = 1024
_LOG_LEVELS = ("debug", "info", "warning", "error")


Model = Annotated[str, typer.Argument(help="Built-in model, named below, folder or Hub id.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=KEY of a tenant that is let in; repeat for more. Prefixes of one never serve another. "
        "Default: everybody may ask.",
        envvar="HF_SPARSE_CACHE_API_KEYS",
    ),
]
AdminKey = Annotated[
    str,
    typer.Option(
        help="Opens the page and /cache; default: they are closed.",
        envvar="HF_SPARSE_CACHE_ADMIN_KEY",
        show_default=False,
    ),
]
MaxMemory = Annotated[str, typer.Option(help="Bytes of prefixes beside the model.")]
TenantMemory = Annotated[
    list[str] | None,
    typer.Option(help="NAME=SIZE, the share that a tenant may take of it; repeat for more; default: all of it."),
]
HostMemory = Annotated[
    str | None, typer.Option(help="A second tier in host memory, for models on an accelerator; default: none.")
]
DiskMemory = Annotated[
    str | None, typer.Option(help="A tier on disk, which the next start finds again; default: none.")
]
DiskDir = Annotated[Path | None, typer.Option(help="Its folder; default: none.")]
Shared = Annotated[
    str | None,
    typer.Option(help="A folder or fsspec URL that other servers read and write, such as s3://…; default: none."),
]
SharedMemory = Annotated[str, typer.Option(help="Most bytes there.")]
ServerPolicy = Annotated[str, typer.Option(help=f"Where checkpoints go: {ALL_POLICIES}.")]
Pieces = Annotated[int, typer.Option(help="Most tokens read at once: how long one who left keeps the model.", min=2)]
CutAfter = Annotated[
    list[str] | None, typer.Option(help="Cut prompts behind this text; repeat; default: special tokens.")
]
MostWaiting = Annotated[int, typer.Option(help="Requests that may wait; more are told to come back.")]
Timeout = Annotated[float, typer.Option(help="Seconds from a request's arrival to its end; 0 for no limit.")]
Drain = Annotated[float, typer.Option(help="Seconds for running requests when told to stop.", min=0)]
MaxBody = Annotated[str, typer.Option(help="Most bytes of a request.")]
ServerDevice = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
AttnImplementation = Annotated[
    str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...; default: the model's.")
]
Quantization = Annotated[str | None, typer.Option(help="bnb-4bit or bnb-8bit; default: none.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's.")]
ChatTemplate = Annotated[Path | None, typer.Option(help="A file with the template; default: the model's own.")]
ChatTemplateKwargs = Annotated[str, typer.Option(help='JSON for it, such as {"enable_thinking": false}.')]
Replicas = Annotated[int, typer.Option(help="Servers behind a router that knows their prefixes, on Ray.", min=1)]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]


def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    admin_key: AdminKey = "",
    max_memory: MaxMemory = "2GiB",
    tenant_memory: TenantMemory = None,
    host_memory: HostMemory = None,
    disk_memory: DiskMemory = None,
    disk_dir: DiskDir = None,
    shared: Shared = None,
    shared_memory: SharedMemory = "100GiB",
    exactness: Exactness = "replayable",
    storage: StorageMode = "exact",
    policy: ServerPolicy = "learned",
    grid: Grid = None,
    pieces: Pieces = _PIECES,
    cut_after: CutAfter = None,
    most_waiting: MostWaiting = 64,
    timeout: Timeout = 600,
    drain: Drain = 30,
    max_body: MaxBody = "16MiB",
    device: ServerDevice = "auto",
    dtype: Dtype = "auto",
    attn_implementation: AttnImplementation = None,
    quantization: Quantization = None,
    trust_remote_code: TrustRemoteCode = False,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = "{}",
    replicas: Replicas = 1,
    log_level: LogLevel = "info",
) -> None:
    """Serve a model over the OpenAI API, with prefixes that are exact: chat, completions, responses.

    Example: `hf-sparse-cache serve jamba-3m --port 8000`
    """
    asked = dict(locals())
    _need_packages()
    from ..serving.listening import Address, PortServer
    from ..serving.options import Options, pairs
    from ..serving.settings import LOOPBACK
    from .sources import own_document

    tenants = pairs("--api-key", api_key or (), several=True)
    _check(tenants, dict(pairs("--tenant-memory", tenant_memory or ())), log_level)
    lists = {"api_keys": api_key, "tenant_memory": tenant_memory, "cut_after": cut_after}
    asked |= {name: tuple(given or ()) for name, given in lists.items()}
    asked |= {"chat_template_kwargs": _template_kwargs(chat_template_kwargs), "learn_from": own_document()[0]}
    if replicas > 1:
        replicating.run(asked)
        return
    service = Options(**{name: asked[name] for name in Options.model_fields}).service()
    _greet(service, f"{model} on {service.model.device}, {exactness} mode", f"http://{host}:{port}")
    if host not in LOOPBACK and not tenants:
        Screen().say("Anybody who reaches this address may ask: there is no --api-key.", style="bold")
    PortServer(service, Address(host, port, drain), log_level).run()


def _greet(service: "Service", served: str, url: str) -> None:
    screen, most = Screen(), service.store.max_memory
    screen.say(f"{served}, prefixes of {'any size' if most is None else format_bytes(most)}")
    screen.say(f"{url}/v1 for clients, {url}/ for operators")


def _need_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"serve needs {', '.join(missing)}: pip install 'hf_sparse_cache[serve]'")


def _check(tenants: list[tuple[str, str]], shares: dict[str, str], log_level: str) -> None:
    unknown = [name for name in shares if name not in dict(tenants)]
    if unknown:
        raise ValueError(f"--tenant-memory names {unknown[0]!r}, which no --api-key names; give its key, too")
    if log_level not in _LOG_LEVELS:
        raise ValueError(f"--log-level is {log_level!r}; give {', '.join(_LOG_LEVELS)}")


def _template_kwargs(text: str) -> dict[str, Any]:
    try:
        found = jsonlib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--chat-template-kwargs is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("--chat-template-kwargs must be a JSON object")
    return found
