"""Memory of what is stored: whose a slot is, when it is given back, and what a process takes."""

import gc
import os
import random
import sys
import threading
from collections import deque
from itertools import pairwise

import numpy as np
import pytest

from hf_sparse_cache.store import slabs


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory comes from numpy")
SIZE = slabs.LEAST_BYTES + 100
SIZES = (SIZE, 300_000, (4 << 20) + 5)
WARM = slabs._WARM_SLOTS


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    """Slabs of this test alone: what other tests have stored may go whenever it is collected."""
    gc.collect()
    monkeypatch.setattr(slabs, "_slabs", {})
    monkeypatch.setattr(slabs, "_warm", deque())


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * slabs._PAGE


def address(array):
    return array.__array_interface__["data"][0]


def living():
    return [slab for refs in slabs._slabs.values() for ref in refs if (slab := ref()) is not None]


def filled(nbytes, value):
    found = slabs.memory(nbytes)
    found[:] = value
    return found


@pytest.mark.parametrize("size", [10, *SIZES])
def test_memory_is_as_large_as_asked_for_and_can_be_written(size):
    found = slabs.memory(size)
    assert found.shape == (size,) and found.dtype == np.uint8 and found.flags.writeable
    found[:] = 7
    assert int(found.sum(dtype=np.int64)) == 7 * size


@linux
def test_what_is_taken_is_what_a_slot_has():
    for size in (*SIZES, slabs.LEAST_BYTES, 8 * slabs.PAGE_BYTES + 1):
        found = slabs.memory(size)
        assert [slab.slot_bytes for slab in living()] == [slabs.taken(size)]
        del found
    assert slabs.taken(slabs.LEAST_BYTES - 1) == slabs.LEAST_BYTES - 1  # lies in the heap
    assert slabs.taken(SIZE, 1) == SIZE < slabs.taken(SIZE)  # as on systems without slabs


@linux
def test_a_slot_is_handed_out_again_once_nobody_holds_it():
    held = [filled(SIZE, 1) for _ in range(8)]  # the first slabs have one slot, and go with it
    places = list(map(address, held))
    assert len(set(places)) == 8
    del held[5]
    assert address(slabs.memory(SIZE)) == places[5]


VIEWS = {
    "a part": lambda array: array[10:20],
    "another type": lambda array: array[:64].view(np.float32),
    "a buffer": lambda array: array.data[5:],
    "a reader of it": lambda array: np.frombuffer(array.data, np.uint8, 16),
}


@linux
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_a_view_of_a_slot_holds_it(view, size):
    array = filled(size, 3)
    held = VIEWS[view](array)
    before = bytes(held)
    del array
    gc.collect()
    others = [filled(size, 9) for _ in range(40)]  # which would write into it
    assert bytes(held) == before and len(others) == 40


