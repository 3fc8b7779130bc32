"""A stand-in accelerator: tensors that say "standin:0", hold main memory, and count what a GPU would have to do.

What is wrong on a GPU and right on a CPU shows here: tensors of two devices in one operation, results that the host
waits for, and operations launched one by one. What a kernel computes does not: the arithmetic is the CPU's.

A process that has called `install` keeps the device until it ends, and torch believes in an accelerator from then on.
`in_a_process_of_its_own` keeps that from other tests.
"""

import collections
import contextlib
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


NAME = "standin"
MISSING = not hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # in older torch
# Results that the host has to have before it can go on.
_READ = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
# Views and allocations: nothing is launched for them.
_FREE = {
    "view", "_unsafe_view", "slice", "select", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "chunk", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "diagonal", "reshape",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "unfold", "is_same_size",
    "_has_compatible_shallow_copy_type", "set_data", "_nested_view_from_buffer", "record_stream",
}  # fmt: skip


# -- streams ----------------------------------------------------------------------------------------------------------


class Stream:
    """Work in order. Copies on any stream but the first one happen as late as they may: when somebody waits for them.

    Attributes:
        recorded: tensors of other streams that it uses, and whose memory it has asked to be kept.
    """

    def __init__(self, device: Any = None) -> None:
        self.recorded: list[Any] = []
        self._ahead: list[Callable[[], Any]] = []
        self._done = 0

    def put(self, work: Callable[[], Any]) -> None:
        self._ahead.append(work)

    def reach(self, end: int) -> None:
        while self._done < end:
            work = self._ahead[self._done]
            self._done += 1
            work()

    def record_event(self) -> "Event":
        return Event(self, len(self._ahead))

    def wait_event(self, event: "Event") -> None:
        self.put(event.arrive)  # in order with its own work
        if self is first:
            self.reach(len(self._ahead))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Event:
    """A point in a stream's work."""

    def __init__(self, stream: Stream, end: int) -> None:
        self.stream, self._end = stream, end

    def arrive(self) -> None:
        self.stream.reach(self._end)

    def synchronize(self) -> None:
        for counter in _counting:
            counter.waits[f"an event {_place()}"] += 1
        self.arrive()


first = Stream()
_current = [first]


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module, and what users of streams do."""

    Stream, Event = Stream, Event

    def current_stream(self, device: Any = None) -> Stream:
        return _current[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        _current.append(stream)
        try:
            yield
        finally:
            _current.pop()


def _queued(target: torch.Tensor, source: torch.Tensor) -> None:
    """A copy that is still to come: until then, nobody knows what its target holds."""
    target.view(torch.uint8).fill_(255) if target.dim() else target.fill_(float("nan"))
    _current[-1].put(lambda: target.copy_(source))


# -- tensors ----------------------------------------------------------------------------------------------------------


def _leaves(value: Any) -> Iterator[Any]:
    """What is in lists, tuples and dicts; torch's own way through them costs more than most operations here."""
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        changed = [_mapped(change, inner) for inner in value]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {key: _mapped(change, inner) for key, inner in value.items()}
    return change(value)


class Counted:
    """What was asked of the device while it was counted.

    Attributes:
        waits: the places at which the host waited for the device, each with how often.
        launches: operations with a result on the device.
    """

    def __init__(self) -> None:
        self.waits: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()

    @property
    def waited(self) -> int:
        """How often the host waited."""
        return self.waits.total()

    @property
    def launched(self) -> int:
        """How many operations were launched."""
        return self.launches.total()


_counting: list[Counted] = []


@contextlib.contextmanager
def counted() -> Iterator[Counted]:
    """Count what is asked of the device in the block."""
    found = Counted()
    _counting.append(found)
    try:
        yield found
    finally:
        _counting.remove(found)


