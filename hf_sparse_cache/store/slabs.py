"""Memory for what is stored on the host, apart from the heap, and given back to the system when nobody reads it.

What is stored lives long and is made between the short-lived tensors of a prefill. In one heap with them it keeps the
gaps between it from being given back: a process took 1.3 times the bytes that it stored. Here every payload has a slot
of its own, of whole pages, in a slab of slots that are alike.

A slot belongs to the array that `memory` gives, and to all that is a view of it: tensors hold the array, and only when
the last of them is gone are the slot's pages given back and the slot handed out again. There is no lock: slabs are
shared by all threads through operations that Python does as one, and a payload may die anywhere, in whatever thread.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections import deque
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray


LEAST_BYTES = 32 << 10  # of what has a slot, which takes up to a page more: little of a checkpoint
_SLAB_BYTES = 64 << 20  # which a slab grows to, by doubling: only pages that were written to take memory
_WARM_SLOTS = 4  # that keep their pages, so that who gets them next need not wait for others: of about one checkpoint
_PAGE = mmap.PAGESIZE
# Elsewhere pages are given back in other ways, and heaps have other gaps: what is stored takes what it holds.
PAGE_BYTES = _PAGE if sys.platform == "linux" else 1
Bytes = NDArray[np.uint8]


class _Slab:
    """One mapping, cut into slots of one size, each of which is held, warm or free.

    Attributes:
        warm: numbers of slots that were given up a moment ago and still have their pages.
        free: numbers of those that have none.
    """

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes, self.slots = slot_bytes, slots
        self.mapping = _mapping(slot_bytes * slots)
        self.warm: deque[int] = deque()
        self.free = deque(range(slots))

    def give(self, nbytes: int) -> Bytes | None:
        """A slot that nobody holds, for as long as its array or a view of it lives; None where there is none."""
        try:
            slot = self.warm.pop()
            with suppress(ValueError, IndexError):  # not there any more, or another thread is at it
                _warm.remove(weakref.ref(self))
        except IndexError:
            try:
                slot = self.free.popleft()  # the first ones: those behind have never been written to
            except IndexError:
                return None
        return self._given(slot, nbytes)

    def _given(self, slot: int, nbytes: int) -> Bytes:
        found = np.frombuffer(self.mapping, np.uint8, nbytes, slot * self.slot_bytes)
        weakref.finalize(found, self._take_back, slot).atexit = False  # which keeps the slab as long as the slot
        return found

    def _take_back(self, slot: int) -> None:
        """The slot stays warm; one that has been so for longer does not."""
        self.warm.append(slot)
        _warm.append(weakref.ref(self))
        with suppress(IndexError):
            while len(_warm) > _WARM_SLOTS:
                slab = _warm.popleft()()
                if slab is not None:
                    slab.cool()

    def cool(self) -> None:
        """Give the pages of its oldest warm slot back."""
        with suppress(IndexError):
            slot = self.warm.popleft()
            self.mapping.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)
            self.free.appendleft(slot)


# By bytes of a slot. Slots keep their slab alive; one of which none is held goes by itself.
_slabs: dict[int, list[weakref.ref[_Slab]]] = {}
_warm: deque[weakref.ref[_Slab]] = deque()  # the slab of each slot that was given up, in that order


def taken(nbytes: int, page_bytes: int = PAGE_BYTES) -> int:
    """What a payload takes of memory that `memory` gives, and of a budget: of the larger ones, whole pages.

    Args:
        nbytes: of all that it holds.
        page_bytes: where it lies; 1 where `memory` does not make its place.
    """
    return nbytes if nbytes < LEAST_BYTES else -(-nbytes // page_bytes) * page_bytes


def memory(nbytes: int) -> Bytes:
    """Memory for one payload, of any content: `(nbytes,)`, given back when it and all views of it are gone.

    Raises:
        MemoryError: there is none.
    """
    if PAGE_BYTES > 1 and nbytes >= LEAST_BYTES:
        with suppress(OSError):  # no mapping is left, or no memory, which numpy will say
            return _slot(nbytes)
    return np.empty(nbytes, np.uint8)


def _slot(nbytes: int) -> Bytes:
    size = taken(nbytes)
    slots = 1
    alive = []
    for known in _slabs.get(size, ()):
        slab = known()
        if slab is not None:
            found = slab.give(nbytes)
            if found is not None:
                return found
            alive.append(known)
            slots = max(slots, min(2 * slab.slots, _SLAB_BYTES // size))
    slab = _Slab(size, slots)
    found = slab.give(nbytes)
    # Another thread may do the same: a slab that is lost here serves the slots that it has given, and no others.
    _slabs[size] = [*alive, weakref.ref(slab)]
    assert found is not None  # nobody else knew it
    return found


def _mapping(nbytes: int) -> mmap.mmap:
    """Pages that a child process does not share; small ones, since a large one would hold more than one slot."""
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without large pages
        found.madvise(mmap.MADV_NOHUGEPAGE)
    return found
