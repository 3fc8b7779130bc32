"""Keys and values that are still proved while the forward begins: nothing reads them before, whatever is wrong.

A layer in front of the first attention needs no keys and values, so that it runs while threads prove them. Where these
are not what was written, the forward stops there, and the prompt begins anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shared_worker
import torch
from persisting import cold_logits, handle, logits, question

from hf_sparse_cache import CheckpointStore
from hf_sparse_cache.errors import UnprovedError
from hf_sparse_cache.models import prefill, sitting
from hf_sparse_cache.models.lazy_kv import Waiting
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.request import Request
from hf_sparse_cache.store import ahead, files, planes, shared


Filled = Callable[[str], Path]


@pytest.fixture(scope="module")
def model() -> Any:
    return shared_worker.model("Zamba2")


@pytest.fixture
def filled(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> Filled:
    """A shared store in which somebody left what he read for a question, in one mode."""
    monkeypatch.setattr(shared, "LOOK_SECONDS", 60.0)
    monkeypatch.setattr(shared, "READ_SECONDS", 60.0)

    def fill(mode: str) -> Path:
        store = CheckpointStore(shared=tmp_path)
        with handle(model, store=store, exactness=mode) as cache:
            logits(model, question(1), cache)
        store.close()
        return tmp_path

    return fill


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What became of each forward. A proof of keys and values waits for the next one to begin, if any does."""
    ended: list[str] = []
    begun = threading.Event()
    forward, prove = prefill._forward, files.prove

    def proving(path: Path, *rest: Any) -> None:
        if path.name.startswith("kv-"):
            begun.clear()
            begun.wait(1)
        prove(path, *rest)

    def told(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        try:
            output = forward(*args, **kwargs)
        except UnprovedError:
            ended.append("unproved")
            raise
        ended.append("whole")
        return output

    monkeypatch.setattr(ahead.files, "prove", proving)
    monkeypatch.setattr(prefill, "_forward", told)
    yield ended


def order(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, proved_behind: str) -> list[str]:
    """What happens in which order to a question; the proof of keys and values waits for one of the others."""
    events: list[str] = []
    happened = {name: threading.Event() for name in ("a layer", "a read")}

    def tell(name: str) -> None:
        events.append(name)
        happened.get(name, threading.Event()).set()

    prove, update, conv = files.prove, Waiting.update, LiveCache.update_conv_state

    def proving(path: Path, *rest: Any) -> None:
        if path.name.startswith("kv-"):
            assert happened[proved_behind].wait(20)
        prove(path, *rest)
        if path.name.startswith("kv-"):
            tell("a proof")

    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(self, *args, **kwargs)
        tell("a read")
        return found

    def running(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = conv(self, *args, **kwargs)
        tell("a layer")
        return found

    monkeypatch.setattr(ahead.files, "prove", proving)
    monkeypatch.setattr(Waiting, "update", reading)
    monkeypatch.setattr(LiveCache, "update_conv_state", running)
    store = CheckpointStore(shared=folder)
    with handle(model, store=store) as cache:
        answer = logits(model, question(2), cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
    store.close(flush=False)
    monkeypatch.undo()
    assert torch.equal(answer, cold_logits(model, question(2)))
    return events


def test_layers_run_while_keys_and_values_are_proved_and_none_is_read_before(
    filled: Filled, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = order(model, filled("bitwise"), monkeypatch, "a layer")
    assert events.index("a layer") < events.index("a proof"), events
    last = len(events) - 1 - events[::-1].index("a proof")
    assert last < events.index("a read"), events


def test_the_twin_without_a_pledge_reads_them_before(
    filled: Filled, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = filled("bitwise")
    monkeypatch.setattr(LayerTensors, "pledged", lambda self, pledge: self)
    events = order(model, folder, monkeypatch, "a read")
    assert events.index("a read") < events.index("a proof"), events


def spoil(folder: Path, ids: torch.Tensor) -> int:
    """Changes one number of the last layer in the keys and values of a text; returns of how many files."""
    names = set()
    for path in folder.rglob("*-state-*.safetensors"):
        record, tokens = files.peek(path)
        if tokens.tolist() == ids[0, : len(tokens)].tolist():
            names |= {name for *_, name in record["kv"]}
    for name in names:
        (path,) = (found for found in folder.rglob(name) if "quarantine" not in found.parts)
        data = bytearray(planes.unpacked(path.read_bytes()))  # as a file that can be read
        data[-2] ^= 0x20
        path.write_bytes(data)
    return len(names)


def test_the_twin_without_proof_is_served_what_is_wrong(
    filled: Filled, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte is one that matters: it can be unpacked, and what is computed of it is wrong."""
    folder = filled("bitwise")
    assert spoil(folder, question(2))
    monkeypatch.setattr(ahead.files, "prove", lambda path, data, seal, *checksum: None)
    store = CheckpointStore(shared=folder)
    with handle(model, store=store) as cache:
        answer = logits(model, question(2), cache)
        assert cache.last_request is not None and cache.last_request.resumed_tokens > 0
    store.close(flush=False)
    assert not torch.equal(answer, cold_logits(model, question(2)))


@pytest.mark.parametrize("seeds", [(2,), (1,), (2, 3), (1, 2, 3)], ids=["one", "the same", "two", "three"])
@pytest.mark.parametrize("mode", ["bitwise", "replayable"])
def test_a_changed_byte_of_a_late_layer_is_noticed_in_the_forward_and_the_answer_is_right(
    filled: Filled, model: Any, forwards: list[str], mode: str, seeds: tuple[int, ...]
) -> None:
    folder = filled(mode)
    ids = torch.cat([question(seed) for seed in seeds])
    assert spoil(folder, ids)
    store = CheckpointStore(shared=folder)
    with handle(model, store=store, exactness=mode) as cache:
        answer = logits(model, ids, cache)
        assert cache.last_request is not None
        assert forwards.count("unproved") == 1, "it is about what is noticed late, and once"
        if mode == "bitwise":
            assert torch.equal(answer, cold_logits(model, ids))
        elif len(seeds) == 1:
            replayed = shared_worker.replayed(cache, ids, cache.last_request.segments)
            assert torch.equal(answer[0], replayed)
        counts = cache.stats().shared
        assert any("put aside" in what and "checksum" in what for what in counts), counts
        assert "resumed from" not in counts
        store.verify()
        assert len(store) > 0, "what was computed in its place is kept"
        torch.testing.assert_close(answer, cold_logits(model, ids), atol=1e-3, rtol=1e-3)
        again = logits(model, ids, cache)
        assert cache.last_request.resumed_tokens > 0
        assert torch.equal(again, answer) or (mode == "replayable" and len(seeds) > 1), "rows of one forward"
    store.close(flush=False)


def test_a_changed_byte_below_an_end_that_was_kept_is_noticed_without_a_forward(
    model: Any, forwards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed there, and whoever decodes on it reads it: it is waited for before."""
    ids = question(1)
    store = CheckpointStore(shared=tmp_path)
    with handle(model, store=store) as cache:
        cache.mark(ids[0])
        logits(model, ids, cache)
    store.close()
    for spoils in (False, True):
        assert not spoils or spoil(tmp_path, ids)
        store = CheckpointStore(shared=tmp_path)
        with handle(model, store=store) as cache:
            cache.mark(ids[0])
            answer = logits(model, ids, cache)
            assert torch.equal(answer, cold_logits(model, ids)) and "unproved" not in forwards
            assert cache.last_request is not None
            assert cache.last_request.resumed_tokens == (0 if spoils else ids.shape[1])
            assert any("put aside" in what for what in cache.stats().shared) is spoils
            store.verify()
        store.close(flush=False)


def test_whoever_was_once_given_what_is_wrong_waits_for_the_proof(
    filled: Filled, model: Any, forwards: list[str]
) -> None:
    folder = filled("bitwise")
    assert spoil(folder, question(2))
    store = CheckpointStore(shared=folder)
    with handle(model, store=store) as cache:
        logits(model, question(2), cache)
        assert forwards.count("unproved") == 1
        store.flush()
        cache.clear()
        assert spoil(folder, question(2))
        assert torch.equal(logits(model, question(2), cache), cold_logits(model, question(2)))
        assert forwards.count("unproved") == 1
        assert sum(count for what, count in cache.stats().shared.items() if "put aside" in what) >= 2
    store.close(flush=False)


@pytest.mark.parametrize(("times", "resumes"), [(1, True), (2, False), (5, False)])
def test_what_is_broken_twice_is_computed_from_nothing(
    model: Any, times: int, resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks it; once is bad luck, and what else there is serves."""
    own, left = sitting._serve_alone, iter([True] * times)

    def broken(means: Any, live: Any, asked: Any, resumes: bool = True) -> Any:
        if resumes and next(left, False):
            raise UnprovedError("it does not match its checksum")
        return own(means, live, asked, resumes=resumes)

    with handle(model) as cache:
        logits(model, question(1), cache)
        monkeypatch.setattr(sitting, "_serve_alone", broken)
        assert torch.equal(logits(model, question(2), cache), cold_logits(model, question(2)))
        assert cache.last_request is not None and (cache.last_request.resumed_tokens > 0) is resumes
        cache.store.verify()


def test_keys_and_values_that_are_rounded_are_proved_before_they_are_read(
    filled: Filled, model: Any, forwards: list[str], tmp_path: Path
) -> None:
    """What is to be widened is read at once: nothing is computed of what is not proved, not even that."""
    store = CheckpointStore(shared=tmp_path / "rounded")
    options = {"exactness": "replayable", "storage": "int8"}
    with handle(model, store=store, **options) as cache:
        logits(model, question(1), cache)
    store.close()
    assert spoil(tmp_path / "rounded", question(2))
    store = CheckpointStore(shared=tmp_path / "rounded")
    with handle(model, store=store, **options) as cache:
        answer = logits(model, question(2), cache)
        assert cache.last_request is not None and "unproved" not in forwards
        again = shared_worker.replayed(cache, question(2), cache.last_request.segments)
        assert torch.equal(answer[0], again)
        assert any("put aside" in what for what in cache.stats().shared)
    store.close(flush=False)


def test_payloads_that_are_not_what_was_written_are_neither_moved_nor_written() -> None:
    def broken() -> None:
        raise UnprovedError("it does not match its checksum")

    payload = LayerTensors(({"keys": torch.zeros(1, 2, 3, 4)},))
    assert payload.to_bytes("{}", torch.zeros(0, dtype=torch.int32).numpy()) and payload.reached() is payload
    pledged = payload.pledged(broken)
    assert pledged.layers is payload.layers and pledged == payload
    for use in (
        lambda: pledged.to_bytes("{}", torch.zeros(0, dtype=torch.int32).numpy()),
        lambda: pledged.moved_to("meta"),
        pledged.reached,
    ):
        with pytest.raises(UnprovedError):
            use()


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("mode", ["bitwise", "replayable"])
def test_what_is_lost_between_the_look_and_the_copy(
    model: Any, mode: str, twin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread finds a file of no use, and memory loses all that needs it, also what a request has just found.

    The request has what it found then. The twin asks the checkpoint again: a state without its keys and values.
    """
    own = prefill.resume_live

    def losing(binding: Any, live: LiveCache, request: Request) -> float:
        for item in cache.store.stored():
            for segment in item.chain():
                cache.store.ledger.lose(segment.payload)
        assert request.checkpoint is not None and not cache.store.stored()
        return own(binding, live, request)

    with handle(model, exactness=mode) as cache:
        logits(model, question(1), cache)
        if twin:
            monkeypatch.setattr(Request, "_chain", lambda self: self.checkpoint.chain())
        with monkeypatch.context() as patch:
            patch.setattr(prefill, "resume_live", losing)
            got = logits(model, question(2), cache)
        assert cache.last_request is not None
        if twin:
            assert "holds keys of" in cache.last_request.reason
            return
        assert cache.last_request.resumed_tokens > 0
        if mode == "bitwise":
            assert torch.equal(got, cold_logits(model, question(2)))
        else:
            again = shared_worker.replayed(cache, question(2), cache.last_request.segments)
            assert torch.equal(got[0], again)
        cache.store.verify()
