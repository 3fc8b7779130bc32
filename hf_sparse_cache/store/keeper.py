"""Who keeps a shared store within its budget: every process does, without a lock and without an index.

A process that writes looks at the whole store now and then, on its own thread, and deletes what is worth least until
all fits. Two that do so at once delete the same. What each process uses it says in a small file of its own, its lease:
nothing that is in use is deleted, and what was used last or often is kept longest. What a killed writer left, that no
unit needs, goes after a while; an hour protects what is just being written.
"""

from __future__ import annotations

import json
import random
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import DamagedFileError
from . import files
from .addresses import BLOCK, Text, file_of, is_note, is_unit, traces
from .headers import Plain, RefusedFileError, parse_json
from .seal import Seal
from .storage import ListedFile, Storage
from .unit_files import state_record


GRACE_SECONDS = 3600.0  # what is being written, and belongs to nothing yet
LEASE_SECONDS = 120.0  # what is being read
FRESH_SECONDS = 10.0  # a unit whose traces are being written
DAY = 86400.0
KEPT_DAYS = {"leases": 7, "quarantine": 7}
FULL, EASED = 0.95, 0.8  # of the budget: where room is made, and down to where
_MOST_USED = 1000  # units that a lease names
_BEAT_SECONDS = 60.0
_PART = 64  # the budget's part that a process writes, on average, before it looks at the whole store


@dataclass(frozen=True)
class _Needs:
    """What one unit keeps alive: files of keys and values, and places."""

    kv: tuple[str, ...] = ()
    places: frozenset[str] = frozenset()
    tokens: int = 0


_FOREIGN, _DAMAGED = _Needs(tokens=1), _Needs()  # of another key or version; of no use to anybody


@dataclass
class _Census:
    """One look at everything.

    Attributes:
        now: by the clock of the storage.
        used: when each unit was used last, and how often, by its file's name.
    """

    now: float
    total: int = 0
    units: dict[str, ListedFile] = field(default_factory=dict)
    kv: dict[str, ListedFile] = field(default_factory=dict)
    notes: dict[str, ListedFile] = field(default_factory=dict)
    leases: list[ListedFile] = field(default_factory=list)
    quarantine: list[ListedFile] = field(default_factory=list)
    unfinished: list[ListedFile] = field(default_factory=list)
    used: dict[str, tuple[float, int]] = field(default_factory=dict)


