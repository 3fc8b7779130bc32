"""Edits that leave no trace, weights that are no parameters, changes in the middle of a prompt, thread counts."""

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import DTYPES, Bench
from tiny_models import build, random_ids

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.models import weights
from hf_sparse_cache.models.samples import Samples, checksum
from hf_sparse_cache.models.weights import identity


def reason(cache: SparsePrefixCache) -> str:
    assert cache.last_request is not None
    return cache.last_request.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", [0, 57, 127])
def test_a_row_of_the_embedding_edited_through_data(dtype: str, row: int) -> None:
    """Noticed within a turn, in 16 bits as well: whichever row it is."""
    model = build("Mamba2", DTYPES[dtype])
    before = str(identity(model))
    model.get_input_embeddings().weight.data[row] += 1
    assert any(str(identity(model)) != before for _ in range(8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edit_of_a_large_tensor_is_noticed_in_its_turn(dtype: str) -> None:
    """More rows than one look compares: each has its turn, and what was not edited raises no alarm."""
    model = torch.nn.ModuleList([torch.nn.Embedding(3_000_000, 2, dtype=DTYPES[dtype])])
    before = str(identity(model))
    turns = 3_000_000 // (128 * 8192) + 1
    assert all(str(identity(model)) == before for _ in range(2 * turns))
    model[0].weight.data[2_999_999] += 1
    looks = next(look for look in range(1, turns + 2) if str(identity(model)) != before)
    assert looks <= turns + 1


def test_samples_have_every_row() -> None:
    for shape in ((5, 7), (4000, 3), (64, 1000), (3, 5000)):
        for row in {0, shape[0] // 2, shape[0] - 1}:
            tensor = torch.zeros(shape)
            samples = Samples([tensor])
            assert samples.all_hold()
            tensor[row] = 1
            assert not samples.all_hold(), (shape, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_checksum_sees_one_value_and_two_rows_that_change_places(dtype: torch.dtype) -> None:
    tensor = (torch.randn(37, 65) * 20).to(dtype)
    before = checksum(tensor)
    for where in ((0, 0), (36, 64), (20, 31)):
        other = tensor.clone()
        other[where] += 1
        assert checksum(other) != before
    assert checksum(tensor.flip(0)) != before and checksum(tensor.flip(1)) != before
    assert checksum(tensor.clone()) == before and checksum(tensor.t().contiguous()) != before


@pytest.mark.parametrize(("where", "factor"), [((3, 5), 2), ((100, 63), -1), ((255, 0), -1)])
def test_a_new_handle_reads_the_weights_anew(where: tuple[int, int], factor: int, tmp_path: Path) -> None:
    """One value or sign, by `.data`: in a shared store, a disk tier and a saved cache nothing old is found."""
    model = build("Jamba")
    bench = Bench("Jamba", model=model)
    stores = [
        CheckpointStore("1GiB"),
        CheckpointStore("1GiB", disk_memory="1GiB", disk_dir=str(tmp_path / "disk")),
    ]
    for store in stores:
        with bench.handle(store=store) as cache:
            bench.warm(cache)
            assert cache.save_pretrained(tmp_path / "saved") > 0
    model.model.layers[0].mamba.in_proj.weight.data[where] *= factor
    with bench.handle() as cache:
        cold = bench.generate(bench.prompt(1), cache)
    for store in stores:
        with bench.handle(store=store) as cache:
            assert bench.generate(bench.prompt(1), cache).equals(cold) and cache.last_request.resumed_tokens == 0
        store.close() if hasattr(store, "close") else None
    with pytest.raises(ValueError, match="other weights"):
        SparsePrefixCache.from_pretrained(tmp_path / "saved", model)


def test_a_save_reads_the_weights_anew(tmp_path: Path) -> None:
    """An edit that nobody noticed: what was stored before it is not saved as of the weights after it."""
    model = build("Jamba")
    bench = Bench("Jamba", model=model)
    with bench.handle() as cache:
        bench.warm(cache)
        model.model.layers[0].mamba.in_proj.weight.data[3, 5] += 1
        assert cache.save_pretrained(tmp_path / "saved") == 0


def test_a_new_handle_of_the_same_weights_finds_everything(tmp_path: Path) -> None:
    bench = Bench("Jamba", model=build("Jamba"))
    with bench.handle() as cache:
        bench.warm(cache)
        cache.save_pretrained(tmp_path)
        store = cache.store
    with bench.handle(store=store) as cache:
        bench.generate(bench.prompt(1), cache)
        assert reason(cache) == "resumed"
    twin = Bench("Jamba", model=build("Jamba"))
    with SparsePrefixCache.from_pretrained(tmp_path, twin.model, policy="balanced") as cache:
        twin.generate(twin.prompt(1), cache)
        assert reason(cache) == "resumed"


# -- weights that are neither parameters nor buffers ------------------------------------------------------------------


def quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["LFM2", "Llama"])
def test_packed_weights_are_weights(family: str, tmp_path: Path) -> None:
    plain = build(family)
    other = copy.deepcopy(plain)
    linear = next(name for name, module in other.named_modules() if type(module) is torch.nn.Linear)
    with torch.no_grad():
        other.get_submodule(linear).weight.mul_(-1.5)
    one, two = (Bench(family, model=quantised(model)) for model in (plain, other))
    with one.handle() as cache:
        one.warm(cache)
        cold = one.generate(one.prompt(1), cache)
        assert one.generate(one.prompt(1), cache).equals(cold) and reason(cache) == "resumed"
        cache.save_pretrained(tmp_path)
        module = one.model.get_submodule(linear)
        packed = module._packed_params._packed_params
        module._packed_params._packed_params = two.model.get_submodule(linear)._packed_params._packed_params
        one.generate(one.prompt(2), cache)
        assert "weights changed" in reason(cache)
        module._packed_params._packed_params = packed
    with pytest.raises(ValueError, match="other weights"):
        SparsePrefixCache.from_pretrained(tmp_path, two.model)
    again = Bench(family, model=quantised(plain))
    with SparsePrefixCache.from_pretrained(tmp_path, again.model, policy="balanced") as cache:
        assert again.generate(again.prompt(1), cache).equals(cold) and reason(cache) == "resumed"


@pytest.mark.parametrize("change", ["replaced", "edited"])
def test_tensors_that_are_plain_attributes(change: str) -> None:
    """As of quantised layers that keep their scales in a dictionary or on the parameter."""
    bench = Bench("Jamba", model=build("Jamba"))
    attention = next(module for module in bench.model.modules() if hasattr(module, "q_proj"))
    attention.scales = {"q": torch.ones(3)}
    attention.q_proj.weight.absmax = torch.ones(4)
    attention.table = torch.ones(100, 100)
    for edit in (
        lambda: attention.scales.update(q=torch.zeros(3)),
        lambda: attention.q_proj.weight.absmax.mul_(2),
        lambda: attention.table.mul_(2) if change == "edited" else setattr(attention, "table", torch.zeros(100, 100)),
    ):
        with bench.handle() as cache:
            bench.warm(cache)
            edit()
            bench.generate(bench.prompt(1), cache)
            assert "weights changed" in reason(cache)


class Gate(torch.nn.Identity):
    """Holds something of its own before torch has given it what every module has."""

    def __init__(self) -> None:
        self.before = 1.0
        super().__init__()


def test_attributes_that_come_before_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what torch gives is passed over by its place, which says nothing where others come first."""
    gate = Gate()
    assert next(iter(vars(gate))) == "before"
    bench = Bench("Jamba", model=build("Jamba"))
    bench.model.model.gate = gate
    with bench.handle() as cache:
        bench.warm(cache)
        gate.before = 2.0
        bench.generate(bench.prompt(1), cache)
        assert "weights changed" in reason(cache)
        monkeypatch.setattr(weights, "_own_from", lambda model: len(vars(torch.nn.Identity())))  # the twin
    with bench.handle() as cache:
        bench.warm(cache)
        gate.before = 3.0
        bench.generate(bench.prompt(1), cache)
        assert reason(cache) == "resumed"


# -- while a prompt is computed ---------------------------------------------------------------------------------------


def trained(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(0.01)


def set_aside(model: Any) -> None:
    model.model.layers[1].some_switch = 5


@pytest.mark.parametrize("change", [trained, set_aside])
def test_a_model_that_changes_in_the_middle_of_a_prompt(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew, once, and what was computed before is not stored as of the model after it, nor the other way."""
    model = build("Jamba")
    bench = Bench("Jamba", model=model)
    forward, turns = type(model).forward, iter([False, True])  # in the second segment

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(turns, False):
            change(model)
        return forward(self, *args, **kwargs)

    with bench.handle() as cache:
        counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(type(model), "forward", counted)
        found = bench.generate(bench.prompt(1), cache)
        assert cache.stats().requests == 1
        assert bench.generate(bench.prompt(1), cache).equals(found) and reason(cache) == "resumed"
        with bench.handle() as fresh:
            assert bench.generate(bench.prompt(1), fresh).equals(found)
        assert bench.generate(bench.prompt(2), cache).distance(bench.generate(bench.prompt(2), None)) <= 1e-4


def test_a_model_that_never_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its forwards moves a weight a little, as some routers do: uncached, with the reason."""
    model = build("Jamba")
    bench = Bench("Jamba", model=model)
    with bench.handle() as cache:
        forward = type(model).forward

        def moving(self: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                self.model.layers[0].input_layernorm.weight.add_(1e-9)
            return forward(self, *args, **kwargs)

        moving.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(type(model), "forward", moving)
        expected = bench.generate(bench.prompt(1), None)
        for _ in range(2):
            assert bench.generate(bench.prompt(1), cache).distance(expected) <= 1e-4
            assert "changed while the prompt was computed" in reason(cache)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("disk", [False, True])
def test_states_belong_to_one_number_of_threads(disk: bool, threads: None, tmp_path: Path) -> None:
    """Sums are taken in another order: what was stored under one number is not matched under another, and stays."""
    extra = {"disk_memory": "1GiB", "disk_dir": str(tmp_path)} if disk else {}
    bench = Bench("Jamba", model=build("Jamba"))
    torch.set_num_threads(1)
    with bench.handle(store=CheckpointStore("1GiB", **extra)) as cache:
        bench.warm(cache)
        torch.set_num_threads(2)
        bench.generate(bench.prompt(1), cache)
        assert cache.last_request.resumed_tokens == 0
        bench.generate(bench.prompt(2), cache)
        assert cache.last_request.resumed_tokens > 0
        torch.set_num_threads(1)
        bench.generate(bench.prompt(3), cache)
        assert cache.last_request.resumed_tokens > 0


def test_switches_of_torch(tmp_path: Path) -> None:
    bench = Bench("Llama", model=build("Llama"))
    with bench.handle() as cache:
        bench.warm(cache)
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            bench.generate(bench.prompt(1), cache)
            assert cache.last_request.resumed_tokens == 0
        finally:
            torch.backends.cuda.enable_flash_sdp(True)
        bench.generate(bench.prompt(2), cache)
        assert cache.last_request.resumed_tokens > 0


def test_ids_are_not_looked_at_twice() -> None:
    """Two models with the same structure never share a name in one process."""
    names = {str(identity(build("Mamba2", seed=seed))).partition(",")[0] for seed in range(3)}
    assert len(names) == 3 and random_ids(3).shape == (1, 3)


@pytest.mark.parametrize("width", [16, 1024])
def test_a_turn_is_one_look_at_a_small_model_and_three_at_a_large_one(width: int) -> None:
    """Wherever the edit is, and whenever in a turn it happens."""
    model = torch.nn.ModuleList([torch.nn.Embedding(5000, width) for _ in range(2)])
    most = 1 if width == 16 else 3
    for look in range(4):
        for table in model:
            for row in (0, 4999):
                before = str(identity(model))
                table.weight.data[row] += 1
                assert any(str(identity(model)) != before for _ in range(most)), (look, row)
        identity(model)
