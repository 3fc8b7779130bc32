"""The name of a model and what hangs on it: how tensors are told apart, what is read anew, what others stored."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guarded import GuardedWeakly, Held

from hf_sparse_cache.models import fingerprint, weights
from hf_sparse_cache.models.samples import checksum
from hf_sparse_cache.models.weights import Identity, forget, identity, unchanged, verified


Patch = pytest.MonkeyPatch


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()


def test_a_name_stays_until_something_changes_and_weights_do_not_come_back() -> None:
    one = model()
    found = identity(one)
    assert identity(one) is found and unchanged(one, found) and not found.packed and found.length_limit == 0
    with torch.no_grad():
        one[0].weight.mul_(2)
    assert not unchanged(one, found)
    later = identity(one)
    assert later.weights != found.weights and (later.settings, later.code) == (found.settings, found.code)
    one.train()
    trained = identity(one)
    assert trained.weights == later.weights and trained.settings != later.settings
    assert identity(one.eval()) == later and not unchanged(one, trained) and unchanged(one, later)
    assert identity(model()).weights not in (found.weights, later.weights)
    forget(one)
    assert identity(one).weights != later.weights and forget(torch.nn.Linear(1, 1)) is None
    assert str(Identity("w", "s", "c", "p")) == "w, settings s, code c"


def test_an_edit_without_a_trace_shows_when_everything_is_read(monkeypatch: Patch) -> None:
    monkeypatch.setattr(weights.Samples, "hold", lambda self: True)
    monkeypatch.setattr(weights.Samples, "all_hold", lambda self: True)
    one = model()
    named = identity(one)
    read = verified(one)
    assert read.weights != named.weights  # nobody had read it before: it may have been edited since it was named
    assert verified(one) == read == identity(one)
    one[0].weight.data[0, 0] += 1
    assert identity(one) == read  # not seen
    again = verified(one)
    assert again.weights != read.weights and verified(one) == again
    fresh = model()
    first = verified(fresh)
    assert verified(fresh) == first  # read at once: nothing was missed


def test_what_is_looked_at_behind_a_forward_is_all_but_values() -> None:
    """Those come to light at the next first look."""
    one = model()
    found = identity(one)
    assert not unchanged(model(), found)
    one[0].bias.data.add_(1)
    assert unchanged(one, found) and identity(one) != found and not unchanged(one, found)
    forget(one)
    assert not unchanged(one, found)


def test_a_name_says_what_others_attached_first() -> None:
    one, plain = model(), identity(model())
    assert (plain.foreign, plain.by_call) == ("", "")
    for part in (one[0], one[1]):
        part.register_forward_hook(lambda module, args, output: None)
    found = identity(one)
    assert found.foreign == "the hook on BatchNorm1d 1" and found.settings == plain.settings
    assert len({found.attached, plain.attached}) == len({found.code, plain.code}) == 2
    assert found.proved_by != plain.proved_by
    one[0].rate = 3
    assert identity(one).proved_by != found.proved_by and identity(one).code == found.code
    assert identity(one).attached == found.attached


def test_a_module_that_is_absent_is_passed_over() -> None:
    one = model()
    one.register_module("nothing", None)
    found = identity(one)
    assert identity(one) is found and unchanged(one, found)


def test_names_are_given_under_a_lock(monkeypatch: Patch) -> None:
    lock, one = Held(), model()
    monkeypatch.setattr(weights, "_lock", lock)
    monkeypatch.setattr(weights, "_known", GuardedWeakly(lock))
    found = identity(one)
    assert unchanged(one, found) and verified(one) and lock.taken == 3 and lock.depth == 0
    forget(one)
    assert lock.taken == 4
    monkeypatch.setattr(weights, "identity", lambda model: found)
    assert unchanged(one, found) and lock.taken == 5


def test_values_are_compared_by_address_and_version() -> None:
    with torch.inference_mode():
        given = torch.ones(3)
    one, two = torch.ones(3), torch.ones(3)
    values = weights._Values([one, given, two])
    assert values.untouched() and values.samples_hold() and values.agree(values)
    one.add_(0)
    assert not values.untouched()
    one.sub_(0)
    assert not values.untouched() and not values.agree(weights._Values([one]))
    values = weights._Values([one, two])
    assert values.agree(weights._Values([two])) and values.agree(weights._Values([torch.zeros(3)]))
    two.data = torch.ones(3)
    assert not values.untouched() and not values.agree(weights._Values([one, two]))
    values = weights._Values([one])
    one.data[0] = 5
    assert values.untouched() and not values.agree(weights._Values([one]))
    assert not values.samples_hold()


def test_weights_that_come_and_go_are_the_same_and_others_are_not() -> None:
    one = model()

    def watch() -> Any:
        return weights._Watch(one, None)

    before = watch()
    assert before._same_weights(watch())
    own = one[0].weight
    one[0].weight = torch.nn.Parameter(own.to("meta"))
    away = watch()
    assert before._same_weights(away) and away._same_weights(before)
    assert (
        weights._Watch(one, before).inherited
        and weights._Watch(one, before).identity.weights == before.identity.weights
    )
    one[0].weight = torch.nn.Parameter(own.detach().clone())
    assert not before._same_weights(watch()) and not weights._Watch(one, before).inherited
    one[0].weight = own
    one[0].more = torch.nn.Parameter(torch.ones(1))
    assert not before._same_weights(watch()) and not watch()._same_weights(before)
    del one[0].more
    assert before._same_weights(watch())
    with torch.no_grad():
        own.mul_(1)
    assert not before._same_weights(watch())


def hooked(one: Any) -> None:
    one[0].register_forward_hook(lambda module, args, output: None)


def pre_hooked(one: Any) -> None:
    one[0].register_forward_pre_hook(lambda module, args: None)


CHANGES: dict[str, Any] = {
    "a mode": lambda one: one[1].train(),
    "an attribute": lambda one: setattr(one[1], "eps", 0.5),
    "a further attribute": lambda one: setattr(one[1], "more", 1),
    "a parameter": lambda one: setattr(one[0], "weight", torch.nn.Parameter(torch.ones(4, 4))),
    "a parameter less": lambda one: setattr(one[0], "bias", None),
    "a parameter gone": lambda one: delattr(one[0], "bias"),
    "a buffer more": lambda one: one[0].register_buffer("more", torch.ones(1)),
    "a buffer": lambda one: setattr(one[1], "running_mean", torch.ones(4)),
    "a module": lambda one: setattr(one[0], "inner", torch.nn.Identity()),
    "another class": lambda one: setattr(one[0], "__class__", type("Heir", (torch.nn.Linear,), {})),
    "a hook": hooked,
    "a hook before": pre_hooked,
    "in place": lambda one: one[1].running_var.add_(1),
    "through data": lambda one: one[0].bias.data.add_(1),
    "memory": lambda one: setattr(one[0].bias, "data", one[0].bias.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_glance_shows_every_change(change: str) -> None:
    one = model()
    watch = weights._Watch(one, None)
    assert watch.still_holds(one) and watch.looks_alike(one)
    CHANGES[change](one)
    assert not watch.still_holds(one) and watch.looks_alike(one) is (change == "through data")


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules_shows(register: str) -> None:
    one = model()
    watch = weights._Watch(one, None)
    handle = getattr(torch.nn.modules.module, register)(lambda *args: None)
    assert not watch.looks_alike(one)
    handle.remove()
    assert watch.looks_alike(one)


def test_what_torch_gives_every_module_is_passed_over_where_it_comes_first() -> None:
    one = model()
    count = len(vars(torch.nn.Module()))
    assert weights._own_from(one) == count
    del one[0].__dict__["_buffers"]
    one[0].__dict__["_buffers"] = {}
    assert weights._own_from(one) == 0
    watch = weights._Watch(one, None)
    assert watch.looks_alike(one)
    one[0].in_features = 5
    assert not watch.looks_alike(one)


class Packed(torch.Tensor):
    """A weight of two parts."""

    @staticmethod
    def __new__(cls, *parts: torch.Tensor) -> Any:
        return torch.Tensor._make_subclass(cls, torch.zeros(1))

    def __init__(self, *parts: torch.Tensor) -> None:
        self.names = [f"part{index}" for index in range(len(parts))]
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        return (
            self._parts[int(name.removeprefix("part"))] if name.startswith("part") else super().__getattribute__(name)
        )

    def __tensor_flatten__(self) -> Any:
        return self.names, None


def test_the_parts_of_a_weight() -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)

    def same(found: Any, *expected: torch.Tensor) -> bool:
        found = list(found)
        return len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))

    assert same(weights.plain_parts(one), one) and same(weights.plain_parts("word"))
    assert same(weights.plain_parts(one.to("meta"))) and same(weights.contents(one), one)
    assert same(weights.plain_parts(Packed(one, two)), one, two)
    carrying = torch.ones(4)
    carrying.scales, carrying.state, carrying.word = two, SimpleNamespace(absmax=three, code=3), "a"  # type: ignore[attr-defined]
    assert same(weights.plain_parts(carrying), carrying, two, three)
    assert same(weights._tensors_in([one, (two, [three, 4]), {"a": one}, "word"]), one, two, three)
    assert weights._away(one.to("meta")) and not weights._away(one) and not weights._away("word")


def test_a_checksum_names_every_weight_by_its_path() -> None:
    one = weights._Watch(model(), None)
    same = weights._Watch(model(), None)
    assert one.checksum() == same.checksum()
    swapped = model()
    swapped[1].weight.data, swapped[1].bias.data = swapped[1].bias.data, swapped[1].weight.data
    assert weights._Watch(swapped, None).checksum() != one.checksum()
    edited = model()
    edited[0].weight.data[3, 3] += 1
    assert weights._Watch(edited, None).checksum() != one.checksum()
    before = one.identity
    one.renew()
    assert one.identity.weights != before.weights and one.identity[1:] == before[1:]


# -- in every process -------------------------------------------------------------------------------------------------

SAVED = {"model": "Jamba", "weights": "a", "threads": 2, "devices": ["cpu"], "torch": "2"}


@pytest.mark.parametrize(
    ("current", "names", "said"),
    [
        ({}, [], []),
        ({"torch": "3", "model": "B"}, ["model", "torch"], ["model Jamba instead of B", "torch 2 instead of 3"]),
        ({"weights": "b"}, ["weights"], ["other weights"]),
        ({"devices": ["b"], "model": "B"}, ["model", "devices"], None),
        ({"config": "b", "modules": "c"}, ["config", "modules"], ["other config", "other modules, adapters or hooks"]),
        ({"settings": "d"}, ["settings"], ["other settings of modules, or adapters"]),
        ({"threads": 4}, ["threads"], ["threads 2 instead of 4"]),
        ({"threads": "2"}, ["threads"], ['threads 2 instead of "2"']),
        ({"threads": 4, "devices": ["cuda"]}, ["devices"], ["devices ['cpu'] instead of ['cuda']"]),
        ({"threads": 4, "devices": ["cuda", "cpu x"]}, ["devices", "threads"], None),
        ({"more": 1}, ["more"], ["more absent instead of 1"]),
        ({"torch": "x" * 300}, ["torch"], [f"torch 2 instead of {'x' * 200}"]),
    ],
)  # fmt: skip
def test_what_two_descriptions_disagree_on(current: dict[str, Any], names: list[str], said: Any) -> None:
    now = {**SAVED, **current}
    assert fingerprint.different(SAVED, now) == names
    if said is not None:
        assert fingerprint.differences(SAVED, now) == said
    long = fingerprint.differences(now, SAVED)
    assert len(long) == len(fingerprint.different(now, SAVED)) and all(len(word) < 260 for word in long)


def test_the_order_in_which_something_is_said_is_no_difference() -> None:
    one, other = {"kernels": {"a": "1", "b": "2"}}, {"kernels": {"b": "2", "a": "1"}}
    assert fingerprint.different(one, other) == [] and fingerprint.different(one, {"kernels": {"a": "2", "b": "1"}})


def test_threads_matter_on_a_cpu() -> None:
    matter = fingerprint.threads_matter
    assert matter({}) and matter({"devices": ["cpu AVX"]}) and matter({"devices": ["cuda", "cpu"]})
    assert not matter({"devices": ["cuda"]}) and not matter({"devices": []})
    assert fingerprint.different({"threads": 1}, {"devices": ["cuda"], "threads": 2}) == ["devices"]


def test_why_what_others_stored_does_not_fit() -> None:
    def space(**values: Any) -> str:
        return fingerprint.durable_space({**SAVED, **values}, "name")

    own = space()
    assert own == json.dumps(SAVED, sort_keys=True, separators=(",", ":")) + "\x1fname"
    assert fingerprint.unlike("no json", []) == "" == fingerprint.unlike(own, [space(weights="b", torch="1")])
    assert fingerprint.unlike(own, ["no json\x1f", "[1]\x1f", "3"]) == ""
    said = fingerprint.unlike(own, ["no json", space(torch="1"), space(torch="1", threads=3), space(torch="1")])
    assert said == (
        "What others stored of this model does not fit: it was made with torch 1 instead of 2; or with "
        "threads 3 instead of 2, torch 1 instead of 2."
    )


def bound(namespace: str = "name", rounds: bool = False, one: Any = None) -> Any:
    class Bound(SimpleNamespace):
        __hash__ = object.__hash__

    rounding = SimpleNamespace(rounds=rounds, scheme="int8 of all")
    return Bound(model=one, rounding=rounding, config=SimpleNamespace(namespace=namespace))


NAMED = Identity("model-7", "settings", "code")


def test_a_store_that_dies_with_the_process_names_weights_at_no_cost(monkeypatch: Patch) -> None:
    monkeypatch.setattr(fingerprint, "describe", lambda binding: pytest.fail("it reads all weights"))
    monkeypatch.setattr(fingerprint, "_modes", lambda model: "modes")
    device = "cpu"
    monkeypatch.setattr(fingerprint, "input_device", lambda model: torch.device(device))
    threads = torch.get_num_threads()
    start = "model-7, settings settings, code code, threads"
    assert fingerprint.space_of(bound(), NAMED, False) == f"{start} {threads}, modes\x1fname"
    assert (
        fingerprint.space_of(bound("b", True), NAMED, False) == f"{start} {threads}, modes, kept as int8 of all\x1fb"
    )
    device = "meta"
    assert fingerprint.space_of(bound(), NAMED, False) == f"{start} any, modes\x1fname"


def test_a_durable_space_is_described_once_for_each_state_of_a_model(monkeypatch: Patch) -> None:
    described: list[Any] = []
    modes, devices = "modes", ["cpu"]
    monkeypatch.setattr(fingerprint, "describe", lambda binding: described.append(binding) or {"devices": devices})
    monkeypatch.setattr(fingerprint, "_modes", lambda model: modes)
    monkeypatch.setattr(fingerprint, "_processor", lambda: "a processor")
    one = bound()
    expected = fingerprint.durable_space({"devices": ["cpu"], "cpu": "a processor"}, "name")
    assert fingerprint.space_of(one, NAMED, True) == expected == fingerprint.space_of(one, NAMED, True)
    assert described == [one]
    fingerprint.space_of(one, NAMED._replace(weights="model-8"), True)
    modes = "others"
    fingerprint.space_of(one, NAMED._replace(weights="model-8"), True)
    assert len(described) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    fingerprint.space_of(one, NAMED._replace(weights="model-8"), True)
    assert len(described) == 4
    devices = ["cuda"]
    assert fingerprint.space_of(bound(), NAMED, True) == fingerprint.durable_space({"devices": ["cuda"]}, "name")


def test_weights_are_read_once_until_one_changes(monkeypatch: Patch) -> None:
    one, read, own = model(), list[str](), fingerprint._tensor_digest
    lock = Held()
    monkeypatch.setattr(fingerprint, "_lock", lock)
    monkeypatch.setattr(fingerprint, "_digests", GuardedWeakly(lock))
    monkeypatch.setattr(fingerprint, "_tensor_digest", lambda name, tensor: read.append(name) or own(name, tensor))
    first = fingerprint.weights_digest(one)
    names = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(read) == names and len(read) == len(names)
    assert fingerprint.weights_digest(one) == first and len(read) == len(names)
    assert fingerprint.weights_digest(model()) == first
    with torch.no_grad():
        one[0].weight[0, 0] += 1
    assert fingerprint.weights_digest(one) != first
    with torch.no_grad():
        one[0].weight[0, 0] -= 1


def test_what_can_be_read_is_read_in_one_order(monkeypatch: Patch) -> None:
    one = model()
    one[0].kept = torch.ones(3)
    names = [name for name, _ in fingerprint._readable(one)]
    assert names == [*sorted(names[:-1]), "0.kept"] and len(names) == 8
    one[0].to("meta")
    with pytest.raises(ValueError, match=r"0\.bias and 1 more"):
        fingerprint._readable(one)
    one = model()
    one[0].kept = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=r"packed in 0\.kept cannot be read"):
        fingerprint._readable(one)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_digest_of_a_tensor_has_its_name_its_kind_and_every_byte() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    digest = fingerprint._tensor_digest
    same = digest("a", tensor)
    assert same == digest("a", tensor.T.contiguous().T) == digest("a", tensor.clone().requires_grad_())
    others = [digest("b", tensor), digest("a", tensor.reshape(3, 2)), digest("a", tensor.view(torch.int32))]
    quantized = torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8)
    others += [
        digest("a", tensor + 1),
        digest("a", quantized),
        digest("a", torch.quantize_per_tensor(tensor + 1, 1.0, 0, torch.qint8)),
    ]
    assert len({same, *others}) == 7


def test_what_files_are_named_by_is_the_same_in_every_release() -> None:
    """Or nothing that was stored before is found again."""
    assert fingerprint._tensor_digest("a", torch.arange(6.0).reshape(2, 3)) == "dc193460a136560a487da19fcf957786"
    assert fingerprint._digest("a") == "27c35e6e9373877f29e562464e46497e"
    assert checksum(torch.arange(300.0).reshape(3, 100)) == "torch.float32(3, 100)61c4124b8463e6c4"


def test_a_configuration_counts_by_what_says_something_of_arithmetic() -> None:
    values = {"a": 1, "dtype": torch.float32, "_name_or_path": "x", "transformers_version": "5", "architectures": [],
              "_commit_hash": "c", "inner": {"architectures": []}}  # fmt: skip
    config = SimpleNamespace(to_dict=lambda: values)
    assert fingerprint.config_values(config) == {"a": 1, "dtype": "torch.float32", "inner": {"architectures": []}}


def found(**given: Any) -> Any:
    return SimpleNamespace(
        **{"code": ["c"], "foreign": [], "opaque": False, "adapted": [], "settings": ["s"], **given}
    )


def test_code_and_settings_that_others_cannot_know_are_of_this_process(monkeypatch: Patch) -> None:
    modules, settings, config = fingerprint._modules_digest, fingerprint._settings_digest, SimpleNamespace()
    said = [modules(config, found()), modules(config, found(code=["d"])), modules(config, found(foreign=["hook"])),
            modules(SimpleNamespace(_attn_implementation="sdpa"), found()),
            modules(SimpleNamespace(_experts_implementation="sdpa"), found()),
            settings(found()), settings(found(adapted=["a"])), settings(found(opaque=True)),
            settings(found(settings=["t"]))]  # fmt: skip
    assert len(set(said)) == len(said) and modules(config, found()) == said[0] and settings(found()) == said[5]
    assert modules(SimpleNamespace(_attn_implementation=None), found()) == said[0]
    assert modules(SimpleNamespace(_attn_implementation="eager"), found()) not in said
    monkeypatch.setattr(fingerprint, "_THIS_PROCESS", "another process")
    assert modules(config, found()) == said[0] and settings(found()) == said[5]
    assert modules(config, found(foreign=["hook"])) not in said and settings(found(opaque=True)) not in said


class Built(torch.nn.Module):
    """A model that its configuration makes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        if config.fails:
            raise RuntimeError("it cannot be built without data")
        self.inner = torch.nn.Linear(2, 2)
        config.built = True
        self.rate = config.rate