@linux
@pytest.mark.parametrize("size", SIZES)
def test_a_slot_that_is_given_back_while_it_is_held_is_written_over(size):
    """The twin: with a slot that does not wait for its holder, the test above sees foreign bytes."""
    array = [filled(size, 3) for _ in range(4)][-1]
    slab = next(slab for ref in slabs._slabs[-(-size // slabs._PAGE) * slabs._PAGE] if (slab := ref()) is not None)
    held = array[10:20]
    slab._take_back((address(array) - address(np.frombuffer(slab.mapping, np.uint8))) // slab.slot_bytes)
    other = filled(size, 9)
    assert bytes(held) != bytes([3] * 10) and other[0] == 9


@linux
@pytest.mark.parametrize("size", SIZES)
def test_a_process_takes_what_is_held_and_no_more(size):
    """Insertions and evictions in any order: neither gaps nor what was held before stay."""
    draw = random.Random(0)
    most, slot = 40 * 2**20 // size, -(-size // slabs._PAGE) * slabs._PAGE
    before = resident()
    held = [filled(size, 1) for _ in range(most)]
    for _ in range(most):
        held[draw.randrange(most)] = filled(size, 2)
    full = resident() - before
    assert 0.95 * most * slot < full <= 1.05 * (most + 1) * slot
    for index in draw.sample(range(most), most // 2):
        held[index] = None
    kept = sum(array is not None for array in held) * slot
    assert resident() - before <= 1.05 * (kept + WARM * slot) + 2**20
    held.clear()
    assert resident() - before <= 2**20


@linux
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_taken_and_given_up_no_two_hold_the_same_byte(seed):
    """Against a model: the value that each holder wrote, and where. Slabs hold no more than what they should."""
    gc.collect()
    known = set(map(id, living()))
    draw = random.Random(seed)
    sizes = [draw.randint(1, 3 * slabs.LEAST_BYTES) for _ in range(6)]
    model, array = {}, None
    for value in range(1, 250):
        if model and draw.random() < 0.45:
            array, written = model.pop(draw.choice([*model]))
            assert array[0] == array[-1] == written
            array = None
        size = draw.choice(sizes)
        model[value] = filled(size, value % 256), value % 256
        spans = sorted((address(array), address(array) + len(array)) for array, _ in model.values())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(set(array.tolist()) == {value} for array, value in model.values())
    mine = [slab for slab in living() if id(slab) not in known]
    held = sum(slab.slots - len(slab.free) - len(slab.warm) for slab in mine)
    assert held == sum(size >= slabs.LEAST_BYTES for size in (len(array) for array, _ in model.values()))
    assert sum(len(slab.warm) for slab in mine) <= WARM
    del mine
    model.clear()
    gc.collect()
    assert {*map(id, living())} <= known


@linux
def test_who_stores_and_evicts_in_turn_writes_to_the_same_pages():
    held = [filled(SIZE, 1) for _ in range(8)]
    places = {address(array) for array in held}
    for index in range(30):
        array = filled(SIZE, 2)
        places.add(address(array))
        held[index % 8] = array
    assert len(places) <= 12  # the first slabs have one slot or two, and go with them


@linux
def test_slabs_go_when_none_of_their_slots_is_held():
    held = [slabs.memory(SIZE) for _ in range(30)]
    size = -(-SIZE // slabs._PAGE) * slabs._PAGE
    assert sum(ref() is not None for ref in slabs._slabs[size]) >= 1
    del held
    gc.collect()
    assert not any(ref() is not None for ref in slabs._slabs[size])


@linux
def test_there_are_few_mappings():
    with open("/proc/self/maps") as file:
        before = len(file.readlines())
    held = [slabs.memory(SIZE) for _ in range(1000)]
    with open("/proc/self/maps") as file:
        assert len(file.readlines()) - before < 30 and held


@linux
def test_threads_never_share_a_slot():
    wrong = []

    def work(value):
        draw = random.Random(value)
        held = []
        for _ in range(300):
            held.append(filled(SIZE, value))
            if len(held) > 5:
                del held[draw.randrange(5)]
            if any(array[0] != value or array[-1] != value for array in held):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@linux
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_process_has_a_copy():
    array = filled(SIZE, 5)
    child = os.fork()
    if not child:
        array[:] = 6
        del array
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert set(array.tolist()) == {5}


@linux
def test_where_no_mapping_is_left_memory_comes_from_the_heap(monkeypatch):
    def none_left(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(slabs, "_mapping", none_left)
    for size in (999_999, (4 << 20) + 1):
        assert len(filled(size, 1)) == size


# -- one slab ---------------------------------------------------------------------------------------------------------


@linux
def test_slabs_double_up_to_their_bound():
    """From one slot on; one of large slots has few of them."""
    held = [slabs.memory(SIZE) for _ in range(40)]
    assert sorted(slab.slots for slab in living()) == [1, 2, 4, 8, 16, 32]
    size = slabs._SLAB_BYTES // 3
    held += [slabs.memory(size) for _ in range(6)]
    assert sorted(slab.slots for slab in living() if slab.slot_bytes == slabs.taken(size)) == [1, 2, 2, 2]
    assert {*slabs._slabs} == {slabs.taken(SIZE), slabs.taken(size)}


@linux
def test_a_slab_gives_its_first_slots_first_and_warm_ones_before():
    slab = slabs._Slab(slabs._PAGE * 9, 3)
    first = [slab.give(10) for _ in range(3)]
    base = address(np.frombuffer(slab.mapping, np.uint8))
    assert [address(array) - base for array in first] == [0, slab.slot_bytes, 2 * slab.slot_bytes]
    assert slab.give(10) is None and [len(array) for array in first] == [10] * 3
    del first[0]
    assert [*slab.warm] == [0] and not slab.free and len(slabs._warm) == 1
    again = slab.give(20)
    assert address(again) == base and not slab.warm and not slabs._warm


@linux
def test_the_oldest_of_the_warm_slots_cools_first():
    slab = slabs._Slab(slabs._PAGE * 9, WARM + 3)
    held = [slab.give(slab.slot_bytes) for _ in range(WARM + 3)]
    pages = np.frombuffer(slab.mapping, np.uint8).reshape(WARM + 3, -1)
    for array in held:
        array[:] = 5
    del array
    order = [3, 1, 0, 2, 4, 6, 5]
    for slot in order:
        held[slot] = None
    assert [*slab.warm] == order[-WARM:] and [*slab.free] == order[: len(order) - WARM][::-1]
    assert [bool(pages[slot].any()) for slot in order] == [False] * 3 + [True] * WARM, "pages are given back"
    slab.cool()
    assert [*slab.warm] == order[-WARM + 1 :] and slab.free[0] == order[-WARM]
    for _ in range(WARM + 1):
        slab.cool()  # with none that is warm, nothing
    assert not slab.warm and len(slab.free) == WARM + 3


@linux
def test_what_is_taken_is_rounded_up_to_pages_where_it_is_large():
    page, least = slabs._PAGE, slabs.LEAST_BYTES
    assert [slabs.taken(nbytes) for nbytes in (0, 1, least - 1)] == [0, 1, least - 1]
    assert slabs.taken(64 * page) == 64 * page and slabs.taken(64 * page + 1) == 65 * page == slabs.taken(65 * page)
    assert slabs.taken(least, page) == -(-least // page) * page
    assert slabs.taken(least + 1, 1000) == -(-(least + 1) // 1000) * 1000 and slabs.taken(least + 5, 1) == least + 5


@linux
def test_small_payloads_and_those_of_other_systems_lie_in_the_heap(monkeypatch):
    slabs.memory(slabs.LEAST_BYTES - 1)
    assert not slabs._slabs
    held = slabs.memory(slabs.LEAST_BYTES)
    assert len(slabs._slabs) == 1 and len(held) == slabs.LEAST_BYTES
    monkeypatch.setattr(slabs, "_slabs", {})
    monkeypatch.setattr(slabs, "PAGE_BYTES", 1)
    assert len(slabs.memory(SIZE)) == SIZE and not slabs._slabs
