"""Routing: the longest prefix, load, sessions, replicas that come and go; beside a naive account of the same."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np
import pytest
from cutting import every
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hf_sparse_cache.planning.cuts import Tokens
from hf_sparse_cache.planning.policies import make_policy
from hf_sparse_cache.request import open_request
from hf_sparse_cache.routing.digest import Digest, DigestEntry, Publisher
from hf_sparse_cache.routing.index import Index, Seen
from hf_sparse_cache.routing.names import Keys, Names, PaperKeys
from hf_sparse_cache.routing.router import PrefixRouter, Rules
from hf_sparse_cache.simulator import Sized
from hf_sparse_cache.store.store import CheckpointStore


BLOCK = 4
KEYS = Keys(b"a secret of the tests", BLOCK)
texts = st.lists(st.integers(0, 1), min_size=1, max_size=30).map(lambda ids: np.asarray(ids, dtype=np.int32))


def names(ids: Tokens, namespace: str = "", keys: Keys = KEYS) -> Names:
    return Names(keys, namespace, ids)


def entry(ids: Tokens, position: int) -> DigestEntry:
    named, (block, tail) = names(ids), divmod(position, BLOCK)
    return DigestEntry(named.at(position), named.anchors[block], tail)


def usable(prefix: Tokens, ids: Tokens) -> bool:
    """Whether a prompt resumes behind a prefix: it begins with it, and leaves two tokens or none to compute."""
    left = len(ids) - len(prefix)
    return (left >= 2 or left == 0) and bool((ids[: len(prefix)] == prefix).all())


def read(store: CheckpointStore, ids: Tokens, space: str = "") -> None:
    with open_request(store, make_policy("last"), ids, every(3), space=space) as request:
        for position in request.planned:
            request.add(position, Sized(1))


class Fleet(RuleBasedStateMachine):
    """An index beside what it should know: for each replica the prefixes stored, and those it was sent lately."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.stored: dict[str, list[Tokens]] = {}
        self.sent: dict[str, list[tuple[int, Tokens]]] = {}

    @rule(replica=st.sampled_from("abc"), prefixes=st.lists(texts, max_size=4))
    def says(self, replica: str, prefixes: list[Tokens]) -> None:
        self.index.published(replica, Digest(entry(ids, len(ids)) for ids in prefixes))
        self.stored[replica] = prefixes
        self.sent[replica] = [(age + 1, ids) for age, ids in self.sent.get(replica, []) if age < 1]

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), ids=texts)
    def is_sent(self, data: st.DataObject, ids: Tokens) -> None:
        replica = data.draw(st.sampled_from(sorted(self.stored)))
        self.index.routed(names(ids), replica)
        self.sent[replica].append((0, ids))

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.stored)))
        del self.stored[gone], self.sent[gone]
        self.index.keep(self.stored)

    @rule(ids=texts)
    def finds_the_longest(self, ids: Tokens) -> None:
        wanted = {name: max([0, *self.prefixes(name, ids)]) for name in self.stored}
        assert self.index.lengths(names(ids), list(self.stored)) == wanted
        longest, holders = self.index.longest(names(ids), list(self.stored))
        assert longest == max(wanted.values(), default=0)
        assert sorted(holders) == sorted(name for name, length in wanted.items() if length == longest)

    def prefixes(self, name: str, ids: Tokens) -> list[int]:
        stored = [prefix for prefix in self.stored[name] if len(prefix)]
        read = [other[: n * BLOCK] for _, other in self.sent[name] for n in range(1, len(other) // BLOCK + 1)]
        return [len(prefix) for prefix in [*stored, *read] if len(prefix) <= len(ids) and usable(prefix, ids)]

    @invariant()
    def forgets_what_is_gone(self) -> None:
        assert self.stored or not len(self.index)


Fleet.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestFleet = Fleet.TestCase


@given(prompts=st.lists(texts, max_size=12), ids=texts)
@settings(max_examples=80, deadline=None)
def test_a_digest_says_what_a_store_would_resume(prompts: list[Tokens], ids: Tokens) -> None:
    store = CheckpointStore(5)
    for prompt in prompts:
        read(store, prompt)
    index = Index()
    index.published("a", Digest.from_bytes(Publisher(store, KEYS).digest().to_bytes()))
    stored = [path for _, path, _ in store.checkpoints()]
    wanted = max([0, *(len(path) for path in stored if len(path) <= len(ids) and usable(path, ids))])
    assert index.longest(names(ids), ["a"])[0] == wanted


def test_a_digest_of_wrong_tokens_is_noticed() -> None:
    """The twin of the above: with another token, another key, or another tenant, nothing is found."""
    ids = np.arange(30, dtype=np.int32)
    store = CheckpointStore(5)
    read(store, ids, "weights\x1fann")
    index = Index()
    index.published("a", Publisher(store, KEYS).digest())
    assert index.longest(names(ids, "ann"), ["a"])[0] == 27
    other = ids.copy()
    other[3] = 7
    strangers = Keys(b"another secret, as long", BLOCK)
    for stranger in (names(other, "ann"), names(ids, "bob"), names(ids), names(ids, "ann", strangers)):
        assert index.longest(stranger, ["a"])[0] == 0


def test_a_digest_tells_no_tokens_and_nothing_of_other_tenants() -> None:
    ids = np.arange(1000, 1600, dtype=np.int32)
    found: list[set[int]] = []
    for space in ("weights\x1fann", "weights\x1fbob"):
        store = CheckpointStore(50)
        read(store, ids, space)
        digest = Publisher(store, KEYS).digest()
        assert digest.to_bytes() == Publisher(store, KEYS).digest().to_bytes() and len(digest) == 1
        assert len(digest.to_bytes()) == 17 * len(digest)
        assert not any(ids[start : start + 2].tobytes() in digest.to_bytes() for start in range(599))
        found.append({number for one in digest for number in (one.name, one.anchor)})
    assert found[0].isdisjoint(found[1])


def test_what_is_evicted_is_no_longer_said_and_what_is_new_is() -> None:
    store = CheckpointStore(1)
    publisher, index = Publisher(store, KEYS), Index()
    first, second = (np.arange(start, start + 30, dtype=np.int32) for start in (0, 100))
    for ids, other in ((first, second), (second, first)):
        read(store, ids)
        index.published("a", publisher.digest())
        assert index.longest(names(ids), ["a"])[0] == 27
        assert index.longest(names(other), ["a"])[0] == 0
    assert len(index) == len(publisher.digest()) == 1


def test_a_long_digest_keeps_what_was_used_last() -> None:
    store = CheckpointStore(100)
    prompts = [np.arange(start, start + 30, dtype=np.int32) for start in range(0, 1000, 50)]
    for ids in prompts:
        read(store, ids)
    index = Index()
    index.published("a", Publisher(store, KEYS, most=5).digest())
    assert [index.longest(names(ids), ["a"])[0] for ids in prompts] == [0] * 15 + [27] * 5


def holding(*holders: str, ids: Tokens, among: str = "abcd", **rules: int) -> PrefixRouter:
    router = PrefixRouter(Rules(**{"least_tokens": BLOCK, **rules}), seed=0)
    router.keep(list(among))
    for name in holders:
        router.published(name, Digest([entry(ids, len(ids) - 2)]))
    return router


IDS = np.arange(30, dtype=np.int32)


@pytest.mark.parametrize(("tail", "most"), [(0, 12), (40, 3)])
def test_the_holder_takes_it_until_it_has_too_much_to_do(tail: int, most: int) -> None:
    """Later where the prefix is half of the prompt or more."""
    router = holding("c", ids=IDS, most_ahead=3)
    asked = names(np.concatenate([IDS, np.arange(tail, dtype=np.int32)]))
    loads = dict.fromkeys("abcd", 1.0)
    assert router.choose(asked, None, loads | {"c": 1.0 + most}) == "c"
    chosen = Counter(router.choose(asked, None, loads | {"c": 2.0 + most, "d": 2.0}) for _ in range(300))
    assert chosen["c"] == 0 and chosen["a"] > 50 and chosen["b"] > 50
    assert chosen["d"] == 0  # of any two it is the one with more to do
    twin = holding(ids=IDS, most_ahead=3)
    assert len({twin.choose(names(IDS), None, loads) for _ in range(100)}) == 4


def test_of_two_holders_the_one_with_less_to_do_takes_it() -> None:
    router = holding("b", "c", ids=IDS)
    assert router.choose(names(IDS), None, {"a": 0.0, "b": 2.0, "c": 1.0, "d": 0.0}) == "c"
    assert {router.choose(names(IDS), None, dict.fromkeys("abcd", 0.0)) for _ in range(100)} == {"b", "c"}


def test_what_was_read_and_not_stored_draws_its_like() -> None:
    router = holding(ids=IDS)
    loads = dict.fromkeys("abcd", 0.0)
    first = router.choose(names(IDS), None, loads)
    router.routed(names(IDS), None, first)
    for _ in range(3):  # what was sent counts as stored no longer, and is remembered
        router.published(first, Digest())
    other = np.concatenate([IDS[:20], IDS[:9]])
    assert router.index.longest(names(other), list(loads))[0] == 0
    assert {router.choose(names(other), None, loads) for _ in range(50)} == {first}
    short = np.concatenate([IDS[:3], IDS[:9]])  # shorter than least_tokens: anybody
    # Of two it is never the one that got most lately.
    assert {router.choose(names(short), None, loads) for _ in range(100)} == {*"abcd"} - {first}


def test_sessions_stay_until_their_replica_is_gone_or_has_too_much_to_do() -> None:
    router = holding("c", ids=IDS, most_ahead=2)
    session, loads = KEYS.session("", "chat-1"), dict.fromkeys("abcd", 0.0)
    router.routed(None, session, "a")
    assert router.choose(names(IDS), session, loads | {"a": 8.0}) == "a"
    assert router.choose(names(IDS), KEYS.session("ann", "chat-1"), loads) == "c"
    assert router.choose(names(IDS), session, loads | {"a": 9.0}) == "c"
    loads.pop("a")
    assert router.choose(names(IDS), session, loads) == "c"
    router.routed(names(IDS), session, "c")
    assert router.choose(names(IDS), session, loads) == "c"


def test_what_few_tokens_bring_together_spreads_and_conversations_stay() -> None:
    """One short prefix, many conversations: their first prompts go to all, and each goes on where it began."""
    router, loads = holding("c", ids=IDS), dict.fromkeys("abcd", 0.0)
    twin = holding("c", ids=IDS, most_share=10**6)
    began: dict[int, str] = {}
    for number in range(400):
        text = np.concatenate([IDS, np.full(60, number, dtype=np.int32)])
        began[number] = router.choose(names(text), None, loads)
        router.routed(names(text), None, began[number])
        held = twin.choose(names(text), None, loads)
        twin.routed(names(text), None, held)
        assert held == "c"
    assert max(Counter(began.values()).values()) <= 1.3 * 100
    for number in range(0, 400, 7):
        more = np.concatenate([IDS, np.full(60, number, dtype=np.int32), IDS])
        assert router.choose(names(more), None, loads) == began[number]


def test_a_new_replica_is_not_given_everything() -> None:
    router = holding(ids=IDS, among="abc")
    for number in range(900):
        router.routed(None, None, "abc"[number % 3])
    router.keep([*"abcd"])
    loads = dict.fromkeys("abcd", 0.0)
    chosen = Counter()
    for _ in range(200):
        name = router.choose(None, None, loads)
        router.routed(None, None, name)
        chosen[name] += 1
    assert 20 < chosen["d"] < 100


def test_sessions_are_bounded() -> None:
    router = holding(ids=IDS, most_sessions=10)
    for number in range(30):
        router.routed(None, number, "abcd"[number % 4])
    loads = dict.fromkeys("abcd", 0.0)
    assert [router.choose(None, number, loads) for number in range(20, 30)] == [*"abcdabcdab"]
    assert len({router.choose(None, 1, loads) for _ in range(100)}) == 3  # b got the last one


def test_a_replica_that_died_is_never_chosen_and_its_successor_holds_nothing() -> None:
    router = holding("c", ids=IDS)
    router.routed(names(IDS), 1, "c")
    router.keep([*"abd"])
    loads = dict.fromkeys("abd", 0.0)
    assert {router.choose(names(IDS), 1, loads) for _ in range(100)} == {*"abd"}
    router.keep([*"abde"])  # takes the place that c had
    assert len({router.choose(names(IDS), 1, loads | {"e": 0.0}) for _ in range(100)}) == 4


def test_nobody_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no replica"):
        PrefixRouter().choose(None, None, {})
    for rules in (
        {"most_ahead": -1},
        {"most_share": 0},
        {"most_share": float("nan")},
        {"least_tokens": 0},
        {"most_sessions": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(rules))):
            Rules(**rules)
    with pytest.raises(ValueError, match="secret has 5 bytes"):
        Keys(b"short")
    with pytest.raises(ValueError, match="block must be between"):
        Keys(block=300)
    with pytest.raises(ValueError, match="no multiple of 17"):
        Digest.from_bytes(b"12345")


def test_memory_of_the_index_is_bounded() -> None:
    index = Index(most_seen=100)
    generator = np.random.default_rng(0)
    for _ in range(200):
        ids = generator.integers(0, 9, 20).astype(np.int32)
        index.routed(names(ids), "a")
        index.published("a", Digest([entry(ids, 18)]))
    assert len(index) == 1 and len(index._seen) <= 100 and len(index._sent) <= 10
    assert len(index._tails) <= 4096 + 1


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=6)), max_size=40),
    st.integers(1, 12),
)
@settings(max_examples=80, deadline=None)
def test_the_last_prompts_are_remembered_as_one_list_of_anchors_would(
    prompts: list[tuple[int, list[int]]], most: int
) -> None:
    """Beside a plain list in which each prompt moves its anchors to the end; a replica goes in the middle of it."""
    seen, plain = Seen(most), OrderedDict[int, int]()
    for number, (replica, ids) in enumerate(prompts):
        anchors = [hash(tuple(ids[:end])) for end in range(1, len(ids) + 1)]
        seen.add(anchors, 1 << replica)
        for anchor in anchors:
            plain[anchor] = plain.pop(anchor, 0) | 1 << replica
        while len(plain) > most:
            plain.popitem(last=False)
        if number == 20:
            seen.forget(1)
            plain = OrderedDict((anchor, left) for anchor, mask in plain.items() if (left := mask & ~1))
        assert len(seen) == len(plain) and all(seen.get(anchor) == mask for anchor, mask in plain.items())
        assert seen._listed <= 2 * max(most, len(plain)) + len(anchors)


@given(texts, texts, st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_names_on_paper_are_equal_where_prefixes_are(ids: Tokens, other: Tokens, block: int) -> None:
    keys = PaperKeys(b"nothing to hide here", block)
    one, two = keys.names("", ids), keys.names("", other)
    assert len(one.anchors) == len(ids) // block + 1 and one.length == len(ids)
    assert one.at(len(ids)) != keys.names("ann", ids).at(len(ids))
    for left in range(1, len(ids) + 1):
        for right in range(1, len(other) + 1):
            same = left == right and bool((ids[:left] == other[:right]).all())
            assert (one.at(left) == two.at(right)) == same
