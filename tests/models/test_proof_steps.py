"""What a proof is put together from: when it is made, what is remembered of it, and how runs are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guarded import Guarded, GuardedWeakly, Held

from hf_sparse_cache import UnsupportedModelError
from hf_sparse_cache.models import proof
from hf_sparse_cache.models.proof import Proof
from hf_sparse_cache.models.rounding import EXACT
from hf_sparse_cache.models.tensors import LayerTensors
from hf_sparse_cache.models.watch import ChangedPrefillError
from hf_sparse_cache.models.weights import Identity


Patch = pytest.MonkeyPatch
PLAIN = Identity("model-0", "settings", "code", proved_by="proved", attached="attached")


class Asked:
    """A binding of a small module, whose name is what is put here, and whose proofs are counted."""

    def __init__(self, patch: Patch, storage: str = "exact", kind: str = "jamba") -> None:
        self.name, self.attempts, self.said = PLAIN, 0, ""
        self.model = torch.nn.Linear(2, 2).eval()
        self.binding: Any = SimpleNamespace(
            model=self.model,
            config=SimpleNamespace(storage=storage),
            text_config=SimpleNamespace(model_type=kind),
            family=SimpleNamespace(name="Some"),
            rounding=SimpleNamespace(scheme=""),
        )
        self.proof = Proof(self.binding)
        self.changes: list[Identity] = []  # what it is called after each attempt
        patch.setattr(proof, "identity", lambda model: self.name)
        patch.setattr(Proof, "_attempt", self._attempt)

    def _attempt(self, of: Any, found: Identity) -> str:
        raise NotImplementedError

    def known(self) -> dict[str, str]:
        return proof._found[self.model][""]


@pytest.fixture
def asked(monkeypatch: Patch) -> Asked:
    return counted(Asked(monkeypatch), monkeypatch)


def counted(asked: Asked, patch: Patch) -> Asked:
    def attempt(self: Proof, found: Identity) -> str:
        asked.attempts += 1
        if asked.changes:
            asked.name = asked.changes.pop(0)
        return asked.said

    patch.setattr(Proof, "_attempt", attempt)
    return asked


def test_it_is_proved_once_and_holds_from_then_on(asked: Asked) -> None:
    assert not asked.proof.holds and asked.proof.known(PLAIN) is None
    asked.proof.require()
    asked.proof.require()
    assert asked.attempts == 1 and asked.proof.holds and asked.known() == {"proved": ""}
    assert Proof(asked.binding).holds and not Proof(asked.binding, wanted=False).holds
    other = SimpleNamespace(**{**vars(asked.binding), "rounding": SimpleNamespace(scheme="int8")})
    assert not Proof(other).holds  # type: ignore[arg-type]
    asked.name = PLAIN._replace(proved_by="another")
    assert not asked.proof.holds and asked.proof.shortcoming() == "" and asked.attempts == 2 and asked.proof.holds


def test_what_does_not_hold_is_remembered_by_the_whole_name_and_raised(asked: Asked) -> None:
    asked.said = "it forgets"
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="Linear cannot be resumed exactly: it forgets"):
            asked.proof.require()
    assert asked.attempts == 1 and asked.known() == {str(PLAIN): "it forgets"} and not asked.proof.holds
    assert asked.proof.shortcoming() == "it forgets"


def test_nothing_is_proved_where_it_is_not_wanted_or_while_a_model_is_trained(asked: Asked) -> None:
    asked.said = "it forgets"
    unwanted = Proof(asked.binding, wanted=False)
    unwanted.require()
    assert unwanted.known(PLAIN) == "" and not unwanted.holds
    asked.model.train()
    asked.proof.require()
    assert asked.attempts == 0
    asked.model.eval()
    with pytest.raises(UnsupportedModelError):
        asked.proof.require()


def test_attached_code_that_may_be_the_reason_is_warned_of(asked: Asked, monkeypatch: Patch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(proof.logger, "warning", warned.append)
    asked.name = PLAIN._replace(foreign="the hook on Linear")
    asked.proof.require()
    assert not warned and asked.attempts == 1
    asked.said, asked.name = "it forgets", asked.name._replace(proved_by="another", attached="more")
    asked.proof.require()
    (said,) = warned
    assert "the hook on Linear" in said and "it forgets" in said


@pytest.mark.parametrize(
    ("storage", "kind", "bits"),
    [("exact", "mamba", 0), ("exact", "qwen3_next", 0), ("bf16", "mamba", 0), ("bf16", "qwen3_next", 16),
     ("int8", "mamba", 8), ("int8", "jamba", 0), ("int8", "nobody knows it", 8)],
)  # fmt: skip
def test_bits_that_a_family_does_not_bear(storage: str, kind: str, bits: int, monkeypatch: Patch) -> None:
    asked = counted(Asked(monkeypatch, storage, kind), monkeypatch)
    Proof(asked.binding, wanted=False).require()
    if not bits:
        asked.proof.require()
        assert asked.attempts == 1
        return
    with pytest.raises(UnsupportedModelError, match=f"cannot be kept in {bits} bits: .*{storage}.* of Some"):
        asked.proof.require()
    assert asked.attempts == 0


def test_code_that_changes_once_is_tried_again_and_code_that_goes_on_changing_is_not(asked: Asked) -> None:
    hooked = PLAIN._replace(foreign="the hook on Linear")
    asked.name = hooked
    asked.changes = [hooked._replace(code="two"), hooked._replace(code="two", proved_by="settled")]
    assert asked.proof.shortcoming() == "" and asked.attempts == 2 and asked.known() == {"settled": ""}
    asked.name, asked.attempts = hooked._replace(code="three", attached="counting", proved_by="third"), 0
    asked.changes = [asked.name._replace(code=word, proved_by=word) for word in ("four", "five", "six", "seven")]
    said = asked.proof.shortcoming()
    assert said == "the hook on Linear is another after every forward, so that nothing fits twice"
    assert asked.attempts == 2 and asked.known() == {"settled": "", "counting": said}
    assert asked.proof.shortcoming() == said and asked.attempts == 2


def test_code_of_nobody_else_may_change_while_it_is_proved(asked: Asked) -> None:
    """What its own forwards write down: the name that it has afterwards is the one that is proved."""
    asked.changes = [PLAIN._replace(code="two", proved_by="then")]
    assert asked.proof.shortcoming() == "" and asked.attempts == 1 and asked.known() == {"then": ""}


def test_what_is_known_of_attached_code_comes_first_and_then_what_was_proved(asked: Asked) -> None:
    names = [PLAIN.attached, PLAIN.proved_by, str(PLAIN)]
    for name in reversed(names):
        proof._remember(asked.proof._known(), name, f"by {name}")
        assert asked.proof.known(PLAIN) == f"by {name}"
    assert asked.proof.known(PLAIN._replace(attached="", proved_by="", code="")) is None


def test_what_is_remembered_of_a_model_has_an_end(monkeypatch: Patch) -> None:
    monkeypatch.setattr(proof, "_MOST_FOUND", 3)
    known: dict[str, str] = {}
    for number in range(3):
        assert proof._remember(known, f"name {number}", f"why {number}") == f"why {number}"
    assert len(known) == 3
    assert proof._remember(known, "another", "") == "" and known == {"another": ""}


def test_what_is_remembered_changes_under_its_lock(asked: Asked, monkeypatch: Patch) -> None:
    lock = Held()
    monkeypatch.setattr(proof, "_lock", lock)
    monkeypatch.setattr(proof, "_found", GuardedWeakly(lock))
    assert asked.proof.shortcoming() == "" and lock.taken >= 2 and lock.depth == 0
    proof._remember(Guarded(lock), "name", "why")


# -- one attempt ------------------------------------------------------------------------------------------------------


class Attempt:
    """One attempt at a proof, of which every step is noted."""

    def __init__(self, patch: Patch, why: str = "", written: bool = True, differs: bool = True) -> None:
        self.steps: list[Any] = []
        self.binding: Any = SimpleNamespace(model="model", live_cache=lambda: "live", cache_name="cache")
        patch.setattr(proof, "_shortcoming", lambda binding, share: self.step(("run", share)) or why)
        patch.setattr(proof.surveys, "noted", lambda model: self.step("noted") or len(self.steps))
        patch.setattr(proof.surveys, "differ", lambda *moments: self.step(("differ", *moments)) or differs)
        patch.setattr(proof.states, "probe", lambda *given: self.step(("probe", *given)))
        patch.setattr(proof.surveys, "note_written", lambda moments: self.step(("written", *moments)) or written)
        patch.setattr(proof, "forget", lambda model: self.step(("forget", model)))

    def step(self, what: Any) -> None:
        self.steps.append(what)

    def made(self, found: Identity = PLAIN) -> list[Any]:
        self.why = Proof(self.binding)._attempt(found)
        return self.steps


RUN = ["noted", ("run", 0.1), "noted"]
CHANGED = [*RUN, ("differ", 1, 3), ("probe", "model", "live", "cache"), "noted", ("written", 1, 3, 6)]


def test_what_forwards_write_down_is_seen_in_one_forward_more(monkeypatch: Patch) -> None:
    assert Attempt(monkeypatch).made() == [*CHANGED, ("forget", "model")]
    assert Attempt(monkeypatch, written=False).made() == CHANGED
    assert Attempt(monkeypatch, differs=False).made() == CHANGED[:4]
    failed = Attempt(monkeypatch, why="it forgets")
    assert failed.made() == RUN and failed.why == "it forgets"


@pytest.mark.parametrize(
    ("foreign", "packed", "share"),
    [("", False, 0.1), ("the hook", False, 0.02), ("", True, float("inf")), ("the hook", True, float("inf"))],
)
def test_how_far_two_pieces_may_lie_from_one(foreign: str, packed: bool, share: float, monkeypatch: Patch) -> None:
    found = PLAIN._replace(foreign=foreign, packed=packed)
    assert Attempt(monkeypatch, differs=False).made(found)[1] == ("run", share)


class Prompts:
    """Runs of a proof on one prompt after another, that end as is said here."""

    def __init__(self, patch: Patch, ends: list[Any]) -> None:
        self.seen: list[Any] = []
        self.ends, self.holding = ends, False
        self.binding: Any = SimpleNamespace(model=torch.nn.Linear(1, 1))
        patch.setattr(proof.mamba1, "held", self.held)
        patch.setattr(proof, "sample_prompt", lambda binding, seed: seed)
        patch.setattr(proof, "_disproof", self.disproof)

    @contextlib.contextmanager
    def held(self, model: Any) -> Iterator[None]:
        assert model is self.binding.model
        self.holding = True
        yield
        self.holding = False

    def disproof(self, binding: Any, ids: Any, share: float) -> str:
        assert self.holding and not torch.is_grad_enabled() and binding is self.binding
        torch.rand(1)
        self.seen.append((ids, share))
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return str(end)

    def said(self) -> str:
        before = torch.get_rng_state()
        why = proof._shortcoming(self.binding, 0.5)
        assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled() and not self.holding
        return why


def test_a_prompt_that_shows_nothing_wrong_is_enough(monkeypatch: Patch) -> None:
    prompts = Prompts(monkeypatch, ["first", "", "third"])
    assert prompts.said() == "" and prompts.seen == [(0, 0.5), (1, 0.5)]
    prompts = Prompts(monkeypatch, ["first", "second", "third", "fourth"])
    assert prompts.said() == "third" and [ids for ids, _ in prompts.seen] == list(range(proof.PROMPTS))
    assert Prompts(monkeypatch, [""]).said() == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ChangedPrefillError("somebody takes some out"), "somebody takes some out"),
        (UnsupportedModelError("It has no rule."), "It has no rule"),
        (KeyError("name"), "a prompt in two pieces ends in KeyError: 'name'"),
    ],
)
def test_an_error_on_a_prompt_is_a_reason_and_no_further_one_is_tried(
    error: Exception, said: str, monkeypatch: Patch
) -> None:
    prompts = Prompts(monkeypatch, ["off", error, ""])
    assert prompts.said() == said and len(prompts.seen) == 2


def test_a_lack_of_memory_says_nothing_about_a_model(monkeypatch: Patch) -> None:
    prompts = Prompts(monkeypatch, [torch.OutOfMemoryError("CUDA out of memory")])
    with pytest.raises(torch.OutOfMemoryError):
        proof._shortcoming(prompts.binding, 0.5)


# -- the prompt -------------------------------------------------------------------------------------------------------


def prompted(patch: Patch, chunk: int = 1, words: int = 40, vocab: int | None = None, **config: Any) -> Any:
    patch.setattr(proof, "input_device", lambda model: torch.device("cpu"))
    embeddings = torch.nn.Embedding(words, 2)
    model = SimpleNamespace(
        get_input_embeddings=lambda: embeddings, config=SimpleNamespace(to_dict=lambda: dict(config))
    )
    return SimpleNamespace(model=model, chunk=chunk, cut_ids=(), text_config=SimpleNamespace(vocab_size=vocab))


@pytest.mark.parametrize(("chunk", "length"), [(1, 64), (48, 64), (49, 65), (256, 272), (496, 512), (500, 512)])
def test_a_prompt_has_one_chunk_and_a_little_more_within_limits(chunk: int, length: int, monkeypatch: Patch) -> None:
    ids = proof.sample_prompt(prompted(monkeypatch, chunk), 1)
    assert ids.shape == (1, length) and ids.dtype == torch.long


def test_a_prompt_is_drawn_from_all_that_is_ordinary(monkeypatch: Patch) -> None:
    def drawn(binding: Any, seeds: int = 12) -> set[int]:
        return {int(token) for seed in range(seeds) for token in proof.sample_prompt(binding, seed)[0]}

    assert drawn(prompted(monkeypatch)) == set(range(40))
    assert drawn(prompted(monkeypatch, vocab=30)) == set(range(30))
    assert drawn(prompted(monkeypatch, vocab=50)) == set(range(40))
    named = prompted(monkeypatch, eos_token_id=[0, 39], text={"image_token_index": 7}, other_token_id=40, pad=3)
    named.cut_ids = (5, -1, 40)
    assert drawn(named) == set(range(40)) - {0, 39, 7, 5}
    none_left = prompted(monkeypatch, words=3, eos_token_id=[0, 1, 2])
    assert drawn(none_left) == {0, 1, 2}
    assert torch.equal(proof.sample_prompt(named, 3), proof.sample_prompt(named, 3))
    assert not torch.equal(proof.sample_prompt(named, 3), proof.sample_prompt(named, 4))


def test_token_ids_of_a_configuration_wherever_it_has_them() -> None:
    values = {
        "eos_token_id": [1, None, 2], "pad_token_id": None, "image_token_index": 3, "stop_token_ids": [4],
        "hidden_size": 5, "token_id_of": 6, "inner": {"bos_token_id": 7, "deep": {"x_token_id": 8, "y": 9}},
        "z_token_id": "word", "bos_token_id": 10,
    }  # fmt: skip
    assert list(proof._token_ids(values)) == [1, 2, 3, 4, 7, 8, 10]


# -- the runs ---------------------------------------------------------------------------------------------------------


def live(length: int = 0, *layers: Any, full: int = 0) -> Any:
    return SimpleNamespace(length=length, layers=list(layers), full_attention_layers=full)


def test_a_run_from_a_checkpoint_begins_behind_what_it_holds(monkeypatch: Patch) -> None:
    restored: list[Any] = []
    monkeypatch.setattr(proof.states, "restore", lambda *given: restored.append(given))
    monkeypatch.setattr(proof, "_continued", lambda binding, cache, ids: (binding, cache.length, ids.shape[1]))
    ids = torch.zeros(1, 50, dtype=torch.long)
    for full, spans in ((0, []), (2, ["kv"])):
        cache = live(full=full)
        binding: Any = SimpleNamespace(live_cache=lambda cache=cache: cache)
        assert proof._run(binding, ids) == (binding, 0, 50) and not restored
        checkpoint: Any = ("state", "kv")
        assert proof._run(binding, ids, checkpoint) == (binding, 34, 50)
        assert restored == [(cache, "state", spans, EXACT)]
        restored.clear()


def test_a_run_goes_on_to_the_end_of_the_prompt_and_keeps_the_last_logits(monkeypatch: Patch) -> None:
    seen: list[Any] = []

    def segment(binding: Any, cache: Any, row: Any, end: int) -> Any:
        seen.append((cache, row.ids.tolist(), row.kwargs, end))
        return SimpleNamespace(logits="logits")

    monkeypatch.setattr(proof.prefill, "segment", segment)
    run = proof._continued(None, "live", torch.tensor([[4, 5, 6]]))  # type: ignore[arg-type]
    assert (run.live, run.logits) == ("live", "logits")
    assert seen == [("live", [4, 5, 6], {"use_cache": True, "logits_to_keep": 16}, 3)]


class Disproof:
    """The runs of one prompt, of which one step may say something; what is captured is 7 and 8."""

    def __init__(self, patch: Patch) -> None:
        self.says: dict[str, str] = {}
        self.steps: list[Any] = []
        self.touched: torch.Tensor | None = None
        self.state, self.kv = torch.tensor([7.0]), torch.tensor([8.0])
        patch.setattr(proof, "_run", self.run)
        patch.setattr(proof, "_continued", self.continued)
        patch.setattr(proof.states, "unruled", lambda cache: self.say(f"unruled {cache}"))
        patch.setattr(proof, "_unfilled", lambda binding, cache: self.say(f"unfilled {cache}"))
        patch.setattr(proof.states, "capture_state", lambda cache: LayerTensors(({"state": self.state},)))
        patch.setattr(proof.states, "capture_kv", self.capture_kv)
        patch.setattr(proof, "_different", lambda *runs: self.say(f"different {[run.live for run in runs]}"))
        patch.setattr(
            proof, "_rounds_otherwise", lambda of, first, ids: self.say(f"rounds {first.shape[1]} {ids.shape[1]}")
        )
        patch.setattr(proof, "_apart", lambda *runs: self.say(f"apart {[getattr(run, 'live', run) for run in runs]}"))

    def say(self, step: str) -> str:
        self.steps.append(step)
        return self.says.get(step, "")

    def capture_kv(self, cache: Any, start: int, end: int) -> LayerTensors:
        assert (start, end) == (0, 14)
        return LayerTensors(({"keys": self.kv},))

    def run(self, binding: Any, ids: torch.Tensor, checkpoint: Any = None) -> Any:
        held = [] if checkpoint is None else [payload.layers[0] for payload in checkpoint]
        return SimpleNamespace(
            live="-".join(map(str, [ids.shape[1], *(int(v) for part in held for v in part.values())]))
        )

    def continued(self, binding: Any, cache: Any, ids: torch.Tensor) -> Any:
        if self.touched is not None:
            self.touched += 1
        return SimpleNamespace(live=f"{cache} to {ids.shape[1]}")

    def made(self) -> str:
        return proof._disproof("binding", torch.zeros(1, 30, dtype=torch.long), 0.5)  # type: ignore[arg-type]


DISPROOF = [
    "unruled 14", "unfilled 14", "different ['14 to 30', '30-7-8']", "unruled 14 to 30", "rounds 14 30",
    "apart ['30', '14 to 30', '30-0-0', 0.5]",
]  # fmt: skip


@pytest.mark.parametrize("last", range(len(DISPROOF) + 1))
def test_the_first_step_that_says_something_ends_a_proof(last: int, monkeypatch: Patch) -> None:
    made = Disproof(monkeypatch)
    made.says = {step: f"by {step}" for step in DISPROOF[last:]}
    assert made.made() == (f"by {DISPROOF[last]}" if last < len(DISPROOF) else "")
    assert made.steps == DISPROOF[: last + 1]


@pytest.mark.parametrize("part", ["state", "kv"])
def test_what_is_captured_must_not_change_when_the_model_goes_on(part: str, monkeypatch: Patch) -> None:
    made = Disproof(monkeypatch)
    made.touched = getattr(made, part)
    assert made.made() == "what was captured changes when the model goes on"
    assert DISPROOF[-1] not in made.steps and DISPROOF[-2] not in made.steps


def test_layers_that_keep_nothing_are_named_unless_they_have_nothing_to_keep(monkeypatch: Patch) -> None:
    class DummyLayer:
        pass

    fixed: list[dict[str, Any]] = [{"state": 1}, {}, {}, {}]
    grown: list[dict[str, Any]] = [{}, {"keys": 1}, {}, {}]
    monkeypatch.setattr(proof.states, "capture_state", lambda cache: SimpleNamespace(layers=fixed))
    monkeypatch.setattr(
        proof.states,
        "capture_kv",
        lambda cache, start, end: SimpleNamespace(layers=grown) if (start, end) == (0, 9) else None,
    )
    cache = live(9, object(), object(), DummyLayer(), object())

    def said(kinds: Any) -> str:
        return proof._unfilled(SimpleNamespace(text_config=SimpleNamespace(layer_types=kinds)), cache)  # type: ignore[arg-type]

    expected = "layer 3 (object) keeps nothing in the cache that it was given"
    assert said(None) == said(["moe", "moe", "moe", "mamba"]) == said(["mlp"]) == expected
    assert said(["mamba", "mamba", "mamba", "mlp"]) == said(["a", "a", "a", "moe"]) == ""
    cache.layers[2] = object()
    assert said(["a", "a", "a", "moe"]).startswith("layer 2 ")
    fixed.append({"state": 1})
    with pytest.raises(ValueError, match="zip"):  # no layer goes without a look
        said(["mlp"] * 4)


def test_a_wiped_payload_has_zeros_for_numbers_and_everything_else_as_it_was() -> None:
    payload = LayerTensors(({"state": torch.ones(2), "index": torch.ones(2, dtype=torch.long), "flag": True}, {}))
    first, second = proof._wiped(payload).layers
    assert not first["state"].any() and first["state"].shape == (2,)
    assert first["index"].all() and first["flag"] is True and second == {}
    assert payload.layers[0]["state"].all()


def test_a_rounded_state_is_compared_only_where_states_are_rounded(monkeypatch: Patch) -> None:
    calls: list[Any] = []

    def run(binding: Any, ids: Any, checkpoint: Any = None, rounding: Any = None) -> Any:
        calls.append(("run", ids.shape[1], checkpoint, rounding))
        return SimpleNamespace(live="live")

    monkeypatch.setattr(proof, "_run", run)
    monkeypatch.setattr(proof, "_continued", lambda binding, cache, ids: calls.append((cache, ids.shape[1])))
    monkeypatch.setattr(proof.states, "round_off", lambda *given: calls.append(("round", *given)) or "state")
    monkeypatch.setattr(proof.states, "capture_kv", lambda *given: calls.append(("kv", *given)) or "kv")
    said = [""]
    monkeypatch.setattr(proof, "_different", lambda one, other: said[0])
    ids = torch.zeros(1, 30, dtype=torch.long)
    exact, rounded = SimpleNamespace(rounds=False), SimpleNamespace(rounds=True, name="int8")
    binding: Any = SimpleNamespace(rounding=exact)
    assert proof._rounds_otherwise(binding, ids[:, :14], ids) == "" and not calls
    binding = SimpleNamespace(rounding=rounded)
    assert proof._rounds_otherwise(binding, ids[:, :14], ids) == ""
    assert calls == [
        ("run", 14, None, None), ("round", "live", rounded, 0, 14), ("kv", "live", 0, 14, rounded), ("live", 30),
        ("run", 30, ("state", "kv"), rounded),
    ]  # fmt: skip
    said[0] = "the logits are others"
    assert proof._rounds_otherwise(binding, ids[:, :14], ids) == "with storage='int8', the logits are others"


# -- the comparisons --------------------------------------------------------------------------------------------------

NAN = float("nan")
SAME: list[tuple[Any, Any]] = [
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN])), (torch.ones(3, 2).T, torch.ones(2, 3)),
    ({"a": torch.ones(2)}, {"a": torch.ones(2)}), ([1, (2, "x")], [1, (2, "x")]), (None, None), (object(), object()),
    (True, True), (1.5, 1.5), (torch.tensor(1.0), torch.tensor(1.0)), ([], ()),
]  # fmt: skip
OTHERS: list[tuple[Any, Any]] = [
    (torch.tensor([1.0]), torch.tensor([2.0])), (torch.tensor([0.0]), torch.tensor([-0.0])),
    (torch.ones(2), torch.ones(1, 2)), (torch.ones(2), torch.ones(2, dtype=torch.int32)), (torch.ones(2), [1.0, 1.0]),
    (torch.zeros(2), torch.zeros(2, dtype=torch.int32)), (torch.zeros(2), torch.zeros(2, device="meta")),
    ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 2}), ({"a": 1}, {"a": 1, "b": 1}), ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
    ([1, 2], [1]), ([1, 2], [1, 3]), ([3, 2], [1, 2]), (1, True), (1, 2), ("a", "b"), (0.5, 0.25), (None, 1),
    ({}, []), (None, torch.ones(1)), (True, False), ({"a": 1}, [1]), ([1], 1),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_is_the_same_to_the_bit(one: Any, other: Any) -> None:
    assert proof._same(one, other) is True and proof._same(other, one) is True


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_what_is_another(one: Any, other: Any) -> None:
    assert proof._same(one, other) is False and proof._same(other, one) is False


def run_of(logits: float, *layers: dict[str, Any]) -> Any:
    return proof._Run(live(0, *(SimpleNamespace(**layer) for layer in layers)), torch.tensor([logits]))


def test_where_a_restored_state_does_not_continue() -> None:
    base = {"state": torch.ones(2), "dtype": 1, "device": "cpu"}
    one = run_of(1.0, base, base)
    assert proof._different(one, run_of(1.0, base, {**base, "dtype": 2, "device": "meta"})) == ""
    assert "the logits are others" in proof._different(one, run_of(2.0, base, base))
    said = "a restored state does not continue as before: {} of layer {} is another".format
    assert proof._different(one, run_of(1.0, base, {**base, "state": torch.zeros(2)})) == said("state", 1)
    assert proof._different(one, run_of(2.0, {**base, "calls": 1}, base)) == said("calls", 0)
    assert proof._different(run_of(1.0, base, {**base, "calls": 1}), one) == said("calls", 1)
    assert proof._different(one, run_of(1.0, {**base, "b": 1, "a": 1}, base)) == said("a", 0)
    with pytest.raises(ValueError, match="zip"):  # no layer goes without a look
        proof._different(one, run_of(1.0, base))


def compared(patch: Patch, *triples: Any) -> Callable[[float], str]:
    patch.setattr(proof, "_triples", lambda *runs: iter(triples))
    return lambda share: proof._apart("one", "two", "wiped", share)  # type: ignore[arg-type]


def test_two_pieces_may_differ_by_a_share_of_what_a_wiped_state_does(monkeypatch: Patch) -> None:
    zeros, ones = torch.zeros(4), torch.ones(4)
    for off, share, said in ((0.5, 0.5, False), (0.5625, 0.5, True), (0.5, 0.25, True), (9.0, float("inf"), False)):
        why = compared(monkeypatch, ("state", zeros, zeros + off, ones))(share)
        assert bool(why) is said and ("state is off by" in why) is said, (off, share)
        why = compared(monkeypatch, ("state", ones, ones - off, zeros))(share)
        assert bool(why) is said, (off, share)
    why = compared(monkeypatch, ("state", zeros, zeros + 2, zeros + 3))(0.1)
    assert why == "state is off by 2.0e+00 after two pieces, and by 3.0e+00 if the state between them is wiped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_pieces_may_differ_by_a_few_roundings(dtype: torch.dtype, monkeypatch: Patch) -> None:
    ones, eps = torch.ones(4, dtype=dtype), torch.finfo(dtype).eps
    for size in (1.0, 8.0):
        for units, said in ((4, False), (5, True), (-4, False), (-6, True)):
            whole, pieces = ones * size, ones * size * (1 + units * eps)
            assert bool(compared(monkeypatch, ("state", whole, pieces, whole))(0.1)) is said, (size, units)


def test_each_tensor_is_compared_until_one_is_off(monkeypatch: Patch) -> None:
    zeros, index = torch.zeros(4), torch.arange(4)
    fine, off = ("fine", zeros, zeros, zeros + 1), ("off", zeros, zeros + 1, zeros + 1)
    assert compared(monkeypatch, fine, ("index", index, index, index + 1), fine)(0.1) == ""
    assert compared(monkeypatch, fine, ("index", index, index, index), off)(0.1).startswith("off is off by")
    said = compared(monkeypatch, ("index", index, index + 1, index), off)(0.1)
    assert said == "index is another after two pieces than after one"


@pytest.mark.parametrize("where", [0, 1, 2])
def test_values_that_are_not_finite_prove_nothing_but_in_some_logits(where: int, monkeypatch: Patch) -> None:
    some, every = [torch.zeros(4) + (index == 2) for index in range(3)], [torch.ones(4) for _ in range(3)]
    some[where][1], every[where][:] = float("inf"), NAN
    assert "not finite" in compared(monkeypatch, ("state", *some))(0.1)
    assert compared(monkeypatch, ("the logits", *some))(0.1) == ""
    some[1][2] = 1.0
    assert "the logits is off by" in compared(monkeypatch, ("the logits", *some))(0.1)
    assert "the logits holds values that are not finite" in compared(monkeypatch, ("the logits", *every))(0.1)
    assert "not finite" in compared(monkeypatch, ("state", *every))(float("inf"))


def test_what_of_three_runs_is_compared(monkeypatch: Patch) -> None:
    """States, keys and values of the second piece, those of the last token of the first, and the logits."""

    def captured(cache: Any, *span: int) -> Any:
        held = {"part": torch.tensor([cache.tag, *span]), "none": torch.zeros(0), "word": "a"}
        return SimpleNamespace(layers=[held, {}, held])

    monkeypatch.setattr(proof.states, "capture_state", captured)
    monkeypatch.setattr(proof.states, "capture_kv", captured)
    runs: list[Any] = []
    for tag in (1, 2, 3):
        cache = live(40)
        cache.tag = tag
        runs.append(proof._Run(cache, torch.tensor([tag])))
    found = {name: [value.tolist() for value in values] for name, *values in proof._triples(*runs)}
    spans: dict[str, list[int]] = {"": [], " behind the cut": [24, 40], " before the cut": [23, 24]}
    expected = {
        f"part of layer {index}{where}": [[tag, *span] for tag in (1, 2, 3)]
        for where, span in spans.items()
        for index in (0, 2)
    }
    assert found == {**expected, "the logits": [[1], [2], [3]]}


@pytest.mark.parametrize("short", range(3))
def test_runs_with_fewer_layers_are_not_compared(short: int, monkeypatch: Patch) -> None:
    """No layer goes without a look."""
    layers: list[dict[str, Any]] = [{"part": torch.ones(1)}, {"part": torch.ones(1)}]
    monkeypatch.setattr(proof.states, "capture_state", lambda cache: SimpleNamespace(layers=layers[: cache.count]))
    monkeypatch.setattr(proof.states, "capture_kv", lambda *given: SimpleNamespace(layers=[]))
    runs: list[Any] = [proof._Run(live(20), torch.ones(1)) for _ in range(3)]
    for index, run in enumerate(runs):
        run.live.count = 1 if index == short else 2
    with pytest.raises(ValueError, match="zip"):
        list(proof._triples(*runs))


def test_the_size_of_differences() -> None:
    assert proof._rms(torch.tensor([3.0, -4.0])) == pytest.approx(12.5**0.5)
    assert proof._rms(torch.zeros(0)) == 0.0
