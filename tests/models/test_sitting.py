"""One prompt while it is served, and several that are served together: each step by itself, without a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse_cache.errors import UnprovedError
from hf_sparse_cache.models import rows as together
from hf_sparse_cache.models import sitting
from hf_sparse_cache.models.inputs import Row
from hf_sparse_cache.models.prefill import Timing
from hf_sparse_cache.models.rows import Filled, Rows
from hf_sparse_cache.models.sitting import Asked, Served, Sitting, Way
from hf_sparse_cache.models.watch import ModelChangedError
from hf_sparse_cache.planning.batch import Member, padded_groups
from hf_sparse_cache.planning.cuts import CutRule
from hf_sparse_cache.planning.policies import MIN_GAIN_TOKENS, Junction, NoCheckpoints
from hf_sparse_cache.planning.policy import Limited
from hf_sparse_cache.planning.segments import Replayable
from hf_sparse_cache.stats import Cause, Reason, RequestInfo


MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Ticks:
    """A clock that is one second later, then two, then four, whenever it is asked."""

    def __init__(self) -> None:
        self._asked = 0

    def perf_counter(self) -> float:
        self._asked += 1
        return float(2**self._asked - 2)


class Opened:
    """A request that notes what is done with it."""

    def __init__(self, resumed: int = 0, prompt: int = 9, **others: Any) -> None:
        self.done: list[Any] = []
        self.promise: Any = "none yet"
        self.handovers, self.match_seconds, self.plan_seconds, self.read = {3: "three"}, 100.0, 1000.0, "read"
        self.resumed_tokens, self.prompt_tokens, self.overlap_tokens = resumed, prompt, resumed
        self.planned, self.announced, self.checkpoint = [], False, None
        self.__dict__.update(others)

    def __enter__(self) -> Opened:
        self.done.append("opened")
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.append("closed")

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("hold_for", "take_over", "start_over", "abandon", "run_with"):
            raise AttributeError(name)
        return lambda *args: self.done.append((name, *args))

    def info(self, reason: Reason | None) -> RequestInfo:
        return RequestInfo(
            self.prompt_tokens, resumed_tokens=self.resumed_tokens, reason=reason or Reason(Cause.RESUMED)
        )


class Promised:
    """What other threads compute: notes what is asked of it."""

    def __init__(self) -> None:
        self.given_to: list[Any] = []
        self.waited: list[Any] = []

    @contextmanager
    def given(self, *args: Any) -> Iterator[str]:
        self.given_to.append(args)
        yield "a promise"

    def wait(self, *args: Any) -> None:
        self.waited.append(args)


SEGMENTING = Replayable(CutRule(64), step=16, price=7.0)


def means(changed: bool = False, policy: Any = None, max_checkpoints: int | None = None) -> Any:
    store = SimpleNamespace(promises=Promised(), foretold=[], give_back=lambda: 0)
    store.foretell = lambda *args: store.foretold.append(args) or "member"
    looked: list[Any] = []

    def now(**how: Any) -> tuple[str, bool]:
        looked.append(how)
        return "space", changed

    binding = SimpleNamespace(
        model="model",
        segmenting=SEGMENTING,
        prefill_cost="cost",
        config=SimpleNamespace(max_checkpoints=max_checkpoints),
        live_cache=lambda: "fresh",
    )
    return SimpleNamespace(
        binding=binding, store=store, policy=policy or Junction(), space=SimpleNamespace(now=now, looked=looked)
    )


def asked(tokens: int = 9, **others: Any) -> Asked:
    return Asked(Row(torch.arange(tokens), tail=others.pop("tail", 1)), **others)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every request was opened with, and the last of them; a test may put the next one in front."""
    seen: list[Any] = []

    def open_request(store: Any, policy: Any, tokens: Any, segmenting: Any, *, space: str) -> Any:
        request = Opened()
        seen.append((store, policy, tokens.tolist(), segmenting, space, request))
        return request

    monkeypatch.setattr(sitting, "open_request", open_request)
    return seen


