"""Random conversations that grow by the answers that `generate()` gave, every tenth answer replayed bit for bit.

A world is one tiny model of six families, one store and a few conversations that take turns: messages are added,
earlier ones edited, answers asked for once more, conversations branched; meanwhile checkpoints are evicted, the store
is resized, moves through its tiers, and is saved and loaded. At the end of a world some of what is stored is run from
nothing over its lineage as well. `python tests/fuzz.py --only fuzz_conversations --seconds 600` says how many
conversations and answers it came to.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fuzz_requests
import torch
from fuzz_requests import BITWISE, POLICIES, REPLAYABLE, World, same_payloads
from tiny_families import SPECIAL
from tiny_models import random_ids
from torch import Tensor

from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.models import prefill, states
from hf_sparse_cache.models.inputs import Row


# Pure Mamba-1; hybrids of both Mambas, one of them with experts; a delta rule; convolutions and a window; attention.
FAMILIES = ("Mamba", "Jamba", "Zamba2", "Qwen3.5", "LFM3", "Llama")
EVERY = 10  # answers of which one is replayed
LONGEST = 320  # tokens of a conversation, after which it begins anew


@dataclass
class Conversation:
    """What was said so far.

    Attributes:
        opening: what it began with.
        turns: for each turn the tokens `(1, length)` up to the answer, and with it.
    """

    opening: Tensor
    turns: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def text(self) -> Tensor:
        return self.turns[-1][1] if self.turns else self.opening


class Chats(World):
    """A world of conversations."""

    families = FAMILIES
    modes = (REPLAYABLE, REPLAYABLE, BITWISE)
    policies = (*["learned"] * len(POLICIES), *POLICIES)

    def __init__(self, seed: int, tally: Counter[str], sabotage: bool = False) -> None:
        super().__init__(seed, tally, sabotage)
        self.openings = [random_ids(self.draw.randint(5, 90), seed=seed * 31 + index) for index in range(2)]
        self.chats = [self.begin() for _ in range(3)]

    # -- conversations ------------------------------------------------------------------------------------------------

    def begin(self) -> Conversation:
        self.tally["conversations"] += 1
        return Conversation(self.draw.choice(self.openings))

    def message(self) -> Tensor:
        """A message of the user, with a special token before and behind it, as chat templates have them."""
        words = random_ids(self.draw.randint(1, 30), self.draw.randrange(1 << 30))
        mark = torch.tensor([[SPECIAL]])
        return torch.cat([mark, words, mark], dim=1)

    def ask(self, chat: Conversation, ids: Tensor) -> None:
        """One answer, which the conversation goes on with."""
        cache, steps = self.handle, self.draw.randint(1, 12)
        mask = torch.ones_like(ids)
        warm = self.generate(ids, mask, cache, steps)
        info = cache.last_request
        assert info is not None
        self.note(
            f"answers {ids.shape[1]} with {steps}, resumed {info.resumed_tokens} captured {info.captured} over "
            f"{info.segments}"
        )
        self.expect(info.resumed_tokens + info.computed_tokens == info.prompt_tokens == ids.shape[1], "tokens add up")
        self.tally["answers"] += 1
        self.tally["resumed" if info.resumed_tokens else "from nothing"] += 1
        if self.tally["answers"] % EVERY == 0 or self.sabotage:
            self.compare_cold(ids, mask, warm, steps, cache)
            self.tally["replayed after a resume" if info.resumed_tokens else "replayed"] += 1
        answer = warm[0].argmax(-1).T  # `(1, steps)`
        chat.turns.append((ids, torch.cat([ids, answer], dim=1)))
        self.prompts = [*self.prompts[-11:], ids]

    # -- what may happen ----------------------------------------------------------------------------------------------

    def goes_on(self) -> None:
        index = self.draw.randrange(len(self.chats))
        if self.chats[index].text.shape[1] > LONGEST:
            self.chats[index] = self.begin()
        chat = self.chats[index]
        self.ask(chat, torch.cat([chat.text, self.message()], dim=1))

    def opens(self) -> None:
        """Another one takes the place of one that is over."""
        self.chats[self.draw.randrange(len(self.chats))] = chat = self.begin()
        self.ask(chat, torch.cat([chat.text, self.message()], dim=1))

    def edited(self) -> None:
        """A message is written anew, and what came behind it is gone."""
        chat = self.draw.choice(self.chats)
        if chat.turns:
            kept = self.draw.randrange(len(chat.turns))
            self.note(f"edits message {kept + 1} of {len(chat.turns)}")
            chat.turns = chat.turns[:kept]
        self.ask(chat, torch.cat([chat.text, self.message()], dim=1))

    def regenerated(self) -> None:
        """The same prompt again; its answer may be longer or shorter."""
        chat = self.draw.choice(self.chats)
        if chat.turns:
            self.note("asks once more")
            ids, _ = chat.turns.pop()
            self.ask(chat, ids)

    def branched(self) -> None:
        """Two conversations with one beginning."""
        chat = self.draw.choice(self.chats)
        self.note(f"branches from one of {len(chat.turns)} turns")
        self.tally["branches"] += 1
        branch = Conversation(chat.opening, list(chat.turns[: self.draw.randint(0, len(chat.turns))]))
        self.chats[self.draw.randrange(len(self.chats))] = branch
        self.ask(branch, torch.cat([branch.text, self.message()], dim=1))

    def saved(self) -> None:
        """What is stored is saved, and one conversation goes on from what is loaded."""
        name, handle = self.draw.choice(list(self.handles.items()))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            count = handle.save_pretrained(folder)
            loaded = SparsePrefixCache.from_pretrained(
                folder, self.model, policy=self.policy, max_memory=None, namespace=name
            )
        self.note(f"saves {count}, loads {len(loaded.store)}")
        self.expect(len(loaded.store) == count, "not all that was saved was loaded")
        own, self.handles = self.handles, {name: loaded}
        with loaded:
            chat = self.draw.choice(self.chats)
            self.ask(chat, torch.cat([chat.text, self.message()], dim=1))
            self.look(loaded)
        self.handles = own

    def step(self) -> None:
        talks: list[Callable[[], None]] = [self.goes_on] * 8 + [self.opens] * 4
        talks += [self.edited, self.regenerated, self.branched] * 2
        rare = [self.evict, self.mark, self.resize, self.reopen, self.saved]
        happens = self.draw.choice(talks if self.sabotage else talks + rare)
        self.tally[f"step: {happens.__name__}"] += 1
        happens()
        self.books()

    def end(self) -> None:
        self.look(self.draw.choice(list(self.handles.values())))

    def look(self, cache: SparsePrefixCache, most: int = 2) -> None:
        """Run some of what is stored of a tenant from nothing, over the lineage that each checkpoint carries."""
        space = cache.server.space.now()[0]
        stored = [item for item in cache.store.checkpoints() if item[0] == space]
        for _, tokens, checkpoint in self.draw.sample(stored, min(most, len(stored))):
            live = cache.server.binding.live_cache()
            ids = torch.from_numpy(tokens).long()
            with torch.no_grad():  # as generate() asks: other rows beside the last one would change its bits
                row = Row(ids, {"use_cache": True, "logits_to_keep": 1})
                output = prefill.replay(cache.server.binding, live, row, checkpoint.lineage)
            kept = cache.server.binding.rounding
            again: Any = states.capture_state(live, kept)
            if checkpoint.final:
                again = states.with_logits(again, output.logits)
            what = f"at {checkpoint.position} over {checkpoint.lineage}"
            self.expect(same_payloads(checkpoint.state, again), f"a stored state {what} is not that of a cold run")
            for segment in checkpoint.chain():
                again = states.capture_kv(live, segment.start, segment.end, kept)
                self.expect(same_payloads(segment.payload, again), f"stored keys and values {what} are not those")
            self.tally["stored states replayed"] += 1


def run(
    seed: int, *, worlds: int | None = None, seconds: float | None = None, steps: int = 40, sabotage: bool = False
) -> Counter[str]:
    """As `fuzz_requests.run`, with worlds of conversations."""
    return fuzz_requests.run(seed, worlds=worlds, seconds=seconds, steps=steps, sabotage=sabotage, kind=Chats)
