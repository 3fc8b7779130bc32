"""The checker accepts exact caches and rejects every kind of wrong state, on each core family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, random_ids
from transformers import PreTrainedModel

from hf_sparse_cache import SparsePrefixCache, check_exactness, exactness, mamba1
from hf_sparse_cache.exactness import ExactnessReport, ExactnessRow
from hf_sparse_cache.models.inputs import Prompts
from hf_sparse_cache.models.states import LayerTensors, capture_state
from hf_sparse_cache.planning.lineage import Lineage
from hf_sparse_cache.stats import RequestInfo
from hf_sparse_cache.store.slabs import taken
from hf_sparse_cache.store.tree import Checkpoint, KVSegment


GRID = 32
DOCUMENT = random_ids(160, seed=1)
PROMPTS = [torch.cat([DOCUMENT, random_ids(40 + extra, seed=2 + extra)], dim=1) for extra in range(2)]


def warmed(model: PreTrainedModel, seed: int = 1) -> SparsePrefixCache:
    """A handle that has seen a document with a question of its own."""
    cache = SparsePrefixCache(model, grid=GRID, policy="balanced", exactness="bitwise")
    model.generate(
        torch.cat([random_ids(160, seed=seed), random_ids(48, seed=9)], dim=1), past_key_values=cache, max_new_tokens=1
    )
    return cache


def stored(cache: SparsePrefixCache) -> list[Checkpoint]:
    return [checkpoint for _, _, checkpoint in cache.store.checkpoints()]


def test_exact_cache_passes(model: PreTrainedModel) -> None:
    with warmed(model) as cache:
        report = check_exactness(model, PROMPTS, cache=cache)
    assert report.passed, str(report)
    assert report.bitwise and report.tokens_equal
    assert report.resumed_tokens >= 2 * 96
    assert report.max_abs_logit_diff <= 1e-4
    assert "bit for bit" in str(report)


def test_nothing_resumed_does_not_pass(model: PreTrainedModel) -> None:
    with SparsePrefixCache(model, grid=GRID, policy="none", exactness="bitwise") as cache:
        report = check_exactness(model, PROMPTS[:1], cache=cache, max_new_tokens=2)
    assert report.bitwise and not report.passed
    assert "nothing was resumed" in str(report)


def zero(kind: str) -> Callable[[SparsePrefixCache], None]:
    def sabotage(cache: SparsePrefixCache) -> None:
        for checkpoint in stored(cache):
            for layer in checkpoint.state.layers:
                for name, value in layer.items():
                    if name.startswith(kind):
                        value.zero_()

    return sabotage


def state_of_another_prompt(cache: SparsePrefixCache) -> None:
    with warmed(cache.model, seed=77) as other:
        others = {checkpoint.position: checkpoint.state for checkpoint in stored(other)}
        for checkpoint in stored(cache):
            if checkpoint.position in others:
                checkpoint.state = others[checkpoint.position]


def position_off_by_one(cache: SparsePrefixCache) -> None:
    """Each state is that of one token earlier."""
    ids = torch.cat([DOCUMENT, random_ids(48, seed=9)], dim=1)
    for checkpoint in stored(cache):
        live = cache.server.live_cache()
        with torch.no_grad():
            cache.server.serve(live, Prompts.of(ids[:, : checkpoint.position - 1], {}), {"use_cache": True})
        checkpoint.state = capture_state(live)


def kv_of_another_prompt(cache: SparsePrefixCache) -> None:
    """The first KV segment is swapped for another prompt's. (In Jamba's attention order is invisible.)"""
    with warmed(cache.model, seed=77) as other:
        first_segment(cache).payload = first_segment(other).payload


def first_segment(cache: SparsePrefixCache) -> KVSegment:
    segment = stored(cache)[0].kv
    assert segment is not None
    while segment.parent is not None:
        segment = segment.parent
    return segment


SABOTAGES = {
    "recurrent state zeroed": zero("recurrent"),
    "conv state zeroed": zero("conv"),
    "state from another prompt": state_of_another_prompt,
    "position off by one": position_off_by_one,
}


@pytest.mark.parametrize("how", SABOTAGES)
def test_sabotaged_state_is_rejected(model: PreTrainedModel, how: str) -> None:
    with warmed(model) as cache:
        SABOTAGES[how](cache)
        report = check_exactness(model, PROMPTS, cache=cache)
    assert report.resumed_tokens > 0
    assert not report.bitwise and not report.passed
    assert report.max_abs_logit_diff > 1e-3  # far outside the tolerance: not a lucky rounding
    assert "NOT EXACT" in str(report)


@pytest.mark.parametrize("family", ["Jamba", "Zamba", "Zamba2"])
def test_swapped_kv_is_rejected(family: str) -> None:
    model = build(family)
    with warmed(model) as cache:
        kv_of_another_prompt(cache)
        report = check_exactness(model, PROMPTS, cache=cache)
    assert report.resumed_tokens > 0
    assert not report.bitwise and not report.passed
    assert report.max_abs_logit_diff > 1e-3


def test_a_call_that_was_not_served_to_its_end_is_reported() -> None:
    """A window one token short is found before it is served: the warm run has no states to compare."""
    model = build("Gemma3")
    with warmed(model) as cache:
        for checkpoint in stored(cache):
            layers = checkpoint.state.layers
            short = (layer | {"seen": layer["seen"] - 1} if "seen" in layer else layer for layer in layers)
            checkpoint.state = LayerTensors(tuple(short))
        report = check_exactness(model, PROMPTS[:1], cache=cache, max_new_tokens=2)
    assert report.resumed_tokens == 0 and not report.bitwise and not report.passed
    assert report.max_abs_logit_diff == 0 and "holds a window of" in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_bitwise(dtype: torch.dtype) -> None:
    for family in ("Mamba", "Zamba2"):
        model = build(family, dtype=dtype)
        with warmed(model) as cache:
            report = check_exactness(model, PROMPTS, cache=cache, max_new_tokens=2)
        assert report.passed, str(report)


def test_broken_mamba1_resume_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold and warm would agree if the scan forgot its state at every cut: the comparison with stock catches it."""
    model = build("Mamba")
    with warmed(model) as cache:
        monkeypatch.setattr(mamba1, "announce", lambda state: None)
        report = check_exactness(model, PROMPTS, cache=cache)
    assert not report.passed
    assert report.max_abs_logit_diff > 1e-3


