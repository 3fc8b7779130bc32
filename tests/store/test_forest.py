"""The trees of prompts against plain lists of them: what is shared, what goes first, what is counted, what is kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from growing import grown, hung, ids_of
from reference_store import Blob, common

from hf_sparse_cache.planning.lineage import Lineage, Span
from hf_sparse_cache.planning.views import Shape
from hf_sparse_cache.store.chains import Chains
from hf_sparse_cache.store.forest import Forest, Trail
from hf_sparse_cache.store.tree import (
    DESCRIPTION_BYTES,
    NODE_BYTES,
    TOKEN_BYTES,
    Account,
    Checkpoint,
    KVSegment,
    Match,
    Node,
    nearest,
)


def checked(forest: Forest) -> None:
    """Counts are those of a walk over all nodes; every leaf waits once to be forgotten."""
    trees = [*forest.trees.values(), *forest.leaving]
    edges = [node for tree in trees for node in tree.edges()]
    assert forest.tokens == sum(len(node.tokens) for node in edges) == sum(tree.tokens for tree in trees)
    assert forest.nbytes == sum(tree.nbytes for tree in trees)
    for tree in trees:
        own = [*tree.edges()]
        described = sum(node.described for node in own)
        assert tree.nodes == 1 + len(own) and tree.root.end == 0 and tree.described_bytes == described
        expected = TOKEN_BYTES * sum(len(node.tokens) for node in own) + NODE_BYTES * (1 + len(own)) + described
        assert tree.nbytes == expected
        for node in own:
            assert node.parent is not None and node.parent.children[int(node.tokens[0])] is node
            assert (node.start, node.end) == (node.parent.end, node.parent.end + len(node.tokens))
    waiting = [node for _, _, node in forest._leaves]
    assert len({*waiting}) == len(waiting) and all(node.queued for node in waiting)
    assert {node for tree in forest.trees.values() for node in tree.edges() if not node.children} <= {*waiting}


def drawn(generator: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(token) for token in generator.integers(0, 3, int(generator.integers(1, 9))))


@pytest.mark.parametrize("seed", range(6))
def test_a_forest_knows_what_a_list_of_its_prompts_knows(seed: int) -> None:
    generator, forest = np.random.default_rng(seed), Forest()
    seen: list[tuple[str, tuple[int, ...]]] = []
    for now in range(40):
        ids, space = drawn(generator), "ab"[int(generator.integers(2))]
        path, depth = forest.walk(ids_of(*ids), space)
        assert depth == max((common(ids, other) for name, other in seen if name == space), default=0)
        assert [node.end for node in path[:-1]] == [node.start for node in path[1:]]
        before = forest.version
        whole = grown(forest, ids, now, space)
        known = (space, ids) in seen or any(name == space and other[: len(ids)] == ids for name, other in seen)
        assert whole[-1].end == len(ids) and whole[-1].path_tokens().tolist() == list(ids)
        assert known or forest.version > before
        seen.append((space, ids))
        checked(forest)
        assert {*forest.trees} == {*forest.roots} == {name for name, _ in seen}
    assert not [*forest.nodes("c")] and forest.walk(ids_of(1), "c") == ([], 0)


def leaves(forest: Forest) -> list[Node]:
    return [node for space in forest.trees for node in forest.nodes(space) if not node.children]


@pytest.mark.parametrize("seed", range(6))
def test_the_least_recently_used_leaf_is_forgotten_first(seed: int) -> None:
    generator, forest = np.random.default_rng(seed), Forest()
    for now in range(1, 30):
        grown(forest, drawn(generator), now, "ab"[int(generator.integers(2))])
    forest.forget(forest.nbytes)
    assert len(leaves(forest)) > 5, "what is within the bound stays"
    while forest.nbytes:
        first = min(leaves(forest), key=lambda node: node.last_used)
        others, tree, parent = {*leaves(forest)} - {first}, first.tree, first.parent
        forest.forget(forest.nbytes - 1)
        assert first.parent is None and len(first.tokens) == 0 and others <= {*leaves(forest)}
        assert parent is not None and (parent.children or parent in leaves(forest) or tree.space not in forest.trees)
        checked(forest)
    assert not forest.trees and not forest._leaves
    grown(forest, (1, 2, 3), 40)
    forest.forget(0)
    assert (forest.nbytes, forest.trees) == (0, {})


def test_what_holds_something_is_cut_behind_it_and_forgotten_once_it_does_not() -> None:
    forest = Forest()
    path = grown(forest, tuple(range(20)), 1)
    (node,), kept = path, hung(path, 6)
    segment = Chains(forest).attach(KVSegment(Span((0, 9)), Blob(9), None, node, Account()))
    before = forest.version
    forest.forget(0)
    assert (node.end, node.tokens.tolist(), forest.tokens) == (9, list(range(9)), 9) and forest.version > before
    assert node.kept == 9 and not node.queued and forest._leaves == []
    node.segments.clear()
    forest.released(node)
    version = forest.version
    forest.forget(0)
    assert node.end == 6 and forest.version > version
    forest.released(node)
    version = forest.version
    forest.forget(0)  # is cut already
    assert node.end == 6 and forest.version == version
    node.checkpoints.remove(kept)
    forest.released(node)
    assert node.kept == 0 and forest.nbytes > 0
    forest.forget(0)
    assert forest.nbytes == 0 and segment.end == 9


def test_a_leaf_that_was_used_meanwhile_waits_for_its_new_turn() -> None:
    forest = Forest()
    (old,) = grown(forest, (1, 2, 3), 1)
    (new,) = grown(forest, (5, 6, 7), 2)
    old.last_used = 3
    forest.forget(forest.nbytes - 1)
    assert new.parent is None and old.parent is not None and old.queued
    checked(forest)


@pytest.mark.parametrize("everything", [True, False])
def test_a_space_that_is_cleared_goes_but_for_what_is_in_use(everything: bool) -> None:
    forest = Forest()
    path = grown(forest, tuple(range(20)), 1, "a")
    grown(forest, (*range(4), *range(50, 60)), 2, "a")
    grown(forest, (0, 77), 3, "a")
    grown(forest, (1, 2), 4, "b")
    kept = hung(forest.walk(ids_of(*range(20)), "a")[0], 8)
    version, tree = forest.version, forest.trees["a"]
    forest.clear(None if everything else "a")
    assert forest.version > version and {*forest.trees} == (set() if everything else {"b"})
    assert forest.leaving == {tree} and tree.leaving and [node.end for node in tree.edges()] == [1, 4, 8]
    assert forest.walk(ids_of(*range(20)), "a") == ([], 0) and path[0].latest is None
    checked(forest)
    assert {node.tree.space for _, _, node in forest._leaves} == (set() if everything else {"b"})
    grown(forest, (0, 1), 5, "a")  # another tree
    assert forest.trees["a"].serial != tree.serial
    kept.node.checkpoints.remove(kept)
    forest.released(kept.node)
    assert not forest.leaving and "a" in forest.trees
    checked(forest)
    forest.clear("nobody")
    forest.clear("a")
    checked(forest)
    assert {*forest.trees} == (set() if everything else {"b"})
    forest.forget(0)
    assert forest.nbytes == 0


def test_what_is_cleared_waits_no_more_and_the_others_in_their_order() -> None:
    forest = Forest()
    for now, (tokens, space) in enumerate(
        [((1, 1), "a"), ((2, 1), "b"), ((3, 1), "a"), ((4, 1), "b"), ((5, 1), "b"), ((6, 1), "a"), ((7, 1), "b")]
    ):
        grown(forest, tokens, now, space)
    forest.clear("a")
    order = []
    while forest.trees:
        before = {int(node.tokens[0]): node for node in leaves(forest)}
        forest.forget(forest.nbytes - 1)
        order += [first for first, node in before.items() if node.parent is None]
    assert order == [2, 4, 5, 7]


# -- descriptions -----------------------------------------------------------------------------------------------------


def shape(*ends: int) -> Shape:
    return Shape(20, 0, np.asarray(ends, dtype=np.int64), np.asarray(ends, dtype=np.int64), np.arange(3), 0)


def test_a_description_is_counted_where_its_prompt_ends_and_once() -> None:
    forest = Forest()
    first, second = shape(3), shape(3, 4)
    sizes = [DESCRIPTION_BYTES + 16 * count + 24 for count in (1, 2)]
    path = grown(forest, tuple(range(20)), 1)
    bare = forest.nbytes
    forest.describe(path, first)
    assert forest.nbytes == bare + sizes[0] == forest.trees[""].nbytes and path[-1].described == sizes[0]
    longer = grown(forest, tuple(range(30)), 2)
    bare = forest.nbytes - sizes[0]
    forest.describe(longer, second)
    assert [node.latest for node in longer] == [second, second]
    assert [node.described for node in longer] == [0, sizes[1]] and forest.nbytes == bare + sizes[1]
    checked(forest)
    forest.forget(forest.nbytes - 1)  # the end goes: its prompt is described where it is remembered up to
    assert path[-1].described == sizes[1]
    checked(forest)
    forest.describe(longer, first)  # its last node is gone
    assert path[-1].described == sizes[0] and longer[-1].latest is second and longer[-1].described == 0
    forest.describe(path, None)
    assert path[-1].latest is None and forest.nbytes == bare - NODE_BYTES - 10 * TOKEN_BYTES
    forest.describe([], first)
    checked(forest)


def test_the_description_of_another_prompt_is_not_handed_up() -> None:
    forest = Forest()
    grown(forest, tuple(range(20)), 1)
    long = grown(forest, tuple(range(30)), 1)
    forest.describe(long, shape(3))
    short = grown(forest, tuple(range(20)), 2)
    forest.describe(short, shape(3, 4, 5))
    sizes = [node.described for node in long]
    assert sizes == [DESCRIPTION_BYTES + 48 + 24, DESCRIPTION_BYTES + 16 + 24]
    forest.forget(forest.nbytes - 1)
    assert long[1].parent is None and long[0].described == sizes[0]
    checked(forest)
    forest.forget(0)
    assert forest.nbytes == 0


def test_a_cleared_space_leaves_no_description() -> None:
    forest = Forest()
    path = grown(forest, tuple(range(20)), 1)
    kept = hung(path, 10)
    forest.describe(path, shape(3))
    path[0].recent = path[0]
    forest.clear()
    assert path[0].latest is None and path[0].recent is None and path[0].described == 0
    checked(forest)
    kept.node.checkpoints.clear()
    forest.released(kept.node)
    assert forest.nbytes == 0


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(1, 12))
def test_each_half_of_a_split_edge_has_what_ends_in_it(depth: int) -> None:
    forest, text = Forest(), tuple(range(12))
    path = grown(forest, text, 3)
    (node,) = path
    items = [hung(path, position) for position in (3, 6, 9)]
    other = hung(path, 6, Lineage([2, 6]))
    chains, below = Chains(forest), None
    for start, end in pairwise((0, 3, 6, 9)):
        below = chains.attach(KVSegment(Span((start, end)), Blob(3), below, node, Account()))
    segments = [*node.segments.values()]
    node.passes, node.generated, node.batched, node.latest = 7, True, True, shape(1)
    node.lost, node.refused = 6, 3
    (upper,) = forest.insert(ids_of(*text[:depth]), "", 4)
    assert node.parent is upper and [upper.end, node.start, node.end] == [depth, depth, 12]
    for entries in ([*items, other], segments):
        for entry in entries:
            end = entry.position if isinstance(entry, Checkpoint) else entry.end
            assert entry.node is (upper if end <= depth else node)
    assert [item.position for item in upper.checkpoints] == [at for at in (3, 6, 6, 9) if at <= depth]
    assert [item.position for item in node.checkpoints] == [at for at in (3, 6, 6, 9) if at > depth]
    assert {*upper.segments.values(), *node.segments.values()} == {*segments}
    assert all(
        half.segments[item.parent, item.span] is item for half in (upper, node) for item in half.segments.values()
    )
    assert (upper.passes, upper.last_used, upper.generated, upper.batched) == (7, 3, True, True)
    assert upper.latest is node.latest is not None and upper.recent is node
    assert (upper.lost, node.lost) == ((6, 0) if depth >= 6 else (0, 6))
    assert (upper.refused, node.refused) == ((3, 0) if depth >= 3 else (0, 3))
    assert forest.tokens == 12 and forest.nbytes == 12 * TOKEN_BYTES + 3 * NODE_BYTES and not upper.queued
    checked(forest)


def test_what_happened_at_the_first_token_stays_with_it() -> None:
    forest = Forest()
    (node,) = grown(forest, tuple(range(12)), 1)
    node.lost = node.refused = 1
    (upper,) = grown(forest, (0, 1), 2)
    assert (upper.lost, upper.refused, node.lost, node.refused) == (1, 1, 0, 0)


def test_a_node_that_goes_is_nobodys_latest() -> None:
    """Not of the one above, nor of those that a split put in between."""
    forest = Forest()
    grown(forest, tuple(range(12)), 1)
    grown(forest, tuple(range(8)), 2)
    grown(forest, tuple(range(4)), 3)
    path = forest.walk(ids_of(*range(12)), "")[0]
    root = forest.roots[""]
    root.recent = path[0]
    assert [node.recent for node in path[:2]] == [path[1], path[2]]
    path[0].recent = path[2]  # the latest end of its path
    forest.forget(forest.nbytes - 1)
    assert path[2].parent is None and [node.recent for node in path[:2]] == [None, None]
    assert root.recent is path[0]
    path[0].recent = path[1]
    forest.forget(forest.nbytes - 1)
    assert path[0].recent is None and root.recent is path[0]


# -- trails -----------------------------------------------------------------------------------------------------------


def test_a_trail_goes_with_its_tree() -> None:
    forest, text = Forest(), tuple(range(12))
    trail = Trail(forest, ids_of(*text), "")
    assert trail.known() == ([], 0)
    path = trail.grown(7)
    assert [node.end for node in path] == [12] and path[0].last_used == 7 and trail.known() == (path, 12)
    assert trail.grown(8) is path and path[0].last_used == 7  # all of it exists
    grown(forest, (*text[:5], 99), 9)
    assert [node.end for node in trail.known()[0]] == [5, 12] and trail.known()[1] == 12
    short = Trail(forest, ids_of(*text[:3]), "")
    assert [node.end for node in short.known()[0]] == [5] and short.known()[1] == 3
    assert [node.end for node in short.grown(10)] == [3]
    assert [node.end for node in trail.grown(10)] == [3, 5, 12]
    forest.clear()
    assert trail.known() == ([], 0) and [node.end for node in trail.grown(11)] == [12]


def test_a_trail_leaves_a_cleared_tree_of_which_all_is_in_use() -> None:
    forest = Forest()
    hung(grown(forest, tuple(range(12)), 1), 12)
    trail = Trail(forest, ids_of(*range(12)), "")
    assert trail.known()[1] == 12
    forest.clear()
    assert trail.known() == ([], 0)


def test_tokens_are_found_whatever_array_they_come_in() -> None:
    forest = Forest()
    grown(forest, (0, 2, 4, 6), 1)
    every = np.arange(8, dtype=np.int64)
    assert forest.walk(every[::2], "")[1] == 4
    kept = ids_of(7, 8, 9)
    (node,) = forest.insert(kept, "b", 0)
    kept[:] = 0  # whoever asked may use his array for something else
    assert node.tokens.tolist() == [7, 8, 9] and node.tokens.dtype == np.int32


# -- where a prompt leaves --------------------------------------------------------------------------------------------


def test_a_departure_says_what_stands_there() -> None:
    forest, text = Forest(), tuple(range(12))

    def left(*tokens: int, most: int = 3, space: str = "") -> tuple[int, list[int], bool]:
        found = forest.departure(ids_of(*tokens), space, most)
        return found.position, found.stored.tolist(), found.generated

    assert left(*text) == (0, [], False)  # nothing is known
    path = grown(forest, text, 1)
    assert left(0, 1, 2, 9, 9) == (3, [3, 4, 5], False)
    assert left(0, 1, 2, 9, 9, most=1) == (3, [3], False)
    assert left(7, 8) == (0, [0, 1, 2], False)  # from the start
    assert left(*text, 99) == (12, [], False)  # behind the last there is nothing
    assert left(*text[:4]) == (4, [], False)  # it ends within the path
    assert left(7, 8, space="b") == (0, [], False)
    grown(forest, (*text[:6], 50, 51), 3)
    grown(forest, (*text[:6], 60, 61), 2)
    assert left(*text[:6], 70, 71) == (6, [50, 51], False)  # the latest of those that went on
    path[-1].last_used = 4
    assert left(*text[:6], 70, 71) == (6, [6, 7, 8], False)
    for node in forest.nodes(""):
        node.generated = node.start == 6 and int(node.tokens[0]) == 6
    assert left(*text[:6], 70, 71) == (6, [6, 7, 8], True) and left(0, 1, 9) == (2, [2, 3, 4], False)


@pytest.mark.parametrize(("depth", "generated"), [(3, False), (4, True), (7, True), (8, False), (9, False)])
def test_tokens_that_were_decoded_below_are_a_models_own(depth: int, generated: bool) -> None:
    forest, text = Forest(), tuple(range(12))
    path = grown(forest, text, 1)
    hung(path, 11, Lineage([4]).decoded(8).then([11]))
    assert forest.departure(ids_of(*text[:depth], 99), "", 1).generated == generated


def test_what_stands_there_is_a_copy() -> None:
    forest = Forest()
    (node,) = grown(forest, tuple(range(12)), 1)
    found = forest.departure(ids_of(0, 1, 99), "", 4)
    found.stored[:] = 0
    assert node.tokens.tolist() == list(range(12))


# -- what hangs on a tree ---------------------------------------------------------------------------------------------


def bush() -> tuple[Forest, list[Checkpoint]]:
    """A stem with three branches, one of which has two more."""
    forest = Forest()
    for tokens in ((0, 1, 2, 3, 10, 11), (0, 1, 2, 3, 20, 21, 22, 30), (0, 1, 2, 3, 20, 21, 22, 40), (0, 1, 2, 3, 50)):
        grown(forest, tokens, 1)
    stem, _ = forest.walk(ids_of(0, 1, 2, 3), "")
    ways = [forest.walk(ids_of(0, 1, 2, 3, *rest), "")[0] for rest in ((10, 11), (20, 21, 22, 30), (20, 21, 22, 40))]
    items = [hung(stem, 2), hung(stem, 4), hung(ways[0], 5), hung(ways[0], 6), hung(ways[1], 8), hung(ways[2], 8)]
    return forest, items


def test_the_next_checkpoints_are_found_on_every_way_down_and_the_one_above() -> None:
    forest, items = bush()
    low, stem, left, leaf, *far = items
    assert low.below() == [stem] and left.below() == [leaf] and leaf.below() == []
    assert {*stem.below()} == {left, *far} and len(stem.below()) == 3
    assert stem.below(limit=0) == [] and stem.below(limit=3) == [left] and {*stem.below(limit=4)} == {left, *far}
    assert [item.above() for item in items] == [None, low, stem, left, stem, stem]
    root = forest.roots[""]
    assert {*nearest([*root.children.values()])} == {low, stem} and nearest([]) == []
    branches = [*stem.node.children.values()]
    assert {*nearest(branches)} == {left, leaf, *far} and len(nearest(branches)) == 4
    assert {*nearest(branches, 3)} == {left, leaf} and {*nearest(branches, 4)} == {left, leaf, *far}
    assert nearest(branches, 0) == []


def test_a_checkpoint_is_stored_while_it_hangs_on_its_node() -> None:
    _, items = bush()
    assert all(item.stored for item in items)
    items[0].node.checkpoints.remove(items[0])
    assert [item.stored for item in items[:2]] == [False, True]
    assert items[1].node.find(Lineage([4])) is items[1] and items[1].node.find(Lineage([2, 4])) is None
    assert items[1].node.find(Lineage([2])) is None


def test_a_prompt_goes_on_from_where_enough_of_it_is_left() -> None:
    forest, text = Forest(), tuple(range(12))
    path = grown(forest, text, 1)
    items = [hung(path, position) for position in (1, 2, 5, 10, 11, 12)]
    other = hung(path, 10, Lineage([4, 10]))

    def fitting(length: int, expected: Lineage | None = None, **how: int) -> list[int]:
        match = Match(*forest.walk(ids_of(*text[:length]), ""), True)
        return [item.position for item in match.fitting(length, expected, **how)]

    assert fitting(12) == [10, 10, 5, 2] and fitting(12, tail=3) == [5, 2] and fitting(12, tail=2) == [10, 10, 5, 2]
    assert fitting(12, Lineage([4, 10, 12])) == [10] and fitting(12, Lineage([5, 12])) == [5]
    assert fitting(11) == [5, 2] and fitting(3) == [] and fitting(4) == [2]
    items[-1].final = items[0].final = True
    assert fitting(12) == [12, 10, 10, 5, 2] and fitting(12, tail=2) == [10, 10, 5, 2]
    assert fitting(1) == [1], "the state of a decode step is for that very prompt"
    match = Match(*forest.walk(ids_of(*text), ""), True)
    assert [*match.fitting(12, None, (other,))] == [items[5], items[3], items[2], items[1]]
    assert match.checkpoints(5) == items[:3] and match.checkpoints(99) == [*items[:4], other, *items[4:]]
    assert Match(match.path, 5, True).checkpoints(12) == items[:3]