class OnDevice(torch.Tensor):
    """A tensor of the stand-in: its values are in `inner`, in main memory."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.inner = inner
        return made

    def record_stream(self, stream: Any) -> None:
        """Noted, as nothing here is given back before its time."""
        stream.recorded.append(self)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        for counter in _counting:
            counter.waits[f"tolist of {tuple(self.shape)} {_place()}"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the values, with the result where a real device would have it."""
    tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    held = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    asked = kwargs.get("device")
    there = bool(held) if asked is None else torch.device(asked).type == NAME
    name = func.overloadpacket.__name__
    plain = name.rstrip("_") or name
    _count(plain, args, kwargs, tensors, there)
    moves = plain in ("_to_copy", "copy", "record_stream")
    plain_ones = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
    mixed = [tensor for tensor in plain_ones if plain != "index" or tensor is args[0]]
    if held and mixed and not moves:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {NAME} and cpu")
    given, options = _mapped(_inner, (args, kwargs))
    if asked is not None:
        options = {**options, "device": torch.device("cpu")}
    options.pop("pin_memory", None)
    if plain == "copy" and len(held) < len(tensors) and _current[-1] is not first:
        _queued(*given[:2])
        return args[0]
    wrappers = {id(tensor.inner): tensor for tensor in held}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice) or not there:
            return value
        return wrappers.get(id(value)) if id(value) in wrappers else OnDevice(value)

    return _mapped(placed, _computed(func, given, options))


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def _computed(func: Any, given: Any, options: dict[str, Any]) -> Any:
    if func.overloadpacket.__name__ == "histc" and not given[0].is_floating_point():  # a GPU counts integers as well
        return func(given[0].float(), *given[1:], **options).to(given[0].dtype)
    return func(*given, **options)


def _count(name: str, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], there: bool) -> None:
    if not _counting:
        return
    held = [isinstance(tensor, OnDevice) for tensor in tensors]
    crosses = (name == "_to_copy" and held[0] != there) or (name == "copy" and len(held) == 2 and held[0] != held[1])
    queued = bool(kwargs.get("non_blocking") or (name == "copy" and len(args) > 2 and args[2]))
    by_mask = name == "index" and any(
        isinstance(leaf, torch.Tensor) and (leaf.dtype == torch.bool or not isinstance(leaf, OnDevice))
        for leaf in _leaves(args[1])
    )
    waits = (crosses and not queued) or (any(held) and (name in _READ or by_mask))
    for counter in _counting:
        if waits:
            counter.waits[f"{name} of {tuple(tensors[0].shape)} {_place()}"] += 1
        if (there or any(held)) and name not in _FREE:
            counter.launches[name] += 1


def _place() -> str:
    """Who asked: the innermost line of this package, or else of transformers."""
    theirs = ""
    for frame in reversed(traceback.extract_stack()):
        if "/hf_sparse_cache/" in frame.filename:
            return f"in {frame.filename.rpartition('/hf_sparse_cache/')[2]}:{frame.lineno}"
        if "/transformers/" in frame.filename and not theirs:
            theirs = f"in transformers/{frame.filename.rpartition('/transformers/')[2]}:{frame.lineno}"
    return theirs


class Here(TorchDispatchMode):
    """What makes tensors on the device where none is given: factories, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def install() -> None:
    """Make the device known to torch, for as long as this process lives."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _making(getattr(torch, name)))


def _making(own: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.tensor` and its like copy below the dispatcher, where no mode sees it."""

    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != NAME:
            return own(data, *args, **({} if device is None else {"device": device}), **kwargs)
        if isinstance(data, OnDevice):
            return own(data, *args, **kwargs)
        with _disable_current_modes():
            made = own(data, *args, **kwargs)
        for counter in _counting:
            if made.numel():
                counter.waits[f"torch.tensor {_place()}"] += 1
        return OnDevice(made)

    return make


def move(model: torch.nn.Module) -> Any:
    """Put a model's weights on the device, in place."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(OnDevice(weight.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model


def on_device(value: torch.Tensor) -> torch.Tensor:
    """A copy on the device, which nobody waits for."""
    return OnDevice(value.clone())


def on_host(value: Any) -> Any:
    """The same values in main memory, for comparisons."""
    return _mapped(_inner, value)


def in_a_process_of_its_own(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns in a forked process in which the device is installed.

    Raises:
        AssertionError: it raised; the message holds the traceback.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_forked, args=(send, work, args))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of threads of the test runner, which the child does not use
        child.start()
    send.close()
    try:
        done, result = receive.recv()
    except EOFError:
        done, result = False, "it ended without an answer"
    child.join()
    assert done, result
    return result


def _forked(send: Any, work: Callable[..., Any], args: Any) -> None:
    try:
        install()
        with Here():
            send.send((True, work(*args)))
    except BaseException:
        send.send((False, traceback.format_exc()))
