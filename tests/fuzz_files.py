"""Honest saves and disk folders, changed at random: what is served of them is equal to a cold run, or not served.

Every round takes a copy of an honest folder with files of a user beside it, and does a few things to it: bytes
flipped, cut or added, names swapped, values of JSON replaced (with every checksum right again), links, pipes and
folders in the place of files. Then it is loaded, served from, inspected and saved over. Nothing but a refusal with its
own class comes out, logits are those of a cold run bit for bit, and no file of the user's is changed or gone.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_models
import torch
from forging import Saved
from persisting import cold_logits, handle, logits, question
from transformers import PreTrainedModel

from hf_sparse_cache import CheckpointStore, SparsePrefixCache
from hf_sparse_cache.cli import inspecting
from hf_sparse_cache.cli.screen import Screen
from hf_sparse_cache.exactness import empty_twin
from hf_sparse_cache.store.seal import Seal


KEY = "a key of sufficient length"
MINE = {"model.safetensors": b"weights", "notes.tmp": b"", "state-of-mind.safetensors": b"calm", "kv.txt": b"\0" * 9}
VALUES = [None, True, -1, 0, 1, 2, 31, 2**31, 2**63, 10**30, 1.5, "", "1", "\x1b[2J", "../x", [], {}, [[]], {"a": 1}]
FAMILIES = ("Jamba", "Gemma3")


class Difference(AssertionError):
    """What a changed folder did that it must not, with the seed of its round."""


class Origin:
    """One model with what it honestly saved: plain, with a key, and as a disk tier."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model: PreTrainedModel = tiny_models.build(family)
        self.folder = folder / family
        prompts = [question(2), torch.flip(question(2), [1])]
        store = self.store(self.folder / "disk")
        with handle(self.model, store=store) as cache:
            for ids in prompts:
                logits(self.model, ids, cache)
            cache.mark(prompts[0][:, :40])
            for name, key in (("plain", None), ("keyed", KEY)):
                cache.save_pretrained(self.folder / name, key=key)
        store.close()
        self.asked = [question(3), torch.cat([prompts[1][:, :70], question(4)[:, :20]], dim=1)]
        self.cold = [cold_logits(self.model, ids) for ids in self.asked]

    def store(self, folder: Path) -> CheckpointStore:
        return CheckpointStore(None, "lru", disk_memory="1GiB", disk_dir=folder)