def test_prompts_of_every_allowed_shape(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, policy="balanced", exactness="bitwise") as cache:
        assert check_exactness(jamba, [PROMPTS[0][0], PROMPTS[1]], cache=cache, max_new_tokens=1).passed
        with pytest.raises(ValueError, match="prompts is empty"):
            check_exactness(jamba, [], cache=cache)
        with pytest.raises(ValueError, match="shape"):
            check_exactness(jamba, [torch.zeros(2, 5, dtype=torch.long)], cache=cache)
        with pytest.raises(ValueError, match="tokenizer"):
            check_exactness(jamba, ["text"], cache=cache)


def test_bytes_are_those_of_the_tensors(jamba: PreTrainedModel) -> None:
    with warmed(jamba) as cache:
        checkpoints = stored(cache)
        segments = set()
        for checkpoint in checkpoints:
            segment = checkpoint.kv
            while segment is not None:
                segments.add(segment)
                segment = segment.parent

        def storage(payload: LayerTensors) -> int:
            held = (value.untyped_storage() for value in payload.tensors())  # which all of a payload share
            return sum({place.data_ptr(): taken(place.nbytes()) for place in held}.values())

        stats = cache.stats()
        assert stats.checkpoint_bytes == sum(storage(checkpoint.state) for checkpoint in checkpoints) > 0
        assert stats.kv_bytes == sum(storage(segment.payload) for segment in segments) > 0
        assert stats.checkpoints == len(checkpoints)


def crafted(monkeypatch: pytest.MonkeyPatch, stock: list[int], warm: list[int], logits: list[float]) -> Any:
    """A report on runs that chose these tokens; warm logits are off stock's by `logits`, step by step."""
    zeros = torch.zeros(len(stock), 5)
    state = (LayerTensors(({"conv.0": torch.zeros(2)},)),)
    off = torch.tensor(logits)[:, None].expand(-1, 5)
    runs = [
        exactness._Run(torch.tensor(stock), zeros, ()),
        exactness._Run(torch.tensor(warm), off, state),
        exactness._Run(torch.tensor(warm), off, state),
        exactness._Run(torch.tensor(warm), off, state),
    ]
    monkeypatch.setattr(exactness, "_run", lambda *args: runs.pop(0))
    model = build("Mamba2")
    with warmed(model) as cache:
        return check_exactness(model, PROMPTS[:1], cache=cache, max_new_tokens=len(stock))