class Keeper:
    """Deletes for one process; called on its writing thread alone, but for `uses`.

    Args:
        budget: bytes of everything; None for no limit.

    Attributes:
        deleted: files so far.
    """

    def __init__(self, storage: Storage, seal: Seal, budget: int | None) -> None:
        self._storage, self._seal, self.budget = storage, seal, budget
        name = uuid.uuid4().hex[:12]
        self._lease = f"leases/{name}-{files.own_tag(name)[:12]}"
        self._lock = threading.Lock()
        self._used: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._needs: dict[str, _Needs] = {}
        self._told = self._changed = False
        self._beaten = float("-inf")
        self._room: int | None = None  # bytes that may be written until the next look
        self.deleted = 0

    def uses(self, state: str, now: float) -> bool:
        """A unit was resumed from; returns whether it is the first since others were told (see `beat`)."""
        with self._lock:
            _, count = self._used.pop(state, (0.0, 0))
            self._used[state] = now, count + 1
            first, self._changed = not self._changed, True
            while len(self._used) > _MOST_USED:
                self._used.popitem(last=False)
            return first

    def admits(self, nbytes: int, now: float) -> bool:
        """Whether so much may be written; makes room where that is due."""
        if self.budget is None:
            return True
        if nbytes > EASED * self.budget:
            return False
        due = random.random() * self.budget < nbytes * _PART
        if self._room is None or nbytes > self._room or due:
            self.sweep(now)
        if self._room is None:
            return True
        self._room -= nbytes
        return self._room >= 0

    def beat(self, now: float, soon: bool = False) -> None:
        """Says what this process uses, at most once a minute."""
        with self._lock:
            if not soon and (not self._changed or now - self._beaten < _BEAT_SECONDS):
                return
            said = {state: [round(now - when, 1), count] for state, (when, count) in self._used.items()}
            self._beaten, self._changed = now, False
        self._storage.put(self._lease, json.dumps({"used": said}).encode())

    def sweep(self, now: float) -> None:
        """Looks at everything, and deletes what is due."""
        with suppress(DamagedFileError):  # something else lies in its place, which is named when the writer is idle
            self.beat(now, soon=True)
        census = self._census()
        gone = list(self._stale(census))
        if self.budget is not None and census.total > FULL * self.budget:
            gone += self._victims(census)
        # The units first: what nothing else needs goes only when they are gone.
        for entry in gone:
            self._remove(entry, census)
        if gone or census.total > (self.budget or 0) or random.random() < 0.1:
            for entry in self._orphans(census):
                self._remove(entry, census)
        if self.budget is not None:
            self._room = self.budget - census.total

    def _remove(self, entry: ListedFile, census: _Census) -> None:
        self._storage.remove(entry.name)
        census.total -= entry.nbytes
        self.deleted += 1

    def _census(self) -> _Census:
        found = _Census(0.0)
        for entry in self._storage.walk():
            place, own = entry.name.partition("/")[0], entry.name.rpartition("/")[2]
            kind: dict[str, ListedFile] | list[ListedFile] | None = None
            if place == "leases" and _is_lease(own):
                kind = found.leases
            elif place == "quarantine" and files.proves_itself(file_of(own.removesuffix(".reason"))):
                kind = found.quarantine
            elif "/at/" in entry.name and is_unit(entry.name):
                kind = found.units
            elif "/at/" in entry.name and is_note(entry.name):
                kind = found.notes
            elif "/kv/" in entry.name and files.proves_itself(own):
                kind = found.kv
            elif _is_unfinished(own):
                kind = found.unfinished
            if isinstance(kind, dict):
                kind[entry.name] = entry
            elif kind is not None:
                kind.append(entry)
            found.total += entry.nbytes if kind is not None else 0
        own_lease = [entry.modified for entry in found.leases if entry.name == self._lease]
        found.now = max(own_lease, default=0.0)
        for lease in found.leases:
            self._read_lease(lease, found)
        return found

    def _read_lease(self, lease: ListedFile, found: _Census) -> None:
        with suppress(OSError, DamagedFileError):
            said = parse_json(self._storage.read(lease.name, 0, 2**20))
            used = said.get("used") if isinstance(said, dict) else None
            for state, value in used.items() if isinstance(used, dict) else ():
                if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
                    continue
                last, count = found.used.get(state, (0.0, 0))
                when = lease.modified - max(0.0, float(value[0]))
                found.used[state] = max(last, when), count + max(0, int(value[1]))

    def _stale(self, census: _Census) -> Iterator[ListedFile]:
        """What stays for a time only."""
        for kind, entries in (("leases", census.leases), ("quarantine", census.quarantine)):
            yield from (entry for entry in entries if census.now - entry.modified > KEPT_DAYS[kind] * DAY)
        yield from (entry for entry in census.unfinished if census.now - entry.modified > GRACE_SECONDS)
        if self.budget is not None:
            for kind, entries in (("leases", census.leases), ("quarantine", census.quarantine)):
                room = self.budget / 20
                for entry in sorted(entries, key=lambda entry: -entry.modified):
                    room -= entry.nbytes
                    age = census.now - entry.modified
                    needed = kind == "leases" and age <= 2 * LEASE_SECONDS
                    if room < 0 and not needed and age <= KEPT_DAYS[kind] * DAY:
                        yield entry

    def _victims(self, census: _Census) -> list[ListedFile]:
        """Units of least worth, until the rest fits; what they alone need counts as theirs."""
        assert self.budget is not None
        # Asked once: a file that could not be read, or was replaced meanwhile, would say something else.
        needs = {name: self._needs_of(entry) for name, entry in census.units.items()}
        needed = Counter(name for each in needs.values() for name in each.kv)
        worth = {name: _worth(entry, needs[name], census, needed) for name, entry in census.units.items()}
        missing = census.total - EASED * self.budget
        missing -= sum(entry.nbytes for entry in self._loose(census, needed))
        doomed: list[ListedFile] = []
        for name in sorted(worth, key=lambda name: (worth[name], name)):
            if missing <= 0:
                break
            entry = census.units[name]
            last, _ = census.used.get(file_of(name), (0.0, 0))
            if census.now - last < LEASE_SECONDS or census.now - entry.modified < FRESH_SECONDS:
                continue
            doomed.append(entry)
            del census.units[name]
            missing -= entry.nbytes
            for kv in needs[name].kv:
                needed[kv] -= 1
                missing -= census.kv[kv].nbytes if not needed[kv] and kv in census.kv else 0
        # The deepest first: whoever finds one may rely on those below it.
        order = [name for entry in doomed for name in reversed(needs[entry.name].kv)]
        freed = [census.kv.pop(name) for name in order if not needed[name] and name in census.kv]
        return [*doomed, *freed]

    def _orphans(self, census: _Census) -> Iterator[ListedFile]:
        """Keys and values, and notes, that no unit needs, once they are old enough to belong to nobody."""
        needs = [self._needs_of(entry) for entry in census.units.values()]
        kv = {name for item in needs for name in item.kv}
        places = {name for item in needs for name in item.places}
        places |= {name.rpartition("/")[0] for name in census.units}
        foreign = self._foreign(census)
        yield from self._loose(census, kv)
        for name, entry in census.notes.items():
            if name.rpartition("/")[0] not in places and _space(name) not in foreign and _old(entry, census):
                yield entry
        for entry in [item for item in census.units.values() if self._needs_of(item) is _DAMAGED]:
            if _old(entry, census):
                yield entry
        known = {file_of(name) for name in census.units}
        self._needs = {name: item for name, item in self._needs.items() if name in known}

    def _loose(self, census: _Census, needed: Container[str]) -> list[ListedFile]:
        """Keys and values that no unit needs, as far as what the units of their space need can be read."""
        foreign = self._foreign(census)
        found = [entry for name, entry in census.kv.items() if name not in needed and _space(name) not in foreign]
        return [entry for entry in found if _old(entry, census)]

    def _foreign(self, census: _Census) -> set[str]:
        return {_space(name) for name, entry in census.units.items() if self._needs_of(entry) is _FOREIGN}

    def _needs_of(self, entry: ListedFile) -> _Needs:
        """What a unit needs, from its header."""
        state = file_of(entry.name)
        if state not in self._needs:

            def part(start: int, end: int) -> Plain:
                return self._storage.read(entry.name, start, end)

            try:
                read = files.peek_parts(part, entry.nbytes, self._seal)
                record = state_record(*read)
                text = Text(self._seal, record.space, record.tokens)
                root = entry.name.partition("/")[0]
                if text.root != root:
                    raise DamagedFileError("it lies in the folder of another space")
                kv = tuple(f"{root}/kv/{name}" for _, name in record.kv)
                places = frozenset(text.folder(block) for block in traces(len(record.tokens) // BLOCK))
                self._needs[state] = _Needs(kv, places, len(record.tokens))
            except FileNotFoundError:
                return _DAMAGED
            except OSError:
                return _FOREIGN  # it cannot be read now, so nothing is deleted that it may need
            except RefusedFileError:
                self._needs[state] = _FOREIGN
            except (DamagedFileError, ValueError):
                self._needs[state] = _DAMAGED
        return self._needs[state]


def _worth(entry: ListedFile, needs: _Needs, census: _Census, needed: Mapping[str, int]) -> float:
    """Tokens that a unit saves for each byte, times how often it was used lately."""
    last, count = census.used.get(file_of(entry.name), (0.0, 0))
    shared = sum(census.kv[name].nbytes / needed[name] for name in needs.kv if name in census.kv)
    age = max(census.now - max(entry.modified, last), 0.0) + FRESH_SECONDS
    return needs.tokens * (1 + count) / max(entry.nbytes + shared, 1.0) / age  # somebody may have emptied it


def _space(name: str) -> str:
    return name.partition("/")[0]


def _old(entry: ListedFile, census: _Census) -> bool:
    return census.now - entry.modified > GRACE_SECONDS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _is_lease(own: str) -> bool:
    name, _, tag = own.rpartition("-")
    return bool(name) and tag == files.own_tag(name)[:12]


def _is_unfinished(own: str) -> bool:
    """Whether a name is one that `Folder.put` gives a file until it is whole."""
    name, dot, _ = own.rpartition(files.TEMPORARY)
    head, _, tag = name.rpartition("-")
    return bool(dot) and own.endswith(files.TEMPORARY) and tag == files.own_tag(head)