FOUND: Any = "the model's name"


# -- one prompt -------------------------------------------------------------------------------------------------------


def test_a_prompt_belongs_to_the_space_of_the_model_that_was_found() -> None:
    given = means()
    Sitting(given, asked(), FOUND)
    assert given.space.looked == [{"told": True, "found": FOUND}]


def test_a_request_is_opened_as_its_prompt_is_to_be_served(opened: list[Any]) -> None:
    given = means(max_checkpoints=3)
    one = asked(5, junctions=[2, 4], tail=2)
    with Sitting(given, one, FOUND).opened("a promise", afresh=True) as request:  # type: ignore[arg-type]
        assert request.done == ["opened"] and request.promise == "a promise"
        assert not one.handovers and one.made_of == ""
    ((store, policy, tokens, segmenting, space, same),) = opened
    assert store is given.store and same is request and space == "space" and tokens == [0, 1, 2, 3, 4]
    assert isinstance(policy, Limited) and request.done == ["opened", "closed"]
    assert (segmenting.tail, segmenting.junctions, segmenting.afresh) == (2, (2, 4), True)
    assert segmenting.step == 16 and one.handovers == {3: "three"} and one.made_of == FOUND


def test_a_request_is_opened_in_a_way_of_its_own(opened: list[Any]) -> None:
    given, policy = means(max_checkpoints=3), Junction()
    way = Way(policy, Replayable(CutRule(8), step=32), 4, "holding")  # type: ignore[arg-type]
    source = Asked(Row(torch.arange(9)), handovers={6: "six"}, made_of=FOUND)  # type: ignore[dict-item]
    with Sitting(given, asked(source=source, meeting=6, way=way), FOUND).opened() as request:
        assert request.promise is None
        assert request.done == ["opened", ("hold_for", "holding"), ("take_over", "six")]
    (_, taken, _, segmenting, _, _) = opened[0]
    assert taken is policy and (segmenting.step, segmenting.tail, segmenting.afresh) == (32, 4, False)


def test_nothing_is_handed_over_by_a_prompt_that_failed(opened: list[Any]) -> None:
    one = asked()
    with pytest.raises(KeyError), Sitting(means(), one, FOUND).opened():
        raise KeyError
    assert not one.handovers and one.made_of == ""


@pytest.mark.parametrize(
    ("policy", "most", "promises"),
    [(Junction(), None, 1), (Junction(), 2, 1), (Junction(), 0, 0), (NoCheckpoints(), 2, 0)],
)
def test_a_prompt_of_which_something_is_kept_is_promised_to_others(
    policy: Any, most: int | None, promises: int, opened: list[Any]
) -> None:
    given = means(policy=policy, max_checkpoints=most)
    with Sitting(given, asked(3), FOUND).promised() as request:
        assert request.promise == ("a promise" if promises else None) and request.done == ["opened"]
    assert request.done == ["opened", "closed"] and len(given.store.promises.given_to) == promises
    if promises:
        ((tokens, space, look, terms),) = given.store.promises.given_to
        assert tokens.tolist() == [0, 1, 2] and space == "space" and look() == "member"
        assert terms == sitting.WaitTerms(SEGMENTING, "cost")  # type: ignore[arg-type]
        ((foretold, segmenting, where),) = given.store.foretold
        assert foretold.tolist() == [0, 1, 2] and segmenting is SEGMENTING and where == "space"


def test_a_prompt_waits_for_what_others_compute_of_it() -> None:
    given = means()
    Sitting(given, asked(), FOUND).wait()
    ((space, look, terms),) = given.store.promises.waited
    assert space == "space" and look() == "member" and terms.segmenting is SEGMENTING


