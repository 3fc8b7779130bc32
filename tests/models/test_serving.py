"""What a server does around a prefill, step by step: looks, counts, warns, finds equal rows, joins them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache, forks
from hf_sparse_cache.models import server as serving
from hf_sparse_cache.models.inputs import Prompts
from hf_sparse_cache.models.live import LiveCache
from hf_sparse_cache.models.rows import Filled
from hf_sparse_cache.models.server import Server
from hf_sparse_cache.models.sitting import Served
from hf_sparse_cache.models.watch import ChangedPrefillError
from hf_sparse_cache.planning.policies import Junction, NoCheckpoints
from hf_sparse_cache.stats import PATIENCE, Cause, Reason, Recorder, RequestInfo


def told_of(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if what in record.getMessage()]


class Model:
    """What a server asks of a model that is no network."""

    training, device = False, torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type="llama"))

    def __init__(self, vocabulary: int = 50) -> None:
        self._embeddings = SimpleNamespace(num_embeddings=vocabulary)

    def get_input_embeddings(self) -> Any:
        return self._embeddings

    def forward(self, input_ids: Any, logits_to_keep: int = 0) -> None: ...

    def modules(self) -> list[Any]:
        return []


def lived(length: int = 0) -> Any:
    made = SimpleNamespace(length=length, found=None, turn="of before", began_anew=[])
    made.start_anew = made.began_anew.append
    return made


def plain_server(**binding: Any) -> Any:
    """A server of no model, without a store."""
    made = Server.__new__(Server)
    rule = SimpleNamespace(rule=SimpleNamespace(cut_after=None))
    config = SimpleNamespace(namespace="", exactness="replayable")
    standing = {"model": Model(), "segmenting": rule, "config": config, "live_cache": lived}
    made.binding = SimpleNamespace(
        **{**standing, "output": lambda logits, live: SimpleNamespace(logits=logits, live=live), **binding}
    )
    made.recorder, made.policy, made._told_of_orphans, made.on_prefill = Recorder(), Junction(), False, None
    made.means = SimpleNamespace(binding=made.binding)
    return made


def info(cause: Cause = Cause.NOTHING_STORED, resumed: int = 0, **values: Any) -> RequestInfo:
    return RequestInfo(9, resumed_tokens=resumed, computed_tokens=9 - resumed, reason=Reason(cause, **values))


# -- a look before ----------------------------------------------------------------------------------------------------


def found_as(**what: Any) -> Any:
    return SimpleNamespace(**{"length_limit": 0, "by_call": "", **what})


ROPE = "the frequencies of this model's RoPE depend on the length of a prompt,"


@pytest.mark.parametrize(
    ("found", "known", "why"),
    [
        (found_as(), "", ""),
        (found_as(), "unsound", "unsound"),
        (found_as(), None, "proved now"),
        (found_as(length_limit=8), "", ""),
        (found_as(length_limit=7), "", f"{ROPE} from 7 tokens on"),
        (found_as(length_limit=6), "", f"{ROPE} from 6 tokens on"),
        (found_as(by_call="a switch of this call"), "unsound", "a switch of this call"),
        (found_as(by_call="a switch of this call", length_limit=7), "", ROPE),
    ],
)
def test_why_a_prompt_of_seven_tokens_cannot_be_served(
    found: Any, known: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the model is; a proof may have changed what is known of it, so that it is looked at once more."""
    server, names, asked = plain_server(), iter((found, "name of after")), []
    monkeypatch.setattr(serving, "identity", lambda model: next(names))
    server.proof = SimpleNamespace(known=lambda name: asked.append(name) or known, shortcoming=lambda: "proved now")
    said, name = server.look(7)
    assert said.startswith(why) and bool(said) is bool(why)
    assert name == ("name of after" if known is None else found)
    assert asked == ([] if found.by_call or 0 < found.length_limit <= 7 else [found])


# -- counting ---------------------------------------------------------------------------------------------------------