class Round:
    """One copy of a folder, and what happens to it."""

    def __init__(self, origin: Origin, kind: str, folder: Path, draw: random.Random, tally: Counter[str]) -> None:
        self.origin, self.kind, self.draw, self.tally = origin, kind, draw, tally
        self.root = folder / "copy"
        shutil.copytree(origin.folder / kind, self.root)
        (self.units,) = [path for path in self.root.iterdir() if path.is_dir()] if kind == "disk" else [self.root]
        for part in {self.root, self.units}:
            for name, data in MINE.items():
                (part / name).write_bytes(data)
        self.steps: list[str] = []

    def files(self) -> list[Path]:
        return sorted(path for path in self.units.iterdir() if path.name not in MINE)

    def one(self) -> Path:
        return self.draw.choice(self.files())

    # -- what is done to it -------------------------------------------------------------------------------------------

    def change(self) -> None:
        """Does one thing to one file."""
        how = self.draw.choice(
            [self.flip, self.flip, self.cut, self.add, self.gone, self.swapped, self.copied, self.replaced]
            + [self.forged] * 6
        )
        if self.files():
            self.steps.append(how.__name__)
            how()

    def flip(self) -> None:
        path = self.one()
        if path.is_file() and (data := bytearray(path.read_bytes())):
            for _ in range(self.draw.choice((1, 1, 8))):
                near = self.draw.random() < 0.5  # where the header is
                data[self.draw.randrange(min(len(data), 600) if near else len(data))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(data)

    def cut(self) -> None:
        path = self.one()
        if path.is_file():
            data = path.read_bytes()
            path.write_bytes(data[: self.draw.choice((0, 4, 8, 100, max(0, len(data) - 1)))])

    def add(self) -> None:
        path = self.one()
        if path.is_file():
            path.write_bytes(path.read_bytes() + self.draw.randbytes(self.draw.choice((1, 8, 500))))

    def gone(self) -> None:
        path = self.one()
        if path.is_file():
            path.unlink()

    def swapped(self) -> None:
        a, b = self.one(), self.one()
        if a.is_file() and b.is_file():
            first, second = a.read_bytes(), b.read_bytes()
            a.write_bytes(second)
            b.write_bytes(first)

    def copied(self) -> None:
        path = self.one()
        if path.is_file():
            kind = self.draw.choice(("state", "kv", "marks"))
            digits = self.draw.randbytes(22).hex()
            shutil.copy(path, self.units / f"{kind}-{digits[:12]}-{digits[12:]}.safetensors")

    def replaced(self) -> None:
        path = self.one()
        if not path.is_file() or path.is_symlink():
            return
        path.unlink()
        how = self.draw.choice(("pipe", "folder", "nowhere", "itself", "elsewhere"))
        self.steps[-1] += f" by {how}"
        if how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        else:
            path.symlink_to({"nowhere": "/nowhere", "itself": path, "elsewhere": self.root / "notes.tmp"}[how])

    def forged(self) -> None:
        """Replaces a value somewhere in a header or in the manifest, with all checksums right again."""
        if self.kind == "disk":
            (self.units / "sparse_cache.json").write_text('{"units": [], "parts": []}')
        try:
            # Nothing that was changed in another way, as states that are plausible would pass without a key.
            saved = Saved(self.units, Seal(KEY if self.kind == "keyed" else None))
        except (OSError, ValueError):  # a manifest that is none by now
            return
        places: list[Any] = [saved.manifest] * (self.kind != "disk")
        places += [part for unit in saved.units.values() for part in (unit.record, unit.payload)]
        containers = [found for place in places for found in nested(place)]
        if containers:
            container = self.draw.choice(containers)
            key = self.draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
            container[key] = self.draw.choice(VALUES)
            self.steps[-1] += f" {key}"
        try:
            saved.write(Seal())
            self.tally["forged"] += 1
        except (ValueError, TypeError, AttributeError, OSError):  # such a value has no place in a file
            return
        finally:
            if self.kind == "disk":
                (self.units / "sparse_cache.json").unlink()

    # -- what must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Loads, serves, inspects and saves over."""
        strange = {path: os.lstat(path) for path in self.files() if path.is_symlink() or not path.is_file()}
        if self.kind == "disk":
            store = self.origin.store(self.root)
            try:
                with handle(self.origin.model, store=store, policy="none") as cache:
                    self.serve(cache)
                    store.verify()
            finally:
                store.close(flush=False)
        else:
            key = KEY if self.kind == "keyed" else None
            try:
                with SparsePrefixCache.from_pretrained(self.root, self.origin.model, key=key, policy="none") as cache:
                    self.serve(cache)
            except (ValueError, FileNotFoundError) as error:
                self.told(str(error))
                self.tally["refused"] += 1
        self.inspect()
        if self.kind != "disk":
            self.save_over()
        for part in {self.root, self.units}:
            for name, data in MINE.items():
                if (part / name).read_bytes() != data:
                    raise Difference(f"{name} of the user is another")
        for path, before in strange.items():
            after = os.lstat(path)
            if (after.st_ino, after.st_mode) != (before.st_ino, before.st_mode):
                raise Difference(f"{path} was replaced")

    def serve(self, cache: SparsePrefixCache) -> None:
        for ids, cold in zip(self.origin.asked, self.origin.cold, strict=True):
            same = torch.equal(logits(self.origin.model, ids, cache), cold)
            assert cache.last_request is not None
            self.tally["resumed" if cache.last_request.resumed_tokens else "cold"] += 1
            if not same:  # unless what was changed are settings and marks, which cut otherwise
                with empty_twin(cache) as twin:
                    again = logits(self.origin.model, ids, twin)
                same = torch.equal(logits(self.origin.model, ids, cache), again)
            if not same:
                raise Difference(f"{cache.last_request.resumed_tokens} tokens were resumed to other logits")

    def save_over(self) -> None:
        with handle(self.origin.model) as cache:
            logits(self.origin.model, self.origin.asked[0], cache)
            try:
                count = cache.save_pretrained(self.root)
            except ValueError as error:
                self.told(str(error))
                return
        with SparsePrefixCache.from_pretrained(self.root, self.origin.model, policy="none") as loaded:
            self.serve(loaded)
            if len(loaded.store) != count:
                raise Difference(f"{count} units were saved and {len(loaded.store)} loaded")
        self.tally["saved over"] += 1

    def inspect(self) -> None:
        shown: list[str] = []
        with mock.patch.object(Screen, "say", lambda self, text="", style=None: shown.append(text)):
            try:
                inspecting.run(self.root, None, True, Screen())
            except ValueError as error:
                shown = [str(error)]
        for text in shown:
            self.told(text.replace("\n", ""))
        self.tally["inspected"] += 1

    def told(self, text: str) -> None:
        if not text.replace("\n", "").isprintable():
            raise Difference(f"a message steers the terminal: {text!r}")


def nested(value: Any) -> list[Any]:
    """Every object and list in a value from JSON that has something to replace."""
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list):
        inner = value
    else:
        return []
    return ([value] if value else []) + [found for item in inner for found in nested(item)]


def run(seed: int, *, rounds: int | None = None, seconds: float | None = None, sabotage: bool = False) -> Counter[str]:
    """Change folders, one after the other.

    Args:
        seed: of the first round; the next ones count on from it.
        rounds, seconds: when to stop, whichever comes first.
        sabotage: whether checksums always fit, so that the comparison has something to find.

    Returns:
        How much of what was tried.

    Raises:
        Difference: something was not as it had to be; names the round and what was done.
    """
    tally: Counter[str] = Counter()
    started = time.monotonic()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        origins = [Origin(family, base) for family in FAMILIES]
        level = logging.getLogger("hf_sparse_cache").level
        logging.getLogger("hf_sparse_cache").setLevel(logging.CRITICAL)
        stack.callback(logging.getLogger("hf_sparse_cache").setLevel, level)
        stack.enter_context(mock.patch("hf_sparse_cache.store.files.os.fsync"))  # no power fails here
        if sabotage:
            stack.enter_context(mock.patch.object(Seal, "fits", lambda *_: True))
            stack.enter_context(mock.patch("hf_sparse_cache.store.files.same_digits", lambda *_: True))
            # A forgery has its checksums right: only what they are there to find is done.
            stack.enter_context(mock.patch.object(Round, "forged", Round.flip))
        while (rounds is None or tally["rounds"] < rounds) and (
            seconds is None or time.monotonic() - started < seconds
        ):
            number = seed + tally["rounds"]
            _one(number, random.Random(number), origins, tally)
            tally["rounds"] += 1
    return tally


def _one(number: int, draw: random.Random, origins: list[Origin], tally: Counter[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = Round(draw.choice(origins), draw.choice(("plain", "plain", "keyed", "disk")), Path(folder), draw, tally)
        try:
            for _ in range(draw.choice((1, 1, 2, 4))):
                here.change()
            here.check()
        except Exception as error:
            done = ", ".join(here.steps)
            raise Difference(f"round {number}, {here.kind}: {type(error).__name__}: {error}; after {done}") from error