def test_steps_are_compared_up_to_the_first_other_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the two runs have read different texts; at it they have not, and it counts."""
    report = crafted(monkeypatch, [5, 6, 7, 8], [5, 6, 9, 8], [1e-5, 2e-5, 0.25, 3.0])
    assert report.max_abs_logit_diff == 0.25 and not report.tokens_equal
    report = crafted(monkeypatch, [5, 6, 7, 8], [4, 6, 7, 9], [0.5, 1.0, 2.0, 3.0])
    assert report.max_abs_logit_diff == 0.5 and not report.tokens_equal
    report = crafted(monkeypatch, [5, 6, 7, 8], [5, 6, 7, 8], [1e-5, 2e-5, 0.25, 3.0])
    assert report.max_abs_logit_diff == 3.0 and report.tokens_equal
    report = crafted(monkeypatch, [5, 6, 7, 8], [5, 6, 7, 1], [0.0, 0.0, 0.0, 0.125])
    assert report.max_abs_logit_diff == 0.125 and not report.tokens_equal


# -- the report, by itself --------------------------------------------------------------------------------------------


def row(resumed: int = 5, logits: bool = True, states: bool = True, off: float = 0.0, **others: Any) -> ExactnessRow:
    return ExactnessRow(1000, resumed, logits, states, off, others.pop("tokens", True), "why", **others)


@pytest.mark.parametrize(
    ("rows", "tolerance", "passed", "title", "verdict"),
    [
        ([row()], 0.5, True, "Exact", "exact: 5 tokens resumed, warm equals cold bit for bit; max logit"),
        ([row(off=0.5), row(resumed=0)], 0.5, True, "Exact", "exact: 5 tokens"),
        ([row(off=0.6)], 0.5, False, "NOT EXACT", "NOT EXACT: further than 5e-01 from stock; max logit difference to"),
        ([row(off=9.0)], None, True, "Exact", "exact: 5"),
        ([row(), row(logits=False)], 0.5, False, "NOT EXACT", "NOT EXACT; max"),
        ([row(states=False)], None, False, "NOT EXACT", "NOT EXACT; max"),
        ([row(0, off=9.0)], 0.5, False, "Not proved", "NOT PROVED: nothing was resumed, so nothing was tested; max"),
        ([], 0.5, False, "Not proved", "NOT PROVED"),
        (
            [row(1, False, False, batched=True)],
            0.5,
            True,
            "Exact",
            "exact: 1 tokens resumed, warm equals cold bit for ",
        ),
        ([row(1, False, False, 0.6, batched=True)], 0.5, False, "NOT EXACT", "NOT EXACT: further than 5e-01 from"),
    ],
)
def test_when_a_report_passes_and_what_it_says(
    rows: list[ExactnessRow], tolerance: float | None, passed: bool, title: str, verdict: str
) -> None:
    report = ExactnessReport(tuple(rows), tolerance)
    assert report.passed is passed
    assert str(report).split("\n\n")[1].startswith(verdict)
    assert f"<b>{title}</b>" in report._repr_html_() and "<p>" in report._repr_html_().partition("</table>")[2]
    assert report.max_abs_logit_diff == max([one.max_abs_logit_diff for one in rows], default=0.0)
    assert report.resumed_tokens == sum(one.resumed_tokens for one in rows)


def test_a_verdict_says_in_what_mode_and_with_what_storage() -> None:
    assert "cold, run over the same segments bit for bit" in str(ExactnessReport((row(),), 0.5, "replayable"))
    assert "repeatable (storage='int8'): 5 tokens" in str(ExactnessReport((row(),), 0.5, "bitwise", "int8"))
    batched = str(ExactnessReport((row(batched=True), row(), row(batched=True)), 0.5))
    assert "; 2 ran batched, which no run repeats bit for bit: compared within the tolerance; max" in batched
    assert str(ExactnessReport((row(off=0.25),), 0.5)).endswith("max logit difference to stock 2.5e-01")


def test_the_cells_of_a_report() -> None:
    rows = (row(2000, off=0.25), row(logits=False, tokens=False), row(states=False), row(batched=True))
    report = ExactnessReport(rows, None)
    assert report._cells() == [
        ("1,000", "2,000", "yes", "yes", "2.5e-01", "yes", "why"),
        ("1,000", "5", "NO", "yes", "0.0e+00", "no", "why"),
        ("1,000", "5", "yes", "NO", "0.0e+00", "yes", "why"),
        ("1,000", "5", "batched", "batched", "0.0e+00", "yes", "why"),
    ]
    assert not report.tokens_equal and ExactnessReport(rows[:1], None).tokens_equal
    sides = report._repr_html_().rpartition("<tr>")[2].split("text-align:")[1:]
    assert [side.startswith("left") for side in sides] == [True, *[False] * 5, True]


def test_states_are_equal_only_tensor_by_tensor_and_value_by_value() -> None:
    def state(*layers: dict[str, Any]) -> tuple[LayerTensors, ...]:
        return (LayerTensors(layers),)

    one = {"a": torch.ones(2), "seen": 3}
    assert exactness._equal(state(one, one), state(dict(one), {"a": torch.ones(2), "seen": 3}))
    for other in (
        {"a": torch.ones(2), "seen": 4},
        {"a": torch.tensor([1.0, 2.0]), "seen": 3},
        {"a": torch.ones(2)},
        {**one, "b": 1},
        {"b": torch.ones(2), "seen": 3},
    ):
        for pair in ((one, other), (other, one)):
            assert not exactness._equal(state(*pair), state(one, one)), other
    assert (
        not exactness._equal((), ()) and not exactness._equal(state(one), ()) and not exactness._equal((), state(one))
    )


def test_what_every_run_decodes() -> None:
    options = exactness.greedy(torch.zeros(1, 5, dtype=torch.long), 3)
    assert options.pop("attention_mask").tolist() == [[1] * 5]
    assert options == {
        "do_sample": False,
        "num_beams": 1,
        "min_new_tokens": 3,
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, from 1 to"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must"),
        ({"prompts": "text"}, "prompts is 'text': give a list"),
        ({"prompts": 3}, "prompts is 3: give a list"),
        ({"prompts": [torch.tensor([[1, 128]])]}, "prompts contains 128, outside"),
    ],
)
def test_what_cannot_be_checked_is_refused_and_the_model_given_back(
    jamba: PreTrainedModel, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        check_exactness(jamba, **{"prompts": PROMPTS, **options})
    assert "_prefill" not in jamba.__dict__


@pytest.mark.parametrize("storage", ["exact", "bf16", "int8"])
def test_the_bound_is_that_of_the_storage_and_of_exact_types_alone(storage: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(exactness, "_check", lambda *args: row())
    model = build("Mamba2")
    with SparsePrefixCache(model, prove=False, storage=storage) as cache:
        report = check_exactness(model, PROMPTS, cache=cache)
        assert (report.tolerance, report.mode, report.storage) == (
            exactness.TOLERANCES[storage],
            "replayable",
            storage,
        )
        assert report.rows == (row(), row())
        assert check_exactness(model, PROMPTS, cache=cache, tolerance=0.0).tolerance == 0.0
        assert "_prefill" in model.__dict__
        for dtype, expected in ((torch.float64, exactness.TOLERANCES[storage]), (torch.bfloat16, None)):
            monkeypatch.setattr(type(model), "dtype", dtype)
            assert check_exactness(model, PROMPTS, cache=cache).tolerance == expected


def test_a_twin_is_empty_and_cuts_alike(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise", prove=False, max_memory="1MiB") as cache:
        cache.mark(DOCUMENT[:, :50])
        jamba.generate(PROMPTS[0], past_key_values=cache, max_new_tokens=1)
        with exactness.empty_twin(cache) as twin:
            assert (twin.config.grid, twin.config.policy, twin.config.max_memory) == (GRID, "none", None)
            assert twin.config.exactness == "bitwise" and not twin.config.ambient and not twin.server.proof.wanted
            assert len(twin.store) == 0 and twin.store is not cache.store
            space = twin.server.space.now()[0]
            assert [len(one) for one in twin.store.marks.prefixes(space)] == [50]


def test_a_handle_of_its_own_is_made_and_taken_off(jamba: PreTrainedModel, monkeypatch: Any) -> None:
    """Where nothing is resumed, a prompt is served once more: then its own states are there."""
    runs, served = [], exactness._run

    def noted(model: Any, ids: Any, handle: Any, steps: int) -> Any:
        runs.append(None if handle is None else len(handle.store))
        return served(model, ids, handle, steps)

    monkeypatch.setattr(exactness, "_run", noted)
    report = check_exactness(jamba, PROMPTS, max_new_tokens=2)
    assert report.passed and report.mode == "replayable" and report.storage == "exact", str(report)
    assert "_prefill" not in jamba.__dict__
    assert [row.prompt_tokens for row in report.rows] == [200, 201] and all(row.resumed_tokens for row in report.rows)
    # Stock; warm, and once more; cold on nothing.
    known = [run if run is None else run > 0 for run in runs]
    assert known == [None, False, True, False, None, True, True, False]


def test_a_handle_that_is_given_stays_and_keeps_what_it_serves(jamba: PreTrainedModel) -> None:
    with warmed(jamba) as cache:
        jamba_prefill, before = jamba.__dict__["_prefill"], cache.stats()
        report = check_exactness(jamba, PROMPTS, cache=cache, max_new_tokens=1)
        after = cache.stats()
        assert report.passed and after.requests == before.requests + 2  # once each, as it resumes at once
        assert after.resumed_tokens - before.resumed_tokens == report.resumed_tokens
        assert jamba.__dict__["_prefill"] is jamba_prefill and cache.server.on_prefill is None


def test_runs_by_themselves_do_not_go_through_an_ambient_handle(jamba: PreTrainedModel) -> None:
    with SparsePrefixCache(jamba, grid=GRID, exactness="bitwise", ambient=True) as cache:
        report = check_exactness(jamba, PROMPTS[:1], cache=cache, max_new_tokens=1)
        assert report.passed and cache.stats().requests == 2


def test_a_run_that_fails_leaves_nothing_on_the_handle(jamba: PreTrainedModel, monkeypatch: Any) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of luck")

    with warmed(jamba) as cache:
        monkeypatch.setattr(jamba, "generate", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            exactness._run(jamba, PROMPTS[0], cache, 1)
        assert cache.server.on_prefill is None
        with pytest.raises(RuntimeError, match="out of luck"):
            check_exactness(jamba, PROMPTS)
    assert "_prefill" not in jamba.__dict__


def test_of_batched_rows_the_distance_to_the_cold_run_counts_too(monkeypatch: Any) -> None:
    """No run repeats them bit for bit, so both are held against the tolerance; of others only stock is."""
    model = build("Mamba2")
    far, near = torch.full((2, 5), 0.5), torch.zeros(2, 5)

    def check(cold: torch.Tensor, warm: torch.Tensor, batched: bool) -> ExactnessRow:
        tokens = torch.tensor([1, 2])
        runs = [exactness._Run(tokens, logits, ()) for logits in (near, warm, cold)]
        info = RequestInfo(200, 200, 96, 104, segments=((0, 96, 2), 200) if batched else (96, 200), reason="why")  # type: ignore[arg-type]
        monkeypatch.setattr(exactness, "_run", lambda *args: runs.pop(0))
        monkeypatch.setattr(type(cache), "last_request", info)
        return exactness._check(model, PROMPTS[0], cache, 2)

    with SparsePrefixCache(model, prove=False, exactness="bitwise") as cache:
        row = check(far, near, True)
        assert (row.max_abs_logit_diff, row.batched, row.logits_bitwise, row.reason) == (0.5, True, False, "why")
        assert (row.prompt_tokens, row.resumed_tokens, row.tokens_equal) == (200, 96, True)
        assert check(near, far, True).max_abs_logit_diff == 0.5
        row = check(far, near, False)
        assert (row.max_abs_logit_diff, row.batched, row.logits_bitwise) == (0.0, False, False)
        assert not row.states_bitwise  # there are none to compare


def test_tokens_of_the_cold_run_count_as_well(monkeypatch: Any) -> None:
    model, zeros = build("Mamba2"), torch.zeros(2, 5)
    info = RequestInfo(200, 200, 96, 104, segments=(96, 200), reason="why")  # type: ignore[arg-type]
    with SparsePrefixCache(model, prove=False, exactness="bitwise") as cache:
        monkeypatch.setattr(type(cache), "last_request", info)
        for odd in range(3):
            runs = [exactness._Run(torch.tensor([1, 3 if odd == n else 2]), zeros, ()) for n in range(3)]
            monkeypatch.setattr(exactness, "_run", lambda *args, runs=runs: runs.pop(0))
            assert not exactness._check(model, PROMPTS[0], cache, 2).tokens_equal


def test_a_replayed_run_is_that_of_the_segments_that_were_named(monkeypatch: Any) -> None:
    """In replayable mode alone: in bitwise mode the cold run finds its cuts itself."""
    model, zeros = build("Mamba2"), torch.zeros(1, 5)
    info = RequestInfo(200, 200, 96, 104, segments=(96, (96, 100), 200), reason="why")  # type: ignore[arg-type]
    for mode in ("replayable", "bitwise"):
        twins: list[Any] = []

        def run(model: Any, ids: Any, handle: Any, steps: int, twins: list[Any] = twins) -> Any:
            twins.append(handle)
            return exactness._Run(torch.tensor([1]), zeros, ())

        with SparsePrefixCache(model, prove=False, exactness=mode) as cache:
            monkeypatch.setattr(type(cache), "last_request", info)
            monkeypatch.setattr(exactness, "_run", run)
            exactness._check(model, PROMPTS[0], cache, 1)
            stock, warm, cold = twins
            assert stock is None and warm is cache and cold is not cache and len(cold.store) == 0
            assert isinstance(cold.server, exactness.Replay) == (mode == "replayable")
            if mode == "replayable":
                assert cold.server._lineage == Lineage([96]).decoded(100).then([200])