def test_what_runs_uncached_is_counted_told_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(serving.logger, "warning_once", said.append)
    server = plain_server()
    with server.recorder.block() as block:
        server.uncached((3, 5), "it cannot be")
        assert [(one.prompt_tokens, one.computed_tokens, str(one.reason)) for one in block] == [
            (3, 3, "call not supported: it cannot be"),
            (5, 5, "call not supported: it cannot be"),
        ]
        server.uncached((), "nothing is known")
    assert (block[2].prompt_tokens, block[2].computed_tokens) == (0, 0) and len(block) == 3
    assert server.recorder.recent == block and server.recorder._calls == 2
    assert said[0] == "SparsePrefixCache is not used by this call, which runs uncached: it cannot be."


def test_rows_of_a_call_are_counted_once_and_told_in_their_order() -> None:
    server = plain_server()
    one, two = info(), info(Cause.RESUMED, 4)
    served = [Served("out", one, {"prefill_seconds": 2.0}), Served("out", two, {"plan_seconds": 1.0}), Served("out")]
    with server.recorder.block() as block:
        server.count(served, [1, 0, 2, 1])
    assert [id(entry) for entry in block] == [id(two), id(one), id(two)]  # of one that is not counted nothing is told
    totals = server.recorder.totals()
    assert (totals.requests, totals.prefill_seconds, totals.plan_seconds, totals.resumed_tokens) == (2, 2.0, 1.0, 4)
    assert server.recorder._calls == 1


def test_checkpoints_that_were_made_with_other_settings_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    server, what = plain_server(), "made with another grid, cut_after, marks or exactness than this handle's settings"
    server._note(info())
    assert not told_of(caplog, what)
    for _ in range(3):
        server._note(info(Cause.CUT_OTHERWISE, tokens=5))
    (said,) = told_of(caplog, what)
    assert not said.endswith(". ") and server.recorder.totals().requests == 4