class Described(torch.nn.Module):
    """A model of two types of numbers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.rate, self.device = config, config.rate, torch.device("cpu")
        self.one, self.other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).half()

    def get_input_embeddings(self) -> None:
        return None


def test_a_description_is_of_all_that_decides_bits(monkeypatch: Patch) -> None:
    config = SimpleNamespace(rate=1, _attn_implementation="sdpa", to_dict=lambda: {"rate": 1, "dtype": torch.half})
    one = Described(config).eval()
    expected = {
        "format": 1, "model": "Described", "weights": fingerprint.weights_digest(one), "attention": "sdpa",
        "modules": fingerprint._modules_digest(config, fingerprint.surveys.survey(one)), "experts": "None",
        "config": fingerprint._digest('{"dtype": "torch.float16", "rate": 1}'),
        "dtype": ["torch.float16", "torch.float32"], "modes": fingerprint.arithmetic.modes("cpu"),
        "devices": [fingerprint.arithmetic.device_name(torch.device("cpu"))], "threads": torch.get_num_threads(),
        "kernels": fingerprint.arithmetic.kernels(), "torch": torch.__version__,
        "transformers": fingerprint.transformers.__version__,
    }  # fmt: skip
    found = fingerprint.describe(bound(one=one))
    # Nobody had read the weights before, which may have been edited since they were named.
    assert found == expected and json.loads(json.dumps(found)) == found
    assert fingerprint.describe(bound(rounds=True, one=one)) == {**expected, "storage": "int8 of all"}
    monkeypatch.setattr(fingerprint, "_on_cuda", lambda model: True)
    monkeypatch.setattr(fingerprint.arithmetic, "libraries", lambda: {"cuda": "12"})
    assert fingerprint.describe(bound(one=one)) == {**expected, "libraries": {"cuda": "12"}}
    one.rate = 2
    said = fingerprint._settings_digest(fingerprint.surveys.survey(one))
    assert fingerprint.describe(bound(one=one)) == {**expected, "libraries": {"cuda": "12"}, "settings": said}


def test_weights_that_were_edited_without_a_trace_are_described_as_they_are(monkeypatch: Patch) -> None:
    monkeypatch.setattr(weights.Samples, "hold", lambda self: True)
    monkeypatch.setattr(weights.Samples, "all_hold", lambda self: True)
    one = Described(SimpleNamespace(rate=1, to_dict=dict)).eval()
    before = fingerprint.describe(bound(one=one))
    one.one.weight.data[0, 0] += 1
    after = fingerprint.describe(bound(one=one))
    assert fingerprint.different(before, after) == ["weights"]
    assert after["experts"] == after["attention"] == "None"


@pytest.mark.parametrize(
    ("there", "inputs", "on"), [(False, "cpu", False), (True, "cpu", True), (False, "cuda", True)]
)
def test_a_model_is_on_a_gpu_where_a_weight_is_or_its_inputs_are(there: int, inputs: str, on: bool) -> None:
    held = [SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=bool(there))]
    device = torch.device(inputs)
    one = SimpleNamespace(parameters=lambda: iter(held), get_input_embeddings=lambda: None, device=device)
    assert fingerprint._on_cuda(one) is on
    assert fingerprint._modes(one) == fingerprint.arithmetic.modes(inputs)


def test_weights_of_another_name_are_read_whichever_comes_first(monkeypatch: Patch) -> None:
    one = model()
    for name in ("model-5", "model-3", "model-7", "model-10"):
        monkeypatch.setattr(fingerprint, "identity", lambda model, name=name: NAMED._replace(weights=name))
        one[0].bias.data.add_(1)
        found = fingerprint.weights_digest(one)
        assert found == fingerprint._digest("".join(fingerprint._tensor_digest(*each) for each in named(one)))


def named(one: Any) -> list[Any]:
    return sorted([*one.named_parameters(), *one.named_buffers()], key=lambda each: each[0])


def test_weights_are_read_wherever_nobody_knows_how_many_processors_there_are(monkeypatch: Patch) -> None:
    one = model()
    expected = fingerprint.weights_digest(one)
    monkeypatch.setattr(fingerprint.os, "cpu_count", lambda: None)
    assert fingerprint.weights_digest(model()) == expected


def test_settings_that_follow_from_the_configuration_need_no_words() -> None:
    config = SimpleNamespace(fails=False, rate=1, built=True)
    one = Built(config).eval()
    follows, look = fingerprint._follows_from_config, fingerprint.surveys.survey
    state = torch.get_rng_state()
    assert follows(one, look(one)) and torch.equal(torch.get_rng_state(), state)
    opaque = look(one)
    opaque.opaque = True
    adapted = look(one)
    adapted.adapted.append("a")
    assert not follows(one, opaque) and not follows(one, adapted)
    one.rate = 2
    assert not follows(one, look(one))
    one.rate = 1
    config.fails = True
    assert not follows(one, look(one))


def test_a_processor_has_a_name_wherever_the_system_says_it(monkeypatch: Patch) -> None:
    text = "processor : 0\nmodel name\t: Some CPU: fast \nmodel name\t: another\n"
    monkeypatch.setattr(fingerprint.Path, "read_text", lambda path, **given: text)
    assert fingerprint._processor.__wrapped__() == "Some CPU: fast"
    monkeypatch.setattr(fingerprint.platform, "processor", lambda: "as python has it")
    text = "nothing"
    assert fingerprint._processor.__wrapped__() == "as python has it"

    def none(path: Any, **given: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(fingerprint.Path, "read_text", none)
    assert fingerprint._processor.__wrapped__() == "as python has it"