@pytest.mark.parametrize("alike", [True, False])
def test_a_prompt_knows_whether_its_model_is_the_same(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    monkeypatch.setattr(sitting, "unchanged", lambda *args: compared.append(args) or alike)
    one = Sitting(means(), asked(), FOUND)
    if alike:
        one.check()
    else:
        with pytest.raises(ModelChangedError, match="the model changed while the prompt was computed"):
            one.check()
    assert compared == [("model", FOUND)]


def test_a_prompt_runs_with_its_request_and_its_check(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(sitting.prefill, "prefill_row", lambda *args: ran.append(args) or "ran")
    given, one = means(), asked()
    served = Sitting(given, one, FOUND)
    with served.opened() as request:
        assert served.run("live") == "ran"  # type: ignore[arg-type]
    assert ran == [(given.binding, "live", one.row, request, served.check)]


@pytest.mark.parametrize(
    ("error", "asks"), [(KeyError(), False), (KeyboardInterrupt(), True), (SystemExit(), True), (MEMORY, False)]
)
def test_an_interrupt_leaves_nothing_pinned(error: BaseException, asks: bool, opened: list[Any]) -> None:
    one = Sitting(means(), asked(), FOUND)
    one.let_go(error)  # before there is a request
    with one.opened() as request:
        pass
    one.let_go(error)
    assert request.done[2:] == ([("abandon", error)] if asks else [])


@pytest.mark.parametrize(
    ("changed", "resumed", "cause"),
    [(False, 0, Cause.RESUMED), (True, 0, Cause.WEIGHTS_CHANGED), (True, 4, Cause.RESUMED), (False, 4, Cause.RESUMED)],
)
def test_what_happened_is_told_with_its_seconds(
    changed: bool, resumed: int, cause: Cause, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sitting, "time", Ticks())  # 0, 2, 6, 14, 30
    one = Sitting(means(changed), asked(), FOUND)
    with one.opened() as request:
        request.resumed_tokens = resumed
    told = one.told("output", Timing(0.5, 0.25))
    assert told.output == "output" and told.read == "read" and told.made_of == FOUND
    assert told.info is not None and told.info.reason.cause is cause
    assert told.seconds == {
        "prefill_seconds": 30.0,
        "match_seconds": 102.0,
        "plan_seconds": 1008.0,  # with what closing it took, which observes and remembers
        "capture_seconds": 0.5,
        "restore_seconds": 0.25,
    }


def test_a_request_that_never_closed_took_no_time_to_close(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = Sitting(means(), asked(), FOUND)
    one.request = Opened()  # type: ignore[assignment]
    assert one.told("output", Timing()).seconds["plan_seconds"] == 1000.0


# -- one prompt alone -------------------------------------------------------------------------------------------------


class Sat:
    """Stands in for a sitting: what it is opened with, and how its run ends."""

    made: list[Sat]
    fails: list[BaseException]

    def __init__(self, means: Any, asked: Any, found: Any) -> None:
        self.asked, self.given, self.done, self.request = asked, (asked, found), [], Opened()
        self.request.done = self.done
        Sat.made.append(self)

    @contextmanager
    def promised(self) -> Iterator[Any]:
        self.done.append("promised")
        yield self.request

    @contextmanager
    def opened(self, afresh: bool = False) -> Iterator[Any]:
        self.done.append(("opened", afresh))
        yield self.request

    def wait(self) -> None:
        self.done.append("waited")

    def run(self, live: Any) -> tuple[Any, Timing]:
        self.done.append("run")
        if Sat.fails:
            raise Sat.fails.pop(0)
        return "output", Timing(1.0, 2.0)

    def told(self, output: Any, timing: Timing) -> Any:
        self.done.append(("told", output, timing))
        return Served(output, made_of=self.given[1])

    def let_go(self, error: BaseException) -> None:
        self.done.append(("let go", type(error)))

    def check(self) -> None:
        self.done.append("checked")


@pytest.fixture
def sat(monkeypatch: pytest.MonkeyPatch) -> type[Sat]:
    monkeypatch.setattr(sitting, "Sitting", Sat)
    monkeypatch.setattr(together, "Sitting", Sat)
    monkeypatch.setattr(sitting, "identity", lambda model: f"{model} now")
    monkeypatch.setattr(together, "identity", lambda model: f"{model} now")
    Sat.made, Sat.fails = [], []
    return Sat


def lived(found: Any = None) -> Any:
    return SimpleNamespace(found=found, start_anew=lambda fresh: None, length=0)


WAY = Way(Junction(), SEGMENTING)


@pytest.mark.parametrize(
    ("way", "resumes", "begins"),
    [
        (None, True, ["promised"]),
        (WAY, True, [("opened", False)]),
        (None, False, [("opened", True), ("start_over",)]),
        (WAY, False, [("opened", True), ("start_over",)]),
    ],
)
def test_how_a_prompt_alone_begins(way: Any, resumes: bool, begins: list[Any], sat: type[Sat]) -> None:
    one = asked(way=way)
    served = sitting._serve_alone(means(), lived("found"), one, *([] if resumes else [False]))
    (only,) = sat.made
    assert only.done == [*begins, "run", ("told", "output", Timing(1.0, 2.0))] and only.given == (one, "found")
    assert served.output == "output"


def test_a_prompt_alone_looks_at_its_model_where_nobody_has(sat: type[Sat]) -> None:
    sitting._serve_alone(means(), lived(), asked())
    assert sat.made[0].given[1] == "model now"


def test_a_prompt_alone_that_runs_out_of_memory_starts_over(sat: type[Sat]) -> None:
    sat.fails = [MEMORY]
    sitting._serve_alone(means(), lived(), asked())
    assert sat.made[0].done[:5] == ["promised", "run", ("opened", True), ("start_over",), "run"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_prompt_alone_that_fails_is_let_go(error: type[BaseException], sat: type[Sat]) -> None:
    sat.fails = [error()]
    with pytest.raises(error):
        sitting._serve_alone(means(), lived(), asked())
    assert sat.made[0].done == ["promised", "run", ("let go", error)]


# -- several ----------------------------------------------------------------------------------------------------------


def test_rows_are_served_behind_those_that_they_take_over_from(
    sat: type[Sat], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, prompts = means(), [asked(4), asked(5), asked(6), asked(7)]
    given.store.foretell = lambda tokens, *args: given.store.foretold.append(args) or Member(tokens, np.zeros(0))
    served: list[Any] = []

    def plan_rows(rows: list[Member], segmenting: Any) -> list[Member]:
        assert segmenting is SEGMENTING and [len(row.ids) for row in rows] == [4, 5, 6, 7]
        rows[2].junctions = [2, 3]
        rows[0].source, rows[0].meeting = rows[2], 3
        rows[3].source, rows[3].meeting, rows[3].junctions = rows[2], 2, [5]
        return [rows[2], rows[3], rows[1], rows[0]]

    monkeypatch.setattr(together, "plan_rows", plan_rows)
    monkeypatch.setattr(Rows, "_alone", lambda self, *args: served.append(args))
    monkeypatch.setattr(Rows, "_leaves", lambda self, indices: served.append(indices))
    Rows(given, prompts, FOUND).serve()
    assert served == [(2, FOUND), (3, FOUND), [1, 0]]
    assert [prompt.junctions for prompt in prompts] == [[], [], [2, 3], [5]]
    assert [(prompt.source, prompt.meeting) for prompt in prompts] == [
        (prompts[2], 3), (None, 0), (None, 0), (prompts[2], 2),
    ]  # fmt: skip
    assert given.space.looked == [{"found": FOUND}] and given.store.foretold == [(SEGMENTING, "space")] * 4


def test_rows_look_at_their_model_where_nobody_has(sat: type[Sat]) -> None:
    assert Rows(means(), [])._found == "model now" and Rows(means(), [], FOUND)._found == FOUND


def test_one_of_several_by_itself_has_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given, prompts, served = means(), [asked(4), asked(5)], []
    given.binding.live_cache = lived
    monkeypatch.setattr(together, "serve_alone", lambda *args: served.append(args) or Served("output"))
    rows = Rows(given, prompts, FOUND)
    rows._alone(1, FOUND)
    rows._alone(0)
    assert [(each is given, prompt) for each, _, prompt in served] == [(True, prompts[1]), (True, prompts[0])]
    assert [live.found for _, live, _ in served] == [FOUND, None] and served[0][1] is not served[1][1]
    assert rows.served == {1: Served("output"), 0: Served("output")}
    assert rows.filled == [Filled(served[0][1], "output", (1,)), Filled(served[1][1], "output", (0,))]


@pytest.mark.parametrize(
    ("error", "again"),
    [(None, False), (MEMORY, True), (ModelChangedError("c"), True), (UnprovedError("u"), True), (KeyError("k"), None)],
)
def test_those_that_cannot_be_looked_at_together_run_each_by_itself(
    error: Exception | None, again: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, alone = Rows(means(), [], FOUND), []
    rows.filled = ["of before"]  # type: ignore[list-item]

    def fails(self: Rows, indices: list[int]) -> None:
        self.filled += ["half", "done"]  # type: ignore[list-item]
        if error is not None:
            raise error

    monkeypatch.setattr(Rows, "_together", fails)
    monkeypatch.setattr(Rows, "_alone", lambda self, *args: alone.append(args))
    if again is None:
        with pytest.raises(KeyError):
            rows._leaves([4, 2])
    else:
        rows._leaves([4, 2])
    assert alone == ([(4,), (2,)] if again else [])
    assert rows.filled == ["of before", *([] if again else ["half", "done"])]


def test_prompts_that_are_looked_at_together(sat: type[Sat], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them wait before any is opened; what runs by itself fills a cache of its own."""
    given, gathered = means(), []
    rows = Rows(given, [asked(index) for index in range(4)], FOUND)
    monkeypatch.setattr(together, "_groups", lambda sittings, means: [[2], [0, 3]])
    monkeypatch.setattr(
        Rows, "_gathered", lambda self, some: gathered.append(some) or {index: ("both", Timing(3.0)) for index in some}
    )
    rows._together([0, 2, 3])
    first, second, third = sat.made
    assert [one.given for one in sat.made] == [(rows._prompts[index], FOUND) for index in (0, 2, 3)]
    assert gathered == [{0: first, 3: third}]
    assert second.done == ["waited", ("opened", False), "run", ("told", "output", Timing(1.0, 2.0))]
    assert first.done == third.done == ["waited", ("opened", False), ("told", "both", Timing(3.0))]
    assert rows.filled == [Filled("fresh", "output", (2,))]  # type: ignore[arg-type]
    assert {index: one.output for index, one in rows.served.items()} == {0: "both", 2: "output", 3: "both"}


def test_all_wait_before_anything_is_pinned(sat: type[Sat], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Sat, "wait", lambda self: order.append("waits"))

    @contextmanager
    def opened(self: Sat) -> Iterator[Any]:
        order.append("opens")
        yield self.request
        order.append("closes")

    monkeypatch.setattr(Sat, "opened", opened)
    monkeypatch.setattr(together, "_groups", lambda *_: order.append("groups") or [[0], [1]])
    Rows(means(), [asked(3), asked(4)], FOUND)._together([0, 1])
    assert order == ["waits", "waits", "opens", "opens", "groups", "closes", "closes"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_prompts_together_of_which_one_fails_are_all_let_go(
    error: type[BaseException], sat: type[Sat], monkeypatch: pytest.MonkeyPatch
) -> None:
    sat.fails = [error()]
    monkeypatch.setattr(together, "_groups", lambda *_: [[0], [1]])
    rows = Rows(means(), [asked(3), asked(4)], FOUND)
    with pytest.raises(error):
        rows._together([0, 1])
    assert [one.done[-1] for one in sat.made] == [("let go", error)] * 2 and not rows.served


def test_prompts_run_in_one_forward_from_copies_of_what_they_resume(
    sat: type[Sat], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, resumed, ran = means(), [], []
    given.binding.live_cache = lived
    monkeypatch.setattr(together, "time", Ticks())  # 0, then 2
    monkeypatch.setattr(together.prefill, "resume_live", lambda *args: resumed.append(args))
    monkeypatch.setattr(together.prefill, "gathered", lambda *args: ran.append(args) or ("live of all", "output"))
    rows = Rows(given, [], FOUND)
    some = {index: Sat(given, asked(index), FOUND) for index in (4, 1, 3)}
    state = object()
    for index in (4, 3):
        some[index].request.checkpoint = state
    found = rows._gathered(some)  # type: ignore[arg-type]
    assert [one.request.done for one in some.values()] == [
        [("run_with", 3), "checked"],
        [("run_with", 3)],
        [("run_with", 3)],
    ]
    assert [(request is some[index].request) for (_, _, request), index in zip(resumed, (4, 1), strict=True)] == [
        True
    ] * 2
    ((binding, prompts, lives),) = ran
    assert binding is given.binding and prompts == [one.given[0].row for one in some.values()]
    assert lives[0] is lives[2] is resumed[0][1] and lives[1] is resumed[1][1] is not lives[0]
    assert rows.filled == [Filled("live of all", "output", (4, 1, 3))]  # type: ignore[arg-type]
    assert found == dict.fromkeys((4, 1, 3), ("output", Timing(0.0, 2.0 / 3)))


# -- who runs with whom -----------------------------------------------------------------------------------------------


def drawn_request(draw: random.Random) -> Opened:
    prompt = draw.randrange(8, 12) if draw.random() < 0.5 else draw.randrange(1, 40)
    resumed = draw.choice([0, 0, draw.randrange(prompt + 1), min(prompt, 6)])
    planned = [prompt] if draw.random() < 0.3 else []
    seen = draw.choice([0, MIN_GAIN_TOKENS - 1, MIN_GAIN_TOKENS])
    return Opened(resumed, prompt, planned=planned, announced=draw.random() < 0.2, overlap_tokens=resumed + seen)


def test_who_runs_with_whom() -> None:
    """As it is said: what is left must be short, and nothing of it known to come back; equally far, or all fresh."""
    draw, most, loses = random.Random(7), 20, []
    together_ = lambda left, wants: loses.append(wants) or left <= most  # noqa: E731
    seen = set()
    for _ in range(200):
        requests = {index: drawn_request(draw) for index in draw.sample(range(30), draw.randrange(1, 12))}
        sittings: Any = {index: SimpleNamespace(request=request) for index, request in requests.items()}
        cost = draw.choice([1.0, 9.0, 100.0])
        given: Any = SimpleNamespace(
            binding=SimpleNamespace(segmenting=SimpleNamespace(together=together_, forward_tokens=cost))
        )
        alone, equal, fresh = [], {}, []
        for index, one in requests.items():
            left = one.prompt_tokens - one.resumed_tokens
            gain = one.overlap_tokens - one.resumed_tokens
            back = bool(one.planned) and (one.announced or gain >= MIN_GAIN_TOKENS)
            if left == 0 or left > most or back:
                alone.append([index])
            elif one.resumed_tokens > 0:
                equal.setdefault((one.resumed_tokens, left), []).append(index)
            else:
                fresh.append(index)
        padded = padded_groups([requests[index].prompt_tokens for index in fresh], cost)
        expected = [*alone, *equal.values(), *([fresh[at] for at in group] for group in padded)]
        assert together._groups(sittings, given) == expected
        seen |= {(bool(alone), any(len(group) > 1 for group in equal.values()), len(padded) > 1)}
    assert len(seen) >= 5 and set(loses) == {True, False}


@pytest.mark.parametrize(
    ("planned", "announced", "gain", "returns"),
    [
        ([9], False, MIN_GAIN_TOKENS, True),
        ([9], False, MIN_GAIN_TOKENS - 1, False),
        ([9], True, 0, True),
        ([], True, MIN_GAIN_TOKENS, False),
    ],
)
def test_what_comes_back_runs_by_itself(planned: list[int], announced: bool, gain: int, returns: bool) -> None:
    request: Any = Opened(5, 50, planned=planned, announced=announced, overlap_tokens=5 + gain)
    assert together._returns(request) is returns