@pytest.mark.parametrize(("ends", "told"), [(None, 0), (True, 0), (False, 1)])
def test_strings_that_no_token_ends_with_are_told_of_at_one_request(
    ends: bool | None, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = plain_server()
    found = None if ends is None else SimpleNamespace(found=ends, strings=("###",))
    server.binding.segmenting.rule.cut_after = found
    for count in range(1, 2 * PATIENCE):
        server._note(info(Cause.RESUMED, 4))
        assert len(told_of(caplog, f"None of {PATIENCE} prompts has a token that ends with")) == told * (
            count >= PATIENCE
        )
    assert not told or "cut_after=('###',)" in told_of(caplog, "None of")[0]


@pytest.mark.parametrize("rows", [1, 2])
def test_calls_that_never_resume_are_told_of_at_one_call(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    server = plain_server()
    server.binding.config.namespace = "tenant"
    for calls in range(1, PATIENCE + 3):
        server.count([Served("out", info(Cause.NOTHING_STORED))] * rows, range(rows))
        said = told_of(caplog, "nothing was resumed")
        assert len(said) == (calls >= PATIENCE)
    in_calls = "" if rows == 1 else f" in {PATIENCE} calls"
    last = "" if rows == 1 else "the last "
    assert said[0].startswith(
        f"{PATIENCE * rows} requests{in_calls} and nothing was resumed. Most frequent reason ({PATIENCE} of "
        f"{last}{PATIENCE}): nothing stored. "
    )
    assert "'tenant'" in said[0]


def test_a_policy_that_stores_nothing_and_calls_that_resume_are_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    silent, hit = plain_server(), plain_server()
    silent.policy = NoCheckpoints()
    hit.count([Served("out", info(Cause.RESUMED, 3))], [0])
    for _ in range(PATIENCE + 1):
        silent.count([Served("out", info())], [0])
        hit.count([Served("out", info())], [0])
    assert not told_of(caplog, "nothing was resumed")


# -- a call -----------------------------------------------------------------------------------------------------------


def asked(rows: list[list[int]], **kwargs: Any) -> Prompts:
    """A batch, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Prompts.of(ids, {"attention_mask": mask, **kwargs})


class Kitchen:
    """Stands in for what serves the different prompts of a call, and notes what it is given."""

    def __init__(self, server: Any, monkeypatch: pytest.MonkeyPatch, turn: Any = "a turn") -> None:
        self.prompts: list[list[int]] = []
        self.rows: list[Any] = []
        self.counted: list[Any] = []
        self.joined: list[Any] = []
        self.turn = turn
        monkeypatch.setattr(server, "_serve", self.serve)
        monkeypatch.setattr(server, "count", lambda served, order: self.counted.append((len(served), list(order))))
        monkeypatch.setattr(server, "_joined", lambda *args: self.joined.append(args) or "joined")

    def serve(self, prompts: list[Any], live: Any) -> Any:
        self.rows, self.live, self.found = prompts, live, live.found
        self.prompts = [row.ids.tolist() for row in prompts]
        self.filled = [Filled(lived(index), "output", (index,)) for index in range(len(prompts))]
        return self.filled, [
            SimpleNamespace(output=f"output {index}", turn=lambda live: self.turn) for index in range(len(prompts))
        ]


def test_equal_rows_of_a_call_are_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    server, live = plain_server(), lived()
    kitchen = Kitchen(server, monkeypatch)
    live.found = "name"
    batch = asked([[5, 6, 7], [8, 9], [5, 6, 7], [9]], position_ids=None)
    kwargs = {"use_cache": True, "attention_mask": 1, "logits_to_keep": 1, "other": 2}
    assert server.serve(live, batch, kwargs, given=4) == "joined"
    assert kitchen.prompts == [[5, 6, 7], [8, 9], [9]] and kitchen.found == "name" and kitchen.live is not live
    assert all(row.kwargs == {"use_cache": True, "logits_to_keep": 1} for row in kitchen.rows)
    assert [row.read.tolist() for row in kitchen.rows] == kitchen.prompts
    assert all(row.position_dims == () and row.tail == 1 for row in kitchen.rows)
    assert kitchen.counted == [(3, [0, 1, 0, 2])]
    assert kitchen.joined == [(live, kitchen.filled, [0, 1, 0, 2], 3)]


@pytest.mark.parametrize(("given", "told"), [(0, [0, 1]), (1, [0]), (2, [0, 1]), (4, [0, 0, 1, 1]), (9, [0, 0, 1, 1])])
def test_of_samples_of_one_prompt_one_is_told(given: int, told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    server = plain_server()
    kitchen = Kitchen(server, monkeypatch)
    server.serve(lived(), asked([[5, 6], [5, 6], [7, 8], [7, 8]]), {}, given=given)
    assert kitchen.counted == [(2, told)]


@pytest.mark.parametrize("mode", ["replayable", "bitwise"])
def test_one_prompt_alone_is_served_in_the_calls_own_cache(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, live, seen = plain_server(), lived(), []
    server.binding.config.exactness = mode
    server.on_prefill = seen.append
    kitchen = Kitchen(server, monkeypatch)
    positions = torch.arange(3).expand(3, 1, 3)
    assert server.serve(live, asked([[5, 6, 7]], position_ids=positions), {}) == "output 0"
    assert kitchen.live is live and kitchen.rows[0].position_dims == (3,) and not kitchen.joined
    assert live.turn == ("a turn" if mode == "replayable" else None) and seen == [kitchen.filled[-1].live]


def test_one_prompt_that_is_padded_or_asked_for_twice_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    server, live = plain_server(), lived()
    kitchen = Kitchen(server, monkeypatch)
    ids, mask = torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]])
    assert server.serve(live, Prompts.of(ids, {"attention_mask": mask}), {}) == "joined"
    assert kitchen.prompts == [[5, 6]] and kitchen.live is not live and live.turn == "of before"
    assert server.serve(live, asked([[5, 6], [5, 6]]), {}) == "joined"
    assert kitchen.joined[-1][2:] == ([0, 0], 2) and kitchen.live is not live


def test_what_looks_at_states_is_given_the_cache_that_was_filled_last(monkeypatch: pytest.MonkeyPatch) -> None:
    server, seen = plain_server(), []
    kitchen, server.on_prefill = Kitchen(server, monkeypatch), seen.append
    server.serve(lived(), asked([[5, 6], [7, 8]]), {})
    assert seen == [kitchen.filled[1].live]


def test_ids_without_an_embedding_are_refused_before_anything_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    server = plain_server()
    kitchen = Kitchen(server, monkeypatch)
    with pytest.raises(ValueError, match="input_ids contains 50, outside the model's vocabulary 0..49"):
        server.serve(lived(), asked([[5, 50]]), {})
    assert not kitchen.rows and not kitchen.counted


def test_memory_that_runs_out_while_rows_are_joined_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    server, live, tries = plain_server(), lived(), []
    server.means.store = SimpleNamespace(give_back=lambda: 0)
    Kitchen(server, monkeypatch)

    def joined(*_: Any) -> str:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "joined"

    monkeypatch.setattr(server, "_joined", joined)
    assert server.serve(live, asked([[5, 6], [7]]), {}) == "joined" and len(tries) == 2 and len(live.began_anew) == 1


def test_a_row_is_served_alone_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    server, given = plain_server(), []
    monkeypatch.setattr(serving, "serve_alone", lambda *args: given.append(args) or "served")
    assert server.serve_row("live", "row") == "served"
    ((means, live, asked_),) = given
    assert means is server.means and (live, asked_.row, asked_.way) == ("live", "row", None)


def test_one_prompt_is_served_alone_and_several_together(monkeypatch: pytest.MonkeyPatch) -> None:
    server, live, made = plain_server(), lived(), []
    live.found = "name"
    monkeypatch.setattr(server, "serve_row", lambda given, row: SimpleNamespace(output=(given, row)))
    filled, served = server._serve(["only"], live)
    assert filled == [Filled(live, (live, "only"), (0,))] and served[0].output == (live, "only")

    class Together:
        def __init__(self, means: Any, prompts: list[Any], found: Any) -> None:
            made.append((means, [asked.row for asked in prompts], found))
            self.served: dict[int, str] = {}
            self.filled = ["filled"]

        def serve(self) -> None:
            self.served = {1: "b", 0: "a"}

    monkeypatch.setattr(serving, "Rows", Together)
    assert server._serve(["one", "two"], live) == (["filled"], ["a", "b"])
    assert made == [(server.means, ["one", "two"], "name")]


@pytest.mark.parametrize(
    ("prompts", "order", "width", "places"),
    [
        ([(0, 1)], [0, 1], 7, None),  # just as it is
        ([(1, 0)], [1, 0], 7, None),
        ([(0, 1)], [1, 0], 7, [1, 0]),
        ([(0, 1)], [0, 1, 1], 7, [0, 1, 1]),
        ([(0, 1)], [0, 0], 7, [0, 0]),
        ([(0, 1)], [0, 1], 8, [0, 1]),  # further padded
        ([(2,), (0, 1)], [0, 1, 2, 0], 7, [1, 2, 0, 1]),
        ([(0,), (1,)], [0, 1], 7, [0, 1]),
    ],
)
def test_rows_find_their_places_among_what_was_filled(
    prompts: list[Any], order: list[int], width: int, places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, live, joins = plain_server(), lived(), []
    monkeypatch.setattr(serving.prefill, "join_rows", lambda *args: joins.append(args) or "joined")
    logits = torch.arange(12.0).reshape(2, 3, 2)
    filled = [Filled(lived(7), SimpleNamespace(logits=logits), each) for each in prompts]
    found = server._joined(live, filled, order, width)
    if places is None:
        assert torch.equal(found.logits, logits[:, -1:]) and found.live is live and not joins
        assert live.began_anew == [filled[0].live]
    else:
        assert found == "joined" and not live.began_anew
        assert joins == [(server.binding, live, [(each.live, each.output) for each in filled], places, width)]


# -- a prefill by itself ----------------------------------------------------------------------------------------------


class Bare(Model):
    def forward(self, input_ids: Any) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize("model", [Model(), Bare()])
def test_a_prefill_by_itself(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, rows, looked = plain_server(model=model), [], []
    logits = torch.arange(5.0)[None, :, None]
    kitchen = Kitchen(server, monkeypatch)

    def serve_row(live: Any, row: Any) -> Any:
        rows.append((live, row, torch.is_grad_enabled()))
        return SimpleNamespace(output=SimpleNamespace(logits=logits))

    monkeypatch.setattr(server, "serve_row", serve_row)
    monkeypatch.setattr(server, "look", lambda tokens: looked.append(tokens) or ("", "name"))
    with torch.enable_grad():
        found, live = server.prefill(torch.tensor([[3, 4, 5, 6]]), 2)
    ((given, row, tracked),) = rows
    assert given is live and live.found == "name" and looked == [4] and not tracked
    assert found[0, :, 0].tolist() == [3.0, 4.0] and kitchen.counted == [(1, [0])]
    assert row.ids.tolist() == row.read.tolist() == [3, 4, 5, 6] and row.tail == 2
    assert row.kwargs == ({"use_cache": True} if isinstance(model, Bare) else {"use_cache": True, "logits_to_keep": 1})


def refuses(server: Any, how: str) -> None:
    if how == "model":
        server.binding.model.training = True
    server.look = lambda tokens: ("it is unsound" if how == "look" else "", "name")

    def serve_row(live: Any, row: Any) -> Any:
        raise ChangedPrefillError("a hook takes some out")

    server.serve_row = serve_row


@pytest.mark.parametrize(
    ("how", "why"), [("model", "training mode"), ("look", "it is unsound"), ("served", "a hook takes some out")]
)
def test_a_prefill_that_cannot_be_exact_is_refused_and_not_counted(
    how: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = plain_server()
    kitchen = Kitchen(server, monkeypatch)
    refuses(server, how)
    with pytest.raises(ValueError, match=rf"prefill cannot be exact here: .*{why}\. generate\(\) runs such a call"):
        server.prefill(torch.tensor([[3, 4, 5, 6]]), 1)
    assert not kitchen.counted


def test_an_answer_is_kept_for_this_model_and_told_here(monkeypatch: pytest.MonkeyPatch) -> None:
    server, kept = plain_server(), []
    monkeypatch.setattr(serving.answers, "keep", lambda *args: kept.append(args))
    server.answered("turn", "result")
    assert kept == [(server.binding, server.recorder, "turn", "result")]


# -- after a fork -----------------------------------------------------------------------------------------------------


def test_a_child_process_counts_from_zero_with_locks_that_nobody_holds(
    jamba: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with SparsePrefixCache(jamba, policy="junction", prove=False) as cache:
        server = cache.server
        assert server in forks._known and server.on_prefill is None and server.means.policy is cache.policy
        assert server.live_cache().get_seq_length() == 0 and isinstance(server.live_cache(), LiveCache)
        other = Server(server.binding, cache.store, cache.policy, Recorder())
        assert other.proof._binding is server.binding and server.proof is not other.proof
        given = Server(server.binding, cache.store, cache.policy, Recorder(), server.proof)
        assert given.proof is server.proof and given in forks._known
        server.uncached((3,), "it cannot be")
        server._note(info(Cause.CUT_OTHERWISE, tokens=5))
        assert len(told_of(caplog, "made with another grid")) == 1
        locks: list[Callable[[], Any]] = [
            lambda: server.policy.lock, lambda: server.space._lock, lambda: server.recorder._lock,
        ]  # fmt: skip
        held = [lock() for lock in locks]
        for lock in held:
            lock.acquire()
        try:
            server.after_fork()
            for lock, before in zip(locks, held, strict=True):
                assert lock() is not before and lock().acquire(blocking=False)
                lock().release()
        finally:
            for lock in held:
                lock.release()
        assert cache.stats().requests == 0 and cache.last_request is None
